"""HEADER"""

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
    """(I + tril(L, -1))^-1 by doubling: from the inverses of the diagonal blocks of b rows to those of 2 b rows."""
    t, s = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    X = tl.where(t == s, 1.0, 0.0) - tl.where((t // 2 == s // 2) & (t > s), L, 0.0)
    for i in tl.static_range(1, 7):  # b = 2^i
        if 1 << i < C:
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
    """What W_t holds of the past, see the top: alpha, A0, a0, theta, T0, t0, T1, c0, b0, c1 (without momentum c0 = A0, T1 = I)."""
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


# ---------------------------------------------------------------------------------------------------------------------
# The learning rule


@triton.jit
def _scan_forward(W, S, k, u, q, eta, alpha, theta, delta, y, W_T, S_T, W_kept, S_kept, r_kept, X_kept, T, dv, dk, EVERY, first, tiles,
                  C: tl.constexpr, DV: tl.constexpr, DK: tl.constexpr, TYPE: tl.constexpr, MOMENTUM: tl.constexpr,
                  DELTA: tl.constexpr, READ: tl.constexpr, AGAIN: tl.constexpr):  # fmt: skip
    """Rows [j DV, (j + 1) DV) of one memory n. AGAIN: only tiles `first`.. of one segment, from a checkpoint in W, for the backward."""
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
        tok = i * C + t
        ok, last = tok < T, tl.minimum(T - i * C, C) - 1
        gate, kept = n * T + tok, n * tiles + i - first
        kat, kok = _at(n, tok, T, dk, h)
        vat, vok = _at(n, tok, T, dv, v)
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
            d = tl.full([C], 1.0, tl.float32)
            if DELTA == 2:
                d = tl.load(delta + gate, mask=ok, other=0.0)
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
        tok = i * C + t
        ok, last = tok < T, tl.minimum(T - i * C, C) - 1
        gate, kept = n * T + tok, n * tiles + i - first
        kat, kok = _at(n, tok, T, dk, h)
        vat, vok = _at(n, tok, T, dv, v)
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
            d = tl.full([C], 1.0, tl.float32)
            if DELTA == 2:
                d = tl.load(delta + gate, mask=ok, other=0.0)
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
    tok = i * C + t
    ok, last = tok < T, tl.minimum(T - i * C, C) - 1
    gate, kept = n * T + tok, n * tiles + i - first
    kat, kok = _at(n, tok, T, dk, h)
    vat, vok = _at(n, tok, T, dv, v)
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
        d = tl.full([C], 1.0, tl.float32)
        if DELTA == 2:
            d = tl.load(delta + gate, mask=ok, other=0.0)
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


EVERY = 8  # tiles from one kept state to the next: 1/8 of what keeping all would take, and 1/8 of the backward's parallel work
SPAN = 64  # tiles whose states the backward holds at once, a multiple of EVERY
WARPS = 4


def _padded(width, least=16):
    return max(least, triton.next_power_of_2(width))


def _setting(W, k, u, q, theta, delta, delta_rule, tile):
    """Sizes and compile-time constants of a scan, for W [N, dv, dk], k [N, T, dk]."""
    N, dv, dk = W.shape
    sizes = dict(C=min(_padded(tile), 64), DV=min(_padded(dv), 64), DK=_padded(dk), TYPE=TYPES[k.dtype], MOMENTUM=theta is not None)
    sizes |= dict(DELTA=2 if delta is not None else int(delta_rule), READ=q is not None, num_warps=WARPS)
    return N, k.shape[1], dv, dk, triton.cdiv(dv, sizes["DV"]), triton.cdiv(k.shape[1], sizes["C"]), sizes


TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


@torch.library.custom_op("nested_learning::scan", mutates_args=())
def _scan(W: Tensor, k: Tensor, u: Tensor, eta: Tensor, alpha: Tensor, q: Tensor | None, theta: Tensor | None, S: Tensor | None,
          delta: Tensor | None, delta_rule: bool, tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, W_T, S_T, kept states W, kept S) for W, S [N, dv, dk], k, q [N, T, dk], u [N, T, dv], series [N, T]; absent: empty."""
    out = _scan_fake(W, k, u, eta, alpha, q, theta, S, delta, delta_rule, tile)
    N, T, dv, dk, blocks, tiles, sizes = _setting(W, k, u, q, theta, delta, delta_rule, tile)
    none = W
    _scan_forward[(N, blocks)](W, S, k, u, q, eta, alpha, theta, delta, *out, none, none, T, dv, dk, EVERY, 0, tiles, AGAIN=False, **sizes)
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
            W_kept, S_kept, k, u, None, *inputs[2:6], none, none, none, W_all, S_all, r_all, X_all, *size, EVERY, first, tiles,
            AGAIN=True, **(sizes | {"READ": False}),
        )  # fmt: skip
        _scan_chain[(N, blocks)](*inputs, X_all, dW, dS, dW_all, dS_all, du, *size, first, tiles, **sizes)
        dk_out, deta, dalpha, dq, dtheta, ddelta = shares
        _scan_local[(N, blocks, tiles)](
            *inputs, du, W_all, S_all, r_all, dW_all, dS_all, dk_out, dq, deta, dalpha, dtheta, ddelta, *size, first, tiles, **sizes
        )
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


def scan(W, k, u, eta, alpha, q=None, *, theta=None, S=None, delta=1.0, tile=64):
    """`memory.scan` with these kernels, for arguments aligned by it (equal leading dimensions) and `unfit` None."""
    lead, same = W.shape[:-2], k.dtype if k.dtype == u.dtype and (q is None or q.dtype == k.dtype) else torch.float32
    number = not torch.is_tensor(delta)
    if number and delta not in (0, 1):
        delta, number = torch.full_like(eta, delta), False

    def flat(x, n, dtype=torch.float32):
        return None if x is None else x.to(dtype).reshape(-1, *x.shape[-n:]).contiguous()

    y, W, S = _scan(
        flat(W, 2), flat(k, 2, same), flat(u, 2, same), flat(eta, 1), flat(alpha, 1), flat(q, 2, same), flat(theta, 1), flat(S, 2),
        None if number else flat(delta, 1), number and delta == 1, tile,
    )[:3]  # fmt: skip
    return None if q is None else y.unflatten(0, lead), W.unflatten(0, lead), None if theta is None else S.unflatten(0, lead)
