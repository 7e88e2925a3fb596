"""Continuum Memory System: feed-forward memories, each updated at its own rate (NL eq. 70-74).

A Transformer block has two memories: attention, new for every token, and a feed-forward network,
fixed after training. A CMS fills the range between. Level l is an MLP whose weights take one step
every `chunk` ticks and stand still otherwise (NL 71):

    w_{i+1} = w_i - sum_{t = i-chunk+1..i} eta_t * error(w_t; x_t)     if i = 0 mod chunk
    w_{i+1} = w_i                                                      else

so fast levels hold what was just read and slow levels hold what lasts. Three ways to combine them:

    sequential  (NL 70, 73)  x -> [fast] -> [mid] -> [slow] -> y   every level has its own start
    nested      (NL 72)      the same; a level returns to its start when the next slower updates
    independent (NL 74)      y = x + sum_l mix_l * MLP_l(x)        parallel, learned weights

A tick is a token (in context, learn.py) or a training step (`optimizers.LevelOptimizer`). On the
token clock the parameters are the initial weights w_0, learned in training; the weights of the
moment ("fast weights", one copy per batch row) live in the state, so that the gradient of what is
read later flows back into w_0. One level that never updates is a Transformer's SwiGLU block.
`python cms.py` shows the calendar of each variant, and what an update costs.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from layers import at_least, of_rows, one_of

VARIANTS = ("sequential", "nested", "independent")


@dataclass(frozen=True)
class Level:
    """One memory of a CMS. Raises ValueError for a chunk or a hidden width below 1."""

    chunk: int | None  # ticks between updates (C^(l) of NL 71); None: never
    hidden: int  # width of the MLP

    def __post_init__(self):
        if self.chunk is not None and (type(self.chunk) is not int or self.chunk < 1):
            wanted = "an integer of at least 1 tick, or None (never updates)"
            raise ValueError(f"chunk of a level must be {wanted}, got {self.chunk!r}")
        at_least(1, **{"hidden of a level": self.hidden})


class MLP(nn.Module):
    """SwiGLU behind its norm, without residual: `w_out (silu(gate) * up)`, gate and up from w_in.

    w_in [2 hidden, d_model] holds both projections (one product); w_out [d_model, hidden]. Only
    these two are ever fast: the norm, like all outside the levels, moves in training alone.
    """

    def __init__(self, d_model, hidden, out_scale=1.0, eps=1e-6):
        super().__init__()
        self.norm = nn.RMSNorm(d_model, eps=eps)
        self.w_in = nn.Parameter(torch.randn(2 * hidden, d_model) * d_model**-0.5)
        self.w_out = nn.Parameter(torch.randn(d_model, hidden) * (out_scale * hidden**-0.5))

    def forward(self, x, fast=None):
        """x [B, T, d_model] -> the same shape.

        fast: {"w_in" [B, 2h, d], "w_out" [B, d, h]}, a memory per row; None: the initial weights.
        """
        weights = {"w_in": self.w_in, "w_out": self.w_out} if fast is None else fast
        gate, up = (self.norm(x) @ weights["w_in"].mT).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ weights["w_out"].mT

    def shapes(self, batch):
        """Of fast weights of `batch` rows."""
        return {name: (batch, *getattr(self, name).shape) for name in ("w_in", "w_out")}

    def start(self, batch):
        """The initial weights as fast weights of `batch` rows: views, so gradients reach them."""
        return {name: getattr(self, name).expand(batch, -1, -1) for name in ("w_in", "w_out")}


def _check_shapes(what, weights, like):
    """ValueError unless weights or gradients have the names and shapes {name: shape} of `like`."""
    shapes = {name: w.shape for name, w in (weights or {}).items()}
    if shapes != like:  # not even if they would broadcast: a batch never shares a memory
        theirs = {name: tuple(shape) for name, shape in shapes.items()}
        raise ValueError(f"{what} must have shapes {like}, got {theirs}")


class CMS(nn.Module):
    """Continuum Memory System (NL 70-74), residuals and norms included: x, state = cms(x, state).

    levels: from fast to slow; each chunk is a multiple of the one before, so that a slow update
    falls on the end of a fast chunk, and only the last level may have chunk=None.
    variant: one of VARIANTS.
    out_scale: factor on the initial w_out; 1 / sqrt(2 n_layers) keeps a deep stream at unit scale.
    step: the initial inner step size of every updating level (a number, or one per level), from
    then on learned, as its logarithm; None: none of its own. They are multiplied by the buffer
    `rise`, which training lets rise to 1 at first.

    state is None when nothing updates in context, else {"position": ticks seen, "updated": ticks
    seen at the last update, "fast", "sums"}, two lists with an entry per level: its fast weights
    (see MLP.forward), None for a level that stays at its start; the gradients collected since its
    last update, None where there are none.
    Raises ValueError for levels that are empty or out of order, an unknown variant, a step <= 0.
    """

    def __init__(self, d_model, levels, variant="sequential", out_scale=1.0, step=None, eps=1e-6):
        super().__init__()
        at_least(1, d_model=d_model)
        one_of("variant", variant, VARIANTS)
        chunks = [level.chunk for level in levels]
        ordered = len(chunks) > 0
        for fast, slow in pairwise(chunks):
            if fast is None or (slow is not None and (slow <= fast or slow % fast)):
                ordered = False
        if not ordered:
            raise ValueError(
                "levels must have chunks that grow from fast to slow, each a multiple of the one "
                f"before, None (never updates) only as the last, got {chunks}"
            )
        self.d_model = d_model
        self.levels = tuple(levels)
        self.variant = variant
        self.mlps = nn.ModuleList(MLP(d_model, level.hidden, out_scale, eps) for level in levels)
        if variant == "independent":
            self.mix = nn.Parameter(torch.full((len(levels),), 1 / len(levels)))
        self.log_step = None
        if step is not None and chunks[0] is not None:
            steps = self.steps(step)
            if min(steps) <= 0:
                raise ValueError(f"step must be above 0 where it is learned, got {step}")
            self.log_step = nn.Parameter(torch.tensor(steps, dtype=self.mlps[0].w_in.dtype).log())
            self.register_buffer("rise", torch.ones_like(self.log_step))

    def steps(self, step=None):
        """Step size of each updating level from `step`, a number or one each; None: as learned."""
        count = sum(level.chunk is not None for level in self.levels)
        if step is None:
            if self.log_step is None:
                raise ValueError("step must be given: this CMS was built without cms_step")
            return self.log_step.exp() * self.rise
        steps = list(step) if isinstance(step, (list, tuple)) else [step] * count
        numbers = all(isinstance(s, (int, float)) and 0 <= s < math.inf for s in steps)
        if len(steps) != count or not numbers:
            wanted = f"a number of at least 0, or one for each of the {count} levels that update"
            raise ValueError(f"step must be {wanted}, got {step}")
        return [float(s) for s in steps]

    def forward(self, x, state=None):
        """x [B, T, d_model] -> (y [B, T, d_model], state, T ticks on; None stays None)."""
        of_rows(None, x, self.mlps[0].w_in)
        fast = [None] * len(self.mlps)
        if state is not None:
            self._check(state, x)
            fast = state["fast"]
            state = state | {"position": state["position"] + x.shape[1]}
        if self.variant == "independent":
            y = x
            for mix, mlp, w in zip(self.mix, self.mlps, fast, strict=True):
                y = y + mix * mlp(x, w)
            return y, state
        for mlp, w in zip(self.mlps, fast, strict=True):
            x = x + mlp(x, w)
        return x, state

    def _check(self, state, x):
        if len(state["fast"]) != len(self.mlps):
            have = len(state["fast"])
            raise ValueError(f"state must have the CMS's {len(self.mlps)} levels, got {have}")
        for number, (w, mlp) in enumerate(zip(state["fast"], self.mlps, strict=True)):
            if w is not None:
                _check_shapes(f"fast weights of level {number}", w, mlp.shapes(x.size(0)))

    def start_state(self, batch):
        """State at tick 0: each level that has a chunk carries fast weights equal to its start."""
        if type(batch) is not int or batch < 1:
            raise ValueError(f"batch must be an integer of at least 1 row, got {batch!r}")
        fast = []
        for mlp, level in zip(self.mlps, self.levels, strict=True):
            fast.append(None if level.chunk is None else mlp.start(batch))
        return {"position": 0, "updated": 0, "fast": fast, "sums": [None] * len(fast)}

    def update(self, state, grads, step=None):
        """NL 71 at tick state["position"]: every level adds `grads` to its sum; the due ones step.

        grads: an entry per level, like state["fast"]: the gradient of the mean loss of the last
        chunk of the fastest level. A level steps along the mean gradient of its own chunk, so that
        a step size means the same for every chunk. step: see `steps`. Returns the new state;
        nothing is written in place, all can be differentiated. Raises ValueError for gradients of
        other shapes than the weights, and for a tick that is not the end of the next chunk.
        """
        if not isinstance(grads, list) or len(grads) != len(self.mlps):
            raise ValueError(f"grads must be a list of {len(self.mlps)}, one for each level")
        chunk = self.levels[0].chunk or 0
        end = state.get("updated", state["position"] - chunk) + chunk
        if chunk and state["position"] != end:
            wanted = f"come every {chunk} ticks, now at {end}"
            raise ValueError(f"update must {wanted}, got position {state['position']}")
        due = self.due(state["position"])
        resets = self.resets(state["position"])
        steps = iter(self.steps(step))
        fast = []
        sums = []
        for number, (w, g) in enumerate(zip(state["fast"], grads, strict=True)):
            total = state["sums"][number]
            if w is not None:
                shapes = self.mlps[number].shapes(len(w["w_in"]))
                _check_shapes(f"gradients of level {number}", g, shapes)
                eta = next(steps)
                total = g if total is None else {name: total[name] + g[name] for name in g}
                if number in resets:  # deviation 12: straight to its start, without a last step
                    w = self.mlps[number].start(w["w_in"].shape[0])
                    total = None
                elif number in due:
                    eta = eta * self.levels[0].chunk / self.levels[number].chunk  # sum to mean
                    w = {name: w[name] - eta * total[name] for name in w}
                    total = None
            fast.append(w)
            sums.append(total)
        return state | {"updated": state["position"], "fast": fast, "sums": sums}

    def due(self, tick):
        """Numbers of the levels that update at the end of a tick: chunk C at C, 2C, ..."""
        if tick < 1:
            raise ValueError(f"tick must be at least 1, got {tick}")
        return [i for i, level in enumerate(self.levels) if level.chunk and tick % level.chunk == 0]

    def resets(self, tick):
        """Numbers of the levels that return to their start: nested ones whose next slower level is
        due, so that each takes C_slow / C_fast steps from one start (NL 72)."""
        due = self.due(tick)
        return [number for number in due if number + 1 in due] if self.variant == "nested" else []


if __name__ == "__main__":
    from runpy import run_module

    run_module("bench.demos", run_name="cms")
