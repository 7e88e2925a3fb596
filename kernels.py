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
inputs are 392) and 388 with self-modification (inputs 256).

Self-modification: with B = W0 + W at the chunk's start and all rows [memory | k | v | eta | alpha]
stacked,

    k, v = l2norm of the rows of B x + x        eta, alpha from its last two rows
    r    = X (B v - W0 k - a0 W k + v - k)      (v - k in the three square blocks only)

and the rest as above with S = 0. A chunk is cut into tiles of 16 tokens, which changes nothing:
k, v, eta, alpha of all of them come from B. In the backward dk, dv, deta, dalpha give dG [rows, C];
dx = B^T dG + dk + dv, and dG x^T + d v^T joins dW at the chunk's start. The backward of the read
alone is `_scan_local` with all tiles at once; dx and dW0 are plain batched products, left to torch.

Decisions:

- Tiles are held transposed, r^T [rows, C], so that the rows of the memory and not the few tokens
  fill the 64 rows of a Hopper matrix instruction. Otherwise Triton gives every warp a copy (255
  registers and spills at C = 32).
- X: forward substitution in all diagonal blocks of 16 at once, then doubling of the blocks by
  [[P, 0], [-R L P, R]]. The nilpotent product (I - L)(I + L^2)(I + L^4)... costs the same but takes
  powers of L: they reach 2^31 where a key repeats with eta = 2, while the inverse has entries of 2.
- States, X, decays and sums are float32. float32 operands of a product are split into three tf32
  products (input_precision "tf32x3", about 22 bits; plain tf32 has 11). Where x, q (in `scan`: k,
  u, q) are bfloat16 so are the operands, all but those of X.
- No atomics: runs are identical.
- First derivatives only: a second one raises RuntimeError; ask for backend="torch" there.
- Registers are what is scarce: 256 x 64 float32 weights fill a quarter of an SM's. So loops hoist
  nothing (disable_licm), what is needed twice far apart is loaded twice (the second time from a
  cache), sums join an accumulator with += of a product (with -= Triton keeps two), and weights go
  round the loop once more in the operands' type, which makes Triton hand them to products in shared
  memory.
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
def _inverse(L):
    """(I + tril(L, -1))^-1, as described at the top of this file."""
    C: tl.constexpr = L.shape[0]
    t = tl.arange(0, C)[:, None]
    s = tl.arange(0, C)[None, :]
    X = tl.where(t == s, 1.0, 0.0)
    for j in range(0, 15):  # column j of every block
        column = tl.sum(tl.where((s == t // 16 * 16 + j) & (t > s), L, 0.0), 1)
        row = tl.sum(tl.where(t == s // 16 * 16 + j, X, 0.0), 0)
        X -= tl.where(t // 16 == s // 16, column[:, None] * row[None, :], 0.0)
    for i in tl.static_range(4, 7):
        if 1 << i < C:  # from the inverses of blocks of 2^i rows to those of twice as many
            below = tl.where((t >> i + 1 == s >> i + 1) & (t >> i > s >> i), L, 0.0)
            X -= _dot(X, _dot(below, X, tl.float32), tl.float32)
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
def _square(p, j, C: tl.constexpr):
    """Where the j-th of the matrices p [..., C, C] lies."""
    return p + j * C * C + tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :]


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
COUNTS = ["T", "H", "rows", "chunk", "PER", "segments", "EVERY", "first", "tiles"]


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
            X = _inverse(d[:, None] * c0 * et[None, :] * _dot(tl.trans(K), K, TYPE))
            if AGAIN:
                tl.store(_square(X_kept, n * tiles + i - first, C), X)
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
            dr = _dot(dr, tl.load(_square(X_kept, kept, C)), tl.float32)
            dw += _dot((-d * a0)[None, :] * dr, tl.trans(K), TYPE)
            if MOMENTUM:
                dz += _dot((-d * b0)[None, :] * dr, tl.trans(K), TYPE)
        _put(du, dr, n * T, tok, ok, dv, v)
    _put_pair(dW, dw, dz, n, dv, dk, v, h, MOMENTUM)


@triton.jit(do_not_specialize=COUNTS)
def _scan_local(
    k, q, eta, alpha, theta, delta, dy, du, W_kept, r_kept, dW_kept,
    dk_out, dq, deta, dalpha, dtheta, ddelta,
    T, dv, dk, rows, wide, chunk, PER, first, tiles,
    C: tl.constexpr, DV: tl.constexpr, DK: tl.constexpr, MOMENTUM: tl.constexpr,
    DELTA: tl.constexpr, READ: tl.constexpr, WRITE: tl.constexpr,
):
    """The rest of the backward, all tiles at once: gradients of k, q and the series.

    Each block of rows has its own copy of them, to be summed. States have `rows` rows and r `wide`
    columns, of which these are the first dv. Not WRITE: the read only, and its part of du.
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
    tok, ok, last, begin = _tile(i, T, chunk, PER, C)
    K = _get(k, n * T, tok, ok, dk, h)
    et, al, A0, a0, c0, b0, a1, b1, c1, T0, t0, T1, t1 = _weights(
        eta, alpha, theta, n * T, tok, ok, C, MOMENTUM
    )
    r = _get(r_kept, kept * C - begin, tok, ok, wide, v)
    w, z = _get_pair(W_kept, kept, rows, dk, v, h, MOMENTUM)
    dK = tl.zeros([DK, C], tl.float32)
    dc1 = tl.zeros([C, C], tl.float32)
    det = tl.zeros([C], tl.float32)
    da = tl.zeros([C], tl.float32)
    db = da
    dt1 = da
    dT1 = dc1
    if WRITE:
        here = t == last
        dw = _get_state(dW_kept, kept * (1 + MOMENTUM), rows, dk, v, h)
        wr = _row(c1, last)
        dwr = tl.sum(_dot(dw, K, TYPE) * r, 0)
        dK += _dot(tl.trans(dw), (wr * et)[None, :] * r, TYPE)
        det += wr * dwr
        dc1 += tl.where(here[:, None], (et * dwr)[None, :], 0.0)
        da += tl.where(here, tl.sum(dw.to(tl.float32) * w.to(tl.float32)), 0.0)
        if MOMENTUM:
            # not earlier, for the registers are full
            dz = _get_state(dW_kept, kept * 2 + 1, rows, dk, v, h)
            wr = _row(T1, last)
            dwr = tl.sum(_dot(dz, K, TYPE) * r, 0)
            dK += _dot(tl.trans(dz), (wr * et)[None, :] * r, TYPE)
            det += wr * dwr
            dT1 += tl.where(here[:, None], (et * dwr)[None, :], 0.0)
            db += tl.where(here, tl.sum(dw.to(tl.float32) * z.to(tl.float32)), 0.0)
            dt1 += tl.where(here, tl.sum(dz.to(tl.float32) * z.to(tl.float32)), 0.0)
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
        if not WRITE:
            _put(du, _dot(dY, c1 * et[None, :] * QK, TYPE), n * T, tok, ok, dv, v)
        G = dM * QK
        dc1 += G * et[None, :]
        det += tl.sum(G * c1, 0)
        dM *= c1 * et[None, :]
        dK += _dot(Q, dM, TYPE)
        _put(dq, dQ + _dot(K, tl.trans(dM), TYPE), copy, tok, ok, dk, h)
    dc0 = al[:, None] * dc1
    da0 = al * da
    db0 = al * db
    if DELTA:  # through the errors
        tl.debug_barrier()  # loaded once more, for the registers are full
        K = _get(k, n * T, tok, ok, dk, h)
        r = _get(r_kept, kept * C - begin, tok, ok, wide, v)
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
# Self-modifying Titans with matrix memories: all rows [memory | k | v | eta | alpha] stacked and
# padded to 4 D


@triton.jit
def _blocks(G, lo: tl.constexpr, hi: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """Sum of the blocks lo..hi-1 of G [4 D, C], each [D, C]."""
    m = tl.arange(0, 4)[:, None, None]
    return tl.sum(tl.where((lo <= m) & (m < hi), tl.reshape(G, (4, D, C)), 0.0), 0)


@triton.jit
def _stack(x, k, v, eta, alpha, C: tl.constexpr, D: tl.constexpr):
    """[4 D, C]: x, k, v [D, C] in blocks 0, 1, 2; eta, alpha [C] in the first rows of block 3."""
    m = tl.arange(0, 4)[:, None, None]
    i = tl.arange(0, D)[None, :, None]
    gates = tl.where(i == 0, eta[None, None, :], tl.where(i == 1, alpha[None, None, :], 0.0))
    stacked = tl.where(
        m == 1, k[None], tl.where(m == 2, v[None], tl.where(m == 3, gates, x[None]))
    )
    return tl.reshape(stacked, (4 * D, C))


@triton.jit(do_not_specialize=COUNTS)
def _modify_forward(
    x, q, W0, W, b_eta, b_alpha, A, y, W_T, W_last, W_kept, K_kept, V_kept, g_kept, r_kept, X_kept,
    T, H, step, chunk, PER, segments, EVERY, first, tiles,
    C: tl.constexpr, D: tl.constexpr, AGAIN: tl.constexpr,
):
    """One memory n; PER tiles make a chunk, else as `_scan_forward`."""
    TYPE: tl.constexpr = x.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    R = 3 * D + 2
    NT = tl.num_programs(0).to(tl.int64) * T
    row = tl.arange(0, 4 * D)
    col = tl.arange(0, D)
    lo = first + tl.program_id(1) * EVERY
    hi = tl.minimum(lo + EVERY, first + tiles) if AGAIN else tiles
    every = 1 if AGAIN else EVERY
    w = _get_state(W, n * segments + lo // EVERY % segments, R, D, row, col)
    be = tl.load(b_eta + n)
    ba = tl.load(b_alpha + n)
    rate = step * tl.load(A + n)
    narrow = w.to(TYPE)  # carried round the loop: products get it in shared memory, not registers
    B = narrow
    for i in tl.range(lo, hi, disable_licm=True):
        tok, ok, last, begin = _tile(i, T, chunk, PER, C)
        if i % PER == 0:
            B = (_get_state(W0, n % H, R, D, row, col).to(tl.float32) + w).to(TYPE)
        if i % every == 0:
            kept = n * tl.cdiv(tiles, every) + (i - first) // every
            _put_state(W_kept, w, kept, R, D, row, col)
        if not AGAIN:
            if i == (tiles - 1) // PER * PER:
                _put_state(W_last, w, n, R, D, row, col)
        # generate from the boundary weights
        xs = _get(x, n * T, tok, ok, D, col)
        G = _dot(B, xs, TYPE)
        K = _blocks(G, 1, 2, C, D) + xs
        V = _blocks(G, 2, 3, C, D) + xs
        nk = tl.rsqrt(tl.sum(K * K, 0) + 1e-6)
        nv = tl.rsqrt(tl.sum(V * V, 0) + 1e-6)
        K = K * nk[None, :]
        V = V * nv[None, :]
        z_eta = tl.sum(tl.where((row == 3 * D)[:, None], G, 0.0), 0) + be
        z_alpha = tl.sum(tl.where((row == 3 * D + 1)[:, None], G, 0.0), 0) + ba
        al = tl.where(ok, tl.exp(-rate * _softplus(z_alpha)), 1.0)
        et = tl.where(ok, step * (1.0 + al) * tl.sigmoid(z_eta), 0.0)
        if AGAIN:
            _put(K_kept, K, n * T, tok, ok, D, col)
            _put(V_kept, V, n * T, tok, ok, D, col)
            series = (et, al, z_eta, z_alpha, nk, nv)
            for m in tl.static_range(6):
                tl.store(g_kept + m * NT + n * T + tok, series[m], mask=ok)
        # the errors of all rows; of M(z) = z + (W0 + W) z the z is added by itself, so that it
        # never is rounded with W0
        A0, a0 = _decay(al)
        X = _inverse(A0 * et[None, :] * _dot(tl.trans(K), K, TYPE))
        own = V - K
        none = tl.zeros([C], tl.float32)
        r = _stack(own, own, own, none, none, C, D) + _dot(B, V, TYPE)
        r += _dot(_get_state(W0, n % H, R, D, row, col), -K, TYPE)
        r += _dot(narrow, -a0[None, :] * K, TYPE)
        r = _dot(r, tl.trans(X), tl.float32)
        A1 = al[:, None] * A0 + tl.where(tok[:, None] == tok[None, :], 1.0, 0.0)
        if AGAIN:
            _put(r_kept, r, (n * tiles + i - first) * C - begin, tok, ok, 4 * D, row)
            tl.store(_square(X_kept, n * tiles + i - first, C), X)
        else:  # read
            Q = _get(q, n * T, tok, ok, D, col)
            M = A1 * et[None, :] * _dot(tl.trans(Q), K, TYPE)
            Y = (al * a0)[None, :] * _dot(narrow, Q, TYPE)
            _put(y, Y + _dot(r, tl.trans(M), TYPE), n * T, tok, ok, D, row)
        # write
        w = _row(al * a0, last) * w + _dot(
            (_row(A1, last) * et)[None, :] * r, tl.trans(K), TYPE
        )
        narrow = w.to(TYPE)
    if not AGAIN:
        _put_state(W_T, w, n, R, D, row, col)


@triton.jit(do_not_specialize=COUNTS)
def _modify_chain(
    x, q, W0, A, dy, W_kept, K_kept, V_kept, g_kept, r_kept, X_kept,
    dr_read, dk_read, dgates, dW, d_all, dG_all, T, H, step, chunk, PER, first, tiles,
    C: tl.constexpr, D: tl.constexpr,
):
    """Backward through generation, errors and write of one memory n, tile by tile in reverse.

    Updated in place: dW, and dgates, from the gradients of eta and alpha in the read to those of
    z_eta and log alpha.
    """
    TYPE: tl.constexpr = x.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    R = 3 * D + 2
    NT = tl.num_programs(0).to(tl.int64) * T
    row = tl.arange(0, 4 * D)
    col = tl.arange(0, D)
    t = tl.arange(0, C)
    # d_all and dG_all hold tokens from `before` on; `held`: where their row of token 0 would be
    before = first // PER * chunk
    held = n * (tl.minimum(T, tl.cdiv(first + tiles, PER) * chunk) - before) - before
    dw = _get_state(dW, n, R, D, row, col)
    narrow = dw.to(TYPE)
    rate = step * tl.load(A + n)
    for back in tl.range(1, tiles + 1, disable_licm=True):
        i = first + tiles - back
        kept = n * tiles + tiles - back
        tok, ok, last, begin = _tile(i, T, chunk, PER, C)
        g = g_kept + n * T + tok
        dg = dgates + n * T + tok
        et = tl.load(g, mask=ok, other=0.0)
        al = tl.load(g + NT, mask=ok, other=1.0)
        A0, a0 = _decay(al)
        A1 = al[:, None] * A0 + tl.where(t[:, None] == t[None, :], 1.0, 0.0)
        K = _get(K_kept, n * T, tok, ok, D, col)
        r = _get(r_kept, kept * C - begin, tok, ok, 4 * D, row)
        # through the write, then the solve
        wr = _row(A1, last)
        dr = _dot(narrow, K, TYPE)
        dwr = tl.sum(dr * r, 0)
        d = dr * (wr * et)[None, :] + _get(dr_read, n * T, tok, ok, D, row)
        d = _dot(d, tl.load(_square(X_kept, kept, C)), tl.float32).to(TYPE)
        _put(d_all, d, held, tok, ok, 4 * D, row)
        dK = _get(dk_read, n * T, tok, ok, D, col)
        dK += _dot(tl.trans(narrow), (wr * et)[None, :] * r, TYPE)
        # dM = -d^T r by 32 rows in every warp: the few tokens would give each warp all of d and r
        parts = tl.permute(tl.reshape(d, (D // 8, 32, C)), (0, 2, 1))
        dM = -tl.sum(_dot(parts, tl.reshape(r, (D // 8, 32, C)), TYPE), 0)
        # through the errors
        w = _get_state(W_kept, kept, R, D, row, col)
        da = tl.where(t == last, tl.sum(dw * w.to(tl.float32)), 0.0)
        dw = _row(al * a0, last) * dw + _dot(-a0[None, :] * d, tl.trans(K), TYPE)
        a1dY = (al * a0)[None, :] * _get(dy, n * T, tok, ok, D, row)
        dw += _dot(a1dY, tl.trans(_get(q, n * T, tok, ok, D, col)), TYPE)
        part = _dot(tl.trans(w), d, TYPE)
        dV = _blocks(d.to(tl.float32), 0, 3, C, D)
        dV += _dot(tl.trans(_get_state(W0, n % H, R, D, row, col)), d, TYPE)
        dK -= dV + a0[None, :] * part
        dV += _dot(tl.trans(_get_state(W_kept, kept - i % PER, R, D, row, col)), d, TYPE)
        da0 = al * da - tl.sum(part * K, 0)
        tl.debug_barrier()
        K = _get(K_kept, n * T, tok, ok, D, col)
        G = dM * _dot(tl.trans(K), K, TYPE)
        dM *= A0 * et[None, :]
        dK += _dot(K, dM + tl.trans(dM), TYPE)
        # through step sizes and retention; loaded once more, for the registers are full
        tl.debug_barrier()
        et = tl.load(g, mask=ok, other=0.0)
        al = tl.load(g + NT, mask=ok, other=1.0)
        A0, a0 = _decay(al)
        dA1 = tl.where(t[:, None] == last, (et * dwr)[None, :], 0.0)
        det = wr * dwr + tl.sum(G * A0, 0) + tl.load(dg, mask=ok, other=0.0)
        dal = da * a0 + tl.sum(dA1 * A0, 1)
        dal = dal + _decay_gradient(A0, a0, al[:, None] * dA1 + G * et[None, :], da0)
        z_eta = tl.load(g + 2 * NT, mask=ok, other=0.0)
        z_alpha = tl.load(g + 3 * NT, mask=ok, other=0.0)
        sig = tl.sigmoid(z_eta)
        dal = dal + tl.load(dg + NT, mask=ok, other=0.0) + step * det * sig
        dal = tl.where(ok, dal, 0.0) * al  # of log alpha
        d_eta = tl.where(ok, step * det * (1.0 + al) * sig * (1.0 - sig), 0.0)
        d_alpha = -rate * dal * tl.sigmoid(z_alpha)
        # every warp has a copy of these few numbers: none may store before all have loaded
        tl.debug_barrier()
        tl.store(dg, d_eta, mask=ok)
        tl.store(dg + NT, dal, mask=ok)
        # through the generation from the boundary weights
        V = _get(V_kept, n * T, tok, ok, D, col)
        nk = tl.load(g + 4 * NT, mask=ok, other=0.0)
        nv = tl.load(g + 5 * NT, mask=ok, other=0.0)
        dK = (dK - K * tl.sum(dK * K, 0)[None, :]) * nk[None, :]
        dV = (dV - V * tl.sum(dV * V, 0)[None, :]) * nv[None, :]
        dG = _stack(tl.zeros_like(dK), dK, dV, d_eta, d_alpha, C, D)
        _put(dG_all, dG, held, tok, ok, 4 * D, row)
        if i % PER == 0:  # all that was generated in this chunk came from the weights at its start
            tl.debug_barrier()
            for j in range(0, PER):
                tok, ok, _, _ = _tile(i + j, T, chunk, PER, C)
                v = _get(V_kept, n * T, tok, ok, D, col)
                xs = _get(x, n * T, tok, ok, D, col)
                dw += _dot(_get(d_all, held, tok, ok, 4 * D, row), tl.trans(v), TYPE)
                dw += _dot(_get(dG_all, held, tok, ok, 4 * D, row), tl.trans(xs), TYPE)
        narrow = dw.to(TYPE)
    _put_state(dW, dw, n, R, D, row, col)


# --------------------------------------------------------------------------------------------------
# Launches. Both operators take a list of tensors (absent ones are empty) and return a list:
# results, then the states that are kept

# Tiles from one kept state to the next: keeping all takes 8 times as much, and the backward has
# 1/8 of the parallel work it had then.
EVERY = 8
SPAN = 64  # tiles whose states the backward holds at once, a multiple of EVERY
# Major compute capabilities whose matrix instructions take their operands from registers, which
# three tf32 products of float32 ones overflow: for heads of 64 a thread spills up to 12 KB in
# `scan` on 8.0. Half the rows and tokens at once cut that to 0.3 KB.
CROWDED = (8, 12)
# one stage, no loads ahead: shared memory is full of operands
LAUNCH = {"scan": dict(num_warps=4, num_stages=1), "modify": dict(num_warps=8, num_stages=1)}


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
            T, dv, dk, dv, dv, C, 1, first, tiles, **constants, WRITE=True,
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
        # The backward takes 160 KiB of shared memory on 9.0. On 8.0 it spills 9 KB a thread; 8.6,
        # 8.9 and 12.0 lack its 128 KiB; for 10.0 Triton 3.9 compiles it to nothing.
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


def _chunks(T, chunk):
    """Tokens of a tile, tiles of a chunk, tiles of T tokens, tiles between kept states."""
    C = 16
    per = triton.cdiv(chunk, C)
    tiles = T // chunk * per + triton.cdiv(T % chunk, C)
    return C, per, tiles, per * max(1, EVERY // per)


@torch.library.custom_op("nested_learning::modify", mutates_args=())
@on_its_device
def _modify(x: list[Tensor], chunk: int, step: float) -> list[Tensor]:
    """y [N, T, d] with y_t = W_t q_t, W at the end, W at the last boundary, and W where it is kept.

    x: x, q [N, T, d], W0 [H, 3d + 2, d], W [N, 3d + 2, d], then b_eta, b_alpha, A [N].
    """
    out = _modify_fake(x, chunk, step)
    N, T, D = x[0].shape
    C, per, tiles, every = _chunks(T, chunk)
    unused = (*out, out[0])  # what only the backward writes
    _modify_forward[(N,)](
        *x, *out, *unused, T, len(x[2]), step, chunk, per, 1, every, 0, tiles,
        C=C, D=D, **LAUNCH["modify"], AGAIN=False,
    )
    return out


@_modify.register_fake
def _modify_fake(x, chunk, step):
    _, _, tiles, every = _chunks(x[0].shape[1], chunk)
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
    C, per, all_tiles, every = _chunks(T, chunk)
    dx = torch.empty_like(x)
    dq = torch.empty_like(q)
    dW0 = torch.zeros_like(W)
    K, V, dr, dk = (torch.empty_like(x) for _ in range(4))
    g = W.new_empty(6, N, T)  # eta, alpha, z_eta, z_alpha and the norms of k and v
    dg = W.new_empty(2, N, T)
    none = W  # for arguments that are not used
    modify = dict(C=C, D=D, **LAUNCH["modify"])
    read = dict(C=C, DV=D, DK=D, MOMENTUM=0, DELTA=0, READ=True, WRITE=False, **LAUNCH["scan"])
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
        W_all = x.new_empty(N, tiles, R, D)
        X = W.new_empty(N, tiles, C, C)
        r = x.new_empty(N, tiles * C, 4 * D)
        d = x.new_empty(N, hi - lo, 4 * D)
        dG = torch.empty_like(d)
        _modify_forward[(N, triton.cdiv(tiles, every))](
            x, q, W0, states, b_eta, b_alpha, A, none, none, none, W_all, K, V, g, r, X,
            T, H, step, chunk, per, states.shape[1], every, first, tiles, **modify, AGAIN=True,
        )
        _scan_local[(N, 1, tiles)](
            K, q, g[0], g[1], none, none, dy, dr, W_all, r, none, dk, dq, dg[0], dg[1], none, none,
            T, D, D, R, 4 * D, chunk, per, first, tiles, **read,
        )
        _modify_chain[(N,)](
            x, q, W0, A, dy, W_all, K, V, g, r, X, dr, dk, dg, dW, d, dG,
            T, H, step, chunk, per, first, tiles, **modify,
        )
        # what is left are plain products, for all chunks at once
        now = slice(lo, hi)
        B = W0.repeat(N // H, 1, 1)[:, None] + W_all[:, ::per]  # [N, chunks, R, D]
        through_B = (dG[..., :R].unflatten(1, (B.shape[1], -1)) @ B).flatten(1, 2)
        dx[:, now] = through_B + sum(dG.split(D, 2)[1:3])
        dW0 += (d.mT @ (V[:, now] - K[:, now]) + dG.mT @ x[:, now])[:, :R]
        if first == tail:
            dW += d_last
    z_alpha = g[3]
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
