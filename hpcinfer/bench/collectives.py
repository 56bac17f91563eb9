"""Collectives by message size, beside the copying that the node can do.

Every byte that a rank sends is copied once at least: the limit is the rate at which all ranks
together copy memory. Bytes are the ledger's, of all ranks. On CPUs the last row of a size is an
Allreduce through memory that the ranks of a node share: each writes its part, and sums a slice of
all parts; it counts the bytes of an Allreduce. All take turns in every repetition.
"""

from statistics import median

import numpy as np
from mpi4py import MPI

from hpcinfer import collectives, node, partition
from hpcinfer.bench import limits, measure
from hpcinfer.bench.table import OF_LIMIT, BenchColumn, text_of

COLUMNS = (
    BenchColumn("collective", "collective"),
    BenchColumn("bytes", "bytes"),
    BenchColumn("us", "time_s", ".1f", 1e6),
    BenchColumn("bytes sent", "sent_bytes"),
    BenchColumn("GB/s", "byte_per_s", ".2f", 1e-9),
    OF_LIMIT,
)


def run(comm, device, sizes, repeat):
    """Measure every collective at every size.

    Parameters
    ----------
    device : array.Device of this rank
    sizes : bytes of the whole array: what an Allreduce reduces, an Allgather has gathered, a
        ReduceScatter sums, an Alltoall sends from every rank, and a rank passes on to the next
    repeat : repetitions of many calls, of which the median counts

    Returns
    -------
    list of rows, the same on every rank
    """
    _, copy_rate = limits.copy_rates(comm, device)
    alone = device.name == "cuda" or not _one_node(comm)
    window = None if alone else _Window(comm, max(sizes))
    rows = []
    for size in sizes:
        calls = _calls(comm, device, size)
        sent = {name: measure.exchanged(comm, call)[1] for name, call in calls.items()}
        if window is not None:
            x, out = np.ones((2, size // 4), np.float32)
            calls["window"] = lambda x=x, out=out: window.reduce(x, out)
            sent["window"] = sent["Allreduce"]

        # Let every collective take its turn in every repetition.
        spent = {name: [] for name in calls}
        for _ in range(repeat):
            for name, call in calls.items():
                spent[name].append(measure.call_s(lambda f: measure.together_s(comm, f), call, 1))
        rows += [
            _row(comm, device, name, size, median(spent[name]), sent[name], copy_rate)
            for name in calls
        ]
    if window is not None:
        window.free()
    return rows


def table(rows):
    """The rows as text."""
    first = rows[0]
    shared = any(row["collective"] == "window" for row in rows)
    head = (
        f"collectives: {first['ranks']} ranks, float32, {measure.machine(first)}; "
        f"bytes of the whole array\n"
        f"limit: copying, {first['limit_byte_per_s'] / 1e9:.1f} GB/s, all ranks together"
        f"{'; window: an Allreduce through shared memory' if shared else ''}\n"
    )
    return text_of(head, COLUMNS, rows)


class _Window:
    """Memory that the ranks of a node share, for an Allreduce of up to `nbytes`.

    It holds the part of every rank, and the sum.
    """

    def __init__(self, comm, nbytes):
        self.comm, self.n = comm, nbytes // 4
        self._window = MPI.Win.Allocate_shared(4 * self.n, 4, comm=comm)
        self._parts = [self._of(rank) for rank in range(comm.size)]
        self._sums = MPI.Win.Allocate_shared(4 * self.n * (comm.rank == 0), 4, comm=comm)
        buffer, _ = self._sums.Shared_query(0)
        self._sum = np.frombuffer(buffer, np.float32)
        self._window.Lock_all()
        self._sums.Lock_all()

    def reduce(self, x, out):
        """Sum `x` (n,) over the ranks into `out`."""
        comm, n = self.comm, len(x)
        self._parts[comm.rank][:n] = x
        self._meet()

        # Sum this rank's slice of all parts.
        own = slice(*partition.block(n, comm.size)[comm.rank])
        np.copyto(self._sum[own], self._parts[0][own])
        for part in self._parts[1:]:
            self._sum[own] += part[own]
        self._meet()
        out[:] = self._sum[:n]

    def free(self):
        """Give the memory back; every rank calls this."""
        self._parts = self._sum = None
        for window in (self._window, self._sums):
            window.Unlock_all()
            window.Free()

    def _of(self, rank):
        buffer, _ = self._window.Shared_query(rank)
        return np.frombuffer(buffer, np.float32)

    def _meet(self):
        """Wait until what every rank has written can be read by all."""
        for window in (self._window, self._sums):
            window.Sync()
        self.comm.Barrier()
        for window in (self._window, self._sums):
            window.Sync()


def _calls(comm, device, size):
    """Each collective on an array of so many bytes, by its name."""
    P, n = comm.size, size // 4
    counts = partition.counts(partition.block(n, P))
    whole, out = device.xp.ones(n, np.float32), device.xp.empty(n, np.float32)
    part = whole[: counts[comm.rank]]
    received = [counts[comm.rank]] * P
    return {
        "Allreduce": lambda: collectives.Allreduce(comm, whole),
        "Allgather": lambda: collectives.Allgather(comm, part, counts),
        "ReduceScatter": lambda: collectives.ReduceScatter(comm, whole, counts),
        "Alltoall": lambda: collectives.Alltoall(comm, whole, counts, received),
        "Sendrecv": lambda: collectives.Shift(comm, whole, out).wait(),
    }


def _one_node(comm):
    """True if all ranks share memory."""
    on_node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    alone = on_node.size == comm.size
    on_node.Free()
    return comm.allreduce(alone, MPI.LAND)


def _row(comm, device, name, size, time_s, sent_bytes, copy_rate):
    return {
        "bench": "collectives",
        "collective": name,
        "dtype": "float32",
        "device": device.name,
        "ranks": comm.size,
        "threads": node.threads_per_rank(),
        "bytes": size,
        "time_s": time_s,
        "sent_bytes": sent_bytes,
        "byte_per_s": sent_bytes / time_s,
        "limit_byte_per_s": copy_rate,
        "share_of_limit": sent_bytes / time_s / copy_rate,
    }
