"""Evaluate a trained run: on text it has not seen, and on the benchmarks of the paper's tables.

    python eval.py RUN                                # bits per byte of its held-out text
    python eval.py RUN --data book.txt                # of another text, or of a folder of texts
    python eval.py RUN --tasks table2                 # language modelling, reasoning (NL table 2)
    python eval.py RUN --tasks table3                 # in-context recall (NL table 3)
    python eval.py RUN --tasks table1 --samples 50    # needles in 4K, 8K, 16K tokens (NL table 1)
    python eval.py RUN --tasks babilong --data-dir DIR --lengths 4096,1e6        # NL fig. 9
    python eval.py RUN --tasks position --data book.txt --context 1e6            # NL fig. 10
    python eval.py RUN --tasks piqa,boolq --limit 100 # any task of lm-eval, by its name there
    python eval.py --pretrained PATH --tasks table2   # a Llama checkpoint, a GGUF file, an export

Tables 2 and 3 go through lm-eval (bench/harness.py; pip install -r requirements-eval.txt), because
the published rows did; with --data-dir DIR they read released files in DIR and need no network.
Needles, bAbI and position need no lm-eval.

Everything is printed, drawn and added to eval.json in the run's folder. Every row says how many
parameters the model has, on how many tokens it was trained and whether the CMS took steps in
context: a small model's row is not comparable with the published ones, and must not look it.

Small models trained on synthetic tasks: python -m bench suites. Continual learning: python -m bench
continual.
"""

import argparse
import difflib
import math
import sys

import torch
from tqdm import tqdm

from bench.harness import check_there, harness
from bench.long_context import babilong_accuracy, needle_words, needles, position
from bench.scorer import Scorer
from bench.tables import beside, cell, draw_position, markdown, published
from support.flags import DEVICES, Parser, Progress, updates_flag, whole_number, whole_numbers
from support.run import Run
from support.vocabulary import n_bytes
from train import NonFinite, validate

# Column of the paper: task and metric of lm-eval, and what guessing scores.
TABLE2 = {
    "Wiki ppl": ("wikitext", "word_perplexity", None),
    "LMB ppl": ("lambada_openai", "perplexity", None),
    "LMB acc": ("lambada_openai", "acc", 0.0),
    "PIQA": ("piqa", "acc", 50.0),
    "Hella": ("hellaswag", "acc_norm", 25.0),
    "Wino": ("winogrande", "acc", 50.0),
    "ARC-e": ("arc_easy", "acc", 25.0),
    "ARC-c": ("arc_challenge", "acc_norm", 25.0),
    "SIQA": ("social_iqa", "acc", 33.3),
    "BoolQ": ("boolq", "acc", 50.0),
}
TABLE3 = {
    "SWDE": ("swde", "contains", 0.0),
    "NQ": ("nq_open", "exact_match", 0.0),
    "DROP": ("drop", "f1", 0.0),
    "FDA": ("fda", "contains", 0.0),
    "SQuAD": ("squad_completion", "contains", 0.0),
    "TQA": ("triviaqa", "exact_match", 0.0),
}
LOCAL_NOTES = {
    "wikitext": "Wiki ppl: the local file has <unk> in it, so it is not comparable with the "
    "published rows.",
    "hellaswag": "Hella: the local file was cleaned by others; where a context's last sentence "
    "begins is guessed.",
    "boolq": "BoolQ: the local file lacks the titles that lm-eval's passages begin with.",
}


def evaluate(
    folder: str, data: str | None = None, device: str = "auto", cms_updates: str | None = None
) -> dict:
    """`score` of a run by its folder, also written to eval.json.

    cms_updates: see Run.open. Raises FileNotFoundError or ValueError for a folder that is no run, a
    damaged checkpoint, bad data, a device that is not there; NonFinite.
    """
    run = Run.open(folder, device, cms_updates)
    result = score(run, data)
    run.record(result)
    return result


def score(run: Run, data: str | None = None) -> dict:
    """Scores of a run on its held-out text, or on all of `data`.

    Every token is scored once, in windows as long as the training rows, memories starting afresh in
    each. Bits per byte divide by the bytes of the text, so models of any tokenizers compare.
    """
    text, tokens, size = run.text(data)
    config = run.config
    rows = 4 * (config.micro_batch or config.batch_size)  # no graph, so there is room
    start = run.encoding.eot_token
    nats, count = validate(run.model, tokens, rows, config.seq_len, run.device, start, show=True)
    bits = nats / math.log(2) / size
    return {
        "text": text,
        "bits_per_byte": bits,
        "byte_perplexity": 2**bits,
        "token_perplexity": math.exp(nats / count),
        "bytes": size,
        "tokens": count,
        "seq_len": config.seq_len,
        "cms_steps_in_context": run.model.config.cms_updates,
    }


# --------------------------------------------------------------------------------------------------
# Tables 2 and 3: tasks of lm-eval


def table2(run: Run, scorer: Scorer, args) -> tuple[dict, str]:
    """NL table 2: language modelling and common sense, with the average of the eight accuracies."""
    made = through_harness(TABLE2, run, scorer, args)
    values = made["values"]
    there = [i for i, value in enumerate(values) if value is not None and i >= 2]
    mean = sum(values[i] for i in there) / max(1, len(there))
    if 0 < len(there) < 8:
        paper = {(row["model"], row["parameters"]): row for row in published("table2")["rows"]}
        theirs = [paper["Hope", "1.3B"]["values"][i] for i in there]
        made["notes"].append(
            f"Average of the {len(there)} accuracies there are: {mean:.2f}; the published Hope "
            f"1.3B in the same columns: {sum(theirs) / len(there):.2f}."
        )
    values.append(mean if len(there) == 8 else None)
    guess = [guess for *_, guess in TABLE2.values()]
    return made, beside("table2", made, run, [*guess, sum(guess[2:]) / 8])


def table3(run: Run, scorer: Scorer, args) -> tuple[dict, str]:
    """NL table 3: short in-context recall."""
    made = through_harness(TABLE3, run, scorer, args)
    made["notes"].append(
        "NQ, DROP (f1) and TQA are lm-eval's own tasks; the paper does not say in which form it "
        "asks them."
    )
    return made, beside("table3", made, run)


def through_harness(columns: dict, run: Run, scorer: Scorer, args) -> dict:
    """Values of a table whose columns are tasks of lm-eval, None where their data is not there."""
    names = sorted({task for task, *_ in columns.values()})
    window = args.max_length or run.config.seq_len
    results = harness(scorer, names, window, args.data_dir, args.limit, optional=True)
    values = []
    for task, metric, guess in columns.values():
        value = results.get(task, {}).get(metric)
        is_accuracy = guess is not None
        values.append(100 * value if is_accuracy and value is not None else value)
    notes = [note for task, note in LOCAL_NOTES.items() if args.data_dir and task in results]
    if args.limit:
        notes.insert(0, f"Only the first {args.limit} items of every task: a look, not a result.")
    return {"values": values, "lm_eval": results, "notes": notes}


def tasks_by_name(names: list[str], run: Run, scorer: Scorer, args) -> tuple[dict, str]:
    """Any tasks of lm-eval, with all their metrics."""
    window = args.max_length or run.config.seq_len
    results = harness(scorer, names, window, args.data_dir, args.limit)
    rows = []
    for task, values in results.items():
        for metric, value in values.items():
            if metric != "n":
                rows.append([task, metric, cell(value), values["n"]])
    return results, markdown(["task", "metric", "value", "items"], rows)


# --------------------------------------------------------------------------------------------------
# Long texts: needles, bAbI, loss by position


def table1(run: Run, scorer: Scorer, args) -> tuple[dict, str]:
    """NL table 1: needles in a haystack, which is args.data or the run's held-out text."""
    haystack = haystack_of(run, args.data)
    words = needle_words(args.data_dir)
    values = needles(scorer, haystack, args.lengths, args.samples, args.seed, words)
    lengths = ", ".join(map(str, args.lengths))
    note = f"{args.samples} questions a cell; lengths {lengths} in tokens of this run's tokenizer."
    made = {"values": values, "lengths": args.lengths, "n": args.samples, "notes": [note]}
    return made, beside("table1", made, run)


def haystack_of(run: Run, data: str | None) -> str:
    """The text of `data`, or the run's held-out text, to hide something in."""
    _, tokens, _ = run.text(data)
    tokens = tokens[tokens != run.encoding.eot_token]
    return run.encoding.decode(tokens.tolist(), errors="ignore")


def babilong_table(run: Run, scorer: Scorer, args) -> tuple[dict, str]:
    """NL figure 9 (no numbers printed): accuracy on bAbI's first five tasks inside a text."""
    haystack = haystack_of(run, args.data)
    lengths = args.lengths
    values = babilong_accuracy(scorer, haystack, args.data_dir, lengths, args.samples, args.seed)
    rows = [[f"qa{i}", *map(cell, row)] for i, row in enumerate(values, 1)]
    title = f"BABILong, accuracy %, {args.samples} questions a cell, by length in tokens"
    made = {"values": values, "lengths": lengths, "n": args.samples}
    return made, f"{title}\n\n{markdown(['task', *lengths], rows)}"


def position_table(run: Run, scorer: Scorer, args) -> tuple[dict, str]:
    """NL figure 10: loss by position in a long text, with a plot."""
    name, tokens, _ = run.text(args.data)
    length = run.config.seq_len
    context = args.context or min(8 * length, len(tokens))
    made = position(scorer, tokens, length, context)
    draw_position(run, made)
    del made["curve"]
    read = tokens[: made["rows"] * context]
    tokens_per_byte = len(read) / n_bytes(read, run.encoding)
    rows = []
    begin = 0
    for end, kept, fresh in zip(made["to"], made["kept"], made["fresh"], strict=True):
        both = [f"{bits * tokens_per_byte:.4f}" for bits in (kept, fresh)]
        rows.append([f"{begin + 1:,} to {end:,}", f"{end / length:g}x", *both])
        begin = end
    head = ["positions", "training length", "memory kept", f"afresh every {length}"]
    title = f"Bits per byte by position, {made['rows']} x {context:,} tokens of {name}"
    half, end = (f"{mib:.1f} MiB" if mib else "unknown" for mib in made["peak_mib"])
    memory = f"Peak memory of the stream: {half} half way, {end} at the end."
    return made | {"text": name}, f"{title}\n\n{markdown(head, rows)}\n\n{memory}"


# --------------------------------------------------------------------------------------------------
# The command

TABLES = {
    "table1": table1,
    "table2": table2,
    "table3": table3,
    "babilong": babilong_table,
    "position": position_table,
}
MOVED = {"tasks": "python -m bench suites", "continual": "python -m bench continual"}


def opened(args) -> Run:
    """The run, or the checkpoint, that the command names. ValueError unless it names one."""
    if (args.run is None) == (args.pretrained is None):
        raise ValueError("eval.py needs the folder of a run, or --pretrained PATH (--help)")
    if args.run is not None:
        return Run.open(args.run, args.device, args.cms_updates)
    return Run.pretrained(args.pretrained, args.device, args.cms_updates)


def run_tasks(args) -> None:
    """Everything named in --tasks: printed, drawn, added to eval.json."""
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not names:
        legal = f"{', '.join(TABLES)} or names of lm-eval's tasks"
        raise ValueError(f"--tasks must be {legal}, got {args.tasks!r}")
    others = [name for name in names if name not in TABLES]
    for name in others:
        # nearer than any name of lm-eval's is to these
        near = difflib.get_close_matches(name, TABLES, 1, 0.82)
        if near:
            raise ValueError(f"unknown task {name!r}: did you mean {near[0]!r}?")
    run = opened(args)
    if others or {"table2", "table3"} & {*names}:
        check_there(args.data_dir)
    facts = run.facts()
    training = "unknown" if facts['training_tokens'] is None else f"{facts['training_tokens']:,}"
    print(
        f"{args.run or args.pretrained}: {facts['model']}, {facts['parameters']:,} parameters, "
        f"{training} training tokens of {facts['trained_on']}, "
        f"CMS steps in context {facts['cms_steps_in_context']}",
        flush=True,
    )
    settings = {name: getattr(args, name) for name in ("data_dir", "limit", "max_length", "seed")}
    with Progress(total=0, unit=" tokens", unit_scale=True) as bar:
        scorer = Scorer(run.model, run.encoding, run.device, args.max_length, bar)
        for name, table in TABLES.items():
            if name in names:
                bar.set_description(name)
                made, text = table(run, scorer, args)
                tqdm.write(f"\n{text}")
                run.record({name: made | facts | settings})
        if others:
            bar.set_description("others")
            made, text = tasks_by_name(others, run, scorer, args)
            tqdm.write(f"\n{text}")
            run.record({task: values | facts | settings for task, values in made.items()})


def parser() -> Parser:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = {"type": whole_number}
    p.add_argument("run", nargs="?", help="folder of the run")
    checkpoint = "instead: a Llama checkpoint's folder, a GGUF file, or what hope.py exported"
    where = "eval.json goes to runs/pretrained-NAME"
    p.add_argument("--pretrained", metavar="PATH", help=f"{checkpoint}; {where}")
    p.add_argument("--tasks", help=f"{', '.join(TABLES)}, or names of lm-eval's tasks, with commas")
    data = "a text file or a folder, scored whole, or shards, of which the held-out part is"
    p.add_argument("--data", help=f"{data} (default: the run's held-out text)")
    p.add_argument("--data-dir", help="folder of benchmark files: no network is used")
    p.add_argument("--limit", **number, help="only so many items of a task of lm-eval: a look")
    longest = "cut what is read to so many tokens (default: never), and the windows of rolling"
    windows = f"{longest} perplexity (default: as long as the training rows)"
    p.add_argument("--max-length", **number, help=windows)
    lengths = "of table1 and babilong, in tokens (default: 4096,8192,16384)"
    p.add_argument("--lengths", type=whole_numbers, default=[4096, 8192, 16384], help=lengths)
    samples = "questions a cell of table1 and babilong (default: 100)"
    p.add_argument("--samples", **number, default=100, help=samples)
    p.add_argument("--context", **number, help="tokens of a row of position (default: 8 rows)")
    p.add_argument("--seed", type=int, default=0, help="of table1 and babilong (default: 0)")
    p.add_argument("--device", default="auto", help=f"{DEVICES} (default: auto)")
    updates_flag(p)
    return p


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0 done, 2 bad input or a failed evaluation."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and argv[0] in MOVED:
            raise ValueError(f"this command is now `{MOVED[argv[0]]} ...`")
        args = parser().parse_args(argv)
        if args.tasks is not None:
            run_tasks(args)
            return 0
        run = opened(args)
        result = score(run, args.data)
    except (ValueError, OSError, NonFinite, torch.OutOfMemoryError) as error:
        print(f"eval.py: error: {error}", file=sys.stderr)
        return 2
    size = f"{result['bytes']:,} bytes, {result['tokens']:,} tokens"
    steps = f"CMS steps in context {result['cms_steps_in_context']}"
    print(f"{args.run or args.pretrained} on {result['text']} ({size}), {steps}")
    print(f"{result['bits_per_byte']:>10.4f} bits per byte")
    print(f"{result['byte_perplexity']:>10.4f} perplexity per byte")
    print(f"{result['token_perplexity']:>10.4f} perplexity per token")
    run.record(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
