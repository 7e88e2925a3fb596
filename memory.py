"""Associative memory: the one learning rule behind every model of this project, and the memory networks it trains.

A memory maps keys to values and learns while it reads. Its fast weights follow, per head, for t = 1..T

    e_t = eta_t * (u_t - delta_t * W_{t-1} k_t)        # surprise;  delta = 1: delta rule (DGD),  delta = 0: plain write
    S_t = theta_t * S_{t-1} + e_t k_t^T                # momentum   (theta absent: S_t = e_t k_t^T)
    W_t = alpha_t * W_{t-1} + S_t                      # retention
    y_t = W_t q_t                                      # read

Without momentum and with delta = 1 this is W_t = W_{t-1} (alpha_t I - eta_t k_t k_t^T) + eta_t u_t k_t^T  (NL eq. 57, 88, 92).

Glossary, in NL's names (the Titans paper swaps two of them):

    k, q   [..., T, dk]  key written to, key read from          eta    [..., T]  step size of the inner learning
    u      [..., T, dv]  what is written: target or -gradient   alpha  [..., T]  retention in (0, 1]; 1 forgets nothing
    W, S   [..., dv, dk] fast weights and their momentum        theta  [..., T]  decay of the momentum, in [0, 1)
    tile   tokens that `scan` computes at once; never changes the result           delta  number or [..., T]
    chunk  tokens that share their gradients: part of a *model* (see `titans_linear`), changes the result

The recurrence is sequential, yet a tile of C tokens can be computed at once, exactly. Let P[t, s] = prod_{i=s+1..t} alpha_i
(t, s = 0..C, lower triangular) and likewise with theta. Then c = P_alpha P_theta (c = P_alpha without momentum) is the
weight of write s in W_t, a = P_alpha[:, 0] and b = c[:, 0] are the weights of W_0 and S_0, and the errors
r_t = u_t - delta_t W_{t-1} k_t, so that e = eta r, solve one unit lower triangular system:

    (I + delta_t c[t-1, s] eta_s (k_t . k_s)) r = u - delta * (a_prev * K W_0^T + b_prev * K S_0^T)
    y   = a * Q W_0^T + b * Q S_0^T + (c[t, s] eta_s (q_t . k_s)) r
    W_C = a_C W_0 + b_C S_0 + (c[C, :] * eta * r)^T K                 S_C = P_theta[C, 0] S_0 + (P_theta[C, :] * eta * r)^T K

Solving for r and not for e = eta r keeps every gradient free of divisions, also at eta = 0.

`python memory.py` shows a memory at work, and which settings of the rule are which published model.
"""

import contextlib
import functools
import logging

import torch
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------------------------
# Three small pieces of algebra, each with the backward that autograd would not find


def decay_forward(alpha):
    """alpha [..., C] -> P [..., C+1, C+1], see `decay`."""
    C = alpha.shape[-1]
    below = torch.ones(C + 1, C + 1, dtype=torch.bool, device=alpha.device).tril_(-1)
    rows = F.pad(alpha, (1, 0)).unsqueeze(-1)  # row t holds alpha_t
    return torch.where(below, rows, rows.new_ones(())).cumprod(-2).tril_()


def decay_backward(P, grad):
    """d alpha_i = sum_{s < i <= t} grad[t, s] P[t, i] P[i-1, s]. No division: exact at zeros and where products underflow."""
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
    """Products of retentions: alpha [..., C] -> P [..., C+1, C+1] with P[t, s] = prod_{i=s+1..t} alpha_i for s <= t, else 0.

    Exact for every alpha in [0, 1], gradients included; differences of cumulative logarithms are not.
    """
    return _Decay.apply(alpha)


def unit_lower_inverse(L, block=16):
    """(I + tril(L, -1))^-1 for L [..., C, C]; what L holds on and above the diagonal is ignored.

    Forward substitution over blocks: as stable as a triangular solve (unlike the nilpotent product, whose powers of L
    grow when keys repeat), and several times faster than a batched LAPACK solve, because almost all of it is bmm.
    """
    C, lead = L.shape[-1], L.shape[:-2]
    n = -(-C // block)
    L = L.reshape(-1, C, C)
    if C % block:
        L = F.pad(L, (0, n * block - C) * 2)
    D = torch.stack([L[:, i : i + block, i : i + block] for i in range(0, n * block, block)], 1)
    D = torch.linalg.solve_triangular(D, torch.eye(block, dtype=L.dtype, device=L.device).expand_as(D),
                                      upper=False, unitriangular=True)  # fmt: skip
    X = torch.zeros_like(L)
    for j in range(n):
        i, end = j * block, (j + 1) * block
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
    """r with (I + tril(L, -1)) r = b, for L [..., C, C] and b [..., C, n] of the same leading dimensions."""
    return _Solve.apply(L, b)[0]


def full_precision(t):
    """t, in float32 if it was narrower: fast weights add up many small steps, and solves need the digits."""
    return t.float() if torch.is_tensor(t) and t.dtype in (torch.bfloat16, torch.float16) else t


def l2norm(x, eps=1e-6):
    """x [..., d] scaled to unit length along its last dimension (vectors far below sqrt(eps) stay small)."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


# ---------------------------------------------------------------------------------------------------------------------
# The learning rule: the definition, then the fast form, in torch and (kernels.py) in Triton


# Whether "auto" takes the kernels on a GPU. They equal torch under Triton's interpreter and compile for an H100, but have
# not yet run on a device: to be True once `pytest -m gpu` has passed on one. Until then backend="triton" asks for them.
AUTO_KERNELS = False


@contextlib.contextmanager
def no_auto_kernels():
    """Within, "auto" is torch: the kernels have no second derivative."""
    global AUTO_KERNELS
    before, AUTO_KERNELS = AUTO_KERNELS, False
    try:
        yield
    finally:
        AUTO_KERNELS = before


@functools.cache
def _log_once(message):
    logging.getLogger(__name__).warning(message)


def fused(what, x, width, chunk=None, backend="auto"):
    """kernels.py where its Triton kernels fit x (device, dtype), the width of keys and, of self-modification, the chunk in
    tokens; else None: torch.

    Not to have them on a GPU is logged, once for each reason. backend "torch" declines them; "triton" insists: ValueError.
    """
    if backend == "torch" or backend == "auto" and not (AUTO_KERNELS and x.is_cuda):
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
    _log_once(f"{what} runs in torch, many times slower than the fused kernels would: {reason}")


_seen = None  # a list while `watch` looks on


@contextlib.contextmanager
def watch():
    """A list to which every `scan` within adds its mean (eta, alpha): how fast memories learn and how much they retain."""
    global _seen
    _seen = []
    try:
        yield _seen
    finally:
        _seen = None


def scan_stepwise(W, k, u, eta, alpha, q=None, *, theta=None, S=None, delta=1.0):
    """The definition of `scan`, token by token; the oracle of every faster form. Arguments and results of `scan`."""
    args = _aligned(W, k, u, eta, alpha, q, theta, S, delta)
    W, k, u, eta, alpha, q, theta, S, delta = map(full_precision, args)
    y = []
    for t in range(k.shape[-2]):
        d = delta[..., t, None] if torch.is_tensor(delta) else delta
        e = eta[..., t, None] * (u[..., t, :] - d * (W @ k[..., t, :, None]).squeeze(-1))
        step = e[..., :, None] * k[..., t, None, :]
        if theta is not None:
            step = S = theta[..., t, None, None] * S + step
        W = alpha[..., t, None, None] * W + step
        if q is not None:
            y.append((W @ q[..., t, :, None]).squeeze(-1))
    return torch.stack(y, -2) if y else None, W, S


def scan(W, k, u, eta, alpha, q=None, *, theta=None, S=None, delta=1.0, tile=64, backend="auto"):
    """The learning rule over T tokens, in tiles: exactly `scan_stepwise`, at the speed of matrix products.

    W [..., dv, dk] start weights; k [..., T, dk]; u [..., T, dv]; eta, alpha [..., T]; q [..., T, dk] or None;
    theta [..., T] or None, S [..., dv, dk] its start (default zero); delta a number or [..., T]. Leading dimensions
    broadcast. alpha in (0, 1], theta in [0, 1); these ranges are the caller's (checking would cost a synchronisation).

    Returns (y [..., T, dv] or None without q, W_T [..., dv, dk], S_T or None without theta), in float32 at least, also
    under autocast. Differentiable, also twice, in every tensor: the outer gradient flows through the inner updates into W.
    Nothing is written in place. backend: "auto" takes the fused kernels on a GPU where they fit (dk <= 64; see AUTO_KERNELS),
    else torch; "torch" and "triton" insist. The kernels have first derivatives only, and where k, u and q are bfloat16 they
    multiply in bfloat16 (sums, states and the solve stay float32).
    Raises ValueError for shapes that do not fit, tile < 1, S without theta, a backend that is unknown or cannot run.
    """
    if tile < 1:
        raise ValueError(f"tile must be at least 1, got {tile}")
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend must be 'auto', 'torch' or 'triton', got {backend!r}")
    if _seen is not None:
        _seen.append((eta.mean(), alpha.mean()))
    args = _aligned(W, k, u, eta, alpha, q, theta, S, delta)
    kernels = fused("scan", k, k.shape[-1], backend=backend)
    if kernels is not None:
        return kernels.scan(*args, tile)
    W, k, u, eta, alpha, q, theta, S, delta = map(full_precision, args)
    y = []
    with torch.autocast(k.device.type, enabled=False):
        for i in range(0, k.shape[-2], tile):
            now = slice(i, i + tile)
            y_tile, W, S = _tile(
                W, S, k[..., now, :], u[..., now, :], eta[..., now], alpha[..., now],
                None if q is None else q[..., now, :], None if theta is None else theta[..., now],
                delta[..., now] if torch.is_tensor(delta) else delta,
            )  # fmt: skip
            y.append(y_tile)
    return torch.cat(y, -2) if q is not None else None, W, S


def _tile(W, S, k, u, eta, alpha, q, theta, delta):
    """One tile of `scan`, in the order and the symbols of the equations at the top of this file."""
    C = k.shape[-2]
    P = c = decay(alpha)
    if theta is not None:
        P_theta = decay(theta)
        c = P[..., 1:] @ P_theta[..., 1:, :]  # sum over s <= j <= t of P[t, j] P_theta[j, s]
        b = c[..., :1]
    a, ce = P[..., :1], c[..., 1:] * eta.unsqueeze(-2)

    def start(x, rows):  # what W_0 and S_0 contribute to W_t x, for the given rows t
        y = a[..., rows, :] * (x @ W.mT)
        return y if theta is None else y + b[..., rows, :] * (x @ S.mT)

    r = u
    if torch.is_tensor(delta) or delta != 0:
        d = delta.unsqueeze(-1) if torch.is_tensor(delta) else delta
        r = solve(d * ce[..., :C, :] * (k @ k.mT), u - d * start(k, slice(0, C)))
    y = None
    if q is not None:
        y = start(q, slice(1, None)) + (ce[..., 1:, :] * (q @ k.mT)) @ r
    W_C = a[..., C:, :] * W + (ce[..., C, :, None] * r).mT @ k
    if theta is not None:
        W_C = W_C + b[..., C:, :] * S
        S = P_theta[..., C:, :1] * S + ((P_theta[..., C, 1:] * eta).unsqueeze(-1) * r).mT @ k
    return y, W_C, S


def _aligned(W, k, u, eta, alpha, q, theta, S, delta):
    """Check every shape, then broadcast the leading dimensions (as views)."""
    if W.ndim < 2:
        raise ValueError(f"W must be [..., dv, dk], got shape {tuple(W.shape)}")
    dv, dk = W.shape[-2:]
    T = k.shape[-2] if k.ndim >= 2 else 0
    if T < 1:
        raise ValueError(f"k must be [..., T, dk] with T >= 1, got shape {tuple(k.shape)}")
    if S is not None and theta is None:
        raise ValueError("S (momentum) was given without theta, its decay")
    matrices = {"k": (k, (T, dk)), "u": (u, (T, dv)), "q": (q, (T, dk)), "S": (S, (dv, dk))}
    series = {"eta": eta, "alpha": alpha, "theta": theta, "delta": delta if torch.is_tensor(delta) else None}
    wanted = matrices | {name: (x, (T,)) for name, x in series.items()}
    wanted["W"] = (W, (dv, dk))
    lead = ()
    for name, (x, tail) in wanted.items():
        if x is None:
            continue
        if tuple(x.shape[-len(tail) :]) != tail:
            raise ValueError(f"{name} must end in {tail} (T = {T}, dv = {dv}, dk = {dk}), got shape {tuple(x.shape)}")
        try:
            lead = torch.broadcast_shapes(lead, x.shape[: x.ndim - len(tail)])
        except RuntimeError:
            shape = tuple(x.shape)
            raise ValueError(f"{name}: leading dimensions of shape {shape} do not broadcast with {tuple(lead)}") from None
    out = {name: x if x is None else x.expand(lead + tail) for name, (x, tail) in wanted.items()}
    if theta is not None and S is None:
        out["S"] = torch.zeros_like(out["W"])
    delta = delta if out["delta"] is None else out["delta"]
    return out["W"], out["k"], out["u"], out["eta"], out["alpha"], out["q"], out["theta"], out["S"], delta


# ---------------------------------------------------------------------------------------------------------------------
# Published models as settings of the rule: q, k [..., T, dk], v [..., T, dv]; W starts at zero; all return scan's (y, W_T, S_T)


def _zeros(v, k):
    return v.new_zeros(*torch.broadcast_shapes(v.shape[:-2], k.shape[:-2]), v.shape[-1], k.shape[-1])


def linear_attention(q, k, v, W=None):
    """W_t = W_{t-1} + v_t k_t^T (NL eq. 14-18)."""
    return retention(q, k, v, k.new_ones(k.shape[-2]), W)


def retention(q, k, v, alpha, W=None):
    """W_t = alpha_t W_{t-1} + v_t k_t^T: RetNet with a fixed alpha [heads, 1], Mamba-2 with alpha from x_t."""
    W = _zeros(v, k) if W is None else W
    if alpha.shape[-1:] == (1,):
        alpha = alpha.expand(*alpha.shape[:-1], k.shape[-2])
    return scan(W, k, v, torch.ones_like(alpha), alpha, q, delta=0.0)


def delta_net(q, k, v, beta, W=None):
    """W_t = W_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T."""
    return gated_delta_net(q, k, v, beta, torch.ones_like(beta), W)


def gated_delta_net(q, k, v, beta, alpha, W=None):
    """W_t = alpha_t W_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T: retention comes before the error, so delta = alpha."""
    W = _zeros(v, k) if W is None else W
    return scan(W, k, v, beta, alpha, q, delta=alpha)


def titans_linear(q, k, v, eta, theta, alpha, chunk, W=None, S=None):
    """Titans with a matrix memory: momentum of l2 gradients taken at the weights of the chunk boundary (`chunk` in tokens)."""
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    for name, rate in {"eta": eta, "theta": theta, "alpha": alpha}.items():
        if rate.shape[-1:] != k.shape[-2:-1]:
            raise ValueError(f"{name} must be [..., T] with T = {k.shape[-2]}, got shape {tuple(rate.shape)}")
    W = _zeros(v, k) if W is None else W
    layers, momentum, y = [W], None if S is None else [S], []
    for i in range(0, k.shape[-2], chunk):
        now = slice(i, i + chunk)
        y_chunk, layers, momentum = write(
            layers, k[..., now, :], v[..., now, :], eta[..., now], alpha[..., now], q[..., now, :],
            theta=theta[..., now], momentum=momentum, delta=0.0, residual=False,
        )  # fmt: skip
        y.append(y_chunk)
    return torch.cat(y, -2), layers[0], momentum[0]


# ---------------------------------------------------------------------------------------------------------------------
# Memory networks: a memory is a list of layers, layers[l] [..., d_out, d_in]; one layer is a matrix, two the MLP of NL eq. 89


def silu_derivative(z):
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


# Gradient of each objective at the memory's output y for target v (NL section 3; Huber and Lp as in MIRAS).
OBJECTIVES = {
    "dot": lambda y, v: -v.expand_as(y),  # -<y, v>, Hebbian
    "l2": lambda y, v: y - v,  # 1/2 |y - v|^2
    "huber": lambda y, v: (y - v).clamp(-1, 1),  # quadratic within 1, linear beyond
    "lp": lambda y, v: (y - v) * (y - v).abs(),  # 1/3 |y - v|^3 summed, p = 3
}


def _check_network(layers, residual, **ends):
    """ValueError unless the layers chain, and their ends fit the widths of the named tensors (input first, then output)."""
    shapes = ", ".join(str(tuple(W.shape)) for W in layers)
    if any(below.shape[-2] != W.shape[-1] for below, W in zip(layers, layers[1:], strict=False)):
        raise ValueError(f"layers must chain, each [..., d_out, d_in] with the d_out below it as d_in, got {shapes}")
    d_in, d_out = layers[0].shape[-1], layers[-1].shape[-2]
    if residual and d_in != d_out:
        raise ValueError(f"a residual memory needs d_in = d_out, got {d_in} and {d_out} from layers {shapes}")
    for (name, x), width in zip(ends.items(), (d_in, d_out), strict=False):
        if x.ndim < 2 or x.shape[-1] != width:
            raise ValueError(f"{name} must be [..., T, {width}] for layers {shapes}, got shape {tuple(x.shape)}")


def read(layers, x, residual=True):
    """M(x) = x + W_L silu(... silu(W_1 x)) for x [..., T, d_in]; without the leading x if not residual (NL eq. 89)."""
    _check_network(layers, residual, x=x)
    h = x
    for W in layers[:-1]:
        h = F.silu(h @ W.mT)
    h = h @ layers[-1].mT
    return x + h if residual else h


def surprise(layers, k, target, objective="l2", residual=True):
    """Local backprop at fixed weights: each layer's input x_l and the gradient g_l of the objective at its output (NL eq. 8-9).

    k [..., T, d_in], target [..., T, d_out] -> ([x_1, ..., x_L], [g_1, ..., g_L]), every x_l and g_l [..., T, width].
    """
    inputs, slopes = [k], []
    for W in layers[:-1]:
        z = inputs[-1] @ W.mT
        slopes.append(silu_derivative(z))
        inputs.append(F.silu(z))
    y = inputs[-1] @ layers[-1].mT
    gradients = [OBJECTIVES[objective](y + k if residual else y, target)]
    for W, slope in zip(reversed(layers[1:]), reversed(slopes), strict=True):
        gradients.insert(0, (gradients[0] @ W) * slope)
    return inputs, gradients


def write(layers, k, target, eta, alpha, q=None, *, theta=None, momentum=None, delta=1.0, objective="l2",
          residual=True, mode="token", running=None):  # fmt: skip
    """Write one chunk k -> target into a memory network, and read it at q: every layer is a memory from x_l to -g_l.

    layers: weights at the chunk boundary, [..., d_out, d_in] each; k [..., T, d_in] unit length; target [..., T, d_out];
    eta, alpha, theta [..., T], shared by all layers; momentum: a list like layers, or None. running: the weights so far,
    where k begins inside a chunk (default: layers, where it begins at the boundary).
    mode: where reads inside the chunk look, "token" at the running weights W_t layer by layer, "boundary" at the
    boundary weights only (NL eq. 90), so that tokens of one chunk cannot see each other.
    Returns (y [..., T, d_out] or None, new layers, new momentum or None without theta). Raises ValueError for unknown names.

    Under delta = 1 the output layer writes target - residual(k) instead of the boundary's -g: the delta term then takes
    the l2 gradient at the *running* weights, exactly; with -g it would remove W k twice (NL eq. 93 as printed). Inner
    keys are not of unit length; the exact minimiser of NL eq. 56 for any length is the step eta / (1 + eta |x|^2).
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    if mode not in ("token", "boundary"):
        raise ValueError(f"mode must be 'token' or 'boundary', got {mode!r}")
    _check_network(layers, residual, k=k, target=target)
    if target.shape[-2] != k.shape[-2]:
        raise ValueError(f"target must be [..., T, d_out] with T = {k.shape[-2]}, got shape {tuple(target.shape)}")
    if momentum is not None and (theta is None or len(momentum) != len(layers)):
        given = f"{len(momentum)} matrices, theta {'missing' if theta is None else 'given'}"
        raise ValueError(f"momentum must come with theta and have one matrix per layer ({len(layers)}), got {given}")
    inputs, gradients = surprise(layers, k, target, objective, residual)
    exact = objective == "l2" and not torch.is_tensor(delta) and delta == 1  # a tensor of ones means the printed form
    y = read(layers, q, residual) if q is not None and mode == "boundary" else None
    h = q if mode == "token" else None
    new_layers, new_momentum = [], []
    for i, (W, x, g) in enumerate(zip(running or layers, inputs, gradients, strict=True)):
        last = i == len(layers) - 1
        u = (target - k if residual else target) if last and exact else -g
        step = eta if i == 0 else eta / (1 + eta * x.square().sum(-1))
        h, W, S = scan(W, x, u, step, alpha, h, theta=theta, S=momentum and momentum[i], delta=delta)
        if h is not None and not last:
            h = F.silu(h)
        new_layers.append(W)
        new_momentum.append(S)
    if h is not None:
        y = h + q if residual else h
    return y, new_layers, None if theta is None else new_momentum


# ---------------------------------------------------------------------------------------------------------------------


def demo():
    torch.manual_seed(0)
    d, n, again = 32, 8, 4
    k, v = l2norm(torch.randn(n, d)), torch.randn(n + again, d)
    k = torch.cat([k, k[:again]])
    one, zero = torch.ones(n + again), torch.zeros(d, d)
    print(f"{n} random pairs written into a {d} x {d} memory, then {again} of the keys once more with new values;")
    print("relative error when read back:\n")
    print(f"{'':34}{'rewritten keys':>16}{'other keys':>12}")
    rules = {
        "Hebbian        (delta 0)": linear_attention(k, k, v),
        "  with retention 0.9 ": retention(k, k, v, 0.9 * one),
        "delta rule     (delta 1)": delta_net(k, k, v, one),
        "  with retention 0.9": scan(zero, k, v, one, 0.9 * one, k),
        "  with momentum 0.3, step 0.7": scan(zero, k, v, 0.7 * one, one, k, theta=0.3 * one),
    }
    for name, (_, W, _) in rules.items():
        error = (k[again:] @ W.mT - v[again:]).norm(dim=-1) / v[again:].norm(dim=-1)
        print(f"{name:34}{error[-again:].mean():16.3f}{error[:-again].mean():12.3f}")
    n = len(k)
    args = (torch.randn(d, d), k, v, torch.rand(n), torch.rand(n), k)
    gap = max((x - y).abs().max().item() for x, y in zip(scan(*args, tile=10)[:2], scan_stepwise(*args)[:2], strict=True))
    print(f"\nscan in tiles against scan token by token: largest difference {gap:.1e} (float32)\n")
    print("""one rule, many models:        u             eta        delta     theta     alpha
  linear attention            v             1          0         -         1
  RetNet, Mamba-2             v             1          0         -         fixed, from x
  DeltaNet                    v             from x     1         -         1
  Gated DeltaNet              v             from x     alpha     -         from x
  Titans                      -gradient     from x     0         from x    from x
  self-modifying Titans       own target    own        1         -         own""")


if __name__ == "__main__":
    demo()
