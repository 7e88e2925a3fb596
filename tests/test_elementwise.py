"""Element-wise functions over the whole range of float32, against themselves in float64.

A function may be wrong by what a rounded argument costs, |f| + |x f'| times a few units in the last
place. torch's own (sigmoid, SiLU, softplus, log-softmax, its norms) are not tested for themselves.
"""

import pytest
import torch
import torch.nn.functional as F
from textbook import close

from baselines import LinearAttention, gelu, gelu_derivative, phi
from fused import linear_cross_entropy, silu_derivative
from layers import retention_of
from memory import l2norm
from titans import NeuralMemory, SelfModifyingTitans

LEAST = 1e-36  # below, float32 soon has fewer digits
FUNCTIONS = {
    "phi": phi,
    "gelu": gelu,
    "gelu'": gelu_derivative,
    "silu'": silu_derivative,
    "retention": lambda z: retention_of(z, 1.0),
    "retention of a slow head": lambda z: retention_of(z, 1e-3),
}


def everywhere():
    """Numbers of every size and both signs, and closely around 0, where functions bend: float32."""
    sizes = torch.logspace(-44, 38, 2000, dtype=torch.float64)
    near = torch.linspace(-120, 120, 4801, dtype=torch.float64)
    return torch.cat([-sizes, near, sizes]).float()


def with_derivative(f, x):
    x = x.clone().requires_grad_()
    y = f(x)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


def derivative(f):
    return lambda x: torch.func.vmap(torch.func.grad(f))(x)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_over_all_of_float32_only_rounding_is_lost(name):
    f = FUNCTIONS[name]
    x = everywhere()
    got, slope = with_derivative(f, x)
    expected, true_slope = with_derivative(f, x.double())
    _, curvature = with_derivative(derivative(f), x.double())
    assert got.isfinite().all() and slope.isfinite().all()
    pairs = [(got, expected, true_slope), (slope, true_slope, curvature)]
    for y, exact, sensitivity in pairs[: 1 if name == "silu'" else 2]:  # its slope is sigmoid's
        allowed = exact.abs() + (x.double() * sensitivity).abs()
        error = (y.double() - exact).abs()
        allowed = 1e-5 * allowed + LEAST
        worst = (error / allowed).argmax()
        assert error[worst] <= allowed[worst], f"{y[worst]} at {x[worst]}, {exact[worst]}"


def test_unit_vectors_are_exact_as_far_as_their_squares_are_numbers():
    sizes = torch.logspace(-44, 18, 500, dtype=torch.float64)[:, None]
    torch.manual_seed(0)
    x = (sizes * torch.randn(500, 8, dtype=torch.float64)).float()
    weight = torch.linspace(-1, 1, 8, dtype=torch.float64)
    got, slope = with_derivative(lambda x: l2norm(x) * weight.to(x.dtype), x)
    expected, true_slope = with_derivative(lambda x: l2norm(x) * weight, x.double())
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=LEAST)
    error = (slope - true_slope).norm(dim=1) / true_slope.norm(dim=1)
    assert error.max() < 1e-5


@pytest.mark.parametrize("size", [1e-30, 1.0, 20.0, 200.0, 1e4])
def test_linear_attention_weighs_values_at_any_size_of_its_features(size):
    """Also where all features of a query are below float32's least number."""
    torch.manual_seed(0)
    mixer = LinearAttention(8, 2)
    q = -size * (1 + torch.rand(1, 2, 5, 4))
    k, v = torch.randn(2, 1, 2, 5, 4)
    state = {"W": None, "position": 0}
    inputs = [t.requires_grad_() for t in (q, k, v)]
    y = mixer.remember(*inputs, None, state)[0]
    y.square().sum().backward()
    wide = [t.detach().double().requires_grad_() for t in inputs]
    expected = mixer.remember(*wide, None, state)[0]
    expected.square().sum().backward()
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(inputs, wide, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-3, atol=1e-5)


def test_linear_attention_reads_zeros_where_no_key_has_a_feature_left():
    mixer = LinearAttention(8, 2)
    q, v = torch.randn(2, 1, 2, 5, 4)
    k = torch.full_like(q, -1e4).requires_grad_()
    y = mixer.remember(q, k, v, None, {"W": None})[0]
    y.sum().backward()
    assert not y.any() and not k.grad.any()


@pytest.mark.parametrize("name", ["readable", "fused", "titans"])
@pytest.mark.parametrize("z", [5.0, 12.0, 18.0, 40.0])
def test_a_memory_with_long_momentum_still_writes(name, z):
    """1 - theta is a factor of its step; a difference keeps nothing of it from z = 17 on."""
    torch.manual_seed(0)
    if name == "titans":
        m = NeuralMemory(16, 2, chunk=4)
        with torch.no_grad():
            m.bias[1] = z
    else:
        m = SelfModifyingTitans(16, 2, chunk=4, momentum=True)
        m.fused = name == "fused"
        torch.nn.init.constant_(m.b_theta, z)
    x = torch.randn(1, 9, 16)
    written = []
    for dtype in (torch.float32, torch.float64):
        m = m.to(dtype)
        m.zero_grad()
        _, state = m(x.to(dtype))
        state["momentum"][0].abs().sum().backward()  # whose squares would underflow
        rate = m.bias if name == "titans" else m.b_theta
        written.append((state["momentum"][0].detach().double(), rate.grad.double()))
    for got, expected in zip(*written, strict=True):
        close(got / expected.abs().max(), expected / expected.abs().max(), 1e-3)


def test_small_losses_keep_their_digits():
    table = torch.tensor([[30.0], [20.0], [-30.0]])
    x = torch.linspace(0.5, 3, 20)[:, None]
    targets = torch.zeros(20, dtype=torch.int64)
    for i in range(20):
        got = linear_cross_entropy(x[i : i + 1], table, targets[:1])
        expected = F.cross_entropy(x[i : i + 1].double() @ table.double().mT, targets[:1])
        assert abs(got - expected) < 2e-7 * (1 + expected)
