"""Calls under way, which `collectives` starts and does not wait for; a number that ranks share."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

from hpcinfer.heartbeat import Call, here
from hpcinfer.ledger import current


class Transfer:
    """A call under way: `test` now and then while computing, `wait` before its result is used.

    MPI libraries for CPUs make progress inside MPI calls only: a long message stands still while
    its ranks compute, unless they test it.

    Parameters
    ----------
    call : of `Ledger.begin`
    sent_bytes : for the ledger
    requests : of MPI
    result : function, what `wait` returns when the requests have ended
    held : what must stay in memory until then
    """

    def __init__(
        self,
        call: Call,
        sent_bytes: float,
        requests: list[MPI.Request],
        result: Callable[[], Any],
        held: Any = None,
    ):
        # Note what is under way, and in whose ledger it is entered when it ends.
        here.call = None
        self._ledger, self._call, self._sent_bytes = current(), call, sent_bytes
        self._requests, self._result, self._held = requests, result, held

        # Count the time of the start alone: what follows is the computation's.
        self._start_s, self._test_s = call[-1], 0.0
        self._end_s: float | None = None
        self._time_s = time.perf_counter() - self._start_s

    def test(self) -> bool:
        """Let MPI move the message on; True once the transfer has ended."""
        if self._end_s is None:
            start_s = time.perf_counter()
            done = MPI.Request.Testall(self._requests)
            end_s = time.perf_counter()
            self._test_s += end_s - start_s
            if done:
                self._end_s = end_s
        return self._end_s is not None

    def wait(self) -> Any:
        """Wait until the transfer has ended, enter it in the ledger, and return its result."""
        # Wait, as seen from outside, in the call that was started.
        start_s = time.perf_counter()
        here.call = (*self._call[:-1], start_s)
        end_s = self._end_s
        if end_s is None:
            MPI.Request.Waitall(self._requests)
            self._end_s = end_s = time.perf_counter()

        # Enter what it has cost.
        result, self._held = self._result(), None
        self._ledger.enter(
            self._call,
            self._sent_bytes,
            time_s=self._time_s + time.perf_counter() - start_s,
            test_s=self._test_s,
            flight_s=end_s - self._start_s,
        )
        return result


class Outgoing:
    """Messages on their way that nobody waits for: they are looked after until they have left."""

    def __init__(self) -> None:
        self._transfers: list[Transfer] = []

    def add(self, transfer: Transfer) -> None:
        """Look after one more."""
        self.test()
        self._transfers.append(transfer)

    def test(self) -> None:
        """Let MPI move the messages on, and forget those that have left."""
        left = [transfer for transfer in self._transfers if transfer.test()]
        for transfer in left:
            transfer.wait()
        self._transfers = [t for t in self._transfers if t not in left]

    def wait(self) -> None:
        """Wait until all have left."""
        while self._transfers:
            self._transfers.pop(0).wait()


class Counter:
    """A number on rank 0 that every rank reads and raises by one-sided calls.

    Collective over `comm` when made and when freed, and at no other time.
    """

    def __init__(self, comm: MPI.Intracomm):
        self._comm = comm
        self._window = MPI.Win.Allocate(8 if comm.rank == 0 else 0, 8, comm=comm)
        if comm.rank == 0:
            self._window.Lock(0)
            self._window.tomemory()[:] = bytes(8)
            self._window.Unlock(0)
        comm.Barrier()

    def add(self, n: int, purpose: str = "") -> int:
        """Raise the number by `n`; returns what it was before (0 for `n` reads it)."""
        ledger = current()
        call = ledger.begin("Fetch_and_op", self._comm, purpose)
        before, raised = np.empty(1, np.int64), np.array([n], np.int64)
        self._window.Lock(0, MPI.LOCK_SHARED)
        self._window.Fetch_and_op([raised, MPI.INT64_T], [before, MPI.INT64_T], 0, 0, MPI.SUM)
        self._window.Unlock(0)
        sent_bytes = 0 if self._comm.rank == 0 else raised.nbytes
        ledger.enter(call, sent_bytes)
        return int(before[0])

    def free(self) -> None:
        """Give the window back; every rank must call this."""
        self._window.Free()
