"""Small models on the synthetic tasks of tasks.py, beside what the paper prints (NL tables 4, 5).

    python -m bench suites --suite formal --models hope,transformer,lstm --quick
    python -m bench suites --suite mad --models hope,transformer,titans --quick
    python -m bench suites --suite mqar --models hope,transformer --quick
    python -m bench suites --suite formal --models hope:chunk=1 --tasks parity --seeds 0,1,2 --quick

A cell is one model on one task with one seed, trained from scratch (small_tasks.py). All models of
a suite have the same sizes (fields of HopeConfig, which a model's own `:field=value` overrides),
equal parameters, the same data and the same number of steps.

formal: a model reads a word and says after every symbol what holds for the prefix. Accuracy is of
whole words: every label right. Trained on lengths 2 to 50; bin 0 is other words of these lengths,
bin 1 words of length 51 to 100. (Where a language has few words, bin 0 is the words trained on, as
published.) Every 100 or 200 steps a model is scored on words kept apart for that, in both bins;
training ends when all are right, and else the best scored weights count. `lstm` is torch's own, two
layers, for this suite only.

mad: the last-token state of `compression` goes through the benchmark's decoder; accuracy is the
mean over the classes of the accuracy on their tokens. The score is the mean over the baseline task
and, without --quick, all its variations.

mqar: accuracy on the keys asked for; the paper has no such table.

Without --quick the published protocols: formal 10,000 words, up to 300 epochs; MAD 12,800 examples,
200 epochs, batches of 128, width 128, 66 tasks. Where several learning rates or weight decays are
given, each model's are chosen task by task on validation data with seed 100, which is not reported;
of equally good ones those that needed fewer steps.

Cost: --quick takes 10 minutes on two cores for two models. In full a cell of formal that never gets
all words right takes 47,000 steps, an hour on a core for hope. MAD in full is 66 tasks of 7 cells
for each model, most of 20,000 steps of 128 x 128 tokens: for a GPU.
"""

import json
import math
import statistics
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np

from bench.cells import (
    SEARCH_SEED,
    Record,
    best_of,
    check_seeds,
    cores,
    machine_flags,
    numbers,
    split_specs,
    without_key,
    workers,
)
from bench.small_tasks import GRIDS, Cell, data_sets, protocol, train_cell
from bench.tables import cell as shown
from bench.tables import markdown, published, short
from layers import one_of
from support.checkpoint import warned
from support.config import TrainConfig
from support.flags import whole_number
from support.plots import heat_map, picture
from support.run import device_for
from tasks import LANGUAGES

COLUMNS = {  # suite -> task -> column of the paper's table
    "formal": dict(zip(LANGUAGES, published("table5")["columns"], strict=True)),
    "mad": {
        "compression": "Compression",
        "recall": "ICR",
        "noisy recall": "noisy ICR",
        "fuzzy recall": "Fuzzy ICR",
        "selective copying": "Selective copy",
        "memorization": "Memorization",
    },
    "mqar": {f"{n} pairs": f"{n} pairs" for n in (4, 16, 64)},
}
TABLES = {"formal": "table5", "mad": "table4"}
BINS = {"formal": 2, "mad": 1, "mqar": 1}  # test sets of a task


def add_flags(parser) -> None:
    parser.add_argument("--suite", required=True, help="formal, mad or mqar")
    parser.add_argument("--models", default="hope,transformer", help="comma-separated")
    parser.add_argument("--tasks", help="some of the suite's, with commas; none: all")
    parser.add_argument("--quick", action="store_true", help="10 minutes on two cores")
    parser.add_argument("--seeds", default="0", help="of data, weights and batches")
    parser.add_argument("--lrs", help="grid of learning rates; none: the protocol's")
    for name in ("steps", "batch", "examples", "tests"):
        parser.add_argument(f"--{name}", type=whole_number, help="none: the protocol's number")
    jobs = "cells trained at once; they share the cores"
    parser.add_argument("--jobs", type=whole_number, default=2, help=jobs)
    machine_flags(parser, None)  # results/tasks_SUITE[_quick].json


# --------------------------------------------------------------------------------------------------
# A suite


def suites(args) -> dict:
    """All cells of a suite; prints its table, draws the heat-map and returns what they show."""
    suite = one_of("suite", args.suite, COLUMNS)
    args.out = args.out or f"results/tasks_{suite}{'_quick' if args.quick else ''}.json"
    models = split_specs(args.models)
    seeds = numbers(args.seeds, int)
    check_seeds(seeds)
    if "lstm" in models and suite != "formal":
        raise ValueError("lstm is a reference on the formal languages only")
    tasks = []
    for task in (args.tasks or ",".join(COLUMNS[suite])).split(","):
        tasks.append(one_of("task", task.strip(), COLUMNS[suite]))
    kinds = kinds_of(suite, tasks, models, args)
    grid = grid_of(suite, kinds[0], args)
    for cell in kinds:  # everything that can be wrong is found here, before anything is written
        cell.config()
        data_sets(replace(cell, examples=1, tests=1))
    for settings in grid:
        TrainConfig(**settings)
    device = str(device_for(args.device))
    threads = args.threads or max(1, cores() // args.jobs)
    record = Record(Path(args.out).with_suffix(".jsonl"), current_key)
    search = {}
    if len(grid) > 1:
        for kind, settings in product(kinds, grid):
            cell = replace(kind, seed=SEARCH_SEED, **settings)
            search[cell.key()] = cell
    steps = sum(cell.steps for cell in [*search.values(), *kinds * len(seeds)])
    others = len(kinds) * len(seeds)
    print(
        f"{len(search)} cells that choose a learning rate, {others} others, at most {steps:,} "
        f"training steps, in {args.jobs} processes of {threads} threads",
        flush=True,
    )
    train = partial(train_cell, device=device, threads=threads)
    with workers(args.jobs) as pool:
        searched = record.run(search, train, facts, told, pool) if search else {}
        wanted = {}
        for seed, kind in product(seeds, kinds):
            cell = replace(kind, seed=seed, **chosen(kind, grid, searched))
            wanted[cell.key()] = cell
        done = record.run(wanted, train, facts, told, pool)
    rows = []
    for model in models:
        rows.append(summary(model, tasks, [c for c in done.values() if c["model"] == model]))
    print(f"\n{table(suite, tasks, rows, args)}")
    draw(Path(args.out).with_suffix(".png"), suite, tasks, rows)
    cells = [without_key(line) for line in [*searched.values(), *done.values()]]
    return {"suite": suite, "quick": args.quick, "rows": rows, "cells": cells}


def current_key(key: str) -> str:
    """The key of a finished cell today; before the CMS learned by default Hope had other levels."""
    old = json.loads(key)
    cell = Cell(**old["cell"])
    model = old["model"]
    if model and "cms_updates" not in model and model["model"].startswith("hope"):
        levels = json.dumps(model["levels"])
        given = "" if ":levels=" in cell.model else f":levels={levels}".replace(" ", "")
        cell = replace(cell, model=f"{cell.model}{given}:cms_updates=off:cms_blocks=null")
    return cell.key()


def kinds_of(suite: str, tasks: list[str], models: list[str], args) -> list[Cell]:
    """A cell for each task, variation and model, without seed and learning rate."""
    given = {name: getattr(args, name) for name in ("steps", "batch", "examples", "tests")}
    changes = {name: value for name, value in given.items() if value}
    kinds = []
    for task in tasks:
        for settings, model in product(protocol(suite, task, args.quick), models):
            kinds.append(Cell(suite, task, model, **(settings | changes)))
    return kinds


def grid_of(suite: str, kind: Cell, args) -> list[dict]:
    """Learning rates and weight decays to choose from; one: no search."""
    lrs, decays = ((), ()) if args.quick else GRIDS[suite]
    if args.lrs:
        lrs = numbers(args.lrs, float)
    pairs = product(lrs or [kind.lr], decays or [kind.weight_decay])
    return [{"lr": lr, "weight_decay": weight_decay} for lr, weight_decay in pairs]


def chosen(kind: Cell, grid: list[dict], searched: dict) -> dict:
    """The settings that validated best; of equally good ones those that needed fewer steps."""

    def validated(settings):
        line = searched[replace(kind, seed=SEARCH_SEED, **settings).key()]
        return None if line["test"] is None else (statistics.mean(line["valid"]), -line["steps"])

    return (best_of(grid, validated) if searched else None) or grid[0]


def facts(cell: Cell) -> dict:
    names = ("suite", "task", "model", "settings", "lr", "weight_decay", "seed")
    return {name: getattr(cell, name) for name in names}


def told(line: dict) -> str:
    values = "diverged"
    if line["test"] is not None:
        values = " / ".join(f"{100 * value:.1f}" for value in line["test"])
    what = f"{line['model']}  {line['task']} {line['settings'] or ''}"
    how = f"lr {line['lr']:g}  seed {line['seed']}"
    return f"{what}  {how}: {values} after {line['steps']} steps, {line['seconds']:.0f} s"


# --------------------------------------------------------------------------------------------------
# What they show


def summary(model: str, tasks: list[str], lines: list[dict]) -> dict:
    """For each task a list over bins: mean and worst over the seeds in %.

    A seed's score is the mean over the variations.
    """
    row = {"model": model, "mean": {}, "worst": {}}
    row["parameters"] = min(line["parameters"] for line in lines)
    for task in tasks:
        own = [line for line in lines if line["task"] == task]
        seeds = {}
        for line in own:  # what diverged has learned nothing
            nothing = [0.0] * BINS[line["suite"]]
            seeds.setdefault(line["seed"], []).append(line["test"] or nothing)
        scores = 100 * np.array([np.mean(values, 0) for values in seeds.values()])  # [seeds, bins]
        row["mean"][task] = scores.mean(0).tolist()
        row["worst"][task] = scores.min(0).tolist()
    return row


def table(suite: str, tasks: list[str], rows: list[dict], args) -> str:
    """Markdown: our rows, then the published ones."""
    columns = [COLUMNS[suite][task] for task in tasks]
    several = "," in args.seeds
    lines = []
    for row in rows:
        line = [f"**{row['model']}**", short(row["parameters"])]
        for task in tasks:
            bins = []
            for mean, worst in zip(row["mean"][task], row["worst"][task], strict=True):
                bins.append(f"{mean:.1f} ({worst:.1f})" if several else f"{mean:.1f}")
            line.append(" / ".join(bins))
        lines.append(line)
    title = "Multi-query associative recall, accuracy %"
    if suite in TABLES:
        paper = published(TABLES[suite])
        title = paper["title"]
        for row in paper["rows"]:
            values = dict(zip(paper["columns"], row["values"], strict=True))
            stated = [f"{row['model']}, published", "not stated"]
            lines.append(stated + [shown(values.get(column)) for column in columns])
    note = f"{title}; seeds {args.seeds}"
    note += ", mean (worst)" * several + ", quick protocol" * args.quick
    return f"{note}\n\n{markdown(['model', 'parameters', *columns], lines)}"


def draw(path: Path, suite: str, tasks: list[str], rows: list[dict]) -> None:
    """Heat-map of mean accuracy: our models, and below them the published ones."""
    bins = BINS[suite]
    names = [row["model"] for row in rows]
    values = [np.concatenate([row["mean"][task] for task in tasks]) for row in rows]
    if suite in TABLES:
        paper = published(TABLES[suite])
        for row in paper["rows"]:
            own = dict(zip(paper["columns"], row["values"], strict=True))
            found = [np.atleast_1d(own.get(COLUMNS[suite][t], [math.nan] * bins)) for t in tasks]
            names.append(f"{row['model']}, published")
            values.append(np.concatenate(found))
    labels = []
    for task, number in product(tasks, range(bins)):
        labels.append(COLUMNS[suite][task] + (f" bin {number}" if bins > 1 else ""))
    with warned(), picture(path, 3.5 + 0.7 * len(labels), 1.5 + 0.35 * len(names)) as figure:
        axes = figure.add_subplot()
        values = np.array(values, float)
        image = heat_map(axes, values, names, labels, "{:.0f}", vmin=0, vmax=100)
        figure.colorbar(image, label="accuracy %", pad=0.02)
        axes.axhline(len(rows) - 0.5, color="white", linewidth=3)
