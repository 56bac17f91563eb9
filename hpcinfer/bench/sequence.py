"""Sequence parallelism beside tensor parallelism: memory between the halves, bytes sent, time.

A layer is norm, column product, ReLU, row product and residual, x + down · ReLU(up · norm(x)).
Tensor parallelism holds all tokens on every rank between the halves, sequence parallelism 1/P of
them; inside a half both hold them all, which is the peak. What each rank holds is counted in a run
of its own, as counting takes time.
"""

import time
from functools import partial
from statistics import median

import numpy as np

from hpcinfer import array, partition
from hpcinfer.bench import limits, measure
from hpcinfer.bench.table import OF_LIMIT, BenchColumn, text_of
from hpcinfer.ops.norm import rms_norm
from hpcinfer.parallel import sequence, tensor

COLUMNS = (
    BenchColumn("strategy", "strategy"),
    BenchColumn("ranks", "ranks"),
    BenchColumn("held MB a rank", "held_bytes", ".2f", 1e-6),
    BenchColumn("peak MB a rank", "peak_bytes", ".2f", 1e-6),
    BenchColumn("bytes sent", "sent_bytes"),
    BenchColumn("ms", "time_s", ".2f", 1e3),
    BenchColumn("speed-up", "speedup", ".2f"),
    BenchColumn("between ms", "between_s", ".2f", 1e3),
    BenchColumn("exchange ms", "exchange_s", ".2f", 1e3),
    OF_LIMIT,
)


def run(comm, device, ffn, tokens, layers, repeat):
    """Measure both strategies, and one rank.

    Parameters
    ----------
    device : array.Device of this rank
    ffn : shape.Ffn
    tokens : of one step
    layers : how many follow each other
    repeat : repetitions, of which the median counts

    Returns
    -------
    list of rows, the same on every rank
    """
    one_rate, all_rate = limits.matrix_rates(comm, device)
    ways = [way(comm, device, ffn, tokens) for way in (_One, _TensorParallel, _SequenceParallel)]
    times, between = {way: [] for way in ways}, {way: [] for way in ways}
    for _ in range(repeat):
        for way in ways:
            way.between_s = 0.0
            times[way].append(way.clock(comm, partial(way.through, layers)) / layers)
            between[way].append(max(comm.allgather(way.between_s)) / layers)

    rows, one_s = [], median(times[ways[0]])
    facts = ffn.facts(device)
    for way in ways:
        peak, _ = measure.held_bytes(device, partial(way.through, layers))
        exchange_s = median(way.clock(comm, way.exchange) for _ in range(repeat))
        _, sent_bytes, _, _ = measure.exchanged(comm, way.exchange)
        time_s, ranks = median(times[way]), 1 if way is ways[0] else comm.size
        limit_s = ffn.flop(tokens) / (one_rate if way is ways[0] else all_rate)
        rows.append(
            measure.row(
                "sequence", facts, way.name, ranks, 1, tokens, time_s, limit_s,
                layers=layers,
                speedup=one_s / time_s,
                exchange_s=exchange_s,
                between_s=median(between[way]),
                held_bytes=max(comm.allgather(way.held)),
                peak_bytes=max(comm.allgather(peak)),
                sent_bytes=sent_bytes,
                limit_flop_per_s=ffn.flop(tokens) / limit_s,
            )
        )  # fmt: skip
    return rows


def table(rows):
    """The rows as text."""
    first, last = rows[0], rows[-1]
    head = (
        f"sequence: {first['model']}, {first['dtype']}, {first['context']} tokens, "
        f"{measure.machine(first)}; figures of one layer\n"
        f"limit: float32 matrix products, {first['limit_flop_per_s'] / 1e9:.0f} GFLOP/s by one "
        f"rank, {last['limit_flop_per_s'] / 1e9:.0f} by {last['ranks']}\n"
    )
    return text_of(head, COLUMNS, rows)


class _One:
    """All tokens and columns on rank 0.

    Attributes
    ----------
    held : bytes of activations that this rank held between the halves
    between_s : seconds of norms and residuals, added up
    """

    name, clock = "one rank", staticmethod(measure.alone_s)

    def __init__(self, comm, device, ffn, tokens):
        self.comm, self.ffn, self.held, self.between_s = comm, ffn, 0, 0.0
        self.counts = partition.counts(partition.block(tokens, comm.size))
        self.norm = device.put(np.ones(ffn.D, np.float32))
        self.weights = [device.put(w) for w in ffn.weights(self._columns())]
        self.x = device.put(ffn.tokens(self._rows(tokens)))
        self.scratch = device.put(ffn.tokens(tokens))

    def _columns(self):
        return None if self.comm.rank == 0 else (0, 0)

    def _rows(self, tokens):
        return tokens if self.comm.rank == 0 else 0

    def products(self, x):
        """Products of this rank's columns."""
        return self.ffn.products(x, *self.weights)

    def half(self, x, products):
        """`products` of all tokens, completed."""
        return products(x)

    def through(self, layers):
        """The tokens through some layers."""
        x = self.x
        for _ in range(layers):
            start_s = time.perf_counter()
            normed = rms_norm(x, self.norm, np.float32(1e-6))
            array.synchronize(normed)
            self.between_s += time.perf_counter() - start_s
            y = self.half(normed, self.products)
            array.synchronize(y)
            start_s = time.perf_counter()
            x = x + y
            array.synchronize(x)
            self.between_s += time.perf_counter() - start_s
            self.held = x.nbytes
        return x

    def exchange(self):
        """The messages of one layer."""
        return self.half(self.x, lambda x: self.scratch)


class _TensorParallel(_One):
    """All tokens on every rank, columns cut."""

    name, clock = "tensor", staticmethod(measure.together_s)

    def _columns(self):
        return partition.block(self.ffn.F, self.comm.size)[self.comm.rank]

    def _rows(self, tokens):
        return tokens

    def half(self, x, products):
        return tensor.complete(self.comm, x, products)


class _SequenceParallel(_TensorParallel):
    """Tokens cut outside the products, columns inside them."""

    name = "sequence"

    def _rows(self, tokens):
        return self.counts[self.comm.rank]

    def half(self, x, products):
        return sequence.complete(self.comm, x, self.counts, products)
