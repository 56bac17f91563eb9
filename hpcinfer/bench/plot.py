"""Pictures of a bench's rows, drawn with matplotlib, which the extra `plot` brings.

Measured is a line with marks, the limit of the machine a dashed line of the same colour; where
there are no numbers along an axis, both are bars.
"""

import importlib.util

from hpcinfer.io.atomic import replacing

_WIDTH, _HEIGHT = 7.0, 4.4


def refuse_missing():
    """Refuse to draw where matplotlib is missing, before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError("plot: got no matplotlib, need it to draw; pip install hpcinfer[plot]")


def draw(path, rows):
    """Draw the rows of one bench.

    Parameters
    ----------
    path : .png, .svg or .pdf
    rows : list of dicts, as `--json` has them
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((_WIDTH, _HEIGHT), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    _PICTURES.get(rows[0]["bench"], _by_name)(figure, rows)
    figure.suptitle(_title(rows[0]), fontsize=10)
    with replacing(path) as partial:
        figure.savefig(partial, format=path.rpartition(".")[2])


def _title(row):
    """The bench, its model and its ranks."""
    words = [row["bench"], *(str(row[k]) for k in ("model", "dtype", "layout") if row.get(k))]
    return ", ".join([*words, f"{row['ranks']} rank" + "s" * (row["ranks"] != 1)])


def _by_batch(figure, rows):
    """Decoding: tokens per second, and milliseconds of a step, beside the limit."""
    left, right = figure.subplots(1, 2)
    figure.set_size_inches(1.5 * _WIDTH, _HEIGHT)
    over, line = _axes_of(rows)
    _lines(left, rows, over, line, lambda r: r["tokens_per_s"], lambda r: r["limit_tokens_per_s"])
    _logarithmic(left, rows, over, "tokens/s")
    _lines(
        right, rows, over, line,
        lambda r: 1e3 * r["batch"] / r["tokens_per_s"],
        lambda r: 1e3 * r["batch"] / r["limit_tokens_per_s"],
    )  # fmt: skip
    _logarithmic(right, rows, over, "ms for a token of every sequence")
    right.legend(fontsize=8)


def _by_length(figure, rows):
    """Prefill: tokens per second over the length of the prompt."""
    axes = figure.subplots()
    over, line = ("context", "batch")
    _lines(axes, rows, over, line, lambda r: r["tokens_per_s"], lambda r: r["limit_tokens_per_s"])
    _logarithmic(axes, rows, over, "tokens/s")
    axes.set_yscale("linear")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def _by_name(figure, rows):
    """A bar for every row, its name what tells it from the others; the limit behind it."""
    axes = figure.subplots()
    names = _names(rows)
    if "tokens_per_s" in rows[0]:
        quantity, unit, factor = "tokens_per_s", "tokens/s", 1
    else:
        quantity, unit, factor = "byte_per_s", "GB/s", 1e-9
    values = [factor * row[quantity] for row in rows]
    limits = [v / row["share_of_limit"] for v, row in zip(values, rows, strict=True)]
    at = range(len(rows))
    axes.barh(at, limits, 0.8, color="0.88", label="limit")
    axes.barh(at, values, 0.5, color="C0", label="measured")
    for i, (value, row) in enumerate(zip(values, rows, strict=True)):
        text = f" {value:.3g} ({100 * row['share_of_limit']:.0f} %)"
        axes.text(value, i, text, va="center", fontsize=8)
    axes.set_yticks(at, names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel(unit)
    axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.set_size_inches(_WIDTH, max(2.2, 1.3 + 0.35 * len(rows)))


def _axes_of(rows):
    """What runs along the axis, and what tells the lines apart: batch and context, or reverse."""
    of_batch, of_context = ({row[name] for row in rows} for name in ("batch", "context"))
    return ("batch", "context") if len(of_batch) >= len(of_context) else ("context", "batch")


_WORDS = {"batch": "sequences", "context": "tokens of context"}


def _lines(axes, rows, over, line, measured, limit):
    """A line of what was measured and a dashed one of its limit for every value of `line`."""
    for i, value in enumerate(sorted({row[line] for row in rows})):
        own = sorted((row for row in rows if row[line] == value), key=lambda row: row[over])
        x, style = [row[over] for row in own], {"color": f"C{i % 10}"}
        words = _WORDS[line] if value > 1 else _WORDS[line].replace("sequences", "sequence")
        axes.plot(x, [measured(r) for r in own], "o-", ms=4, label=f"{value} {words}", **style)
        axes.plot(x, [limit(r) for r in own], "--", lw=1, **style)
    axes.plot([], [], "--", color="0.4", lw=1, label="limit of the machine")


def _logarithmic(axes, rows, over, what):
    """Axes of powers of two and ten."""
    values = sorted({row[over] for row in rows})
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.set_xticks(values, [str(v) for v in values], fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel(_WORDS[over])
    axes.set_ylabel(what)
    axes.grid(True, which="major", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def _names(rows):
    """What tells each row from the others, in words."""
    told = [k for k in _TELLING if len({str(row.get(k)) for row in rows}) > 1]
    texts = []
    for row in rows:
        own = [k for k in told if row.get(k) is not None]
        words = [str(row[k]) if k in _PLAIN else f"{k} {row[k]}" for k in own]
        texts.append(", ".join(words) or row["bench"])
    return texts


_TELLING = ("strategy", "writes", "reads", "cut", "ranks", "cached", "batch", "context")
_PLAIN = ("strategy", "writes", "reads", "cut")
_PICTURES = {"decode": _by_batch, "prefill": _by_length}
