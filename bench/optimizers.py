"""Optimizers against each other.

    python -m bench optimizers     every model under every optimizer, and the time of their steps
    python -m bench digits         a small vision transformer under each (NL figure 11, toy scale)

The first trains as `python -m bench quality` does, with a learning rate of its own for each pair of
model and optimizer. The second trains on the 1437 images of 8 x 8 pixels that scikit-learn's digits
leave beside 360 for testing; a tenth of them chooses the learning rate.
"""

import math
import statistics
import time
from itertools import product

import torch
import torch.nn.functional as F
from torch import nn

from bench.cells import (
    SEARCH_SEED,
    best_of,
    check_seeds,
    cores,
    numbers,
    spec_config,
    split_specs,
    workers,
)
from bench.quality import compare, corpus_of, training_flags
from hope import Hope, HopeConfig
from optimizers import OPTIMIZERS, optimizer_by_name
from support.config import TrainConfig
from support.flags import whole_number
from support.run import device_for, optimizer_for
from train import NonFinite, learning_rate, update

# --------------------------------------------------------------------------------------------------
# On language models


def add_flags(parser) -> None:
    names = f"out of {', '.join(OPTIMIZERS)}"
    parser.add_argument("--models", default="hope,transformer", help="comma-separated")
    parser.add_argument("--optimizers", default="adamw,muon,m3,delta_momentum,dmgd", help=names)
    parser.add_argument(
        "--rounds", type=whole_number, default=20, help="rounds of ten optimizer steps, timed"
    )
    training_flags(parser, "results/optimizers.json", tokens=500_000, seeds="0")


def digits_flags(parser) -> None:
    names = f"out of {', '.join(OPTIMIZERS)}"
    parser.add_argument("--optimizers", default="adamw,muon,m3", help=names)
    parser.add_argument("--steps", type=whole_number, default=300, help="of every run")
    parser.add_argument("--seeds", default="0,1,2", help="of weights and batches")
    parser.add_argument("--lrs", default="1e-3,3e-3,1e-2", help="grid of learning rates")
    parser.add_argument("--batch", type=whole_number, default=64, help="images in a batch")
    parser.add_argument("--threads", type=whole_number, help="CPU threads; all cores if not given")
    parser.add_argument("--out", default="results/digits.json", help="file of the result, as JSON")


def compare_optimizers(args) -> dict:
    """`compare` of every model under every optimizer, then the time of their steps."""
    models = split_specs(args.models)
    names = split_specs(args.optimizers)
    n_vocab = corpus_of(args.data).encoding.n_vocab
    configs = {model: spec_config(model, args.preset, vocab_size=n_vocab) for model in models}
    for name in names:
        TrainConfig(optimizer=name)  # ValueError for an unknown one, before anything is trained
    result = {}
    with workers(args.jobs) as pool:
        for model in models:
            args.models = ",".join(f"{model}@{name}" for name in names)
            result[model] = compare(args, pool)
    for model, config in configs.items():
        result[model]["step_seconds"] = step_times(model, config, names, args)
    return result


def step_times(title: str, config: HopeConfig, names: list[str], args) -> dict[str, list[float]]:
    """Seconds of ten steps of each optimizer, round by round, on random gradients.

    Prints medians, and ratios within a round, so that a slow round slows all of them.
    """
    torch.set_num_threads(args.threads or max(1, cores() // args.jobs))
    device = device_for(args.device)
    optimizers = {}
    for name in names:
        torch.manual_seed(0)
        model = Hope(config).to(device)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizers[name] = optimizer_by_name(model, name)

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    rounds = {name: [] for name in names}
    for number in range(args.rounds + 1):
        for name, optimizer in optimizers.items():
            wait()
            began = time.perf_counter()
            for _ in range(10):  # M3's slow memory is read once in ten steps
                optimizer.step()
            wait()
            if number:  # the first is a warm-up
                rounds[name].append(time.perf_counter() - began)

    base = "muon" if "muon" in names else names[0]
    what = f"medians of {args.rounds} rounds; ratio to {base}"
    print(f"\n{title}: time of an optimizer's step, {what}\n")
    for name, own in rounds.items():
        ratio = statistics.median(t / of for t, of in zip(own, rounds[base], strict=True))
        print(f"{name:<16}{100 * statistics.median(own):>9.2f} ms{ratio:>8.2f}")
    return rounds


# --------------------------------------------------------------------------------------------------
# On a vision transformer


class DigitsViT(nn.Module):
    """8 x 8 images [B, 64] -> logits [B, 10]: 16 patches, pre-norm blocks, mean of the patches."""

    def __init__(self, d=64, n_layers=2, n_heads=4):
        super().__init__()
        self.patches = nn.Linear(4, d)
        self.position = nn.Parameter(torch.randn(16, d) * 0.1)
        how = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(d, n_heads, 4 * d, **how) for _ in range(n_layers)
        )
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, 10)

    def forward(self, x):
        x = x.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)  # patches of 2 x 2
        x = self.patches(x) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def load_images() -> tuple[torch.Tensor, torch.Tensor]:
    """Images [1797, 64] in -1 .. 1 and their digits, shuffled. ValueError without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("digits needs scikit-learn: pip install scikit-learn") from None
    x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return (x.float() / 8 - 1)[order], y[order]


def train_vit(config: TrainConfig, steps: int, batch: int, fit, held_out) -> dict:
    """Train a ViT on the images and digits of `fit`, test it on those of `held_out`.

    Raises NonFinite where the training diverges.
    """
    torch.manual_seed(config.seed)
    model = DigitsViT()
    optimizer = optimizer_for(model, config)
    x, y = fit
    losses = []
    for step in range(steps):
        rows = torch.randint(len(x), (batch,))
        loss = F.cross_entropy(model(x[rows]), y[rows])
        lr = learning_rate(step, steps, config)
        losses.append(update(model, optimizer, lr, [loss])[0])
    model.eval()
    x, y = held_out
    with torch.no_grad():
        logits = model(x)
    return {
        "optimizer": config.optimizer,
        "lr": config.lr,
        "seed": config.seed,
        "train_loss": statistics.mean(losses[-max(1, steps // 10) :]),
        "test_loss": F.cross_entropy(logits, y).item(),
        "test_accuracy": (logits.argmax(-1) == y).float().mean().item(),
    }


def digits(args) -> dict:
    """Losses and accuracy of a ViT under each optimizer, at the best learning rate of each."""
    names = split_specs(args.optimizers)
    seeds = numbers(args.seeds, int)
    lrs = numbers(args.lrs, float)
    check_seeds(seeds)
    configs = {}
    for name, lr, seed in product(names, lrs, [SEARCH_SEED, *seeds]):
        configs[name, lr, seed] = TrainConfig(optimizer=name, lr=lr, seed=seed, weight_decay=0.05)
    x, y = load_images()
    if args.threads:
        torch.set_num_threads(args.threads)
    test = (x[:360], y[:360])
    train = (x[360:], y[360:])
    tenth = len(train[0]) // 10
    held_out = (train[0][:tenth], train[1][:tenth])
    fit = (train[0][tenth:], train[1][tenth:])

    cells = []
    rows = []
    for name in names:
        # the learning rate
        search = {}
        for lr in lrs:
            config = configs[name, lr, SEARCH_SEED]
            try:
                search[lr] = train_vit(config, args.steps, args.batch, fit, held_out)
            except NonFinite as error:
                search[lr] = {"optimizer": name, "lr": lr, "test_loss": None, "error": str(error)}
        scores = {lr: score(cell) for lr, cell in search.items()}
        best = best_of(lrs, scores.get)
        if best is None:
            raise ValueError(f"{name} diverged at all of --lrs {args.lrs}: add smaller ones")
        # the reported runs
        own = []
        for seed in seeds:
            own.append(train_vit(configs[name, best, seed], args.steps, args.batch, train, test))
        row = {"optimizer": name, "lr": best}
        for key in ("train_loss", "test_loss", "test_accuracy"):
            row[key] = statistics.mean(cell[key] for cell in own)
        losses = [cell["test_loss"] for cell in own]
        row["test_loss_std"] = statistics.stdev(losses) if len(losses) > 1 else None
        rows.append(row | {"search": list(search.values())})
        cells += own
    show_digits(args, rows)
    return {"rows": rows, "cells": cells}


def score(cell: dict) -> float | None:
    """Of a run that chooses the learning rate: the higher the better, None if it diverged."""
    loss = cell["test_loss"]
    return None if loss is None or not math.isfinite(loss) else -loss


def show_digits(args, rows: list[dict]) -> None:
    how = f"{args.steps} steps of {args.batch} images, means of seeds {args.seeds}"
    print(f"ViT on scikit-learn's digits, {how}\n")
    print(f"{'optimizer':<16}{'lr':>8}{'training loss':>15}{'test loss':>17}{'accuracy':>10}")
    for row in rows:
        loss = f"{row['test_loss']:.4f}"
        if row["test_loss_std"] is not None:
            loss += f" ± {row['test_loss_std']:.3f}"
        losses = f"{row['train_loss']:>15.5f}{loss:>17}"
        print(f"{row['optimizer']:<16}{row['lr']:>8g}{losses}{row['test_accuracy']:>10.2%}")
