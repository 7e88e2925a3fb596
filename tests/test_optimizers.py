"""What optimizers.py must be: each optimizer equal to its definition, a closed form, or torch's own, under a stated mapping.

float64 and 1e-10 unless a test says otherwise. NL is arXiv 2512.24695.

    python -m pytest tests/test_optimizers.py
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import optimizers
from hope import Hope, HopeConfig
from memory import l2norm, scan, scan_stepwise, write
from optimizers import (
    CUBIC,
    DGD,
    M3,
    RMS,
    AdaGradMemory,
    AdamMemory,
    DeepMomentum,
    DeltaMomentum,
    GradientDescent,
    Momentum,
    Muon,
    PreconditionedMomentum,
    Together,
    memorize,
    newton_schulz,
    optimizer_by_name,
    split_parameters,
    to_rms,
)

SHAPES = [(6, 4), (3, 8), (4, 6), (5, 5)]
MATRICES = [DeltaMomentum, DeepMomentum, Muon, M3]
ALL = [GradientDescent, Momentum, PreconditionedMomentum, AdamMemory, AdaGradMemory, *MATRICES]


def weights(seed=0, shapes=SHAPES, dtype=torch.float64):
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def gradients(steps, seed=1, shapes=SHAPES, dtype=torch.float64, scale=1.0):
    torch.manual_seed(seed)
    return [[scale * torch.randn(shape, dtype=dtype) for shape in shapes] for _ in range(steps)]


def run(make, steps=12, rates=None, **options):
    """Weights after `steps` given gradients; rates: the learning rate of each step, for all groups."""
    params = weights(dtype=options.get("dtype", torch.float64))
    optimizer = make(params)
    for t, grads in enumerate(gradients(steps, **options)):
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        for group in optimizer.param_groups if rates else []:
            group["lr"] = rates[t]
        optimizer.step()
    return [p.detach() for p in params]


def difference(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def moved(params, before):
    return [p.detach() - b for p, b in zip(params, before, strict=True)]


# Equal to torch's own


@pytest.mark.parametrize("rates", [None, [0.1, 0.05, 0.01] * 4], ids=["constant", "scheduled"])
@pytest.mark.parametrize("make, torchs", [
    (lambda w: GradientDescent(w, lr=0.1), lambda w: torch.optim.SGD(w, lr=0.1)),
    (lambda w: Momentum(w, lr=0.1, momentum=0.8), lambda w: torch.optim.SGD(w, lr=0.1, momentum=0.8)),
    (lambda w: AdamMemory(w, lr=0.1, betas=(0.8, 0.95)), lambda w: torch.optim.Adam(w, lr=0.1, betas=(0.8, 0.95))),
    (lambda w: AdamMemory(w, lr=0.1, weight_decay=0.3), lambda w: torch.optim.AdamW(w, lr=0.1, weight_decay=0.3)),
    (lambda w: AdaGradMemory(w, lr=0.1), lambda w: torch.optim.Adagrad(w, lr=0.1)),
    (lambda w: PreconditionedMomentum(w, 0.1, momentum=0, beta=0.9), lambda w: torch.optim.Adam(w, 0.1, betas=(0.0, 0.9))),
])  # fmt: skip
def test_element_wise_memories_equal_torch(make, torchs, rates):
    assert difference(run(make, rates=rates), run(torchs, rates=rates)) < 1e-12


def test_adagrad_that_forgets_is_rmsprop():
    ours = run(lambda w: AdaGradMemory(w, lr=0.1, retention=0.9, eps=0))
    assert difference(ours, run(lambda w: torch.optim.RMSprop(w, lr=0.1 * 0.1**0.5, alpha=0.9, eps=0))) < 1e-12


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_torchs_within_its_bfloat16(nesterov):
    settings = dict(lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.2)
    start = weights(dtype=torch.float32)
    ours = run(lambda w: Muon(w, **settings), dtype=torch.float32)
    theirs = run(lambda w: torch.optim.Muon(w, adjust_lr_fn="match_rms_adamw", **settings), dtype=torch.float32)
    for a, b, w in zip(ours, theirs, start, strict=True):  # bfloat16 has 8 bits: 0.4% a number, five rounds of products
        assert (a - b).norm() < 0.02 * (a - w.detach()).norm()


# Equal to their definitions


def singular_values_by_polynomial(G, steps=5):
    """Newton-Schulz on the singular values alone: what it must do to the matrix."""
    U, s, V = torch.linalg.svd(G, full_matrices=False)
    s = s / G.norm()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return U @ torch.diag(s) @ V


def muon_by_svd(lr, momentum, nesterov, weight_decay):
    """Muon written from NL eq. 42-44, 52, for one step: (W, M, g) -> (W, M)."""

    def step(W, M, g):
        M = momentum * M + (1 - momentum) * g
        read = momentum * M + (1 - momentum) * g if nesterov else M
        return (1 - lr * weight_decay) * W - lr * 0.2 * max(W.shape) ** 0.5 * singular_values_by_polynomial(read), M

    return step


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_its_definition(nesterov):
    settings = dict(lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.2)
    expected = [(p.detach(), torch.zeros_like(p)) for p in weights()]
    for grads in gradients(12):
        step = muon_by_svd(**settings)
        expected = [step(W, M, g) for (W, M), g in zip(expected, grads, strict=True)]
    assert difference(run(lambda w: Muon(w, **settings)), [W for W, _ in expected]) < 1e-10


def test_newton_schulz_is_the_polynomial_of_the_singular_values():
    torch.manual_seed(0)
    for shape in [(4, 4), (3, 7), (7, 3), (2, 5, 3), (1, 6)]:
        G = torch.randn(shape, dtype=torch.float64)
        expected = torch.stack([singular_values_by_polynomial(g) for g in G.reshape(-1, *shape[-2:])]).reshape(shape)
        assert (newton_schulz(G) - expected).abs().max() < 1e-12
        assert (newton_schulz(1e-30 * G) - expected).abs().max() < 1e-12
    assert not newton_schulz(torch.zeros(3, 4)).any()


def test_cubic_newton_schulz_is_gradient_descent_towards_orthogonality():
    """NL eq. 43-44: the step of size 1/8 on |O^T O - I|^2, and it ends at U V^T."""
    torch.manual_seed(0)
    G = torch.randn(5, 3, dtype=torch.float64)
    O = (G / G.norm()).requires_grad_()
    gradient = torch.autograd.grad((O.mT @ O - torch.eye(3)).square().sum(), O)[0]
    assert (newton_schulz(G, 1, CUBIC) - (O - gradient / 8)).abs().max() < 1e-12
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    assert (newton_schulz(G, 40, CUBIC) - U @ V).abs().max() < 1e-10


def test_the_usual_newton_schulz_ends_near_orthogonal():
    torch.manual_seed(0)
    s = torch.linalg.svdvals(newton_schulz(torch.randn(20, 64, 96)))
    assert 0.5 < s.min() and s.max() < 1.3


def test_momentum_is_gradient_descent_on_its_objective_as_printed():
    """NL eq. 33-34: W <- W + m, m <- alpha m - eta g, where g is the gradient of -<m g^T, -I> ... written with autograd."""
    W = [p.detach() for p in weights()]
    m = [torch.zeros_like(w) for w in W]
    for grads in gradients(12):
        for i, g in enumerate(grads):
            old = m[i].clone().requires_grad_()
            (slope,) = torch.autograd.grad((old @ g.mT).diagonal().sum(), old)  # <m g^T, I>
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


def test_delta_momentum_is_a_write_of_memory_py():
    """Its step is memory.write, all rows of g at once; for a g of one row, the recurrence itself."""
    torch.manual_seed(0)
    for rows in (1, 4):
        M, g = torch.randn(2, rows, 6, dtype=torch.float64)
        c = 0.5 / g.square().sum()
        alpha = torch.tensor([0.8] + [1.0] * (rows - 1), dtype=torch.float64)  # retention acts once
        target, eta = torch.eye(rows, dtype=torch.float64) / c, c.expand(rows)
        optimizer = DeltaMomentum([w := nn.Parameter(torch.zeros_like(M))], momentum=0.8, delta=0.5)
        optimizer.state[w]["M"] = M.clone()
        w.grad = g
        optimizer.step()
        _, (expected,), _ = write([M], g, target, eta, alpha, delta=0.0, residual=False)
        assert (optimizer.state[w]["M"] - expected).abs().max() < 1e-12
        assert (memorize([M], g, target, 0.8, c, "l2")[0] - expected).abs().max() < 1e-12
        if rows == 1:
            assert (scan(M, g, target, eta, alpha)[1] - expected).abs().max() < 1e-12


def test_literal_delta_momentum_diverges_and_the_bounded_one_does_not():
    g = torch.full((1, 2), 2.0, dtype=torch.float64)  # |g|^2 = 8 > 1 + momentum
    literal = bounded = torch.zeros_like(g)
    for _ in range(50):
        literal = delta_momentum_by_autograd(literal, g, 0.9, 1.0)
        bounded = delta_momentum_by_autograd(bounded, g, 0.9, 0.5 / g.square().sum())
    assert literal.norm() > 1e20
    assert torch.allclose(bounded, g / (1 - 0.9 + 0.5))


def test_delta_momentum_without_delta_is_momentum():
    assert difference(run(lambda w: DeltaMomentum(w, delta=0)), run(Momentum)) < 1e-12


def test_deep_momentum_with_a_linear_memory_read_as_itself_is_momentum():
    linear = dict(depth=1, objective="dot", features="linear", eta=1.0)
    assert difference(run(lambda w: DeepMomentum(w, momentum=0.8, **linear)), run(lambda w: Momentum(w, momentum=0.8))) < 1e-12


@pytest.mark.parametrize("objective", ["dot", "l2"])
def test_deep_momentum_learns_by_gradient_descent_and_is_read_as_its_jacobian(objective):
    """NL eq. 50: m(u) = (I + B) silu(A u) on the rows of u = g / |g|, values I; the update is dm/du, mean over the rows."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.zeros(3, 5, dtype=torch.float64))
    optimizer = DeepMomentum([w], lr=1.0, momentum=0.8, eta=0.3, objective=objective)
    A, B, identity = torch.zeros(3, 5).double(), torch.zeros(3, 3).double(), torch.eye(3).double()
    for _ in range(6):
        g = torch.randn(3, 5, dtype=torch.float64)
        u = g / g.norm() * 3**0.5  # rows of unit length, in the mean of squares
        A.requires_grad_(), B.requires_grad_()
        y = F.silu(u @ A.mT) @ (identity + B).mT
        loss = -(y * identity).sum() if objective == "dot" else (y - identity).square().sum() / 2
        dA, dB = torch.autograd.grad(loss, (A, B))
        A, B = 0.8 * A.detach() - 0.3 * dA, 0.8 * B.detach() - 0.3 * dB
        jacobians = [torch.autograd.functional.jacobian(lambda x: (identity + B) @ F.silu(A @ x), row) for row in u]  # noqa: B023
        before = w.detach().clone()
        w.grad = g
        optimizer.step()
        assert (before - w - torch.stack(jacobians).mean(0)).abs().max() < 1e-12


def test_tall_gradients_are_transposed_in_deep_momentum():
    grads = gradients(5, shapes=[(5, 3)])
    results = []
    for tall in (True, False):
        w = nn.Parameter(torch.zeros((5, 3) if tall else (3, 5), dtype=torch.float64))
        optimizer = DeepMomentum([w])
        for (g,) in grads:
            w.grad = g if tall else g.mT.contiguous()
            optimizer.step()
        results.append(w.detach() if tall else w.detach().mT)
    assert difference(results[:1], results[1:]) < 1e-12


def test_sign_features_compress_only_signs():
    big, small = (run(lambda w: DeepMomentum(w, features="sign"), scale=s) for s in (1.0, 1e-6))
    assert difference(big, small) < 1e-12


def test_the_preconditioner_learns_by_gradient_descent():
    """NL eq. 38-39: H steps 1 - beta along the gradient of |H - g^2|^2 / 2."""
    w = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer, H = PreconditionedMomentum([w], beta=0.9), torch.zeros(4, dtype=torch.float64)
    for _ in range(5):
        w.grad = torch.randn(4, dtype=torch.float64)
        optimizer.step()
        H.requires_grad_()
        (slope,) = torch.autograd.grad((H - w.grad**2).square().sum() / 2, H)
        H = H.detach() - 0.1 * slope
    assert (optimizer.state[w]["H"] - H).abs().max() < 1e-12


def test_adam_s_memory_is_the_least_squares_map_from_gradients_to_their_root_mean_square():
    """NL eq. 100-105 with equal betas: m = argmin sum_i beta^age (m g_i - P)^2, solved here by lstsq."""
    beta, _ = 0.8, torch.manual_seed(0)
    g = torch.randn(9, dtype=torch.float64)
    w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = AdamMemory([w], lr=1.0, betas=(beta, beta), eps=0)
    for x in g:
        before = w.detach().clone()
        w.grad = x.reshape(1)
        optimizer.step()
    weight = beta ** torch.arange(8, -1, -1, dtype=torch.float64)
    P = ((weight * g**2).sum() / weight.sum()).sqrt()
    m = torch.linalg.lstsq((weight.sqrt() * g)[:, None], (weight.sqrt() * P)[:, None]).solution
    assert (before - w - m.flatten()).abs().max() < 1e-12


# M3


def test_m3_with_no_slow_memory_and_no_second_moment_is_muon():
    for settings in ({}, {"nesterov": False, "weight_decay": 0.2}):
        ours = run(lambda w: M3(w, betas=(0.9, 0.9, 0.9), alpha=0, second_moment=False, **settings))  # noqa: B023
        assert difference(ours, run(lambda w: Muon(w, momentum=0.9, **settings))) < 1e-12  # noqa: B023


def m3_by_definition(W, grads, lr, beta1, beta2, beta3, alpha, f):
    """Algorithm 1 in its form that forgets, without nesterov, on one matrix."""
    M1, M2, V, O2 = (torch.zeros_like(W) for _ in range(4))
    for t, g in enumerate(grads, 1):
        M1 = beta1 * M1 + (1 - beta1) * g
        if t % f == 0:
            M2 = beta3 * M2 + (1 - beta3) * sum(grads[t - f : t]) / f
            O2 = singular_values_by_polynomial(M2)
        O = singular_values_by_polynomial(M1) + alpha * O2
        V = beta2 * V + (1 - beta2) * O**2
        U = O / (V / (1 - beta2**t)).sqrt()
        W = W - lr * 0.2 * U / U.square().mean().sqrt()
    return W


def test_m3_is_its_definition():
    grads = gradients(12)
    ours = run(lambda w: M3(w, lr=0.1, betas=(0.9, 0.8, 0.7), alpha=0.5, frequency=3, nesterov=False, eps=0))
    for i, p in enumerate(weights()):
        expected = m3_by_definition(p.detach(), [g[i] for g in grads], 0.1, 0.9, 0.8, 0.7, 0.5, 3)
        assert (ours[i] - expected).abs().max() < 1e-9


@pytest.mark.parametrize("make", [Muon, M3, lambda w: M3(w, second_moment=False)])
def test_the_step_of_orthogonal_memories_does_not_depend_on_the_gradients_scale(make):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        plain, tiny = (run(make, 25, scale=s, dtype=dtype) for s in (1.0, 1e-4))
        start = [p.detach() for p in weights(dtype=dtype)]
        assert difference(plain, tiny) < tolerance < 1e-3 < difference(plain, start)


def rms_of_printed_step(scale):
    (p,) = weights(shapes=[(16, 16)])
    optimizer, before = M3([p], lr=1.0, printed=True), p.detach().clone()
    for (g,) in gradients(3, shapes=[(16, 16)], scale=scale):
        before.copy_(p.detach())
        p.grad = g
        optimizer.step()
    return (p.detach() - before).square().mean().sqrt().item()


def test_m3_as_printed_explodes_as_gradients_shrink():
    assert rms_of_printed_step(1e-4) == pytest.approx(1e4 * rms_of_printed_step(1.0), rel=1e-3)
    assert rms_of_printed_step(1e-4) > 1000


def test_m3_as_printed_is_algorithm_1():
    (p,) = weights(shapes=[(4, 6)])
    grads = [g for (g,) in gradients(10, shapes=[(4, 6)])]
    optimizer = M3([p], lr=0.1, betas=(0.9, 0.8, 0.7), alpha=0.5, frequency=4, eps=1e-3, printed=True)
    W = p.detach().clone()
    for g in grads:
        p.grad = g
        optimizer.step()
    M1, M2, V, O2 = (torch.zeros_like(W) for _ in range(4))
    for t, g in enumerate(grads, 1):
        M1, V = M1 + 0.9 * g, V + 0.8 * g**2
        if t % 4 == 0:
            M2 = M2 + 0.7 * sum(grads[t - 4 : t])
            O2 = singular_values_by_polynomial(M2)
        W = W - 0.1 * (singular_values_by_polynomial(M1) + 0.5 * O2) / (V.sqrt() + 1e-3)
    assert (p - W).abs().max() < 1e-10
