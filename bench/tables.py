"""What models score beside what the paper prints (paper_tables.json): Markdown tables and pictures."""

import json
import math
from pathlib import Path

import numpy as np

from support.checkpoint import atomic_write


def published(table: str) -> dict:
    """{"title", "columns", "rows"} of a table of the paper (paper_tables.json)."""
    return json.loads((Path(__file__).parent / "paper_tables.json").read_text())[table]


def markdown(head: list, rows: list[list]) -> str:
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [head, ["---"] * len(head), *rows])


def cell(value) -> str:
    if isinstance(value, list):
        return " / ".join(map(cell, value))
    return "-" if value is None else f"{value:,.2f}" if isinstance(value, float) else str(value)


def short(n: int) -> str:
    """1,029,854 -> 1.03M."""
    return next((f"{n / unit:.3g}{name}" for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")) if n >= unit), str(n))


def beside(table: str, made: dict, run, guess: list | None = None) -> str:
    """Our row, what guessing scores, and the published rows of a table, with the notes below; draws the same."""
    paper, facts = published(table), run.facts()
    ours = [f"**{facts['model']}, this run**", short(facts["parameters"])]
    ours += [f"{short(facts['training_tokens'])} ({facts['trained_on']})", facts["cms_steps_in_context"]]
    rows = [ours + [cell(value) for value in made["values"]]]
    if guess:
        rows.append(["guessing", "none", "none", "none", *map(cell, guess)])
    for row in paper["rows"]:
        stated = [row["parameters"] or "not stated", row["tokens"] or "not stated", "not stated"]
        rows.append([f"{row['model']}, published", *stated, *map(cell, row["values"])])
    draw(run.folder / f"{table}.png", paper, made["values"], facts)
    head = ["model", "parameters", "training tokens", "CMS steps in context", *paper["columns"]]
    return "\n\n".join([paper["title"], markdown(head, rows), *made["notes"]])


def draw(path: Path, paper: dict, values: list, facts: dict) -> None:
    """A panel for each column: this run in red, the published Hope black, the other published rows grey."""
    from matplotlib.figure import (
        Figure,  # slow to import; a Figure of its own needs no display
    )

    columns = paper["columns"]
    figure = Figure(figsize=(1.4 * len(columns) + 1, 4), layout="constrained")
    for i, (axes, column) in enumerate(zip(figure.subplots(1, len(columns)), columns, strict=True)):
        for row in paper["rows"]:
            axes.plot(np.atleast_1d(row["values"][i]), "o", color="black" if row["model"] == "Hope" else "0.75")
        if values[i] is not None:
            axes.plot(np.atleast_1d(values[i]), "D", color="tab:red")
        axes.set(title=column, xticks=[], yscale="log" if "ppl" in column else "linear")
    size = f"{short(facts['parameters'])} parameters, {short(facts['training_tokens'])} training tokens"
    figure.suptitle(f"{paper['title']}\nred: {facts['model']}, {size}; black: published Hope; grey: other published rows")
    atomic_write(path, lambda beside: figure.savefig(beside, format="png", dpi=120))


def draw_position(run, made: dict) -> None:
    """position.png: the loss by position, its means up to 1, 2, 4 ... training rows; what a memory begun afresh loses."""
    from matplotlib.figure import Figure

    curve, to, length, facts = made["curve"] / math.log(2), made["to"], run.train.seq_len, run.facts()
    edges = np.unique(np.geomspace(1, len(curve) + 1, 40).astype(int)) - 1
    figure = Figure(figsize=(7, 6), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=[2, 1])
    steps = [curve[a:b].mean() for a, b in zip(edges, edges[1:], strict=False)]
    top.stairs(steps, edges + 1, baseline=None, color="tab:blue", alpha=0.5)
    top.plot(to, made["kept"], "o", color="tab:blue", label="mean since the point before")
    top.set_ylim(0.9 * min(made["kept"]), 1.2 * max(made["kept"]))  # the first few tokens would hide all others
    bottom.plot(to, np.subtract(made["fresh"], made["kept"]), "o-", color="tab:orange")
    bottom.axhline(0, color="0.7", linewidth=1)
    for axes in (top, bottom):
        axes.axvline(length, color="0.7", linestyle=":", label="length of training rows")
    top.legend()
    title = f"{facts['model']}, {short(facts['parameters'])} parameters, {short(facts['training_tokens'])} training tokens"
    top.set(xscale="log", ylabel="bits per token", title=title)
    bottom.set(xlabel="position (tokens)", ylabel=f"worse if begun\nafresh every {length}")
    atomic_write(run.folder / "position.png", lambda beside: figure.savefig(beside, format="png", dpi=120))
