"""`cupy.cuda.nccl`: sums over processes in the order of a stream, which MPI makes.

Communicators are made by all processes of the job at a time, each of one of them.
"""

import ctypes
import os

import numpy as np

from cupy import _segments, _streams

available = True
NCCL_FLOAT32, NCCL_FLOAT64, NCCL_SUM = 7, 8, 0
_TYPES = {NCCL_FLOAT32: np.float32, NCCL_FLOAT64: np.float64}


class NcclError(RuntimeError):
    """An error of NCCL."""


def get_unique_id():
    """A number that no other communicator has, as a tuple of bytes."""
    return tuple(int(b) - 128 for b in os.urandom(128))


class _Numbers:
    """Numbers in memory of the device."""

    def __init__(self, address, n, dtype):
        self._address, self._nbytes = address, n * np.dtype(dtype).itemsize
        self.dtype = dtype

    @property
    def values(self):
        raw = (ctypes.c_ubyte * self._nbytes).from_address(self._address)
        return np.frombuffer(raw, self.dtype)

    def _chunk(self):
        return _segments.chunk_at(self._address)

    def _span(self):
        return _segments.span_at(self._address, self._nbytes)


class NcclCommunicator:
    """Processes that sum together."""

    def __init__(self, ndev, commId, rank):
        from mpi4py import MPI

        color = int.from_bytes(bytes(b + 128 for b in commId[:3]), "little")
        self._comm = MPI.COMM_WORLD.Split(color, rank)
        if (self._comm.size, self._comm.rank) != (ndev, rank):
            raise NcclError(f"NCCL_ERROR_INVALID_ARGUMENT: {self._comm.size} of {ndev} came")

    def allReduce(self, sendbuf, recvbuf, count, datatype, op, stream):
        """Sum over the processes, on a stream."""
        if op != NCCL_SUM or datatype not in _TYPES:
            raise NotImplementedError("stand-in: NCCL sums of float32 and float64 are written")
        sent, received = (_Numbers(x, count, _TYPES[datatype]) for x in (sendbuf, recvbuf))

        def reduce():
            values = sent.values.copy()
            self._comm.Allreduce(values.copy(), values)
            received.values[...] = values

        with _streams.Stream._of(stream):
            _streams.submit("allReduce", reduce, [sent], [received])
