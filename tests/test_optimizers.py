"""Each optimizer equals its definition, a closed form, or torch's own, under a stated mapping.

Bit for bit, or in float64 to 1e-10 unless a test says otherwise.
"""

import copy
import io
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hope import Hope, HopeConfig
from memory import scan, write
from optimizers import (
    DGD,
    M3,
    OPTIMIZERS,
    AdaGradMemory,
    AdamMemory,
    CombinedOptimizer,
    DeepMomentum,
    DeltaMomentum,
    GradientDescent,
    LevelOptimizer,
    Momentum,
    Muon,
    PreconditionedMomentum,
    memorize,
    newton_schulz,
    optimizer_by_name,
    root_of_squares,
    split_parameters,
    to_rms,
    unit,
)

SHAPES = [(6, 4), (3, 8), (4, 6), (5, 5)]
MATRICES = [DeltaMomentum, DeepMomentum, Muon, M3]
ALL = [GradientDescent, Momentum, PreconditionedMomentum, AdamMemory, AdaGradMemory, *MATRICES]

pytestmark = pytest.mark.usefixtures("float64")


def weights(seed=0, shapes=SHAPES, dtype=torch.float64):
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def gradients(steps, seed=1, shapes=SHAPES, dtype=torch.float64, scale=1.0):
    torch.manual_seed(seed)
    return [[scale * torch.randn(shape, dtype=dtype) for shape in shapes] for _ in range(steps)]


def step_with(optimizer, params, grads):
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    optimizer.step()


def run(make, steps=12, rates=None, **options):
    """Weights after steps along given gradients; rates: the learning rate of each step."""
    params = weights(dtype=options.get("dtype", torch.float64))
    optimizer = make(params)
    for t, grads in enumerate(gradients(steps, **options)):
        for group in optimizer.param_groups if rates else []:
            group["lr"] = rates[t]
        step_with(optimizer, params, grads)
    return [p.detach() for p in params]


def difference(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def assert_equal(model, other):
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


# --------------------------------------------------------------------------------------------------
# Equal to torch's own

TORCHS = {
    "gradient descent": (
        lambda w: GradientDescent(w, lr=0.1),
        lambda w: torch.optim.SGD(w, lr=0.1),
    ),
    "momentum": (
        lambda w: Momentum(w, lr=0.1, momentum=0.8),
        lambda w: torch.optim.SGD(w, lr=0.1, momentum=0.8),
    ),
    "Adam": (
        lambda w: AdamMemory(w, lr=0.1, betas=(0.8, 0.95)),
        lambda w: torch.optim.Adam(w, lr=0.1, betas=(0.8, 0.95)),
    ),
    "AdamW": (
        lambda w: AdamMemory(w, lr=0.1, weight_decay=0.3),
        lambda w: torch.optim.AdamW(w, lr=0.1, weight_decay=0.3),
    ),
    "AdaGrad": (
        lambda w: AdaGradMemory(w, lr=0.1),
        lambda w: torch.optim.Adagrad(w, lr=0.1),
    ),
    "Adam without momentum": (
        lambda w: PreconditionedMomentum(w, 0.1, momentum=0, beta=0.9),
        lambda w: torch.optim.Adam(w, 0.1, betas=(0.0, 0.9)),
    ),
}


@pytest.mark.parametrize("name", TORCHS)
def test_element_wise_memories_equal_torch(name):
    ours, theirs = TORCHS[name]
    for rates in (None, [0.1, 0.05, 0.01] * 4):
        assert difference(run(ours, rates=rates), run(theirs, rates=rates)) < 1e-12


def test_adagrad_that_forgets_is_rmsprop():
    ours = run(lambda w: AdaGradMemory(w, lr=0.1, retention=0.9, eps=0))
    theirs = run(lambda w: torch.optim.RMSprop(w, lr=0.1 * 0.1**0.5, alpha=0.9, eps=0))
    assert difference(ours, theirs) < 1e-12


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_torchs_within_its_bfloat16(nesterov):
    settings = dict(lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.2)

    def theirs(w):
        return torch.optim.Muon(w, adjust_lr_fn="match_rms_adamw", **settings)

    start = weights(dtype=torch.float32)
    ours = run(lambda w: Muon(w, **settings), dtype=torch.float32)
    expected = run(theirs, dtype=torch.float32)
    # bfloat16 has 8 bits: 0.4% a number, five rounds of products
    for a, b, w in zip(ours, expected, start, strict=True):
        assert (a - b).norm() < 0.02 * (a - w.detach()).norm()


# --------------------------------------------------------------------------------------------------
# Equal to their definitions: Newton-Schulz and Muon


def singular_values_by_polynomial(G, steps=5):
    """Newton-Schulz on the singular values alone: what it must do to the matrix."""
    U, s, V = torch.linalg.svd(G, full_matrices=False)
    s = s / G.norm()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return U @ torch.diag(s) @ V


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_its_definition(nesterov):
    """NL eq. 42-44, 52."""
    expected = [p.detach() for p in weights()]
    means = [torch.zeros_like(W) for W in expected]
    for grads in gradients(12):
        for i, g in enumerate(grads):
            means[i] = 0.9 * means[i] + 0.1 * g
            O = singular_values_by_polynomial(0.9 * means[i] + 0.1 * g if nesterov else means[i])
            W = expected[i]
            expected[i] = (1 - 0.1 * 0.2) * W - 0.1 * 0.2 * max(W.shape) ** 0.5 * O
    settings = dict(lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.2)
    assert difference(run(lambda w: Muon(w, **settings)), expected) < 1e-10


def test_newton_schulz_is_the_polynomial_of_the_singular_values():
    for shape in [(4, 4), (3, 7), (7, 3), (2, 5, 3), (1, 6)]:
        G = torch.randn(shape)
        matrices = G.reshape(-1, *shape[-2:])
        expected = torch.stack([singular_values_by_polynomial(g) for g in matrices]).reshape(shape)
        assert (newton_schulz(G) - expected).abs().max() < 1e-12
        assert (newton_schulz(1e-30 * G) - expected).abs().max() < 1e-12
    assert not newton_schulz(torch.zeros(3, 4)).any()


def test_cubic_newton_schulz_is_gradient_descent_towards_orthogonality():
    """NL eq. 43-44 without the pull to g: steps of 1/8 on |O^T O - I|^2, which end at U V^T."""
    cubic = (1.5, -0.5, 0.0)
    G = torch.randn(5, 3)
    O = (G / G.norm()).requires_grad_()
    (slope,) = torch.autograd.grad((O.mT @ O - torch.eye(3)).square().sum(), O)
    assert (newton_schulz(G, 1, cubic) - (O - slope / 8)).abs().max() < 1e-12
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    assert (newton_schulz(G, 40, cubic) - U @ V).abs().max() < 1e-10


def test_the_usual_newton_schulz_ends_near_orthogonal():
    s = torch.linalg.svdvals(newton_schulz(torch.randn(20, 64, 96, dtype=torch.float32)))
    assert 0.5 < s.min() and s.max() < 1.3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_newton_schulz_in_bfloat16_on_a_gpu_is_near_the_exact_polynomial():
    G = torch.randn(3, 64, 96)
    expected = torch.stack([singular_values_by_polynomial(g) for g in G])
    got = newton_schulz(G.float().cuda()).double().cpu()
    assert (got - expected).norm() < 0.02 * expected.norm()


# --------------------------------------------------------------------------------------------------
# Equal to their definitions: momentum and its kin


def test_momentum_is_gradient_descent_on_its_objective_as_printed():
    """NL eq. 33-34: W <- W + m, m <- alpha m - eta slope, with the slope of <m g^T, I>."""
    W = [p.detach() for p in weights()]
    m = [torch.zeros_like(w) for w in W]
    for grads in gradients(12):
        for i, g in enumerate(grads):
            old = m[i].clone().requires_grad_()
            (slope,) = torch.autograd.grad((old @ g.mT).diagonal().sum(), old)
            m[i] = 0.8 * m[i] - 0.1 * slope
            W[i] = W[i] + m[i]
    assert difference(run(lambda w: Momentum(w, lr=0.1, momentum=0.8)), W) < 1e-12


def delta_momentum_by_autograd(m, g, momentum, step):
    """NL eq. 48-49: retention, minus `step` times the gradient of |m g^T|^2 / 2, plus g."""
    old = m.clone().requires_grad_()
    (slope,) = torch.autograd.grad((old @ g.mT).square().sum() / 2, old)
    return momentum * m - step * slope + g


def test_delta_momentum_is_gradient_descent_on_its_objective():
    W = [p.detach() for p in weights()]
    m = [torch.zeros_like(w) for w in W]
    for grads in gradients(12):
        for i, g in enumerate(grads):
            m[i] = delta_momentum_by_autograd(m[i], g, 0.8, 0.5 / g.square().sum())
            W[i] = W[i] - 0.1 * m[i]
    assert difference(run(lambda w: DeltaMomentum(w, lr=0.1, momentum=0.8, delta=0.5)), W) < 1e-10


@pytest.mark.parametrize("rows", [1, 4])
def test_delta_momentum_is_a_write_of_memory_py(rows):
    """Its step is memory.write, all rows of g at once; for a g of one row, the recurrence."""
    M, g = torch.randn(2, rows, 6)
    c = 0.5 / g.square().sum()
    alpha = torch.tensor([0.8] + [1.0] * (rows - 1))  # retention acts once
    target = torch.eye(rows) / c
    eta = c.expand(rows)
    w = nn.Parameter(torch.zeros_like(M))
    optimizer = DeltaMomentum([w], momentum=0.8, delta=0.5)
    optimizer.state[w]["M"] = M.clone()
    step_with(optimizer, [w], [g])
    _, (expected,), _ = write([M], g, target, eta, alpha, delta=0.0, residual=False)
    assert (optimizer.state[w]["M"] - expected).abs().max() < 1e-12
    assert (memorize([M], g, target, 0.8, c, "l2")[0] - expected).abs().max() < 1e-12
    if rows == 1:
        assert (scan(M, g, target, eta, alpha)[1] - expected).abs().max() < 1e-12


def test_literal_delta_momentum_diverges_and_the_bounded_one_does_not():
    g = torch.full((1, 2), 2.0)  # |g|^2 = 8 > 1 + momentum
    literal = torch.zeros_like(g)
    bounded = torch.zeros_like(g)
    for _ in range(50):
        literal = delta_momentum_by_autograd(literal, g, 0.9, 1.0)
        bounded = delta_momentum_by_autograd(bounded, g, 0.9, 0.5 / g.square().sum())
    assert literal.norm() > 1e20
    assert torch.allclose(bounded, g / (1 - 0.9 + 0.5))


def test_delta_momentum_without_delta_is_momentum():
    assert difference(run(lambda w: DeltaMomentum(w, delta=0)), run(Momentum)) < 1e-12


def test_deep_momentum_with_a_linear_memory_read_as_itself_is_momentum():
    linear = dict(depth=1, objective="dot", features="linear", eta=1.0)
    deep = run(lambda w: DeepMomentum(w, momentum=0.8, **linear))
    assert difference(deep, run(lambda w: Momentum(w, momentum=0.8))) < 1e-12


@pytest.mark.parametrize("objective", ["dot", "l2"])
def test_deep_momentum_learns_by_gradient_descent_and_is_read_as_its_jacobian(objective):
    """NL eq. 50: m(u) = (I + B) silu(A u) on the rows of u = g / |g|, with values I.

    The update is |g| dm/du, the mean over rows of u.
    """
    w = nn.Parameter(torch.zeros(3, 5))
    optimizer = DeepMomentum([w], lr=1.0, momentum=0.8, eta=0.3, objective=objective)
    A = torch.zeros(3, 5)
    B = torch.zeros(3, 3)
    identity = torch.eye(3)

    def m(row):
        return (identity + B) @ F.silu(A @ row)

    for _ in range(6):
        g = torch.randn(3, 5)
        u = g / g.norm()
        A.requires_grad_()
        B.requires_grad_()
        y = F.silu(u @ A.mT) @ (identity + B).mT
        error = (y - identity).square().sum() / 2
        loss = -(y * identity).sum() if objective == "dot" else error
        dA, dB = torch.autograd.grad(loss, (A, B))
        A = 0.8 * A.detach() - 0.3 * dA
        B = 0.8 * B.detach() - 0.3 * dB
        jacobian = torch.stack([torch.autograd.functional.jacobian(m, row) for row in u]).mean(0)
        before = w.detach().clone()
        step_with(optimizer, [w], [g])
        assert (before - w - g.norm() * jacobian).abs().max() < 1e-12


@pytest.mark.parametrize("objective", ["dot", "l2"])
@pytest.mark.parametrize("rank", [1, 16])
def test_deep_momentum_stays_bounded(rank, objective):
    w = nn.Parameter(torch.zeros(16, 24))
    optimizer = DeepMomentum([w], objective=objective)
    norms = []
    g = torch.randn(16, rank) @ torch.randn(rank, 24)
    for _ in range(300):  # the same gradient again and again: nothing adds up more
        step_with(optimizer, [w], [1e3 * g])
        norms.append(sum(M.norm().item() for M in optimizer.state[w].values()))
    assert norms[-1] < 3 and norms[-1] == pytest.approx(norms[-50], rel=1e-3)


def test_tall_gradients_are_transposed_in_deep_momentum():
    tall = nn.Parameter(torch.zeros(5, 3))
    wide = nn.Parameter(torch.zeros(3, 5))
    of_tall = DeepMomentum([tall])
    of_wide = DeepMomentum([wide])
    for (g,) in gradients(5, shapes=[(5, 3)]):
        step_with(of_tall, [tall], [g])
        step_with(of_wide, [wide], [g.mT.contiguous()])
    assert difference([tall.detach()], [wide.detach().mT]) < 1e-12


@pytest.mark.parametrize("features", ["unit", "sign"])
def test_features_of_unit_length_keep_a_deep_momentum_bounded(features):
    w = nn.Parameter(torch.zeros(16, 24))
    optimizer = DeepMomentum([w], features=features)
    for _ in range(300):
        step_with(optimizer, [w], [torch.ones(16, 24)])
    assert max(M.abs().max() for M in optimizer.state[w].values()) < 3


@pytest.mark.parametrize("network", [{}, {"depth": 1, "objective": "l2"}])
def test_linear_features_are_refused_where_nothing_bounds_the_memory(network):
    with pytest.raises(ValueError, match="features must be .* at depth .*, got 'linear'"):
        DeepMomentum([nn.Parameter(torch.zeros(3, 4))], features="linear", **network)


def test_sign_features_compress_only_signs():
    big, small = (run(lambda w: DeepMomentum(w, features="sign"), scale=s) for s in (1.0, 1e-6))
    assert difference(big, small) < 1e-12


def test_the_preconditioner_learns_by_gradient_descent():
    """NL eq. 38-39: H steps 1 - beta along the gradient of |H - g^2|^2 / 2."""
    w = nn.Parameter(torch.zeros(4))
    optimizer = PreconditionedMomentum([w], beta=0.9)
    H = torch.zeros(4)
    for _ in range(5):
        g = torch.randn(4)
        step_with(optimizer, [w], [g])
        H.requires_grad_()
        (slope,) = torch.autograd.grad((H - g**2).square().sum() / 2, H)
        H = H.detach() - 0.1 * slope
    assert (optimizer.state[w]["R"].square() - H).abs().max() < 1e-12


def test_adam_s_memory_is_the_least_squares_map_from_gradients_to_their_root_mean_square():
    """NL eq. 100-105 with equal betas: m = argmin sum_i beta^age (m g_i - P)^2, by lstsq."""
    beta = 0.8
    g = torch.randn(9)
    w = nn.Parameter(torch.zeros(1))
    optimizer = AdamMemory([w], lr=1.0, betas=(beta, beta), eps=0)
    for x in g:
        before = w.detach().clone()
        step_with(optimizer, [w], [x.reshape(1)])
    weight = beta ** torch.arange(8.0, -1, -1)
    P = ((weight * g**2).sum() / weight.sum()).sqrt()
    m = torch.linalg.lstsq((weight.sqrt() * g)[:, None], (weight.sqrt() * P)[:, None]).solution
    assert (before - w - m.flatten()).abs().max() < 1e-12


# --------------------------------------------------------------------------------------------------
# M3


def test_m3_with_no_slow_memory_and_no_second_moment_is_muon():
    m3 = dict(betas=(0.9, 0.9, 0.9), alpha=0, second_moment=False)
    assert difference(run(lambda w: M3(w, **m3)), run(lambda w: Muon(w, momentum=0.9))) < 1e-12
    settings = dict(nesterov=False, weight_decay=0.2)
    expected = run(lambda w: Muon(w, momentum=0.9, **settings))
    assert difference(run(lambda w: M3(w, **m3, **settings)), expected) < 1e-12


def test_m3_is_its_definition():
    """Algorithm 1 in its form that forgets, without nesterov."""
    settings = dict(lr=0.1, betas=(0.9, 0.8, 0.7), alpha=0.5, frequency=3, nesterov=False, eps=0)
    ours = run(lambda w: M3(w, **settings))
    of_weights = zip(*gradients(12), strict=True)
    for p, grads, got in zip(weights(), of_weights, ours, strict=True):
        W = p.detach()
        M1, M2, V, O2 = torch.zeros(4, *W.shape)
        for t, g in enumerate(grads, 1):
            M1 = 0.9 * M1 + 0.1 * g
            if t % 3 == 0:
                M2 = 0.7 * M2 + 0.3 * sum(grads[t - 3 : t]) / 3
                O2 = singular_values_by_polynomial(M2)
            O = singular_values_by_polynomial(M1) + 0.5 * O2
            V = 0.8 * V + 0.2 * O**2
            U = O / (V / (1 - 0.8**t)).sqrt()
            W = W - 0.1 * 0.2 * U / U.square().mean().sqrt()
        assert (got - W).abs().max() < 1e-9


@pytest.mark.parametrize("make", [Muon, M3, lambda w: M3(w, second_moment=False)])
def test_the_step_of_orthogonal_memories_does_not_depend_on_the_gradients_scale(make):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        plain, tiny = (run(make, 25, scale=s, dtype=dtype) for s in (1.0, 1e-4))
        start = [p.detach() for p in weights(dtype=dtype)]
        assert difference(plain, tiny) < tolerance < 1e-3 < difference(plain, start)


def rms_of_printed_step(scale):
    (p,) = weights(shapes=[(16, 16)])
    optimizer = M3([p], lr=1.0, printed=True)
    for grads in gradients(3, shapes=[(16, 16)], scale=scale):
        before = p.detach().clone()
        step_with(optimizer, [p], grads)
    return (p.detach() - before).square().mean().sqrt().item()


def test_m3_as_printed_explodes_as_gradients_shrink():
    assert rms_of_printed_step(1e-4) == pytest.approx(1e4 * rms_of_printed_step(1.0), rel=1e-3)
    assert rms_of_printed_step(1e-4) > 1000


def test_m3_as_printed_is_algorithm_1():
    (p,) = weights(shapes=[(4, 6)])
    grads = [g for (g,) in gradients(10, shapes=[(4, 6)])]
    settings = dict(lr=0.1, betas=(0.9, 0.8, 0.7), alpha=0.5, frequency=4, eps=1e-3)
    optimizer = M3([p], printed=True, **settings)
    W = p.detach().clone()
    M1, M2, V, O2 = torch.zeros(4, 4, 6)
    for t, g in enumerate(grads, 1):
        step_with(optimizer, [p], [g])
        if t > 1 and (t - 1) % 4 == 0:  # before the steps kf + 1 .. (k + 1) f: of (k - 1) f .. kf
            M2 = M2 + 0.7 * sum(grads[max(0, t - 6) : t - 1])
            O2 = singular_values_by_polynomial(M2)
        M1 = M1 + 0.9 * g
        V = V + 0.8 * g**2
        W = W - 0.1 * (singular_values_by_polynomial(M1) + 0.5 * O2) / (V.sqrt() + 1e-3)
    assert (p - W).abs().max() < 1e-10


def test_a_larger_model_s_matrices_share_one_stack_without_changing_anything():
    """Equal shapes, also transposed, are orthogonalised at once: each matrix as if alone."""
    shapes = [(4, 6), (6, 4), (4, 6), (5, 5)]
    together = weights(shapes=shapes)
    alone = weights(shapes=shapes)
    of_all = M3(together)
    of_each = CombinedOptimizer(*(M3([w]) for w in alone))
    for grads in gradients(11, shapes=shapes):
        step_with(of_all, together, grads)
        step_with(of_each, alone, grads)
    assert difference([w.detach() for w in together], [w.detach() for w in alone]) < 1e-12


# --------------------------------------------------------------------------------------------------
# The scale of gradients


def newton_schulz_read(make, **options):
    return lambda w, **lr: make(w, output="newton_schulz", **options, **lr)


# scale-free optimizers, and those whose update has the gradient's scale
FREE = {
    "Muon": Muon,
    "M3": M3,
    "M3 without second moment": partial(M3, second_moment=False, eps=0.0),
    "momentum": newton_schulz_read(Momentum),
    "preconditioned": newton_schulz_read(PreconditionedMomentum, eps=0.0),
    "delta momentum": newton_schulz_read(DeltaMomentum),
    "deep momentum": newton_schulz_read(DeepMomentum),
    "Adam": partial(AdamMemory, eps=0.0),
    "AdaGrad": partial(AdaGradMemory, eps=0.0),
    "preconditioned, linear": partial(PreconditionedMomentum, eps=0.0),
}
SCALED = {
    "descent": GradientDescent,
    "momentum, linear": Momentum,
    "delta momentum, linear": DeltaMomentum,
    "deep momentum, linear": DeepMomentum,
}
SCALES = [1.0, 1e-38, 1e-30, 1e-23, 1e-15, 1e15, 1e19, 1e30, 1e38]


def moved(name, scales, plan, **rates):
    """Weights that were 0 before the gradients of `plan`, for each scale of these: [scales, 4, 6].

    rates: those of them that the optimizer has.
    """
    params = [nn.Parameter(torch.zeros(4, 6, dtype=torch.float32)) for _ in scales]
    groups = []
    for p, scale in zip(params, scales, strict=True):
        lr = 1e-3 / scale if name in SCALED else 1e-3
        groups.append({"params": [p], "lr": lr})
    optimizer = (FREE | SCALED)[name](groups)
    for group in optimizer.param_groups:
        group.update({key: rates[key] for key in rates.keys() & group.keys()})
    for g in plan:
        step_with(optimizer, params, [(g * scale).float() for scale in scales])
    return torch.stack([p.detach() for p in params])


def assert_alike(expected, *others):
    assert expected.isfinite().all()
    for got in others:  # at 1e-38 entries of a gradient have few digits
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-2 * expected.abs().max().item())


def ordinary(n):
    torch.manual_seed(3)
    g = torch.randn(n, 4, 6)
    return list(g / g.abs().max())


@pytest.mark.parametrize("name", [*FREE, *SCALED])
def test_no_optimizer_depends_on_the_scale_of_gradients(name):
    assert_alike(*moved(name, SCALES, ordinary(12)))


FAST = {"momentum": 0.5, "frequency": 2}  # 300 steps are as long as 2,000 of the usual 0.9


LONG = [pytest.param(name, 2000, {}, marks=pytest.mark.slow) for name in ("M3", "delta momentum")]


@pytest.mark.parametrize(
    "name, steps, rates", [*((name, 300, FAST) for name in [*FREE, *SCALED]), *LONG]
)
def test_zeros_after_one_gradient_are_the_same_at_every_scale(name, steps, rates):
    first, last = ordinary(2)
    if name.startswith("M3"):
        rates = rates and rates | {"betas": (0.5, 0.95, 0.5)}
    plan = [first, *[torch.zeros(4, 6)] * steps, last]
    # numbers below float32's least normal one do not decay: Adam's M, at eps 0 divided by its root
    least = 1e-35 if name == "Adam" else 1e-38
    assert_alike(*moved(name, [1.0, least, 1e38], plan, **rates))


def test_squares_that_an_earlier_version_summed_are_taken_over():
    state = {"H": torch.full((2, 2), 4.0)}
    assert torch.equal(root_of_squares(state, torch.zeros(2, 2), 1.0, 1.0), torch.full((2, 2), 2.0))
    assert state.keys() == {"R"}


def test_a_memory_of_orthogonal_reads_keeps_its_direction_through_zeros():
    """Muon's steps along one gradient are equal, though M is 1e-60 of it at the end."""
    (w,) = weights(shapes=[(4, 6)], dtype=torch.float32)
    optimizer = Muon([w], lr=1e-3, momentum=0.5)
    (g,) = ordinary(1)
    steps = []
    for t in range(200):
        before = w.detach().clone()
        step_with(optimizer, [w], [g.float() if t == 0 else torch.zeros_like(w)])
        steps.append(w.detach() - before)
    torch.testing.assert_close(steps[-1], steps[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [*FREE, *SCALED])
def test_weights_without_any_gradient_stay(name):
    assert not moved(name, [1.0], [torch.zeros(4, 6)] * 12).any()


@pytest.mark.parametrize("scale", SCALES)
def test_newton_schulz_and_unit_lengths_do_not_depend_on_scale(scale):
    (g,) = ordinary(1)
    G = (g * scale).float()
    for f in (newton_schulz, unit, partial(to_rms, rms=0.2)):
        torch.testing.assert_close(f(G), f(g.float()), rtol=1e-4, atol=1e-5)
        assert not f(torch.zeros_like(G)).any()


def test_a_tiny_gradient_after_an_ordinary_one_leaves_delta_momentum_s_weights_in_place():
    (w,) = weights(shapes=[(4, 6)], dtype=torch.float32)
    optimizer = DeltaMomentum([w])
    first, then = ordinary(2)
    start = w.detach().clone()
    for g in (first, 1e-23 * then):
        step_with(optimizer, [w], [g.float()])
    assert (w - start).abs().max() < 0.1


# --------------------------------------------------------------------------------------------------
# DGD


@pytest.mark.parametrize("length", [0.1, 1.0, 7.0])
def test_dgd_is_the_minimiser_of_its_problem(length):
    """NL eq. 56 for one token of any length, by Newton's method on the printed objective."""
    lr = 0.4
    layer = nn.Linear(5, 3, bias=False)
    optimizer = DGD(layer, lr=lr)
    start = layer.weight.detach().clone()
    x = F.normalize(torch.randn(1, 5), dim=1) * length
    y = layer(x)
    gradient = 3 * y.detach() ** 2
    (y**3).sum().backward()

    def objective(W):
        return (W @ x[0] + gradient[0]).square().sum() / 2 + (W - start).square().sum() / (2 * lr)

    slope = torch.func.grad(objective)(start)
    curvature = torch.func.hessian(objective)(start).reshape(15, 15)
    step = torch.linalg.solve(curvature, slope.flatten()).reshape(3, 5)
    W = start - step  # the objective is quadratic: one step is exact
    assert torch.func.grad(objective)(W).abs().max() < 1e-10
    optimizer.step()
    assert (layer.weight - W).abs().max() < 1e-10


def test_dgd_follows_the_tokens_of_a_batch_one_by_one():
    """W <- W (I - eta' x x^T) - eta' dL/dy x^T over batch and time, with dL/dy at the old W."""
    lr = 0.3
    first = nn.Linear(4, 6)
    last = nn.Linear(6, 2, bias=False)
    model = nn.Sequential(first, nn.Tanh(), last)
    optimizer = DGD(model, lr=lr, weight_decay=0.1)
    inputs = torch.randn(2, 5, 4)
    h = first(inputs).detach().requires_grad_()
    y = last(torch.tanh(h)).detach().requires_grad_()
    y.square().sum().backward()
    (torch.tanh(h) @ last.weight.detach().mT * y.grad).sum().backward()
    optimizer.zero_grad()  # forgets the passes made so far

    def follow(W, keys, slopes):
        W = W.detach() * (1 - lr * 0.1)
        for x, slope in zip(keys.flatten(0, 1), slopes.flatten(0, 1), strict=True):
            eta = lr / (1 + lr * x @ x)
            W = W - eta * torch.outer(W @ x + slope, x)
        return W

    def with_bias():
        return torch.cat([first.weight, first.bias[:, None]], 1).detach()

    expected = [
        follow(with_bias(), torch.cat([inputs, torch.ones(2, 5, 1)], -1), h.grad),
        follow(last.weight, torch.tanh(h).detach(), y.grad),
    ]
    with torch.no_grad():
        model(100 * inputs)  # is not recorded
    for rows in inputs:  # two passes, one step
        model(rows[None]).square().sum().backward()
    optimizer.step()
    assert difference([with_bias(), last.weight.detach()], expected) < 1e-10
    before = last.weight.detach().clone()
    optimizer.step()  # nothing new was recorded
    assert torch.equal(last.weight, before)


@pytest.mark.parametrize("frozen", ["weight", "bias", "both"])
def test_dgd_moves_only_what_requires_a_gradient(frozen):
    """The rest takes the steps of its own problem, W x - u with what is frozen as a part of u."""
    lr = 0.3
    layer = nn.Linear(4, 3)
    model = nn.Sequential(nn.Linear(4, 4), layer, nn.Tanh())
    for name, p in layer.named_parameters():
        p.requires_grad_(frozen not in (name, "both"))
    optimizer = DGD(model, lr=lr)
    W, b = layer.weight.detach().clone(), layer.bias.detach().clone()
    x = torch.randn(5, 4)
    inputs = model[0](x).detach()
    first = model[0].weight.detach().clone()
    y = layer(inputs).detach().requires_grad_()
    torch.tanh(y).square().sum().backward()
    model(x).square().sum().backward()
    optimizer.step()
    for k, slope in zip(inputs, y.grad, strict=True):
        error = W @ k + b + slope
        if frozen == "weight":
            b = b - lr / (1 + lr) * error
        if frozen == "bias":
            W = W - lr / (1 + lr * k @ k) * torch.outer(error, k)
    assert difference([layer.weight.detach(), layer.bias.detach()], [W, b]) < 1e-10
    assert not torch.equal(model[0].weight, first)  # gradients pass through what is frozen


def test_dgd_recovers_gradient_descent_for_small_inputs():
    layer = nn.Linear(4, 3, bias=False)
    optimizer = DGD(layer, lr=0.1)
    before = layer.weight.detach().clone()
    x = 1e-5 * torch.randn(1, 4)
    (layer(x) @ torch.tensor([1e5, 2e5, -1e5])).sum().backward()
    optimizer.step()
    assert torch.allclose(layer.weight - before, -0.1 * layer.weight.grad, rtol=1e-4)


# --------------------------------------------------------------------------------------------------
# The statements of the paper


def test_the_last_7_gradients_hold_half_of_momentum_and_the_last_44_99_percent():
    """NL sec. 4.3 at beta = 0.9, counted (the paper says 6 and 43: 46.9% and 98.9%)."""
    p = nn.Parameter(torch.zeros(400))
    optimizer = Momentum([p], momentum=0.9)
    for axis in torch.eye(400):  # gradient i points along axis i: M holds the weight of each
        step_with(optimizer, [p], [axis])
    M = optimizer.state[p]["M"]
    held = (M.flip(0) / M.sum()).cumsum(0).tolist()
    assert held[6 - 1] == pytest.approx(0.4686, abs=1e-4)
    assert held[43 - 1] == pytest.approx(0.9892, abs=1e-4)
    assert min(n for n in range(1, 401) if held[n - 1] >= 0.5) == 7
    assert min(n for n in range(1, 401) if held[n - 1] >= 0.99) == 44


def test_momentum_forgets_the_first_of_two_orthogonal_tasks_and_the_slow_memory_does_not():
    """NL eq. 45: 50 gradients along u1, then 50 along u2. What fraction is left of the first?"""
    u1, u2 = torch.eye(4)[:2].unsqueeze(1)
    p = nn.Parameter(torch.zeros(1, 4))
    q = nn.Parameter(torch.zeros(1, 4))
    momentum = Momentum([p], momentum=0.9)
    m3 = M3([q], betas=(0.9, 0.95, 0.9), alpha=0.5, frequency=10)

    def learn(u):
        for _ in range(50):
            step_with(momentum, [p], [u])
            step_with(m3, [q], [u])
        return torch.stack([momentum.state[p]["M"][0, 0], m3.state[q]["M2"][0, 0]])

    held = learn(u1)
    left = (learn(u2) / held).tolist()
    assert left[0] == pytest.approx(0.9**50) and left[0] < 0.0052  # 0.5%
    assert left[1] == pytest.approx(0.9**5) and left[1] > 0.59  # 59%
    # and so it is in what moves the weights: half of the slow memory's reading is still along u1
    slow = m3.state[q]["O2"]
    fast = newton_schulz(m3.state[q]["M"])
    assert slow[0, 0] / slow.norm() > 0.5 and fast[0, 0] / fast.norm() < 0.0053


# --------------------------------------------------------------------------------------------------
# Whole models


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.linear = nn.Linear(4, 6)
        self.head = nn.Linear(6, 5, bias=False)
        self.conv = nn.Conv1d(4, 4, 3)
        self.short = nn.ModuleDict({"conv": nn.Linear(4, 3, bias=False)})
        self.start = nn.Parameter(torch.zeros(2, 4, 4))
        self.start2 = nn.Parameter(torch.zeros(4, 4))
        self.norm = nn.RMSNorm(4)


def test_matrices_are_what_maps_features_to_features():
    model = Model()
    names = {id(p): name for name, p in model.named_parameters()}
    matrices, decayed, plain = ([names[id(p)] for p in part] for part in split_parameters(model))
    assert matrices == ["linear.weight"]
    assert decayed == ["head.weight", "conv.weight", "short.conv.weight"]
    undecayed = ["linear.bias", "conv.bias", "norm.weight"]
    assert plain == ["start", "start2", "embedding.weight", *undecayed]


@pytest.mark.parametrize(
    "name", ["hope", "titans", "transformer", "gated_deltanet", "samba", "titans_mac"]
)
def test_every_parameter_of_a_model_has_one_optimizer(name):
    model = Hope(HopeConfig.preset("nano", model=name, d_model=32, n_layers=1, n_heads=2))
    undecayed = ("start", "embedding", "bias", "log_A", "persistent")
    for kind in OPTIMIZERS:
        decay = []
        for group in optimizer_by_name(model, kind).param_groups:
            decay += [(id(p), group["weight_decay"]) for p in group["params"]]
        expected = []
        for parameter, p in model.named_parameters():
            plain = p.ndim < 2 or any(part in parameter for part in undecayed)
            expected.append((id(p), 0 if plain else 0.1))
        assert sorted(decay) == sorted(expected)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_saved_optimizer_goes_on_as_if_never_stopped(kind):
    def model_and_optimizer():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
        return model, optimizer_by_name(model, kind)

    def steps(model, optimizer, numbers):
        for t in numbers:
            optimizer.zero_grad()
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(t))
            model(x).square().sum().backward()
            optimizer.step()

    model, optimizer = model_and_optimizer()
    steps(model, optimizer, range(25))
    saved = model_and_optimizer()
    steps(*saved, range(13))  # in the middle of M3's slow period
    file = io.BytesIO()
    torch.save([part.state_dict() for part in saved], file)
    file.seek(0)
    again = model_and_optimizer()
    for part, state in zip(again, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    steps(*again, range(13, 25))
    assert_equal(model, again[0])


@pytest.mark.parametrize("kind", OPTIMIZERS[1:])
def test_non_linear_reads_have_one_scale(kind):
    """One lr serves them all: the update's root mean square is 0.2 lr, as AdamW's usually is."""
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(48, 64, dtype=torch.float32))
    optimizer = optimizer_by_name(model, kind, lr=1.0, weight_decay=0.0)
    for grads in gradients(20, shapes=[(48, 64)], dtype=torch.float32):
        before = model.w.detach().clone()
        step_with(optimizer, [model.w], grads)
    assert (model.w.detach() - before).square().mean().sqrt() == pytest.approx(0.2, rel=0.2)


def test_parameter_groups_have_their_own_rates():
    a, b = weights(shapes=[(3, 4), (3, 4)])
    before = [a.detach().clone(), b.detach().clone()]
    optimizer = Muon([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.3}])
    g = torch.randn(3, 4)
    step_with(optimizer, [a, b], [g, g])
    assert torch.allclose(3 * (a - before[0]), b - before[1])
    assert optimizer.step(lambda: 5) == 5


# --------------------------------------------------------------------------------------------------
# The step clock

STEP_LEVELS = {"fast": 1, "slow": 3, "still": None, "": 2}


def combined(params):
    params = list(params)
    sgd = torch.optim.SGD(params[::2], lr=0.1, momentum=0.9)
    return CombinedOptimizer(sgd, torch.optim.AdamW(params[1::2], lr=0.01))


UNDER_THE_CLOCK = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
    "combined": combined,
}


def network():
    return nn.ModuleDict({name: nn.Linear(3, 3) for name in ("fast", "slow", "still", "rest")})


def clocked(net, kind="sgd", levels=STEP_LEVELS):
    return LevelOptimizer(UNDER_THE_CLOCK[kind](net.parameters()), net, levels)


def random_steps(net, n):
    """Gradients of n training steps, in the order of the parameters."""
    return gradients(n, shapes=[p.shape for p in net.parameters()])


def take(optimizer, net, grads):
    for step in grads:
        step_with(optimizer, list(net.parameters()), step)


@pytest.mark.parametrize("kind", UNDER_THE_CLOCK)
def test_each_level_steps_along_the_sum_of_its_period_as_if_it_were_alone(kind):
    net = network()
    alone = copy.deepcopy(net)
    grads = random_steps(net, 7)
    take(clocked(net, kind), net, grads)
    for i, part in enumerate(net):
        chunk = {"fast": 1, "slow": 3, "rest": 2}.get(part)
        own = UNDER_THE_CLOCK[kind](alone[part].parameters())
        for end in range(chunk, 8, chunk) if chunk else ():
            period = [step[2 * i : 2 * i + 2] for step in grads[end - chunk : end]]
            sums = [sum(of_one) for of_one in zip(*period, strict=True)]
            take(own, alone[part], [sums])
    for a, b in zip(net.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_level_moves_at_multiples_of_its_chunk_and_at_no_other_step():
    net = network()
    optimizer = clocked(net, "adamw")
    for tick, step in enumerate(random_steps(net, 12), 1):
        before = copy.deepcopy(net)
        take(optimizer, net, [step])
        moved = [name for name in net if not torch.equal(net[name].weight, before[name].weight)]
        slow = ["slow"] * (tick % 3 == 0)
        assert moved == ["fast", *slow] + ["rest"] * (tick % 2 == 0)
        assert optimizer.due(tick) == ["fast", *slow] + [""] * (tick % 2 == 0)


def test_the_step_clock_keeps_no_gradient_that_the_next_backward_overwrites():
    """DDP with gradient_as_bucket_view writes all gradients into the same memory."""
    net = network()
    plain = copy.deepcopy(net)
    grads = random_steps(net, 9)
    take(clocked(plain), plain, grads)
    optimizer = clocked(net)
    buckets = [torch.empty_like(p) for p in net.parameters()]
    for step in grads:
        for p, bucket, g in zip(net.parameters(), buckets, step, strict=True):
            p.grad = bucket.copy_(g)
        optimizer.step()
    assert_equal(net, plain)


@pytest.mark.parametrize("kind", ["sgd", "adamw", "combined", "combined alone"])
def test_optimizers_of_optimizers_are_torch_s(kind):
    """A scheduler, a closure, a GradScaler, hooks, copies: as the optimizer inside by itself."""

    def build(net, wrap):
        inside = UNDER_THE_CLOCK[kind.split()[0]](list(net.parameters()))
        if wrap and kind != "combined alone":
            return LevelOptimizer(inside, net, {"": 1})
        parts = inside.optimizers if isinstance(inside, CombinedOptimizer) else (inside,)
        return inside if wrap else parts

    net = network()
    alone = copy.deepcopy(net)
    optimizer = build(net, True)
    assert isinstance(optimizer, torch.optim.Optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    others = build(alone, False)
    plain = [torch.optim.lr_scheduler.LambdaLR(other, lambda t: 0.5**t) for other in others]
    called = []
    optimizer.register_step_post_hook(lambda *_: called.append(1))

    def loss(net, t):
        x = torch.full((2, 3), 0.3 * (t + 1))
        return sum(part(x).square().sum() for part in net.values())

    for t in range(3):
        scaler.scale(loss(net, t)).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        loss(alone, t).backward()
        for other, schedule in zip(others, plain, strict=True):
            other.step()
            other.zero_grad()
            schedule.step()
        optimizer.zero_grad()
    assert difference(list(net.parameters()), list(alone.parameters())) < 1e-12
    assert called == [1, 1, 1]
    first = next(net.parameters())
    assert optimizer.state[first].keys() == others[0].state[next(alone.parameters())].keys()

    def closure():
        optimizer.zero_grad()
        value = loss(net, 3)
        value.backward()
        return value

    expected = loss(net, 3)
    assert optimizer.step(closure) == expected != loss(net, 3)
    twin, copied = copy.deepcopy((net, optimizer))
    for which, own in ((net, optimizer), (twin, copied)):
        own.zero_grad()
        loss(which, 1).backward()
        own.step()
    assert_equal(net, twin)


def test_a_group_that_is_added_to_the_step_clock_has_a_level():
    net = network()
    optimizer = LevelOptimizer(torch.optim.SGD(net["fast"].parameters(), lr=0.1), net, {"": 2})
    optimizer.add_param_group({"params": net["slow"].parameters(), "lr": 0.5})
    with pytest.raises(ValueError, match=r"shape \(3, 3\) is in a parameter group already"):
        optimizer.add_param_group({"params": net["slow"].weight})
    with pytest.raises(ValueError, match=r"shape \[4\], not the model's"):
        optimizer.add_param_group({"params": nn.Parameter(torch.zeros(4))})
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]
    before = net["slow"].weight.detach().clone()
    for _ in range(2):
        net["slow"](torch.ones(1, 3)).sum().backward()
        assert torch.equal(net["slow"].weight, before)
        optimizer.step()
    torch.testing.assert_close(before - net["slow"].weight, torch.full((3, 3), 1.0))


@pytest.mark.parametrize("kind", UNDER_THE_CLOCK)
def test_the_step_clock_resumes_in_the_middle_of_a_period(kind, tmp_path):
    net = network()
    other = copy.deepcopy(net)
    grads = random_steps(net, 9)
    take(clocked(net, kind), net, grads)
    first = clocked(other, kind)
    take(first, other, grads[:4])
    torch.save([first.state_dict(), other.state_dict()], tmp_path / "x.pt")
    take(first, other, grads[4:6])  # what was saved is a copy
    state, of_net = torch.load(tmp_path / "x.pt", weights_only=True)
    again = network()
    again.load_state_dict(of_net)
    second = clocked(again, kind)
    second.load_state_dict(state)
    take(second, again, grads[4:])
    assert_equal(net, again)
    with pytest.raises(ValueError, match="must be of levels {'': 1}, got {'fast': 1"):
        clocked(again, kind, {"": 1}).load_state_dict(state)


def test_bad_levels_of_the_step_clock_are_named():
    net = network()
    bad = {
        r"chunk of level 'fast' must be at least 1.*got 0": {"fast": 0, "": 1},
        r"'slow.weight' has no level.*\['fast'\]": {"fast": 1},
        r"'fats' has no parameter.*fast.weight": {"fats": 1, "": 1},
    }
    for message, levels in bad.items():
        with pytest.raises(ValueError, match=message):
            clocked(net, levels=levels)
    foreign = nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match=r"shape \[4\], not the model"):
        LevelOptimizer(torch.optim.SGD([*net.parameters(), foreign], lr=0.1), net, {"": 1})


# --------------------------------------------------------------------------------------------------
# Bad input raises before any state changes

WITH_MOMENTUM = [Momentum, PreconditionedMomentum, DeltaMomentum, DeepMomentum, Muon]
BAD = {
    "lr": (ALL, [0, -1.0, math.nan, math.inf, "fast"]),
    "weight_decay": (ALL, [-0.1, math.nan, math.inf]),
    "momentum": (WITH_MOMENTUM, [1, -0.1, None]),
    "betas": ([AdamMemory, M3], [(0.9, 1.0, 0.9), (-0.1, 0.9), (0.9,), 0.9]),
    "beta": ([PreconditionedMomentum], [1.0]),
    "eps": ([AdamMemory, AdaGradMemory, M3], [-1e-8]),
    "delta": ([DeltaMomentum], [-0.1, 1.1]),
    "eta": ([DeepMomentum], [0]),
    "depth": ([DeepMomentum], [0, 3, 1.5]),
    "objective": ([DeepMomentum], ["l3"]),
    "features": ([DeepMomentum], ["cubic"]),
    "output": ([Momentum, DeltaMomentum], ["softmax"]),
    "retention": ([AdaGradMemory], [0, 1.1]),
    "alpha": ([M3], [-1]),
    "frequency": ([M3], [0, -3, 2.5]),
    "steps": ([Muon, M3], [0]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_hyper_parameters_are_refused(name):
    def matrix():
        return [nn.Parameter(torch.zeros(3, 4))]

    for make in BAD[name][0]:
        optimizer = make(matrix())
        for value in BAD[name][1]:
            with pytest.raises(ValueError, match=f"^{name} must be .*, got ") as error:
                make(matrix(), **{name: value})
            assert str(error.value).endswith(f"got {value!r}")
            with pytest.raises(ValueError, match=f"^{name} must be "):  # a group's own value too
                optimizer.add_param_group({"params": matrix(), name: value})
        assert len(optimizer.param_groups) == 1


def test_unknown_hyper_parameters_are_refused():
    for make in ALL[1:]:  # GradientDescent's constructor takes those of all others
        with pytest.raises(TypeError, match="unexpected keyword argument 'momentun'"):
            make([nn.Parameter(torch.zeros(3, 4))], momentun=0.5)


@pytest.mark.parametrize("make", [*MATRICES, lambda w: Momentum(w, output="newton_schulz")])
def test_matrix_optimizers_refuse_vectors_and_stacks(make):
    for shape in ((4,), (2, 3, 4)):
        with pytest.raises(ValueError, match="takes matrices, got a parameter of shape"):
            make([nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(shape))])


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("bad", ["nan", "inf", "sparse"])
def test_bad_gradients_are_refused_before_anything_changes(make, bad):
    params = weights()
    optimizer = make(params)
    (grads,) = gradients(1)
    step_with(optimizer, params, grads)
    if bad == "sparse":
        grads[-1] = grads[-1].to_sparse()
    else:
        grads[-1][0, 0] = float(bad)
    before = copy.deepcopy([params, [dict(optimizer.state[p]) for p in params]])
    wrong = "must be dense, got a sparse one" if bad == "sparse" else "is not finite"
    with pytest.raises(ValueError, match=rf"gradient of a parameter of shape \(5, 5\) {wrong}"):
        step_with(optimizer, params, grads)
    for p, old, state in zip(params, *before, strict=True):
        assert torch.equal(p, old)
        for name, value in optimizer.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(state[name]))


def test_large_finite_gradients_are_no_error():
    w = nn.Parameter(torch.zeros(3, 4, dtype=torch.float32))
    w.grad = torch.full_like(w, 3e38)  # their norm is infinite
    GradientDescent([w], lr=1e-38).step()
    assert torch.allclose(w.detach(), torch.tensor(-3.0, dtype=torch.float32), rtol=0.1)


def test_dgd_refuses_bad_input():
    with pytest.raises(ValueError, match="nn.Linear"):
        DGD(nn.Tanh())
    with pytest.raises(ValueError, match="lr must be above 0 and finite, got 0"):
        DGD(nn.Linear(2, 2), lr=0)
    layer = nn.Linear(2, 2)
    optimizer = DGD(layer)
    before = layer.weight.detach().clone()
    (layer(torch.ones(1, 2)) * math.inf).sum().backward()
    with pytest.raises(ValueError, match="not finite"):
        optimizer.step()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(
    "bad", [{"weight_decay": math.inf}, {"lr": math.inf}, {"betas": (0.9, math.nan)}]
)
def test_bad_rates_of_a_model_s_optimizer_are_refused(kind, bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"^{name} must be .*, got "):
        optimizer_by_name(Model(), kind, **bad)


def test_an_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match="unknown optimizer 'adam': must be one of adamw, muon"):
        optimizer_by_name(Model(), "adam")


def test_state_of_other_optimizers_is_refused():
    model = Model()
    state = optimizer_by_name(model, "adamw").state_dict()
    with pytest.raises(ValueError, match="must hold 2 optimizers, got 0"):
        optimizer_by_name(model, "m3").load_state_dict(state)
