"""Messages of any length: what has PIECE bytes or more goes in pieces.

Many MPI libraries count the bytes of a message in 32 bits, in their interface or behind it, and
fail at 2 GiB. A piece of PIECE bytes is followed by another one, the last is shorter (or empty): a
receiver that does not know the length finds the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mpi4py import MPI

from hpcinfer import array
from hpcinfer.array import Array
from hpcinfer.staging import out_buffer, raw, starts

PIECE = 1 << 30

# Bytes from which ranks add up a ReduceScatter themselves: Open MPI takes twice as long, and more.
_LARGEST_SUM = 1 << 18 if MPI.get_vendor()[0] == "Open MPI" else PIECE

# Of the messages that stand for a collective call; those of `collectives.Isend` count from 0.
_TAG = 32767


def cut(x: Array) -> list[Array]:
    """The bytes of a contiguous array in pieces, as views: all of PIECE bytes but the last."""
    flat = raw(x)
    return [flat[i : i + PIECE] for i in range(0, len(flat) + 1, PIECE)]


def isend(comm: MPI.Comm, x: Array, to: int, tag: int = 0) -> list[MPI.Request]:
    """Start sending a contiguous array."""
    return [comm.Isend([piece, MPI.BYTE], to, tag) for piece in cut(x)]


def irecv(comm: MPI.Comm, x: Array, source: int, tag: int = 0) -> list[MPI.Request]:
    """Start receiving into a contiguous array of the size that is sent."""
    return [comm.Irecv([piece, MPI.BYTE], source, tag) for piece in cut(x)]


def recv_bytes(comm: MPI.Comm, source: int, tag: int) -> np.ndarray:
    """Receive a message of any length: (n,) uint8, host."""
    pieces: list[np.ndarray] = []
    status = MPI.Status()
    while not pieces or len(pieces[-1]) == PIECE:
        message = comm.Mprobe(source, tag, status)
        source, tag = status.Get_source(), status.Get_tag()
        pieces.append(np.empty(status.Get_count(MPI.BYTE), np.uint8))
        message.Recv([pieces[-1], MPI.BYTE])
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def bcast(comm: MPI.Comm, x: Array, root: int) -> None:
    """Copy a contiguous array of `root` to all ranks."""
    for piece in cut(x):
        comm.Bcast(piece, root)


def ibcast(comm: MPI.Comm, x: Array, root: int) -> list[MPI.Request]:
    """Start copying a contiguous array of `root` to all ranks."""
    return [comm.Ibcast(piece, root) for piece in cut(x)]


def allreduce(
    comm: MPI.Comm, x: Array, op: MPI.Op, width: int = 1, kind: MPI.Datatype | None = None
) -> None:
    """Reduce a contiguous array in place.

    Parameters
    ----------
    width : numbers that belong together, by which `x` can be cut
    kind : MPI's type of so many; None for that of one number
    """
    flat, step = x.reshape(-1), max(1, PIECE // (width * x.itemsize)) * width
    for i in range(0, max(1, len(flat)), step):
        piece = flat[i : i + step]
        comm.Allreduce(MPI.IN_PLACE, [piece, len(piece) // width, kind] if kind else piece, op)


def allgatherv(comm: MPI.Comm, part: Array, whole: Array, sizes: Sequence[int]) -> None:
    """Gather contiguous parts of so many bytes, end to end, on all ranks."""
    if sum(sizes) < PIECE:
        comm.Allgatherv(raw(part), [raw(whole), sizes, starts(sizes), MPI.BYTE])
        return
    slots = _slots(part, whole, sizes, comm.rank)

    # Pass on, round the ring, what has come last.
    to, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    for step in range(comm.size - 1):
        given, taken = (slots[(comm.rank - step - i) % comm.size] for i in (0, 1))
        requests = irecv(comm, taken, source, _TAG) + isend(comm, given, to, _TAG)
        MPI.Request.Waitall(requests)


def iallgatherv(
    comm: MPI.Comm, part: Array, whole: Array, sizes: Sequence[int]
) -> list[MPI.Request]:
    """Start gathering contiguous parts of so many bytes, end to end, on all ranks."""
    if sum(sizes) < PIECE:
        taken = [raw(whole), sizes, starts(sizes), MPI.BYTE]
        return [comm.Iallgatherv([raw(part), MPI.BYTE], taken)]
    slots = _slots(part, whole, sizes, comm.rank)
    return [request for root, slot in enumerate(slots) for request in ibcast(comm, slot, root)]


def gather(comm: MPI.Comm, part: Array, whole: Array | None, root: int) -> None:
    """Gather parts of equal size on rank `root`, which alone has a `whole`."""
    if part.nbytes * comm.size < PIECE:
        comm.Gather(raw(part), None if whole is None else raw(whole), root)
    elif whole is None:
        MPI.Request.Waitall(isend(comm, part, root, _TAG))
    else:
        slots = _slots(part, whole, [part.nbytes] * comm.size, root)
        others = [rank for rank in range(comm.size) if rank != root]
        MPI.Request.Waitall([q for r in others for q in irecv(comm, slots[r], r, _TAG)])


def alltoallv(
    comm: MPI.Comm,
    sent: Array,
    received: Array,
    counts: Sequence[int],
    from_counts: Sequence[int],
    row: int,
) -> None:
    """Send every rank its rows.

    Each rank counts bytes or rows, by what it has itself: MPI matches the bytes alone.

    Parameters
    ----------
    sent, received : contiguous rows for rank 0, or from it, first
    counts, from_counts : rows for every rank, and from it
    row : bytes of a row
    """
    if max(sent.nbytes, received.nbytes) < PIECE:
        counts, from_counts = ([c * row for c in rows] for rows in (counts, from_counts))
        row = 1
    item = MPI.BYTE if row == 1 else MPI.BYTE.Create_contiguous(row).Commit()
    try:
        comm.Alltoallv(
            [raw(sent), counts, starts(counts), item],
            [raw(received), from_counts, starts(from_counts), item],
        )
    finally:
        if row > 1:
            item.Free()


def reduce_scatter(comm: MPI.Comm, whole: Array, part: Array, counts: Sequence[int]) -> None:
    """Sum `whole`, contiguous, over the ranks, and keep so many numbers of it on each in `part`."""
    if whole.nbytes < _LARGEST_SUM:
        comm.Reduce_scatter(whole, part, counts)
        return

    # Let every rank have what the others have of its part, and add it up.
    parts = out_buffer(whole, (comm.size, part.size))
    own = [part.size] * comm.size
    alltoallv(comm, whole, parts, counts, own, whole.itemsize)
    array.namespace(parts).sum(parts, axis=0, out=part.reshape(-1))


def _slots(part: Array, whole: Array, sizes: Sequence[int], own: int) -> list[Array]:
    """Where the parts go in the bytes of `whole`, this rank's one having been put there."""
    flat = raw(whole)
    slots = [flat[i : i + n] for i, n in zip(starts(sizes), sizes, strict=True)]
    slots[own][...] = raw(part)
    array.synchronize(flat)
    return slots
