"""The fused chunk update in Triton: `memory.scan` and the chunk step of `titans.SelfModifyingTitans`, forward and backward.

In torch every chunk is dozens of small kernels that wait for each other. Here one program keeps the fast weights of one
(batch, head) on chip and walks all its tiles in one launch. memory.py and titans.py define what is computed and are the
tests' oracles; this file repeats their algebra for tokens t, s = 0..C-1 of a tile, l the last of them:

    A0[t, s] = prod_{s < i < t} alpha_i  (s < t, else 0)   a0[t] = prod_{i < t} alpha_i     before token t; T0, t0 from theta
    A1 = alpha A0 + I      a1 = alpha a0                   T1 = theta T0 + I      t1 = theta t0                after token t
    c0 = A0 T1             b0 = A0 t1                      c1 = alpha c0 + T1     b1 = alpha b0 + t1   (plain: c0 = A0, T1 = I)

    forward    X  = (I + delta c0 eta ∘ K K^T)^-1                    r = X (u - delta (a0 K W^T + b0 K S^T))
               y  = a1 Q W^T + b1 Q S^T + (c1 eta ∘ Q K^T) r
               W' = a1[l] W + b1[l] S + (c1[l] eta r)^T K            S' = t1[l] S + (T1[l] eta r)^T K

    backward   d  = X^T (c1[l] eta K dW'^T + T1[l] eta K dS'^T + (c1 eta ∘ Q K^T)^T dy) = du
    (chain)    dW = a1[l] dW' + (a1 dy)^T Q - (delta a0 d)^T K       dS = b1[l] dW' + t1[l] dS' + (b1 dy)^T Q - (delta b0 d)^T K

    (local)    M  = (dy r^T) ∘ c1 eta      N = -(d r^T) ∘ delta c0 eta
               dQ = a1 dy W + b1 dy S + M K
               dK = c1[l] eta r dW' + T1[l] eta r dS' + M^T Q + (N + N^T) K - delta (a0 d W + b0 d S)
               dc1 = (dy r^T) ∘ (Q K^T) eta, row l: + eta (K dW'^T . r)      da1 = Q . dy W,    at l: + <dW', W>
               dc0 = -(d r^T) ∘ (K K^T) delta eta + alpha dc1                da0 = -delta K . d W + alpha da1
               and through a product of decays, without a division (exact at 0, finite at 1e-30):
               d alpha_i = sum_s (A0^T dA0 ∘ A0)[i, s] + a0_i (A0^T da0)_i + (what alpha in A1, a1 gets directly)

Only the chain must walk the tiles in reverse; everything local runs for all tiles at once. The forward keeps W and S at
every EVERY-th tile; the backward computes the states between again ("again"), all segments at once, and holds at most
SPAN tiles of them, whatever T. So what stays from forward to backward is 1/EVERY of the states, a few percent of the inputs.

Self-modification: with B = W0 + W at the chunk's start and all rows [memory | k | v | eta | alpha] stacked,

    k, v = l2norm of the rows of B x + x;   eta, alpha from its last two rows;   r = X (B v - W0 k - a0 W k + v - k)

(v - k in the three square blocks), the rest as above with S = 0. A chunk is cut into tiles of 16 tokens, which changes
nothing: k, v, eta, alpha of all of them come from B. Backward: dk, dv, deta, dalpha give dG [rows, C], dx = B^T dG + dk +
dv, and dG x^T + d v^T joins dW at the chunk's start. What depends only on the read goes into "again"; dW0 is summed last.

Decisions. Tiles are held transposed, r^T [rows, C], so that the rows of the memory and not the few tokens fill the 64
rows of a Hopper matrix instruction; otherwise Triton gives every warp a copy (255 registers and spills at C = 32).
X: forward substitution in all diagonal blocks of 16 at once, then doubling of the blocks by [[P, 0], [-R L P, R]]. The
nilpotent product (I - L)(I + L^2)(I + L^4)... costs the same but takes powers of L: they reach 2^31 where a key repeats
with eta = 2, while the inverse has entries of 2. States, X, decays and sums are float32. float32 operands of a product are
split into three tf32 products (input_precision "tf32x3", about 22 bits; plain tf32 has 11); where x, q (k, u, q) are
bfloat16 so are the operands, all but those of X. No atomics: runs are identical. First derivatives only: a second one
raises RuntimeError; ask for backend="torch" there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------------------
# Algebra of one tile, on chip

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: kernels run on the CPU, for tests


@triton.jit
def _dot(a, b, TYPE: tl.constexpr):
    """a @ b of operands rounded to TYPE, summed in float32. float32 operands become three tf32 products, never one."""
    a, b = a.to(TYPE), b.to(TYPE)
    if INTERPRETED:  # the interpreter would multiply the bits of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _decay(x, C: tl.constexpr):
    """x [C] -> P [C, C], P[t, s] = prod_{s < i < t} x_i below the diagonal, else 0; p[t] = prod_{i < t} x_i."""
    t, s = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    before = tl.sum(tl.where(s == t - 1, x[None, :], tl.where((t == 0) & (s == 0), 1.0, 0.0)), 1)  # x[t-1], and 1 at t = 0
    P = tl.cumprod(tl.where(s < t - 1, before[:, None], 1.0), 0)
    return tl.where(s < t, P, 0.0), tl.cumprod(before, 0)


@triton.jit
def _decay_gradient(P, p, dP, dp):
    """d x_i = sum_{s < i < t} P[t, i] dP[t, s] P[i, s] + sum_{i < t} P[t, i] dp[t] p[i]. No division, exact at zeros."""
    return tl.sum(_dot(tl.trans(P), dP, tl.float32) * P, 1) + p * tl.sum(P * dp[:, None], 0)


@triton.jit
def _inverse(L, C: tl.constexpr):
    """(I + tril(L, -1))^-1: forward substitution in all diagonal blocks of 16 at once, then doubling of the blocks."""
    t, s = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
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
def _row(M, last, C: tl.constexpr):
    """Row `last` of M [C, n], or element `last` of a vector."""
    here = tl.arange(0, C) == last
    return tl.sum(tl.where(here if len(M.shape) == 1 else here[:, None], M, 0.0), 0)


@triton.jit
def _weights(alpha, theta, tok, ok, C: tl.constexpr, MOMENTUM: tl.constexpr):
    """What W_t holds of the past: alpha, A0, a0, theta, T0, t0, T1, c0, b0, c1 of the equations at the top."""
    t, s = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    al = tl.load(alpha + tok, mask=ok, other=1.0)
    A0, a0 = _decay(al, C)
    one = tl.where(t == s, 1.0, 0.0)
    th, T0, t0, T1, c0, b0 = al, A0, a0, one, A0, a0
    if MOMENTUM:
        th = tl.load(theta + tok, mask=ok, other=1.0)
        T0, t0 = _decay(th, C)
        T1 = th[:, None] * T0 + one
        c0 = tl.where(s < t, _dot(A0, T1, tl.float32), 0.0)
        b0 = tl.sum(A0 * (th * t0)[None, :], 1)
    return al, A0, a0, th, T0, t0, T1, c0, b0, al[:, None] * c0 + T1


@triton.jit
def _at(n, tok, T, width, cols):
    """Offsets of rows tok, columns cols in [N, T, width], and which of them exist; both [cols, tok], transposed."""
    return (n * T + tok)[None, :] * width + cols[:, None], (tok < T)[None, :] & (cols < width)[:, None]


@triton.jit
def _tile(n, i, T, dk, dv, h, v, C: tl.constexpr):
    """Tile i of memory n: offsets in the series, which of its tokens there are, the last; then `_at` of keys and of values."""
    tok = i * C + tl.arange(0, C)
    kat, kok = _at(n, tok, T, dk, h)
    vat, vok = _at(n, tok, T, dv, v)
    return n * T + tok, tok < T, tl.minimum(T - i * C, C) - 1, kat, kok, vat, vok


@triton.jit
def _factor(delta, gate, ok, C: tl.constexpr, DELTA: tl.constexpr):
    """delta [C]: 1 for the plain rule (DELTA 1), else its series (2)."""
    d = tl.full([C], 1.0, tl.float32)
    if DELTA == 2:
        d = tl.load(delta + gate, mask=ok, other=0.0)
    return d


# ---------------------------------------------------------------------------------------------------------------------
# The learning rule


@triton.jit
def _scan_forward(W, S, k, u, q, eta, alpha, theta, delta, y, W_T, S_T, W_kept, S_kept, r_kept, X_kept,
                  T, dv, dk, EVERY, first, tiles, C: tl.constexpr, DV: tl.constexpr, DK: tl.constexpr, TYPE: tl.constexpr,
                  MOMENTUM: tl.constexpr, DELTA: tl.constexpr, READ: tl.constexpr, AGAIN: tl.constexpr):  # fmt: skip
    """Rows [j DV, (j + 1) DV) of one memory n. AGAIN: only one segment, from the state kept at its start, for the backward."""
    n, j = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v, h, t = j * DV + tl.arange(0, DV), tl.arange(0, DK), tl.arange(0, C)
    at, real = v[:, None] * dk + h[None, :], (v < dv)[:, None] & (h < dk)[None, :]
    start, size, segments = n, dv * dk, tl.cdiv(tl.cdiv(T, C), EVERY)
    lo, hi = 0, tl.cdiv(T, C)
    if AGAIN:
        segment = first // EVERY + tl.program_id(2)
        start = n * segments + segment
        lo, hi = segment * EVERY, tl.minimum(segment * EVERY + EVERY, hi)
    w = tl.load(W + start * size + at, mask=real, other=0.0)
    z = w
    if MOMENTUM:
        z = tl.load(S + start * size + at, mask=real, other=0.0)
    for i in range(lo, hi):
        kept = n * tiles + i - first
        gate, ok, last, kat, kok, vat, vok = _tile(n, i, T, dk, dv, h, v, C)
        K = tl.load(k + kat, mask=kok, other=0.0)
        r = tl.load(u + vat, mask=vok, other=0.0).to(tl.float32)
        et = tl.load(eta + gate, mask=ok, other=0.0)
        al, A0, a0, th, T0, t0, T1, c0, b0, c1 = _weights(alpha, theta, gate, ok, C, MOMENTUM)
        if AGAIN:
            tl.store(W_kept + kept * size + at, w, mask=real)
            if MOMENTUM:
                tl.store(S_kept + kept * size + at, z, mask=real)
        elif i % EVERY == 0:
            checkpoint = (n * segments + i // EVERY) * size
            tl.store(W_kept + checkpoint + at, w, mask=real)
            if MOMENTUM:
                tl.store(S_kept + checkpoint + at, z, mask=real)
        if DELTA:
            d = _factor(delta, gate, ok, C, DELTA)
            X = _inverse(d[:, None] * c0 * et[None, :] * _dot(tl.trans(K), K, TYPE), C)
            r -= (d * a0)[None, :] * _dot(w, K, TYPE)
            if MOMENTUM:
                r -= (d * b0)[None, :] * _dot(z, K, TYPE)
            r = _dot(r, tl.trans(X), tl.float32)
            if AGAIN:
                tl.store(X_kept + (kept * C + t[:, None]) * C + t[None, :], X)
        if AGAIN:
            tl.store(r_kept + (kept * C + t[None, :]) * dv + v[:, None], r, mask=(v < dv)[:, None])
        if READ:
            Q = tl.load(q + kat, mask=kok, other=0.0)
            Y = (al * a0)[None, :] * _dot(w, Q, TYPE)
            if MOMENTUM:
                Y += (al * b0 + th * t0)[None, :] * _dot(z, Q, TYPE)
            Y += _dot(r, tl.trans(c1 * et[None, :] * _dot(tl.trans(Q), K, TYPE)), TYPE)
            tl.store(y + vat, Y, mask=vok)
        w = _row(al * a0, last, C) * w + _dot((_row(c1, last, C) * et)[None, :] * r, tl.trans(K), TYPE)
        if MOMENTUM:
            w += _row(al * b0 + th * t0, last, C) * z
            z = _row(th * t0, last, C) * z + _dot((_row(T1, last, C) * et)[None, :] * r, tl.trans(K), TYPE)
    if not AGAIN:
        tl.store(W_T + n * size + at, w, mask=real)
        if MOMENTUM:
            tl.store(S_T + n * size + at, z, mask=real)


@triton.jit
def _scan_chain(k, q, eta, alpha, theta, delta, dy, X_kept, dW, dS, dW_kept, dS_kept, du, T, dv, dk, first, tiles,
                C: tl.constexpr, DV: tl.constexpr, DK: tl.constexpr, TYPE: tl.constexpr, MOMENTUM: tl.constexpr,
                DELTA: tl.constexpr, READ: tl.constexpr):  # fmt: skip
    """The part of the backward that must walk the tiles in reverse: dW, dS (updated in place) and du."""
    n, j = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v, h, t = j * DV + tl.arange(0, DV), tl.arange(0, DK), tl.arange(0, C)
    at, real = v[:, None] * dk + h[None, :], (v < dv)[:, None] & (h < dk)[None, :]
    size = dv * dk
    dw = tl.load(dW + n * size + at, mask=real, other=0.0)
    dz = dw
    if MOMENTUM:
        dz = tl.load(dS + n * size + at, mask=real, other=0.0)
    for back in range(0, tiles):
        i = first + tiles - 1 - back
        kept = n * tiles + i - first
        gate, ok, last, kat, kok, vat, vok = _tile(n, i, T, dk, dv, h, v, C)
        K = tl.load(k + kat, mask=kok, other=0.0)
        et = tl.load(eta + gate, mask=ok, other=0.0)
        al, A0, a0, th, T0, t0, T1, c0, b0, c1 = _weights(alpha, theta, gate, ok, C, MOMENTUM)
        tl.store(dW_kept + kept * size + at, dw, mask=real)
        dr = (_row(c1, last, C) * et)[None, :] * _dot(dw, K, TYPE)
        dw_next = _row(al * a0, last, C) * dw
        if MOMENTUM:
            tl.store(dS_kept + kept * size + at, dz, mask=real)
            dr += (_row(T1, last, C) * et)[None, :] * _dot(dz, K, TYPE)
            dz = _row(th * t0, last, C) * dz + _row(al * b0 + th * t0, last, C) * dw
        if READ:
            Q = tl.load(q + kat, mask=kok, other=0.0)
            dY = tl.load(dy + vat, mask=vok, other=0.0)
            dr += _dot(dY, c1 * et[None, :] * _dot(tl.trans(Q), K, TYPE), TYPE)
            dw_next += _dot((al * a0)[None, :] * dY, tl.trans(Q), TYPE)
            if MOMENTUM:
                dz += _dot((al * b0 + th * t0)[None, :] * dY, tl.trans(Q), TYPE)
        dw = dw_next
        if DELTA:
            d = _factor(delta, gate, ok, C, DELTA)
            dr = _dot(dr, tl.load(X_kept + (kept * C + t[:, None]) * C + t[None, :]), tl.float32)
            dw -= _dot((d * a0)[None, :] * dr, tl.trans(K), TYPE)
            if MOMENTUM:
                dz -= _dot((d * b0)[None, :] * dr, tl.trans(K), TYPE)
        tl.store(du + vat, dr, mask=vok)
    tl.store(dW + n * size + at, dw, mask=real)
    if MOMENTUM:
        tl.store(dS + n * size + at, dz, mask=real)


@triton.jit
def _scan_local(k, q, eta, alpha, theta, delta, dy, du, W_kept, S_kept, r_kept, dW_kept, dS_kept,
                dk_out, dq, deta, dalpha, dtheta, ddelta, T, dv, dk, first, tiles,
                C: tl.constexpr, DV: tl.constexpr, DK: tl.constexpr, TYPE: tl.constexpr, MOMENTUM: tl.constexpr,
                DELTA: tl.constexpr, READ: tl.constexpr):  # fmt: skip
    """The rest of the backward, all tiles at once: gradients of k, q and the series, a share per block of rows."""
    n, j, i = tl.program_id(0).to(tl.int64), tl.program_id(1), first + tl.program_id(2)
    v, h, t = j * DV + tl.arange(0, DV), tl.arange(0, DK), tl.arange(0, C)
    at, real = v[:, None] * dk + h[None, :], (v < dv)[:, None] & (h < dk)[None, :]
    share, size = j * tl.num_programs(0) * T, dv * dk
    kept = n * tiles + i - first
    gate, ok, last, kat, kok, vat, vok = _tile(n, i, T, dk, dv, h, v, C)
    K = tl.load(k + kat, mask=kok, other=0.0)
    et = tl.load(eta + gate, mask=ok, other=0.0)
    al, A0, a0, th, T0, t0, T1, c0, b0, c1 = _weights(alpha, theta, gate, ok, C, MOMENTUM)
    r = tl.load(r_kept + (kept * C + t[None, :]) * dv + v[:, None], mask=(v < dv)[:, None], other=0.0)
    w = tl.load(W_kept + kept * size + at, mask=real, other=0.0)
    dw = tl.load(dW_kept + kept * size + at, mask=real, other=0.0)
    # through the write
    here = t == last
    wr = _row(c1, last, C)
    dwr = tl.sum(_dot(dw, K, TYPE) * r, 0)
    det = wr * dwr
    dK = _dot(tl.trans(dw), (wr * et)[None, :] * r, TYPE)
    dc1 = tl.where(here[:, None], (et * dwr)[None, :], 0.0)
    da = tl.where(here, tl.sum(dw.to(tl.float32) * w.to(tl.float32)), 0.0)
    db, dT1, dt1, z = da, dc1, da, w
    if MOMENTUM:
        z = tl.load(S_kept + kept * size + at, mask=real, other=0.0)
        dz = tl.load(dS_kept + kept * size + at, mask=real, other=0.0)
        wr = _row(T1, last, C)
        dwr = tl.sum(_dot(dz, K, TYPE) * r, 0)
        det += wr * dwr
        dK += _dot(tl.trans(dz), (wr * et)[None, :] * r, TYPE)
        dT1 = tl.where(here[:, None], (et * dwr)[None, :], 0.0)
        db = tl.where(here, tl.sum(dw.to(tl.float32) * z.to(tl.float32)), 0.0)
        dt1 = tl.where(here, tl.sum(dz.to(tl.float32) * z.to(tl.float32)), 0.0)
    # through the read
    if READ:
        Q = tl.load(q + kat, mask=kok, other=0.0)
        dY = tl.load(dy + vat, mask=vok, other=0.0)
        part = _dot(tl.trans(w), dY, TYPE)
        dQ = (al * a0)[None, :] * part
        da += tl.sum(part * Q, 0)
        if MOMENTUM:
            part = _dot(tl.trans(z), dY, TYPE)
            dQ += (al * b0 + th * t0)[None, :] * part
            db += tl.sum(part * Q, 0)
        dM = _dot(tl.trans(dY), r, TYPE)
        G = dM * _dot(tl.trans(Q), K, TYPE)
        dc1 += G * et[None, :]
        det += tl.sum(G * c1, 0)
        dM *= c1 * et[None, :]
        dK += _dot(Q, dM, TYPE)
        tl.store(dq + share * dk + kat, dQ + _dot(K, tl.trans(dM), TYPE), mask=kok)
    # through the errors
    dc0, da0, db0 = al[:, None] * dc1, al * da, al * db
    if DELTA:
        d = _factor(delta, gate, ok, C, DELTA)
        dr = tl.load(du + vat, mask=vok, other=0.0)
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
            tl.store(ddelta + share + gate, dd + tl.sum(G * c0 * et[None, :], 1), mask=ok)
        dM *= d[:, None] * c0 * et[None, :]
        dK += _dot(K, dM + tl.trans(dM), TYPE)
    tl.store(dk_out + share * dk + kat, dK, mask=kok)
    tl.store(deta + share + gate, det, mask=ok)
    # through the weights c = P_alpha P_theta
    dal = da * a0 + tl.sum(dc1 * c0, 1)
    dA0 = dc0
    if MOMENTUM:
        dal += db * b0
        dt1 += db + tl.sum(A0 * db0[:, None], 0)
        dT1 += dc1 + _dot(tl.trans(A0), dc0, tl.float32)
        dA0 = _dot(dc0, tl.trans(T1), tl.float32) + db0[:, None] * (th * t0)[None, :]
        dth = dt1 * t0 + tl.sum(dT1 * T0, 1) + _decay_gradient(T0, t0, th[:, None] * dT1, th * dt1)
        tl.store(dtheta + share + gate, dth, mask=ok)
    tl.store(dalpha + share + gate, dal + _decay_gradient(A0, a0, dA0, da0), mask=ok)


# ---------------------------------------------------------------------------------------------------------------------
# Self-modifying Titans with matrix memories, all rows [memory | k | v | eta | alpha] stacked and padded to R = 4 D


@triton.jit
def _block(G, m: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """Rows [m D, (m + 1) D) of G [4 D, C]."""
    here = tl.arange(0, 4)[:, None, None] == m
    return tl.sum(tl.where(here, tl.reshape(G, (4, D, C)), 0.0), 0)


@triton.jit
def _stack(k, v, eta, alpha, C: tl.constexpr, D: tl.constexpr):
    """[4 D, C] with k, v [D, C] in blocks 1 and 2, eta, alpha [C] in the first rows of block 3, zeros elsewhere."""
    m, i = tl.arange(0, 4)[:, None, None], tl.arange(0, D)[None, :, None]
    gates = tl.where(i == 0, eta[None, None, :], tl.where(i == 1, alpha[None, None, :], 0.0))
    return tl.reshape(tl.where(m == 1, k[None], tl.where(m == 2, v[None], tl.where(m == 3, gates, 0.0))), (4 * D, C))


@triton.jit
def _own(x, C: tl.constexpr, D: tl.constexpr):
    """x [D, C] -> [4 D, C] with x in blocks 0, 1, 2: the identity of M(z) = z + (W0 + W) z. It never is rounded with W0."""
    return tl.reshape(tl.where(tl.arange(0, 4)[:, None, None] < 3, x[None], 0.0), (4 * D, C))


@triton.jit
def _piece(n, i, kept, T, chunk, PER, row, i0, C: tl.constexpr, D: tl.constexpr):
    """Tile i of memory n, cut so that chunks begin tiles: its first token, the end of its chunk, its tokens, which there are,
    the last; offsets in [N, T, D] and, as the kept-th tile, in [C, 4 D] and [C, D], transposed."""
    begin = i // PER * chunk + i % PER * C
    end = tl.minimum(T, (i // PER + 1) * chunk)
    t = tl.arange(0, C)
    tok, at = begin + t, kept * C + t
    xat, rat = (n * T + tok)[None, :] * D + i0[:, None], at[None, :] * (4 * D) + row[:, None]
    return begin, end, tok, tok < end, tl.minimum(end - begin, C) - 1, xat, rat, at[None, :] * D + i0[:, None]


@triton.jit
def _softplus(z):
    return tl.maximum(z, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(z)))


@triton.jit
def _modify_forward(x, q, W0, W, b_eta, b_alpha, A, y, W_T, W_last, W_kept, dy, K_kept, V_kept, r_kept, X_kept, z_kept,
                    g_kept, dr_kept, dK_kept, dq, T, H, step, chunk, PER, EVERY, all_tiles, first, tiles,
                    C: tl.constexpr, D: tl.constexpr, TYPE: tl.constexpr, AGAIN: tl.constexpr):  # fmt: skip
    """One memory n. PER tiles make a chunk. AGAIN: one segment from a checkpoint in W, keeping what the backward needs, and the
    backward of the read, which depends on nothing later."""
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(0) % H
    row, i0, t = tl.arange(0, 4 * D), tl.arange(0, D), tl.arange(0, C)
    at, real, size = row[:, None] * D + i0[None, :], (row < 3 * D + 2)[:, None], (3 * D + 2) * D
    start, lo, hi = n, 0, all_tiles
    if AGAIN:
        segment = first // EVERY + tl.program_id(1)
        start = n * tl.cdiv(all_tiles, EVERY) + segment
        lo, hi = segment * EVERY, tl.minimum(segment * EVERY + EVERY, all_tiles)
    w = tl.load(W + start * size + at, mask=real, other=0.0)
    be, ba, rate = tl.load(b_eta + n), tl.load(b_alpha + n), step * tl.load(A + n)
    B = w.to(TYPE)
    for i in range(lo, hi):
        kept = n * tiles + i - first
        begin, end, tok, ok, last, xat, rat, kat = _piece(n, i, kept, T, chunk, PER, row, i0, C, D)
        w0 = tl.load(W0 + h * size + at, mask=real, other=0.0)
        B = tl.where(i % PER == 0, (w0.to(tl.float32) + w).to(TYPE), B)
        if AGAIN:
            tl.store(W_kept + kept * size + at, w, mask=real)
        elif i % EVERY == 0:
            tl.store(W_kept + (n * tl.cdiv(all_tiles, EVERY) + i // EVERY) * size + at, w, mask=real)
        if not AGAIN:
            if i == (all_tiles - 1) // PER * PER:
                tl.store(W_last + n * size + at, w, mask=real)
        # generate from the boundary weights
        xs = tl.load(x + xat, mask=ok[None, :], other=0.0)
        G = _dot(B, xs, TYPE)
        K, V = _block(G, 1, C, D) + xs, _block(G, 2, C, D) + xs
        nk, nv = tl.rsqrt(tl.sum(K * K, 0) + 1e-6), tl.rsqrt(tl.sum(V * V, 0) + 1e-6)
        K, V = K * nk[None, :], V * nv[None, :]
        z_eta = tl.sum(tl.where((row == 3 * D)[:, None], G, 0.0), 0) + be
        z_alpha = tl.sum(tl.where((row == 3 * D + 1)[:, None], G, 0.0), 0) + ba
        al = tl.where(ok, tl.exp(-rate * _softplus(z_alpha)), 1.0)
        et = tl.where(ok, step * (1.0 + al) * tl.sigmoid(z_eta), 0.0)
        # the errors of all rows, then read, then write
        A0, a0 = _decay(al, C)
        X = _inverse(A0 * et[None, :] * _dot(tl.trans(K), K, TYPE), C)
        r = _own(V - K, C, D) + _dot(B, V, TYPE) - _dot(w0, K, TYPE) - a0[None, :] * _dot(w, K, TYPE)
        r = _dot(r, tl.trans(X), tl.float32)
        A1 = al[:, None] * A0 + tl.where(t[:, None] == t[None, :], 1.0, 0.0)
        Q = tl.load(q + xat, mask=ok[None, :], other=0.0)
        QK = _dot(tl.trans(Q), K, TYPE)
        M = A1 * et[None, :] * QK
        if AGAIN:
            tl.store(K_kept + kat, K)
            tl.store(V_kept + kat, V)
            tl.store(r_kept + rat, r)
            tl.store(X_kept + (kept * C + t[:, None]) * C + t[None, :], X)
            z = z_kept + kept * 4 * C + t
            tl.store(z, z_eta)
            tl.store(z + C, z_alpha)
            tl.store(z + 2 * C, nk)
            tl.store(z + 3 * C, nv)
            dY = tl.load(dy + (n * T + tok)[None, :] * D + row[:, None], mask=ok[None, :] & (row < D)[:, None], other=0.0)
            tl.store(dr_kept + (kept * C + t)[None, :] * D + row[:, None], _dot(dY, M, TYPE), mask=(row < D)[:, None])
            part = _dot(tl.trans(w), dY, TYPE)
            dM = _dot(tl.trans(dY), r, TYPE)
            tl.store(dK_kept + kat, _dot(Q, dM * A1 * et[None, :], TYPE))
            dQ = (al * a0)[None, :] * part + _dot(K, tl.trans(dM * A1 * et[None, :]), TYPE)
            tl.store(dq + xat, dQ, mask=ok[None, :])
            dM *= QK
            da, dA1 = tl.sum(part * Q, 0), dM * et[None, :]
            dal = da * a0 + tl.sum(dA1 * A0, 1) + _decay_gradient(A0, a0, al[:, None] * dA1, al * da)
            tl.store(g_kept + kept * 2 * C + t, tl.sum(dM * A1, 0))
            tl.store(g_kept + (kept * 2 + 1) * C + t, dal)
        else:
            Y = (al * a0)[None, :] * _dot(w, Q, TYPE) + _dot(r, tl.trans(M), TYPE)
            tl.store(y + (n * T + tok)[None, :] * D + row[:, None], Y, mask=ok[None, :] & (row < D)[:, None])
        w = _row(al * a0, last, C) * w + _dot((_row(A1, last, C) * et)[None, :] * r, tl.trans(K), TYPE)
    if not AGAIN:
        tl.store(W_T + n * size + at, w, mask=real)


@triton.jit
def _modify_chain(x, q, W0, A, dy, K_kept, V_kept, W_kept, r_kept, X_kept, z_kept, g_kept, dr_kept, dK_kept, dW, d_last,
                  dx, d_kept, dG_kept, dgates, T, H, step, chunk, PER, all_tiles, first, tiles,
                  C: tl.constexpr, D: tl.constexpr, TYPE: tl.constexpr):  # fmt: skip
    """Backward through generation, errors and write of one memory n, tile by tile in reverse; dW is updated in place."""
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(0) % H
    row, i0, t = tl.arange(0, 4 * D), tl.arange(0, D), tl.arange(0, C)
    at, real, size = row[:, None] * D + i0[None, :], (row < 3 * D + 2)[:, None], (3 * D + 2) * D
    dw = tl.load(dW + n * size + at, mask=real, other=0.0)
    rate = step * tl.load(A + n)
    for back in range(0, tiles):
        i = first + tiles - 1 - back
        kept = n * tiles + i - first
        begin, end, tok, ok, last, xat, rat, kat = _piece(n, i, kept, T, chunk, PER, row, i0, C, D)
        z = z_kept + kept * 4 * C + t
        z_eta, z_alpha, nk, nv = tl.load(z), tl.load(z + C), tl.load(z + 2 * C), tl.load(z + 3 * C)
        al, sig = tl.where(ok, tl.exp(-rate * _softplus(z_alpha)), 1.0), tl.sigmoid(z_eta)
        et = tl.where(ok, step * (1.0 + al) * sig, 0.0)
        A0, a0 = _decay(al, C)
        A1 = al[:, None] * A0 + tl.where(t[:, None] == t[None, :], 1.0, 0.0)
        K, r = tl.load(K_kept + kat), tl.load(r_kept + rat)
        w = tl.load(W_kept + kept * size + at, mask=real, other=0.0)
        # through the write
        wr = _row(A1, last, C)
        dr = _dot(dw, K, TYPE)
        dwr = tl.sum(dr * r, 0)
        dK = tl.load(dK_kept + kat) + _dot(tl.trans(dw), (wr * et)[None, :] * r, TYPE)
        da = tl.where(t == last, tl.sum(dw * w.to(tl.float32)), 0.0)
        # through the read
        dr *= (wr * et)[None, :]
        dr += tl.load(dr_kept + (kept * C + t)[None, :] * D + row[:, None], mask=(row < D)[:, None], other=0.0)
        dY = tl.load(dy + (n * T + tok)[None, :] * D + row[:, None], mask=ok[None, :] & (row < D)[:, None], other=0.0)
        Q = tl.load(q + xat, mask=ok[None, :], other=0.0)
        dw = _row(al * a0, last, C) * dw + _dot((al * a0)[None, :] * dY, tl.trans(Q), TYPE)
        # through the errors
        d = _dot(dr, tl.load(X_kept + (kept * C + t[:, None]) * C + t[None, :]), tl.float32)
        tl.store(d_kept + rat, d)
        dw -= _dot(a0[None, :] * d, tl.trans(K), TYPE)
        from_start = _dot(tl.trans(tl.load(W0 + h * size + at, mask=real, other=0.0)), d, TYPE)
        from_start += _block(d, 0, C, D) + _block(d, 1, C, D) + _block(d, 2, C, D)
        boundary = W_kept + (kept - i % PER) * size + at
        dV = from_start + _dot(tl.trans(tl.load(boundary, mask=real, other=0.0)), d, TYPE)
        part = _dot(tl.trans(w), d, TYPE)
        dK -= from_start + a0[None, :] * part
        da0 = al * da - tl.sum(part * K, 0)
        dM = -_dot(tl.trans(d), r, TYPE)
        S = dM * _dot(tl.trans(K), K, TYPE)
        dM *= A0 * et[None, :]
        dK += _dot(K, dM + tl.trans(dM), TYPE)
        # through step sizes and retention
        dA1 = tl.where(t[:, None] == last, (et * dwr)[None, :], 0.0)
        det = wr * dwr + tl.sum(S * A0, 0) + tl.load(g_kept + kept * 2 * C + t)
        dal = da * a0 + tl.sum(dA1 * A0, 1) + _decay_gradient(A0, a0, al[:, None] * dA1 + S * et[None, :], da0)
        dal = (dal + tl.load(g_kept + (kept * 2 + 1) * C + t) + step * det * sig) * al  # of log alpha
        d_eta = tl.where(ok, step * det * (1.0 + al) * sig * (1.0 - sig), 0.0)
        d_alpha = tl.where(ok, -rate * dal * tl.sigmoid(z_alpha), 0.0)
        series, NT = dgates + n * T + tok, tl.num_programs(0) * T
        tl.store(series, d_eta, mask=ok)
        tl.store(series + NT, d_alpha, mask=ok)
        tl.store(series + 2 * NT, -step * dal * _softplus(z_alpha), mask=ok)
        # through the generation from the boundary weights
        V = tl.load(V_kept + kat)
        dK = (dK - K * tl.sum(dK * K, 0)[None, :]) * nk[None, :]
        dV = (dV - V * tl.sum(dV * V, 0)[None, :]) * nv[None, :]
        dG = _stack(dK, dV, d_eta, d_alpha, C, D).to(TYPE)
        tl.store(dG_kept + rat, dG)
        dX = dK + dV + _dot(tl.trans(tl.load(W0 + h * size + at, mask=real, other=0.0)), dG, TYPE)
        dX += _dot(tl.trans(tl.load(boundary, mask=real, other=0.0)), dG, TYPE)
        tl.store(dx + xat, dX, mask=ok[None, :])
        if i % PER == 0:  # all that was generated in this chunk came from the weights at its start
            tl.debug_barrier()
            for j in range(0, PER):
                more = (j * C + t[None, :]) * (4 * D) + kept * C * (4 * D) + row[:, None]
                tok_j = begin + j * C + t
                x_ok = tok_j < end
                kat_j = (kept * C + j * C + t)[:, None] * D + i0[None, :]
                xat_j = (n * T + tok_j)[:, None] * D + i0[None, :]
                v_j = tl.load(V_kept + kat_j, mask=x_ok[:, None], other=0.0)
                dw += _dot(tl.load(d_kept + more, mask=x_ok[None, :], other=0.0), v_j, TYPE)
                x_j = tl.load(x + xat_j, mask=x_ok[:, None], other=0.0)
                dw += _dot(tl.load(dG_kept + more, mask=x_ok[None, :], other=0.0), x_j, TYPE)
        if i == (all_tiles - 1) // PER * PER:
            dw += tl.load(d_last + n * size + at, mask=real, other=0.0)
    tl.store(dW + n * size + at, dw, mask=real)


@triton.jit
def _modify_starts(x, K_kept, V_kept, d_kept, dG_kept, dW0, T, chunk, PER, first, tiles,
                   C: tl.constexpr, D: tl.constexpr, TYPE: tl.constexpr):  # fmt: skip
    """dW0 += d (v - k)^T + dG x^T over the tiles of one memory n, for the rows of block m."""
    n, m = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, i0, t = m * D + tl.arange(0, D), tl.arange(0, D), tl.arange(0, C)
    at, real = n * (3 * D + 2) * D + row[:, None] * D + i0[None, :], (row < 3 * D + 2)[:, None]
    total = tl.load(dW0 + at, mask=real, other=0.0)
    for j in range(0, tiles):
        i, kept = first + j, n * tiles + j
        tok = i // PER * chunk + i % PER * C + t
        ok = tok < tl.minimum(T, (i // PER + 1) * chunk)
        rat, kat = (kept * C + t)[None, :] * (4 * D) + row[:, None], (kept * C + t)[:, None] * D + i0[None, :]
        difference = tl.load(V_kept + kat).to(tl.float32) - tl.load(K_kept + kat).to(tl.float32)
        total += _dot(tl.load(d_kept + rat), difference, TYPE)
        xs = tl.load(x + (n * T + tok)[:, None] * D + i0[None, :], mask=ok[:, None], other=0.0)
        total += _dot(tl.load(dG_kept + rat), xs, TYPE)
    tl.store(dW0 + at, total, mask=real)


EVERY = 8  # tiles from one kept state to the next: 1/8 of what keeping all would take, and 1/8 of the backward's parallel work
SPAN = 64  # tiles whose states the backward holds at once, a multiple of EVERY
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
STAGES = 1  # no loads ahead: shared memory is full of operands
WARPS = {"scan forward": 4, "scan again": 4, "scan chain": 4, "scan local": 4,
         "modify forward": 8, "modify again": 8, "modify chain": 8, "modify starts": 4}  # fmt: skip


def _launch(name):
    return dict(num_warps=WARPS[name], num_stages=STAGES)


def _padded(width, least=16):
    return max(least, triton.next_power_of_2(width))


def _setting(W, k, u, q, theta, delta, delta_rule, tile):
    """Sizes and compile-time constants of a scan, for W [N, dv, dk], k [N, T, dk]."""
    N, dv, dk = W.shape
    sizes = dict(C=min(_padded(tile), 32), DV=min(_padded(dv), 64), DK=_padded(dk), TYPE=TYPES[k.dtype])
    sizes |= dict(MOMENTUM=theta is not None, DELTA=2 if delta is not None else int(delta_rule), READ=q is not None)
    return N, k.shape[1], dv, dk, triton.cdiv(dv, sizes["DV"]), triton.cdiv(k.shape[1], sizes["C"]), sizes


@torch.library.custom_op("nested_learning::scan", mutates_args=())
def _scan(W: Tensor, k: Tensor, u: Tensor, eta: Tensor, alpha: Tensor, q: Tensor | None, theta: Tensor | None,
          S: Tensor | None, delta: Tensor | None, delta_rule: bool,
          tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, W_T, S_T, kept W, kept S) for W, S [N, dv, dk], k, q [N, T, dk], u [N, T, dv], series [N, T]; absent: empty."""
    out = _scan_fake(W, k, u, eta, alpha, q, theta, S, delta, delta_rule, tile)
    N, T, dv, dk, blocks, tiles, sizes = _setting(W, k, u, q, theta, delta, delta_rule, tile)
    none = W
    _scan_forward[(N, blocks)](W, S, k, u, q, eta, alpha, theta, delta, *out, none, none, T, dv, dk, EVERY, 0, tiles,
                               AGAIN=False, **sizes, **_launch("scan forward"))  # fmt: skip
    return out


@_scan.register_fake
def _scan_fake(W, k, u, eta, alpha, q, theta, S, delta, delta_rule, tile):
    N, T, dv, dk, _, tiles, _ = _setting(W, k, u, q, theta, delta, delta_rule, tile)
    kept, none = (N, triton.cdiv(tiles, EVERY), dv, dk), (0,)
    W_T, W_kept = W.new_empty(N, dv, dk), W.new_empty(kept)
    return (W.new_empty((N, T, dv) if q is not None else none), W_T, W.new_empty(W_T.shape if theta is not None else none),
            W_kept, W.new_empty(kept if theta is not None else none))  # fmt: skip


@torch.library.custom_op("nested_learning::scan_backward", mutates_args=())
def _scan_backward(dy: Tensor, dW_T: Tensor, dS_T: Tensor, W_kept: Tensor, S_kept: Tensor, k: Tensor, u: Tensor, eta: Tensor,
                   alpha: Tensor, q: Tensor | None, theta: Tensor | None, delta: Tensor | None, delta_rule: bool,
                   tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of W, k, u, eta, alpha, q, theta, S, delta; absent: empty."""
    N, T, dv, dk, blocks, all_tiles, sizes = _setting(dW_T, k, u, q, theta, delta, delta_rule, tile)
    C, new, none = sizes["C"], dW_T.new_empty, dW_T
    dW, dS, du = dW_T.clone(), dS_T.clone(), torch.empty_like(u)
    # gradients that all blocks of rows share: one copy per block, added up at the end
    shares = [new(blocks, *x.shape, dtype=torch.float32 if blocks > 1 else x.dtype) if x is not None else new(0)
              for x in (k, eta, alpha, q, theta, delta)]  # fmt: skip
    for first in reversed(range(0, all_tiles, SPAN)):
        tiles = min(SPAN, all_tiles - first)
        states = [new(N, tiles, dv, dk, dtype=k.dtype) for _ in range(4 if theta is not None else 2)]
        W_all, dW_all, S_all, dS_all = states if theta is not None else [*states, none, none]
        r_all, X_all = new(N, tiles, C, dv, dtype=k.dtype), new(N, tiles, C, C) if sizes["DELTA"] else none
        inputs, size = (k, q, eta, alpha, theta, delta, dy), (T, dv, dk)
        _scan_forward[(N, blocks, triton.cdiv(tiles, EVERY))](
            W_kept, S_kept, k, u, None, *inputs[2:6], none, none, none, W_all, S_all, r_all, X_all, *size, EVERY, first,
            tiles, AGAIN=True, **(sizes | {"READ": False}), **_launch("scan again"),
        )  # fmt: skip
        _scan_chain[(N, blocks)](*inputs, X_all, dW, dS, dW_all, dS_all, du, *size, first, tiles, **sizes,
                                 **_launch("scan chain"))  # fmt: skip
        dk_out, deta, dalpha, dq, dtheta, ddelta = shares
        _scan_local[(N, blocks, tiles)](
            *inputs, du, W_all, S_all, r_all, dW_all, dS_all, dk_out, dq, deta, dalpha, dtheta, ddelta, *size, first,
            tiles, **sizes, **_launch("scan local"),
        )  # fmt: skip
    dk_out, deta, dalpha, dq, dtheta, ddelta = (
        x if x.ndim == 1 else x.sum(0).to(like.dtype) if blocks > 1 else x.squeeze(0)
        for x, like in zip(shares, (k, eta, alpha, q, theta, delta), strict=True)
    )
    return dW, dk_out, du, deta, dalpha, dq, dtheta, dS, ddelta


@_scan_backward.register_fake
def _(dy, dW_T, dS_T, W_kept, S_kept, k, u, eta, alpha, q, theta, delta, delta_rule, tile):
    return tuple(dW_T.new_empty(0) if x is None else torch.empty_like(x)
                 for x in (dW_T, k, u, eta, alpha, q, theta, None if theta is None else dW_T, delta))  # fmt: skip


def _scan_save(ctx, inputs, output):
    W, k, u, eta, alpha, q, theta, S, delta, ctx.delta_rule, ctx.tile = inputs
    ctx.save_for_backward(*output[3:], k, u, eta, alpha, q, theta, delta)


def _scan_gradients(ctx, dy, dW_T, dS_T, *_):
    dy, dW_T, dS_T = (x.contiguous() for x in (dy, dW_T, dS_T))
    gradients = _scan_backward(dy, dW_T, dS_T, *ctx.saved_tensors, ctx.delta_rule, ctx.tile)
    present = [x is not None for x in ctx.saved_tensors[2:]]  # k, u, eta, alpha, q, theta, delta
    wanted = [True, *present[:6], present[5], present[6]]
    return *(g if given else None for g, given in zip(gradients, wanted, strict=True)), None, None


_scan.register_autograd(_scan_gradients, setup_context=_scan_save)


def unfit(x, width, chunk=1):
    """Why the kernels cannot run on tensors like x with keys of this width and chunks of so many tokens; None: they can."""
    if not INTERPRETED.value and (not x.is_cuda or torch.cuda.get_device_capability(x.device) < (8, 0)):
        return f"they need an NVIDIA GPU of compute capability 8.0 or more (the tensors are on {x.device})"
    if x.dtype not in TYPES:
        return f"they need float32 or bfloat16, got {x.dtype}"
    if width > 64 or chunk > 128:
        return f"they need keys of width 64 at most and chunks of 128 tokens at most, got {width} and {chunk}"


def scan(W, k, u, eta, alpha, q, theta, S, delta, tile):
    """`memory.scan` with these kernels, for arguments aligned by it (equal leading dimensions) that are not `unfit`."""
    lead, same = W.shape[:-2], k.dtype if k.dtype == u.dtype and (q is None or q.dtype == k.dtype) else torch.float32
    number = not torch.is_tensor(delta)
    if number and delta not in (0, 1):
        delta, number = torch.full_like(eta, delta), False

    def flat(x, n, dtype=torch.float32):
        return None if x is None else x.to(dtype).reshape(-1, *x.shape[-n:]).contiguous()

    y, W, S = _scan(
        flat(W, 2), flat(k, 2, same), flat(u, 2, same), flat(eta, 1), flat(alpha, 1), flat(q, 2, same), flat(theta, 1),
        flat(S, 2), None if number else flat(delta, 1), number and delta == 1, tile,
    )[:3]  # fmt: skip
    return None if q is None else y.unflatten(0, lead), W.unflatten(0, lead), None if theta is None else S.unflatten(0, lead)


# ---------------------------------------------------------------------------------------------------------------------


def _chunks(T, chunk):
    """(tokens of a tile, tiles of a chunk, tiles of T tokens, tiles between kept states)."""
    C = 16
    per = triton.cdiv(chunk, C)
    return C, per, T // chunk * per + triton.cdiv(T % chunk, C), per * max(1, EVERY // per)


@torch.library.custom_op("nested_learning::modify", mutates_args=())
def _modify(x: Tensor, q: Tensor, W: Tensor, W0: Tensor, b_eta: Tensor, b_alpha: Tensor, A: Tensor, chunk: int,
            step: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(W_t q_t, W_T, W at the last boundary, kept states) for x, q [N, T, d], W [N, 3d + 2, d], W0 [H, ...], gates [N]."""
    out = _modify_fake(x, q, W, W0, b_eta, b_alpha, A, chunk, step)
    (N, T, D), (C, per, tiles, every) = x.shape, _chunks(x.shape[1], chunk)
    none = [W] * 10
    _modify_forward[(N,)](x, q, W0, W, b_eta, b_alpha, A, *out, *none, T, len(W0), step, chunk, per, every, tiles, 0, tiles,
                          C=C, D=D, TYPE=TYPES[x.dtype], AGAIN=False, **_launch("modify forward"))  # fmt: skip
    return out


@_modify.register_fake
def _modify_fake(x, q, W, W0, b_eta, b_alpha, A, chunk, step):
    _, _, tiles, every = _chunks(x.shape[1], chunk)
    kept = W.new_empty(W.shape[0], triton.cdiv(tiles, every), *W.shape[1:])
    return W.new_empty(x.shape), torch.empty_like(W), torch.empty_like(W), kept


@torch.library.custom_op("nested_learning::modify_backward", mutates_args=())
def _modify_backward(dy: Tensor, dW_T: Tensor, d_last: Tensor, W_kept: Tensor, x: Tensor, q: Tensor, W0: Tensor,
                     b_eta: Tensor, b_alpha: Tensor, A: Tensor, chunk: int,
                     step: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, q, W, W0 [N, ...] and of (z_eta, z_alpha, A) [3, N, T], token by token."""
    (N, T, D), (C, per, all_tiles, every) = x.shape, _chunks(x.shape[1], chunk)
    dx, dq, dgates = torch.empty_like(x), torch.empty_like(q), dW_T.new_empty(3, N, T)
    dW, dW0 = dW_T.clone(), torch.zeros_like(dW_T)
    sizes, none = dict(C=C, D=D, TYPE=TYPES[x.dtype]), dW_T
    span = every * max(1, SPAN // every)
    for first in reversed(range(0, all_tiles, span)):
        tiles = min(span, all_tiles - first)

        def new(*shape, dtype=x.dtype, tiles=tiles):
            return dW_T.new_empty(N, tiles, *shape, dtype=dtype)

        W_all, K, V, r, dK, dr, d, dG = new(3 * D + 2, D), *(new(C, n) for n in (D, D, 4 * D, D, D, 4 * D, 4 * D))
        X, z, g = (new(n, C, dtype=torch.float32) for n in (C, 4, 2))
        _modify_forward[(N, triton.cdiv(tiles, every))](
            x, q, W0, W_kept, b_eta, b_alpha, A, none, none, none, W_all, dy, K, V, r, X, z, g, dr, dK, dq,
            T, len(W0), step, chunk, per, every, all_tiles, first, tiles, AGAIN=True, **sizes,
            **_launch("modify again"),
        )  # fmt: skip
        _modify_chain[(N,)](x, q, W0, A, dy, K, V, W_all, r, X, z, g, dr, dK, dW, d_last, dx, d, dG, dgates,
                            T, len(W0), step, chunk, per, all_tiles, first, tiles, **sizes,
                            **_launch("modify chain"))  # fmt: skip
        _modify_starts[(N, 4)](x, K, V, d, dG, dW0, T, chunk, per, first, tiles, **sizes, **_launch("modify starts"))
    return dx, dq, dW, dW0, dgates


@_modify_backward.register_fake
def _(dy, dW_T, d_last, W_kept, x, q, W0, b_eta, b_alpha, A, chunk, step):
    return *(torch.empty_like(like) for like in (x, q, dW_T, dW_T)), dW_T.new_empty(3, *x.shape[:2])


def _modify_save(ctx, inputs, output):
    x, q, W, W0, b_eta, b_alpha, A, ctx.chunk, ctx.step = inputs
    ctx.save_for_backward(output[3], x, q, W0, b_eta, b_alpha, A)


def _modify_gradients(ctx, dy, dW_T, d_last, _):
    dy, dW_T, d_last = (g.contiguous() for g in (dy, dW_T, d_last))
    W0 = ctx.saved_tensors[3]
    dx, dq, dW, dW0, dgates = _modify_backward(dy, dW_T, d_last, *ctx.saved_tensors, ctx.chunk, ctx.step)
    return dx, dq, dW, dW0.unflatten(0, (-1, len(W0))).sum(0).to(W0.dtype), *dgates.sum(-1), None, None


_modify.register_autograd(_modify_gradients, setup_context=_modify_save)


def self_modify(x, q, W, W0, b_eta, b_alpha, A, chunk, step):
    """All chunks of one layer of `titans.SelfModifyingTitans`, from a chunk boundary on: its `_SelfModify` with these kernels.

    x, q [N, T, d] (N = batch x heads), W [N, 3d + 2, d], W0 [H, 3d + 2, d] with H heads, b_eta, b_alpha, A [N]
    -> W_t q_t [N, T, d], W_T, W at the last boundary.
    """
    gates = (t.float().contiguous() for t in (b_eta, b_alpha, A))
    x, q, W0 = (t.to(x.dtype).contiguous() for t in (x, q, W0))
    return _modify(x, q, W.float().contiguous(), W0, *gates, chunk, float(step))[:3]
