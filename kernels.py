"""The learning rule and the self-modifying chunk step as fused Triton kernels, with backward.

    fast form      defined by (token by token)            the same in torch
    scan           memory.scan_stepwise                   memory.scan
    self_modify    titans.SelfModifyingTitans._chunk      fused.self_modify

The tests compare these with each other. In torch every chunk is dozens of small kernels that wait
for each other. Here one program keeps the fast weights of one (batch, head) on chip and walks all
its tiles in one launch. The equations below repeat those at the top of memory.py for the tokens
t, s = 0..C-1 of a tile, l the last of them. W' and S' are the weights after the tile, ∘ is the
product by elements:

    A0[t, s] = prod_{s < i < t} alpha_i  (s < t, else 0)           before token t
    a0[t]    = prod_{i < t} alpha_i
    A1 = alpha A0 + I        a1 = alpha a0                         after token t
    T0, t0, T1, t1           the same of theta                     (plain: c0 = A0, T1 = I)
    c0 = A0 T1               b0 = A0 t1
    c1 = alpha c0 + T1       b1 = alpha b0 + t1

    forward
        X   = (I + delta c0 eta ∘ K K^T)^-1
        r   = X (u - delta (a0 K W^T + b0 K S^T))
        y   = a1 Q W^T + b1 Q S^T + (c1 eta ∘ Q K^T) r
        W'  = a1[l] W + b1[l] S + (c1[l] eta r)^T K
        S'  = t1[l] S + (T1[l] eta r)^T K

    backward, chain
        d   = X^T (c1[l] eta K dW'^T + T1[l] eta K dS'^T + (c1 eta ∘ Q K^T)^T dy)  = du
        dW  = a1[l] dW' + (a1 dy)^T Q - (delta a0 d)^T K
        dS  = b1[l] dW' + t1[l] dS' + (b1 dy)^T Q - (delta b0 d)^T K

    backward, local
        M   = (dy r^T) ∘ c1 eta      N = -(d r^T) ∘ delta c0 eta
        dQ  = a1 dy W + b1 dy S + M K
        dK  = c1[l] eta r dW' + T1[l] eta r dS' + M^T Q + (N + N^T) K - delta (a0 d W + b0 d S)
        dc1 = (dy r^T) ∘ (Q K^T) eta                       row l: + eta (K dW'^T . r)
        dc0 = -(d r^T) ∘ (K K^T) delta eta + alpha dc1
        da1 = Q . dy W                                     at l: + <dW', W>
        da0 = -delta K . d W + alpha da1
        d alpha_i = sum_s (A0^T dA0 ∘ A0)[i, s] + a0_i (A0^T da0)_i + (what A1, a1 get directly)

The last line goes through a product of decays without a division: exact at 0, finite at 1e-30.

Only the chain must walk the tiles in reverse; everything local runs for all tiles at once. The
forward keeps W and S at every EVERY-th tile. The backward recomputes the states between ("again"),
all segments at once, and holds at most SPAN tiles of them, whatever T. What stays from forward to
backward is 1/EVERY of the states: for heads of width 64, 64 bytes a token in `scan` (its bfloat16
inputs are 392) and 97 with self-modification (inputs 256; with tiles of 16 tokens 388).

Self-modification: a tile is a chunk of up to 64 tokens (on Hopper; elsewhere of up to 16), longer
chunks are several tiles. With B = W0 + W at the chunk's start and the rows [memory | k | v | eta |
alpha] of the weights,

    k, v = l2norm of the rows of B x + x        eta, alpha from its last two rows
    r    = X (B v - W0 k - a0 W k + v - k)      (v - k in the three square blocks only)

and the rest as above with S = 0. So the memory's rows change nothing that is generated, and all
rows are changed in the same way, each by itself:

    o = X (v - k)       z = X (v - a0 k)        (several tiles: y = X v, z = -X a0 k)
    r = o + o W0^T + z W^T                      (+ y (B - W0)^T)
    W' = a1[l] W + r^T (c1[l] eta K)

One program for each head walks the tiles with the controller alone, the rows k, v, eta and alpha
(`_control_forward`). With its k, o, z the memory's rows are a chain of two small products, split
over programs (`_memory_states`), and they are read in all tiles at once (`_memory_read`). Mirrored
in the backward:

    d   = D + (X^T c1[l] eta K) dW'^T           D = X^T (c1 eta ∘ Q K^T)^T dy, controller: 0
    dW  = a1[l] dW' + d^T (v - a0 k) + E        E = (a1 dy)^T Q, controller: dG^T x
    dv  = d + d B, summed over the rows         dk = -d - d W0 - a0 d W + ..., as above
    G   = -(d r^T) ∘ c0 eta ∘ K K^T             gradient of log A0 and, summed, of log eta
    d log alpha_i = sum_{s < i < t} G[t, s] + the same of a0, a1[l], c1[l]

`_memory_maps` finds what is not sequential in this, `_memory_states` d and dW, `_memory_local` what
the memory's rows add to the gradients of k, v, q, eta and alpha. With these `_control_chain` walks
the controller in reverse; its dk, dv, deta, dalpha give dG [rows, C]. dx = B^T dG + dk + dv and dW0
are plain batched products, left to torch.

Decisions:

- Tiles of `scan` are held transposed, r^T [rows, C], so that the rows of the memory and not the few
  tokens fill the 64 rows of a Hopper matrix instruction. Otherwise Triton gives every warp a copy
  (255 registers and spills at C = 32). In self-modification 64 tokens fill them, and a number of
  each token takes 2 registers of a thread, not 16. There 8 warps would compute all twice.
- X: from blocks of one row by doubling, [[P, 0], [-R L P, R]]; up to 16 rows a block is one warp's.
  The nilpotent product (I - L)(I + L^2)(I + L^4)... costs the same but takes powers of L: they
  reach 2^31 where a key repeats with eta = 2, while the inverse has entries of 2.
- States, X, decays and sums are float32. float32 operands of a product are split into three tf32
  products (input_precision "tf32x3", about 22 bits; plain tf32 has 11). Where x, q (in `scan`: k,
  u, q) are bfloat16 so are the operands, all but those of X: these are split into two bfloat16
  each (16 bits, see `_wide`), which takes half the instructions.
- What is an operand is not what a Hopper matrix instruction sums up in place: ptxas (12.8, 13.0)
  takes the sum, rounded, for what was there before, rounded.
- No atomics: runs are identical.
- First derivatives only: a second one raises RuntimeError; ask for backend="torch" there.
- Registers are what is scarce. So loops hoist nothing (disable_licm), what is needed twice far
  apart is loaded twice (the second time from a cache), and sums join an accumulator with += of a
  product (with -= Triton keeps two).
"""

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: on the CPU, tests

# --------------------------------------------------------------------------------------------------
# Algebra of one tile, on chip


@triton.jit
def _dot(a, b, TYPE: tl.constexpr):
    """a @ b of operands rounded to TYPE, summed in float32; of float32: three tf32 products."""
    a = a.to(TYPE)
    b = b.to(TYPE)
    if INTERPRETED:  # the interpreter would multiply the bits of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _decay(x):
    """P[t, s] = prod_{s < i < t} x_i for s < t, else 0; p[t] = prod_{i < t} x_i."""
    C: tl.constexpr = x.shape[0]
    t = tl.arange(0, C)[:, None]
    s = tl.arange(0, C)[None, :]
    # x[t-1], and 1 at t = 0
    before = tl.sum(
        tl.where(s == t - 1, x[None, :], tl.where((t == 0) & (s == 0), 1.0, 0.0)), 1
    )
    P = tl.cumprod(tl.where(s < t - 1, before[:, None], 1.0), 0)
    return tl.where(s < t, P, 0.0), tl.cumprod(before, 0)


@triton.jit
def _decay_gradient(P, p, dP, dp):
    """d x_i = sum_{s < i < t} P[t, i] dP[t, s] P[i, s] + sum_{i < t} P[t, i] dp[t] p[i].

    No division, so it is exact at zeros.
    """
    return tl.sum(_dot(tl.trans(P), dP, tl.float32) * P, 1) + p * tl.sum(P * dp[:, None], 0)


@triton.jit
def _halves(x):
    """x = high + low up to 16 bits; high is x cut off, which takes one instruction."""
    high = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16), (x - high).to(tl.bfloat16)


@triton.jit
def _wide(a, b, TYPE: tl.constexpr):
    """a @ b of float32 operands, to about 16 bits where TYPE is bfloat16, else as in `_dot`.

    By bfloat16 products of what bfloat16 holds and of the rest.
    """
    if TYPE == tl.float32:
        return _dot(a, b, TYPE)
    a_high, a_low = _halves(a)
    b_high, b_low = _halves(b)
    r = _dot(a_low, b_high, TYPE)
    r += _dot(a_high, b_low, TYPE)
    r += _dot(a_high, b_high, TYPE)
    return r


@triton.jit
def _decays(la, et, TYPE: tl.constexpr):
    """For retentions exp(la): c0 eta and a0 at the top, the last of c1 eta and of a1."""
    C: tl.constexpr = la.shape[0]
    t = tl.arange(0, C)[:, None]
    s = tl.arange(0, C)[None, :]
    before = tl.cumsum(la) - la
    whole = tl.sum(la)
    if TYPE == tl.float32:  # sums that do not cancel
        c0 = _dot(tl.where(s < t, 1.0, 0.0), tl.where(t > s, la[:, None], 0.0), TYPE)
        c0 = tl.exp(c0) * et[None, :]
        last = tl.exp(tl.sum(tl.where(t > s, la[:, None], 0.0), 0)) * et
    else:  # differences of sums: 5e-4 off at worst, which bfloat16 hides
        after = before + la - tl.where(et > 0.0, tl.log(tl.maximum(et, 1e-37)), -1e4)
        c0 = tl.exp(before[:, None] - after[None, :])
        last = tl.exp(whole - after)
    return tl.where(s < t, c0, 0.0), tl.exp(before), last, tl.exp(whole)


@triton.jit
def _decays_between(G, TYPE: tl.constexpr):
    """Gradient of la_i, sum_{s < i < t} G[s, t], from G of the logarithm of A0, transposed."""
    C: tl.constexpr = G.shape[0]
    i = tl.arange(0, C)[:, None]
    t = tl.arange(0, C)[None, :]
    return tl.sum(tl.where(i < t, _dot(tl.where(t < i, 1.0, 0.0), G, TYPE), 0.0), 1)


@triton.jit
def _decays_outside(before, after):
    """The same from `before` of the logarithm of a0 and `after` of that of the last of A1."""
    return tl.cumsum(after - before) - after + tl.sum(before)


@triton.jit
def _inverse(L, TYPE: tl.constexpr):
    """(I + tril(L, -1))^-1, as described at the top of this file."""
    C: tl.constexpr = L.shape[0]
    n: tl.constexpr = C // 16
    # blocks of 16, each of them in one warp
    one = tl.arange(0, n)[:, None, None, None] == tl.arange(0, n)[None, None, :, None]
    B = tl.sum(tl.where(one, tl.reshape(L, (n, 16, n, 16)), 0.0), 2)
    t = tl.arange(0, 16)[None, :, None]
    s = tl.arange(0, 16)[None, None, :]
    X = tl.where(t == s, 1.0, tl.where((t >> 1 == s >> 1) & (t > s), -B, 0.0))
    for i in tl.static_range(1, 4):  # from the inverses of blocks of 2^i rows to twice as many
        below = tl.where((t >> i + 1 == s >> i + 1) & (t >> i > s >> i), B, 0.0)
        X -= _wide(X, _wide(below, X, TYPE), TYPE)
    X = tl.reshape(tl.where(one, X[:, :, None, :], 0.0), (C, C))
    t = tl.arange(0, C)[:, None]
    s = tl.arange(0, C)[None, :]
    for i in tl.static_range(4, 7):
        if 1 << i < C:
            below = tl.where((t >> i + 1 == s >> i + 1) & (t >> i > s >> i), L, 0.0)
            X -= _wide(X, _wide(below, X, TYPE), TYPE)
    return X


@triton.jit
def _softplus(z):
    """log(1 + e^z), to a few units in the last place also where 1 + e^z rounds to 1."""
    u = tl.exp(-tl.abs(z))
    w = 1.0 + u  # log(1 + u) = u (log w) / (w - 1): what w loses, it loses in both
    tail = tl.where(w == 1.0, u, u * (tl.log(w) / tl.maximum(w - 1.0, 1e-8)))
    return tl.maximum(z, 0.0) + tail


@triton.jit
def _row(M, last):
    """Row `last` of M [C, n], or element `last` of a vector."""
    here = tl.arange(0, M.shape[0]) == last
    return tl.sum(tl.where(here if len(M.shape) == 1 else here[:, None], M, 0.0), 0)


@triton.jit
def _delta(p, ok, C: tl.constexpr, DELTA: tl.constexpr):
    """delta of the tokens at p: a series where DELTA is 2, else ones."""
    return tl.load(p, mask=ok, other=0.0) if DELTA == 2 else tl.full([C], 1.0, tl.float32)


@triton.jit
def _weights(eta, alpha, theta, start, tok, ok, C: tl.constexpr, MOMENTUM: tl.constexpr):
    """eta, alpha of the tokens start + tok, then the decays of the equations at the top."""
    t = tl.arange(0, C)[:, None]
    s = tl.arange(0, C)[None, :]
    et = tl.load(eta + start + tok, mask=ok, other=0.0)
    al = tl.load(alpha + start + tok, mask=ok, other=1.0)
    A0, a0 = _decay(al)
    T1 = tl.where(t == s, 1.0, 0.0)
    a1 = al * a0
    # without momentum b0, b1, T0, t0 and t1 are not used
    c0 = A0
    b0 = a0
    b1 = a0
    T0 = A0
    t0 = a0
    t1 = a0
    if MOMENTUM:
        th = tl.load(theta + start + tok, mask=ok, other=1.0)
        T0, t0 = _decay(th)
        T1 = th[:, None] * T0 + T1
        t1 = th * t0
        c0 = tl.where(s < t, _dot(A0, T1, tl.float32), 0.0)
        b0 = tl.sum(A0 * t1[None, :], 1)
        b1 = al * b0 + t1
    return et, al, A0, a0, c0, b0, a1, b1, al[:, None] * c0 + T1, T0, t0, T1, t1


# Where things lie in memory: rows and columns beyond the width, and tokens that are not `ok`, are
# read as 0 and not written.


@triton.jit
def _get(p, start, tok, ok, width, cols):
    """Rows start + tok, columns cols of p [..., width], transposed to [cols, tok]."""
    at = tok[None, :] * width + cols[:, None]
    return tl.load(p + start * width + at, mask=ok[None, :] & (cols < width)[:, None], other=0.0)


@triton.jit
def _put(p, x, start, tok, ok, width, cols):
    at = tok[None, :] * width + cols[:, None]
    tl.store(p + start * width + at, x, mask=ok[None, :] & (cols < width)[:, None])


@triton.jit
def _get_state(p, j, rows, width, row, col):
    """Rows row, columns col of the j-th state in p [..., rows, width]."""
    at = row[:, None] * width + col[None, :]
    return tl.load(
        p + j * rows * width + at, mask=(row < rows)[:, None] & (col < width)[None, :], other=0.0
    )


@triton.jit
def _put_state(p, w, j, rows, width, row, col):
    at = row[:, None] * width + col[None, :]
    tl.store(p + j * rows * width + at, w, mask=(row < rows)[:, None] & (col < width)[None, :])


@triton.jit
def _get_pair(p, j, rows, width, row, col, MOMENTUM: tl.constexpr):
    """W and S, the j-th pair in p [..., 2, rows, width]; without momentum W twice, of one state."""
    j *= 1 + MOMENTUM
    W = _get_state(p, j, rows, width, row, col)
    return W, _get_state(p, j + MOMENTUM, rows, width, row, col)


@triton.jit
def _put_pair(p, w, z, j, rows, width, row, col, MOMENTUM: tl.constexpr):
    _put_state(p, w, j * (1 + MOMENTUM), rows, width, row, col)
    if MOMENTUM:
        _put_state(p, z, j * 2 + 1, rows, width, row, col)


@triton.jit
def _matrix(p, j, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Where the j-th of the matrices p [..., ROWS, COLS] lies."""
    return p + j * ROWS * COLS + tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]


@triton.jit
def _tile(i, T, chunk, PER, C: tl.constexpr):
    """Tile i where a chunk is PER tiles of C tokens, the last one shorter.

    Returns its tokens, which of them exist, the index of the last one, and the first token.
    """
    begin = i // PER * chunk + i % PER * C
    end = tl.minimum(T, (i // PER + 1) * chunk)
    tok = begin + tl.arange(0, C)
    return tok, tok < end, tl.minimum(end - begin, C) - 1, begin


# --------------------------------------------------------------------------------------------------
# The learning rule

# A kernel is compiled once, not again where one of these is 1 or a multiple of 16.
COUNTS = ["T", "H", "rows", "chunk", "PER", "segments", "EVERY", "first", "tiles", "all_tiles"]


@triton.jit(do_not_specialize=COUNTS)
def _scan_forward(
    W, k, u, q, eta, alpha, theta, delta, y, W_T, W_kept, r_kept, X_kept,
    T, dv, dk, segments, EVERY, first, tiles,
    C: tl.constexpr, DV: tl.constexpr, DK: tl.constexpr, MOMENTUM: tl.constexpr,
    DELTA: tl.constexpr, READ: tl.constexpr, AGAIN: tl.constexpr,
):
    """Rows [j DV, (j + 1) DV) of one memory n, from one of its `segments` states in W on.

    Keeps every EVERY-th state. AGAIN: for the backward, only the EVERY tiles up to the next kept
    state, now keeping every state, and r and X.
    """
    TYPE: tl.constexpr = k.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1)
    v = j * DV + tl.arange(0, DV)
    h = tl.arange(0, DK)
    lo = first + tl.program_id(2) * EVERY
    hi = tl.minimum(lo + EVERY, first + tiles) if AGAIN else tiles
    every = 1 if AGAIN else EVERY
    w, z = _get_pair(W, n * segments + lo // EVERY % segments, dv, dk, v, h, MOMENTUM)
    for i in tl.range(lo, hi, disable_licm=True):
        tok, ok, last, _ = _tile(i, T, C, 1, C)
        K = _get(k, n * T, tok, ok, dk, h)
        et, _, _, a0, c0, b0, a1, b1, c1, _, _, T1, t1 = _weights(
            eta, alpha, theta, n * T, tok, ok, C, MOMENTUM
        )
        if DELTA:
            d = _delta(delta + n * T + tok, ok, C, DELTA)
            X = _inverse(d[:, None] * c0 * et[None, :] * _dot(tl.trans(K), K, TYPE), TYPE)
            if AGAIN:
                tl.store(_matrix(X_kept, n * tiles + i - first, C, C), X)
        if i % every == 0:
            kept = n * tl.cdiv(tiles, every) + (i - first) // every
            _put_pair(W_kept, w, z, kept, dv, dk, v, h, MOMENTUM)
        # the errors of all tokens
        r = _get(u, n * T, tok, ok, dv, v).to(tl.float32)
        if DELTA:
            r -= (d * a0)[None, :] * _dot(w, K, TYPE)
            if MOMENTUM:
                r -= (d * b0)[None, :] * _dot(z, K, TYPE)
            r = _dot(r, tl.trans(X), tl.float32)
        if AGAIN:
            _put(r_kept, r, (n * tiles - first) * C, tok, ok, dv, v)
        # read
        if READ:
            Q = _get(q, n * T, tok, ok, dk, h)
            Y = a1[None, :] * _dot(w, Q, TYPE)
            if MOMENTUM:
                Y += b1[None, :] * _dot(z, Q, TYPE)
            Y += _dot(r, tl.trans(c1 * et[None, :] * _dot(tl.trans(Q), K, TYPE)), TYPE)
            _put(y, Y, n * T, tok, ok, dv, v)
        # write
        w = _row(a1, last) * w + _dot((_row(c1, last) * et)[None, :] * r, tl.trans(K), TYPE)
        if MOMENTUM:
            w += _row(b1, last) * z
            z = _row(t1, last) * z + _dot((_row(T1, last) * et)[None, :] * r, tl.trans(K), TYPE)
    if not AGAIN:
        _put_pair(W_T, w, z, n, dv, dk, v, h, MOMENTUM)


@triton.jit(do_not_specialize=COUNTS)
def _scan_chain(
    k, q, eta, alpha, theta, delta, dy, X_kept, dW, dW_kept, du, T, dv, dk, first, tiles,
    C: tl.constexpr, DV: tl.constexpr, DK: tl.constexpr, MOMENTUM: tl.constexpr,
    DELTA: tl.constexpr, READ: tl.constexpr,
):
    """The part of the backward that must walk the tiles in reverse: dW, dS (in place) and du."""
    TYPE: tl.constexpr = k.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1)
    v = j * DV + tl.arange(0, DV)
    h = tl.arange(0, DK)
    dw, dz = _get_pair(dW, n, dv, dk, v, h, MOMENTUM)
    for back in tl.range(1, tiles + 1, disable_licm=True):
        kept = n * tiles + tiles - back
        tok, ok, last, _ = _tile(first + tiles - back, T, C, 1, C)
        K = _get(k, n * T, tok, ok, dk, h)
        et, _, _, a0, c0, b0, a1, b1, c1, _, _, T1, t1 = _weights(
            eta, alpha, theta, n * T, tok, ok, C, MOMENTUM
        )
        _put_pair(dW_kept, dw, dz, kept, dv, dk, v, h, MOMENTUM)
        # through the write
        dr = (_row(c1, last) * et)[None, :] * _dot(dw, K, TYPE)
        if MOMENTUM:
            dr += (_row(T1, last) * et)[None, :] * _dot(dz, K, TYPE)
            dz = _row(t1, last) * dz + _row(b1, last) * dw
        dw *= _row(a1, last)
        # through the read
        if READ:
            Q = _get(q, n * T, tok, ok, dk, h)
            dY = _get(dy, n * T, tok, ok, dv, v)
            dr += _dot(dY, c1 * et[None, :] * _dot(tl.trans(Q), K, TYPE), TYPE)
            dw += _dot(a1[None, :] * dY, tl.trans(Q), TYPE)
            if MOMENTUM:
                dz += _dot(b1[None, :] * dY, tl.trans(Q), TYPE)
        # through the errors
        if DELTA:
            d = _delta(delta + n * T + tok, ok, C, DELTA)
            dr = _dot(dr, tl.load(_matrix(X_kept, kept, C, C)), tl.float32)
            dw += _dot((-d * a0)[None, :] * dr, tl.trans(K), TYPE)
            if MOMENTUM:
                dz += _dot((-d * b0)[None, :] * dr, tl.trans(K), TYPE)
        _put(du, dr, n * T, tok, ok, dv, v)
    _put_pair(dW, dw, dz, n, dv, dk, v, h, MOMENTUM)


@triton.jit(do_not_specialize=COUNTS)
def _scan_local(
    k, q, eta, alpha, theta, delta, dy, du, W_kept, r_kept, dW_kept,
    dk_out, dq, deta, dalpha, dtheta, ddelta,
    T, dv, dk, first, tiles,
    C: tl.constexpr, DV: tl.constexpr, DK: tl.constexpr, MOMENTUM: tl.constexpr,
    DELTA: tl.constexpr, READ: tl.constexpr,
):
    """The rest of the backward, all tiles at once: gradients of k, q and the series.

    Each block of rows has its own copy of them, to be summed.
    """
    TYPE: tl.constexpr = k.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1)
    i = first + tl.program_id(2)
    v = j * DV + tl.arange(0, DV)
    h = tl.arange(0, DK)
    t = tl.arange(0, C)
    kept = n * tiles + i - first
    copy = (j * tl.num_programs(0) + n) * T
    tok, ok, last, begin = _tile(i, T, C, 1, C)
    K = _get(k, n * T, tok, ok, dk, h)
    et, al, A0, a0, c0, b0, a1, b1, c1, T0, t0, T1, t1 = _weights(
        eta, alpha, theta, n * T, tok, ok, C, MOMENTUM
    )
    r = _get(r_kept, kept * C - begin, tok, ok, dv, v)
    w, z = _get_pair(W_kept, kept, dv, dk, v, h, MOMENTUM)
    here = t == last
    dw = _get_state(dW_kept, kept * (1 + MOMENTUM), dv, dk, v, h)
    wr = _row(c1, last)
    dwr = tl.sum(_dot(dw, K, TYPE) * r, 0)
    dK = _dot(tl.trans(dw), (wr * et)[None, :] * r, TYPE)
    det = wr * dwr
    dc1 = tl.where(here[:, None], (et * dwr)[None, :], 0.0)
    da = tl.where(here, tl.sum(dw.to(tl.float32) * w.to(tl.float32)), 0.0)
    if MOMENTUM:
        # not earlier, for the registers are full
        dz = _get_state(dW_kept, kept * 2 + 1, dv, dk, v, h)
        wr = _row(T1, last)
        dwr = tl.sum(_dot(dz, K, TYPE) * r, 0)
        dK += _dot(tl.trans(dz), (wr * et)[None, :] * r, TYPE)
        det += wr * dwr
        dT1 = tl.where(here[:, None], (et * dwr)[None, :], 0.0)
        db = tl.where(here, tl.sum(dw.to(tl.float32) * z.to(tl.float32)), 0.0)
        dt1 = tl.where(here, tl.sum(dz.to(tl.float32) * z.to(tl.float32)), 0.0)
    if READ:
        Q = _get(q, n * T, tok, ok, dk, h)
        dY = _get(dy, n * T, tok, ok, dv, v)
        part = _dot(tl.trans(w), dY, TYPE)
        dQ = a1[None, :] * part
        da += tl.sum(part * Q, 0)
        if MOMENTUM:
            part = _dot(tl.trans(z), dY, TYPE)
            dQ += b1[None, :] * part
            db += tl.sum(part * Q, 0)
        dM = _dot(tl.trans(dY), r, TYPE)
        QK = _dot(tl.trans(Q), K, TYPE)
        G = dM * QK
        dc1 += G * et[None, :]
        det += tl.sum(G * c1, 0)
        dM *= c1 * et[None, :]
        dK += _dot(Q, dM, TYPE)
        _put(dq, dQ + _dot(K, tl.trans(dM), TYPE), copy, tok, ok, dk, h)
    dc0 = al[:, None] * dc1
    da0 = al * da
    if MOMENTUM:
        db0 = al * db
    if DELTA:  # through the errors
        tl.debug_barrier()  # loaded once more, for the registers are full
        K = _get(k, n * T, tok, ok, dk, h)
        r = _get(r_kept, kept * C - begin, tok, ok, dv, v)
        d = _delta(delta + n * T + tok, ok, C, DELTA)
        dr = _get(du, n * T, tok, ok, dv, v)
        part = _dot(tl.trans(w), dr, TYPE)
        dK -= (d * a0)[None, :] * part
        part = tl.sum(part * K, 0)
        dd = -a0 * part
        da0 -= d * part
        if MOMENTUM:
            part = _dot(tl.trans(z), dr, TYPE)
            dK -= (d * b0)[None, :] * part
            part = tl.sum(part * K, 0)
            dd -= b0 * part
            db0 -= d * part
        dM = -_dot(tl.trans(dr), r, TYPE)
        G = dM * _dot(tl.trans(K), K, TYPE)
        dc0 += G * d[:, None] * et[None, :]
        det += tl.sum(G * d[:, None] * c0, 0)
        if DELTA == 2:
            tl.store(ddelta + copy + tok, dd + tl.sum(G * c0 * et[None, :], 1), mask=ok)
        dM *= d[:, None] * c0 * et[None, :]
        dK += _dot(K, dM + tl.trans(dM), TYPE)
    _put(dk_out, dK, copy, tok, ok, dk, h)
    tl.store(deta + copy + tok, det, mask=ok)
    dal = da * a0 + tl.sum(dc1 * c0, 1)
    dA0 = dc0
    if MOMENTUM:  # through c0 = A0 T1 and b0 = A0 t1
        th = tl.load(theta + n * T + tok, mask=ok, other=1.0)
        dal += db * b0
        dt1 += db + tl.sum(A0 * db0[:, None], 0)
        dT1 += dc1 + _dot(tl.trans(A0), dc0, tl.float32)
        dA0 = _dot(dc0, tl.trans(T1), tl.float32) + db0[:, None] * t1[None, :]
        dth = dt1 * t0 + tl.sum(dT1 * T0, 1)
        dth += _decay_gradient(T0, t0, th[:, None] * dT1, th * dt1)
        tl.store(dtheta + copy + tok, dth, mask=ok)
    tl.store(dalpha + copy + tok, dal + _decay_gradient(A0, a0, dA0, da0), mask=ok)


# --------------------------------------------------------------------------------------------------
# Self-modifying Titans with matrix memories. The controller: rows k and v [D, D], and 16 rows of
# which eta and alpha are the first two. What is of the 16 lies across, [16, C]: with 16 columns the
# compiler gives up the backward on 8.0 (32 registers, 8 KB of spills)


@triton.jit
def _load(p, start, tok, ok, width, col):
    """Rows start + tok, columns col of p [..., width]; 0 where not `ok`."""
    at = tok[:, None] * width + col[None, :]
    return tl.load(p + start * width + at, mask=ok[:, None], other=0.0)


@triton.jit
def _save(p, x, start, tok, ok, width, col):
    tl.store(p + start * width + tok[:, None] * width + col[None, :], x, mask=ok[:, None])


@triton.jit
def _gates(p, start, tok, D: tl.constexpr):
    """Where the gates of rows start + tok of p [..., 2 D + 16] lie, as [16, tok]."""
    at = (start + tok) * (2 * D + 16) + 2 * D
    return p + at[None, :] + tl.arange(0, 16)[:, None]


@triton.jit
def _load_rows(p, start, tok, ok, D: tl.constexpr):
    """Rows start + tok of p [..., 2 D + 16], in blocks k, v, gates."""
    col = tl.arange(0, D)
    k = _load(p, start, tok, ok, 2 * D + 16, col)
    v = _load(p, start, tok, ok, 2 * D + 16, D + col)
    return k, v, tl.load(_gates(p, start, tok, D), mask=ok[None, :], other=0.0)


@triton.jit
def _save_rows(p, k, v, gates, start, tok, ok, D: tl.constexpr):
    col = tl.arange(0, D)
    _save(p, k, start, tok, ok, 2 * D + 16, col)
    _save(p, v, start, tok, ok, 2 * D + 16, D + col)
    tl.store(_gates(p, start, tok, D), gates, mask=ok[None, :])


@triton.jit
def _get_control(p, j, rows, D: tl.constexpr):
    """The last 2 D + 2 rows of the j-th state in p [..., rows, D]: k, v, gates."""
    p += (j + 1) * rows * D - (2 * D + 2) * D
    gate = tl.arange(0, 16)
    gates = _load(p, 2 * D, gate, gate < 2, D, tl.arange(0, D))
    return tl.load(_matrix(p, 0, D, D)), tl.load(_matrix(p, 1, D, D)), gates


@triton.jit
def _put_control(p, k, v, gates, j, rows, D: tl.constexpr):
    p += (j + 1) * rows * D - (2 * D + 2) * D
    gate = tl.arange(0, 16)
    tl.store(_matrix(p, 0, D, D), k)
    tl.store(_matrix(p, 1, D, D), v)
    _save(p, gates, 2 * D, gate, gate < 2, D, tl.arange(0, D))


@triton.jit
def _rates(z_eta, z_alpha, rate, step, ok):
    """eta, the logarithm of alpha, and the sigmoid of z_eta; not `ok`: 0."""
    la = tl.where(ok, tl.maximum(-rate * _softplus(z_alpha), -100.0), 0.0)
    sigmoid = tl.sigmoid(z_eta)
    return tl.where(ok, step * (1.0 + tl.exp(la)) * sigmoid, 0.0), la, sigmoid


@triton.jit
def _get_rates(g, A, n, tok, ok, T, NT, step):
    """`_rates` from what is kept."""
    at = g + n * T + tok
    z_eta = tl.load(at, mask=ok, other=0.0)
    return _rates(z_eta, tl.load(at + NT, mask=ok, other=0.0), step * tl.load(A + n), step, ok)


@triton.jit
def _generate(x, W0, b, TYPE: tl.constexpr):
    """Rows of (W0 + b) x + x for tokens x, of unit length, and one over their norms."""
    y = _dot(x, tl.trans(W0), TYPE)
    y += _dot(x, tl.trans(b), TYPE)
    y += x
    norm = tl.rsqrt(tl.sum(y * y, 1) + 1e-6)
    return y * norm[:, None], norm


@triton.jit
def _errors(o, z, y, W0, w, b, TYPE: tl.constexpr, SPLIT: tl.constexpr):
    """o + o W0^T + z w^T, and + y b^T where SPLIT.

    Of M(o) = o + W0 o the o is added by itself, so that it never is rounded with W0, and at last:
    see "Decisions".
    """
    r = _dot(o, tl.trans(W0), TYPE)
    r += _dot(z, tl.trans(w), TYPE)
    if SPLIT:
        r += _dot(y, tl.trans(b), TYPE)
    return r + o


@triton.jit(do_not_specialize=COUNTS)
def _control_forward(
    x, W0, W, b_eta, b_alpha, A, W_T, W_last, W_kept, K_kept, V_kept, g, own, Y, Z, last, a1_last,
    X_kept, r_kept, T, H, step, chunk, PER, segments, EVERY, first, tiles, all_tiles,
    C: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr, AGAIN: tl.constexpr,
):
    """One controller n; PER tiles make a chunk (SPLIT: more than one), else as `_scan_forward`."""
    TYPE: tl.constexpr = x.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    R = 3 * D + 2
    NT = tl.num_programs(0).to(tl.int64) * T
    col = tl.arange(0, D)
    gate = tl.arange(0, 16)[:, None]
    t = tl.arange(0, C)
    lo = first + tl.program_id(1) * EVERY
    hi = tl.minimum(lo + EVERY, first + tiles) if AGAIN else first + tiles
    wk, wv, wg = _get_control(W, n * segments + lo // EVERY % segments, R, D)
    bk = wk.to(TYPE)  # at the chunk's start
    bv = wv.to(TYPE)
    bg = wg.to(TYPE)
    be = tl.load(b_eta + n)
    ba = tl.load(b_alpha + n)
    rate = step * tl.load(A + n)
    for i in tl.range(lo, hi, disable_licm=True):
        tok, ok, _, begin = _tile(i, T, chunk, PER, C)
        kept = n * tiles + i - first
        if not SPLIT or i % PER == 0:
            bk = wk.to(TYPE)
            bv = wv.to(TYPE)
            bg = wg.to(TYPE)
        if AGAIN:
            _put_control(W_kept, wk, wv, wg, kept, 2 * D + 2, D)
        else:
            if i % EVERY == 0:
                j = n * tl.cdiv(all_tiles, EVERY) + i // EVERY
                _put_control(W_kept, wk, wv, wg, j, R, D)
            if i == (all_tiles - 1) // PER * PER:
                _put_control(W_last, wk, wv, wg, n, R, D)
        # generate from the boundary weights
        W0k, W0v, W0g = _get_control(W0, n % H, R, D)
        xs = _load(x, n * T, tok, ok, D, col)
        G = _dot(W0g, tl.trans(xs), TYPE)
        G += _dot(bg, tl.trans(xs), TYPE)
        z_eta = tl.sum(tl.where(gate == 0, G, 0.0), 0) + be
        z_alpha = tl.sum(tl.where(gate == 1, G, 0.0), 0) + ba
        tl.store(g + n * T + tok, z_eta, mask=ok)
        tl.store(g + NT + n * T + tok, z_alpha, mask=ok)
        et, la, _ = _rates(z_eta, z_alpha, rate, step, ok)
        K, norm = _generate(xs, W0k, bk, TYPE)
        K = K.to(TYPE)
        _save(K_kept, K, n * T, tok, ok, D, col)
        if AGAIN:
            tl.store(g + 2 * NT + n * T + tok, norm, mask=ok)
        c0, a0, wr, a1 = _decays(la, et, TYPE)
        tl.store(last + kept * C + t, wr)
        tl.store(a1_last + kept, a1)
        X = _inverse(c0 * _dot(K, tl.trans(K), TYPE), TYPE)
        if AGAIN:
            tl.store(_matrix(X_kept, kept, C, C), X)
        V, norm = _generate(xs, W0v, bv, TYPE)
        if AGAIN:
            _save(V_kept, V, n * T, tok, ok, D, col)
            tl.store(g + 3 * NT + n * T + tok, norm, mask=ok)
        # what the errors of all rows are made of, with the solve
        z = -a0[:, None] * K
        if SPLIT:
            y = _wide(X, V, TYPE).to(TYPE)
            _save(Y, y, n * T, tok, ok, D, col)
        else:
            z += V
        z = _wide(X, z, TYPE).to(TYPE)
        if not SPLIT:
            y = z  # not used
        tl.store(_matrix(Z, kept, C, D), z)
        o = _wide(X, V - K.to(tl.float32), TYPE)
        tl.store(_matrix(own, kept, C, D), o)
        K = wr[:, None] * K
        # the errors, then the write
        rk = _errors(o, z, y, W0k, wk, bk, TYPE, SPLIT)
        wk = a1 * wk + _dot(tl.trans(rk), K, TYPE)
        rv = _errors(o, z, y, W0v, wv, bv, TYPE, SPLIT)
        wv = a1 * wv + _dot(tl.trans(rv), K, TYPE)
        rg = _dot(W0g, tl.trans(o), TYPE)
        rg += _dot(wg, tl.trans(z), TYPE)
        if SPLIT:
            rg += _dot(bg, tl.trans(y), TYPE)
        wg = a1 * wg + _dot(rg, K, TYPE)
        if AGAIN:
            _save_rows(r_kept, rk, rv, rg, kept * C - begin, tok, ok, D)
    if not AGAIN:
        _put_control(W_T, wk, wv, wg, n, R, D)


@triton.jit
def _series(s_kept, kept, m, C: tl.constexpr):
    """The m-th series of the kept-th tile: last of c1 eta; eta, alpha, a0, factors of gradients."""
    return tl.load(s_kept + (kept * 6 + m) * C + tl.arange(0, C))


@triton.jit(do_not_specialize=COUNTS)
def _control_chain(
    x, W0, W_kept, K_kept, V_kept, g, r_kept, Kx_kept, z_kept, c0_kept, s_kept, a1_last,
    dk_memory, dv_memory, dgates, dW, d_all, dG_all, T, H, chunk, PER, first, tiles,
    C: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr,
):
    """Backward through generation, errors and write of one controller n, in reverse.

    dk_memory, dv_memory and dgates: gradients of k, v, log eta, log alpha in the memory's rows.
    Updated in place: dW, and dgates to the gradients of z_eta and log alpha.
    """
    TYPE: tl.constexpr = x.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    R = 3 * D + 2
    NT = tl.num_programs(0).to(tl.int64) * T
    col = tl.arange(0, D)
    gate = tl.arange(0, 16)[:, None]
    # d_all and dG_all hold tokens from `start` on; `held`: where their row of token 0 would be
    start = first // PER * chunk
    held = n * (tl.minimum(T, tl.cdiv(first + tiles, PER) * chunk) - start) - start
    dwk, dwv, dwg = _get_control(dW, n, R, D)
    bk = tl.zeros_like(dwk)  # SPLIT: gradients of the boundary weights of this chunk so far
    bv = bk
    bg = tl.zeros_like(dwg)
    for back in tl.range(1, tiles + 1, disable_licm=True):
        i = first + tiles - back
        kept = n * tiles + tiles - back
        tok, ok, _, begin = _tile(i, T, chunk, PER, C)
        # through the write, then the solve: Kx = X^T (wr eta K)
        Kx = tl.load(_matrix(Kx_kept, kept, C, D))
        dk = _dot(Kx, tl.trans(dwk), TYPE).to(TYPE)
        dv = _dot(Kx, tl.trans(dwv), TYPE).to(TYPE)
        dg = _dot(dwg, tl.trans(Kx), TYPE).to(TYPE)
        _save_rows(d_all, dk, dv, dg, held, tok, ok, D)
        # through the products of keys; all [C, C] are transposed
        rk, rv, rg = _load_rows(r_kept, kept * C - begin, tok, ok, D)
        G = _dot(rk, tl.trans(dk), TYPE)
        G += _dot(rv, tl.trans(dv), TYPE)
        G += _dot(tl.trans(rg), dg, TYPE)
        G *= -tl.load(_matrix(c0_kept, kept, C, C)).to(tl.float32)
        N = G.to(TYPE)
        K = _load(K_kept, n * T, tok, ok, D, col)
        G *= _dot(K, tl.trans(K), TYPE)
        d_eta = tl.sum(G, 1)
        dla = _decays_between(G, TYPE)
        # through the errors
        a0 = _series(s_kept, kept, 3, C)
        wk, wv, wg = _get_control(W_kept, kept, 2 * D + 2, D)
        a1 = tl.load(a1_last + kept)
        dla += a1 * (tl.sum(dwk * wk + dwv * wv) + tl.sum(dwg * wg))
        part = _dot(dk, wk, TYPE)
        part += _dot(dv, wv, TYPE)
        part += _dot(tl.trans(dg), wg, TYPE)
        before = -a0 * tl.sum(part * K, 1)
        W0k, W0v, W0g = _get_control(W0, n % H, R, D)
        dV = _dot(Kx, tl.trans(dwk + dwv), TYPE)  # dk + dv once more: registers are scarce
        dV += _dot(dk, W0k, TYPE)
        dV += _dot(dv, W0v, TYPE)
        dV += _dot(tl.trans(dg), W0g, TYPE)
        dK = -dV - a0[:, None] * part
        V = _load(V_kept, n * T, tok, ok, D, col)
        if SPLIT:
            wk, wv, wg = _get_control(W_kept, kept - i % PER, 2 * D + 2, D)
            dV += _dot(dk, wk, TYPE)
            dV += _dot(dv, wv, TYPE)
            dV += _dot(tl.trans(dg), wg, TYPE)
            bk += _dot(tl.trans(dk), V, TYPE)
            bv += _dot(tl.trans(dv), V, TYPE)
            bg += _dot(dg, V, TYPE)
        else:
            dV += part
        at = n * T + tok
        dV += _load(dv_memory, n * T, tok, ok, D, col)
        dV -= V * tl.sum(dV * V, 1)[:, None]
        dV = (dV * tl.load(g + 3 * NT + at, mask=ok, other=0.0)[:, None]).to(TYPE)
        # through the keys
        dK += _dot(N, K, TYPE)
        dK += _dot(tl.trans(N), K, TYPE)
        part = _dot(rk, dwk, TYPE)
        part += _dot(rv, dwv, TYPE)
        part += _dot(tl.trans(rg), dwg, TYPE)
        part *= _series(s_kept, kept, 0, C)[:, None]
        after = tl.sum(part * K, 1)
        dK += part
        dK += _load(dk_memory, n * T, tok, ok, D, col)
        dK -= K * tl.sum(dK * K, 1)[:, None]
        dK = (dK * tl.load(g + 2 * NT + at, mask=ok, other=0.0)[:, None]).to(TYPE)
        # through the errors and the step sizes
        z = tl.load(_matrix(z_kept, kept, C, D))
        dwk = a1 * dwk + _dot(tl.trans(dk), z, TYPE)
        dwv = a1 * dwv + _dot(tl.trans(dv), z, TYPE)
        dwg = a1 * dwg + _dot(dg, z, TYPE)
        d_eta += after + tl.load(dgates + at, mask=ok, other=0.0)
        al = _series(s_kept, kept, 2, C)
        dla += _decays_outside(before, after) + d_eta * al / (1.0 + al)
        dla += tl.load(dgates + NT + at, mask=ok, other=0.0)
        d_eta *= _series(s_kept, kept, 4, C)
        # every warp has a copy of these few numbers: none may store before all have loaded
        tl.debug_barrier()
        tl.store(dgates + at, d_eta, mask=ok)
        tl.store(dgates + NT + at, dla, mask=ok)
        dla *= _series(s_kept, kept, 5, C)
        dG = tl.where(gate == 0, d_eta[None, :], tl.where(gate == 1, dla[None, :], 0.0))
        _save_rows(dG_all, dK, dV, dG, held, tok, ok, D)
        xs = _load(x, n * T, tok, ok, D, col)
        if SPLIT:
            bk += _dot(tl.trans(dK), xs, TYPE)
            bv += _dot(tl.trans(dV), xs, TYPE)
            bg += _dot(dG, xs, TYPE)
            if i % PER == 0:
                dwk += bk
                dwv += bv
                dwg += bg
                bk = tl.zeros_like(bk)
                bv = tl.zeros_like(bv)
                bg = tl.zeros_like(bg)
        else:
            dwk += _dot(tl.trans(dK), xs, TYPE)
            dwv += _dot(tl.trans(dV), xs, TYPE)
            dwg += _dot(dG, xs, TYPE)
    _put_control(dW, dwk, dwv, dwg, n, R, D)


# --------------------------------------------------------------------------------------------------
# The memory's rows, given k, v, eta, alpha and X of the controller: all tiles at once, but for
# `_memory_states`


@triton.jit(do_not_specialize=COUNTS)
def _memory_maps(
    K_kept, V_kept, g, A, X_kept, q, dy, D0, Kx, z, c0_kept, s_kept, E,
    T, step, chunk, PER, first, tiles, C: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr,
):
    """What one tile does to gradients: see the top."""
    TYPE: tl.constexpr = K_kept.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    i = first + tl.program_id(1)
    NT = tl.num_programs(0).to(tl.int64) * T
    col = tl.arange(0, D)
    t = tl.arange(0, C)
    kept = n * tiles + i - first
    tok, ok, _, _ = _tile(i, T, chunk, PER, C)
    K = _load(K_kept, n * T, tok, ok, D, col)
    et, la, sigmoid = _get_rates(g, A, n, tok, ok, T, NT, step)
    c0, a0, wr, _ = _decays(la, et, TYPE)
    zs = -a0[:, None] * K
    if not SPLIT:
        zs += _load(V_kept, n * T, tok, ok, D, col)
    tl.store(_matrix(z, kept, C, D), zs)
    tl.store(_matrix(c0_kept, kept, C, C), tl.trans(c0))
    z_alpha = tl.load(g + NT + n * T + tok, mask=ok, other=0.0)
    d_alpha = -step * tl.load(A + n) * tl.sigmoid(z_alpha)
    series = (wr, et, tl.exp(la), a0, 1.0 - sigmoid, d_alpha)
    for m in tl.static_range(6):
        tl.store(s_kept + (kept * 6 + m) * C + t, tl.where(ok | (m < 4), series[m], 0.0))
    X = tl.trans(tl.load(_matrix(X_kept, kept, C, C)))
    tl.store(_matrix(Kx, kept, C, D), _wide(X, wr[:, None] * K, TYPE))
    Q = _load(q, n * T, tok, ok, D, col)
    dY = _load(dy, n * T, tok, ok, D, col)
    al = tl.exp(la)[:, None]
    c1 = al * c0 + tl.where(t[:, None] == t[None, :], et[:, None], 0.0)
    dr = _dot(tl.trans(c1 * _dot(Q, tl.trans(K), TYPE)), dY, TYPE)
    tl.store(_matrix(D0, kept, C, D), _wide(X, dr, TYPE))
    tl.store(_matrix(E, kept, D, D), _dot(tl.trans(al * a0[:, None] * dY), Q, TYPE))


@triton.jit(do_not_specialize=COUNTS)
def _memory_states(
    W, o, z, y, K, last, a1_last, W0, E, W_T, W_last, W_kept, W_all, r_kept,
    T, H, rows, chunk, PER, segments, EVERY, first, tiles, all_tiles,
    C: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, SPLIT: tl.constexpr,
    BACK: tl.constexpr, AGAIN: tl.constexpr,
):
    """Columns [j DV, (j + 1) DV) of the memory's W^T and r of one memory n, tile by tile.

    BACK: of dW^T and d in reverse, with o, z, y, K, r for D, X^T c1[l] eta K, v, v - a0 k, d above.
    """
    TYPE: tl.constexpr = o.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, D)
    v = tl.program_id(1) * DV + tl.arange(0, DV)
    t = tl.arange(0, C)
    lo = first + tl.program_id(2) * EVERY
    hi = tl.minimum(lo + EVERY, first + tiles) if AGAIN else first + tiles
    at = v[None, :] * D + col[:, None]  # where the columns of a state lie
    w = tl.load(W + (n * segments + lo // EVERY % segments) * rows * D + at).to(tl.float32)
    if BACK:
        b = tl.zeros_like(w)  # SPLIT: gradients of the boundary weights of this chunk so far
    else:
        b = w.to(TYPE)
        w0 = tl.load(W0 + n % H * rows * D + at)
    for count in tl.range(lo, hi):
        i = lo + hi - 1 - count if BACK else count
        kept = n * tiles + i - first
        tok, ok, _, begin = _tile(i, T, chunk, PER, C)
        tl.store(W_all + kept * D * D + at, w)
        if not AGAIN and not BACK:
            if i % EVERY == 0:
                j = n * tl.cdiv(all_tiles, EVERY) + i // EVERY
                tl.store(W_kept + j * rows * D + at, w)
            if i == (all_tiles - 1) // PER * PER:
                tl.store(W_last + n * rows * D + at, w)
        r = tl.load(o + (kept * C + t)[:, None] * D + v[None, :]).to(tl.float32)
        r += _dot(tl.load(_matrix(z, kept, C, D)), w, TYPE)
        if not BACK:
            r += _dot(tl.load(_matrix(o, kept, C, D)), w0, TYPE)
        if SPLIT:
            ys = _load(y, n * T, tok, ok, D, col)
            if BACK:
                b += _dot(tl.trans(ys), r, TYPE)
            else:
                b = tl.where(i % PER == 0, w, b.to(tl.float32)).to(TYPE)
                r += _dot(ys, b, TYPE)
        w *= tl.load(a1_last + kept)
        if BACK:  # d by tokens, r by tiles
            _save(r_kept, r, n * T, tok, ok, D, v)
            w += _dot(tl.trans(tl.load(_matrix(K, kept, C, D))), r, TYPE)
            w += tl.load(E + kept * D * D + at)
            if SPLIT:
                if i % PER == 0:
                    w += b
                    b *= 0.0
        else:
            _save(r_kept, r, kept * C - begin, tok, ok, D, v)
            r *= tl.load(last + kept * C + t)[:, None]
            w += _dot(tl.trans(_load(K, n * T, tok, ok, D, col)), r, TYPE)
    if not AGAIN:
        tl.store(W_T + n * rows * D + at, w)


@triton.jit(do_not_specialize=COUNTS)
def _memory_read(
    K_kept, q, g, A, W_all, r_kept, y, T, step, chunk, PER, first, tiles,
    C: tl.constexpr, D: tl.constexpr,
):
    TYPE: tl.constexpr = K_kept.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    i = first + tl.program_id(1)
    NT = tl.num_programs(0).to(tl.int64) * T
    col = tl.arange(0, D)
    kept = n * tiles + i - first
    tok, ok, _, begin = _tile(i, T, chunk, PER, C)
    K = _load(K_kept, n * T, tok, ok, D, col)
    Q = _load(q, n * T, tok, ok, D, col)
    et, la, _ = _get_rates(g, A, n, tok, ok, T, NT, step)
    c0, a0, _, _ = _decays(la, et, TYPE)
    al = tl.exp(la)[:, None]
    c1 = al * c0 + tl.where(tok[:, None] == tok[None, :], et[:, None], 0.0)
    Y = al * a0[:, None] * _dot(Q, tl.trans(tl.load(_matrix(W_all, kept, D, D))), TYPE)
    r = _load(r_kept, kept * C - begin, tok, ok, D, col)
    Y += _dot(c1 * _dot(Q, tl.trans(K), TYPE), r, TYPE)
    _save(y, Y, n * T, tok, ok, D, col)


@triton.jit(do_not_specialize=COUNTS)
def _memory_local(
    K_kept, q, W0, dy, d_kept, W_kept, r_kept, dW_kept, c0_kept, s_kept, a1_last,
    dk_out, dv_out, dq, dgates, T, H, chunk, PER, first, tiles,
    C: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr,
):
    """Gradients of k, v, q, log eta and log alpha in the memory's rows, all tiles at once."""
    TYPE: tl.constexpr = K_kept.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    i = first + tl.program_id(1)
    NT = tl.num_programs(0).to(tl.int64) * T
    col = tl.arange(0, D)
    t = tl.arange(0, C)[None, :]
    s = tl.arange(0, C)[:, None]
    kept = n * tiles + i - first
    tok, ok, _, begin = _tile(i, T, chunk, PER, C)
    K = _load(K_kept, n * T, tok, ok, D, col)
    Q = _load(q, n * T, tok, ok, D, col)
    dY = _load(dy, n * T, tok, ok, D, col)
    r = _load(r_kept, kept * C - begin, tok, ok, D, col)
    d = _load(d_kept, n * T, tok, ok, D, col)
    # between tokens; all [C, C] are transposed: rows s wrote, columns t read
    c0 = tl.load(_matrix(c0_kept, kept, C, C)).to(tl.float32)
    al = _series(s_kept, kept, 2, C)
    c1 = al[None, :] * c0 + tl.where(s == t, _series(s_kept, kept, 1, C)[:, None], 0.0)
    c1 *= _dot(r, tl.trans(dY), TYPE)
    G = c1 * _dot(K, tl.trans(Q), TYPE)
    d_eta = tl.sum(G, 1)
    G = tl.where(s < t, G, 0.0)
    dla = tl.sum(G, 0)
    M = c1.to(TYPE)
    c0 *= -_dot(r, tl.trans(d), TYPE)
    N = c0.to(TYPE)
    c0 *= _dot(K, tl.trans(K), TYPE)
    d_eta += tl.sum(c0, 1)
    G += c0
    # through the write
    w = tl.load(_matrix(W_kept, kept, D, D))
    dw = tl.load(_matrix(dW_kept, kept, D, D))
    wr = _series(s_kept, kept, 0, C)
    dK = wr[:, None] * _dot(r, dw, TYPE)
    after = tl.sum(dK * K, 1)
    dla += tl.load(a1_last + kept) * tl.sum(dw.to(tl.float32) * w)
    # through the read
    a0 = _series(s_kept, kept, 3, C)
    dQ = (al * a0)[:, None] * _dot(dY, w, TYPE)
    before = tl.sum(dQ * Q, 1)
    dla += before
    dQ += _dot(tl.trans(M), K, TYPE)
    _save(dq, dQ, n * T, tok, ok, D, col)
    dK += _dot(M, Q, TYPE)
    # through the errors
    dV = d + _dot(d, tl.load(_matrix(W0 + n % H * (3 * D + 2) * D, 0, D, D)), TYPE)
    part = _dot(d, w, TYPE)
    dK -= dV + a0[:, None] * part
    before -= a0 * tl.sum(part * K, 1)
    if SPLIT:
        dV += _dot(d, tl.load(_matrix(W_kept, kept - i % PER, D, D)), TYPE)
    else:
        dV += part
    _save(dv_out, dV, n * T, tok, ok, D, col)
    dK += _dot(N, K, TYPE)
    dK += _dot(tl.trans(N), K, TYPE)
    _save(dk_out, dK, n * T, tok, ok, D, col)
    dla += _decays_between(G, TYPE) + _decays_outside(before, after)
    tl.store(dgates + n * T + tok, d_eta + after, mask=ok)
    tl.store(dgates + NT + n * T + tok, dla, mask=ok)


# --------------------------------------------------------------------------------------------------
# Launches. Both operators take a list of tensors (absent ones are empty) and return a list:
# results, then the states that are kept

# Tiles from one kept state to the next: keeping all takes 8 times as much, and the backward has
# 1/8 of the parallel work it had then.
EVERY = 8
SPAN = 64  # tiles whose states the backward holds at once, a multiple of EVERY
FORWARD_SPAN = 512  # the same of the forward of self-modification
TILE = 64  # tokens of its tiles on Hopper, at most; elsewhere 16
# Major compute capabilities whose matrix instructions take their operands from registers, which
# three tf32 products of float32 ones overflow: for heads of 64 a thread spills up to 12 KB in
# `scan` on 8.0. Half the rows and tokens at once cut that to 0.3 KB.
CROWDED = (8, 12)
# One stage is no loads ahead: shared memory is full of operands.
LAUNCH = {
    "scan": dict(num_warps=4, num_stages=1),
    "control": dict(num_warps=4, num_stages=1),
    "memory": dict(num_warps=4, num_stages=1),
    "states": dict(num_warps=4, num_stages=3),
}
DV = 16  # rows of the memory in one program of `_memory_states`: more programs, shorter steps


def _block(n, most):
    """The block size for n rows, columns or tokens: a power of two from 16 on."""
    return min(max(16, triton.next_power_of_2(n)), most)


def _sizes(x, tile, delta):
    """N, T, dv, dk, blocks of rows, tiles, compile-time constants of a scan of x as in `_scan`."""
    W, k, u, q, *_, series = x
    N, T, dk = k.shape
    dv = u.shape[2]
    crowded = False
    if k.is_cuda and k.dtype == torch.float32:
        crowded = torch.cuda.get_device_capability(k.device)[0] in CROWDED
    constants = {
        "C": _block(tile, 16 if crowded else 32),
        "DV": _block(dv, 32 if crowded else 64),
        "DK": _block(dk, 64),
        "MOMENTUM": W.shape[1] - 1,
        "DELTA": 2 if series.numel() else int(delta),
        "READ": q.numel() > 0,
    }
    blocks = triton.cdiv(dv, constants["DV"])
    tiles = triton.cdiv(T, constants["C"])
    return N, T, dv, dk, blocks, tiles, constants | LAUNCH["scan"]


def on_its_device(f):
    """Operator f(..., tensors, number, number) with the GPU of these tensors as the current one.

    Triton launches on the current one.
    """

    @functools.wraps(f)
    def run(*args):
        with torch.cuda.device_of(args[-3][0]):
            return f(*args)

    return run


@torch.library.custom_op("nested_learning::scan", mutates_args=())
@on_its_device
def _scan(x: list[Tensor], tile: int, delta: float) -> list[Tensor]:
    """y, (W, S) at the end, and those that are kept.

    x: (W, S) [N, 1 or 2, dv, dk], k [N, T, dk], u [N, T, dv], q as k, then eta, alpha, theta and
    delta [N, T].
    """
    N, T, dv, dk, blocks, tiles, constants = _sizes(x, tile, delta)
    out = _scan_fake(x, tile, delta)
    unused = out[:2]  # r and X are written in the backward only
    _scan_forward[(N, blocks)](
        *x, *out, *unused, T, dv, dk, 1, EVERY, 0, tiles, **constants, AGAIN=False
    )
    return out


@_scan.register_fake
def _scan_fake(x, tile, delta):
    N, T, dv, _, _, tiles, constants = _sizes(x, tile, delta)
    new = x[0].new_empty
    y = new(N * constants["READ"], T, dv)
    return [y, new(x[0].shape), new(N, triton.cdiv(tiles, EVERY), *x[0].shape[1:])]


@torch.library.custom_op("nested_learning::scan_backward", mutates_args=())
@on_its_device
def _scan_backward(
    grads: list[Tensor], kept: list[Tensor], x: list[Tensor], tile: int, delta: float
) -> list[Tensor]:
    """Gradients of x, the arguments of `_scan`."""
    N, T, dv, dk, blocks, all_tiles, constants = _sizes(x, tile, delta)
    W, k, u, q, *series = x
    C = constants["C"]
    dy = grads[0]
    dW = grads[1].clone()
    du = torch.empty_like(u)
    # gradients that all blocks of rows contribute to: one copy per block, added up at the end
    copies = []
    for t in (k, q, *series):
        dtype = torch.float32 if blocks > 1 else t.dtype
        copies.append(W.new_empty(blocks, *t.shape, dtype=dtype))
    for first in reversed(range(0, all_tiles, SPAN)):
        tiles = min(SPAN, all_tiles - first)
        W_all = k.new_empty(N, tiles, *W.shape[1:])
        dW_all = torch.empty_like(W_all)
        r = k.new_empty(N, tiles * C, dv)
        X = W.new_empty(N, tiles, C, C)
        _scan_forward[(N, blocks, triton.cdiv(tiles, EVERY))](
            *kept, k, u, q, *series, dy, dW, W_all, r, X,
            T, dv, dk, kept[0].shape[1], EVERY, first, tiles,
            **constants | dict(READ=False), AGAIN=True,
        )
        _scan_chain[(N, blocks)](
            k, q, *series, dy, X, dW, dW_all, du, T, dv, dk, first, tiles, **constants
        )
        _scan_local[(N, blocks, tiles)](
            k, q, *series, dy, du, W_all, r, dW_all, *copies,
            T, dv, dk, first, tiles, **constants,
        )
    summed = []
    for g, t in zip(copies, (k, q, *series), strict=True):
        summed.append(g.sum(0).to(t.dtype) if blocks > 1 else g[0])
    dk_out, *rest = summed
    return [dW, dk_out, du, *rest]


def unfit(x, width, chunk=None):
    """Why the kernels cannot run on tensors like x with keys of this width, None where they can.

    chunk: tokens of a chunk of self-modifying Titans, None for `scan`.
    """
    if x.is_cuda:
        return unfit_on(torch.cuda.get_device_capability(x.device), x.dtype, width, chunk)
    if not INTERPRETED.value:
        needed = "an NVIDIA GPU of compute capability 8.0 or more"
        return f"they need {needed} (the tensors are on {x.device})"
    return unfit_on((9, 0), x.dtype, width, chunk)


def unfit_on(capability, dtype, width, chunk=None):
    """`unfit` for tensors of a type on an NVIDIA GPU of a compute capability, as (9, 0)."""
    if capability < (8, 0):
        has = "this GPU has {}.{}".format(*capability)
        return f"they need an NVIDIA GPU of compute capability 8.0 or more, {has}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"they need float32 or bfloat16, got {dtype}"
    if chunk is None:
        return f"they need keys of width 64 at most, got {width}" if width > 64 else None
    if width not in (16, 32, 64) or chunk > 128:
        needed = "heads of width 16, 32 or 64 and chunks of 128 tokens at most"
        return f"they need {needed}, got {width} and {chunk}"
    if width == 64 and dtype == torch.float32 and capability[0] != 9:
        # On 9.0 it takes 160 KiB of shared memory and spills 6 KB a thread. On 8.0, 8.9, 10.0 and
        # 12.0 the compiler gives the backward up: 32 to 56 registers, 6 to 17 KB of spills.
        needed = "compute capability 9.0 for float32 heads of width 64"
        return "they need {}, this GPU has {}.{}: use bfloat16".format(needed, *capability)
    return None


def scan(W, k, u, eta, alpha, q, theta, S, delta, tile):
    """`memory.scan` with these kernels, for arguments aligned by it and not `unfit`.

    Their leading dimensions are equal.
    """
    lead = W.shape[:-2]
    narrow = k.dtype == u.dtype and (q is None or q.dtype == k.dtype)
    dtype = k.dtype if narrow else torch.float32
    if not torch.is_tensor(delta) and delta not in (0, 1):
        delta = torch.full_like(eta, delta)
    number = 0.0 if torch.is_tensor(delta) else float(delta)

    def flat(x, n, dtype=torch.float32):
        """x [..., n last dimensions] -> [N, ...]; empty for what is not a tensor."""
        if not torch.is_tensor(x):
            return W.new_empty(0, dtype=dtype)
        return x.to(dtype).reshape(-1, *x.shape[-n:]).contiguous()

    pair = flat(W, 2)[:, None] if S is None else torch.stack([flat(W, 2), flat(S, 2)], 1)
    matrices = [flat(x, 2, dtype) for x in (k, u, q)]
    series = [flat(x, 1) for x in (eta, alpha, theta, delta)]
    y, pair, _ = _scan([pair, *matrices, *series], tile, number)
    W_T, *S_T = (x.reshape(lead + x.shape[1:]) for x in pair.unbind(1))
    y = None if q is None else y.reshape(lead + y.shape[1:])
    return y, W_T, S_T[0] if S_T else None


# --------------------------------------------------------------------------------------------------


def _chunks(x, chunk):
    """Tokens of a tile, tiles of a chunk, tiles of x, tiles between kept states."""
    hopper = not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] == 9
    C = _block(chunk, TILE if hopper else 16)  # elsewhere operands take registers: see CROWDED
    per = triton.cdiv(chunk, C)
    T = x.shape[1]
    tiles = T // chunk * per + triton.cdiv(T % chunk, C)
    return C, per, tiles, per * max(1, EVERY // per)


@torch.library.custom_op("nested_learning::modify", mutates_args=())
@on_its_device
def _modify(x: list[Tensor], chunk: int, step: float) -> list[Tensor]:
    """y [N, T, d] with y_t = W_t q_t, W at the end, W at the last boundary, and W where it is kept.

    x: x, q [N, T, d], W0 [H, 3d + 2, d], W [N, 3d + 2, d], then b_eta, b_alpha, A [N].
    """
    out = _modify_fake(x, chunk, step)
    y, W_T, *states = out
    x, q, W0, W, *gates = x
    N, T, D = x.shape
    H, R, _ = W0.shape
    C, per, all_tiles, every = _chunks(x, chunk)
    sizes = dict(C=C, D=D, SPLIT=per > 1)
    K = torch.empty_like(x)
    Y = torch.empty_like(x)
    g = W.new_empty(2, N, T)
    none = W  # for arguments that are not used
    span = every * max(1, FORWARD_SPAN // every)
    for first in range(0, all_tiles, span):
        tiles = min(span, all_tiles - first)
        at = (chunk, per, 1, every, first, tiles, all_tiles)
        o, z, r = x.new_empty(3, N, tiles, C, D)
        W_all = x.new_empty(N, tiles, D, D)
        last = W.new_empty(N, tiles, C)
        a1_last = W.new_empty(N, tiles)
        start = W_T if first else W
        _control_forward[(N,)](
            x, W0, start, *gates, W_T, *states, K, none, g, o, Y, z, last, a1_last, none, none,
            T, H, step, *at, **sizes, **LAUNCH["control"], AGAIN=False,
        )
        _memory_states[(N, D // DV)](
            start, o, z, Y, K, last, a1_last, W0, none, W_T, *states, W_all, r,
            T, H, R, *at, **sizes, **LAUNCH["states"], DV=DV, BACK=False, AGAIN=False,
        )
        _memory_read[(N, tiles)](
            K, q, g, gates[2], W_all, r, y, T, step, chunk, per, first, tiles, C=C, D=D,
            **LAUNCH["memory"],
        )
    return out


@_modify.register_fake
def _modify_fake(x, chunk, step):
    _, _, tiles, every = _chunks(x[0], chunk)
    W = x[3]
    new = W.new_empty
    kept = new(len(W), triton.cdiv(tiles, every), *W.shape[1:])
    return [new(x[1].shape), new(W.shape), new(W.shape), kept]


@torch.library.custom_op("nested_learning::modify_backward", mutates_args=())
@on_its_device
def _modify_backward(
    grads: list[Tensor], kept: list[Tensor], inputs: list[Tensor], chunk: int, step: float
) -> list[Tensor]:
    """Gradients of the inputs of `_modify`."""
    x, q, W0, W, b_eta, b_alpha, A = inputs
    dy, dW, d_last = grads
    dW = dW.clone()
    W_last, W_kept = kept
    N, T, D = x.shape
    R = W.shape[1]
    H = len(W0)
    C, per, all_tiles, every = _chunks(x, chunk)
    dx = torch.empty_like(x)
    dq = torch.empty_like(q)
    dW0 = torch.zeros_like(W)
    K, V, Y, d_memory, dk, dv = (torch.empty_like(x) for _ in range(6))
    g = W.new_empty(4, N, T)  # z_eta, z_alpha, and one over the norms of k and v
    dg = W.new_empty(2, N, T)
    none = W  # for arguments that are not used
    sizes = dict(C=C, D=D, SPLIT=per > 1)
    W0_all = W0.repeat(N // H, 1, 1)
    span = every * max(1, SPAN // every)
    # the last chunk goes by itself: the gradient of the weights at its start joins there
    tail = (all_tiles - 1) // per * per
    for first in (tail, *reversed(range(0, tail, span))):
        if first == tail:
            tiles = all_tiles - tail
            states = W_last[:, None]
        else:
            tiles = min(span, tail - first)
            states = W_kept
        lo = first // per * chunk
        hi = min(T, triton.cdiv(first + tiles, per) * chunk)
        segments = triton.cdiv(tiles, every)
        at = (chunk, per, states.shape[1], every, first, tiles, tiles)
        X = W.new_empty(N, tiles, C, C)
        c0 = x.new_empty(N, tiles, C, C)
        series = W.new_empty(N, tiles, 6, C)
        a1_last = W.new_empty(N, tiles)
        last = W.new_empty(N, tiles, C)
        o, z, D0, Kx, z_write, r_memory = x.new_empty(6, N, tiles, C, D)
        W_memory, dW_memory, E = x.new_empty(3, N, tiles, D, D)
        W_control = x.new_empty(N, tiles, 2 * D + 2, D)
        r = x.new_empty(N, tiles * C, 2 * D + 16)
        d = x.new_empty(N, hi - lo, 2 * D + 16)
        dG = torch.empty_like(d)
        _control_forward[(N, segments)](
            x, W0, states, b_eta, b_alpha, A, none, none, W_control, K, V, g, o, Y, z, last,
            a1_last, X, r, T, H, step, *at, **sizes, **LAUNCH["control"], AGAIN=True,
        )
        _memory_maps[(N, tiles)](
            K, V, g, A, X, q, dy, D0, Kx, z_write, c0, series, E,
            T, step, chunk, per, first, tiles, **sizes, **LAUNCH["memory"],
        )
        _memory_states[(N, D // DV, segments)](
            states, o, z, Y, K, last, a1_last, W0, none, none, none, none, W_memory, r_memory,
            T, H, R, *at, **sizes, **LAUNCH["states"], DV=DV, BACK=False, AGAIN=True,
        )
        _memory_states[(N, D // DV)](
            dW, D0, Kx, V, z_write, none, a1_last, none, E, dW, none, none, dW_memory, d_memory,
            T, H, R, chunk, per, 1, every, first, tiles, tiles, **sizes, **LAUNCH["states"],
            DV=DV, BACK=True, AGAIN=False,
        )
        _memory_local[(N, tiles)](
            K, q, W0, dy, d_memory, W_memory, r_memory, dW_memory, c0, series, a1_last,
            dk, dv, dq, dg, T, H, chunk, per, first, tiles, **sizes, **LAUNCH["memory"],
        )
        _control_chain[(N,)](
            x, W0, W_control, K, V, g, r, Kx, z_write, c0, series, a1_last, dk, dv, dg, dW, d, dG,
            T, H, chunk, per, first, tiles, **sizes, **LAUNCH["control"],
        )
        # what is left are plain products, for all chunks at once
        now = slice(lo, hi)
        d = torch.cat([d_memory[:, now], d[..., : 2 * D + 2]], 2)
        dG = dG[..., : 2 * D + 2]
        B = W0_all[:, None, D:] + W_control[:, ::per]  # [N, chunks, 2 D + 2, D]
        through_B = (dG.unflatten(1, (B.shape[1], -1)) @ B).flatten(1, 2)
        dx[:, now] = through_B + dG[..., :D] + dG[..., D : 2 * D]
        dW0 += d.mT @ (V[:, now] - K[:, now])
        dW0[:, D:] += dG.mT @ x[:, now]
        if first == tail:
            dW += d_last
    z_alpha = g[1]
    d_alpha = -step * dg[1]
    db_alpha = A * (d_alpha * z_alpha.sigmoid()).sum(1)
    dA = (d_alpha * F.softplus(z_alpha)).sum(1)
    dW0 = dW0.unflatten(0, (-1, H)).sum(0).to(W0.dtype)
    return [dx, dq, dW0, dW, dg[0].sum(1), db_alpha, dA]


def self_modify(x, q, W, W0, b_eta, b_alpha, A, chunk, step):
    """`fused.self_modify` with static q and no momentum: all chunks of one layer, from a boundary.

    x, q [N, T, d] (N = batch x heads), W [N, 3d + 2, d], W0 [H, 3d + 2, d] with H heads, b_eta,
    b_alpha, A [N] -> y [N, T, d] with y_t = W_t q_t, W at the end, W at the last boundary.
    """
    narrow = [t.to(x.dtype).contiguous() for t in (x, q, W0)]
    wide = [t.float().contiguous() for t in (W, b_eta, b_alpha, A)]
    return tuple(_modify([*narrow, *wide], chunk, float(step))[:3])


# --------------------------------------------------------------------------------------------------
# Derivatives of the operators


def _differentiable(operator, gradients):
    """Register the backward of an operator: gradients(grads of results, kept, tensors, numbers)."""

    def save(ctx, inputs, output):
        x, *ctx.numbers = inputs
        ctx.tensors = len(x)
        ctx.shapes = [y.shape for y in output[:-1]]
        ctx.set_materialize_grads(False)  # zeros for what is kept would be as large as that
        ctx.save_for_backward(*x, *output[2:])

    def backward(ctx, grads):
        saved = ctx.saved_tensors  # asked for once only: a checkpoint computes them again
        x = saved[: ctx.tensors]
        kept = saved[ctx.tensors :]
        given = []
        for g, shape in zip(grads[:-1], ctx.shapes, strict=True):
            given.append(kept[0].new_zeros(shape) if g is None else g.contiguous())
        with torch.autocast(kept[0].device.type, enabled=False):
            return gradients(given, kept, x, *ctx.numbers), None, None

    operator.register_autograd(backward, setup_context=save)
    gradients.register_fake(lambda grads, kept, x, *numbers: [torch.empty_like(t) for t in x])


_differentiable(_scan, _scan_backward)
_differentiable(_modify, _modify_backward)


if __name__ == "__main__":  # apart, as the interpreter must be chosen before Triton is imported
    import subprocess
    import sys
    from pathlib import Path

    command = [sys.executable, Path(__file__).with_name("selfcheck.py"), *sys.argv[1:]]
    sys.exit(subprocess.call(command))
