"""MPI collectives on NumPy and CuPy arrays, each entered in the ledger.

Functions carry the MPI verb's name and take the communicator first. Device arrays are made ready
(stream synchronised), contiguous, and staged through page-locked host memory unless MPI was found
to read device memory. Reductions run in float32 (or integers): a sum in half precision would depend
on the number of ranks.

Bytes are counted as sent per rank by the ring algorithms, n being the bytes of the whole array::

    Allgather (P-1) n_own · ReduceScatter n - n_own · Allreduce 2 n (P-1)/P · Bcast n at the root ·
    Alltoall n - n_own · Gather n_own except at the root · Shift n, if to another rank · Send n ·
    Recv 0 · Fetch_and_op 8, if on another rank

Calls whose names begin with I are started only, and return a `Transfer`.
"""

import atexit
import time
from functools import partial

import numpy as np
from mpi4py import MPI

from hpcinfer import array, capture
from hpcinfer.heartbeat import here
from hpcinfer.ledger import axis_name, current

_reducer = MPI.Comm.Create_keyval()


def use_reducer(comm, reducer):
    """Let small sums over a communicator go through memory that its ranks share.

    Parameters
    ----------
    reducer : `node_sum.NodeSum`, or what has its `serves` and `sum`, such as
        `ops.cuda.runtime.nccl.StreamSum`; None for sums by MPI
    """
    comm.Set_attr(_reducer, reducer)


def reducer_of(comm):
    """What `use_reducer` gave a communicator, or None."""
    return comm.Get_attr(_reducer)


def Allreduce(comm, x, op=MPI.SUM, purpose=""):
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
    call = current().begin("Allreduce", comm, purpose)
    if shared is not None:
        shared.sum(x)
    elif size > 1:
        buffer = _to_host(x)
        comm.Allreduce(MPI.IN_PLACE, buffer, op)
        _from_host(buffer, x)
    current().enter(call, sent_bytes)
    return x


def Allgather(comm, x, counts=None, axis=0, purpose=""):
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
    xp = array.namespace(x)
    counts = [x.shape[axis]] * comm.size if counts is None else list(counts)
    if len(counts) != comm.size or counts[comm.rank] != x.shape[axis]:
        raise ValueError(
            f"Allgather: got {x.shape[axis]} items on rank {comm.rank}, need counts {counts}"
        )
    call = current().begin("Allgather", comm, purpose)
    if _is_alone(comm, x):
        current().enter(call, 0)
        return xp.ascontiguousarray(x)

    # Move the cut axis to the front, so that each rank's part is one run of memory.
    part = _to_host(xp.moveaxis(x, axis, 0))
    row = part.nbytes // part.shape[0] if part.shape[0] else _row_bytes(part)
    whole = _out_buffer(x, (sum(counts), *part.shape[1:]))
    sizes = [c * row for c in counts]
    comm.Allgatherv(_raw(part), [_raw(whole), sizes, _starts(sizes), MPI.BYTE])

    result = xp.ascontiguousarray(xp.moveaxis(_stage(whole, x), 0, axis))
    current().enter(call, part.nbytes * (comm.size - 1))
    return result


def ReduceScatter(comm, x_sum, counts, axis=0, purpose=""):
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
    if x_sum.dtype.kind != "f" or array.is_half(x_sum.dtype):
        raise TypeError(f"ReduceScatter: got {x_sum.dtype}, need float32 or float64")
    if len(counts) != comm.size or sum(counts) != x_sum.shape[axis]:
        raise ValueError(f"ReduceScatter: got {x_sum.shape[axis]} items, need counts {counts}")
    xp = array.namespace(x_sum)
    call = current().begin("ReduceScatter", comm, purpose)
    if _is_alone(comm, x_sum):
        current().enter(call, 0)
        return xp.ascontiguousarray(x_sum)
    whole = _to_host(xp.moveaxis(x_sum, axis, 0))
    part = _out_buffer(x_sum, (counts[comm.rank], *whole.shape[1:]))
    row = int(np.prod(whole.shape[1:], dtype=np.int64))
    comm.Reduce_scatter(whole, part, [c * row for c in counts])
    result = xp.ascontiguousarray(xp.moveaxis(_stage(part, x_sum), 0, axis))
    current().enter(call, whole.nbytes - part.nbytes)
    return result


def Bcast(comm, x, root=0, purpose=""):
    """Copy `x` of rank `root` into `x` of every rank; returns x."""
    call = current().begin("Bcast", comm, purpose)
    if not _is_alone(comm, x):
        buffer = _to_host(x)
        comm.Bcast(_raw(buffer), root)
        _from_host(buffer, x)
    sent_bytes = x.nbytes if comm.rank == root and comm.size > 1 else 0
    current().enter(call, sent_bytes)
    return x


def AllreduceRecords(comm, records, op, purpose=""):
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
    call = current().begin("AllreduceRecords", comm, purpose)
    buffer = _to_host(records, direct=False)
    width = buffer.shape[-1]
    record = MPI.FLOAT.Create_contiguous(width).Commit()
    try:
        comm.Allreduce(MPI.IN_PLACE, [buffer, buffer.size // max(1, width), record], op)
    finally:
        record.Free()
    _from_host(buffer, records)
    sent_bytes = 2 * records.nbytes * (comm.size - 1) / comm.size
    current().enter(call, sent_bytes)
    return records


def record_op(function):
    """MPI operation that reduces records by `function`; commutative, freed when Python exits.

    Parameters
    ----------
    function : function (a, b) -> c of float32 arrays (records, n), associative and commutative

    Returns
    -------
    MPI operation; make it once per process, MPI holds only so many
    """

    def reduce(a, b, record):
        shape = (-1, record.Get_extent()[1] // 4)
        a, b = (np.frombuffer(x, np.float32).reshape(shape) for x in (a, b))
        b[...] = function(a, b)

    op = MPI.Op.Create(reduce, commute=True)
    atexit.register(op.Free)
    return op


def Alltoall(comm, x, send_counts, recv_counts, purpose=""):
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
    # Refuse counts that do not fit, before the first message.
    if len(send_counts) != comm.size or len(recv_counts) != comm.size:
        raise ValueError(
            f"Alltoall: got {len(send_counts)} and {len(recv_counts)} counts, need {comm.size}"
        )
    if sum(send_counts) != len(x):
        raise ValueError(f"Alltoall: got {len(x)} rows, need send_counts {list(send_counts)}")

    # Send each rank its rows, as bytes.
    call = current().begin("Alltoall", comm, purpose)
    if _is_alone(comm, x):
        current().enter(call, 0)
        return array.namespace(x).ascontiguousarray(x)
    sent = _to_host(x)
    row = _row_bytes(sent)
    received = _out_buffer(x, (sum(recv_counts), *sent.shape[1:]))
    sizes, from_sizes = ([c * row for c in counts] for counts in (send_counts, recv_counts))
    comm.Alltoallv(
        [_raw(sent), sizes, _starts(sizes), MPI.BYTE],
        [_raw(received), from_sizes, _starts(from_sizes), MPI.BYTE],
    )
    result = _stage(received, x)
    current().enter(call, sum(sizes) - sizes[comm.rank])
    return result


def Gather(comm, x, root=0, purpose=""):
    """Gather `x`, equal in shape on every rank, to rank `root`.

    Returns
    -------
    (P, *shape) of x's type on `root`, None elsewhere
    """
    call = current().begin("Gather", comm, purpose)
    part = _to_host(x)
    whole = _out_buffer(x, (comm.size, *part.shape)) if comm.rank == root else None
    comm.Gather(_raw(part), None if whole is None else _raw(whole), root)
    result = None if whole is None else _stage(whole, x)
    current().enter(call, 0 if comm.rank == root else part.nbytes)
    return result


def Shift(comm, x, out, step=1, purpose=""):
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
    sent = _to_host(x)
    received = _recv_buffer(out)
    requests = [
        comm.Irecv([_raw(received), MPI.BYTE], source),
        comm.Isend([_raw(sent), MPI.BYTE], to),
    ]
    sent_bytes = 0 if to == comm.rank else sent.nbytes
    return Transfer(call, sent_bytes, requests, lambda: _unstage(received, out), sent)


def Isend(comm, x, to, tag=0, purpose=""):
    """Start sending `x` to rank `to` (of the other group, over an intercommunicator).

    Parameters
    ----------
    x : any shape and type; not to be written before the transfer ends
    to : rank
    tag : tells messages between the same ranks apart
    purpose : word for the ledger

    Returns
    -------
    Transfer of x; `wait` must be called, for example by `Outgoing`
    """
    call = current().begin("Send", comm, purpose)
    sent = _to_host(x)
    requests = [comm.Isend([_raw(sent), MPI.BYTE], to, tag)]
    return Transfer(call, sent.nbytes, requests, lambda: x, sent)


def Recv(comm, out, source, tag=0, purpose=""):
    """Receive into `out` what rank `source` sends; returns out.

    Parameters
    ----------
    out : contiguous, of the size that the sender sends
    """
    call = current().begin("Recv", comm, purpose)
    received = _recv_buffer(out)
    comm.Recv([_raw(received), MPI.BYTE], source, tag)
    _unstage(received, out)
    current().enter(call, 0)
    return out


def RecvBytes(comm, source=MPI.ANY_SOURCE, tag=0, purpose=""):
    """Receive a message of any length.

    Returns
    -------
    (n,) uint8, host
    """
    call = current().begin("Recv", comm, purpose)
    status = MPI.Status()
    message = comm.Mprobe(source, tag, status)
    received = np.empty(status.Get_count(MPI.BYTE), np.uint8)
    message.Recv([received, MPI.BYTE])
    current().enter(call, 0)
    return received


def Iallgather(comm, part, whole, counts, purpose=""):
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
    sent, received = _to_host(part), _recv_buffer(whole)
    request = comm.Iallgatherv(
        [_raw(sent), MPI.BYTE], [_raw(received), counts, _starts(counts), MPI.BYTE]
    )
    sent_bytes = sent.nbytes * (comm.size - 1)
    return Transfer(
        call,
        sent_bytes,
        [request],
        lambda: _unstage(received, whole),
        sent,
    )


def Ibcast(comm, x, root=0, purpose=""):
    """Start copying `x` of rank `root` into `x` of every rank.

    Returns
    -------
    Transfer of x; `wait` must be called
    """
    call = current().begin("Bcast", comm, purpose)
    buffer = _to_host(x) if comm.rank == root else _recv_buffer(x)
    request = comm.Ibcast(_raw(buffer), root)
    sent_bytes = x.nbytes if comm.rank == root and comm.size > 1 else 0
    return Transfer(call, sent_bytes, [request], lambda: _unstage(buffer, x), buffer)


class Counter:
    """A number on rank 0 that every rank reads and raises by one-sided calls.

    Collective over `comm` when made and when freed, and at no other time.
    """

    def __init__(self, comm):
        self._comm = comm
        self._window = MPI.Win.Allocate(8 if comm.rank == 0 else 0, 8, comm=comm)
        if comm.rank == 0:
            self._window.Lock(0)
            np.frombuffer(self._window, np.int64)[0] = 0
            self._window.Unlock(0)
        comm.Barrier()

    def add(self, n, purpose=""):
        """Raise the number by `n`; returns what it was before (0 for `n` reads it)."""
        call = current().begin("Fetch_and_op", self._comm, purpose)
        before, n = np.empty(1, np.int64), np.array([n], np.int64)
        self._window.Lock(0, MPI.LOCK_SHARED)
        self._window.Fetch_and_op([n, MPI.INT64_T], [before, MPI.INT64_T], 0, 0, MPI.SUM)
        self._window.Unlock(0)
        sent_bytes = 0 if self._comm.rank == 0 else n.nbytes
        current().enter(call, sent_bytes)
        return int(before[0])

    def free(self):
        """Give the window back; every rank must call this."""
        self._window.Free()


class Transfer:
    """A call under way: `test` now and then while computing, `wait` before its result is used.

    MPI libraries for CPUs make progress inside MPI calls only: a long message stands still while
    its ranks compute, unless they test it.

    Parameters
    ----------
    call : of `Ledger.begin`
    sent_bytes : for the ledger
    requests : of MPI
    result : function, what `wait` returns when the requests have ended
    held : what must stay in memory until then
    """

    def __init__(self, call, sent_bytes, requests, result, held=None):
        here.call = None
        self._call, self._sent_bytes, start_s = call, sent_bytes, call[-1]
        self._requests, self._result, self._held = requests, result, held
        self._start_s, self._end_s, self._test_s = start_s, None, 0.0
        self._time_s = time.perf_counter() - start_s

    def test(self):
        """Let MPI move the message on; True once the transfer has ended."""
        if self._end_s is None:
            start_s = time.perf_counter()
            done = MPI.Request.Testall(self._requests)
            end_s = time.perf_counter()
            self._test_s += end_s - start_s
            if done:
                self._end_s = end_s
        return self._end_s is not None

    def wait(self):
        """Wait until the transfer has ended, enter it in the ledger, and return its result."""
        start_s = time.perf_counter()
        here.call = (*self._call[:-1], start_s)
        if self._end_s is None:
            MPI.Request.Waitall(self._requests)
            self._end_s = time.perf_counter()
        result, self._held = self._result(), None
        current().enter(
            self._call,
            self._sent_bytes,
            time_s=self._time_s + time.perf_counter() - start_s,
            test_s=self._test_s,
            flight_s=self._end_s - self._start_s,
        )
        return result


class Outgoing:
    """Messages on their way that nobody waits for: they are looked after until they have left."""

    def __init__(self):
        self._transfers = []

    def add(self, transfer):
        """Look after one more."""
        self.test()
        self._transfers.append(transfer)

    def test(self):
        """Let MPI move the messages on, and forget those that have left."""
        left = [transfer for transfer in self._transfers if transfer.test()]
        for transfer in left:
            transfer.wait()
        self._transfers = [t for t in self._transfers if t not in left]

    def wait(self):
        """Wait until all have left."""
        while self._transfers:
            self._transfers.pop(0).wait()


_direct = False  # whether MPI reads and writes the memory of GPUs


def use_direct(direct):
    """Let MPI read and write the memory of GPUs from now on, as `use_device_memory` found."""
    global _direct
    _direct = direct


def use_device_memory(comm, xp, said):
    """Let MPI take device arrays as they are, if it is said to do so and does it rightly.

    Collective over `comm`, before any other call with device arrays. A library that cannot do it
    may crash on the first one, so nothing is tried unless every rank is told to.

    Parameters
    ----------
    xp : array module of this rank's device
    said : what `array.mpi_reads_device_memory` says on this rank

    Returns
    -------
    True if MPI takes device arrays from now on, the same on every rank
    """
    global _direct
    _direct = False
    if not comm.allreduce(said and xp is not np, MPI.LAND):
        return False
    _direct = comm.allreduce(_device_memory_works(comm, xp), MPI.LAND)
    return _direct


def _device_memory_works(comm, xp):
    """True if messages of two sizes, short and by rendezvous, bring what was sent."""
    right = True
    for n in (16, 1 << 20):
        own = xp.arange(n, dtype=np.float32) + comm.rank
        total, passed, whole = own.copy(), xp.zeros_like(own), xp.zeros((comm.size, n), np.float32)
        array.synchronize(own)
        comm.Allreduce(MPI.IN_PLACE, total, MPI.SUM)
        comm.Allgather(own, whole)
        neighbours = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        comm.Sendrecv(_raw(own), neighbours[0], 0, _raw(passed), neighbours[1], 0)
        count, numbers = np.arange(n, dtype=np.float32), np.arange(comm.size, dtype=np.float32)
        right &= np.allclose(array.host(total), count * comm.size + numbers.sum())
        right &= np.array_equal(array.host(passed), count + np.float32(neighbours[1]))
        right &= np.array_equal(array.host(whole), count + numbers[:, None])
    return bool(right)


def _is_alone(comm, x):
    """True if there is nobody else, and x would go to the host and back for nothing."""
    return comm.size == 1 and array.namespace(x) is not np


def _to_host(x, direct=True):
    """Contiguous array with x's values that MPI may read: x itself where it is one.

    Parameters
    ----------
    direct : False if it must be in host memory, whatever MPI reads
    """
    if array.namespace(x) is np:
        return np.ascontiguousarray(x)
    if not (_direct and direct):
        return array.staged(x)
    x = array.namespace(x).ascontiguousarray(x)
    array.synchronize(x)
    return x


def _from_host(buffer, x):
    """Write what MPI left in `buffer` back to `x`, unless the two are one."""
    if buffer is x:
        return
    if array.namespace(buffer) is not array.namespace(x):
        array.unstage(buffer, x)
    elif array.namespace(x) is not np or not np.shares_memory(buffer, x):
        x[...] = buffer


def _out_buffer(x, shape):
    """Uninitialised contiguous array of x's type where MPI may write what x's memory is to have.

    What the device has been told to do has been done: a message follows no stream.
    """
    xp = array.namespace(x)
    if xp is np or _direct:
        return xp.empty(shape, x.dtype)
    return array.page_locked(shape, x.dtype)


def _stage(buffer, x):
    """What MPI left in a `_out_buffer` for x, in the memory that x is in."""
    xp = array.namespace(x)
    if xp is np or _direct:
        return buffer
    result = xp.empty(buffer.shape, buffer.dtype)
    array.unstage(buffer, result)
    return result


def _recv_buffer(out):
    """Contiguous array that MPI may write to: `out` itself where it is one."""
    if array.namespace(out) is np:
        return out
    if _direct and out.flags.c_contiguous:
        array.synchronize(out)
        return out
    return _out_buffer(out, out.shape)


def _unstage(received, out):
    """`out`, with what MPI wrote to `received`."""
    if received is not out:
        _from_host(received, out)
    return out


def _raw(x):
    """The bytes of a contiguous array, which MPI moves whatever the element type."""
    return x.reshape(-1).view(np.uint8)


def _row_bytes(part):
    return int(np.prod(part.shape[1:], dtype=np.int64)) * part.dtype.itemsize


def _starts(sizes):
    return [sum(sizes[:r]) for r in range(len(sizes))]
