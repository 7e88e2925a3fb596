"""Hand-derived backward passes in torch, for what autograd does slowly or inexactly.

    fast form             what it computes                        defined by (its oracle in tests)
    decay                 products of retentions                  P in the equations of memory.py
    solve                 a unit lower triangular system          the same equations
    causal_convolution    SiLU of a short depthwise convolution   torch's conv1d
    linear_cross_entropy  mean loss of a linear output layer      torch's cross_entropy
    self_modify           all chunks of self-modifying Titans     titans.SelfModifyingTitans._chunk

`kernels_for` decides where kernels.py (Triton) takes over from `memory.scan` and `self_modify`.
"""

import functools
import logging

import torch
import torch.nn.functional as F

EPS = 1e-6  # of l2norm and of the norms around memories

# --------------------------------------------------------------------------------------------------
# Which backend computes it

BACKENDS = ("auto", "torch", "triton")


def kernels_for(kernel, x, width, backend="auto", **case):
    """The module kernels.py where its kernel, "scan" or "self_modify", fits tensors of x's device
    and type, keys of this width and the case (fields of selfcheck.Case); else None: torch computes.

    backend: "torch" declines the kernels, "triton" insists on them, "auto" takes them on a GPU
    where they have passed the comparison of selfcheck.py. Why not is logged, once for each reason.
    Raises ValueError for an unknown backend, and for "triton" where the kernels do not fit.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "torch" or (backend == "auto" and not x.is_cuda):
        return None
    try:
        import kernels
        import selfcheck

        reason = kernels.unfit(x, width, case.get("chunk"))
        if reason is None and backend == "auto":
            reason = selfcheck.why_not(kernel, x, width, **case)
    except ImportError as error:
        reason = f"Triton is missing ({error})"
    if reason is None:
        return kernels
    if backend == "triton":
        raise ValueError(f"backend 'triton' cannot run {kernel}: {reason}")
    if not torch.compiler.is_compiling():  # which cannot trace a logger
        _log_once(f"{kernel} runs in torch, far slower than the fused kernels would: {reason}")
    return None


@functools.cache
def _log_once(message):
    logging.getLogger(__name__).warning(message)


# --------------------------------------------------------------------------------------------------
# Small pieces of algebra, with the backward passes that autograd would not find


def decay_forward(alpha):
    """alpha [..., C] -> P [..., C+1, C+1], see `decay`."""
    C = alpha.shape[-1]
    below = torch.ones(C + 1, C + 1, dtype=torch.bool, device=alpha.device).tril_(-1)
    rows = F.pad(alpha, (1, 0)).unsqueeze(-1)  # [..., C+1, 1]; row t holds alpha_t
    return torch.where(below, rows, rows.new_ones(())).cumprod(-2).tril_()


def decay_backward(P, grad):
    """d alpha_i = sum_{s < i <= t} grad[t, s] P[t, i] P[i-1, s].

    No division, so it is exact at zeros and where products underflow.
    """
    return ((P[..., 1:].mT @ grad) * P[..., :-1, :]).sum(-1)


class _Decay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, alpha):
        P = decay_forward(alpha)
        ctx.save_for_backward(P)
        return P

    @staticmethod
    def backward(ctx, grad):
        return decay_backward(*ctx.saved_tensors, grad)


def decay(alpha):
    """Products of retentions: alpha [..., C] -> P [..., C+1, C+1].

    P[t, s] = prod_{i=s+1..t} alpha_i for s <= t, else 0. Exact for every alpha in [0, 1], gradients
    included; differences of cumulative logarithms are not.
    """
    return _Decay.apply(alpha)


def unit_lower_inverse(L, block=16):
    """(I + tril(L, -1))^-1 for L [..., C, C]; what L holds on and above the diagonal is ignored.

    Forward substitution over blocks: as stable as a triangular solve (unlike the nilpotent product,
    whose powers of L grow when keys repeat), and several times faster than a batched LAPACK solve,
    because almost all of it is batched matrix products.
    """
    C = L.shape[-1]
    lead = L.shape[:-2]
    n = -(-C // block)
    L = L.reshape(-1, C, C)  # [N, C, C]
    if C % block:
        L = F.pad(L, (0, n * block - C) * 2)
    D = torch.stack([L[:, i : i + block, i : i + block] for i in range(0, n * block, block)], 1)
    one = torch.eye(block, dtype=L.dtype, device=L.device).expand_as(D)  # [N, n, block, block]
    D = torch.linalg.solve_triangular(D, one, upper=False, unitriangular=True)
    X = torch.zeros_like(L)
    for j in range(n):
        i = j * block
        end = i + block
        X[:, i:end, i:end] = D[:, j]
        if j:
            X[:, i:end, :i] = (D[:, j] @ (L[:, i:end, :i] @ X[:, :i, :i])).neg_()
    return X[:, :C, :C].reshape(*lead, C, C)


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, L, b):
        X = unit_lower_inverse(L)
        r = X @ b
        ctx.save_for_backward(X, r)
        ctx.set_materialize_grads(False)
        return r, X  # X is a result only so that the backward, too, can be differentiated

    @staticmethod
    def backward(ctx, dr, dX):
        X, r = ctx.saved_tensors
        dL = db = None
        if dr is not None:
            db = X.mT @ dr
            dL = -(db @ r.mT).tril(-1)
        if dX is not None:  # in a second derivative only
            d = -(X.mT @ dX @ X.mT).tril(-1)
            dL = d if dL is None else dL + d
        return dL, db


def solve(L, b):
    """r with (I + tril(L, -1)) r = b, for L [..., C, C] and b [..., C, n]."""
    return _Solve.apply(L, b)[0]


# --------------------------------------------------------------------------------------------------
# The short convolution


def silu_derivative(z):
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


class _CausalConv(torch.autograd.Function):
    """SiLU of a depthwise convolution, as shifted multiply-adds: faster than conv1d on a CPU.

    x [B, width-1+T, D], w [width, D] -> [B, T, D]. The backward computes the convolution again,
    which is cheaper than keeping what SiLU was applied to.
    """

    @staticmethod
    def convolve(x, w):
        T = x.shape[1] - len(w) + 1
        y = x[:, :T] * w[0]
        for j in range(1, len(w)):
            y.addcmul_(x[:, j : j + T], w[j])
        return y

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return F.silu(_CausalConv.convolve(x, w), inplace=True)

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        T = grad.shape[1]
        y = _CausalConv.convolve(x, w)
        if torch.is_grad_enabled():  # a second derivative is wanted, which the fused form has not
            grad = grad * silu_derivative(y)
        else:
            grad = torch.ops.aten.silu_backward(grad, y)
        dx = torch.zeros_like(x, dtype=grad.dtype)
        dw = []
        for j in range(len(w)):
            dx[:, j : j + T].addcmul_(grad, w[j])
            dw.append((x[:, j : j + T] * grad).sum((0, 1)))
        return dx, torch.stack(dw)


causal_convolution = _CausalConv.apply

# --------------------------------------------------------------------------------------------------
# The loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass, part by part, while a part's logits are there."""

    @staticmethod
    def forward(ctx, x, table, targets, at_once):
        wanted = ctx.needs_input_grad
        N = len(targets)
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        dx = torch.empty_like(x) if wanted[0] else None
        dtable = torch.zeros_like(table) if wanted[1] else None
        rows = max(1, at_once // len(table))
        for i in range(0, N, rows):
            part = x[i : i + rows]
            target = targets[i : i + rows, None]
            logits = F.linear(part, table)  # under autocast narrower than the rest
            narrow = logits.dtype
            logits = logits.to(torch.promote_types(narrow, torch.float32))
            logits.sub_(logits.amax(1, keepdim=True))  # first: a small loss keeps its digits
            top = logits.exp().sum(1, keepdim=True).log_()
            loss = loss + (top - logits.gather(1, target)).sum()
            p = logits.sub_(top).exp_()
            p.scatter_add_(1, target, p.new_full((), -1.0).expand_as(target))
            p = p.div_(N).to(narrow)
            if wanted[0]:
                dx[i : i + rows] = p @ table
            if wanted[1]:
                dtable += p.mT @ part
        ctx.save_for_backward(dx, dtable)
        return loss / N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        dx, dtable = (g if g is None else g * grad for g in ctx.saved_tensors)
        return dx, dtable, None, None


MANY_LOGITS = 2**25  # more are not held at once: 128 MiB in float32


def linear_cross_entropy(x, table, targets, at_once=MANY_LOGITS):
    """Mean cross-entropy in nats of the logits x table^T: a scalar in float32 at least.

    x [N, d], table [V, d], targets [N] int64. at_once: about as many logits are held at a time.
    First derivatives only.
    """
    return _LinearCrossEntropy.apply(x, table, targets, at_once)


# --------------------------------------------------------------------------------------------------
# One tile of the learning rule, for a layer of one or more memories


def tile_forward(W, S, k, v, u, q, c, eta, p, every=1):
    """Solve, read and write C tokens, by the equations and symbols at the top of memory.py.

        W, S   [M, R, d]    weights and momentum (or None: without)
        k, v   [M, C, d]    keys; vectors whose reads at W are a part of what is written, or 0
        u      [M, C, R]    the rest of what is written
        q      [N, C, d]    queries of the first d rows of every M / N-th layer, `every` = M / N
        c      [M, C+1, .]  weights of W_0, with momentum of S_0, and of every write, in W_t
        eta    [M, C]       step sizes
        p      [M, C+1]     products of theta at the end, of S_0 and of every write; or None

    Returns y [N, C, d], W and S at the end, X = (I + ..)^-1 and r.
    """
    C = k.shape[1]
    d = q.shape[-1]
    a = c[..., :1]
    b = c[..., 1:2]
    ce = c[..., -C:] * eta.unsqueeze(1)  # [M, C+1, C]
    r = torch.baddbmm(u, torch.addcmul(v, a[:, :C], k, value=-1), W.mT)
    past = a[::every, 1:] * (q @ W[::every, :d].mT)
    if S is not None:
        r.baddbmm_(b[:, :C] * k, S.mT, alpha=-1)
        past.baddbmm_(b[::every, 1:] * q, S[::every, :d].mT)
    X = unit_lower_inverse(ce[:, :C] * (k @ k.mT))
    r = X @ r
    # read at the running weights, then write
    y = past.baddbmm_(ce[::every, 1:] * (q @ k[::every].mT), r[::every, :, :d])
    W = torch.baddbmm(a[:, C:] * W, (ce[:, C].unsqueeze(-1) * r).mT, k)
    if S is not None:
        W.addcmul_(b[:, C:], S)
        last = (p[:, 1:] * eta).unsqueeze(-1)
        S = torch.baddbmm(p[:, :1, None] * S, r.mT, last * k)
    return y, W, S, X, r


def tile_backward(dy, dW, dS, W, S, X, r, k, v, q, c, eta, p, every=1):
    """Gradients dW, dS, dk, dv, du, dq, dc, deta and maybe dp, from dy and dW, dS at the end."""
    C = k.shape[1]
    d = q.shape[-1]
    a = c[..., :1]
    b = c[..., 1:2]
    ce = c[..., -C:] * eta.unsqueeze(1)
    last = ce[:, C].unsqueeze(-1)
    G = k @ k.mT  # again: keeping it for all chunks would be a seventh of all that is kept
    Gq = q @ k[::every].mT
    dp = []
    # through the write W_C = a_C W + (last * r)^T k
    dr = k @ dW.mT  # [M, C, R]
    dk = (last * r) @ dW
    d_last = torch.linalg.vecdot(dr, r)
    dr.mul_(last)
    da_C = torch.linalg.vecdot(dW.flatten(1), W.flatten(1))
    if S is not None:  # through S_C = p_0 S + r^T (last_S * k), and b_C S
        last_S = (p[:, 1:] * eta).unsqueeze(-1)
        dr.baddbmm_(last_S * k, dS.mT)
        d_key = r @ dS
        dk.addcmul_(last_S, d_key)
        d_last_S = torch.linalg.vecdot(d_key, k)
        db_C = torch.linalg.vecdot(dW.flatten(1), S.flatten(1))
        dp_0 = torch.linalg.vecdot(dS.flatten(1), S.flatten(1))
        dp = [torch.cat([dp_0.unsqueeze(-1), d_last_S * eta], -1)]
        dS = (p[:, :1, None] * dS).addcmul_(b[:, C:], dW)
    dW = a[:, C:] * dW
    # through the read y = a q W^T + b q S^T + (ce G_q) r
    dr[::every, :, :d].baddbmm_((ce[::every, 1:] * Gq).mT, dy)
    d_read = dy @ r[::every, :, :d].mT
    dyW = dy @ W[::every, :d]
    dW[::every, :d].baddbmm_((a[::every, 1:] * dy).mT, q)
    # through the solve (I + ce G) r = u + (v - a k) W^T - b k S^T
    du = X.mT @ dr
    d_solve = (du @ r.mT).neg_()
    dW.baddbmm_(du.mT, torch.addcmul(v, a[:, :C], k, value=-1))
    dv = du @ W
    dk.addcmul_(a[:, :C], dv, value=-1)
    # through the products of keys and queries
    dG = d_solve * ce[:, :C]
    dk.baddbmm_(dG + dG.mT, k)
    dG = d_read * ce[::every, 1:]
    dk[::every].baddbmm_(dG.mT, q)
    dq = torch.baddbmm(a[::every, 1:] * dyW, dG, k[::every])
    # through step sizes and decays
    dce = F.pad(d_solve.mul_(G), (0, 0, 0, 1))  # [M, C+1, C]
    dce[::every, 1:].addcmul_(d_read, Gq)
    dce[:, C].add_(d_last)
    deta = (dce * c[..., -C:]).sum(1)
    dc = F.pad(dce.mul_(eta.unsqueeze(1)), (c.shape[-1] - C, 0))
    dc[:, :C, 0] = -torch.linalg.vecdot(k, dv)
    dc[::every, 1:, 0] += torch.linalg.vecdot(dyW, q)
    dc[:, C, 0] += da_C
    if S is not None:  # its part of the read and the solve
        dyS = dy @ S[::every, :d]
        dS[::every, :d].baddbmm_((b[::every, 1:] * dy).mT, q)
        dq.addcmul_(b[::every, 1:], dyS)
        dS.baddbmm_(du.mT, b[:, :C] * k, alpha=-1)
        d_key = du @ S
        dk.addcmul_(b[:, :C], d_key, value=-1)
        deta.addcmul_(d_last_S, p[:, 1:])
        dc[:, :C, 1] = -torch.linalg.vecdot(k, d_key)
        dc[::every, 1:, 1] += torch.linalg.vecdot(dyS, q)
        dc[:, C, 1] += db_C
    return dW, dS, dk, dv, du, dq, dc, deta, *dp


# --------------------------------------------------------------------------------------------------
# Self-modifying Titans: all chunks of one layer

# deviation 27
TARGET = 2.0  # longest target of an MLP memory
LONGEST = 1000.0  # of weights and momentum, in Frobenius norm


def at_most(x, length):
    """(y, scale): x [..., d], scaled to `length` where it is longer, and by how much [..., 1]."""
    square = x.square().sum(-1, keepdim=True)
    scale = (square / length**2).clamp(min=1).rsqrt()
    return x * scale, scale


def at_most_backward(grad, y, scale, length):
    """The gradient at x, from that at y = x * scale."""
    along = torch.linalg.vecdot(y, grad).unsqueeze(-1) * (scale < 1) / length**2
    return scale * torch.addcmul(grad, along, y, value=-1)


def settled(W):
    """(W [..., m, n], scale): of norm LONGEST at most, where a chunk with momentum begins."""
    y, scale = at_most(W.flatten(-2), LONGEST)
    return y.view_as(W), scale


def to_blocks(rows, m):
    """rows [N, C, m d] of m memories -> [N m, C, d]."""
    return rows.unflatten(-1, (m, -1)).transpose(1, 2).flatten(0, 1)


def to_rows(blocks, m):
    """The inverse of `to_blocks`."""
    return blocks.unflatten(0, (-1, m)).transpose(1, 2).flatten(2)


def each(t, n):
    """t [N, ...] for each of n memories -> [N n, ...]; None stays None."""
    return t if t is None else t.repeat_interleave(n, 0)


class _SelfModify(torch.autograd.Function):
    """All chunks of one layer, defined by `SelfModifyingTitans._chunk` in titans.py.

    N = batch x heads; rows are [memory | k | v | q | eta | alpha | theta], R in number: with q only
    if that is adaptive, with theta only if there is momentum. n memories have an output of width d.

        x                [N, T, d]  inputs from a chunk boundary on
        q                [N, T, d]  queries of unit length, or None: they are adaptive
        W, W0            [N, R, d]  running weights (what was learned), initial weights
        b_eta, b_alpha   [N, 1]     biases of the gates
        A                [N, 1]     rate of forgetting, of each head
        chunk, step      tokens generated at once, inner step size
        b_theta, S       [N, 1] and [N, R, d], bias and running momentum, or None: without
        W2, W02, S2      [N n, d, d], the same of the second layers of MLPs, or None: matrices

    Returns y [N, T, d], W at the end, W at the last chunk boundary, adaptive queries or None, S at
    the end or None, and for MLPs W2 at the end, at the boundary, and S2, else None. y_t is W_t q_t
    of matrices, (W02 + W2_t) silu((W0 + W_t) q_t) of MLPs, memory's rows only. The backward walks
    the chunks in reverse with dW and dS, gradients at the chunk's end. First derivatives only.
    """

    # What limits it on one CPU thread (`python -m bench speed --profile hope`, d 256, 4 x 1024
    # tokens): with matrices 36% of a step, two thirds in batched products of 64 x 64 x 194, a third
    # in passes over [C, C] and [C, R]. Not measured on a GPU, where launches should bound it.

    @staticmethod
    def forward(ctx, x, q, W, W0, b_eta, b_alpha, A, chunk, step, b_theta=None, S=None, W2=None,
                W02=None, S2=None):
        T, d = x.shape[1:]
        adaptive = q is None
        momentum = S is not None
        mlp = W2 is not None
        m = 2 + adaptive  # of k, v and q come from rows
        n = 1 + m
        q = torch.empty_like(x) if adaptive else q
        y = torch.empty_like(x)
        nothing = x.new_zeros(())
        theta = rest = p = P_theta = zg = z = t = st = e = g2 = shrink = X2 = r2 = y1 = None
        saved = []
        for i in range(0, T, chunk):
            xc = x[:, i : i + chunk]
            qc = q[:, i : i + chunk]
            C = xc.shape[1]
            start = [W, S, W2, S2]
            scales = [None] * 4
            if momentum:  # deviation 27
                for j, weights in enumerate(start):
                    if weights is not None:
                        start[j], scales[j] = settled(weights)
                W, S, W2, S2 = start
            # generate from the boundary weights
            B = W + W0
            g = xc @ B[:, d:].mT  # [N, C, R - d]
            kv = g[..., : m * d]
            if mlp:
                B2 = W2 + W02
                zg = to_blocks(kv, m)
                kv = to_rows(F.silu(zg) @ B2.unflatten(0, (-1, n))[:, 1:].flatten(0, 1).mT, m)
            kv = kv.unflatten(-1, (m, d)) + xc.unsqueeze(2)  # [N, C, m, d]
            norm = torch.rsqrt(torch.linalg.vecdot(kv, kv).add_(EPS)).unsqueeze(-1)
            kv.mul_(norm)
            k, v, *made = kv.unbind(2)
            if adaptive:
                qc.copy_(made[0])
            z_alpha = g[..., m * d + 1] + b_alpha
            alpha = torch.exp(-step * A * F.softplus(z_alpha))
            sig = torch.sigmoid(g[..., m * d] + b_eta)
            eta = step * (1 + alpha) * sig
            c = P = decay_forward(alpha)  # [N, C+1, C+1]
            if momentum:
                z_theta = g[..., m * d + 2] + b_theta
                theta = torch.sigmoid(z_theta)
                rest = torch.sigmoid(-z_theta)  # 1 - theta, with all its digits
                eta.mul_(rest.square() / (1 + theta))
                P_theta = decay_forward(theta)
                p = P_theta[:, C]
                c = torch.cat([P[..., :1], P[..., 1:] @ P_theta[..., 1:, :]], -1)  # [N, C+1, C+2]
            vk = v - k
            if mlp:  # t: target, u2: without k; e: error at the boundary, g2: carried back to h
                rows = torch.cat([v, k], 1) @ B.mT  # [N, 2C, R]
                z = to_blocks(rows[..., : n * d], n)
                h = F.silu(z)  # [N n, 2C, d]
                t, e = (h @ B2.mT).split(C, 1)
                t, st = at_most(t.unflatten(0, (-1, n)) + v.unsqueeze(1), TARGET)  # deviation 27
                u2 = (t - k.unsqueeze(1)).flatten(0, 1)
                e = e - u2
                g2 = e @ B2
                shrink = 1 / (1 + B2.square().sum((-2, -1), keepdim=True))  # deviation 7
                u, _ = at_most(-shrink * torch.ops.aten.silu_backward(g2, z[:, C:]), 1.0)
                gates = rows[:, :C, n * d :].clamp(-TARGET, TARGET)
                u = [to_rows(u, n), gates - k @ W0[:, n * d :].mT]
                args = (k, nothing, torch.cat(u, -1))
            else:  # targets - residual - W0 k is v - k + W0 (v - k) + W v
                u = vk @ W0.mT
                u[..., : n * d].unflatten(-1, (n, d)).add_(vk.unsqueeze(2))
                args = (k, v, u)
            yc, W, S, X, r = tile_forward(W, S, *args, qc, c, eta, p)
            if mlp:
                y1 = yc.baddbmm_(qc, W0[:, :d].mT)
                h = h[:, C:]
                hq = F.silu(y1)
                eta2 = each(eta, n)
                eta2 = eta2 / (1 + eta2 * torch.linalg.vecdot(h, h))
                u2.baddbmm_(h, W02.mT, alpha=-1)
                args = (h, nothing, u2, hq, each(c, n), eta2, each(p, n), n)
                yc, W2, S2, X2, r2 = tile_forward(W2, S2, *args)
                yc.baddbmm_(hq, W02[::n].mT)
            y[:, i : i + chunk] = yc
            if any(ctx.needs_input_grad):
                saved += [*start, *scales, kv, norm, X, r, P, c, alpha, sig, eta, z_alpha]
                saved += [theta, rest, P_theta, p, zg, z, t, st, e, g2, shrink, X2, r2, y1]
        ctx.save_for_backward(x, q, W0, A, W02, *saved)
        ctx.options = (chunk, step, adaptive)
        # copies: the first boundary is an input
        boundary2 = start[2].clone() if mlp else None
        return y, W, start[0].clone(), q if adaptive else None, S, W2, boundary2, S2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, *grads):
        with torch.autocast(dy.device.type, enabled=False):
            return _SelfModify.gradients(ctx, dy, *grads)

    @staticmethod
    def gradients(ctx, dy, dW, d_boundary, dq, dS, dW2, d_boundary2, dS2):
        x, q, W0, A, W02, *saved = ctx.saved_tensors
        chunk, step, adaptive = ctx.options
        N, T, d = x.shape
        per_chunk = len(saved) // -(-T // chunk)
        mlp = W02 is not None
        m = 2 + adaptive
        n = 1 + m
        nothing = x.new_zeros(())
        silu_backward = torch.ops.aten.silu_backward
        dx = torch.empty_like(x)
        dq = dq if adaptive else torch.empty_like(x)
        dW0 = torch.zeros_like(W0)
        dW02 = torch.zeros_like(W02) if mlp else None
        dz = x.new_empty(W0.shape[1] - n * d, N, T)  # of eta, alpha, theta before their biases
        dA = torch.zeros_like(A)
        for i in range((T - 1) // chunk * chunk, -1, -chunk):
            j = i // chunk * per_chunk
            start = saved[j : j + 4]
            scales = saved[j + 4 : j + 8]
            kv, norm, X, r, P, c, alpha, sig, *more = saved[j + 8 : j + per_chunk]
            W, S, W2, S2 = start
            eta, z_alpha, theta, rest, P_theta, p, zg, z, *more = more
            t, st, e, g2, shrink, X2, r2, y1 = more
            xc = x[:, i : i + chunk]
            qc = q[:, i : i + chunk]
            dyc = dy[:, i : i + chunk]
            C = xc.shape[1]
            k, v = kv.unbind(2)[:2]
            B = W + W0
            if mlp:  # through the second layers
                h = F.silu(z)
                hq = F.silu(y1)
                hk = h[:, C:]
                eta_n = each(eta, n)
                part = 1 / (1 + eta_n * torch.linalg.vecdot(hk, hk))
                args = (X2, r2, hk, nothing, hq, each(c, n), eta_n * part, each(p, n), n)
                dW2, dS2, dh, _, du2, dhq, *more = tile_backward(dyc, dW2, dS2, W2, S2, *args)
                more[1].mul_(part.square_())  # of eta
                dh.addcmul_(hk, (more[1] * eta_n.square_()).unsqueeze(-1), value=-2)
                dh.baddbmm_(du2, W02, alpha=-1)
                dW02.baddbmm_(du2.mT, hk, alpha=-1)
                dW02[::n].baddbmm_(dyc.mT, hq)
                dyc = silu_backward(dhq.baddbmm_(dyc, W02[::n]), y1)
                dW0[:, :d].baddbmm_(dyc.mT, qc)
            args = (X, r, k, nothing if mlp else v, qc, c, eta, p)
            dW, dS, dk, dv, du, dqc, *rates = tile_backward(dyc, dW, dS, W, S, *args)
            if mlp:  # through the targets and the first layers' gradients
                for rate, rate2 in zip(rates, more, strict=True):
                    rate.add_(rate2.unflatten(0, (-1, n)).sum(1))
                dqc.baddbmm_(dyc, W0[:, :d])
                B2 = W2 + W02
                zk = z[:, C:]
                d_gates = du[..., n * d :]
                du = to_blocks(du[..., : n * d], n)
                slope = silu_backward(g2, zk)
                du = at_most_backward(du, *at_most(-shrink * slope, 1.0), 1.0)
                along = torch.linalg.vecdot(du, slope).sum(1)
                dB2 = 2 * shrink.square() * along[:, None, None] * B2
                dg2 = silu_backward(du.mul_(-shrink), zk)
                de = dg2 @ B2.mT
                dt = du2.sub_(de).unflatten(0, (-1, n))
                dk.sub_(dt.sum(1))
                dt = at_most_backward(dt, t, st, TARGET)
                d_out = torch.cat([dt.flatten(0, 1), de], 1)
                dB2.baddbmm_(e.mT, dg2).baddbmm_(d_out.mT, h)
                d_rows = d_out @ B2
                d_rows[:, C:].add_(dh)
                d_rows = silu_backward(d_rows, z)
                s = torch.sigmoid(zk)  # of SiLU's second derivative
                d_rows[:, C:].addcmul_(du.mul_(g2), s * (1 - s) * (2 + zk * (1 - 2 * s)))
                within = (v @ B[:, n * d :].mT).abs() <= TARGET
                d_targets = F.pad(d_gates * within, (0, 0, 0, C))
                d_rows = torch.cat([to_rows(d_rows, n), d_targets], -1)
                dB = d_rows.mT @ torch.cat([v, k], 1)
                dv, dk_rows = (d_rows @ B).split(C, 1)
                dk.add_(dk_rows).baddbmm_(d_gates, W0[:, n * d :], alpha=-1)
                dW0[:, n * d :].baddbmm_(d_gates.mT, k, alpha=-1)
                dv = dv + dt.sum(1)
            else:
                dW0.baddbmm_(du.mT, v - k)
                d_res = du[..., : n * d].unflatten(-1, (n, d)).sum(2).baddbmm_(du, W0)
                dk.sub_(d_res)
                dv = dv + d_res
            # Gradients of each weight in W_t, summed over all that W_t becomes; alpha_t multiplies
            # the weights in W_{t-1}. The same for S_t and theta, as S_t is a part of W_t.
            dc, deta, *dp = rates
            later = P[..., 1:].mT @ dc  # [N, C, as c]
            d_alpha = (later * c[:, :-1]).sum(-1)
            dzc = []
            if dS is not None:
                later = later[..., 1:]
                later[:, -1].add_(dp[0])
                later = P_theta[:, 1:, 1:].mT @ later
                d_theta = (later * P_theta[:, :-1]).sum(-1)
                dzc = [theta * (rest * d_theta - deta * eta * (2 + rest / (1 + theta)))]
                deta.mul_(rest.square() / (1 + theta))
            d_alpha.addcmul_(deta, sig, value=step).mul_(alpha)  # of log alpha
            dze = step * deta * (1 + alpha) * sig * (1 - sig)
            dza = -step * A * d_alpha * torch.sigmoid(z_alpha)
            dzc = torch.stack([dze, dza, *dzc])
            dz[..., i : i + chunk] = dzc
            dA.sub_((step * d_alpha * F.softplus(z_alpha)).sum(1, keepdim=True))
            # through the generation from the boundary weights
            if adaptive:
                dkv = torch.stack([dk, dv, dqc.add_(dq[:, i : i + chunk])], 2)
            else:
                dq[:, i : i + chunk] = dqc
                dkv = torch.stack([dk, dv], 2)
            along = torch.linalg.vecdot(kv, dkv).unsqueeze(-1)
            dkv.addcmul_(kv, along, value=-1).mul_(norm)
            dg = dkv.flatten(2)
            if mlp:
                dg = to_blocks(dg, m)
                dB2.unflatten(0, (-1, n))[:, 1:] += (dg.mT @ F.silu(zg)).unflatten(0, (-1, m))
                dg = dg @ B2.unflatten(0, (-1, n))[:, 1:].flatten(0, 1)
                dg = to_rows(silu_backward(dg, zg), m)
                dW2.add_(dB2)
                dW02.add_(dB2)
                dW.add_(dB)
                dW0.add_(dB)
            dg = torch.cat([dg, dzc.movedim(0, -1)], -1)
            dx[:, i : i + chunk] = torch.baddbmm(dkv.sum(2), dg, B[:, d:])
            dWg = dg.mT @ xc
            dW[:, d:].add_(dWg)
            dW0[:, d:].add_(dWg)
            if i + chunk >= T:
                dW.add_(d_boundary)
                if mlp:
                    dW2.add_(d_boundary2)
            if dS is not None:
                before = []
                for g, y, scale in zip((dW, dS, dW2, dS2), start, scales, strict=True):
                    if g is not None:
                        g = at_most_backward(g.flatten(1), y.flatten(1), scale, LONGEST).view_as(g)
                    before.append(g)
                dW, dS, dW2, dS2 = before
        db_eta, db_alpha, *db_theta = dz.sum(2, keepdim=True)
        rest = (None, None, *(db_theta or [None]), dS, dW2, dW02, dS2)
        return dx, None if adaptive else dq, dW, dW0, db_eta, db_alpha, dA, *rest


self_modify = _SelfModify.apply


def all_chunks(x, q, W, S, W0, gates, chunk, step, kernels=None, operands=None):
    """`self_modify` for batch and heads, by `kernels` (kernels.py) if given, in type `operands`.

    x, q [B, H, T, d]; W, S, W0: a list for the layers, [B, H, ...] or [H, ...]; gates: b_eta,
    b_alpha, A, b_theta, [H] each. q, S and b_theta may be None. Returns y as `_chunk`, W at the
    last chunk boundary, W and S at the end.
    """
    B, H, _, d = x.shape

    def flat(tensors):
        return [t if t is None else t.flatten(0, t.ndim - 3) for t in tensors]

    rows = [t.expand(B, *t.shape) for t in W0]
    first, *second = map(flat, zip(W, rows, S or (None, None), strict=False))
    gates = [t if t is None else t.expand(B, H).reshape(B * H, 1) for t in gates]
    made = W2 = boundary2 = S1 = S2 = None
    if kernels is not None:
        gates = [t.squeeze(1) for t in gates[:3]]
        args = (*(t.to(operands) for t in flat((x, q))), first[0], W0[0], *gates)
        y, W1, boundary = kernels.self_modify(*args, chunk, step)
    else:
        args = (*flat((x, q)), *first[:2], *gates[:3], chunk, step, gates[3], first[2])
        y, W1, boundary, made, S1, W2, boundary2, S2 = self_modify(*args, *sum(second, []))
    q = made.view_as(x) if q is None else q
    y = q + y.view_as(x) if second else q + q @ W0[0][:, :d].mT + y.view_as(x)

    def whole(*ends):
        return [t.view_as(start) for t, start in zip(ends, W, strict=False)]

    return y, whole(boundary, boundary2), whole(W1, W2), S and whole(S1, S2)


if __name__ == "__main__":
    print(__doc__)
