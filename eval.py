"""Evaluate a trained run: on text it has not seen, and on the benchmarks of the paper's tables, beside the published rows.

    python eval.py runs/hope-nano                                 # bits per byte of the held-out part of its own corpus
    python eval.py runs/hope-nano --data book.txt                 # of the whole of another text, or of a folder of texts
    python eval.py runs/x --tasks table2                          # language modelling and common sense (NL table 2)
    python eval.py runs/x --tasks table3                          # in-context recall (NL table 3)
    python eval.py runs/x --tasks table1 --samples 50             # needles in 4K, 8K, 16K tokens of text (NL table 1)
    python eval.py runs/x --tasks babilong --data-dir DIR --lengths 4096,1000000      # bAbI inside long text (NL fig. 9)
    python eval.py runs/x --tasks position --data book.txt --context 1e6              # does it use its memory? (NL fig. 10)
    python eval.py runs/x --tasks piqa,boolq --limit 100          # any task of lm-eval, by its name there
    python eval.py tasks --suite formal --models hope,transformer --quick    # the same as python suites.py (NL tables 4, 5)
    python eval.py continual domains --quick                      # the same as python continual.py

Tables 2 and 3 go through lm-eval (harness.py; pip install -r requirements-eval.txt), because the published rows did; with
--data-dir DIR they read released files in DIR and need no network. Needles, bAbI and position need no lm-eval.

Everything is printed, drawn and added to eval.json in the run's folder, and every row says how many parameters the model
has, on how many tokens it was trained and whether the CMS took steps in context: a small model's row is not comparable
with the published ones, and must not look it.
"""

import argparse
import difflib
import math
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from bench.harness import Scorer, harness, token_losses
from bench.tables import beside, cell, draw_position, markdown, published
from support.config import Parser, whole_number
from support.plan import peak_memory
from support.run import Run
from support.vocabulary import n_bytes
from tasks import NEEDLES, babi, babilong, needle
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
    "wikitext": "Wiki ppl: the local file has <unk> in it, so it is not comparable with the published rows.",
    "hellaswag": "Hella: the local file was cleaned by others; where a context's last sentence begins is guessed.",
    "boolq": "BoolQ: the local file lacks the titles that lm-eval's passages begin with.",
}


def evaluate(run: str, data: str | None = None, device: str = "auto") -> dict:
    """Scores of a run on its held-out text, or on all of `data`; also written to eval.json.

    Every token is scored exactly once, in windows as long as the training rows, memories starting afresh in each. Bits per
    byte divides by the true number of bytes of the text, so models with different tokenizers compare. Returns
    bits_per_byte, byte_perplexity, token_perplexity, bytes, tokens and on what. Raises FileNotFoundError or ValueError for
    a folder that is no run, a damaged checkpoint, bad data, or a device that is not there.
    """
    opened = Run.open(run, device)
    train, (text, tokens, size) = opened.train, opened.text(data)
    rows, start = train.micro_batch or train.batch_size, opened.encoding.eot_token
    nats, count = validate(opened.model, tokens, rows, train.seq_len, opened.device, start=start)
    bits = nats / math.log(2) / size
    result = {
        "text": text,
        "bits_per_byte": bits,
        "byte_perplexity": 2**bits,
        "token_perplexity": math.exp(nats / count),
        "bytes": size,
        "tokens": count,
        "seq_len": train.seq_len,
    }
    opened.record(result)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# One function per table: (run, scorer, args) -> (what goes to eval.json, markdown)


def table1(run: Run, scorer: Scorer, args):
    """NL table 1: needles in a haystack, which is args.data or the run's held-out text."""
    values = needles(scorer, run.haystack(args.data), args.lengths, args.samples, args.seed, needle_words(args.data_dir))
    note = f"{args.samples} questions a cell; lengths {', '.join(map(str, args.lengths))} in tokens of this run's tokenizer."
    made = {"values": values, "lengths": args.lengths, "n": args.samples, "notes": [note]}
    return made, beside("table1", made, run)


def needles(scorer: Scorer, haystack: str, lengths: list[int], samples: int, seed: int = 0, words=None) -> list[list[float]]:
    """Accuracy in %, a list over lengths for each kind of needle. A question scores the fraction of its answers that stand
    in the 128 tokens written after it (RULER)."""
    scorer.bar.reset(len(NEEDLES) * samples * sum(lengths))
    values = [[] for _ in NEEDLES]
    for kind, row in zip(NEEDLES, values, strict=True):
        for length in lengths:
            made = [needle(kind, haystack, length, seed + i, words, lambda t: len(scorer.tokens(t))) for i in range(samples)]
            texts = scorer.generate([scorer.tokens(one["prompt"]) for one in made], 128)
            found = [np.mean([a in text for a in one["answers"]]) for one, text in zip(made, texts, strict=True)]
            row.append(100 * float(np.mean(found)))
    return values


def needle_words(data_dir):
    """Adjectives and nouns for the keys of needles, where the folder has them; else None."""
    files = [Path(data_dir or "") / "needle" / f"{kind}list.txt" for kind in ("adjective", "noun")]
    if data_dir is None or not all(file.is_file() for file in files):
        return None
    return [word for file in files for word in file.read_text().split()]


def table2(run: Run, scorer: Scorer, args):
    """NL table 2: language modelling and common sense, with the average of the eight accuracies."""
    made = through_harness(TABLE2, run, scorer, args)
    which = [i for i, value in enumerate(made["values"]) if value is not None and i >= 2]
    mean = sum(made["values"][i] for i in which) / max(1, len(which))
    if 0 < len(which) < 8:
        hope = next(r["values"] for r in published("table2")["rows"] if (r["model"], r["parameters"]) == ("Hope", "1.3B"))
        made["notes"].append(f"Average of the {len(which)} accuracies there are: {mean:.2f}; the published Hope 1.3B in the "
                             f"same columns: {sum(hope[i] for i in which) / len(which):.2f}.")  # fmt: skip
    made["values"].append(mean if len(which) == 8 else None)
    guess = [guess for *_, guess in TABLE2.values()]
    return made, beside("table2", made, run, [*guess, sum(guess[2:]) / 8])


def table3(run: Run, scorer: Scorer, args):
    """NL table 3: short in-context recall."""
    made = through_harness(TABLE3, run, scorer, args)
    made["notes"].append("NQ, DROP (f1) and TQA are lm-eval's own tasks; the paper does not say in which form it asks them.")
    return made, beside("table3", made, run)


def through_harness(columns, run, scorer, args) -> dict:
    """Values of a table whose columns are tasks of lm-eval, None where their data is not at hand."""
    names, window = sorted({task for task, *_ in columns.values()}), args.max_length or run.train.seq_len
    results = harness(scorer, names, window, args.data_dir, args.limit, optional=True)
    values = [results.get(task, {}).get(metric) for task, metric, _ in columns.values()]
    values = [v if v is None or guess is None else 100 * v for v, (*_, guess) in zip(values, columns.values(), strict=True)]
    notes = [note for task, note in LOCAL_NOTES.items() if args.data_dir and task in results]
    if args.limit:
        notes.insert(0, f"Only the first {args.limit} items of every task: a look, not a result.")
    return {"values": values, "lm_eval": results, "notes": notes}


def tasks_by_name(names: list[str], run: Run, scorer: Scorer, args):
    """Any tasks of lm-eval, with all their metrics."""
    results = harness(scorer, names, args.max_length or run.train.seq_len, args.data_dir, args.limit)
    rows = [[task, key, cell(v), r["n"]] for task, r in results.items() for key, v in r.items() if key != "n"]
    return results, markdown(["task", "metric", "value", "items"], rows)


def babilong_table(run: Run, scorer: Scorer, args):
    """NL figure 9 (which prints no numbers): accuracy on bAbI's first five tasks inside a text, read as a stream."""
    files = [sorted((Path(args.data_dir or "") / "babi" / "en").glob(f"qa{task}_*_test.txt")) for task in range(1, 6)]
    if not all(files):
        raise ValueError(f"data_dir {args.data_dir!r} has no babi/en/qa1_..._test.txt to qa5: name the folder with --data-dir")
    haystack, values = run.haystack(args.data), []
    scorer.bar.reset(5 * args.samples * sum(args.lengths))
    for (file, *_) in files:
        questions, row = babi(file), []
        for length in args.lengths:
            hits = 0
            for i in range(args.samples):
                one = questions[np.random.default_rng([args.seed, i]).integers(len(questions))]
                size = lambda text: len(scorer.tokens(text))  # noqa: E731
                pieces = babilong(one["facts"], one["question"], haystack, length, args.seed + i, size)
                hits += one["answer"].lower() in scorer.answer(pieces, 16).lower()
            row.append(100 * hits / args.samples)
        values.append(row)
    rows = [[f"qa{i}", *map(cell, row)] for i, row in enumerate(values, 1)]
    text = f"BABILong, accuracy %, {args.samples} questions a cell, by length in tokens\n\n"
    return {"values": values, "lengths": args.lengths, "n": args.samples}, text + markdown(["task", *args.lengths], rows)


def position_table(run: Run, scorer: Scorer, args):
    """NL figure 10: loss by position in a long text, with a plot."""
    (name, tokens, _), length = run.text(args.data), run.train.seq_len
    context = args.context or min(8 * length, len(tokens))
    made = position(scorer, tokens, length, context)
    draw_position(run, made)
    del made["curve"]
    read = tokens[: made["rows"] * context]
    per_byte = len(read) / n_bytes(read, run.encoding)
    spans = zip([0, *made["to"]], made["to"], made["kept"], made["fresh"], strict=False)
    rows = [[f"{a + 1:,} to {b:,}", f"{b / length:g}x", f"{kept * per_byte:.4f}", f"{fresh * per_byte:.4f}"]
            for a, b, kept, fresh in spans]  # fmt: skip
    head = ["positions", "training length", "memory kept", f"afresh every {length}"]
    half, end = (f"{mib:.1f} MiB" if mib else "unknown" for mib in made["peak_mib"])
    text = f"Bits per byte by position, {made['rows']} x {context:,} tokens of {name}\n\n{markdown(head, rows)}\n\n"
    return made | {"text": name}, f"{text}Peak memory of the stream: {half} half way, {end} at the end."


@torch.inference_mode()
def position(scorer: Scorer, tokens: np.ndarray, seq_len: int, context: int, rows: int = 16) -> dict:
    """Loss at every position of rows of `context` tokens, the memory kept all the way, and of the same tokens again with
    the memory starting afresh every seq_len: the difference is what a memory longer than a training row is worth.

    tokens: [N]; its first disjoint rows, `rows` of them or as many as there are. Returns "kept", "fresh": bits per token
    of the positions up to seq_len, from there to 2 seq_len, to 4 seq_len ... ("to"); "curve": nats per token [context] of
    the first; "peak_mib": most memory held until half way and until the end of the first reading; "rows". ValueError where
    the text is shorter than context.
    """
    if not 1 <= context <= len(tokens):
        raise ValueError(f"context is {context} tokens: legal is 1 to {len(tokens)}, the length of the text")
    rows = min(rows, len(tokens) // context)
    targets = torch.from_numpy(tokens[: rows * context].astype(np.int64)).view(rows, context)
    inputs = torch.cat([torch.full((rows, 1), scorer.encoding.eot_token), targets[:, :-1]], 1)
    scorer.bar.reset(2 * targets.numel())

    def losses(inputs, targets, state=None):
        logits, state = scorer.call(inputs, state)
        scorer.bar.update(inputs.numel())
        return token_losses(logits, targets), state

    kept, fresh, peak, state = torch.zeros(context), torch.zeros(context), [], None
    step = max(1, scorer.limit // rows)
    for at in range(0, context, step):
        here = slice(at, at + step)
        nats, state = losses(inputs[:, here], targets[:, here], state)
        kept[here] = nats.mean(0)
        if at < context / 2 <= at + step or at + step >= context:
            peak.append(peak_memory(scorer.device))
    whole = context // seq_len * seq_len  # the rest is a shorter window
    for span, length in ((slice(0, whole), seq_len), (slice(whole, context), context - whole)):
        if length:
            windows = (t[:, span].reshape(-1, length).split(max(1, scorer.limit // length)) for t in (inputs, targets))
            nats = torch.cat([losses(x, y)[0] for x, y in zip(*windows, strict=True)])
            fresh[span] = nats.view(rows, -1).mean(0)
    if not torch.isfinite(kept + fresh).all():
        raise NonFinite(f"position: the loss at {int((~torch.isfinite(kept + fresh)).nonzero()[0])} is not finite")
    to = [min(seq_len * 2**i, context) for i in range(max(0, math.ceil(math.log2(context / seq_len))) + 1)]
    means = {name: [curve[a:b].mean().item() / math.log(2) for a, b in zip([0, *to], to, strict=False)]
             for name, curve in (("kept", kept), ("fresh", fresh))}  # fmt: skip
    return means | {"to": to, "rows": rows, "peak_mib": [peak[0], peak[-1]], "curve": kept.numpy()}


# ---------------------------------------------------------------------------------------------------------------------
# Commands

TABLES = {"table1": table1, "table2": table2, "table3": table3, "babilong": babilong_table, "position": position_table}


def run_tasks(args) -> None:
    """Everything named in --tasks: printed, drawn, added to eval.json."""
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not names:
        raise ValueError(f"no task in --tasks {args.tasks!r}: legal are {', '.join(TABLES)} and names of lm-eval's tasks")
    others = [name for name in names if name not in TABLES]
    for name in others:
        if near := difflib.get_close_matches(name, TABLES, 1, 0.82):  # nearer than any name of lm-eval's to these
            raise ValueError(f"unknown task {name!r}: did you mean {near[0]!r}?")
    run = Run.open(args.run, args.device)
    facts = run.facts()
    print(f"{args.run}: {facts['model']}, {facts['parameters']:,} parameters, {facts['training_tokens']:,} training tokens of "
          f"{facts['trained_on']}, CMS steps in context {facts['cms_steps_in_context']}", flush=True)  # fmt: skip
    settings = {"data_dir": args.data_dir, "limit": args.limit, "max_length": args.max_length, "seed": args.seed}
    with tqdm(total=0, unit=" tokens", unit_scale=True, dynamic_ncols=True) as bar:
        scorer = Scorer(run.model, run.encoding, run.device, args.max_length, bar)
        for name in [*(name for name in TABLES if name in names), *["others"] * bool(others)]:
            bar.set_description(name)
            if name == "others":
                made, text = tasks_by_name(others, run, scorer, args)
                run.record({task: values | facts | settings for task, values in made.items()})
            else:
                made, text = TABLES[name](run, scorer, args)
                run.record({name: made | facts | settings})
            tqdm.write(f"\n{text}")


def wholes(text: str) -> list[int]:
    """A flag: several, with commas."""
    return [whole_number(part) for part in text.split(",")]


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0 done, 2 bad input."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["continual"]:
        import continual

        return continual.main(argv[1:])
    if argv[:1] == ["tasks"]:
        import suites

        return suites.main(argv[1:])
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("--tasks", help=f"{', '.join(TABLES)}, or names of lm-eval's tasks, with commas")
    parser.add_argument("--data", help="a text file or a folder, scored whole, or shards, of which the held-out part is "
                        "(default: the run's held-out text)")  # fmt: skip
    parser.add_argument("--data-dir", help="folder of benchmark files: no network is used")
    parser.add_argument("--limit", type=whole_number, help="only the first so many items of a task of lm-eval: a look")
    parser.add_argument("--max-length", type=whole_number, help="cut what is read to so many tokens (default: never), and the windows "
                        "of rolling perplexity (default: as long as the training rows)")  # fmt: skip
    parser.add_argument("--lengths", type=wholes, default=[4096, 8192, 16384], help="of table1 and babilong, in tokens")
    parser.add_argument("--samples", type=whole_number, default=100, help="questions a cell of table1 and babilong (default: 100)")
    parser.add_argument("--context", type=whole_number, help="tokens of a row of position (default: 8 training rows)")
    parser.add_argument("--seed", type=int, default=0, help="of table1 and babilong")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")

    try:
        args = parser.parse_args(argv)
        if args.tasks is not None:
            run_tasks(args)
            return 0
        result = evaluate(args.run, args.data, args.device)
    except (ValueError, OSError, NonFinite, torch.OutOfMemoryError) as error:
        print(f"eval.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{args.run} on {result['text']} ({result['bytes']:,} bytes, {result['tokens']:,} tokens)")
    for key, unit in (("bits_per_byte", "bits per byte"), ("byte_perplexity", "perplexity per byte"),
                      ("token_perplexity", "perplexity per token")):  # fmt: skip
        print(f"{result[key]:>10.4f} {unit}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
