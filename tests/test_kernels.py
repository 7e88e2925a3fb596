"""kernels.py against the torch path, which is tested against its own definition elsewhere.

Without a GPU the kernels run under Triton's interpreter, and are compiled ahead of time for an H100 by a process of its
own (`python tests/test_kernels.py` prints what each takes). With a GPU the same tests run on it, and those marked `gpu`.
"""

import copy
import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

import hope  # noqa: E402
import kernels  # noqa: E402
import memory  # noqa: E402
import titans  # noqa: E402
from fused import _SelfModify
from titans import SelfModifyingTitans

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"  # interpreted, see conftest.py
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # norm of the difference over the norm of the expected
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device")
both = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def nearest(x, source, target, rounding, convert=interpreter._convert_float):
    """Triton's interpreter cuts float32 off to bfloat16 (0.27% too small on average); the hardware rounds to nearest."""
    if (source, target) == (tl.float32, tl.bfloat16):
        return torch.from_numpy(x.copy()).bfloat16().view(torch.uint16).numpy()
    return convert(x, source, target, rounding)


interpreter._convert_float = nearest


def scan_problem(seed, N, T, dk, dv, momentum, delta, q=True, dtype=torch.float32):
    """Arguments of scan [N, ...], on DEVICE, with gradients; steps reach 1 + alpha, retention comes close to 0 and 1."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(N, *shape, generator=rng)

    def uniform():
        return torch.rand(N, T, generator=rng)

    alpha = 1 - uniform() ** 3
    args = dict(
        W=normal(dv, dk), k=F.normalize(normal(T, dk), dim=-1).to(dtype), u=normal(T, dv).to(dtype),
        eta=uniform() * (1 if momentum else 1 + alpha), alpha=alpha,
        q=F.normalize(normal(T, dk), dim=-1).to(dtype) if q else None,
        theta=0.9 * uniform() if momentum else None, S=normal(dv, dk) if momentum else None,
        delta=uniform() if delta == "series" else delta,
    )  # fmt: skip
    return {name: x.to(DEVICE).requires_grad_() if torch.is_tensor(x) else x for name, x in args.items()}


def modify_problem(seed, N, heads, T, d, dtype=torch.float32):
    """x, q, W, W0, b_eta, b_alpha, A of kernels.self_modify, around alpha 0.9, where the shortest heads start."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    rows = 3 * d + 2
    args = [normal(N, T, d).to(dtype), F.normalize(normal(N, T, d), dim=-1).to(dtype), 0.2 * normal(N, rows, d) * d**-0.5,
            normal(heads, rows, d) * d**-0.5, normal(N), normal(N) - 2.2, normal(N).exp()]  # fmt: skip
    return [x.to(DEVICE).requires_grad_() for x in args]


def modify_in_torch(x, q, W, W0, b_eta, b_alpha, A, chunk, step):
    W0 = W0.repeat(len(x) // len(W0), 1, 1)
    return _SelfModify.apply(x, q, W, W0, b_eta[:, None], b_alpha[:, None], A[:, None], chunk, step)


def exact(args):
    """The same values in float64, as leaves of their own."""
    return [x.detach().double().requires_grad_() if torch.is_tensor(x) else x for x in args]


def results(f, args):
    """Outputs of f and gradients of one random weighted sum of them, by name."""
    outputs, rng = [y for y in f(*args) if y is not None], torch.Generator().manual_seed(1)
    loss = sum((y * torch.randn(y.shape, generator=rng).to(y)).sum() for y in outputs)
    leaves = [x for x in args if torch.is_tensor(x)]
    gradients = torch.autograd.grad(loss, leaves)
    return {f"output {i}": y for i, y in enumerate(outputs)} | {f"gradient {i}": g for i, g in enumerate(gradients)}


def assert_equal_up_to(tolerance, ours, expected):
    for name, e in expected.items():
        assert ours[name].shape == e.shape, name
        gap = (ours[name].double() - e).norm() / e.norm().clamp(min=1e-3)
        assert gap <= tolerance, f"{name}: differs by {gap:.2g}"


def scan_with(backend, tile=16):
    return lambda W, k, u, eta, alpha, q, theta, S, delta: memory.scan(
        W, k, u, eta, alpha, q, theta=theta, S=S, delta=delta, tile=tile, backend=backend
    )


def random_scan(seed):
    """Sizes and switches of a scan; T is rarely a multiple of the tile, widths are rarely powers of two, and some are 1."""
    draw = random.Random(seed)
    return dict(N=draw.randint(1, 3), T=draw.randint(1, 40), dk=draw.randint(1, 40), dv=draw.choice([draw.randint(1, 40), 80]),
                momentum=draw.random() < 0.5, delta=draw.choice([0.0, 0.5, 1.0, "series"]), q=draw.random() < 0.8)  # fmt: skip


@both
@pytest.mark.parametrize("seed", range(6))
def test_the_fused_scan_and_every_gradient_equal_torch(seed, dtype):
    problem, tile = list(scan_problem(seed, **random_scan(seed), dtype=dtype).values()), random.Random(seed).choice([16, 32])
    ours, expected = results(scan_with("triton", tile), problem), results(scan_with("torch"), exact(problem))
    assert all(g.dtype == x.dtype for g, x in zip([v for n, v in ours.items() if n.startswith("g")],
                                                  [x for x in problem if torch.is_tensor(x)], strict=True))  # fmt: skip
    assert_equal_up_to(TOLERANCE[dtype], ours, expected)


def test_random_scans_cover_every_switch():
    cases = [random_scan(seed) for seed in range(6)]
    assert {c["delta"] for c in cases} == {0.0, 0.5, 1.0, "series"} and {c["momentum"] for c in cases} == {True, False}
    assert {c["q"] for c in cases} == {True, False} and any(c["dv"] == 80 for c in cases) and any(c["T"] < 16 for c in cases)


def test_a_single_memory_needs_no_leading_dimension():
    batch = [x.detach() if torch.is_tensor(x) else x for x in scan_problem(4, 1, 5, 16, 12, True, "series").values()]
    for one, of_batch in zip(scan_with("triton")(*(x[0] for x in batch)), scan_with("triton")(*batch), strict=True):
        assert torch.equal(one, of_batch[0])


def test_states_between_kept_ones_are_computed_again(monkeypatch):
    """More tiles than the backward holds at once, and a last segment that is shorter."""
    monkeypatch.setattr(kernels, "EVERY", 2)
    monkeypatch.setattr(kernels, "SPAN", 2)
    problem = list(scan_problem(1, N=1, T=73, dk=16, dv=16, momentum=True, delta=1.0).values())
    assert_equal_up_to(1e-5, results(scan_with("triton"), problem), results(scan_with("torch"), exact(problem)))


def test_repeated_keys_at_the_largest_step_stay_exact():
    """k_t = k, eta = 2, alpha = 1: the powers of the triangular matrix reach 2^31, its inverse has entries of 2 only."""
    args = scan_problem(2, N=1, T=64, dk=16, dv=16, momentum=False, delta=1.0)
    k = args["k"].detach()[:, :1].expand(1, 64, 16)
    args |= dict(k=k, q=k, eta=torch.full_like(args["eta"], 2), alpha=torch.ones_like(args["alpha"]))
    args = [x.detach() if torch.is_tensor(x) else x for x in args.values()]
    ours, expected = scan_with("triton", 32)(*args)[0], scan_with("torch")(*exact(args))[0]
    assert (ours - expected).norm() <= 1e-5 * expected.norm()


def test_vanishing_retention_and_momentum_keep_exact_gradients():
    args = scan_problem(3, N=1, T=20, dk=16, dv=16, momentum=True, delta=1.0)
    with torch.no_grad():
        args["alpha"][:, 3:6], args["theta"][:, 8:10], args["alpha"][:, 12:] = 1e-30, 0.0, 1.0
    problem = list(args.values())
    assert_equal_up_to(1e-5, results(scan_with("triton"), problem), results(scan_with("torch"), exact(problem)))


def random_modify(seed, dtype):
    """(N, heads, T, d), chunk, inner step. The gradients of gates are one number a head, a sum over tokens that may cancel:
    rounding x, q and W0 to bfloat16 alone changes those of 4 heads by up to 2.7e-2, so there are 8 heads in bfloat16."""
    draw = random.Random(seed)
    d, heads, chunk, step = draw.choice([16, 32]), draw.choice([1, 2]), draw.randint(6, 28), draw.uniform(0.5, 1)
    return (2, heads, draw.randint(1, 40), d) if dtype == torch.float32 else (8, heads, draw.randint(6, 20), d), chunk, step


@both
@pytest.mark.parametrize("seed", range(3))
def test_the_fused_chunk_step_and_every_gradient_equal_torch(seed, dtype):
    sizes, *rest = random_modify(seed, dtype)
    problem = modify_problem(seed, *sizes, dtype)
    ours = results(lambda *args: kernels.self_modify(*args, *rest), problem)
    assert_equal_up_to(TOLERANCE[dtype], ours, results(lambda *args: modify_in_torch(*args, *rest), exact(problem)))


def test_the_layer_takes_the_kernels_and_stays_itself():
    """Inside the mixer: cut anywhere, the fused layer gives what the torch layer gives."""
    torch.manual_seed(0)
    layer, x = SelfModifyingTitans(32, 2, chunk=8).to(DEVICE), torch.randn(1, 21, 32, device=DEVICE)
    ys = []
    for backend in ("torch", "triton"):
        layer.backend, state, y = backend, None, []
        with torch.no_grad():
            for part in x.split([11, 10], 1):
                out, state = layer(part, state)
                y.append(out)
        ys.append(torch.cat([*y, state["running"][0].flatten()[None, :, None].expand(1, -1, 32)], 1))
    assert (ys[0] - ys[1]).norm() <= 1e-5 * ys[0].norm()


@pytest.mark.parametrize("momentum", [False, True])
def test_both_layers_of_an_mlp_memory_take_the_fused_scan(momentum, monkeypatch):
    torch.manual_seed(0)
    layer = SelfModifyingTitans(16, 1, chunk=8, memory="mlp", momentum=momentum).to(DEVICE)
    x = torch.randn(1, 11, 16).to(DEVICE)
    scanned, original, found = [], kernels.scan, []
    monkeypatch.setattr(kernels, "scan", lambda W, *rest: scanned.append(tuple(W.shape)) or original(W, *rest))
    for backend, part in ("torch", copy.deepcopy(layer).double()), ("triton", layer):
        part.backend = backend
        y, _ = part(x.to(part.start.dtype))
        found.append([y, *torch.autograd.grad(y.square().sum(), list(part.parameters()))])
    n = 51 if momentum else 50  # rows of the first layer: three memories of 16, a row for every gate
    assert scanned[:4] == 2 * [(1, 1, n, 16), (1, 1, 3, 16, 16)]
    assert_equal_up_to(1e-5, dict(enumerate(found[1])), dict(enumerate(found[0])))


@pytest.mark.parametrize("what", ["scan", "self_modify"])
def test_every_element_of_every_output_is_written(what, monkeypatch):
    """Buffers that start as NaN give the same results."""
    if what == "scan":
        args, f = list(scan_problem(0, N=1, T=19, dk=16, dv=12, momentum=True, delta="series").values()), scan_with("triton")
    else:
        args, f = modify_problem(0, 1, 1, 19, 16), lambda *args: kernels.self_modify(*args, 16, 1.0)
    clean = results(f, args)
    for owner, name in ((torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, original=original, **k: original(*a, **k).fill_(float("nan")))
    for name, x in results(f, args).items():
        assert torch.equal(x, clean[name]), name  # which also shows that runs are identical


def test_a_compiled_graph_holds_the_kernels_unbroken():
    problem = list(scan_problem(0, N=1, T=9, dk=16, dv=16, momentum=False, delta=1.0).values())
    compiled = torch.compile(scan_with("triton"), backend="aot_eager", fullgraph=True)
    plain = results(scan_with("triton"), problem)
    assert all(torch.equal(x, plain[name]) for name, x in results(compiled, problem).items())


@pytest.mark.parametrize("which", ["scan", "modify"])
def test_the_operators_keep_their_promises(which):
    """Fake and real outputs agree in shape and dtype, nothing is mutated or aliased."""
    if which == "scan":
        a = scan_problem(0, N=1, T=9, dk=16, dv=12, momentum=True, delta=1.0)
        W = torch.stack([a["W"], a["S"]], 1).detach().requires_grad_()
        x = [W, *(a[name] for name in ("k", "u", "q", "eta", "alpha", "theta")), W.new_empty(0)]
        args, operator = (x, 16, 1.0), torch.ops.nested_learning.scan.default
    else:
        x, q, W, W0, *gates = modify_problem(0, 1, 1, 9, 16)
        args, operator = ([x, q, W0, W, *gates], 16, 1.0), torch.ops.nested_learning.modify.default
    torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))
    backward = getattr(torch.ops.nested_learning, f"{which}_backward").default
    (x, *numbers), out = args, operator(*args)
    x, out = [t.detach() for t in x], [t.detach() for t in out]
    opcheck_args = (out[:-1], out[2:], x, *numbers)
    torch.library.opcheck(backward, opcheck_args, test_utils=("test_schema", "test_faketensor"))


def test_second_derivatives_are_refused_not_wrong():
    problem = list(scan_problem(0, N=1, T=5, dk=16, dv=16, momentum=False, delta=1.0).values())
    y = scan_with("triton")(*problem)[0]
    (g,) = torch.autograd.grad(y.sum(), problem[0], create_graph=True)
    with pytest.raises(RuntimeError, match="(?s)scan_backward.*autograd"):
        torch.autograd.grad(g.sum(), problem[1])


def test_what_does_not_fit_falls_back_and_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(kernels, "unfit", lambda x, width, chunk=None: f"width {width} is too wide")
    monkeypatch.setattr(memory, "AUTO_KERNELS", True)
    memory._log_once.cache_clear()
    on_gpu = type("Tensor", (), {"is_cuda": True})()
    with caplog.at_level(logging.WARNING):
        assert memory.fused("scan", on_gpu, 128) is None and memory.fused("scan", on_gpu, 128) is None
    assert [r.getMessage() for r in caplog.records] == [
        "scan runs in torch, many times slower than the fused kernels would: width 128 is too wide"
    ]
    with pytest.raises(ValueError, match="'triton' cannot run scan: width 128 is too wide"):
        memory.fused("scan", on_gpu, 128, backend="triton")


@pytest.mark.parametrize("change, told", [(dict(dk=80), "width 64 at most.*got 80"), (dict(dtype=torch.float64), "float64")])
def test_backend_triton_says_why_it_cannot(change, told):
    sizes = dict(N=1, T=3, dk=16, dv=16, momentum=False, delta=1.0) | change
    with pytest.raises(ValueError, match=told):
        scan_with("triton")(*scan_problem(0, **sizes).values())


@pytest.mark.parametrize("d, chunk", [(24, 16), (8, 16), (128, 16), (32, 129)])
def test_chunk_steps_that_do_not_fit_are_refused(d, chunk):
    told = kernels.unfit(torch.ones(1, device=DEVICE), d, chunk)
    assert f"got {d} and {chunk}" in told and kernels.unfit(torch.ones(1, device=DEVICE), 32, 128) is None
    mixer = SelfModifyingTitans(2 * d, 2, chunk=chunk).to(DEVICE)
    mixer.backend = "triton"
    with pytest.raises(ValueError, match="heads of width 16, 32 or 64"):
        mixer(torch.randn(1, chunk, 2 * d, device=DEVICE))


def test_auto_is_torch_where_a_second_derivative_is_wanted(monkeypatch):
    monkeypatch.setattr(memory, "AUTO_KERNELS", True)
    with hope.twice_differentiable(torch.nn.Identity()):
        assert memory.fused("scan", type("Tensor", (), {"is_cuda": True})(), 16) is None
    assert memory.AUTO_KERNELS


# --------------------------------------------------------------------------------------------------
# Compiled for an H100, without one


COMPILED = ["scan forward", "scan again", "scan chain", "scan local",
            "modify forward", "modify again", "modify chain"]  # fmt: skip


def compiled(name, dtype="bf16", **changes):
    """Registers, spill stack and shared memory (bytes) of a kernel for heads of 64, compiled for sm_90 as it is launched."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    family, part = name.split()
    function = getattr(kernels, f"_{family}_{'forward' if part == 'again' else part}")
    if family == "scan":
        constants = dict(C=32, DV=64, DK=64, MOMENTUM=0, DELTA=1, READ=part != "again")
        constants |= {"WRITE": True} if part == "local" else {}
    else:
        constants = dict(C=16, D=64)
    constants |= ({"AGAIN": part == "again"} if part in ("forward", "again") else {}) | changes
    narrow = {"k", "u", "q", "x", "dq", "du", "dk_out", "W0", "d_all", "dG_all", "dr_read", "dk_read"}
    narrow |= {f"{name}_kept" for name in ("r", "K", "V", "dW")}
    if part != "forward":
        narrow |= {"W_kept"}
    whole = {"T", "dv", "dk", "rows", "wide", "H", "chunk", "PER", "segments", "EVERY", "first", "tiles"}

    def kind(p):
        if p in constants:
            return "constexpr"
        return "i32" if p in whole else "fp32" if p == "step" else f"*{dtype}" if p in narrow else "*fp32"

    signature = {p: kind(p) for p in function.arg_names}
    aligned = [i for i, (p, k) in enumerate(signature.items()) if k.startswith("*") or p in ("dk", "dv", "wide")]
    source = ASTSource(function, signature, {(function.arg_names.index(p),): v for p, v in constants.items()},
                       {(i,): [["tt.divisibility", 16]] for i in aligned})  # fmt: skip
    options = kernels.LAUNCH[family]
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+)\s+STACK:(\d+)", usage).groups())
    return dict(kernel=name, registers=registers, stack=stack, shared=kernel.metadata.shared, warps=options["num_warps"],
                triton=triton.__version__)  # fmt: skip


def test_every_kernel_compiles_for_hopper_within_its_registers():
    """Not under the interpreter, hence in a process of its own. Bounds are today's values and a little room."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(titans.__file__).parent)
    run = subprocess.run([sys.executable, "-W", "ignore", __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    usage = {row["kernel"]: row for row in map(json.loads, run.stdout.splitlines())}
    assert list(usage) == COMPILED
    for name, row in usage.items():
        assert row["shared"] <= 227 * 1024 and row["registers"] <= 255, row
        assert row["stack"] <= STACK[name], row


# Bytes of spill stack a thread may have: 0, 0, 0, 64, 0, 0, 224 with Triton 3.9 and 48, 0, 0, 48, 56, 192, 152 with 3.6.
STACK = {"scan forward": 64, "scan again": 0, "scan chain": 0, "scan local": 64,
         "modify forward": 64, "modify again": 192, "modify chain": 224}  # fmt: skip


# --------------------------------------------------------------------------------------------------
# On a GPU only


@pytest.mark.gpu
@needs_gpu
@both
@pytest.mark.parametrize("momentum", [False, True])
def test_scan_on_the_device_at_real_size(momentum, dtype):
    problem = list(scan_problem(0, N=8, T=700, dk=64, dv=64, momentum=momentum, delta=1.0, dtype=dtype).values())
    f = scan_with("triton", 64)
    ours = results(f, problem)
    assert_equal_up_to(TOLERANCE[dtype], ours, results(scan_with("torch"), exact(problem)))
    assert all(torch.equal(x, ours[name]) for name, x in results(f, problem).items())


@pytest.mark.gpu
@needs_gpu
@both
@pytest.mark.parametrize("d, chunk", [(64, 64), (32, 16), (64, 128), (32, 48)])
def test_chunk_step_on_the_device_at_real_size(d, chunk, dtype):
    problem = modify_problem(0, 32, 4, 300, d, dtype)
    with torch.no_grad():  # memories of a few tokens: self-modification makes rounding grow in longer ones, in torch too
        problem[5] += 2.2
        problem[6].pow_(0.3)

    def f(*args):
        return kernels.self_modify(*args, chunk, 1.0)

    ours = results(f, problem)
    assert_equal_up_to(TOLERANCE[dtype], ours, results(lambda *args: modify_in_torch(*args, chunk, 1.0), exact(problem)))
    assert all(torch.equal(x, ours[name]) for name, x in results(f, problem).items())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    script = (
        "import torch, sys; sys.path.insert(0, 'tests'); import test_kernels as t\n"
        "t.results(t.scan_with('triton'), list(t.scan_problem(0, 1, 37, 16, 24, True, 'series').values()))\n"
        "t.results(lambda *a: t.kernels.self_modify(*a, 24, 1.0), t.modify_problem(0, 1, 1, 37, 16))\n"
        "torch.cuda.synchronize()"
    )
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", script]
    alone = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else neighbours in the pool hide errors
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(titans.__file__).parent, env=alone, timeout=500)
    if "Device not supported" in run.stdout + run.stderr:
        pytest.skip("compute-sanitizer does not support this device")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]


if __name__ == "__main__":
    for name in sys.argv[1:] or COMPILED:
        print(json.dumps(compiled(name)), flush=True)
