"""Pipeline parallelism: each rank has some of the layers, and micro-batches pass through the ranks.

    before   x of a micro-batch on the first rank; layers cut in P runs, some perhaps empty
    after    y of the micro-batch on the last rank, and what it chose on every rank
    cost     1 Send a micro-batch by every rank but the last: 4 T D bytes; to announce n bytes, P-1
             Send by the last rank: (P-1) n bytes
    source   Huang et al. 2018, GPipe (arXiv:1811.06965); Narayanan et al. 2021, section 2.2
             (arXiv:2104.04473)

A rank receives a micro-batch, computes its layers, sends it on without waiting, and turns to the
next one, so that up to P micro-batches are under way at a time. While the first fills the pipeline
and the last drains it, ranks are idle: of m equal micro-batches a share (P-1)/(m+P-1) of the time.
All micro-batches pass in one order, so messages need no names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from hpcinfer import collectives
from hpcinfer.array import Array
from hpcinfer.transfer import Outgoing

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

_FORWARD, _BACK = 1, 2  # tags: activations to the next stage, results to all


class Pipeline:
    """One rank's place in the pipeline.

    Parameters
    ----------
    comm : communicator whose ranks are the stages, in order

    Attributes
    ----------
    is_first, is_last : whether this rank begins, ends the pipeline; one rank does both
    """

    def __init__(self, comm: Comm, purpose: str = "pipeline"):
        self.comm, self.purpose = comm, purpose
        self.is_first, self.is_last = comm.rank == 0, comm.rank == comm.size - 1
        self._outgoing = Outgoing()

    def forward(self, x: Array, compute: Callable) -> Array | None:
        """One micro-batch through this rank's layers.

        Parameters
        ----------
        x : (T, D) float32; on the first rank the input, on the others a buffer for what arrives,
            new for every micro-batch, as without layers it is what travels on
        compute : function (T, D) -> (T, D), this rank's layers

        Returns
        -------
        what `compute` returned on the last rank, None elsewhere
        """
        # Receive, compute, and send on without waiting.
        if not self.is_first:
            x = collectives.Recv(self.comm, x, self.comm.rank - 1, _FORWARD, self.purpose)
        y = compute(x)
        if self.is_last:
            return y
        self._outgoing.add(
            collectives.Isend(self.comm, y, self.comm.rank + 1, _FORWARD, self.purpose)
        )
        return None

    def broadcast_result(self, result: np.ndarray) -> None:
        """Send what the last rank found in a micro-batch to all others, without waiting.

        Parameters
        ----------
        result : (n,) uint8, host
        """
        for rank in range(self.comm.size - 1):
            purpose = f"{self.purpose} result"
            self._outgoing.add(collectives.Isend(self.comm, result, rank, _BACK, purpose))

    def receive_result(self) -> np.ndarray:
        """What the last rank announced of the oldest micro-batch not heard of: (n,) uint8, host.

        Raises
        ------
        RuntimeError
            On the last rank, which would wait for itself.
        """
        last = self.comm.size - 1
        if self.is_last:
            raise RuntimeError(
                f"pipeline: got rank {last} to hear what it announced itself, need a rank before it"
            )
        return collectives.RecvBytes(self.comm, last, _BACK, f"{self.purpose} result")

    def test(self) -> None:
        """Let MPI move messages on."""
        self._outgoing.test()

    def wait(self) -> None:
        """Wait until all messages of this rank have left."""
        self._outgoing.wait()


def bubble_share(P: int, m: int) -> float:
    """Share of the time that ranks are idle with m equal micro-batches: (P-1)/(m+P-1)."""
    return (P - 1) / (m + P - 1)
