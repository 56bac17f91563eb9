"""Pictures of a bench's rows, drawn with matplotlib, which the extra `plot` brings.

Measured is a line with marks, the limit of the machine a dashed line of the same colour; where
there are no numbers along an axis, both are bars.
"""

import importlib.util

from hpcinfer.io.atomic import replacing
from hpcinfer.io.claims import target_of

_WIDTH, _HEIGHT = 7.0, 4.4


def refuse_missing():
    """Refuse to draw where matplotlib is missing, before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError("plot: got no matplotlib, need it to draw; pip install matplotlib")


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
    figure.suptitle(_title(rows), fontsize=10)
    with replacing(target_of(path)) as partial:
        figure.savefig(partial, format=path.rpartition(".")[2])


def _title(rows):
    """The bench, what its rows have in common, and the most ranks."""
    names = ("model", "weights" if "weights" in rows[0] else "dtype", "layout")
    facts = [{str(row.get(name) or "") for row in rows} for name in names]
    words = [word for values in facts if len(values) == 1 for word in values if word]
    ranks = max(row["ranks"] for row in rows)
    return f"{rows[0]['bench']}: " + ", ".join([*words, _count(ranks, "rank")])


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


def _by_ranks(figure, rows):
    """Scaling: speed-up over ranks, what the memory allows, and the ideal."""
    axes = figure.subplots()
    ranks = sorted({row["ranks"] for row in rows})
    axes.plot(ranks, [n / ranks[0] for n in ranks], ":", color="0.4", lw=1, label="ideal")
    for i, kind in enumerate(("strong", "weak")):
        own, colour = [row for row in rows if row["scaling"] == kind], f"C{i}"
        x, label = [row["ranks"] for row in own], f"{kind} ({own[0]['axis']})"
        axes.plot(x, [row["speedup"] for row in own], "o-", ms=4, color=colour, label=label)
        limits = [row["limit_speedup"] for row in own]
        axes.plot(x, limits, "--", lw=1, color=colour, label=f"{kind}, limit of the machine")
    axes.set_xticks(ranks)
    axes.set_xlabel("ranks")
    axes.set_ylabel("speed-up")
    axes.set_ylim(bottom=0)
    axes.grid(True, color="0.9")
    axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _by_size(figure, rows):
    """Collectives: microseconds and bytes per second over the size of the array."""
    left, right = figure.subplots(1, 2)
    figure.set_size_inches(1.5 * _WIDTH, _HEIGHT)
    names = list(dict.fromkeys(row["collective"] for row in rows))
    for name in names:
        own = [row for row in rows if row["collective"] == name]
        x = [row["bytes"] for row in own]
        label = {"window": "Allreduce, shared memory"}.get(name, name)
        left.plot(x, [1e6 * row["time_s"] for row in own], "o-", ms=4, label=label)
        right.plot(x, [row["byte_per_s"] / 1e9 for row in own], "o-", ms=4)
    limit = rows[0]["limit_byte_per_s"] / 1e9
    right.axhline(limit, ls="--", lw=1, color="0.4")
    left.plot([], [], "--", lw=1, color="0.4", label="limit: copying")
    sizes = sorted({row["bytes"] for row in rows})
    for axes, what in ((left, "us a call"), (right, "GB/s sent by all ranks")):
        _powers(axes, sizes, [_size_text(n) for n in sizes], "bytes of the whole array", what)
    left.legend(fontsize=8)


def _by_name(figure, rows):
    """A bar for every row, its name what tells it from the others; the limit behind it."""
    # Find what is drawn, and the limit of each row.
    axes = figure.subplots()
    names = _names(rows)
    if "tokens_per_s" in rows[0]:
        quantity, unit, factor = "tokens_per_s", "tokens/s", 1
    else:
        quantity, unit, factor = "byte_per_s", "GB/s", 1e-9
    values = [factor * row[quantity] for row in rows]
    limits = [v / row["share_of_limit"] for v, row in zip(values, rows, strict=True)]

    # Draw both, with the share in words.
    at = range(len(rows))
    axes.barh(at, limits, 0.8, color="0.88", label="limit")
    axes.barh(at, values, 0.5, color="C0", label="measured")
    for i, (value, row) in enumerate(zip(values, rows, strict=True)):
        text = f" {_short(value)} ({100 * row['share_of_limit']:.0f} %)"
        axes.text(value, i, text, va="center", fontsize=8)

    # Name rows and axes.
    axes.set_yticks(at, names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel(unit)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.set_size_inches(_WIDTH, max(2.4, 1.5 + 0.35 * len(rows)))


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
    """Axes of powers, with marks at the values of the rows."""
    values = sorted({row[over] for row in rows})
    _powers(axes, values, [str(value) for value in values], _WORDS[over], what)


def _powers(axes, values, texts, along, what):
    """Axes of powers of two and ten, with marks at some values."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.set_xticks(values, texts, fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel(along)
    axes.set_ylabel(what)
    axes.grid(True, which="major", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def _size_text(nbytes):
    """Bytes in the largest binary unit that leaves a number of 1 or more."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:g} {unit}"
        nbytes /= 1024
    return f"{nbytes:g} GiB"


def _count(n, word):
    return f"{n} {word}" + "s" * (n != 1)


def _short(value):
    """A number with three digits or more."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _names(rows):
    """What tells each row from the others, in words."""
    told = [k for k in _TELLING if len({str(row.get(k)) for row in rows}) > 1]
    texts = []
    for row in rows:
        own = [k for k in told if row.get(k) is not None]
        words = [_TELLING[k].format(row[k]).replace("_", "-") for k in own]
        if row["ranks"] > 1 and row["bench"] not in ("extract", "load"):
            words.append(_count(row["ranks"], "rank"))
        texts.append(", ".join(words) or row["bench"])
    return texts


_TELLING = {
    "strategy": "{}",
    "writes": "{}",
    "reads": "{}",
    "cut": "{}",
    "cached": "{} cached",
    "batch": "batch {}",
    "context": "{} tokens",
}
_PICTURES = {
    "decode": _by_batch,
    "prefill": _by_length,
    "scaling": _by_ranks,
    "collectives": _by_size,
}
