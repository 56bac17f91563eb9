"""Records of finished requests, and snapshots, on their way to the one rank that writes them."""

import pickle
import time

import numpy as np

from hpcinfer import collectives
from hpcinfer.transfer import Outgoing

_TAG, _POLL_S = 11, 0.002


class Outbox:
    """What the leader of a replica sends to the root, and the root writes. Nobody waits for it.

    Parameters
    ----------
    grid : Grid
    write : function of what was put, called on the root only
    """

    def __init__(self, grid, write):
        self._grid, self._write = grid, write
        self._outgoing = Outgoing()
        self._open = grid.layout.dp - 1

    def put(self, *message):
        """Hand on a message; counts on the leader of a replica alone."""
        if self._grid.is_root:
            self._write(*message)
        elif self._grid.is_leader:
            self._send(pickle.dumps(message))

    def poll(self):
        """Write what has come from other replicas meanwhile, and let MPI move messages on."""
        self._outgoing.test()
        while self._grid.is_root and self._grid.comm.iprobe(tag=_TAG):
            message = collectives.RecvBytes(self._grid.comm, tag=_TAG, purpose="results")
            if len(message):
                self._write(*pickle.loads(message.tobytes()))
            else:
                self._open -= 1

    def close(self):
        """On the root wait for the last message of every replica; elsewhere until all have left."""
        if self._grid.is_leader and not self._grid.is_root:
            self._send(b"")
        while self._grid.is_root and self._open:
            self.poll()
            time.sleep(_POLL_S)
        self._outgoing.wait()

    def _send(self, message):
        x = np.frombuffer(message, np.uint8)
        self._outgoing.add(collectives.Isend(self._grid.comm, x, 0, _TAG, "results"))
