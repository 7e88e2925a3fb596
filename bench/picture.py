"""The picture of the README: a block of Hope from top to bottom, and beside each part its clock.

    python -m bench.picture [FILE]        # docs/hope.png, 700 px wide in the README
"""

import sys
from pathlib import Path

from matplotlib.patches import FancyBboxPatch

from support.plots import INK, picture

FAINT = "#8a8a8a"
STATIC = "#ececec"
TITANS = "#f6b48a"
CMS = ("#ffd966", "#a9d18e")
TICKS = 32  # tokens that a clock shows

# y of the row, its box, whether it joins the residual stream, colour, period in tokens (0: never)
ROWS = (
    (4.95, "norm, projections, convolution", False, STATIC, 0),
    (4.05, "memories of k, v, η, α, content\nself-modifying Titans", True, TITANS, 1),
    (2.95, "CMS level 1: MLP", True, CMS[0], 4),
    (2.2, "CMS level 2: MLP", True, CMS[1], 16),
    (1.45, "last level: MLP", True, STATIC, 0),
)
CLOCKS = (
    "in training only",
    "every token: a write it chose for itself",
    "every C₁ tokens: a step on next-token loss*",
    "every C₂ tokens: the same, on more text*",
    "in training only",
)
NOTE = """* with learning in context on; else in training only.
  The defaults: C₁ = 512, and a level that is static."""


def box(axes, left, right, y, height, text, color):
    """A rounded box around y, with centred text."""
    shape = "round,pad=0,rounding_size=0.08"
    corner = (left, y - height / 2)
    patch = FancyBboxPatch(
        corner, right - left, height, boxstyle=shape, facecolor=color, edgecolor=INK, linewidth=0.9
    )
    axes.add_patch(patch)
    axes.text((left + right) / 2, y, text, ha="center", va="center", fontsize=9, color=INK)


def arrow(axes, start, end):
    """From start to end, both (x, y)."""
    style = {"arrowstyle": "-|>", "color": INK, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style)


def clock(axes, left, right, y, period, color, label):
    """A line of TICKS tokens with a mark wherever a part changes, and in words when that is."""
    axes.plot([left, right], [y, y], color=FAINT, linewidth=0.8)
    step = (right - left) / TICKS
    for tick in range(period, TICKS + 1, period) if period else ():
        x = left + (tick - 0.5) * step
        high = 0.13 if period == 1 else 0.2
        axes.plot([x, x], [y - high, y + high], color=color, linewidth=4.6, solid_capstyle="butt")
        axes.plot([x, x], [y - high, y + high], color=INK, linewidth=0.6, solid_capstyle="butt")
    axes.text(left, y + 0.24, label, fontsize=8.5, color=INK, va="bottom")


def draw(figure) -> None:
    """Left the block, from tokens to logits; right the clocks."""
    figure.set_layout_engine("none")  # all places are given
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 7), ylim=(0.1, 6.5))
    axes.axis("off")
    stream = 0.45  # x of the residual stream
    left, right = 0.95, 3.25  # of the boxes
    box(axes, 0.1, 1.5, 6.15, 0.4, "tokens", "white")
    box(axes, 0.1, 1.5, 0.4, 0.4, "norm, logits", "white")
    arrow(axes, (stream, 5.95), (stream, 0.6))
    axes.text(1.65, 6.15, "embedding", fontsize=8.5, color=FAINT, va="center")
    frame = "round,pad=0,rounding_size=0.1"
    patch = FancyBboxPatch(
        (0.2, 0.98), 3.25, 4.55, boxstyle=frame, fill=False, edgecolor=FAINT, linestyle="--"
    )
    axes.add_patch(patch)
    axes.text(3.4, 5.37, "block, n times", fontsize=8.5, color=FAINT, ha="right", va="center")
    axes.text(3.75, 6.15, "When it changes", fontsize=10, color=INK, va="center", weight="bold")
    axes.text(3.75, 0.42, NOTE, fontsize=8.5, color=FAINT, va="center", linespacing=1.5)
    axes.text(6.85, 5.6, "tokens →", fontsize=8.5, color=FAINT, ha="right", va="center")
    for (y, text, joins, color, period), label in zip(ROWS, CLOCKS, strict=True):
        height = 0.6 if "\n" in text else 0.42
        box(axes, left, right, y, height, text, color)
        clock(axes, 3.75, 6.85, y - 0.1, period, color, label)
        if joins:  # the residual stream takes up what the box says
            low = y - height / 2 - 0.09
            axes.plot([left + 0.3] * 2, [y - height / 2, low], color=INK, linewidth=0.9)
            arrow(axes, (left + 0.3, low), (stream + 0.08, low))
            circle = {"markerfacecolor": "white", "markeredgecolor": INK, "zorder": 5}
            axes.plot(stream, low, "o", markersize=9, **circle)
            axes.plot(stream, low, "+", markersize=6, color=INK, zorder=6)
        if text.startswith("memories"):
            arrow(axes, (2.1, ROWS[0][0] - 0.21), (2.1, y + height / 2))
            axes.text(2.2, 4.545, "x, q", fontsize=8.5, color=INK, va="center")
        else:
            arrow(axes, (stream, y), (left, y))


def main() -> None:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/hope.png")
    with picture(path, 7, 5.6, dpi=200) as figure:
        draw(figure)
    print(f"in {path}")


if __name__ == "__main__":
    main()
