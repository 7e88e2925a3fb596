"""Continual learning: what a model still knows after it has learned something else (NL sec. 7, 9).

    python -m bench continual stream --data FOLDER     # token clock: a novel, read once
    python -m bench continual domains --data FOLDER    # step clock: code, plays, novels, WikiText
    python -m bench continual classes --data FOLDER    # step clock: CLINC150 by its 10 domains
    python -m bench continual classes --set banking77  # or Banking77 in 7 groups of classes
    python -m bench continual cost                     # token clock: time and memory
    python -m bench continual domains --quick          # a minute, to see that it runs: without
                                                       # --data on the standard library's text alone

FOLDER holds the data sets (docs/data.md; default: $NESTED_DATA); learners.py: the learners. Every
stage is scored after every stage: R[i][j] is the score on stage j after learning stage i, row 0
before learning anything. From it

    average      mean of the last row
    forgetting   mean over j < n of (best R[i][j] with i < n) - R[n][j]
    backward     mean over j < n of R[n][j] - R[j][j]
    forward      mean over j > 1 of R[j-1][j] - R[0][j]

with the sign that makes more forgetting worse and more transfer better, for accuracy and for bits
per byte. Cost stands beside it: parameter updates, FLOPs (6 per parameter and token trained on),
seconds of the processor.

Learning rates and the strength of EWC are chosen with SEARCH_SEED, on held-out data of their own. A
finished cell is a line of the results (bench/cells.py): the same command goes on where it was
stopped, or only draws.
"""

import argparse
import itertools
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from bench.cells import SEARCH_SEED, Record, best_of
from bench.learners import (
    LEARNERS,
    STREAM,
    cost,
    metrics,
    read_novels,
    run,
    stream_model,
)
from bench.streams import WORDS, banking77, clinc150, code_lines, domains, joined, texts
from layers import one_of
from support.checkpoint import first_line, warned
from support.flags import Parser
from support.plots import heat_map, picture
from train import NonFinite

LRS = (1.7e-4, 5e-4, 1.5e-3, 4.5e-3)  # of the stages after the first, to choose from; quick: two
STRENGTHS = (1e1, 1e2, 1e3)  # of the penalty of EWC, to choose from, at each of those rates
COMMANDS = ("stream", "domains", "classes", "cost")
SETS = {"clinc150": clinc150, "banking77": banking77}

# --------------------------------------------------------------------------------------------------
# Measuring


def cell(args, record, settings, measure):
    """The record's line of a cell; measured, written and printed where there is none yet.

    settings: learner, seed and more, which begin the line; measure(**settings) gives the rest.
    """
    flags = {"command": args.command, "quick": args.quick}
    if args.command == "classes":
        flags["set"] = args.set
    if args.data is None:
        flags["text"] = "standard library"
    key = json.dumps(flags | settings, sort_keys=True)
    if key not in record.finished:
        line = record.add(key, settings | measure(**settings))
        print("\n".join(table([line], args.command)[2:]), flush=True)
    return record.finished[key]


def staged(args, record):
    """`domains` and `classes`: every learner's settings are chosen, with them every seed is run."""
    changes = {}
    if args.command == "domains":
        to_choose, to_report = domains(args.data, args.quick)
    else:
        sets = {}
        for half, (name, stages_of) in enumerate(SETS.items()):
            sets[name] = code_lines(half) if args.data is None else stages_of(args.data)
        to_choose, to_report = sets.pop(args.set)
        _, other = sets.popitem()[1]
        count = sum(len(stage.classes) for stage in to_report)
        before = joined(other, count)
        # Sixteen words are no context to learn from: Hope-Attention, a Transformer with levels.
        changes = {"hope": "hope_attention", "before": before}
        changes |= {"vocab_size": WORDS + 1, "classes": count + len(before.classes)}
    first = {}  # what stage 1 made of each model
    higher_is_better = args.command == "classes"

    def measure(learner, seed, lr, ewc):
        stages = to_choose if seed == SEARCH_SEED else to_report
        result = run(learner, stages, seed, lr, ewc, args.quick, first, **changes)
        names = {"stages": [stage.name for stage in stages]}
        return names | metrics(result["matrix"], higher_is_better) | result

    def measured(learner, seed, lr, ewc):
        settings = {"learner": learner, "seed": seed, "lr": lr, "ewc": ewc}
        return cell(args, record, settings, measure)

    def chosen(learner):
        """(learning rate, strength)"""
        kind, levels, method = LEARNERS[learner]
        if kind == "hope" and method == "finetune" and levels != 3:
            return chosen("hope 3 levels")  # an ablation: nothing but the number of levels changes

        def score(settings):
            try:
                average = measured(learner, SEARCH_SEED, *settings)["average"]
            except NonFinite as error:
                print(f"{learner} diverged with {settings}: {error}", flush=True)
                return None
            return average if higher_is_better else -average

        tried = LRS[2:] if args.quick else LRS
        lrs = tried[:1] if method == "none" else tried
        grid = itertools.product(lrs, STRENGTHS if method == "ewc" else (None,))
        best = best_of(grid, score)
        if best is None:
            raise NonFinite(f"{learner} diverged with all settings")
        return best

    for learner in args.learners:
        best = chosen(learner)
        for seed in range(args.seeds):
            measured(learner, seed, *best)


def stream(args, record):
    """`stream`: novels that are read once, learning, and then as much of something else."""
    rows = 1 if args.quick else 4
    length = 4_096 if args.quick else 16_384
    root = Path("runs/stream-quick" if args.quick else "runs/stream")
    if args.data is None:
        root = root.with_name("stream-stdlib")
    _, read = texts(args.data, root / "texts", rows, length)

    def measure(learner, seed):
        return read_novels(learner, stream_model(learner, seed, root, args.quick), read)

    for seed, learner in itertools.product(range(args.seeds), STREAM):
        cell(args, record, {"learner": learner, "seed": seed}, measure)


# --------------------------------------------------------------------------------------------------
# Tables


def in_order(lines):
    """{learner: its lines}"""
    own = {name: [] for name in (*LEARNERS, *STREAM)}
    for line in lines:
        own[line["learner"]].append(line)
    return {name: lines for name, lines in own.items() if lines}


def column(lines, *path):
    """What every line holds at a path of keys."""
    for key in path:
        lines = [line[key] for line in lines]
    return lines


def spread(values):
    """Mean and, of several, the sample standard deviation, as text."""
    mean = f"{np.mean(values):.3f}"
    return f"{mean} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else mean


def row(cells):
    return "| " + " | ".join(cells) + " |"


def table(lines, command):
    """Lines of the record, seeds averaged, as lines of a Markdown table."""
    return stream_table(lines) if command == "stream" else staged_table(lines)


def staged_table(lines):
    keys = ("average", "last", "forgetting", "first forgotten", "backward", "forward")
    units = {"updates": 1e6, "flops": 1e12, "seconds": 1}
    head = ["learner", "seeds", "lr (EWC)", *keys, "M parameter updates", "TFLOP", "s"]
    out = [row(head), "|" + "---|" * len(head)]
    for learner, own in in_order(lines).items():
        settings = f"{own[0]['lr']:g}"
        if own[0]["ewc"]:
            settings += f" ({own[0]['ewc']:g})"
        cells = [spread(column(own, key)) for key in keys]
        for key, unit in units.items():
            cells.append(f"{np.mean(column(own, key)) / unit:.2f}")
        out.append(row([learner, f"{len(own)}", settings, *cells]))
    return out


def stream_table(lines):
    head = ["levels", "second half: without", "with updates", "level"]
    head += ["gain right after", "after another novel (that alone)", "after code (that alone)"]
    head += ["read again: after another novel (that alone)", "after code (that alone)"]
    out = [row(head), "|" + "---|" * len(head)]
    for learner, own in in_order(lines).items():
        first = [learner]
        first += [spread(column(own, "second half", how)) for how in ("without", "with")]
        for level in learning(own):
            name = level if level == "all" else f"{level} alone"
            cells = [*first, name, spread(column(own, "gain", "novel", level))]
            for what in ("another novel", "code"):
                left = spread(column(own, "gain", what, level))
                alone = np.mean(column(own, "gain of the other alone", what, level))
                cells.append(f"{left} ({alone:.3f})")
            cells += [again(own, what) if first[0] else "" for what in ("another novel", "code")]
            out.append(row(cells))
            first = [""] * len(first)
    return out


def again(own, what):
    """How much better a text is read again and learned on than from the start, after `what`."""
    start = np.array(column(own, "again", "from the start"))
    both, alone = (start - column(own, "again", name) for name in (what, f"{what} alone"))
    return f"{spread(both)} ({np.mean(alone):.3f})"


def learning(own):
    """Levels of a learner that are away from their initial weights; nested ones return to them."""
    return [level for level, gain in own[0]["gain"]["novel"].items() if gain]


# --------------------------------------------------------------------------------------------------
# Pictures


def plot(lines, command, path):
    """The lines of the record as a picture, seeds averaged."""
    if command == "stream":
        with warned(), picture(path, 10, 3.8) as figure:
            draw_stream(figure, lines)
        return
    learners = {line["learner"] for line in lines}
    rows = -(-(len(learners) + 1) // 3)
    with warned(), picture(path, 12, 3.4 * rows, dpi=100) as figure:
        draw_matrices(figure.subplots(rows, 3, squeeze=False), lines, command == "classes")


def draw_stream(figure, lines):
    """What learning gains while a novel is read, and what is left of it after something else."""
    reading, left = figure.subplots(1, 2)
    for number, (learner, own) in enumerate(in_order(lines).items()):
        color = f"C{number}"
        curve = np.mean(column(own, "curve"), 0)  # [16, without and with learning]
        read = np.arange(1, 17) * own[0]["length"] / 16e3
        reading.plot(read, curve[:, 0] - curve[:, 1], color=color, label=learner)
        for level, style in zip(learning(own), ("o-", "^:", "v:", "s:"), strict=False):
            after = list(own[0]["gain"])
            gains = [np.mean(column(own, "gain", what, level)) for what in after]
            label = learner if level == "all" else f"its level {level} alone"
            left.plot(after, gains, style, color=color, label=label)
    reading.set(title="reading a novel", xlabel="thousand bytes of the novel read")
    reading.set(ylabel="gain of learning (bits per byte)")
    left.set(title="what is left of it", xlabel="read last")
    left.set(ylabel="gain on the novel (bits per byte)")
    for axes in (reading, left):
        axes.axhline(0, color="gray", linewidth=0.8)
        axes.legend()


def draw_matrices(grid, lines, higher_is_better):
    """A heat-map of the matrix for every learner, and all settings that were tried.

    grid: axes [rows, 3], at least one more than there are learners.
    """
    grid = grid.flatten().tolist()
    chosen = [line for line in lines if line["seed"] != SEARCH_SEED]
    learners = in_order(chosen)
    matrices = [np.mean(column(own, "matrix"), 0)[1:] for own in learners.values()]
    names = chosen[0]["stages"]
    if higher_is_better:
        scale = {"vmin": 0, "vmax": 1, "form": "{:.0%}"}
        legend = "accuracy"
    else:  # what diverges must not hide all else
        scale = {"vmin": np.min(matrices), "vmax": np.percentile(matrices, 95)}
        scale["cmap"] = "viridis_r"
        legend = "bits per byte"
    for number, (learner, matrix) in enumerate(zip(learners, matrices, strict=True)):
        axes = grid[number]
        left = number % 3 == 0
        image = heat_map(axes, matrix, names if left else [""] * len(names), names, **scale)
        axes.set(title=learner, xlabel="scored on stage", ylabel="after stage" if left else "")
    axes.figure.colorbar(image, ax=grid, label=legend, shrink=0.6, aspect=40)
    axes = grid[len(learners)]
    searched = [line for line in lines if line["seed"] == SEARCH_SEED]
    for learner, tried in in_order(searched).items():
        tried.sort(key=lambda line: (line["ewc"] or 0, line["lr"]))
        for strength, points in itertools.groupby(tried, lambda line: line["ewc"]):
            points = np.array([(line["forgetting"], line["last"]) for line in points])
            label = f"{learner} {strength:g}" if strength else learner
            axes.plot(*points.T, "o-", linewidth=1.2, markersize=3, label=label)
    unit = "" if higher_is_better else " (bits per byte)"
    axes.set(title="all settings tried", xlabel="forgetting", ylabel=f"last stage{unit}")
    axes.legend(fontsize=7)
    for axes in grid[len(learners) + 1 :]:
        axes.remove()


# --------------------------------------------------------------------------------------------------
# The command


def parser():
    raw = argparse.RawDescriptionHelpFormatter
    p = Parser(prog="python -m bench continual", description=__doc__, formatter_class=raw)
    p.add_argument("command", help=", ".join(COMMANDS))
    p.add_argument("--data", help="folder of the data sets (default: $NESTED_DATA; docs/data.md)")
    p.add_argument("--set", default="clinc150", help="of classes: " + " or ".join(SETS))
    p.add_argument("--learners", help=f"comma-separated, of {', '.join(LEARNERS)} (default: all)")
    p.add_argument("--seeds", type=int, default=3, help="0, 1, ... (default: 3)")
    p.add_argument("--out", help="results (default: results/continual_COMMAND.jsonl)")
    p.add_argument("--quick", action="store_true", help="a minute, to see that it runs")
    return p


def main(argv=None):
    """The command; returns the exit status: 0 done, 2 bad input or a run that diverged."""
    try:
        args = parser().parse_args(argv)
        one_of("command", args.command, COMMANDS)
        one_of("set", args.set, SETS)
        torch.set_num_threads(1)  # the models are small
        if args.command == "cost":
            cost(args.quick)
            return 0
        if not args.quick:
            args.data = args.data or os.environ.get("NESTED_DATA")
        if not args.data and not args.quick:
            raise ValueError("no data: name its folder with --data or $NESTED_DATA")
        if not 1 <= args.seeds <= SEARCH_SEED:
            raise ValueError(f"seeds must be 1 to {SEARCH_SEED}, got {args.seeds}")
        names = args.learners.split(",") if args.learners else LEARNERS
        args.learners = [one_of("learner", name, LEARNERS) for name in names]
        what = f"classes_{args.set}" if args.command == "classes" else args.command
        default = f"{'runs/quick' if args.quick else 'results'}/continual_{what}.jsonl"
        out = Path(args.out or default)
        record = Record(out)
        (stream if args.command == "stream" else staged)(args, record)
        lines = list(record.finished.values())
        plot(lines, args.command, out.with_suffix(".png"))
    except (ValueError, OSError, NonFinite) as error:
        print(f"bench continual: error: {first_line(error)}", file=sys.stderr)
        return 2
    reported = [line for line in lines if line["seed"] != SEARCH_SEED]
    written = f"written to {out} and {out.with_suffix('.png')}"
    print("\n".join(["", *table(reported, args.command), "", written]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
