"""Cores for the ranks of a node, and advice where there are too few: they run, but slowly."""

from __future__ import annotations

import socket
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hpcinfer import array, collectives, node, staging
from hpcinfer.array import Device
from hpcinfer.collectives import Reducer
from hpcinfer.grid import Grid, agree_all
from hpcinfer.heartbeat import waiting
from hpcinfer.node_sum import open_node_sums
from hpcinfer.ops import dispatch
from hpcinfer.stream_sum import open_stream_sums

if TYPE_CHECKING:
    from mpi4py.MPI import Comm


def take_threads(on_node: Comm) -> int:
    """Give this rank's numerical libraries its share of the node's cores, unless the user has.

    Collective over `on_node`.

    Returns
    -------
    number of threads
    """
    threads = node.threads_per_rank()
    with waiting("allgather", on_node, "threads"):
        of_ranks = on_node.allgather(node.cores())
    if threads is None:
        sharing = sum(bool(node.cores() & cores) for cores in of_ranks)
        n_cores = min(len(node.cores()), node.core_quota() or len(node.cores()))
        threads = max(1, n_cores // sharing)
    node.use_threads(threads)
    return threads


def take_device(comm: Comm, on_node: Comm, choice: str) -> tuple[Device, bool]:
    """The device of this rank, of whose memory it takes no more than its share.

    Collective over both communicators.

    Parameters
    ----------
    comm : communicator of all ranks
    on_node : of those that share memory with this one
    choice : "cpu", "cuda" or "auto"

    Returns
    -------
    device : Device
    direct : True if MPI reads and writes its memory

    Raises
    ------
    ValueError
        On every rank, if one has no such device.
    """
    # Share a GPU with the other ranks that have it.
    device = agree_all(comm, array.select_device, choice, on_node.rank)
    with waiting("allgather", on_node, "device"):
        identities = on_node.allgather(device.identity)
    device.share(identities.count(device.identity))

    # Let MPI read its memory where that works.
    said = device.name == "cuda" and array.mpi_reads_device_memory()
    with waiting("allreduce", comm, "device"):
        direct = staging.use_device_memory(comm, device.xp, said)
    return device, direct


def take_sums(grid: Grid, device: Device) -> list[tuple[Comm, Reducer | None]]:
    """Let sums over the ranks of a node go through common memory, those of GPUs by NCCL if asked.

    Collective over the grid's communicators.

    Returns
    -------
    list of (communicator, reducer), which are in use from now on

    Raises
    ------
    ValueError, RuntimeError
        On every rank, if NCCL is asked for and cannot be used.
    """
    # Begin without what another engine has on these communicators.
    comms = grid.tp, grid.tp_cp
    for comm in comms:
        collectives.use_reducer(comm, None)

    # Open the sums of CPUs, or those that the user has asked for.
    if device.name == "cpu":
        open_node_sums(comms, grid.node, *_node_sum_kernels())
        return [(comm, collectives.reducer_of(comm)) for comm in comms]

    # Sum by NCCL where any rank asks for it.
    with waiting("allreduce", grid.comm, "nccl"):
        wanted = grid.comm.allreduce(array.nccl_is_wanted())
    if wanted:
        from hpcinfer.ops.cuda.runtime import nccl

        open_stream_sums(grid.comm, comms, socket.gethostname(), device, nccl)
    return [(comm, collectives.reducer_of(comm)) for comm in comms]


def _node_sum_kernels() -> tuple[ModuleType, Any] | tuple[None, None]:
    """Compiled sums over the ranks of a node and how they are called; None, None without."""
    if dispatch.chosen("numpy") is None:
        return None, None
    from hpcinfer.ops.cpu.runtime import launch, node_sum

    return node_sum, launch.call


def spread_advice(grid: Grid) -> str | None:
    """What to do about ranks of tp on several nodes that one node could hold; on every rank.

    Collective over the grid's communicators.
    """
    # Number the nodes by their first ranks, and see who is where.
    with waiting("allgather", grid.comm, "nodes"):
        of_ranks = grid.comm.allgather(grid.node.bcast(grid.comm.rank))
        apart = max(grid.comm.allgather(len(set(grid.tp.allgather(of_ranks[grid.comm.rank])))))
    size = max(of_ranks.count(first) for first in set(of_ranks))
    if apart == 1 or size < grid.tp.size or node.oversubscription_is_meant():
        return None
    return (
        f"advice: got the {grid.tp.size} ranks of tp on {apart} nodes, need them on one to be "
        f"fast, where {size} ranks run; place ranks in blocks (srun -m block), or choose a tp that "
        f"divides {size}"
    )


def advice(on_node: Comm, device: Device) -> str | None:
    """What to do about too many ranks, or threads, on the node of rank 0; on every rank.

    Collective over `on_node`.

    Parameters
    ----------
    on_node : communicator of the ranks that share a node
    device : Device of this rank

    Returns
    -------
    str, one line, or None if there is nothing to say or the user wants to hear nothing
    """
    # Gather what each rank of the node may use.
    threads = node.threads_per_rank()
    with waiting("allgather", on_node, "oversubscription"):
        of_ranks = on_node.allgather((node.cores(), device.identity, threads))
    if node.oversubscription_is_meant():
        return None
    cores, gpus = set().union(*(c for c, _, _ in of_ranks)), {gpu for _, gpu, _ in of_ranks}
    n_cores, ranks = min(len(cores), node.core_quota() or len(cores)), on_node.size
    n_threads = sum(threads or 1 for _, _, threads in of_ranks)

    # Compare it with what there is.
    if gpus != {None} and ranks > len(gpus):
        return (
            f"advice: got {ranks} ranks on {len(gpus)} GPUs of a node, need a GPU for each rank to "
            f"be fast; start {len(gpus)} ranks per node"
        )
    if ranks > n_cores:
        return (
            f"advice: got {ranks} ranks on {n_cores} cores of a node, need a core or more for each "
            f"to be fast; start {n_cores} ranks or fewer, or ask for more cores"
        )
    if gpus == {None} and ranks > 1 and n_threads > n_cores:
        return (
            f"advice: got {n_threads} threads of {ranks} ranks on {n_cores} cores of a node, need "
            f"no more than cores to be fast; set OMP_NUM_THREADS={n_cores // ranks}"
        )
    return None
