"""Sums over the GPUs of some ranks, in the order of each rank's stream, by NCCL.

The host starts a sum and goes on, as with a kernel; a captured step has it in its graph.
"""

from __future__ import annotations

import numpy as np

from hpcinfer import array
from hpcinfer.array import Array


def missing() -> str | None:
    """Why NCCL cannot be used; None if it can."""
    try:
        from cupy.cuda import nccl
    except ImportError as error:
        return str(error)
    return None if nccl.available else "CuPy was built without NCCL"


def unique_id() -> tuple:
    """What all ranks of a communicator must be told by one of them."""
    from cupy.cuda import nccl

    return nccl.get_unique_id()


class StreamSum:
    """Allreduce of device arrays over some ranks, each with a GPU of its own.

    Collective over those ranks when made.

    Parameters
    ----------
    ranks, rank : number of ranks, and which one this is
    known : what `unique_id` gave on one of them
    """

    def __init__(self, ranks, rank, known):
        from cupy.cuda import nccl

        self._comm = nccl.NcclCommunicator(ranks, known, rank)
        self._types = {"float32": nccl.NCCL_FLOAT32, "float64": nccl.NCCL_FLOAT64}
        self._sum = nccl.NCCL_SUM

    def serves(self, x: Array) -> bool:
        """True, on every rank alike, if an array is summed here."""
        on_device = array.namespace(x) is not np
        return on_device and x.dtype.name in self._types and x.flags.c_contiguous and x.size > 0

    def sum(self, x: Array) -> None:
        """Start summing x over the ranks, in place."""
        from cupy.cuda import get_current_stream

        place, kind = x.data.ptr, self._types[x.dtype.name]
        self._comm.allReduce(place, place, x.size, kind, self._sum, get_current_stream().ptr)
