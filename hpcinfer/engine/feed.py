"""Requests on their way from the input to the ranks of the replica that answers them.

The leader of every replica reads the whole input, so that a request is known by what stands before
it wherever it is answered, and keeps those that the replicas' common queue gives it.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from hpcinfer import partition
from hpcinfer.grid import Grid, agree
from hpcinfer.parallel.data import Queue
from hpcinfer.requests.request import BadRequest, Request

BLOCK = 64


class Feed:
    """A stream of requests, handed to every rank of a replica; closed as a context manager.

    Parameters
    ----------
    grid : Grid
    items : all requests, on the leader of every replica; ignored elsewhere
    n : how many items there are, equal on every rank

    Attributes
    ----------
    done : True when every item was given to some replica
    """

    def __init__(self, grid: Grid, items: Iterable[Request | BadRequest] | None, n: int):
        self._grid, self._remaining, self._read = grid, n, 0
        self._items = iter(items) if grid.is_leader else None
        self._queue = Queue(grid.dp, n) if grid.is_leader else None

    @property
    def done(self) -> bool:
        return self._remaining == 0

    def wants(self, waiting: int, held: int, most: int) -> bool:
        """True if this replica should take more: it has room, and less than its share.

        Parameters
        ----------
        waiting, held : sequences that wait, that wait or run
        most : sequences that may wait
        """
        share = partition.guided(self._remaining + held, self._grid.layout.dp)
        return not self.done and waiting < most and held < share

    def take(self, held: int = 0) -> list[Request | BadRequest]:
        """The next block of requests, equal on every rank of the replica; empty if others have all.

        Parameters
        ----------
        held : sequences that wait or run here, which count as part of this replica's share

        Raises
        ------
        Exception
            On every rank of the replica, what reading raised on its leader.
        """
        try:
            block, self._remaining = agree(self._grid.replica, self._take, held)
        except BaseException as error:
            # Other replicas know nothing of it; its leader alone reports it.
            error.agreed = self._grid.replica.size == self._grid.comm.size
            error.reported = not self._grid.is_leader
            raise
        return block

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, kind: type | None, *details) -> None:
        """End the stream, unless an error has kept other replicas from coming here."""
        if self._queue is not None and (kind is None or self._grid.layout.dp == 1):
            self._queue.free()

    def _take(self, held: int) -> tuple[list[Request | BadRequest], int]:
        """The next block, on the leader, and how many requests remain for all replicas."""
        start, stop = self._queue.take(BLOCK, held)
        block = list(islice(self._items, start - self._read, stop - self._read))
        self._read = max(self._read, stop)
        return block, self._queue.remaining
