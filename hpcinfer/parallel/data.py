"""Data parallelism: replicas of the model share one queue and take from it what they can serve.

    before   n items, numbered, on every rank or readable by every rank
    after    each number was given to one rank
    cost     2 Fetch_and_op a block, 1 for a refusal: 8 bytes each, sent by the ranks other than the
             one with the counter; no rank waits for another
    source   Polychronopoulos and Kuck 1987, guided self-scheduling (IEEE Trans. Comput. C-36(12));
             fetch-and-add by one-sided communication: MPI 4.1, section 12.3.4

The next number is a counter in one rank's memory. A rank that has room reads it, adds to it what it
takes, and owns the numbers in between: whoever had short work comes back earlier and takes more.
Blocks shrink with what remains, so that large ones save calls and small ones let the ranks end
together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpcinfer import partition
from hpcinfer.transfer import Counter

if TYPE_CHECKING:
    from mpi4py.MPI import Comm


class Queue:
    """Numbers 0..n-1, each given once. Made and freed by all ranks of `comm` together.

    Parameters
    ----------
    comm : communicator of the ranks that take
    n : how many numbers there are, equal on every rank

    Attributes
    ----------
    remaining : numbers that were not given when this rank asked last

    Raises
    ------
    ValueError
        If `n` is negative.
    """

    def __init__(self, comm: Comm, n: int):
        if n < 0:
            raise ValueError(f"data: got a queue of {n} items, need 0 or more")
        self.comm, self.n, self.remaining = comm, n, n
        self._counter = Counter(comm)

    def take(self, most: int, held: int = 0) -> tuple[int, int]:
        """Take the next block of numbers.

        Parameters
        ----------
        most : numbers that this rank takes at most
        held : numbers that it still works on, which count as part of its share

        Returns
        -------
        (start, stop) : the block; empty if nothing remains, or this rank has its share already
        """
        given = min(self._counter.add(0, "data"), self.n)
        self.remaining = self.n - given
        n = min(most, partition.guided(self.remaining + held, self.comm.size) - held)
        if n <= 0:
            return given, given

        # Others may have taken in between: the block begins where the last of them ended.
        start = self._counter.add(n, "data")
        start, stop = min(start, self.n), min(start + n, self.n)
        self.remaining = self.n - stop
        return start, stop

    def free(self) -> None:
        """End the queue; every rank must call this."""
        self._counter.free()
