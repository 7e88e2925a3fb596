"""Continuum Memory System: a chain of feed-forward memories, each updated at its own rate (NL sec. 7.1, eq. 70-74).

A Transformer block has two memories: attention, new for every token, and a feed-forward network, fixed after
training. CMS fills the range between: level l is an MLP whose weights take one step every `chunk` ticks and stand
still otherwise (NL 71),

    w_{i+1} = w_i - sum_{t = i-chunk+1..i} eta_t * error(w_t; x_t)     if i = 0 mod chunk,     else w_{i+1} = w_i

so fast levels hold what was just read and slow levels hold what lasts. A tick is a token (in context) or a step (in
training). Three ways to put the levels together:

    sequential (NL 70, 73)   x -> [fast] -> [mid] -> [slow] -> y       every level starts from its own learned weights
    nested     (NL 72)       the same chain; a level returns to its learned start whenever the next slower level updates
    independent (NL 74)      y = x + sum_l mix_l * MLP_l(x)            a learned weighted sum of parallel levels

On the token clock (Hope.learn in hope.py) the parameters are the learned starts w_0; the weights of the moment ("fast
weights", one copy per batch row) live in the state, so that the gradient of what is read later flows back into the
starts. On the step clock (`LevelOptimizer`, at the end of this file) the parameters themselves are the weights of the
moment, and each level's optimizer accumulates and steps at its own rate. One level that never updates is the usual
SwiGLU block of a Transformer.

    python cms.py        the calendar of each variant, and what an update costs
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

VARIANTS = ("sequential", "nested", "independent")


@dataclass(frozen=True)
class Level:
    """One memory of the chain. chunk: ticks between updates (C^(l) of NL 71), None = never; hidden: width of its MLP.

    Raises ValueError for chunk < 1 or hidden < 1.
    """

    chunk: int | None
    hidden: int

    def __post_init__(self):
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"level chunk is {self.chunk}; it must be at least 1 tick, or None (never updates)")
        if self.hidden < 1:
            raise ValueError(f"level hidden is {self.hidden}; it must be at least 1")


class MLP(nn.Module):
    """SwiGLU behind its norm, without the residual: `w_out (silu(gate) * up)`, `[gate; up] = w_in norm(x)`.

    w_in [2 hidden, d_model] holds both projections (one product); w_out [d_model, hidden]. Only these two are ever
    fast: the norm, like everything outside the levels, moves on the training clock alone.
    """

    def __init__(self, d_model, hidden, out_scale=1.0, eps=1e-6):
        super().__init__()
        self.norm = nn.RMSNorm(d_model, eps=eps)
        self.w_in = nn.Parameter(torch.randn(2 * hidden, d_model) * d_model**-0.5)
        self.w_out = nn.Parameter(torch.randn(d_model, hidden) * (out_scale * hidden**-0.5))

    def forward(self, x, fast=None):
        """x [B, T, d_model] -> the same shape. fast: {"w_in" [B, 2h, d], "w_out" [B, d, h]}, one memory per row, or
        None for the learned start."""
        w_in, w_out = (self.w_in, self.w_out) if fast is None else (fast["w_in"], fast["w_out"])
        gate, up = (self.norm(x) @ w_in.mT).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ w_out.mT

    def start(self, batch):
        """The learned start as fast weights of `batch` rows: views, so every row's gradient reaches the parameters."""
        return {name: getattr(self, name).expand(batch, -1, -1) for name in ("w_in", "w_out")}


class CMS(nn.Module):
    """Continuum Memory System (NL 70-74): residuals and norms included, `x, state = cms(x, state)`.

    levels: from fast to slow; each chunk is a multiple of the one before, so that a slow update always falls on the
    end of a fast chunk, and only the last level may have chunk=None. variant: one of VARIANTS. out_scale: factor on
    the initial w_out (1 / sqrt(2 n_layers) keeps a deep residual stream at unit scale).

    step: None, or the initial inner step size of every updating level (a number, or one per level), which then is
    learned, as its logarithm.

    state is None when nothing updates in context. Otherwise it is a plain tree, {"position": ticks seen, "fast": [one
    entry per level], "sums": [one per level]}: the level's fast weights (see MLP.forward), or None for a level that stays
    at its start; the gradients it has collected since its last update, or None where there are none yet.
    Raises ValueError for an empty or ill-ordered list of levels, an unknown variant, shapes that do not fit, a step <= 0.
    """

    def __init__(self, d_model, levels, variant="sequential", out_scale=1.0, step=None, eps=1e-6):
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"unknown CMS variant {variant!r}; choose one of {', '.join(VARIANTS)}")
        if d_model < 1:
            raise ValueError(f"d_model is {d_model}; it must be at least 1")
        if not levels:
            raise ValueError("levels is empty; a CMS has at least one (chunk=None: an ordinary feed-forward block)")
        for fast, slow in pairwise(levels):
            if fast.chunk is None or (slow.chunk is not None and (slow.chunk <= fast.chunk or slow.chunk % fast.chunk)):
                raise ValueError(
                    f"level chunks are {[level.chunk for level in levels]}; they must grow from fast to slow, "
                    "each a multiple of the one before, None (never updates) only as the last"
                )
        self.d_model, self.levels, self.variant = d_model, tuple(levels), variant
        self.mlps = nn.ModuleList(MLP(d_model, level.hidden, out_scale, eps) for level in levels)
        if variant == "independent":
            self.mix = nn.Parameter(torch.full((len(levels),), 1 / len(levels)))
        self.log_step = None
        if step is not None:
            steps = self.steps(step)
            if min(steps, default=1) <= 0:
                raise ValueError(f"step is {step}; a learned inner step size must start above 0")
            self.log_step = nn.Parameter(torch.tensor(steps, dtype=torch.get_default_dtype()).log())

    def steps(self, step=None):
        """Step size of each updating level, from `step` (a number, or one for each) or, None, the learned ones."""
        count = sum(level.chunk is not None for level in self.levels)
        if step is None:
            if self.log_step is None:
                raise ValueError("this CMS has no learned inner step size: build it with one (cms_step), or give step")
            return self.log_step.exp()
        steps = [float(step)] * count if isinstance(step, (int, float)) else [float(s) for s in step]
        if len(steps) != count or not all(0 <= s < float("inf") for s in steps):
            raise ValueError(f"step is {step}; legal is one number >= 0, or one for each of the {count} levels that update")
        return steps

    def forward(self, x, state=None):
        """x [B, T, d_model] -> (y [B, T, d_model], state with its position T ticks on; None stays None)."""
        if x.shape[-1] != self.d_model:
            raise ValueError(f"x has width {x.shape[-1]}; this CMS has d_model {self.d_model}")
        fast = [None] * len(self.mlps)
        if state is not None:
            self._check(state, x)
            fast = state["fast"]
            state = state | {"position": state["position"] + x.shape[1]}
        if self.variant == "independent":
            return sum((mix * mlp(x, w) for mix, mlp, w in zip(self.mix, self.mlps, fast, strict=True)), start=x), state
        for mlp, w in zip(self.mlps, fast, strict=True):
            x = x + mlp(x, w)
        return x, state

    def _check(self, state, x):
        if len(state["fast"]) != len(self.mlps):
            raise ValueError(f"the state has {len(state['fast'])} levels; this CMS has {len(self.mlps)}")
        for number, w in enumerate(state["fast"]):
            if w is not None and w["w_in"].shape[0] != x.shape[0]:  # a batch never shares a memory, so no broadcasting
                rows = w["w_in"].shape[0]
                raise ValueError(f"level {number} of the state has fast weights for {rows} rows; x has {x.shape[0]}")

    def start_state(self, batch):
        """State at tick 0 for `batch` rows: each level that has a chunk carries fast weights equal to its start."""
        if batch < 1:
            raise ValueError(f"batch is {batch}; it must be at least 1 row")
        updates = [level.chunk is not None for level in self.levels]
        fast = [mlp.start(batch) if moves else None for mlp, moves in zip(self.mlps, updates, strict=True)]
        return {"position": 0, "fast": fast, "sums": [None] * len(fast)}

    def update(self, state, grads, step=None):
        """NL 71 at tick state["position"]: every level adds `grads` to its sum; those that are due take their step.

        grads: one entry per level, like state["fast"]: the gradient of the summed loss of the ticks since the last call,
        of which every tick at which a level is due must be the end. step: see `steps`. Returns the new state; nothing is
        written in place, and the result can be differentiated in everything that can.
        """
        due, resets = self.due(state["position"]), self.resets(state["position"])
        steps, fast, sums = iter(self.steps(step)), [], []
        for number, (w, total, g) in enumerate(zip(state["fast"], state["sums"], grads, strict=True)):
            if w is not None:
                eta, batch = next(steps), w["w_in"].shape[0]
                total = g if total is None else {name: total[name] + g[name] for name in g}
                if number in resets:
                    w, total = self.mlps[number].start(batch), None
                elif number in due:
                    w, total = {name: w[name] - eta * total[name] for name in w}, None
            fast.append(w)
            sums.append(total)
        return state | {"fast": fast, "sums": sums}

    def due(self, tick):
        """Numbers of the levels that update at the end of tick (the first is 1): chunk C at C, 2C, ... (NL 71)."""
        if tick < 1:
            raise ValueError(f"tick is {tick}; ticks count from 1")
        return [number for number, level in enumerate(self.levels) if level.chunk and tick % level.chunk == 0]

    def resets(self, tick):
        """Numbers of the levels that return to their learned start after the updates of tick: in the nested variant
        those whose next slower level is due, so each takes C_slow / C_fast steps from one start (NL 72); else none."""
        due = self.due(tick)
        return [number for number in due if number + 1 in due] if self.variant == "nested" else []


class LevelOptimizer:
    """The step clock (NL 71 with ticks = training steps): each level accumulates gradients and steps every `chunk` steps.

    optimizer: any torch optimizer, or several `Together`, of parameters of `model`. levels: {part of a parameter's name:
    chunk in steps, None = never steps}; the first part found in a name decides, and "" is found in every name. Mixers and
    embeddings deserve levels of their own, slower than most: they forget first.

        optimizer = LevelOptimizer(AdamW(model.parameters()), model, {"mlps.0": 1, "mlps.1": 8, "": 16})

    A level that is due hands the *sum* of its gradients (of one training step each) to the optimizer; the parameters of
    the others have no gradient in that step, and so neither they nor their moments move. `due(step)` names the calendar.
    `state_dict` holds the sums, so a run resumes in the middle of a period. Raises ValueError for a parameter that is not
    the model's or has no level, a chunk < 1, a part that is in no name, the state of other levels.
    """

    def __init__(self, optimizer, model, levels):
        for part, chunk in levels.items():
            if chunk is not None and (type(chunk) is not int or chunk < 1):
                raise ValueError(f"level {part!r} has chunk {chunk!r}; it must be at least 1 step, or None (never steps)")
        self.optimizer, self.levels, self.ticks = optimizer, dict(levels), 0
        self.parameters, self.level, self.sums = {}, {}, {}
        names = {id(p): name for name, p in model.named_parameters()}
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if (name := names.get(id(p))) is None:
                raise ValueError(f"the optimizer has a parameter of shape {list(p.shape)} that is not the model's")
            found = [part for part in levels if part in name]
            if not found:
                raise ValueError(f"parameter {name!r} has no level: the levels are {list(levels)}; '' takes all the others")
            self.parameters[name], self.level[name] = p, found[0]
        if unused := [part for part in levels if part and part not in self.level.values()]:
            raise ValueError(f"level {unused[0]!r} has no parameter, among {', '.join(list(self.parameters)[:4])}, ...")

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def due(self, tick):
        """The levels that step at the end of training step `tick` (the first is 1)."""
        return [part for part, chunk in self.levels.items() if chunk and tick % chunk == 0]

    @torch.no_grad()
    def step(self):
        """Take p.grad of every parameter, which is None afterwards, and let the levels that are due step."""
        self.ticks += 1
        due = self.due(self.ticks)
        for name, p in self.parameters.items():
            if p.grad is not None and self.levels[self.level[name]]:
                self.sums[name] = self.sums[name].add_(p.grad) if name in self.sums else p.grad
            p.grad = self.sums.pop(name, None) if self.level[name] in due else None
        self.optimizer.step()
        self.zero_grad()

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self):
        return {"optimizer": self.optimizer.state_dict(), "ticks": self.ticks, "levels": self.levels,
                "sums": {name: g.clone() for name, g in self.sums.items()}}  # fmt: skip

    def load_state_dict(self, state):
        if state["levels"] != self.levels:
            raise ValueError(f"the state is of levels {state['levels']}; these are {self.levels}")
        self.optimizer.load_state_dict(state["optimizer"])
        self.ticks = state["ticks"]
        self.sums = {name: g.to(self.parameters[name]).clone() for name, g in state["sums"].items()}


def main():
    levels = [Level(2, 64), Level(4, 128), Level(12, 256), Level(None, 512)]
    print("Updates (u) and updates followed by a return to the learned start (R), tick by tick\n")
    for variant in VARIANTS:
        cms = CMS(64, levels, variant)
        print(f"{variant:<14}" + "".join(f"{tick:>3}" for tick in range(1, 25)))
        for number, level in enumerate(levels):
            marks = ["R" if number in cms.resets(t) else "u" if number in cms.due(t) else "." for t in range(1, 25)]
            print(f"  chunk {level.chunk or 'never':<6}" + "".join(f"{mark:>3}" for mark in marks))
        print()
    print("What it costs (d_model 64): a slow memory is large and cheap to update, because it seldom is\n")
    print("  chunk   hidden  parameters  updated per tick")
    for level, mlp in zip(cms.levels, cms.mlps, strict=True):
        count = sum(w.numel() for w in mlp.parameters())
        rate = (mlp.w_in.numel() + mlp.w_out.numel()) / level.chunk if level.chunk else 0
        print(f"  {level.chunk or 'never':<6}{level.hidden:>8}{count:>12,}{rate:>18,.0f}")
    y, state = cms(torch.randn(3, 10, 64), cms.start_state(batch=3))
    shapes = [tuple(w["w_in"].shape) if w else None for w in state["fast"]]
    print(f"\nafter {state['position']} tokens of 3 rows: y {tuple(y.shape)}, fast w_in per level {shapes}")


if __name__ == "__main__":
    main()
