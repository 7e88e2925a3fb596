"""Optimizers as associative memories of the gradients they have seen (NL section 4).

A gradient g = dL/dW [d_out, d_in] of a layer y = W x is itself what a memory wrote: W maps x to its
surprise -dL/dy (NL eq. 8-9). An optimizer adds a memory M of these g, with an objective, a capacity
and a retention. Every class here is

    M <- write(M, g)                                retention, then one step on M's objective
    W <- (1 - lr * weight_decay) W - lr * read(M)   read: linear or Newton-Schulz (NL eq. 52)

                           M is                 learns by                     forgets
    GradientDescent        nothing              -                             everything
    Momentum               a matrix like W      min -<M g^T, I>               in all directions
                                                M + g
    PreconditionedMomentum a matrix like W      min -<M g^T, P>               in all directions
                                                M + P g
    DeltaMomentum          a matrix like W      min |M g^T - I|^2 / 2         most where g points
                                                M (I - c g^T g) + g
    DeepMomentum           an MLP               any of memory.OBJECTIVES      in all layers
    Muon                   a matrix like W      as Momentum                   in all directions
    M3                     two, on two clocks   as Muon                       one soon, one slowly
    AdamMemory             a number per weight  min sum of (M g - P)^2        by age
    AdaGradMemory          a number per weight  the same                      never
    DGD                    W itself             min |W x + dL/dy|^2 / 2       most where x points
                                                    + |W - W_t|^2 / (2 lr)

M is a linear map from keys (rows of g) to values (rows of I). `memorize` is that step for any
network and objective; Momentum, DeltaMomentum and DeepMomentum are cases of it.

DeltaMomentum, DeepMomentum, Muon and M3 take matrices. `split_parameters` says which parameters of
a model these are, and `optimizer_by_name` gives the rest to AdamW. Updates read through
Newton-Schulz have a root mean square of 0.2, as AdamW's usually have, so that one lr serves both.

`python optimizers.py` draws NL figure 4 and shows what each memory keeps of gradients long past.
"""

import math
from collections import ChainMap
from functools import partial

import torch
from torch import nn

from fused import silu_derivative
from layers import at_least, one_of
from memory import OBJECTIVES, floats, full_precision, scan, surprise

RMS = 0.2  # of AdamW's update / lr in usual training; Newton-Schulz reads are scaled to it

# --------------------------------------------------------------------------------------------------
# Scale: squares of float32 are 0 below 1e-23 and infinite above 1e19, and a memory without new
# gradients decays to 0. Powers of two, which are exact, are taken out before.


def magnitude(x):
    """floor(log2) of the largest entry, a scalar; -inf where all are 0."""
    own = x.to_local() if hasattr(x, "to_local") else x  # a shard of FSDP2, maybe an empty one
    top = own.abs().amax() if own.numel() else own.new_zeros(())
    if own is not x:
        torch.distributed.all_reduce(top, torch.distributed.ReduceOp.MAX, x.device_mesh.get_group())
    return top.log2().floor()


def times_2_to(x, e):
    """x 2^e, exact, also where 2^e by itself is out of range."""
    half = (e / 2).floor()
    return x * half.exp2() * (e - half).exp2()


def normal(x):
    """(x 2^-e [..., m, n] with sizes that sum to [1, 2), e [..., 1, 1]); 0 stays 0, e is 0."""
    # a sum, as empty shards have no largest entry; in float64 none is out of range
    total = x.abs().double().sum((-2, -1), keepdim=True)
    e = total.log2().floor().nan_to_num(neginf=0.0).to(x.dtype)
    return times_2_to(x, -e), e


def in_units(state, name, g, e=0.0):
    """(memory, g 2^e), both in the memory's own unit 2^state[name + "_exponent"].

    The unit is 1 as long as the larger of the two is within 2^-32 .. 2^32.
    """
    M = tensor(state, name, g)
    old = state.get(f"{name}_exponent", torch.zeros((), device=g.device))
    sizes = magnitude(M) + old, magnitude(g) + e
    new = torch.maximum(*sizes)
    new = torch.where(new.isinf() | (new.abs() < 32), 0.0, new)
    state[f"{name}_exponent"] = new
    shift_M = torch.where(sizes[0].isinf(), 0.0, old - new)  # zeros stay in any unit
    shift_g = torch.where(sizes[1].isinf(), 0.0, e - new)
    return M.copy_(times_2_to(M, shift_M)), times_2_to(g, shift_g)


def root_of_squares(state, g, decay, weight):
    """The root of H <- decay H + weight g^2, in state["R"]; no square is formed."""
    if "H" in state:  # H itself, of an earlier version
        state["R"] = state.pop("H").sqrt()
    R = tensor(state, "R", g)
    return R.copy_(torch.hypot(R * decay**0.5, g * weight**0.5))


def quotient(a, b):
    """a / b, and 0 / 0 = 0."""
    return a / b.masked_fill(b == 0, 1.0)


# --------------------------------------------------------------------------------------------------
# How a memory of gradients is read: lists of matrices in, lists of updates out

QUINTIC = (3.4445, -4.7750, 2.0315)  # Muon's: steep at 0; singular values end within 0.7 .. 1.2


def newton_schulz(G, steps=5, coefficients=QUINTIC):
    """The orthogonal matrix next to G [..., m, n], nearly (NL eq. 42-44).

    O <- a O + b (O O^T) O + c (O O^T)^2 O moves all singular values to 1. In bfloat16 on a GPU,
    else in G's precision. Invariant to the scale of G; zero stays zero.
    """
    floats(G=G)
    at_least(0, steps=steps)
    a, b, c = coefficients
    G, _ = normal(full_precision(G))
    O = quotient(G, G.norm(dim=(-2, -1), keepdim=True))
    wide = G.shape[-2] <= G.shape[-1]
    if not wide:
        O = O.mT
    O = O.to(torch.bfloat16 if G.is_cuda else G.dtype)
    for _ in range(steps):
        A = O @ O.mT
        O = a * O + (b * A + c * (A @ A)) @ O
    return (O if wide else O.mT).to(G.dtype)


def orthogonal(memories, steps=5):
    """`newton_schulz` of a list of matrices; equal shapes, also transposed, are one stack."""
    stacks = {}
    for i, M in enumerate(memories):
        stacks.setdefault((*sorted(M.shape), M.dtype, M.device), []).append(i)
    out = [None] * len(memories)
    for members in stacks.values():
        wide = []
        for i in members:
            M = memories[i]
            wide.append(M if M.shape[0] <= M.shape[1] else M.mT)
        stack = newton_schulz(torch.stack(wide), steps)  # [matrices, m, n]
        for i, O in zip(members, stack.to(wide[0].dtype), strict=True):
            out[i] = O if O.shape == memories[i].shape else O.mT
    return out


def orthogonal_to_rms(memories, steps=5):
    """`orthogonal`, scaled so that a matrix of singular values 1 has the root mean square RMS."""
    return [O * (RMS * max(O.shape) ** 0.5) for O in orthogonal(memories, steps)]


def to_rms(M, rms):
    """M scaled to a root mean square of rms; zero stays zero."""
    M, _ = normal(M)
    return quotient(M, M.square().mean().sqrt() / rms)


def unit(g):
    """g scaled to unit length (Frobenius norm); zero stays zero."""
    return to_rms(g, g.numel() ** -0.5)


def unit_and_scale(g):
    g, e = normal(g)
    return unit(g), g.norm(), e


READS = {"linear": lambda memories, steps: memories, "newton_schulz": orthogonal_to_rms}

# Feature maps of gradients (NL eq. 51) -> features, and the scale s 2^e that was taken away: the
# update is multiplied by it again
FEATURES = {
    "linear": lambda g: (g, 1.0, None),
    "sign": lambda g: unit_and_scale(g.sign()),
    "unit": unit_and_scale,
}

# --------------------------------------------------------------------------------------------------
# The step that all optimizers share


def _at_least_1(value):
    return type(value) is int and value >= 1


_FRACTION = ("in [0, 1)", lambda x: 0 <= x < 1)
_POSITIVE = ("above 0 and finite", lambda x: 0 < x < math.inf)
_AT_LEAST_0 = ("at least 0 and finite", lambda x: 0 <= x < math.inf)

LEGAL = {  # hyper-parameter: its range in words, and the check
    "lr": _POSITIVE,
    "eta": _POSITIVE,
    "eps": _AT_LEAST_0,
    "alpha": _AT_LEAST_0,
    "weight_decay": _AT_LEAST_0,
    "momentum": _FRACTION,
    "beta": _FRACTION,
    "betas": ("numbers in [0, 1)", lambda betas: all(0 <= beta < 1 for beta in betas)),
    "delta": ("in [0, 1]", lambda x: 0 <= x <= 1),
    "retention": ("in (0, 1]", lambda x: 0 < x <= 1),
    "frequency": ("a whole number of at least 1", _at_least_1),
    "steps": ("a whole number of at least 1", _at_least_1),
    "depth": ("1 or 2", lambda x: type(x) is int and 1 <= x <= 2),
    "objective": (f"one of {', '.join(OBJECTIVES)}", OBJECTIVES.__contains__),
    "features": (f"one of {', '.join(FEATURES)}", FEATURES.__contains__),
    "output": (f"one of {', '.join(READS)}", READS.__contains__),
}


def check(name, value, n_betas=2):
    """ValueError for a hyper-parameter out of its range."""
    legal, fine = LEGAL[name]
    try:
        good = fine(value)
        if name == "betas":
            legal = f"{n_betas} {legal}"
            good = good and len(value) == n_betas
    except TypeError:
        good = False
    if not good:
        raise ValueError(f"{name} must be {legal}, got {value!r}")


class GradientDescent(torch.optim.Optimizer):
    """W <- W - lr g: no memory but W itself (NL eq. 1-9). Also the step of every optimizer below.

    weight_decay is decoupled: W shrinks by lr * weight_decay. Raises ValueError for bad
    hyper-parameters (when a parameter group is added) and, before anything has changed, for sparse
    or non-finite gradients.
    """

    matrices = False  # takes matrices only
    n_betas = 0

    def __init__(self, params, lr=1e-2, weight_decay=0.0, **rates):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, **rates))

    def add_param_group(self, group):
        for name, value in (self.defaults | group).items():
            if name in LEGAL:
                check(name, value, self.n_betas)
        super().add_param_group(group)
        added = self.param_groups[-1]
        if not (self.matrices or added.get("output") == "newton_schulz"):
            return
        for p in added["params"]:
            if p.ndim != 2:
                self.param_groups.pop()
                got = f"got a parameter of shape {tuple(p.shape)}: see split_parameters"
                raise ValueError(f"{type(self).__name__} takes matrices, {got}")

    def write(self, g, state, group):
        """Write one gradient into the memory `state` (a dict of tensors, changed in place).

        Returns what `read` is to read.
        """
        return g

    def read(self, memories, states, group):
        """The updates, to be subtracted lr times, of all parameters of a group (NL eq. 52)."""
        return READS[group.get("output", "linear")](memories, group.get("steps", 5))

    @torch.no_grad()
    def step(self, closure=None):
        """Write one gradient into every memory and step every parameter.

        closure, if given, computes the loss, which is returned.
        """
        loss = loss_of(closure)
        self.check_gradients()
        for group in self.param_groups:
            lr = group["lr"]
            params = [p for p in group["params"] if p.grad is not None]
            states = [self.state[p] for p in params]
            memories = []
            for p, state in zip(params, states, strict=True):
                memories.append(self.write(p.grad, state, group))
            updates = self.read(memories, states, group)
            # deviation 14: lr outside the memory, so that a schedule acts at once
            for p, update in zip(params, updates, strict=True):
                p.mul_(1 - lr * group["weight_decay"]).sub_(update, alpha=lr)
        return loss

    def check_gradients(self):
        """ValueError for the first gradient that is sparse or not finite."""
        params = []
        for group in self.param_groups:
            params += [p for p in group["params"] if p.grad is not None]
        what = "the gradient of a parameter of shape"
        for p in params:
            if p.grad.layout != torch.strided:
                raise ValueError(f"{what} {tuple(p.shape)} must be dense, got a sparse one")
        # one norm first, so that a GPU is waited for once; it may overflow though all is finite
        if params and not nn.utils.get_total_norm([p.grad for p in params]).isfinite():
            for p in params:
                if not p.grad.isfinite().all():
                    raise ValueError(f"{what} {tuple(p.shape)} is not finite")


def loss_of(closure):
    """What the closure of a step computes, with gradients; None without one."""
    with torch.enable_grad():
        return None if closure is None else closure()


def tensor(state, name, like):
    """state[name], zeros like `like` at first."""
    if name not in state:
        state[name] = torch.zeros_like(like, memory_format=torch.preserve_format)
    return state[name]


def memorize(layers, k, target, retention, eta, objective="dot"):
    """One step of a memory network from keys k [T, d_in] to targets [T, d_out] (NL eq. 36-37).

    layers[l] [d_out, d_in] as in memory.py -> the new list: W_l <- retention W_l - eta g_l^T x_l.
    For one layer with k = g and target = I, "dot" is momentum (NL eq. 34) and "l2" the delta rule
    (NL eq. 48).
    """
    inputs, errors = surprise(layers, k, target, objective, residual=False)
    return [retention * W - eta * e.mT @ x for W, x, e in zip(layers, inputs, errors, strict=True)]


# --------------------------------------------------------------------------------------------------
# Momentum and its kin


class Momentum(GradientDescent):
    """M <- momentum M + g: gradient descent on -<M g^T, I>, with retention (NL eq. 10-13, 33-34).

    A sum: the gradient of i steps ago weighs momentum^i; at 0.9 the last 7 hold half of it, the
    last 44 hold 99%. output: how M is read, "linear" or, for matrices, "newton_schulz".
    """

    def __init__(self, params, lr=1e-2, momentum=0.9, weight_decay=0.0, output="linear"):
        super().__init__(params, lr, weight_decay, momentum=momentum, output=output)

    def write(self, g, state, group):
        M, g = self.memory(g, state, group)
        return M.mul_(group["momentum"]).add_(g)

    def memory(self, g, state, group):
        """M and g; where the read takes the scale away, in M's unit."""
        if group["output"] == "newton_schulz":
            return in_units(state, "M", g)
        return tensor(state, "M", g), g


class PreconditionedMomentum(Momentum):
    """M <- momentum M + P g: a momentum whose values are P and not 1 (NL eq. 46-47).

    P^-1 is a memory of its own, of the gradient's size: H = P^-2 learns g^2 by gradient descent on
    |H - g^2|^2 / 2 with step 1 - beta (NL eq. 38-41), and is divided by the weight of what it has
    seen. With momentum 0 it equals Adam with betas (0, beta). The state holds H's root "R", as in
    all optimizers here that sum squares: the square of a float32 is soon infinite or 0.
    """

    def __init__(self, params, lr=1e-3, momentum=0.9, beta=0.999, eps=1e-8, weight_decay=0.0,
                 output="linear"):
        rates = {"momentum": momentum, "beta": beta, "eps": eps}
        GradientDescent.__init__(self, params, lr, weight_decay, **rates, output=output)

    def write(self, g, state, group):
        beta = group["beta"]
        state["step"] = state.get("step", 0) + 1
        R = root_of_squares(state, g, beta, 1 - beta)  # deviation 15: a diagonal
        P_inverse = R / (1 - beta ** state["step"]) ** 0.5 + group["eps"]
        return super().write(quotient(g, P_inverse), state, group)


class DeltaMomentum(Momentum):
    """M <- M (momentum I - c g^T g) + g: gradient descent on |M g^T - I|^2 / 2 (NL eq. 48-49).

    The delta rule: what M holds along the rows of the new gradient is forgotten first, so that a
    direction that keeps coming back does not pile up.
    """

    matrices = True

    def __init__(self, params, lr=1e-2, momentum=0.9, delta=0.2, weight_decay=0.0, output="linear"):
        rates = {"momentum": momentum, "delta": delta}
        GradientDescent.__init__(self, params, lr, weight_decay, **rates, output=output)

    def write(self, g, state, group):
        M, g = self.memory(g, state, group)
        # deviation 17: c = delta / |g|^2 (Frobenius norm) keeps the decay in [momentum - delta,
        # momentum]. With the print's c = 1 it turns over and diverges once |g|^2 > 1 + momentum.
        u = unit(g)
        old = torch.linalg.multi_dot([M, u.mT, u])  # in the cheaper order
        return M.mul_(group["momentum"]).sub_(old, alpha=group["delta"]).add_(g)


class DeepMomentum(GradientDescent):
    """Deep momentum gradient descent, DMGD: the memory of gradients is a network m(u) (NL eq. 50).

    u = phi(g) are features of g (NL eq. 51). m maps rows of u to rows of I, so it has W's input and
    output width. It learns by one step of size eta per gradient on the objective ("dot" is NL's
    <m(u^T), 1>). depth 2: m(u) = (I + B) silu(A u) with A like g and B square, both from zero, so
    that retention leads back to the identity. depth 1: the matrix A; with features "linear" and
    eta 1 it is Momentum. A g with more rows than columns is transposed.

    A and B feed each other; features of unit length, "unit" and "sign", and eta <= 1 - momentum
    keep them bounded, whatever the gradients. "linear" is for depth 1 and "dot" or "huber" only.
    """

    matrices = True

    def __init__(self, params, lr=1e-2, momentum=0.9, eta=0.1, depth=2, objective="dot",
                 features="unit", weight_decay=0.0, output="linear"):
        network = {"depth": depth, "objective": objective, "features": features, "output": output}
        super().__init__(params, lr, weight_decay, momentum=momentum, eta=eta, **network)

    def add_param_group(self, group):
        network = self.defaults | group
        depth = network["depth"]
        objective = network["objective"]
        bounded = depth == 1 and objective in ("dot", "huber")
        if network["features"] == "linear" and not bounded:
            wanted = f"features must be unit or sign at depth {depth} with objective {objective}"
            raise ValueError(f"{wanted}, got 'linear', whose memory grows without bound")
        super().add_param_group(group)

    def write(self, g, state, group):
        momentum = group["momentum"]
        tall = g.shape[0] > g.shape[1]
        u, scale, e = FEATURES[group["features"]](g.mT if tall else g)
        identity = torch.eye(len(u), dtype=u.dtype, device=u.device)
        layers = [tensor(state, "A", u)]
        if group["depth"] == 2:
            layers.append(identity + tensor(state, "B", identity))
        A, *outer = memorize(layers, u, identity, momentum, group["eta"], group["objective"])
        state["A"] = A
        # deviation 18: read as the linear map that m is at u, (I + B) diag(mean slope) A, where the
        # slope of silu is a mean over rows of u. The print adds m(u), which has no shape of W.
        M = A * scale
        for layer in outer:
            state["B"] = layer.sub_(identity, alpha=momentum)  # retention acts on what was learned
            M = silu_derivative(u @ A.mT).mean(0).unsqueeze(1) * M
            M = M + state["B"] @ M
        if e is not None and group["output"] == "linear":
            M = times_2_to(M, e)
        return M.mT if tall else M


# --------------------------------------------------------------------------------------------------
# Memories whose reading is orthogonal


class Muon(GradientDescent):
    """A linear momentum memory with Newton-Schulz output, W <- W - lr NS(M) (NL eq. 42-44, 52).

    M is a mean, M <- momentum M + (1 - momentum) g, read with g once more on top (nesterov). steps:
    of Newton-Schulz. Equals torch.optim.Muon(adjust_lr_fn="match_rms_adamw") up to its bfloat16.
    """

    matrices = True

    def __init__(self, params, lr=3e-3, momentum=0.95, nesterov=True, steps=5, weight_decay=0.0):
        how = {"nesterov": nesterov, "steps": steps, "output": "newton_schulz"}
        super().__init__(params, lr, weight_decay, momentum=momentum, **how)

    def write(self, g, state, group):
        M, g = in_units(state, "M", g)
        M.lerp_(g, 1 - group["momentum"])
        return g.lerp(M, group["momentum"]) if group["nesterov"] else M


class M3(Muon):
    """Multi-scale Momentum Muon: two momentum memories on two clocks (NL eq. 75, Algorithm 1).

        M1 <- a mean of gradients, every step                O1 = NS(M1)
        M2 <- a mean of means of `frequency` gradients       O2 = NS(M2), every `frequency` steps
        W  <- W - lr (O1 + alpha O2) / sqrt(V)               V: a mean of (O1 + alpha O2)^2

    betas: of M1, V and M2. The quotient is scaled to the root mean square RMS. Without
    second_moment it is O1 + alpha O2, and Muon if alpha = 0. State: five tensors of a parameter's
    size.

    printed: Algorithm 1 to the letter. There nothing is ever forgotten, and orthogonal matrices,
    which have no scale, are divided by the root of V of the *gradients*, which have one: the
    smaller the gradients the longer the step, without bound.
    """

    n_betas = 3

    def __init__(self, params, lr=3e-3, betas=(0.95, 0.95, 0.9), alpha=0.3, frequency=10,
                 nesterov=True, steps=5, eps=1e-8, weight_decay=0.0, second_moment=True,
                 printed=False):
        memories = {"betas": betas, "alpha": alpha, "frequency": frequency, "nesterov": nesterov}
        reading = {"steps": steps, "eps": eps, "second_moment": second_moment, "printed": printed}
        GradientDescent.__init__(self, params, lr, weight_decay, **memories, **reading)

    def write(self, g, state, group):
        beta1, beta2, beta3 = group["betas"]
        frequency = group["frequency"]
        state["step"] = state.get("step", 0) + 1
        recent, now = in_units(state, "recent", g)
        recent.add_(now)  # the sum since the slow memory's last tick
        tensor(state, "M2", g)
        due = state["step"] % frequency == 0
        if due:
            M2, total = in_units(state, "M2", recent, state["recent_exponent"])
        if group["printed"]:
            M1, g1 = in_units(state, "M", g)
            M1.add_(g1, alpha=beta1)
            root_of_squares(state, g, 1.0, beta2)
            if due:  # as printed the next sum begins with this gradient once more
                M2.add_(total, alpha=beta3)
                recent.copy_(now)
        else:  # deviation 16: means, which forget, and V of what is divided
            M1 = super().write(g, state, group | {"momentum": beta1})
            if due:
                M2.lerp_(total / frequency, 1 - beta3)
                recent.zero_()
        return M1

    def read(self, memories, states, group):
        slow = [tensor(state, "O2", M) for M, state in zip(memories, states, strict=True)]
        due = [state for state in states if state["step"] % group["frequency"] == 0]
        new = orthogonal([state["M2"] for state in due], group["steps"])
        for state, O2 in zip(due, new, strict=True):
            state["O2"] = O2.contiguous()
        if not group["printed"]:  # which reads the new one from the next step on
            slow = [state["O2"] for state in states]
        updates = []
        fast = orthogonal(memories, group["steps"])
        for O1, O2, state in zip(fast, slow, states, strict=True):
            O = O1.add(O2, alpha=group["alpha"])
            if group["printed"]:
                update = quotient(O, state["R"] + group["eps"])
            elif group["second_moment"]:
                beta2 = group["betas"][1]
                V = tensor(state, "V", O).lerp_(O.square(), 1 - beta2)
                V = V / (1 - beta2 ** state["step"])
                update = to_rms(quotient(O, V.sqrt_() + group["eps"]), RMS)
            else:
                update = O * (RMS * max(O.shape) ** 0.5)
            updates.append(update)
        return updates


# --------------------------------------------------------------------------------------------------
# Element-wise memories (NL appendix B): one number per weight, a least-squares map from g to P


class AdamMemory(GradientDescent):
    """Adam as a memory: m = argmin of sum_i w_i (m g_i - P)^2 + lambda m^2 (NL eq. 100-105).

    For every weight alone m = P M / (H + lambda), with M = sum w_i g_i and H = sum w_i g_i^2. For
    P = sqrt(H) and lambda -> 0 it is M / sqrt(H). The weights w_i = beta^age decay (the print has
    none) at rates of M's and of H's own, and are divided by their sum, which is bias correction.
    Equals torch.optim.AdamW(lr, betas, eps, weight_decay).
    """

    n_betas = 2

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(params, lr, weight_decay, betas=betas, eps=eps)

    def write(self, g, state, group):
        beta1, beta2 = group["betas"]
        t = state.get("step", 0) + 1
        state["step"] = t
        # deviation 15: sums that decay, with Adam's bias correction
        M = tensor(state, "M", g).lerp_(g, 1 - beta1) / (1 - beta1**t)
        R = root_of_squares(state, g, beta2, 1 - beta2) / (1 - beta2**t) ** 0.5
        return quotient(M, R + group["eps"])


class AdaGradMemory(GradientDescent):
    """AdaGrad: that memory without forgetting, read for the newest gradient (NL eq. 106-111).

    H <- retention H + g^2, the update is g / sqrt(H). retention 1 equals
    torch.optim.Adagrad(lr, eps=eps). Below 1 and at eps 0 it equals
    RMSprop(lr * sqrt(1 - retention), alpha=retention).
    """

    def __init__(self, params, lr=1e-2, retention=1.0, eps=1e-10, weight_decay=0.0):
        super().__init__(params, lr, weight_decay, retention=retention, eps=eps)

    def write(self, g, state, group):
        # deviation 15: the diagonal of the paper's outer products
        R = root_of_squares(state, g, group["retention"], 1.0)
        return quotient(g, R + group["eps"])


# --------------------------------------------------------------------------------------------------
# Delta gradient descent: the weights themselves follow the learning rule of memory.py


class DGD(GradientDescent):
    """Delta gradient descent on the linear layers of a model, from their inputs (NL eq. 54-57).

    For every token, W <- argmin 1/2 |W x - u|^2 + 1/(2 lr) |W - W_t|^2 with u = -dL/dy: exactly
    W (I - eta' x x^T) - eta' dL/dy x^T with eta' = lr / (1 + lr |x|^2). The tokens of a batch
    follow one another (`scan`), with dL/dy taken at the weights before the batch. A bias is one
    more column, whose input is 1.

    model: its nn.Linear layers are taken, other parameters are not (see `param_groups`); what
    requires no gradient does not move, and W x - u is then a problem of the rest alone. Hooks
    record x and dL/dy of every forward pass with gradients, until `step` or `zero_grad`. The loss
    must be a *sum* over tokens: a mean makes u smaller, yet W forgets along x just as much. Raises
    ValueError for a model without linear layers, and in `step`, before anything has changed, for
    records that are not finite.
    """

    def __init__(self, model, lr=1e-2, weight_decay=0.0):
        self.layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        if not self.layers:
            got = f"got {type(model).__name__} without any"
            raise ValueError(f"DGD takes a model with nn.Linear layers, {got}")
        super().__init__(nn.ModuleList(self.layers).parameters(), lr, weight_decay)
        self.seen = {layer: [] for layer in self.layers}
        for layer in self.layers:
            layer.register_forward_hook(self._record)

    def _record(self, layer, inputs, y):
        if any(p.requires_grad for p in layer.parameters()) and y.requires_grad:
            x = inputs[0].detach()
            y.register_hook(lambda gradient: self.seen[layer].append((x, gradient.detach())))

    def _tokens(self, layer):
        """All that a layer has seen: x [N, d_in] and dL/dy [N, d_out]."""
        x = torch.cat([x.flatten(0, -2) for x, _ in self.seen[layer]])
        gradient = torch.cat([gradient.flatten(0, -2) for _, gradient in self.seen[layer]])
        if not (x.isfinite().all() and gradient.isfinite().all()):
            shape = tuple(layer.weight.shape)
            raise ValueError(f"an input or gradient of a layer of shape {shape} is not finite")
        return x, gradient

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)
        for records in self.seen.values():
            records.clear()

    @torch.no_grad()
    def step(self, closure=None):
        loss = loss_of(closure)
        tokens = {layer: self._tokens(layer) for layer in self.layers if self.seen[layer]}
        (group,) = self.param_groups
        lr = group["lr"]
        for layer, (x, gradient) in tokens.items():
            u = -gradient
            weights = []  # of what moves, [d_out, d_in] and [d_out, 1], and their inputs
            keys = []
            columns = None if layer.bias is None else layer.bias[:, None]
            for W, k in ((layer.weight, x), (columns, torch.ones_like(x[:, :1]))):
                if W is not None and W.requires_grad:
                    weights.append(W)
                    keys.append(k)
                elif W is not None:  # frozen: its part of W x is no error of what moves
                    u = u - k @ W.mT
            k = torch.cat(keys, 1)
            # deviation 19: exact for any |x| (NL eq. 57 is |x| = 1); appendix C has eta for 1/eta
            eta = lr / (1 + lr * full_precision(k).square().sum(-1))
            W = torch.cat(weights, 1) * (1 - lr * group["weight_decay"])
            _, W, _ = scan(W, k, u, eta, torch.ones_like(eta))
            for own, new in zip(weights, W.split([w.shape[1] for w in weights], 1), strict=True):
                own.copy_(new)
            self.seen[layer].clear()
        return loss


# --------------------------------------------------------------------------------------------------
# Optimizers of a whole model


def split_parameters(model):
    """(matrices, decayed, plain): what a matrix optimizer takes; AdamW's with decay, and without.

    plain: embeddings, persistent tokens, vectors, biases, mixtures, rates of Mamba's states, and
    the initial weights of memories, which retention pulls back to already. decayed: heads (their
    rows are classes) and convolutions, which have two or more dimensions but are no map between two
    spaces of features. All in the model's order; a tied head is an embedding.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    undecayed = ("bias", "log_A", "persistent", "b_eta", "b_alpha", ".b", ".mix")
    matrices = []
    decayed = []
    plain = []
    for name, p in model.named_parameters():
        if p.ndim < 2 or id(p) in embeddings or "start" in name or name.endswith(undecayed):
            plain.append(p)
        elif p.ndim > 2 or {"conv", "head", "lm_head"} & set(name.split(".")):
            decayed.append(p)
        else:
            matrices.append(p)
    return matrices, decayed, plain


# Of the matrices of a model. deviation 20: all are read through Newton-Schulz, so that what differs
# is the memory, and one lr serves all of them and AdamW.
MATRIX_OPTIMIZERS = {
    "muon": Muon,
    "m3": M3,
    "delta_momentum": partial(DeltaMomentum, output="newton_schulz"),
    "dmgd": partial(DeepMomentum, output="newton_schulz"),
}
OPTIMIZERS = ("adamw", *MATRIX_OPTIMIZERS)


def optimizer_by_name(model, name="adamw", lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95)):
    """An optimizer of all parameters of a model.

    AdamW, or one of MATRIX_OPTIMIZERS for its matrices and AdamW (whose betas these are) for the
    rest. Weight decay acts on matrices, heads and convolutions alone. Raises ValueError for an
    unknown name and for hyper-parameters out of range.
    """
    one_of("optimizer", name, OPTIMIZERS)
    for rate, value in {"lr": lr, "weight_decay": weight_decay, "betas": betas}.items():
        check(rate, value)
    matrices, decayed, plain = split_parameters(model)
    if name == "adamw":
        not_decayed = set(map(id, plain))
        matrices = []
        decayed = [p for p in model.parameters() if id(p) not in not_decayed]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # a fused step takes no mix of sharded and whole parameters
    alike = len({hasattr(p, "full_tensor") for p in model.parameters()}) == 1
    parts = []
    if matrices:
        parts.append(MATRIX_OPTIMIZERS[name](matrices, lr=lr, weight_decay=weight_decay))
    if groups:
        how = {"fused": True} if alike else {"foreach": False}
        adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, **how)
        adamw.register_load_state_dict_post_hook(partial(_keep, how))  # not that of the saved one
        parts.append(adamw)
    return CombinedOptimizer(*parts) if matrices else parts[0]


def _keep(how, optimizer):
    for group in optimizer.param_groups:
        group.update({"fused": None, "foreach": None} | how)


class Wrapper(torch.optim.Optimizer):
    """An optimizer made of others, whose groups and states are theirs: a scheduler, a closure, a
    GradScaler find in it what they look for."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers
        self.__setstate__({"defaults": {}})  # not torch's __init__, which would add groups again

    def __getstate__(self):
        """Without what torch puts in: hooks, and the `step` that a scheduler has replaced."""
        own = vars(self).items()
        return {name: value for name, value in own if name != "step" and name[0] != "_"}

    @property
    def param_groups(self):
        return sum((optimizer.param_groups for optimizer in self.optimizers), [])

    @property
    def state(self):
        return ChainMap(*(optimizer.state for optimizer in self.optimizers))

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def add_param_group(self, group):
        """The last optimizer takes it. ValueError for a parameter that another one has."""
        params = group["params"]
        params = [params] if torch.is_tensor(params) else list(params)
        have = {id(p) for own in self.param_groups for p in own["params"]}
        for p in params:
            if id(p) in have:
                shape = tuple(p.shape)
                raise ValueError(f"a parameter of shape {shape} is in a parameter group already")
        self.optimizers[-1].add_param_group(group | {"params": params})


class CombinedOptimizer(Wrapper):
    """Optimizers of different parameters as one."""

    def step(self, closure=None):
        loss = loss_of(closure)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self):
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state):
        """ValueError for the state of another number of optimizers."""
        states = state.get("optimizers", ())
        if len(states) != len(self.optimizers):
            wanted = f"must hold {len(self.optimizers)} optimizers"
            raise ValueError(f"the state {wanted}, got {len(states)}")
        for optimizer, own in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(own)


def scale_rates(optimizer, model, scales):
    """Give parameters learning rates of their own: groups with "scale", which `train.update` reads.

    scales: {part of a parameter's name: fraction of lr}; parameters without one have 1.
    """
    own = {}
    for name, p in model.named_parameters():
        own[id(p)] = next((scale for part, scale in scales.items() if part in name), 1.0)
    for each in getattr(optimizer, "optimizers", [optimizer]):
        groups = []
        for group in each.param_groups:
            for scale in sorted({own[id(p)] for p in group["params"]}, reverse=True):
                params = [p for p in group["params"] if own[id(p)] == scale]
                groups.append(group | {"params": params, "scale": scale})
        each.param_groups[:] = groups


class LevelOptimizer(Wrapper):
    """The step clock: NL eq. 71 with training steps as ticks, so every level has its own period.

    A level accumulates gradients and steps every `chunk` steps. It hands the *sum* of its gradients
    to the optimizer; the parameters of other levels have no gradient in that step, so neither they
    nor their moments move.

        levels = {"mlps.0": 1, "mlps.1": 8, "": 16}
        optimizer = LevelOptimizer(AdamW(model.parameters()), model, levels)

    optimizer: any of torch or of this file, of parameters of `model`. levels: {part of a
    parameter's name: chunk in steps, or None = never steps}; the first part found in a name
    decides, and "" is found in every name. Mixers and embeddings deserve levels of their own,
    slower than most, because they forget first. `state_dict` holds the sums, so that a run resumes
    within a period.

    Raises ValueError for a parameter that is not the model's or has no level, a chunk < 1, a level
    without parameters, and the state of other levels.
    """

    def __init__(self, optimizer, model, levels):
        for part, chunk in levels.items():
            if chunk is not None and (type(chunk) is not int or chunk < 1):
                wanted = "at least 1 step, or None (never steps)"
                raise ValueError(f"chunk of level {part!r} must be {wanted}, got {chunk!r}")
        super().__init__(optimizer)
        self.optimizer = optimizer
        self.model = model
        self.levels = dict(levels)
        self.ticks = 0
        self.parameters = {}  # by name
        self.level = {}  # of a parameter, by name
        self.sums = {}  # gradients since the level's last step, by name
        for group in optimizer.param_groups:
            self._take(group["params"])
        for part in levels:
            if part and part not in self.level.values():
                some = ", ".join(list(self.parameters)[:4])
                raise ValueError(f"level {part!r} has no parameter, among {some}, ...")

    def _take(self, params, then=None):
        """Find the levels of params; if all have one, go on with `then` and keep them."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        level = {}
        for p in params:
            name = names.get(id(p))
            if name is None:
                shape = list(p.shape)
                raise ValueError(f"the optimizer has a parameter of shape {shape}, not the model's")
            level[name] = next((part for part in self.levels if part in name), None)
            if level[name] is None:
                hint = f"the levels are {list(self.levels)}; '' takes all the others"
                raise ValueError(f"parameter {name!r} has no level: {hint}")
        if then is not None:
            then()
        self.level |= level
        self.parameters |= dict(zip(level, params, strict=True))

    def add_param_group(self, group):
        params = group["params"]
        params = [params] if torch.is_tensor(params) else list(params)
        self._take(params, partial(super().add_param_group, group | {"params": params}))

    def due(self, tick):
        """The levels that step at the end of training step `tick` (the first is 1)."""
        return [part for part, chunk in self.levels.items() if chunk and tick % chunk == 0]

    @torch.no_grad()
    def step(self, closure=None):
        """Take p.grad of every parameter, None afterwards; the levels that are due step."""
        loss = loss_of(closure)
        self.ticks += 1
        due = self.due(self.ticks)
        for name, p in self.parameters.items():
            level = self.level[name]
            if p.grad is not None and self.levels[level]:
                if name in self.sums:
                    self.sums[name].add_(p.grad)
                else:  # a copy: DDP writes the next gradient into the same memory
                    self.sums[name] = p.grad.clone()
            p.grad = self.sums.pop(name, None) if level in due else None
        self.optimizer.step()
        self.zero_grad()
        return loss

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none=True)

    def state_dict(self):
        return {
            "optimizer": self.optimizer.state_dict(),
            "ticks": self.ticks,
            "levels": self.levels,
            "sums": {name: g.clone() for name, g in self.sums.items()},
        }

    def load_state_dict(self, state):
        if state["levels"] != self.levels:
            raise ValueError(f"the state must be of levels {self.levels}, got {state['levels']}")
        self.optimizer.load_state_dict(state["optimizer"])
        self.ticks = state["ticks"]
        self.sums = {name: g.to(self.parameters[name]).clone() for name, g in state["sums"].items()}


if __name__ == "__main__":
    from runpy import run_module

    run_module("bench.demos", run_name="optimizers")
