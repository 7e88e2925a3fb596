"""Hope: a self-modifying memory followed by a continuum of slower ones, as a language model.

    Block (NL sec. 8.3, eq. 94-97)
        x = x + mixer(norm(x))    self-modifying Titans: fast weights that learn from every token
        x = cms(x)                MLPs that learn at slower and slower rates

    Model
        tokens -> embedding -> Block 1 -> ... -> Block n -> norm -> logits

Every mixer, Hope's and its rivals', has one signature, mixer(x, state) -> (y, state), so `model`
in the config only swaps a class. A mixer owns what is said about it (layers.py) and checks its own
fields; a new one is a line of MIXERS. Whatever the model, `hidden` is solved so that all models of
a preset have as many parameters as Transformer++ (within 2%).

State is the product: a plain tree of tensors and numbers, apart from the weights, that can be
saved, loaded, moved and continued. Any way of cutting a sequence into calls gives the same logits.

    python hope.py               the model as a nested system: who learns when, from what
    python hope.py --model samba --preset 340m
    python hope.py export RUN FOLDER    a run as safetensors, for others (support/export.py)
"""

import dataclasses
import math
import typing
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

import learn
from baselines import (
    DLA,
    RWKV7,
    SRWM,
    TTT,
    Attention,
    Comba,
    DeltaNet,
    GatedDeltaNet,
    LinearAttention,
    Mamba,
    Mamba2,
    Memora,
    RetNet,
    TitansMAC,
    TitansMAG,
    TitansMAL,
)
from cms import CMS, Level
from fused import MANY_LOGITS, linear_cross_entropy
from layers import Sampler, component, count, one_of, recomputed, unlike
from memory import floats, full_precision
from titans import NeuralMemory, SelfModifyingTitans

# d_model, n_layers, n_heads, vocab_size of the Transformer++ that all models of a preset equal
PRESETS = {
    "nano": (128, 5, 2, 257),
    "30m": (384, 10, 6, 32768),
    "125m": (768, 14, 12, 32768),
    "340m": (1024, 24, 16, 32768),
    "760m": (1536, 25, 24, 32768),
    "1.3b": (2048, 24, 32, 32768),
}

# The Hope that the paper trained: MLP memories, adaptive queries, momentum (deviations 22 and 23).
PUBLISHED = {"memory": "mlp", "adaptive": ["k", "v", "q"], "momentum": True}

# Name -> config -> mixer; a tuple's mixers take turns, layer by layer.
MIXERS = {
    "hope": lambda c: SelfModifyingTitans(
        c.d_model, c.n_heads, c.chunk, c.memory, c.adaptive, c.momentum, c.inner_step, c.conv_width,
        c.gate, c.mode, c.dgd, c.retention, c.out_scale, c.window_reset, c.counters,
    ),
    "hope_attention": lambda c: Attention(
        *c.sizes, c.conv_width, c.rope_base, c.out_scale, rope_factors=c.rope_factors,
    ),
    "ttt_e2e": lambda c: Attention(*c.sizes, c.conv_width, c.rope_base, c.out_scale, c.window),
    "titans": lambda c: NeuralMemory(
        *c.sizes, c.chunk, c.depth, c.conv_width, c.window_reset, c.out_scale,
    ),
    "titans_mac": lambda c: TitansMAC(*c.sizes, *c.long_memory, out_scale=c.out_scale),
    "titans_mag": lambda c: TitansMAG(*c.sizes, *c.long_memory, out_scale=c.out_scale),
    "titans_mal": lambda c: TitansMAL(*c.sizes, *c.long_memory, out_scale=c.out_scale),
    "transformer": lambda c: Attention(*c.sizes, c.conv_width, out_scale=c.out_scale),
    "linear_attention": lambda c: LinearAttention(*c.sizes, c.conv_width, c.out_scale),
    "retnet": lambda c: RetNet(*c.sizes, c.conv_width, c.expand or 2, c.out_scale),
    "deltanet": lambda c: DeltaNet(*c.sizes, c.conv_width, c.expand or 1, c.out_scale),
    "gated_deltanet": lambda c: GatedDeltaNet(*c.sizes, c.conv_width, c.expand or 1, c.out_scale),
    "comba": lambda c: Comba(*c.sizes, c.conv_width, c.expand or 1, c.out_scale),
    "mamba2": lambda c: Mamba2(*c.sizes, c.conv_width, c.expand or 2, c.out_scale),
    "rwkv7": lambda c: RWKV7(*c.sizes, out_scale=c.out_scale),
    "srwm": lambda c: SRWM(*c.sizes, out_scale=c.out_scale),
    "dla": lambda c: DLA(*c.sizes, c.chunk, c.depth, c.conv_width, c.out_scale),
    "memora": lambda c: Memora(*c.sizes, min(16, c.chunk), c.conv_width, c.out_scale),
    "ttt_linear": lambda c: TTT(*c.sizes, min(16, c.chunk), 1, c.conv_width, c.out_scale),
    "ttt_mlp": lambda c: TTT(*c.sizes, min(16, c.chunk), 2, c.conv_width, c.out_scale),
    "samba": (
        lambda c: Mamba(c.d_model, c.conv_width, out_scale=c.out_scale),
        lambda c: Attention(*c.sizes, out_scale=c.out_scale, window=c.window),
    ),
}

LEARNING = ("hope", "hope_attention", "ttt_e2e")  # their CMS learns in context by default

# What may differ between the model that made a state and the one that goes on from it.
FREE = ("cms_updates", "cms_step", "cms_clip")


def layer_kinds(model):
    """The makers of a model's mixers, in the order in which layers take turns."""
    makers = MIXERS[model]
    return makers if isinstance(makers, tuple) else (makers,)


def check_shape(tokens):
    """TypeError or ValueError for tokens or targets that are not [B, T] int64 with B, T >= 1."""
    wanted = "tokens and targets must be [B, T] int64 with B, T >= 1"
    if not torch.is_tensor(tokens):
        raise TypeError(f"{wanted}, got a {type(tokens).__name__}")
    if tokens.ndim != 2 or tokens.dtype != torch.int64 or not tokens.numel():
        raise ValueError(f"{wanted}, got shape {tuple(tokens.shape)} of {tokens.dtype}")


def loss_fn(logits, targets, reduction="mean"):
    """Cross-entropy in nats, in float32 or float64, "mean" or "sum": a scalar.

    logits [B, T, vocab], targets [B, T] int64.
    """
    floats(logits=logits)
    check_shape(targets)
    flat = full_precision(logits).flatten(0, -2)  # [B T, vocab]
    return F.cross_entropy(flat, targets.flatten(), reduction=reduction)


@dataclass
class HopeConfig:
    """Everything that defines a model; saved with every run.

    Raises ValueError, with the value and the legal range, for what is not legal. What concerns one
    part of a block is checked by that part: a config is legal if a block of it can be built.
    """

    model: str = "hope"  # a name of MIXERS
    vocab_size: int = 257  # symbols
    d_model: int = 128  # hidden size
    n_layers: int = 5  # blocks
    n_heads: int = 2  # of every mixer
    hidden: int | None = None  # feed-forward width, all levels together; None: equal parameters
    levels: list | None = None  # chunks of the CMS in tokens, fast to slow; a None never updates
    variant: str = "sequential"  # of the CMS: sequential, nested or independent
    cms_updates: str | None = None  # off, first_order, full; None: first_order if a level updates
    cms_blocks: int | None = None  # the last so many blocks have `levels`; None: all
    cms_step: float | list | None = 1.0  # first inner step(s), then learned; None: see `learn`
    cms_clip: float = 1.0  # longest inner gradient of a row; a longer one is scaled to it
    conv: int | None = None  # tokens of the short convolution, 0: none; None: the model's usual
    chunk: int = 64  # tokens between generations of keys, values, rates (TTT, Memora: <= 16)
    memory: str = "matrix"  # or "mlp"
    adaptive: list = field(default_factory=lambda: ["k", "v"])  # memories among k, v, q
    momentum: bool = False  # of self-modifying Titans
    inner_step: float = 1.0  # 0 freezes self-modifying memories: the control
    mode: str = "token"  # where reads look: "token" or "boundary"
    dgd: bool = True  # delta rule at the running weights
    retention: bool = True  # memories may forget; false: alpha is 1
    counters: int = 0  # heads of Hope that only count: nothing is fed back into what they write
    gate: bool = True  # output gate
    depth: int = 2  # layers of the memory of Titans and DLA
    expand: int | None = None  # value width / key width; None: 2 for RetNet, Mamba-2, else 1
    window: int = 128  # tokens attention sees in Samba, TTT-E2E, MAG, MAL; a segment of MAC
    window_reset: int | None = None  # tokens, whole chunks, after which Titans' memories begin anew
    norm_eps: float = 1e-6  # of the norms between parts
    tied: bool = True  # one table for tokens in and out
    rope_base: float = 10000.0  # of hope_attention, ttt_e2e
    rope_factors: list | None = None  # of hope_attention: divide each pair's frequency; None: 1

    def __post_init__(self):
        one_of("model", self.model, MIXERS)
        if self.levels is None:
            self.levels = [64, None] if self.model in LEARNING else [None]
        for f in dataclasses.fields(self):
            setattr(self, f.name, _of_kind(f.name, getattr(self, f.name), f.type))
        if self.cms_updates is None:
            self.cms_updates = "first_order" if self.levels and self.levels[0] else "off"
        one_of("cms_updates", self.cms_updates, learn.UPDATES)
        sizes = ("vocab_size", "d_model", "n_layers", "n_heads", "hidden", "conv", "expand")
        for name in (*sizes, "cms_blocks"):
            value = getattr(self, name)
            least = 0 if name == "conv" else 1
            if value is not None and value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value}")
        for name in ("norm_eps", "rope_base", "cms_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number above 0, got {getattr(self, name)}")
        if self.learners > self.n_layers:
            wanted = f"at most n_layers, {self.n_layers}"
            raise ValueError(f"cms_blocks must be {wanted}, got {self.cms_blocks}")
        with torch.device("meta"):  # nothing is allocated
            mixers = [make(self) for make in layer_kinds(self.model)]
            parts = [part for mixer in mixers for part in mixer.modules()]
            resets = any(hasattr(part, "window_reset") for part in parts)
            if self.window_reset is not None and not resets:
                why = f"None for {self.model}, which has no memory of Titans"
                raise ValueError(f"window_reset must be {why}, got {self.window_reset}")
            if self.hidden is None:
                self.hidden = self._equal_hidden(mixers)
            self.new_cms(self.n_layers - 1)

    def _equal_hidden(self, mixers):
        """Feed-forward width at which blocks have Transformer++'s parameters (SwiGLU of 8/3 d)."""
        d = self.d_model
        n = len(self.levels)
        target = 4 * d * d + 3 * d * (8 * round(d / 3)) + 2 * d
        layers = []
        for i, mixer in enumerate(mixers):
            layers.append(count(mixer) * len(range(i, self.n_layers, len(mixers))))
        norms = d * (2 + (n - 1) * self.learners / self.n_layers)
        mean = sum(layers) / self.n_layers + norms
        each = round((target - mean) / (3 * d * n) / 4) * 4 if n else 0
        if n and each < 4:
            left = f"leaves no parameters for {n} CMS levels; set hidden or fewer levels"
            raise ValueError(f"{self.model} at d_model {d} {left}")
        return n * each

    @classmethod
    def preset(cls, name, model="hope", published=False, **overrides):
        """The config of a preset (a name of PRESETS). Overrides are fields of HopeConfig.

        published: with what PUBLISHED holds.
        """
        sizes = PRESETS[one_of("preset", name, PRESETS)]
        for override in overrides:
            one_of("field of HopeConfig", override, [f.name for f in dataclasses.fields(cls)])
        own = dict(zip(("d_model", "n_layers", "n_heads", "vocab_size"), sizes, strict=True))
        if name != "nano":
            own["window"] = 2048  # as published; nano is trained on shorter rows
        layers = overrides.get("n_layers", own["n_layers"])
        if model in LEARNING and type(layers) is int:
            # nano: three of five blocks learn as much as all five, in two thirds of the time
            own["cms_blocks"] = max(1, layers * 3 // 5)
            if name != "nano":
                # As TTT-E2E: the last quarter of the blocks, from 1,024 tokens on. A row of 4,096
                # has three steps of the fast level and one of the slow: its size is trained, too.
                own |= {"levels": [1024, 2048, None], "cms_blocks": max(1, layers // 4)}
        if published:
            own |= PUBLISHED
        return cls(model=model, **(own | overrides))

    def to_dict(self):
        return dataclasses.asdict(self)

    @property
    def sizes(self):
        return self.d_model, self.n_heads

    @property
    def long_memory(self):
        """Of the Titans that attend: chunk, segment or window, depth, convolution, window_reset."""
        return self.chunk, self.window, self.depth, self.conv_width, self.window_reset

    @property
    def conv_width(self):
        """Width of the short convolution in tokens, 0 for none."""
        if self.conv is not None:
            return self.conv
        without = ("transformer", "hope_attention", "ttt_e2e", "linear_attention", "retnet",
                   "rwkv7", "srwm")
        return 0 if self.model in without else 4

    @property
    def out_scale(self):
        """Of projections into the residual stream: its variance does not grow with depth."""
        return (2 * self.n_layers) ** -0.5

    @property
    def learners(self):
        """How many blocks, the last ones, have a CMS of several `levels`."""
        return self.n_layers if self.cms_blocks is None else self.cms_blocks

    def new_cms(self, layer):
        """The CMS of a block: `levels`, or before the last `cms_blocks` an ordinary MLP."""
        if layer < self.n_layers - self.learners:
            return CMS(self.d_model, [Level(None, self.hidden)], "sequential", self.out_scale,
                       eps=self.norm_eps)
        n = len(self.levels)
        if n and self.hidden % n:
            raise ValueError(f"hidden must be a multiple of {n}, the CMS levels, got {self.hidden}")
        levels = [Level(chunk, self.hidden // n) for chunk in self.levels]
        return CMS(
            self.d_model, levels, self.variant, self.out_scale, self.cms_step, self.norm_eps
        )


def _of_kind(name, value, hint):
    """value, if it is of the type of a config's field; a tuple as a list. Else ValueError."""
    kinds = typing.get_args(hint) or (hint,)
    if isinstance(value, tuple):
        value = list(value)
    if type(value) in kinds or (type(value) is int and float in kinds):
        return value
    names = {int: "an integer", float: "a number", bool: "true or false", list: "a list"}
    wanted = " or ".join(names.get(kind, "a name" if kind is str else "None") for kind in kinds)
    raise ValueError(f"{name} must be {wanted}, got {value!r}")


class Block(nn.Module):
    """x = x + mixer(norm(x)); x = cms(x). (x [B, T, d_model], state) -> (x, state)."""

    recompute = False  # keep nothing of a block for the backward pass but its input

    def __init__(self, config, layer):
        super().__init__()
        kinds = layer_kinds(config.model)
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.mixer = kinds[layer % len(kinds)](config)
        self.cms = config.new_cms(layer)

    def forward(self, x, state):
        if self.recompute and torch.is_grad_enabled():
            return recomputed(self._forward, x, state)
        return self._forward(x, state)

    def _forward(self, x, state):
        x, mixer = self.mix(x, state and state["mixer"])
        x, cms = self.cms(x, state and state["cms"])
        return x, {"mixer": mixer, "cms": cms}

    def mix(self, x, state):
        """The mixer with its norm and residual."""
        y, state = self.mixer(self.norm(x), state)
        return x + y, state


class Hope(nn.Module):
    """The language model. (tokens [B, T] int64, state) -> (logits [B, T, vocab_size], state).

    A state is {"blocks", "model": the config's fields, "position": tokens read} and, where CMS
    levels learn, "stream"; the first dimension of every tensor is its rows.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        fields = config.to_dict().items()
        self.identity = {name: value for name, value in fields if name not in FREE}
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=0.05)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = None
        if not config.tied:
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(self, tokens, state=None, updates=None, step=None, targets=None):
        """Read tokens. Raises ValueError for ids out of range, a state that does not belong.

        targets [B, T] int64: what follows each token; then the result is the mean cross-entropy in
        nats, a scalar, of whole rows read as the config says.

        updates: one of learn.UPDATES, whether the CMS levels take steps in context; None: as the
        config says. step: how long, see `learn`. A state that was read on with updates "off" has
        lost its place in the chunk: from there on it can only be read so.
        """
        for given in (tokens,) if targets is None else (tokens, targets):
            check_shape(given)
            # On a GPU the check would stall the stream; the embedding asserts there.
            if not given.is_cuda and not torch.compiler.is_compiling():
                self._check_ids(given)
        if targets is not None:
            return self.loss(tokens, targets)
        position = 0 if state is None else self._position_of(state)
        logits, after = self.unchecked(tokens, state, updates, step)
        after |= {"model": self.identity, "position": position + tokens.shape[1]}
        return logits, after

    def _position_of(self, state):
        """The tokens that a state has read. ValueError, naming both sides, if it does not fit."""
        made_by = state.get("model") if isinstance(state, dict) else None
        if made_by is None:  # made by hand, or saved by an earlier version: its shapes must do
            learns = isinstance(state, dict) and "stream" in state
            token = torch.zeros(1, 1, dtype=torch.int64, device=self.embedding.weight.device)
            like = self.unchecked(token, None, "first_order" if learns else "off")[1]
            if wrong := unlike(state, like):
                raise ValueError(f"state must be of this model, {self.config.model}: {wrong}")
            made_by = self.identity
        for name, ours in self.identity.items():
            if made_by.get(name, ours) != ours:
                wanted = f"a model whose {name} is {ours!r}"
                raise ValueError(f"state must be of {wanted}, got one with {made_by[name]!r}")
        blocks = state["blocks"]
        if len(blocks) != len(self.blocks) or None in blocks:
            have = f"{len(blocks)}, {blocks.count(None)} of them None"
            raise ValueError(f"state must have {len(self.blocks)} blocks, got {have}")
        parts = [block["mixer"] or {"position": 0} for block in blocks] + [state]
        if "stream" in state:
            parts += [block["cms"] for block in blocks[-self.config.learners :]]
        read = {part["position"] for part in parts if "position" in part}
        if len(read) > 1:
            raise ValueError(f"state must be at one position in all parts, got {sorted(read)}")
        return max(read, default=0)

    def _check_ids(self, tokens):
        low = tokens.min().item()
        high = tokens.max().item()
        if low < 0 or high >= self.config.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"token ids must be in [0, {self.config.vocab_size}), got {wrong}")

    def unchecked(self, tokens, state=None, updates=None, step=None):
        """`forward` without a look at the tokens."""
        updates = self.config.cms_updates if updates is None else updates
        if one_of("updates", updates, learn.UPDATES) == "off":
            return self.read(tokens, state)
        return learn.read_and_update(self, tokens, state, updates == "full", step)

    def read(self, tokens, state=None):
        """The same with updates "off": no CMS level takes a step."""
        x = self.embedding(tokens)  # [B, T, d_model]
        x, states = self.through(self.blocks, x, state and state["blocks"])
        return self.logits(x), {"blocks": states}

    @property
    def learners(self):
        """The blocks whose CMS levels learn in context: the last ones."""
        return list(self.blocks)[-self.config.learners :]

    def through(self, blocks, x, states=None):
        """x [B, T, d_model] through blocks in a row -> (x, their states)."""
        after = []
        for i, block in enumerate(blocks):
            x, state = block(x, states and states[i])
            after.append(state)
        return x, after

    @property
    def table(self):
        """[vocab_size, d_model]: what predicts each symbol."""
        return self.embedding.weight if self.head is None else self.head.weight

    def logits(self, x):
        """[B, T, d_model] after the last block -> [B, T, vocab_size]."""
        return F.linear(self.norm(x), self.table)

    def loss(self, tokens, targets):
        """`forward`'s loss of targets. Large logits are never held whole, if no level learns."""
        small = targets.numel() * len(self.table) <= MANY_LOGITS
        if small or self.config.cms_updates != "off":
            return loss_fn(self.unchecked(tokens)[0], targets)
        x, _ = self.through(self.blocks, self.embedding(tokens))
        return linear_cross_entropy(self.norm(x).flatten(0, 1), self.table, targets.flatten())

    def learn(self, tokens, state=None, updates=None, step=None):
        """Read a stream and learn from it in context (NL 70-74). tokens [B, T] -> (loss, state).

        loss [B, T], in nats: of every token, given all before it; [B, T - 1] without a state, as
        nothing predicts the first token of a stream. step: inner step size of the CMS levels, a
        number or one for each level that updates; None: the learned ones. It multiplies the mean
        gradient of a level's chunk: NL 71 with eta_t = step / chunk.

        Under torch.no_grad() this is learning at test time. Otherwise the loss is differentiable:
        the initial weights are trained *through* the updates ("full": exact, second order, by the
        plain path of every mixer) or at the updated weights ("first_order": inner gradients are
        constants). Raises ValueError for a model without a level that updates, a fastest chunk of
        one token, a step that is missing or negative, a state that was read with updates off.
        """
        updates = self.config.cms_updates if updates is None else updates
        if updates == "off":
            raise ValueError("updates must be 'first_order' or 'full' to learn, got 'off'")
        logits, after = self(tokens, state, updates, step)
        predictions = logits[:, :-1]  # of tokens[:, 1:]
        if state is not None:
            predictions = torch.cat([state["stream"]["logits"][:, None], predictions], 1)
        targets = tokens[:, tokens.shape[1] - predictions.shape[1] :]
        loss = F.cross_entropy(full_precision(predictions).mT, targets, reduction="none")
        return loss, after

    def generate(self, tokens, n, state=None, **how):
        """Sample n tokens after the prompt tokens [B, T]; yields each, [B] int64, once it is known.

        Constant memory for recurrent mixers. how: arguments of `Sampler`, as temperature=0.8;
        state continues an earlier call. Raises ValueError or TypeError for what is out of range.
        """
        stream = self.generate_with_state(tokens, n, state, **how)
        return (token for token, _ in stream)

    def generate_with_state(self, tokens, n, state=None, **how):
        """`generate` that yields (token [B], the state that has read everything before it)."""
        if type(n) is not int or n < 0:
            raise ValueError(f"n must be an integer of at least 0 tokens, got {n!r}")
        check_shape(tokens)
        self._check_ids(tokens)
        return self._generate(tokens, n, state, Sampler(**how))

    @torch.no_grad()
    def _generate(self, tokens, n, state, sampler):
        size = (len(tokens), self.config.vocab_size)
        seen = torch.zeros(size, dtype=torch.bool, device=tokens.device)
        for _ in range(n):
            for part in tokens.split(4096, 1):  # the logits of a long prompt are never held whole
                logits, state = self(part, state)
            token = sampler(logits[:, -1], seen.scatter_(1, tokens, True))
            yield token, state
            tokens = token[:, None]

    def levels(self):
        """The model as a nested system (NL Definition 2), from the highest update frequency on.

        Rows as of `layers.component`, with the "level": level 1 updates most often, one of infinite
        period in training alone.
        Parameters of a level that learns in context are its initial weights.
        """
        rows = {}
        for block in self.blocks:
            found = block.mixer.components()
            for i, (mlp, level) in enumerate(zip(block.cms.mlps, block.cms.levels, strict=True)):
                if level.chunk is not None and self.config.cms_updates != "off":
                    context = "next-token loss, in context"
                    own = (count(mlp), level.chunk)
                    every = f"every {level.chunk} tokens"
                    found.append(component(f"CMS level {i + 1}", every, context, *own))
            for row in found:  # equal components of all blocks are one row
                same = rows.setdefault(row["component"], row | {"parameters": 0})
                same["parameters"] += row["parameters"]
        left = count(self) - sum(row["parameters"] for row in rows.values())
        static = ("projections, embedding, static MLP", "every training step")
        static = component(*static, "next-token loss, training set", left, math.inf)
        rows = [*rows.values(), static]
        periods = sorted({row["period"] for row in rows})
        for row in rows:
            row["level"] = periods.index(row["period"]) + 1
        return rows


if __name__ == "__main__":
    import sys
    from runpy import run_module

    if sys.argv[1:2] == ["export"]:
        run_module("support.export", run_name="__main__")
    else:
        run_module("bench.demos", run_name="hope")
