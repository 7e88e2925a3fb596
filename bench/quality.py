"""What models learn from the same data: bits per byte of held-out text after the same training.

    python -m bench quality                                                        # 36 runs
    python -m bench quality --models hope,transformer --seeds 0 --minutes 5      # and at equal time
    python -m bench quality --models hope@adamw,hope@muon                          # MODEL@OPTIMIZER

All models are trained as train.py does it, on the same batches. For each model the learning rate of
the grid is chosen that is best on a shorter run with seed 100, which no other run uses; then there
is a run for each seed. "After equal time" are runs of their own, each with a schedule that ends
after the tokens which the model gets through in --minutes of training, at the median speed of its
learning-rate runs. Cells run in --jobs processes that share the cores.
"""

import argparse
import json
import math
import statistics
import time
from contextlib import suppress
from dataclasses import asdict
from functools import cache, partial
from itertools import product
from pathlib import Path

from bench.cells import (
    SEARCH_SEED,
    Record,
    best_of,
    check_seeds,
    code_version,
    cores,
    machine_flags,
    numbers,
    parameters,
    parse_spec,
    spec_config,
    split_specs,
    state_numbers,
    where,
    without_key,
    workers,
)
from hope import HopeConfig, loss_fn
from support.checkpoint import first_line
from support.config import TrainConfig
from support.corpus import batch, load_corpus
from support.flags import whole_number
from support.run import Run, as_of_today, device_for, precision
from support.vocabulary import n_bytes
from train import NonFinite, schedule, update, validate

MODELS = "hope,hope:inner_step=0,transformer,transformer:conv=4,gated_deltanet,titans"


def add_flags(parser) -> None:
    parser.add_argument("--models", default=MODELS, help="comma-separated")
    training_flags(parser, "results/quality.json", tokens=1_000_000, seeds="0,1,2")


def training_flags(parser, out: str, tokens: int, seeds: str) -> None:
    """The flags that `compare` reads, but --models."""

    def number(flag, default, help):
        parser.add_argument(flag, type=whole_number, default=default, help=help)

    number("--tokens", tokens, "tokens of each run, rounded up to whole steps")
    parser.add_argument("--seeds", default=seeds, help="of weights and batches")
    rates = "grid of learning rates; one: no search"
    parser.add_argument("--lrs", default="1.5e-3,3e-3,6e-3", help=rates)
    number("--lr-tokens", tokens // 4, "tokens of a learning-rate run")
    number("--batch", 4, "rows in a batch")
    number("--seq-len", 512, "tokens in a row")
    number("--eval-tokens", 262_144, "held-out tokens, from the first on")
    parser.add_argument("--preset", default="nano", help="size of the models")
    parser.add_argument("--data", default="stdlib", help="'stdlib', a text file or a folder")
    timed = "also train each model for this long; 0: do not"
    parser.add_argument("--minutes", type=minutes, default=0.0, help=timed)
    number("--jobs", 2, "cells trained at once; they share the cores")
    machine_flags(parser, out)


def minutes(text: str) -> float:
    """A flag: a number of at least 0."""
    with suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text}")


# --------------------------------------------------------------------------------------------------
# A cell: (spec, TrainConfig), one training run

corpus_of = cache(load_corpus)  # the keys of all cells need it


def cell_model(config: TrainConfig) -> HopeConfig:
    """The model of a cell."""
    own = {"vocab_size": corpus_of(config.data).encoding.n_vocab}
    return HopeConfig.preset(config.preset, model=config.model, **(own | config.set))


def cell_key(config: TrainConfig, corpus: dict, model: HopeConfig | None = None) -> str:
    """All settings of a cell, the model's defaults included.

    corpus: its fingerprint, so the data may lie anywhere.
    """
    train = asdict(config) | {"data": corpus["name"]}
    model = (model or cell_model(config)).to_dict()
    return json.dumps({"train": train, "model": model, "corpus": corpus}, sort_keys=True)


def current_key(key: str) -> str:
    """The key of a finished cell, with the defaults of later fields: they change no model."""
    old = json.loads(key)
    train, model = as_of_today(old["train"], old["model"])
    if "cms_updates" not in old["model"] and model["model"].startswith("hope"):
        # before the CMS learned by default Hope's levels differed
        own = {"levels": model["levels"], "cms_updates": "off"}
        train["set"] = own | train["set"] | {"cms_updates": "off", "cms_blocks": None}
    return cell_key(TrainConfig(**train), old["corpus"], HopeConfig(**model))


def train_cell(cell: tuple[str, TrainConfig]) -> dict:
    """Train and validate one model.

    A loss that is not finite is a result, too: bits_per_byte None, and the error.
    """
    _, config = cell
    run = Run.start(config, keep=False)
    optimizer = run.new_optimizer()
    seconds = []
    held = state_numbers(run.model, config.seq_len)
    result = {"bits_per_byte": None, "state_numbers": held}
    try:
        for step in range(config.steps):
            began = time.perf_counter()
            rows = batch(run.corpus.train, config.batch_size, config.seq_len, config.seed, step)
            inputs, targets = (part.to(run.device) for part in rows)
            lr = schedule(run.model, step, config.steps, config)
            with precision(run.device):
                logits, _ = run.model(inputs)
            loss = loss_fn(logits, targets)
            update(run.model, optimizer, lr, [loss], config.grad_clip)
            seconds.append(time.perf_counter() - began)
        held_out = run.corpus.val[: config.eval_tokens]
        start = run.encoding.eot_token
        sizes = (config.batch_size, config.seq_len)
        nats, _ = validate(run.model, held_out, *sizes, run.device, start=start)
        result["bits_per_byte"] = nats / math.log(2) / n_bytes(held_out, run.encoding)
    except NonFinite as error:
        result["error"] = f"step {step + 1}: {first_line(error)}"
    speed = config.tokens_per_step / statistics.median(seconds) if seconds else None
    took = {"train_seconds": sum(seconds), "tokens_per_s": speed}
    return result | took | {"code": code_version()}


def facts(cell: tuple[str, TrainConfig]) -> dict:
    """What stands before a cell's result in its line."""
    spec, config = cell
    return {
        "spec": spec,
        "lr": config.lr,
        "seed": config.seed,
        "threads": config.threads,
        "tokens": config.steps * config.tokens_per_step,
        "parameters": parameters(cell_model(config)),
    }


def told(line: dict) -> str:
    """What is printed of a finished cell."""
    bits = line["bits_per_byte"]
    shown = f"none ({line['error']})" if bits is None else f"{bits:.4f}"
    settings = f"{line['spec']}  lr {line['lr']:g}  seed {line['seed']}  {line['tokens']:,} tokens"
    return f"{settings}: {shown} bits per byte, {line['train_seconds']:.0f} s"


def trained(cells: list, record: Record, corpus: dict, pool) -> list[dict]:
    """Lines of cells, in order; those that the record lacks are trained."""
    keys = [cell_key(config, corpus) for _, config in cells]
    lines = record.run(dict(zip(keys, cells, strict=True)), train_cell, facts, told, pool)
    return [{**lines[key], "spec": spec} for key, (spec, _) in zip(keys, cells, strict=True)]


# --------------------------------------------------------------------------------------------------
# The comparison


def quality(args) -> dict:
    """`compare`, with worker processes of its own."""
    with workers(args.jobs) as pool:
        return compare(args, pool)


def compare(args, pool) -> dict:
    """Choose learning rates, train at equal tokens and (--minutes) at equal time; print tables."""
    specs = split_specs(args.models)
    seeds = numbers(args.seeds, int)
    lrs = numbers(args.lrs, float)
    check_seeds(seeds)
    device = str(device_for(args.device))
    threads = args.threads or max(1, cores() // args.jobs)

    def cell(spec, lr, seed, tokens):
        model, _, optimizer = spec.partition("@")
        name, fields = parse_spec(model)
        return spec, TrainConfig(
            model=name, preset=args.preset, set=fields, data=args.data,
            optimizer=optimizer or "adamw", tokens=tokens, batch_size=args.batch,
            seq_len=args.seq_len, lr=lr, seed=seed, eval_every=0, eval_tokens=args.eval_tokens,
            device=device, threads=threads,
        )

    # Everything that can be wrong is found here, before anything is written.
    tried = product(lrs, specs) if len(lrs) > 1 else ()
    search = [cell(spec, lr, SEARCH_SEED, args.lr_tokens) for lr, spec in tried]
    for spec, seed in product(specs, seeds):
        cell(spec, lrs[0], seed, args.tokens)
    corpus = corpus_of(args.data)
    batch(corpus.train, 1, args.seq_len, 0, 0)
    note_unequal_sizes(specs, args.preset, corpus.encoding.n_vocab)

    record = Record(Path(args.out).with_suffix(".jsonl"), current_key)
    train = partial(trained, record=record, corpus=corpus.fingerprint(), pool=pool)
    others = len(specs) * len(seeds) * (2 if args.minutes else 1)
    how = f"in {args.jobs} processes on {where(device, threads)}"
    print(f"{len(search)} learning-rate runs, {others} others, {how}", flush=True)
    # learning rates
    searched = train(search)
    best = dict.fromkeys(specs, lrs[0])
    for spec in specs if search else ():
        best[spec] = best_lr(spec, lrs, searched)
    # equal tokens; seed by seed, so that a benchmark stopped half way has compared all models
    runs = list(product(seeds, specs))
    lines = train([cell(spec, best[spec], seed, args.tokens) for seed, spec in runs])
    result = {"best_lr": best, "equal_tokens": summary("after equal tokens", lines)}
    # equal time
    if args.minutes:
        step = args.batch * args.seq_len
        tokens = {}
        for spec in specs:
            steps = round(speed_of(spec, searched or lines) * 60 * args.minutes / step)
            tokens[spec] = max(1, steps) * step
        timed = train([cell(spec, best[spec], seed, tokens[spec]) for seed, spec in runs])
        result["equal_time"] = summary(f"after equal time ({args.minutes:g} minutes)", timed)
        lines = lines + timed

    edges = [f"{spec} {lr:g}" for spec, lr in best.items() if lr in (min(lrs), max(lrs))]
    if search and edges:
        at = ", ".join(edges)
        print(f"\nnote: the best learning rate is at the edge of the grid for {at}")
    lines = searched + lines
    versions = {line["code"] for line in lines}
    if len(versions) > 1:
        note = f"cells of {len(versions)} versions of the code; a fresh --out trains all again"
        print(f"\nnote: {note}")
    return result | {"cells": [without_key(line) for line in lines]}


def note_unequal_sizes(specs: list[str], preset: str, n_vocab: int) -> None:
    """Print a note where models differ in size. ValueError for a model that cannot be built."""
    sizes = {}
    for spec in specs:
        sizes[spec] = parameters(spec_config(spec.partition("@")[0], preset, vocab_size=n_vocab))
    if max(sizes.values()) > 1.02 * min(sizes.values()):
        shown = ", ".join(f"{spec} {n:,}" for spec, n in sizes.items())
        print(f"note: parameters differ by more than 2%: {shown}")


def best_lr(spec: str, lrs: list[float], searched: list[dict]) -> float:
    """The learning rate of the best search run of a model. ValueError where all diverged."""
    bits = {line["lr"]: line["bits_per_byte"] for line in searched if line["spec"] == spec}
    best = best_of(lrs, lambda lr: None if bits[lr] is None else -bits[lr])
    if best is None:
        tried = ", ".join(f"{lr:g}" for lr in lrs)
        diverged = f"model {spec!r} diverged at every learning rate of {tried}"
        raise ValueError(f"{diverged}: add smaller ones to --lrs")
    return best


def speed_of(spec: str, lines: list[dict]) -> float:
    """Median training speed of a model (tokens/s)."""
    own = [line for line in lines if line["spec"] == spec]
    return statistics.median(line["tokens_per_s"] for line in own if line["tokens_per_s"])


# --------------------------------------------------------------------------------------------------
# Its table


def summary(title: str, lines: list[dict]) -> list[dict]:
    """A row for each model, the best mean first, also printed.

    Differences to hope are of runs on the same batches (same seed).
    """
    runs = {}
    for line in lines:
        runs.setdefault(line["spec"], {})[line["seed"]] = line
    base = "hope" if "hope" in runs else next(iter(runs))
    reference = {seed: line["bits_per_byte"] for seed, line in runs[base].items()}
    rows = []
    for spec, seeds in runs.items():
        bits = {seed: line["bits_per_byte"] for seed, line in seeds.items()}
        mean, std = spread(list(bits.values()))
        pairs = [(value, reference[seed]) for seed, value in bits.items()]
        above, above_std = spread([None if None in (a, b) else a - b for a, b in pairs])
        first = next(iter(seeds.values()))
        speeds = [line["tokens_per_s"] for line in seeds.values() if line["tokens_per_s"]]
        seconds = statistics.median(line["train_seconds"] for line in seeds.values())
        same = ("parameters", "state_numbers", "lr", "tokens")
        row = {"model": spec} | {name: first[name] for name in same}
        row["tokens_per_s"] = statistics.median(speeds) if speeds else None
        row |= {"mean": mean, "std": std, "minutes": seconds / 60}
        row |= {"difference": above, "difference_std": above_std, "seeds": bits}
        rows.append(row)
    rows.sort(key=lambda row: math.inf if row["mean"] is None else row["mean"])
    show(title, base, rows)
    return rows


def spread(values: list) -> tuple[float | None, float | None]:
    """Mean, and standard deviation where there are several; of a diverged run nothing."""
    if None in values:
        return None, None
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def show(title: str, base: str, rows: list[dict]) -> None:
    """Print the rows of `summary`."""

    def with_std(mean, std, sign=""):
        if mean is None:
            return "-"
        return f"{mean:{sign}.4f}" if std is None else f"{mean:{sign}.4f} ± {std:.4f}"

    width = max(len(row["model"]) for row in rows) + 2
    what = "bits per byte of held-out text, mean ± std of seeds"
    print(f"\n{title}: {what}; difference to {base}\n")
    print(
        f"{'model':<{width}}{'bits per byte':>17}{'difference':>19}{'parameters':>12}{'state':>10}"
        f"{'lr':>9}{'tokens':>12}{'tokens/s':>10}{'minutes':>9}  each seed"
    )
    for row in rows:
        bits = with_std(row["mean"], row["std"])
        difference = with_std(row["difference"], row["difference_std"], "+")
        each = []
        for seed, value in row["seeds"].items():
            each.append(f"{seed}: none" if value is None else f"{seed}: {value:.4f}")
        print(
            f"{row['model']:<{width}}{bits:>17}{difference:>19}{row['parameters']:>12,}"
            f"{row['state_numbers']:>10,}{row['lr']:>9g}{row['tokens']:>12,}"
            f"{row['tokens_per_s'] or 0:>10,.0f}{row['minutes']:>9.2f}  {', '.join(each)}"
        )
