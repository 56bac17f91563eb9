"""MPI collectives on NumPy and CuPy arrays, each entered in the ledger.

Functions carry the MPI verb's name and take the communicator first; arrays of devices are made
ready for them by `staging`. Reductions run in float32 (or integers): a sum in half precision would
depend on the number of ranks.

Bytes are counted as sent per rank by the ring algorithms, n being those of the whole array::

    Allgather (P-1) n_own · ReduceScatter n - n_own · Allreduce 2 n (P-1)/P · Bcast n at the root ·
    Alltoall n - n_own · Gather n_own except at the root · Shift n, if to another rank · Send n ·
    Recv 0 · Fetch_and_op 8, if on another rank

Calls whose names begin with I are started only, and return a `Transfer`.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
from mpi4py import MPI

from hpcinfer import array, capture, pieces
from hpcinfer.array import Array
from hpcinfer.ledger import axis_name, current
from hpcinfer.staging import (
    from_host,
    is_alone,
    out_buffer,
    recv_buffer,
    stage,
    to_host,
    unstage,
)
from hpcinfer.transfer import Transfer


class Reducer(Protocol):
    """What sums small arrays over a communicator by another way than MPI's."""

    def serves(self, x: Array) -> bool:
        """True, on every rank alike, if an array is summed here."""

    def sum(self, x: Array) -> None:
        """Sum x over the ranks, in place."""


_reducer = MPI.Comm.Create_keyval()


def use_reducer(comm: MPI.Comm, reducer: Reducer | None) -> None:
    """Let sums that a reducer serves go by it: `node_sum.NodeSum`, or `nccl.StreamSum` of ops.cuda.

    Parameters
    ----------
    reducer : None for sums by MPI
    """
    comm.Set_attr(_reducer, reducer)


def reducer_of(comm: MPI.Comm) -> Reducer | None:
    """What `use_reducer` gave a communicator, or None."""
    reducer: Any = comm.Get_attr(_reducer)
    return reducer


def Allreduce(comm: MPI.Comm, x: Array, op: MPI.Op = MPI.SUM, purpose: str = "") -> Array:
    """Reduce `x` over the ranks, in place; small sums in a node's window, if there is one.

    Parameters
    ----------
    x : any shape, float32, float64 or integers; equal shape on every rank
    op : MPI operation
    purpose : word for the ledger

    Returns
    -------
    x, now holding the reduction.

    Raises
    ------
    TypeError
        For 16-bit floating types, whose sums would depend on P.
    """
    if x.dtype.kind not in "fiub" or array.is_half(x.dtype):
        raise TypeError(f"Allreduce: got {x.dtype}, need float32, float64 or integers")

    # Find out whether the ranks of a node add it up in memory that they share.
    size = comm.size
    sent_bytes = 2 * x.nbytes * (size - 1) / size
    shared = reducer_of(comm) if op == MPI.SUM else None
    if shared is not None and not shared.serves(x):
        shared = None

    # Have the call made again with each replay of a captured step.
    if capture.under_way is not None:
        if size == 1 or shared is not None:
            capture.under_way.sum(("Allreduce", axis_name(comm), purpose), sent_bytes, shared)
        else:
            capture.under_way.pause(partial(Allreduce, comm, x, op, purpose))
        if capture.under_way.defers:
            if shared is not None:  # its stream notes it, as it does a kernel
                shared.sum(x)
            return x

    # Add up.
    ledger = current()
    call = ledger.begin("Allreduce", comm, purpose)
    if shared is not None:
        shared.sum(x)
    elif size > 1:
        buffer = to_host(x)
        pieces.allreduce(comm, buffer, op)
        from_host(buffer, x)
    ledger.enter(call, sent_bytes)
    return x


def Allgather(
    comm: MPI.Comm, x: Array, counts: Sequence[int] | None = None, axis: int = 0, purpose: str = ""
) -> Array:
    """Gather the ranks' parts of one axis, in rank order.

    Parameters
    ----------
    x : this rank's part; the ranks' shapes differ at most along `axis`
    counts : length of every rank's part along `axis`; None if all are equal
    axis : the cut axis

    Returns
    -------
    array of x's type whose `axis` has length sum(counts), equal on all ranks.
    """
    # Refuse parts that are not as the ranks have agreed on.
    xp = array.namespace(x)
    counts = [x.shape[axis]] * comm.size if counts is None else list(counts)
    if len(counts) != comm.size or counts[comm.rank] != x.shape[axis]:
        raise ValueError(
            f"Allgather: got {x.shape[axis]} items on rank {comm.rank}, need counts {counts}"
        )
    ledger = current()
    call = ledger.begin("Allgather", comm, purpose)
    if is_alone(comm, x):
        ledger.enter(call, 0)
        return xp.ascontiguousarray(x)

    # Move the cut axis to the front, so that each rank's part is one run of memory.
    part = to_host(xp.moveaxis(x, axis, 0))
    row = part.nbytes // part.shape[0] if part.shape[0] else array.item_bytes(part)
    whole = out_buffer(x, (sum(counts), *part.shape[1:]))
    pieces.allgatherv(comm, part, whole, [c * row for c in counts])

    # Move it back.
    result = xp.ascontiguousarray(xp.moveaxis(stage(whole, x), 0, axis))
    ledger.enter(call, part.nbytes * (comm.size - 1))
    return result


def ReduceScatter(
    comm: MPI.Comm, x_sum: Array, counts: Sequence[int], axis: int = 0, purpose: str = ""
) -> Array:
    """Sum `x_sum` over the ranks and keep this rank's part of one axis.

    Parameters
    ----------
    x_sum : partial sum, equal shape on every rank, float32 or float64
    counts : length of every rank's part along `axis`, adding up to its length
    axis : the axis that is cut

    Returns
    -------
    this rank's part of the sum: `axis` has length counts[rank].
    """
    # Refuse what would be summed in half precision, and parts that do not make up the whole.
    if x_sum.dtype.kind != "f" or array.is_half(x_sum.dtype):
        raise TypeError(f"ReduceScatter: got {x_sum.dtype}, need float32 or float64")
    if len(counts) != comm.size or sum(counts) != x_sum.shape[axis]:
        raise ValueError(f"ReduceScatter: got {x_sum.shape[axis]} items, need counts {counts}")
    xp, ledger = array.namespace(x_sum), current()
    call = ledger.begin("ReduceScatter", comm, purpose)
    if is_alone(comm, x_sum):
        ledger.enter(call, 0)
        return xp.ascontiguousarray(x_sum)

    # Move the cut axis to the front, so that what each rank keeps is one run of memory.
    whole = to_host(xp.moveaxis(x_sum, axis, 0))
    part = out_buffer(x_sum, (counts[comm.rank], *whole.shape[1:]))
    row = int(np.prod(whole.shape[1:], dtype=np.int64))
    pieces.reduce_scatter(comm, whole, part, [c * row for c in counts])
    result = xp.ascontiguousarray(xp.moveaxis(stage(part, x_sum), 0, axis))
    ledger.enter(call, whole.nbytes - part.nbytes)
    return result


def Bcast(comm: MPI.Comm, x: Array, root: int = 0, purpose: str = "") -> Array:
    """Copy `x` of rank `root` into `x` of every rank; returns x."""
    ledger = current()
    call = ledger.begin("Bcast", comm, purpose)
    if not is_alone(comm, x):
        buffer = to_host(x)
        pieces.bcast(comm, buffer, root)
        from_host(buffer, x)
    ledger.enter(call, x.nbytes if comm.rank == root and comm.size > 1 else 0)
    return x


def AllreduceRecords(comm: MPI.Comm, records: Array, op: MPI.Op, purpose: str = "") -> Array:
    """Reduce records over the ranks with an operation that needs each record whole, in place.

    MPI may split a message anywhere between two items of its datatype. A record travels as one item
    of a contiguous datatype, so that `op` never sees a part of one.

    Parameters
    ----------
    records : (..., n) float32; equal shape on every rank
    op : MPI operation on records of n float32, made by `record_op`
    purpose : word for the ledger

    Returns
    -------
    records, now holding the reduction.
    """
    if records.dtype != np.float32 or records.ndim < 1:
        raise TypeError(f"AllreduceRecords: got {records.dtype}, need records of float32")
    ledger = current()
    call = ledger.begin("AllreduceRecords", comm, purpose)

    # Let a record be one item of its own type.
    buffer = to_host(records, direct=False)
    width = buffer.shape[-1]
    record = MPI.FLOAT.Create_contiguous(width).Commit()
    try:
        pieces.allreduce(comm, buffer, op, max(1, width), record)
    finally:
        record.Free()

    # Hand back the reduction.
    from_host(buffer, records)
    ledger.enter(call, 2 * records.nbytes * (comm.size - 1) / comm.size)
    return records


def record_op(function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> MPI.Op:
    """MPI operation that reduces records by `function`; commutative, freed when Python exits.

    Parameters
    ----------
    function : function (a, b) -> c of float32 arrays (records, n), associative and commutative

    Returns
    -------
    MPI operation; make it once per process, MPI holds only so many
    """

    def reduce(given: Any, kept: Any, record: MPI.Datatype) -> None:
        shape = (-1, record.Get_extent()[1] // 4)
        a, b = (np.frombuffer(x, np.float32).reshape(shape) for x in (given, kept))
        b[...] = function(a, b)

    op = MPI.Op.Create(reduce, commute=True)
    atexit.register(op.Free)
    return op


def Alltoall(
    comm: MPI.Comm,
    x: Array,
    send_counts: Sequence[int],
    recv_counts: Sequence[int],
    purpose: str = "",
) -> Array:
    """Send every rank its own rows of `x`.

    Parameters
    ----------
    x : (sum of send_counts, ...), any type; the rows for rank 0 first
    send_counts : rows for every rank, 0 allowed
    recv_counts : rows from every rank: what that rank's send_counts say for this one

    Returns
    -------
    (sum of recv_counts, ...) of x's type, the rows from rank 0 first
    """
    # Refuse counts that are not of every rank, or not of all rows.
    if len(send_counts) != comm.size or len(recv_counts) != comm.size:
        raise ValueError(
            f"Alltoall: got {len(send_counts)} and {len(recv_counts)} counts, need {comm.size}"
        )
    if sum(send_counts) != len(x):
        raise ValueError(f"Alltoall: got {len(x)} rows, need send_counts {list(send_counts)}")
    ledger = current()
    call = ledger.begin("Alltoall", comm, purpose)
    if is_alone(comm, x):
        ledger.enter(call, 0)
        return array.namespace(x).ascontiguousarray(x)

    # Move the rows as runs of bytes, whatever their type.
    sent = to_host(x)
    row = array.item_bytes(sent)
    received = out_buffer(x, (sum(recv_counts), *sent.shape[1:]))
    pieces.alltoallv(comm, sent, received, send_counts, recv_counts, row)
    result = stage(received, x)
    ledger.enter(call, sent.nbytes - send_counts[comm.rank] * row)
    return result


def Gather(comm: MPI.Comm, x: Array, root: int = 0, purpose: str = "") -> Array | None:
    """Gather `x`, equal in shape on every rank, to rank `root`.

    Returns
    -------
    (P, *shape) of x's type on `root`, None elsewhere
    """
    ledger = current()
    call = ledger.begin("Gather", comm, purpose)
    part = to_host(x)
    whole = out_buffer(x, (comm.size, *part.shape)) if comm.rank == root else None
    pieces.gather(comm, part, whole, root)
    result = None if whole is None else stage(whole, x)
    ledger.enter(call, 0 if comm.rank == root else part.nbytes)
    return result


def Shift(comm: MPI.Comm, x: Array, out: Array, step: int = 1, purpose: str = "") -> Transfer:
    """Start sending `x` to rank + step and receiving into `out` from rank - step, round the ring.

    Parameters
    ----------
    x : any shape and type, contiguous; not to be written before the transfer ends
    out : contiguous, of the size that the sender sends; not to be used before the transfer ends
    step : how many ranks further
    purpose : word for the ledger

    Returns
    -------
    Transfer of `out`; `wait` must be called
    """
    call = current().begin("Shift", comm, purpose)
    to, source = (comm.rank + step) % comm.size, (comm.rank - step) % comm.size
    sent = to_host(x)
    received = recv_buffer(out)
    requests = pieces.irecv(comm, received, source) + pieces.isend(comm, sent, to)
    sent_bytes = 0 if to == comm.rank else sent.nbytes
    return Transfer(call, sent_bytes, requests, lambda: unstage(received, out), sent)


def Isend(comm: MPI.Comm, x: Array, to: int, tag: int = 0, purpose: str = "") -> Transfer:
    """Start sending `x` to rank `to` (of the other group, over an intercommunicator).

    Parameters
    ----------
    x : any shape and type; not to be written before the transfer ends
    to : rank
    tag : tells messages between the same ranks apart
    purpose : word for the ledger

    Returns
    -------
    Transfer of x; `wait` must be called, for example by `transfer.Outgoing`
    """
    call = current().begin("Send", comm, purpose)
    sent = to_host(x)
    return Transfer(call, sent.nbytes, pieces.isend(comm, sent, to, tag), lambda: x, sent)


def Recv(comm: MPI.Comm, out: Array, source: int, tag: int = 0, purpose: str = "") -> Array:
    """Receive into `out` what rank `source` sends; returns out.

    Parameters
    ----------
    out : contiguous, of the size that the sender sends
    """
    ledger = current()
    call = ledger.begin("Recv", comm, purpose)
    received = recv_buffer(out)
    MPI.Request.Waitall(pieces.irecv(comm, received, source, tag))
    unstage(received, out)
    ledger.enter(call, 0)
    return out


def RecvBytes(
    comm: MPI.Comm, source: int = MPI.ANY_SOURCE, tag: int = 0, purpose: str = ""
) -> np.ndarray:
    """Receive a message of any length.

    Returns
    -------
    (n,) uint8, host
    """
    ledger = current()
    call = ledger.begin("Recv", comm, purpose)
    received = pieces.recv_bytes(comm, source, tag)
    ledger.enter(call, 0)
    return received


def Iallgather(
    comm: MPI.Comm, part: Array, whole: Array, counts: Sequence[int], purpose: str = ""
) -> Transfer:
    """Start gathering the ranks' parts of one run of bytes.

    Parameters
    ----------
    part : (counts[rank],) uint8, this rank's; not to be written before the transfer ends
    whole : (sum(counts),) uint8, contiguous; not to be used before the transfer ends
    counts : bytes of every rank

    Returns
    -------
    Transfer of `whole`; `wait` must be called
    """
    call = current().begin("Allgather", comm, purpose)
    sent, received = to_host(part), recv_buffer(whole)
    requests = pieces.iallgatherv(comm, sent, received, counts)
    sent_bytes = sent.nbytes * (comm.size - 1)
    return Transfer(call, sent_bytes, requests, lambda: unstage(received, whole), sent)


def Ibcast(comm: MPI.Comm, x: Array, root: int = 0, purpose: str = "") -> Transfer:
    """Start copying `x` of rank `root` into `x` of every rank.

    Returns
    -------
    Transfer of x; `wait` must be called
    """
    call = current().begin("Bcast", comm, purpose)
    buffer = to_host(x) if comm.rank == root else recv_buffer(x)
    requests = pieces.ibcast(comm, buffer, root)
    sent_bytes = x.nbytes if comm.rank == root and comm.size > 1 else 0
    return Transfer(call, sent_bytes, requests, lambda: unstage(buffer, x), buffer)
