"""Arrays that MPI may read and write: host arrays as they are, those of a device or copies of them.

What MPI does not read itself is staged through page-locked host memory. A message follows no
stream, so that the device has written what is sent, and has read what is overwritten, before MPI is
called.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np
from mpi4py import MPI

from hpcinfer import array
from hpcinfer.array import Array

# Whether MPI reads and writes the memory of GPUs: that of the engine at work.
_direct = False


def use_direct(direct: bool) -> None:
    """Let MPI read and write the memory of GPUs from now on, as `use_device_memory` found."""
    global _direct
    _direct = direct


def use_device_memory(comm: MPI.Comm, xp: ModuleType, said: bool) -> bool:
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


def _device_memory_works(comm: MPI.Comm, xp: ModuleType) -> bool:
    """True if messages of two sizes, short and by rendezvous, bring what was sent."""
    right = True
    for n in (16, 1 << 20):
        # Send by each kind of call.
        own = xp.arange(n, dtype=np.float32) + comm.rank
        total, passed, whole = own.copy(), xp.zeros_like(own), xp.zeros((comm.size, n), np.float32)
        array.synchronize(own)
        comm.Allreduce(MPI.IN_PLACE, total, MPI.SUM)
        comm.Allgather(own, whole)
        neighbours = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        comm.Sendrecv(raw(own), neighbours[0], 0, raw(passed), neighbours[1], 0)

        # Compare on the host.
        count, numbers = np.arange(n, dtype=np.float32), np.arange(comm.size, dtype=np.float32)
        right &= np.allclose(array.host(total), count * comm.size + numbers.sum())
        right &= np.array_equal(array.host(passed), count + np.float32(neighbours[1]))
        right &= np.array_equal(array.host(whole), count + numbers[:, None])
    return bool(right)


def is_alone(comm: MPI.Comm, x: Array) -> bool:
    """True if there is nobody else, and x would go to the host and back for nothing."""
    return comm.size == 1 and array.namespace(x) is not np


def to_host(x: Array, direct: bool = True) -> Array:
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


def from_host(buffer: Array, x: Array) -> None:
    """Write what MPI left in `buffer` back to `x`, unless the two are one."""
    if buffer is x:
        return
    if array.namespace(buffer) is not array.namespace(x):
        array.unstage(buffer, x)
    elif array.namespace(x) is not np or not np.shares_memory(buffer, x):
        x[...] = buffer


def out_buffer(x: Array, shape: tuple[int, ...]) -> Array:
    """Uninitialised contiguous array of x's type where MPI may write what x's memory is to have.

    What the device has been told to do has been done: a message follows no stream.
    """
    xp = array.namespace(x)
    if xp is np or _direct:
        return xp.empty(shape, x.dtype)
    return array.page_locked(shape, x.dtype)


def stage(buffer: Array, x: Array) -> Array:
    """What MPI left in a `out_buffer` for x, in the memory that x is in."""
    xp = array.namespace(x)
    if xp is np or _direct:
        return buffer
    result = xp.empty(buffer.shape, buffer.dtype)
    array.unstage(buffer, result)
    return result


def recv_buffer(out: Array) -> Array:
    """Contiguous array that MPI may write to: `out` itself where it is one."""
    if array.namespace(out) is np:
        return out
    if _direct and out.flags.c_contiguous:
        array.synchronize(out)
        return out
    return out_buffer(out, out.shape)


def unstage(received: Array, out: Array) -> Array:
    """`out`, with what MPI wrote to `received`."""
    if received is not out:
        from_host(received, out)
    return out


def raw(x: Array) -> Array:
    """The bytes of a contiguous array, which MPI moves whatever the element type."""
    return x.reshape(-1).view(np.uint8)


def starts(sizes: Sequence[int]) -> list[int]:
    """Where each of some runs begins that lie end to end."""
    return [sum(sizes[:r]) for r in range(len(sizes))]
