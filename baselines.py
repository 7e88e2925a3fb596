"""The rivals of Hope: sequence mixers with the same signature, mixer(x, state) -> (y, state).

Attention (Transformer++; RoPE: Su et al. 2021) remembers everything; its state grows with the text:

    y_t = sum_{s <= t} softmax_s(<R_t q_t, R_s k_s> / sqrt(dk)) v_s
    R_t rotates pair i of the channels by the angle t * base^(-2i / dk), i < dk / 2

Most keep fast weights of a fixed size per head, settings of the learning rule in memory.py:

    linear attention   W_t = W_{t-1} + v_t phi(k_t)^T                        read over its sum
    RetNet             W_t = alpha W_{t-1} + v_t k_t^T                       alpha fixed per head
    Mamba-2            W_t = alpha_t W_{t-1} + dt_t v_t k_t^T                alpha_t = exp(-A dt_t)
    DeltaNet           W_t = W_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T
    Gated DeltaNet     W_t = alpha_t W_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T
    Comba              the same with beta_t b, b < 1, in the bracket;        read at q_t - D b k_t
    DLA                W_t = alpha_t W_{t-1} + eta_t grad <f(k_t; W_boundary), v_t>   f a network
    TTT                W_t = W_{t-1} - eta_t grad |f(k_t; W_boundary) - v_t|^2 / 2
    Memora             TTT's step, with retention, on logits: f's weights are softmax(W_boundary)

Two need a rule of their own: RWKV-7, whose every key channel decays at its own rate, and SRWM,
whose matrix makes its own keys, queries and steps. Samba takes turns between Mamba, whose every
channel decays at its own rate, and attention in a window. Titans MAC, MAG and MAL join attention
with the long-term memory of titans.py.

x and y are [B, T, d_model]. The state is a dict of tensors and numbers; cutting a sequence into
calls never changes y. Numbers of deviations refer to docs/paper.md.

`python baselines.py` prints the parameters of each mixer and how its state grows with the text.
"""

import math
from functools import lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F

from fused import EPS, solve
from layers import (
    Recurrent,
    at_least,
    by_chunk,
    component,
    convolution,
    deep_memory,
    head_width,
    heads,
    linear,
    of_rows,
    over_chunks,
    recomputed,
    retention_of,
    scan_products,
)
from memory import floats, full_precision, l2norm, scan, write
from titans import NeuralMemory

# --------------------------------------------------------------------------------------------------
# Attention


@lru_cache(maxsize=512)  # of the chunks of a row, which learners read one by one
def rotations(position, T, width, base, factors, dtype, device):
    """exp(i t base^(-2j / width)) for t = position.. (T of them), j < width / 2: [T, 1, width / 2].

    factors: width / 2 numbers, a tuple, that divide the angles; None: 1. Angles are float64: a far
    position is as exact as a near one. One cache serves all layers.
    """
    with torch.inference_mode(False):  # a table first needed in generation must serve training too
        t = torch.arange(position, position + T, dtype=torch.float64)
        frequency = base ** (torch.arange(0, width, 2, dtype=torch.float64) / -width)
        if factors is not None:
            frequency = frequency / torch.tensor(factors, dtype=torch.float64)
        angle = torch.outer(t, frequency)
        return torch.complex(angle.cos(), angle.sin())[:, None].to(device=device, dtype=dtype)


@torch.compiler.assume_constant_result  # or a compiled block makes it on the CPU in every step
def known_rotations(*args):
    return rotations(*args)


def rotate(x, position, base=10000.0, factors=None):
    """RoPE of x [B, T, H, dk] at positions position..position + T - 1; neighbours form the pairs.

    One complex product: with its gradient three times faster on a CPU than sines and cosines on
    halves. Computed in float32 (float64 for a float64 x), returned in x's dtype.
    """
    exact = x if x.dtype == torch.float64 else x.float()
    pairs = torch.view_as_complex(exact.unflatten(-1, (-1, 2)))  # [B, T, H, dk / 2]
    known = (position, x.shape[1], x.shape[-1], base, factors, pairs.dtype, x.device)
    table = known_rotations(*known)
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


def attention_products(d, T, window=None, width=2):
    """Multiply-adds per token, forward and backward, of causal attention in rows of T tokens.

    width: of a key and a value together, in heads' widths.
    """
    n = min(window or T, T)
    keys = n - n * (n - 1) / (2 * T)  # the mean over a row of min(t, n)
    return 3 * width * d * keys


class Attention(nn.Module):
    """Causal softmax attention with RoPE and a key-value cache: the mixer of Transformer++.

    conv: width of a short convolution (with SiLU) over q, k and v, 0 for none. out_scale: factor on
    the initial output projection. window: tokens a query sees, itself included (None: all).
    rope_factors: dk / 2 numbers that divide RoPE's frequencies (None: 1).
    State: "k" (rotated), "v" [B, H, S, dk], with a window S < window; "position" in tokens; "conv",
    the tail, where there is a convolution.
    Raises ValueError where n_heads does not divide d_model, for an odd head width, window < 1 and
    other factors.
    """

    def __init__(
        self, d_model, n_heads, conv=0, rope_base=10000.0, out_scale=1.0, window=None,
        rope_factors=None,
    ):
        super().__init__()
        self.n_heads = n_heads
        self.width = head_width(d_model, n_heads)
        self.rope_base = rope_base
        self.rope_factors = None if rope_factors is None else tuple(rope_factors)
        self.window = window
        if self.width % 2:
            raise ValueError(f"d_model / n_heads must be even for RoPE, got {self.width}")
        if rope_factors is not None:
            positive = all(type(f) in (int, float) and 0 < f < math.inf for f in rope_factors)
            if len(rope_factors) != self.width // 2 or not positive:
                wanted = f"{self.width // 2} numbers above 0"
                raise ValueError(f"rope_factors must be {wanted}, got {rope_factors}")
        if window is not None:
            at_least(1, window=window)
        self.qkv = linear(d_model, 3 * d_model)
        self.conv = convolution(3 * d_model, conv)
        self.out = linear(d_model, d_model, out_scale)

    def forward(self, x, state=None):
        state = of_rows(state, x, self.qkv.weight) or {"position": 0, "conv": None}
        T = x.shape[1]
        past = state["position"]
        after = {"position": past + T}
        qkv = self.qkv(x)
        if self.conv is not None:
            qkv, after["conv"] = self.conv(qkv, state["conv"])
        q, k, v = self.split(qkv, past)
        if past:
            k = torch.cat((state["k"], k), 2)
            v = torch.cat((state["v"], v), 2)
        if self.window is None:
            mask = None
            if past and T > 1:  # queries are the last T of past + T positions; one sees everything
                mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
            y = self.look(q, k, v, mask, is_causal=not past)
        else:
            y = self.look_near(q, k, v)
            gone = max(0, k.shape[2] - self.window + 1)
            # copies, or the state would keep the whole text alive
            k = k[:, :, gone:].clone()
            v = v[:, :, gone:].clone()
        return self.out(y.transpose(1, 2).flatten(2)), after | {"k": k, "v": v}

    def split(self, qkv, position):
        """[B, T, 3 d_model] -> q, k (both rotated; deviation 37), v, each [B, H, T, dk]."""
        q, k, v = (z.unflatten(-1, (self.n_heads, self.width)) for z in qkv.chunk(3, -1))
        rope = (position, self.rope_base, self.rope_factors)
        q, k = (rotate(z, *rope).transpose(1, 2) for z in (q, k))
        # contiguous costs nothing measurable, and the cache does not keep all of qkv alive
        return q, k, v.transpose(1, 2).contiguous()

    def look(self, q, k, v, mask=None, is_causal=False):
        """Softmax attention of q [B, H, T, dk] over k, v [B, H, S, dk]; mask [T, S]: where."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)

    def look_near(self, q, k, v):
        """`look` within the window. Blocks of `window` queries keep the cost linear in T."""
        T = q.shape[2]
        past = k.shape[2] - T
        outputs = []
        for i in range(0, T, self.window):
            end = past + min(i + self.window, T)
            first = max(0, past + i - self.window + 1)
            rows = torch.arange(past + i, end, device=q.device)
            distance = rows[:, None] - torch.arange(first, end, device=q.device)
            mask = (distance >= 0) & (distance < self.window)
            queries = q[:, :, i : i + self.window]
            outputs.append(self.look(queries, k[:, :, first:end], v[:, :, first:end], mask))
        return torch.cat(outputs, 2)

    def products(self, T):
        """Multiply-adds per token in rows of T tokens, forward and backward, beyond projections."""
        return attention_products(self.n_heads * self.width, T, self.window)

    def components(self):
        """Rows of `Hope.levels()`."""
        what = "attention (non-parametric)"
        return [component(what, "every token", "keys and values, in context")]


# --------------------------------------------------------------------------------------------------
# Matrix memories: q, k [..., T, dk], v [..., T, dv], rates [..., T] -> (y [..., T, dv], W_T, None),
# from W [..., dv, dk] on (None: zeros). v's type is that of the products: see `scan`.


def _remember(q, k, v, beta, alpha, W, backend, delta):
    """`scan` from W on."""
    floats(q=q, k=k, v=v)
    if W is None:
        lead = torch.broadcast_shapes(v.shape[:-2], k.shape[:-2])
        W = full_precision(v.new_zeros(*lead, v.shape[-1], k.shape[-1]))
    q, k = q.to(v.dtype), k.to(v.dtype)
    return scan(W, k, v, beta, alpha, q, delta=delta, backend=backend)


def retention(q, k, v, alpha, W=None, backend="auto"):
    """W_t = alpha_t W_{t-1} + v_t k_t^T. alpha [heads, 1]: one for all tokens."""
    floats(k=k, v=v, alpha=alpha)
    if alpha.shape[-1] == 1:
        alpha = alpha.expand(*alpha.shape[:-1], k.shape[-2])
    return _remember(q, k, v, torch.ones_like(alpha), alpha, W, backend, delta=0.0)


def gated_delta_net(q, k, v, beta, alpha, W=None, backend="auto"):
    """W_t = alpha_t W_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T.

    Retention acts before the error is taken, hence delta = alpha.
    """
    return _remember(q, k, v, beta, alpha, W, backend, delta=alpha)


def linear_attention(q, k, v, W=None, backend="auto"):
    """W_t = W_{t-1} + v_t k_t^T (NL eq. 14-18)."""
    floats(k=k)
    return retention(q, k, v, k.new_ones(k.shape[-2]), W, backend)


def delta_net(q, k, v, beta, W=None, backend="auto"):
    """W_t = W_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T."""
    floats(beta=beta)
    return gated_delta_net(q, k, v, beta, torch.ones_like(beta), W, backend)


def with_one(x):
    """x and a channel that is always 1, whose weights are a bias."""
    return F.pad(x, (0, 1), value=1.0)


def phi(x, shift=0.0):
    """(elu(x) + 1) e^-shift, for a shift where all x <= 0; of elu nothing is left below x = -17."""
    return torch.where(x > 0, x + 1, (x.clamp(max=0) - shift).exp())


class LinearAttention(Recurrent):
    """Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236): exp(q k) is phi(q) phi(k).

        y_t = sum_{s <= t} phi(q_t) phi(k_s) v_s / sum_{s <= t} phi(q_t) phi(k_s)

    phi = elu + 1 (deviation 37). No norm, gate or position. The last row of W [B, H, dk + 1, dk] is
    written by values of 1, so it reads the sum of the weights.
    """

    def __init__(self, d_model, n_heads, conv=0, out_scale=1.0):
        super().__init__(d_model, n_heads, conv, gate=False, out_scale=out_scale)
        self.norm = nn.Identity()

    def remember(self, q, k, v, rates, state):
        q = phi(q, q.detach().amax(-1, keepdim=True).clamp(max=0))  # y is blind to phi(q)'s length
        k = phi(k)
        y, W, _ = linear_attention(q, k, with_one(full_precision(v)), state["W"], self.backend)
        weight = y[..., -1:]
        weight = weight.masked_fill(weight < 1e-30, 1.0)  # all keys so far have underflowed: y is 0
        return y[..., :-1] / weight, {"W": W}

    def products(self, T):
        d = self.width
        return self.n_heads * scan_products(d, d + 1, T, T, delta=False)


class RetNet(Recurrent):
    """Retentive network (Sun et al. 2023, arXiv 2307.08621): W_t = alpha W_{t-1} + v_t k_t^T.

    The first head forgets 2^-5 a token, each further one half as much. q and k are rotated and
    d_model / n_heads wide, values twice as wide; a group norm (per head, nothing learned) and a
    swish gate follow (deviation 30). State: "position", "conv", "W" [B, H, dv, dk].
    """

    def __init__(self, d_model, n_heads, conv=0, expand=2, out_scale=1.0):
        super().__init__(d_model, n_heads, conv, expand, out_scale=out_scale)
        self.norm = nn.LayerNorm(expand * self.width, eps=EPS, elementwise_affine=False)

    def remember(self, q, k, v, rates, state):
        k = k * self.width**-0.5
        q, k = (rotate(z.transpose(1, 2), state["position"]).transpose(1, 2) for z in (q, k))
        alpha = 1 - 2.0 ** (-5 - torch.arange(self.n_heads, dtype=k.dtype, device=k.device))
        y, W, _ = retention(q, k, v, alpha[:, None], state["W"], self.backend)
        return y, {"W": W}

    def products(self, T):
        d = self.width
        return self.n_heads * scan_products(d, self.expand * d, T, T, delta=False)


class DeltaNet(Recurrent):
    """DeltaNet (Yang et al. 2024, arXiv 2406.06484), see `delta_net`.

    q, k and v pass a short convolution and SiLU, q and k have unit length, beta = sigmoid(x w); no
    output gate. State: "position", "conv", "W" [B, H, dv, dk].
    """

    def __init__(self, d_model, n_heads, conv=4, expand=1, out_scale=1.0):
        super().__init__(d_model, n_heads, conv, expand, rates=1, gate=False, out_scale=out_scale)

    def remember(self, q, k, v, rates, state):
        beta = rates[0].sigmoid()
        y, W, _ = delta_net(l2norm(q), l2norm(k), v, beta, state["W"], self.backend)
        return y, {"W": W}

    def products(self, T):
        d = self.width
        return self.n_heads * scan_products(d, self.expand * d, T, T)


def mamba_dt_bias(n):
    """n biases b, softplus(b) log-uniform in [1e-3, 1e-1]: time constants of many lengths."""
    return torch.empty(n).uniform_(math.log(1e-3), math.log(1e-1)).exp().expm1().log()


class GatedDeltaNet(Recurrent):
    """Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464): DeltaNet with retention and output gate.

    alpha = exp(-A softplus(x w + dt_bias)) can come as close to 1 as it likes. Values are as wide
    as keys unless expand says otherwise (deviation 31, as in DeltaNet).
    State: "position", "conv", "W" [B, H, dv, dk].
    """

    def __init__(self, d_model, n_heads, conv=4, expand=1, out_scale=1.0, rates=2):
        super().__init__(d_model, n_heads, conv, expand, rates, out_scale=out_scale)
        self.log_A = nn.Parameter(torch.empty(n_heads).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(mamba_dt_bias(n_heads))

    rule = staticmethod(gated_delta_net)

    def alpha(self, dt):
        return retention_of(dt + self.dt_bias[:, None], self.log_A.exp()[:, None])

    def remember(self, q, k, v, rates, state):
        beta, dt = rates
        rule = (beta.sigmoid(), self.alpha(dt), state["W"], self.backend)
        y, W, _ = self.rule(l2norm(q), l2norm(k), v, *rule)
        return y, {"W": W}

    def products(self, T):
        d = self.width
        return self.n_heads * scan_products(d, self.expand * d, T, T, decays=1)


class Comba(GatedDeltaNet):
    """Comba (Hu et al. 2025, arXiv 2506.02475): Gated DeltaNet with two feedbacks, b and D.

        W_t = alpha_t W_{t-1} + beta_t (v_t - alpha_t b W_{t-1} k_t) k_t^T       0 < b < 1
        y_t = W_t (q_t - D b k_t)

    b and D are one number per head; with b = 1, D = 0 it is Gated DeltaNet. The output gate is a
    sigmoid (deviation 31). State: as Gated DeltaNet's.
    """

    squash = staticmethod(torch.sigmoid)

    def make_memory(self):
        self.b = nn.Parameter(torch.ones(self.n_heads, 1))  # before its sigmoid
        self.D = nn.Parameter(torch.ones(self.n_heads, 1, 1))

    def rule(self, q, k, v, beta, alpha, W, backend):
        b = self.b.sigmoid()
        q = q - self.D * b.unsqueeze(-1) * k
        return _remember(q, k, v, beta, alpha, W, backend, delta=alpha * b)


class Mamba2(GatedDeltaNet):
    """Mamba-2 (Dao and Gu 2024, arXiv 2405.21060): retention and step from one number, no error.

        W_t = exp(-A dt_t) W_{t-1} + dt_t v_t k_t^T        y_t = W_t q_t + D v_t

    dt = softplus(x w + dt_bias); q, k, v are its C, B, x. Every head has a q and k of its own, and
    the norm comes before the gate (deviation 30). State: "position", "conv", "W" [B, H, dv, dk].
    """

    def __init__(self, d_model, n_heads, conv=4, expand=2, out_scale=1.0):
        super().__init__(d_model, n_heads, conv, expand, out_scale, rates=1)
        self.D = nn.Parameter(torch.ones(n_heads, 1, 1))

    def remember(self, q, k, v, rates, state):
        dt = F.softplus(rates[0] + self.dt_bias[:, None])
        u = (dt.unsqueeze(-1) * v).to(v.dtype)
        y, W, _ = retention(q, k, u, self.alpha(rates[0]), state["W"], self.backend)
        return y + self.D * v, {"W": W}

    def products(self, T):
        d = self.width
        return self.n_heads * scan_products(d, self.expand * d, T, T, delta=False, decays=1)


# --------------------------------------------------------------------------------------------------
# A network as memory


class ChunkMemory(Recurrent):
    """A network that learns from gradients at the weights of the chunk boundary.

        W_t = alpha_t W_{t-1} - eta_t gradient        eta = base sigmoid(x w + b) / chunk

    A kind has `start`, its initial layers [H, d_out, d_in], and write(q, k, v, eta, alpha,
    boundary, running) -> (y, running) for the tokens of a chunk. forgets: alpha, at first
    1 - 1e-4, is read off the token; else it is 1.
    State: "position", "conv", "boundary" and "running" (lists of [B, H, d_out, d_in]).
    """

    base = 1.0

    def __init__(self, d_model, n_heads, chunk, conv, out_scale, forgets):
        at_least(1, chunk=chunk)
        super().__init__(d_model, n_heads, conv, rates=1 + forgets, out_scale=out_scale)
        self.chunk = chunk
        self.b_eta = nn.Parameter(torch.zeros(n_heads, 1))
        if forgets:
            self.b_alpha = nn.Parameter(torch.full((n_heads, 1), -math.log(10_000 - 1)))

    def start_state(self, batch):
        running = [full_precision(W).expand(batch, *W.shape).clone() for W in self.start]
        return {"position": 0, "conv": None, "boundary": running, "running": running}

    def remember(self, q, k, v, rates, state):
        eta = self.base * torch.sigmoid(rates[0] + self.b_eta) / self.chunk  # [B, H, T]
        alpha = torch.ones_like(eta)
        if len(rates) > 1:
            alpha = retention_of(rates[1] + self.b_alpha, 1.0)

        def one_chunk(now, boundary, running, momentum):
            y, running = recomputed(self.write, *now, boundary, running)  # as in TTT's paper
            return y, running, momentum

        streams = (q, k, full_precision(v), eta, alpha)
        return over_chunks(one_chunk, streams, state, self.chunk)

    def components(self):
        return deep_memory(self, self.start)


class DLA(ChunkMemory):
    """Deep linear attention (in Behrouz et al. 2025, arXiv 2505.23735): Hebbian, no error taken.

        W_t = alpha_t W_{t-1} + eta_t grad <f(k_t; W_boundary), v_t>          y_t = f(q_t; W_t)

    f is an MLP of `depth` residual layers (1: gated linear attention), q, k and v have unit length.
    No error bounds what is written: eta < 1 / chunk and the bounded steps of `write` do (deviation
    38). Raises ValueError for chunk < 1 and depth < 1.
    """

    def __init__(self, d_model, n_heads, chunk=64, depth=2, conv=4, out_scale=1.0):
        at_least(1, depth=depth)
        super().__init__(d_model, n_heads, chunk, conv, out_scale, forgets=True)
        d = self.width
        self.start = nn.ParameterList(torch.randn(n_heads, d, d) * d**-0.5 for _ in range(depth))

    def write(self, q, k, v, eta, alpha, boundary, running):
        args = (boundary, l2norm(k), l2norm(v), eta, alpha, l2norm(q))
        rule = {"delta": 0.0, "objective": "dot", "backend": self.backend}
        return write(*args, running=running, **rule)[:2]

    def products(self, T):
        d = self.width
        depth = len(self.start)
        scans = scan_products(d, d, T, self.chunk, delta=False, decays=1)
        # what the network says at the boundary has no part in the gradient
        return self.n_heads * ((6 * depth - 5) * d * d + depth * scans)


def gelu(z):
    """z Phi(z), by erfc: of torch's 1 + erf nothing is left below z = -6."""
    return z * (0.5 * torch.erfc(z * -(0.5**0.5)))


def gelu_derivative(z):
    density = torch.exp(-0.5 * z * z) * (2 * math.pi) ** -0.5
    return 0.5 * torch.erfc(z * -(0.5**0.5)) + z * density


class TTT(ChunkMemory):
    """TTT-Linear (depth 1), TTT-MLP (depth 2): learning by descent (Sun et al. 2024, 2407.04620).

        f(x) = x + LN(W x + b)    or    x + LN(W2 gelu(W1 x + b1) + b2)        y_t = f(q_t; W_t)
        W_t = W_{t-1} - eta_t grad_W |f(k_t; W_boundary) - v_t|^2 / 2

    The boundary is the end of the previous `chunk` of tokens (the paper's inner mini-batch). The
    layer norm is outside the loop; a bias is a column of W for an input that is always 1. The step
    is eta = base sigmoid(x w + b) / (chunk |z|^2), z the layer's input, base 1, for the MLP 0.1:
    all tokens of a chunk repeat the same step for equal keys, so a longer one explodes
    (deviation 32).
    Raises ValueError for chunk < 1, and a depth that is not 1 or 2.
    """

    def __init__(self, d_model, n_heads, chunk=16, depth=1, conv=4, out_scale=1.0, forgets=False):
        super().__init__(d_model, n_heads, chunk, conv, out_scale, forgets)
        if depth not in (1, 2):
            raise ValueError(f"depth must be 1 (TTT-Linear) or 2 (TTT-MLP), got {depth}")
        d = self.width
        self.base = 1.0 if depth == 1 else 0.1
        sizes = [(d, d)] if depth == 1 else [(4 * d, d), (d, 4 * d)]  # (d_out, d_in)
        initial = [torch.randn(n_heads, *size) * size[1] ** -0.5 for size in sizes]
        self.start = nn.ParameterList(F.pad(W, (0, 1)) for W in initial)  # biases of 0
        self.scale = nn.Parameter(torch.ones(n_heads, 1, d))
        self.shift = nn.Parameter(torch.zeros(n_heads, 1, d))

    def surprise(self, k, v, weights):
        """Each layer's input, and at its output the gradient of |f(k; weights) - v|^2 / 2."""
        inputs = [with_one(k)]
        slopes = []
        for W in weights[:-1]:
            z = inputs[-1] @ W.mT
            slopes.append(gelu_derivative(z))
            inputs.append(with_one(gelu(z)))
        z = inputs[-1] @ weights[-1].mT
        # gradient of |k + LN(z) - v|^2 / 2 at z: a layer norm is blind to z's mean and length
        z = z - z.mean(-1, keepdim=True)
        r = (z.square().mean(-1, keepdim=True) + EPS).sqrt().reciprocal()
        z = z * r
        g = (k + z * self.scale + self.shift - v) * self.scale
        gradients = [r * (g - g.mean(-1, keepdim=True) - z * (g * z).mean(-1, keepdim=True))]
        # backward to the layers below
        for W, slope in zip(reversed(weights[1:]), reversed(slopes), strict=True):
            gradients.insert(0, (gradients[0] @ W[..., :-1]) * slope)
        return inputs, gradients

    def write(self, q, k, v, eta, alpha, boundary, running):
        """Write every layer, and read it."""
        h = q
        new = []
        learned = zip(running, *self.surprise(k, v, boundary), strict=True)
        for i, (W, x, g) in enumerate(learned):
            step = eta / x.square().sum(-1)
            read_at = with_one(gelu(h) if i else h)
            h, W, _ = scan(W, x, -g, step, alpha, read_at, delta=0.0, backend=self.backend)
            new.append(W)
        return self.around(q, h), new

    def around(self, x, z):
        """f(x) for the layers' output z."""
        return x + F.layer_norm(z, z.shape[-1:], eps=EPS) * self.scale + self.shift

    def products(self, T):
        sizes = [W.shape[1:] for W in self.start]
        count = 0
        for d_out, d_in in sizes:  # outputs at the boundary, and the scan
            count += 3 * d_out * d_in + scan_products(d_in, d_out, T, self.chunk, delta=False)
        if len(sizes) > 1:
            count += 3 * 4 * self.width**2  # errors of the first layer
        return self.n_heads * count


class Memora(TTT):
    """Memora (MIRAS: Behrouz et al. 2025, arXiv 2504.13173): TTT-MLP that weighs, never subtracts.

        A_t = alpha_t A_{t-1} - eta_t grad_W |f(k_t; W_boundary) - v_t|^2 / 2
        W = sqrt(d_in) softmax(A) by rows                                y_t = f(q_t; W_boundary)

    Retention by KL divergence is this, the learning rule on the logits A: log W is A but for a
    constant of each row, which no softmax sees. Reads look at the boundary, as W_t is not linear in
    what was written. eta is TTT's, times sqrt(d_in) = d_in / sum_j W_ij (deviation 38).
    State: as TTT's, of logits.
    """

    def __init__(self, d_model, n_heads, chunk=16, conv=4, out_scale=1.0):
        super().__init__(d_model, n_heads, chunk, 2, conv, out_scale, forgets=True)
        for A in self.start:
            nn.init.normal_(A)

    def write(self, q, k, v, eta, alpha, boundary, running):
        weights = [A.shape[-1] ** 0.5 * A.softmax(-1) for A in boundary]
        new = []
        for A, x, g in zip(running, *self.surprise(k, v, weights), strict=True):
            step = eta * A.shape[-1] ** 0.5 / x.square().sum(-1)
            new.append(scan(A, x, -g, step, alpha, delta=0.0, backend=self.backend)[1])
        h = gelu(with_one(q) @ weights[0].mT)
        return self.around(q, with_one(h) @ weights[1].mT), new

    def products(self, T):
        d = self.width
        count = sum(3 * 3 * W[0].numel() for W in self.start)  # at the boundary; read; write
        return self.n_heads * (count + 3 * 4 * d * d + 2 * min(self.chunk, T) ** 2)


# --------------------------------------------------------------------------------------------------
# Rules of their own


def scan_by_channel(W, q, k, v, e, b, log_w, tile):
    """W_t = W_{t-1} diag(w_t) - (W_{t-1} e_t) b_t^T + v_t k_t^T, y_t = W_t q_t, in tiles, exactly.

    W [..., dv, dk], v [..., T, dv], all others [..., T, dk] -> (y [..., T, dv], W_T). With L_t the
    product of w from the tile's start on, W_t / L_t has no decay; a tile must not be so long that
    L vanishes: 16 tokens of w > 0.545 leave 6e-5.
    """
    T = q.shape[-2]

    def tiles(x):  # zeros change nothing
        return F.pad(x, (0, 0, 0, -T % tile)).unflatten(-2, (-1, tile))

    q, k, v, e, b, log_w = map(tiles, (q, k, v, e, b, log_w))  # [..., n, tile, d]
    log_L = log_w.cumsum(-2)
    e = e * (log_L - log_w).exp()
    b = b * (-log_L).exp()
    k = k * (-log_L).exp()
    q = q * log_L.exp()
    # W_{t-1} e_t of all tokens: what the tile's start says, and what the tile wrote
    said = solve(e @ b.mT, torch.cat((e, (e @ k.mT).tril(-1) @ v), -1))
    by_start, written = said.split((e.shape[-1], v.shape[-1]), -1)
    steps = zip(*(z.unbind(-3) for z in (by_start, written, b, v.mT @ k, log_L)), strict=True)
    starts = []
    erased = []
    for by_start_i, written_i, b_i, vk, log_L_i in steps:
        starts.append(W)
        erased.append(by_start_i @ W.mT + written_i)
        W = (W - erased[-1].mT @ b_i + vk) * log_L_i[..., -1:, :].exp()
    y = q @ torch.stack(starts, -3).mT - (q @ b.mT).tril() @ torch.stack(erased, -3)
    y = y + (q @ k.mT).tril() @ v
    return y.flatten(-3, -2)[..., :T, :], W


class RWKV7(nn.Module):
    """RWKV-7 (Peng et al. 2025, arXiv 2503.14456), its time mixing.

        W_t = W_{t-1} diag(w_t) - (W_{t-1} e_t) (a_t e_t)^T + v_t k_t^T              y_t = W_t r_t

    Every key channel has its own decay w in (0.545, 1) and its own step a. What is erased, e, is
    the key times k_k at unit length; what is written, k, the key times 1 + (a - 1) k_a. Every
    stream reads a mixture of its own of this token and the last; w, a and the gate are of low rank.
    Layers do not share v (deviation 39).
    State: "position", "last" [B, 1, d_model], "W" [B, H, d, d].
    """

    def __init__(self, d_model, n_heads, tile=16, out_scale=1.0):
        super().__init__()
        self.n_heads = n_heads
        self.width = head_width(d_model, n_heads)
        self.tile = tile
        channels = torch.arange(d_model) / d_model
        powers = torch.tensor([0.1, 0.45, 0.35, 0.35, 0.45, 0.1])  # of r, w, k, v, a, gate
        self.mix = nn.Parameter(1 - channels ** powers[:, None])

        def low_rank(size, squash, scale):
            rank = min(max(32, 32 * round(size * d_model**0.5 / 32)), d_model // 2)
            return nn.Sequential(linear(d_model, rank), squash, linear(rank, d_model, scale))

        self.r = linear(d_model, d_model)
        self.k = linear(d_model, d_model, 0.1)
        self.v = linear(d_model, d_model)
        self.w = low_rank(2.5, nn.Tanh(), 0.1)
        self.a = low_rank(2.5, nn.Identity(), 0.1)
        self.gate = low_rank(5, nn.Sigmoid(), 1.0)
        within = torch.linspace(-1, 1, self.width).repeat(n_heads)
        self.b_w = nn.Parameter(6 * channels**1.8 - 5.5 + 2.5 * within * within.abs())
        self.b_a = nn.Parameter(torch.full((d_model,), -0.19))
        self.k_k = nn.Parameter(torch.full((d_model,), 0.71))
        self.k_a = nn.Parameter(torch.full((d_model,), 1.02))
        self.r_k = nn.Parameter(torch.full((n_heads, 1, self.width), -0.04))
        self.scale = nn.Parameter(torch.ones(n_heads, 1, self.width))
        self.shift = nn.Parameter(torch.zeros(n_heads, 1, self.width))
        self.out = linear(d_model, d_model, out_scale)

    def forward(self, x, state=None):
        state = of_rows(state, x, self.r.weight)
        B, T, d_model = x.shape
        if state is None:
            W = full_precision(x).new_zeros(B, self.n_heads, self.width, self.width)
            state = {"position": 0, "last": x.new_zeros(B, 1, d_model), "W": W}
        before = torch.cat((state["last"], x[:, :-1]), 1)
        r, w, k, v, a, g = (x + mu * (before - x) for mu in self.mix)
        streams = (self.r(r), self.w(w), self.k(k), self.v(v), self.a(a))
        r, w, k, v, a = map(full_precision, streams)
        with torch.autocast(x.device.type, enabled=False):
            log_w = -math.exp(-0.5) * torch.sigmoid(w + self.b_w)
            a = torch.sigmoid(a + self.b_a)
            streams = (r, k * (1 + (a - 1) * self.k_a), v, k * self.k_k, a, log_w)
            r, k, v, e, a, log_w = (heads(z, self.n_heads) for z in streams)
            e = l2norm(e)
            y, W = scan_by_channel(state["W"], r, k, v, e, a * e, log_w, self.tile)
            y = F.layer_norm(y, y.shape[-1:], eps=1e-5 * self.width) * self.scale + self.shift
            y = y + (r * self.r_k * k).sum(-1, keepdim=True) * v
        y = y.to(x.dtype).transpose(1, 2).flatten(2) * self.gate(g)
        # a copy, or the state would keep the whole input alive
        after = {"position": state["position"] + T, "last": x[:, -1:].clone(), "W": W}
        return self.out(y), after

    def products(self, T):
        """Multiply-adds per token in rows of T tokens, forward and backward, beyond projections."""
        d = self.width
        return self.n_heads * (3 * (4 * d * d + 9 * self.tile * d) + self.tile**2 / 3)

    components = Recurrent.components


def self_reference(W, x):
    """W [B, H, 3 d + 4, d], x [B, H, C, d] -> (y [B, H, C, d], W), token by token, see SRWM."""
    d = x.shape[-1]
    rows = (torch.arange(W.shape[-2], device=W.device) // d).clamp(max=3)  # of y, q, k, beta
    outputs = []
    for x_t in x.softmax(-1).unbind(2):
        said = W @ x_t.unsqueeze(-1)
        y, q, k, beta = said.squeeze(-1).split((d, d, d, 4), -1)
        k = k.softmax(-1)
        step = beta.sigmoid()[..., rows].unsqueeze(-1)
        change = W @ (q.softmax(-1) - k).unsqueeze(-1)
        W = torch.addcmul(W, step * change, k.unsqueeze(-2))
        outputs.append(y)
    return torch.stack(outputs, 2), W


class SRWM(nn.Module):
    """The self-referential weight matrix (Irie et al. 2022, arXiv 2202.05780): W rewrites itself.

        [y | q | k | beta]_t = W_{t-1} softmax(x_t)
        W_t = W_{t-1} + sigmoid(beta_t) W_{t-1} (softmax(q_t) - softmax(k_t)) softmax(k_t)^T

    beta has four numbers, for the rows of y, q, k and of beta itself. W_{t-1} makes k_t, so nothing
    is parallel: token by token, for small tasks. Tiles are recomputed in the backward pass.
    State: "position", "W" [B, H, 3 d + 4, d].
    """

    def __init__(self, d_model, n_heads, tile=16, out_scale=1.0):
        super().__init__()
        d = head_width(d_model, n_heads)
        self.n_heads = n_heads
        self.tile = tile
        self.start = nn.Parameter(torch.randn(n_heads, 3 * d + 4, d) * d**-0.5)
        with torch.no_grad():
            self.start[:, d : 2 * d] *= 0.01
            self.start[:, 3 * d :] -= 1
        self.out = linear(d_model, d_model, out_scale)

    def forward(self, x, state=None):
        state = of_rows(state, x, self.out.weight)
        if state is None:
            state = {"position": 0, "W": full_precision(self.start).expand(len(x), -1, -1, -1)}
        W = state["W"]
        outputs = []
        with torch.autocast(x.device.type, enabled=False):
            for now in heads(full_precision(x), self.n_heads).split(self.tile, 2):
                y, W = recomputed(self_reference, W, now)
                outputs.append(y)
        y = self.out(torch.cat(outputs, 2).to(x.dtype).transpose(1, 2).flatten(2))
        return y, {"position": state["position"] + x.shape[1], "W": W}

    def products(self, T):
        """Multiply-adds per token in rows of T tokens, forward and backward, beyond projections."""
        return 3 * 2 * self.start.numel()

    def components(self):
        """Rows of `Hope.levels()`."""
        what = "self-referential matrix"
        return [component(what, "every token", "own keys and values", self.start.numel())]


# --------------------------------------------------------------------------------------------------
# Samba


def selective_scan(h, A, x, dt, b, c):
    """h [B, d, n], A [d, n], x, dt [B, T, d], b, c [B, T, n] -> (h_t C_t [B, T, d], h_T)."""
    decay = (dt.unsqueeze(-1) * A).exp()  # [B, T, d, n]
    write = (dt * x).unsqueeze(-1) * b.unsqueeze(-2)
    seen = []
    for decay_t, write_t in zip(decay.unbind(1), write.unbind(1), strict=True):
        h = torch.addcmul(write_t, decay_t, h)
        seen.append(h)
    return (torch.stack(seen, 1) @ c.unsqueeze(-1)).squeeze(-1), h


class Mamba(nn.Module):
    """Selective state space (Gu and Dao 2023, arXiv 2312.00752), half of Samba (2406.07522).

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t + D x_t

    h is [B, d, n], d = expand * d_model. The step dt [d], B and C [n] are read off the token, A is
    negative: every channel and state decays at its own rate, which memory.scan (one retention per
    head) cannot express. Hence token by token, exact and slow: forward and backward take ten times
    attention's time on a CPU (d_model 128, 512 tokens), and a GPU, not measured, launches T
    kernels. Tiles are recomputed in the backward pass, so that T / tile states are kept, not T.
    The convolution has no bias (deviation 33).
    State: "h" [B, d, n], "conv" (the tail), "position" in tokens.
    """

    def __init__(self, d_model, conv=4, n=16, expand=2, tile=64, out_scale=1.0):
        super().__init__()
        d = expand * d_model
        self.tile = tile
        self.sizes = (math.ceil(d_model / 16), n, n)  # dt (low rank) | B | C
        self.proj = linear(d_model, 2 * d)
        self.conv = convolution(d, conv)
        self.rates = linear(d, sum(self.sizes))
        self.dt_proj = linear(self.sizes[0], d)
        self.dt_bias = nn.Parameter(mamba_dt_bias(d))
        self.log_A = nn.Parameter(torch.arange(1.0, n + 1).log().repeat(d, 1))
        self.D = nn.Parameter(torch.ones(d))
        self.out = linear(d, d_model, out_scale)

    def start_state(self, batch):
        """The state before the first token."""
        h = full_precision(self.D).new_zeros(batch, *self.log_A.shape)
        return {"position": 0, "conv": None, "h": h}

    def forward(self, x, state=None):
        state = of_rows(state, x, self.proj.weight) or self.start_state(len(x))
        T = x.shape[1]
        x, gate = self.proj(x).chunk(2, -1)  # [B, T, d] each
        tail = state["conv"]
        if self.conv is not None:
            x, tail = self.conv(x, tail)
        dt, b, c = self.rates(x).split(self.sizes, -1)
        dt = F.softplus(full_precision(self.dt_proj(dt)) + self.dt_bias)
        A = -self.log_A.exp()
        h = state["h"]
        outputs = []
        with torch.autocast(x.device.type, enabled=False):
            tiles = (full_precision(z).split(self.tile, 1) for z in (x, dt, b, c))
            for now in zip(*tiles, strict=True):
                y, h = recomputed(selective_scan, h, A, *now)
                outputs.append(y)
        y = (torch.cat(outputs, 1).to(x.dtype) + self.D * x) * F.silu(gate)
        return self.out(y), {"position": state["position"] + T, "conv": tail, "h": h}

    def products(self, T):
        """Multiply-adds per token in rows of T tokens, forward and backward, beyond projections."""
        return 3 * self.log_A.numel()

    def components(self):
        """Rows of `Hope.levels()`."""
        return [component("state space", "every token", "keys and values, in context")]


# --------------------------------------------------------------------------------------------------
# Titans with attention (Titans paper sec. 4): a core that attends, a long-term memory that learns,
# and persistent tokens, learned, for what does not depend on the text. Three ways to join them.
#
# As in sec. 4.4 the gate is normalised: o = norm(attention) * silu(norm(memory)). The long-term
# memory does not read the persistent tokens: what they would write is in its initial weights.


class PersistentAttention(Attention):
    """Attention that also sees `persistent` learned tokens [persistent, d_model].

    They have no position: they meet a query unrotated, at every distance alike (deviation 36).
    """

    def __init__(self, d_model, n_heads, window=None, persistent=4, out_scale=1.0):
        super().__init__(d_model, n_heads, out_scale=out_scale, window=window)
        self.persistent = nn.Parameter(torch.randn(persistent, d_model))

    def split(self, qkv, position):
        """As Attention.split, but q [B, H, T, 2 dk] is rotated | plain: for tokens | persistent."""
        plain = qkv[..., : self.n_heads * self.width].unflatten(-1, (self.n_heads, self.width))
        q, k, v = super().split(qkv, position)
        return torch.cat((q, plain.transpose(1, 2)), -1), k, v

    def look(self, q, k, v, mask=None, is_causal=False):
        sizes = (3, self.n_heads, self.width)
        fixed = self.qkv(self.persistent).unflatten(-1, sizes).permute(1, 2, 0, 3)  # [3, H, p, dk]
        fixed_k, fixed_v = (z.expand(q.shape[0], *z.shape).to(k.dtype) for z in fixed[1:])
        # zeros hide the half of the query that is not meant
        k = torch.cat((F.pad(fixed_k, (self.width, 0)), F.pad(k, (0, self.width))), 2)
        v = torch.cat((fixed_v, v), 2)
        mask = F.pad(mask, (len(self.persistent), 0), value=True)
        scale = self.width**-0.5
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

    def products(self, T):
        d = self.n_heads * self.width
        persistent = 3 * 3 * d * len(self.persistent)
        return attention_products(d, T, self.window, width=3) + persistent  # q and k: 2 dk


class TitansMAC(nn.Module):
    """Memory as a context: per segment retrieve, then attend, then write (Titans paper sec. 4.1).

        h = M(x W_Q)          at the weights of the memory's chunk boundary; nothing is written
        y = attention of x over [persistent | h | x], within the segment
        o = norm(y) * silu(norm(M_t(y)))                 M_t has learned y up to token t

    As printed, the last read and the attention to h leak within a segment: reads here use the
    running weights, and attention to h is causal (deviation 35). Segments are cut at absolute
    positions, h has the positions of its tokens. A memory chunk shorter than the segment makes h
    more recent.
    State: "memory", "position" and, of the running segment, "k" and "v" [B, H, 2 S, dk] of h and x
    in turn. Raises ValueError for segment < 1.
    """

    def __init__(self, d_model, n_heads, chunk=64, segment=128, depth=2, conv=4,
                 window_reset=None, persistent=4, out_scale=1.0):
        super().__init__()
        at_least(1, segment=segment)
        self.segment = segment
        self.memory = NeuralMemory(d_model, n_heads, chunk, depth, conv, window_reset, gate=False)
        self.attention = PersistentAttention(d_model, n_heads, persistent=persistent)
        self.norm = nn.RMSNorm(d_model, eps=EPS)
        self.out = linear(d_model, d_model, out_scale)

    def start_state(self, batch):
        """The state before the first token."""
        core = self.attention
        none = core.persistent.new_zeros(batch, core.n_heads, 0, core.width)
        return {"memory": self.memory.start_state(batch), "k": none, "v": none, "position": 0}

    def forward(self, x, state=None):
        core = self.attention
        state = of_rows(state, x, core.qkv.weight) or self.start_state(len(x))
        T = x.shape[1]
        position = state["position"]
        memory = state["memory"]
        k = state["k"]
        v = state["v"]
        outputs = []
        for piece, _ in by_chunk(position, T, self.segment, self.memory.chunk):
            now = x[:, piece]
            n = now.shape[1]
            # retrieve
            q, k_x, v_x = core.split(core.qkv(now), position)
            _, k_h, v_h = core.split(core.qkv(self.memory.retrieve(now, memory)), position)
            # what the memory said stands beside its token, however the text is cut into calls
            k = torch.cat((k, torch.stack((k_h, k_x), 3).flatten(2, 3)), 2)
            v = torch.cat((v, torch.stack((v_h, v_x), 3).flatten(2, 3)), 2)
            # attend
            length = k.shape[2] // 2
            causal = torch.ones(n, length, dtype=torch.bool, device=x.device).tril(length - n)
            seen = core.look(q, k, v, causal.repeat_interleave(2, 1))
            seen = core.out(seen.transpose(1, 2).flatten(2))  # [B, n, d_model]
            # write
            learned, memory = self.memory(seen, memory)
            outputs.append(self.norm(seen) * F.silu(learned))
            position += n
            if position % self.segment == 0:
                k = k[:, :, :0].clone()
                v = v[:, :, :0].clone()
        after = {"memory": memory, "k": k, "v": v, "position": position}
        return self.out(torch.cat(outputs, 1)), after

    def products(self, T):
        """Multiply-adds per token in rows of T tokens, forward and backward, beyond projections."""
        d = self.attention.n_heads * self.attention.width
        # queries, keys and values of h
        retrieved = 3 * (4 * d * d + self.memory.depth * self.memory.width * d)
        keys = min(self.segment, T) + 1 + len(self.attention.persistent)
        return self.memory.products(T) + retrieved + 3 * 3 * d * keys

    def components(self):
        """Rows of `Hope.levels()`."""
        return self.memory.components() + self.attention.components()


class TitansMAG(nn.Module):
    """Memory as a gate beside attention in a window (Titans paper sec. 4.2).

        o = norm(attention(x)) * silu(norm(M_t(x)))

    State: "memory", "attention", "position".
    """

    def __init__(self, d_model, n_heads, chunk=64, window=128, depth=2, conv=4,
                 window_reset=None, persistent=4, out_scale=1.0):
        super().__init__()
        self.memory = NeuralMemory(d_model, n_heads, chunk, depth, conv, window_reset, gate=False)
        self.attention = PersistentAttention(d_model, n_heads, window, persistent)
        self.norm = nn.RMSNorm(d_model, eps=EPS)
        self.out = linear(d_model, d_model, out_scale)

    def forward(self, x, state=None):
        state = state or {"memory": None, "attention": None}
        learned, memory = self.memory(x, state["memory"])
        seen, attention = self.attention(x, state["attention"])
        y = self.out(self.norm(seen) * F.silu(learned))
        return y, {"memory": memory, "attention": attention, "position": memory["position"]}

    def products(self, T):
        """Multiply-adds per token in rows of T tokens, forward and backward, beyond projections."""
        return self.memory.products(T) + self.attention.products(T)

    def components(self):
        """Rows of `Hope.levels()`."""
        return self.memory.components() + self.attention.components()


class TitansMAL(nn.Module):
    """Memory as a layer below attention in a window (Titans paper sec. 4.3).

        o = attention(x + M_t(x))                       deviation 36: as printed, attention(M_t(x))

    State: "memory", "attention", "position".
    """

    def __init__(self, d_model, n_heads, chunk=64, window=128, depth=2, conv=4,
                 window_reset=None, persistent=4, out_scale=1.0):
        super().__init__()
        self.memory = NeuralMemory(d_model, n_heads, chunk, depth, conv, window_reset, gate=False)
        self.attention = PersistentAttention(d_model, n_heads, window, persistent, out_scale)

    def forward(self, x, state=None):
        state = state or {"memory": None, "attention": None}
        learned, memory = self.memory(x, state["memory"])
        y, attention = self.attention(x + learned, state["attention"])
        return y, {"memory": memory, "attention": attention, "position": memory["position"]}

    def products(self, T):
        """Multiply-adds per token in rows of T tokens, forward and backward, beyond projections."""
        return self.memory.products(T) + self.attention.products(T)

    def components(self):
        """Rows of `Hope.levels()`."""
        return self.memory.components() + self.attention.components()


if __name__ == "__main__":
    from runpy import run_module

    run_module("bench.demos", run_name="baselines")
