"""Optimizers against each other."""

import math
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from bench.cells import (
    SEARCH_SEED,
    cores,
    load_corpus,
    numbers,
    spec_config,
    split_specs,
    workers,
)
from bench.quality import compare
from hope import Hope, HopeConfig
from optimizers import (
    M3,
    DeepMomentum,
    DeltaMomentum,
    Momentum,
    Muon,
    optimizer_by_name,
)
from support.config import TrainConfig
from support.run import device_for, optimizer_for
from train import learning_rate


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


def toy_path(make, lr, omega, k=10.0, alpha=1.0, steps=300):
    """[(r, theta, psi), ...] of an optimizer on psi = r^2 + k (r - theta + alpha sin(omega r))^2 from (-3.5, 2) (NL eq. 53).

    A ravine along theta = r + alpha sin(omega r), k times as steep across as along: its direction changes with r.
    """
    w = nn.Parameter(torch.tensor([[-3.5, 2.0]], dtype=torch.float64))
    optimizer, path = make([w], lr=lr), []
    for _ in range(steps):
        r, theta = w[0].tolist()
        across = r - theta + alpha * math.sin(omega * r)
        path.append((r, theta, r**2 + k * across**2))
        if path[-1][-1] > 1e6:
            break
        slope = 2 * r + 2 * k * across * (1 + alpha * omega * math.cos(omega * r)), -2 * k * across
        w.grad = torch.tensor([slope], dtype=w.dtype)
        optimizer.step()
    return path


def steps_to_stay(path, below=1e-3):
    """Steps after which psi stays below; infinite if it ends above."""
    last = max(i for i, (_, _, psi) in enumerate(path) if not psi < below)
    return last + 1 if last + 1 < len(path) else math.inf


def draw(paths, omega, file, k=10.0, alpha=1.0):
    """The toy's level lines with the paths {name: path}, and psi step by step, as a picture."""
    import numpy as np
    from matplotlib.figure import (
        Figure,  # slow to import; a Figure of its own needs no display
    )

    r, theta = np.meshgrid(np.linspace(-5, 3, 300), np.linspace(-5.5, 3.5, 300))
    psi = r**2 + k * (r - theta + alpha * np.sin(omega * r)) ** 2
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    plane, fall = figure.subplots(1, 2)
    plane.contourf(r, theta, np.log10(psi + 1e-3), 24, cmap="Greys_r", alpha=0.6)
    for (name, path), color in zip(paths.items(), ("tab:blue", "tab:orange", "tab:green"), strict=True):
        x, y, value = np.array(path).T
        plane.plot(x, y, ".-", color=color, markersize=4, linewidth=1, label=name)
        fall.semilogy(value, color=color, label=f"{name}: {steps_to_stay(path)} steps")
    plane.plot(0, 0, "*", color="black", markersize=12)
    plane.plot(-3.5, 2, "o", color="black")
    plane.set(xlabel="r", ylabel="theta", xlim=(-5, 3), ylim=(-5.5, 3.5), title=f"k {k:g}, alpha {alpha:g}, omega {omega:g}")
    fall.axhline(1e-3, color="black", linewidth=0.8, linestyle=":")
    fall.set(xlabel="step", ylabel="psi", ylim=(1e-6, 1e3), xlim=(0, 200))
    for axes in (plane, fall):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=130)


def demo():
    makes = {"momentum": Momentum, "delta momentum": DeltaMomentum, "deep momentum": DeepMomentum}
    rates, omegas = [2.0**-n for n in range(8, -1, -1)], (1.0, 2.0, 3.0)
    print("NL figure 4: psi = r^2 + 10 (r - theta + sin(omega r))^2 from (-3.5, 2), defaults of every optimizer;\n"
          "steps until psi stays below 0.001, at the best lr of 1, 1/2, ... 1/256\n")  # fmt: skip
    print(f"{'':18}" + "".join(f"{f'omega {omega:g}':>20}" for omega in omegas))
    shown = {}
    for name, make in makes.items():
        line = f"{name:18}"
        for omega in omegas:
            path, lr = min(((toy_path(make, lr, omega), lr) for lr in rates), key=lambda run: steps_to_stay(run[0]))
            steps = steps_to_stay(path)
            line += f"{f'{steps}  (lr {lr:.2g})' if steps < math.inf else f'over {len(path)}':>20}"
            if omega == omegas[0]:
                shown[name] = path
        print(line, flush=True)
    file = Path("runs/optimizers.png")
    draw(shown, omegas[0], file)
    print(f"\npaths for omega {omegas[0]:g} drawn in {file}\n")

    print("NL eq. 45: 50 gradients along u1, then 50 along u2. How much of what was held along u1 is left:\n")
    u = torch.eye(4).unsqueeze(1)
    memories = {"momentum": (Momentum, "M"), "Muon": (Muon, "M"), "M3, fast": (M3, "M"), "M3, slow": (M3, "M2")}
    for name, (make, key) in memories.items():
        w = nn.Parameter(torch.zeros(1, 4))
        optimizer, held = make([w]), []
        for task in range(2):
            for _ in range(50):
                w.grad = u[task]
                optimizer.step()
            held.append(optimizer.state[w][key][0, 0].item())
        print(f"{name:18}{held[1] / held[0]:>12.2%}")
