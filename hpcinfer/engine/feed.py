"""Requests on their way from the one rank that reads them to all ranks, block by block."""

from itertools import islice

from hpcinfer.grid import agree

BLOCK = 64


class Feed:
    """A stream of requests, read on the root and handed to every rank.

    Parameters
    ----------
    comm : communicator of all ranks
    items : iterator on the root, ignored elsewhere

    Attributes
    ----------
    done : True when the stream has ended
    """

    def __init__(self, comm, items):
        self.comm, self.done = comm, False
        self._items = iter(items) if comm.rank == 0 else None

    def take(self):
        """The next block of requests, equal on every rank; empty at the end.

        Raises
        ------
        Exception
            On every rank, what reading raised on the root.
        """
        block = agree(self.comm, lambda: list(islice(self._items, BLOCK)))
        self.done = len(block) < BLOCK
        return block
