"""Hope: a self-modifying memory followed by a continuum of slower ones (NL section 8.3, eq. 94-97), as a language model.

Block:   x = x + mixer(norm(x))      self-modifying Titans: fast weights that learn from every token    (titans.py)
         x = cms(x)                  MLPs that learn at slower and slower rates                         (cms.py)

Every mixer, Hope's and its rivals', has one signature, mixer(x, state) -> (y, state), so `model` in the config only swaps
a class. Whatever the model, `hidden` is solved so that all models of a preset have the same number of parameters as
Transformer++ (within 2%).

State is the product: a plain tree of tensors and ints, apart from the weights, that can be saved, loaded, moved and
continued. Any way of cutting a sequence into calls gives the same logits as one call.

The token clock (NL 71): with `updates` on, the CMS levels learn in context, every row for itself, from the task's own loss.

    tokens      | chunk 1: read, score, differentiate | chunk 2: read with what chunk 1 taught | ...
    level C     |                           w <- w - eta * sum of the gradients of the last C tokens

Gradients are taken once per chunk of the fastest level, over that whole chunk, with the mixers' state at its start held
fixed; a loss term belongs to the chunk of its target, and the first one of a chunk, whose prediction was made in the chunk
before, is dropped. So the result does not depend on how a stream is cut into calls.

    python hope.py                                       the model as a nested system: who learns when, from what
    python hope.py generate runs/x --prompt "def "       text from a trained model, streamed, at constant memory
"""

import argparse
import contextlib
import dataclasses
import difflib
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint as computed_again

import checkpoint
from baselines import TTT, Attention, DeltaNet, GatedDeltaNet, LinearAttention, Mamba, RetNet, TitansMAC, TitansMAG, TitansMAL
from checkpoint import first_line, load_file, write_beside
from cms import CMS, VARIANTS, Level
from memory import full_precision, no_auto_kernels
from titans import NeuralMemory, SelfModifyingTitans

# d_model, n_layers, n_heads, vocab_size: the sizes of the Transformer++ that all models of a preset equal in parameters
PRESETS = {
    "nano": (128, 5, 2, 257),
    "30m": (384, 10, 6, 32768),
    "125m": (768, 14, 12, 32768),
    "340m": (1024, 24, 16, 32768),
    "760m": (1536, 25, 24, 32768),
    "1.3b": (2048, 24, 32, 32768),
}

UPDATES = ("off", "first_order", "full")  # of the CMS levels on the token clock

MIXERS = {
    "hope": lambda c: SelfModifyingTitans(
        c.d_model, c.n_heads, c.chunk, c.memory, tuple(c.adaptive), c.momentum, c.inner_step, c.width, c.gate, c.mode, c.dgd,
        c.retention, c.out_scale,
    ),
    "hope_attention": lambda c: Attention(c.d_model, c.n_heads, c.width, c.rope_base, c.out_scale),
    "titans": lambda c: NeuralMemory(c.d_model, c.n_heads, c.chunk, c.depth, c.width, c.out_scale),
    "titans_mac": lambda c: TitansMAC(c.d_model, c.n_heads, c.chunk, c.window, c.depth, c.width, out_scale=c.out_scale),
    "titans_mag": lambda c: TitansMAG(c.d_model, c.n_heads, c.chunk, c.window, c.depth, c.width, out_scale=c.out_scale),
    "titans_mal": lambda c: TitansMAL(c.d_model, c.n_heads, c.chunk, c.window, c.depth, c.width, out_scale=c.out_scale),
    "transformer": lambda c: Attention(c.d_model, c.n_heads, c.width, out_scale=c.out_scale),
    "linear_attention": lambda c: LinearAttention(c.d_model, c.n_heads, c.width, c.out_scale),
    "retnet": lambda c: RetNet(c.d_model, c.n_heads, c.width, c.expand or 2, c.out_scale),
    "deltanet": lambda c: DeltaNet(c.d_model, c.n_heads, c.width, c.expand or 1, c.out_scale),
    "gated_deltanet": lambda c: GatedDeltaNet(c.d_model, c.n_heads, c.width, c.expand or 1, c.out_scale),
    "ttt_linear": lambda c: TTT(c.d_model, c.n_heads, min(16, c.chunk), 1, c.width, c.out_scale),
    "ttt_mlp": lambda c: TTT(c.d_model, c.n_heads, min(16, c.chunk), 2, c.width, c.out_scale),
    "samba": (  # layer by layer in turn
        lambda c: Mamba(c.d_model, c.width, out_scale=c.out_scale),
        lambda c: Attention(c.d_model, c.n_heads, out_scale=c.out_scale, window=c.window),
    ),
}


def mixer(c, layer):
    """The mixer of that layer, counted from 0."""
    kinds = MIXERS[c.model] if isinstance(MIXERS[c.model], tuple) else (MIXERS[c.model],)
    return kinds[layer % len(kinds)](c)


def one_of(what, value, choices):
    """value, if it is among choices; else ValueError with the nearest name."""
    if value in choices:
        return value
    near = difflib.get_close_matches(str(value), choices, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown {what} {value!r}: must be one of {', '.join(choices)}{hint}")


@dataclass
class HopeConfig:
    """Everything that defines a model; saved with every run. Raises ValueError, with value and range, for what is not legal.

    levels: chunk lengths of the CMS from fast to slow, in tokens, None = never updates. hidden: width of the feed-forward
    block, all levels together; None = solved for equal parameters. conv: width of the short convolution in tokens, 0 =
    none; None = 4, but none for attention, also linear, and RetNet. expand: width of values over that of keys in RetNet,
    DeltaNet and Gated DeltaNet; None = 2 for RetNet, else 1. window: tokens that the attention of Samba, MAG and MAL sees, and
    a segment of MAC.
    cms_step: initial inner step size of the CMS levels on the token clock, a number or one for each level that updates,
    learned from there on; None = not learned: `learn` is then given one. norm_eps, tied (one table for tokens in and out) and
    rope_base (of hope_attention) are what pre-trained models differ in. The remaining fields belong to the mixers in
    titans.py; TTT's chunk is 16, as in its paper, unless `chunk` is shorter.
    """

    model: str = "hope"
    vocab_size: int = 257
    d_model: int = 128
    n_layers: int = 5
    n_heads: int = 2
    hidden: int | None = None
    levels: list | None = None
    variant: str = "sequential"
    cms_step: float | list | None = None
    conv: int | None = None
    chunk: int = 64
    memory: str = "matrix"
    adaptive: list = dataclasses.field(default_factory=lambda: ["k", "v"])
    momentum: bool = False
    inner_step: float = 1.0
    mode: str = "token"
    dgd: bool = True
    retention: bool = True
    gate: bool = True
    depth: int = 2
    expand: int | None = None
    window: int = 128
    norm_eps: float = 1e-6
    tied: bool = True
    rope_base: float = 10000.0

    def __post_init__(self):
        one_of("model", self.model, MIXERS)
        one_of("memory", self.memory, ("matrix", "mlp"))
        one_of("mode", self.mode, ("token", "boundary"))
        one_of("variant", self.variant, VARIANTS)
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "chunk", "depth", "window"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model must be a multiple of n_heads, got d_model {self.d_model} and n_heads {self.n_heads}")
        if not isinstance(self.inner_step, (int, float)) or not 0 <= self.inner_step <= 1:
            raise ValueError(f"inner_step must be in [0, 1], got {self.inner_step!r}")
        if self.conv is not None and (not isinstance(self.conv, int) or self.conv < 0):
            raise ValueError(f"conv must be an integer of at least 0 tokens, got {self.conv!r}")
        if self.levels is None:
            self.levels = [512, None] if self.model.startswith("hope") else [None]
        if not isinstance(self.levels, (list, tuple)) or not self.levels:
            raise ValueError(f"levels must be a list of chunk lengths (None: never updates), fast to slow, got {self.levels!r}")
        if any(chunk is not None and (type(chunk) is not int or chunk < 1) for chunk in self.levels):
            raise ValueError(f"levels must hold integers of at least 1 token, None only last, got {self.levels!r}")
        if not isinstance(self.adaptive, (list, tuple)) or not set(self.adaptive) <= {"k", "v", "q"}:
            raise ValueError(f"adaptive must be a list out of 'k', 'v', 'q', got {self.adaptive!r}")
        for name in ("momentum", "dgd", "retention", "gate", "tied"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        for name in ("norm_eps", "rope_base"):
            if type(getattr(self, name)) not in (int, float) or not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number above 0, got {getattr(self, name)!r}")
        for name in ("hidden", "expand"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1 or None, got {value!r}")
        if self.cms_step is not None:
            n = sum(chunk is not None for chunk in self.levels)
            steps = self.cms_step if isinstance(self.cms_step, (list, tuple)) else [self.cms_step] * n
            if len(steps) != n or not all(type(s) in (int, float) and 0 < s < math.inf for s in steps):
                raise ValueError(f"cms_step must be a number above 0, or one for each of {n} levels, got {self.cms_step!r}")
        self.levels, self.adaptive = list(self.levels), list(self.adaptive)
        if self.hidden is None:
            self.hidden = self._equal_hidden()

    @classmethod
    def preset(cls, name, model="hope", **overrides):
        """The config of a preset: nano, 30m, 125m, 340m, 760m, 1.3b. Overrides are fields of HopeConfig."""
        d_model, n_layers, n_heads, vocab_size = PRESETS[one_of("preset", name, PRESETS)]
        for field in overrides:
            one_of("field of HopeConfig", field, [f.name for f in dataclasses.fields(cls)])
        sizes = dict(d_model=d_model, n_layers=n_layers, n_heads=n_heads, vocab_size=vocab_size)
        if name != "nano":
            sizes["window"] = 2048  # as published; nano is trained on shorter rows
        return cls(model=model, **(sizes | overrides))

    def to_dict(self):
        return dataclasses.asdict(self)

    @property
    def width(self):
        """Width of the short convolution in tokens, 0 for none."""
        without = ("transformer", "hope_attention", "linear_attention", "retnet")
        return self.conv if self.conv is not None else 0 if self.model in without else 4

    @property
    def out_scale(self):
        """Of projections into the residual stream, so that its variance does not grow with depth."""
        return (2 * self.n_layers) ** -0.5

    def _equal_hidden(self):
        """Total feed-forward width at which a block has the parameters of Transformer++'s (SwiGLU of 8/3 d_model)."""
        d = self.d_model
        target = 4 * d * d + 3 * d * (8 * round(d / 3)) + 2 * d
        with torch.device("meta"):  # counts only
            mixers = [mixer(self, layer) for layer in range(self.n_layers)]
        mean = sum(p.numel() for m in mixers for p in m.parameters()) / self.n_layers
        n = len(self.levels)
        each = round((target - mean - d * (n + 1)) / (3 * d * n) / 4) * 4
        if each < 4:
            raise ValueError(f"{self.model} at d_model {d} leaves no parameters for {n} CMS levels; set hidden or fewer levels")
        return n * each


class Block(nn.Module):
    recompute = False  # keep nothing of a block for the backward pass but its input

    def __init__(self, c, layer):
        super().__init__()
        self.norm = nn.RMSNorm(c.d_model, eps=c.norm_eps)
        self.mixer = mixer(c, layer)
        if c.hidden % len(c.levels):
            raise ValueError(f"hidden must be a multiple of the number of levels, got {c.hidden} for {len(c.levels)} levels")
        levels = [Level(chunk, c.hidden // len(c.levels)) for chunk in c.levels]
        self.cms = CMS(c.d_model, levels, c.variant, c.out_scale, c.cms_step, c.norm_eps)

    def forward(self, x, state):
        if self.recompute and torch.is_grad_enabled():
            return computed_again(self._forward, x, state, use_reentrant=False, preserve_rng_state=False)
        return self._forward(x, state)

    def _forward(self, x, state):
        y, mixer = self.mixer(self.norm(x), state and state["mixer"])
        x, cms = self.cms(x + y, state and state["cms"])
        return x, {"mixer": mixer, "cms": cms}


@contextlib.contextmanager
def plain(model):
    """Within, every mixer takes its readable path, through memory.scan, instead of a fused one."""
    fused = [module for module in model.modules() if getattr(module, "fused", False)]
    for module in fused:
        module.fused = False
    try:
        yield
    finally:
        for module in fused:
            module.fused = True


@contextlib.contextmanager
def twice_differentiable(model):
    """Fused backward passes have no second derivative: within, there are none."""
    with plain(model), no_auto_kernels(), sdpa_kernel(SDPBackend.MATH):
        yield


class Hope(nn.Module):
    """The language model. (tokens [B, T] int64, state=None) -> (logits [B, T, vocab_size], state)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=0.05)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(self, tokens, state=None, updates="off", step=None):
        """Raises ValueError for ids out of range.

        updates: one of UPDATES, whether the CMS levels take steps in context, and step: how long, see `learn`. A state that
        was read on with updates "off" has lost its place in the chunk: from there on it can only be read.
        """
        if tokens.ndim != 2 or tokens.dtype != torch.int64 or not tokens.numel():
            raise ValueError(f"tokens must be [B, T] int64 with B, T >= 1, got shape {tuple(tokens.shape)} of {tokens.dtype}")
        # On a GPU the check would stall the stream; the embedding asserts there.
        if not tokens.is_cuda and not torch.compiler.is_compiling():
            low, high = tokens.min().item(), tokens.max().item()
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(f"token ids must be in [0, {self.config.vocab_size}), got {low if low < 0 else high}")
        if one_of("updates", updates, UPDATES) == "off":
            return self._read(tokens, state)
        return self._read_and_update(tokens, state, updates == "full", step)

    def _read(self, tokens, state=None):
        x, states = self.embedding(tokens), []
        for i, block in enumerate(self.blocks):
            x, s = block(x, state and state["blocks"][i])
            states.append(s)
        table = self.embedding.weight if self.head is None else self.head.weight
        return F.linear(self.norm(x), table), {"blocks": states}

    def learn(self, tokens, state=None, updates="first_order", step=None):
        """Read a stream and learn from it in context (NL 70-74). tokens [B, T] -> (loss, state).

        loss [B, T], in nats: of every token, given all before it; [B, T - 1] where there is no state, because nothing
        predicts the first token of a stream. step: inner step size of the CMS levels, a number or one for each level that
        updates; None: the learned ones. It multiplies the *sum* over tokens (NL 71).

        Under torch.no_grad() this is learning at test time. Otherwise loss can be differentiated: the start weights are
        trained *through* the updates ("full": exact, second order, by the plain path of every mixer) or at the updated
        weights ("first_order": the inner gradients count as constants). The state is a plain tree like any other. Beside
        the rows' own weights it holds the sums of the slower levels and, of the unfinished chunk, the mixers' state at its
        start and its tokens. Raises ValueError for a model without a level that updates, a chunk below 2 tokens, a step
        that is missing or negative, a state that no call with updates on has returned.
        """
        if updates == "off":
            raise ValueError("updates is 'off'; learn takes 'first_order' or 'full'")
        logits, after = self(tokens, state, updates, step)
        last = None if state is None else state["stream"]["logits"]
        before = logits[:, :-1] if last is None else torch.cat([last[:, None], logits[:, :-1]], 1)
        targets = tokens[:, tokens.shape[1] - before.shape[1] :]
        return F.cross_entropy(full_precision(before).mT, targets, reduction="none"), after

    def start_stream(self, batch):
        """State before the first token of `batch` rows whose CMS levels learn."""
        if (chunk := self.config.levels[0]) is None or chunk < 2:
            why = "no level updates" if chunk is None else "a chunk of 1 token has no loss term of its own"
            raise ValueError(f"levels is {self.config.levels}: {why}; learning in context needs a first chunk of at least 2")
        blocks = [{"mixer": None, "cms": block.cms.start_state(batch)} for block in self.blocks]
        if not torch.is_grad_enabled():  # a state is apart from the weights; training alone needs the views
            blocks = map_state(torch.clone, blocks)
        empty = torch.empty(batch, 0, dtype=torch.int64, device=self.embedding.weight.device)
        return {"blocks": blocks, "stream": {"mixers": [None] * len(blocks), "tokens": empty, "logits": None}}

    def _read_and_update(self, tokens, state, full, step):
        """`forward` with updates on, piece by piece; no piece reaches beyond its chunk."""
        batch, T = tokens.shape
        outer = torch.is_grad_enabled()
        state = self.start_stream(batch) if state is None else state
        if state.get("stream") is None:
            raise ValueError("this state was read on with updates off; learning goes on from a state that `learn` returned")
        if (rows := state["stream"]["tokens"].shape[0]) != batch:
            raise ValueError(f"the state is of {rows} rows; tokens has {batch}")
        for block in self.blocks:
            block.cms.steps(step)  # raises for a bad one
        out, i = [], 0
        while i < T:
            blocks, (mixers, since) = state["blocks"], (state["stream"][name] for name in ("mixers", "tokens"))
            piece = tokens[:, i : i + self.config.levels[0] - since.shape[1]]
            since, whole = torch.cat([since, piece], 1), not since.shape[1]
            complete = since.shape[1] == self.config.levels[0]
            with twice_differentiable(self) if full else contextlib.nullcontext():
                if not (whole and complete):
                    logits, after = self._read(piece, {"blocks": blocks})
                if complete:
                    starts = [{"mixer": m, "cms": block["cms"]} for m, block in zip(mixers, blocks, strict=True)]
                    read, end, grads = self._errors(since, starts, retain=outer, create=outer and full)
                    if whole:
                        logits, after = read, end
            blocks = after["blocks"]
            if complete:
                for block, s, g in zip(self.blocks, blocks, grads, strict=True):
                    s["cms"] = block.cms.update(s["cms"], g, step)
                mixers, since = [s["mixer"] for s in blocks], since[:, :0]
            state = {"blocks": blocks, "stream": {"mixers": mixers, "tokens": since, "logits": logits[:, -1]}}
            out.append(logits)
            i += piece.shape[1]
        return torch.cat(out, 1), state

    @torch.enable_grad()
    def _errors(self, tokens, blocks, retain, create):
        """One chunk, read from `blocks`, and the gradient of its summed loss at the fast weights it was read with.

        Returns (logits, state, per block and level {name: gradient} or None). retain: keep the graph, for an outer
        gradient; create: of the gradients, too.
        """

        def alias(w):  # a node of its own: the gradient is this chunk's alone, although the mixers' state depends on w
            return w.view_as(w) if w.requires_grad else w.detach().requires_grad_()

        fast = [[w and {name: alias(t) for name, t in w.items()} for w in block["cms"]["fast"]] for block in blocks]
        read_from = [b | {"cms": b["cms"] | {"fast": f}} for b, f in zip(blocks, fast, strict=True)]
        logits, state = self._read(tokens, {"blocks": read_from})
        loss = F.cross_entropy(full_precision(logits[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        grads = iter(torch.autograd.grad(loss, tensors(fast), retain_graph=retain, create_graph=create))
        grads = map_state(lambda _: next(grads), fast)
        for s, block in zip(state["blocks"], blocks, strict=True):
            s["cms"] = s["cms"] | {"fast": block["cms"]["fast"]}
        if not retain:
            logits, state = logits.detach(), map_state(torch.Tensor.detach, state)
        return logits, state, grads

    def generate(self, tokens, n, state=None, temperature=1.0, top_k=None):
        """Sample n tokens after the prompt tokens [B, T], T >= 1; yields each as [B] int64 the moment it is known.

        Constant memory for recurrent mixers. temperature 0 takes the most likely token. state continues an earlier call.
        """
        if n < 0:
            raise ValueError(f"n must be at least 0 tokens, got {n}")
        if temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if tokens.ndim != 2 or tokens.shape[1] < 1:
            raise ValueError(f"the prompt must be [B, T] with at least one token, got shape {tuple(tokens.shape)}")
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise ValueError(f"token ids must be in [0, {self.config.vocab_size}), got {tokens.min()} to {tokens.max()}")
        return self._generate(tokens, n, state, temperature, top_k)

    @torch.no_grad()
    def _generate(self, tokens, n, state, temperature, top_k):
        for _ in range(n):
            logits, state = self(tokens, state)
            logits = logits[:, -1]
            if temperature == 0:
                token = logits.argmax(-1)
            else:
                logits = logits / temperature
                if top_k is not None and top_k < logits.shape[-1]:
                    logits = logits.masked_fill(logits < logits.topk(top_k)[0][:, -1:], -math.inf)
                token = torch.multinomial(logits.softmax(-1), 1).squeeze(1)
            yield token
            tokens = token[:, None]

    def levels(self):
        """The model as a nested system (NL Definition 2): its components from the highest update frequency to the lowest.

        Rows {"component", "level", "updates", "context", "parameters"}; level 1 updates most often.
        """
        c, count = self.config, lambda modules: sum(p.numel() for m in modules for p in m.parameters())
        mixers = [b.mixer for b in self.blocks]
        rows = []  # (tokens between updates, component, updates, context, parameters)
        named = [(name, p) for m in mixers for name, p in m.named_parameters()]
        starts = sum(p.numel() for name, p in named if any(part.startswith("start") for part in name.split(".")))
        if starts and c.inner_step:  # else frozen: as static as any projection
            made = ", ".join(["content", *c.adaptive, "eta", "alpha"]) if c.model == "hope" else "content"
            targets = "own targets, in context" if c.model == "hope" else "keys and values, in context"
            chunk = min(16, c.chunk) if c.model.startswith("ttt") else c.chunk
            rows.append((1, f"memories ({made})", f"every token, generated every {chunk}", targets, starts))
        if c.model in ("transformer", "hope_attention", "samba", "titans_mac", "titans_mag", "titans_mal"):
            rows.append((1, "attention (non-parametric)", "every token", "keys and values, in context", 0))
        if c.model in ("linear_attention", "retnet", "deltanet", "gated_deltanet", "samba"):
            what = "state space" if c.model == "samba" else "matrix memory"
            rows.append((1, what, "every token", "keys and values, in context", 0))
        for i, level in enumerate(self.blocks[0].cms.levels):
            size = count(b.cms.mlps[i] for b in self.blocks)
            if level.chunk is not None:
                what, when = f"CMS level {i + 1}", f"every {level.chunk} tokens"
                rows.append((level.chunk, what, when, "next-token loss, with `updates` on", size))
        static = count([self]) - sum(row[-1] for row in rows)
        what = "projections, embedding, static MLP"
        rows.append((math.inf, what, "every training step", "next-token loss, training set", static))
        periods = sorted({row[0] for row in rows})
        names = ("component", "updates", "context", "parameters")
        return [dict(zip(names, row[1:], strict=True)) | {"level": periods.index(row[0]) + 1} for row in rows]

    @classmethod
    def load(cls, run, device="cpu"):
        """(model in eval mode, what `tokenizer` knows its tokenizer by) from a run folder. ValueError says what is wrong."""
        from vocabulary import tokenizer_of  # a model alone needs no tokenizer

        config = os.path.join(run, "config.json")
        if not os.path.isfile(config):
            raise ValueError(f"{run!r} is no run folder: {config} does not exist")
        try:
            with open(config) as f:
                saved = json.load(f)
            model, tokenizer = cls(HopeConfig(**saved["model"])), tokenizer_of(run, saved["tokenizer"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{config} is damaged: {error!r}") from None
        checkpoint.load(run, model)
        return model.to(device).eval(), tokenizer

    @classmethod
    def from_pretrained(cls, folder, levels=(512, None), **changes):
        """A Llama-family checkpoint (config.json, *.safetensors) as Hope-Attention whose MLPs are CMS levels (NL 7.3).

        levels: chunk lengths from fast to slow. Each pre-trained MLP is shared out among them, hidden unit by hidden unit,
        as the independent variant with every mixing weight 1: a sum of narrower MLPs, so that at the start, and with step
        size 0 for ever, this *is* the pre-trained model. changes: further fields of HopeConfig, as cms_step. Weights are
        read to float32. Grouped keys and values are repeated for each of their heads.
        Deviation: NL gives every level pre-trained MLPs of its own; here every block has all levels.
        Raises ValueError for what is no such checkpoint, and for parts that have no place here.
        """
        try:
            from safetensors.torch import load_file as load_safetensors
        except ImportError:
            raise ValueError("reading a pre-trained checkpoint needs safetensors: pip install safetensors") from None
        folder = Path(folder)
        try:
            llama = json.loads((folder / "config.json").read_text())
            weights = {}
            for file in sorted(folder.glob("*.safetensors")):
                weights |= load_safetensors(file)
        except Exception as error:  # safetensors has errors of its own
            raise ValueError(f"{folder} is no readable checkpoint: {first_line(error)}") from None
        rope = llama.get("rope_parameters") or llama.get("rope_scaling") or {}
        foreign = {
            "rope type": (rope.get("rope_type", rope.get("type", "default")), "default"),
            "hidden_act": (llama.get("hidden_act", "silu"), "silu"),
            "attention_bias": (bool(llama.get("attention_bias")), False),
            "mlp_bias": (bool(llama.get("mlp_bias")), False),
        }
        for name, (value, legal) in foreign.items():
            if value != legal:
                raise ValueError(f"{folder} has {name} {value!r}; legal is {legal!r}")
        try:
            n, d, H = llama["num_hidden_layers"], llama["hidden_size"], llama["num_attention_heads"]
            groups, eps, tied = llama.get("num_key_value_heads") or H, llama["rms_norm_eps"], llama["tie_word_embeddings"]
            sizes = dict(vocab_size=llama["vocab_size"], d_model=d, n_layers=n, n_heads=H, hidden=llama["intermediate_size"])
            if (llama.get("head_dim") or d // H) * H != d:
                raise ValueError(f"{folder} has head_dim {llama['head_dim']}; legal is hidden_size / heads, {d // H}")
            base = float(rope.get("rope_theta") or llama.get("rope_theta", 10000.0))
            own = dict(model="hope_attention", levels=list(levels), variant="independent")
            model = cls(HopeConfig(**(sizes | own | dict(norm_eps=eps, tied=tied, rope_base=base) | changes)))

            def heads(name, count):  # [count, head width, d], keys and values repeated for every head of their group
                return weights.pop(name).float().view(count, -1, d).repeat_interleave(H // count, 0)

            def paired(w):  # RoPE there turns channels i and i + width / 2 together, here neighbours
                return w.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)

            new = {"embedding.weight": weights.pop("model.embed_tokens.weight")}
            new["norm.weight"] = weights.pop("model.norm.weight")
            if not tied:
                new["head.weight"] = weights["lm_head.weight"]
            weights.pop("lm_head.weight", None)
            for i in range(n):
                old, at = f"model.layers.{i}.", f"blocks.{i}."
                q, k, v = (heads(f"{old}self_attn.{x}_proj.weight", c) for x, c in (("q", H), ("k", groups), ("v", groups)))
                new[at + "norm.weight"] = weights.pop(old + "input_layernorm.weight")
                new[at + "mixer.qkv.weight"] = torch.cat([paired(q), paired(k), v]).flatten(0, 1)
                new[at + "mixer.out.weight"] = weights.pop(old + "self_attn.o_proj.weight")
                norm = weights.pop(old + "post_attention_layernorm.weight")
                gate, up, down = (weights.pop(f"{old}mlp.{x}_proj.weight") for x in ("gate", "up", "down"))
                parts = (gate.chunk(len(levels)), up.chunk(len(levels)), down.chunk(len(levels), 1))
                for level, (gate, up, down) in enumerate(zip(*parts, strict=True)):
                    mlp = f"{at}cms.mlps.{level}."
                    new |= {mlp + "norm.weight": norm, mlp + "w_in": torch.cat([gate, up]), mlp + "w_out": down}
                new[at + "cms.mix"] = torch.ones(len(levels))
                if model.config.cms_step is not None:
                    new[at + "cms.log_step"] = model.blocks[i].cms.log_step.detach()
            model.load_state_dict(new)
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{folder} is no checkpoint of the Llama family: {first_line(error)}") from None
        if left := [name for name in weights if not name.endswith("rotary_emb.inv_freq")]:
            raise ValueError(f"{folder} has {left[0]}, which has no place here; legal are plain Llama weights")
        return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Counting


def flops_per_token(config, seq_len):
    """FLOPs of training on one token of rows of seq_len: forward and backward, CMS updates off, all layers.

    Counted are products, 2 FLOPs per multiply-add: 6 per parameter of a matrix, once forward and twice backward, plus what the
    mixers multiply besides. Not counted: elementwise work, and what a backward pass computes again to save memory. Attention
    counts the keys that its queries see, half of a causal square, as fused attention computes; scans count whole tiles.
    """
    c = config
    with torch.device("meta"):  # counts only
        model = Hope(c)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    mlps = sum(p.numel() for block in model.blocks for mlp in block.cms.mlps for p in (mlp.w_in, mlp.w_out))
    matrices = linear + mlps + (c.vocab_size * c.d_model if c.tied else 0)
    own = sum(_products(c, type(block.mixer), seq_len) for block in model.blocks)
    return 6.0 * matrices + 2.0 * own


def _products(c, kind, T):
    """Multiply-adds per token, forward and backward, of one mixer beyond its projections."""
    d, H = c.d_model, c.n_heads
    w = d // H  # of a head; scans below are of one head

    def scan(dk, dv, tile, delta, momentum=False, decays=0):
        """memory.scan, by its lines: read and write of the state, of the tile; decays: rates with a gradient of their own."""
        C = min(tile, 64, T)
        forward = 2 * dk * dv + C * (dk + dv)
        forward += (dk * dv + C * (dk + dv)) * delta + (2 * dk * dv + C * C) * momentum
        return 3 * forward + C * C * (delta / 3 + decays)  # the solve's inverse has no backward, a decay no product forward

    def attention(window, width=2):  # width: of a key and a value together, in heads' widths
        n = min(window or T, T)
        keys = n - n * (n - 1) / (2 * T)  # the mean over a row of min(t, n)
        return 3 * width * d * keys

    def neural_memory(L):  # surprise at the boundary, then a layer of read and write at a time
        return H * (3 * (2 * L - 1) * w * w + L * scan(w, w, c.chunk, False, True, 2))

    if c.model in ("transformer", "hope_attention"):
        return attention(None)
    if kind is Attention:
        return attention(c.window)
    if kind is Mamba:
        return 3 * 2 * d * 16
    if c.model == "linear_attention":
        return H * scan(w, w + 1, T, False)  # the value 1 sums the weights
    if c.model in ("retnet", "deltanet", "gated_deltanet"):
        dv = w * (c.expand or (2 if c.model == "retnet" else 1))
        return H * scan(w, dv, T, c.model != "retnet", decays=c.model == "gated_deltanet")
    if kind is TTT:  # outputs and errors at the boundary; a bias is one more input
        sizes = [(w + 1, w)] if c.model == "ttt_linear" else [(w + 1, 4 * w), (4 * w + 1, w)]
        boundary = sum(i * o for i, o in sizes) + (4 * w * w if len(sizes) > 1 else 0)
        return H * (3 * boundary + sum(scan(i, o, min(16, c.chunk), False) for i, o in sizes))
    if kind is NeuralMemory:
        return neural_memory(c.depth)
    if kind is TitansMAC:  # what is retrieved has keys and values of its own
        n = min(c.window, T)
        retrieved = 3 * (4 * d * d + c.depth * w * d)
        return neural_memory(c.depth) + retrieved + 3 * 3 * d * (n + 1 + 4)
    if kind in (TitansMAG, TitansMAL):
        return neural_memory(c.depth) + attention(c.window, 3) + 3 * 3 * d * 4
    n = 1 + len(c.adaptive)
    rows, C = n * w + (3 if c.momentum else 2), min(c.chunk, T)
    generate = (rows - w) * w + w * w  # and the read at the learned start
    if c.memory == "matrix" and set(c.adaptive) == {"k", "v"} and not c.momentum:  # titans._SelfModify, by its lines
        return H * (3 * (generate + 3 * rows * w + w * w + C * (3 * w + rows)) + C * C * (1 / 3 + 1))
    one = 3 * (generate + 2 * rows * w) + scan(w, rows, c.chunk, True, c.momentum, 1 + c.momentum)
    two = 3 * 5 * n * w * w + n * scan(w, w, c.chunk, True, c.momentum, 1 + c.momentum)
    return H * (one + two * (c.memory == "mlp"))


# ---------------------------------------------------------------------------------------------------------------------
# State as a value


def map_state(f, state):
    """The same tree with f applied to every tensor."""
    if torch.is_tensor(state):
        return f(state)
    if isinstance(state, dict):
        return {name: map_state(f, value) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [map_state(f, value) for value in state]
    return state


def tensors(state):
    """All tensors of a state, in order."""
    found = []
    map_state(found.append, state)
    return found


def save_state(state, path):
    """Write a state to a file: cut from the graph, on the CPU. OSError where that fails; never half a file."""
    state = map_state(lambda t: t.detach().cpu().clone(), state)
    write_beside(Path(path), lambda beside: torch.save(state, beside))


def load_state(path, device="cpu"):
    """The state `save_state` wrote. Raises ValueError where the file is torn or no such file."""
    return map_state(lambda t: t.to(device), load_file(path))


def device_for(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU if there is one. ValueError for one this machine lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise ValueError(f"device is {name!r}: legal are auto, cpu, cuda, cuda:N")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(index or 0) >= gpus:
        raise ValueError(f"device is {name!r}, but torch sees {gpus} GPUs: legal are auto, cpu, cuda:N with N < {gpus}")
    return torch.device(name)


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def table(config):
    with torch.device("meta"):  # counts only
        model = Hope(config)
    rows = model.levels()
    total = sum(p.numel() for p in model.parameters())
    print(f"{config.model}: {total:,} parameters, d_model {config.d_model}, {config.n_layers} layers, {config.n_heads} heads\n")
    print(f"{'level':>5}  {'component':<44}{'updates':<38}{'context':<42}{'parameters':>12}")
    for row in rows:
        print(f"{row['level']:>5}  {row['component']:<44}{row['updates']:<38}{row['context']:<42}{row['parameters']:>12,}")
    print("\nLevel 1 updates most often. Parameters of a level that learns in context are its learned start.")


def main():
    parser = argparse.ArgumentParser(description="Hope as a nested system; text from a trained model")
    commands = parser.add_subparsers(dest="command")
    g = commands.add_parser("generate", help="stream text from a run", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    g.add_argument("run", help="run folder of train.py")
    g.add_argument("--prompt", default="def ", help="text to continue")
    g.add_argument("--n", type=int, default=400, help="tokens to generate")
    g.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token")
    g.add_argument("--top-k", type=int, default=None, help="sample among the k most likely tokens")
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--preset", default="nano", help="preset to show (default nano)")
    parser.add_argument("--model", default="hope", help="model to show (default hope)")
    args = parser.parse_args()
    try:
        if args.command is None:
            return table(HopeConfig.preset(args.preset, args.model))
        from vocabulary import tokenizer

        device = device_for(args.device)
        model, name = Hope.load(args.run, device)
        encoding = tokenizer(name)
        torch.manual_seed(args.seed)
        prompt = encoding.encode(args.prompt, disallowed_special=()) or [encoding.eot_token]
        tokens = torch.tensor([prompt], device=device)
        out = model.generate(tokens, args.n, temperature=args.temperature, top_k=args.top_k)
        print(args.prompt, end="", flush=True)
        for token in out:
            sys.stdout.buffer.write(encoding.decode_bytes(token.tolist()))
            sys.stdout.flush()
        print()
    except (ValueError, RuntimeError, OSError) as error:
        print(f"hope.py: error: {first_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main()
