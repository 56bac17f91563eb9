"""Where this rank is: the MPI call that it waits in, and the step and layer that it works on.

Written in passing by whoever makes calls and computes, and read by a thread that tells other ranks
when they miss this one (`hpcinfer.job.watchdog`). Writing costs an assignment.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

Call = tuple[str, str, str, float]  # verb, axis, purpose, and when it began in seconds


class Heartbeat:
    """Where one rank is.

    Attributes
    ----------
    call : the MPI call under way, None outside of calls
    calls : number of calls that have ended
    step : number of the step at work, 0 before the first
    layer : the layer at work, or being read; None before the first
    """

    def __init__(self) -> None:
        self.call: Call | None = None
        self.calls = self.step = 0
        self.layer: int | None = None


here = Heartbeat()


@contextmanager
def waiting(verb: str, comm: Comm, purpose: str) -> Iterator[None]:
    """Note that the body waits in a call that enters no ledger: one on small Python objects."""
    here.call = verb, comm.Get_name() or "comm", purpose, time.perf_counter()
    try:
        yield
    finally:
        here.call = None
        here.calls += 1
