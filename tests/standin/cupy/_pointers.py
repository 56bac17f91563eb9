"""Pointers to memory of the device, and what keeps it in use."""

import contextlib
import operator
import weakref

import numpy as np

from cupy._notes import hazard
from cupy._segments import Span
from cupy._streams import submit


class PooledMemory:
    """A chunk in use; it goes back to its pool when nothing refers to this any more."""

    __slots__ = ("chunk", "_pool", "__weakref__")

    def __init__(self, chunk, pool):
        self.chunk, self._pool = chunk, weakref.ref(pool)

    def __del__(self):
        pool = self._pool()
        if pool is not None:
            pool._give_back(self.chunk)
        elif self.chunk.whole:
            self.chunk.segment.release()


class MemoryPointer:
    """An address in a chunk.

    Attributes
    ----------
    mem : PooledMemory, None for no memory at all
    ptr : address, 0 for no memory
    """

    def __init__(self, mem, offset):
        self.mem, self._offset = mem, offset

    @property
    def ptr(self):
        """Address."""
        if self.mem is None:
            return 0
        chunk = self.mem.chunk
        return chunk.segment.address + chunk.start + self._offset

    def __int__(self):
        return self.ptr

    def __add__(self, offset):
        return MemoryPointer(self.mem, self._offset + operator.index(offset))

    def _bytes(self, n):
        """(n,) uint8 from here on."""
        if self.mem is None:
            return np.empty(0, np.uint8)
        chunk = self.mem.chunk
        if self._offset + n > chunk.size:
            hazard(f"{self._offset + n} bytes are used of an allocation of {chunk.size}")
        start = chunk.start + self._offset
        return chunk.segment.bytes[start : start + n]

    def memset_async(self, value, size, stream=None):
        """Fill bytes."""
        with using(stream):
            run, to = _Run(self, size), self._bytes(size)
            submit("memset", lambda: to.fill(value), writes=[run])

    def copy_from_device_async(self, src, size, stream=None):
        """Copy bytes within the device."""
        with using(stream):
            to, source = self._bytes(size), src._bytes(size)
            reads, writes = [_Run(src, size)], [_Run(self, size)]
            submit("memcpy", lambda: np.copyto(to, source), reads, writes)


def using(stream):
    """A stream as the current one within a `with` block; None for the current one."""
    return contextlib.nullcontext() if stream is None else stream


class _Run:
    """Bytes from a pointer on, as an operand."""

    def __init__(self, pointer, size):
        self._mem, self._address, self._size = pointer.mem, pointer.ptr, size

    def _chunk(self):
        return chunk_of(self._mem)

    def _span(self):
        return span_of(self._mem, self._address, self._size)


def chunk_of(mem):
    """Chunk of a PooledMemory; None for no memory."""
    return None if mem is None else mem.chunk


def span_of(mem, address, nbytes):
    """Span of bytes within a PooledMemory."""
    if mem is None:
        return Span()
    return mem.chunk.span(address - mem.chunk.segment.address, nbytes)
