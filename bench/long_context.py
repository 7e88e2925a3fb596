"""Long texts, read as a stream: needles in a haystack, bAbI inside a text, loss by position.

Every function takes a `Scorer`, reads without lm-eval and counts tokens on the scorer's bar.
"""

import math
from itertools import product
from pathlib import Path

import numpy as np
import torch

from bench.scorer import Scorer, token_losses
from support.plan import peak_memory
from tasks import NEEDLES, babi, babilong, needle
from train import NonFinite


def needles(scorer: Scorer, haystack: str, lengths, samples, seed=0, words=None) -> list[list]:
    """Accuracy in %, [kinds of needles][lengths].

    A question scores the fraction of its answers that stand in the 128 tokens written after it
    (RULER). words: adjectives and nouns of the keys. ValueError, before anything is read, for a
    length in which a question has no room.
    """
    own = (words, scorer.length)
    made = {}
    for kind, length in product(NEEDLES, lengths):
        seeds = range(seed, seed + samples)
        made[kind, length] = [needle(kind, haystack, length, i, *own) for i in seeds]
    scorer.bar.reset(len(NEEDLES) * samples * sum(lengths))
    values = []
    for kind in NEEDLES:
        row = []
        for length in lengths:
            asked = made[kind, length]
            texts = scorer.generate([scorer.tokens(one["prompt"]) for one in asked], 128)
            found = []
            for one, text in zip(asked, texts, strict=True):
                found.append(np.mean([answer in text for answer in one["answers"]]))
            row.append(100 * float(np.mean(found)))
        values.append(row)
    return values


def needle_words(data_dir: str | None) -> list[str] | None:
    """Adjectives and nouns for the keys of needles, where the folder has them."""
    words = []
    for kind in ("adjective", "noun"):
        file = Path(data_dir or "") / "needle" / f"{kind}list.txt"
        if data_dir is None or not file.is_file():
            return None
        words += file.read_text().split()
    return words


def babilong_accuracy(
    scorer: Scorer, haystack: str, data_dir: str | None, lengths, samples, seed=0
) -> list[list[float]]:
    """Accuracy in %, [bAbI's first five tasks][lengths]: is the answer in the 16 tokens written?"""
    folder = Path(data_dir or "") / "babi" / "en"
    files = [sorted(folder.glob(f"qa{task}_*_test.txt")) for task in range(1, 6)]
    if not all(files):
        raise ValueError(f"--data-dir must have babi/en/qa1_..._test.txt to qa5, got {data_dir!r}")
    scorer.bar.reset(5 * samples * sum(lengths))
    values = []
    for file, *_ in files:
        questions = babi(file)
        row = []
        for length in lengths:
            hits = 0
            for i in range(samples):
                one = questions[np.random.default_rng([seed, i]).integers(len(questions))]
                text = (one["facts"], one["question"], haystack)
                pieces = babilong(*text, length, seed + i, scorer.length)
                hits += one["answer"].lower() in scorer.answer(pieces, 16).lower()
            row.append(100 * hits / samples)
        values.append(row)
    return values


@torch.no_grad()
def position(
    scorer: Scorer, tokens: np.ndarray, seq_len: int, context: int, rows=16, afresh=True
) -> dict:
    """Loss at every position of rows of `context` tokens: is a memory longer than seq_len used?

    The rows are read twice: with the memory kept all the way, and (afresh) with the memory starting
    afresh every seq_len tokens. tokens [N]: its first disjoint rows, at most `rows` of them.

    Returns "kept", "fresh": bits per token of the positions up to seq_len, from there to 2 seq_len,
    to 4 seq_len ... ("to"); "curve": nats of each token [rows, context] in the first reading;
    "peak_mib": most memory held until half way and until the end of it; "rows". Raises ValueError
    where the text is shorter than context, NonFinite.
    """
    if not 1 <= context <= len(tokens):
        legal = f"1 to {len(tokens)} tokens, the length of the text"
        raise ValueError(f"context must be {legal}, got {context}")
    rows = min(rows, len(tokens) // context)
    targets = torch.from_numpy(tokens[: rows * context].astype(np.int64)).view(rows, context)
    inputs = torch.cat([torch.full((rows, 1), scorer.encoding.eot_token), targets[:, :-1]], 1)
    scorer.bar.reset((1 + afresh) * targets.numel())

    def losses(inputs, targets, state=None):
        logits, state = scorer.call(inputs, state)
        scorer.bar.update(inputs.numel())
        return token_losses(logits, targets), state

    # the memory kept
    kept = torch.zeros(rows, context)
    peak = []
    state = None
    step = max(1, scorer.limit // rows)
    for at in range(0, context, step):
        here = slice(at, at + step)
        nats, state = losses(inputs[:, here], targets[:, here], state)
        kept[:, here] = nats
        if at < context / 2 <= at + step or at + step >= context:
            peak.append(peak_memory(scorer.device))
    curves = {"kept": kept.mean(0)}
    if afresh:  # in every window; the last one may be shorter
        fresh = curves["fresh"] = torch.zeros(context)
        whole = context // seq_len * seq_len
        for span, length in ((slice(0, whole), seq_len), (slice(whole, context), context - whole)):
            if span.start == span.stop:
                continue
            at_once = max(1, scorer.limit // length)
            windows = [t[:, span].reshape(-1, length).split(at_once) for t in (inputs, targets)]
            nats = torch.cat([losses(x, y)[0] for x, y in zip(*windows, strict=True)])
            fresh[span] = nats.view(rows, -1).mean(0)
    wrong = ~torch.isfinite(sum(curves.values()))
    if wrong.any():
        raise NonFinite(f"position: the loss at {int(wrong.nonzero()[0])} is not finite")
    # means over spans that double
    to = [min(seq_len, context)]
    while to[-1] < context:
        to.append(min(2 * to[-1], context))
    means = {name: [] for name in curves}
    for name, curve in curves.items():
        for begin, end in zip([0, *to], to, strict=False):
            means[name].append(curve[begin:end].mean().item() / math.log(2))
    result = means | {"to": to, "rows": rows, "curve": kept.numpy()}
    return result | {"peak_mib": [peak[0], peak[-1]]}
