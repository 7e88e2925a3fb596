"""Hand-derived backward passes in torch, for what autograd does slowly or inexactly.

    fast form             what it computes                        defined by (its oracle in tests)
    decay                 products of retentions                  P in the equations of memory.py
    solve                 a unit lower triangular system          the same equations
    causal_convolution    SiLU of a short depthwise convolution   torch's conv1d
    self_modify           all chunks of self-modifying Titans     titans.SelfModifyingTitans._chunk

The last one has matrix memories only. `kernels_for` decides where kernels.py (Triton) takes over
from `memory.scan` and `self_modify`.
"""

import functools
import logging

import torch
import torch.nn.functional as F

EPS = 1e-6  # of l2norm and of the norms around memories

# --------------------------------------------------------------------------------------------------
# Which backend computes it

BACKENDS = ("auto", "torch", "triton")

# Whether "auto" takes the Triton kernels on a GPU. They equal torch under Triton's interpreter and
# compile for an H100, but have not run on a device: set True once `pytest -m gpu` passed on one.
KERNELS_PROVEN = False


def kernels_for(what, x, width, chunk=None, backend="auto"):
    """The module kernels.py where its Triton kernels fit x (device, dtype), the width of the keys
    and, in self-modification, the chunk in tokens; else None: torch computes it.

    backend: "torch" declines the kernels, "triton" insists on them, "auto" takes them on a GPU once
    they are proven. Why they do not fit is logged, once for each reason.
    Raises ValueError for an unknown backend, and for "triton" where the kernels do not fit.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "torch" or (backend == "auto" and not (KERNELS_PROVEN and x.is_cuda)):
        return None
    try:
        import kernels

        reason = kernels.unfit(x, width, chunk)
    except ImportError as error:
        reason = f"Triton is missing ({error})"
    if reason is None:
        return kernels
    if backend == "triton":
        raise ValueError(f"backend 'triton' cannot run {what}: {reason}")
    _log_once(f"{what} runs in torch, far slower than the fused kernels would: {reason}")
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
# Self-modifying Titans with matrix memories: all chunks of one layer


class _SelfModify(torch.autograd.Function):
    """All chunks of one layer, defined by `SelfModifyingTitans._chunk` in titans.py.

    N = batch x heads; rows are [memory | k | v | q | eta | alpha | theta], R in number: with q only
    if that is adaptive, with theta only if there is momentum.

        x                [N, T, d]  inputs from a chunk boundary on
        q                [N, T, d]  queries of unit length, or None: they are adaptive
        W, W0            [N, R, d]  running weights (what was learned), initial weights
        b_eta, b_alpha   [N, 1]     biases of the gates
        A                [N, 1]     rate of forgetting, of each head
        chunk, step      tokens generated at once, inner step size
        b_theta, S       [N, 1] and [N, R, d], bias and running momentum, or None: without

    Returns y [N, T, d] with y_t = W_t q_t (memory's rows only), W at the end, W at the last chunk
    boundary, adaptive queries or None, S at the end or None. Symbols as at the top of memory.py; G
    are the products of keys and queries. The backward walks the chunks in reverse with dW and dS,
    the gradients of weights and momentum at the chunk's end. First derivatives only.
    """

    # What limits it on one CPU thread (`python -m bench speed --profile hope`: one training step,
    # d 256, 4 x 1024 tokens): this function takes 36% of the step (forward 13%, backward 23%), the
    # projections and MLPs around it 42%. Two thirds of its time are batched products of
    # 64 x 64 x 194, a third passes over the [C, C] decays and [C, R] errors between them. It was
    # not measured on a GPU, where the launches of these small kernels should bound it.

    @staticmethod
    def forward(ctx, x, q, W, W0, b_eta, b_alpha, A, chunk, step, b_theta=None, S=None):
        T, d = x.shape[1:]
        adaptive = q is None
        momentum = S is not None
        m = 2 + adaptive  # of k, v and q come from rows
        n = d * (1 + m)
        if adaptive:
            q = torch.empty_like(x)
        y = torch.empty_like(x)
        saved = []
        for i in range(0, T, chunk):
            xc = x[:, i : i + chunk]
            qc = q[:, i : i + chunk]
            C = xc.shape[1]
            boundary = W
            # generate from the boundary weights
            g = xc @ (W + W0)[:, d:].mT  # [N, C, R - d]
            kv = g[..., : m * d].unflatten(-1, (m, d)) + xc.unsqueeze(2)  # [N, C, m, d]
            norm = torch.rsqrt(torch.linalg.vecdot(kv, kv).add_(EPS)).unsqueeze(-1)
            kv.mul_(norm)
            k, v, *made = kv.unbind(2)
            if adaptive:
                qc.copy_(made[0])
            z_alpha = g[..., m * d + 1] + b_alpha
            alpha = torch.exp(-step * A * F.softplus(z_alpha))
            sig = torch.sigmoid(g[..., m * d] + b_eta)
            eta = step * (1 + alpha) * sig
            # solve for the errors r [N, C, R] of all rows, whose right-hand side is
            # targets - residual - a W k = v - k + W0 (v - k) + W (v - a k)
            c = P = decay_forward(alpha)  # [N, C+1, C+1]
            if momentum:
                S_boundary = S
                theta = torch.sigmoid(g[..., m * d + 2] + b_theta)
                eta.mul_(1 - theta)
                P_theta = decay_forward(theta)
                # [N, C+1, C+2]: of W_0, of S_0, of every write, in W_t
                c = torch.cat([P[..., :1], P[..., 1:] @ P_theta[..., 1:, :]], -1)
                b = c[..., 1:2]
            a = c[..., :1]
            ce = c[..., -C:] * eta.unsqueeze(1)  # [N, C+1, C]
            kq = torch.cat([k, qc], 1)  # [N, 2C, d]
            G = kq @ k.mT  # [N, 2C, C], of keys, then of queries
            Z = torch.addcmul(v, a[:, :C], k, value=-1)
            vk = v - k
            r = torch.baddbmm(vk @ W0.mT, Z, W.mT)
            r[..., :n].unflatten(-1, (1 + m, d)).add_(vk.unsqueeze(2))
            if momentum:
                r.baddbmm_(b[:, :C] * k, S.mT, alpha=-1)
            X = unit_lower_inverse(ce[:, :C] * G[:, :C])
            r = X @ r
            # read at the running weights, then write
            past = a[:, 1:] * (qc @ W[:, :d].mT)
            if momentum:
                past.baddbmm_(b[:, 1:] * qc, S[:, :d].mT)
            y[:, i : i + chunk] = torch.baddbmm(past, ce[:, 1:] * G[:, C:], r[..., :d])
            W = torch.baddbmm(a[:, C:] * W, (ce[:, C].unsqueeze(-1) * r).mT, k)
            if momentum:
                W.addcmul_(b[:, C:], S)
                last = (P_theta[:, C, 1:] * eta).unsqueeze(-1)
                S = torch.baddbmm(P_theta[:, C:, :1] * S, r.mT, last * k)
            if any(ctx.needs_input_grad):
                saved += [boundary, kv, norm, X, r, P, alpha, sig, z_alpha]
                if momentum:
                    saved += [S_boundary, theta, P_theta, c]
        ctx.save_for_backward(x, q, W0, A, *saved)
        ctx.chunk = chunk
        ctx.step = step
        ctx.adaptive = adaptive
        # a copy: the first boundary is an input
        return y, W, boundary.clone(), q if adaptive else None, S

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, *grads):
        with torch.autocast(dy.device.type, enabled=False):
            return _SelfModify.gradients(ctx, dy, *grads)

    @staticmethod
    def gradients(ctx, dy, dW, d_boundary, dq, dS):
        x, q, W0, A, *saved = ctx.saved_tensors
        N, T, d = x.shape
        chunk = ctx.chunk
        step = ctx.step
        per_chunk = len(saved) // -(-T // chunk)
        momentum = dS is not None
        m = 2 + ctx.adaptive
        n = d * (1 + m)
        dx = torch.empty_like(x)
        if not ctx.adaptive:
            dq = torch.empty_like(x)
        dW0 = torch.zeros_like(W0)
        dz = x.new_empty(W0.shape[1] - n, N, T)  # of eta, alpha, theta before their biases
        dA = torch.zeros_like(A)
        for i in range((T - 1) // chunk * chunk, -1, -chunk):
            j = i // chunk * per_chunk
            W, kv, norm, X, r, P, alpha, sig, z_alpha, *more = saved[j : j + per_chunk]
            xc = x[:, i : i + chunk]
            qc = q[:, i : i + chunk]
            dyc = dy[:, i : i + chunk]
            C = xc.shape[1]
            k, v = kv.unbind(2)[:2]
            kq = torch.cat([k, qc], 1)
            one_alpha = 1 + alpha
            G = kq @ k.mT  # again: keeping it for all chunks would be a seventh of all that is kept
            eta = step * one_alpha * sig
            c = P
            if momentum:
                S, theta, P_theta, c = more
                eta.mul_(1 - theta)
                b = c[..., 1:2]
            a = c[..., :1]
            ce = c[..., -C:] * eta.unsqueeze(1)
            last = ce[:, C].unsqueeze(-1)
            # through the write W_C = a_C W + (last * r)^T k
            dr = k @ dW.mT  # [N, C, R]
            dk = (last * r) @ dW
            d_last = torch.linalg.vecdot(dr, r)
            dr.mul_(last)
            da_C = torch.linalg.vecdot(dW.flatten(1), W.flatten(1))
            if momentum:  # through S_C = P_theta[C, 0] S + r^T (last_S * k), and b_C S
                last_S = (P_theta[:, C, 1:] * eta).unsqueeze(-1)
                dr.baddbmm_(last_S * k, dS.mT)
                d_key = r @ dS
                dk.addcmul_(last_S, d_key)
                d_last_S = torch.linalg.vecdot(d_key, k)
                db_C = torch.linalg.vecdot(dW.flatten(1), S.flatten(1))
                dp_C = torch.linalg.vecdot(dS.flatten(1), S.flatten(1))
                dS = (P_theta[:, C:, :1] * dS).addcmul_(b[:, C:], dW)
            dW = a[:, C:] * dW
            # through the read y = a q W^T + b q S^T + (ce G_q) r
            dr[..., :d].baddbmm_((ce[:, 1:] * G[:, C:]).mT, dyc)
            d_read = dyc @ r[..., :d].mT
            dyW = dyc @ W[:, :d]
            dW[:, :d].baddbmm_((a[:, 1:] * dyc).mT, qc)
            if momentum:
                dyS = dyc @ S[:, :d]
                dS[:, :d].baddbmm_((b[:, 1:] * dyc).mT, qc)
            # through the solve (I + ce G_k) r = v - k + (v - k) W0^T + (v - a k) W^T - b k S^T
            dr = X.mT @ dr
            d_solve = (dr @ r.mT).neg_()
            dW.baddbmm_(dr.mT, torch.addcmul(v, a[:, :C], k, value=-1))
            dW0.baddbmm_(dr.mT, v - k)
            dZ = dr @ W
            d_res = dr[..., :n].unflatten(-1, (1 + m, d)).sum(2).baddbmm_(dr, W0)
            dk.addcmul_(a[:, :C], dZ, value=-1).sub_(d_res)
            dv = dZ + d_res
            if momentum:
                dS.baddbmm_(dr.mT, b[:, :C] * k, alpha=-1)
                dZS = dr @ S
                dk.addcmul_(b[:, :C], dZS, value=-1)
            # through the products of keys and queries, G = [k; q] k^T
            dG = torch.cat([d_solve * ce[:, :C], d_read * ce[:, 1:]], 1)
            dk.baddbmm_(dG.mT, kq)
            dkq = dG @ k
            dk.add_(dkq[:, :C])
            dqc = dkq[:, C:].addcmul_(a[:, 1:], dyW)
            if momentum:
                dqc.addcmul_(b[:, 1:], dyS)
            # through step sizes and retention
            dce = F.pad(d_solve.mul_(G[:, :C]), (0, 0, 0, 1))  # [N, C+1, C]
            dce[:, 1:].addcmul_(d_read, G[:, C:])
            dce[:, C].add_(d_last)
            deta = (dce * c[..., -C:]).sum(1)
            da = F.pad(torch.linalg.vecdot(dyW, qc), (1, 0))
            da[:, :C].sub_(torch.linalg.vecdot(k, dZ))
            da[:, C].add_(da_C)
            dc = [da.unsqueeze(-1), dce * eta.unsqueeze(1)]
            if momentum:
                db = F.pad(torch.linalg.vecdot(dyS, qc), (1, 0))
                db[:, :C].sub_(torch.linalg.vecdot(k, dZS))
                db[:, C].add_(db_C)
                dc.insert(1, db.unsqueeze(-1))
            # Gradients of each weight in W_t, summed over all that W_t becomes; alpha_t multiplies
            # the weights in W_{t-1}. The same for S_t and theta, as S_t is a part of W_t.
            later = P[..., 1:].mT @ torch.cat(dc, -1)  # [N, C, as c]
            d_alpha = (later * c[:, :-1]).sum(-1)
            dzc = []
            if momentum:
                later = later[..., 1:]
                later[:, -1, 0].add_(dp_C)
                later[:, -1, 1:].addcmul_(d_last_S, eta)
                later = P_theta[:, 1:, 1:].mT @ later
                d_theta = (later * P_theta[:, :-1]).sum(-1)
                deta.addcmul_(d_last_S, P_theta[:, C, 1:])
                dzc = [theta * ((1 - theta) * d_theta - deta * eta)]
                deta.mul_(1 - theta)
            d_alpha.addcmul_(deta, sig, value=step).mul_(alpha)  # of log alpha
            dze = step * deta * one_alpha * sig * (1 - sig)
            dza = -step * A * d_alpha * torch.sigmoid(z_alpha)
            dzc = torch.stack([dze, dza, *dzc])
            dz[..., i : i + chunk] = dzc
            dA.sub_((step * d_alpha * F.softplus(z_alpha)).sum(1, keepdim=True))
            # through the generation from the boundary weights
            if ctx.adaptive:
                dkv = torch.stack([dk, dv, dqc.add_(dq[:, i : i + chunk])], 2)
            else:
                dq[:, i : i + chunk] = dqc
                dkv = torch.stack([dk, dv], 2)
            along = torch.linalg.vecdot(kv, dkv).unsqueeze(-1)
            dkv.addcmul_(kv, along, value=-1).mul_(norm)
            dg = torch.cat([dkv.flatten(2), dzc.movedim(0, -1)], -1)
            dx[:, i : i + chunk] = torch.baddbmm(dkv.sum(2), dg, (W + W0)[:, d:])
            dWg = dg.mT @ xc
            dW[:, d:].add_(dWg)
            dW0[:, d:].add_(dWg)
            if i + chunk >= T:
                dW.add_(d_boundary)
        if ctx.adaptive:
            dq = None
        db_eta, db_alpha, *db_theta = dz.sum(2, keepdim=True)
        return dx, dq, dW, dW0, db_eta, db_alpha, dA, None, None, *(db_theta or [None]), dS


self_modify = _SelfModify.apply


def all_chunks(x, q, W, S, W0, gates, chunk, step, kernels=None, operands=None):
    """`self_modify` for batch and heads, by `kernels` (kernels.py) if given, in type `operands`.

    x, q [B, H, T, d], W, S [B, H, R, d], W0 [H, R, d], gates: b_eta, b_alpha, A, b_theta, [H] each.
    q, S and b_theta may be None. Returns y with y_t = q_t + (W0 + W_t) q_t, W at the last chunk
    boundary, W and S at the end.
    """
    B, H, _, d = x.shape
    flat = [t if t is None else t.flatten(0, 1) for t in (x, q, W, S)]
    gates = [t if t is None else t.expand(B, H).reshape(B * H, 1) for t in gates]
    made = None
    if kernels is not None:
        args = (flat[0].to(operands), flat[1].to(operands), flat[2], W0)
        y, W, boundary = kernels.self_modify(*args, *(t.squeeze(1) for t in gates[:3]), chunk, step)
    else:
        args = (*flat[:3], W0.expand(B, *W0.shape).flatten(0, 1), *gates[:3], chunk, step)
        y, W, boundary, made, S = self_modify(*args, gates[3], flat[3])
    out = (y, boundary, W, S, made)
    y, boundary, W, S, made = (t if t is None else t.unflatten(0, (B, H)) for t in out)
    if q is None:
        q = made
    return q + q @ W0[:, :d].mT + y, boundary, W, S
