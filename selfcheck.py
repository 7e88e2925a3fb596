"""Is kernels.py right on this very GPU? What `backend="auto"` asks before it takes a kernel.

    python kernels.py           # compare what the default models use, here, and say how it went

A compiler can break a right kernel: ptxas 12.8 (of Triton 3.6) overwrites what tells a Hopper
matrix instruction where its operands lie, once in a few launches and only where registers are
full, so that self-modification of heads of 64 crashes on an H100. Tests elsewhere cannot tell. So
each kind of kernel, in the data type, head width and chunk of the model, is compared with torch on
the GPU at hand, once, in a process of its own (a crash leaves a process without a GPU) and with a
time limit. The verdict is kept in ~/.cache/nested_learning for this GPU, its driver, torch, CUDA,
Triton and kernels.py. What fails is tried again with another ptxas, if the CUDA toolkit has one,
then without Hopper's matrix instructions; then torch computes it.

The comparison: a few problems, copied over twice as many programs as the GPU runs at once and a
few more, with more tiles than the backward holds at once and a ragged last one. Buffers start as
NaN. All copies must be equal to the last bit, and so must many runs, one of them beside a matrix
product on another stream: a race, a tail that is not written, one wrong program out of all show
here. Then each problem's outputs and gradients, one by one, against torch in float64.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent
LIMIT = 600  # seconds a comparison may take, compilation included
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # |ours - torch's| / |torch's|
REPEATS = 20  # what breaks does so in a part of all launches
PROBLEMS = 8  # different ones; also the heads of a layer


@dataclass(frozen=True)
class Case:
    """One kind of kernel. chunk: of self_modify; momentum and delta: of scan."""

    kernel: str  # "scan" or "self_modify"
    dtype: str  # of the products: "float32" or "bfloat16"
    width: int  # of the keys, of a head
    chunk: int = 0
    momentum: bool = False
    delta: float | str = 1.0  # a number, or "series": one for every token


def round_to_nearest():
    """From here on Triton's interpreter rounds to bfloat16 as hardware does; it would cut off."""
    import triton.language as tl
    from triton.runtime import interpreter

    def nearest(x, source, target, rounding, convert=interpreter._convert_float):
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(x.copy()).bfloat16().view(torch.uint16).numpy()
        return convert(x, source, target, rounding)

    interpreter._convert_float = nearest


# --------------------------------------------------------------------------------------------------
# Problems


def scan_problem(seed, N, T, dk, dv, momentum, delta, q=True, dtype=torch.float32):
    """Arguments of memory.scan [N, ...] by name.

    Steps reach 1 + alpha, retention comes close to 0 and 1.
    """
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(N, *shape, generator=rng)

    def unit(*shape):
        return F.normalize(normal(*shape), dim=-1).to(dtype)

    def uniform():
        return torch.rand(N, T, generator=rng)

    alpha = 1 - uniform() ** 3
    return {
        "W": normal(dv, dk),
        "k": unit(T, dk),
        "u": normal(T, dv).to(dtype),
        "eta": uniform() * (1 if momentum else 1 + alpha),
        "alpha": alpha,
        "q": unit(T, dk) if q else None,
        "theta": 0.9 * uniform() if momentum else None,
        "S": normal(dv, dk) if momentum else None,
        "delta": uniform() if delta == "series" else delta,
    }


def modify_problem(seed, N, heads, T, d, dtype=torch.float32):
    """Arguments of kernels.self_modify up to A. alpha is around 0.9, where short heads start:
    in longer memories self-modification makes rounding grow."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    R = 3 * d + 2
    x = normal(N, T, d).to(dtype)
    q = F.normalize(normal(N, T, d), dim=-1).to(dtype)
    W = 0.2 * normal(N, R, d) * d**-0.5
    W0 = normal(heads, R, d) * d**-0.5
    return [x, q, W, W0, normal(N), normal(N) - 2.2, normal(N).exp()]  # b_eta, b_alpha, A


def modify_by(backend, chunk, step):
    """The chunk step as a function of `modify_problem`'s arguments, by "triton" or "torch"."""
    import fused
    import kernels

    if backend == "triton":
        return lambda *args: kernels.self_modify(*args, chunk, step)

    def in_torch(x, q, W, W0, *gates):
        W0 = W0.repeat(len(x) // len(W0), 1, 1)
        gates = [gate[:, None] for gate in gates]
        return fused.self_modify(x, q, W, W0, *gates, chunk, step)[:3]

    return in_torch


def scan_by(backend, tile):
    """The learning rule as a function of `scan_problem`'s arguments, by "triton" or "torch"."""
    import memory

    def scan(W, k, u, eta, alpha, q, theta, S, delta):
        options = dict(theta=theta, S=S, delta=delta, tile=tile, backend=backend)
        return memory.scan(W, k, u, eta, alpha, q, **options)

    return scan


def functions(case: Case):
    """(by the kernels, by torch): functions of a problem's arguments, as a list."""
    if case.kernel == "scan":
        return scan_by("triton", 64), scan_by("torch", 64)
    return modify_by("triton", case.chunk, 0.9), modify_by("torch", case.chunk, 0.9)


def results(f, args) -> dict:
    """Outputs of f, and gradients of a weighted sum of them, by name. args: tensors or None."""
    args = [x.detach().requires_grad_() if torch.is_tensor(x) else x for x in args]
    outputs = [y for y in f(*args) if y is not None]
    loss = 0.0
    for y in outputs:  # fixed weights, alike for all copies of a problem
        weights = torch.linspace(0, 40, y[0].numel(), device=y.device, dtype=torch.float64).cos()
        loss = loss + (y * weights.view(y.shape[1:]).to(y)).sum()
    gradients = torch.autograd.grad(loss, [x for x in args if torch.is_tensor(x)])
    named = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return named | {f"gradient {i}": g for i, g in enumerate(gradients)}


# --------------------------------------------------------------------------------------------------
# The comparison


@contextlib.contextmanager
def poisoned():
    """Within, buffers that are not yet written hold NaN."""

    def filled(original):
        def new(*args, **options):
            x = original(*args, **options)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return new

    places = ((torch, "empty_like"), (torch.Tensor, "new_empty"))
    before = [getattr(owner, name) for owner, name in places]
    for (owner, name), original in zip(places, before, strict=True):
        setattr(owner, name, filled(original))
    try:
        yield
    finally:
        for (owner, name), original in zip(places, before, strict=True):
            setattr(owner, name, original)


@contextlib.contextmanager
def busy(device):
    """Within, the GPU also multiplies matrices, on a stream of its own."""
    with torch.cuda.stream(torch.cuda.Stream(device)):
        a = torch.randn(4096, 4096, device=device)
        for _ in range(20):
            a = (a @ a).clamp(-1, 1)
    yield
    torch.cuda.synchronize(device)


@contextlib.contextmanager
def short_spans():
    """Within, few tiles are held at once: short texts have several spans."""
    import kernels

    before = kernels.EVERY, kernels.SPAN, kernels.FORWARD_SPAN
    kernels.EVERY, kernels.SPAN, kernels.FORWARD_SPAN = 2, 2, 2
    try:
        yield
    finally:
        kernels.EVERY, kernels.SPAN, kernels.FORWARD_SPAN = before


def compare(case: Case, device: torch.device, copies: int, T: int) -> tuple[float, list[str]]:
    """(largest relative error, what is wrong) of a kernel against torch, see the top."""
    dtype = getattr(torch, case.dtype)
    if case.kernel == "scan":
        sizes = (PROBLEMS, T, case.width, case.width)
        problem = scan_problem(0, *sizes, case.momentum, case.delta, dtype=dtype).values()
        shared = None
    else:
        problem = modify_problem(0, PROBLEMS, PROBLEMS, T, case.width, dtype)
        shared = 3  # W0, of all copies: its gradient is summed over them
    problem = [x.to(device) if torch.is_tensor(x) else x for x in problem]
    ours, torchs = functions(case)

    many = list(problem)
    for i, x in enumerate(problem):
        if torch.is_tensor(x) and i != shared:
            many[i] = x.repeat(copies, *[1] * (x.ndim - 1))
    with poisoned(), short_spans():
        found = results(ours, many)
        again = [results(ours, many)]
        if device.type == "cuda":
            again += [results(ours, many) for _ in range(REPEATS)]
            with busy(device):
                again.append(results(ours, many))
    exact = [x.double() if torch.is_tensor(x) else x for x in problem]
    worst = 0.0
    wrong = []
    for name, wanted in results(torchs, exact).items():
        x = found[name]
        gate = wanted.ndim == 1  # one number a head, a sum over all tokens that may cancel
        if not all(torch.equal(x, run[name]) for run in again):
            wrong.append(f"{name} changes from run to run, or is not written")
        if name == f"gradient {shared}":
            x = x / copies
        else:
            each = x.unflatten(0, (copies, PROBLEMS))
            # torch adds up gates, by rows, and not always in the same order
            if not torch.allclose(each, each[:1], rtol=1e-3 if gate else 0, atol=0):
                wrong.append(f"{name} differs between programs with equal inputs")
            # the worst program of each problem
            x = each.double() - wanted
            x = wanted + x.gather(0, x.abs().nan_to_num(torch.inf).argmax(0, keepdim=True))[0]
        rows = (1, -1) if gate else (len(wanted), -1)
        gap = (x.double() - wanted).reshape(rows).norm(dim=1)
        error = (gap / wanted.reshape(rows).norm(dim=1).clamp(min=1e-3)).max().item()
        error /= 4 if gate else 1
        worst = max(worst, error)
        if not error <= TOLERANCE[case.dtype]:
            wrong.append(f"{name} differs from torch by {error:.2g}, relatively")
    return worst, wrong


# --------------------------------------------------------------------------------------------------
# Verdicts


@dataclass
class Verdict:
    """How a comparison ended: error relative, `wrong` empty where it passed."""

    error: float
    wrong: list
    seconds: float


def ways() -> list[dict]:
    """Environments in which to compile, the usual one first."""
    found = [{}]
    ptxas = shutil.which("ptxas") or shutil.which("ptxas", path="/usr/local/cuda/bin")
    if ptxas and "TRITON_PTXAS_PATH" not in os.environ:
        found.append({"TRITON_PTXAS_PATH": ptxas})
    if "DISABLE_MMA_V3" not in os.environ:
        found.append({"DISABLE_MMA_V3": "1"})
    return found


def check_apart(case: Case, device: int, way: dict) -> Verdict:
    """`compare` in a process of its own."""
    command = [sys.executable, str(ROOT / "selfcheck.py"), json.dumps(asdict(case)), str(device)]
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"} | way
    began = time.perf_counter()
    try:
        options = dict(capture_output=True, text=True, env=environment, timeout=LIMIT)
        run = subprocess.run(command, **options)
        return Verdict(**json.loads(run.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        why = f"not done after {LIMIT} s"
    except (IndexError, ValueError, TypeError):
        why = ([f"exit status {run.returncode}", *run.stderr.strip().splitlines()])[-1][:300]
    return Verdict(0.0, [why], time.perf_counter() - began)


def cache_file() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "nested_learning" / "kernels.json"


@functools.cache
def driver() -> str | None:
    """The version of NVIDIA's driver, which has a compiler of its own."""
    with contextlib.suppress(OSError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True).stdout.strip() or None
    return None


def conditions(case: Case, device: int, way: dict) -> str:
    """What a verdict holds for, as a key of the cache."""
    import triton

    chosen = {name: os.environ.get(name) for name in ("TRITON_PTXAS_PATH", "DISABLE_MMA_V3")}
    gpu = torch.cuda.get_device_properties(device)
    code = b"".join((ROOT / name).read_bytes() for name in ("kernels.py", "selfcheck.py"))
    parts = [asdict(case), chosen | way, gpu.name, gpu.major, gpu.minor, torch.__version__]
    parts += [driver(), torch.version.cuda, triton.__version__, hashlib.sha256(code).hexdigest()]
    return json.dumps(parts)


def known() -> dict:
    """The verdicts of the cache, by their conditions; none where it is missing or damaged."""
    try:
        found = json.loads(cache_file().read_text())
        return {key: Verdict(**verdict) for key, verdict in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def keep(key: str, verdict: Verdict) -> None:
    """Add to the cache; where it cannot be written, the next process checks again."""
    path = cache_file()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps(known() | {key: verdict}, default=asdict))
        beside.replace(path)


def say(message: str) -> None:
    logging.getLogger(__name__).warning(message)


# Of this process: the arguments of `why_not` -> why `auto` may not take the kernel, or None
VERDICTS = {}


def why_not(kernel, x, width, chunk=0, momentum=False, delta=1.0) -> str | None:
    """Why `auto` may not take a kernel for tensors like x, on a GPU; None where it may.

    The first question of a kind has it checked, but not inside a graph that is being compiled:
    there, what was not asked before is not taken. For the others see Case.
    """
    key = (kernel, x.dtype, width, chunk, momentum, delta)
    if key not in VERDICTS:
        if torch.compiler.is_compiling():
            return "nothing had asked for them before the model was compiled"
        dtype = str(x.dtype).removeprefix("torch.")
        VERDICTS[key] = judge(Case(kernel, dtype, *key[2:]), x.get_device())
    return VERDICTS[key]


def judge(case: Case, device: int) -> str | None:
    """The verdict on a kernel that was not asked for before, known or found now."""
    name = f"kernels: {case.kernel} ({case.dtype}, width {case.width})"
    for way in ways():
        key = conditions(case, device, way)
        verdict = known().get(key)
        if verdict is None:
            say(f"{name} is compared with torch on this GPU, once ...")
            verdict = check_apart(case, device, way)
            keep(key, verdict)
        how = "".join(f", with {variable}={value}" for variable, value in way.items())
        gpu = torch.cuda.get_device_name(device)
        if not verdict.wrong:
            os.environ.update(way)  # what is compiled from here on is what was checked
            say(f"{name} passed on {gpu} ({verdict.seconds:.0f} s), in use{how}")
            return None
        say(f"{name} failed on {gpu}{how}: {'; '.join(verdict.wrong[:3])}")
    return "they failed the comparison with torch on this GPU"


def taken(kernel: str) -> bool:
    """Whether kernels of this name were asked for in this process, and none was refused."""
    asked = [why for key, why in VERDICTS.items() if key[0] == kernel]
    return bool(asked) and not any(asked)


def agree(gather) -> None:
    """Several processes: what failed in one is taken by none. gather(value): those of all."""
    for verdicts in gather(VERDICTS):
        for key, why in verdicts.items():
            VERDICTS[key] = VERDICTS.get(key) or why


# --------------------------------------------------------------------------------------------------
# The command


def main(argv: list[str]) -> int:
    """No arguments: `python kernels.py`. Else a case as JSON and a GPU: print its verdict."""
    gpu = torch.cuda.is_available()
    if argv and not argv[0].startswith("{"):
        print("python kernels.py: compare the fused kernels with torch on this machine; no flags")
        return 0 if argv[0] in ("-h", "--help") else 2
    if argv:
        case = Case(**json.loads(argv[0]))
        device = torch.device("cuda", int(argv[1]))
        torch.cuda.set_device(device)
        properties = torch.cuda.get_device_properties(device)
        copies = -(-(2 * properties.multi_processor_count + 4) // PROBLEMS)
        began = time.perf_counter()
        error, wrong = compare(case, device, copies, 300)
        seconds = time.perf_counter() - began
        print(json.dumps(asdict(Verdict(error, wrong, seconds))))
        return 0
    where = torch.cuda.get_device_name() if gpu else "no GPU: interpreted on the CPU, small"
    print(f"kernels.py against torch ({where})")
    if not gpu:
        round_to_nearest()
    passed = True
    for case in default_cases(gpu):
        if gpu:
            passed &= judge(case, torch.cuda.current_device()) is None
            continue
        error, wrong = compare(case, torch.device("cpu"), 2, 21)
        passed &= not wrong
        outcome = "; ".join(wrong) or "passed"
        print(f"{case}: {outcome}, largest error {error:.1e}", flush=True)
    return 0 if passed else 1


def default_cases(gpu: bool) -> list[Case]:
    """What Hope and its rivals ask for: in training on a GPU, and in float32."""
    width, chunk = (64, 64) if gpu else (16, 16)
    cases = [Case("self_modify", dtype, width, chunk) for dtype in ("bfloat16", "float32")]
    cases += [Case("scan", "bfloat16", width, delta="series"), Case("scan", "float32", width)]
    return cases + [Case("scan", "float32", width, momentum=True, delta=0.0)]


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    sys.exit(main(sys.argv[1:]))
