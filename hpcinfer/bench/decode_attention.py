"""Decode: one query per sequence meets a cache that is cut over the ranks by pages.

The sequences share the cached tokens evenly. Copies of the cache take turns, as the layers of a
model do, so that each step reads it from memory and not from a cache of the processor. A step is
attention to the own keys and the exchange that completes it; the exchange is timed by itself too.
"""

from functools import partial

import numpy as np

from hpcinfer import node, partition
from hpcinfer.bench import limits, measure
from hpcinfer.bench.shape import attend_nothing, tokens_of
from hpcinfer.bench.table import OF_LIMIT, BenchColumn, text_of
from hpcinfer.parallel.gather import gather
from hpcinfer.parallel.ring import ring
from hpcinfer.parallel.tree import tree, tree_single

_COLD_BYTES = 1 << 30  # of cache in all copies, over all ranks
_MERGES = {"gather": gather, "tree": tree, "tree_single": tree_single}


COLUMNS = (
    BenchColumn("cached", "cached"),
    BenchColumn("queries", "batch"),
    BenchColumn("strategy", "strategy"),
    BenchColumn("ranks", "ranks"),
    BenchColumn("step us", "time_s", ".0f", 1e6),
    BenchColumn("speed-up", "speedup", ".2f"),
    BenchColumn("exchange us", "exchange_s", ".0f", 1e6),
    BenchColumn("bytes a step", "sent_bytes"),
    BenchColumn("calls of a rank", "calls"),
    OF_LIMIT,
)


def run(comm, device, shape, cached, queries, repeat):
    """Measure decode.

    Parameters
    ----------
    device : array.Device of this rank
    shape : AttentionShape
    cached : numbers of tokens in the whole cache
    queries : numbers of sequences, which have one query each and share the cache
    repeat : repetitions, of which the median counts

    Returns
    -------
    list of rows, the same on every rank
    """
    rates = limits.read_rates(comm, device)
    caches = (_CutCache(comm, device, shape, L, T) for L in cached for T in queries)
    return [row for cache in caches for row in _rows(cache, rates, repeat)]


def table(rows):
    """The rows as text."""
    first, last = rows[0], rows[-1]
    head = (
        f"decode attention: {first['model']}, {first['dtype']}, "
        f"{measure.machine(first)}; bytes are those of all ranks together\n"
        f"limit: reading the cache, {first['limit_byte_per_s'] / 1e9:.1f} GB/s by one rank, "
        f"{last['limit_byte_per_s'] / 1e9:.1f} by {last['ranks']}\n"
    )
    return text_of(head, COLUMNS, rows)


class _CutCache:
    """Queries, and this rank's part of the cache; rank 0 has room for the whole.

    Attributes
    ----------
    L, T : cached tokens, sequences
    counts : keys of every rank
    o, lse : attention of the queries to this rank's keys
    """

    def __init__(self, comm, device, shape, L, T):
        self.comm, self.device, self.shape, self.L, self.T = comm, device, shape, L, T
        lengths = partition.counts(partition.block(L, T))
        dealt = [partition.block_cyclic(n, comm.size) for n in lengths]
        self.counts = [sum(map(len, of_sequences)) for of_sequences in zip(*dealt, strict=True)]
        self._own = np.concatenate([tokens_of(b, of[comm.rank]) for b, of in enumerate(dealt)])
        self._all = np.concatenate([tokens_of(b, np.arange(n)) for b, n in enumerate(lengths)])
        self._q = device.put(shape.queries(T))
        self._q_at = np.stack([np.arange(T), lengths], axis=1)

        self._copies, self._turn = -(-_COLD_BYTES // (L * shape.key_bytes)), 0
        n = L if comm.rank == 0 else len(self._own)
        self._k, self._v = map(device.put, shape.keys(n, self._copies))
        self.o, self.lse = self.local()

    def _keys(self, n):
        """The next copy's first n keys and values."""
        self._turn = (self._turn + 1) % self._copies
        return self._k[self._turn, :n], self._v[self._turn, :n]

    def one_rank(self):
        """Attention of rank 0 to the whole cache."""
        return self.shape.attend(self._q, *self._keys(self.L), self._q_at, self._all)

    def local(self):
        """Attention to this rank's keys."""
        return self.shape.attend(self._q, *self._keys(len(self._own)), self._q_at, self._own)

    def ring(self, attend):
        """Attention to all keys, which pass around."""
        k, v = self._keys(len(self._own))
        return ring(self.comm, self._q, k, v, self._q_at, self._own, self.counts, attend)

    def step(self, strategy):
        """Attention of all ranks to the whole cache."""
        if strategy == "ring":
            return self.ring(self.shape.attend)
        return _MERGES[strategy](self.comm, *self.local())

    def exchange(self, strategy):
        """The messages of a step, and the merge."""
        if strategy == "ring":
            return self.ring(attend_nothing)
        return _MERGES[strategy](self.comm, self.o, self.lse)


def _rows(cache, rates, repeat):
    """Rows of one cache: one rank, then every strategy."""
    comm, (one_rate, all_rate) = cache.comm, rates
    together, alone = partial(measure.together_s, comm), partial(measure.alone_s, comm)
    one_s = measure.call_s(alone, cache.one_rank, repeat)
    rows = [_row(cache, "one rank", 1, one_s, one_rate)]
    for strategy in ("ring", *_MERGES):
        time_s = measure.call_s(together, partial(cache.step, strategy), repeat)
        exchange = partial(cache.exchange, strategy)
        exchange_s = measure.call_s(together, exchange, repeat)
        calls, sent_bytes, _, _ = measure.exchanged(comm, exchange)
        rows.append(_row(cache, strategy, comm.size, time_s, all_rate))
        rows[-1] |= {
            "speedup": one_s / time_s,
            "exchange_s": exchange_s,
            "sent_bytes": sent_bytes,
            "calls": calls,
        }
    return rows


def _row(cache, strategy, ranks, time_s, byte_per_s):
    """Row of one rank, or of a strategy before what only an exchange has."""
    # Every cached key and value is read once.
    limit_s = cache.L * cache.shape.key_bytes / byte_per_s
    return {
        "bench": "decode-attention",
        **cache.shape.facts(cache.device),
        "strategy": strategy,
        "batch": cache.T,
        "context": cache.L // cache.T,
        "cached": cache.L,
        "ranks": ranks,
        "threads": node.threads_per_rank(),
        "time_s": time_s,
        "tokens_per_s": cache.T / time_s,
        "limit_byte_per_s": byte_per_s,
        "limit_tokens_per_s": cache.T / limit_s,
        "share_of_limit": limit_s / time_s,
        "speedup": 1.0,
        "exchange_s": 0.0,
        "sent_bytes": 0,
        "calls": "none",
    }
