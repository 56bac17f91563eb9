"""Parameters kept in parts: how much of their gathering hides behind the computation.

Every rank takes its own tokens through the layers, whose parameters are kept whole, or in parts
that are brought together by Allgather or by Bcast, ahead of their use or when they are used. A run
that computes nothing tells how long the gathering takes by itself. During a run the ledger tells
how long a rank waited for it, and how long it spent in tests, in which MPI copies what no hardware
copies for it. The first layer of a run cannot be fetched ahead. All ways take turns in every
repetition.
"""

import numpy as np

from hpcinfer import array, partition
from hpcinfer.bench import limits, measure
from hpcinfer.bench.table import OF_LIMIT, BenchColumn, percent, text_of
from hpcinfer.parallel import zero

_TURNS = 8  # parts of a layer's computation, between which MPI may move messages on
_WAYS = {
    "allgather": (0, False),
    "allgather, ahead": (0, True),
    "broadcast": (np.inf, False),
    "broadcast, ahead": (np.inf, True),
}


COLUMNS = (
    BenchColumn("parameters", "strategy"),
    BenchColumn("ms", "time_s", ".2f", 1e3),
    BenchColumn("speed-up", "speedup", ".2f"),
    BenchColumn("gather ms", "exchange_s", ".2f", 1e3),
    percent("of copying %", "exchange_share_of_limit"),
    BenchColumn("waited ms", "waited_s", ".2f", 1e3),
    BenchColumn("tested ms", "tested_s", ".2f", 1e3),
    percent("overlapped %", "overlapped_share"),
    percent("hidden %", "hidden_share"),
    BenchColumn("bytes sent", "sent_bytes"),
    BenchColumn("peak MB", "peak_bytes", ".1f", 1e-6),
    BenchColumn("by formula MB", "formula_bytes", ".1f", 1e-6),
    BenchColumn("whole MB", "whole_bytes", ".1f", 1e-6),
    OF_LIMIT,
)


def run(comm, device, ffn, tokens, layers, repeat):
    """Measure parameters kept whole and in parts.

    Parameters
    ----------
    device : array.Device of this rank
    ffn : shape.Ffn
    tokens : of every rank
    layers : how many
    repeat : repetitions, of which the median counts

    Returns
    -------
    list of rows, the same on every rank
    """
    _, flop_rate = limits.matrix_rates(comm, device)
    _, copy_rate = limits.copy_rates(comm, device)
    limit_s = ffn.flop(tokens) * comm.size / flop_rate
    whole = [
        dict(zip(("up", "down"), map(device.put, ffn.weights()), strict=True))
        for _ in range(layers)
    ]
    x = device.put(ffn.tokens(tokens))
    ways = {"kept whole": _Kept(comm, whole)} | {
        name: _ZeroLayers(comm, device, whole, *how) for name, how in _WAYS.items()
    }

    # Let every way take its turn in every repetition, with and without computing.
    spent = {(name, n): [] for name in ways for n in (0, tokens)}
    for _ in range(repeat):
        for name, n in spent:
            spent[name, n].append(_timed(comm, ffn, ways[name], x[:n], layers))

    # Make a row of each, beside the first.
    facts = ffn.facts(device) | {"layers": layers}
    rates = {"limit_flop_per_s": flop_rate, "limit_byte_per_s": copy_rate}
    rates["whole_bytes"] = sum(w.nbytes for layer in whole for w in layer.values())
    rows = []
    for name, way in ways.items():
        medians = [np.median(spent[name, n], axis=0).tolist() for n in (0, tokens)]
        row = _row(comm, facts, name, way, medians, tokens, limit_s, rates)
        row["speedup"] = rows[0]["time_s"] / row["time_s"] if rows else 1.0
        rows.append(row)
    return rows


def _row(comm, facts, name, way, medians, tokens, limit_s, rates):
    """Row of one way; `medians` of gathering alone and of whole layers, as `_timed` has them."""
    (_, sent_bytes, *by_itself), (time_s, _, waited_s, tested_s) = medians
    layers, alone_s = facts["layers"], sum(by_itself)
    return measure.row(
        "zero", facts, name, comm.size, comm.size, tokens * comm.size, time_s / layers, limit_s,
        exchange_s=alone_s / layers,
        waited_s=waited_s / layers,
        tested_s=tested_s / layers,
        overlapped_share=measure.saved(waited_s, alone_s),
        hidden_share=measure.saved(waited_s + tested_s, alone_s),
        sent_bytes=round(sent_bytes / layers),
        peak_bytes=max(comm.allgather(way.held_bytes)),
        formula_bytes=max(comm.allgather(way.formula_bytes)),
        exchange_share_of_limit=_share(sent_bytes, alone_s, rates["limit_byte_per_s"]),
        **rates,
    )  # fmt: skip


def table(rows):
    """The rows as text."""
    first = rows[0]
    head = (
        f"zero: {first['model']}, {first['dtype']}, {first['layers']} layers, {first['context']} "
        f"tokens on each of {first['ranks']} ranks, {measure.machine(first)}; "
        f"times and bytes sent are those of one layer\n"
        f"limit: float32 matrix products, {first['limit_flop_per_s'] / 1e9:.0f} GFLOP/s; gathering "
        f"beside copying, {first['limit_byte_per_s'] / 1e9:.1f} GB/s; all ranks together\n"
    )
    return text_of(head, COLUMNS, rows)


class _Kept:
    """Every layer whole on every rank."""

    def __init__(self, comm, whole):
        self._whole = whole
        self.held_bytes = self.formula_bytes = sum(w.nbytes for u in whole for w in u.values())

    def get(self, n):
        """Parameters of layer n."""
        return self._whole[n]

    def test(self):
        """Nothing is under way."""


class _ZeroLayers:
    """Layers in parts, or each whole on one rank.

    Attributes
    ----------
    held_bytes : of parameters on this rank, parts and buffers, as counted when they were made
    formula_bytes : the same, by the formula
    """

    def __init__(self, comm, device, whole, small_bytes, ahead):
        made = []

        def make():
            units = [zero.cut(comm, w, small_bytes, n % comm.size) for n, w in enumerate(whole)]
            made.append(zero.Gathered(comm, units, device.xp, ahead=ahead))

        _, self.held_bytes = measure.held_bytes(device, make)
        (gathered,) = made
        self.get, self.test = gathered.get, gathered.test

        # n/P of every layer, or the own layers whole, and two layers that are whole, or one.
        n = sum(-(-w.nbytes // zero.ALIGN) * zero.ALIGN for w in whole[0].values())
        P, rank, layers = comm.size, comm.rank, len(whole)
        part = n // P + (rank < n % P)
        own = layers * part if small_bytes == 0 else len(range(rank, layers, P)) * n
        self.formula_bytes = own + (1 + ahead) * n


def _timed(comm, ffn, way, x, layers):
    """Seconds of the slowest rank, bytes sent by all, waited_s, tested_s, in all layers."""
    spent = []

    def through():
        y = x
        for n in range(layers):
            weights = way.get(n)
            y = y + _products(ffn, y, weights, way.test)
        return y

    _, *sent = measure.exchanged(comm, lambda: spent.append(measure.together_s(comm, through)))
    return [*spent, *sent]


def _products(ffn, x, weights, between):
    """The products of all tokens in parts, with `between` called after each.

    A GPU is waited for, as otherwise a message would be that takes its turn behind the products.
    """
    parts = []
    for start, stop in partition.block(len(x), _TURNS):
        parts.append(ffn.products(x[start:stop], **weights))
        array.synchronize(parts[-1])
        between()
    return array.namespace(x).concatenate(parts)


def _share(sent_bytes, alone_s, byte_per_s):
    """Share of the copy limit that gathering by itself reaches; None where nothing is sent."""
    return sent_bytes / byte_per_s / alone_s if sent_bytes else None
