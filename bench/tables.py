"""What models score beside what the paper prints (paper_tables.json): Markdown tables and pictures.

A function here takes what a table of eval.py has measured, {"values": ..., "notes": ...}, and the
run, whose size and training stand beside every number.
"""

import json
import math
from pathlib import Path

import numpy as np

from support.checkpoint import warned
from support.plots import picture


def published(table: str) -> dict:
    """{"title", "columns", "rows"} of a table of the paper."""
    return json.loads((Path(__file__).parent / "paper_tables.json").read_text())[table]


# --------------------------------------------------------------------------------------------------
# Markdown


def markdown(head: list, rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def cell(value) -> str:
    """A value of a table: "-" for None, two digits of a float, several with slashes."""
    if isinstance(value, list):
        return " / ".join(map(cell, value))
    if value is None:
        return "-"
    return f"{value:,.2f}" if isinstance(value, float) else str(value)


def short(n: int | None) -> str:
    """1,029,854 -> 1.03M."""
    if n is None:
        return "unknown"
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if n >= unit:
            return f"{n / unit:.3g}{name}"
    return str(n)


def beside(table: str, made: dict, run, guess: list | None = None) -> str:
    """Our row, what guessing scores, the published rows, and the notes below; draws the same."""
    paper = published(table)
    facts = run.facts()
    if "lengths" in made:  # as many values a column
        facts["model"] += f" at {' / '.join(f'{n:,}' for n in made['lengths'])} tokens"
    ours = [f"**{facts['model']}, this run**", short(facts["parameters"])]
    ours += [f"{short(facts['training_tokens'])} ({facts['trained_on']})"]
    ours += [facts["cms_steps_in_context"], *map(cell, made["values"])]
    rows = [ours]
    if guess:
        rows.append(["guessing", "none", "none", "none", *map(cell, guess)])
    for row in paper["rows"]:
        size = row["parameters"] or "not stated"
        stated = [size, row["tokens"] or "not stated", "not stated"]
        rows.append([f"{row['model']}, published", *stated, *map(cell, row["values"])])
    draw(run.folder / f"{table}.png", paper, made["values"], facts)
    head = ["model", "parameters", "training tokens", "CMS steps in context", *paper["columns"]]
    return "\n\n".join([paper["title"], markdown(head, rows), *made["notes"]])


# --------------------------------------------------------------------------------------------------
# Pictures


def draw(path: Path, paper: dict, values: list, facts: dict) -> None:
    """A panel for each column: this run orange, the published Hope black, other rows grey."""
    columns = paper["columns"]
    with warned(), picture(path, 1.4 * len(columns) + 1, 4) as figure:
        panels = zip(figure.subplots(1, len(columns)), columns, values, strict=True)
        for i, (axes, column, value) in enumerate(panels):
            for row in paper["rows"]:
                color = "black" if row["model"] == "Hope" else "0.75"
                axes.plot(np.atleast_1d(row["values"][i]), "o", color=color)
            if value is not None:
                axes.plot(np.atleast_1d(value), "D", color="C1")
            axes.set(title=column, xticks=[], yscale="log" if "ppl" in column else "linear")
        orange = f"orange: {facts['model']}, {_size(facts)}"
        others = "black: published Hope; grey: other published rows"
        figure.suptitle(f"{paper['title']}\n{orange}; {others}")


def draw_position(run, made: dict) -> None:
    """position.png: the loss by position, and what a memory begun afresh loses.

    Points are means up to 1, 2, 4 ... training rows.
    """
    curve = made["curve"] / math.log(2)  # [rows, context]
    to = made["to"]
    length = run.config.seq_len
    facts = run.facts()
    middle, means = spans(curve)
    mean = means.mean(1)
    with warned(), picture(run.folder / "position.png", 7, 6) as figure:
        top, bottom = figure.subplots(2, sharex=True, height_ratios=(2, 1))
        top.plot(middle, mean, color="C0", linewidth=1, label="mean of the rows")
        if len(curve) > 1:
            spread = means.std(1, ddof=1)
            label = f"standard deviation of the {len(curve)} rows"
            style = {"color": "C0", "alpha": 0.18, "linewidth": 0}
            top.fill_between(middle, mean - spread, mean + spread, label=label, **style)
        top.plot(to, made["kept"], "o", color="C0", label="mean since the point before")
        bottom.plot(to, np.subtract(made["fresh"], made["kept"]), "o-", color="C1")
        bottom.axhline(0, color="0.7", linewidth=1)
        for axes in (top, bottom):
            axes.axvline(length, color="0.5", linestyle=":", label="length of training rows")
        top.legend()
        top.set(xscale="log", ylabel="bits per token", title=f"{facts['model']}, {_size(facts)}")
        bottom.set(xlabel="position (tokens)", ylabel=f"worse if begun\nafresh every {length}")


def spans(curve: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """curve [rows, context] -> positions in the middle of 29 growing spans, their means [29, rows].

    From position 32 on: the first tokens, hard to foresee, would hide all others.
    """
    length = curve.shape[1]
    edges = np.unique(np.geomspace(min(32, length // 2) + 1, length + 1, 30).astype(int)) - 1
    means = [curve[:, a:b].mean(1) for a, b in zip(edges, edges[1:], strict=False)]
    return np.sqrt((edges[:-1] + 1) * edges[1:]), np.stack(means)


def _size(facts: dict) -> str:
    parameters = short(facts["parameters"])
    return f"{parameters} parameters, {short(facts['training_tokens'])} training tokens"
