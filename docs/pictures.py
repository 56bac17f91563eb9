"""Draw the pictures of the documents, next to this file.

python docs/pictures.py        needs matplotlib (extra plot); writes docs/axes.svg
python docs/pictures.py png    the same as docs/axes.png, to look at
"""

import sys
from itertools import product
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

# In the order in which ranks are numbered, the last running fastest.
LENGTHS = {"pp": 2, "dp": 2, "cp": 2, "tp": 2}
MEANING = {
    "pp": "pp: layers, in stages",
    "dp": "dp: requests, among replicas",
    "cp": "cp: tokens of a sequence",
    "tp": "tp: heads and columns",
}
COLOURS = {"pp": "#8a4f9e", "dp": "#c9772b", "cp": "#2b7a6b", "tp": "#2f5fa8"}
FOLDER = Path(__file__).resolve().parent


def rank_of(index):
    """Number of the rank with these coordinates, as `hpcinfer.grid` counts."""
    rank = 0
    for axis, length in LENGTHS.items():
        rank = rank * length + index[axis]
    return rank


def place_of(index):
    """Where a rank stands: columns are dp, then tp; rows are pp, then cp."""
    return 5.6 * index["dp"] + 2.4 * index["tp"], -4.5 * index["pp"] - 1.75 * index["cp"]


def draw_axes(path):
    """The grid of dp=2,pp=2,cp=2,tp=2, with every rank's coordinates."""
    figure = Figure((8.4, 6.0))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-2.3, 10.9)
    axes.set_ylim(-8.35, 2.35)
    axes.set_aspect("equal")
    axes.set_axis_off()

    # A frame for each replica, and a band for each of its stages
    for dp in range(LENGTHS["dp"]):
        _box(axes, (5.6 * dp - 0.45, -6.8), 5.1, 8.25, COLOURS["dp"], "none")
        axes.text(5.6 * dp + 2.1, 1.65, f"replica dp={dp}", ha="center", color=COLOURS["dp"])
        for pp in range(LENGTHS["pp"]):
            _box(axes, (5.6 * dp - 0.2, -4.5 * pp - 2.05), 4.6, 3.3, COLOURS["pp"], "#f5eef7")
    for pp in range(LENGTHS["pp"]):
        axes.text(-1.4, -4.5 * pp - 0.45, f"stage\npp={pp}", ha="center", color=COLOURS["pp"])

    # Ranks, and what joins those that differ along one axis
    for values in product(*map(range, LENGTHS.values())):
        index = dict(zip(LENGTHS, values, strict=True))
        _rank(axes, index)
        _joins(axes, index)
    for dp in range(LENGTHS["dp"]):
        _hand_on(axes, 5.6 * dp + 2.1)

    # What each axis cuts
    for i, (axis, words) in enumerate(reversed(MEANING.items())):
        x, y = (4.4, -0.4)[i % 2], (-7.5, -8.05)[i // 2]
        axes.plot([x, x + 0.6], [y, y], color=COLOURS[axis], lw=2.5)
        axes.text(x + 0.8, y, words, va="center")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)


def _rank(axes, index):
    """A rank's number and coordinates."""
    x, y = place_of(index)
    _box(axes, (x, y), 1.8, 1.05, "0.35", "white")
    axes.text(x + 0.9, y + 0.7, f"rank {rank_of(index)}", ha="center", va="center", weight="bold")
    words = f"cp={index['cp']} tp={index['tp']}"
    axes.text(x + 0.9, y + 0.3, words, ha="center", va="center", fontsize=8.5, color="0.3")


def _joins(axes, index):
    """Lines to the next rank along tp and cp."""
    x, y = place_of(index)
    lines = {"tp": ((x + 1.8, x + 2.4), (y + 0.52,) * 2), "cp": ((x + 0.9,) * 2, (y, y - 0.7))}
    for axis, line in lines.items():
        if index[axis] + 1 < LENGTHS[axis]:
            axes.plot(*line, color=COLOURS[axis], lw=2.5)


def _hand_on(axes, x):
    """What the stages of a replica hand on, from the middle `x` of one to the next."""
    style = {"arrowstyle": "-|>", "color": COLOURS["pp"], "lw": 2.5}
    axes.annotate("", (x, -3.25), (x, -2.05), arrowprops=style)
    apart = rank_of(dict.fromkeys(LENGTHS, 0) | {"pp": 1})
    words = f"rank r to rank r + {apart}"
    axes.text(x + 0.25, -2.65, words, va="center", fontsize=8.5, color=COLOURS["pp"])


def _box(axes, corner, width, height, edge, face):
    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(
        FancyBboxPatch(corner, width, height, boxstyle=style, edgecolor=edge, facecolor=face)
    )


def main(kind="svg"):
    """Draw all."""
    matplotlib.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "hpcinfer", "font.family": "sans-serif"}
    )
    draw_axes(FOLDER / f"axes.{kind}")


if __name__ == "__main__":
    main(*sys.argv[1:])
