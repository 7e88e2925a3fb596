"""Optimizers as associative memories: each one compresses the gradients it has seen into a memory, and reads it (NL sec. 4).

A gradient g = dL/dW [d_out, d_in] of a layer y = W x is itself what a memory wrote (W maps x to its surprise -dL/dy, NL
eq. 8-9). An optimizer adds a memory M of these g, with an objective, a capacity and a retention. Every class here is

    M <- write(M, g)                                   retention, then one step on the memory's objective
    W <- (1 - lr * weight_decay) W - lr * read(M)      sigma of NL eq. 52: linear, or Newton-Schulz

                           M is                      learns                                  forgets
    GradientDescent        nothing                   -                                       everything
    Momentum               a matrix like W           min -<M g^T, I>        M + g            alike in all directions
    PreconditionedMomentum a matrix like W           min -<M g^T, P>        M + P g          alike in all directions
    DeltaMomentum          a matrix like W           min |M g^T - I|^2 / 2  M (I - c g^T g) + g   most where g points
    DeepMomentum           an MLP                    any of memory.OBJECTIVES                alike in all layers
    Muon                   a matrix like W           as Momentum, read through Newton-Schulz     alike
    M3                     two, on two clocks        as Muon                                 one soon, one slowly
    AdamMemory             a number for each weight  min sum of (M g - P)^2, aging           alike
    AdaGradMemory          a number for each weight  the same                                never
    DGD                    W itself                  min |W x + dL/dy|^2 / 2 + |W - W_t|^2 / (2 lr)   most where x points

M is a linear map from keys (rows of g) to values (rows of I): `memorize` is that step for any network and objective, and
makes Momentum, DeltaMomentum and DeepMomentum one thing. lr stands outside the memory (NL eq. 33 has it inside: equal while
it is constant), so that a schedule acts at once and a non-linear read does not swallow it.

Matrix optimizers (DeltaMomentum, DeepMomentum, Muon, M3) take matrices; `split_parameters` says which, `optimizer_by_name`
gives the rest to AdamW. Read through Newton-Schulz, updates have AdamW's usual root mean square of 0.2: one lr serves both.

`python optimizers.py` draws NL figure 4 and shows what each memory keeps of gradients long past.
"""

import math
from functools import partial

import torch
from torch import nn

from fused import silu_derivative
from memory import OBJECTIVES, full_precision, scan, surprise

RMS = 0.2  # of AdamW's update divided by lr, in the course of usual training; Newton-Schulz reads are scaled to it

# ---------------------------------------------------------------------------------------------------------------------
# How a memory of gradients is read: lists of matrices in, lists of updates out


QUINTIC = (3.4445, -4.7750, 2.0315)  # Muon's: steepest at 0, singular values end within about 0.7 .. 1.2
CUBIC = (1.5, -0.5, 0.0)  # gradient descent on |O^T O - I|^2 / 8 (NL eq. 43-44 without the pull towards g); exact, slower


def newton_schulz(G, steps=5, coefficients=QUINTIC):
    """The orthogonal matrix next to G [..., m, n], nearly: singular values to 1 by O <- a O + b (O O^T) O + c (O O^T)^2 O.

    In bfloat16 on a GPU, else in G's precision. Invariant to the scale of G; zero stays zero. NL eq. 42-44.
    """
    a, b, c = coefficients
    G = full_precision(G)
    O = G / G.norm(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(G.dtype).tiny)
    wide = G.shape[-2] <= G.shape[-1]
    O = (O if wide else O.mT).to(torch.bfloat16 if G.is_cuda else G.dtype)
    for _ in range(steps):
        A = O @ O.mT
        O = a * O + (b * A + c * (A @ A)) @ O
    return (O if wide else O.mT).to(G.dtype)


def orthogonal(memories, steps=5):
    """`newton_schulz` of a list of matrices, equal shapes (up to transposition) at once."""
    stacks = {}
    for i, M in enumerate(memories):
        stacks.setdefault((*sorted(M.shape), M.dtype, M.device), []).append(i)
    out = [None] * len(memories)
    for members in stacks.values():
        flat = [memories[i] if memories[i].shape[0] <= memories[i].shape[1] else memories[i].mT for i in members]
        for i, O in zip(members, newton_schulz(torch.stack(flat), steps).to(flat[0].dtype), strict=True):
            out[i] = O if O.shape == memories[i].shape else O.mT
    return out


def to_rms(M, rms):
    """M scaled to a root mean square of rms; zero stays zero."""
    return M * (rms / M.square().mean().sqrt().clamp(min=torch.finfo(M.dtype).tiny))


def orthogonal_to_rms(memories, steps=5):
    """`orthogonal`, scaled so that a matrix of singular values 1 has the root mean square RMS."""
    return [O * (RMS * max(O.shape) ** 0.5) for O in orthogonal(memories, steps)]


def unit(g):
    """g scaled to unit length (Frobenius norm); zero stays zero."""
    return to_rms(g, g.numel() ** -0.5)


READS = {"linear": lambda memories, steps: memories, "newton_schulz": orthogonal_to_rms}
# Feature maps of gradients (NL eq. 51), each with the scale it took away, which the reading gets back
FEATURES = {"linear": lambda g: (g, 1.0), "sign": lambda g: (g.sign(), 1.0), "unit": lambda g: (unit(g), g.norm())}

# ---------------------------------------------------------------------------------------------------------------------
# The step that all optimizers share


def _whole(value):
    return type(value) is int and value >= 1


_FRACTION = ("in [0, 1)", lambda x: 0 <= x < 1)
_POSITIVE = ("above 0 and finite", lambda x: 0 < x < math.inf)
_AT_LEAST_0 = ("at least 0 and finite", lambda x: 0 <= x < math.inf)
LEGAL = {
    "lr": _POSITIVE,
    "eta": _POSITIVE,
    "eps": _AT_LEAST_0,
    "alpha": _AT_LEAST_0,
    "weight_decay": _AT_LEAST_0,
    "momentum": _FRACTION,
    "beta": _FRACTION,
    "betas": ("each in [0, 1)", lambda betas: all(0 <= beta < 1 for beta in betas)),
    "delta": ("in [0, 1]", lambda x: 0 <= x <= 1),
    "retention": ("in (0, 1]", lambda x: 0 < x <= 1),
    "frequency": ("a whole number of at least 1", _whole),
    "steps": ("a whole number of at least 1", _whole),
    "depth": ("1 or 2", lambda x: type(x) is int and 1 <= x <= 2),
    "objective": (f"one of {', '.join(OBJECTIVES)}", OBJECTIVES.__contains__),
    "features": (f"one of {', '.join(FEATURES)}", FEATURES.__contains__),
    "output": (f"one of {', '.join(READS)}", READS.__contains__),
}


class GradientDescent(torch.optim.Optimizer):
    """W <- W - lr g: no memory but W itself (NL eq. 1-9); and the step of every optimizer below, with its checks.

    Raises ValueError, naming value and legal range, for bad hyper-parameters (when a parameter group is added) and for
    sparse or non-finite gradients (before anything has changed). weight_decay is decoupled: W shrinks by lr * weight_decay.
    """

    matrices = False  # takes matrices only
    n_betas = 0

    def __init__(self, params, lr=1e-2, weight_decay=0.0, **rates):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, **rates))

    def add_param_group(self, group):
        for name, value in (self.defaults | group).items():
            legal, check = LEGAL.get(name, ("", lambda value: True))
            try:
                fine = check(value) and (name != "betas" or len(value) == self.n_betas)
            except TypeError:
                fine = False
            if not fine:
                number = f"{self.n_betas}, " if name == "betas" else ""
                raise ValueError(f"{name} is {value!r}: legal is {number}{legal}")
        super().add_param_group(group)
        shapes = [tuple(p.shape) for p in self.param_groups[-1]["params"]]
        matrices = self.matrices or self.param_groups[-1].get("output") == "newton_schulz"
        if matrices and any(len(shape) != 2 for shape in shapes):
            self.param_groups.pop()
            wrong = next(shape for shape in shapes if len(shape) != 2)
            raise ValueError(f"{type(self).__name__} takes matrices, got a parameter of shape {wrong}: see split_parameters")

    def write(self, g, state, group):
        """Write one gradient into the memory `state` (a dict of tensors, in place); returns what `read` is to read."""
        return g

    def read(self, memories, states, group):
        """The updates, to be subtracted lr times: sigma(M) of NL eq. 52, for all parameters of a group at once."""
        return READS[group.get("output", "linear")](memories, group.get("steps", 5))

    @torch.no_grad()
    def step(self, closure=None):
        """One gradient into every memory, one step of every parameter. closure, if given, computes the loss, returned."""
        loss = loss_of(closure)
        self.check_gradients()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            states = [self.state[p] for p in params]
            memories = [self.write(p.grad, state, group) for p, state in zip(params, states, strict=True)]
            for p, update in zip(params, self.read(memories, states, group), strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
        return loss

    def check_gradients(self):
        """ValueError for the first gradient that is sparse or not finite."""
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p in params:
            if p.grad.layout != torch.strided:
                raise ValueError(f"the gradient of a parameter of shape {tuple(p.shape)} is sparse: legal are dense ones")
        # one number, so that a GPU is waited for once; a norm may overflow though all is finite
        if params and not torch.nn.utils.get_total_norm([p.grad for p in params]).isfinite():
            for p in params:
                if not p.grad.isfinite().all():
                    raise ValueError(f"the gradient of a parameter of shape {tuple(p.shape)} is not finite")


def loss_of(closure):
    """What the closure of a step computes, with gradients; None without one."""
    with torch.enable_grad():
        return closure and closure()


def tensor(state, name, like):
    """state[name], zeros like `like` at first."""
    if name not in state:
        state[name] = torch.zeros_like(like, memory_format=torch.preserve_format)
    return state[name]


def memorize(layers, k, target, retention, eta, objective="dot"):
    """One step of a memory network on the objective of (keys k [T, d_in], targets [T, d_out]), after retention.

    layers[l] [d_out, d_in] as in memory.py -> the new list: W_l <- retention W_l - eta g_l^T x_l (NL eq. 36-37). One layer,
    k = g, target = I: "dot" is momentum (NL 34), retention W + eta g; "l2" the delta rule (NL 48).
    """
    inputs, errors = surprise(layers, k, target, objective, residual=False)
    return [retention * W - eta * e.mT @ x for W, x, e in zip(layers, inputs, errors, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Momentum and its kin


class Momentum(GradientDescent):
    """M <- momentum M + g: gradient descent on -<M g^T, I>, with retention (NL eq. 10-13, 33-34). A sum: the gradient of i
    steps ago weighs momentum^i; at 0.9 the last 7 hold half of it, the last 44 99%.

    output: how M is read, "linear" or, for matrices, "newton_schulz"."""

    def __init__(self, params, lr=1e-2, momentum=0.9, weight_decay=0.0, output="linear"):
        super().__init__(params, lr, weight_decay, momentum=momentum, output=output)

    def write(self, g, state, group):
        return tensor(state, "M", g).mul_(group["momentum"]).add_(g)


class PreconditionedMomentum(Momentum):
    """M <- momentum M + P g: a momentum whose values are P, not 1 (NL eq. 46-47). P^-1 is a memory of its own, of the
    gradient's size: P^-2 = H learns g^2 by gradient descent on |H - g^2|^2 / 2 with step 1 - beta (NL eq. 38-41; ours is
    diagonal, and H is divided by the weight of what it has seen). W <- W - lr M. Momentum 0: Adam with betas (0, beta)."""

    def __init__(self, params, lr=1e-3, momentum=0.9, beta=0.999, eps=1e-8, weight_decay=0.0, output="linear"):
        GradientDescent.__init__(self, params, lr, weight_decay, momentum=momentum, beta=beta, eps=eps, output=output)

    def write(self, g, state, group):
        state["step"] = state.get("step", 0) + 1
        H = tensor(state, "H", g).lerp_(g.square(), 1 - group["beta"])
        P_inverse = (H / (1 - group["beta"] ** state["step"])).sqrt_().add_(group["eps"])
        return super().write(g / P_inverse, state, group)


class DeltaMomentum(Momentum):
    """M <- M (momentum I - c g^T g) + g: the delta rule, gradient descent on |M g^T - I|^2 / 2 (NL eq. 48-49). What M holds
    along the new gradient's rows is forgotten first, so a direction that keeps coming back does not pile up.

    As printed c = 1: no step size on the decay, which turns over and diverges as soon as |g|^2 > 1 + momentum. Here
    c = delta / |g|^2 (Frobenius norm), so the decay stays in [momentum - delta, momentum], whatever the gradient's scale.
    """

    matrices = True

    def __init__(self, params, lr=1e-2, momentum=0.9, delta=0.2, weight_decay=0.0, output="linear"):
        GradientDescent.__init__(self, params, lr, weight_decay, momentum=momentum, delta=delta, output=output)

    def write(self, g, state, group):
        M = tensor(state, "M", g)
        u = unit(g)
        old = torch.linalg.multi_dot([M, u.mT, u])  # in the cheaper order
        return M.mul_(group["momentum"]).sub_(old, alpha=group["delta"]).add_(g)


class DeepMomentum(GradientDescent):
    """Deep momentum gradient descent, DMGD: the memory of gradients is a network m(u) (NL eq. 50), u = phi(g) (NL eq. 51).

    m maps rows of u to rows of I, so it has W's input and output width, and learns by one step of size eta per gradient on
    the objective ("dot" is NL's <m(u^T), 1>). depth 2: m(u) = (I + B) silu(A u), A like g, B square, both from zero, so
    retention leads back to the identity; a g with more rows than columns is transposed. A and B feed each other; features
    "unit" and eta <= 1 - momentum keep them bounded, whatever the gradients.

    NL eq. 50 prints W <- W + m(u), which has W's shape for no m that maps keys to values. We add the linear map that m is
    at u, (I + B) diag(mean slope) A, the mean over rows of u. For depth 1 it is the matrix A: a linear memory is read as
    itself. Then momentum is features "linear", eta 1.
    """

    matrices = True

    def __init__(self, params, lr=1e-2, momentum=0.9, eta=0.1, depth=2, objective="dot", features="unit", weight_decay=0.0,
                 output="linear"):  # fmt: skip
        super().__init__(params, lr, weight_decay, momentum=momentum, eta=eta, depth=depth, objective=objective,
                         features=features, output=output)  # fmt: skip

    def write(self, g, state, group):
        tall = g.shape[0] > g.shape[1]
        u, scale = FEATURES[group["features"]](g.mT if tall else g)
        identity = torch.eye(len(u), dtype=u.dtype, device=u.device)
        layers = [tensor(state, "A", u)]
        if group["depth"] == 2:
            layers.append(identity + tensor(state, "B", identity))
        state["A"], *outer = memorize(layers, u, identity, group["momentum"], group["eta"], group["objective"])
        M = state["A"] * scale
        for layer in outer:
            state["B"] = layer.sub_(identity, alpha=group["momentum"])  # retention acts on what was learned alone
            M = silu_derivative(u @ state["A"].mT).mean(0).unsqueeze(1) * M
            M = M + state["B"] @ M
        return M.mT if tall else M


# ---------------------------------------------------------------------------------------------------------------------
# Memories whose reading is orthogonal


class Muon(GradientDescent):
    """A linear momentum memory with Newton-Schulz output, W <- W - lr NS(M) (NL eq. 42-44, 52).

    M is a mean, M <- momentum M + (1 - momentum) g, read with g once more on top (nesterov). steps: of Newton-Schulz.
    Equals torch.optim.Muon(adjust_lr_fn="match_rms_adamw") up to its bfloat16.
    """

    matrices = True

    def __init__(self, params, lr=3e-3, momentum=0.95, nesterov=True, steps=5, weight_decay=0.0):
        super().__init__(params, lr, weight_decay, momentum=momentum, nesterov=nesterov, steps=steps, output="newton_schulz")

    def write(self, g, state, group):
        M = tensor(state, "M", g).lerp_(g, 1 - group["momentum"])
        return g.lerp(M, group["momentum"]) if group["nesterov"] else M


class M3(Muon):
    """Multi-scale Momentum Muon: two momentum memories on two clocks (NL eq. 75, Algorithm 1).

        M1 <- a mean of gradients, every step (betas[0])            O1 = NS(M1)
        M2 <- a mean of means of `frequency` gradients (betas[2])   O2 = NS(M2), every `frequency` steps
        W  <- W - lr (O1 + alpha O2) / sqrt(V)                      V: mean of (O1 + alpha O2)^2 (betas[1])

    The quotient is scaled to the root mean square RMS. Without second_moment it is O1 + alpha O2, and with alpha = 0 Muon.

    printed: Algorithm 1 to the letter. There nothing is ever forgotten (M1 += betas[0] g, V += betas[1] g^2, M2 += betas[2]
    sum of g), and the orthogonalised matrices, which have no scale, are divided by the root of V of the *gradients*, which
    have: the smaller the gradients the longer the step, without bound. Hence means, and V of what is divided.
    State: five tensors of a parameter's size.
    """

    n_betas = 3

    def __init__(self, params, lr=3e-3, betas=(0.95, 0.95, 0.9), alpha=0.3, frequency=10, nesterov=True, steps=5, eps=1e-8,
                 weight_decay=0.0, second_moment=True, printed=False):  # fmt: skip
        GradientDescent.__init__(
            self, params, lr, weight_decay, betas=betas, alpha=alpha, frequency=frequency, nesterov=nesterov, steps=steps,
            eps=eps, second_moment=second_moment, printed=printed,
        )  # fmt: skip

    def write(self, g, state, group):
        beta1, beta2, beta3 = group["betas"]
        state["step"] = state.get("step", 0) + 1
        recent = tensor(state, "recent", g).add_(g)  # the sum since the slow memory's last tick
        M2, tick = tensor(state, "M2", g), state["step"] % group["frequency"] == 0
        if group["printed"]:
            M1 = tensor(state, "M", g).add_(g, alpha=beta1)
            tensor(state, "V", g).addcmul_(g, g, value=beta2)
        else:
            M1 = super().write(g, state, group | {"momentum": beta1})
        if tick:
            M2.add_(recent, alpha=beta3) if group["printed"] else M2.lerp_(recent / group["frequency"], 1 - beta3)
            recent.zero_()
        return M1

    def read(self, memories, states, group):
        due = [state for state in states if state["step"] % group["frequency"] == 0]
        for state, O2 in zip(due, orthogonal([state["M2"] for state in due], group["steps"]), strict=True):
            state["O2"] = O2.contiguous()
        updates = []
        for O, state in zip(orthogonal(memories, group["steps"]), states, strict=True):
            O = O.add(tensor(state, "O2", O), alpha=group["alpha"])
            scale = RMS * max(O.shape) ** 0.5
            if group["printed"]:
                O, scale = O / (state["V"].sqrt() + group["eps"]), 1.0
            elif group["second_moment"]:
                beta2 = group["betas"][1]
                V = tensor(state, "V", O).lerp_(O.square(), 1 - beta2) / (1 - beta2 ** state["step"])
                O, scale = to_rms(O / (V.sqrt_() + group["eps"]), RMS), 1.0
            updates.append(O * scale)
        return updates


# ---------------------------------------------------------------------------------------------------------------------
# Element-wise memories (NL appendix B): one number per weight, the least-squares map from gradients to P


class AdamMemory(GradientDescent):
    """Adam as a memory: m = argmin of sum_i w_i (m g_i - P)^2 + lambda m^2 for every weight alone (NL eq. 100-105).

    m = P M / (H + lambda) with M = sum w_i g_i and H = sum w_i g_i^2; for P = sqrt(H), lambda -> 0: M / sqrt(H). With
    weights w_i = beta^age that decay (the print has none), at M's and H's own rate, divided by their sum: this is bias
    correction. Equals torch.optim.AdamW(lr, betas, eps, weight_decay), and torch.optim.Adam without weight decay.
    """

    n_betas = 2

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(params, lr, weight_decay, betas=betas, eps=eps)

    def write(self, g, state, group):
        (beta1, beta2), t = group["betas"], state.get("step", 0) + 1
        state["step"] = t
        M = tensor(state, "M", g).lerp_(g, 1 - beta1) / (1 - beta1**t)
        H = tensor(state, "H", g).lerp_(g.square(), 1 - beta2) / (1 - beta2**t)
        return M / (H.sqrt() + group["eps"])


class AdaGradMemory(GradientDescent):
    """AdaGrad as the same memory without forgetting, read for the newest gradient alone: g / sqrt(H) (NL eq. 106-111).

    H <- retention H + g^2, the diagonal of the paper's outer products. retention 1 equals torch.optim.Adagrad(lr, eps=eps);
    below 1 it equals RMSprop(lr * sqrt(1 - retention), alpha=retention) at eps 0.
    """

    def __init__(self, params, lr=1e-2, retention=1.0, eps=1e-10, weight_decay=0.0):
        super().__init__(params, lr, weight_decay, retention=retention, eps=eps)

    def write(self, g, state, group):
        H = tensor(state, "H", g).mul_(group["retention"]).addcmul_(g, g)
        return g / (H.sqrt() + group["eps"])


# ---------------------------------------------------------------------------------------------------------------------
# Delta gradient descent: the weights themselves follow the learning rule of memory.py


class DGD(GradientDescent):
    """Delta gradient descent on the linear layers of a model, from what went into them (NL eq. 54-57).

    For every token, W <- argmin 1/2 |W x - u|^2 + 1/(2 lr) |W - W_t|^2 with u = -dL/dy: exactly
    W (I - eta' x x^T) - eta' dL/dy x^T with eta' = lr / (1 + lr |x|^2), for any |x| (NL eq. 57 is |x| = 1; appendix C
    prints eta for 1/eta). The tokens of a batch follow one another: `scan`, with dL/dy taken at the weights before the batch.
    A bias is one more column, whose input is 1.

    model: an nn.Module; its nn.Linear layers are taken, other parameters are not (`optimizer.param_groups` shows which).
    Hooks record x and dL/dy of every forward pass with gradients, until `step` or `zero_grad`. The loss must be a *sum* over
    tokens: a mean makes u smaller, yet W forgets along x just as much. Raises ValueError for a model without linear layers,
    and in `step`, before anything has changed, for records that are not finite.
    """

    def __init__(self, model, lr=1e-2, weight_decay=0.0):
        self.layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        if not self.layers:
            raise ValueError(f"DGD takes a model with nn.Linear layers, got {type(model).__name__} without any")
        super().__init__([p for layer in self.layers for p in layer.parameters()], lr, weight_decay)
        self.seen = {layer: [] for layer in self.layers}
        for layer in self.layers:
            layer.register_forward_hook(self._record)

    def _record(self, layer, inputs, y):
        if y.requires_grad:
            x = inputs[0].detach()
            y.register_hook(lambda gradient: self.seen[layer].append((x, gradient.detach())))

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)
        for records in self.seen.values():
            records.clear()

    @torch.no_grad()
    def step(self, closure=None):
        loss, tokens = loss_of(closure), {}
        for layer, records in self.seen.items():
            if records:
                x, gradient = (torch.cat([part.flatten(0, -2) for part in parts]) for parts in zip(*records, strict=True))
                if not (x.isfinite().all() and gradient.isfinite().all()):
                    raise ValueError(f"an input or gradient of a layer of shape {tuple(layer.weight.shape)} is not finite")
                tokens[layer] = x, gradient
        (group,) = self.param_groups
        for layer, (x, gradient) in tokens.items():
            W, k = layer.weight, x
            if layer.bias is not None:
                W, k = torch.cat([W, layer.bias[:, None]], 1), torch.cat([x, torch.ones_like(x[:, :1])], 1)
            eta = group["lr"] / (1 + group["lr"] * full_precision(k).square().sum(-1))
            _, W, _ = scan(W * (1 - group["lr"] * group["weight_decay"]), k, -gradient, eta, torch.ones_like(eta))
            layer.weight.copy_(W[:, : layer.in_features])
            if layer.bias is not None:
                layer.bias.copy_(W[:, -1])
            self.seen[layer].clear()
        return loss


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers for a whole model


def split_parameters(model):
    """(matrices, decayed, plain): the matrices a matrix optimizer takes, and what goes to AdamW with and without decay.

    plain: embeddings, persistent tokens, vectors, biases, the rates of Mamba's states, and the learned starts of memories,
    which retention pulls back to already. decayed: what is no map between two spaces of features though it has two or more
    dimensions: heads (their rows are classes), convolutions. All in the model's order; a tied head is an embedding.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices, decayed, plain = [], [], []
    for name, p in model.named_parameters():
        if p.ndim < 2 or id(p) in embeddings or "start" in name or name.endswith(("bias", "log_A", "persistent")):
            plain.append(p)
        elif p.ndim > 2 or {"conv", "head", "lm_head"} & set(name.split(".")):
            decayed.append(p)
        else:
            matrices.append(p)
    return matrices, decayed, plain


class CombinedOptimizer:
    """Optimizers of different parameters as one: what a training loop needs of torch.optim.Optimizer."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers

    @property
    def param_groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self):
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state):
        """ValueError for the state of other optimizers."""
        if len(state.get("optimizers", ())) != len(self.optimizers):
            raise ValueError(f"the state is not of {len(self.optimizers)} optimizers")
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)


class LevelOptimizer:
    """The step clock (NL 71 with ticks = training steps): each level accumulates gradients and steps every `chunk` steps.

    optimizer: any torch optimizer, or several `CombinedOptimizer`, of parameters of `model`. levels: {part of a parameter's name:
    chunk in steps, None = never steps}; the first part found in a name decides, and "" is found in every name. Mixers and
    embeddings deserve levels of their own, slower than most: they forget first.

        optimizer = LevelOptimizer(AdamW(model.parameters()), model, {"mlps.0": 1, "mlps.1": 8, "": 16})

    A level that is due hands the *sum* of its gradients (of one training step each) to the optimizer; the parameters of
    the others have no gradient in that step, and so neither they nor their moments move. `due(step)` names the calendar.
    `state_dict` holds the sums, so a run resumes in the middle of a period. Raises ValueError for a parameter that is not
    the model's or has no level, a chunk < 1, a part that is in no name, the state of other levels.
    """

    def __init__(self, optimizer, model, levels):
        for part, chunk in levels.items():
            if chunk is not None and (type(chunk) is not int or chunk < 1):
                raise ValueError(f"level {part!r} has chunk {chunk!r}; it must be at least 1 step, or None (never steps)")
        self.optimizer, self.levels, self.ticks = optimizer, dict(levels), 0
        self.parameters, self.level, self.sums = {}, {}, {}
        names = {id(p): name for name, p in model.named_parameters()}
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if (name := names.get(id(p))) is None:
                raise ValueError(f"the optimizer has a parameter of shape {list(p.shape)} that is not the model's")
            found = [part for part in levels if part in name]
            if not found:
                raise ValueError(f"parameter {name!r} has no level: the levels are {list(levels)}; '' takes all the others")
            self.parameters[name], self.level[name] = p, found[0]
        if unused := [part for part in levels if part and part not in self.level.values()]:
            raise ValueError(f"level {unused[0]!r} has no parameter, among {', '.join(list(self.parameters)[:4])}, ...")

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def due(self, tick):
        """The levels that step at the end of training step `tick` (the first is 1)."""
        return [part for part, chunk in self.levels.items() if chunk and tick % chunk == 0]

    @torch.no_grad()
    def step(self):
        """Take p.grad of every parameter, which is None afterwards, and let the levels that are due step."""
        self.ticks += 1
        due = self.due(self.ticks)
        for name, p in self.parameters.items():
            if p.grad is not None and self.levels[self.level[name]]:
                self.sums[name] = self.sums[name].add_(p.grad) if name in self.sums else p.grad
            p.grad = self.sums.pop(name, None) if self.level[name] in due else None
        self.optimizer.step()
        self.zero_grad()

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self):
        return {"optimizer": self.optimizer.state_dict(), "ticks": self.ticks, "levels": self.levels,
                "sums": {name: g.clone() for name, g in self.sums.items()}}  # fmt: skip

    def load_state_dict(self, state):
        if state["levels"] != self.levels:
            raise ValueError(f"the state is of levels {state['levels']}; these are {self.levels}")
        self.optimizer.load_state_dict(state["optimizer"])
        self.ticks = state["ticks"]
        self.sums = {name: g.to(self.parameters[name]).clone() for name, g in state["sums"].items()}


# Of the matrices of a model. All are read through Newton-Schulz, so what differs is the memory; one lr serves all and AdamW.
MATRIX_OPTIMIZERS = {
    "muon": Muon,
    "m3": M3,
    "delta_momentum": partial(DeltaMomentum, output="newton_schulz"),
    "dmgd": partial(DeepMomentum, output="newton_schulz"),
}
OPTIMIZERS = ("adamw", *MATRIX_OPTIMIZERS)


def optimizer_by_name(model, name="adamw", lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95)):
    """An optimizer of all parameters of a model: AdamW, or one of MATRIX_OPTIMIZERS for its matrices and AdamW for the rest.

    betas are AdamW's. Weight decay acts on matrices, heads and convolutions alone. ValueError for an unknown name.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer is {name!r}: legal are {', '.join(OPTIMIZERS)}")
    matrices, decayed, plain = split_parameters(model)
    if name == "adamw":
        not_decayed = set(map(id, plain))
        matrices, decayed = [], [p for p in model.parameters() if id(p) not in not_decayed]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    parts = [MATRIX_OPTIMIZERS[name](matrices, lr=lr, weight_decay=weight_decay)] if matrices else []
    parts += [torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)] if groups else []
    return CombinedOptimizer(*parts) if matrices else parts[0]


if __name__ == "__main__":
    from runpy import run_module

    run_module("bench.demos", run_name="optimizers")
