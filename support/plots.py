"""The one style of the project's pictures. matplotlib is imported late, because it is slow to."""

import contextlib
from pathlib import Path

import numpy as np

from support.checkpoint import atomic_write

# Okabe and Ito: eight that also the colour-blind tell apart, the pale yellow darker
COLORS = "#0072b2 #d55e00 #009e73 #cc79a7 #56b4e9 #b8a100 #e69f00 #555555".split()
INK = "#222222"
STYLE = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": "#8a8a8a",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "text.color": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "image.aspect": "auto",
    "image.cmap": "viridis",
}


@contextlib.contextmanager
def picture(path: str | Path, width: float, height: float, dpi: int = 120):
    """Within, an empty figure of so many inches in the one style; then it is a PNG at path."""
    import matplotlib
    from matplotlib.figure import Figure  # needs no display

    path = Path(path)
    with matplotlib.rc_context(STYLE | {"axes.prop_cycle": matplotlib.cycler(color=COLORS)}):
        figure = Figure((width, height), layout="constrained")
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda beside: figure.savefig(beside, format="png", dpi=dpi))


def heat_map(axes, values, rows, columns, form="{:.2f}", **options):
    """values [rows, columns] as colours with the numbers in them -> the image, for its colour bar.

    rows, columns: their names. NaN stays empty. options: of imshow.
    """
    image = axes.imshow(values, **options)
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            light = sum(image.cmap(image.norm(value))[:3]) > 1.6
            how = {"ha": "center", "va": "center", "fontsize": 7}
            axes.text(j, i, form.format(value), color=INK if light else "white", **how)
    axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def label_ends(axes, ends, fontsize=8):
    """Names to the right of where lines end, moved apart where they would touch.

    ends: [(name, x, y, color), ...]; to be called when the axes have their limits.
    """
    height = axes.get_window_extent().height
    gap = 1.25 * fontsize * axes.figure.dpi / 72
    pixels = [axes.transData.transform((x, y))[1] for _, x, y, _ in ends]
    order = np.argsort(pixels)
    bottom = axes.get_window_extent().y0
    # a gap apart: halfway between moving each up from the one below and down from the one above
    slots = gap * np.arange(len(order))
    wanted = np.array(pixels)[order] - slots
    up = np.maximum.accumulate(wanted)
    down = np.minimum.accumulate(wanted[::-1])[::-1]
    at = (up + down) / 2 + slots
    for place, i in zip(at, order, strict=True):
        name, x, y, color = ends[i]
        where = (1.03, (place - bottom) / height)
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkB": 2}
        line |= {"shrinkA": 0, "relpos": (0, 0.5)}
        how = {"textcoords": "axes fraction", "va": "center", "fontsize": fontsize, "color": color}
        axes.annotate(name, (x, y), where, arrowprops=line, **how)
