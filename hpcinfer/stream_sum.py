"""Allreduce of ranks that have a GPU each, in the order of their streams, by NCCL.

    before   x on every rank, on its GPU
    after    their sum on every rank
    cost     2 (P-1)/P n words sent by each rank, as by MPI; the host waits for none of them
    source   NVIDIA's NCCL (docs.nvidia.com/deeplearning/nccl), by `cupy.cuda.nccl`

`collectives.Allreduce` takes this way where the user has asked for it. The library's calls are in
`ops.cuda.runtime.nccl`; a sum takes its turn as kernels do, and is in the graph of a captured step.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np
from mpi4py import MPI

from hpcinfer import array, collectives
from hpcinfer.array import Device
from hpcinfer.collectives import Reducer
from hpcinfer.errors import agreed
from hpcinfer.heartbeat import waiting

_REMEDY = "unset HPCINFER_NCCL, and messages go by MPI"


def open_stream_sums(
    everyone: MPI.Comm, comms: Sequence[MPI.Comm], host: str, device: Device, nccl: ModuleType
) -> None:
    """Let communicators of ranks that have a GPU each sum by NCCL; every rank calls this.

    Parameters
    ----------
    everyone : communicator of all ranks
    comms : communicators of this rank
    host : name of the node
    device : Device of this rank
    nccl : the library's calls, `ops.cuda.runtime.nccl`

    Raises
    ------
    ValueError, RuntimeError
        On every rank, where NCCL cannot be used, or sums wrongly.
    """
    # Refuse before the first message, on facts that every rank knows.
    with waiting("allgather", everyone, "nccl"):
        of_ranks = everyone.allgather((nccl.missing(), (host, device.identity)))
    reasons = [reason for reason, _ in of_ranks if reason is not None]
    if len({place for _, place in of_ranks}) < everyone.size:
        reasons.append("ranks that have one GPU together")
    if reasons:
        raise agreed(ValueError(f"NCCL: got {reasons[0]}, need a GPU for each rank; {_REMEDY}"))

    # What is to be trusted has summed rightly once.
    right = True
    for comm in (comm for comm in comms if comm.size > 1):
        with waiting("bcast", comm, "nccl"):
            known = comm.bcast(nccl.unique_id() if comm.rank == 0 else None)
        sums = nccl.StreamSum(comm.size, comm.rank, known)
        right &= _sums_rightly(sums, comm, device)
        collectives.use_reducer(comm, sums)
    with waiting("allreduce", everyone, "nccl"):
        right = everyone.allreduce(right, MPI.MIN)
    if not right:
        raise agreed(RuntimeError(f"NCCL: got wrong sums, need right ones; {_REMEDY}"))


def _sums_rightly(sums: Reducer, comm: MPI.Comm, device: Device) -> bool:
    """True if arrays of two sizes are summed as they must be."""
    right = True
    for n in (3, 1 << 18):
        x = device.put(np.arange(n, dtype=np.float32) + np.float32(comm.rank))
        sums.sum(x)
        wanted = np.arange(n, dtype=np.float32) * comm.size + sum(range(comm.size))
        right &= bool(np.allclose(array.host(x), wanted))
    return right
