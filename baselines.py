"""Baselines: the sequence mixers Hope is compared with, behind the same signature, `y, state = mixer(x, state=None)`.

Attention (Transformer++): an exact memory of everything, whose state grows with every token (RoPE: Su et al. 2021),

    y_t = sum_{s <= t} softmax_s(<R_t q_t, R_s k_s> / sqrt(dk)) v_s        R_t: rotation by t * base^(-2i/dk), i < dk/2

Gated DeltaNet (Yang et al. 2024): a matrix of fixed size, one setting of memory.scan (DESIGN section 2),

    W_t = alpha_t W_{t-1} (I - eta_t k_t k_t^T) + eta_t v_t k_t^T,    y_t = W_t q_t

x, y are [B, T, d_model]. The state is a plain dict of tensors and ints; cutting a sequence into calls never changes y.

    python baselines.py        parameters of each mixer, and how its state grows with the text
"""

import math
from functools import lru_cache

import torch
from torch import nn
from torch.nn import functional as F

from memory import l2norm, scan
from titans import ShortConvolution, head_width, linear


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


class Attention(nn.Module):
    """Causal softmax attention with RoPE and a key-value cache: the mixer of Transformer++.

    conv: width of a short convolution (with SiLU) over q, k and v, 0 for none; out_scale: factor on the initial output
    projection. State: {"k", "v" [B, H, S, dk] (k rotated), "position" (S tokens), "conv" (tail, where there is one)}.
    Raises ValueError if n_heads does not divide d_model, or a head has an odd width, which RoPE cannot pair.
    """

    def __init__(self, d_model, n_heads, conv=0, rope_base=10000.0, out_scale=1.0):
        super().__init__()
        self.n_heads, self.width, self.rope_base = n_heads, head_width(d_model, n_heads), rope_base
        if self.width % 2:
            raise ValueError(f"head width is {self.width} (d_model {d_model} / n_heads {n_heads}); RoPE needs it even")
        self.qkv = linear(d_model, 3 * d_model)
        self.conv = ShortConvolution(3 * d_model, conv) if conv else None
        self.out = linear(d_model, d_model, out_scale)

    def forward(self, x, state=None):
        """x [B, T, d_model] -> (y [B, T, d_model], state)."""
        T, past = x.shape[1], state["position"] if state else 0
        qkv, new = self.qkv(x), {"position": past + T}
        if self.conv is not None:
            qkv, new["conv"] = self.conv(qkv, state["conv"] if state else None)
        q, k, v = (z.unflatten(-1, (self.n_heads, self.width)) for z in qkv.chunk(3, dim=-1))
        q, k = (rotate(z, past, self.rope_base).transpose(1, 2) for z in (q, k))
        v = v.transpose(1, 2).contiguous()  # costs nothing measurable, and the cache does not keep all of qkv alive
        mask = None
        if past:
            k, v = torch.cat((state["k"], k), dim=2), torch.cat((state["v"], v), dim=2)
            if T > 1:  # the queries are the last T of past + T positions; a single one sees everything
                mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not past)
        return self.out(y.transpose(1, 2).flatten(2)), new | {"k": k, "v": v}


class GatedDeltaNet(nn.Module):
    """Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464): the delta rule with retention, and an output gate.

    q, k, v pass one short convolution of width `conv` and SiLU; q, k have unit length per head. Step eta ("beta" there)
    is sigmoid(x w_b), retention alpha = exp(-A softplus(x w_a + dt_bias)), which can come as close to 1 as it likes.
    Retention acts before the delta rule reads, hence delta = alpha. chunk is only scan's tile: it changes the speed,
    never the result. Deviation: keys and values are both d_model / n_heads wide (the published models: wider values).
    State: {"W" [B, H, dv, dk], "conv" (tail), "position" (tokens)}.
    Raises ValueError if n_heads does not divide d_model, or chunk < 1.
    """

    def __init__(self, d_model, n_heads, conv=4, chunk=64, out_scale=1.0):
        super().__init__()
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}; it must be at least 1 token")
        self.n_heads, self.width, self.chunk = n_heads, head_width(d_model, n_heads), chunk
        self.sizes = (3 * d_model, d_model, n_heads, n_heads)  # q k v | output gate | eta | alpha, in one product
        self.proj = linear(d_model, sum(self.sizes))
        self.conv = ShortConvolution(3 * d_model, conv) if conv else None
        self.log_A = nn.Parameter(torch.empty(n_heads).uniform_(1, 16).log())
        dt = torch.empty(n_heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()  # as in Mamba
        self.dt_bias = nn.Parameter(dt.expm1().log())  # softplus(dt_bias) = dt
        self.norm = nn.RMSNorm(self.width, eps=1e-6)
        self.out = linear(d_model, d_model, out_scale)

    def forward(self, x, state=None):
        """x [B, T, d_model] -> (y [B, T, d_model], state)."""
        B, T, _ = x.shape
        qkv, gate, b, a = self.proj(x).split(self.sizes, dim=-1)
        tail = state["conv"] if state else None
        if self.conv is not None:
            qkv, tail = self.conv(qkv, tail)
        q, k, v = (z.unflatten(-1, (self.n_heads, self.width)).transpose(1, 2) for z in qkv.chunk(3, dim=-1))
        eta = b.sigmoid().transpose(1, 2)
        alpha = (-self.log_A.exp() * F.softplus(a + self.dt_bias)).exp().transpose(1, 2)
        W = state["W"] if state else self.log_A.new_zeros(B, self.n_heads, self.width, self.width)
        y, W, _ = scan(W, l2norm(k), v, eta, alpha, l2norm(q), delta=alpha, tile=self.chunk)
        y = self.norm(y).to(x.dtype).transpose(1, 2).flatten(2) * F.silu(gate)
        return self.out(y), {"W": W, "conv": tail, "position": T + (state["position"] if state else 0)}


def main():
    d_model, n_heads, lengths = 128, 2, (64, 4096)
    mixers = {
        "Attention": Attention(d_model, n_heads),
        "Attention, conv 4": Attention(d_model, n_heads, conv=4),
        "GatedDeltaNet": GatedDeltaNet(d_model, n_heads),
    }
    print(f"d_model {d_model}, {n_heads} heads, one row, float32\n")
    print("mixer               parameters" + "".join(f"   state after {T:>5}" for T in lengths))
    for name, mixer in mixers.items():
        line = f"{name:<20}{sum(p.numel() for p in mixer.parameters()):>10,}"
        for T in lengths:
            with torch.no_grad():
                _, state = mixer(torch.randn(1, T, d_model))
            line += f"{sum(z.nbytes for z in state.values() if torch.is_tensor(z)) / 1024:>12,.1f} KiB  "
        print(line)
    print("\nAttention keeps every key and value; Gated DeltaNet keeps one matrix per head, whatever the length.")


if __name__ == "__main__":
    main()
