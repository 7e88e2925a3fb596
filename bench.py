"""Measure models against each other: speed and memory of a training step, and what they learn from the same data.

    python bench.py speed                                              # hope and its control against the Transformer
    python bench.py speed --models hope,hope:memory=mlp,gated_deltanet --batch 1 --seq-len 1024,4096,16384
    python bench.py speed --profile hope                               # where the time of one training step goes
    python bench.py quality                                            # bits per byte after equal tokens: 36 runs
    python bench.py quality --models hope,transformer --seeds 0 --minutes 5      # and after equal time
    python bench.py optimizers                                         # optimizers on hope and on the transformer
    python bench.py ablation                                           # Hope without its parts (NL table 6)
    python bench.py digits                                             # and on a small vision transformer (scikit-learn)
    python bench.py kernels                                            # the fused kernels on a GPU: 15 minutes

A model is NAME[:field=value ...] with fields of HopeConfig: `hope`, `hope:inner_step=0` (memories that never learn),
`transformer:conv=4`, `hope:chunk=128:levels=[256,null]`. MODEL@OPTIMIZER (in quality) is trained with that optimizer.

speed: one process. A training step is forward + loss + backward; the optimizer, the same for all, is left out. Models
take turns, A B C A B C ..., so that whatever disturbs the machine disturbs all of them; the first round is a warm-up.
Shown are medians over the rounds; the ratio to `transformer` is the median of each round's ratio. Memory is the peak of
one training step in MiB above a process that holds only the model and the optimizer's state: allocations on a GPU,
resident memory of a fresh process on a CPU (Linux).

quality: the pieces of train.py on the same batches. For each model the learning rate of the grid that is best on a
shorter run with seed 100 (no other run uses it); then a run for each seed. "After equal time" are runs of their own,
each with a schedule that ends after the tokens the model gets through in --minutes of training, at the median speed of
its learning-rate runs. Cells run in --jobs processes that share the cores; a finished cell is a line in the .jsonl
beside --out, and the same command goes on where an earlier one was stopped.

optimizers: quality of every model with every optimizer, each with its best learning rate of the same grid, and the time of
an optimizer's step: ten steps of one, then of the next, round after round.

ablation: quality of Hope with one part taken away or changed at a time, beside the perplexities of NL table 6. Hope of this
repository has no momentum and static queries by default, so there the paper's "without" is ours "with". 22 million tokens of
training with the defaults: 1.5 hours of one CPU core, half of them for the MLP memories.

digits: 8 x 8 images of scikit-learn, a ViT of patches of 2 x 2; the learning rate is chosen on a tenth of the training
images with seed 100, and every optimizer takes the same number of steps on the same batches.

kernels: forward + backward of the kernels of kernels.py on one GPU, heads of 64, bfloat16, medians of CUDA events after a
warm-up, against the same in torch (eager, and with each tile compiled) and, where flash-linear-attention is installed,
against its chunk_gated_delta_rule on the same tensors. FLOPs are those of the matrix products the kernels do, bytes are
those of inputs and gradients read or written once; both also as a fraction of the device's ceilings, a large matrix
product and a large copy measured in the same process. Then training steps of the 340m preset against Transformer++.
"""

import argparse
import ctypes
import json
import math
import multiprocessing
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cache, partial
from importlib import metadata
from pathlib import Path

import torch

from checkpoint import first_line, write_beside
from data import batch, load_corpus
from hope import Hope, HopeConfig, device_for
from optimizers import OPTIMIZERS, optimizer_by_name
from tables import markdown, published
from train import (
    NonFinite,
    Parser,
    TrainConfig,
    gradient_norm,
    learning_rate,
    loss_fn,
    optimizer_for,
    peak_memory,
    precision,
    validate,
    whole,
    write_json,
)
from vocabulary import n_bytes

HERE = Path(__file__).resolve().parent
M_MMAP_THRESHOLD = -3  # of malloc.h
SEARCH_SEED = 100  # of the learning-rate runs
load_corpus = cache(load_corpus)  # a worker trains many cells on one corpus

# ---------------------------------------------------------------------------------------------------------------------
# Models by name


def split_specs(text: str) -> list[str]:
    """Model specs of a comma-separated list; commas inside [...] are a value's. ValueError for none or a repeat."""
    specs = [spec.strip() for spec in re.split(r",(?![^\[]*\])", text) if spec.strip()]
    if not specs or len(set(specs)) < len(specs):
        raise ValueError(f"models is {text!r}: needs at least one, each once")
    return specs


def parse_spec(spec: str) -> tuple[str, dict]:
    """"hope:chunk=128:memory=mlp" -> ("hope", {"chunk": 128, "memory": "mlp"}). ValueError for a part without '='."""
    name, *parts = spec.split(":")
    fields = {}
    for part in parts:
        field, equals, value = part.partition("=")
        if not equals or field == "model":
            raise ValueError(f"model {spec!r}: {part!r} must be field=value, a field of HopeConfig but model")
        try:
            fields[field] = json.loads(value)
        except json.JSONDecodeError:
            fields[field] = value
    return name, fields


def spec_config(spec: str, preset: str = "nano", **sizes) -> HopeConfig:
    """The model of a spec; its own fields win over `sizes`. ValueError in one line for what cannot be built."""
    name, fields = parse_spec(spec)
    try:
        config = HopeConfig.preset(preset, model=name, **(sizes | fields))
        parameters(config)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"model {spec!r}: {first_line(error)}") from None
    return config


def parameters(config: HopeConfig) -> int:
    with torch.device("meta"):  # counts only
        return sum(p.numel() for p in Hope(config).parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Speed and memory


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
    from matplotlib.figure import Figure  # slow to import; a Figure of its own needs no display

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
    write_beside(path, lambda beside: figure.savefig(beside, format="png", dpi=120))


# ---------------------------------------------------------------------------------------------------------------------
# Quality. A cell is one training run: its settings are a TrainConfig, its result a line of the .jsonl.


def train_cell(cell: tuple[str, TrainConfig]) -> dict:
    """Train and validate one model. A loss that is not finite is a result too: bits_per_byte None, and the error."""
    _, config = cell
    torch.set_num_threads(config.threads)
    corpus, device = load_corpus(config.data), device_for(config.device)
    encoding = corpus.encoding
    torch.manual_seed(config.seed)
    model = Hope(cell_model(config)).to(device).train()
    optimizer = optimizer_for(model, config)
    seconds, result = [], {"bits_per_byte": None}
    try:
        for step in range(config.steps):
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config.steps, config)
            rows = batch(corpus.train, config.batch_size, config.seq_len, config.seed, step)
            inputs, targets = (part.to(device) for part in rows)
            with precision(device):
                logits, _ = model(inputs)
            loss = loss_fn(logits, targets)
            loss.backward()
            norm = gradient_norm(model, step + 1, loss.item())
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.grad_clip, norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds.append(time.perf_counter() - began)
        held_out = corpus.val[: config.eval_tokens]
        nats, _ = validate(model, held_out, config.batch_size, config.seq_len, device, start=encoding.eot_token)
        result["bits_per_byte"] = nats / math.log(2) / n_bytes(held_out, encoding)
    except NonFinite as error:
        result["error"] = str(error).split(";")[0]
    speed = config.tokens_per_step / statistics.median(seconds) if seconds else None
    return result | {"train_seconds": sum(seconds), "tokens_per_s": speed, "code": code_version()}


def cell_model(config: TrainConfig) -> HopeConfig:
    own = {"vocab_size": load_corpus(config.data).encoding.n_vocab}
    return HopeConfig.preset(config.preset, model=config.model, **(own | config.set))


@cache
def code_version() -> str:
    """Checksum of the code that a result depends on."""
    names = ("memory", "titans", "cms", "baselines", "hope", "kernels", "data", "optimizers", "train")
    sources = [path.read_bytes() for path in (HERE / f"{name}.py" for name in names) if path.exists()]
    return f"{zlib.crc32(b''.join(sources)):08x}"


def cell_key(config: TrainConfig, corpus: dict, model: HopeConfig | None = None) -> str:
    """All settings of a cell, defaults of the model included, and its data by name and checksum, wherever it lies."""
    train, model = asdict(config) | {"data": corpus["name"]}, model or cell_model(config)
    return json.dumps({"train": train, "model": model.to_dict(), "corpus": corpus}, sort_keys=True)


def current_key(key: str) -> str:
    """A finished cell's key with the defaults of settings that came later: a new field's default changes no model."""
    old = json.loads(key)
    return cell_key(TrainConfig(**old["train"]), old["corpus"], HopeConfig(**old["model"]))


def read_cells(path: Path, key=current_key) -> dict[str, dict]:
    """{key: line} of the finished cells. Lines torn by a kill, or with settings that are gone, do not count and are told."""
    cells, lines = {}, path.read_text().splitlines() if path.exists() else []
    lost = 0
    for line in filter(None, lines):
        try:
            cell = json.loads(line)
            cells[key(cell["key"])] = cell
        except (ValueError, KeyError, TypeError):
            lost += 1
    if lost:
        print(f"note: {lost} lines of {path} do not count: torn, or with settings that this version does not know")
    return cells


def leave_with_parent() -> None:
    """In a worker: no training goes on after the benchmark was killed."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@contextmanager
def workers(jobs: int):
    """Processes that train cells; they start when there is a cell to train, and end with the benchmark."""
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), leave_with_parent)
    try:
        yield pool
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def run_cells(wanted: dict[str, object], train, facts, told, path: Path, finished: dict[str, dict], pool) -> dict[str, dict]:
    """{key: result} of {key: cell}: those in `finished`, and the rest, trained by the pool, each at once a line of `path`.

    train: cell -> result; facts: cell -> what stands before it in the line; told: line -> what is printed.
    """
    missing = {key: cell for key, cell in wanted.items() if key not in finished}
    if len(missing) < len(wanted):
        print(f"{len(wanted) - len(missing)} of {len(wanted)} cells are in {path} already", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as log:
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            log.write("\n")  # after the line torn by a kill
        futures = {pool.submit(train, cell): key for key, cell in missing.items()}
        for done, future in enumerate(as_completed(futures), 1):
            key = futures[future]
            line = finished[key] = {**facts(missing[key]), **future.result(), "key": key}
            log.write(json.dumps(line) + "\n")
            log.flush()
            print(f"[{done}/{len(missing)}] {told(line)}", flush=True)
    return {key: finished[key] for key in wanted}


def quality_cells(wanted: list[tuple[str, TrainConfig]], path: Path, corpus: dict, pool) -> list[dict]:
    """Results of (spec, settings), in order."""
    def facts(cell):
        spec, config = cell
        return {"spec": spec, "lr": config.lr, "seed": config.seed, "threads": config.threads,
                "tokens": config.steps * config.tokens_per_step, "parameters": parameters(cell_model(config))}  # fmt: skip

    def told(cell):
        return (f"{cell['spec']}  lr {cell['lr']:g}  seed {cell['seed']}  {cell['tokens']:,} tokens: "
                f"{bits(cell)} bits per byte, {cell['train_seconds']:.0f} s")  # fmt: skip

    keys = [cell_key(config, corpus) for _, config in wanted]
    done = run_cells(dict(zip(keys, wanted, strict=True)), train_cell, facts, told, path, read_cells(path), pool)
    return [{**done[key], "spec": spec} for key, (spec, _) in zip(keys, wanted, strict=True)]


def bits(cell: dict) -> str:
    return f"{cell['bits_per_byte']:.4f}" if cell["bits_per_byte"] is not None else f"none ({cell['error']})"


def summary(title: str, cells: list[dict]) -> list[dict]:
    """Prints one row a model, best mean first; differences to hope are of runs on the same batches (same seed)."""
    runs = {}
    for cell in cells:
        runs.setdefault(cell["spec"], {})[cell["seed"]] = cell
    base = "hope" if "hope" in runs else next(iter(runs))

    def spread(values):  # mean, and standard deviation over seeds where there are several
        if any(v is None for v in values):
            return None, None
        return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None

    rows = []
    for spec, seeds in runs.items():
        own = {seed: cell["bits_per_byte"] for seed, cell in seeds.items()}
        pairs = [(value, runs[base][seed]["bits_per_byte"]) for seed, value in own.items()]
        mean, std = spread(list(own.values()))
        above, above_std = spread([None if None in pair else pair[0] - pair[1] for pair in pairs])
        first = next(iter(seeds.values()))
        speeds = [cell["tokens_per_s"] for cell in seeds.values() if cell["tokens_per_s"]]
        rows.append({"model": spec, "parameters": first["parameters"], "lr": first["lr"], "tokens": first["tokens"],
                     "tokens_per_s": statistics.median(speeds) if speeds else None, "mean": mean, "std": std,
                     "minutes": statistics.median(cell["train_seconds"] for cell in seeds.values()) / 60,
                     "difference": above, "difference_std": above_std, "seeds": own})  # fmt: skip
    rows.sort(key=lambda row: math.inf if row["mean"] is None else row["mean"])

    def shown(mean, std, sign=""):
        return "-" if mean is None else f"{mean:{sign}.4f}" + ("" if std is None else f" ± {std:.4f}")

    width = max(len(spec) for spec in runs) + 2
    print(f"\n{title}: bits per byte of held-out text, mean ± std of seeds; difference to {base}\n")
    print(f"{'model':<{width}}{'bits per byte':>17}{'difference':>19}{'parameters':>12}{'lr':>9}{'tokens':>12}"
          f"{'tokens/s':>10}{'minutes':>9}  each seed")  # fmt: skip
    for r in rows:
        each = ", ".join(f"{seed}: " + ("none" if v is None else f"{v:.4f}") for seed, v in r["seeds"].items())
        difference = shown(r["difference"], r["difference_std"], "+")
        print(f"{r['model']:<{width}}{shown(r['mean'], r['std']):>17}{difference:>19}{r['parameters']:>12,}"
              f"{r['lr']:>9g}{r['tokens']:>12,}"
              f"{r['tokens_per_s'] or 0:>10,.0f}{r['minutes']:>9.2f}  {each}")  # fmt: skip
    return rows


def quality(args) -> dict:
    with workers(args.jobs) as pool:
        return compare(args, pool)


def compare(args, pool) -> dict:
    """Learning rates, runs at equal tokens, runs at equal time (with --minutes); prints the tables and returns all."""
    specs, seeds, lrs = split_specs(args.models), numbers(args.seeds, int), numbers(args.lrs, float)
    if SEARCH_SEED in seeds:
        raise ValueError(f"seeds has {SEARCH_SEED}, which chooses the learning rates: legal are others")
    device = str(device_for(args.device))
    threads = args.threads or max(1, cores() // args.jobs)

    def cell(spec, lr, seed, tokens):
        model, _, optimizer = spec.partition("@")
        name, fields = parse_spec(model)
        return spec, TrainConfig(
            model=name, preset=args.preset, set=fields, data=args.data, optimizer=optimizer or "adamw", tokens=tokens,
            batch_size=args.batch, seq_len=args.seq_len, lr=lr, seed=seed, eval_every=0, eval_tokens=args.eval_tokens,
            device=device, threads=threads,
        )  # fmt: skip

    # Everything that can be wrong is found here, before anything is written.
    search = [cell(spec, lr, SEARCH_SEED, args.lr_tokens) for lr in lrs for spec in specs if len(lrs) > 1]
    [cell(spec, lrs[0], seed, args.tokens) for seed in seeds for spec in specs]
    corpus = load_corpus(args.data)
    n_vocab = corpus.encoding.n_vocab
    models = {spec: spec_config(spec.partition("@")[0], args.preset, vocab_size=n_vocab) for spec in specs}
    sizes = {spec: parameters(config) for spec, config in models.items()}
    batch(corpus.train, 1, args.seq_len, 0, 0)
    if max(sizes.values()) > 1.02 * min(sizes.values()):
        print(f"note: parameters differ by more than 2%: {', '.join(f'{s} {n:,}' for s, n in sizes.items())}")

    path, fingerprint = Path(args.out).with_suffix(".jsonl"), corpus.fingerprint()
    print(f"{len(search)} learning-rate runs, {len(specs) * len(seeds) * (2 if args.minutes else 1)} others, in "
          f"{args.jobs} processes on {where(device, threads)}", flush=True)  # fmt: skip
    searched = quality_cells(search, path, fingerprint, pool)
    best = dict.fromkeys(specs, lrs[0])
    for spec in specs if search else ():
        own = [c for c in searched if c["spec"] == spec and c["bits_per_byte"] is not None]
        if not own:
            raise ValueError(f"model {spec!r} diverged at every learning rate of {args.lrs}: add smaller ones to --lrs")
        best[spec] = min(own, key=lambda c: c["bits_per_byte"])["lr"]
    # Seed by seed, so that a benchmark stopped half way has compared all models.
    at_tokens = [cell(spec, best[spec], seed, args.tokens) for seed in seeds for spec in specs]
    cells = quality_cells(at_tokens, path, fingerprint, pool)
    result = {"best_lr": best, "equal_tokens": summary("after equal tokens", cells)}
    if args.minutes:
        tokens = {}
        for spec in specs:
            rate = statistics.median(c["tokens_per_s"] for c in searched or cells if c["spec"] == spec and c["tokens_per_s"])
            steps = max(1, round(rate * 60 * args.minutes / (args.batch * args.seq_len)))
            tokens[spec] = steps * args.batch * args.seq_len
        at_time = [cell(spec, best[spec], seed, tokens[spec]) for seed in seeds for spec in specs]
        timed = quality_cells(at_time, path, fingerprint, pool)
        cells = cells + timed
        result["equal_time"] = summary(f"after equal time ({args.minutes:g} minutes)", timed)
    edges = [f"{spec} {lr:g}" for spec, lr in best.items() if len(lrs) > 1 and lr in (min(lrs), max(lrs))]
    if edges:
        print(f"\nnote: the best learning rate is at the edge of the grid for {', '.join(edges)}")
    versions = {c["code"] for c in searched + cells}
    if len(versions) > 1:
        print(f"\nnote: cells of {len(versions)} versions of the code; a fresh --out trains all again")
    return result | {"cells": [{k: v for k, v in c.items() if k != "key"} for c in searched + cells]}


# ---------------------------------------------------------------------------------------------------------------------
# Ablation

ABLATION = {  # fields of hope: what it is, the row of NL table 6
    "": ("Hope", "Hope"),
    "dgd=false": ("plain gradient instead of DGD (delta 0)", "w/o DGD (plain GD inside self-modifying Titans)"),
    "momentum=true": ("with momentum (published: Hope without)", "w/o momentum"),
    "retention=false": ("without retention", "w/o weight decay"),
    "levels=[null]": ("without CMS: one level", "w/o CMS"),
    'adaptive=["v"]': ("static k", "w/o inner projection k"),
    'adaptive=["k"]': ("static v", "w/o inner projection v"),
    'adaptive=["k","v","q"]': ("learned q (published: Hope with static q)", "w/o inner projection q"),
    "mode=boundary": ("reads of the boundary weights", None),
    "conv=0": ("without convolution", None),
    "gate=false": ("without output gate", None),
    "memory=mlp": ("MLP memories", None),
    "inner_step=0": ("memories that never learn", None),
}


def ablation(args) -> dict:
    """`compare` of Hope and what is left of it, and a table beside the paper's; returns all."""
    if parse_spec(args.model)[0] != "hope":
        raise ValueError(f"model is {args.model!r}: legal is hope, with fields")
    specs = {":".join(filter(None, (args.model, fields))): names for fields, names in ABLATION.items()}
    args.models = ",".join(specs)
    with workers(args.jobs) as pool:
        result = compare(args, pool)
    paper = {row["model"]: row["values"][0] for row in published("table6")["rows"]}
    found, lines = {row["model"]: row for row in result["equal_tokens"]}, []
    for spec, (what, row) in specs.items():
        own = found[spec]
        values = (f"{x:{sign}.3f}" if x is not None else "-" for x, sign in ((own["mean"], ""), (own["difference"], "+")))
        lines.append([what, f"`{spec}`", *values, paper.get(row, "-")])
    print("\n" + markdown(["Hope", "model", "bits per byte", "difference", "published, 1.3B: mean perplexity"], lines))
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers


def compare_optimizers(args) -> dict:
    """`compare` of every model under every optimizer, then the time of their steps; returns all."""
    models, names, result = split_specs(args.models), split_specs(args.optimizers), {}
    specs = {model: [f"{model}@{name}" for name in names] for model in models}
    n_vocab = load_corpus(args.data).encoding.n_vocab
    configs = {model: spec_config(model, args.preset, vocab_size=n_vocab) for model in models}
    for name in names:
        TrainConfig(optimizer=name)
    with workers(args.jobs) as pool:
        for model in models:
            args.models = ",".join(specs[model])
            result[model] = compare(args, pool)
    for model, config in configs.items():
        result[model]["step_seconds"] = step_times(model, config, names, args)
    return result


def step_times(title: str, config: HopeConfig, names: list[str], args) -> dict[str, list[float]]:
    """Seconds of ten steps of each optimizer, round by round, on random gradients; prints medians and ratios."""
    torch.set_num_threads(args.threads or max(1, cores() // args.jobs))
    device, models, rounds = device_for(args.device), {}, {name: [] for name in names}
    for name in names:
        torch.manual_seed(0)
        models[name] = Hope(config).to(device)
        for p in models[name].parameters():
            p.grad = torch.randn_like(p)
    optimizers = {name: optimizer_by_name(model, name) for name, model in models.items()}
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    for number in range(args.rounds + 1):
        for name, optimizer in optimizers.items():
            wait()
            began = time.perf_counter()
            for _ in range(10):  # M3's slow memory is read once in ten steps
                optimizer.step()
            wait()
            if number:
                rounds[name].append(time.perf_counter() - began)
    base = "muon" if "muon" in names else names[0]
    print(f"\n{title}: time of an optimizer's step, medians of {args.rounds} rounds; ratio to {base}\n")
    for name, own in rounds.items():
        ratio = statistics.median(t / of for t, of in zip(own, rounds[base], strict=True))
        print(f"{name:<16}{100 * statistics.median(own):>9.2f} ms{ratio:>8.2f}")
    return rounds


class DigitsViT(torch.nn.Module):
    """8 x 8 images [B, 64] -> logits [B, 10]: 16 patches of 2 x 2, pre-norm Transformer blocks, mean of the patches."""

    def __init__(self, d=64, n_layers=2, n_heads=4):
        super().__init__()
        self.patches = torch.nn.Linear(4, d)
        self.position = torch.nn.Parameter(torch.randn(16, d) * 0.1)
        self.blocks = torch.nn.ModuleList(
            torch.nn.TransformerEncoderLayer(d, n_heads, 4 * d, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(n_layers)
        )
        self.norm, self.head = torch.nn.LayerNorm(d), torch.nn.Linear(d, 10)

    def forward(self, x):
        x = x.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        x = self.patches(x) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def digits(args) -> dict:
    """NL figure 11 at toy scale: training loss, test loss and accuracy of a ViT under each optimizer; prints the table."""
    names, seeds, lrs = split_specs(args.optimizers), numbers(args.seeds, int), numbers(args.lrs, float)
    if SEARCH_SEED in seeds:
        raise ValueError(f"seeds has {SEARCH_SEED}, which chooses the learning rates: legal are others")
    configs = {(name, lr): TrainConfig(optimizer=name, lr=lr, weight_decay=0.05) for name in names for lr in lrs}
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("digits needs scikit-learn: pip install scikit-learn") from None
    if args.threads:
        torch.set_num_threads(args.threads)
    x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    x = x.float() / 8 - 1
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = order[:360], order[360:]  # 360 images for testing, 1437 for training

    def run(name, lr, seed, fit, held_out):
        torch.manual_seed(seed)
        model, config = DigitsViT(), configs[name, lr]
        optimizer = optimizer_for(model, config)
        recent = []
        for step in range(args.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps, config)
            rows = fit[torch.randint(len(fit), (args.batch,))]
            loss = torch.nn.functional.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            recent.append(loss.item())
        model.eval()
        with torch.no_grad():
            logits = model(x[held_out])
        loss = torch.nn.functional.cross_entropy(logits, y[held_out]).item()
        accuracy = (logits.argmax(-1) == y[held_out]).float().mean().item()
        recent = recent[-max(1, args.steps // 10) :]
        return {"optimizer": name, "lr": lr, "seed": seed, "train_loss": statistics.mean(recent), "test_loss": loss,
                "test_accuracy": accuracy}  # fmt: skip

    cells, rows = [], []
    tenth = len(train) // 10
    for name in names:
        search = [run(name, lr, SEARCH_SEED, train[tenth:], train[:tenth]) for lr in lrs]
        best = min(search, key=lambda c: c["test_loss"] if math.isfinite(c["test_loss"]) else math.inf)["lr"]
        own = [run(name, best, seed, train, test) for seed in seeds]
        means = {key: statistics.mean(c[key] for c in own) for key in ("train_loss", "test_loss", "test_accuracy")}
        spread = statistics.stdev(c["test_loss"] for c in own) if len(own) > 1 else None
        rows.append({"optimizer": name, "lr": best, **means, "test_loss_std": spread, "search": search})
        cells += own
    print(f"ViT on scikit-learn's digits, {args.steps} steps of {args.batch} images, means of seeds {args.seeds}\n\n"
          f"{'optimizer':<16}{'lr':>8}{'training loss':>15}{'test loss':>17}{'accuracy':>10}")  # fmt: skip
    for r in rows:
        std = "" if r["test_loss_std"] is None else f" ± {r['test_loss_std']:.3f}"
        loss = f"{r['test_loss']:.4f}{std}"
        print(f"{r['optimizer']:<16}{r['lr']:>8g}{r['train_loss']:>15.5f}{loss:>17}{r['test_accuracy']:>10.2%}")
    return {"rows": rows, "cells": cells}


# Fused kernels. What does not fit into the device's memory, or fails, is None, and said; the rest goes on.


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


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    with suppress(OSError, TypeError):
        return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    return platform.processor() or platform.machine()


def where(device: str, threads: int) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    return f"{processor()} ({cores()} cores, {threads} thread{'s' * (threads > 1)} each process)"


def commit() -> str | None:
    """The commit of this code, with "+" if files were changed since."""
    with suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(HERE)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
        return head + "+" * bool(changed)


def numbers(text: str, kind) -> list:
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{text!r} is no comma-separated list of {'whole ' * (kind is int)}numbers") from None
    if len(set(values)) < len(values):
        raise ValueError(f"{text!r} has a number twice")
    return values


def minutes(text: str) -> float:
    with suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")


def parser() -> Parser:
    raw, defaults = argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter
    top = Parser(description=__doc__, formatter_class=raw, usage="python bench.py COMMAND [--flag value ...]")
    title = "commands; `speed --help`, `quality --help`, ... list their flags"
    commands = top.add_subparsers(dest="command", metavar="COMMAND", title=title)
    s = commands.add_parser("speed", formatter_class=defaults, help="time and peak memory of a training step")
    q = commands.add_parser("quality", formatter_class=defaults, help="bits per byte after equal tokens and equal time")
    a = commands.add_parser("ablation", formatter_class=defaults, help="the same, of Hope without its parts (NL table 6)")
    o = commands.add_parser("optimizers", formatter_class=defaults, help="the same, of models under several optimizers")
    d = commands.add_parser("digits", formatter_class=defaults, help="optimizers on a small vision transformer")
    s.add_argument("--models", default="hope,hope:inner_step=0", help="comma-separated; transformer is always measured")
    s.add_argument("--seq-len", default="1024", type=lambda text: [whole(part) for part in text.split(",")],
                   help="tokens in a row; several, with commas, are also drawn")  # fmt: skip
    s.add_argument("--d-model", type=whole, default=256, help="width")
    s.add_argument("--n-layers", type=whole, default=4, help="blocks")
    s.add_argument("--n-heads", type=whole, default=4, help="heads")
    s.add_argument("--repeats", type=whole, default=5, help="rounds after the warm-up")
    s.add_argument("--profile", metavar="MODEL", help="only print where the time of this model's training step goes")
    q.add_argument("--models", default="hope,hope:inner_step=0,transformer,transformer:conv=4,gated_deltanet,titans")
    o.add_argument("--models", default="hope,transformer", help="comma-separated")
    a.add_argument("--model", default="hope", help="Hope, with fields that all have")
    for command, tokens, seeds in ((q, 1_000_000, "0,1,2"), (o, 500_000, "0"), (a, 1_000_000, "0")):
        command.add_argument("--tokens", type=whole, default=tokens, help="of each run, rounded up to whole steps")
        command.add_argument("--seeds", default=seeds, help="of weights and batches")
        command.add_argument("--lrs", default="1.5e-3,3e-3,6e-3", help="grid of learning rates; one: no search")
        command.add_argument("--lr-tokens", type=whole, default=tokens // 4, help="tokens of a learning-rate run")
        command.add_argument("--seq-len", type=whole, default=512, help="tokens in a row")
        command.add_argument("--eval-tokens", type=whole, default=262_144, help="held-out tokens, from the first on")
        command.add_argument("--preset", default="nano", help="size of the models")
        command.add_argument("--data", default="stdlib", help="'stdlib', a text file or a folder")
        command.add_argument("--jobs", type=whole, default=2, help="cells trained at once; they share the cores")
        command.add_argument("--minutes", type=minutes, default=0.0, help="also train each model for this long; 0: do not")
    o.add_argument("--rounds", type=whole, default=20, help="rounds of ten optimizer steps that are timed")
    o.add_argument("--optimizers", default="adamw,muon,m3,delta_momentum,dmgd", help=f"out of {', '.join(OPTIMIZERS)}")
    d.add_argument("--optimizers", default="adamw,muon,m3", help=f"out of {', '.join(OPTIMIZERS)}")
    d.add_argument("--steps", type=whole, default=300, help="of every run")
    d.add_argument("--seeds", default="0,1,2", help="of weights and batches")
    d.add_argument("--lrs", default="1e-3,3e-3,1e-2", help="grid of learning rates")
    d.add_argument("--batch", type=whole, default=64, help="images in a batch")
    d.add_argument("--out", default="results/digits.json", help="the result as JSON")
    k = commands.add_parser("kernels", formatter_class=defaults, help="the fused kernels, on a GPU")
    k.add_argument("--heads", default="128,256", help="batch x heads, multiples of 16")
    k.add_argument("--lengths", default="2048,4096,8192,16384,32768", help="tokens in a row")
    k.add_argument("--chunk", type=whole, default=64, help="tokens that self-modifying memories generate at once")
    k.add_argument("--preset", default="340m", help="size of the models whose training steps are timed; none: leave them out")
    k.add_argument("--models", default="hope", help="comma-separated; transformer is always measured")
    for command in (s, q, a, o, d):
        command.add_argument("--threads", type=lambda text: whole(text, 0), default=0, help="CPU threads of a process; 0: all")
    for command in (s, q, a, o):
        command.add_argument("--batch", type=whole, default=4, help="rows in a batch")
    for command in (s, q, a, o, k):
        command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        command.add_argument("--out", default=f"results/{command.prog.split()[-1]}.json", help="the result as JSON")
    return top


def write_result(args, result: dict) -> None:
    """--out: the result, and with what and where it was measured."""
    machine = {"cpu": processor(), "cores": cores(), "torch": torch.__version__, "python": platform.python_version(),
               "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}  # fmt: skip
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(args.out), {"command": args.line, "machine": machine, "commit": commit(), **result})


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0 done, 2 bad input or a failed run, 130 stopped by Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        top = parser()
        args = top.parse_args(argv)
        args.line = shlex.join(["python", "bench.py", *argv])
        if args.command is None:
            top.print_help()
            return 0
        commands = {"speed": speed, "quality": quality, "ablation": ablation, "optimizers": compare_optimizers,
                    "digits": digits, "kernels": kernel_speed}  # fmt: skip
        result = commands[args.command](args)
        if result:
            write_result(args, result)
            print(f"\nin {args.out}")
        return 0
    except (ValueError, OSError, RuntimeError) as error:  # out of memory, a worker that was killed: RuntimeErrors
        killed = "a worker was killed (out of memory?); finished cells are kept: try fewer --jobs"
        message = killed if isinstance(error, BrokenProcessPool) else first_line(error)
        print(f"bench.py: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench.py: stopped; the same command goes on from the finished cells", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
