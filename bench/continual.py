"""Continual learning: what a model still knows after it has learned something else (NL sec. 7, 9.1).

    python continual.py stream  --data FOLDER     # token clock: a held-out novel read once, learned in context, then forgotten?
    python continual.py domains --data FOLDER     # step clock: code -> Shakespeare -> novels -> WikiText, bits per byte
    python continual.py classes --data FOLDER     # step clock: CLINC150 by its 10 domains (or --set banking77), accuracy
    python continual.py cost                      # token clock: time and memory
    python continual.py domains --quick           # a minute, to see that it runs

FOLDER holds novels/, tinyshakespeare/, wikitext2/, clinc150/, banking77/ in their released form (default: the environment
variable NESTED_DATA); code is this Python's standard library. After every stage every stage is scored: the matrix
R[i][j] is the score on stage j after learning stage i, row 0 before learning anything. From it

    average     mean of the last row                         forgetting  mean over j < n of best R[i][j], i < n, less R[n][j]
    backward    mean over j < n of R[n][j] - R[j][j]         forward     mean over j > 1 of R[j-1][j] - R[0][j]

with the sign that makes more forgetting worse and more transfer better, for accuracy and for bits per byte. Cost stands
beside it: parameter updates, FLOPs (6 per parameter and token trained on), seconds of the processor.

Learners: `none` stops learning after the first stage (all it does is read its context), `finetune`, `ewc` (Kirkpatrick et
al. 2017, diagonal Fisher of every finished stage), and Hope with 1 to 4 CMS levels on the step clock (`LevelOptimizer`):
level l of the MLPs steps every PERIODS[l] steps, embedding, mixers and norms with the slowest. Stage 1 is trained by all in
the ordinary way; it makes the starts. Learning rates, EWC's strength and inner step sizes are chosen with a seed and on
held-out data of their own. Results go to a file of one JSON object a line; what is there is not run again.
"""

import argparse
import contextlib
import csv
import io
import itertools
import json
import math
import os
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

from hope import loss_fn
from learn import tensors
from optimizers import LevelOptimizer
from support.config import TrainConfig
from support.corpus import batch, documents, join
from support.run import optimizer_for, resumed
from support.vocabulary import encode, n_bytes, tokenizer

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as in train.py

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from hope import Hope, HopeConfig, one_of
from support.checkpoint import atomic_write, first_line
from train import train, validate

SIZE = dict(d_model=64, n_layers=2, n_heads=1)  # about 0.11M parameters, equal for all learners
PERIODS = (1, 3, 9, 27)  # training steps between updates of level 1, 2, 3, 4
FIRST_LR = 2e-3  # of stage 1
LRS = (1.7e-4, 5e-4, 1.5e-3, 4.5e-3)  # of the stages after it, to choose from
STRENGTHS = (1e1, 1e2, 1e3)  # of the penalty of EWC, to choose from, at each of those rates
CHOSEN_ON = 100  # the seed with which they are chosen, on held-out data that is not reported
LEARNERS = {  # name: (model, levels on the step clock, method)
    "transformer none": ("transformer", 1, "none"),
    "transformer finetune": ("transformer", 1, "finetune"),
    "transformer ewc": ("transformer", 1, "ewc"),
    "hope none": ("hope", 1, "none"),
    "hope ewc": ("hope", 1, "ewc"),
    **{f"hope {n} level{'s' * (n > 1)}": ("hope", n, "finetune") for n in (1, 2, 3, 4)},
}

# ---------------------------------------------------------------------------------------------------------------------
# Learning one stage after the other


def build(model, levels, seed, classes=None, **changes):
    """A model of SIZE whose feed-forward block has that many levels; the token clock is off. classes: a head of their own."""
    torch.manual_seed(seed)
    chunks = [2**20 * 2**i for i in range(levels - 1)] + [None]  # calendars of tokens, unused here
    model = Hope(HopeConfig(model=model, levels=chunks, **(SIZE | changes)))
    if classes:
        model.head = nn.Linear(model.config.d_model, classes, bias=False)
    return model


def level_optimizer(model, periods):
    """train.py's AdamW, the MLPs of a block with a period each; a head of its own has the first, everything else the last."""
    levels = {f"mlps.{i}": period for i, period in enumerate(periods)} | {"": periods[-1]}
    if model.head is not None:
        levels = {"head": periods[0]} | levels
    return LevelOptimizer(optimizer_for(model, TrainConfig()), model, levels)


class EWC:
    """Elastic weight consolidation: 1/2 strength * sum over finished stages of F (w - w*)^2, F the diagonal Fisher."""

    def __init__(self, model, strength):
        self.model, self.strength, self.stages = model, strength, []

    def penalty(self):
        params = list(self.model.parameters())
        return sum((0.5 * self.strength * (F_ * (p - w).square()).sum()
                    for fisher, at in self.stages for F_, p, w in zip(fisher, params, at, strict=True)), start=0.0)  # fmt: skip

    def finish(self, losses):
        """Remember the stage: losses, an iterable of scalars, one for each example."""
        params = list(self.model.parameters())
        fisher, count = [torch.zeros_like(p) for p in params], 0
        for loss in losses:
            grads, count = torch.autograd.grad(loss, params), count + 1
            for total, g in zip(fisher, grads, strict=True):
                total.addcmul_(g, g)
        self.stages.append(([f / count for f in fisher], [p.detach().clone() for p in params]))


def learn(model, optimizer, stage, lr, seed, quick, penalty=lambda: 0.0):
    """All training steps of a stage. Returns what they cost."""
    cost, began = Counter(), time.process_time()
    for step in range(stage.steps(quick)):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 10)
        loss, tokens = stage.loss(model, seed, step)
        (loss + penalty()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        due = optimizer.due(optimizer.ticks)
        updates = sum(p.numel() for name, p in optimizer.parameters.items() if optimizer.level[name] in due)
        cost.update(updates=updates, tokens=tokens)
    cost.update(seconds=time.process_time() - began)
    return cost


def run(learner, stages, seed, lr, strength, quick, first, hope="hope", before=None, **changes):
    """One learner through all stages: {"matrix", "updates", "flops", "seconds", "parameters"}.

    stages: objects with `steps(quick)`, `loss(model, seed, step)` and its number of tokens, `examples(model)`,
    `score(model, seen)`, see Domain and Classes. lr, strength: of the stages after the first, and of EWC. first: a dictionary
    that is filled with what stage 1 has made of each model and seed, because it is the same whatever comes after. hope: which
    of its two forms, "hope" or "hope_attention". before: what every learner is trained on before stage 1, unscored.
    """
    kind, levels, method = LEARNERS[learner]
    kind = hope if kind == "hope" else kind
    model = build(kind, levels, seed, **changes)
    size = sum(p.numel() for p in model.parameters())
    if (kind, levels, seed) not in first:
        rows, cost = [[stage.score(model, []) for stage in stages]], Counter()
        for stage in [before, stages[0]] if before else stages[:1]:
            cost += learn(model, level_optimizer(model, PERIODS[:1] * levels), stage, FIRST_LR, seed, quick)
        rows.append([stage.score(model, stages[:1]) for stage in stages])
        first[kind, levels, seed] = {name: w.clone() for name, w in model.state_dict().items()}, rows, cost
    weights, rows, cost = first[kind, levels, seed]
    model.load_state_dict(weights)
    matrix, cost, ewc = list(rows), Counter(cost), EWC(model, strength) if method == "ewc" else None
    optimizer = level_optimizer(model, PERIODS[:levels])  # one for all stages: its periods do not end with a stage
    for number, stage in enumerate(stages[1:], 1):
        if ewc:
            began = time.process_time()
            ewc.finish(stages[number - 1].examples(model))
            cost.update(seconds=time.process_time() - began)
        if method != "none":
            cost += learn(model, optimizer, stage, lr, seed, quick, ewc.penalty if ewc else lambda: 0.0)
        matrix.append([scored.score(model, stages[: number + 1]) for scored in stages])
    return {"matrix": matrix, "updates": cost["updates"], "flops": 6 * size * cost["tokens"],
            "seconds": round(cost["seconds"], 1), "parameters": size}  # fmt: skip


def metrics(matrix, higher_is_better):
    """average, forgetting, backward and forward transfer of a matrix [1 + n][n], see the top of this file."""
    R = np.array(matrix) * (1 if higher_is_better else -1)
    n = R.shape[1]
    seen = np.arange(n - 1)
    return {
        "average": float(np.mean(matrix[-1])),
        "last": float(matrix[-1][-1]),
        "forgetting": float(np.mean([R[j + 1 : n, j].max() - R[n, j] for j in seen])),
        "first forgotten": float(R[1, 0] - R[n, 0]),
        "backward": float(np.mean([R[n, j] - R[j + 1, j] for j in seen])),
        "forward": float(np.mean([R[j, j] - R[0, j] for j in range(1, n)])),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Stages: domains of text, and classes


class Domain:
    """Text of one kind, bits per byte on its held-out part."""

    def __init__(self, name, train, held_out, tokens=60_000):
        self.name, self.train, self.held_out, self.tokens = name, train, held_out, tokens

    def steps(self, quick):
        return 5 if quick else self.tokens // (4 * 128)

    def loss(self, model, seed, step):
        inputs, targets = batch(self.train, 4, 128, seed, step)
        return loss_fn(model(inputs)[0], targets), inputs.numel()

    def examples(self, model, count=32):
        for step in range(count):
            inputs, targets = batch(self.train, 1, 128, 10**6, step)
            yield loss_fn(model(inputs)[0], targets)

    def score(self, model, seen):
        nats, _ = validate(model, self.held_out, 16, 128, "cpu")
        return nats / math.log(2) / n_bytes(self.held_out, tokenizer())


def read(*path):
    folder = Path(*path)
    if not folder.exists():
        raise ValueError(f"{folder} does not exist: --data must name the folder that holds {'/'.join(path[1:])}")
    return folder


def domains(data, scored=9_216):
    """Code, Shakespeare, novels, WikiText, twice: with text to choose settings on, and with text to report. What is held out
    are files, or the end of one file; `scored` bytes of it are scored."""
    folder = read(data, "novels")
    plays = read(data, "tinyshakespeare", "input.txt").read_bytes()
    test, valid = (read(data, "wikitext2", name).read_bytes() for name in ("test.txt", "valid.txt"))
    code = [text for _, text in documents("stdlib") if len(text) > scored]
    novels = [text[20_000:] for _, text in documents(str(folder))]  # past the front matter
    end, middle = len(plays) * 9 // 10, len(plays) * 19 // 20
    parts = {  # to train on, to choose on, to report
        "code": (code[6:], code[:3], code[3:6]),
        "Shakespeare": ([plays[:end]], [plays[end:middle]], [plays[middle:]]),
        "novels": (novels[6:], novels[:3], novels[3:6]),
        "WikiText": ([valid], [test[: len(test) // 2]], [test[len(test) // 2 :]]),
    }
    both = [], []
    for name, (to_train, *held_out) in parts.items():
        to_train = join(to_train, tokenizer())
        for stages, own in zip(both, held_out, strict=True):
            own = np.concatenate([encode(text, tokenizer())[: scored // len(own)] for text in own])
            stages.append(Domain(name, to_train, own))
    return both


WORDS = 4096  # hash buckets of words: no vocabulary is learned from any data
LENGTH = 16  # words of a query that are read
EPOCHS = 4  # of a stage


class Classes:
    """Intents of one stage: read the words, name the class. Accuracy among all classes seen so far.

    The class of a query is the row of the head with the largest logit after its last word. The loss of a stage compares its
    own classes only, for every learner: then what is forgotten is forgotten by the features and not by the last softmax.
    """

    def __init__(self, name, train, held_out, classes, epochs=1):
        self.name, self.classes, self.epochs = name, classes, epochs
        (self.x, self.last, self.y), (self.tx, self.tlast, self.ty) = train, held_out

    def steps(self, quick):
        return 3 if quick else self.epochs * len(self.y) // 32

    def logits(self, model, words, last, classes):
        """What `model(words)` says after the last word about the class tokens, and nothing else: a tenth of the work."""
        x = model.embedding(words)
        for block in model.blocks:
            x, _ = block(x, None)
        return F.linear(model.norm(x[torch.arange(len(x)), last]), model.head.weight[classes])

    def loss(self, model, seed, step):
        epoch, i = divmod(step * 32, len(self.y) - len(self.y) % 32)
        rows = np.random.default_rng([seed, epoch]).permutation(len(self.y))[i : i + 32]
        return self.loss_of(model, torch.from_numpy(rows)), 32 * LENGTH

    def loss_of(self, model, rows):
        targets = torch.tensor([self.classes.index(c) for c in self.y[rows].tolist()])
        return F.cross_entropy(self.logits(model, self.x[rows], self.last[rows], self.classes), targets)

    def examples(self, model, count=64):
        for row in torch.from_numpy(np.random.default_rng(10**6).permutation(len(self.y))[:count]):
            yield self.loss_of(model, row[None])

    @torch.no_grad()
    def score(self, model, seen):
        if self not in seen:  # a class that was never named cannot be the answer
            return 0.0
        classes = [c for stage in seen for c in stage.classes]
        found = torch.tensor(classes)[self.logits(model, self.tx, self.tlast, classes).argmax(-1)]
        return (found == self.ty).double().mean().item()


def queries(rows):
    """[(text, class)] -> (words [N, LENGTH] with <pad> = WORDS, index of the last word [N], class [N])."""
    x, last = torch.full((len(rows), LENGTH), WORDS), []
    for i, (text, _) in enumerate(rows):
        words = [zlib.crc32(word.encode()) % WORDS for word in text.lower().replace("?", " ?").split()][:LENGTH]
        x[i, : len(words)] = torch.tensor(words)
        last.append(len(words) - 1)
    return x, torch.tensor(last), torch.tensor([c for _, c in rows])


def clinc150(data):
    """Its 10 domains, twice: scored on its validation part, to choose settings on, and on its test part, to report."""
    folder = read(data, "clinc150")
    full = json.loads((folder / "data_full.json").read_text())
    groups = json.loads((folder / "domains.json").read_text())
    return [class_stages(groups, full["train"], full[part]) for part in ("val", "test")]


def banking77(data, stages=7):
    """Its classes in 7 groups, twice: to choose settings on, every tenth query is held out; to report, its test part."""
    folder = read(data, "banking77")

    def rows(name):
        with open(folder / name, newline="") as file:
            return list(csv.reader(file))[1:]

    train, test = rows("train.csv"), rows("test.csv")
    names = sorted({label for _, label in train})
    groups = {f"group {i + 1}": names[i * len(names) // stages : (i + 1) * len(names) // stages] for i in range(stages)}
    nine_of_ten = [row for i, row in enumerate(train) if i % 10]
    return [class_stages(groups, nine_of_ten, train[::10]), class_stages(groups, train, test)]


def joined(stages, after):
    """All stages as one, of classes that are numbered from `after` on: another set, to be trained on before."""
    train, held_out = ([torch.cat(part) for part in zip(*parts, strict=True)] for parts in (
        [(s.x, s.last, s.y + after) for s in stages], [(s.tx, s.tlast, s.ty + after) for s in stages]))  # fmt: skip
    return Classes("before", train, held_out, [after + c for s in stages for c in s.classes])


def class_stages(groups, train, test):
    number = {label: i for i, label in enumerate(label for labels in groups.values() for label in labels)}

    def of(rows, labels):
        return queries([(text, number[label]) for text, label in rows if label in labels])

    parts = [(name, of(train, own), of(test, own), [number[label] for label in own]) for name, own in groups.items()]
    return [Classes(*part, EPOCHS) for part in parts]


# ---------------------------------------------------------------------------------------------------------------------
# The token clock: a novel read once

STREAM = {  # chunks of the levels in tokens, all of which update, and the variant
    "1 fast level": ([128], "sequential"),
    "3 levels": ([128, 512, 2048], "sequential"),
    "3 levels, nested": ([128, 512, 2048], "nested"),
}
STEPS = (3e-4, 1e-3, 3e-3)  # inner step sizes of the first level, to choose from


def steps(step, levels):
    """Step size of each level, from that of the first: by sqrt(chunk) less, as the noise of a sum over a chunk grows."""
    return [step * math.sqrt(levels[0] / chunk) for chunk in levels]


def bits(loss):
    return loss.mean().item() / math.log(2)


def trained(folder, data, levels, seed, quick):
    """The model of an ordinary run of train.py, no steps in context; goes on where it was stopped."""
    if not (folder / "sample.txt").exists():
        if (folder / "config.json").exists():
            config = resumed(str(folder))
        else:
            config = TrainConfig(out=str(folder), data=str(data), set={"levels": levels, **SIZE}, seed=seed, eval_every=0,
                                 tokens=8_192 if quick else 800_000, threads=1)  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            train(config)
    return Hope.load(folder)[0]


def texts(data, folder, rows, length):
    """What to read, {"novel", "another novel", "code"}: tokens [rows, length] each, to choose step sizes on and to report,
    all from different books and files; the beginnings of others are written to `folder`, to train on."""
    novels = [text[20_000:] for _, text in documents(str(read(data, "novels"))) if len(text) > 20_000 + length]
    code = b"\n".join(text for _, text in documents("stdlib"))
    code, code_to_train = code[: 2 * rows * length], code[2 * rows * length :]
    if not folder.exists():
        folder.mkdir(parents=True)
        for i in range(40):
            (folder / f"novel{i}.txt").write_bytes(novels[4 * rows + i][:25_000])
            (folder / f"code{i}.txt").write_bytes(code_to_train[i * 100_000 :][:25_000])
    both = []
    for part in (0, 1):
        own = novels[2 * rows * part : 2 * rows * (part + 1)]
        lines = [code[i * length :] for i in range(rows * part, rows * (part + 1))]
        parts = {"novel": own[:rows], "another novel": own[rows:], "code": lines}
        both.append({what: np.stack([encode(t[:length], tokenizer()) for t in part]) for what, part in parts.items()})
    return [{what: torch.from_numpy(tokens.astype(np.int64)) for what, tokens in part.items()} for part in both]


def read_still(model, tokens, state=None):
    """Loss [B, T - 1] of tokens [B, T] in nats, read with fresh mixers and the CMS levels of `state`; nothing is learned."""
    blocks = state and {"blocks": [{"mixer": None, "cms": block["cms"]} for block in state["blocks"]]}
    return F.cross_entropy(model(tokens, blocks)[0][:, :-1].mT, tokens[:, 1:], reduction="none")


def gains(model, tokens, state):
    """By how many bits per byte the state reads tokens better than the start: all its levels, and each alone with the others
    at their starts. {"all", "1", "2", ...}"""
    start, found, count = bits(read_still(model, tokens)), {}, len(model.config.levels)
    for name in ("all", *range(count)) if count > 1 else ("all",):
        blocks = []
        for block in state["blocks"]:
            fast = [w if name in ("all", level) else None for level, w in enumerate(block["cms"]["fast"])]
            blocks.append({"cms": block["cms"] | {"fast": fast}})
        found[name if name == "all" else str(name + 1)] = start - bits(read_still(model, tokens, {"blocks": blocks}))
    return found


@torch.no_grad()
def stream(args, records, report):
    """Held-out novels, read once, learning; then as much of something else. What is gained by it, and what is left."""
    rows, length = (2, 4_096) if args.quick else (4, 16_384)
    root = Path("runs/continual-quick" if args.quick else "runs/continual")
    to_choose, to_report = texts(args.data, root / "texts", rows, length)
    done = {(r["learner"], r["seed"]): r for r in records}

    def model_of(name, seed):
        levels, variant = STREAM[name]
        with torch.enable_grad():
            model = trained(root / f"{'-'.join(map(str, levels))}-{seed}", root / "texts", levels, seed, args.quick)
        for block in model.blocks:
            block.cms.variant = variant  # a calendar: sequential and nested levels read alike
        return model

    for name, (levels, _) in STREAM.items():
        if (name, CHOSEN_ON) not in done:
            model, novel = model_of(name, CHOSEN_ON), to_choose["novel"]
            losses = {step: bits(model.learn(novel, step=steps(step, levels))[0][:, length // 2 :]) for step in STEPS}
            best = min(STEPS, key=lambda step: losses[step] if math.isfinite(losses[step]) else math.inf)
            done[name, CHOSEN_ON] = {"learner": name, "seed": CHOSEN_ON, "step": best, "second half": losses}
            report(done[name, CHOSEN_ON])
    for seed, (name, (levels, variant)) in itertools.product(range(args.seeds), STREAM.items()):
        if (name, seed) in done:
            continue
        model, began = model_of(name, seed), time.process_time()
        step = steps(done[name, CHOSEN_ON]["step"], levels)
        novel = to_report["novel"]
        still, (loss, state) = read_still(model, novel), model.learn(novel, step=step)
        again = novel[:, length // 2 :]
        gain, without = {"novel": gains(model, again, state)}, {}
        for what in ("another novel", "code"):
            gain[what] = gains(model, again, model.learn(to_report[what], state, step=step)[1])
            without[what] = gains(model, again, model.learn(to_report[what], step=step)[1])
        curve = [[bits(x[:, i : i + length // 16]) for x in (still, loss)] for i in range(0, length, length // 16)]
        report({"learner": name, "seed": seed, "levels": levels, "variant": variant, "steps": step, "length": length,
                "parameters": sum(p.numel() for p in model.parameters()),
                "second half": {"without": bits(still[:, length // 2 :]), "with": bits(loss[:, length // 2 :])},
                "curve": curve, "gain": gain, "gain of the other alone": without,
                "seconds": round(time.process_time() - began, 1)})  # fmt: skip


def cost(quick):
    """What learning in context costs: training step and state of each model, levels of 256 and 1,024 tokens, float32."""
    d, T, repeats = (64, 512, 1) if quick else (256, 1024, 3)
    tokens, targets = torch.randint(257, (2, 4, T))
    print(f"d {d}, 4 layers, 4 x {T} tokens, levels [256, 1024]: seconds of the processor for a training step (median)\n")
    print("| model | off | first_order | ratio | fast weights + sums + state of an unfinished chunk, MB a row |")
    print("|---" * 5 + "|")
    for kind in ("hope", "hope_attention"):
        torch.manual_seed(0)
        model = Hope(HopeConfig(model=kind, d_model=d, n_layers=4, n_heads=d // 64, levels=[256, 1024], cms_step=1e-3))
        times = {"off": [], "first_order": []}
        for _ in range(repeats + 1):  # interleaved; the first is for warming up
            for updates, seconds in times.items():
                model.zero_grad()
                began = time.process_time()
                loss_fn(model(tokens, updates=updates)[0], targets).backward()
                seconds.append(time.process_time() - began)
        off, on = (float(np.median(seconds[1:])) for seconds in times.values())
        with torch.no_grad():
            _, state = model.learn(tokens[:1, : 256 + 100])
        cms = sum(t.nbytes for block in state["blocks"] for t in tensors(block["cms"])) / 1e6
        sums = sum(t.nbytes for block in state["blocks"] for t in tensors(block["cms"]["sums"])) / 1e6
        start = sum(t.nbytes for t in tensors(state["stream"])) / 1e6
        print(f"| `{kind}` | {off:.2f} | {on:.2f} | {on / off:.2f} | {cms - sums:.2f} + {sums:.2f} + {start:.2f} |", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def staged(args, records, report):
    """`domains` and `classes`: of every learner that is asked for its settings, chosen with a seed and on held-out data of
    their own; with them every seed."""
    if args.command == "domains":
        (to_choose, to_report), changes = domains(args.data), {}
    else:
        sets = {"clinc150": clinc150(args.data), "banking77": banking77(args.data)}
        to_choose, to_report = sets.pop(args.set)
        count = sum(len(stage.classes) for stage in to_report)
        before = joined(*(stages for _, stages in sets.values()), count)
        # Sixteen words are no context to learn from: Hope-Attention, that is the Transformer with levels.
        changes = {"hope": "hope_attention", "before": before, "vocab_size": WORDS + 1, "classes": count + len(before.classes)}
    done = {(r["learner"], r["seed"], r["lr"], r["ewc"]): r for r in records}
    first = {}

    def measured(learner, seed, lr, strength):
        if (learner, seed, lr, strength) not in done:
            stages = to_choose if seed == CHOSEN_ON else to_report
            result = run(learner, stages, seed, lr, strength, args.quick, first, **changes)
            record = {"learner": learner, "seed": seed, "lr": lr, "ewc": strength, "stages": [s.name for s in stages],
                      **metrics(result["matrix"], args.command == "classes"), **result}  # fmt: skip
            report(record)
            done[learner, seed, lr, strength] = record
        return done[learner, seed, lr, strength]

    def chosen(learner):
        kind, levels, method = LEARNERS[learner]
        grid = itertools.product(LRS[:1] if method == "none" else LRS, (None,))
        if levels in (1, 2, 4) and kind == "hope" and method == "finetune":
            return chosen("hope 3 levels")  # an ablation: nothing but the number of levels changes
        if method == "ewc":
            grid = itertools.product(LRS, STRENGTHS)
        tried = [measured(learner, CHOSEN_ON, *settings) for settings in grid]
        return (max if args.command == "classes" else min)(tried, key=lambda r: r["average"])

    for learner in args.learners:
        best = chosen(learner)
        for seed in range(args.seeds):
            measured(learner, seed, best["lr"], best["ewc"])


def spread(values, digits=3):
    """Mean and, of several, the sample standard deviation, as text."""
    return f"{np.mean(values):.{digits}f}" + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def in_order(records):
    """The learners that have records."""
    return [name for name in (*LEARNERS, *STREAM) if name in {r["learner"] for r in records}]


def learning(records):
    """The levels of the stream's records that are not at their start, as all nested ones but the slowest at a reset."""
    return [level for level in (records[0]["gain"]["novel"] if records else ()) if records[0]["gain"]["novel"][level]]


def table(records, command):
    """The records, seeds averaged, as lines of a Markdown table."""
    learners = in_order(records)
    if command == "stream":
        records = [r for r in records if r["seed"] != CHOSEN_ON]
        lines = ["| levels | step | second half: without | with updates | level | gain right after | after another novel "
                 "(that alone) | after code (that alone) |", "|" + "---|" * 8]  # fmt: skip
        for learner in learners:
            own = [r for r in records if r["learner"] == learner]
            head = [learner, f"{own[0]['steps'][0]:g}"] if own else []
            head += [spread([r["second half"][which] for r in own]) for which in ("without", "with") if own]
            for level in learning(own):
                cells = [spread([r["gain"]["novel"][level] for r in own])]
                for what in ("another novel", "code"):
                    alone = np.mean([r["gain of the other alone"][what][level] for r in own])
                    cells.append(spread([r["gain"][what][level] for r in own]) + f" ({alone:.3f})")
                first = head if level == "all" else [""] * 4
                lines.append("| " + " | ".join([*first, level if level == "all" else f"{level} alone", *cells]) + " |")
        return lines
    keys = ("average", "last", "forgetting", "first forgotten", "backward", "forward")
    lines = ["| learner | seeds | lr (EWC) | " + " | ".join(keys) + " | M parameter updates | TFLOP | s |", "|" + "---|" * 12]
    for learner in learners:
        own = [r for r in records if r["learner"] == learner]
        chosen = f"{own[0]['lr']:g}" + (f" ({own[0]['ewc']:g})" if own[0]["ewc"] else "")
        cells = [spread([r[key] for r in own]) for key in keys]
        cost = [np.mean([r[key] for r in own]) / unit for key, unit in (("updates", 1e6), ("flops", 1e12), ("seconds", 1))]
        lines.append(f"| {learner} | {len(own)} | {chosen} | " + " | ".join([*cells, *(f"{x:.2f}" for x in cost)]) + " |")
    return lines


def plot(records, command, path):
    """Curves and gains of the stream; or a heat-map of the matrix for every learner, and all settings that were tried."""
    from matplotlib.figure import (
        Figure,  # slow to import; a Figure of its own needs no display
    )

    chosen = [r for r in records if r["seed"] != CHOSEN_ON] or records
    learners = in_order(chosen)
    if command == "stream":
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        first, second = figure.subplots(1, 2)
        for number, learner in enumerate(learners):
            own, color = [r for r in chosen if r["learner"] == learner], f"C{number}"
            curve = np.mean([r["curve"] for r in own], 0)
            first.plot(np.arange(1, 17) * own[0]["length"] / 16e3, curve[:, 0] - curve[:, 1], color=color, label=learner)
            for level, style in zip(learning(own), ("o-", "^:", "v:", "s:"), strict=False):
                gains = [[values[level] for values in r["gain"].values()] for r in own]
                label = learner if level == "all" else f"its level {level} alone"
                second.plot(list(own[0]["gain"]), np.mean(gains, 0), style, color=color, label=label)
        first.set(xlabel="thousand bytes of the novel read", ylabel="gain of learning (bits per byte)", title="reading a novel")
        second.set(xlabel="read last", ylabel="gain on the novel (bits per byte)", title="what is left of it")
        for axes in (first, second):
            axes.axhline(0, color="gray", linewidth=0.8)
            axes.legend(frameon=False, fontsize=7)
    else:
        rows = -(-(len(learners) + 1) // 3)
        figure = Figure(figsize=(10.5, 3.2 * rows), layout="constrained")
        grid = figure.subplots(rows, 3, squeeze=False).flatten()
        higher = command == "classes"
        for axes, learner in zip(grid, learners, strict=False):
            R = np.mean([r["matrix"] for r in chosen if r["learner"] == learner], 0)[1:]
            high = 1 if higher else np.percentile([r["matrix"][1:] for r in chosen], 95)
            image = axes.imshow(R, cmap="viridis" if higher else "viridis_r", vmin=0 if higher else np.min(R), vmax=high)
            for i, row in enumerate(R):
                for j, value in enumerate(row):
                    light = sum(image.cmap(image.norm(value))[:3]) > 1.6
                    axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="black" if light else "white", fontsize=6)
            ticks, names = range(len(R)), chosen[0]["stages"]
            axes.set(title=learner, xlabel="scored on stage", ylabel="after stage")
            axes.set_xticks(ticks, names, fontsize=6, rotation=40, ha="right")
            axes.set_yticks(ticks, names, fontsize=6)
        axes = grid[len(learners)]
        for learner in learners:
            tried = [r for r in records if r["learner"] == learner and r["seed"] == CHOSEN_ON]
            tried.sort(key=lambda r: (r["ewc"] or 0, r["lr"]))
            for strength, own in itertools.groupby(tried, lambda r: r["ewc"]):
                points = np.array([(r["forgetting"], r["last"]) for r in own])
                axes.plot(*points.T, "o-", markersize=3, label=f"{learner} {strength:g}" if strength else learner)
        axes.set(title="all settings tried", xlabel="forgetting", ylabel="last stage" + ("" if higher else " (bits per byte)"))
        axes.legend(frameon=False, fontsize=6)
        for axes in grid[len(learners) + 1 :]:
            axes.remove()
    atomic_write(path, lambda beside: figure.savefig(beside, dpi=120, format="png"))


def main(argv=None):
    """The command; returns the exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", help="stream, domains, classes or cost")
    parser.add_argument("--data", default=os.environ.get("NESTED_DATA"), help="folder of the data sets (default: $NESTED_DATA)")
    parser.add_argument("--set", default="clinc150", help="of classes: clinc150 or banking77")
    parser.add_argument("--learners", help=f"comma-separated, of {', '.join(LEARNERS)} (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="0, 1, ... (default: 3)")
    parser.add_argument("--out", help="results, a JSON object a line (default: results/continual_COMMAND.jsonl)")
    parser.add_argument("--quick", action="store_true", help="a minute, to see that it runs")
    args = parser.parse_args(argv)
    try:
        one_of("command", args.command, ("stream", "domains", "classes", "cost"))
        one_of("set", args.set, ("clinc150", "banking77"))
        if args.command == "cost":
            cost(args.quick)
            return 0
        if not args.data:
            raise ValueError("no data: name the folder of the data sets with --data or the environment variable NESTED_DATA")
        if not 1 <= args.seeds <= CHOSEN_ON:
            raise ValueError(f"seeds is {args.seeds}: legal is 1 to {CHOSEN_ON}")
        names = args.learners.split(",") if args.learners else LEARNERS
        args.learners = [one_of("learner", name, LEARNERS) for name in names]
        name = f"continual_{args.command}" + (f"_{args.set}" if args.command == "classes" else "")
        args.out = args.out or ("runs/quick/" if args.quick else "results/") + name + ".jsonl"
        out = Path(args.out)
        records = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []

        def report(record):
            records.append(record)
            out.parent.mkdir(parents=True, exist_ok=True)
            with open(out, "a") as file:
                file.write(json.dumps(record) + "\n")
            print("\n".join(table([record], args.command)[2:]), flush=True)

        (stream if args.command == "stream" else staged)(args, records, report)
        plot(records, args.command, out.with_suffix(".png"))
    except (ValueError, OSError) as error:
        print(f"continual.py: error: {first_line(error)}", file=sys.stderr)
        return 2
    chosen = [r for r in records if r["seed"] != CHOSEN_ON]
    print("\n".join(["", *table(chosen, args.command), "", f"written to {out} and {out.with_suffix('.png')}"]))
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
