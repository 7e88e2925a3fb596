"""Times of the fused Triton kernels (kernels.py) on a CUDA GPU, and of models that train with them.

    python -m bench kernels                                          # 20 rows, then training steps
    python -m bench kernels --heads 128 --lengths 4096 --preset none
    python -m bench kernels --heads none --models hope,gated_deltanet --steps 8x4096

For the learning rule (`scan`, as a gated delta rule) and the self-modifying chunk step, heads of
width 64 in bfloat16, forward and backward: milliseconds, TFLOP/s and TB/s counted by hand
(`scan_work`, `modify_work`) beside what a matrix product and a copy reach on this GPU, and how many
times longer the same takes in torch ("eager") and in flash-linear-attention ("fla") where it is
installed. Then training steps as train.py takes them on a GPU (kernels where they pass, blocks
compiled; without the optimizer): tokens/s, the part of the peak, peak memory and launches, beside
a Transformer's. What fails (out of memory, a compiler) is printed on stderr and shown as "-".
--out is written after every row.
"""

import itertools
import math
import statistics
import sys
from contextlib import suppress
from functools import partial
from importlib import metadata
from types import SimpleNamespace

import torch

import fused
import memory
import selfcheck
from bench.cells import numbers, spec_config, split_specs, write_result
from bench.speed import build, training_step
from support import plan
from support.checkpoint import first_line
from support.config import TrainConfig
from support.flags import whole_number
from support.run import device_for, settle_kernels
from train import Graphed, parallel

WIDTH = 64  # of a head
RIVALS = ("eager", "fla")
SLOW = 4096  # tokens: rivals that launch kernels chunk by chunk are measured up to here


def add_flags(parser) -> None:
    heads = "batch x heads, multiples of 16; none: leave the kernels out"
    parser.add_argument("--heads", default="128,256", help=heads)
    lengths = "2048,4096,8192,16384,32768"
    parser.add_argument("--lengths", default=lengths, help="tokens in a row")
    chunk = "tokens that self-modifying memories generate at once"
    parser.add_argument("--chunk", type=whole_number, default=64, help=chunk)
    preset = "size of the models whose training steps are timed; none: leave them out"
    parser.add_argument("--preset", default="340m", help=preset)
    models = "comma-separated; transformer is always measured"
    parser.add_argument("--models", default="hope,hope:cms_updates=off", help=models)
    steps = "rows x tokens of the training steps"
    parser.add_argument("--steps", default="8x4096,1x32768", help=steps)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--out", default="results/kernels.json", help="file of the result, as JSON")


# --------------------------------------------------------------------------------------------------
# Measuring


def measured(name, f, *args):
    """f(*args), or None and a line that says why not."""
    try:
        return f(*args)
    except Exception as error:  # of compilers and drivers, too
        why = f"{name}: {type(error).__name__}: {first_line(error)}"
        print(why, file=sys.stderr, flush=True)
    finally:
        torch.cuda.empty_cache()


def milliseconds(f) -> float:
    """Median time of f on the device."""
    from triton.testing import do_bench

    return do_bench(f, warmup=50, rep=200, return_mode="median")


def forward_and_backward(f, args) -> float:
    """Milliseconds of f on args, and of the gradients of all of them."""
    args = [x.detach().requires_grad_() for x in args]
    with torch.no_grad():
        weights = torch.randn_like(f(*args))
    return milliseconds(lambda: torch.autograd.grad(f(*args), args, weights))


def forward_alone(f, args) -> float:
    """Milliseconds of f on args without a graph."""
    with torch.no_grad():
        return milliseconds(lambda: f(*args))


# --------------------------------------------------------------------------------------------------
# What a GPU can do, and what the kernels ask of it


def ceilings(device) -> dict:
    """TFLOP/s of a bfloat16 matrix product of 8192^3, TB/s of a copy of 4 GiB, read and written."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(2**30, device=device)
    target = torch.empty_like(source)
    product = milliseconds(lambda: a @ b)
    copy = milliseconds(lambda: target.copy_(source))
    return {"tflops": 2 * 8192**3 / product / 1e9, "tbytes": 2 * source.nbytes / copy / 1e9}


def scan_work(N: int, T: int, d: int = WIDTH, C: int = 32) -> tuple[int, int]:
    """FLOPs and bytes of the fused scan, forward and backward: N heads of width d, tiles of C."""
    # in the order forward, again, chain, local
    big = 3 + 2 + 3 + 4  # products of [d, d] x [d, C]
    small = 4 + 2 + 3 + 7  # products of [d, C] x [C, C]
    inverse = 2 * 2  # its doublings
    per_tile = 2 * (big * d * d * C + small * d * C * C) + inverse * 2 * C**3
    moved = N * T * (2 * 6 * d * 2 + 2 * d * 4 + 4 * 4)
    return N * -(-T // C) * per_tile, moved


def modify_work(N: int, T: int, d: int = WIDTH, C: int = 64) -> tuple[int, int]:
    """The same for self-modifying Titans; its two rows of gates are left out."""
    # of control (forward, again, chain), memory (states 3 times, read, maps, local), torch
    big = 10 + 10 + 13 + 3 + 3 + 2 + 1 + 1 + 4 + 7  # products of C tokens with d x d
    small = 19 + 19 + 6 + 0 + 0 + 0 + 2 + 8 + 9 + 0  # with C x C
    per_tile = 2 * C * d * (big * d + small * C)
    moved = N * T * (2 * 4 * d * 2 + 2 * d * 4)
    return N * -(-T // C) * per_tile, moved


# --------------------------------------------------------------------------------------------------
# The kernels and their rivals, on the same random tensors: {name: (function, its arguments)}


def scan_calls(N: int, T: int, device) -> dict:
    """The learning rule with the inputs of a gated delta rule."""
    d = WIDTH
    normal = partial(torch.randn, device=device)
    k, q = (memory.l2norm(normal(N, T, d)).bfloat16() for _ in range(2))
    u = normal(N, T, d).bfloat16()
    eta = torch.rand(N, T, device=device)
    alpha = 1 - 0.1 * torch.rand(N, T, device=device)
    W = torch.zeros(N, d, d, device=device)
    args = (k, q, u, eta, alpha)

    def run(backend, k, q, u, eta, alpha):
        return memory.scan(W, k, u, eta, alpha, q, delta=alpha, backend=backend)[0]

    calls = {"fused": (partial(run, "triton"), args)}
    if T <= SLOW:
        calls["eager"] = partial(run, "torch"), args
    with suppress(ImportError):
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        def fla(*rows):
            return chunk_gated_delta_rule(*rows, scale=1.0)[0]

        # FLA's g is the logarithm of alpha; its order is queries, keys, values, g, beta
        rows = (x.unflatten(0, (-1, 16)) for x in (q, k, u, alpha.log(), eta))  # [B, H, T, ...]
        calls["fla"] = fla, [x.transpose(1, 2).contiguous() for x in rows]
    return calls


def modify_calls(N: int, T: int, chunk: int, device) -> dict:
    """The self-modifying chunk step of layers with 16 heads."""
    import kernels

    d = WIDTH
    R = 3 * d + 2
    normal = partial(torch.randn, device=device)
    x = normal(N, T, d).bfloat16()
    q = memory.l2norm(normal(N, T, d)).bfloat16()
    W = torch.zeros(N, R, d, device=device)
    W0 = normal(16, R, d) * d**-0.5
    gates = [torch.full((N,), value, device=device) for value in (0.0, -math.log(9), 1.0)]

    def eager(x, q, W0):
        flat = [g[:, None] for g in gates]
        W0 = W0.repeat(N // 16, 1, 1)
        return fused.self_modify(x.float(), q.float(), W, W0, *flat, chunk, 1.0)[0]

    def run(x, q, W0):
        return kernels.self_modify(x, q, W, W0, *gates, chunk, 1.0)[0]

    calls = {"fused": (run, (x, q, W0))}
    if T <= SLOW:
        calls["eager"] = eager, (x, q, W0)
    return calls


# --------------------------------------------------------------------------------------------------
# Rows of the result


def kernel_row(what: str, N: int, T: int, chunk: int, peak: dict, device) -> dict:
    """One row: N heads, T tokens. What could not be measured is None."""
    torch.manual_seed(0)
    name = f"{what} of {N} heads, T {T}"
    if what == "scan":
        calls = measured(name, scan_calls, N, T, device)
        flops, moved = scan_work(N, T)
    else:
        calls = measured(name, modify_calls, N, T, chunk, device)
        flops, moved = modify_work(N, T)
    ms = {}
    for rival, call in (calls or {}).items():
        ms[rival] = measured(f"{name}, {rival}", forward_and_backward, *call)
    row = {"what": what, "heads": N, "T": T, "chunk": None if what == "scan" else chunk}
    row["forward"] = None
    time = ms.get("fused")
    if calls:
        row["forward"] = measured(f"{name}, forward", forward_alone, *calls["fused"])
    row["ms"] = time
    row["tflops"] = flops / time / 1e9 if time else None
    row["tbytes"] = moved / time / 1e9 if time else None
    row["of_tflops"] = row["tflops"] / peak["tflops"] if time else None
    row["of_tbytes"] = row["tbytes"] / peak["tbytes"] if time else None
    for rival in RIVALS:
        row[rival] = ms[rival] / time if ms.get(rival) and time else None
    row["all_ms"] = ms
    return row


COLUMNS = [  # key, title, width, digits
    ("forward", "forward", 9, 3),
    ("ms", "ms", 9, 3),
    ("tflops", "TFLOP/s", 9, 1),
    ("of_tflops", "of peak", 9, 3),
    ("tbytes", "TB/s", 7, 2),
    ("of_tbytes", "of peak", 9, 3),
    ("eager", "eager/", 8, 1),
    ("fla", "fla/", 7, 2),
]


def kernel_table(rows: list[dict]) -> str:
    """The measured cells as text; what was not measured is '-'."""
    head = f"{'':14}{'heads':>6}{'T':>8}{'chunk':>7}"
    for _, title, width, _ in COLUMNS:
        head += f"{title:>{width}}"
    lines = [head]
    for row in rows:
        line = f"{row['what']:14}{row['heads']:>6}{row['T']:>8}{row['chunk'] or '-':>7}"
        for key, _, width, digits in COLUMNS:
            shown = "-" if row[key] is None else f"{row[key]:,.{digits}f}"
            line += f"{shown:>{width}}"
        lines.append(line)
    return "\n".join(lines)


def training_row(spec: str, preset: str, rows: int, T: int, device) -> dict:
    """A training step of `rows` rows of T tokens: tokens/s, the part of the peak, peak memory."""
    torch.compiler.reset()  # the number of graphs is limited, over all models
    config = spec_config(spec, preset)
    module, *batch = build(config, rows, T, device)
    model = module.model
    settle_kernels(model, device)
    train = TrainConfig(seq_len=T, batch_size=rows)
    run = SimpleNamespace(model=model, config=train, device=device)
    forward = parallel(run)
    step = partial(training_step, forward, *batch)
    first = step()
    loop = step()  # the last that compiles, a little; the next is recorded
    torch.cuda.reset_peak_memory_stats()
    step()
    speed = rows * T / statistics.median(step() for _ in range(5))
    gb = torch.cuda.max_memory_allocated() / 1e9
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        step()
    launched = [event for event in profiled.events() if event.device_type.name == "CUDA"]
    longest = {}
    for event in launched:
        ms, count = longest.get(event.name, (0.0, 0))
        longest[event.name] = ms + event.time_range.elapsed_us() / 1e3, count + 1
    longest = sorted(longest.items(), key=lambda item: -item[1][0])
    peak = plan.peak_flops(device)
    return {
        "model": spec,
        "preset": preset,
        "rows": rows,
        "T": T,
        "compiled": plan.compiles(model, train, device),
        "tokens_per_s": speed,
        "mfu": plan.flops_per_token(config, T) * speed / peak if peak else None,
        "gb": gb,
        "launches": len(launched),
        "graph": isinstance(forward, Graphed) and forward.graph is not None,
        "loop_s": loop,  # the same step without a graph
        "busy_ms": sum(event.time_range.elapsed_us() for event in launched) / 1e3,
        "longest": [[name[:80], *cost] for name, cost in longest[:15]],  # kernel, ms, launches
        "first_s": first,
    }


def training_rows(args, device, found: list):
    """Adds a row for each step and model to `found`; yields a line that tells it, after each."""
    specs = dict.fromkeys(["transformer", *split_specs(args.models)])
    for step, spec in itertools.product(args.steps.split(","), specs):
        rows, T = (int(n) for n in step.split("x"))
        row = measured(f"{spec}, {step}", training_row, spec, args.preset, rows, T, device)
        if row is None:
            row = {"model": spec, "preset": args.preset, "rows": rows, "T": T, "tokens_per_s": None}
        own = row["tokens_per_s"]
        found.append(row)
        base = next(r["tokens_per_s"] for r in found if (r["rows"], r["T"]) == (rows, T))
        row["ratio"] = own / base if own and base else None
        yield f"{spec}, {step}: " + (training_line(row) if own else "not measured")


def training_line(row: dict) -> str:
    used = f", {row['mfu']:.1%} of the peak" if row["mfu"] else ""
    ratio = "" if row["ratio"] is None else f", {row['ratio']:.2f} of transformer's"
    cost = f"{row['gb']:.1f} GB, {row['launches']:,} launches"
    return f"{row['tokens_per_s']:,.0f} tokens/s{ratio}{used}, {cost}"


# --------------------------------------------------------------------------------------------------
# The command


def versions() -> dict:
    import triton

    found = {"driver": selfcheck.driver(), "cuda": torch.version.cuda, "triton": triton.__version__}
    with suppress(ImportError, metadata.PackageNotFoundError):
        found["fla"] = metadata.version("flash-linear-attention")
    return found


def kernel_speed(args) -> dict:
    """`python -m bench kernels`: prints the tables and returns what they hold.

    Raises ValueError where there is no GPU, and for heads or lengths that cannot be.
    """
    device = device_for(args.device)
    if device.type != "cuda":
        why = "tests/test_kernels.py checks the kernels without one"
        raise ValueError(f"device must be a CUDA GPU, got {device} ({why})")
    torch.cuda.set_device(device.index or 0)  # events are recorded on the current one
    heads = [] if args.heads == "none" else numbers(args.heads, int)
    lengths = numbers(args.lengths, int)
    for N in heads:
        if N < 16 or N % 16:
            raise ValueError(f"heads must be multiples of 16, got {N}")
    if min(lengths) < 1:
        raise ValueError(f"lengths must be at least 1 token, got {min(lengths)}")
    like = torch.empty(0, dtype=torch.bfloat16, device=device)
    selfcheck.why_not("self_modify", like, WIDTH, args.chunk)  # settles how kernels are compiled
    peak = ceilings(device) if heads else {"tflops": None, "tbytes": None}
    rows = []
    steps = []
    result = {"versions": versions(), "ceilings": peak, "rows": rows, "training": steps}
    print(torch.cuda.get_device_name(device))
    if heads:
        print(f"matrix product {peak['tflops']:.0f} TFLOP/s, copy {peak['tbytes']:.2f} TB/s\n")
    for what, N, T in itertools.product(("scan", "self-modifying"), heads, lengths):
        rows.append(kernel_row(what, N, T, args.chunk, peak, device))
        write_result(args, result)
        lines = kernel_table(rows[-1:]).splitlines()
        print("\n".join(lines if len(rows) == 1 else lines[1:]), flush=True)
    if args.preset != "none":
        for line in training_rows(args, device, steps):
            write_result(args, result)
            print(line, flush=True)
    return result
