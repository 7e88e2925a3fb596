"""The Continuous Thought Machine (CTM; Darlow et al. 2025, arXiv 2505.05522), in one file.

Data are read once, into keys and values. Then D neurons think about them for T ticks, a time of
their own that no axis of the data gives them. One tick, from the activations z of the one before:

    S_a = synchronisation of pairs of neurons, z^0 .. z^(t-1)     what the next look is made of
    o   = attention(W_q S_a; keys, values)                        the look
    a   = synapses([o ; z])                                       all neurons talk to each other
    A   = the last M of all a                                     what each neuron remembers
    z_i = g_i(A_i)                                                a private MLP for every neuron
    S_o = synchronisation of pairs of neurons, z^0 .. z^t         what is known so far
    y   = W_o S_o,   certainty = 1 - entropy(softmax(y)) / log(classes)

The synchronisation of neurons i and j is the decayed inner product of their whole activity, with a
learned decay lambda >= 0 for every pair, in two running sums:

    r = exp(-lambda);   alpha <- r alpha + z_i z_j;   beta <- r beta + 1;   S = alpha / sqrt(beta)

In the words of memory.py it is the one recurrence on the clock of ticks: entries of a matrix memory
W with a retention of their own (r), the Hebbian write z z^T (delta = 0, eta = 1), and read as
itself: the fast weights are the answer, no query chooses from them.

Training takes, row by row, the mean of the loss at the tick of least loss and at the tick of most
certainty. So a trained model says how long it has to think: `stop` ends a row that is certain.

    python ctm.py                       parity of 8 bits, on a CPU
    python ctm.py maze --length 9       perfect mazes of 9 x 9 pixels: image in, route out
    python ctm.py digits                scikit-learn's digits (an optional package)
    python ctm.py digits --images DIR   images in a folder for each class, as ImageNet-1K's
    python ctm.py --help                all flags; --control trains the rivals of equal size

A run is a folder: config.json, checkpoints/, result.json (what is printed), ctm.png (a thought).
Glossary: B rows, T ticks, N tokens of the data, D neurons, M ticks of history, P positions to say
something about, C classes of what can be said.
"""

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from layers import at_least, component, count, head_width, heads, map_state, one_of, tensors
from memory import full_precision
from tasks import IGNORE

PAIRINGS = ("random-pairing", "random", "first-last")
LONGEST_DECAY = 15.0  # of lambda: exp(-15) forgets everything within a tick


def uniform(*shape, bound):
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


@dataclass
class CTMConfig:
    """Everything that defines a model. ValueError, with value and legal range, for what is not."""

    reader: str = "features"  # a name of READERS: what makes features of the data
    d_input: int = 64  # width of a feature
    scale: int = 1  # of the reader "pixels": pixels to a token along each side, a power of 2
    positions: int = 1  # P
    classes: int = 2  # C
    d_model: int = 128  # neurons, D
    width: int = 64  # of the attention
    n_heads: int = 4
    ticks: int = 16  # T
    history: int = 8  # pre-activations a neuron sees, M
    hidden: int = 8  # width of a neuron's MLP; 0: it has one layer
    depth: int = 1  # of the synapses; above 1 a U-Net of so many widths
    pairing: str = "random-pairing"  # one of PAIRINGS
    pairs_out: int = 32  # n of the pairing that is read out: pairs, or neurons on either side
    pairs_action: int = 32  # n of the pairing that looks at the data
    self_pairs: int = 0  # of random-pairing: the first pairs are a neuron with itself
    dropout: float = 0.0  # before the layers of synapses and neurons

    def __post_init__(self):
        for f in fields(self):
            kinds = {int: "a whole number", str: "a name", float: "a number"}
            value = getattr(self, f.name)
            whole = type(value) is int and type(f.default) is float
            if type(value) is not type(f.default) and not whole:
                raise ValueError(f"{f.name} must be {kinds[type(f.default)]}, got {value!r}")
        one_of("reader", self.reader, READERS)
        one_of("pairing", self.pairing, PAIRINGS)
        names = "d_input scale positions d_model n_heads ticks history depth pairs_out pairs_action"
        at_least(1, **{name: getattr(self, name) for name in names.split()})
        head_width(self.width, self.n_heads)
        narrow = 16 if self.depth > 1 else 1  # the narrowest of the U-Net
        neurons = self.pairs_out + self.pairs_action if self.pairing == "first-last" else narrow
        n_self = min(self.pairs_out, self.pairs_action)
        for name, holds, wanted in (
            ("classes", self.classes >= 2, "at least 2"),
            ("hidden", self.hidden >= 0, "at least 0"),
            ("dropout", 0 <= self.dropout < 1, "from 0 to below 1"),
            ("scale", self.scale & (self.scale - 1) == 0, "a power of 2"),
            ("self_pairs", 0 <= self.self_pairs <= n_self, f"from 0 to {n_self}, the pairs"),
            ("d_model", self.d_model >= max(narrow, neurons), f"at least {max(narrow, neurons)}"),
        ):
            if not holds:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)}")


# --------------------------------------------------------------------------------------------------
# The parts of a tick


class Synapses(nn.Module):
    """What neurons say to each other: [o ; z] [B, width + D] -> pre-activations a [B, D].

    depth 1: one gated layer. More: a U-Net, `depth` widths equally spaced from D down to 16, where
    every width on the way up is added to, and normalised with, the same width on the way down.
    """

    def __init__(self, d_in, D, depth=1, dropout=0.0):
        super().__init__()
        if depth == 1:
            gated = (nn.Linear(d_in, 2 * D), nn.GLU(), nn.LayerNorm(D))
            self.entry = nn.Sequential(nn.Dropout(dropout), *gated)
            widths = [D]
        else:
            self.entry = self.layer(d_in, D, 0.0)
            widths = [int(width) for width in np.linspace(D, 16, depth)]
        pairs = list(zip(widths, widths[1:], strict=False))
        self.down = nn.ModuleList(self.layer(wide, narrow, dropout) for wide, narrow in pairs)
        self.up = nn.ModuleList(self.layer(narrow, wide, dropout) for wide, narrow in pairs)
        self.norms = nn.ModuleList(nn.LayerNorm(wide) for wide, _ in pairs)

    def layer(self, d_in, d_out, dropout):
        layers = (nn.Linear(d_in, d_out), nn.LayerNorm(d_out), nn.SiLU())
        return nn.Sequential(nn.Dropout(dropout), *layers)

    def forward(self, x):
        x = self.entry(x)
        passed = []
        for down in self.down:
            passed.append(x)
            x = down(x)
        for i in reversed(range(len(passed))):
            x = self.norms[i](self.up[i](x) + passed[i])
        return x


class NeuronModels(nn.Module):
    """z_i = g_i(A_i): an MLP of its own for every neuron. A [B, D, M] -> z [B, D].

    Layers of all neurons are one batched product: M -> 2 hidden, gated, -> 2, gated; with hidden 0
    M -> 2, gated. Each is divided by a learned temperature.
    """

    def __init__(self, D, M, hidden=8, dropout=0.0):
        super().__init__()
        sizes = [(M, 2 * hidden), (hidden, 2)] if hidden else [(M, 2)]
        weights = (uniform(D, *size, bound=sum(size) ** -0.5) for size in sizes)
        self.weights = nn.ParameterList(weights)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(D, 1, n)) for _, n in sizes)
        self.temperatures = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in sizes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, A):
        x = A.transpose(0, 1)  # [D, B, M]: neurons are the batch of the product
        layers = zip(self.weights, self.biases, self.temperatures, strict=True)
        for weight, bias, temperature in layers:
            x = F.glu(torch.baddbmm(bias, self.dropout(x), weight) / temperature)
        return x.squeeze(-1).T


class Synchronisation(nn.Module):
    """S of chosen pairs of neurons: (z [B, D], sums) -> (S [B, size], sums). O(1) a tick.

    The pairs are drawn once and belong to the weights:

        random-pairing   n pairs, drawn; the first self_pairs are a neuron with itself
        random           n neurons drawn twice, all pairs between: n (n + 1) / 2 numbers
        first-last       the first n neurons (last: the last n), all pairs: n (n + 1) / 2 numbers

    sums: {"alpha", "beta"} [B, size], those of `start` before the first z.
    """

    def __init__(self, D, n, pairing="random-pairing", self_pairs=0, last=False):
        super().__init__()
        left = torch.randint(D, (n,))
        right = torch.randint(D, (n,))
        if pairing == "random-pairing":
            right[:self_pairs] = left[:self_pairs]
        else:
            if pairing == "first-last":
                left = right = torch.arange(D - n, D) if last else torch.arange(n)
            i, j = torch.triu_indices(n, n)
            left, right = left[i], right[j]
        self.register_buffer("left", left)
        self.register_buffer("right", right)
        self.decay = nn.Parameter(torch.zeros(len(left)))  # lambda

    def start(self, B):
        zero = torch.zeros(B, len(self.left), device=self.left.device)
        return {"alpha": zero, "beta": zero}

    def forward(self, z, sums):
        z = full_precision(z)
        r = torch.exp(-self.decay.clamp(0, LONGEST_DECAY))  # at both ends a gradient still passes
        alpha = r * sums["alpha"] + z[:, self.left] * z[:, self.right]
        beta = r * sums["beta"] + 1
        return alpha * beta.rsqrt(), {"alpha": alpha, "beta": beta}


# --------------------------------------------------------------------------------------------------
# What makes features [B, N, d_input] of data


class Bits(nn.Module):
    """Bits [B, N] int64, 0 or 1: an embedding of each, and its place on a half circle."""

    def __init__(self, d):
        super().__init__()
        self.embedding = nn.Embedding(2, d)
        self.place = nn.Linear(2, d)

    def forward(self, bits):
        angle = torch.linspace(0, math.pi, bits.shape[1], device=bits.device)
        circle = torch.stack([-angle.sin(), angle.cos()], -1)  # [N, 2]
        return self.embedding(bits) + self.place(circle.to(self.place.weight.dtype))


class Pixels(nn.Module):
    """Images [B, 3, height, width] in -1 .. 1: a small ResNet without position embedding.

    Two residual layers, and two more each time it halves the sides: a token for scale x scale
    pixels. deviation 61: GroupNorm in the place of BatchNorm, so rows do not see each other.
    """

    def __init__(self, d, scale):
        super().__init__()
        self.stem = nn.Conv2d(3, d, 3, padding=1)
        strides = [1] + [2] * (scale.bit_length() - 1)
        self.first = nn.ModuleList(nn.Conv2d(d, d, 3, stride, 1) for stride in strides)
        self.second = nn.ModuleList(nn.Conv2d(d, d, 3, padding=1) for _ in strides)
        self.norms = nn.ModuleList(nn.GroupNorm(1, d) for _ in range(2 * len(strides)))

    def forward(self, images):
        x = self.stem(images)
        for i, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            y = second(F.relu(self.norms[2 * i + 1](first(F.relu(self.norms[2 * i](x))))))
            short = F.avg_pool2d(x, 2, ceil_mode=True) if y.shape != x.shape else x
            x = short + y
        return x.flatten(2).mT


READERS = {
    "features": lambda c: nn.Identity(),
    "bits": lambda c: Bits(c.d_input),
    "pixels": lambda c: Pixels(c.d_input, c.scale),
}


# --------------------------------------------------------------------------------------------------
# The model


class CTM(nn.Module):
    """logits, certainty, state = model(features, state=None, ticks=None, stop=None)

    features [B, N, d_input], or what the config's reader takes; logits [B, T, P, C]; certainty
    [B, T], in 0 .. 1. state is a value, a tree of tensors with rows first: T ticks in one call are
    T calls of one tick. ticks: None for the config's.

    stop: rows whose certainty reaches it think no further, and cost nothing from then on; ticks is
    then the most they get. Such a row's last logits are repeated up to the tick at which the
    last row ended, the last one returned. state["ticks"] [B] counts each row's ticks in all calls.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        d = config.width
        self.reader = READERS[config.reader](config)
        self.embed = nn.Sequential(nn.Linear(config.d_input, d), nn.LayerNorm(d))
        n_action, n_out = self.make_core(config)
        self.query = nn.Linear(n_action, d)
        self.in_q, self.in_k, self.in_v, self.out = (nn.Linear(d, d) for _ in range(4))
        self.head = nn.Linear(n_out, config.positions * config.classes)
        for part in (self.in_q, self.in_k, self.in_v):  # as q, k, v in one product are
            nn.init.uniform_(part.weight, -((1.5 / d) ** 0.5), (1.5 / d) ** 0.5)
        for part in (self.in_q, self.in_k, self.in_v, self.out):
            nn.init.zeros_(part.bias)

    def make_core(self, c):
        """Create what thinks. Returns the sizes of S_a and S_o."""
        D = c.d_model
        self.z0 = uniform(D, bound=D**-0.5)
        self.A0 = uniform(D, c.history, bound=(D + c.history) ** -0.5)
        self.synapses = Synapses(c.width + D, D, c.depth, c.dropout)
        self.neurons = NeuronModels(D, c.history, c.hidden, c.dropout)
        self.action = Synchronisation(D, c.pairs_action, c.pairing, c.self_pairs, last=True)
        self.output = Synchronisation(D, c.pairs_out, c.pairing, c.self_pairs)
        return len(self.action.left), len(self.output.left)

    def start(self, B):
        """The state before the first tick: what is remembered is learned, the same for all rows."""
        z = self.z0.expand(B, -1)
        _, sums = self.output(z, self.output.start(B))  # S_o^t is of z^0 .. z^t
        state = {"z": z, "A": self.A0.expand(B, -1, -1)}
        return state | {"action": self.action.start(B), "output": sums}

    def look(self, state):
        """-> (S_a [B, n], what of the state has changed)."""
        S, sums = self.action(state["z"], state["action"])
        return S, {"action": sums}

    def think(self, o, state):
        """o [B, width] -> (S_o [B, n], what of the state has changed)."""
        a = self.synapses(torch.cat([o, state["z"]], -1))
        A = torch.cat([state["A"][:, :, 1:], a[:, :, None]], 2)
        z = self.neurons(A)
        S, sums = self.output(z, state["output"])
        return S, {"z": z, "A": A, "output": sums}

    def tick(self, keys, values, state):
        """keys, values [B, heads, N, width / heads] -> (logits [B, P, C], certainty [B], state)."""
        S, seen = self.look(state)
        q = self.in_q(self.query(S)).unflatten(-1, (self.config.n_heads, 1, -1))
        attention = (q @ keys.mT * q.shape[-1] ** -0.5).softmax(-1)  # [B, heads, 1, N]
        o = self.out((attention @ values).flatten(1))
        S, thought = self.think(o, state)
        logits = self.head(S).unflatten(-1, (self.config.positions, -1))
        after = state | seen | thought
        after |= {"attention": attention.squeeze(2), "ticks": state["ticks"] + 1}
        return logits, certainty_of(logits), after

    def forward(self, features, state=None, ticks=None, stop=None):
        ticks = self.config.ticks if ticks is None else ticks
        at_least(1, ticks=ticks)
        if stop is not None and not 0 < stop <= 1:
            raise ValueError(f"stop must be a certainty above 0 and up to 1, got {stop}")
        if self.config.reader == "features" and features.shape[2:] != (self.config.d_input,):
            wanted = f"[B, N, {self.config.d_input}]"
            raise ValueError(f"features must be {wanted}, got shape {tuple(features.shape)}")
        tokens = self.embed(self.reader(features))  # [B, N, width]
        B = len(tokens)
        keys = heads(self.in_k(tokens), self.config.n_heads)  # [B, heads, N, width / heads]
        values = heads(self.in_v(tokens), self.config.n_heads)
        if state is None:
            state = self.start(B) | {"ticks": tokens.new_zeros(B, dtype=torch.int64)}
        elif len(state["ticks"]) != B:
            raise ValueError(f"state must have {B} rows, as the data, got {len(state['ticks'])}")
        live = torch.arange(B, device=tokens.device)  # rows that still think
        ended = []
        said = []
        for _ in range(ticks):
            logits, certainty, state = self.tick(keys, values, state)
            if len(live) < B:
                logits = said[-1][0].index_copy(0, live, logits)
                certainty = said[-1][1].index_copy(0, live, certainty)
            said.append((logits, certainty))
            if stop is None:
                continue
            more = certainty[live] < stop
            if not more.all():
                ended.append((live[~more], part_of(state, ~more)))
                live, keys, values = live[more], keys[more], values[more]
                state = part_of(state, more)
            if not len(live):
                break
        if ended:
            state = joined([*ended, (live, state)])
        return *(torch.stack(told, 1) for told in zip(*said, strict=True)), state

    @torch.no_grad()
    def project(self):
        """Bring decays back to 0 .. 15, outside of which they have no gradient: call it after each
        step of an optimizer. deviation 60: not in `forward`, which torch.compile and FSDP forbid.
        """
        for part in self.modules():
            if isinstance(part, Synchronisation):
                part.decay.clamp_(0, LONGEST_DECAY)

    def levels(self):
        """The model as a nested system, from the highest update frequency on: see Hope.levels."""
        starts = self.z0.numel() + self.A0.numel()
        decays = self.action.decay.numel() + self.output.decay.numel()
        left = count(self) - starts - decays
        tick = "every tick"
        step = ("every training step", "loss of two ticks, training set", left, 3)
        rows = [
            component("activations z, histories A", tick, "the data, each other", starts),
            component("synchronisation, by retention", tick, "z z^T, Hebbian", decays),
            component("keys and values of the data", "every input", "the data", 0, 2),
            component("synapses, neuron models, projections", *step),
        ]
        return [row | {"level": row.pop("period")} for row in rows]


def certainty_of(logits):
    """1 - entropy / its largest value, mean over positions: [B, P, C] -> [B], in 0 .. 1."""
    log_p = full_precision(logits).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return 1 - entropy.mean(-1) / math.log(logits.shape[-1])


def part_of(state, rows):
    return map_state(lambda t: t[rows], state)


def joined(parts):
    """(rows, their state) of disjoint rows -> the state of all of them, in order."""
    order = torch.cat([rows for rows, _ in parts]).argsort()
    columns = zip(*(tensors(state) for _, state in parts), strict=True)
    merged = iter([torch.cat(column)[order] for column in columns])
    return map_state(lambda _: next(merged), parts[0][1])


def loss_fn(logits, certainty, targets):
    """Mean over rows of (L at the tick of least loss + L at the most certain tick) / 2, in nats.

    logits [B, T, P, C]; certainty [B, T]; targets [B, P] int64. L: mean over the positions whose
    target is not IGNORE. Which ticks is a constant; the same one for all positions of a row.
    """
    B, T = certainty.shape
    counts = targets != IGNORE
    same = targets[:, None].expand(B, T, -1)
    L = F.cross_entropy(full_precision(logits).flatten(0, 2), same.flatten(), reduction="none")
    L = L.view(B, T, -1).sum(2) / counts.sum(1, keepdim=True).clamp(min=1)
    ticks = torch.stack([L.argmin(1), certainty.argmax(1)], 1)  # [B, 2]
    return L.gather(1, ticks).mean()


if __name__ == "__main__":
    import sys

    from bench.thinking import main

    sys.exit(main())
