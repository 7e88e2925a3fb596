"""Small models trained on the synthetic tasks of tasks.py, beside what the paper prints (NL tables 4 and 5).

    python eval.py tasks --suite formal --models hope,transformer,linear_attention,lstm --quick      # formal languages
    python eval.py tasks --suite mad --models hope,transformer,gated_deltanet,titans --quick         # MAD
    python eval.py tasks --suite mqar --models hope,transformer --quick                              # many keys to recall
    python eval.py tasks --suite formal --models hope:chunk=1,hope:inner_step=0 --tasks parity --seeds 0,1,2 --quick

A cell is one model on one task with one seed, trained from scratch. All models of a suite have the same sizes (fields of
HopeConfig, which a model's own `:field=value` override), equal parameters, the same data and the same number of steps.
Cells run in --jobs processes; a finished one is a line of the .jsonl beside --out, and the same command goes on from there.

formal: a model reads a word and says after every symbol what holds for the prefix. Accuracy is of whole words: every
label right. Trained on lengths 2 to 50; bin 0 is other words of these lengths, bin 1 words of length 51 to 100. (Where a
language has few words, bin 0 is the words trained on, as published.) Every 100 or 200 steps a model is scored on words kept
apart for that, also in both bins; training ends when all are right, and else the best scored weights count. (Published:
the same, on the test words; so here where a language has few.) `lstm` is torch's own, two layers, for this suite only.

mad: the last-token state of `compression` goes through the benchmark's decoder; accuracy is the mean over the classes of
the accuracy on their tokens. The score is the mean over the baseline task and, without --quick, all its variations.

mqar: accuracy on the keys asked for; the paper has no such table.

Without --quick the published protocols: formal 10,000 words, up to 300 epochs; MAD 12,800 examples, 200 epochs, batches of
128, width 128, learning rates 1e-4, 5e-4, 1e-3 with weight decay 0 and 0.1, 66 tasks. Where several learning rates or
weight decays are given, each model's are chosen task by task on validation data with seed 100, which is not reported; of
equally good ones that which needed fewer steps.

Cost: --quick is made for 10 minutes on two cores for two models. In full a cell of formal that never gets all words right
takes 47,000 steps, an hour on a core for hope, and each task of a model has four cells, or more with more seeds. MAD in full is
66 tasks of 7 cells for each model, most of 20,000 steps of 128 x 128 tokens: for a GPU. The number of steps is printed first.
"""

import argparse
import inspect
import json
import math
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bench.cells import (
    SEARCH_SEED,
    cores,
    numbers,
    read_cells,
    run_cells,
    spec_config,
    split_specs,
    workers,
)
from bench.tables import cell as shown
from bench.tables import markdown, published, short
from hope import Hope, HopeConfig, loss_fn, one_of
from support.checkpoint import atomic_write, first_line
from support.config import TrainConfig
from support.flags import Parser, whole_number
from support.run import device_for, optimizer_for, write_json
from tasks import IGNORE, LANGUAGES, MAD, formal, mqar
from train import NonFinite, gradient_norm, learning_rate

COLUMNS = {  # task: column of the paper's table
    "formal": dict(zip(LANGUAGES, published("table5")["columns"], strict=True)),
    "mad": {"compression": "Compression", "recall": "ICR", "noisy recall": "noisy ICR", "fuzzy recall": "Fuzzy ICR",
            "selective copying": "Selective copy", "memorization": "Memorization"},
    "mqar": {"4 pairs": "4 pairs", "16 pairs": "16 pairs", "64 pairs": "64 pairs"},
}  # fmt: skip
TABLES = {"formal": "table5", "mad": "table4"}


@dataclass(frozen=True)
class Cell:
    """One training run. settings: of the task's generator; sizes: of the model, where its spec does not say otherwise."""

    suite: str
    task: str
    model: str
    seed: int = 0
    settings: dict = field(default_factory=dict)
    sizes: dict = field(default_factory=lambda: {"d_model": 32, "n_layers": 2, "n_heads": 1, "chunk": 16})
    lr: float = 1.5e-2
    weight_decay: float = 0.0
    steps: int = 2000
    batch: int = 64
    check: int = 200  # steps between validations that may end the training; 0: none
    examples: int = 10_000
    tests: int = 500

    def config(self) -> HopeConfig | None:
        """The model; None for the LSTM. ValueError in one line for what cannot be built."""
        if self.model == "lstm":
            return None
        return spec_config(self.model, vocab_size=self.vocab(), **self.sizes)

    def vocab(self) -> int:
        if self.suite == "formal":
            return sum(map(len, LANGUAGES[self.task]))
        function, settings = self.generator()
        return settings.get("vocab", inspect.signature(function).parameters["vocab"].default)

    def generator(self) -> tuple:
        """(function, its settings)."""
        if self.suite == "mqar":
            return mqar, {"pairs": int(self.task.split()[0])} | self.settings
        function, settings, _ = MAD[self.task]
        return function, {k: v for k, v in (settings | self.settings).items() if k != "examples"}

    def key(self) -> str:
        config = self.config()
        return json.dumps({"cell": asdict(self), "model": config and config.to_dict()}, sort_keys=True)


SMALL, LARGE = ({"d_model": d, "n_layers": 2, "n_heads": d // 64, "chunk": 16} for d in (64, 128))
_QUICK = {"sizes": SMALL, "lr": 3e-3, "steps": 500, "batch": 16, "check": 0, "examples": 12_800, "tests": 320}
_FULL = {"sizes": LARGE, "batch": 128, "check": 0}
QUICK = {"formal": {"batch": 32, "check": 100, "tests": 300}, "mad": _QUICK, "mqar": _QUICK | {"settings": {"vocab": 256}}}
FULL = {
    "formal": {"steps": 300 * 10_000 // 64, "tests": 2000},
    "mad": _FULL | {"examples": 12_800, "tests": 1280},
    "mqar": _FULL | {"examples": 100_000, "tests": 3000, "steps": 64 * 100_000 // 128},
}
GRIDS = {  # learning rates, weight decays
    "formal": ((1.5e-3, 5e-3, 1.5e-2), (0.0,)),
    "mad": ((1e-4, 5e-4, 1e-3), (0.0, 0.1)),
    "mqar": ((1e-4, 5e-4, 1e-3, 2e-3), (0.1,)),
}


def protocol(suite: str, task: str, quick: bool) -> list[dict]:
    """Settings of a task's cells: one dict, or one for each variation of the benchmark."""
    if quick or suite != "mad":
        base = (QUICK if quick else FULL)[suite]
        return [base | {"examples": 256} if task == "memorization" else base]
    own = FULL["mad"] | {"examples": MAD[task][1].get("examples", 12_800)}
    varied = [own] + [own | ({"examples": value} if name == "examples" else {"settings": {name: value}})
                      for name, values in MAD[task][2] for value in values]  # fmt: skip
    return [one | {"steps": -(-200 * one["examples"] // one["batch"])} for one in varied]


# ---------------------------------------------------------------------------------------------------------------------
# One cell


def data_sets(cell: Cell) -> tuple:
    """(training set, [validation sets], [test sets]), each set inputs and targets [n, T]; two bins in `formal`, else one."""
    if cell.suite == "formal":
        def split(words):  # a language with few words has nothing to keep apart
            cuts = [0, cell.tests, 2 * cell.tests, None] if len(words[0]) > 2 * cell.tests else [0, None, None, None]
            return [[array[a:b] for array in words] for a, b in zip(cuts, cuts[1:], strict=False)]

        near = split(formal(cell.task, cell.examples + 2 * cell.tests, 2, 50, cell.seed))
        far = split(formal(cell.task, 2 * cell.tests + 1, 51, 100, cell.seed))
        return near[2], [near[1], far[1]], [near[0], far[0]]
    generate, settings = cell.generator()
    train, valid, test = (generate(n, **settings, seed=2 * cell.seed + other, train=train)
                          for n, other, train in ((cell.examples, 0, True), (cell.tests, 1, False), (cell.tests, 0, False)))
    return train, [valid], [test]


class LSTM(nn.Module):
    """Embedding, torch's LSTM, a linear map to the vocabulary: (tokens [B, T]) -> (logits, state)."""

    def __init__(self, vocab, d, layers):
        super().__init__()
        self.embedding, self.out = nn.Embedding(vocab, d), nn.Linear(d, vocab)
        self.lstm = nn.LSTM(d, d, layers, batch_first=True)

    def forward(self, tokens):
        y, state = self.lstm(self.embedding(tokens))
        return self.out(y), state


class Autoencoder(nn.Module):
    """A language model's state at the last token, plus sines and cosines of a place, through an MLP: the token there (MAD)."""

    def __init__(self, model: Hope):
        super().__init__()
        self.model, d = model, model.config.d_model
        self.decoder = nn.Sequential(nn.RMSNorm(d), nn.Linear(d, d), nn.GELU(), nn.RMSNorm(d), nn.Linear(d, d), nn.GELU(),
                                     nn.RMSNorm(d), nn.Linear(d, model.config.vocab_size))  # fmt: skip

    def forward(self, tokens):
        x, d = self.model.embedding(tokens), self.model.config.d_model
        for block in self.model.blocks:
            x, _ = block(x, None)
        angle = torch.outer(torch.arange(tokens.shape[1]), 10_000.0 ** (-torch.arange(0, d, 2) / d)).to(x)
        return self.decoder(x[:, -1:] + torch.cat([angle.sin(), angle.cos()], 1)), None


def build(cell: Cell) -> nn.Module:
    config = cell.config()
    if config is None:
        sizes = dict(cell.sizes)
        return LSTM(cell.vocab(), round(1.25 * sizes["d_model"]), sizes["n_layers"])  # as many parameters as the others
    return Autoencoder(Hope(config)) if cell.task == "compression" else Hope(config)


@torch.no_grad()
def score(model: nn.Module, part: list, how: str, batch: int = 128) -> float:
    """Accuracy in [0, 1]: of whole rows ("rows"), of tokens ("tokens"), or the mean over classes of that of tokens."""
    right, asked = [], [targets != IGNORE for targets in part[1].split(batch)]
    for inputs, targets in zip(*(array.split(batch) for array in part), strict=True):
        right.append(model(inputs)[0].argmax(-1) == targets)
    right, asked = torch.cat(right), torch.cat(asked)
    if how == "rows":
        return (right | ~asked).all(1).double().mean().item()
    if how == "tokens":
        return right[asked].double().mean().item()
    targets, right = part[1][asked], right[asked].double()
    return statistics.mean(right[targets == one].mean().item() for one in targets.unique())


def train_cell(cell: Cell, device: str, threads: int) -> dict:
    """Train and score one model. A loss that is not finite is a result too: scores None, and the error."""
    torch.set_num_threads(threads)
    load = lambda part: [torch.from_numpy(array).to(device) for array in part]  # noqa: E731
    (x, y), valid, test = (load(part) if i == 0 else [load(one) for one in part] for i, part in enumerate(data_sets(cell)))
    how = {"formal": "rows", "mad": "classes", "mqar": "tokens"}[cell.suite]
    config = TrainConfig(lr=cell.lr, weight_decay=cell.weight_decay, seed=cell.seed)
    torch.manual_seed(cell.seed)
    model = build(cell).to(device)
    optimizer, rng = optimizer_for(model, config), np.random.default_rng(cell.seed)
    began, best, kept, result = time.perf_counter(), -1.0, None, {"valid": None, "test": None}
    try:
        for step in range(cell.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, cell.steps, config)
            rows = torch.from_numpy(rng.integers(0, len(x), cell.batch)).to(device)
            inputs, targets = x[rows], y[rows]
            length = 1 + int((targets != IGNORE).any(0).nonzero().max())  # nothing is asked for behind it
            loss = loss_fn(model(inputs[:, :length])[0], targets[:, :length])
            loss.backward()
            norm = gradient_norm(model, step + 1, loss.item())
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.grad_clip, norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step + 1 == cell.steps or (cell.check and (step + 1) % cell.check == 0):
                scores = [score(model, part, how) for part in valid]
                if statistics.mean(scores) >= best:
                    best, result["valid"] = statistics.mean(scores), scores
                    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
                if best == 1:
                    break
        model.load_state_dict(kept)
        result["test"] = [score(model, part, how) for part in test]
    except NonFinite as error:
        result["error"] = str(error).split(";")[0]
    size = sum(p.numel() for p in model.parameters())
    return result | {"steps": step + 1, "loss": loss.item(), "seconds": time.perf_counter() - began, "parameters": size}


# ---------------------------------------------------------------------------------------------------------------------
# A suite


def run(args) -> dict:
    """All cells of a suite; prints its table, draws the heat-map and returns what they show."""
    suite, models, seeds = args.suite, split_specs(args.models), numbers(args.seeds, int)
    if SEARCH_SEED in seeds or min(seeds) < 0:
        raise ValueError(f"seeds is {args.seeds}: legal are numbers from 0 on but {SEARCH_SEED}, which chooses learning rates")
    tasks = [one_of("task", task.strip(), COLUMNS[suite]) for task in (args.tasks or ",".join(COLUMNS[suite])).split(",")]
    for model in models:
        if model == "lstm" and suite != "formal":
            raise ValueError("lstm is a reference on the formal languages only")
    lrs, decays = ((), ()) if args.quick else GRIDS.get(suite, ((), ()))
    lrs = numbers(args.lrs, float) if args.lrs else lrs
    changes = {name: value for name in ("steps", "batch", "examples", "tests") if (value := getattr(args, name))}
    kinds = [Cell(suite, task, model, **(one | changes)) for task in tasks for one in protocol(suite, task, args.quick)
             for model in models]  # fmt: skip
    for cell in kinds:  # everything that can be wrong is found here, before anything is written
        cell.config()
        data_sets(replace(cell, examples=1, tests=1))
        for lr in lrs or [cell.lr]:
            TrainConfig(lr=lr)
    grid = [{"lr": lr, "weight_decay": wd} for lr in lrs or [kinds[0].lr] for wd in decays or [kinds[0].weight_decay]]
    search = {cell.key(): cell for kind in kinds for one in grid if len(grid) > 1
              for cell in [replace(kind, seed=SEARCH_SEED, **one)]}  # fmt: skip
    device, path = str(device_for(args.device)), Path(args.out).with_suffix(".jsonl")
    threads = args.threads or max(1, cores() // args.jobs)
    steps = sum(cell.steps for cell in [*search.values(), *kinds * len(seeds)])
    print(f"{len(search)} cells that choose a learning rate, {len(kinds) * len(seeds)} others, at most {steps:,} training "
          f"steps, in {args.jobs} processes of {threads} threads", flush=True)  # fmt: skip

    def told(line):
        values = "diverged" if line["test"] is None else " / ".join(f"{100 * value:.1f}" for value in line["test"])
        return (f"{line['model']}  {line['task']} {line['settings'] or ''}  lr {line['lr']:g}  seed {line['seed']}: {values} "
                f"after {line['steps']} steps, {line['seconds']:.0f} s")  # fmt: skip

    def facts(cell):
        return {name: getattr(cell, name) for name in ("suite", "task", "model", "settings", "lr", "weight_decay", "seed")}

    def cells(wanted):
        train = partial(train_cell, device=device, threads=threads)
        return run_cells(wanted, train, facts, told, path, read_cells(path, str), pool)

    with workers(args.jobs) as pool:
        searched = cells(search) if search else {}
        chosen = []
        for kind in kinds:
            def validated(one, kind=kind):  # of equally good ones that which needed fewer steps
                line = searched[replace(kind, seed=SEARCH_SEED, **one).key()]
                return (-1.0 if line["test"] is None else statistics.mean(line["valid"])), -line["steps"]

            chosen.append(replace(kind, **(max(grid, key=validated) if search else grid[0])))
        done = cells({cell.key(): cell for seed in seeds for kind in chosen for cell in [replace(kind, seed=seed)]})
    rows = [summary(model, tasks, [line for line in done.values() if line["model"] == model]) for model in models]
    text = table(suite, tasks, rows, args)
    print(f"\n{text}")
    draw(Path(args.out).with_suffix(".png"), suite, tasks, rows)
    kept = [{name: value for name, value in line.items() if name != "key"} for line in [*searched.values(), *done.values()]]
    return {"suite": suite, "quick": args.quick, "rows": rows, "cells": kept}


def summary(model: str, tasks: list[str], lines: list[dict]) -> dict:
    """For each task a list over bins: mean and worst over the seeds in %, a seed's score the mean over the variations."""
    row = {"model": model, "parameters": min(line["parameters"] for line in lines), "mean": {}, "worst": {}}
    for task in tasks:
        own = [line for line in lines if line["task"] == task]
        bins = max(len(line["test"] or [0]) for line in own)
        seeds = {}
        for line in own:  # what diverged has learned nothing
            seeds.setdefault(line["seed"], []).append(line["test"] or [0.0] * bins)
        scores = 100 * np.array([np.mean(values, 0) for values in seeds.values()])
        row["mean"][task], row["worst"][task] = scores.mean(0).tolist(), scores.min(0).tolist()
    return row


def table(suite: str, tasks: list[str], rows: list[dict], args) -> str:
    """Markdown: our rows, then the published ones."""
    columns = [COLUMNS[suite][task] for task in tasks]
    many = "," in args.seeds
    lines = [[f"**{row['model']}**", short(row["parameters"]), *(" / ".join(
        f"{mean:.1f} ({worst:.1f})" if many else f"{mean:.1f}" for mean, worst in zip(row["mean"][task], row["worst"][task],
                                                                                     strict=True)) for task in tasks)]
             for row in rows]  # fmt: skip
    title = "Multi-query associative recall, accuracy %"
    if suite in TABLES:
        paper = published(TABLES[suite])
        title = paper["title"]
        for row in paper["rows"]:
            values = dict(zip(paper["columns"], row["values"], strict=True))
            lines.append([f"{row['model']}, published", "not stated", *(shown(values.get(column)) for column in columns)])
    note = f"{title}; seeds {args.seeds}" + ", mean (worst)" * many + (", quick protocol" if args.quick else "")
    return f"{note}\n\n{markdown(['model', 'parameters', *columns], lines)}"


def draw(path: Path, suite: str, tasks: list[str], rows: list[dict]) -> None:
    """Heat-map of mean accuracy: our models, and below them the published ones."""
    from matplotlib.figure import (
        Figure,  # slow to import; a Figure of its own needs no display
    )

    bins = len(rows[0]["mean"][tasks[0]]) if suite == "formal" else 1
    names = [row["model"] for row in rows]
    values = [[value for task in tasks for value in row["mean"][task]] for row in rows]
    for row in published(TABLES[suite])["rows"] if suite in TABLES else []:
        own = dict(zip(published(TABLES[suite])["columns"], row["values"], strict=True))
        names.append(f"{row['model']}, published")
        values.append([value for task in tasks for value in np.atleast_1d(own.get(COLUMNS[suite][task], [math.nan] * bins))])
    labels = [COLUMNS[suite][task] + (f" bin {i}" if bins > 1 else "") for task in tasks for i in range(bins)]
    figure = Figure(figsize=(2.5 + 0.7 * len(labels), 1.5 + 0.35 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(np.array(values, float), cmap="viridis", vmin=0, vmax=100, aspect="auto")
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            if not math.isnan(value):
                axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=8, color="black" if value > 60 else "white")
    axes.axhline(len(rows) - 0.5, color="white", linewidth=3)
    axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title("accuracy %")
    atomic_write(path, lambda beside: figure.savefig(beside, dpi=120, format="png"))


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0 done, 2 bad input, 130 stopped by Ctrl-C."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", required=True, help="formal, mad or mqar")
    parser.add_argument("--models", default="hope,transformer", help="comma-separated; lstm in formal")
    parser.add_argument("--tasks", help="some of the suite's, with commas (default: all)")
    parser.add_argument("--quick", action="store_true", help="10 minutes on two cores for two models")
    parser.add_argument("--seeds", default="0", help="of data, weights and batches")
    parser.add_argument("--lrs", help="grid of learning rates")
    for name in ("steps", "batch", "examples", "tests"):
        parser.add_argument(f"--{name}", type=whole_number, help="another number than the protocol's")
    parser.add_argument("--jobs", type=whole_number, default=2, help="cells trained at once; they share the cores")
    parser.add_argument("--threads", type=lambda text: whole_number(text, 0), default=0, help="CPU threads of a process; 0: all")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--out", help="the result as JSON (default: results/tasks_SUITE.json)")
    try:
        args = parser.parse_args(argv)
        one_of("suite", args.suite, COLUMNS)
        args.out = args.out or f"results/tasks_{args.suite}{'_quick' if args.quick else ''}.json"
        result = run(args)
        write_json(Path(args.out), result)
        print(f"\nin {args.out} and {Path(args.out).with_suffix('.png')}")
        return 0
    except (ValueError, OSError, RuntimeError) as error:
        print(f"eval.py tasks: error: {first_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("eval.py tasks: stopped; the same command goes on from the finished cells", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
