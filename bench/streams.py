"""What continual learning learns from: domains of text, groups of classes, and novels to read once.

A stage is what is learned before something else comes. It has

    steps(quick)             how many training steps it takes
    loss(model, seed, step)  (loss of the batch of a step, its number of tokens)
    examples(model, quick)   losses of single examples, for the Fisher information of EWC
    score(model, seen)       how well it is known, where `seen` are the stages trained on so far

Every set of stages is made twice: scored on text to choose settings on, and on text to report. The
folder of the data sets holds novels/, tinyshakespeare/, wikitext2/, clinc150/, banking77/ in their
released form; code is this Python's standard library. Without a folder, all is made of the latter.
"""

import csv
import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from hope import loss_fn
from support.corpus import batch, documents, join
from support.vocabulary import encode, n_bytes, tokenizer
from train import validate

TURN = 512  # bytes of a novel, then of code
FRONT_MATTER = 20_000  # bytes at the beginning of a book that are not read
WORDS = 4096  # hash buckets of words: no vocabulary is learned from any data
LENGTH = 16  # words of a query that are read
PACKAGES = ("asyncio", "email", "encodings", "multiprocessing")  # domains without a folder
EPOCHS = 4  # of a stage of classes


def existing(data, *parts) -> Path:
    """A file or folder below `data`. ValueError where it is not there."""
    path = Path(data, *parts)
    if not path.exists():
        inside = "/".join(parts)
        raise ValueError(f"{path} does not exist: --data must name the folder that holds {inside}")
    return path


# --------------------------------------------------------------------------------------------------
# Domains of text


class Domain:
    """Text of one kind; bits per byte of its held-out part. train, held_out: tokens [N]."""

    def __init__(self, name, train, held_out, tokens=60_000):
        self.name = name
        self.train = train
        self.held_out = held_out
        self.tokens = tokens  # to train on

    def steps(self, quick):
        return 5 if quick else self.tokens // (4 * 128)

    def loss(self, model, seed, step):
        inputs, targets = batch(self.train, 4, 128, seed, step)
        return loss_fn(model(inputs)[0], targets), inputs.numel()

    def examples(self, model, quick):
        for step in range(8 if quick else 32):
            inputs, targets = batch(self.train, 1, 128, 10**6, step)
            yield loss_fn(model(inputs)[0], targets)

    def score(self, model, seen):
        nats, _ = validate(model, self.held_out, 16, 128, "cpu")
        return nats / math.log(2) / n_bytes(self.held_out, tokenizer())


def domains(data, quick=False):
    """Stages code, Shakespeare, novels, WikiText: (to choose settings on, to report).

    What is held out are files, or the end of one file; 9,216 bytes of it are scored, 1,024 where it
    must be quick. Without data: four packages of the standard library.
    """
    scored = 1_024 if quick else 9_216
    if data is None:
        parts = dict.fromkeys(PACKAGES, b"")
        for name, text in documents("stdlib"):
            if (package := name.split("/")[0]) in parts:
                parts[package] += text
        parts = {name: cut(text) for name, text in parts.items()}
    else:
        parts = released_domains(data, scored)
    both = [], []
    for name, (texts, *held_out) in parts.items():
        train = join(texts, tokenizer())
        for stages, own in zip(both, held_out, strict=True):
            pieces = [encode(text, tokenizer())[: scored // len(own)] for text in own]
            stages.append(Domain(name, train, np.concatenate(pieces)))
    return both


def cut(text):
    """(texts to train on, to choose on, to report): the last two are its last tenth."""
    end = len(text) * 9 // 10
    middle = len(text) * 19 // 20
    return [text[:end]], [text[end:middle]], [text[middle:]]


def released_domains(data, scored):
    """{name: (texts to train on, to choose on, to report)}"""
    folder = existing(data, "novels")
    plays = existing(data, "tinyshakespeare", "input.txt").read_bytes()
    test = existing(data, "wikitext2", "test.txt").read_bytes()
    valid = existing(data, "wikitext2", "valid.txt").read_bytes()
    code = [text for _, text in documents("stdlib") if len(text) > scored]
    novels = [text[FRONT_MATTER:] for _, text in documents(str(folder))]
    half = len(test) // 2
    return {
        "code": (code[6:], code[:3], code[3:6]),
        "Shakespeare": cut(plays),
        "novels": (novels[6:], novels[:3], novels[3:6]),
        "WikiText": ([valid], [test[:half]], [test[half:]]),
    }


# --------------------------------------------------------------------------------------------------
# Classes of queries


class Classes:
    """Intents of one stage: read the words, name the class. Accuracy among all classes seen so far.

    The class of a query is the row of the head with the largest logit after its last word. The loss
    of a stage compares its own classes only, for every learner: then what is forgotten is forgotten
    by the features and not by the last softmax.

    train, held_out: (words [N, LENGTH], index of the last word [N], class [N]); classes: a list.
    """

    def __init__(self, name, train, held_out, classes, epochs=1):
        self.name = name
        self.classes = classes
        self.epochs = epochs
        self.x, self.last, self.y = train
        self.tx, self.tlast, self.ty = held_out

    def steps(self, quick):
        return 3 if quick else self.epochs * len(self.y) // 32

    def logits(self, model, words, last, classes):
        """[N, classes] after the last word, of the rows `classes` of the head and no others."""
        x = model.embedding(words)  # [N, LENGTH, d_model]
        for block in model.blocks:
            x, _ = block(x, None)
        x = model.norm(x[torch.arange(len(x)), last])  # [N, d_model]
        return F.linear(x, model.head.weight[classes])

    def loss(self, model, seed, step):
        epoch, i = divmod(step * 32, len(self.y) - len(self.y) % 32)
        rows = np.random.default_rng([seed, epoch]).permutation(len(self.y))[i : i + 32]
        return self.loss_of(model, torch.from_numpy(rows)), 32 * LENGTH

    def loss_of(self, model, rows):
        targets = torch.tensor([self.classes.index(c) for c in self.y[rows].tolist()])
        logits = self.logits(model, self.x[rows], self.last[rows], self.classes)
        return F.cross_entropy(logits, targets)

    def examples(self, model, quick):
        rows = np.random.default_rng(10**6).permutation(len(self.y))[: 8 if quick else 64]
        for row in torch.from_numpy(rows):
            yield self.loss_of(model, row[None])

    @torch.no_grad()
    def score(self, model, seen):
        if self not in seen:  # a class that was never named cannot be the answer
            return 0.0
        classes = []
        for stage in seen:
            classes += stage.classes
        best = self.logits(model, self.tx, self.tlast, classes).argmax(-1)
        return (torch.tensor(classes)[best] == self.ty).double().mean().item()


def queries(rows):
    """[(text, class)] -> (words [N, LENGTH], padded with WORDS; last word [N]; class [N])."""
    x = torch.full((len(rows), LENGTH), WORDS)
    last = []
    for i, (text, _) in enumerate(rows):
        split = text.lower().replace("?", " ?").split()
        words = [zlib.crc32(word.encode()) % WORDS for word in split[:LENGTH]]
        x[i, : len(words)] = torch.tensor(words)
        last.append(len(words) - 1)
    return x, torch.tensor(last), torch.tensor([c for _, c in rows])


def class_stages(groups, train, test):
    """A stage for each of {name: labels}, of [(text, label)] to train on and to be scored on."""
    number = {}
    for labels in groups.values():
        for label in labels:
            number[label] = len(number)

    def of(rows, labels):
        return queries([(text, number[label]) for text, label in rows if label in labels])

    stages = []
    for name, own in groups.items():
        classes = [number[label] for label in own]
        stages.append(Classes(name, of(train, own), of(test, own), classes, EPOCHS))
    return stages


def clinc150(data):
    """CLINC150 by its 10 domains: its validation part is to choose on, its test part to report."""
    folder = existing(data, "clinc150")
    full = json.loads((folder / "data_full.json").read_text())
    groups = json.loads((folder / "domains.json").read_text())
    return [class_stages(groups, full["train"], full[part]) for part in ("val", "test")]


def banking77(data, stages=7):
    """Banking77 in 7 groups: every tenth query is to choose on, its test part to report."""
    folder = existing(data, "banking77")

    def rows(name):
        with open(folder / name, newline="") as file:
            return list(csv.reader(file))[1:]

    train = rows("train.csv")
    names = sorted({label for _, label in train})
    bounds = [i * len(names) // stages for i in range(stages + 1)]
    groups = {f"group {i + 1}": names[bounds[i] : bounds[i + 1]] for i in range(stages)}
    nine_of_ten = [row for i, row in enumerate(train) if i % 10]
    to_choose = class_stages(groups, nine_of_ten, train[::10])
    return [to_choose, class_stages(groups, train, rows("test.csv"))]


def code_lines(half, stages=3, modules=4):
    """Without data: which module of the standard library has this line? half: 0 or 1, of them."""
    files = [(name, text) for name, text in documents("stdlib") if len(text) > 30_000]
    groups = {}
    rows = []
    for i, (name, text) in enumerate(files[half::2][: stages * modules]):
        groups.setdefault(f"group {1 + i // modules}", []).append(name)
        lines = [line.strip() for line in text.decode("utf-8", "replace").splitlines()]
        rows += [(line, name) for line in lines if len(line.split()) > 3]
    train = [row for i, row in enumerate(rows) if i % 10 > 1]
    return [class_stages(groups, train, rows[i::10]) for i in (0, 1)]


def joined(stages, after):
    """All stages of another set as one, with classes from `after` on: to be trained on before."""
    train = zip(*[(s.x, s.last, s.y + after) for s in stages], strict=True)
    held_out = zip(*[(s.tx, s.tlast, s.ty + after) for s in stages], strict=True)
    classes = []
    for stage in stages:
        classes += [after + c for c in stage.classes]
    train = [torch.cat(part) for part in train]
    return Classes("before", train, [torch.cat(part) for part in held_out], classes)


# --------------------------------------------------------------------------------------------------
# Novels to read once


def texts(data, folder, rows, length):
    """What to read, {"novel", "another novel", "code"}: int64 tokens [rows, length] each.

    Two such dictionaries, to choose a set-up on and to report, all of different books and files.
    The beginnings of still others are written to `folder`, to train on, a novel and code by turns:
    what was read before the other comes again after it. Without data, long modules of the standard
    library are the novels.
    """
    code = [text for _, text in documents("stdlib")]
    novels = code if data is None else [t for _, t in documents(str(existing(data, "novels")))]
    novels = [text for text in novels if len(text) > FRONT_MATTER + length][: 4 * rows + 40]
    code = b"\n".join(text for text in code if text not in novels)
    novels = [text[FRONT_MATTER:] for text in novels]
    read = 2 * rows * length
    if not folder.exists():
        folder.mkdir(parents=True)
        for i in range(40):
            pair = novels[4 * rows + i][:25_000], code[read + i * 100_000 :][:25_000]
            turns = [text[j : j + TURN] for j in range(0, 25_000, TURN) for text in pair]
            text = b"\n".join(turns).decode(errors="ignore")
            (folder / f"{i}.txt").write_text(text, encoding="utf-8")
    both = []
    for part in (0, 1):
        own = novels[2 * rows * part : 2 * rows * (part + 1)]
        code_rows = range(rows * part, rows * (part + 1))
        lines = [code[i * length : (i + 1) * length] for i in code_rows]
        read_now = {"novel": own[:rows], "another novel": own[rows:], "code": lines}
        both.append({what: _tokens(pieces, length) for what, pieces in read_now.items()})
    return both


def _tokens(pieces, length):
    """The beginnings of texts as int64 tokens [rows, length]."""
    rows = [encode(text[:length], tokenizer()) for text in pieces]
    return torch.from_numpy(np.stack(rows).astype(np.int64))
