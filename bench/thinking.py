"""What `python ctm.py` does: train a Continuous Thought Machine on a task, measure it, draw it."""

import argparse
import json
import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

import ctm
from ctm import CTM, CTMConfig, loss_fn
from layers import count, one_of
from support import checkpoint
from support.checkpoint import first_line
from support.config import TrainConfig
from support.flags import DEVICES, Parser, whole_number
from support.monitor import ProgressBar, interrupts, say
from support.plots import picture
from support.run import device_for, write_json
from tasks import IGNORE, MOVES, WAIT, image_folder, mazes, prefix_labels, read_image
from train import learning_rate, update

STOPS = (0.8, 0.9, 0.99)  # certainties at which adaptive compute ends a row
CLIP = 1.0  # longest gradient. deviation 62: published, the 0.9 quantile of the last 1,000
SAVE_EVERY = 500  # steps

# --------------------------------------------------------------------------------------------------
# Rivals of equal size


class ReadZ(CTM):
    """Reads activations where the CTM reads synchronisation: number k of S is z of k mod D."""

    def look(self, state):
        S, seen = super().look(state)
        return self.instead(S, state["z"]), seen

    def think(self, o, state):
        S, thought = super().think(o, state)
        return self.instead(S, thought["z"]), thought

    def instead(self, S, z):
        return z[:, torch.arange(S.shape[1], device=z.device) % z.shape[1]]


class LSTM(CTM):
    """The same looks, ticks and read-out around an LSTM of as many parameters."""

    def make_core(self, c):
        with torch.device("meta"):
            whole = count(CTM(c))
        read = c.positions * c.classes
        rest = count(self) + 4 * c.width**2 + 5 * c.width + read  # all that is no core
        slope = 5 * c.width + 8 + read  # a core of n: whole - rest = slope n + 4 n^2
        n = max(1, round((math.sqrt(slope**2 + 16 * (whole - rest)) - slope) / 8))
        self.cell = nn.LSTMCell(c.width, n)
        return n, n

    def start(self, B):
        zero = self.cell.weight_hh.new_zeros(B, self.cell.hidden_size)
        return {"h": zero, "c": zero}

    def look(self, state):
        return state["h"], {}

    def think(self, o, state):
        h, c = self.cell(o, (state["h"], state["c"]))
        return h, {"h": h, "c": c}


CONTROLS = ("one-tick", "no-history", "read-z", "lstm")


def build(config: CTMConfig, control: str | None = None) -> CTM:
    """The model, or a rival of as many parameters. one-tick is also the feed-forward net."""
    if control is not None:
        one_of("control", control, CONTROLS)
    if control == "one-tick":
        config = replace(config, ticks=1)
    if control == "no-history":  # as many weights in a neuron's MLP
        wider = round(config.hidden * (config.history + 2) / 3)
        config = replace(config, history=1, hidden=wider)
    return {"read-z": ReadZ, "lstm": LSTM}.get(control, CTM)(config)


def trust(model, certainty):
    """How far each tick is to be believed [B, T]: of an LSTM the last one most, as published."""
    if isinstance(model, LSTM):
        return torch.arange(certainty.shape[1], device=certainty.device).expand_as(certainty)
    return certainty


# --------------------------------------------------------------------------------------------------
# Tasks


@dataclass
class Task:
    """What is learned. Inputs are those of the config's reader, targets [B, P] int64."""

    title: str
    config: CTMConfig
    draw: Callable  # (rows, numpy's rng) -> (inputs, targets), to train on
    test: Callable  # () -> an iterable of such batches, to measure
    grid: tuple  # height and width of the tokens, for the picture
    steps: int
    lr: float


def parity(args, own: dict) -> Task:
    """Cumulative parity: at every bit, whether the number of ones up to it is odd."""
    length = args.length or 8

    def draw(n, rng):
        bits = rng.integers(0, 2, (n, length))
        return torch.from_numpy(bits), torch.from_numpy(1 - prefix_labels("parity", bits))

    def test():
        rng = np.random.default_rng([0, 1, 2])
        return [draw(256, rng) for _ in range(4)]

    sizes = {"reader": "bits", "positions": length, "pairing": "random"}
    sizes |= {"pairs_out": 16, "pairs_action": 16} | own  # deviation 64
    config = CTMConfig(**sizes)
    return Task(f"parity of {length} bits", config, draw, test, (1, length), 2000, 1e-3)


def maze(args, own: dict) -> Task:
    """Perfect mazes: the picture in, the route from start to goal out, pixel by pixel."""
    size = args.length or 9
    test_size = args.test_length or size
    moves = min(100, 2 * ((size // 2) ** 2 - 1))  # no route is longer, or those are cut

    def draw(n, rng, size=size):
        return tuple(torch.from_numpy(part) for part in mazes(n, size, moves, rng))

    def test():
        rng = np.random.default_rng([0, 1, 2])
        return [draw(128, rng, test_size) for _ in range(8)]

    for side in (size, test_size):
        draw(1, np.random.default_rng(0), side)  # raises for a size that is none
    scale = 1 if size <= 15 else 2
    sizes = {"reader": "pixels", "positions": moves, "classes": 5, "scale": scale}
    sizes |= {"d_model": 192, "pairs_out": 96, "pairs_action": 96}
    config = CTMConfig(**sizes | own)
    grid = (math.ceil(test_size / config.scale),) * 2
    return Task(f"mazes of {test_size} x {test_size}", config, draw, test, grid, 4000, 1e-3)


def digits(args, own: dict) -> Task:
    """Images to classes: scikit-learn's digits, or --images of --length pixels a side."""
    sizes = {"reader": "pixels", "pairs_out": 64, "pairs_action": 64, "ticks": 10}
    if args.images is None:
        from bench.optimizers import load_images

        x, y = load_images()
        x = x.view(-1, 1, 8, 8).expand(-1, 3, -1, -1)
        y = y.view(-1, 1)

        def draw(n, rng):
            rows = torch.from_numpy(rng.integers(360, len(x), n))
            return x[rows], y[rows]

        config = CTMConfig(**sizes | {"classes": 10} | own)
        return Task("digits", config, draw, lambda: [(x[:360], y[:360])], (8, 8), 600, 1e-3)
    size = args.length or 64
    classes, train, held_out = image_folder(args.images)
    pool = ThreadPoolExecutor()

    def read(files, rngs):
        images = list(pool.map(lambda file, rng: read_image(file[0], size, rng), files, rngs))
        return torch.from_numpy(np.stack(images)), torch.tensor([[label] for _, label in files])

    def draw(n, rng):
        files = [train[i] for i in rng.integers(0, len(train), n)]
        return read(files, rng.spawn(n))

    def test():
        for i in range(0, len(held_out), 256):
            files = held_out[i : i + 256]
            yield read(files, [None] * len(files))

    sizes |= {"classes": len(classes), "scale": 8, "d_model": 512, "d_input": 128}
    config = CTMConfig(**sizes | own)
    title = f"{len(train):,} images of {len(classes)} classes in {args.images}"
    grid = (math.ceil(size / config.scale),) * 2
    return Task(title, config, draw, test, grid, 20_000, 5e-4)


TASKS = {"parity": parity, "maze": maze, "digits": digits}


def curriculum(logits, targets, ahead=5):
    """Targets [B, P] of routes without what comes too early to learn.

    Of each row the longest beginning that is right at any tick counts, and `ahead` moves more.
    """
    right = (logits.argmax(-1) == targets[:, None]).long()  # [B, T, P]
    known = right.cumprod(2).sum(2).amax(1, keepdim=True)  # [B, 1]
    place = torch.arange(targets.shape[1], device=targets.device)
    return targets.masked_fill(place >= known + ahead, IGNORE)


# --------------------------------------------------------------------------------------------------
# Training


def train(args, setup, task: Task, model, optimizer, save, start: int, steps: int) -> int:
    """Steps start + 1 to `steps` -> the step at which it ended, which is saved."""
    device = next(model.parameters()).device
    recent = []
    bar = ProgressBar(steps, start)
    model.train()
    with bar, interrupts() as interrupted:
        for step in range(start, steps):
            # drawn from seed and step alone: a resumed run sees what it would have seen
            batch = task.draw(args.batch_size, np.random.default_rng([args.seed, step]))
            inputs, targets = (part.to(device) for part in batch)
            logits, certainty, _ = model(inputs)
            certainty = trust(model, certainty)
            asked = curriculum(logits, targets) if args.task == "maze" else targets
            lr = learning_rate(step, steps, setup)
            loss, _ = update(model, optimizer, lr, [loss_fn(logits, certainty, asked)], CLIP)
            model.project()
            answer = answers(logits, certainty)
            recent = [*recent[-49:], (loss, (answer == targets).float().mean().item())]
            mean, right = np.mean(recent, axis=0)
            bar.set_postfix_str(f"loss {mean:.3f}, {right:.1%} right", refresh=False)
            bar.update()
            done = step + 1
            if done % SAVE_EVERY == 0 or done == steps or interrupted:
                save(done)
            if interrupted:
                return done
    return steps


def answers(logits, certainty):
    """[B, T, P, C] -> what is said at the most certain tick [B, P]."""
    rows = torch.arange(len(logits), device=logits.device)
    return logits[rows, certainty.argmax(1)].argmax(-1)


def walked(image, route):
    """The maze [3, H, W] after a route from its start, up to the first wall; None at the goal."""
    here = ((image[0] > 0) & (image[1] < 0)).nonzero()[0]
    image = image.clone()
    for move in route:
        image[:, here[0], here[1]] = 1.0
        there = here + torch.tensor(MOVES[move], device=here.device)
        pixel = image[:, there[0], there[1]]
        if pixel[0] < 0 < pixel[1]:
            return None
        if pixel.max() < 0:
            break
        here = there
    image[:, here[0], here[1]] = torch.tensor([1.0, -1.0, -1.0])
    return image


@torch.no_grad()
def reached(model, batches, times=10) -> float:
    """Share of mazes whose goal is reached, the model being asked again from where it came to."""
    model.eval()
    device = next(model.parameters()).device
    rows = 0
    arrived = 0
    for images, _ in batches:
        rows += len(images)
        for _ in range(times):
            logits, certainty, _ = model(images.to(device))
            routes = answers(logits, trust(model, certainty)).tolist()
            after = [walked(*pair) for pair in zip(images, routes, strict=True)]
            left = [image for image in after if image is not None]
            arrived += len(after) - len(left)
            if not left:
                break
            images = torch.stack(left)
    return arrived / rows


def last_ticks(certainty, stop):
    """[B, T] -> the tick, from 0, at which a row of CTM.forward(stop=stop) ends [B]."""
    enough = certainty >= stop
    enough[:, -1] = True
    return enough.int().argmax(1)


@torch.no_grad()
def evaluate(model, batches) -> dict:
    """Shares of positions and whole rows that are right, calibration, and what stopping saves."""
    model.eval()
    device = next(model.parameters()).device
    found = {}

    def note(**rows):
        for name, value in rows.items():
            found.setdefault(name, []).append(value.double().cpu())

    for batch in batches:
        inputs, targets = (part.to(device) for part in batch)
        with torch.compiler.set_stance("force_eager"):  # other rows than those that are compiled
            logits, certainty, _ = model(inputs)
        trusted = trust(model, certainty)
        said = answers(logits, trusted) == targets
        note(said=said, ticks=(logits.argmax(-1) == targets[:, None]).double().mean(2))
        note(certainty=certainty, moves=(targets != WAIT).sum(1))
        # calibration: of the mean of all ticks' answers, weighted by certainty
        weight = certainty.clamp(min=1e-6)
        weight = weight / weight.sum(1, keepdim=True)
        p, answer = torch.einsum("bt, btpc -> bpc", weight, logits.softmax(-1)).max(-1)
        note(p=p, hit=answer == targets)
        tick = torch.arange(certainty.shape[1], device=device)
        early = []
        for stop in STOPS:
            unseen = tick > last_ticks(certainty, stop)[:, None]
            early.append(answers(logits, trusted.masked_fill(unseen, -1)) == targets)
        used = [last_ticks(certainty, stop) + 1 for stop in STOPS]
        note(early=torch.stack(early, 1), used=torch.stack(used, 1))  # [B, stops, P], [B, stops]
    found = {name: torch.cat(value) for name, value in found.items()}
    p = found["p"].flatten()
    gap = found["hit"].flatten() - p
    bins = (p * 10).long().clamp(max=9)
    ece = sum(gap[bins == i].sum().abs() for i in range(10)) / len(p)
    whole = found["said"].prod(1)
    result = {
        "rows": len(whole),
        "right": found["said"].mean().item(),
        "whole": whole.mean().item(),
        "by_tick": found["ticks"].mean(0).tolist(),
        "by_position": found["said"].mean(0).tolist(),
        "certainty": found["certainty"].mean(0).tolist(),
        "ece": ece.item(),
        "stop": [],
        "by_moves": [],  # of routes: moves, rows, whole ones right, ticks used at each of STOPS
    }
    for i, stop in enumerate(STOPS):
        right = found["early"][:, i]
        shares = {"right": right.mean().item(), "whole": right.prod(1).mean().item()}
        ticks = found["used"][:, i].mean().item()
        result["stop"].append({"certainty": stop, "ticks": ticks} | shares)
    for moves in found["moves"].unique():
        rows = found["moves"] == moves
        used = found["used"][rows].mean(0).tolist()
        result["by_moves"].append([int(moves), int(rows.sum()), whole[rows].mean().item(), *used])
    return result


def show(task: Task, result: dict) -> None:
    """The numbers of `evaluate`, in words."""
    for name in ("tick", "position"):
        shares = result[f"by_{name}"]
        if len(shares) > 1:
            chosen = sorted({round(i) for i in np.linspace(0, len(shares) - 1, 14)})
            print(f"{name:<10}" + "".join(f"{i + 1:>6}" for i in chosen))
            print(f"{'% right':<10}" + "".join(f"{100 * shares[i]:>6.1f}" for i in chosen))
    print(f"{task.title}, {result['rows']} rows, calibration error {result['ece']:.3f}")
    form = "{:<28}{:>8.2%} right{:>9.2%} of whole rows{:>6.1f} ticks"
    ticks = len(result["by_tick"])
    print(form.format("at the most certain tick", result["right"], result["whole"], ticks))
    for stop in result["stop"]:
        name = f"stopped at certainty {stop['certainty']}"
        print(form.format(name, stop["right"], stop["whole"], stop["ticks"]))
    if "reached" in result:
        print(f"goals reached, asked again on the way: {result['reached']:.2%}")


# --------------------------------------------------------------------------------------------------
# A picture of a thought


def busiest(rows: list) -> np.ndarray:
    """A [n] for every tick -> [n, T], what varies most first, each scaled to -1 .. 1."""
    x = torch.stack(rows).T
    x = x[x.std(1, correction=0).argsort(descending=True)]
    return (x / x.abs().amax(1, keepdim=True).clamp(min=1e-12)).numpy()


@torch.no_grad()
def draw(folder: Path, task: Task, model, result: dict, columns: int = 8) -> None:
    """ctm.png: where one row looks at, its neurons, their synchronisation, certainty, by tick."""
    model.eval()
    inputs, targets = next(iter(task.test()))
    inputs = inputs[:1].to(next(model.parameters()).device)
    state = None
    looks, z, S, certainty = [], [], [], []
    for _ in range(model.config.ticks):
        _, sure, state = model(inputs, state, ticks=1)
        looks.append(state["attention"][0].mean(0).view(task.grid).cpu())
        z.append(state["z"][0].cpu())
        S.append((state["output"]["alpha"] * state["output"]["beta"].rsqrt())[0].cpu())
        certainty.append(sure.item())
    shown = sorted({round(i) for i in np.linspace(0, len(looks) - 1, columns)})
    with picture(folder / "ctm.png", 11, 5.5, dpi=110) as figure:
        strip, below = figure.subfigures(2, 1, height_ratios=(1, 2))
        axes = strip.subplots(1, len(shown) + 1, squeeze=False)[0]
        pixels = inputs[0, None] if inputs.ndim == 2 else (inputs[0].permute(1, 2, 0) + 1) / 2
        axes[0].imshow(pixels.cpu().numpy(), cmap="gray", aspect="equal")
        axes[0].set_title("data")
        most = max(look.max().item() for look in looks)
        for at, tick in zip(axes[1:], shown, strict=True):
            look = at.imshow(looks[tick].numpy(), vmin=0, vmax=most, aspect="equal")
            at.set_title(f"tick {tick + 1}")
        for at in axes:
            at.set(xticks=[], yticks=[])
            at.spines[:].set_visible(True)
        strip.colorbar(look, ax=axes, label="attention,\nmean of the heads")
        traces, pairs, sure = below.subplots(1, 3)
        ticks = range(1, len(z) + 1)
        lively, synchronous = (busiest(rows) for rows in (z, S))
        for i, trace in enumerate(lively[:12]):
            traces.plot(ticks, 0.5 * trace + i, linewidth=1)
        traces.set(title="neurons that change most", xlabel="tick", yticks=[])
        extent = (0.5, len(z) + 0.5, 0, 1)
        how = {"cmap": "RdBu", "vmin": -1, "vmax": 1, "interpolation": "nearest"}
        image = pairs.imshow(synchronous[:48], extent=extent, **how)
        below.colorbar(image, ax=pairs, label="of each pair's largest")
        pairs.set(title="synchronisation of pairs", xlabel="tick", yticks=[])
        for at in (*axes, pairs):
            at.grid(False)
        sure.plot(ticks, certainty, label="certainty of this row")
        sure.plot(ticks, result["certainty"], label="certainty, mean")
        sure.plot(ticks, result["by_tick"], label="right, mean")
        sure.set(xlabel="tick", ylim=(0, 1.02), title=f"{result['right']:.1%} right")
        sure.legend()
        for at in (traces, pairs, sure):
            at.xaxis.get_major_locator().set_params(integer=True)


# --------------------------------------------------------------------------------------------------
# The command

OF_A_CALL = ("resume", "test_length")  # flags that are not a run's own


def parser() -> Parser:
    form = argparse.RawDescriptionHelpFormatter
    p = Parser(prog="ctm.py", description=ctm.__doc__, formatter_class=form)
    add = p.add_argument
    add("task", nargs="?", default="parity", help=f"{', '.join(TASKS)} (default parity)")
    add("--length", type=whole_number, help="bits (8), pixels of a side (maze 9, --images 64)")
    add("--test-length", type=whole_number, help="other mazes to measure with, of a run, too")
    add("--images", metavar="FOLDER", help="of digits: a folder of images for each class")
    add("--ticks", type=whole_number, help="T")
    add("--history", type=whole_number, help="M, pre-activations that a neuron sees")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="of CTMConfig")
    add("--control", help=f"a rival of equal size: {', '.join(CONTROLS)}")
    add("--steps", type=whole_number, help="of training (default: by task)")
    add("--batch-size", type=whole_number, default=64, help="rows of a step (default 64)")
    add("--lr", type=float, help="largest learning rate (default: by task)")
    add("--seed", type=int, default=0, help="of weights and data (default 0)")
    add("--device", default="auto", help=DEVICES)
    add("--compile", action="store_true", help="torch.compile of a tick, without a graph break")
    add("--out", help="folder of the run (default runs/ctm-TASK, the first that is free)")
    add("--resume", metavar="RUN", help="go on with a run, or measure it again")
    return p


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags; of a run that goes on those it was begun with. ValueError in one line."""
    p = parser()
    args = p.parse_args(argv)
    if args.resume:
        try:
            saved = json.loads((Path(args.resume) / "config.json").read_text())["flags"]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{args.resume} is no run of ctm.py: {error}") from None
        p.set_defaults(**saved)
        args = p.parse_args(argv)
        for name, was in saved.items():
            now = getattr(args, name)
            if now != was and name not in ("steps", "device", "out"):
                raise ValueError(f"{args.resume} was trained with {name} {was}, not {now}")
    one_of("task", args.task, TASKS)
    for flag, task in (("images", "digits"), ("test_length", "maze")):
        if getattr(args, flag) and args.task != task:
            raise ValueError(f"{flag} is for the task {task}, got {args.task}")
    if args.length and args.task == "digits" and not args.images:
        raise ValueError(f"length of digits must be 8, as they are, got {args.length}")
    return args


def run(args) -> int:
    """Train, measure and draw. Returns the exit status."""
    device = device_for(args.device)
    own = TrainConfig(set=args.set).set
    own |= {n: getattr(args, n) for n in ("ticks", "history") if getattr(args, n) is not None}
    free = CTMConfig.__dataclass_fields__.keys() - {"reader", "positions", "classes"}
    for name in own:
        one_of("field of CTMConfig that no task decides", name, sorted(free))
    task = TASKS[args.task](args, own)
    steps = args.steps or task.steps
    how = {"lr": task.lr if args.lr is None else args.lr, "warmup": 0.02, "min_lr_ratio": 0.0}
    setup = TrainConfig(model="ctm", preset=args.task, seed=args.seed, out=args.out, **how)
    folder = Path(args.resume) if args.resume else setup.fresh_folder()
    torch.manual_seed(args.seed)
    model = build(task.config, args.control).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), setup.lr, weight_decay=0.0)
    start = checkpoint.load(folder, model, optimizer) if args.resume else 0
    if steps < start:
        raise ValueError(f"steps must be at least {start}, which are done, got {steps}")
    folder.mkdir(parents=True, exist_ok=True)
    flags = {name: value for name, value in vars(args).items() if name not in OF_A_CALL}
    write_json(folder / "config.json", {"flags": flags, "model": asdict(model.config)})
    if not args.resume:
        checkpoint.save(folder, model, optimizer, 0)  # a full disk shows now
    if args.compile:
        model.tick = torch.compile(model.tick, fullgraph=True, dynamic=False)
    what = f"{args.control or 'ctm'}, {count(model):,} parameters"
    say(f"{what}, {task.title}, {model.config.ticks} ticks, {device}, in {folder}")

    def save(step):
        checkpoint.save(folder, model, optimizer, step)

    done = train(args, setup, task, model, optimizer, save, start, steps)
    if done < steps:
        say(f"stopped and saved after step {done}; python ctm.py --resume {folder} goes on")
        return 130
    result = {"flags": flags, "step": done, "parameters": count(model)}
    result |= evaluate(model, task.test())
    if args.task == "maze":
        result["reached"] = reached(model, task.test())
    show(task, result)
    name = f"result-{args.test_length}.json" if args.test_length else "result.json"
    write_json(folder / name, result)
    if args.control != "lstm":
        draw(folder, task, model, result)
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command; exit status 0: done, 2: bad input or a failed run, 130: stopped by Ctrl-C."""
    try:
        return run(parse(argv))
    except (ValueError, OSError, RuntimeError) as error:  # NonFinite and out of memory, too
        print(f"ctm.py: error: {first_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ctm.py: interrupted", file=sys.stderr)
        return 130
