"""Attention and FFN on different ranks: share of the time that each side waits for the other.

M ranks attend to a cache, N have the columns of a dense FFN. With one micro-batch a side works
while the other waits: each is idle half of the time. With m of them, in ping-pong, a side waits for
the first of them and for nothing else: 1 of m · layers + 1 slots if the works are equal, which the
length of the cache sees to unless it is given. With two a message must be there at once; three give
it time. A rank waits where it receives.
"""

import time
from functools import partial
from statistics import median

import numpy as np

from hpcinfer import array, partition
from hpcinfer.bench import measure
from hpcinfer.bench.shape import AttentionShape, sleep
from hpcinfer.bench.table import OF_LIMIT, BenchColumn, percent, text_of
from hpcinfer.errors import UsageError
from hpcinfer.ops.activation import relu
from hpcinfer.ops.experts import experts_ffn
from hpcinfer.parallel import disagg

SLEEP_S = 0.02  # work of a side that sleeps, on all its tokens


COLUMNS = (
    BenchColumn("strategy", "strategy"),
    BenchColumn("micro-batches", "batch"),
    BenchColumn("ms", "time_s", ".2f", 1e3),
    BenchColumn("speed-up", "speedup", ".2f"),
    percent("attention idle %", "attention_idle_share"),
    percent("FFN idle %", "ffn_idle_share"),
    percent("if equal %", "equal_idle_share"),
    BenchColumn("bytes sent", "sent_bytes"),
    OF_LIMIT,
)


def run(comm, device, heads, ffn, tokens, layers, split, micro, context, work, repeat):
    """Measure numbers of micro-batches.

    Parameters
    ----------
    device : array.Device of this rank
    heads : of the attention, each with its part of the model's width
    ffn : shape.Ffn
    tokens : of one step, over all attention ranks
    layers : how many
    split : (A, F) ranks of each side, None for half of the ranks each
    micro : list of numbers of micro-batches
    context : cached tokens, None for as many as make attention take the time of the FFN
    work : "compute" or "sleep"
    repeat : repetitions, of which the median counts

    Returns
    -------
    list of rows, the same on every rank
    """
    split = split or (-(-comm.size // 2), comm.size // 2)
    if ffn.D % heads:
        raise UsageError(
            f"bench: got --width {ffn.D} --heads {heads}, need a multiple of the heads"
        )
    if min(split) < 1 or sum(split) != comm.size:
        raise UsageError(
            f"bench: got {split[0]}:{split[1]} attention and FFN ranks of {comm.size}, need all "
            "ranks on one side or the other, and 1 or more on each"
        )

    # Let the two sides meet over an intercommunicator.
    M, shape = split[0], AttentionShape(heads, heads, ffn.D // heads, "float32")
    attends = comm.rank < M
    side = comm.Split(int(attends), comm.rank)
    inter = side.Create_intercomm(0, comm, M if attends else 0)
    try:
        sides = _Sides(inter, device, shape, ffn, tokens, split, comm.rank, work)
        works = _equal(comm, sides, context, repeat)
        rows = [_row(comm, sides, works, layers, m, repeat) for m in micro]
    finally:
        inter.Free()
        side.Free()
    return rows


def table(rows):
    """The rows as text."""
    first = rows[0]
    head = (
        f"disagg: {first['model']}, {first['dtype']}, {first['context'] * first['batch']} tokens, "
        f"{first['split']} attention and FFN ranks, cache of {first['cached']} tokens, "
        f"{measure.machine(first)}; times are those of one layer\n"
        f"limit: the longer of the two works by itself, attention "
        f"{1e3 * first['attention_s']:.2f} ms, FFN {1e3 * first['ffn_s']:.2f} ms\n"
    )
    return text_of(head, COLUMNS, rows)


class _Sides:
    """Work of this rank, as one of M that attend or of N that have the FFN.

    Attributes
    ----------
    cached : tokens in the cache that attention reads
    """

    def __init__(self, inter, device, shape, ffn, tokens, split, rank, work):
        M, N = split
        self.device = device
        self.inter, self.shape, self.ffn, self.tokens, self.work = inter, shape, ffn, tokens, work
        self.split, self.attends = split, rank < M
        self.shares = partition.experts(1, ffn.F, N)
        if self.attends:
            n = partition.counts(partition.block(tokens, M))[rank]
            self.x = device.put(ffn.tokens(n))
        else:
            self.x = device.put(ffn.tokens(tokens))
            own = ffn.weights(self.shares[rank - M].columns)
            self._weights = [device.put(w[None]) for w in own]
        self.cached = 0

    def cache(self, cached):
        """Make the cache `cached` tokens long."""
        if self.attends:
            self._k, self._v = (self.device.put(x[0]) for x in self.shape.keys(cached))
        self.cached = cached

    def attend(self, x):
        """(n, D) -> (n, D): every token sees the whole cache."""
        if self.work == "sleep":
            return sleep(SLEEP_S * len(x) / max(1, len(self.x)), x)
        q = x.reshape(len(x), self.shape.H, self.shape.K)
        at = np.stack([np.zeros(len(x), np.int32), self.cached + np.arange(len(x))], axis=1)
        keys_at = np.stack([np.zeros(self.cached, np.int32), np.arange(self.cached)], axis=1)
        return x + self.shape.attend(q, self._k, self._v, at, keys_at)[0].reshape(x.shape)

    def compute(self, n, x, ids, weights):
        """(n, D) -> (n, D): this rank's columns of the FFN."""
        if self.work == "sleep":
            return sleep(SLEEP_S * len(x) / max(1, self.tokens), x)
        return experts_ffn(x, ids, weights, *self._weights, 0, relu)

    def own_work(self):
        """This rank's work on all its tokens in one layer."""
        return self.attend(self.x) if self.attends else self.compute(0, self.x, *_one(self.x))

    def step(self, layers, m):
        """All layers of this rank's tokens in `m` micro-batches."""
        if not self.attends:
            return disagg.ffn_side(
                self.inter, range(layers), m, self.compute, self.ffn.D, lambda n: 1,
                xp=self.device.xp,
            )  # fmt: skip

        def attend(n, b, x):
            y = self.attend(x)
            return y, y, *_one(y), False

        xs = [self.x[slice(*rows)] for rows in partition.block(len(self.x), m)]
        return disagg.attention_side(
            self.inter, range(layers), xs, attend, lambda n, b, x, y: x, lambda n: self.shares
        )


def _one(x):
    """The choice of a dense FFN: expert 0, with weight 1."""
    xp = array.namespace(x)
    return xp.zeros((len(x), 1), np.int32), xp.ones((len(x), 1), np.float32)


def _equal(comm, sides, context, repeat):
    """Seconds of the attention and of the FFN of one layer, after making the cache long enough."""
    sides.cache(context or 1024)
    for _ in range(1 if context else 3):
        attention_s, ffn_s = _works(comm, sides, repeat)
        if not context and sides.work == "compute":
            sides.cache(max(1, round(sides.cached * ffn_s / attention_s)))
    return _works(comm, sides, repeat)


def _works(comm, sides, repeat):
    """Seconds of the slowest attention rank and of the slowest FFN rank, all working at once."""
    M = sides.split[0]
    measured = []
    for _ in range(repeat):
        comm.Barrier()
        start_s = time.perf_counter()
        measure.await_arrays(sides.own_work())
        times = comm.allgather(time.perf_counter() - start_s)
        measured.append((max(times[:M]), max(times[M:])))
    return np.median(measured, axis=0).tolist()


def _row(comm, sides, works, layers, m, repeat):
    # Run the layers, and see how long each side waited in receives.
    M, N = sides.split
    step = partial(sides.step, layers, m)
    _, sent_bytes, _, _ = measure.exchanged(comm, step)
    measured = [measure.received_s(comm, step) for _ in range(repeat)]
    time_s = median(time_s for time_s, _ in measured) / layers
    idle = [
        median(sum(waited[ranks]) / len(waited[ranks]) / time_s for time_s, waited in measured)
        for ranks in (slice(0, M), slice(M, None))
    ]

    # Beside it what equal works would wait.
    return measure.row(
        "disagg",
        sides.ffn.facts(sides.device) | {"model": f"{sides.ffn}, {sides.shape.H} heads"},
        f"disagg, {sides.work}",
        comm.size,
        m,
        sides.tokens,
        time_s,
        max(works),
        split=f"{M}:{N}",
        cached=sides.cached,
        layers=layers,
        speedup=sum(works) / time_s,
        attention_s=works[0],
        ffn_s=works[1],
        attention_idle_share=idle[0],
        ffn_idle_share=idle[1],
        equal_idle_share=1 / 2 if m == 1 else 1 / (m * layers + 1),
        sent_bytes=sent_bytes // layers,
    )
