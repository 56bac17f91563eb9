"""What an engine sets in its process while it works, so that two engines do not touch each other.

A process has one count of threads in its libraries, one choice of kernels and one ledger under way:
each engine keeps its own, and sets them when its work begins. Outside of engines calls are entered
in `ledger.ledger`, and kernels are those that `dispatch.use` chose.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hpcinfer import collectives, node, staging
from hpcinfer.collectives import Reducer
from hpcinfer.ledger import Ledger, entering
from hpcinfer.ops import dispatch

if TYPE_CHECKING:
    from mpi4py.MPI import Comm


@dataclass
class ProcessState:
    """State of a process that belongs to one of its engines.

    Attributes
    ----------
    kernels : "auto" or "plain"
    ledger : what the engine has sent
    threads : of the rank's own kernels and of its libraries; 0 before it is known
    direct : True if MPI reads and writes the memory of GPUs
    reducers : list of (communicator, reducer), as `collectives.use_reducer` takes them
    """

    kernels: str
    ledger: Ledger = field(default_factory=Ledger)
    threads: int = 0
    direct: bool = False
    reducers: list[tuple[Comm, Reducer | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        dispatch.refuse_unknown(self.kernels)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Set all of it; the ledger and the choice of kernels for the body only.

        Threads, direct messages and reducers stay until another engine sets its own.
        """
        # Change what another engine has left.
        if self.threads and self.threads != node.threads():
            node.use_threads(self.threads)
        staging.use_direct(self.direct)
        for comm, reducer in self.reducers:
            if collectives.reducer_of(comm) is not reducer:
                collectives.use_reducer(comm, reducer)

        # Go back to what was there, which may be that of another engine.
        before = dispatch.choice()
        dispatch.use(self.kernels)
        try:
            with entering(self.ledger):
                yield
        finally:
            dispatch.use(before)
