"""Learners of continual learning, on both clocks of the Continuum Memory System (CMS).

Step clock: stages one after the other. After stage 1, `none` stops learning (all it does is read
its context), `finetune` goes on, `ewc` too, held back by elastic weight consolidation (Kirkpatrick
et al. 2017, diagonal Fisher information of every finished stage), and Hope has 1 to 4 CMS levels
(`LevelOptimizer`): level l of the MLPs steps every PERIODS[l] training steps; embedding, mixers and
norms step with the slowest. Stage 1 is trained by all in the ordinary way.

Token clock: a model that was trained through its steps in context reads a text once, and the CMS
levels learn from it as they did in training (`Hope.learn`).
"""

import contextlib
import io
import math
import time
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from hope import Hope, HopeConfig, loss_fn
from layers import tensors
from optimizers import LevelOptimizer
from support.config import TrainConfig
from support.run import Run, optimizer_for, resumed
from train import train, update

SIZE = {"d_model": 64, "n_layers": 2, "n_heads": 1}  # about 0.11M parameters, for all learners

# --------------------------------------------------------------------------------------------------
# The step clock: one stage after the other

PERIODS = (1, 3, 9, 27)  # training steps between updates of level 1, 2, 3, 4
FIRST_LR = 2e-3  # of stage 1
LEARNERS = {  # name: (model, levels on the step clock, method)
    "transformer none": ("transformer", 1, "none"),
    "transformer finetune": ("transformer", 1, "finetune"),
    "transformer ewc": ("transformer", 1, "ewc"),
    "hope none": ("hope", 1, "none"),
    "hope ewc": ("hope", 1, "ewc"),
    "hope 1 level": ("hope", 1, "finetune"),
    "hope 2 levels": ("hope", 2, "finetune"),
    "hope 3 levels": ("hope", 3, "finetune"),
    "hope 4 levels": ("hope", 4, "finetune"),
}


def build(model, levels, seed, classes=None, **changes):
    """A model of SIZE with that many feed-forward levels. classes: rows of a head of its own."""
    torch.manual_seed(seed)
    # The token clock is off: only how many chunks there are matters.
    chunks = [2**20 * 2**i for i in range(levels - 1)] + [None]
    own = {"levels": chunks, "cms_updates": "off"}
    model = Hope(HopeConfig(model=model, **(own | SIZE | changes)))
    if classes:
        model.head = nn.Linear(model.config.d_model, classes, bias=False)
    return model


def level_optimizer(model, periods):
    """train.py's AdamW on the step clock: a period for each MLP of a block.

    A head of its own has the first period, everything else the last.
    """
    levels = {f"mlps.{i}": period for i, period in enumerate(periods)} | {"": periods[-1]}
    if model.head is not None:
        levels = {"head": periods[0]} | levels
    return LevelOptimizer(optimizer_for(model, TrainConfig()), model, levels)


class EWC:
    """Elastic weight consolidation: strength / 2 * sum over finished stages of F (w - w*)^2.

    F is the diagonal Fisher information of a stage, w* the weights at its end.
    """

    def __init__(self, model, strength):
        self.model = model
        self.strength = strength
        self.stages = []  # (Fisher information, weights), lists of a tensor per parameter

    def penalty(self):
        total = 0.0
        for fisher, at in self.stages:
            for F_, p, w in zip(fisher, self.model.parameters(), at, strict=True):
                total = total + (0.5 * self.strength * (F_ * (p - w).square()).sum())
        return total

    def finish(self, losses):
        """Remember the stage: losses, an iterable of scalars, one for each example."""
        params = list(self.model.parameters())
        fisher = [torch.zeros_like(p) for p in params]
        count = 0
        for loss in losses:
            count += 1
            for total, g in zip(fisher, torch.autograd.grad(loss, params), strict=True):
                total.addcmul_(g, g)
        at = [p.detach().clone() for p in params]
        self.stages.append(([f / count for f in fisher], at))


def train_stage(model, optimizer, stage, lr, seed, quick, penalty=lambda: 0.0):
    """All training steps of a stage -> Counter of updates (of single parameters), tokens, seconds.

    Raises NonFinite where the loss or a gradient is not finite.
    """
    cost = Counter()
    began = time.process_time()
    for step in range(stage.steps(quick)):
        loss, tokens = stage.loss(model, seed, step)
        rising = min(1.0, (step + 1) / 10)
        update(model, optimizer, lr * rising, [loss + penalty()], grad_clip=1.0)
        due = optimizer.due(optimizer.ticks)
        for name, p in optimizer.parameters.items():
            if optimizer.level[name] in due:
                cost["updates"] += p.numel()
        cost["tokens"] += tokens
    cost["seconds"] += time.process_time() - began
    return cost


def run(learner, stages, seed, lr, ewc, quick, first, hope="hope", before=None, **changes):
    """One learner through all stages: {"matrix", "updates", "flops", "seconds", "parameters"}.

    stages: see streams.py. lr: of the stages after the first; ewc: its strength. first: a
    dictionary that is filled with what stage 1 has made of each model and seed, because that is the
    same whatever comes after. hope: which of its two forms, "hope" or "hope_attention". before: a
    stage that every learner is trained on before stage 1, unscored. changes: fields of HopeConfig,
    `classes`.
    """
    kind, levels, method = LEARNERS[learner]
    kind = hope if kind == "hope" else kind
    model = build(kind, levels, seed, **changes)
    size = sum(p.numel() for p in model.parameters())
    # stage 1: in the ordinary way, all levels at every step
    if (kind, levels, seed) not in first:
        rows = [[stage.score(model, []) for stage in stages]]
        cost = Counter()
        for stage in [before, stages[0]] if before else stages[:1]:
            optimizer = level_optimizer(model, PERIODS[:1] * levels)
            cost += train_stage(model, optimizer, stage, FIRST_LR, seed, quick)
        rows.append([stage.score(model, stages[:1]) for stage in stages])
        weights = {name: w.clone() for name, w in model.state_dict().items()}
        first[kind, levels, seed] = weights, rows, cost
    weights, rows, cost = first[kind, levels, seed]
    model.load_state_dict(weights)
    matrix = list(rows)
    cost = Counter(cost)
    # the others: one optimizer for all, because its periods do not end with a stage
    anchor = EWC(model, ewc) if method == "ewc" else None
    optimizer = level_optimizer(model, PERIODS[:levels])
    for number, stage in enumerate(stages[1:], 1):
        if anchor:
            began = time.process_time()
            anchor.finish(stages[number - 1].examples(model, quick))
            cost["seconds"] += time.process_time() - began
        if method != "none":
            penalty = anchor.penalty if anchor else lambda: 0.0
            cost += train_stage(model, optimizer, stage, lr, seed, quick, penalty)
        matrix.append([scored.score(model, stages[: number + 1]) for scored in stages])
    return {
        "matrix": matrix,
        "updates": cost["updates"],
        "flops": 6 * size * cost["tokens"],
        "seconds": round(cost["seconds"], 1),
        "parameters": size,
    }


def metrics(matrix, higher_is_better):
    """Average, forgetting and transfer of a matrix [1 + n][n] of scores, see continual.py."""
    R = np.array(matrix) * (1 if higher_is_better else -1)
    n = R.shape[1]
    seen = range(n - 1)  # all stages but the last
    return {
        "average": float(np.mean(matrix[-1])),
        "last": float(matrix[-1][-1]),
        "forgetting": float(np.mean([R[j + 1 : n, j].max() - R[n, j] for j in seen])),
        "first forgotten": float(R[1, 0] - R[n, 0]),
        "backward": float(np.mean([R[n, j] - R[j + 1, j] for j in seen])),
        "forward": float(np.mean([R[j, j] - R[0, j] for j in range(1, n)])),
    }


# --------------------------------------------------------------------------------------------------
# The token clock: a text read once

ROW = 2048  # tokens of a row in training
STREAM = {  # chunks of the levels in tokens, all of which update, and the variant
    "1 fast level": ([128], "sequential"),
    "3 levels": ([128, 512, 2048], "sequential"),
    "3 levels, nested": ([128, 512, 2048], "nested"),
}


def stream_model(name, seed, root, quick):
    """The model of a line of STREAM, trained on root/texts and kept in `root`."""
    levels, variant = STREAM[name]
    folder = root / f"{'-'.join(map(str, levels))}-{seed}"
    with torch.enable_grad():
        model = trained(folder, root / "texts", levels, seed, quick)
    for block in model.blocks:
        block.cms.variant = variant  # a calendar: sequential and nested levels read alike
    return model


def trained(folder, data, levels, seed, quick):
    """The model of a run of train.py, through steps in context; resumes a stopped one."""
    if not (folder / "sample.txt").exists():
        if (folder / "config.json").exists():
            config = resumed(str(folder))
        else:
            config = TrainConfig(
                out=str(folder),
                data=str(data),
                set={"levels": levels, "cms_blocks": None, **SIZE},
                seed=seed,
                seq_len=ROW,
                batch_size=1,
                eval_every=0,
                tokens=8_192 if quick else 800_000,
                threads=1,
            )
        with contextlib.redirect_stdout(io.StringIO()):
            train(config)
    return Run.open(folder, "cpu").model


def bits(loss):
    """Mean of losses in nats, in bits: per byte, because tokens are bytes here."""
    return loss.mean().item() / math.log(2)


def read_still(model, tokens, state=None):
    """Loss [B, T - 1] in nats of tokens [B, T] with fresh mixers and the CMS levels of `state`.

    Nothing is learned.
    """
    if state is not None:
        blocks = [{"mixer": None, "cms": block["cms"]} for block in state["blocks"]]
        state = {"blocks": blocks}
    logits = model(tokens, state, updates="off")[0][:, :-1]
    return F.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")


def gains(model, tokens, state):
    """By how many bits per byte `state` reads tokens better than the initial weights do.

    {"all", "1", "2", ...}: all its levels, and each alone with the others at their initial weights.
    """
    start = bits(read_still(model, tokens))
    count = len(model.config.levels)
    kept = {"all": range(count)}
    if count > 1:
        kept |= {str(level + 1): [level] for level in range(count)}
    found = {}
    for name, levels in kept.items():
        blocks = []
        for block in state["blocks"]:
            fast = [w if i in levels else None for i, w in enumerate(block["cms"]["fast"])]
            blocks.append({"cms": block["cms"] | {"fast": fast}})
        found[name] = start - bits(read_still(model, tokens, {"blocks": blocks}))
    return found


@torch.no_grad()
def read_novels(name, model, read):
    """A novel is read once, and then as much of something else: what is gained, and what is left.

    read: {"novel", "another novel", "code"}, tokens [B, T] each. gain: how much better the model
    then knows the second half of the novel, learning no more (see `gains`). "again": bits per byte
    of reading that half again and learning on, from the start and after what was read before.
    """
    began = time.process_time()
    novel = read["novel"]
    length = novel.shape[1]
    half = length // 2
    again = novel[:, half:]
    still = read_still(model, novel)
    loss, state = model.learn(novel)
    curve = []
    for i in range(0, length, length // 16):
        curve.append([bits(x[:, i : i + length // 16]) for x in (still, loss)])
    gain = {"novel": gains(model, again, state)}
    alone = {}
    read_on = {"from the start": bits(model.learn(again)[0])}
    for what in ("another novel", "code"):
        after = {what: model.learn(read[what], state)[1]}
        after[f"{what} alone"] = model.learn(read[what])[1]
        gain[what], alone[what] = (gains(model, again, own) for own in after.values())
        for name_of, own in after.items():
            again_loss, _ = model.learn(again, own)
            read_on[name_of] = bits(again_loss[:, 1:])  # the start has no prediction of the first
    levels, variant = STREAM[name]
    return {
        "levels": levels,
        "variant": variant,
        "length": length,
        "parameters": sum(p.numel() for p in model.parameters()),
        "second half": {"without": bits(still[:, half:]), "with": bits(loss[:, half:])},
        "curve": curve,
        "gain": gain,
        "gain of the other alone": alone,
        "again": read_on,
        "seconds": round(time.process_time() - began, 1),
    }


def cost(quick):
    """Prints time of a training step and memory of the state, learning in context or not."""
    d, T, repeats = (64, 512, 1) if quick else (256, 1024, 3)
    tokens, targets = torch.randint(257, (2, 4, T))
    size = f"d {d}, 4 layers, 4 x {T} tokens, levels [256, 1024]"
    print(f"{size}: seconds of the processor for a training step (median)\n")
    memory = "fast weights + sums + state of an unfinished chunk, MB a row"
    print(f"| model | off | first_order | ratio | {memory} |")
    print("|---" * 5 + "|")
    for kind in ("hope", "hope_attention"):
        torch.manual_seed(0)
        own = {"d_model": d, "n_layers": 4, "n_heads": d // 64, "levels": [256, 1024]}
        model = Hope(HopeConfig(model=kind, **own))
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
        parts = {"cms": [block["cms"] for block in state["blocks"]], "chunk": state["stream"]}
        parts["sums"] = [cms["sums"] for cms in parts["cms"]]
        size = {}
        for name, part in parts.items():
            size[name] = sum(t.nbytes for t in tensors(part)) / 1e6
        memory = f"{size['cms'] - size['sums']:.2f} + {size['sums']:.2f} + {size['chunk']:.2f}"
        times = f"{off:.2f} | {on:.2f} | {on / off:.2f}"
        print(f"| `{kind}` | {times} | {memory} |", flush=True)
