"""kernels.py against the torch path, which is tested against its own definition elsewhere.

Without a GPU the kernels run under Triton's interpreter (conftest.py), and a process of its own
compiles them ahead of time for several GPUs. With a GPU the same tests run on it, and those marked
`gpu`. What each kernel takes, and its table in docs/results.md:

    PYTHONPATH=. python -W ignore tests/test_kernels.py > results/kernels_compiled.jsonl
    python -m bench.report
"""

import copy
import itertools
import json
import logging
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import types
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import fused  # noqa: E402
import kernels  # noqa: E402
import selfcheck  # noqa: E402
from layers import map_state  # noqa: E402
from learn import twice_differentiable  # noqa: E402
from titans import SelfModifyingTitans  # noqa: E402

ROOT = Path(kernels.__file__).parent
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# norm of the difference over the norm of the expected
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device")
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
both = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])

if GPU:  # chooses the compiler with which the kernels are right here, for this process
    selfcheck.judge(selfcheck.Case("self_modify", "bfloat16", 64, chunk=64), 0)
else:
    selfcheck.round_to_nearest()

# --------------------------------------------------------------------------------------------------
# Problems, and how two solutions are compared


def leaves(x):
    return x.to(DEVICE).requires_grad_() if torch.is_tensor(x) else x


def scan_problem(*sizes, **switches):
    """Arguments of scan [N, ...], on DEVICE, with gradients."""
    problem = selfcheck.scan_problem(*sizes, **switches)
    return {name: leaves(x) for name, x in problem.items()}


def modify_problem(*sizes):
    """Arguments of kernels.self_modify up to A, on DEVICE, with gradients."""
    return [leaves(x) for x in selfcheck.modify_problem(*sizes)]


def both_modify(chunk, step):
    """The chunk step by the kernels, and in torch."""
    return selfcheck.modify_by("triton", chunk, step), selfcheck.modify_by("torch", chunk, step)


scan_with = partial(selfcheck.scan_by, tile=16)


def exact(args):
    """The same values in float64, as leaves of their own."""
    return [x.detach().double().requires_grad_() if torch.is_tensor(x) else x for x in args]


def results(f, args):
    """Outputs of f and gradients of one random weighted sum of them, by name."""
    rng = torch.Generator().manual_seed(1)
    outputs = [y for y in f(*args) if y is not None]
    loss = sum((y * torch.randn(y.shape, generator=rng).to(y)).sum() for y in outputs)
    gradients = torch.autograd.grad(loss, [x for x in args if torch.is_tensor(x)])
    named = {f"output {i}": y for i, y in enumerate(outputs)}
    return named | {f"gradient {i}": g for i, g in enumerate(gradients)}


def assert_equal_up_to(tolerance, ours, expected):
    for name, e in expected.items():
        assert ours[name].shape == e.shape, name
        gap = (ours[name].double() - e).norm() / e.norm().clamp(min=1e-3)
        assert gap <= tolerance, f"{name}: differs by {gap:.2g}"


def assert_scan_equals_torch(problem):
    problem = list(problem.values())
    expected = results(scan_with("torch"), exact(problem))
    assert_equal_up_to(1e-5, results(scan_with("triton"), problem), expected)


# --------------------------------------------------------------------------------------------------
# The learning rule


def random_scan(seed):
    """Sizes and switches of a scan.

    T is rarely a multiple of the tile, widths are rarely powers of two, and some are 1.
    """
    draw = random.Random(seed)
    return {
        "N": draw.randint(1, 3),
        "T": draw.randint(1, 40),
        "dk": draw.randint(1, 40),
        "dv": draw.choice([draw.randint(1, 40), 80]),
        "momentum": draw.random() < 0.5,
        "delta": draw.choice([0.0, 0.5, 1.0, "series"]),
        "q": draw.random() < 0.8,
    }


@both
@pytest.mark.parametrize("seed", range(6))
def test_the_fused_scan_and_every_gradient_equal_torch(seed, dtype):
    tile = random.Random(seed).choice([16, 32])
    problem = list(scan_problem(seed, **random_scan(seed), dtype=dtype).values())
    ours = results(scan_with("triton", tile=tile), problem)
    expected = results(scan_with("torch"), exact(problem))
    gradients = [x for name, x in ours.items() if name.startswith("gradient")]
    leaves = [x for x in problem if torch.is_tensor(x)]
    assert [g.dtype for g in gradients] == [x.dtype for x in leaves]
    assert_equal_up_to(TOLERANCE[dtype], ours, expected)


def test_random_scans_cover_every_switch():
    cases = [random_scan(seed) for seed in range(6)]
    assert {case["delta"] for case in cases} == {0.0, 0.5, 1.0, "series"}
    assert {case["momentum"] for case in cases} == {True, False}
    assert {case["q"] for case in cases} == {True, False}
    assert any(case["dv"] == 80 for case in cases)
    assert any(case["T"] < 16 for case in cases)


def test_a_single_memory_needs_no_leading_dimension():
    batch = [x.detach() for x in scan_problem(4, 1, 5, 16, 12, True, "series").values()]
    single = scan_with("triton")(*(x[0] for x in batch))
    for one, of_batch in zip(single, scan_with("triton")(*batch), strict=True):
        assert torch.equal(one, of_batch[0])


def test_states_between_kept_ones_are_recomputed(monkeypatch):
    """More tiles than the backward holds at once, and a last segment that is shorter."""
    monkeypatch.setattr(kernels, "EVERY", 2)
    monkeypatch.setattr(kernels, "SPAN", 2)
    assert_scan_equals_torch(scan_problem(1, N=1, T=73, dk=16, dv=16, momentum=True, delta=1.0))


def test_repeated_keys_at_the_largest_step_stay_exact():
    """k_t = k, eta = 2, alpha = 1: powers of the triangular matrix reach 2^31, its inverse 2.

    k k^T is exactly 1: were it 1e-7 more, that alone would be 1e-5 of y, whoever computes it.
    """
    args = scan_problem(2, N=1, T=64, dk=16, dv=16, momentum=False, delta=1.0)
    k = 0.25 * args["k"].detach()[:, :1].sign().expand(1, 64, 16)
    eta = torch.full_like(args["eta"], 2)
    args |= dict(k=k, q=k, eta=eta, alpha=torch.ones_like(args["alpha"]))
    args = [x.detach() if torch.is_tensor(x) else x for x in args.values()]
    ours = scan_with("triton", tile=32)(*args)[0]
    expected = scan_with("torch")(*exact(args))[0]
    assert (ours - expected).norm() <= 5e-6 * expected.norm()


def test_vanishing_retention_and_momentum_keep_exact_gradients():
    args = scan_problem(3, N=1, T=20, dk=16, dv=16, momentum=True, delta=1.0)
    with torch.no_grad():
        args["alpha"][:, 3:6] = 1e-30
        args["theta"][:, 8:10] = 0.0
        args["alpha"][:, 12:] = 1.0
    assert_scan_equals_torch(args)


# --------------------------------------------------------------------------------------------------
# Self-modifying Titans


def random_modify(seed, dtype):
    """Sizes (N, heads, T, d), chunk, inner step.

    The gradients of gates are one number a head, a sum over tokens that may cancel: rounding x, q
    and W0 to bfloat16 alone changes those of 4 heads by up to 2.7e-2. So bfloat16 has 8 heads.
    """
    draw = random.Random(seed)
    d = draw.choice([16, 32])
    heads = draw.choice([1, 2])
    chunk = draw.randint(6, 28)
    step = draw.uniform(0.5, 1)
    if dtype == torch.float32:
        return (2, heads, draw.randint(1, 40), d), chunk, step
    return (8, heads, draw.randint(6, 20), d), chunk, step


@pytest.mark.slow
@both
@pytest.mark.parametrize("tile", [16, 64])  # of 16 tokens a chunk has several
@pytest.mark.parametrize("seed", range(2))
def test_the_fused_chunk_step_and_every_gradient_equal_torch(seed, tile, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "TILE", tile)
    sizes, chunk, step = random_modify(seed, dtype)
    problem = modify_problem(seed, *sizes, dtype)
    ours, expected = both_modify(chunk, step)
    assert_equal_up_to(TOLERANCE[dtype], results(ours, problem), results(expected, exact(problem)))


@pytest.mark.parametrize("chunk", [pytest.param(14, marks=pytest.mark.slow), 20])  # 1, 2 tiles
def test_a_chunk_step_of_several_spans_equals_torch(chunk, monkeypatch):
    """More tiles than either pass holds at once; in the backward the last chunk goes by itself."""
    for name, value in dict(TILE=16, EVERY=2, SPAN=2, FORWARD_SPAN=2).items():
        monkeypatch.setattr(kernels, name, value)
    problem = modify_problem(0, 2, 1, 65, 16)
    ours, expected = both_modify(chunk, 0.9)
    assert_equal_up_to(1e-5, results(ours, problem), results(expected, exact(problem)))


def split_by_hand(x, q, W, W0, b_eta, b_alpha, A, chunk, step):
    """The chunk step as kernels.py splits it: first the rows of keys, values and gates alone."""
    d = x.shape[-1]
    W0 = W0.repeat(len(x) // len(W0), 1, 1)
    memory, memory0 = W[:, :d], W0[:, :d]
    control, control0 = W[:, d:], W0[:, d:]
    tiles = []
    for part in x.split(chunk, 1):
        k, v, gates = (part @ (control0 + control).mT).split([d, d, 2], -1)
        k, v = (z * (z.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for z in (k + part, v + part))
        softplus = torch.nn.functional.softplus(gates[..., 1] + b_alpha[:, None])
        log = -step * A[:, None] * softplus
        eta = step * (1 + log.exp()) * torch.sigmoid(gates[..., 0] + b_eta[:, None])
        sums = log.cumsum(1)
        a0 = (sums - log).exp()
        between = ((sums - log)[:, :, None] - sums[:, None]).tril(-1).exp().tril(-1)
        c0 = between * eta[:, None]
        L = c0 * (k @ k.mT)
        own = torch.stack([v - k, v - a0[..., None] * k])
        own, z = torch.linalg.solve_triangular(L, own, upper=False, unitriangular=True)
        last = (sums[:, -1:] - sums).exp() * eta
        written = last[..., None] * k
        tiles.append((k, own, z, written, log.exp(), eta, a0, c0))
        r = own @ control0.mT + z @ control.mT
        r = torch.cat([r[..., : 2 * d] + own.repeat(1, 1, 2), r[..., 2 * d :]], -1)
        control = sums[:, -1].exp()[:, None, None] * control + r.mT @ written
    outputs = []
    for queries, tile in zip(q.split(chunk, 1), tiles, strict=True):
        k, own, z, written, alpha, eta, a0, c0 = tile
        r = own + own @ memory0.mT + z @ memory.mT
        c1 = alpha[..., None] * c0 + torch.diag_embed(eta)
        y = (alpha * a0)[..., None] * (queries @ memory.mT) + c1 * (queries @ k.mT) @ r
        outputs.append(y)
        memory = (alpha * a0)[:, -1, None, None] * memory + r.mT @ written
    return torch.cat(outputs, 1), torch.cat([memory, control], 1)


def test_the_split_in_controller_and_memory_is_the_chunk_step():
    *problem, A = exact(modify_problem(0, 6, 3, 45, 16))
    step, chunk = 0.9, 14
    y, W = split_by_hand(*problem, A, chunk, step)
    expected, after, _ = both_modify(chunk, step)[1](*problem, A)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(W, after, rtol=0, atol=1e-10)


@pytest.mark.parametrize("z", [-8.0, -16.0, -17.0, -20.0, -60.0])
def test_retention_is_exact_where_one_plus_its_exponential_rounds_to_one(z):
    """1 - alpha is rate * softplus(z) there, about 0.01 with this rate."""
    problem = modify_problem(0, 2, 1, 20, 16)
    with torch.no_grad():
        problem[3][:, -1] = 0.0  # W0's row of alpha,
        problem[2][:, -1] = 0.0  # and W's: z is the bias
        problem[5].fill_(z)
        problem[6].fill_(0.01 * math.exp(-z))
    ours, expected = both_modify(32, 1.0)  # in one chunk: no row of alpha is read once written
    W = ours(*problem)[1].double()
    assert_equal_up_to(1e-6, {"W": W}, {"W": expected(*exact(problem))[1]})


@pytest.mark.parametrize("window", [None, 8])
def test_the_layer_takes_the_kernels_and_stays_itself(window):
    """Inside the mixer: cut anywhere, the fused layer gives what the torch layer gives."""
    torch.manual_seed(0)
    layer = SelfModifyingTitans(32, 2, chunk=8, window_reset=window).to(DEVICE)
    x = torch.randn(1 if window is None else 2, 33, 32, device=DEVICE)
    found = []
    for backend in ("torch", "triton"):
        layer.backend = backend
        state = None
        y = []
        with torch.no_grad():
            for part in x.split([11, 22], 1):
                out, state = layer(part, state)
                y.append(out)
        learned = state["running"][0].flatten(1)[:, :, None].expand(-1, -1, 32)
        found.append(torch.cat([*y, learned], 1))
    assert (found[0] - found[1]).norm() <= 1e-5 * found[0].norm()


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [False, True])
def test_both_layers_of_an_mlp_memory_take_the_fused_scan(momentum, monkeypatch):
    torch.manual_seed(0)
    layer = SelfModifyingTitans(16, 1, chunk=8, memory="mlp", momentum=momentum).to(DEVICE)
    x = torch.randn(1, 11, 16).to(DEVICE)
    scanned = []
    found = []
    original = kernels.scan

    def spy(W, *rest):
        scanned.append(tuple(W.shape))
        return original(W, *rest)

    monkeypatch.setattr(kernels, "scan", spy)
    for backend, part in ("torch", copy.deepcopy(layer).double()), ("triton", layer):
        part.backend = backend
        y, _ = part(x.to(part.start.dtype))
        gradients = torch.autograd.grad(y.square().sum(), list(part.parameters()))
        found.append(dict(enumerate([y, *gradients])))
    R = 51 if momentum else 50  # of the first layer: three memories of 16, a row for every gate
    assert scanned[:4] == 2 * [(1, 1, R, 16), (1, 1, 3, 16, 16)]
    assert_equal_up_to(1e-5, found[1], found[0])


# --------------------------------------------------------------------------------------------------
# As operators of torch


@pytest.mark.slow
@pytest.mark.parametrize("what", ["scan", "self_modify"])
def test_every_element_of_every_output_is_written(what):
    """Buffers that start as NaN give the same results, to the bit: so runs are identical, too."""
    if what == "scan":
        args = list(scan_problem(0, 1, 19, 16, 12, momentum=True, delta="series").values())
        f = scan_with("triton")
    else:
        args = modify_problem(0, 1, 1, 19, 16)
        f = both_modify(16, 1.0)[0]
    clean = results(f, args)

    with selfcheck.poisoned():
        found = results(f, args)
    for name, x in found.items():
        assert torch.equal(x, clean[name]), name


@pytest.mark.slow
def test_a_compiled_graph_holds_the_kernels_unbroken():
    problem = list(scan_problem(0, 1, 9, 16, 16, momentum=False, delta=1.0).values())
    compiled = torch.compile(scan_with("triton"), backend="aot_eager", fullgraph=True)
    uncompiled = results(scan_with("triton"), problem)
    for name, x in results(compiled, problem).items():
        assert torch.equal(x, uncompiled[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("which", ["scan", "modify"])
def test_the_operators_keep_their_promises(which):
    """Fake and real outputs agree in shape and dtype, nothing is mutated or aliased."""
    operators = torch.ops.nested_learning
    if which == "scan":
        a = scan_problem(0, N=1, T=9, dk=16, dv=12, momentum=True, delta=1.0)
        W = torch.stack([a["W"], a["S"]], 1).detach().requires_grad_()
        x = [W, *(a[name] for name in ("k", "u", "q", "eta", "alpha", "theta")), W.new_empty(0)]
        operator = operators.scan.default
        backward = operators.scan_backward.default
    else:
        x, q, W, W0, *gates = modify_problem(0, 1, 1, 9, 16)
        x = [x, q, W0, W, *gates]
        operator = operators.modify.default
        backward = operators.modify_backward.default
    promises = ("test_schema", "test_faketensor")
    forward = (*promises, "test_autograd_registration")
    torch.library.opcheck(operator, (x, 16, 1.0), test_utils=forward)
    out = [t.detach() for t in operator(x, 16, 1.0)]
    args = (out[:-1], out[2:], [t.detach() for t in x], 16, 1.0)
    torch.library.opcheck(backward, args, test_utils=promises)


def test_second_derivatives_are_refused_not_wrong():
    problem = list(scan_problem(0, N=1, T=5, dk=16, dv=16, momentum=False, delta=1.0).values())
    y = scan_with("triton")(*problem)[0]
    (g,) = torch.autograd.grad(y.sum(), problem[0], create_graph=True)
    with pytest.raises(RuntimeError, match="(?s)scan_backward.*autograd"):
        torch.autograd.grad(g.sum(), problem[1])


# --------------------------------------------------------------------------------------------------
# Which backend computes it


class OnGPU:
    """As much of a tensor on a GPU as `kernels_for` asks for."""

    is_cuda = True


@pytest.fixture
def proven(monkeypatch):
    """`auto` takes the kernels on a GPU."""
    monkeypatch.setattr(selfcheck, "why_not", lambda *args, **case: None)


def test_what_does_not_fit_falls_back_and_is_logged_once(proven, caplog, monkeypatch):
    monkeypatch.setattr(kernels, "unfit", lambda x, width, chunk: f"width {width} is too wide")
    fused._log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert fused.kernels_for("scan", OnGPU, 128) is None
        assert fused.kernels_for("scan", OnGPU, 128) is None
    assert [record.getMessage() for record in caplog.records] == [
        "scan runs in torch, far slower than the fused kernels would: width 128 is too wide"
    ]
    with pytest.raises(ValueError, match="'triton' cannot run scan: width 128 is too wide"):
        fused.kernels_for("scan", OnGPU, 128, backend="triton")


def test_what_does_not_fit_falls_back_in_a_compiled_graph_too(proven, caplog, monkeypatch):
    """Logging would break the graph: it was done before, or is by the next call outside of one."""
    monkeypatch.setattr(kernels, "unfit", lambda x, width, chunk: f"width {width} is too wide")
    fused._log_once.cache_clear()

    def f(x):
        return x + 1 if fused.kernels_for("scan", OnGPU, 128) is None else x

    with caplog.at_level(logging.WARNING):
        compiled = torch.compile(f, backend="eager", fullgraph=True)
        assert compiled(torch.zeros(1)).item() == 1
    assert caplog.records == []


def test_auto_is_torch_where_a_second_derivative_is_wanted(proven, monkeypatch):
    monkeypatch.setattr(kernels, "unfit", lambda x, width, chunk: None)
    mixer = SelfModifyingTitans(32, 2)
    taken = partial(fused.kernels_for, "scan", OnGPU, 16)
    with twice_differentiable(mixer):
        assert taken(backend=mixer.backend) is None
    assert taken(backend=mixer.backend) is kernels


def test_the_layer_asks_for_the_type_that_autocast_multiplies_in(monkeypatch):
    asked = []

    def spy(what, x, *rest, **case):
        asked.append(x.dtype)

    monkeypatch.setattr("titans.kernels_for", spy)
    layer = SelfModifyingTitans(32, 2, chunk=8).to(DEVICE)
    x = torch.randn(1, 9, 32, device=DEVICE)
    layer(x)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(DEVICE, dtype):
            layer(x)
    assert asked == [torch.float32, torch.bfloat16, torch.float32]


def test_backend_triton_says_why_it_cannot():
    sizes = dict(N=1, T=3, dk=16, dv=16, momentum=False, delta=1.0)
    wide = scan_problem(0, **sizes | {"dk": 80}).values()
    double = map_state(torch.Tensor.double, scan_problem(0, **sizes)).values()
    for told, problem in {"width 64 at most.*got 80": wide, "float64": double}.items():
        with pytest.raises(ValueError, match=told):
            scan_with("triton")(*problem)


def test_chunk_steps_that_do_not_fit_are_refused():
    one = torch.ones(1, device=DEVICE)
    assert kernels.unfit(one, 32, 128) is None
    for d, chunk in (24, 16), (8, 16), (128, 16), (32, 129):
        assert f"got {d} and {chunk}" in kernels.unfit(one, d, chunk)
        mixer = SelfModifyingTitans(2 * d, 2, chunk=chunk).to(DEVICE)
        mixer.backend = "triton"
        with pytest.raises(ValueError, match="heads of width 16, 32 or 64"):
            mixer(torch.randn(1, chunk, 2 * d, device=DEVICE))


def on_gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def test_float32_heads_of_64_are_refused_where_they_overflow_the_registers(monkeypatch):
    """An H100 holds them; the backward on an A100 would spill 17 KB a thread."""
    gpu = dict(is_cuda=True, device="cuda:0")
    like, narrow = (types.SimpleNamespace(**gpu, dtype=t) for t in (torch.float32, torch.bfloat16))
    refused = {"A100": (8, 0), "A10": (8, 6), "L4": (8, 9), "B200": (10, 0), "RTX 5090": (12, 0)}
    for capability in refused.values():
        on_gpu(monkeypatch, capability)
        assert "this GPU has {}.{}: use bfloat16".format(*capability) in kernels.unfit(like, 64, 64)
        assert kernels.unfit(like, 32, 64) is kernels.unfit(like, 64) is None
        assert kernels.unfit(narrow, 64, 64) is None
    on_gpu(monkeypatch, (9, 0))
    assert kernels.unfit(like, 64, 64) is None
    on_gpu(monkeypatch, (7, 5))
    for x, chunk in itertools.product((like, narrow), (64, None)):
        assert "8.0 or more, this GPU has 7.5" in kernels.unfit(x, 64, chunk)


def test_float32_scans_take_smaller_blocks_where_they_overflow_the_registers(monkeypatch):
    class Like(types.SimpleNamespace):
        is_cuda = True
        device = "cuda:0"

        def numel(self):
            return 0

    found = {}
    for capability in ((8, 0), (8, 9), (9, 0), (12, 0)):
        on_gpu(monkeypatch, capability)
        for dtype in (torch.float32, torch.bfloat16):
            W = Like(shape=(3, 1, 64, 64))
            k = Like(shape=(3, 100, 64), dtype=dtype)
            *_, blocks, tiles, constants = kernels._sizes([W, k, k, k, Like()], 64, 1.0)
            found[capability, dtype] = constants["C"], constants["DV"], blocks, tiles
    small = {case for case, sizes in found.items() if sizes == (16, 32, 2, 7)}
    assert small == {((8, 0), torch.float32), ((8, 9), torch.float32), ((12, 0), torch.float32)}
    assert set(found.values()) == {(16, 32, 2, 7), (32, 64, 1, 4)}


# --------------------------------------------------------------------------------------------------
# Compiled for GPUs, without one

# Compute capability, ten times: KiB of shared memory that a program can have
SHARED = {80: 163, 89: 99, 90: 227, 120: 99}
# As launched for heads of 64 on sm_90: function, key of its launch, compile-time constants.
SCAN = dict(C=32, DV=64, DK=64, MOMENTUM=0, DELTA=1)
MODIFY = dict(C=64, D=64, SPLIT=False)
STATES = MODIFY | dict(DV=kernels.DV)
KERNELS = {
    "scan forward": ("_scan_forward", "scan", SCAN | dict(READ=True, AGAIN=False)),
    "scan again": ("_scan_forward", "scan", SCAN | dict(READ=False, AGAIN=True)),
    "scan chain": ("_scan_chain", "scan", SCAN | dict(READ=True)),
    "scan local": ("_scan_local", "scan", SCAN | dict(READ=True)),
    "control forward": ("_control_forward", "control", MODIFY | dict(AGAIN=False)),
    "control again": ("_control_forward", "control", MODIFY | dict(AGAIN=True)),
    "control chain": ("_control_chain", "control", MODIFY),
    "memory states": ("_memory_states", "states", STATES | dict(BACK=False, AGAIN=False)),
    "memory again": ("_memory_states", "states", STATES | dict(BACK=False, AGAIN=True)),
    "memory back": ("_memory_states", "states", STATES | dict(BACK=True, AGAIN=False)),
    "memory read": ("_memory_read", "memory", dict(C=64, D=64)),
    "memory maps": ("_memory_maps", "memory", MODIFY),
    "memory local": ("_memory_local", "memory", MODIFY),
}
# Kernels, and the bytes of spill stack that a thread may have there, with operands in bfloat16;
# today's are in results/kernels_compiled.jsonl
STACK = {
    "scan forward": (96, 96, 0, 160),
    "scan again": (0, 0, 0, 0),
    "scan chain": (0, 0, 0, 0),
    "scan local": (352, 224, 64, 512),
    "control forward": (288, 160, 864, 384),
    "control again": (416, 384, 1312, 448),
    "control chain": (768, 1088, 1280, 1024),
    "memory states": (0, 0, 0, 0),
    "memory again": (0, 0, 0, 0),
    "memory back": (0, 0, 0, 0),
    "memory read": (0, 0, 0, 0),
    "memory maps": (0, 0, 0, 0),
    "memory local": (128, 64, 800, 160),
}

# Arguments of the kernels that are in the operands' type (W_kept in the backward only), and counts.
NARROW = {"k", "u", "q", "x", "dq", "du", "dk_out", "dv_out", "W0", "d_all", "dG_all", "d_kept"}
NARROW |= {"r_kept", "K_kept", "V_kept", "dW_kept", "W_all", "dk_memory", "dv_memory", "own", "o"}
NARROW |= {"z", "Z", "K", "E", "D0", "Kx", "Kx_kept", "z_kept", "c0_kept"}
INTEGERS = {"dv", "dk", *kernels.COUNTS}


def merged(ptx):
    """What a program computes twice from sums that a wgmma between the two changes in place.

    ptxas 12.8 and 13.0 take one for the other.
    """
    known = {}  # operation and arguments -> the registers among these
    changed = set()
    found = []
    for line in map(str.strip, ptx.splitlines()):
        registers = set(re.findall(r"%r\d+", line.partition("{")[2].partition("}")[0]))
        if "wgmma.mma_async" in line:
            changed |= {key for key, uses in known.items() if uses & registers}
        elif match := re.fullmatch(r"((?:cvt|add|sub|mul|fma|neg)\S*)\s+(%r\d+), (.*);", line):
            operation, result, arguments = match.groups()
            key = operation, arguments
            if key in changed:
                found.append(line)
            changed.discard(key)
            known[key] = set(re.findall(r"%r\d+", arguments))
            for other in [key for key, uses in known.items() if result in uses]:
                del known[other]
                changed.discard(other)
    return found


def test_what_ptxas_merges_is_found_in_ptx():
    product = "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%r1,%r2}, %rd1, %rd2, 1, 1;"
    rounded = "cvt.rn.bf16x2.f32 \t%r{}, %r1, %r2;"
    assert merged("\n".join([rounded.format(8), product, rounded.format(9)])) == [rounded.format(9)]
    assert merged("\n".join([rounded.format(8), rounded.format(9), product])) == []
    new = "add.f32 \t%r1, %r1, %r3;"  # the operand is another one
    assert merged("\n".join([rounded.format(8), product, new, rounded.format(9)])) == []


def compiled(name, target=90, dtype="bf16", **changes):
    """Registers, spill stack and shared memory (bytes) of a kernel, as launched on sm_`target`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, family, constants = KERNELS[name]
    function = getattr(kernels, function)
    if target != 90 and family != "scan":
        constants = constants | {"C": 16} | ({"SPLIT": True} if "SPLIT" in constants else {})
    constants = constants | changes
    narrow = NARROW if constants.get("AGAIN") is False else NARROW | {"W_kept"}
    if family in ("control", "states"):
        narrow = narrow | {"Y", "y"}

    def kind(p):
        if p in constants:
            return "constexpr"
        if p in INTEGERS:
            return "i32"
        if p == "step":
            return "fp32"
        return f"*{dtype}" if p in narrow else "*fp32"

    names = function.arg_names
    signature = {p: kind(p) for p in names}
    aligned = [p for p in names if signature[p].startswith("*") or p in ("dk", "dv")]
    hints = {(names.index(p),): [["tt.divisibility", 16]] for p in aligned}
    fixed = {(names.index(p),): value for p, value in constants.items()}
    source = ASTSource(function, signature, fixed, hints)
    options = kernels.LAUNCH[family]
    kernel = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [tool, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+)\s+STACK:(\d+)", usage).groups())
    return {
        "kernel": name,
        "target": target,
        "registers": registers,
        "stack": stack,
        "shared": kernel.metadata.shared,
        "merged": len(merged(kernel.asm["ptx"])),
        "warps": options["num_warps"],
        "triton": triton.__version__,
    }


def compiled_elsewhere(*words):
    """Rows of `compiled`; not under the interpreter, hence in a process of its own."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-W", "ignore", __file__, *words]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("number, target", list(enumerate(SHARED)))
def test_every_kernel_compiles_within_its_registers(number, target):
    usage = compiled_elsewhere(str(target))
    assert [(row["kernel"], row["target"]) for row in usage] == [(name, target) for name in STACK]
    for row in usage:
        assert row["shared"] <= SHARED[target] * 1024, row
        assert row["registers"] > 64 or row["stack"] == 0, row  # few: the compiler gave up
        assert row["stack"] <= STACK[row["kernel"]][number], row
        assert row["merged"] == 0, row


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["scan forward", "scan chain", "scan local"])
def test_float32_scans_compile_where_registers_overflow_at_full_size(kernel):
    (row,) = compiled_elsewhere("80", kernel, "fp32", "C=16", "DV=32")
    assert row["registers"] > 64 and row["stack"] <= 448, row


# --------------------------------------------------------------------------------------------------
# On a GPU only


def skip_unfit(x, width, chunk=None):
    if reason := kernels.unfit(x, width, chunk):
        pytest.skip(reason)


@pytest.mark.gpu
@needs_gpu
@both
@pytest.mark.parametrize("momentum", [False, True])
def test_scan_on_the_device_at_real_size(momentum, dtype):
    sizes = dict(N=8, T=700, dk=64, dv=64, momentum=momentum, delta=1.0)
    problem = list(scan_problem(0, **sizes, dtype=dtype).values())
    ours = results(scan_with("triton", tile=64), problem)
    assert_equal_up_to(TOLERANCE[dtype], ours, results(scan_with("torch"), exact(problem)))
    for name, x in results(scan_with("triton", tile=64), problem).items():
        assert torch.equal(x, ours[name]), name


@pytest.mark.gpu
@needs_gpu
@both
@pytest.mark.parametrize("d, chunk", [(64, 64), (32, 16), (64, 128), (32, 48)])
def test_chunk_step_on_the_device_at_real_size(d, chunk, dtype):
    """Of memories of a few tokens: in longer ones self-modification makes rounding grow."""
    problem = modify_problem(0, 32, 4, 300, d, dtype)
    skip_unfit(problem[0], d, chunk)
    with torch.no_grad():
        problem[5] += 2.2
        problem[6].pow_(0.3)
    f, expected = both_modify(chunk, 1.0)
    ours = results(f, problem)
    assert_equal_up_to(TOLERANCE[dtype], ours, results(expected, exact(problem)))
    for name, x in results(f, problem).items():
        assert torch.equal(x, ours[name]), name


CASES = [
    selfcheck.Case("self_modify", "bfloat16", 64, chunk=64),
    selfcheck.Case("self_modify", "float32", 64, chunk=64),
    selfcheck.Case("scan", "float32", 64, delta="series"),
    selfcheck.Case("scan", "bfloat16", 64, momentum=True),
]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kernel}-{case.dtype}")
def test_the_self_check_passes(case):
    like = torch.empty(0, dtype=getattr(torch, case.dtype), device=DEVICE)
    skip_unfit(like, 64, case.chunk or None)
    assert selfcheck.judge(case, torch.cuda.current_device()) is None


SANITIZED = """
import sys, torch
sys.path.insert(0, "tests")
import test_kernels as t
t.results(t.scan_with("triton"), list(t.scan_problem(0, 1, 37, 16, 24, True, "series").values()))
t.results(t.both_modify(24, 1.0)[0], t.modify_problem(0, 1, 1, 37, 16))
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    """Its racecheck sees shared memory alone; races in the GPU's own are the self-check's."""
    name = "compute-sanitizer"
    program = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    # without the pool, whose neighbours hide errors
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    options = dict(capture_output=True, text=True, cwd=ROOT, env=environment, timeout=500)
    run = subprocess.run(command, **options)
    if "Device not supported" in run.stdout + run.stderr:
        pytest.skip("compute-sanitizer does not support this device")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]


if __name__ == "__main__":
    # numbers of targets, names of kernels, a type, constants as C=16; all targets and kernels
    words = sys.argv[1:]
    constants = {name: int(n) for name, _, n in (w.partition("=") for w in words) if n}
    dtype = "fp32" if "fp32" in words else "bf16"
    for target in [int(word) for word in words if word.isdigit()] or SHARED:
        for name in [word for word in words if word in STACK] or STACK:
            print(json.dumps(compiled(name, target, dtype, **constants)), flush=True)
