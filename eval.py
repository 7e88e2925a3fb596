"""Evaluate a trained run: on text it has not seen, and on the benchmarks of the paper's tables, beside the published rows.

    python eval.py runs/hope-nano                                 # bits per byte of the held-out part of its own corpus
    python eval.py runs/hope-nano --data book.txt                 # of the whole of another text, or of a folder of texts
    python eval.py runs/x --tasks table2                          # language modelling and common sense (NL table 2)
    python eval.py runs/x --tasks table3                          # in-context recall (NL table 3)
    python eval.py runs/x --tasks table1 --samples 50             # needles in 4K, 8K, 16K tokens of text (NL table 1)
    python eval.py runs/x --tasks babilong --data-dir DIR --lengths 4096,1000000      # bAbI inside long text (NL fig. 9)
    python eval.py runs/x --tasks position --data book.txt --context 1e6              # does it use its memory? (NL fig. 10)
    python eval.py runs/x --tasks piqa,boolq --limit 100          # any task of the harness

Tables 2 and 3 go through EleutherAI's lm-eval (pip install -r requirements-eval.txt), because the published rows did. With
--data-dir DIR no network is needed: the harness's own tasks then read the files in DIR (tests/lm_eval_tasks). Needles,
bAbI and position need neither.

A question with several answers is read once: the state after it, a value, is copied for every answer. Every number goes
to eval.json in the run's folder, with the parameters and training tokens of the model and whether the CMS took steps in
context; without them a small model's row would look as if it could be compared with the published ones.
"""

import argparse
import difflib
import json
import logging
import math
import os
import resource
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import documents, encode, join, load_corpus, n_bytes, tokenizer
from hope import Hope, device_for, first_line, map_state, write_beside
from tasks import NEEDLES, babi, babilong, needle
from train import NonFinite, TrainConfig, precision, read_config, read_metrics, validate, write_json

HERE = Path(__file__).resolve().parent
LOCAL_TASKS = HERE / "tests" / "lm_eval_tasks"

# Column of the paper: the harness's task and metric, the folder of lm-eval that defines it, what guessing scores.
TABLE2 = {
    "Wiki ppl": ("wikitext", "word_perplexity", "wikitext", None),
    "LMB ppl": ("lambada_openai", "perplexity", "lambada", None),
    "LMB acc": ("lambada_openai", "acc", "lambada", 0.0),
    "PIQA": ("piqa", "acc", "piqa", 50.0),
    "Hella": ("hellaswag", "acc_norm", "hellaswag", 25.0),
    "Wino": ("winogrande", "acc", "winogrande", 50.0),
    "ARC-e": ("arc_easy", "acc", "arc", 25.0),
    "ARC-c": ("arc_challenge", "acc_norm", "arc", 25.0),
    "SIQA": ("social_iqa", "acc", "siqa", 33.3),
    "BoolQ": ("boolq", "acc", "super_glue/boolq", 50.0),
}
TABLE3 = {
    "SWDE": ("swde", "contains", "swde", 0.0),
    "NQ": ("nq_open", "exact_match", "nq_open", 0.0),
    "DROP": ("drop", "f1", "drop", 0.0),
    "FDA": ("fda", "contains", "fda", 0.0),
    "SQuAD": ("squad_completion", "contains", "squad_completion", 0.0),
    "TQA": ("triviaqa", "exact_match", "triviaqa", 0.0),
}
FOLDERS = {task: folder for task, _, folder, _ in (TABLE2 | TABLE3).values()}
NOTES = {
    "wikitext": "Wiki ppl from local files is of text with <unk> in it: not comparable with the published rows.",
    "boolq": "BoolQ from local files lacks the title the harness puts before a passage.",
    "nq_open": "NQ, DROP and TQA are the harness's own tasks; the paper does not say which form of them it used.",
}


# ---------------------------------------------------------------------------------------------------------------------
# A run, and bits per byte of its text


def opened(run: str, device: str = "auto"):
    """(model, encoding, config, TrainConfig, device) of a run. FileNotFoundError or ValueError says what is wrong with it."""
    config, where = read_config(run), device_for(device)
    try:
        train = TrainConfig(**config["train"])
    except TypeError as error:
        raise ValueError(f"{run}/config.json is of another version: {error}") from None
    model, name = Hope.load(run)
    encoding = tokenizer(name)
    if model.config.vocab_size != encoding.n_vocab:
        size = model.config.vocab_size
        raise ValueError(f"{run} has a vocabulary of {size} symbols, but its tokenizer {name!r} has {encoding.n_vocab}")
    return model.to(where), encoding, config, train, where


def text_of(run, data, config, train, encoding):
    """(name, tokens, bytes) of `data`, or of the held-out part of the run's corpus."""
    if data is not None:
        files = [content for _, content in documents(data)]
        return data, join(files, encoding), sum(len(content) for content in files)
    corpus = load_corpus(train.data, encoding)
    if corpus.fingerprint() != config["corpus"]:
        raise ValueError(
            f"data {train.data!r} has changed since {run} was trained, so its held-out part may have "
            "been trained on: name a text with --data"
        )
    return f"held-out part of {corpus.name}", corpus.val, corpus.val_bytes


def evaluate(run: str, data: str | None = None, device: str = "auto") -> dict:
    """Scores of a run on its held-out text, or on all of `data`; also written to eval.json.

    Every token is scored exactly once, in windows as long as the training rows, memories starting afresh in each. Bits per
    byte divides by the true number of bytes of the text, so models with different tokenizers compare. Returns
    bits_per_byte, byte_perplexity, token_perplexity, bytes, tokens and on what. Raises FileNotFoundError or ValueError for
    a folder that is no run, a damaged checkpoint, bad data, or a device that is not there.
    """
    model, encoding, config, train, where = opened(run, device)
    text, tokens, size = text_of(run, data, config, train, encoding)
    nats, count = validate(model, tokens, train.batch_size, train.seq_len, where)
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
    record(run, result)
    return result


def record(run: str, result: dict) -> None:
    """Add to eval.json, keeping what other commands wrote there."""
    path = Path(run) / "eval.json"
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        kept = {}
    write_json(path, kept | result)


# ---------------------------------------------------------------------------------------------------------------------
# Scoring and writing in batches


class Scorer:
    """Log-likelihoods and greedy text of a model, (tokens [B, T], state) -> (logits [B, T, vocab], state), in batches.

    Rows of a batch may have different lengths: what pads the end of a row cannot change what came before. max_length: the
    longest input in tokens, longer ones lose their beginning, as in the harness; None: nothing is cut, the state carries
    any length. `bar` counts tokens.
    """

    def __init__(self, model, encoding, device="cpu", max_length: int | None = None, bar: tqdm | None = None):
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length is {max_length}: legal is at least 1 token")
        self.model, self.encoding, self.device, self.max_length = model, encoding, torch.device(device), max_length
        self.bar = bar if bar is not None else tqdm(disable=True)
        # tokens in a call and rows in a batch: as fast as larger ones on a CPU; on a GPU 256 MB of float32 logits
        self.limit, self.rows = (4096, 64) if self.device.type == "cpu" else (2**26 // encoding.n_vocab, 256)

    def call(self, tokens, state=None):
        with precision(self.device):
            return self.model(tokens.to(self.device), state)

    @torch.inference_mode()
    def read(self, tokens, state=None):
        """(logits of the last token [B, vocab], state) after tokens [B, T], which may be longer than one call bears."""
        for piece in tokens.split(max(1, self.limit // len(tokens)), 1):
            logits, state = self.call(piece, state)
            self.bar.update(piece.numel())
        return logits[:, -1], state

    @torch.inference_mode()
    def loglikelihood(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """(nats, whether greedy decoding would write it) of each continuation of a context of at least one token."""
        if self.max_length is not None:
            pairs = [(context[-max(1, self.max_length + 1 - len(end)) :], end) for context, end in pairs]
            if longest := max((len(end) for _, end in pairs if len(end) > self.max_length), default=0):
                raise ValueError(f"a continuation has {longest} tokens: legal is at most max_length, {self.max_length}")
        groups, results = defaultdict(list), [(0.0, True)] * len(pairs)
        for i, (context, end) in enumerate(pairs):
            if end:  # a tokenizer may merge all of it into the context
                groups[tuple(context)].append(i)
        shared = {context: len(group) > 1 for context, group in groups.items()}
        order = sorted(groups, key=lambda context: (shared[context], len(context)), reverse=True)  # the longest first
        while order:
            first = order[0]
            size = min(self.rows, max(1, self.limit // len(first)))
            near = 16 if shared[first] else len(first)  # what a context is longer than the shortest is read for every answer
            batch = [c for c in order[:size] if shared[c] == shared[first] and len(first) - len(c) <= near]
            order = order[len(batch) :]
            cut, state = 0, None
            if shared[first]:  # up to the last token of the shortest: every row keeps one to predict its answer from
                cut = len(batch[-1]) - 1
                if cut:
                    _, state = self.read(torch.tensor([c[:cut] for c in batch]))
            rows = [(len(c) - cut + len(pairs[i][1]) - 1, n, i) for n, c in enumerate(batch) for i in groups[c]]
            self._answers(sorted(rows, reverse=True), cut, state, pairs, results)
        return results

    def _answers(self, rows, cut, state, pairs, results):
        """Fill in results of rows (width, number of its context in the batch, number of the pair), the widest first."""
        while rows:
            width = rows[0][0]
            part = rows[: min(self.rows, max(1, self.limit // width))]
            rows = rows[len(part) :]
            inputs, targets = torch.zeros(len(part), width, dtype=torch.int64), torch.full((len(part), width), -1)
            for r, (n, _, i) in enumerate(part):
                context, end = pairs[i]
                inputs[r, :n] = torch.tensor([*context[cut:], *end[:-1]])
                targets[r, n - len(end) : n] = torch.tensor(end)
            which = torch.tensor([n for _, n, _ in part], device=self.device)
            s = state and map_state(lambda t, which=which: t[which], state)
            nats, hit = torch.empty(len(part), width), torch.empty(len(part), width, dtype=torch.bool)
            step = max(1, self.limit // len(part))
            for at in range(0, width, step):
                here = slice(at, at + step)
                logits, s = self.call(inputs[:, here], s)
                wanted = targets[:, here].to(self.device)
                nats[:, here] = F.cross_entropy(logits.float().mT, wanted, ignore_index=-1, reduction="none")
                hit[:, here] = logits.argmax(-1) == wanted
            for r, (n, _, i) in enumerate(part):
                its = slice(n - len(pairs[i][1]), n)
                results[i] = (-nats[r, its].double().sum().item(), bool(hit[r, its].all()))
                self.bar.update(n - (len(pairs[i][0]) - cut - 1) + (0 if cut else len(pairs[i][0])))

    @torch.inference_mode()
    def generate(self, contexts: list[list[int]], n: int, until: tuple = (), state=None) -> list[str]:
        """What the model writes greedily after each context: at most n tokens, up to a string of `until` or the end of text.

        A batch holds contexts of different lengths: the longer ones go on being read while the shorter ones write. state:
        all contexts go on from there (its batch must be 1).
        """
        results, order = [""] * len(contexts), sorted(range(len(contexts)), key=lambda i: -len(contexts[i]))
        while order:
            longest = len(contexts[order[0]])
            batch = [i for i in order[: self.rows] if longest - len(contexts[i]) <= n]
            order = order[len(batch) :]
            rows = [contexts[i][-self.max_length :] if self.max_length else contexts[i] for i in batch]
            cut = min(map(len, rows))
            s = state and map_state(lambda t, b=len(rows): t.expand(b, *t.shape[1:]), state)
            logits, s = self.read(torch.tensor([row[:cut] for row in rows]), s)
            written, writing = [[] for _ in rows], set(range(len(rows)))
            for t in range(cut, max(map(len, rows)) + n):
                best, step = logits.argmax(-1).tolist(), []
                for r, row in enumerate(rows):
                    step.append(row[t] if t < len(row) else best[r])
                    if t >= len(row) and r in writing:
                        written[r].append(best[r])
                        results[batch[r]], ended = self._text(written[r], until)
                        if ended or len(written[r]) == n:
                            writing.discard(r)
                if not writing:
                    break
                logits, s = self.call(torch.tensor(step)[:, None], s)
                logits = logits[:, -1]
            self.bar.update(sum(len(row) - cut for row in rows))
        return results

    def _text(self, tokens, until):
        """(text up to the first stop, whether there was one)."""
        ended = tokens[-1] == self.encoding.eot_token
        text = self.encoding.decode(tokens[: len(tokens) - ended], errors="replace")
        for stop in until:
            if stop and stop in text:
                text, ended = text[: text.index(stop)], True
        return text, ended


# ---------------------------------------------------------------------------------------------------------------------
# The harness


def adapter(scorer: Scorer, window: int):
    """The model as an lm-eval LM. window: of rolling perplexity, in tokens, as the harness cuts them."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class Adapter(TemplateLM):
        eot_token_id = scorer.encoding.eot_token

        def tok_encode(self, string, add_special_tokens=None, **_):
            return encode(string.encode("utf-8"), scorer.encoding).tolist()

        def loglikelihood(self, requests, disable_tqdm=True):
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests, **_):
            return scorer.loglikelihood([(context, end) for _, context, end in requests])

        def loglikelihood_rolling(self, requests, disable_tqdm=True):
            pairs, owner = [], []
            for i, request in enumerate(requests):
                tokens = self.tok_encode(request.args[0])
                for pair in get_rolling_token_windows(tokens, self.prefix_token_id, window, context_len=1):
                    pairs.append(make_disjoint_window(pair))
                    owner.append(i)
            sums = np.zeros(len(requests))
            np.add.at(sums, owner, [nats for nats, _ in scorer.loglikelihood(pairs)])
            return sums.tolist()

        def generate_until(self, requests, disable_tqdm=True):
            results = [None] * len(requests)
            alike = defaultdict(list)
            for i, request in enumerate(requests):
                context, options = request.args
                if options.get("do_sample"):
                    raise ValueError("the task samples its answers: only greedy ones are supported")
                until = options.get("until") or []
                until = (until,) if isinstance(until, str) else tuple(until)
                alike[options.get("max_gen_toks", 256), until].append((i, self.tok_encode(context)))
            for (n, until), items in alike.items():
                for (i, _), text in zip(items, scorer.generate([t for _, t in items], n, until), strict=True):
                    results[i] = text
            return results

    return Adapter()


def harness(scorer: Scorer, names: list[str], window: int, data_dir: str | None = None, limit: int | None = None,
            optional: bool = False) -> dict[str, dict]:  # fmt: skip
    """{task: {metric: value, "n": items}} of tasks of lm-eval, by name; accuracies from 0 to 1.

    data_dir: read the data from its files, with the task files in tests/lm_eval_tasks. optional: leave out tasks whose
    files are not there. limit: the first so many items of each. ValueError where lm-eval or data is missing or for an
    unknown name.
    """
    if data_dir is not None:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # before datasets is imported: no network at all
        if not Path(data_dir).is_dir():
            raise ValueError(f"data_dir {data_dir!r} is not a folder")
    try:
        import datasets
        import lm_eval.api.task
        from lm_eval.evaluator import evaluate as run_harness
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"lm-eval is not installed ({error}): pip install -r requirements-eval.txt") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = lambda items, **_: items  # ours is the one progress bar

    known = {path.stem for path in LOCAL_TASKS.glob("*.yaml")} if data_dir is not None else set(FOLDERS)
    if data_dir is not None or known >= set(names):  # reading only these folders, not all 14,000 task files, saves seconds
        folder = Path(lm_eval.tasks.__file__).parent
        folders = sorted({str(folder / FOLDERS[name]) for name in known})
        folders += [str(LOCAL_TASKS)] * (data_dir is not None)
        manager = TaskManager(include_defaults=False, include_path=folders, metadata={"data_dir": data_dir})
    else:
        manager = TaskManager()
        known = set(manager.all_tasks)
    if wrong := [name for name in names if name not in known and not optional]:
        near = difflib.get_close_matches(wrong[0], [*known, *COMMANDS], 1)
        hint = f"did you mean {near[0]!r}?" if near else f"legal are {', '.join(COMMANDS)} and the harness's own names"
        where = " with --data-dir" if data_dir is not None else ""
        raise ValueError(f"unknown task {wrong[0]!r}{where}: {hint}")
    loaded = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        if name not in known:
            continue
        try:
            one = manager.load([name if data_dir is None else f"local_{name}"])
        except OSError as error:
            if not optional:
                raise ValueError(f"the data of task {name!r} could not be read: {first_line(error)}") from None
            continue
        for part, entries in loaded.items():
            entries |= one.get(part, {})
    if not loaded["tasks"]:
        raise ValueError(f"data_dir {data_dir!r} holds the files of none of the tasks {', '.join(sorted(set(names) & known))}")

    model = adapter(scorer, window)
    scorer.bar.reset(sum(_size(task, model, limit) for task in loaded["tasks"].values()))
    done = run_harness(model, loaded, limit=limit, bootstrap_iters=0, log_samples=False)
    results = {}
    for task, values in done["results"].items():
        if task in loaded["tasks"]:
            numbers = {key.split(",")[0]: v for key, v in values.items() if "," in key and isinstance(v, (int, float))}
            results[task] = numbers | {"n": done["n-samples"][task]["effective"]}
    return results


def _size(task, model, limit) -> int:
    """Tokens that a task will make a model read: every context once, every continuation."""
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    seen, total = set(), 0
    for request in task.instances:
        context, *rest = (text for text in request.args if isinstance(text, str))
        total += sum(len(text.encode()) for text in rest) + (0 if rest and context in seen else len(context.encode()))
        seen.add(context)
    return total


# ---------------------------------------------------------------------------------------------------------------------
# The tables


def benchmark(columns: dict, scorer: Scorer, window: int, **options) -> dict:
    """Values of a paper's table whose columns are tasks of the harness: {"values", "n", "notes"}; None where data lacks."""
    results = harness(scorer, sorted({task for task, *_ in columns.values()}), window, optional=True, **options)
    values, n = [], []
    for task, metric, _, guess in columns.values():
        value = results.get(task, {}).get(metric)
        values.append(value if value is None or guess is None else 100 * value)
        n.append(results.get(task, {}).get("n"))
    notes = [NOTES[task] for task in results if task in NOTES and (options.get("data_dir") or task == "nq_open")]
    return {"values": values, "n": n, "notes": notes}


def table2(scorer, window, **options):
    """NL table 2: language modelling and common sense, with the average of the eight accuracies."""
    made = benchmark(TABLE2, scorer, window, **options)
    accuracies = made["values"][2:]
    there = [value for value in accuracies if value is not None]
    made["values"].append(sum(there) / len(there) if len(there) == len(accuracies) else None)
    if made["values"][-1] is None and there:
        which = [i for i, value in enumerate(made["values"][:-1]) if i >= 2 and value is not None]
        hope = next(row for row in published("table2")["rows"] if row["model"] == "Hope" and row["parameters"] == "1.3B")
        theirs = sum(hope["values"][i] for i in which) / len(which)
        made["notes"].append(f"Average of the {len(which)} accuracies there are: {sum(there) / len(there):.2f}; of the same "
                             f"columns of the published Hope 1.3B: {theirs:.2f}.")  # fmt: skip
    return made


def table3(scorer, window, **options):
    """NL table 3: short in-context recall."""
    return benchmark(TABLE3, scorer, window, **options)


def table1(scorer: Scorer, haystack: str, lengths: list[int], samples: int, seed: int = 0, words=None) -> dict:
    """NL table 1: needles in a haystack. A question scores the fraction of its answers among the 128 tokens written after
    it, as in RULER."""
    scorer.bar.reset(len(NEEDLES) * samples * sum(lengths))
    values = []
    for kind in NEEDLES:
        values.append([])
        for length in lengths:
            made = [needle(kind, haystack, length, seed + i, words, size=counter(scorer)) for i in range(samples)]
            texts = scorer.generate([tokens_of(scorer, one["prompt"]) for one in made], 128)
            found = [sum(a in text for a in one["answers"]) / len(one["answers"]) for one, text in zip(made, texts, strict=True)]
            values[-1].append(100 * sum(found) / samples)
    return {"values": values, "n": samples, "lengths": lengths, "notes": []}


def babilong_table(scorer: Scorer, haystack: str, data_dir: str, lengths: list[int], samples: int, seed: int = 0) -> dict:
    """NL figure 9: accuracy on bAbI's first five tasks inside a text of `lengths` tokens, read as a stream."""
    folder = Path(data_dir or "") / "babi" / "en"
    files = [sorted(folder.glob(f"qa{task}_*_test.txt")) for task in range(1, 6)]
    if not all(files):
        raise ValueError(f"data_dir {data_dir!r} has no babi/en/qa1..qa5_*_test.txt: name the folder with --data-dir")
    questions = [babi(found[0]) for found in files]
    scorer.bar.reset(len(files) * samples * sum(lengths))
    values = []
    for task in questions:
        values.append([])
        for length in lengths:
            hits = 0
            for i in range(samples):
                one = task[np.random.default_rng([seed, i]).integers(len(task))]
                pieces = babilong(one["facts"], one["question"], haystack, length, seed + i, size=counter(scorer))
                hits += one["answer"].lower() in answer(scorer, pieces, 16).lower()
            values[-1].append(100 * hits / samples)
    return {"values": values, "n": samples, "lengths": lengths, "notes": []}


def answer(scorer: Scorer, pieces, n: int) -> str:
    """What is written after a text that comes in pieces: read in calls of scorer.limit tokens, at constant memory."""
    state, held = None, []
    for piece in pieces:
        held += tokens_of(scorer, piece)
        while len(held) > scorer.limit:
            _, state = scorer.read(torch.tensor([held[: scorer.limit]]), state)
            held = held[scorer.limit :]
    return scorer.generate([held], n, state=state)[0]


def tokens_of(scorer, text):
    return encode(text.encode("utf-8"), scorer.encoding).tolist()


def counter(scorer):
    """Length of a string in the model's tokens."""
    return lambda text: len(encode(text.encode("utf-8"), scorer.encoding))


@torch.inference_mode()
def position(scorer: Scorer, tokens: np.ndarray, seq_len: int, context: int, rows: int = 16) -> dict:
    """Loss at every position of rows of `context` tokens, the memory kept all the way, and the same tokens again with the
    memory starting afresh every seq_len: the difference is what the memory of more than one training row is worth.

    tokens: [N]; the first `rows` disjoint rows of it (fewer where it is short). {"kept", "fresh": bits per token of
    positions up to seq_len, 2 seq_len, 4 seq_len ..., "to": those positions, "peak_mib": peak memory after half and all of
    the first reading, "rows"}; "curve" holds nats per token by position [context]. ValueError where tokens < context.
    """
    if not 1 <= context <= len(tokens):
        raise ValueError(f"context is {context} tokens: legal is 1 to {len(tokens)}, the length of the text")
    rows = min(rows, len(tokens) // context)
    targets = torch.from_numpy(tokens[: rows * context].astype(np.int64)).view(rows, context)
    inputs = torch.cat([torch.full((rows, 1), scorer.encoding.eot_token), targets[:, :-1]], 1)
    scorer.bar.reset(2 * targets.numel())
    curves, peak, state = {}, [], None
    for name, restart in (("kept", context), ("fresh", seq_len)):
        curves[name] = torch.zeros(context)
        step = max(1, min(scorer.limit // rows, restart))
        at = 0
        while at < context:
            to = min(at + step, context, (at // restart + 1) * restart)
            logits, state = scorer.call(inputs[:, at:to], None if at % restart == 0 else state)
            wanted = targets[:, at:to].to(scorer.device)
            curves[name][at:to] = F.cross_entropy(logits.float().mT, wanted, reduction="none").mean(0).cpu()
            scorer.bar.update(rows * (to - at))
            if name == "kept" and (at < context / 2 <= to or to == context):
                peak.append(peak_memory(scorer.device))
            at = to
    if not all(torch.isfinite(curve).all() for curve in curves.values()):
        raise NonFinite("position: the loss is not finite")
    to = [min(seq_len * 2**i, context) for i in range(max(0, math.ceil(math.log2(context / seq_len))) + 1)]
    spans = [slice(begin, end) for begin, end in zip([0, *to], to, strict=False)]
    means = {name: [curve[span].mean().item() / math.log(2) for span in spans] for name, curve in curves.items()}
    return means | {"to": to, "rows": rows, "peak_mib": [peak[0], peak[-1]], "curve": curves["kept"].numpy()}


def peak_memory(device) -> float:
    """Most memory this process has held so far, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# ---------------------------------------------------------------------------------------------------------------------
# Beside the paper


def published(table: str) -> dict:
    """{"title", "columns", "rows"} of a table of the paper (paper_tables.json)."""
    return json.loads((HERE / "paper_tables.json").read_text())[table]


def about(run, model, train, config) -> dict:
    """What must stand beside every number of a run."""
    tokens = max((r["tokens"] for r in read_metrics(Path(run)) if "tokens" in r), default=0)
    return {
        "model": f"{train.model} ({train.preset})",
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": tokens,
        "trained_on": config["corpus"]["name"],
        "cms_steps_in_context": "off",  # the CMS takes no steps on the token clock yet
    }


def markdown(columns: list, rows: list[list]) -> str:
    """A table as text."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def cell(value) -> str:
    if isinstance(value, list):
        return " / ".join(cell(v) for v in value)
    return "-" if value is None else f"{value:,.2f}" if isinstance(value, float) else str(value)


def short(n: int) -> str:
    """1,029,854 -> 1.03M."""
    return next((f"{n / unit:.3g}{name}" for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")) if n >= unit), str(n))


def beside(table: str, made: dict, facts: dict, guess: list | None = None) -> str:
    """Our row, what guessing scores, and the published rows of a table, in markdown, with the notes below."""
    paper = published(table)
    ours = f"**{facts['model']}, this run**"
    rows = [[ours, short(facts["parameters"]), f"{short(facts['training_tokens'])} ({facts['trained_on']})",
             facts["cms_steps_in_context"], *map(cell, made["values"])]]  # fmt: skip
    if guess:
        rows.append(["guessing", "", "", "", *map(cell, guess)])
    for row in paper["rows"]:
        size, tokens = (row[key] or "not stated" for key in ("parameters", "tokens"))
        rows.append([f"{row['model']}, published", size, tokens, "not stated", *map(cell, row["values"])])
    head = ["model", "parameters", "training tokens", "CMS steps in context", *paper["columns"]]
    text = f"{paper['title']}\n\n{markdown(head, rows)}"
    return text + "".join(f"\n\n{note}" for note in made["notes"])


def draw(path: Path, table: str, made: dict, facts: dict) -> None:
    """A panel for each column: the published models as grey dots, Hope dark, this run in colour."""
    from matplotlib.figure import Figure  # slow to import; a Figure of its own needs no display

    paper = published(table)
    last = lambda value: value[-1] if isinstance(value, list) else value  # noqa: E731  of several lengths, the longest
    figure = Figure(figsize=(1.5 * len(paper["columns"]) + 1, 4), layout="constrained")
    for i, (axes, column) in enumerate(zip(figure.subplots(1, len(paper["columns"])), paper["columns"], strict=True)):
        for row in paper["rows"]:
            axes.plot(0, last(row["values"][i]), "o", color="black" if row["model"] == "Hope" else "0.75")
        if made["values"][i] is not None:
            axes.plot(0, last(made["values"][i]), "D", color="tab:red")
        axes.set(title=column, xticks=[], yscale="log" if "ppl" in column else "linear")
    size = f"{short(facts['parameters'])} parameters, {short(facts['training_tokens'])} training tokens"
    figure.suptitle(f"{paper['title']}\nred: {facts['model']}, {size}; black: published Hope; grey: other published rows")
    write_beside(path, lambda beside: figure.savefig(beside, format="png", dpi=120))


def draw_position(path: Path, made: dict, seq_len: int, facts: dict) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes, curve = figure.add_subplot(), made["curve"] / math.log(2)
    edges = np.unique(np.geomspace(1, len(curve) + 1, 40).astype(int)) - 1
    means = [curve[a:b].mean() for a, b in zip(edges, edges[1:], strict=False)]
    axes.plot((edges[:-1] + edges[1:]) / 2 + 1, means, "-", color="tab:blue", label="memory kept")
    for name, style in (("kept", "o"), ("fresh", "x")):
        label = "mean up to there" if name == "kept" else f"the same tokens, memory afresh every {seq_len}"
        axes.plot(made["to"], made[name], style, color="tab:blue" if name == "kept" else "tab:orange", label=label)
    axes.axvline(seq_len, color="0.7", linestyle=":", label="length of training rows")
    axes.set(xscale="log", xlabel="position (tokens)", ylabel="bits per token",
             title=f"{facts['model']}, {short(facts['parameters'])} parameters: loss by position")  # fmt: skip
    axes.legend()
    write_beside(path, lambda beside: figure.savefig(beside, format="png", dpi=120))


# ---------------------------------------------------------------------------------------------------------------------
# Commands

COMMANDS = ("table1", "table2", "table3", "babilong", "position")


def run_tasks(args) -> None:
    """Everything named in --tasks, printed, drawn and added to eval.json."""
    model, encoding, config, train, where = opened(args.run, args.device)
    facts, run = about(args.run, model, train, config), Path(args.run)
    bar = tqdm(total=0, unit=" tokens", unit_scale=True, dynamic_ncols=True, desc="evaluating", file=sys.stderr)
    scorer = Scorer(model, encoding, where, args.max_length, bar)
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not names:
        raise ValueError(f"no task in --tasks {args.tasks!r}: legal are {', '.join(COMMANDS)} and the harness's own names")
    window = args.max_length or train.seq_len
    options = {"data_dir": args.data_dir, "limit": args.limit}
    lengths = _numbers("lengths", args.lengths)
    text = lambda: text_of(args.run, args.data, config, train, encoding)  # noqa: E731
    hay = lambda: encoding.decode(text()[1].tolist(), errors="ignore").replace("<|endoftext|>", "\n")  # noqa: E731
    said, result = [], {}
    for name in names:
        if name in ("table2", "table3"):
            made = (table2 if name == "table2" else table3)(scorer, window, **options)
            guess = [g for *_, g in (TABLE2 if name == "table2" else TABLE3).values()]
            if name == "table2":
                guess.append(sum(guess[2:]) / len(guess[2:]))
            said.append(beside(name, made, facts, guess))
            draw(run / f"{name}.png", name, made, facts)
        elif name == "table1":
            made = table1(scorer, hay(), lengths, args.samples, args.seed, needle_words(args.data_dir))
            made["notes"].append(f"{args.samples} questions a cell, lengths {lengths} in tokens of this run's tokenizer.")
            said.append(beside(name, made, facts))
            draw(run / f"{name}.png", name, made, facts)
        elif name == "babilong":
            made = babilong_table(scorer, hay(), args.data_dir, lengths, args.samples, args.seed)
            rows = [[f"qa{i}", *map(cell, row)] for i, row in enumerate(made["values"], 1)]
            said.append(f"BABILong, accuracy %, {args.samples} questions a cell\n\n" + markdown(["task", *lengths], rows))
        elif name == "position":
            title, tokens, _ = text()
            context = args.context or min(8 * train.seq_len, len(tokens))
            made = position(scorer, tokens, train.seq_len, context)
            draw_position(run / "position.png", made, train.seq_len, facts)
            del made["curve"]
            per_byte = rows_bytes(tokens, made, context, encoding)
            made |= {"text": title, "tokens_per_byte": per_byte}
            rows = [[f"{a + 1:,} to {b:,}", f"{b / train.seq_len:g}x", *(f"{per_byte * x:.4f}" for x in (kept, fresh))]
                    for a, b, kept, fresh in zip([0, *made["to"]], made["to"], made["kept"], made["fresh"], strict=False)]  # fmt: skip
            head = ["positions", "of the training length", "memory kept", f"afresh every {train.seq_len}"]
            said.append(f"Bits per byte by position, {made['rows']} rows of {context:,} tokens of {title}\n\n"
                        + markdown(head, rows) + "\n\nPeak memory of the stream: {:.1f} MiB half way, {:.1f} MiB at the end."
                        .format(*made["peak_mib"]))  # fmt: skip
        else:
            continue
        result[name] = made | facts | options
    if rest := [name for name in names if name not in COMMANDS]:
        made = harness(scorer, rest, window, **options)
        rows = [[task, metric, f"{v:.4f}", values["n"]] for task, values in made.items() for metric, v in values.items()
                if metric != "n"]  # fmt: skip
        said.append(markdown(["task", "metric", "value", "items"], rows))
        for task, values in made.items():
            result[task] = values | facts | options
    bar.close()
    record(args.run, result)
    print(f"{args.run}: {facts['model']}, {facts['parameters']:,} parameters, {facts['training_tokens']:,} training tokens of "
          f"{facts['trained_on']}, CMS steps in context {facts['cms_steps_in_context']}\n")  # fmt: skip
    if args.limit:
        print(f"Only the first {args.limit} items of every task: not a result.\n")
    print("\n\n".join(said))


def rows_bytes(tokens, made, context, encoding) -> float:
    """Tokens per byte of the text that was read: turns bits per token into bits per byte."""
    read = tokens[: made["rows"] * context]
    return len(read) / n_bytes(read, encoding)


def needle_words(data_dir):
    """Adjectives and nouns for the keys of needles, where the folder has them; else None."""
    files = [Path(data_dir or "") / "needle" / f"{kind}list.txt" for kind in ("adjective", "noun")]
    if data_dir is None or not all(file.is_file() for file in files):
        return None
    return [word for file in files for word in file.read_text().split()]


def _numbers(name, text) -> list[int]:
    try:
        numbers = [int(float(part)) for part in text.split(",")]
        if min(numbers) < 1:
            raise ValueError
        return numbers
    except ValueError:
        raise ValueError(f"{name} is {text!r}: legal are whole numbers of tokens, as 4096,8192") from None


def _count(text) -> int:
    """A whole number of at least 1, as 1000000 or 1e6."""
    value = float(text)
    if value < 1 or not value.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(value)


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("--tasks", help=f"{', '.join(COMMANDS)}, or tasks of the harness by name, with commas")
    parser.add_argument("--data", help="a text file or a folder, scored whole (default: the run's held-out text)")
    parser.add_argument("--data-dir", help="folder of benchmark files: no network is used")
    parser.add_argument("--limit", type=_count, help="only the first so many items of a task of the harness: a quick look")
    parser.add_argument("--max-length", type=_count, help="cut contexts to so many tokens (default: not); rolling "
                        "perplexity uses windows of this length (default: the training rows')")  # fmt: skip
    parser.add_argument("--lengths", default="4096,8192,16384", help="of table1 and babilong, in tokens")
    parser.add_argument("--samples", type=_count, default=100, help="questions a cell of table1 and babilong")
    parser.add_argument("--context", type=_count, help="tokens of a row of position (default: 8 training rows)")
    parser.add_argument("--seed", type=int, default=0, help="of needles and babilong")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    args = parser.parse_args(argv)
    try:
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
