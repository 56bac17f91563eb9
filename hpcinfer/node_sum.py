"""Allreduce inside a node: each rank writes its part into common memory and adds up all parts.

    before   x on every rank, of one node
    after    their sum on every rank, the same number on all
    cost     n words written and (P-1) n read by each rank; for small n, as it is linear in P
    source   the shared-memory windows of MPI-3 (Hoefler 2013, doi:10.1007/s00607-013-0324-2)

`collectives.Allreduce` takes this way for small sums of ranks that have common memory. Compiled
functions make the sum (`ops.cpu.runtime.node_sum`), so that a replayed step needs neither Python
nor MPI for it. The ranks wait for each other in a loop, as MPI does inside a node; who waits for
long lets MPI go on meanwhile, since another rank may wait in a call that needs this one's part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import numpy as np
from mpi4py import MPI

from hpcinfer import collectives, node
from hpcinfer.array import Array
from hpcinfer.heartbeat import waiting

# Bytes of a part at most, and of the parts of all ranks together, which each rank reads.
_PART_BYTES, _ALL_BYTES = 64 << 10, 256 << 10

# Turns of waiting between two calls of MPI: some tenths of a millisecond; few where ranks have no
# core of their own.
_TURNS, _TURNS_CROWDED = 10_000, 100

# Calls after which a rank sleeps between them, and for how long.
_SHORT_WAITS, _SLEEP_S = 1000, 1e-4


class NodeSum:
    """One rank's view of the memory that the ranks of a communicator share.

    Parameters
    ----------
    comm : communicator
    memory : uint8, shared, 0 at first: a line of the cache for each rank, then two parts for each
    kernels : compiled functions, `ops.cpu.runtime.node_sum`
    launch : how they are called, so that a step that is captured keeps the calls
    patience : turns of waiting between two calls of MPI

    Attributes
    ----------
    state : (WORDS,) int64 of this rank, as `ops.cpu.runtime.node_sum` knows it
    """

    def __init__(
        self,
        comm: MPI.Comm,
        memory: np.ndarray,
        kernels: ModuleType,
        launch: Callable[..., None],
        patience: int,
    ):
        P = comm.size
        self._comm, self._rank = comm, comm.rank
        self._kernels, self._launch = kernels, launch
        self._flags = memory[: 64 * P].view(np.int64).reshape(P, 8)
        self._slots = memory[64 * P :].view(np.float32).reshape(2, P, -1)
        self.state = np.zeros(kernels.WORDS, np.int64)
        self.state[kernels.PATIENCE] = patience
        self._begun = kernels.ticks(), time.perf_counter()
        self._waits = self._waited_for = 0

    @property
    def late(self) -> np.ndarray:
        """(1,) int64, 1 while a sum is not complete."""
        return self.state[self._kernels.LATE :][:1]

    @property
    def time_s(self) -> float:
        """Seconds that this rank has spent in sums so far."""
        begun, begun_s = self._begun
        tick_s = (time.perf_counter() - begun_s) / max(1, self._kernels.ticks() - begun)
        return float(self.state[self._kernels.TICKS]) * tick_s

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the sums use beside the numbers that are summed."""
        return self._flags, self._slots, self.state

    def serves(self, x: Array) -> bool:
        """True, on every rank alike, if an array is summed here."""
        if not isinstance(x, np.ndarray) or x.dtype != np.float32 or not x.flags.c_contiguous:
            return False
        return x.nbytes <= _PART_BYTES and x.nbytes * self._comm.size <= _ALL_BYTES

    def sum(self, x: Array) -> None:
        """Sum x over the ranks, in place."""
        flat, kernels = x.reshape(-1), self._kernels
        self._launch(kernels.put, self._slots, self._flags, self._rank, self.state, flat)
        self._launch(kernels.take, self._slots, self._flags, self.state, flat)
        while self.state[kernels.LATE]:
            self.wait()
            kernels.take(self._slots, self._flags, self.state, flat)

    def wait(self) -> None:
        """Let MPI, other threads and other processes go on; for longer, the longer a sum takes."""
        self._comm.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG)
        number = int(self.state[self._kernels.NUMBER])
        self._waits = self._waits + 1 if number == self._waited_for else 0
        self._waited_for = number
        time.sleep(0 if self._waits < _SHORT_WAITS else _SLEEP_S)


def open_node_sums(
    comms: Iterable[MPI.Comm],
    on_node: MPI.Comm,
    kernels: Any,
    launch: Any,
) -> None:
    """Let communicators make their small sums in common memory; every rank of the node calls this.

    Parameters
    ----------
    comms : communicators of this rank
    on_node : communicator of the ranks that share memory with this one
    kernels, launch : as NodeSum takes them; None where this rank has none
    """
    # Wait in MPI sooner where ranks share cores.
    with waiting("allgather", on_node, "node sum"):
        of_ranks = on_node.allgather(node.cores())
    crowded = sum(bool(node.cores() & cores) for cores in of_ranks) > len(node.cores())

    # Give each communicator its own memory.
    for comm in comms:
        with waiting("allreduce", comm, "node sum"):
            made = _opened(comm, kernels, launch, _TURNS_CROWDED if crowded else _TURNS)
        collectives.use_reducer(comm, made)


def _opened(
    comm: MPI.Comm,
    kernels: Any,
    launch: Any,
    patience: int,
) -> NodeSum | None:
    """NodeSum for a communicator; None where its ranks cannot have one, on all of them alike."""
    # Find out whether all of them are on one node, and can compute the sums.
    of_node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    shares = of_node.size == comm.size
    of_node.Free()
    able = shares and kernels is not None
    if comm.size == 1 or not comm.allreduce(able, MPI.MIN):
        return None

    # Let all map the memory of the first.
    memory: Any = None
    handle: Any = None
    if comm.rank == 0:
        memory, handle = node.common_memory(64 * comm.size + 2 * comm.size * _PART_BYTES)
    handle = comm.bcast(handle)
    if comm.rank > 0:
        memory = node.map_common(handle, write=True)
    mapped = comm.allreduce(memory is not None, MPI.MIN)
    if comm.rank == 0:
        node.close_common(handle)
    return NodeSum(comm, memory, kernels, launch, patience) if mapped else None
