"""What memory.py must be: one learning rule, and everything else a setting of it.

Every expected value is derived here, from the paper or from a model's own literature, never from
memory.py: `recurrence` is the rule as a loop over tokens, `written_by_autograd` a memory network
whose local gradients come from torch.autograd, and every classical model stands in its own paper's
form. float64 and 1e-10 unless a test says otherwise. NL is arXiv 2512.24695; names and shapes are
those of memory.py.
"""

import random
import re
import threading

import pytest
import torch
import torch.nn.functional as F
from textbook import titans_linear
from torch.autograd import gradcheck, gradgradcheck

from baselines import delta_net, gated_delta_net, linear_attention, retention
from fused import decay
from layers import tensors
from memory import l2norm, read, scan, scan_stepwise, watch, write

# --------------------------------------------------------------------------------------------------
# Oracles and helpers


def recurrence(W, k, u, eta, alpha, q=None, *, theta=None, S=None, delta=1.0):
    """The rule as matrices: S_t = theta S + eta (u k^T - delta W k k^T), W_t = alpha W + S_t."""
    T = k.shape[-2]
    delta = torch.as_tensor(delta, dtype=k.dtype)
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
        k_t = k[..., t, :].unsqueeze(-1)
        u_t = u[..., t, :].unsqueeze(-1)
        known = at(delta, t) * (W @ (k_t @ k_t.mT))
        step = at(eta, t) * (u_t @ k_t.mT) - at(eta, t) * known
        if theta is not None:
            S = at(theta, t) * S + step
            step = S
        W = at(alpha, t) * W + step
        if q is not None:
            outputs.append((W @ q[..., t, :].unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, -2) if outputs else None, W, S


def normal(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def unit(*shape, seed=0):
    return F.normalize(normal(*shape, seed=seed), dim=-1)


def uniform(*shape, seed=0, low=0.0, high=1.0):
    rng = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(*shape, generator=rng, dtype=torch.float64)


def ones(*shape):
    return torch.ones(*shape, dtype=torch.float64)


def problem(seed, batch=(2, 3), T=11, dk=4, dv=5, momentum=True, delta="tensor", q=True):
    """Random arguments of scan, with gradients: keys of any length, steps as long as is stable."""
    seed = 100 * seed
    alpha = uniform(*batch, T, seed=seed, low=0.3)
    args = {
        "W": normal(*batch, dv, dk, seed=seed + 1),
        "k": unit(*batch, T, dk, seed=seed + 2) * uniform(*batch, T, 1, seed=seed + 3, low=0.5),
        "u": normal(*batch, T, dv, seed=seed + 4),
        "eta": uniform(*batch, T, seed=seed + 5) * (1 if momentum else 1 + alpha),
        "alpha": alpha,
        "q": unit(*batch, T, dk, seed=seed + 6) if q else None,
        "theta": uniform(*batch, T, seed=seed + 7, high=0.9) if momentum else None,
        "S": normal(*batch, dv, dk, seed=seed + 8) if momentum else None,
        "delta": uniform(*batch, T, seed=seed + 9) if delta == "tensor" else delta,
    }
    return {name: x.requires_grad_() if torch.is_tensor(x) else x for name, x in args.items()}


def only_tensors(args):
    return {name: x for name, x in args.items() if torch.is_tensor(x)}


def assert_close(ours, expected, tolerance=1e-10, what=""):
    """Largest difference, relative to the largest expected value where that exceeds 1."""
    if expected is None:
        assert ours is None, f"{what}: expected None"
        return
    assert ours.shape == expected.shape, f"{what}: {tuple(ours.shape)} != {tuple(expected.shape)}"
    assert torch.isfinite(ours).all(), f"{what}: not finite"
    if expected.numel():
        expected = expected.double()
        gap = (ours.double() - expected).abs().max() / expected.abs().max().clamp(min=1)
        assert gap <= tolerance, f"{what}: differs by {gap:.3g}"


def assert_all_close(ours, expected, tolerance=1e-10, names=None):
    names = range(len(ours)) if names is None else names
    for name, a, b in zip(names, ours, expected, strict=True):
        assert_close(a, b, tolerance, name)


def gradients(results, inputs, seed=0):
    """Gradients of one random weighted sum of all results."""
    loss = 0.0
    for i, x in enumerate(x for x in results if x is not None):
        loss = loss + (x.double() * normal(*x.shape, seed=1000 * seed + i)).sum()
    inputs = list(inputs)
    return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)


def assert_same_function(f, oracle, args, tolerance=1e-10, **options):
    """Equal outputs, equal states, equal gradients with respect to every tensor argument."""
    ours = f(**args, **options)
    expected = oracle(**args)
    assert_all_close(ours, expected, tolerance, ("y", "W_T", "S_T"))
    inputs = only_tensors(args)
    slopes = gradients(ours, inputs.values())
    assert_all_close(slopes, gradients(expected, inputs.values()), tolerance, inputs)


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


def assert_twice_differentiable(f, inputs):
    assert gradcheck(f, inputs)
    assert gradgradcheck(f, inputs)


each_form = pytest.mark.parametrize("f", [scan, scan_stepwise])
each_kind = pytest.mark.parametrize("momentum", [False, True], ids=["plain", "momentum"])

# --------------------------------------------------------------------------------------------------
# scan is the recurrence


@pytest.mark.parametrize("delta", [0, 1.0, 0.7, "tensor"])
@each_kind
@pytest.mark.parametrize("tile", [1, 5, 16, 64])
def test_scan_is_the_recurrence_in_outputs_states_and_all_gradients(tile, momentum, delta):
    pick = random.Random(f"{tile} {momentum} {delta}")
    batch = pick.choice([(), (3,), (2, 2)])
    shape = {"T": pick.randint(2, 37), "dk": pick.randint(1, 6), "dv": pick.randint(1, 7)}
    args = problem(1, batch, momentum=momentum, delta=delta, **shape)
    assert_same_function(scan, recurrence, args, tile=tile)


@pytest.mark.parametrize("delta", [0.0, 1, 0.3, "tensor"])
@each_kind
def test_scan_stepwise_is_the_recurrence(momentum, delta):
    args = problem(2, (2, 3), T=9, momentum=momentum, delta=delta)
    assert_same_function(scan_stepwise, recurrence, args)


@each_kind
@pytest.mark.parametrize("T", [1, 63, 64, 65, 130])
def test_lengths_around_a_multiple_of_the_tile_are_no_special_case(T, momentum):
    args = problem(T, (2,), T=T, dk=3, dv=2, momentum=momentum)
    assert_same_function(scan, recurrence, args, tile=64)


@each_kind
@each_form
def test_without_q_nothing_is_read_and_the_states_are_the_same(f, momentum):
    args = problem(4, T=10, momentum=momentum, q=False)
    y, _, S_T = f(**args)
    assert y is None and (S_T is None) == (not momentum)
    assert_same_function(f, recurrence, args)


@each_form
def test_momentum_without_a_start_starts_at_zero(f):
    args = problem(5, T=10) | {"S": None}
    zeros = torch.zeros_like(args["W"])
    assert_same_function(f, lambda **given: recurrence(**given | {"S": zeros}), args)


BROADCASTS = {
    "one start, one schedule for the batch": {
        "W": (), "S": (), "eta": (), "alpha": (), "theta": (), "delta": (),
    },
    "one start per head": {
        "W": (3,), "S": (3,), "eta": (2, 3), "alpha": (3,), "theta": (2, 1), "delta": (3,),
    },
    "keys shared by the batch": {
        "k": (), "u": (2, 3), "eta": (2, 1), "alpha": (1, 3), "W": (2, 1), "S": (1, 3),
    },
    "keys and values shared, many starts": {
        "k": (1, 3), "u": (3,), "eta": (), "alpha": (), "q": (2, 3), "theta": (),
    },
    "only q has a batch": dict.fromkeys(
        ("W", "k", "u", "eta", "alpha", "theta", "S", "delta"), ()
    ),
}


@each_kind
@pytest.mark.parametrize("case", BROADCASTS)
@each_form
def test_leading_dimensions_broadcast_and_gradients_keep_their_shape(f, case, momentum):
    args = problem(7, (2, 3), T=7, dk=2, dv=3, momentum=momentum)
    for name, batch in BROADCASTS[case].items():
        if args[name] is not None:
            index = (0,) * (2 - len(batch)) + tuple(slice(0, n) for n in batch)
            args[name] = args[name].detach()[index].clone().requires_grad_()

    def expanded(**given):
        ours = f(**given)
        wanted = recurrence(**given)
        return [a if a is None else a.expand_as(b) for a, b in zip(ours, wanted, strict=True)]

    assert_same_function(expanded, recurrence, args)


@each_form
def test_the_outputs_carry_the_broadcast_batch_even_when_the_start_does_not(f):
    args = problem(8, (2, 3), T=5, dk=2, dv=3)
    args["W"] = args["W"].detach()[0, 0]
    assert [x.shape for x in f(**args)] == [(2, 3, 5, 3), (2, 3, 3, 2), (2, 3, 3, 2)]


@each_form
def test_transposed_and_expanded_views_are_as_good_as_contiguous_tensors(f):
    args = problem(9, (2, 3), T=8)
    for name in ("k", "u", "q"):  # heads split off the last dimension, as every mixer does it
        x = args[name].detach()
        args[name] = x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    args["alpha"] = torch.full((2, 3, 1), 0.9).double().requires_grad_().expand(2, 3, 8)
    args["W"] = args["W"].detach().mT.contiguous().mT.requires_grad_()
    assert_same_function(f, recurrence, args)


@pytest.mark.parametrize("name", ["W", "k", "u", "eta", "alpha", "q", "theta", "S", "delta"])
def test_each_argument_gets_its_gradient_also_when_it_is_the_only_one_that_needs_it(name):
    args = problem(10, (2,), T=9, dk=3, dv=2)
    args = {other: x.detach().requires_grad_(other == name) for other, x in args.items()}
    ours = gradients(scan(**args, tile=4), [args[name]])
    assert_all_close(ours, gradients(recurrence(**args), [args[name]]))


@pytest.mark.parametrize(
    "momentum, result", [(False, 0), (False, 1), (True, 0), (True, 1), (True, 2)]
)
def test_a_loss_on_one_result_alone_has_the_right_gradients(momentum, result):
    args = problem(11, (2,), T=9, momentum=momentum)
    inputs = only_tensors(args)
    ours = gradients([scan(**args, tile=4)[result]], inputs.values())
    expected = gradients([recurrence(**args)[result]], inputs.values())
    assert_all_close(ours, expected, names=inputs)


def test_without_gradients_the_values_are_the_same():
    args = problem(12, T=21)
    with torch.no_grad():
        assert_all_close(scan(**args, tile=5), recurrence(**args))


def test_the_torch_backend_is_what_auto_takes_on_a_cpu():
    args = problem(13, T=21)
    assert_same_function(scan, recurrence, args, backend="torch", tile=5)
    auto = scan(**args, backend="auto")
    assert all(map(torch.equal, scan(**args, backend="torch"), auto))


def test_half_a_sequence_and_then_the_other_half_is_the_whole_sequence():
    args = problem(14, T=20)
    whole = scan(**args, tile=16)
    for cut in (1, 7, 16, 19):
        outputs = []
        state = {"W": args["W"], "S": args["S"]}
        for piece in (slice(None, cut), slice(cut, None)):
            now = {name: args[name][..., piece, :] for name in ("k", "u", "q")}
            now |= {name: args[name][..., piece] for name in ("eta", "alpha", "theta", "delta")}
            y, state["W"], state["S"] = scan(**now, **state, tile=16)
            outputs.append(y)
        assert_all_close((torch.cat(outputs, -2), state["W"], state["S"]), whole)


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
        args["eta"][:] = eta
        args["alpha"][:] = 1.0
    assert_same_function(scan, recurrence, args, tile=64)


def test_a_memory_that_never_learns_only_forgets():
    args = problem(16, T=20, momentum=False) | {"eta": 0 * ones(2, 3, 20)}
    assert_close(scan(**args)[1], args["alpha"].prod(-1)[..., None, None] * args["W"])


# --------------------------------------------------------------------------------------------------
# Exact and finite at the edges


@pytest.mark.slow
@pytest.mark.parametrize("case", ["1", "1e-6", "1e-6 or 1", "1, momentum", "1e-6, momentum"])
def test_4096_tokens_in_float32_with_this_alpha_stay_finite_and_near_float64(case):
    T = 4096
    args = problem(20, (2,), T=T, dk=8, dv=6, momentum=False, delta=1.0)
    args["k"] = F.normalize(args["k"].detach(), dim=-1)
    args["eta"] = uniform(2, T, high=0.9)
    args["alpha"] = (1e-6 if "1e-6" in case else 1.0) * ones(2, T)
    if "or" in case:
        args["alpha"][uniform(2, T, seed=1) < 0.5] = 1.0
    if "momentum" in case:
        args["theta"] = uniform(2, T, seed=2, high=0.5)
        args["S"] = normal(2, 6, 8)
        args["eta"] = args["eta"] / 3
    single = only_tensors(args)
    single = {name: x.detach().float().requires_grad_() for name, x in single.items()}
    # the oracle starts from the same rounded numbers, so only the arithmetic differs
    double = {name: x.detach().double().requires_grad_() for name, x in single.items()}
    ours = scan(**single)
    expected = scan_stepwise(**double)
    assert all(x is None or x.dtype == torch.float32 for x in ours)
    assert_all_close(ours, expected, 1e-5, ("y", "W_T", "S_T"))
    slopes = gradients(ours, single.values())
    assert_all_close(slopes, gradients(expected, double.values()), 1e-5, single)


@pytest.mark.parametrize("where", [slice(None), [3, 4, 5, 11, 16], [0], [20]], ids=str)
@pytest.mark.parametrize("delta", [0.0, 1.0, "tensor"])
def test_theta_zero_is_exact_with_the_right_gradients(where, delta):
    args = problem(21, T=21, delta=delta)
    with torch.no_grad():
        args["theta"][..., where] = 0.0
    assert_same_function(scan, recurrence, args, tile=5)


def test_theta_zero_everywhere_is_the_rule_without_momentum():
    args = problem(22, T=21) | {"theta": 0 * ones(2, 3, 21)}
    without = scan(**args | {"theta": None, "S": None})
    assert_all_close(scan(**args)[:2], without[:2])


@pytest.mark.parametrize("alpha", [1.0, 1e-6, 1e-300, 0.0])
@each_kind
def test_extreme_retention_is_exact_with_the_right_gradients(momentum, alpha):
    args = problem(23, T=21, momentum=momentum)
    with torch.no_grad():
        args["alpha"][..., 4:] = alpha  # runs of it, behind ordinary values
        args["alpha"][..., 12:14] = 0.9
    assert_same_function(scan, recurrence, args, tile=16)


def positional(f, args, **options):
    """f as a function of its tensors in a row, without results that are None, for gradcheck."""

    def of_tensors(*x):
        results = f(**dict(zip(args, x, strict=True)), **options)
        return tuple(r for r in results if r is not None)

    return of_tensors


@pytest.mark.parametrize("theta_zero", [False, True], ids=["", "theta 0"])
def test_gradcheck_and_gradgradcheck_of_scan(theta_zero):
    args = problem(30, (), T=3, dk=2, dv=2)
    if theta_zero:
        with torch.no_grad():
            args["theta"][1] = 0.0
    assert_twice_differentiable(positional(scan, args, tile=2), tuple(args.values()))


def test_gradcheck_and_gradgradcheck_of_scan_without_momentum_with_shared_starts():
    args = only_tensors(problem(32, (2,), T=3, dk=2, dv=1, momentum=False))
    for name in ("W", "alpha"):
        args[name] = args[name].detach()[0].clone().requires_grad_()
    assert_twice_differentiable(positional(scan, args, tile=2), tuple(args.values()))


# --------------------------------------------------------------------------------------------------
# decay, l2norm


def products(alpha):
    """decay, entry by entry."""
    C = alpha.shape[-1]
    P = torch.zeros(*alpha.shape[:-1], C + 1, C + 1, dtype=alpha.dtype)
    for t in range(C + 1):
        for s in range(t + 1):
            P[..., t, s] = alpha[..., s:t].prod(-1)
    return P


@pytest.mark.parametrize("batch", [(), (2, 3)])
@pytest.mark.parametrize("C", [1, 2, 7])
def test_decay_holds_the_product_between_any_two_positions(C, batch):
    alpha = uniform(*batch, C, seed=C)
    P = decay(alpha)
    assert_close(P, products(alpha), 1e-15)
    assert torch.equal(P, P.tril()), "the future must weigh exactly nothing"
    assert torch.equal(P.diagonal(dim1=-2, dim2=-1), ones(*batch, C + 1))


def test_decay_is_relatively_exact_in_float32_from_tiny_to_one():
    alpha = torch.tensor([1.0, 1e-6, 1.0, 0.5, 1e-6, 1e-6, 1.0, 1e-6, 0.999999])
    exact = products(alpha.double())
    assert ((decay(alpha).double() - exact).abs() <= 1e-6 * exact).all()


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
    x = normal(3, 4, 5, seed=1)
    assert_close(l2norm(x), x / x.norm(dim=-1, keepdim=True), 1e-4)
    assert (l2norm(x).norm(dim=-1) <= 1).all()
    zero = torch.zeros(5, requires_grad=True)
    l2norm(zero).sum().backward()
    assert torch.equal(l2norm(zero), torch.zeros(5)) and torch.isfinite(zero.grad).all()
    assert gradcheck(l2norm, x[0].requires_grad_())


# --------------------------------------------------------------------------------------------------
# The classical models, each in the form of its own literature


def qkv(seed=40, T=23):
    keys = unit(2, 3, T, 4, seed=seed), unit(2, 3, T, 4, seed=seed + 1)
    return *keys, normal(2, 3, T, 5, seed=seed + 2)


def assert_is_the_loop(result, q, k, v, step):
    """The reads are M_t q_t, the state is the last M; M <- step(t, M, k_t, v_t), both columns."""
    M = torch.zeros(2, 3, 5, 4, dtype=torch.float64)
    reads = []
    for t in range(k.shape[-2]):
        M = step(t, M, k[..., t, :, None], v[..., t, :, None])
        reads.append((M @ q[..., t, :, None]).squeeze(-1))
    assert_all_close(result[:2], (torch.stack(reads, -2), M))


def test_linear_attention_is_the_causal_sum_of_values_weighted_by_key_query_products():
    q, k, v = qkv()
    y, W_T, _ = linear_attention(q, k, v)  # Katharopoulos et al. 2020, unnormalised (NL 14-18)
    assert_close(y, (q @ k.mT).tril() @ v)
    assert_close(W_T, torch.einsum("bhtv,bhtk->bhvk", v, k))


def test_retention_is_retnets_parallel_form_with_its_decay_matrix():
    q, k, v = qkv()
    gamma = (1 - 2.0 ** (-5 - torch.arange(3, dtype=torch.float64)))[:, None]  # RetNet eq. 8
    n = torch.arange(23)
    distance = (n[:, None] - n).clamp(min=0)
    D = torch.where(n[:, None] >= n, gamma[..., None] ** distance, 0.0)
    y, W_T, _ = retention(q, k, v, gamma)
    assert_close(y, ((q @ k.mT) * D) @ v)
    assert_close(W_T, torch.einsum("bhtv,bhtk,ht->bhvk", v, k, D[:, -1]))


def test_mamba_2_is_a_setting_of_scan():
    """State space duality: y = (L o C B^T) (dt x), L[t, s] = exp(sum_{s < i <= t} dt_i A)."""
    q, k, v = qkv()  # C, B, x of the Mamba-2 paper
    dt = uniform(2, 3, 23, seed=1)
    A = -uniform(3, 1, seed=2, low=0.5, high=4.0)
    logs = (dt * A).cumsum(-1)
    L = (logs[..., :, None] - logs[..., None, :]).exp().tril()
    W = torch.zeros(5, 4, dtype=torch.float64)
    y, _, _ = scan(W, k, v, dt, (dt * A).exp(), q, delta=0.0, tile=16)
    assert_close(y, (L * (q @ k.mT)) @ (dt[..., None] * v))


def test_delta_net_is_its_householder_product_form():
    q, k, v = qkv()
    beta = uniform(2, 3, 23, seed=3)

    def step(t, M, k, v):
        b = beta[..., t, None, None]
        return M @ (torch.eye(4) - b * k @ k.mT) + b * v @ k.mT

    assert_is_the_loop(delta_net(q, k, v, beta), q, k, v, step)


def test_gated_delta_net_forgets_before_it_corrects():
    q, k, v = qkv()
    beta = uniform(2, 3, 23, seed=3)
    alpha = uniform(2, 3, 23, seed=4)

    def step(t, M, k, v):
        b = beta[..., t, None, None]
        return M @ (alpha[..., t, None, None] * (torch.eye(4) - b * k @ k.mT)) + b * v @ k.mT

    assert_is_the_loop(gated_delta_net(q, k, v, beta, alpha), q, k, v, step)


@pytest.mark.parametrize("chunk", [1, 4, 23, 64])
def test_titans_with_a_matrix_memory_is_its_loop_over_surprise_and_momentum(chunk):
    q, k, v = qkv()
    eta = uniform(2, 3, 23, seed=3, high=0.2)
    theta = uniform(2, 3, 23, seed=4)
    alpha = uniform(2, 3, 23, seed=5, low=0.5)
    M = S = torch.zeros(2, 3, 5, 4, dtype=torch.float64)
    reads = []
    for t in range(23):
        if t % chunk == 0:
            boundary = M.clone().requires_grad_()  # kept for the whole chunk
        loss = 0.5 * ((boundary @ k[..., t, :, None] - v[..., t, :, None]) ** 2).sum()
        (surprise,) = torch.autograd.grad(loss, boundary)
        S = theta[..., t, None, None] * S - eta[..., t, None, None] * surprise
        M = alpha[..., t, None, None] * M + S
        reads.append((M @ q[..., t, :, None]).squeeze(-1))
    ours = titans_linear(q, k, v, eta, theta, alpha, chunk)
    assert_all_close(ours, (torch.stack(reads, -2), M, S))


# --------------------------------------------------------------------------------------------------
# What one write does: DGD and its stability


def test_delta_gradient_descent_lands_on_the_minimiser_for_keys_of_any_length():
    """NL 56: argmin_W 1/2 ||W x - u||^2 + 1/(2 eta) ||W - W_t||^2.

    Hence W (x x^T + I / eta) = u x^T + W_t / eta.
    """
    x = normal(50, 4, seed=1) * uniform(50, 1, high=5.0)
    u = normal(50, 3, seed=2)
    W = normal(50, 3, 4, seed=3)
    eta = 10 ** uniform(50, low=-2, high=2)
    A = x[:, :, None] * x[:, None, :] + torch.eye(4) / eta[:, None, None]
    B = u[:, :, None] * x[:, None, :] + W / eta[:, None, None]
    minimiser = torch.linalg.solve(A, B, left=False)
    bounded = eta / (1 + eta * x.square().sum(-1))
    _, W_T, _ = scan(W, x[:, None], u[:, None], bounded[:, None], ones(50, 1))
    assert_close(W_T, minimiser)


def test_delta_rule_step_is_the_running_gradient_step_of_the_l2_objective():
    k = unit(1, 4, seed=1)
    v = normal(1, 3, seed=2)
    W = normal(3, 4, seed=3).requires_grad_()
    (slope,) = torch.autograd.grad(0.5 * ((W @ k[0] - v[0]) ** 2).sum(), W)
    assert_close(scan(W, k, v, 0.7 * ones(1), 0.9 * ones(1))[1], 0.9 * W - 0.7 * slope)


def test_with_unit_step_the_delta_rule_recalls_what_was_just_written():
    args = problem(51, T=30, momentum=False, delta=1.0)
    k = F.normalize(args["k"].detach(), dim=-1)
    y, _, _ = scan(args["W"], k, args["u"], ones(30), ones(30), q=k, tile=16)
    assert_close(y, args["u"])


@pytest.mark.parametrize("chunk, factor", [(16, -0.6), (64, -5.4)])
def test_frozen_gradients_with_step_a_tenth_converge_at_chunk_16_and_explode_at_64(chunk, factor):
    """A repeated key: each chunk multiplies the error by 1 - 0.1 * chunk."""
    T = 16 * chunk
    k = unit(1, 4).expand(T, 4)
    v = torch.tensor([[2.0, -1.0, 0.5, 1.0]]).double().expand(T, 4)
    _, W, _ = titans_linear(k, k, v, 0.1 * ones(T), 0 * ones(T), ones(T), chunk)
    error = (W @ k[0] - v[0]) / v[0].norm()
    assert_close(error, -(factor**16) * v[0] / v[0].norm(), 1e-8)
    assert error.norm() < 1e-2 if chunk == 16 else error.norm() > 1e9


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_printed_form_of_nl_93_flips_between_one_and_zero_and_ours_reads_one_and_stays(chunk):
    key = ones(chunk, 1)
    one = ones(chunk)
    printed = 0 * ones(1, 1)
    ours = [0 * ones(1, 1)]
    reads_printed = []
    reads_ours = []
    for _ in range(4):
        # NL 93: M_t = M_{t-1} (alpha - eta k k^T) - eta (M_boundary k - v) k^T removes M k twice
        _, printed, _ = scan(printed, key, key - key @ printed.mT, one, one)
        _, ours, _ = write(ours, key, key, one, one, residual=False)
        reads_printed.append(printed.item())
        reads_ours.append(ours[0].item())
    assert reads_printed == [1, 0, 1, 0]
    assert reads_ours == [1, 1, 1, 1]


# --------------------------------------------------------------------------------------------------
# Memory networks

SHAPES = {  # depth, residual
    "matrix": (1, False),
    "residual matrix": (1, True),
    "residual MLP": (2, True),
    "residual MLP of 3 layers": (3, True),
    "MLP without residual": (2, False),
}
each_shape = pytest.mark.parametrize("depth, residual", SHAPES.values(), ids=SHAPES)

OBJECTIVES = {
    "dot": lambda m, v: -(m * v).sum(),
    "l2": lambda m, v: 0.5 * (m - v).square().sum(),
    "huber": lambda m, v: F.huber_loss(m, v, reduction="sum", delta=1.0),
    "lp": lambda m, v: (m - v).abs().pow(3).sum() / 3,
}


def network(depth, batch=(2,), d=3, hidden=4, d_out=3, seed=60):
    widths = [d] + [hidden] * (depth - 1) + [d_out]
    layers = []
    for n in range(depth):
        W = normal(*batch, widths[n + 1], widths[n], seed=seed + n) / widths[n] ** 0.5
        layers.append(W.requires_grad_())
    return layers


def chunk_of_data(T=7, batch=(2,), d=3, d_out=3, seed=70):
    data = {
        "k": unit(*batch, T, d, seed=seed),
        "target": 2 * normal(*batch, T, d_out, seed=seed + 1),  # reaches both branches of Huber
        "eta": uniform(*batch, T, seed=seed + 2),
        "alpha": uniform(*batch, T, seed=seed + 3, low=0.5),
        "q": unit(*batch, T, d, seed=seed + 4),
    }
    return {name: x.requires_grad_() for name, x in data.items()}


def tokens_of(data, piece):
    """A slice of a chunk of data."""
    cut = {name: data[name][..., piece, :] for name in ("k", "target", "q")}
    return cut | {name: data[name][..., piece] for name in ("eta", "alpha")}


def network_outputs(layers, x):
    """Every layer's input and output: x_1 = x, x_l = silu(W_{l-1} x_{l-1})."""
    inputs = []
    outputs = []
    for n, W in enumerate(layers):
        inputs.append(F.silu(outputs[-1]) if n else x)
        outputs.append((W.unsqueeze(-3) @ inputs[-1].unsqueeze(-1)).squeeze(-1))
    return inputs, outputs


def written_by_autograd(layers, k, target, eta, alpha, q=None, *, theta=None, momentum=None,
                        delta=1.0, objective="l2", residual=True, mode="token"):
    """One chunk write: autograd's gradients at the boundary, and the weights after every token."""
    inputs, outputs = network_outputs(layers, k)
    loss = OBJECTIVES[objective](outputs[-1] + k if residual else outputs[-1], target)
    local_gradients = torch.autograd.grad(loss, outputs, create_graph=True)
    if theta is not None and momentum is None:
        momentum = [torch.zeros_like(W) for W in layers]
    running = []
    moments = []
    for n, (W, x, g) in enumerate(zip(layers, inputs, local_gradients, strict=True)):
        u = -g
        if n == len(layers) - 1 and objective == "l2" and delta == 1:
            u = target - k if residual else target
        step = eta / (1 + eta * x.square().sum(-1)) if n else eta
        S = None if theta is None else momentum[n]
        history = []
        for t in range(k.shape[-2]):
            now = slice(t, t + 1)
            rule = {"theta": None if theta is None else theta[..., now], "S": S, "delta": delta}
            rates = step[..., now], alpha[..., now]
            _, W, S = recurrence(W, x[..., now, :], u[..., now, :], *rates, **rule)
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
    last = [W[..., -1, :, :] for W in running]
    return y, last, None if theta is None else moments


def flat(result):
    y, layers, momentum = result
    return [y, *layers, *(momentum or [])]


def assert_same_write(layers, data, **options):
    ours = write(layers, **data, **options)
    expected = written_by_autograd(layers, **data, **options)
    assert (ours[2] is None) == (expected[2] is None)
    assert_all_close(flat(ours), flat(expected))
    inputs = tensors([layers, data, options])
    assert_all_close(gradients(flat(ours), inputs), gradients(flat(expected), inputs))


@each_shape
def test_read_runs_the_network(depth, residual):
    layers = network(depth)
    x = unit(2, 7, 3)
    h = network_outputs(layers, x)[1][-1]
    assert_close(read(layers, x, residual), x + h if residual else h)
    if residual:
        assert_close(read(layers, x), x + h)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("delta", [0.0, 0.5, 1.0])
@each_shape
def test_write_is_autograds_local_gradients_into_the_recurrence(depth, residual, delta, objective):
    for mode in ("token", "boundary"):
        options = {"objective": objective, "delta": delta, "residual": residual, "mode": mode}
        assert_same_write(network(depth), chunk_of_data(T=5), **options)


@pytest.mark.parametrize("delta", [0.0, 1.0])
@each_shape
def test_write_with_momentum_keeps_one_momentum_per_layer(depth, residual, delta):
    theta = uniform(2, 5, seed=80, high=0.9).requires_grad_()
    for start in (None, network(depth, seed=90)):
        options = {"residual": residual, "delta": delta, "theta": theta, "momentum": start}
        assert_same_write(network(depth), chunk_of_data(T=5), **options)


def test_write_of_layers_shared_by_a_batch_gives_every_row_its_own_weights():
    layers = network(2, batch=(3,))
    data = chunk_of_data(T=5, batch=(2, 3))
    _, after, _ = write(layers, **data)
    assert [W.shape for W in after] == [(2, 3, 4, 3), (2, 3, 3, 4)]
    assert_same_write(layers, data)


@pytest.mark.parametrize("depth", [1, 2])
def test_write_to_another_width_is_possible_without_the_residual(depth):
    assert_same_write(network(depth, d_out=2), chunk_of_data(T=5, d_out=2), residual=False)


@pytest.mark.parametrize("depth", [1, 2])
def test_write_without_q_only_writes(depth):
    data = chunk_of_data(T=5) | {"q": None}
    assert write(network(depth), **data)[0] is None
    assert_same_write(network(depth), data)


def test_the_defaults_of_write_are_l2_delta_rule_residual_and_token_reads():
    layers = network(2)
    data = chunk_of_data()
    explicit = write(layers, **data, delta=1.0, objective="l2", residual=True, mode="token")
    assert all(map(torch.equal, flat(write(layers, **data)), flat(explicit)))


def test_boundary_reads_see_only_the_weights_before_the_chunk():
    layers = network(2)
    data = chunk_of_data()
    assert_close(write(layers, **data, mode="boundary")[0], read(layers, data["q"]))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_last_token_read_sees_exactly_the_weights_that_are_handed_on(depth):
    data = chunk_of_data()
    y, after, _ = write(network(depth), **data)
    assert_close(y[..., -1:, :], read(after, data["q"][..., -1:, :]))


def test_tokens_of_one_chunk_see_each_other_and_never_the_future():
    layers = network(2)
    data = {name: x.detach() for name, x in chunk_of_data(T=8).items()}
    changed = {name: x.clone() for name, x in data.items()}
    for name in ("k", "target", "q"):
        changed[name][..., 4, :] += 1.0
    for name in ("eta", "alpha"):
        changed[name][..., 4] *= 0.5
    before = write(layers, **data)[0]
    after = write(layers, **changed)[0]
    assert torch.equal(before[..., :4, :], after[..., :4, :])
    assert ((before - after)[..., 5:, :].abs() > 1e-6).any(-1).all()


@pytest.mark.parametrize("residual", [False, True])
def test_a_matrix_under_l2_and_the_delta_rule_does_not_depend_on_the_chunk(residual):
    data = chunk_of_data(T=12)
    expected = write(network(1), **data, residual=residual)
    layers = network(1)
    reads = []
    for i in range(0, 12, 3):
        y, layers, _ = write(layers, **tokens_of(data, slice(i, i + 3)), residual=residual)
        reads.append(y)
    assert_close(torch.cat(reads, -2), expected[0])
    assert_close(layers[0], expected[1][0])


@pytest.mark.parametrize("mode", ["token", "boundary"])
@pytest.mark.parametrize("delta", [0.0, 1.0])
@each_shape
def test_a_chunk_written_in_pieces_is_the_chunk_written_at_once(depth, residual, delta, mode):
    """`running` carries the weights inside a chunk; gradients stay those of the boundary."""
    boundary = network(depth)
    data = chunk_of_data(T=8)
    theta = uniform(2, 8, seed=80, high=0.9)
    options = {"residual": residual, "delta": delta, "mode": mode}
    expected = flat(write(boundary, **data, theta=theta, **options))
    running = momentum = None
    reads = []
    for now in (slice(0, 3), slice(3, 4), slice(4, 8)):
        so_far = {"theta": theta[..., now], "momentum": momentum, "running": running}
        y, running, momentum = write(boundary, **tokens_of(data, now), **so_far, **options)
        reads.append(y)
    ours = [torch.cat(reads, -2), *running, *momentum]
    assert_all_close(ours, expected)
    assert_all_close(gradients(ours, boundary), gradients(expected, boundary))


def test_a_matrix_written_by_the_dot_objective_is_linear_attention_and_by_l2_is_delta_net():
    q, k, v = qkv()
    one = ones(2, 3, 23)
    beta = uniform(2, 3, 23, seed=3)
    start = [torch.zeros(5, 4, dtype=torch.float64)]
    hebb = write(start, k, v, one, one, q, delta=0.0, objective="dot", residual=False)
    assert_close(hebb[0], (q @ k.mT).tril() @ v)

    def step(t, M, k, v):
        b = beta[..., t, None, None]
        return M @ (torch.eye(4) - b * k @ k.mT) + b * v @ k.mT

    y, (W_T,), _ = write(start, k, v, beta, one, q, residual=False)
    assert_is_the_loop((y, W_T), q, k, v, step)


@pytest.mark.parametrize("depth", [2, 3])
def test_every_inner_layer_lands_on_the_minimiser_of_its_own_objective(depth):
    """NL 56 by layer: the key is what the layer saw, the target minus its output's gradient."""
    layers = network(depth)
    data = chunk_of_data(T=1) | {"alpha": ones(2, 1), "q": None}
    data["eta"] = torch.tensor([[0.3], [30.0]]).double()
    inputs, outputs = network_outputs(layers, data["k"])
    loss = OBJECTIVES["huber"](outputs[-1] + data["k"], data["target"])
    local = torch.autograd.grad(loss, outputs)
    _, after, _ = write(layers, **data, objective="huber")
    for W, W_T, x, g in list(zip(layers, after, inputs, local, strict=True))[1:]:
        A = x.mT @ x + torch.eye(x.shape[-1]) / data["eta"][..., None]
        B = -g.mT @ x + W / data["eta"][..., None]
        assert_close(W_T, torch.linalg.solve(A, B, left=False))


@pytest.mark.parametrize("mode", ["token", "boundary"])
@each_shape
def test_the_outer_gradient_reaches_the_start_of_every_layer_through_two_writes(
    depth, residual, mode
):
    layers = network(depth, batch=())
    chunks = []
    for seed in (100, 110):
        chunks.append({name: x.detach() for name, x in chunk_of_data(4, seed=seed).items()})

    def outer_loss():
        now = layers
        loss = 0.0
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
    data = chunk_of_data(T=2, batch=(), d=2, d_out=2)

    def f(W1, W2, k, target, eta, alpha, q):
        y, after, _ = write([W1, W2], k, target, eta, alpha, q)
        return (y, *after)

    assert_twice_differentiable(f, (*layers, *data.values()))


# --------------------------------------------------------------------------------------------------
# States are values


def calls():
    """Name -> (a function without arguments, the tensors it is given)."""
    args = problem(120, T=9)
    plain = {name: x for name, x in args.items() if name not in ("theta", "S")}
    layers = network(2)
    data = chunk_of_data()
    more = {"theta": uniform(2, 7, seed=80).requires_grad_(), "momentum": network(2, seed=90)}
    return {
        "scan": (lambda: scan(**args, tile=4), args),
        "scan without momentum": (lambda: scan(**plain), plain),
        "scan_stepwise": (lambda: scan_stepwise(**args), args),
        "decay": (lambda: decay(args["alpha"]), args),
        "l2norm": (lambda: l2norm(args["k"]), args),
        "read": (lambda: read(layers, data["q"]), [layers, data]),
        "write": (lambda: write(layers, **data, **more), [layers, data, more]),
    }


@pytest.mark.parametrize("grad", [True, False], ids=["with gradients", "without"])
@pytest.mark.parametrize("name", calls())
def test_states_are_values_nothing_is_written_in_place(name, grad):
    f, given = calls()[name]
    inputs = tensors(given)
    copies = [x.detach().clone() for x in inputs]
    versions = [x._version for x in inputs]
    with torch.set_grad_enabled(grad):
        results = tensors(f())
    if grad:
        sum(x.sum() for x in results).backward()
    assert all(map(torch.equal, inputs, copies))
    assert [x._version for x in inputs] == versions


def test_a_write_leaves_the_given_lists_as_they_are():
    layers = network(2)
    momentum = network(2, seed=90)
    before = layers + momentum
    _, after, moments = write(layers, **chunk_of_data(), theta=uniform(2, 7), momentum=momentum)
    assert after is not layers and moments is not momentum
    assert all(a is b for a, b in zip(layers + momentum, before, strict=True))


# --------------------------------------------------------------------------------------------------
# What `watch` sees


def test_each_thread_watches_its_own_scans_alone():
    """Two at once, in steps: what one reads must not stand in the other's list."""
    both = threading.Barrier(2, timeout=60)
    seen = {}

    def read(eta):
        with watch() as calls:
            for _ in range(10):
                both.wait()
                W = torch.zeros(2, 2)
                scan(W, torch.ones(3, 2), torch.ones(3, 2), torch.full((3,), eta), torch.ones(3))
        seen[eta] = [call["eta"].mean().item() for call in calls]

    threads = [threading.Thread(target=read, args=(eta,)) for eta in (0.25, 0.5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {0.25: [0.25] * 10, 0.5: [0.5] * 10}


# --------------------------------------------------------------------------------------------------
# Bad input


def assert_refused(f, *words, **options):
    """A ValueError whose message has every word: an argument, a shape `2, 8`, a legal value."""
    with pytest.raises(ValueError) as info:
        f(**options)
    for word in words:
        found = re.search(rf"(?<!\w){re.escape(str(word))}(?!\w)", str(info.value))
        assert found, f"{word!r} not in: {info.value}"


def shown(shape):
    return ", ".join(map(str, shape))


@each_form
def test_scan_refuses_a_wrong_shape_by_name_and_shape(f):
    wrong = [  # at batch (2,), T = 11, dk = 4, dv = 5
        ("eta", (2, 12)),
        ("eta", (12,)),
        ("eta", (2, 11, 5)),
        ("eta", (3, 11)),
        ("alpha", (2, 7)),
        ("theta", (2, 7)),
        ("delta", (2, 9)),
        ("delta", (7, 11)),
        ("k", (2, 11, 6)),
        ("q", (2, 11, 6)),
        ("q", (2, 9, 4)),
        ("u", (2, 11, 6)),
        ("u", (2, 9, 5)),
        ("S", (2, 4, 5)),
    ]
    for name, shape in wrong:
        assert_refused(f, name, shown(shape), **problem(130, (2,)) | {name: ones(*shape)})
    assert_refused(f, "S", "theta", **problem(131) | {"theta": None})


def test_a_tile_below_one_and_an_unknown_backend_are_refused_with_the_legal_values():
    for tile in (0, -3):
        assert_refused(scan, "tile", tile, **problem(132), tile=tile)
    assert_refused(scan, "backend", "cuda", "auto", "torch", **problem(132), backend="cuda")


@pytest.mark.parametrize("length", [9, 30])
def test_classical_models_refuse_rates_of_another_length(length):
    q, k, v = qkv()
    right = uniform(2, 3, 23)
    wrong = uniform(2, 3, length)
    for f, rates in [
        (retention, {"alpha": wrong}),
        (delta_net, {"beta": wrong}),
        (gated_delta_net, {"beta": wrong, "alpha": right}),
        (gated_delta_net, {"beta": right, "alpha": wrong}),
    ]:
        # by shape only: a model may hand its rate on to scan under scan's name for it
        assert_refused(f, shown(wrong.shape), q=q, k=k, v=v, **rates)


def test_write_names_what_it_refuses_with_its_shape_or_the_legal_values():
    layers = network(2)
    data = chunk_of_data()
    assert_refused(write, "l1", *OBJECTIVES, layers=layers, **data, objective="l1")
    assert_refused(write, "chunk", "token", "boundary", layers=layers, **data, mode="chunk")
    wrong = [("eta", (2, 9)), ("alpha", (2, 9)), ("target", (2, 7, 9)), ("target", (2, 5, 3))]
    for name, shape in wrong + [("q", (2, 7, 9)), ("k", (2, 7, 9))]:
        assert_refused(write, name, shown(shape), layers=layers, **data | {name: ones(*shape)})


def test_write_and_read_refuse_layers_that_do_not_fit():
    data = chunk_of_data()
    broken = [network(2)[0], ones(2, 3, 6)]
    assert_refused(write, "2, 3, 6", layers=broken, **data)
    assert_refused(read, "2, 3, 6", layers=broken, x=data["q"])
    narrower = network(2, d_out=2)
    assert_refused(write, "residual", layers=narrower, **chunk_of_data(d_out=2))
    assert_refused(read, "residual", layers=narrower, x=data["q"])


def test_write_refuses_momentum_without_theta_and_momentum_of_another_depth():
    layers = network(2)
    data = chunk_of_data()
    theta = uniform(2, 7)
    assert_refused(write, "momentum", "theta", layers=layers, **data, momentum=network(2))
    assert_refused(write, "momentum", layers=layers, **data, theta=theta, momentum=network(1))
