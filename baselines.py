"""Baselines: the sequence mixers Hope is compared with, behind the same signature, `y, state = mixer(x, state=None)`.

Attention (Transformer++): an exact memory of everything, whose state grows with every token (RoPE: Su et al. 2021),

    y_t = sum_{s <= t} softmax_s(<R_t q_t, R_s k_s> / sqrt(dk)) v_s        R_t: rotation by t * base^(-2i/dk), i < dk/2

A matrix of fixed size per head, settings of memory.scan in its symbols:

    linear attention W_t = W_{t-1} + v_t phi(k_t)^T                            read over its sum of weights
    RetNet           W_t = alpha W_{t-1} + v_t k_t^T                                               alpha fixed per head
    DeltaNet         W_t = W_{t-1} (I - eta_t k_t k_t^T) + eta_t v_t k_t^T
    Gated DeltaNet   W_t = alpha_t W_{t-1} (I - eta_t k_t k_t^T) + eta_t v_t k_t^T
    TTT              W_t = W_{t-1} - eta_t grad |f(k_t; W_boundary) - v_t|^2 / 2                   f a network

Samba: Mamba, whose every channel decays at its own rate, and attention in a window, in turn. Titans MAC, MAG, MAL: attention
with the long-term memory of titans.py as its context, its gate, or the layer below it.

x, y are [B, T, d_model]. The state is a plain dict of tensors and ints; cutting a sequence into calls never changes y.

    python baselines.py        parameters of each mixer, and how its state grows with the text
"""

import math
from functools import lru_cache
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from layers import (
    Recurrent,
    ShortConvolution,
    component,
    deep_memory,
    head_width,
    linear,
    over_chunks,
    recomputed,
    retention_of,
    scan_products,
)
from memory import full_precision, l2norm, scan
from titans import NeuralMemory


def _zeros(v, k):
    return v.new_zeros(*torch.broadcast_shapes(v.shape[:-2], k.shape[:-2]), v.shape[-1], k.shape[-1])


def linear_attention(q, k, v, W=None, backend="auto"):
    """W_t = W_{t-1} + v_t k_t^T (NL eq. 14-18)."""
    return retention(q, k, v, k.new_ones(k.shape[-2]), W, backend)


def retention(q, k, v, alpha, W=None, backend="auto"):
    """W_t = alpha_t W_{t-1} + v_t k_t^T: RetNet with a fixed alpha [heads, 1], Mamba-2 with alpha from x_t."""
    W = _zeros(v, k) if W is None else W
    if alpha.shape[-1:] == (1,):
        alpha = alpha.expand(*alpha.shape[:-1], k.shape[-2])
    return scan(W, k, v, torch.ones_like(alpha), alpha, q, delta=0.0, backend=backend)


def delta_net(q, k, v, beta, W=None, backend="auto"):
    """W_t = W_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T."""
    return gated_delta_net(q, k, v, beta, torch.ones_like(beta), W, backend)


def gated_delta_net(q, k, v, beta, alpha, W=None, backend="auto"):
    """W_t = alpha_t W_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T: retention comes before the error, so delta = alpha."""
    W = _zeros(v, k) if W is None else W
    return scan(W, k, v, beta, alpha, q, delta=alpha, backend=backend)


@lru_cache(maxsize=8)
def rotations(position, T, width, base, dtype, device):
    """Unit complex numbers exp(i * t * base^(-2j/width)) for t = position.. (T of them), j < width/2: [T, 1, width/2].

    Angles are formed in float64, so a far position is as exact as a near one. The cache serves all layers of a pass.
    """
    with torch.inference_mode(False):  # a table first asked for while generating must serve training too
        t = torch.arange(position, position + T, dtype=torch.float64)
        angle = torch.outer(t, base ** (torch.arange(0, width, 2, dtype=torch.float64) / -width))
        return torch.complex(angle.cos(), angle.sin())[:, None].to(device=device, dtype=dtype)


def rotate(x, position, base=10000.0):
    """RoPE of x [B, T, H, dk] at absolute positions position..position+T-1; neighbouring channels form the pairs.

    One complex product: on a CPU three times faster, with its gradient, than sines and cosines on halves. Computed in
    float32 (float64 for a float64 x), returned in x's dtype.
    """
    pairs = torch.view_as_complex((x if x.dtype == torch.float64 else x.float()).unflatten(-1, (-1, 2)))
    table = rotations(position, x.shape[1], x.shape[-1], base, pairs.dtype, x.device)
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


def attention_products(d, T, window, width=2):
    """Multiply-adds per token, forward and backward, of causal attention in rows of T tokens.

    width: of a key and a value together, in heads' widths.
    """
    n = min(window or T, T)
    keys = n - n * (n - 1) / (2 * T)  # the mean over a row of min(t, n)
    return 3 * width * d * keys


class Attention(nn.Module):
    """Causal softmax attention with RoPE and a key-value cache: the mixer of Transformer++.

    conv: width of a short convolution (with SiLU) over q, k and v, 0 for none; out_scale: factor on the initial output
    projection; window: tokens a query sees, itself included (None: all), so that the cache stops growing at window - 1.
    State: {"k", "v" [B, H, S, dk] (k rotated), "position" (tokens seen), "conv" (tail, where there is one)}.
    Raises ValueError if n_heads does not divide d_model, a head has an odd width, which RoPE cannot pair, or window < 1.
    """

    def __init__(self, d_model, n_heads, conv=0, rope_base=10000.0, out_scale=1.0, window=None):
        super().__init__()
        self.n_heads, self.width, self.rope_base, self.window = n_heads, head_width(d_model, n_heads), rope_base, window
        if self.width % 2:
            raise ValueError(f"head width is {self.width} (d_model {d_model} / n_heads {n_heads}); RoPE needs it even")
        if window is not None and window < 1:
            raise ValueError(f"window is {window}; it must be at least 1 token, or None (everything)")
        self.qkv = linear(d_model, 3 * d_model)
        self.conv = ShortConvolution(3 * d_model, conv) if conv else None
        self.out = linear(d_model, d_model, out_scale)

    def forward(self, x, state=None):
        """x [B, T, d_model] -> (y [B, T, d_model], state)."""
        T, past = x.shape[1], state["position"] if state else 0
        qkv, new = self.qkv(x), {"position": past + T}
        if self.conv is not None:
            qkv, new["conv"] = self.conv(qkv, state["conv"] if state else None)
        q, k, v = self.split(qkv, past)
        if past:
            k, v = torch.cat((state["k"], k), dim=2), torch.cat((state["v"], v), dim=2)
        if self.window is None:
            mask = None
            if past and T > 1:  # the queries are the last T of past + T positions; a single one sees everything
                mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
            y = self.look(q, k, v, mask, is_causal=not past)
        else:
            y = self.look_near(q, k, v)
            kept = max(0, k.shape[2] - self.window + 1)
            k, v = k[:, :, kept:].clone(), v[:, :, kept:].clone()  # copies, or the state would keep all of them alive
        return self.out(y.transpose(1, 2).flatten(2)), new | {"k": k, "v": v}

    def split(self, qkv, position):
        """[B, T, 3 d_model] -> q, k (rotated), v, each [B, H, T, dk]."""
        q, k, v = (z.unflatten(-1, (self.n_heads, self.width)) for z in qkv.chunk(3, dim=-1))
        q, k = (rotate(z, position, self.rope_base).transpose(1, 2) for z in (q, k))
        return q, k, v.transpose(1, 2).contiguous()  # costs nothing measurable, and the cache does not keep all of qkv alive

    def look(self, q, k, v, mask=None, is_causal=False):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)

    def look_near(self, q, k, v):
        """q: the last T of the positions of k. In blocks of `window` queries, so that the cost is linear in T."""
        T, S, window, y = q.shape[2], k.shape[2], self.window, []
        for i in range(0, T, window):
            rows = torch.arange(S - T + i, S - T + min(i + window, T), device=q.device)
            first, end = max(0, S - T + i - window + 1), S - T + min(i + window, T)
            distance = rows[:, None] - torch.arange(first, end, device=q.device)
            mask = (distance >= 0) & (distance < window)
            y.append(self.look(q[:, :, i : i + window], k[:, :, first:end], v[:, :, first:end], mask))
        return torch.cat(y, dim=2)

    def products(self, T):
        return attention_products(self.n_heads * self.width, T, self.window)

    def components(self):
        what = "attention (non-parametric)"
        return [component(what, "every token", "keys and values, in context")]


def mamba_dt_bias(n):
    """Biases b with softplus(b) log-uniform in [1e-3, 1e-1]: time constants of many lengths, as Mamba starts."""
    return torch.empty(n).uniform_(math.log(1e-3), math.log(1e-1)).exp().expm1().log()


class LinearAttention(Recurrent):
    """Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236): softmax's exp(q k) becomes phi(q) phi(k), phi = elu + 1.

        y_t = sum_{s <= t} phi(q_t) phi(k_s) v_s / sum_{s <= t} phi(q_t) phi(k_s)

    No norm, no gate, no position. The last row of W [B, H, dk + 1, dk], written by values of 1, reads the sum of the weights.
    """

    def __init__(self, d_model, n_heads, conv=0, out_scale=1.0):
        super().__init__(d_model, n_heads, conv, gate=False, out_scale=out_scale)
        self.norm = nn.Identity()

    def remember(self, q, k, v, rates, state):
        y, W, _ = linear_attention(F.elu(q) + 1, F.elu(k) + 1, with_one(v), state["W"], self.backend)
        return y[..., :-1] / y[..., -1:], {"W": W}

    def products(self, T):
        w = self.width
        return self.n_heads * scan_products(w, w + 1, T, T, delta=False)  # the value 1 sums the weights


class RetNet(Recurrent):
    """Retentive network (Sun et al. 2023, arXiv 2307.08621): W_t = alpha W_{t-1} + v_t k_t^T with one fixed alpha per head.

    Heads forget at rates from 2^-5 on, each half as fast as the one before; q and k are rotated as in RoPE; values are
    twice as wide as keys; group norm (per head, nothing learned) and a swish gate follow the read. State: see Recurrent, "W".
    """

    def __init__(self, d_model, n_heads, conv=0, expand=2, out_scale=1.0):
        super().__init__(d_model, n_heads, conv, expand, out_scale=out_scale)
        self.norm = nn.LayerNorm(expand * self.width, eps=1e-6, elementwise_affine=False)

    def remember(self, q, k, v, rates, state):
        past = state["position"]
        q, k = (rotate(z.transpose(1, 2), past).transpose(1, 2) for z in (q, k * self.width**-0.5))
        alpha = 1 - 2.0 ** (-5 - torch.arange(self.n_heads, dtype=k.dtype, device=k.device))
        y, W, _ = retention(q, k, v, alpha[:, None], state["W"], self.backend)
        return y, {"W": W}

    def products(self, T):
        w = self.width
        return self.n_heads * scan_products(w, self.expand * w, T, T, delta=False)


class DeltaNet(Recurrent):
    """DeltaNet (Yang et al. 2024, arXiv 2406.06484): W_t = W_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T.

    q, k, v pass a short convolution and SiLU, q and k have unit length, beta = sigmoid(x w); no output gate. State: "W".
    """

    def __init__(self, d_model, n_heads, conv=4, expand=1, out_scale=1.0):
        super().__init__(d_model, n_heads, conv, expand, rates=1, gate=False, out_scale=out_scale)

    def remember(self, q, k, v, rates, state):
        y, W, _ = delta_net(l2norm(q), l2norm(k), v, rates[0].sigmoid(), state["W"], self.backend)
        return y, {"W": W}

    def products(self, T):
        w = self.width
        return self.n_heads * scan_products(w, self.expand * w, T, T)


class GatedDeltaNet(Recurrent):
    """Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464): DeltaNet with retention, which acts before the error, and a gate.

        W_t = alpha_t W_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T

    Retention alpha = exp(-A softplus(x w_a + dt_bias)) can come as close to 1 as it likes. Deviation: values are as wide as
    keys unless expand says otherwise (the published models: 2). State: "W" [B, H, dv, dk].
    """

    def __init__(self, d_model, n_heads, conv=4, expand=1, out_scale=1.0):
        super().__init__(d_model, n_heads, conv, expand, rates=2, out_scale=out_scale)
        self.log_A = nn.Parameter(torch.empty(n_heads).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(mamba_dt_bias(n_heads))

    def remember(self, q, k, v, rates, state):
        beta, a = rates
        alpha = retention_of(a + self.dt_bias[:, None], self.log_A.exp()[:, None])
        y, W, _ = gated_delta_net(l2norm(q), l2norm(k), v, beta.sigmoid(), alpha, state["W"], self.backend)
        return y, {"W": W}

    def products(self, T):
        w = self.width
        return self.n_heads * scan_products(w, self.expand * w, T, T, decays=1)


class TTT(Recurrent):
    """TTT-Linear (depth 1) and TTT-MLP (depth 2) (Sun et al. 2024, arXiv 2407.04620): a memory that learns by gradient descent.

        f(x) = x + LN(W x + b)    or    x + LN(W2 gelu(W1 x + b1) + b2)        y_t = f(q_t; W_t)
        W_t = W_{t-1} - eta_t grad_W |f(k_t; W_boundary) - v_t|^2 / 2

    The boundary is the end of the previous `chunk` of tokens (their inner mini-batch). The layer norm is learned, outside
    the loop; a bias is a column of W for an input that is always 1. Learned step sizes: eta = base sigmoid(x w + b), base 1,
    and 0.1 for the MLP, over chunk * |x|^2, x the layer's input: all tokens of a chunk repeat the same step for equal
    keys, so a longer step explodes (the published code divides by the head width; deviation). Left out: that code's
    1 / i for the i-th reader of a chunk, which is not in the paper's equations, and separate convolutions for q and k.
    State: "boundary", "running" (lists of [B, H, d_out, d_in + 1]). Raises ValueError for chunk < 1 or depth not 1 or 2.
    """

    def __init__(self, d_model, n_heads, chunk=16, depth=1, conv=4, out_scale=1.0):
        super().__init__(d_model, n_heads, conv, rates=1, out_scale=out_scale)
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}; it must be at least 1 token")
        if depth not in (1, 2):
            raise ValueError(f"depth is {depth}; it must be 1 (TTT-Linear) or 2 (TTT-MLP)")
        self.chunk, self.base, d = chunk, 1.0 if depth == 1 else 0.1, self.width
        sizes = pairwise([d, *[4 * d] * (depth - 1), d])
        starts = [torch.randn(n_heads, d_out, d_in) * d_in**-0.5 for d_in, d_out in sizes]
        self.start = nn.ParameterList(F.pad(W, (0, 1)) for W in starts)
        self.scale, self.shift = nn.Parameter(torch.ones(n_heads, 1, d)), nn.Parameter(torch.zeros(n_heads, 1, d))
        self.b_eta = nn.Parameter(torch.zeros(n_heads, 1))

    def remember(self, q, k, v, rates, state):
        eta = self.base * torch.sigmoid(rates[0] + self.b_eta) / self.chunk

        def one_chunk(piece, boundary, running, momentum):
            now = [z[:, :, piece] for z in (q, k, v, eta)]
            y, running = recomputed(self.write, *now, boundary, running)  # as in the paper
            return y, running, momentum

        y, state = over_chunks(one_chunk, state, q.shape[2], self.chunk)
        return torch.cat(y, 2), state

    def start_state(self, batch):
        running = [full_precision(W).expand(batch, *W.shape).clone() for W in self.start]
        return {"position": 0, "conv": None, "boundary": running, "running": running}

    def write(self, q, k, v, eta, boundary, running):
        """Tokens of one chunk: gradients at `boundary`, read and written from `running` on -> (y, running)."""
        one, inputs, slopes = torch.ones_like(eta), [with_one(k)], []
        for W in boundary[:-1]:
            z = inputs[-1] @ W.mT
            slopes.append(gelu_derivative(z))
            inputs.append(with_one(F.gelu(z)))
        z = inputs[-1] @ boundary[-1].mT
        # the gradient of |k + LN(z) - v|^2 / 2 at z: what is left of it after the layer norm's mean and length
        z = z - z.mean(-1, keepdim=True)
        r = torch.rsqrt(z.square().mean(-1, keepdim=True) + 1e-6)
        z = z * r
        g = (k + z * self.scale + self.shift - v) * self.scale
        gradients = [r * (g - g.mean(-1, keepdim=True) - z * (g * z).mean(-1, keepdim=True))]
        for W, slope in zip(reversed(boundary[1:]), reversed(slopes), strict=True):
            gradients.insert(0, (gradients[0] @ W[..., :-1]) * slope)
        h, new = q, []
        for i, (W, x, g) in enumerate(zip(running, inputs, gradients, strict=True)):
            h, W, _ = scan(W, x, -g, eta / x.square().sum(-1), one, with_one(F.gelu(h) if i else h), delta=0.0, backend=self.backend)
            new.append(W)
        return q + F.layer_norm(h, h.shape[-1:], eps=1e-6) * self.scale + self.shift, new

    def products(self, T):
        w = self.width
        sizes = [(W.shape[-1], W.shape[-2]) for W in self.start]  # a bias is one more input
        boundary = sum(i * o for i, o in sizes)  # outputs and errors at the boundary
        if len(sizes) > 1:
            boundary += 4 * w * w
        scans = sum(scan_products(i, o, T, self.chunk, delta=False) for i, o in sizes)
        return self.n_heads * (3 * boundary + scans)

    def components(self):
        return deep_memory(self, self.start)


def with_one(x):
    """x and a channel that is always 1: the weights of that channel are the bias."""
    return F.pad(x, (0, 1), value=1.0)


def gelu_derivative(z):
    return 0.5 * (1 + torch.erf(z * 0.5**0.5)) + z * torch.exp(-0.5 * z * z) * (2 * math.pi) ** -0.5


class Mamba(nn.Module):
    """Selective state space (Gu and Dao 2023, arXiv 2312.00752), every second mixer of Samba (Ren et al. 2024, 2406.07522).

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t + D x_t        h [B, d, n], d = expand * d_model

    Step dt [d], B and C [n] are read off the token, A is negative: every channel and state decays at its own rate, which
    memory.scan (one retention per head) cannot express. Hence token by token, but recomputed in the backward pass in tiles,
    so that memory is T / tile states, not T: no division, no logarithm, exact. One mixer's forward and backward takes ten
    times attention's on a CPU (d_model 128, 512 tokens): passes over [B, T, d, n]. On a GPU, not measured, T launches.
    State: {"h" [B, d, n], "conv" (tail), "position" (tokens)}.
    """

    def __init__(self, d_model, conv=4, n=16, expand=2, tile=64, out_scale=1.0):
        super().__init__()
        d, self.tile = expand * d_model, tile
        self.sizes = (-(-d_model // 16), n, n)  # dt (low rank) | B | C
        self.proj = linear(d_model, 2 * d)
        self.conv = ShortConvolution(d, conv) if conv else None
        self.rates = linear(d, sum(self.sizes))
        self.dt_proj = linear(self.sizes[0], d)
        self.dt_bias = nn.Parameter(mamba_dt_bias(d))
        self.log_A = nn.Parameter(torch.arange(1.0, n + 1).log().repeat(d, 1))
        self.D = nn.Parameter(torch.ones(d))
        self.out = linear(d, d_model, out_scale)

    def forward(self, x, state=None):
        """x [B, T, d_model] -> (y [B, T, d_model], state)."""
        T, (x, gate) = x.shape[1], self.proj(x).chunk(2, dim=-1)
        tail = state["conv"] if state else None
        if self.conv is not None:
            x, tail = self.conv(x, tail)
        dt, b, c = self.rates(x).split(self.sizes, dim=-1)
        dt = F.softplus(full_precision(self.dt_proj(dt)) + self.dt_bias)
        h = state["h"] if state else dt.new_zeros(x.shape[0], *self.log_A.shape)
        A, y = -self.log_A.exp(), []
        with torch.autocast(x.device.type, enabled=False):
            for z in zip(*(full_precision(z).split(self.tile, dim=1) for z in (x, dt, b, c)), strict=True):
                y_tile, h = checkpoint(selective_scan, h, A, *z, use_reentrant=False, preserve_rng_state=False)
                y.append(y_tile)
        y = (torch.cat(y, dim=1).to(x.dtype) + self.D * x) * F.silu(gate)
        return self.out(y), {"h": h, "conv": tail, "position": T + (state["position"] if state else 0)}

    def products(self, T):
        d, n = self.log_A.shape
        return 3 * d * n

    def components(self):
        return [component("state space", "every token", "keys and values, in context")]


def selective_scan(h, A, x, dt, b, c):
    """h [B, d, n], A [d, n], x, dt [B, T, d], b, c [B, T, n] -> (h_t C_t [B, T, d], h_T)."""
    decay, write, seen = (dt.unsqueeze(-1) * A).exp(), (dt * x).unsqueeze(-1) * b.unsqueeze(-2), []
    for decay_t, write_t in zip(decay.unbind(1), write.unbind(1), strict=True):
        h = torch.addcmul(write_t, decay_t, h)
        seen.append(h)
    return (torch.stack(seen, 1) @ c.unsqueeze(-1)).squeeze(-1), h


# ---------------------------------------------------------------------------------------------------------------------
# Titans with attention (Titans paper sec. 4): a core that attends, a long-term memory that learns, and persistent memory,
# which is learned tokens that hold what does not depend on the text. Three ways to put them together.
#
# As in the paper's sec. 4.4, the gate is normalised: o = norm(attention) * silu(norm(memory)). Persistent tokens have no
# position: they meet a query unrotated, at every distance alike. The long-term memory does not read them: what they would
# write is in its learned start.


class PersistentAttention(Attention):
    """Attention in a window, or as MAC cuts it, that also sees `persistent` learned tokens [persistent, d_model]."""

    def __init__(self, d_model, n_heads, window=None, persistent=4, out_scale=1.0):
        super().__init__(d_model, n_heads, out_scale=out_scale, window=window)
        self.persistent = nn.Parameter(torch.randn(persistent, d_model))

    def split(self, qkv, position):
        """As Attention.split, but a query is twice as wide, rotated and not: one half meets tokens, one the persistent."""
        plain = qkv[..., : qkv.shape[-1] // 3].unflatten(-1, (self.n_heads, self.width)).transpose(1, 2)
        q, k, v = super().split(qkv, position)
        return torch.cat((q, plain), -1), k, v

    def look(self, q, k, v, mask=None, is_causal=False):
        fixed = self.qkv(self.persistent).unflatten(-1, (3, self.n_heads, self.width)).permute(1, 2, 0, 3)
        fixed_k, fixed_v = (z.expand(q.shape[0], *z.shape).to(k.dtype) for z in fixed[1:])
        k = torch.cat((F.pad(fixed_k, (self.width, 0)), F.pad(k, (0, self.width))), dim=2)
        mask = F.pad(mask, (len(self.persistent), 0), value=True)
        v = torch.cat((fixed_v, v), dim=2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.width**-0.5)

    def products(self, T):
        d = self.n_heads * self.width  # a query is twice as wide, see `split`
        return attention_products(d, T, self.window, 3) + 3 * 3 * d * len(self.persistent)


class TitansMAC(nn.Module):
    """Memory as a context: per segment retrieve, then attend, then write (Titans paper sec. 4.1).

        h = M(x W_Q)          retrieve, at the weights of the memory's chunk boundary; nothing is written
        y = attention of x over [persistent | h | x]     both of this segment only, causal
        o = norm(y) * silu(norm(M_t(y)))                 write y, read at the running weights: nothing leaks

    The printed M_t is the memory after the whole segment, and its attention sees all of h: both leak within a segment, hence
    running weights and a causal mask over h. Segments are cut at absolute positions, h has the positions of its tokens. With
    a memory chunk shorter than the segment, h is as recent as the memory's last chunk.
    State: {"memory", "k", "v" (h and x of the running segment, in turn) [B, H, 2 S, dk], "position"}.
    """

    def __init__(self, d_model, n_heads, chunk=64, segment=128, depth=2, conv=4, persistent=4, out_scale=1.0):
        super().__init__()
        if segment < 1:
            raise ValueError(f"segment is {segment}; it must be at least 1 token")
        self.segment = segment
        self.memory = NeuralMemory(d_model, n_heads, chunk, depth, conv, gate=False)
        self.attention = PersistentAttention(d_model, n_heads, persistent=persistent)
        self.norm = nn.RMSNorm(d_model, eps=1e-6)
        self.out = linear(d_model, d_model, out_scale)

    def forward(self, x, state=None):
        """x [B, T, d_model] -> (y [B, T, d_model], state)."""
        core, T, y, i = self.attention, x.shape[1], [], 0
        state = state or self.start_state(x.shape[0])
        memory, k, v, position = state["memory"], state["k"], state["v"], state["position"]
        while i < T:
            n = min(T - i, *(length - position % length for length in (self.segment, self.memory.chunk)))
            now = x[:, i : i + n]
            q, k_now, v_now = core.split(core.qkv(now), position)
            _, k_h, v_h = core.split(core.qkv(self.memory.retrieve(now, memory)), position)
            # what the memory said stands beside its token, so that the cache does not tell how the stream was cut
            k = torch.cat((k, torch.stack((k_h, k_now), 3).flatten(2, 3)), 2)
            v = torch.cat((v, torch.stack((v_h, v_now), 3).flatten(2, 3)), 2)
            length = k.shape[2] // 2
            causal = torch.ones(n, length, dtype=torch.bool, device=x.device).tril(length - n)
            seen = core.look(q, k, v, causal.repeat_interleave(2, dim=1))
            seen = core.out(seen.transpose(1, 2).flatten(2))
            learned, memory = self.memory(seen, memory)
            y.append(self.norm(seen) * F.silu(learned))
            i, position = i + n, position + n
            if position % self.segment == 0:
                k, v = k[:, :, :0].clone(), v[:, :, :0].clone()
        return self.out(torch.cat(y, 1)), {"memory": memory, "k": k, "v": v, "position": position}

    def start_state(self, batch):
        memory = self.memory.start_state(batch)
        nothing = self.attention.persistent.new_zeros(batch, self.attention.n_heads, 0, self.attention.width)
        return {"memory": memory, "k": nothing, "v": nothing, "position": 0}

    def products(self, T):
        d = self.attention.n_heads * self.attention.width
        n = min(self.segment, T)
        retrieved = 3 * (4 * d * d + self.memory.depth * self.memory.width * d)  # keys and values of its own
        persistent = len(self.attention.persistent)
        return self.memory.products(T) + retrieved + 3 * 3 * d * (n + 1 + persistent)

    def components(self):
        return self.memory.components() + self.attention.components()


class TitansMAG(nn.Module):
    """Memory as a gate: o = norm(attention(x)) * silu(norm(M_t(x))), attention in a window (Titans paper sec. 4.2).

    State: {"memory", "attention", "position"}.
    """

    def __init__(self, d_model, n_heads, chunk=64, window=128, depth=2, conv=4, persistent=4, out_scale=1.0):
        super().__init__()
        self.memory = NeuralMemory(d_model, n_heads, chunk, depth, conv, gate=False)
        self.attention = PersistentAttention(d_model, n_heads, window, persistent)
        self.norm = nn.RMSNorm(d_model, eps=1e-6)
        self.out = linear(d_model, d_model, out_scale)

    def forward(self, x, state=None):
        """x [B, T, d_model] -> (y [B, T, d_model], state)."""
        learned, memory = self.memory(x, state and state["memory"])
        seen, attention = self.attention(x, state and state["attention"])
        y = self.out(self.norm(seen) * F.silu(learned))
        return y, {"memory": memory, "attention": attention, "position": memory["position"]}

    def products(self, T):
        return self.memory.products(T) + self.attention.products(T)

    def components(self):
        return self.memory.components() + self.attention.components()


class TitansMAL(nn.Module):
    """Memory as a layer: o = attention(x + M_t(x)), attention in a window (Titans paper sec. 4.3). State: as TitansMAG."""

    def __init__(self, d_model, n_heads, chunk=64, window=128, depth=2, conv=4, persistent=4, out_scale=1.0):
        super().__init__()
        self.memory = NeuralMemory(d_model, n_heads, chunk, depth, conv, gate=False)
        self.attention = PersistentAttention(d_model, n_heads, window, persistent, out_scale)

    def forward(self, x, state=None):
        """x [B, T, d_model] -> (y [B, T, d_model], state)."""
        learned, memory = self.memory(x, state and state["memory"])
        y, attention = self.attention(x + learned, state and state["attention"])
        return y, {"memory": memory, "attention": attention, "position": memory["position"]}

    def products(self, T):
        return self.memory.products(T) + self.attention.products(T)

    def components(self):
        return self.memory.components() + self.attention.components()


if __name__ == "__main__":
    from runpy import run_module

    run_module("bench.demos", run_name="baselines")
