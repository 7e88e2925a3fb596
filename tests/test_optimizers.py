"""What optimizers.py must be: each optimizer equal to its definition, a closed form, or torch's own, under a stated mapping.

float64 and 1e-10 unless a test says otherwise. NL is arXiv 2512.24695.

    python -m pytest tests/test_optimizers.py
"""

import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hope import Hope, HopeConfig
from memory import scan, write
from optimizers import (
    CUBIC,
    DGD,
    M3,
    OPTIMIZERS,
    AdaGradMemory,
    AdamMemory,
    DeepMomentum,
    DeltaMomentum,
    GradientDescent,
    Momentum,
    Muon,
    PreconditionedMomentum,
    memorize,
    newton_schulz,
    optimizer_by_name,
    split_parameters,
)

SHAPES = [(6, 4), (3, 8), (4, 6), (5, 5)]
KINDS = list(OPTIMIZERS)
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
    """NL eq. 50: m(u) = (I + B) silu(A u) on the rows of u = g / |g|, values I; the update is dm/du, mean over rows, by |g|."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.zeros(3, 5, dtype=torch.float64))
    optimizer = DeepMomentum([w], lr=1.0, momentum=0.8, eta=0.3, objective=objective)
    A, B, identity = torch.zeros(3, 5).double(), torch.zeros(3, 3).double(), torch.eye(3).double()
    for _ in range(6):
        g = torch.randn(3, 5, dtype=torch.float64)
        u = g / g.norm()
        A.requires_grad_(), B.requires_grad_()
        y = F.silu(u @ A.mT) @ (identity + B).mT
        loss = -(y * identity).sum() if objective == "dot" else (y - identity).square().sum() / 2
        dA, dB = torch.autograd.grad(loss, (A, B))
        A, B = 0.8 * A.detach() - 0.3 * dA, 0.8 * B.detach() - 0.3 * dB
        jacobians = [torch.autograd.functional.jacobian(lambda x: (identity + B) @ F.silu(A @ x), row) for row in u]  # noqa: B023
        before = w.detach().clone()
        w.grad = g
        optimizer.step()
        assert (before - w - g.norm() * torch.stack(jacobians).mean(0)).abs().max() < 1e-12


@pytest.mark.parametrize("objective", ["dot", "l2"])
@pytest.mark.parametrize("rank", [1, 16])
def test_deep_momentum_stays_bounded(rank, objective):
    torch.manual_seed(0)
    w = nn.Parameter(torch.zeros(16, 24, dtype=torch.float64))
    optimizer, norms = DeepMomentum([w], objective=objective), []
    g = torch.randn(16, rank, dtype=torch.float64) @ torch.randn(rank, 24, dtype=torch.float64)
    for _ in range(300):  # the same gradient again and again: nothing adds up more
        w.grad = 1e3 * g
        optimizer.step()
        norms.append(sum(M.norm().item() for M in optimizer.state[w].values()))
    assert norms[-1] < 3 and norms[-1] == pytest.approx(norms[-50], rel=1e-3)


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


def test_a_larger_model_s_matrices_share_one_stack_without_changing_anything():
    """Equal shapes, also transposed, are orthogonalised at once: each matrix as if it were alone."""
    shapes = [(4, 6), (6, 4), (4, 6), (5, 5)]
    together = weights(shapes=shapes)
    alone = [nn.Parameter(w.detach().clone()) for w in together]
    optimizers = [M3(together), *(M3([w]) for w in alone)]
    for grads in gradients(11, shapes=shapes):
        for params in (together, alone):
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert difference([w.detach() for w in together], [w.detach() for w in alone]) < 1e-12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_newton_schulz_in_bfloat16_on_a_gpu_is_near_the_exact_polynomial():
    torch.manual_seed(0)
    G = torch.randn(3, 64, 96, dtype=torch.float64)
    expected = torch.stack([singular_values_by_polynomial(g) for g in G])
    assert (newton_schulz(G.float().cuda()).double().cpu() - expected).norm() < 0.02 * expected.norm()


# DGD


@pytest.mark.parametrize("length", [0.1, 1.0, 7.0])
def test_dgd_is_the_minimiser_of_its_problem(length):
    """NL eq. 56 for one token of any length, solved by Newton's method on the printed objective."""
    torch.manual_seed(0)
    layer, lr = nn.Linear(5, 3, bias=False).double(), 0.4
    optimizer = DGD(layer, lr=lr)
    start, x = layer.weight.detach().clone(), F.normalize(torch.randn(1, 5).double(), dim=1) * length
    y = layer(x)
    gradient = 3 * y.detach() ** 2
    (y**3).sum().backward()

    def objective(W):
        return (W @ x[0] + gradient[0]).square().sum() / 2 + (W - start).square().sum() / (2 * lr)

    W = start.clone()
    slope, curvature = torch.func.grad(objective)(W), torch.func.hessian(objective)(W)
    W = W - torch.linalg.solve(curvature.reshape(15, 15), slope.flatten()).reshape(3, 5)  # quadratic: one step is exact
    assert torch.func.grad(objective)(W).abs().max() < 1e-10
    optimizer.step()
    assert (layer.weight - W).abs().max() < 1e-10


def test_dgd_follows_the_tokens_of_a_batch_one_by_one():
    """Batch, time and bias: W <- W (I - eta' x x^T) - eta' dL/dy x^T, dL/dy at the weights before the batch."""
    torch.manual_seed(0)
    model, lr = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2, bias=False)).double(), 0.3
    optimizer = DGD(model, lr=lr, weight_decay=0.1)
    inputs = torch.randn(2, 5, 4, dtype=torch.float64)
    first, last = model[0], model[2]
    h = first(inputs).detach().requires_grad_()
    y = last(torch.tanh(h)).detach().requires_grad_()
    y.square().sum().backward()
    (torch.tanh(h) @ last.weight.detach().mT * y.grad).sum().backward()
    optimizer.zero_grad()  # forgets the passes made so far
    expected = []
    augmented = torch.cat([inputs, torch.ones(2, 5, 1, dtype=torch.float64)], -1)
    W1, W2 = torch.cat([first.weight, first.bias[:, None]], 1).detach(), last.weight.detach()
    for W, k, g in ((W1, augmented, h.grad), (W2, torch.tanh(h).detach(), y.grad)):
        W = W * (1 - lr * 0.1)
        for x, slope in zip(k.flatten(0, 1), g.flatten(0, 1), strict=True):
            eta = lr / (1 + lr * x @ x)
            W = W - eta * torch.outer(W @ x + slope, x)
        expected.append(W)
    with torch.no_grad():
        model(100 * inputs)  # is not recorded
    for rows in inputs:  # two passes, one step
        model(rows[None]).square().sum().backward()
    optimizer.step()
    got = [torch.cat([first.weight, first.bias[:, None]], 1).detach(), last.weight.detach()]
    assert difference(got, expected) < 1e-10
    before = last.weight.detach().clone()
    optimizer.step()  # nothing new was recorded
    assert torch.equal(last.weight, before)


def test_dgd_recovers_gradient_descent_for_small_inputs():
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, bias=False).double()
    optimizer, before, x = DGD(layer, lr=0.1), layer.weight.detach().clone(), 1e-5 * torch.randn(1, 4).double()
    (layer(x) @ torch.tensor([1e5, 2e5, -1e5]).double()).sum().backward()
    optimizer.step()
    assert torch.allclose(layer.weight - before, -0.1 * layer.weight.grad, rtol=1e-4)


# The statements of the paper


def test_the_last_7_gradients_hold_half_of_momentum_and_the_last_44_99_percent():
    """NL sec. 4.3, counted: at beta = 0.9 (the paper says 6 and 43, which hold 46.9% and 98.9%)."""
    p = nn.Parameter(torch.zeros(400, dtype=torch.float64))
    optimizer = Momentum([p], momentum=0.9)
    for i in range(400):  # gradient i points along axis i: M holds the weight of each
        p.grad = torch.zeros_like(p)
        p.grad[i] = 1
        optimizer.step()
    held = (optimizer.state[p]["M"].flip(0) / optimizer.state[p]["M"].sum()).cumsum(0).tolist()
    assert held[6 - 1] == pytest.approx(0.4686, abs=1e-4) and held[43 - 1] == pytest.approx(0.9892, abs=1e-4)
    assert min(n for n in range(1, 401) if held[n - 1] >= 0.5) == 7
    assert min(n for n in range(1, 401) if held[n - 1] >= 0.99) == 44


def test_momentum_forgets_the_first_of_two_orthogonal_tasks_and_the_slow_memory_does_not():
    """NL eq. 45: 50 gradients along u1, then 50 along u2. What is left of the first task, as a share of what was held?"""
    u1, u2 = torch.eye(4, dtype=torch.float64)[:2].unsqueeze(1)
    p = nn.Parameter(torch.zeros(1, 4, dtype=torch.float64))
    q = nn.Parameter(torch.zeros(1, 4, dtype=torch.float64))
    momentum, m3 = Momentum([p], momentum=0.9), M3([q], betas=(0.9, 0.95, 0.9), alpha=0.5, frequency=10)
    for u in (u1, u2):
        for _ in range(50):
            p.grad = q.grad = u
            momentum.step(), m3.step()
        if u is u1:
            full = [momentum.state[p]["M"][0, 0].item(), m3.state[q]["M2"][0, 0].item()]
    left = [momentum.state[p]["M"][0, 0].item() / full[0], m3.state[q]["M2"][0, 0].item() / full[1]]
    assert left[0] == pytest.approx(0.9**50) and left[0] < 0.0052  # 0.5%
    assert left[1] == pytest.approx(0.9**5) and left[1] > 0.59  # 59%
    # and so it is in what moves the weights: half of the slow memory's reading is still along u1, of the fast one's 0.5%
    slow, fast = m3.state[q]["O2"], newton_schulz(m3.state[q]["M"])
    assert slow[0, 0] / slow.norm() > 0.5 and fast[0, 0] / fast.norm() < 0.0053


# Whole models


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.linear, self.head = nn.Embedding(5, 4), nn.Linear(4, 6), nn.Linear(6, 5, bias=False)
        self.conv = nn.Conv1d(4, 4, 3)
        self.short = nn.ModuleDict({"conv": nn.Linear(4, 3, bias=False)})
        self.start, self.start2 = nn.Parameter(torch.zeros(2, 4, 4)), nn.Parameter(torch.zeros(4, 4))
        self.norm = nn.RMSNorm(4)


def test_matrices_are_what_maps_features_to_features():
    model = Model()
    names = {id(p): name for name, p in model.named_parameters()}
    matrices, decayed, plain = ([names[id(p)] for p in part] for part in split_parameters(model))
    assert matrices == ["linear.weight"]
    assert decayed == ["head.weight", "conv.weight", "short.conv.weight"]
    assert plain == ["start", "start2", "embedding.weight", "linear.bias", "conv.bias", "norm.weight"]


@pytest.mark.parametrize("name", ["hope", "titans", "transformer", "gated_deltanet", "samba", "titans_mac"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_of_a_model_has_one_optimizer(name, kind):
    model = Hope(HopeConfig.preset("nano", model=name, d_model=32, n_layers=1, n_heads=2))
    groups = optimizer_by_name(model, kind).param_groups
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(id(p) for p in model.parameters())
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for parameter, p in model.named_parameters():
        undecayed = p.ndim < 2 or any(part in parameter for part in ("start", "embedding", "bias", "log_A", "persistent"))
        assert decay[id(p)] == (0 if undecayed else 0.1), parameter


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_optimizer_goes_on_as_if_never_stopped(kind):
    def model_and_optimizer():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
        return model, optimizer_by_name(model, kind)

    def steps(model, optimizer, numbers):
        for t in numbers:
            optimizer.zero_grad()
            model(torch.randn(8, 4, generator=torch.Generator().manual_seed(t))).square().sum().backward()
            optimizer.step()

    model, optimizer = model_and_optimizer()
    steps(model, optimizer, range(25))
    saved, file = model_and_optimizer(), io.BytesIO()
    steps(*saved, range(13))  # in the middle of M3's slow period
    torch.save([part.state_dict() for part in saved], file)
    file.seek(0)
    again = model_and_optimizer()
    for part, state in zip(again, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    steps(*again, range(13, 25))
    for a, b in zip(model.parameters(), again[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_non_linear_reads_have_one_scale():
    """One learning rate serves them all: the update's root mean square is 0.2 lr, as AdamW's usually is."""
    for kind in KINDS[1:]:
        w = nn.Parameter(torch.zeros(48, 64))
        model = nn.Module()
        model.w = w
        optimizer = optimizer_by_name(model, kind, lr=1.0, weight_decay=0.0)
        for (g,) in gradients(20, shapes=[(48, 64)], dtype=torch.float32):
            before = w.detach().clone()
            w.grad = g
            optimizer.step()
        assert (w.detach() - before).square().mean().sqrt() == pytest.approx(0.2, rel=0.2), kind


def test_state_of_other_optimizers_is_refused():
    model = Model()
    with pytest.raises(ValueError, match="not of 2 optimizers"):
        optimizer_by_name(model, "m3").load_state_dict(optimizer_by_name(model, "adamw").state_dict())


def test_parameter_groups_have_their_own_rates():
    a, b = weights(shapes=[(3, 4), (3, 4)])
    before = [a.detach().clone(), b.detach().clone()]
    optimizer = Muon([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.3}])
    a.grad = b.grad = torch.randn(3, 4, dtype=torch.float64)
    optimizer.step()
    assert torch.allclose(3 * (a - before[0]), b - before[1])
    assert optimizer.step(lambda: 5) == 5


# Bad input raises before any state changes


BAD = {
    "lr": (ALL, [0, -1.0, math.nan, math.inf, "fast"]),
    "weight_decay": (ALL, [-0.1, math.nan]),
    "momentum": ([Momentum, PreconditionedMomentum, DeltaMomentum, DeepMomentum, Muon], [1, -0.1, None]),
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


@pytest.mark.parametrize("name, value, make", [(n, v, m) for n, (makes, values) in BAD.items() for m in makes for v in values])
def test_bad_hyper_parameters_are_refused(name, value, make):
    with pytest.raises(ValueError, match=f"^{name} is .*: legal is ") as error:
        make([nn.Parameter(torch.zeros(3, 4))], **{name: value})
    assert repr(value) in str(error.value)
    optimizer = make([nn.Parameter(torch.zeros(3, 4))])
    with pytest.raises(ValueError, match=f"^{name} is "):  # a group's own value too
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, 4))], name: value})
    assert len(optimizer.param_groups) == 1


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
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    if bad == "sparse":
        params[-1].grad = params[-1].grad.to_sparse()
    else:
        params[-1].grad[0, 0] = float(bad)
    before = [p.detach().clone() for p in params]
    state = [{k: torch.as_tensor(v).clone() for k, v in optimizer.state[p].items()} for p in params]
    with pytest.raises(ValueError, match=r"gradient of a parameter of shape \(5, 5\) is (not finite|sparse)"):
        optimizer.step()
    assert difference(params, before) == 0
    for p, old in zip(params, state, strict=True):
        assert all(torch.equal(torch.as_tensor(optimizer.state[p][k]), v) for k, v in old.items())


def test_large_finite_gradients_are_no_error():
    w = nn.Parameter(torch.zeros(3, 4))
    w.grad = torch.full((3, 4), 3e38)  # their norm is infinite
    GradientDescent([w], lr=1e-38).step()
    assert torch.allclose(w.detach(), torch.tensor(-3.0), rtol=0.1)


def test_dgd_refuses_bad_input():
    with pytest.raises(ValueError, match="nn.Linear"):
        DGD(nn.Tanh())
    with pytest.raises(ValueError, match="lr is 0: legal is above 0"):
        DGD(nn.Linear(2, 2), lr=0)
    layer = nn.Linear(2, 2)
    optimizer, before = DGD(layer), layer.weight.detach().clone()
    (layer(torch.ones(1, 2)) * math.inf).sum().backward()
    with pytest.raises(ValueError, match="not finite"):
        optimizer.step()
    assert torch.equal(layer.weight, before)


def test_an_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match="optimizer is 'adam': legal are adamw, muon, m3"):
        optimizer_by_name(Model(), "adam")
