"""Time and peak memory of training steps, the models side by side in one process.

    python -m bench speed                                      # hope and its control
    python -m bench speed --models hope,hope:memory=mlp --batch 1 --seq-len 1024,4096,16384
    python -m bench speed --profile hope                       # where the time of one step goes

A training step is forward + loss + backward; the optimizer, the same for all, is left out. Models
take turns, A B C A B C ..., so that whatever disturbs the machine disturbs all of them; the first
round is a warm-up. Shown are medians over the rounds; the ratio to `transformer`, always measured,
is the median of each round's ratio. Memory is the peak of one training step in MiB above a process
that holds only the model and the optimizer's state: allocations on a GPU, resident memory of a
fresh process on a CPU (Linux). Several lengths are also drawn.
"""

import ctypes
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

from bench.cells import machine_flags, parameters, spec_config, split_specs, where
from bench.tables import markdown
from hope import Hope, HopeConfig
from support.checkpoint import warned
from support.config import TrainConfig
from support.flags import whole_number, whole_numbers
from support.plan import peak_memory
from support.plots import INK, label_ends, picture
from support.run import device_for, optimizer_for
from train import LossModule

M_MMAP_THRESHOLD = -3  # of malloc.h


def add_flags(parser) -> None:
    parser.add_argument("--models", default="hope,hope:inner_step=0", help="comma-separated")
    lengths = "tokens in a row; several, with commas, are also drawn"
    parser.add_argument("--seq-len", default="1024", type=whole_numbers, help=lengths)
    sizes = {
        "--batch": (4, "rows in a batch"),
        "--d-model": (256, "width"),
        "--n-layers": (4, "blocks"),
        "--n-heads": (4, "heads"),
        "--repeats": (5, "rounds after the warm-up"),
    }
    for flag, (default, help) in sizes.items():
        parser.add_argument(flag, type=whole_number, default=default, help=help)
    parser.add_argument(
        "--profile", metavar="MODEL", help="only print where the time of this model's step goes"
    )
    machine_flags(parser, "results/speed.json")


def speed(args) -> dict | None:
    """Prints a table for each length; returns what they hold, None with --profile."""
    sizes = {"d_model": args.d_model, "n_layers": args.n_layers, "n_heads": args.n_heads}
    args.device = str(device_for(args.device))
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.profile:
        return profile(args.profile, spec_config(args.profile, **sizes), args)
    specs = ["transformer"] + [s for s in split_specs(args.models) if s != "transformer"]
    configs = {spec: spec_config(spec, **sizes) for spec in specs}
    rows_of = f"{args.batch} row{'s' * (args.batch > 1)}"
    model = f"d {args.d_model}, {args.n_layers} layers, {args.n_heads} heads"
    machine = where(args.device, torch.get_num_threads())
    print(f"training steps of {rows_of}, {model}; {machine}, medians of {args.repeats} rounds")
    rows = []
    for length in args.seq_len:
        rows += speed_at(length, configs, args)
    if len(args.seq_len) > 1:
        draw(Path(args.out).with_suffix(".png"), specs, args.seq_len, rows)
        for title, name in (("tokens/s", "tokens_per_s"), ("peak MiB", "memory_mib")):
            lines = []
            for spec in specs:
                values = [row[name] for row in rows if row["model"] == spec]
                lines.append([f"`{spec}`"] + [f"{v:,.0f}" if v else "-" for v in values])
            print("\n" + markdown([title, *map(str, args.seq_len)], lines))
    return {"rows": rows}


def speed_at(length: int, configs: dict[str, HopeConfig], args) -> list[dict]:
    """A row for each model on rows of that length; the first model is the base of the ratios."""
    rounds = interleaved_steps(length, configs, args)
    width = max(map(len, configs)) + 2
    first = next(iter(configs))
    head = f"{length:,} tokens"
    columns = f"{'parameters':>12}{'ms/step':>10}{'tokens/s':>10}{'ratio':>8}{'MiB':>9}{'ratio':>8}"
    print(f"\n{head:<{width}}{columns}")
    rows = []
    for spec, config in configs.items():
        memory = memory_of(config, length, args)
        median = statistics.median(rounds[spec])
        ratios = [base / own for base, own in zip(rounds[first], rounds[spec], strict=True)]
        row = {
            "model": spec,
            "seq_len": length,
            "parameters": parameters(config),
            "seconds": median,
            "tokens_per_s": args.batch * length / median,
            "ratio": statistics.median(ratios),
            "memory_mib": memory,
            "rounds": rounds[spec],
        }
        rows.append(row)
        base = rows[0]["memory_mib"]
        row["memory_ratio"] = memory / base if memory is not None and base else None
        used = "-" if memory is None else f"{memory:,.0f}"
        times = "-" if row["memory_ratio"] is None else f"{row['memory_ratio']:.2f}"
        shown = f"{row['parameters']:>12,}{1e3 * median:>10,.0f}{row['tokens_per_s']:>10,.0f}"
        print(f"{spec:<{width}}{shown}{row['ratio']:>8.2f}{used:>9}{times:>8}", flush=True)
    return rows


def interleaved_steps(length: int, configs: dict[str, HopeConfig], args) -> dict[str, list]:
    """{model: seconds of its step in each round}."""
    built = {}
    for spec, config in configs.items():
        built[spec] = build(config, args.batch, length, args.device)
    rounds = {spec: [] for spec in configs}
    for number in range(args.repeats + 1):
        for spec, parts in built.items():
            seconds = training_step(*parts)
            parts[0].zero_grad(set_to_none=True)
            if number:  # the first round is a warm-up
                rounds[spec].append(seconds)
    return rounds


def memory_of(config: HopeConfig, length: int, args) -> float | None:
    """`step_memory`, on a CPU in a process of its own."""
    call = (config, args.batch, length, args.device, args.threads)
    if args.device != "cpu":
        return step_memory(*call)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(step_memory, *call).result()


def step_memory(config, batch_size: int, seq_len: int, device: str, threads: int) -> float | None:
    """Peak MiB of a training step above model and optimizer state. On a CPU: in a fresh process."""
    if threads:
        torch.set_num_threads(threads)
    with suppress(OSError, AttributeError):
        # glibc, left alone, keeps freed tensors among living ones: the mark would tell of its
        # hoard, not of the step's need
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 16 * 2**10)
    forward, inputs, targets = build(config, batch_size, seq_len, device)
    optimizer = optimizer_for(forward.model, TrainConfig())
    # a small step loads libraries and makes the optimizer's state
    training_step(forward, inputs[:1, :16], targets[:1, :16])
    optimizer.step()
    forward.zero_grad(set_to_none=True)
    if inputs.is_cuda:
        torch.cuda.reset_peak_memory_stats(inputs.device)
    else:
        with suppress(OSError):  # the high-water mark falls to the resident size
            Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory(device)
    training_step(forward, inputs, targets)
    return None if before is None else peak_memory(device) - before


def profile(spec: str, config: HopeConfig, args) -> None:
    """Prints the 15 operations that take the most time of their own in one training step."""
    length = args.seq_len[0]
    forward, inputs, targets = build(config, args.batch, length, args.device)
    training_step(forward, inputs, targets)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if inputs.is_cuda:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as run:
        training_step(forward, inputs, targets)
    print(f"{spec}: one training step of {args.batch} x {length} tokens")
    order = "self_cuda_time_total" if inputs.is_cuda else "self_cpu_time_total"
    print(run.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=60))


def build(config: HopeConfig, batch_size: int, seq_len: int, device) -> tuple:
    """(LossModule, inputs, targets) with random weights and tokens."""
    torch.manual_seed(0)
    shape = (batch_size, seq_len + 1)
    tokens = torch.randint(min(config.vocab_size, 256), shape, device=device)
    return LossModule(Hope(config).to(device)), tokens[:, :-1], tokens[:, 1:]


def training_step(forward, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Forward, loss, backward; seconds. Gradients are cleared first."""
    forward.zero_grad(set_to_none=True)
    wait(inputs.device)
    began = time.perf_counter()
    loss = forward(inputs, targets)
    if loss.requires_grad:  # train.Graphed has done it
        loss.backward()
    wait(inputs.device)
    return time.perf_counter() - began


def wait(device) -> None:
    """Until a GPU has done what it was asked to."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def draw(path: Path, specs: list[str], lengths: list[int], rows: list[dict]) -> None:
    """Speed and peak memory as multiples of the Transformer's, against the length of rows.

    Hope's models are thick.
    """
    panels = {
        "ratio": "speed of a training step",
        "memory_ratio": "peak memory of a training step",
    }
    with warned(), picture(path, 12, 6) as figure:
        for axes, (name, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
            ends = []
            for i, spec in enumerate(specs):
                values = [row[name] for row in rows if row["model"] == spec]
                if None in values:
                    continue
                thick = spec.startswith("hope")
                color = f"C{i % 7}" if i else INK  # the last of the cycle is the axes' grey
                style = {"marker": "o" if thick else ".", "linewidth": 2.6 if thick else 1.2}
                style["linestyle"] = ("-", "--", ":")[i // 7 % 3]
                axes.plot(lengths, values, color=color, **style)
                ends.append((spec, lengths[-1], values[-1], color))
            axes.set(xscale="log", yscale="log", title=title, xlabel="tokens in a row")
            axes.set(ylabel=f"times {specs[0]}'s, at the same length")
            axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
            axes.yaxis.get_major_locator().set_params(subs=(1, 2, 3, 5))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
            label_ends(axes, ends)
