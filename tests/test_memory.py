"""What memory.py must be: one learning rule, and everything else a setting of it.

Every expected value is derived here, from the paper or from a model's own literature, never from memory.py:
`recurrence` is the rule as a loop over tokens, `written_by_autograd` is a memory network whose local gradients come
from torch.autograd instead of a hand-written backward pass, and every classical model stands in its own paper's form.
float64 and 1e-10 unless a test says otherwise. NL is arXiv 2512.24695; names and shapes are those of memory.py:
k, q [..., T, dk], u [..., T, dv], eta, alpha, theta [..., T], W, S [..., dv, dk].

    python -m pytest tests/test_memory.py
"""

import random
import re

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from baselines import delta_net, gated_delta_net, linear_attention, retention
from fused import decay
from memory import l2norm, read, scan, scan_stepwise, titans_linear, write

# ---------------------------------------------------------------------------------------------- oracles and helpers


def recurrence(W, k, u, eta, alpha, q=None, *, theta=None, S=None, delta=1.0):
    """The learning rule as matrices: S_t = theta S_{t-1} + eta (u k^T - delta W k k^T), W_t = alpha W_{t-1} + S_t."""
    T, delta = k.shape[-2], torch.as_tensor(delta, dtype=k.dtype)
    leading = [x.shape[:-2] for x in (W, k, u, q, S) if x is not None]
    leading += [x.shape[:-1] for x in (eta, alpha, theta, delta) if x is not None]
    W = W.expand(*torch.broadcast_shapes(*leading), *W.shape[-2:])
    if theta is not None:
        S = torch.zeros_like(W) if S is None else S.expand_as(W)

    def at(x, t):
        """A number per token, ready to multiply a matrix."""
        return x[..., t, None, None] if x.ndim else x

    outputs = []
    for t in range(T):
        k_t, u_t = k[..., t, :].unsqueeze(-1), u[..., t, :].unsqueeze(-1)
        step = at(eta, t) * (u_t @ k_t.mT) - at(eta, t) * at(delta, t) * (W @ (k_t @ k_t.mT))
        if theta is not None:
            step = S = at(theta, t) * S + step
        W = at(alpha, t) * W + step
        if q is not None:
            outputs.append((W @ q[..., t, :].unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, -2) if outputs else None, W, S


def problem(seed, batch=(2, 3), T=11, dk=4, dv=5, momentum=True, delta="tensor", q=True):
    """Random arguments of scan, with gradients. Steps reach 1 + alpha where the rule is stable; keys of any length."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*batch, *shape, generator=rng, dtype=torch.float64)

    def uniform(low, high):
        return low + (high - low) * torch.rand(*batch, T, generator=rng, dtype=torch.float64)

    alpha = uniform(0.3, 1.0)
    args = {
        "W": normal(dv, dk),
        "k": F.normalize(normal(T, dk), dim=-1) * uniform(0.5, 1.0)[..., None],
        "u": normal(T, dv),
        "eta": uniform(0.0, 1.0) * (1 + alpha if not momentum else 1),
        "alpha": alpha,
        "q": F.normalize(normal(T, dk), dim=-1) if q else None,
        "theta": uniform(0.0, 0.9) if momentum else None,
        "S": normal(dv, dk) if momentum else None,
        "delta": uniform(0.0, 1.0) if delta == "tensor" else delta,
    }
    return {name: x.requires_grad_() if torch.is_tensor(x) else x for name, x in args.items()}


def assert_close(ours, expected, tolerance=1e-10, what=""):
    """Largest difference, relative to the largest expected value where that exceeds 1."""
    if expected is None:
        assert ours is None, f"{what}: expected None"
        return
    assert ours.shape == expected.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(expected.shape)}"
    assert torch.isfinite(ours).all(), f"{what}: not finite"
    if expected.numel():
        gap = (ours.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1)
        assert gap <= tolerance, f"{what}: differs by {gap:.3g}"


def gradients(results, inputs, seed=0):
    """Gradients of one random weighted sum of all results."""
    rng = torch.Generator().manual_seed(seed)
    results = [x for x in results if x is not None]
    loss = sum((x.double() * torch.randn(x.shape, generator=rng, dtype=torch.float64)).sum() for x in results)
    return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)


def tensors(args):
    return {name: x for name, x in args.items() if torch.is_tensor(x)}


def assert_same_function(f, oracle, args, tolerance=1e-10, **options):
    """Equal outputs, equal states, equal gradients with respect to every tensor argument."""
    ours, expected = f(**args, **options), oracle(**args)
    for what, a, b in zip(("y", "W_T", "S_T"), ours, expected, strict=True):
        assert_close(a, b, tolerance, what)
    inputs = tensors(args)
    for name, a, b in zip(inputs, gradients(ours, inputs.values()), gradients(expected, inputs.values()), strict=True):
        assert_close(a, b, tolerance, f"gradient of {name}")


def central_differences(f, x, step=1e-5):
    """Gradient of the number f() with respect to the leaf x, entry by entry."""
    slope = torch.zeros_like(x)
    with torch.no_grad():
        for i in range(x.numel()):
            value = x.view(-1)[i].item()
            x.view(-1)[i] = value + step
            above = f()
            x.view(-1)[i] = value - step
            below = f()
            x.view(-1)[i] = value
            slope.view(-1)[i] = (above - below) / (2 * step)
    return slope


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def uniform(*shape, seed=0, low=0.0, high=1.0):
    return low + (high - low) * torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------- scan is the recurrence


@pytest.mark.parametrize("delta", [0, 1.0, 0.7, "tensor"])
@pytest.mark.parametrize("momentum", [False, True], ids=["plain", "momentum"])
@pytest.mark.parametrize("tile", [1, 5, 16, 64])
def test_scan_is_the_recurrence_for_random_shapes_in_outputs_states_and_all_gradients(tile, momentum, delta):
    pick = random.Random(f"{tile} {momentum} {delta}")
    for seed in range(2):
        batch = pick.choice([(), (3,), (2, 2)])
        shape = {"T": pick.randint(2, 37), "dk": pick.randint(1, 6), "dv": pick.randint(1, 7)}
        args = problem(seed, batch, momentum=momentum, delta=delta, **shape)
        assert_same_function(scan, recurrence, args, tile=tile)


@pytest.mark.parametrize("delta", [0.0, 1, 0.3, "tensor"])
@pytest.mark.parametrize("momentum", [False, True], ids=["plain", "momentum"])
def test_scan_stepwise_is_the_recurrence(momentum, delta):
    for seed, batch in enumerate([(), (2, 3)]):
        assert_same_function(scan_stepwise, recurrence, problem(seed, batch, T=9, momentum=momentum, delta=delta))


@pytest.mark.parametrize("T", [1, 63, 64, 65, 130])
def test_lengths_around_a_multiple_of_the_tile_are_no_special_case(T):
    assert_same_function(scan, recurrence, problem(T, (2,), T=T, dk=3, dv=2), tile=64)


@pytest.mark.parametrize("tile", [1, 4, 64])
@pytest.mark.parametrize("momentum", [False, True], ids=["plain", "momentum"])
def test_one_token_is_one_step(momentum, tile):
    assert_same_function(scan, recurrence, problem(3, T=1, momentum=momentum), tile=tile)


@pytest.mark.parametrize("momentum", [False, True], ids=["plain", "momentum"])
@pytest.mark.parametrize("f", [scan, scan_stepwise])
def test_without_q_nothing_is_read_and_the_states_are_the_same(f, momentum):
    args = problem(4, T=10, momentum=momentum, q=False)
    assert f(**args)[0] is None
    assert_same_function(f, recurrence, args)


@pytest.mark.parametrize("f", [scan, scan_stepwise])
def test_momentum_without_a_start_starts_at_zero(f):
    args = problem(5, T=10) | {"S": None}
    assert f(**args)[2].shape == args["W"].shape
    assert_same_function(f, lambda **a: recurrence(**a | {"S": torch.zeros_like(a["W"])}), args)


@pytest.mark.parametrize("f", [scan, scan_stepwise])
def test_without_theta_there_is_no_momentum_state(f):
    assert f(**problem(6, momentum=False))[2] is None


BROADCASTS = {
    "one start, one schedule for the batch": {"W": (), "S": (), "eta": (), "alpha": (), "theta": (), "delta": ()},
    "one start per head": {"W": (3,), "S": (3,), "eta": (2, 3), "alpha": (3,), "theta": (2, 1), "delta": (3,)},
    "keys shared by the batch": {"k": (), "u": (2, 3), "eta": (2, 1), "alpha": (1, 3), "W": (2, 1), "S": (1, 3)},
    "keys and values shared, many starts": {"k": (1, 3), "u": (3,), "eta": (), "alpha": (), "q": (2, 3), "theta": ()},
    "only q has a batch": dict.fromkeys(("W", "k", "u", "eta", "alpha", "theta", "S", "delta"), ()),
}


@pytest.mark.parametrize("momentum", [False, True], ids=["plain", "momentum"])
@pytest.mark.parametrize("case", BROADCASTS)
@pytest.mark.parametrize("f", [scan, scan_stepwise])
def test_leading_dimensions_broadcast_and_gradients_keep_the_shape_of_their_argument(f, case, momentum):
    args = problem(7, (2, 3), T=7, dk=2, dv=3, momentum=momentum)
    for name, batch in BROADCASTS[case].items():
        if args[name] is not None:
            index = tuple(0 for _ in range(2 - len(batch))) + tuple(slice(0, n) for n in batch)
            args[name] = args[name].detach()[index].clone().requires_grad_()
    ours, expected = f(**args), recurrence(**args)
    ours = [a if a is None else a.expand_as(b) for a, b in zip(ours, expected, strict=True)]
    assert_same_function(lambda **_: ours, recurrence, args)


def test_the_outputs_carry_the_broadcast_batch_even_when_the_start_does_not():
    args = problem(8, (2, 3), T=5, dk=2, dv=3)
    args["W"] = args["W"].detach()[0, 0]
    for f in (scan, scan_stepwise):
        y, W_T, S_T = f(**args)
        assert (y.shape, W_T.shape, S_T.shape) == ((2, 3, 5, 3), (2, 3, 3, 2), (2, 3, 3, 2))


@pytest.mark.parametrize("f", [scan, scan_stepwise])
def test_transposed_and_expanded_views_are_as_good_as_contiguous_tensors(f):
    args = problem(9, (2, 3), T=8, momentum=True)
    for name in ("k", "u", "q"):  # heads split off the last dimension, as every mixer does it
        args[name] = args[name].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    args["alpha"] = torch.tensor(0.9, dtype=torch.float64).expand(2, 3, 8)
    args["W"] = args["W"].detach().mT.contiguous().mT.requires_grad_()
    inputs = tensors({name: x for name, x in args.items() if name != "alpha"})
    ours, expected = f(**args), recurrence(**args)
    ours, expected = (*ours, *gradients(ours, inputs.values())), (*expected, *gradients(expected, inputs.values()))
    for a, b in zip(ours, expected, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("name", ["W", "k", "u", "eta", "alpha", "q", "theta", "S", "delta"])
def test_each_argument_gets_its_gradient_also_when_it_is_the_only_one_that_needs_it(name):
    args = problem(10, (2,), T=9, dk=3, dv=2)
    args = {other: x.detach().requires_grad_(other == name) for other, x in args.items()}
    (ours,) = gradients(scan(**args, tile=4), [args[name]])
    (expected,) = gradients(recurrence(**args), [args[name]])
    assert_close(ours, expected)


@pytest.mark.parametrize("momentum, result", [(False, 0), (False, 1), (True, 0), (True, 1), (True, 2)])
def test_a_loss_on_one_result_alone_has_the_right_gradients(momentum, result):
    args = problem(11, (2,), T=9, momentum=momentum)
    inputs = tensors(args)
    ours = gradients(scan(**args, tile=4)[result : result + 1], inputs.values())
    expected = gradients(recurrence(**args)[result : result + 1], inputs.values())
    for name, a, b in zip(inputs, ours, expected, strict=True):
        assert_close(a, b, what=name)


def test_without_gradients_the_values_are_the_same():
    args = problem(12, T=21)
    with torch.no_grad():
        for a, b in zip(scan(**args, tile=5), recurrence(**args), strict=True):
            assert_close(a, b)


def test_the_torch_backend_is_what_auto_takes_on_a_cpu():
    args = problem(13, T=21)
    assert_same_function(scan, recurrence, args, backend="torch", tile=5)
    for a, b in zip(scan(**args, backend="torch"), scan(**args, backend="auto"), strict=True):
        assert torch.equal(a, b)


def test_half_a_sequence_and_then_the_other_half_is_the_whole_sequence():
    args = problem(14, T=20)
    whole = scan(**args, tile=16)
    for cut in (1, 7, 16, 19):
        parts, state = [], {"W": args["W"], "S": args["S"]}
        for piece in (slice(None, cut), slice(cut, None)):
            now = {name: args[name][..., piece, :] for name in ("k", "u", "q")}
            now |= {name: args[name][..., piece] for name in ("eta", "alpha", "theta", "delta")}
            y, state["W"], state["S"] = scan(**now, **state, tile=16)
            parts.append(y)
        for a, b in zip((torch.cat(parts, -2), state["W"], state["S"]), whole, strict=True):
            assert_close(a, b)


def test_later_tokens_never_change_earlier_outputs():
    args = problem(15, T=20)
    before = scan(**args, tile=16)[0]
    with torch.no_grad():
        for name in ("k", "u", "q"):
            args[name][..., 12:, :] = 3.0
        for name in ("eta", "alpha", "theta", "delta"):
            args[name][..., 12:] = 0.5
    after = scan(**args, tile=16)[0]
    assert torch.equal(before[..., :12, :], after[..., :12, :])
    assert not torch.equal(before[..., 12:, :], after[..., 12:, :])


@pytest.mark.parametrize("eta", [1.0, 1.9])
def test_a_key_repeated_for_many_tiles_is_as_exact_as_any(eta):
    args = problem(17, (2,), T=150, momentum=False, delta=1.0)
    with torch.no_grad():
        args["k"][:] = unit(4)
        args["eta"][:], args["alpha"][:] = eta, 1.0
    assert_same_function(scan, recurrence, args, tile=64)


def test_a_memory_that_never_learns_only_forgets():
    args = problem(16, T=20, momentum=False) | {"eta": torch.zeros(2, 3, 20, dtype=torch.float64)}
    assert_close(scan(**args)[1], args["alpha"].prod(-1)[..., None, None] * args["W"])


# ------------------------------------------------------------------------------------ exact and finite at the edges


@pytest.mark.parametrize("case", ["1", "1e-6", "1e-6 or 1", "1, momentum", "1e-6, momentum"])
def test_4096_tokens_in_float32_with_this_alpha_stay_finite_and_near_float64(case):
    T = 4096
    args = problem(20, (2,), T=T, dk=8, dv=6, momentum=False, delta=1.0)
    args["k"], args["eta"] = F.normalize(args["k"].detach(), dim=-1), uniform(2, T, high=0.9)
    args["alpha"] = torch.full((2, T), 1e-6 if "1e-6" in case else 1.0, dtype=torch.float64)
    if "or" in case:
        args["alpha"][uniform(2, T, seed=1) < 0.5] = 1.0
    if "momentum" in case:
        args |= {"theta": uniform(2, T, seed=2, high=0.5), "S": normal(2, 6, 8), "eta": args["eta"] / 3}
    single = {name: x.detach().float().requires_grad_() for name, x in tensors(args).items()}
    # the oracle starts from the same rounded numbers, so only the arithmetic differs
    double = {name: x.detach().double().requires_grad_() for name, x in single.items()}
    ours, expected = scan(**single), scan_stepwise(**double)
    for what, a, b in zip(("y", "W_T", "S_T"), ours, expected, strict=True):
        assert a is None or a.dtype == torch.float32
        assert_close(a, b, 1e-5, what)
    ours, expected = gradients(ours, single.values()), gradients(expected, double.values())
    for name, a, b in zip(single, ours, expected, strict=True):
        assert_close(a, b, 1e-5, f"gradient of {name}")


@pytest.mark.parametrize("delta", [0.0, 1.0, "tensor"])
@pytest.mark.parametrize("where", ["everywhere", "at some positions", "at the start", "at the end"])
def test_theta_zero_is_exact_with_the_right_gradients(where, delta):
    args = problem(21, T=21, delta=delta)
    zeros = {"everywhere": slice(None), "at some positions": [3, 4, 5, 11, 16], "at the start": [0], "at the end": [20]}
    with torch.no_grad():
        args["theta"][..., zeros[where]] = 0.0
    assert_same_function(scan, recurrence, args, tile=5)


def test_theta_zero_everywhere_is_the_rule_without_momentum():
    args = problem(22, T=21) | {"theta": torch.zeros(2, 3, 21, dtype=torch.float64)}
    with_zero, without = scan(**args), scan(**args | {"theta": None, "S": None})
    assert_close(with_zero[0], without[0])
    assert_close(with_zero[1], without[1])


@pytest.mark.parametrize("alpha", [1.0, 1e-6, 1e-300, 0.0])
@pytest.mark.parametrize("momentum", [False, True], ids=["plain", "momentum"])
def test_extreme_retention_is_exact_with_the_right_gradients(momentum, alpha):
    args = problem(23, T=21, momentum=momentum)
    with torch.no_grad():
        args["alpha"][..., 4:] = alpha  # runs of it, behind ordinary values
        args["alpha"][..., 12:14] = 0.9
    assert_same_function(scan, recurrence, args, tile=16)


def assert_twice_differentiable(f, inputs):
    assert gradcheck(f, inputs)
    assert gradgradcheck(f, inputs)


def positional(f, args, **options):
    """f as a function of its tensors in a row, without the results that are None, as gradcheck wants it."""
    return lambda *x: tuple(r for r in f(**dict(zip(args, x, strict=True)), **options) if r is not None)


@pytest.mark.parametrize("theta_zero", [False, True], ids=["", "theta 0"])
def test_gradcheck_and_gradgradcheck_of_scan(theta_zero):
    args = problem(30, (), T=3, dk=2, dv=2)
    if theta_zero:
        with torch.no_grad():
            args["theta"][1] = 0.0
    assert_twice_differentiable(positional(scan, args, tile=2), tuple(args.values()))


def test_gradcheck_and_gradgradcheck_of_scan_without_momentum_with_shared_starts():
    args = tensors(problem(32, (2,), T=3, dk=2, dv=1, momentum=False))
    args |= {name: args[name].detach()[0].clone().requires_grad_() for name in ("W", "alpha")}
    assert_twice_differentiable(positional(scan, args, tile=2), tuple(args.values()))


# ---------------------------------------------------------------------------------------------------- decay, l2norm


def products(alpha):
    """decay, entry by entry."""
    C = alpha.shape[-1]
    P = torch.zeros(*alpha.shape[:-1], C + 1, C + 1, dtype=alpha.dtype)
    for t in range(C + 1):
        for s in range(t + 1):
            P[..., t, s] = alpha[..., s:t].prod(-1)
    return P


@pytest.mark.parametrize("C", [1, 2, 7])
def test_decay_holds_the_product_between_any_two_positions(C):
    for batch in ((), (2, 3)):
        alpha = uniform(*batch, C, seed=C)
        P = decay(alpha)
        assert_close(P, products(alpha), 1e-15)
        assert torch.equal(P, P.tril()), "the future must weigh exactly nothing"
        assert torch.equal(P.diagonal(dim1=-2, dim2=-1), torch.ones(*batch, C + 1, dtype=torch.float64))


def test_decay_is_relatively_exact_in_float32_from_tiny_to_one():
    alpha = torch.tensor([1.0, 1e-6, 1.0, 0.5, 1e-6, 1e-6, 1.0, 1e-6, 0.999999])
    ours, exact = decay(alpha).double(), products(alpha.double())
    assert ((ours - exact).abs() <= 1e-6 * exact).all()


def test_decay_has_finite_gradients_over_many_tiny_factors():
    alpha = torch.full((2, 128), 1e-6, requires_grad=True)
    decay(alpha).sum().backward()
    # d/d alpha_i of the sum is 1 for the product of alpha_i alone, plus terms of 1e-6 and less
    assert_close(alpha.grad, torch.ones_like(alpha), 1e-5)


@pytest.mark.parametrize("zeros", [[], [2], [1, 2], [0, 3], [0, 1, 2, 3]], ids=str)
def test_gradcheck_and_gradgradcheck_of_decay_at_zeros(zeros):
    alpha = uniform(4, seed=1, low=0.2)
    alpha[zeros] = 0.0
    assert_close(decay(alpha), products(alpha), 1e-15)
    assert_twice_differentiable(decay, alpha.requires_grad_())


def test_l2norm_keeps_directions_has_unit_length_and_survives_zero():
    x = normal(3, 4, 5, seed=1).requires_grad_()
    assert_close(l2norm(x), x / x.norm(dim=-1, keepdim=True), 1e-4)
    assert (l2norm(x).norm(dim=-1) <= 1).all()
    zero = torch.zeros(5, requires_grad=True)
    l2norm(zero).sum().backward()
    assert torch.equal(l2norm(zero), torch.zeros(5)) and torch.isfinite(zero.grad).all()
    assert gradcheck(l2norm, x.detach()[0].requires_grad_())


# -------------------------------------------------------- the classical models, each in the form of its own literature


def qkv(seed=40, T=23):
    return unit(2, 3, T, 4, seed=seed), unit(2, 3, T, 4, seed=seed + 1), normal(2, 3, T, 5, seed=seed + 2)


def matrices(k, v, step):
    """The textbook loop of every matrix-valued memory: M <- step(t, M, k_t as column, v_t as column)."""
    M, history = torch.zeros(2, 3, 5, 4, dtype=torch.float64), []
    for t in range(k.shape[-2]):
        M = step(t, M, k[..., t, :, None], v[..., t, :, None])
        history.append(M)
    return torch.stack(history, -3)


def assert_model(result, history, q):
    """The reads are M_t q_t and the state is the last M."""
    assert_close(result[0], (history @ q[..., None]).squeeze(-1))
    assert_close(result[1], history[..., -1, :, :])


def test_linear_attention_is_the_causal_sum_of_values_weighted_by_key_query_products():
    q, k, v = qkv()
    y, W_T, *_ = linear_attention(q, k, v)
    assert_close(y, (q @ k.mT).tril() @ v)  # Katharopoulos et al. 2020, unnormalised, no feature map (NL 14-18)
    assert_close(W_T, torch.einsum("bhtv,bhtk->bhvk", v, k))


def test_retention_is_retnets_parallel_form_with_its_decay_matrix():
    q, k, v = qkv()
    gamma = (1 - 2.0 ** (-5 - torch.arange(3, dtype=torch.float64)))[:, None]  # one fixed number per head, RetNet eq. 8
    n = torch.arange(23)
    D = torch.where(n[:, None] >= n, gamma[..., None] ** (n[:, None] - n).clamp(min=0), 0.0)
    y, W_T, *_ = retention(q, k, v, gamma)
    assert_close(y, ((q @ k.mT) * D) @ v)
    assert_close(W_T, torch.einsum("bhtv,bhtk,ht->bhvk", v, k, D[:, -1]))


def test_mamba_2_is_a_setting_of_scan():
    q, k, v = qkv()  # C, B, x of the Mamba-2 paper
    dt, A = uniform(2, 3, 23, seed=1), -uniform(3, 1, seed=2, low=0.5, high=4.0)
    logs = (dt * A).cumsum(-1)  # state space duality: y = (L o C B^T) (dt x), L[t, s] = exp(sum_{s < i <= t} dt_i A)
    L = (logs[..., :, None] - logs[..., None, :]).exp().tril()
    W = torch.zeros(5, 4, dtype=torch.float64)
    y, _, _ = scan(W, k, v, dt, (dt * A).exp(), q, delta=0.0, tile=16)
    assert_close(y, (L * (q @ k.mT)) @ (dt[..., None] * v))


def test_delta_net_is_its_householder_product_form():
    q, k, v = qkv()
    beta, eye = uniform(2, 3, 23, seed=3), torch.eye(4, dtype=torch.float64)
    b = beta[..., None, None]

    def step(t, M, k, v):
        return M @ (eye - b[:, :, t] * k @ k.mT) + b[:, :, t] * v @ k.mT

    assert_model(delta_net(q, k, v, beta), matrices(k, v, step), q)


def test_gated_delta_net_forgets_before_it_corrects():
    q, k, v = qkv()
    beta, alpha, eye = uniform(2, 3, 23, seed=3), uniform(2, 3, 23, seed=4), torch.eye(4, dtype=torch.float64)
    b, a = beta[..., None, None], alpha[..., None, None]

    def step(t, M, k, v):
        return M @ (a[:, :, t] * (eye - b[:, :, t] * k @ k.mT)) + b[:, :, t] * v @ k.mT

    assert_model(gated_delta_net(q, k, v, beta, alpha), matrices(k, v, step), q)


@pytest.mark.parametrize("chunk", [1, 4, 23, 64])
def test_titans_with_a_matrix_memory_is_its_loop_over_surprise_and_momentum(chunk):
    q, k, v = qkv()
    eta, theta = uniform(2, 3, 23, seed=3, high=0.2), uniform(2, 3, 23, seed=4)
    alpha = uniform(2, 3, 23, seed=5, low=0.5)
    M = S = torch.zeros(2, 3, 5, 4, dtype=torch.float64)
    reads = []
    for t in range(23):
        if t % chunk == 0:
            weights = M.clone().requires_grad_()  # the boundary, kept for the whole chunk
        loss = 0.5 * ((weights @ k[..., t, :, None] - v[..., t, :, None]) ** 2).sum()
        (surprise,) = torch.autograd.grad(loss, weights)
        S = theta[..., t, None, None] * S - eta[..., t, None, None] * surprise
        M = alpha[..., t, None, None] * M + S
        reads.append(M @ q[..., t, :, None])
    y, W_T, S_T = titans_linear(q, k, v, eta, theta, alpha, chunk)
    assert_close(y, torch.stack(reads, -3).squeeze(-1))
    assert_close(W_T, M)
    assert_close(S_T, S)


def classical(name, q, k, v, **state):
    """Every classical model with rates made from its inputs."""
    beta, alpha, theta = k[..., 0].sigmoid(), v[..., 0].sigmoid(), q[..., 0].sigmoid()
    if name == "linear_attention":
        return linear_attention(q, k, v, **state)
    if name == "retention":
        return retention(q, k, v, torch.tensor([[0.9], [0.8], [1.0]], dtype=torch.float64), **state)
    if name == "delta_net":
        return delta_net(q, k, v, beta, **state)
    if name == "gated_delta_net":
        return gated_delta_net(q, k, v, beta, alpha, **state)
    return titans_linear(q, k, v, 0.2 * beta, theta, alpha, 4, **state)


CLASSICAL = ["linear_attention", "retention", "delta_net", "gated_delta_net", "titans_linear"]


@pytest.mark.parametrize("name", CLASSICAL)
def test_every_classical_model_continues_from_its_state(name):
    q, k, v = qkv(T=20)
    y, *whole = classical(name, q, k, v)
    first, *state = classical(name, *(x[..., :8, :] for x in (q, k, v)))  # 8 is a chunk boundary of Titans, too
    state = {letter: x for letter, x in zip("WS", state, strict=False) if x is not None}
    second, *rest = classical(name, *(x[..., 8:, :] for x in (q, k, v)), **state)
    for a, b in zip((torch.cat([first, second], -2), *rest), (y, *whole), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("name", CLASSICAL)
def test_every_classical_model_is_differentiable(name):
    q, k, v = (x[:1, :, :5, :2].clone().requires_grad_() for x in qkv())
    W = normal(3, 2, 2).requires_grad_()
    assert gradcheck(lambda q, k, v, W: classical(name, q, k, v, W=W)[0], (q, k, v, W))


# ------------------------------------------------------------------------ what one write does: DGD and its stability


def test_delta_gradient_descent_lands_on_the_minimiser_for_keys_of_any_length():
    """NL 56: argmin_W 1/2 ||W x - u||^2 + 1/(2 eta) ||W - W_t||^2, so W (x x^T + I / eta) = u x^T + W_t / eta."""
    x, u, W = normal(50, 4, seed=1) * uniform(50, 1, high=5.0), normal(50, 3, seed=2), normal(50, 3, 4, seed=3)
    eta = 10 ** uniform(50, low=-2, high=2)
    A = x[:, :, None] * x[:, None, :] + torch.eye(4, dtype=torch.float64) / eta[:, None, None]
    B = u[:, :, None] * x[:, None, :] + W / eta[:, None, None]
    minimiser = torch.linalg.solve(A, B, left=False)
    bounded = eta / (1 + eta * x.square().sum(-1))
    _, W_T, _ = scan(W, x[:, None], u[:, None], bounded[:, None], torch.ones(50, 1, dtype=torch.float64))
    assert_close(W_T, minimiser)


def test_delta_rule_step_is_the_running_gradient_step_of_the_l2_objective():
    k, v, W = unit(1, 4, seed=1), normal(1, 3, seed=2), normal(3, 4, seed=3).requires_grad_()
    eta, alpha = torch.tensor([[0.7], [0.9]], dtype=torch.float64)
    (slope,) = torch.autograd.grad(0.5 * ((W @ k[0] - v[0]) ** 2).sum(), W)
    assert_close(scan(W, k, v, eta, alpha)[1], 0.9 * W - 0.7 * slope)


def test_with_unit_step_the_delta_rule_recalls_what_was_just_written():
    args = problem(51, T=30, momentum=False, delta=1.0)
    k = F.normalize(args["k"].detach(), dim=-1)
    ones = torch.ones(30, dtype=torch.float64)
    y, _, _ = scan(args["W"], k, args["u"], ones, ones, q=k, tile=16)
    assert_close(y, args["u"])


@pytest.mark.parametrize("model", ["write", "titans_linear"])
def test_frozen_gradients_with_step_a_tenth_converge_at_chunk_16_and_explode_at_chunk_64(model):
    """A repeated key: each chunk multiplies the error by 1 - 0.1 * chunk, which is -0.6 at 16 and -5.4 at 64."""
    for chunk, factor in ((16, -0.6), (64, -5.4)):
        T = 16 * chunk
        k, v = unit(1, 4).expand(T, 4), torch.tensor([[2.0, -1.0, 0.5, 1.0]]).double().expand(T, 4)
        eta, zeros, ones = torch.tensor([[0.1], [0.0], [1.0]], dtype=torch.float64).expand(3, T)
        if model == "titans_linear":
            _, W, _ = titans_linear(k, k, v, eta, zeros, ones, chunk)
        else:
            layers = [torch.zeros(4, 4, dtype=torch.float64)]
            for i in range(0, T, chunk):
                c = slice(i, i + chunk)
                _, layers, _ = write(layers, k[c], v[c], eta[c], ones[c], delta=0.0, residual=False)
            (W,) = layers
        error = W @ k[0] - v[0]
        assert_close(error / v[0].norm(), -(factor**16) * v[0] / v[0].norm(), 1e-8)
        assert error.norm() < 1e-2 if chunk == 16 else error.norm() > 1e9


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_printed_form_of_nl_93_flips_between_one_and_zero_and_ours_reads_one_and_stays(chunk):
    key, one = torch.ones(chunk, 1, dtype=torch.float64), torch.ones(chunk, dtype=torch.float64)
    printed, ours = torch.zeros(1, 1, dtype=torch.float64), [torch.zeros(1, 1, dtype=torch.float64)]
    reads_printed, reads_ours = [], []
    for _ in range(4):
        # NL 93: M_t = M_{t-1} (alpha - eta k k^T) - eta (M_boundary k - v) k^T removes M k once by each term
        _, printed, _ = scan(printed, key, key - key @ printed.mT, one, one)
        _, ours, _ = write(ours, key, key, one, one, residual=False)
        reads_printed.append(printed.item())
        reads_ours.append(ours[0].item())
    assert reads_printed == [1, 0, 1, 0]
    assert reads_ours == [1, 1, 1, 1]


# ------------------------------------------------------------------------------------------------- memory networks

SHAPES = {  # depth, residual
    "matrix": (1, False),
    "residual matrix": (1, True),
    "residual MLP": (2, True),
    "residual MLP of 3 layers": (3, True),
    "MLP without residual": (2, False),
}

OBJECTIVES = {
    "dot": lambda m, v: -(m * v).sum(),
    "l2": lambda m, v: 0.5 * (m - v).square().sum(),
    "huber": lambda m, v: F.huber_loss(m, v, reduction="sum", delta=1.0),
    "lp": lambda m, v: (m - v).abs().pow(3).sum() / 3,
}


def network(depth, batch=(2,), d=3, hidden=4, d_out=3, seed=60):
    widths = [d] + [hidden] * (depth - 1) + [d_out]
    shapes = [(widths[n + 1], widths[n]) for n in range(depth)]
    return [(normal(*batch, *s, seed=seed + n) / s[1] ** 0.5).requires_grad_() for n, s in enumerate(shapes)]


def chunk_of_data(T=7, batch=(2,), d=3, d_out=3, seed=70):
    data = {
        "k": unit(*batch, T, d, seed=seed),
        "target": 2 * normal(*batch, T, d_out, seed=seed + 1),  # far enough to reach both branches of Huber
        "eta": uniform(*batch, T, seed=seed + 2),
        "alpha": uniform(*batch, T, seed=seed + 3, low=0.5),
        "q": unit(*batch, T, d, seed=seed + 4),
    }
    return {name: x.requires_grad_() for name, x in data.items()}


def network_outputs(layers, x):
    """Every layer's input and output: x_1 = x, x_l = silu(W_{l-1} x_{l-1})."""
    inputs, outputs = [], []
    for n, W in enumerate(layers):
        inputs.append(x if n == 0 else F.silu(outputs[-1]))
        outputs.append((W.unsqueeze(-3) @ inputs[-1].unsqueeze(-1)).squeeze(-1))
    return inputs, outputs


def written_by_autograd(
    layers,
    k,
    target,
    eta,
    alpha,
    q=None,
    *,
    theta=None,
    momentum=None,
    delta=1.0,
    objective="l2",
    residual=True,
    mode="token",
):
    """One chunk write with autograd's gradients at the boundary weights, and the weights after every single token."""
    inputs, outputs = network_outputs(layers, k)
    surprise = OBJECTIVES[objective](outputs[-1] + k if residual else outputs[-1], target)
    local_gradients = torch.autograd.grad(surprise, outputs, create_graph=True)
    running, moments = [], []
    for n, (W, x, g) in enumerate(zip(layers, inputs, local_gradients, strict=True)):
        u = -g
        if n == len(layers) - 1 and objective == "l2" and delta == 1:
            u = target - k if residual else target
        step = eta if n == 0 else eta / (1 + eta * x.square().sum(-1))
        S = momentum[n] if momentum is not None else None if theta is None else torch.zeros_like(W)
        history = []
        for t in range(k.shape[-2]):
            now = slice(t, t + 1)
            rule = {"theta": None if theta is None else theta[..., now], "S": S, "delta": delta}
            _, W, S = recurrence(W, x[..., now, :], u[..., now, :], step[..., now], alpha[..., now], **rule)
            history.append(W)
        running.append(torch.stack(history, -3))
        moments.append(S)
    y = None
    if q is not None:
        h = q
        for n, W in enumerate(running):
            h = F.silu(h) if n else h
            W = W if mode == "token" else layers[n].unsqueeze(-3)
            h = (W @ h.unsqueeze(-1)).squeeze(-1)
        y = q + h if residual else h
    return y, [W[..., -1, :, :] for W in running], moments if theta is not None else None


def flat(result):
    y, layers, momentum = result
    return [y, *layers, *(momentum or [])]


def assert_same_write(layers, data, **options):
    ours, expected = write(layers, **data, **options), written_by_autograd(layers, **data, **options)
    assert (ours[2] is None) == (expected[2] is None)
    ours, expected = flat(ours), flat(expected)
    for a, b in zip(ours, expected, strict=True):
        assert_close(a, b)
    inputs = [*layers, *(options.get("momentum") or []), *(x for x in data.values() if torch.is_tensor(x))]
    if options.get("theta") is not None:
        inputs.append(options["theta"])
    for n, (a, b) in enumerate(zip(gradients(ours, inputs), gradients(expected, inputs), strict=True)):
        assert_close(a, b, what=f"gradient of input {n}")


@pytest.mark.parametrize("memory", SHAPES)
def test_read_runs_the_network(memory):
    depth, residual = SHAPES[memory]
    layers, x = network(depth), unit(2, 7, 3)
    h = network_outputs(layers, x)[1][-1]
    assert_close(read(layers, x, residual), x + h if residual else h)
    if residual:
        assert_close(read(layers, x), x + h)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("delta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("memory", SHAPES)
def test_write_is_autograds_local_gradients_into_the_recurrence(memory, delta, objective):
    depth, residual = SHAPES[memory]
    for mode in ("token", "boundary"):
        options = {"objective": objective, "delta": delta, "residual": residual, "mode": mode}
        assert_same_write(network(depth), chunk_of_data(T=5), **options)


@pytest.mark.parametrize("memory", SHAPES)
def test_write_with_momentum_keeps_one_momentum_per_layer(memory):
    depth, residual = SHAPES[memory]
    theta = uniform(2, 5, seed=80, high=0.9).requires_grad_()
    momentum = [S.detach().requires_grad_() for S in network(depth, seed=90)]
    for delta in (0.0, 1.0):
        for start in (None, momentum):
            options = {"residual": residual, "delta": delta, "theta": theta, "momentum": start}
            assert_same_write(network(depth), chunk_of_data(T=5), **options)


def test_write_of_layers_shared_by_a_batch_gives_every_row_its_own_weights():
    layers, data = network(2, batch=(3,)), chunk_of_data(T=5, batch=(2, 3))
    _, after, _ = write(layers, **data)
    assert [W.shape for W in after] == [(2, 3, 4, 3), (2, 3, 3, 4)]
    assert_same_write(layers, data)


def test_write_to_another_width_is_possible_without_the_residual():
    for depth in (1, 2):
        assert_same_write(network(depth, d_out=2), chunk_of_data(T=5, d_out=2), residual=False)


@pytest.mark.parametrize("depth", [1, 2])
def test_write_without_q_only_writes(depth):
    data = chunk_of_data(T=5) | {"q": None}
    assert write(network(depth), **data)[0] is None
    assert_same_write(network(depth), data)


def test_the_defaults_of_write_are_l2_delta_rule_residual_and_token_reads():
    layers, data = network(2), chunk_of_data()
    explicit = write(layers, **data, delta=1.0, objective="l2", residual=True, mode="token")
    for a, b in zip(write(layers, **data)[1], explicit[1], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(write(layers, **data)[0], explicit[0])


def test_boundary_reads_see_only_the_weights_before_the_chunk():
    layers, data = network(2), chunk_of_data()
    assert_close(write(layers, **data, mode="boundary")[0], read(layers, data["q"]))


def test_the_last_token_read_sees_exactly_the_weights_that_are_handed_on():
    for depth in (1, 2, 3):
        data = chunk_of_data()
        y, after, _ = write(network(depth), **data)
        assert_close(y[..., -1:, :], read(after, data["q"][..., -1:, :]))


def test_tokens_of_one_chunk_see_each_other_and_never_the_future():
    layers, data = network(2), {name: x.detach() for name, x in chunk_of_data(T=8).items()}
    changed = {name: x.clone() for name, x in data.items()}
    for name in ("k", "target", "q"):
        changed[name][..., 4, :] += 1.0
    for name in ("eta", "alpha"):
        changed[name][..., 4] *= 0.5
    before, after = write(layers, **data)[0], write(layers, **changed)[0]
    assert torch.equal(before[..., :4, :], after[..., :4, :])
    assert ((before - after)[..., 5:, :].abs() > 1e-6).any(-1).all()


def test_a_matrix_under_l2_and_the_delta_rule_does_not_depend_on_the_chunk():
    for residual in (False, True):
        data = chunk_of_data(T=12)
        expected, reads, layers = write(network(1), **data, residual=residual), [], network(1)
        for i in range(0, 12, 3):
            now = slice(i, i + 3)
            piece = {name: data[name][..., now, :] for name in ("k", "target", "q")}
            piece |= {name: data[name][..., now] for name in ("eta", "alpha")}
            y, layers, _ = write(layers, **piece, residual=residual)
            reads.append(y)
        assert_close(torch.cat(reads, -2), expected[0])
        assert_close(layers[0], expected[1][0])


@pytest.mark.parametrize("mode", ["token", "boundary"])
@pytest.mark.parametrize("delta", [0.0, 1.0])
@pytest.mark.parametrize("memory", SHAPES)
def test_a_chunk_written_in_pieces_is_the_chunk_written_at_once(memory, delta, mode):
    """`running` carries the weights inside a chunk; gradients stay those of the boundary."""
    depth, residual = SHAPES[memory]
    boundary, data, theta = network(depth), chunk_of_data(T=8), uniform(2, 8, seed=80, high=0.9)
    options = {"residual": residual, "delta": delta, "mode": mode}
    expected = write(boundary, **data, theta=theta, **options)
    running = momentum = None
    reads = []
    for now in (slice(0, 3), slice(3, 4), slice(4, 8)):
        piece = {name: data[name][..., now, :] for name in ("k", "target", "q")}
        piece |= {name: data[name][..., now] for name in ("eta", "alpha")} | {"theta": theta[..., now]}
        y, running, momentum = write(boundary, **piece, momentum=momentum, running=running, **options)
        reads.append(y)
    ours, expected = flat((torch.cat(reads, -2), running, momentum)), flat(expected)
    for a, b in zip((*ours, *gradients(ours, boundary)), (*expected, *gradients(expected, boundary)), strict=True):
        assert_close(a, b)


def test_a_matrix_written_by_the_dot_objective_is_linear_attention_and_by_l2_is_delta_net():
    q, k, v = qkv()
    ones, beta = torch.ones(2, 3, 23, dtype=torch.float64), uniform(2, 3, 23, seed=3)
    start = [torch.zeros(5, 4, dtype=torch.float64)]
    hebb = write(start, k, v, ones, ones, q, delta=0.0, objective="dot", residual=False)
    assert_close(hebb[0], (q @ k.mT).tril() @ v)
    eye, b = torch.eye(4, dtype=torch.float64), beta[..., None, None]

    def step(t, M, k, v):
        return M @ (eye - b[:, :, t] * k @ k.mT) + b[:, :, t] * v @ k.mT

    y, (W_T,), _ = write(start, k, v, beta, ones, q, residual=False)
    assert_model((y, W_T), matrices(k, v, step), q)


@pytest.mark.parametrize("depth", [2, 3])
def test_every_inner_layer_lands_on_the_minimiser_of_its_own_objective(depth):
    """NL 56 layer by layer: the key is what the layer saw, the target is minus the local gradient at its output."""
    layers, data = network(depth), chunk_of_data(T=1) | {"alpha": torch.ones(2, 1, dtype=torch.float64), "q": None}
    data["eta"] = torch.tensor([[0.3], [30.0]]).double()
    inputs, outputs = network_outputs(layers, data["k"])
    local = torch.autograd.grad(OBJECTIVES["huber"](outputs[-1] + data["k"], data["target"]), outputs)
    _, after, _ = write(layers, **data, objective="huber")
    for W, W_T, x, g in list(zip(layers, after, inputs, local, strict=True))[1:]:
        A = x.mT @ x + torch.eye(x.shape[-1], dtype=torch.float64) / data["eta"][..., None]
        B = -g.mT @ x + W / data["eta"][..., None]
        assert_close(W_T, torch.linalg.solve(A, B, left=False))


@pytest.mark.parametrize("mode", ["token", "boundary"])
@pytest.mark.parametrize("memory", SHAPES)
def test_the_outer_gradient_reaches_the_start_of_every_layer_through_two_writes(memory, mode):
    depth, residual = SHAPES[memory]
    layers = network(depth, batch=())
    chunks = [{name: x.detach() for name, x in chunk_of_data(T=4, seed=seed).items()} for seed in (100, 110)]

    def outer_loss():
        now, loss = layers, 0.0
        for data in chunks:
            y, now, _ = write(now, **data, residual=residual, mode=mode)
            loss = loss + (y - data["target"]).square().mean()
        return loss + sum(W.square().mean() for W in now)

    slopes = torch.autograd.grad(outer_loss(), layers)
    for W, slope in zip(layers, slopes, strict=True):
        assert slope.abs().max() > 1e-4
        assert_close(slope, central_differences(lambda: outer_loss().item(), W), 1e-7)


def test_gradcheck_and_gradgradcheck_of_write():
    layers = network(2, batch=(), d=2, hidden=2, d_out=2)
    data = {name: x.detach().requires_grad_() for name, x in chunk_of_data(T=2, batch=(), d=2, d_out=2).items()}

    def f(W1, W2, k, target, eta, alpha, q):
        y, after, _ = write([W1, W2], k, target, eta, alpha, q)
        return (y, *after)

    inputs = (*layers, *data.values())
    assert_twice_differentiable(f, inputs)


# -------------------------------------------------------------------------------------------- states are values


def calls():
    args, layers, data, (q, k, v) = problem(120, T=9), network(2), chunk_of_data(), qkv()
    rates = [uniform(2, 3, 23, seed=s).requires_grad_() for s in (1, 2, 3)]
    start = normal(2, 3, 5, 4).requires_grad_()
    theta, momentum = uniform(2, 7, seed=80).requires_grad_(), network(2, seed=90)
    plain = {name: x for name, x in args.items() if name not in ("theta", "S")}
    return {
        "scan": (lambda: scan(**args, tile=4), list(args.values())),
        "scan without momentum": (lambda: scan(**plain), list(plain.values())),
        "scan_stepwise": (lambda: scan_stepwise(**args), list(args.values())),
        "decay": (lambda: [decay(rates[0])], rates[:1]),
        "l2norm": (lambda: [l2norm(k)], [k]),
        "read": (lambda: [read(layers, data["q"])], [*layers, data["q"]]),
        "write": (
            lambda: flat(write(layers, **data, theta=theta, momentum=momentum)),
            [*layers, *data.values(), theta, *momentum],
        ),
        "linear_attention": (lambda: linear_attention(q, k, v, W=start), [q, k, v, start]),
        "retention": (lambda: retention(q, k, v, rates[0], W=start), [q, k, v, rates[0], start]),
        "delta_net": (lambda: delta_net(q, k, v, rates[0], W=start), [q, k, v, rates[0], start]),
        "gated_delta_net": (lambda: gated_delta_net(q, k, v, *rates[:2], W=start), [q, k, v, *rates[:2], start]),
        "titans_linear": (lambda: titans_linear(q, k, v, *rates, 4, W=start, S=start), [q, k, v, *rates, start]),
    }


@pytest.mark.parametrize("grad", [True, False], ids=["with gradients", "without"])
@pytest.mark.parametrize("name", calls())
def test_states_are_values_nothing_is_written_in_place(name, grad):
    f, inputs = calls()[name]
    copies, versions = [x.detach().clone() for x in inputs], [x._version for x in inputs]
    with torch.set_grad_enabled(grad):
        results = [x for x in f() if x is not None]
    if grad and any(x.requires_grad for x in inputs):
        sum(x.sum() for x in results).backward()
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))
    assert [x._version for x in inputs] == versions


def test_a_write_leaves_the_given_lists_as_they_are():
    layers, momentum = network(2), network(2, seed=90)
    before = [*layers], [*momentum]
    _, after, moments = write(layers, **chunk_of_data(), theta=uniform(2, 7), momentum=momentum)
    assert after is not layers and moments is not momentum
    assert all(a is b for a, b in zip(layers + momentum, before[0] + before[1], strict=True))


# ------------------------------------------------------------------------------------------------------- bad input


def assert_refused(f, *words, **options):
    """A ValueError whose message has every word: an argument's name, a shape as `2, 8`, a legal value."""
    with pytest.raises(ValueError) as info:
        f(**options)
    for word in words:
        assert re.search(rf"(?<!\w){re.escape(str(word))}(?!\w)", str(info.value)), f"{word!r} not in: {info.value}"


WRONG_SHAPES = {  # scan's arguments at batch (2,), T = 11, dk = 4, dv = 5
    "eta of another length": ("eta", (2, 12)),
    "eta of another length without batch": ("eta", (12,)),
    "eta with a last dimension too many": ("eta", (2, 11, 5)),
    "eta of another batch": ("eta", (3, 11)),
    "alpha of another length": ("alpha", (2, 7)),
    "theta of another length": ("theta", (2, 7)),
    "delta of another length": ("delta", (2, 9)),
    "delta of another batch": ("delta", (7, 11)),
    "k wider than the memory": ("k", (2, 11, 6)),
    "q wider than the memory": ("q", (2, 11, 6)),
    "q of another length": ("q", (2, 9, 4)),
    "u wider than the memory": ("u", (2, 11, 6)),
    "u of another length": ("u", (2, 9, 5)),
    "S unlike W": ("S", (2, 4, 5)),
}


@pytest.mark.parametrize("case", WRONG_SHAPES)
@pytest.mark.parametrize("f", [scan, scan_stepwise])
def test_a_wrong_shape_is_refused_by_name_and_shape(f, case):
    name, shape = WRONG_SHAPES[case]
    args = problem(130, (2,)) | {name: torch.ones(shape, dtype=torch.float64)}
    assert_refused(f, name, ", ".join(map(str, shape)), **args)


@pytest.mark.parametrize("f", [scan, scan_stepwise])
def test_momentum_state_without_theta_is_refused(f):
    assert_refused(f, "S", "theta", **problem(131) | {"theta": None})


def test_a_tile_below_one_and_an_unknown_backend_are_refused_with_the_legal_values():
    for tile in (0, -3):
        assert_refused(scan, "tile", tile, **problem(132), tile=tile)
    assert_refused(scan, "backend", "cuda", "auto", "torch", **problem(132), backend="cuda")


def test_titans_refuses_a_chunk_below_one():
    q, k, v = qkv()
    rate = uniform(2, 3, 23)
    assert_refused(titans_linear, "chunk", 0, q=q, k=k, v=v, eta=rate, theta=rate, alpha=rate, chunk=0)


@pytest.mark.parametrize("length", [9, 30])
@pytest.mark.parametrize(
    "model, rates, options",
    [
        (retention, ["alpha"], {}),
        (delta_net, ["beta"], {}),
        (gated_delta_net, ["beta", "alpha"], {}),
        (titans_linear, ["eta", "theta", "alpha"], {"chunk": 4}),
        (titans_linear, ["eta", "theta", "alpha"], {"chunk": 23}),
    ],
)
def test_classical_models_refuse_rates_of_another_length(model, rates, options, length):
    q, k, v = qkv()
    for rate in rates:
        given = dict.fromkeys(rates, uniform(2, 3, 23)) | {rate: uniform(2, 3, length)}
        # by shape only: a model may hand its rate on to scan under scan's name for it
        assert_refused(model, f"2, 3, {length}", q=q, k=k, v=v, **given, **options)


def test_write_names_an_unknown_objective_or_mode_and_the_legal_ones():
    layers, data = network(2), chunk_of_data()
    assert_refused(write, "l1", *OBJECTIVES, layers=layers, **data, objective="l1")
    assert_refused(write, "chunk", "token", "boundary", layers=layers, **data, mode="chunk")


@pytest.mark.parametrize(
    "name, shape",
    [
        ("eta", (2, 9)),
        ("alpha", (2, 9)),
        ("target", (2, 7, 9)),
        ("target", (2, 5, 3)),
        ("q", (2, 7, 9)),
        ("k", (2, 7, 9)),
    ],
)
def test_write_refuses_a_wrong_shape_by_name_and_shape(name, shape):
    data = chunk_of_data() | {name: torch.ones(shape, dtype=torch.float64)}
    assert_refused(write, name, ", ".join(map(str, shape)), layers=network(2), **data)


def test_write_and_read_refuse_layers_that_do_not_chain():
    layers, data = [network(2)[0], torch.ones(2, 3, 6, dtype=torch.float64)], chunk_of_data()
    assert_refused(write, "2, 3, 6", layers=layers, **data)
    assert_refused(read, "2, 3, 6", layers=layers, x=data["q"])


def test_write_and_read_refuse_a_residual_between_different_widths():
    layers, data = network(2, d_out=2), chunk_of_data(d_out=2)
    assert_refused(write, "residual", layers=layers, **data)
    assert_refused(read, "residual", layers=layers, x=data["q"])


def test_write_refuses_momentum_without_theta_and_momentum_of_another_depth():
    layers, data = network(2), chunk_of_data()
    assert_refused(write, "momentum", "theta", layers=layers, **data, momentum=network(2))
    assert_refused(write, "momentum", layers=layers, **data, theta=uniform(2, 7), momentum=network(1))
