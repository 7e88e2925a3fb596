"""Titans and self-modifying Titans: memories that learn at test time, as mixers of a sequence model.

`NeuralMemory` is the long-term memory module of Titans (LMM): static projections make keys, values and queries; a deep
memory takes momentum steps of the l2 gradient, with step size, momentum and retention read off the token.

`SelfModifyingTitans` (NL section 8) lets memories make all of that themselves. Per head there is one memory for each of
k, v, eta, alpha and for the content. With M_t(z) = z + W_t z (or the MLP z + W1 silu(W2 z), NL eq. 89; eta and alpha are
single rows without residual), everything generated from the weights at the boundary of the chunk:

    k = l2norm(M_k(x))   v = l2norm(M_v(x))   eta = (1 + alpha) sigmoid(M_eta(x) + b)   alpha = exp(-A softplus(M_alpha(x) + b))
    targets   v^_m = M_m(v)             for every memory m: it chooses what it wants to learn          (NL eq. 83-85)
    write     M_m <- alpha M_m - eta (M_m(k) - v^_m) k^T        delta rule at the running weights      (NL eq. 88, 93)
    read      y = M_memory,t(q)         the running weights of the token                               (NL eq. 86)

All first layers share the key k, eta and alpha, so they are ONE memory with stacked rows [memory | k | v | eta | alpha]:
one read, one triangular system and one write per chunk instead of five.

Departures from the printed formulas, and why: the boundary is the end of the *previous* chunk (NL eq. 91 prints the end of
the current one, which would leak the future); v is normalised, because self-generated targets are quadratic in the weights
and otherwise diverge; the l2 gradient is taken once, at the running weights (see memory.write); eta stays below
1 + alpha, where the factor alpha - eta along a key is stable, yet can be negative; one chunk length for all memories
(the paper has two), because the rows are stacked; eta and alpha are single rows also where the others are MLPs.

`python titans.py` trains one small memory to do what it was not told: look up what it saw before.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from memory import _Decay, decay_backward, l2norm, scan, silu_derivative, unit_lower_inverse, write

EPS = 1e-6  # of l2norm

# ---------------------------------------------------------------------------------------------------------------------
# Short convolution


class _CausalConv(torch.autograd.Function):
    """Depthwise convolution as shifted multiply-adds: several times faster on a CPU than conv1d, forward and backward."""

    @staticmethod
    def forward(ctx, x, w):  # x [B, width-1+T, D], w [width, D]
        ctx.save_for_backward(x, w)
        T = x.shape[1] - len(w) + 1
        y = x[:, :T] * w[0]
        for j in range(1, len(w)):
            y.addcmul_(x[:, j : j + T], w[j])
        return y

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        T = grad.shape[1]
        dx, dw = torch.zeros_like(x), []
        for j in range(len(w)):
            dx[:, j : j + T].addcmul_(grad, w[j])
            dw.append((x[:, j : j + T] * grad).sum((0, 1)))
        return dx, torch.stack(dw)


class ShortConvolution(nn.Module):
    """SiLU of a causal depthwise convolution, which carries its last width-1 inputs from call to call.

    (x [B, T, D], tail [B, width-1, D] or None) -> (y [B, T, D], tail). Raises ValueError for width < 1.
    """

    def __init__(self, dim, width=4):
        super().__init__()
        if width < 1:
            raise ValueError(f"width of a convolution must be at least 1 token, got {width}")
        self.weight = nn.Parameter(torch.randn(width, dim) * width**-0.5)

    def forward(self, x, tail=None):
        width = len(self.weight)
        if tail is None:
            tail = x.new_zeros(x.shape[0], width - 1, x.shape[2])
        x = torch.cat([tail, x], 1)
        return F.silu(_CausalConv.apply(x, self.weight)), x[:, x.shape[1] - width + 1 :]


def heads(x, n):
    """[B, T, n * d] -> [B, n, T, d]."""
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def head_width(d_model, n_heads):
    if n_heads < 1 or d_model % n_heads:
        raise ValueError(f"d_model must be a multiple of n_heads, got d_model {d_model} and n_heads {n_heads}")
    return d_model // n_heads


def retention(z, A):
    """exp(-A softplus(z)): comes as close to 1 as float32 can hold, where a sigmoid's gradient has long vanished."""
    return torch.exp(-A * F.softplus(z))


def retention_bias(alpha):
    """z with retention(z, 1) = alpha."""
    return math.log(math.expm1(-math.log(alpha)))


# ---------------------------------------------------------------------------------------------------------------------
# Self-modifying Titans, the chunk step with matrix memories, fused


class _SelfModify(torch.autograd.Function):
    """All chunks of one layer with hand-derived backward; `SelfModifyingTitans._chunk` is its readable definition.

    x, q [N, T, d] (N = batch x heads, q of unit length), W [N, 3d + 2, d] rows [memory | k | v | eta | alpha],
    b_eta, b_alpha, A [N, 1], starting on a chunk boundary -> y [N, T, d], W_T, and W at the last boundary.

    Symbols as at the top of memory.py. Backward walks the chunks in reverse with dW, the gradient at the chunk's end.
    """

    @staticmethod
    def forward(ctx, x, q, W, b_eta, b_alpha, A, chunk, step):
        N, T, d = x.shape
        y, saved = torch.empty_like(x), []
        for i in range(0, T, chunk):
            xc, qc = x[:, i : i + chunk], q[:, i : i + chunk]
            C = xc.shape[1]
            boundary = W
            # generate from the boundary weights
            g = xc @ W[:, d:].mT
            kv = g[..., : 2 * d].unflatten(-1, (2, d)) + xc.unsqueeze(2)
            norm = torch.rsqrt(torch.linalg.vecdot(kv, kv).add_(EPS)).unsqueeze(-1)
            kv.mul_(norm)
            k, v = kv.unbind(2)
            z_alpha = g[..., 2 * d + 1] + b_alpha
            alpha = torch.exp(-step * A * F.softplus(z_alpha))
            sig = torch.sigmoid(g[..., 2 * d] + b_eta)
            eta = step * (1 + alpha) * sig
            # solve for the errors r of all rows; targets and base share one product: v^ - a k W = residual + (v - a k) W
            P = _Decay.forward(_NoSave, alpha)
            a, ce = P[..., :1], P[..., 1:] * eta.unsqueeze(1)
            kq = torch.cat([k, qc], 1)
            S = kq @ k.mT
            Z = torch.addcmul(v, a[:, :C], k, value=-1)
            r = Z @ W.mT
            r[..., : 3 * d].unflatten(-1, (3, d)).add_((v - k).unsqueeze(2))
            X = unit_lower_inverse(ce[:, :C] * S[:, :C])
            r = X @ r
            # read at the running weights, then write
            qW = qc @ W[:, :d].mT
            yc = torch.addcmul(qc, a[:, 1:], qW)
            y[:, i : i + chunk] = torch.baddbmm(yc, ce[:, 1:] * S[:, C:], r[..., :d])
            W = torch.baddbmm(a[:, C:] * W, (ce[:, C].unsqueeze(-1) * r).mT, k)
            saved += [boundary, kv, norm, kq, S, Z, X, r, P, alpha, sig, z_alpha, qW]
        ctx.save_for_backward(x, A, *saved)
        ctx.chunk, ctx.step = chunk, step
        return y, W, boundary if T % chunk else W.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dW, d_boundary):
        x, A, *saved = ctx.saved_tensors
        N, T, d = x.shape
        chunk, step, per_chunk = ctx.chunk, ctx.step, 13
        dx, dq = torch.empty_like(x), torch.empty_like(x)
        dz_eta, dz_alpha, dA = x.new_empty(N, T), x.new_empty(N, T), torch.zeros_like(A)
        if T % chunk == 0:
            dW, d_boundary = dW + d_boundary, None
        for i in range((T - 1) // chunk * chunk, -1, -chunk):
            j = i // chunk * per_chunk
            W, kv, norm, kq, S, Z, X, r, P, alpha, sig, z_alpha, qW = saved[j : j + per_chunk]
            xc, dyc = x[:, i : i + chunk], dy[:, i : i + chunk]
            C = xc.shape[1]
            k, v = kv.unbind(2)
            q, one_alpha = kq[:, C:], 1 + alpha
            eta = step * one_alpha * sig
            a, ce = P[..., :1], P[..., 1:] * eta.unsqueeze(1)
            last = ce[:, C].unsqueeze(-1)
            # through the write W_C = a_C W + (last * r)^T k
            dr = k @ dW.mT
            dk = (last * r) @ dW
            d_last = torch.linalg.vecdot(dr, r)
            dr.mul_(last)
            da_C = torch.linalg.vecdot(dW.flatten(1), W.flatten(1))
            dW = a[:, C:] * dW
            # through the read y = q + a qW + (ce S_q) r
            dr[..., :d].baddbmm_((ce[:, 1:] * S[:, C:]).mT, dyc)
            d_read = dyc @ r[..., :d].mT
            ady = a[:, 1:] * dyc
            dW[:, :d].baddbmm_(ady.mT, q)
            # through the solve (I + ce S_k) r = residual + Z W^T
            dr = X.mT @ dr
            d_solve = (dr @ r.mT).neg_()
            dW.baddbmm_(dr.mT, Z)
            dZ = dr @ W
            d_res = dr[..., : 3 * d].unflatten(-1, (3, d)).sum(2)
            dk.addcmul_(a[:, :C], dZ, value=-1).sub_(d_res)
            dv = dZ + d_res
            # through the products of keys and queries, S = [k; q] k^T
            dS = torch.cat([d_solve * ce[:, :C], d_read * ce[:, 1:]], 1)
            dk.baddbmm_(dS.mT, kq)
            dkq = dS @ k
            dk.add_(dkq[:, :C])
            dq[:, i : i + chunk] = dkq[:, C:].add_(dyc).baddbmm_(ady, W[:, :d])
            # through step sizes and retention
            dce = F.pad(d_solve.mul_(S[:, :C]), (0, 0, 0, 1))
            dce[:, 1:].addcmul_(d_read, S[:, C:])
            dce[:, C].add_(d_last)
            deta = (dce * P[..., 1:]).sum(1)
            dP = torch.empty_like(P)
            torch.mul(dce, eta.unsqueeze(1), out=dP[..., 1:])
            da = F.pad(torch.linalg.vecdot(dyc, qW), (1, 0))
            da[:, :C].sub_(torch.linalg.vecdot(k, dZ))
            da[:, C].add_(da_C)
            dP[..., 0] = da
            d_alpha = decay_backward(P, dP).addcmul_(deta, sig, value=step).mul_(alpha)  # of log alpha
            dz_eta[:, i : i + chunk] = dze = step * deta * one_alpha * sig * (1 - sig)
            dz_alpha[:, i : i + chunk] = dza = -step * A * d_alpha * torch.sigmoid(z_alpha)
            dA.sub_((step * d_alpha * F.softplus(z_alpha)).sum(1, keepdim=True))
            # through the generation from the boundary weights
            dkv = torch.stack([dk, dv], 2)
            dkv.addcmul_(kv, torch.linalg.vecdot(kv, dkv).unsqueeze(-1), value=-1).mul_(norm)
            dg = torch.cat([dkv.flatten(2), dze.unsqueeze(-1), dza.unsqueeze(-1)], -1)
            dx[:, i : i + chunk] = torch.baddbmm(dkv.sum(2), dg, W[:, d:])
            dW[:, d:].baddbmm_(dg.mT, xc)
            if d_boundary is not None:
                dW, d_boundary = dW + d_boundary, None
        return dx, dq, dW, dz_eta.sum(1, keepdim=True), dz_alpha.sum(1, keepdim=True), dA, None, None


class _NoSave:
    """Stands for the ctx of a Function whose forward is called inside another Function's forward."""

    save_for_backward = staticmethod(lambda *tensors: None)
