"""What mixers are made of: short convolution, heads, the loop over chunks, the shell of a memory.

Nothing here is a concept of the paper; titans.py and baselines.py build theirs from it. A mixer is
(x [B, T, d_model], state) -> (y [B, T, d_model], state), and has besides

    products(T)    multiply-adds per token in rows of T tokens, forward and backward, beyond those
                   of its projections (nn.Linear)
    components()   its rows of `Hope.levels()`, see `component`

A state is a plain tree of tensors and numbers. At the end: how tokens are drawn from logits.
"""

import difflib
import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fused import EPS, causal_convolution
from memory import floats, full_precision

# --------------------------------------------------------------------------------------------------
# Checks


def one_of(what, value, choices):
    """value, if it is among choices; else ValueError with the nearest name."""
    if isinstance(value, str) and value in choices:
        return value
    near = difflib.get_close_matches(str(value), choices)
    near.sort(key=lambda name: len(name) != len(str(value)))  # 350m is 340m and not 30m
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown {what} {value!r}: must be one of {', '.join(choices)}{hint}")


def at_least(least, **numbers):
    """ValueError for a number that is no integer or below `least`, by its name."""
    for name, value in numbers.items():
        if type(value) is not int:
            raise ValueError(f"{name} must be an integer, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def whole_chunks(window_reset, chunk):
    """ValueError for a window that does not end with a chunk. None: no windows."""
    whole = type(window_reset) is int and window_reset > 0 and window_reset % chunk == 0
    if not (window_reset is None or whole):
        wanted = f"a positive multiple of chunk, {chunk} tokens, or None"
        raise ValueError(f"window_reset must be {wanted}, got {window_reset!r}")


# --------------------------------------------------------------------------------------------------
# Layers


class ShortConvolution(nn.Module):
    """SiLU of a causal depthwise convolution that carries its last width - 1 inputs along.

    (x [B, T, D], tail [B, width-1, D] or None) -> (y [B, T, D], tail). ValueError for width < 1.
    """

    def __init__(self, dim, width=4):
        super().__init__()
        at_least(1, **{"width of a convolution": width})
        self.weight = nn.Parameter(torch.randn(width, dim) * width**-0.5)

    def forward(self, x, tail=None):
        width = len(self.weight)
        if of_rows(tail, x) is None:
            tail = x.new_zeros(x.shape[0], width - 1, x.shape[2])
        x = torch.cat([tail, x], 1)
        y = causal_convolution(x, self.weight).to(x.dtype)
        # a copy, or the state would keep the whole input alive
        return y, x[:, x.shape[1] - width + 1 :].clone()


def convolution(dim, width):
    """A ShortConvolution, or None for a width of 0."""
    return None if width == 0 else ShortConvolution(dim, width)


def linear(d_in, d_out, scale=1.0):
    """A projection without bias, std scale / sqrt(d_in): unit variance in, variance scale^2 out."""
    layer = nn.Linear(d_in, d_out, bias=False)
    nn.init.normal_(layer.weight, std=scale * d_in**-0.5)
    return layer


def heads(x, n):
    """[B, T, n * d] -> [B, n, T, d]."""
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def head_width(d_model, n_heads):
    """d_model / n_heads. Raises ValueError where that is no positive integer."""
    whole = type(d_model) is type(n_heads) is int
    if not whole or n_heads < 1 or d_model < 1 or d_model % n_heads:
        raise ValueError(f"d_model must be a multiple of n_heads, got {d_model!r} and {n_heads!r}")
    return d_model // n_heads


def retention_of(z, A):
    """exp(-A softplus(z)): comes as close to 1 as float32 can hold, where a sigmoid has vanished.

    With A = 1, z = -log(n - 1) gives 1 - 1/n: a memory of n tokens.
    """
    return torch.exp(-A * F.softplus(z))


def recomputed(function, *args):
    """function(*args), computed again in the backward pass and not kept for it."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


class _ComputedAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, parameters, *inputs):
        ctx.function = function
        ctx.parameters = parameters
        kind = inputs[0].device.type
        dtype = torch.get_autocast_dtype(kind)
        ctx.autocast = partial(torch.autocast, kind, dtype, torch.is_autocast_enabled(kind))
        ctx.save_for_backward(*inputs[len(parameters) :])
        return tuple(function(*inputs[len(parameters) :]))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        needed = ctx.needs_input_grad[2 + len(ctx.parameters) :]
        inputs = []
        for tensor, need in zip(ctx.saved_tensors, needed, strict=True):
            inputs.append(tensor.detach().requires_grad_(need))
        with torch.enable_grad(), ctx.autocast():
            outputs = ctx.function(*inputs)
        pairs = [pair for pair in zip(outputs, grads, strict=True) if pair[0].requires_grad]
        outputs, grads = zip(*pairs, strict=True)
        leaves = [*ctx.parameters, *inputs]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
        return None, None, *(next(found) if leaf.requires_grad else None for leaf in leaves)


def computed_again(function, parameters, *states):
    """function(*states), computed without a graph now and once more, with one, backward.

    As `recomputed`, for a function that differentiates within itself, of trees of tensors.
    parameters: what else it depends on.
    """
    shape = None  # of the result, a tree with its tensors

    def flat(*inputs):
        nonlocal shape
        rest = iter(inputs)
        shape = function(*map_state(lambda _: next(rest), states))
        return tensors(shape)

    made = iter(_ComputedAgain.apply(flat, parameters, *parameters, *tensors(states)))
    return map_state(lambda _: next(made), shape)


# --------------------------------------------------------------------------------------------------
# Chunks and states


def by_chunk(position, T, *chunks):
    """Cut T tokens, from an absolute position on, wherever a chunk of one of these lengths ends.

    Yields (slice, whether it begins a chunk of the first length), in order.
    """
    i = 0
    while i < T:
        left = min(chunk - (position + i) % chunk for chunk in chunks)
        yield slice(i, i + left), (position + i) % chunks[0] == 0
        i += left


def over_chunks(step, streams, state, chunk, all_chunks=None, settle=None):
    """The one loop over chunks: read and write T tokens with a memory that learns.

    streams: a tree of what the tokens bring, [B, H, T, ...] each. step(now, boundary, running,
    momentum) -> (y, running, momentum) takes a piece of them within one chunk. `boundary` is the
    weights at the end of the chunk before, `running` those so far. all_chunks(now, running,
    momentum) -> (y, boundary, running, momentum), if given, takes all tokens from the first
    boundary on at once, where there is a whole chunk of them. settle, if given: what happens to
    each tensor of running and momentum where a chunk begins.

    state: {"position", "boundary", "running"}, maybe "momentum". Chunks sit at absolute positions,
    so any way of cutting a sequence into calls gives the same result.
    Returns (y [B, H, T, d], state).
    """
    T = tensors(streams)[0].shape[2]
    position = state["position"]
    boundary = state["boundary"]
    running = state["running"]
    momentum = state.get("momentum")
    outputs = []
    for piece, begins in by_chunk(position, T, chunk):
        if begins:
            if settle is not None:
                running, momentum = map_state(settle, (running, momentum))
            boundary = running
        if begins and all_chunks is not None and T - piece.start >= chunk:
            now = part(streams, piece.start, T)
            y, boundary, running, momentum = all_chunks(now, running, momentum)
            outputs.append(y)
            break
        now = part(streams, piece.start, piece.stop)
        y, running, momentum = step(now, boundary, running, momentum)
        outputs.append(y)
    position += T
    if position % chunk == 0:
        boundary = running
    after = {"position": position, "boundary": boundary, "running": running}
    if "momentum" in state:
        after["momentum"] = momentum
    return torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0], after


def over_windows(read, streams, state, window, start):
    """read(streams, state) -> (y [B, H, T, d], state), in windows (deviation 26).

    After every `window` tokens, at absolute positions, the state has the weights start(batch)
    again; None: never. So windows do not depend on each other, and all whole ones of a call are
    rows of one batch, [B n, H, window, ...]: heads stay behind rows, as kernels.py counts them.
    By themselves go only the rest of a window that an earlier call began, and an unfinished one.
    """
    if window is None:
        return read(streams, state)
    B, _, T = tensors(streams)[0].shape[:3]
    position = state["position"]
    rest = min(-position % window, T)
    n = (T - rest) // window
    end = rest + n * window  # of the last whole window

    def to_rows(t):
        return t.unflatten(2, (n, window)).transpose(1, 2).flatten(0, 1)

    outputs = []
    if rest:
        y, state = read(part(streams, 0, rest), state)
        outputs.append(y)
    if (position + rest) % window == 0:
        state = {"position": 0} | start(B)
    if n:
        rows = map_state(to_rows, part(streams, rest, end))
        y, _ = read(rows, {"position": 0} | start(B * n))
        outputs.append(y.unflatten(0, (B, n)).transpose(1, 2).flatten(2, 3))
    if end < T:
        y, state = read(part(streams, end, T), state)
        outputs.append(y)
    return torch.cat(outputs, 2), state | {"position": position + T}


def part(streams, begin, end):
    """Tokens begin .. end - 1 of a tree of tensors [B, H, T, ...]."""
    return map_state(lambda t: t[:, :, begin:end], streams)


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


def of_rows(state, x, weight=None):
    """A mixer's state, if it has the rows of x [B, T, d]: else one would be broadcast to many.

    weight [.., d]: what x is multiplied by, if its width and type are to be checked.
    """
    floats(x=x)
    if x.ndim != 3 or not x.size(1):
        raise ValueError(f"x must be [B, T, d_model] with T >= 1, got shape {tuple(x.shape)}")
    if weight is not None:
        wanted = weight.shape[1], weight.dtype
        fits = x.dtype == wanted[1] or torch.is_autocast_enabled(x.device.type)
        if x.size(2) != wanted[0] or not fits:
            got = f"{x.size(2)} and {x.dtype}"
            raise ValueError(f"x must have width {wanted[0]} and {wanted[1]}, got {got}")
    rows = x.size(0)
    for t in tensors(state):
        if t.size(0) != rows:
            raise ValueError(f"state must have {rows} rows, as its input, got {t.size(0)}")
    return state


# The dimension of a part of a state that grows with the text
GROWS = {"k": 2, "v": 2, "tokens": 1, "x": 1}


def unlike(state, like, where="state", key=None):
    """Where a state has not the tree or the shapes of `like`, in words; None: nowhere.

    Rows may differ, and what grows. None and what is learned later stand for each other.
    """
    if torch.is_tensor(state) and torch.is_tensor(like):
        ours, theirs = ([*t.shape[1:]] for t in (like, state))
        if key in GROWS and state.ndim == like.ndim:
            ours[GROWS[key] - 1] = theirs[GROWS[key] - 1]
        return None if ours == theirs else f"{where} has rows of shape {theirs}, not {ours}"
    if type(state) is not type(like):
        later = state is None and key == "mixer"
        later = later or (like is None and key in ("cms", "sums", "mixers"))
        kinds = f"{type(state).__name__}, not {type(like).__name__}"
        return None if later else f"{where} is {kinds}"
    if not isinstance(like, (dict, list)):
        return None
    theirs, ours = (t if isinstance(t, dict) else dict(enumerate(t)) for t in (state, like))
    if "updated" not in theirs:  # an earlier version's
        ours = {part: own for part, own in ours.items() if part != "updated"}
    if theirs.keys() != ours.keys():
        return f"{where} has the parts {[*theirs]}, not {[*ours]}"
    for part, own in ours.items():
        inner = part if isinstance(like, dict) else key
        if wrong := unlike(theirs[part], own, f"{where}[{part!r}]", inner):
            return wrong
    return None


# --------------------------------------------------------------------------------------------------
# What a mixer says about itself


def count(module):
    """How many parameters a module has."""
    return sum(p.numel() for p in module.parameters())


def component(what, updates, context, parameters=0, period=1):
    """A row of `Hope.levels()`: a part, when it updates (period in tokens), and from what."""
    row = {"component": what, "updates": updates, "context": context, "parameters": parameters}
    return row | {"period": period}


def clock(mixer):
    """When a memory changes, in words for `component`."""
    window = getattr(mixer, "window_reset", None)
    reset = f", reset every {window}" if window else ""
    return f"every token, generated every {mixer.chunk}{reset}"


def deep_memory(mixer, initial_weights):
    """The rows of `Hope.levels()` for a memory with initial weights of its own."""
    size = sum(W0.numel() for W0 in initial_weights)
    context = "keys and values, in context"
    return [component("memories (content)", clock(mixer), context, size)]


def scan_products(dk, dv, T, tile=64, delta=True, momentum=False, decays=0):
    """Multiply-adds per token that `scan` takes forward and backward, by its lines.

    decays: how many of alpha, theta and delta have a gradient of their own.
    """
    C = min(tile, 64, T)
    forward = 2 * dk * dv + C * (dk + dv)  # read and write of the state, and within the tile
    if delta:
        forward += dk * dv + C * (dk + dv)
    if momentum:
        forward += 2 * dk * dv + C * C
    # the solve's inverse has no backward, a decay no product forward
    return 3 * forward + C * C * (delta / 3 + decays)


# --------------------------------------------------------------------------------------------------
# The shell of a recurrent memory


class Recurrent(nn.Module):
    """A memory with projections, short convolution, heads, norm per head and output gate around it.

    A kind of memory says how it remembers: remember(q, k [B, H, T, dk], v [B, H, T, dv],
    rates [n, B, H, T], state) -> (y [B, H, T, dv], what goes into the state). v has the type of the
    projection (bfloat16 under autocast), all else float32 at least. rates: numbers per head and
    token. conv: width of a short convolution with SiLU over q, k, v, 0 for none. expand:
    dv / dk, with dk = d_model / n_heads. project: False returns the read alone, normalised.

    (x [B, T, d_model], state) -> (y [B, T, d_model], state), state a dict with "position", "conv"
    (the tail). Raises ValueError where n_heads does not divide d_model, and for expand < 1.
    """

    squash = staticmethod(F.silu)  # of the output gate

    def __init__(self, d_model, n_heads, conv, expand=1, rates=0, gate=True, project=True,
                 out_scale=1.0):
        super().__init__()
        at_least(1, expand=expand)
        self.n_heads = n_heads
        self.width = head_width(d_model, n_heads)
        self.expand = expand
        self.backend = "auto"  # see fused.kernels_for
        dv = expand * d_model
        # q | k | v | gate | rates, in one product
        self.sizes = (d_model, d_model, dv, dv if gate else 0, rates * n_heads)
        self.in_proj = linear(d_model, sum(self.sizes))
        self.conv = convolution(2 * d_model + dv, conv)
        self.make_memory()
        self.norm = nn.RMSNorm(expand * self.width, eps=EPS)
        self.out_proj = linear(dv, d_model, out_scale) if project else None

    def make_memory(self):
        """Create what the memory itself learns in training."""

    def start_state(self, batch):
        """The state before the first token; "W": weights of a matrix memory, None for zeros."""
        return {"position": 0, "conv": None, "W": None}

    def forward(self, x, state=None):
        state = of_rows(state, x, self.in_proj.weight) or self.start_state(len(x))
        T = x.shape[1]
        sizes = (sum(self.sizes[:3]), *self.sizes[3:])
        qkv, gate, rates = self.in_proj(x).split(sizes, dim=-1)
        tail = state["conv"]
        if self.conv is not None:
            qkv, tail = self.conv(qkv, tail)
        qkv = qkv.split(self.sizes[:3], dim=-1)
        q, k, v = (heads(z, self.n_heads) for z in qkv)
        q, k = full_precision(q), full_precision(k)
        if rates.shape[-1]:
            rates = full_precision(rates).unflatten(-1, (-1, self.n_heads)).permute(2, 0, 3, 1)
        with torch.autocast(x.device.type, enabled=False):
            y, memory = self.remember(q, k, v, rates, state)
        y = self.norm(y).to(x.dtype).transpose(1, 2).flatten(2)  # [B, T, expand * d_model]
        if gate.shape[-1]:
            y = y * self.squash(gate)
        if self.out_proj is not None:
            y = self.out_proj(y)
        return y, {"position": state["position"] + T, "conv": tail} | memory

    def components(self):
        """Rows of `Hope.levels()`."""
        return [component("matrix memory", "every token", "keys and values, in context")]


# --------------------------------------------------------------------------------------------------
# Drawing tokens


class Sampler:
    """(logits [B, vocab], seen [B, vocab] bool) -> tokens [B] int64, drawn after, in this order:

    repetition_penalty    divides the positive logits of tokens seen, multiplies the negative ones
                          (Keskar et al. 2019, sec. 4.1); 1: none
    top_k                 keeps the k most likely tokens; None: all
    temperature           divides the logits; 0: the most likely token is taken
    top_p                 keeps the most likely tokens, no more than have this probability together
                          (Holtzman et al. 2020); 1: all
    min_p                 keeps those at least so many times as likely as the likeliest; 0: all

    ValueError for what is out of range.
    """

    def __init__(self, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
        if top_k is not None and (type(top_k) is not int or top_k < 1):
            raise ValueError(f"top_k must be an integer of at least 1, got {top_k!r}")
        for name, value, wanted, fits in (
            ("temperature", temperature, "of at least 0", lambda x: 0 <= x < math.inf),
            ("top_p", top_p, "above 0 and at most 1", lambda x: 0 < x <= 1),
            ("min_p", min_p, "from 0 to 1", lambda x: 0 <= x <= 1),
            ("repetition_penalty", repetition_penalty, "above 0", lambda x: 0 < x < math.inf),
        ):
            if not isinstance(value, (int, float)) or not fits(value):
                raise ValueError(f"{name} must be a number {wanted}, got {value!r}")
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.min_p = min_p
        self.repetition_penalty = repetition_penalty

    def __call__(self, logits, seen):
        logits = full_precision(logits)
        if self.repetition_penalty != 1:
            by = self.repetition_penalty
            lower = torch.where(logits > 0, logits / by, logits * by)
            logits = torch.where(seen, lower, logits)
        if self.temperature == 0:
            return logits.argmax(-1)
        # the largest is 0, so that no temperature overflows; one below 1e-30 is as 1e-30
        scaled = (logits - logits.amax(-1, keepdim=True)) / max(self.temperature, 1e-30)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k)[0][:, -1:]  # undivided: there are no ties yet
            scaled = scaled.masked_fill(logits < least, -math.inf)
        p = scaled.softmax(-1)
        if self.top_p < 1:
            ordered, order = p.sort(-1, descending=True)
            enough = ordered.cumsum(-1) - ordered >= self.top_p  # before a token; never the first
            p = p.masked_fill(torch.empty_like(enough).scatter_(-1, order, enough), 0)
        p = p.masked_fill(p < self.min_p * p.amax(-1, keepdim=True), 0)
        return torch.multinomial(p, 1).squeeze(1)


if __name__ == "__main__":
    print(__doc__)
