"""NL figure 4: optimizers in a ravine that bends; and what they keep of old gradients (NL eq. 45).

    python optimizers.py       # prints both and draws the first in runs/optimizers.png
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

from optimizers import M3, DeepMomentum, DeltaMomentum, Momentum, Muon
from support.plots import picture

STEEP = 10.0  # k of NL eq. 53: how much steeper the ravine is across than along
BEND = 1.0  # its alpha
START = (-3.5, 2.0)


def toy_path(make, lr: float, omega: float, steps: int = 300) -> list[tuple]:
    """[(r, theta, psi), ...] of an optimizer on psi = r^2 + k (r - theta + alpha sin(omega r))^2.

    A ravine along theta = r + alpha sin(omega r), whose direction changes with r (NL eq. 53).
    """
    w = nn.Parameter(torch.tensor([START], dtype=torch.float64))
    optimizer = make([w], lr=lr)
    path = []
    for _ in range(steps):
        r, theta = w[0].tolist()
        across = r - theta + BEND * math.sin(omega * r)
        psi = r**2 + STEEP * across**2
        path.append((r, theta, psi))
        if psi > 1e6:
            break
        slope_r = 2 * r + 2 * STEEP * across * (1 + BEND * omega * math.cos(omega * r))
        slope_theta = -2 * STEEP * across
        w.grad = torch.tensor([(slope_r, slope_theta)], dtype=w.dtype)
        optimizer.step()
    return path


def steps_to_stay(path: list[tuple], below: float = 1e-3) -> float:
    """Steps after which psi stays below; infinite if it ends above."""
    last = max(i for i, (_, _, psi) in enumerate(path) if not psi < below)
    return last + 1 if last + 1 < len(path) else math.inf


def draw(paths: dict[str, list], omega: float, file: Path) -> None:
    """The toy's level lines with the paths by name, and psi step by step, as a picture."""
    xlim = (-5, 3)
    ylim = (-5.5, 3.5)
    r, theta = np.meshgrid(np.linspace(*xlim, 300), np.linspace(*ylim, 300))
    psi = r**2 + STEEP * (r - theta + BEND * np.sin(omega * r)) ** 2
    with picture(file, 11, 4.5) as figure:
        plane, fall = figure.subplots(1, 2)
        image = plane.contourf(r, theta, np.log10(psi + 1e-3), 24, cmap="Greys_r", alpha=0.6)
        figure.colorbar(image, ax=plane, label="log10 psi")
        for name, path in paths.items():
            x, y, value = np.array(path).T
            plane.plot(x, y, ".-", markersize=4, linewidth=1, label=name)
            fall.semilogy(value, label=f"{name}: {steps_to_stay(path)} steps")
        plane.plot(0, 0, "*", color="black", markersize=12)
        plane.plot(*START, "o", color="black")
        title = f"k {STEEP:g}, alpha {BEND:g}, omega {omega:g}"
        plane.set(xlabel="r", ylabel="theta", xlim=xlim, ylim=ylim, title=title)
        fall.axhline(1e-3, color="black", linewidth=0.8, linestyle=":")
        fall.set(xlabel="step", ylabel="psi", ylim=(1e-6, 1e3), xlim=(0, 200))
        for axes in (plane, fall):
            axes.legend()


def ravine() -> None:
    """NL figure 4 as a table, and as a picture for the first omega."""
    makes = {
        "momentum": Momentum,
        "delta momentum": DeltaMomentum,
        "deep momentum": DeepMomentum,
    }
    rates = [2.0**-n for n in range(8, -1, -1)]
    omegas = (1.0, 2.0, 3.0)
    psi = "psi = r^2 + 10 (r - theta + sin(omega r))^2"
    print(f"NL figure 4: {psi} from (-3.5, 2), defaults of every optimizer;")
    print("steps until psi stays below 0.001, at the best lr of 1, 1/2, ... 1/256\n")
    print(f"{'':18}" + "".join(f"{f'omega {omega:g}':>20}" for omega in omegas))
    shown = {}
    for name, make in makes.items():
        line = f"{name:18}"
        for omega in omegas:
            paths = {lr: toy_path(make, lr, omega) for lr in rates}
            needed = {lr: steps_to_stay(path) for lr, path in paths.items()}
            lr = min(rates, key=needed.get)
            steps = needed[lr]
            found = f"{steps}  (lr {lr:.2g})" if steps < math.inf else f"over {len(paths[lr])}"
            line += f"{found:>20}"
            if omega == omegas[0]:
                shown[name] = paths[lr]
        print(line, flush=True)
    file = Path("runs/optimizers.png")
    draw(shown, omegas[0], file)
    print(f"\npaths for omega {omegas[0]:g} drawn in {file}\n")


def forgetting() -> None:
    """NL eq. 45: what is left of a first task after a second one, orthogonal to it."""
    print("NL eq. 45: 50 gradients along u1, then 50 along u2.", end=" ")
    print("How much of what was held along u1 is left:\n")
    memories = {
        "momentum": (Momentum, "M"),
        "Muon": (Muon, "M"),
        "M3, fast": (M3, "M"),
        "M3, slow": (M3, "M2"),
    }
    u = torch.eye(4).unsqueeze(1)  # [tasks, 1, 4]
    for name, (make, key) in memories.items():
        w = nn.Parameter(torch.zeros(1, 4))
        optimizer = make([w])
        held = []
        for task in range(2):
            for _ in range(50):
                w.grad = u[task]
                optimizer.step()
            held.append(optimizer.state[w][key][0, 0].item())
        print(f"{name:18}{held[1] / held[0]:>12.2%}")


def demo() -> None:
    ravine()
    forgetting()
