"""Speed and memory of training steps."""

import ctypes
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

from bench.cells import parameters, spec_config, split_specs, where
from bench.tables import markdown
from hope import Hope, HopeConfig, loss_fn
from support.checkpoint import atomic_write
from support.config import TrainConfig
from support.plan import peak_memory
from support.run import device_for, optimizer_for, precision

M_MMAP_THRESHOLD = -3  # of malloc.h


def training_step(model, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Forward, loss, backward; seconds. Gradients are cleared first, as after an optimizer's step."""
    model.zero_grad(set_to_none=True)
    wait = (lambda: torch.cuda.synchronize(inputs.device)) if inputs.is_cuda else (lambda: None)
    wait()
    began = time.perf_counter()
    with precision(inputs.device):
        logits, _ = model(inputs)
    loss_fn(logits, targets).backward()
    wait()
    return time.perf_counter() - began


def build(config: HopeConfig, batch_size: int, seq_len: int, device) -> tuple:
    """(model, inputs, targets) with random weights and tokens."""
    torch.manual_seed(0)
    tokens = torch.randint(min(config.vocab_size, 256), (batch_size, seq_len + 1), device=device)
    return Hope(config).to(device), tokens[:, :-1], tokens[:, 1:]


def step_memory(config: HopeConfig, batch_size: int, seq_len: int, device: str, threads: int) -> float | None:
    """Peak MiB of one training step above model and optimizer state. On a CPU call it in a fresh process."""
    if threads:
        torch.set_num_threads(threads)
    with suppress(OSError, AttributeError):
        # glibc, left alone, keeps freed tensors among living ones: the mark would tell of its hoard, not of the step's need
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 16 * 2**10)
    model, inputs, targets = build(config, batch_size, seq_len, device)
    optimizer = optimizer_for(model, TrainConfig())
    training_step(model, inputs[:1, :16], targets[:1, :16])  # loads libraries, and makes the optimizer's state
    optimizer.step()
    model.zero_grad(set_to_none=True)
    if inputs.is_cuda:
        torch.cuda.reset_peak_memory_stats(inputs.device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to the resident size
    before = peak_memory(device)
    training_step(model, inputs, targets)
    return None if before is None else peak_memory(device) - before


def profile(spec: str, config: HopeConfig, length: int, args) -> None:
    """Prints the 15 operations that take the most time of their own in one training step."""
    model, inputs, targets = build(config, args.batch, length, args.device)
    training_step(model, inputs, targets)
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * inputs.is_cuda
    with torch.profiler.profile(activities=kinds) as run:
        training_step(model, inputs, targets)
    print(f"{spec}: one training step of {args.batch} x {length} tokens")
    order = "self_cuda_time_total" if inputs.is_cuda else "self_cpu_time_total"
    print(run.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=60))


def speed(args) -> dict:
    """Times and peak memory of training steps, length by length; prints a table for each and returns what they hold."""
    sizes = {"d_model": args.d_model, "n_layers": args.n_layers, "n_heads": args.n_heads}
    lengths = args.seq_len
    args.device = str(device_for(args.device))
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.profile:
        return profile(args.profile, spec_config(args.profile, **sizes), lengths[0], args)
    specs = ["transformer"] + [spec for spec in split_specs(args.models) if spec != "transformer"]
    configs = {spec: spec_config(spec, **sizes) for spec in specs}
    print(f"training steps of {args.batch} row{'s' * (args.batch > 1)}, d {args.d_model}, {args.n_layers} layers, "
          f"{args.n_heads} heads; {where(args.device, torch.get_num_threads())}, medians of {args.repeats} rounds")
    rows = [row for length in lengths for row in speed_at(length, configs, args)]
    if len(lengths) > 1:
        draw_speed(Path(args.out).with_suffix(".png"), specs, lengths, rows)
        line = lambda spec, name: [f"{row[name]:,.0f}" if row[name] else "-" for row in rows if row["model"] == spec]  # noqa: E731
        for title, name in (("tokens/s", "tokens_per_s"), ("peak MiB", "memory_mib")):
            print("\n" + markdown([title, *map(str, lengths)], [[f"`{spec}`", *line(spec, name)] for spec in specs]))
    return {"rows": rows}


def speed_at(length: int, configs: dict[str, HopeConfig], args) -> list[dict]:
    """A row for each model: steps on rows of that length, the models interleaved; the first one is the base of ratios."""
    built = {spec: build(config, args.batch, length, args.device) for spec, config in configs.items()}
    rounds = {spec: [] for spec in configs}
    for number in range(args.repeats + 1):
        for spec, parts in built.items():
            seconds = training_step(*parts)
            parts[0].zero_grad(set_to_none=True)
            if number:
                rounds[spec].append(seconds)
    del built, parts

    rows, width, first = [], max(map(len, configs)) + 2, next(iter(configs))
    head = f"{length:,} tokens"
    print(f"\n{head:<{width}}{'parameters':>12}{'ms/step':>10}{'tokens/s':>10}{'ratio':>8}{'MiB':>9}{'ratio':>8}")
    for spec, config in configs.items():
        call = (config, args.batch, length, args.device, args.threads)
        if args.device == "cpu":
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                memory = fresh.submit(step_memory, *call).result()
        else:
            memory = step_memory(*call)
        median = statistics.median(rounds[spec])
        ratio = statistics.median(t / own for t, own in zip(rounds[first], rounds[spec], strict=True))
        r = {"model": spec, "seq_len": length, "parameters": parameters(config), "seconds": median,
             "tokens_per_s": args.batch * length / median, "ratio": ratio, "memory_mib": memory, "rounds": rounds[spec]}
        rows.append(r)
        base = rows[0]["memory_mib"]
        r["memory_ratio"] = memory / base if memory is not None and base else None
        used = "-" if memory is None else f"{memory:,.0f}"
        times = "-" if r["memory_ratio"] is None else f"{r['memory_ratio']:.2f}"
        print(f"{spec:<{width}}{r['parameters']:>12,}{1e3 * median:>10,.0f}{r['tokens_per_s']:>10,.0f}"
              f"{ratio:>8.2f}{used:>9}{times:>8}", flush=True)  # fmt: skip
    return rows


def draw_speed(path: Path, specs: list[str], lengths: list[int], rows: list[dict]) -> None:
    """Tokens per second and peak memory of a training step against the length of its rows; Hope's models are thick."""
    from matplotlib.figure import (
        Figure,  # slow to import; a Figure of its own needs no display
    )

    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = (("tokens_per_s", "tokens/s of a training step"), ("memory_mib", "peak memory of a training step, MiB"))
    for axes, (name, title) in zip(figure.subplots(1, 2), panels, strict=True):
        for i, spec in enumerate(specs):
            own = spec.startswith("hope")
            values = [row[name] for row in rows if row["model"] == spec]
            if None not in values:
                axes.plot(lengths, values, marker="o" if own else ".", color="tab:red" if spec == "hope" else f"C{i % 10}",
                          linestyle=("-", "--", ":")[i // 10 % 3], linewidth=2.5 if own else 1, label=spec)  # fmt: skip
        axes.set(xscale="log", yscale="log", title=title, xlabel="tokens in a row")
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    atomic_write(path, lambda beside: figure.savefig(beside, format="png", dpi=120))
