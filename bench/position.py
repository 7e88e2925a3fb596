"""Loss by position of several runs, in rows many times as long as those of training (NL figure 10).

    python -m bench position runs/hope-nano runs/samba-nano runs/transformer-nano
    python -m bench position runs/hope-nano runs/hope-nano@off --context 16384

RUN@off is the run with CMS levels that take no steps in context. All runs read the same held-out
text of the first one, with everything they carry kept from the row's first token to its last.
"""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from bench.long_context import position
from bench.scorer import Scorer
from bench.tables import markdown, spans
from support.checkpoint import warned
from support.flags import DEVICES, whole_number
from support.plots import label_ends, picture
from support.run import Run
from support.vocabulary import n_bytes


def add_flags(parser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder of train.py, or RUN@off")
    number = {"type": whole_number}
    parser.add_argument("--context", **number, default=8192, help="tokens of a row")
    parser.add_argument("--rows", **number, default=16, help="the most rows that are read")
    parser.add_argument("--device", default="auto", help=DEVICES)
    parser.add_argument("--out", default="results/position.json", help="file of the result")


def positions(args) -> dict:
    """Bits per byte of the positions up to 1, 2, 4 ... training rows, a row a run, and a plot."""
    runs = []
    for name in args.runs:
        folder, at, updates = name.partition("@")
        if at and updates != "off":
            raise ValueError(f"a run must be FOLDER or FOLDER@off, got {name!r}")
        runs.append(Run.open(folder, args.device, updates or None))
    text, tokens, _ = runs[0].text(None)
    length = runs[0].config.seq_len
    for name, run in zip(args.runs, runs, strict=True):
        own = (run.saved["corpus"], run.config.seq_len)
        if own != (runs[0].saved["corpus"], length):
            wanted = f"be trained on the text of {args.runs[0]}, in rows of {length} tokens"
            raise ValueError(f"all runs must {wanted}; {name} was not")
    rows = []
    curves = {}
    for name, run in zip(args.runs, runs, strict=True):
        with tqdm(total=0, desc=name, unit=" tokens", unit_scale=True, leave=False) as bar:
            scorer = Scorer(run.model, run.encoding, run.device, bar=bar)
            made = position(scorer, tokens, length, args.context, args.rows, afresh=False)
        read = tokens[: made["rows"] * args.context]
        scale = len(read) / n_bytes(read, run.encoding)  # tokens a byte
        spans = [bits * scale for bits in made["kept"]]
        rows.append({"run": name} | run.facts() | {"bits_per_byte": spans})
        curves[name] = made["curve"] / np.log(2) * scale
    result = {"text": text, "rows": made["rows"], "to": made["to"], "runs": rows}
    print(f"bits per byte by position, {made['rows']} x {args.context:,} tokens of {text}\n")
    print(table(result))
    draw(Path(args.out).with_suffix(".png"), length, curves)
    return result


def table(result: dict) -> str:
    """A row a run, a column a span of positions."""
    begins = [1, *(end + 1 for end in result["to"][:-1])]
    spans = [f"{a:,} to {b:,}" for a, b in zip(begins, result["to"], strict=True)]
    lines = []
    for row in result["runs"]:
        of = f"`{Path(row['run']).name}`"
        lines.append([of, f"{row['parameters']:,}", *(f"{b:.3f}" for b in row["bits_per_byte"])])
    return markdown(["run", "parameters", *spans], lines)


def draw(path: Path, length: int, curves: dict[str, np.ndarray]) -> None:
    """A line a run, see `spans`."""
    with warned(), picture(path, 7, 4) as figure:
        axes = figure.subplots()
        ends = []
        for i, (name, curve) in enumerate(curves.items()):
            middle, means = spans(curve)
            mean = means.mean(1)
            axes.plot(middle, mean, color=f"C{i}")
            ends.append((Path(name).name, middle[-1], mean[-1], f"C{i}"))
        axes.axvline(length, color="0.5", linestyle=":")
        axes.annotate("length of training rows", (length, axes.get_ylim()[1]), fontsize=8, va="top")
        axes.set(xscale="log", xlabel="position (tokens)", ylabel="bits per byte")
        figure.draw_without_rendering()
        label_ends(axes, ends)
