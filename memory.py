"""Associative memory: the one learning rule behind every model here, and the networks it trains.

A memory maps keys to values and learns while it reads. Its fast weights follow, per head,
for t = 1..T

    e_t = eta_t * (u_t - delta_t * W_{t-1} k_t)      # surprise; delta 1: delta rule, 0: plain write
    S_t = theta_t * S_{t-1} + e_t k_t^T              # momentum (theta absent: S_t = e_t k_t^T)
    W_t = alpha_t * W_{t-1} + S_t                    # retention
    y_t = W_t q_t                                    # read

Without momentum and with delta = 1 this is delta gradient descent (DGD; NL eq. 57, 88, 92):
W_t = W_{t-1} (alpha_t I - eta_t k_t k_t^T) + eta_t u_t k_t^T.

Glossary, in NL's names (the Titans paper swaps eta and theta):

    k, q   [..., T, dk]   key written to, key read from
    u      [..., T, dv]   what is written: a target (delta 1), or minus a gradient (delta 0)
    W, S   [..., dv, dk]  fast weights and their momentum
    eta    [..., T]       step size of the inner learning
    alpha  [..., T]       retention in (0, 1]: W is multiplied by it at every token; 1: no decay
    theta  [..., T]       decay of the momentum, in [0, 1)
    delta  number or [..., T]
    tile   tokens that `scan` computes at once; never changes the result
    chunk  tokens that share their gradients: part of a *model*, changes the result

A tile of C tokens, from weights W_0 on, can nevertheless be computed at once, exactly. Let
P[t, s] = prod_{i=s+1..t} alpha_i (t, s = 0..C, lower triangular) and likewise with theta. Then
c = P_alpha P_theta (without momentum c = P_alpha) is the weight of write s in W_t;
a = P_alpha[:, 0] and b = c[:, 0] are the weights of W_0 and S_0. The errors
r_t = u_t - delta_t W_{t-1} k_t, with e = eta r, solve one unit lower triangular system:

    (I + delta_t c[t-1, s] eta_s (k_t . k_s)) r = u - delta * (a_prev * K W_0^T + b_prev * K S_0^T)
    y   = a * Q W_0^T + b * Q S_0^T + (c[t, s] eta_s (q_t . k_s)) r
    W_C = a_C W_0 + b_C S_0 + (c[C, :] * eta * r)^T K
    S_C = P_theta[C, 0] S_0 + (P_theta[C, :] * eta * r)^T K

Solving for r and not for e = eta r keeps every gradient free of divisions, also at eta = 0.

`scan_stepwise` is the definition, `scan` the fast form, `write` applies it to a network's layers;
self-modifying Titans repeat it in fused form (fused.py, kernels.py). Try `python memory.py`.
"""

import contextlib
import contextvars

import torch
import torch.nn.functional as F

from fused import EPS, decay, kernels_for, silu_derivative, solve


def full_precision(t):
    """t in float32 if it was narrower: sums of many small steps, and solves, need the digits."""
    narrow = torch.is_tensor(t) and t.dtype in (torch.bfloat16, torch.float16)
    return t.float() if narrow else t


def floats(**given):
    """TypeError for an argument, by its name, that is no tensor of floating-point numbers; and
    where one is float64 and another is not."""
    for name, t in given.items():
        if not torch.is_tensor(t) or not t.is_floating_point():
            got = t.dtype if torch.is_tensor(t) else type(t).__name__
            raise TypeError(f"{name} must be a tensor of float32, float64 or bfloat16, got {got}")
    types = {t.dtype for t in given.values()}
    if torch.float64 in types and len(types) > 1:
        raise TypeError(f"{', '.join(given)} must all be float64 or none, got {types}")


def l2norm(x, eps=EPS):
    """x [..., d] scaled to unit length (vectors far below sqrt(eps) stay small)."""
    floats(x=x)
    return x / (x.square().sum(-1, keepdim=True) + eps).sqrt()  # rsqrt's gradient has a cube


# --------------------------------------------------------------------------------------------------
# The learning rule: the definition, then the fast form


def scan_stepwise(W, k, u, eta, alpha, q=None, *, theta=None, S=None, delta=1.0):
    """The definition of `scan`, token by token. Arguments and results of `scan`."""
    args = _aligned(W, k, u, eta, alpha, q, theta, S, delta)
    W, k, u, eta, alpha, q, theta, S, delta = map(full_precision, args)
    y = []
    for t in range(k.shape[-2]):
        d = delta[..., t, None] if torch.is_tensor(delta) else delta
        e = eta[..., t, None] * (u[..., t, :] - d * (W @ k[..., t, :, None]).squeeze(-1))
        step = e[..., :, None] * k[..., t, None, :]  # [..., dv, dk]
        if theta is not None:
            S = theta[..., t, None, None] * S + step
            step = S
        W = alpha[..., t, None, None] * W + step
        if q is not None:
            y.append((W @ q[..., t, :, None]).squeeze(-1))
    return torch.stack(y, -2) if y else None, W, S


def scan(W, k, u, eta, alpha, q=None, *, theta=None, S=None, delta=1.0, tile=64, backend="auto"):
    """The learning rule over T tokens, in tiles: `scan_stepwise`, as fast as matrix products.

    W [..., dv, dk] initial weights; k [..., T, dk]; u [..., T, dv]; eta, alpha [..., T];
    q [..., T, dk] or None; theta [..., T] or None, S [..., dv, dk] the momentum's start (default
    zero); delta a number or [..., T]. Leading dimensions broadcast. alpha must be in (0, 1], theta
    in [0, 1): that is the caller's to see to (a check would cost a synchronisation).

    Returns (y [..., T, dv] or None without q, W_T [..., dv, dk], S_T or None without theta), in
    float32 at least, also under autocast. Differentiable, also twice, in every tensor: the outer
    gradient flows through the inner updates into W. Nothing is written in place.

    backend: see `kernels_for`. The Triton kernels have first derivatives only, and where k, u and q
    are bfloat16 they multiply in bfloat16 (sums, states and the solve stay float32).
    Raises ValueError for shapes that do not fit, tile < 1, S without theta, an unknown backend.
    """
    if tile < 1:
        raise ValueError(f"tile must be at least 1, got {tile}")
    if not torch.compiler.is_compiling():  # a context variable cannot be traced
        seen = _watching.get()
        if seen is not None:
            seen.append(dict(W=W, k=k, u=u, eta=eta, alpha=alpha, theta=theta, S=S, delta=delta))
    args = _aligned(W, k, u, eta, alpha, q, theta, S, delta)
    wide = u if u.element_size() > k.element_size() else k  # in whose type the kernels multiply
    kind = "series" if torch.is_tensor(delta) or delta not in (0, 1) else float(delta)
    case = {"momentum": theta is not None, "delta": kind}
    kernels = kernels_for("scan", wide, k.shape[-1], backend, **case)
    if kernels is not None:
        return kernels.scan(*args, tile)
    W, k, u, eta, alpha, q, theta, S, delta = map(full_precision, args)
    y = []
    with torch.autocast(k.device.type, enabled=False):
        for i in range(0, k.shape[-2], tile):
            now = slice(i, i + tile)
            y_now, W, S = _tile(
                W,
                S,
                k[..., now, :],
                u[..., now, :],
                eta[..., now],
                alpha[..., now],
                None if q is None else q[..., now, :],
                None if theta is None else theta[..., now],
                delta[..., now] if torch.is_tensor(delta) else delta,
            )
            y.append(y_now)
    return torch.cat(y, -2) if q is not None else None, W, S


def _tile(W, S, k, u, eta, alpha, q, theta, delta):
    """One tile of `scan`, in the order and the symbols of the equations at the top of this file."""
    C = k.shape[-2]
    P = decay(alpha)  # [..., C+1, C+1]
    c = P
    if theta is not None:
        P_theta = decay(theta)
        c = P[..., 1:] @ P_theta[..., 1:, :]  # sum over s <= j <= t of P[t, j] P_theta[j, s]
        b = c[..., :1]
    a = P[..., :1]
    ce = c[..., 1:] * eta.unsqueeze(-2)  # [..., C+1, C]

    def start(x, rows):  # what W_0 and S_0 contribute to W_t x, for the given rows t
        y = a[..., rows, :] * (x @ W.mT)
        return y if theta is None else y + b[..., rows, :] * (x @ S.mT)

    # the errors of all tokens
    r = u
    if torch.is_tensor(delta) or delta != 0:
        d = delta.unsqueeze(-1) if torch.is_tensor(delta) else delta
        r = solve(d * ce[..., :C, :] * (k @ k.mT), u - d * start(k, slice(0, C)))
    # read at the running weights
    y = None
    if q is not None:
        y = start(q, slice(1, None)) + (ce[..., 1:, :] * (q @ k.mT)) @ r
    # write
    W_C = a[..., C:, :] * W + (ce[..., C, :, None] * r).mT @ k
    if theta is not None:
        W_C = W_C + b[..., C:, :] * S
        S = P_theta[..., C:, :1] * S + ((P_theta[..., C, 1:] * eta).unsqueeze(-1) * r).mT @ k
    return y, W_C, S


def _aligned(W, k, u, eta, alpha, q, theta, S, delta):
    """Check every kind and shape, then broadcast the leading dimensions (as views)."""
    given = {name: t for name, t in (("q", q), ("theta", theta), ("S", S)) if t is not None}
    if not isinstance(delta, (int, float)):
        given["delta"] = delta
    floats(W=W, k=k, u=u, eta=eta, alpha=alpha, **given)
    if W.ndim < 2:
        raise ValueError(f"W must be [..., dv, dk], got shape {tuple(W.shape)}")
    dv, dk = W.shape[-2:]
    T = k.shape[-2] if k.ndim >= 2 else 0
    if T < 1:
        raise ValueError(f"k must be [..., T, dk] with T >= 1, got shape {tuple(k.shape)}")
    if S is not None and theta is None:
        raise ValueError("S (momentum) was given without theta, its decay")
    matrices = {"k": (k, (T, dk)), "u": (u, (T, dv)), "q": (q, (T, dk)), "S": (S, (dv, dk))}
    series = {"eta": eta, "alpha": alpha, "theta": theta}
    series["delta"] = delta if torch.is_tensor(delta) else None
    wanted = matrices | {name: (x, (T,)) for name, x in series.items()}
    wanted["W"] = (W, (dv, dk))
    lead = ()
    for name, (x, tail) in wanted.items():
        if x is None:
            continue
        shape = tuple(x.shape)
        if shape[-len(tail) :] != tail:
            sizes = f"T = {T}, dv = {dv}, dk = {dk}"
            raise ValueError(f"{name} must end in {tail} ({sizes}), got shape {shape}")
        try:
            lead = torch.broadcast_shapes(lead, shape[: x.ndim - len(tail)])
        except RuntimeError:
            wrong = f"{name}: leading dimensions of shape {shape} do not broadcast"
            raise ValueError(f"{wrong} with {tuple(lead)}") from None
    out = {name: x if x is None else x.expand(lead + tail) for name, (x, tail) in wanted.items()}
    if theta is not None and S is None:
        out["S"] = torch.zeros_like(out["W"])
    if out["delta"] is None:
        out["delta"] = delta
    return tuple(out[name] for name in ("W", "k", "u", "eta", "alpha", "q", "theta", "S", "delta"))


_watching = contextvars.ContextVar("watching", default=None)


@contextlib.contextmanager
def watch():
    """A list to which every `scan` within (of this thread) appends its arguments, but for q."""
    seen = []
    token = _watching.set(seen)
    try:
        yield seen
    finally:
        _watching.reset(token)


# --------------------------------------------------------------------------------------------------
# Memory networks: a list of layers [..., d_out, d_in]; one is a matrix, two the MLP of NL eq. 89

# Gradient of each objective at the memory's output y for target v (NL section 3; MIRAS)
OBJECTIVES = {
    "dot": lambda y, v: -v.expand_as(y),  # -<y, v>, Hebbian
    "l2": lambda y, v: y - v,  # 1/2 |y - v|^2
    "huber": lambda y, v: (y - v).clamp(-1, 1),  # quadratic within 1, linear beyond
    "lp": lambda y, v: (y - v) * (y - v).abs(),  # 1/3 |y - v|^3 summed, p = 3
}


def _check_network(layers, residual, **ends):
    """ValueError unless the layers chain and fit the named tensors (input first, then output)."""
    floats(**{f"layers[{i}]": W for i, W in enumerate(layers)}, **ends)
    shapes = ", ".join(str(tuple(W.shape)) for W in layers)
    for below, W in zip(layers, layers[1:], strict=False):
        if below.shape[-2] != W.shape[-1]:
            rule = "each [..., d_out, d_in] with the d_out below it as d_in"
            raise ValueError(f"layers must chain, {rule}, got {shapes}")
    d_in = layers[0].shape[-1]
    d_out = layers[-1].shape[-2]
    if residual and d_in != d_out:
        raise ValueError(f"a residual memory needs d_in = d_out, got {d_in} and {d_out}: {shapes}")
    for (name, x), width in zip(ends.items(), (d_in, d_out), strict=False):
        if x.ndim < 2 or x.shape[-1] != width:
            wanted = f"[..., T, {width}] for layers {shapes}"
            raise ValueError(f"{name} must be {wanted}, got shape {tuple(x.shape)}")


def read(layers, x, residual=True):
    """M(x) = x + W_L silu(... silu(W_1 x)) (NL eq. 89); without the leading x if not residual.

    x [..., T, d_in] -> [..., T, d_out].
    """
    _check_network(layers, residual, x=x)
    h = x
    for W in layers[:-1]:
        h = F.silu(h @ W.mT)
    h = h @ layers[-1].mT
    return x + h if residual else h


def surprise(layers, k, target, objective="l2", residual=True):
    """Local backprop at fixed weights (NL eq. 8-9). k [..., T, d_in], target [..., T, d_out].

    Returns ([x_1, ..., x_L], [g_1, ..., g_L]): each layer's input and the gradient of the objective
    at its output, [..., T, width]. Raises ValueError for unknown names, shapes that do not fit.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    _check_network(layers, residual, k=k, target=target)
    T = k.shape[-2]
    if target.shape[-2] != T:
        shape = tuple(target.shape)
        raise ValueError(f"target must be [..., T, d_out] with T = {T}, got shape {shape}")
    inputs = [k]
    slopes = []
    for W in layers[:-1]:
        z = inputs[-1] @ W.mT
        slopes.append(silu_derivative(z))
        inputs.append(F.silu(z))
    y = inputs[-1] @ layers[-1].mT
    gradients = [OBJECTIVES[objective](y + k if residual else y, target)]
    for W, slope in zip(reversed(layers[1:]), reversed(slopes), strict=True):
        gradients.insert(0, (gradients[0] @ W) * slope)
    return inputs, gradients


def write(layers, k, target, eta, alpha, q=None, *, theta=None, momentum=None, delta=1.0,
          objective="l2", residual=True, mode="token", running=None, backend="auto"):
    """Write one chunk k -> target into a memory network and read it at q.

    Every layer is itself a memory from its input x_l to -g_l, see `surprise`.

    layers: weights at the chunk boundary, [..., d_out, d_in] each. k [..., T, d_in] of unit length;
    target [..., T, d_out]; eta, alpha, theta [..., T], shared by all layers. momentum: a list like
    layers, or None. running: the weights so far, where k begins inside a chunk (default: layers).
    mode: reads inside the chunk look at the running weights W_t layer by layer ("token"), or at the
    boundary weights only ("boundary", NL eq. 90), so that tokens of a chunk do not see each other.
    Returns (y [..., T, d_out] or None, new layers, new momentum or None without theta).
    Raises ValueError for unknown names and shapes that do not fit.

    Under delta = 1 the output layer writes target - residual(k), not the boundary's -g: the delta
    term then takes the l2 gradient at the *running* weights, exactly; with -g it would remove W k
    twice (NL eq. 93 as printed). Inner keys are not of unit length; the exact minimiser of NL
    eq. 56 for any length is the step eta / (1 + eta |x|^2).
    """
    if mode not in ("token", "boundary"):
        raise ValueError(f"mode must be 'token' or 'boundary', got {mode!r}")
    inputs, gradients = surprise(layers, k, target, objective, residual)
    if momentum is not None and (theta is None or len(momentum) != len(layers)):
        given = f"{len(momentum)} matrices, theta {'missing' if theta is None else 'given'}"
        wanted = f"come with theta and have one matrix per layer ({len(layers)})"
        raise ValueError(f"momentum must {wanted}, got {given}")
    # a delta tensor of ones means the printed form
    exact = objective == "l2" and not torch.is_tensor(delta) and delta == 1
    y = read(layers, q, residual) if q is not None and mode == "boundary" else None
    h = q if mode == "token" else None
    new_layers = []
    new_momentum = []
    for i, (W, x, g) in enumerate(zip(running or layers, inputs, gradients, strict=True)):
        last = i == len(layers) - 1
        u = -g
        if last and exact:
            u = target - k if residual else target
        step = eta if i == 0 else eta / (1 + eta * x.square().sum(-1))
        S = momentum and momentum[i]
        h, W, S = scan(W, x, u, step, alpha, h, theta=theta, S=S, delta=delta, backend=backend)
        if h is not None and not last:
            h = F.silu(h)
        new_layers.append(W)
        new_momentum.append(S)
    if h is not None:
        y = h + q if residual else h
    return y, new_layers, None if theta is None else new_momentum


if __name__ == "__main__":
    from runpy import run_module

    run_module("bench.demos", run_name="memory")
