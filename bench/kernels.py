"""The fused kernels on a GPU."""

import math
import statistics
import subprocess
import sys
from contextlib import suppress
from functools import partial
from importlib import metadata

import torch

from bench.cells import numbers, spec_config, split_specs, write_result
from bench.speed import build, training_step
from support.checkpoint import first_line
from support.run import device_for


def measured(name, f):
    """f(), or None and a line that says why not."""
    try:
        return f()
    except Exception as error:  # of compilers and drivers, too
        print(f"{name}: {type(error).__name__}: {first_line(error)}", file=sys.stderr, flush=True)
    finally:
        torch.cuda.empty_cache()


def milliseconds(f) -> float:
    """Median time of f on the device."""
    from triton.testing import do_bench

    return do_bench(f, warmup=50, rep=200, return_mode="median")


def there_and_back(f, args):
    """A call of f on args, forward and backward, as one function without arguments."""
    args = [x.detach().requires_grad_() for x in args]
    with torch.no_grad():
        weights = torch.randn_like(f(*args))
    return lambda: torch.autograd.grad(f(*args), args, weights)


def ceilings(device) -> dict:
    """TFLOP/s of a bfloat16 matrix product of 8192^3, and TB/s of a copy of 4 GiB, bytes read and written counted."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(2**30, device=device)
    target = torch.empty_like(source)
    product, copy = milliseconds(lambda: a @ b), milliseconds(lambda: target.copy_(source))
    return {"tflops": 2 * 8192**3 / product / 1e9, "tbytes": 2 * source.nbytes / copy / 1e9}


def scan_work(N: int, T: int, d: int = 64, C: int = 32) -> tuple[int, int]:
    """FLOPs and bytes of the fused scan, forward and backward, for N heads of width d in tiles of C tokens."""
    # products of [d, d] x [d, C] and of [d, C] x [C, C], and the doubling of the inverse, of forward, again, chain, local
    big, small, inverse = (3 + 2 + 3 + 4), (4 + 2 + 3 + 7), 2 * 2
    per_tile = 2 * (big * d * d * C + small * d * C * C) + inverse * 2 * C**3
    return N * -(-T // C) * per_tile, N * T * (2 * 6 * d * 2 + 2 * d * 4 + 4 * 4)


def modify_work(N: int, T: int, d: int = 64, C: int = 16) -> tuple[int, int]:
    """The same for self-modifying Titans, whose 3 d + 2 rows are padded to 4 d."""
    # products of all 4 d rows with d columns, and of d rows with C tokens, of forward, again, local, chain and what is left
    big, small = (6 + 5 + 0 + 9 + 3), (10 + 5 + 5 + 10 + 0)
    return N * -(-T // C) * 2 * ((4 * big + 1) * d * d * C + small * d * C * C), N * T * (2 * 4 * d * 2 + 2 * d * 4)


def kernel_calls(what: str, N: int, T: int, chunk: int, device) -> dict:
    """{name: (function, its arguments)} of the fused kernels and what they are measured against, on the same tensors."""
    import kernels
    import memory
    import titans

    d, calls = 64, {}
    normal = partial(torch.randn, device=device)
    if what == "scan":  # as a gated delta rule
        k, q = (memory.l2norm(normal(N, T, d)).bfloat16() for _ in range(2))
        u, eta, alpha = normal(N, T, d).bfloat16(), torch.rand(N, T, device=device), 1 - 0.1 * torch.rand(N, T, device=device)
        args, W = (k, q, u, eta, alpha), torch.zeros(N, d, d, device=device)

        def run(backend, k, q, u, eta, alpha):
            return memory.scan(W, k, u, eta, alpha, q, delta=alpha, backend=backend)[0]

        tile = torch.compile(memory._tile, dynamic=False)

        def compiled(k, q, u, eta, alpha):
            state, y = W, []
            for parts in zip(*(x.split(64, 1) for x in (k.float(), u.float(), eta, alpha, q.float())), strict=True):
                now, state, _ = tile(state, None, *parts, None, parts[3])
                y.append(now)
            return torch.cat(y, 1)

        calls["fused"] = partial(run, "triton"), args
        if T <= 4096:
            calls["eager"], calls["compiled"] = (partial(run, "torch"), args), (compiled, args)
        with suppress(ImportError):
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule

            rows = [x.unflatten(0, (-1, 16)).transpose(1, 2).contiguous() for x in (q, k, u, alpha.log(), eta)]
            # FLA's g is the logarithm of alpha; its order is queries, keys, values, g, beta
            calls["fla"] = lambda *a: chunk_gated_delta_rule(*a, scale=1.0)[0], rows
    else:
        x, q = normal(N, T, d).bfloat16(), memory.l2norm(normal(N, T, d)).bfloat16()
        W, W0, heads = torch.zeros(N, 3 * d + 2, d, device=device), normal(16, 3 * d + 2, d) * d**-0.5, N // 16
        gates = [torch.full((N,), value, device=device) for value in (0.0, -math.log(9), 1.0)]

        def torch_step(x, q, W0):
            flat = [g[:, None] for g in gates]
            return titans._SelfModify.apply(x.float(), q.float(), W, W0.repeat(heads, 1, 1), *flat, chunk, 1.0)[0]

        def fused_step(x, q, W0):
            return kernels.self_modify(x, q, W, W0, *gates, chunk, 1.0)[0]

        calls["fused"] = fused_step, (x, q, W0)
        if T <= 4096:
            calls["eager"] = torch_step, (x, q, W0)
    return calls


def kernel_table(rows: list[dict]) -> str:
    """The measured cells as text; what was not measured is '-'."""
    def shown(value, digits=2):
        return "-" if value is None else f"{value:,.{digits}f}"

    lines = [f"{'':14}{'heads':>6}{'T':>8}{'chunk':>7}{'ms':>9}{'TFLOP/s':>9}{'of peak':>9}{'TB/s':>7}{'of peak':>9}"
             f"{'eager/':>8}{'compiled/':>11}{'fla/':>7}"]  # fmt: skip
    for r in rows:
        lines.append(
            f"{r['what']:14}{r['heads']:>6}{r['T']:>8}{r['chunk'] or '-':>7}{shown(r['ms'], 3):>9}{shown(r['tflops'], 1):>9}"
            f"{shown(r['of_tflops'], 3):>9}{shown(r['tbytes']):>7}{shown(r['of_tbytes'], 3):>9}"
            f"{shown(r['eager'], 1):>8}{shown(r['compiled'], 1):>11}{shown(r['fla']):>7}"
        )
    return "\n".join(lines)


def driver() -> str | None:
    with suppress(OSError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True).stdout.strip() or None


def kernel_speed(args) -> dict:
    """Times of the fused kernels; prints the table and returns what it holds. --out is written with every row."""
    device = device_for(args.device)
    if device.type != "cuda":
        raise ValueError("kernels are measured on a CUDA GPU, and here is none (tests/test_kernels.py checks them without one)")
    import triton

    import memory

    torch.cuda.set_device(device.index or 0)  # events are recorded on the current one
    memory.AUTO_KERNELS = True  # the models, too, are measured with the kernels
    heads, lengths = numbers(args.heads, int), numbers(args.lengths, int)
    wrong = [N for N in heads if N < 16 or N % 16] + [T for T in lengths if T < 1]
    if wrong:
        raise ValueError(f"heads must be multiples of 16 and lengths at least 1 token, got {wrong[0]}")
    versions = {"driver": driver(), "cuda": torch.version.cuda, "triton": triton.__version__}
    with suppress(ImportError, metadata.PackageNotFoundError):
        versions["fla"] = metadata.version("flash-linear-attention")
    torch._dynamo.config.cache_size_limit = 64
    peak, rows, steps = ceilings(device), [], []
    result = {"versions": versions, "ceilings": peak, "rows": rows, "training": steps}
    name = torch.cuda.get_device_name(device)
    print(f"{name}: matrix product {peak['tflops']:.0f} TFLOP/s, copy {peak['tbytes']:.2f} TB/s\n")
    for what, N, T in [(what, N, T) for what in ("scan", "self-modifying") for N in heads for T in lengths]:
        torch.manual_seed(0)
        chunk = None if what == "scan" else args.chunk
        calls = measured(f"{what} of {N} heads, T {T}", lambda: kernel_calls(what, N, T, args.chunk, device)) or {}  # noqa: B023
        ms = {name: measured(f"{what} of {N} heads, T {T}, {name}", lambda: milliseconds(there_and_back(*call)))  # noqa: B023
              for name, call in calls.items()}  # fmt: skip
        flops, moved = (scan_work if what == "scan" else modify_work)(N, T)
        rivals = ("eager", "compiled", "fla")
        fused = ms.get("fused")
        ratio = {name: ms[name] / fused if ms.get(name) and fused else None for name in rivals}
        tflops, tbytes = (work / fused / 1e9 if fused else None for work in (flops, moved))
        rows.append({"what": what, "heads": N, "T": T, "chunk": chunk, "ms": fused, "tflops": tflops, "tbytes": tbytes,
                     "of_tflops": tflops and tflops / peak["tflops"], "of_tbytes": tbytes and tbytes / peak["tbytes"], **ratio,
                     "all_ms": ms})  # fmt: skip
        del calls
        write_result(args, result)
        print(kernel_table(rows[-1:]).splitlines()[-1] if len(rows) > 1 else kernel_table(rows), flush=True)
    for T in (4096, 32768) if args.preset != "none" else ():
        for spec in ("transformer", *split_specs(args.models)):
            def tokens_per_second():
                step = build(spec_config(spec, args.preset), max(1, 16384 // T), T, device)  # noqa: B023
                training_step(*step)
                return step[1].numel() / statistics.median(training_step(*step) for _ in range(5))

            steps.append({"model": spec, "T": T, "tokens_per_s": measured(f"{spec}, T {T}", tokens_per_second)})
            base = next(s["tokens_per_s"] for s in steps if s["T"] == T)
            steps[-1]["ratio"] = steps[-1]["tokens_per_s"] / base if base and steps[-1]["tokens_per_s"] else None
            write_result(args, result)
            speed = "not measured" if steps[-1]["tokens_per_s"] is None else f"{steps[-1]['tokens_per_s']:,.0f} tokens/s"
            ratio = steps[-1]["ratio"] or math.nan
            print(f"training step, {args.preset}, T {T}: {spec} {speed}, ratio {ratio:.2f}", flush=True)
    return result
