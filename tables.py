"""What models score beside what the paper prints (paper_tables.json): Markdown tables and pictures."""

import json
import math
from pathlib import Path

import numpy as np

from hope import write_beside


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
    from matplotlib.figure import Figure  # slow to import; a Figure of its own needs no display

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
    write_beside(path, lambda beside: figure.savefig(beside, format="png", dpi=120))


def draw_position(run, made: dict) -> None:
    """position.png: the loss by position, its means up to 1, 2, 4 ... training rows, and those of a memory begun afresh."""
    from matplotlib.figure import Figure

    curve, length, facts = made["curve"] / math.log(2), run.train.seq_len, run.facts()
    edges = np.unique(np.geomspace(1, len(curve) + 1, 40).astype(int)) - 1
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.stairs([curve[a:b].mean() for a, b in zip(edges, edges[1:], strict=False)], edges + 1, color="tab:blue", alpha=0.5)
    axes.plot(made["to"], made["kept"], "o", color="tab:blue", label="memory kept (mean since the point before)")
    axes.plot(made["to"], made["fresh"], "x", color="tab:orange", label=f"the same tokens, memory afresh every {length}")
    axes.axvline(length, color="0.7", linestyle=":", label="length of training rows")
    title = f"{facts['model']}, {short(facts['parameters'])} parameters, {short(facts['training_tokens'])} training tokens"
    axes.set(xscale="log", xlabel="position (tokens)", ylabel="bits per token", title=title)
    axes.legend()
    write_beside(run.folder / "position.png", lambda beside: figure.savefig(beside, format="png", dpi=120))
