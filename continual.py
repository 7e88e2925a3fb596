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
the ordinary way; it makes the starts. Results go to a file of one JSON object a line; what is there is not run again.
"""

import argparse
import csv
import json
import math
import os
import sys
import time
import zlib
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as in train.py

import numpy as np
import torch
import torch.nn.functional as F

from cms import LevelOptimizer
from data import batch, documents, join, n_bytes, tokenizer
from hope import Hope, HopeConfig, first_line, one_of, tensors, write_beside
from train import loss_fn, validate

SIZE = dict(d_model=64, n_layers=2, n_heads=1)  # about 0.11M parameters, equal for all learners
PERIODS = (1, 3, 9, 27)  # training steps between updates of level 1, 2, 3, 4
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


def build(model, levels, seed, **changes):
    """A model of SIZE whose feed-forward block has that many levels; the token clock is off."""
    torch.manual_seed(seed)
    chunks = [2**20 * 2**i for i in range(levels - 1)] + [None]  # calendars of tokens, unused here
    return Hope(HopeConfig(model=model, levels=chunks, **(SIZE | changes)))


def optimizer_for(model, levels, lr):
    """AdamW, each of `levels` MLPs of a block at its period; everything else with the slowest."""
    periods = {f"mlps.{i}": PERIODS[i] for i in range(levels)} | {"": PERIODS[levels - 1]}
    decayed = [(name, p) for name, p in model.named_parameters() if p.ndim >= 2 and "embedding" not in name]
    rest = [(name, p) for name, p in model.named_parameters() if p.ndim < 2 or "embedding" in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return LevelOptimizer(torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95)), periods)


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


def run(learner, stages, seed, lr, ewc_strength, quick, **changes):
    """One learner through all stages: {"matrix", "updates", "flops", "seconds", "parameters"}.

    stages: objects with `steps(quick)`, `loss(model, seed, step)` and its number of tokens, `examples(model)`,
    `score(model)`, see Domain and Classes.
    """
    kind, levels, method = LEARNERS[learner]
    model = build(kind, levels, seed, **changes)
    size = sum(p.numel() for p in model.parameters())
    ewc = EWC(model, ewc_strength) if method == "ewc" else None
    matrix, updates, tokens = [[stage.score(model, []) for stage in stages]], 0, 0
    began = time.process_time()
    scoring = 0.0
    for number, stage in enumerate(stages):
        if number < 2:  # stage 1 the ordinary way; from then on one optimizer, whose periods do not end with a stage
            optimizer = optimizer_for(model, levels if number else 1, lr)
        steps = 0 if number and method == "none" else stage.steps(quick)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / 10)
            loss, count = stage.loss(model, seed, step)
            tokens += count
            if ewc:
                loss = loss + ewc.penalty()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            due = optimizer.due(optimizer.ticks)
            updates += sum(p.numel() for name, p in optimizer.parameters.items() if optimizer.level[name] in due)
        if ewc and number + 1 < len(stages):
            ewc.finish(stage.examples(model))
        paused = time.process_time()
        matrix.append([stage.score(model, stages[: number + 1]) for stage in stages])
        scoring += time.process_time() - paused
    seconds = time.process_time() - began - scoring
    return {"matrix": matrix, "updates": updates, "flops": 6 * size * tokens, "seconds": round(seconds, 1), "parameters": size}


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

    def __init__(self, name, train, val, tokens=100_000):
        self.name, self.train, self.val, self.tokens = name, train, val, tokens

    def steps(self, quick):
        return 5 if quick else self.tokens // (8 * 256)

    def loss(self, model, seed, step):
        inputs, targets = batch(self.train, 8, 256, seed, step)
        return loss_fn(model(inputs)[0], targets), inputs.numel()

    def examples(self, model, count=24):
        for step in range(count):
            inputs, targets = batch(self.train, 1, 256, 10**6, step)
            yield loss_fn(model(inputs)[0], targets)

    def score(self, model, seen):
        nats, _ = validate(model, self.val, 8, 256, "cpu")
        return nats / math.log(2) / n_bytes(self.val, tokenizer())


def read(*path):
    folder = Path(*path)
    if not folder.exists():
        raise ValueError(f"{folder} does not exist: --data must name the folder that holds {'/'.join(path[1:])}")
    return folder


def domains(data, held_out=8_192):
    """Code, Shakespeare, novels, WikiText: files (or the end of one file) are held out, 8,192 bytes are scored."""
    encoding = tokenizer()

    def split(name, texts):
        if len(texts) == 1:
            cut = int(len(texts[0]) * 0.95)
            texts = [texts[0][cut:], texts[0][:cut]]
        val = join(texts[:3] if len(texts) > 3 else texts[:1], encoding)[:held_out]
        return Domain(name, join(texts[3:] if len(texts) > 3 else texts[1:], encoding), val)

    code = [text for _, text in documents("stdlib")]
    novels = [text for _, text in documents(str(read(data, "novels")))]
    shakespeare = [read(data, "tinyshakespeare", "input.txt").read_bytes()]
    wikitext = [read(data, "wikitext2", name).read_bytes() for name in ("test.txt", "valid.txt")]
    return [split("code", code), split("Shakespeare", shakespeare), split("novels", novels), split("WikiText", wikitext)]


WORDS = 4096  # hash buckets of words: no vocabulary is learned from any data
LENGTH = 16  # words of a query that are read


class Classes:
    """Intents of one stage: read the words, name the class. Accuracy among all classes seen so far.

    The class of a query is the class token with the largest logit after its last word. The loss of a stage compares its
    own classes only, for every learner: then what is forgotten is forgotten by the features and not by the last softmax.
    """

    def __init__(self, name, train, test, classes, epochs=2):
        self.name, self.classes, self.epochs = name, classes, epochs
        (self.x, self.last, self.y), (self.tx, self.tlast, self.ty) = train, test

    def steps(self, quick):
        return 3 if quick else self.epochs * len(self.y) // 32

    def logits(self, model, words, last, classes):
        """What `model(words)` says after the last word about the class tokens, and nothing else: a tenth of the work."""
        x = model.embedding(words)
        for block in model.blocks:
            x, _ = block(x, None)
        x = model.norm(x[torch.arange(len(x)), last])
        return F.linear(x, model.embedding.weight[[WORDS + 1 + c for c in classes]])

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
    folder = read(data, "clinc150")
    full = json.loads((folder / "data_full.json").read_text())
    groups = json.loads((folder / "domains.json").read_text())
    return class_stages(groups, full["train"], full["test"])


def banking77(data, stages=7):
    folder = read(data, "banking77")

    def rows(name):
        with open(folder / name, newline="") as file:
            return list(csv.reader(file))[1:]

    train, test = rows("train.csv"), rows("test.csv")
    names = sorted({label for _, label in train})
    groups = {f"group {i + 1}": names[i * len(names) // stages : (i + 1) * len(names) // stages] for i in range(stages)}
    return class_stages(groups, train, test)


def class_stages(groups, train, test):
    number = {label: i for i, label in enumerate(label for labels in groups.values() for label in labels)}

    def of(rows, labels):
        return queries([(text, number[label]) for text, label in rows if label in labels])

    parts = [(name, of(train, own), of(test, own), [number[label] for label in own]) for name, own in groups.items()]
    return [Classes(*part) for part in parts]


# ---------------------------------------------------------------------------------------------------------------------
# The token clock: a novel read once

STREAM = {  # chunks of the levels in tokens, all of which update; the last two read with the same weights
    "1 level": ([128], "sequential"),
    "3 levels": ([128, 512, 2048], "sequential"),
    "3 levels nested": ([128, 512, 2048], "nested"),
}
STEPS = (3e-4, 1e-3, 3e-3)  # inner step sizes to choose from, on other novels than are reported


def bits(loss):
    return loss.mean().item() / math.log(2)


@torch.no_grad()
def read_frozen(model, tokens, state=None):
    """Bits per token of tokens [B, T] with the weights of `state` and fresh mixers, nothing learned."""
    if state is not None:
        state = {"blocks": [{"mixer": None, "cms": block["cms"]} for block in state["blocks"]]}
    return bits(F.cross_entropy(model(tokens, state)[0][:, :-1].mT, tokens[:, 1:]))


def pretrained(levels, variant, train, seed, tokens, folder):
    """A model trained the ordinary way (no steps in context) on `train`; kept in `folder`."""
    path = folder / f"{'-'.join(map(str, levels))}-{seed}-{tokens}.pt"
    torch.manual_seed(seed)
    model = Hope(HopeConfig(model="hope", levels=list(levels), variant=variant, **SIZE))
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    optimizer, steps = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95)), tokens // (8 * 512)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 10) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        inputs, targets = batch(train, 8, 512, seed, step)
        loss_fn(model(inputs)[0], targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    folder.mkdir(parents=True, exist_ok=True)
    write_beside(path, lambda beside: torch.save(model.state_dict(), beside))
    return model


def stream(args, done, report):
    """Held-out novels, then as much of something else, then the novels' continuation: what is gained, what is kept."""
    encoding, rows = tokenizer(), 4
    length, again, tokens = (1024, 512, 10_000) if args.quick else (8_192, 4_096, 400_000)
    novels = [text for _, text in documents(str(read(args.data, "novels")))]
    streams = [np.frombuffer(text, np.uint8).astype(np.int64) for text in novels[: 2 * rows + 2]]
    streams = torch.from_numpy(np.stack([text[20_000 : 20_000 + length + again] for text in streams]))  # past the front matter
    novel, chosen_on = streams[:rows], streams[rows : rows + 2, :length]
    train = join(novels[rows + 2 :], encoding)
    code = join([text for _, text in documents("stdlib")], encoding).astype(np.int64)
    code = torch.from_numpy(code[code < 256][: rows * length].reshape(rows, length))
    others = {"another novel": streams[rows + 2 :, :length], "code": code}  # that novel is of the training text
    began, folder = time.process_time(), Path(args.out).parent / "pretrained"
    for seed in range(args.seeds):
        for name, (levels, variant) in STREAM.items():
            if (name, seed) in done:
                continue
            model = pretrained(levels, variant, train, seed, tokens, folder)
            with torch.no_grad():
                grid = {step: bits(model.learn(chosen_on, step=step)[0][:, length // 2 :]) for step in STEPS}
                step = min(grid, key=lambda s: grid[s] if math.isfinite(grid[s]) else math.inf)
                still = F.cross_entropy(model(novel[:, :length])[0][:, :-1].mT, novel[:, 1:length], reduction="none")
                loss, state = model.learn(novel[:, :length], step=step)
                fresh = read_frozen(model, novel[:, length:])
                after_novel = read_frozen(model, novel[:, length:], state)
                curve = [(bits(still[:, i : i + 2048]), bits(loss[:, i : i + 2048])) for i in range(0, length, 2048)]
                kept = {}
                for what, text in others.items():
                    since, kept[what] = state, []
                    for part in text.split(length // 4, 1):
                        since = model.learn(part, since, step=step)[1]
                        kept[what].append(read_frozen(model, novel[:, length:], since))
            report({"learner": name, "seed": seed, "levels": levels, "variant": variant, "step": step, "grid": grid,
                    "parameters": sum(p.numel() for p in model.parameters()),
                    "second half": {"without": bits(still[:, length // 2 :]), "with": bits(loss[:, length // 2 :])},
                    "continuation": {"start weights": fresh, "after the novel": after_novel, "then": kept},
                    "curve": curve, "seconds": round(time.process_time() - began, 1)})  # fmt: skip


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


def staged(args, done, report):
    """`domains` and `classes`: every learner that is asked for, every seed."""
    if args.command == "domains":
        stages, changes = domains(args.data), {}
    else:
        stages = clinc150(args.data) if args.set == "clinc150" else banking77(args.data)
        classes = sum(len(stage.classes) for stage in stages)
        changes = {"vocab_size": WORDS + 1 + classes, "chunk": 16}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for learner in args.learners:
            if (learner, seed) not in done:
                result = run(learner, stages, seed, args.lr, args.ewc, args.quick, **changes)
                report({"learner": learner, "seed": seed, "lr": args.lr, "stages": [stage.name for stage in stages],
                        **({"ewc": args.ewc} if "ewc" in learner else {}),
                        **metrics(result["matrix"], args.command == "classes"), **result})  # fmt: skip


def table(records, command):
    """The records, seeds averaged, as lines of a Markdown table."""
    if command == "stream":
        lines = ["| learner | seed | step | second half: without | with updates | continuation: gain after the novel "
                 "| kept after another novel | kept after code |", "|" + "---|" * 8]  # fmt: skip
        for r in records:
            half, rest = r["second half"], r["continuation"]
            gains = [rest["start weights"] - x for x in (rest["after the novel"], *(k[-1] for k in rest["then"].values()))]
            cells = [r["learner"], r["seed"], r["step"], *(f"{x:.3f}" for x in (half["without"], half["with"], *gains))]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        return lines
    keys = ("average", "last", "forgetting", "first forgotten", "backward", "forward")
    lines = ["| learner | seeds | " + " | ".join(keys) + " | M parameter updates | TFLOP | s |", "|" + "---|" * 11]
    for learner in dict.fromkeys(r["learner"] for r in records):
        own = [r for r in records if r["learner"] == learner]
        cells = [f"{np.mean([r[key] for r in own]):.3f}" for key in keys]
        cost = [np.mean([r[key] for r in own]) / unit for key, unit in (("updates", 1e6), ("flops", 1e12), ("seconds", 1))]
        lines.append(f"| {learner} | {len(own)} | " + " | ".join([*cells, *(f"{x:.2f}" for x in cost)]) + " |")
    return lines


def plot(records, command, path):
    """Curves of the stream, or one heat-map of the matrix for every learner."""
    from matplotlib.figure import Figure  # slow to import; a Figure of its own needs no display

    if command == "stream":
        figure = Figure(figsize=(12, 3.6), layout="constrained")
        first, *others = figure.subplots(1, 3)
        for learner, color in zip(STREAM, ("tab:orange", "tab:blue", "tab:green"), strict=True):
            own = [r for r in records if r["learner"] == learner]
            if not own:
                continue
            curve = np.mean([r["curve"] for r in own], 0)
            x = np.arange(1, len(curve) + 1) * 2.048
            first.plot(x, curve[:, 0] - curve[:, 1], color=color, label=learner)
            for axes, what in zip(others, own[0]["continuation"]["then"], strict=True):
                rest = [r["continuation"] for r in own]
                gains = [[r["start weights"] - bits for bits in (r["after the novel"], *r["then"][what])] for r in rest]
                axes.plot(np.arange(5) * x[-1] / 4, np.mean(gains, 0), "o-", color=color, label=learner)
                axes.set(xlabel=f"thousand bytes of {what} read", title=f"then {what}", ylabel="gain kept (bits per byte)")
        first.set(xlabel="thousand bytes of the novel read", ylabel="gain of learning (bits per byte)", title="reading a novel")
        for axes in (first, *others):
            axes.axhline(0, color="gray", linewidth=0.8)
            axes.legend(frameon=False)
    else:
        learners = list(dict.fromkeys(r["learner"] for r in records))
        figure = Figure(figsize=(3.2 * min(3, len(learners)), 3 * -(-len(learners) // 3)), layout="constrained")
        grid = figure.subplots(-(-len(learners) // 3), min(3, len(learners)), squeeze=False).flatten()
        for axes, learner in zip(grid, learners, strict=False):
            R = np.mean([r["matrix"] for r in records if r["learner"] == learner], 0)[1:]
            high = 1 if command == "classes" else np.percentile([r["matrix"][1:] for r in records], 95)
            axes.imshow(R, cmap="viridis" if command == "classes" else "viridis_r", vmin=0, vmax=high)
            for i, row in enumerate(R):
                for j, value in enumerate(row):
                    axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="white", fontsize=6)
            ticks, names = range(len(R)), records[0]["stages"]
            axes.set(title=learner, xlabel="scored on stage", ylabel="after stage")
            axes.set_xticks(ticks, names, fontsize=6, rotation=20)
            axes.set_yticks(ticks, names, fontsize=6)
        for axes in grid[len(learners) :]:
            axes.remove()
    write_beside(path, lambda beside: figure.savefig(beside, dpi=120, format="png"))


def main(argv=None):
    """The command; returns the exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", help="stream, domains, classes or cost")
    parser.add_argument("--data", default=os.environ.get("NESTED_DATA"), help="folder of the data sets (default: $NESTED_DATA)")
    parser.add_argument("--set", default="clinc150", help="of classes: clinc150 or banking77")
    parser.add_argument("--learners", help=f"comma-separated, of {', '.join(LEARNERS)} (default: all)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-3, help="AdamW's, of every learner and stage")
    parser.add_argument("--ewc", type=float, default=1e3, help="strength of the penalty of EWC")
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
        if args.seeds < 1 or args.first_seed < 0:
            raise ValueError(f"seeds is {args.seeds}, first-seed {args.first_seed}: legal are at least 1 and 0")
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
            print(table([record], args.command)[-1], flush=True)

        (stream if args.command == "stream" else staged)(args, {(r["learner"], r["seed"]) for r in records}, report)
        plot(records, args.command, out.with_suffix(".png"))
    except (ValueError, OSError) as error:
        print(f"continual.py: error: {first_line(error)}", file=sys.stderr)
        return 2
    print("\n".join(["", *table(records, args.command), "", f"written to {out} and {out.with_suffix('.png')}"]))
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
