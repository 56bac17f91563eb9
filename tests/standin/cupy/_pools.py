"""Pools of memory of the device, as CuPy has them, and where arrays get theirs from.

A pool has free chunks for every stream, takes the smallest that is large enough, cuts off the rest,
and joins neighbours when they are given back. So memory is used again as on a GPU.
"""

import bisect
import contextlib
import gc
import operator

from cupy import _streams
from cupy._facts import refuse
from cupy._notes import count
from cupy._pointers import MemoryPointer, PooledMemory
from cupy._segments import DEVICE_BYTES, UNIT, Chunk, Segment


class OutOfMemoryError(MemoryError):
    """No memory is left, or a pool may not have more."""


class MemoryPool:
    """A pool, as CuPy's, for one device."""

    def __init__(self, allocator=None):
        refuse("MemoryPool", allocator=allocator)
        self._free = {}  # stream -> chunks by size
        self._segments = set()
        self._used_bytes = self._total_bytes = self._limit = 0

    def __del__(self):
        self.free_all_blocks()

    def malloc(self, size):
        """Memory of at least `size` bytes, with garbage in it."""
        size = -(-operator.index(size) // UNIT) * UNIT
        if not size:
            return MemoryPointer(None, 0)
        count("alloc")
        chunk = self._take(size) or self._grow(size)
        self._used_bytes += chunk.size
        capture = _streams.capturing()
        chunk.take(capture)
        if capture is not None:
            capture.allocate(chunk.span(chunk.start, size))
        return MemoryPointer(PooledMemory(chunk, self), 0)

    def _take(self, size):
        """The smallest free chunk of the current stream that is large enough."""
        free = self._free.get(_streams.current().ptr, [])
        at = bisect.bisect_left(free, size, key=lambda chunk: chunk.size)
        if at == len(free):
            return None
        chunk = free.pop(at)
        rest = chunk.cut(size)
        if rest is not None:
            self._keep(rest)
        return chunk

    def _grow(self, size):
        """A chunk of its own from the device."""
        if self._limit and self._total_bytes + size > self._limit:
            raise OutOfMemoryError(
                f"Out of memory allocating {size:,} bytes (allocated so far: "
                f"{self._total_bytes:,} bytes, limit set to: {self._limit:,} bytes)."
            )
        _streams.refuse_unsafe("cudaMalloc: a memory pool must grow")
        segment = self._segment(size)
        chunk = segment.first = Chunk(segment, 0, size, _streams.current().ptr)
        self._segments.add(segment)
        self._total_bytes += size
        return chunk

    def _segment(self, size):
        for last_resort in (lambda: None, gc.collect):
            try:
                return Segment(size)
            except _streams.CUDARuntimeError:
                last_resort()
                self.free_all_blocks()
        try:
            return Segment(size)
        except _streams.CUDARuntimeError:
            raise OutOfMemoryError(f"Out of memory allocating {size:,} bytes.") from None

    def _give_back(self, chunk):
        """Take a chunk back, and join it to its neighbours as far as they are free."""
        self._used_bytes -= chunk.size
        chunk.serial = 0
        if chunk.next is not None and not chunk.next.serial:
            self._forget(chunk.next)
            chunk.join_next()
        if chunk.previous is not None and not chunk.previous.serial:
            chunk = chunk.previous
            self._forget(chunk)
            chunk.join_next()
        self._keep(chunk)

    def _keep(self, chunk):
        bisect.insort(self._free.setdefault(chunk.stream, []), chunk, key=lambda c: c.size)

    def _forget(self, chunk):
        self._free[chunk.stream] = [c for c in self._free[chunk.stream] if c is not chunk]

    def free_all_blocks(self, stream=None):
        """Give free segments that are whole back to the device."""
        for number in list(self._free) if stream is None else [stream.ptr]:
            chunks = self._free.get(number, [])
            self._free[number] = [chunk for chunk in chunks if not chunk.whole]
            for chunk in chunks:
                if chunk.whole:
                    self._total_bytes -= chunk.size
                    self._segments.remove(chunk.segment)
                    chunk.segment.release()

    def n_free_blocks(self):
        """Number of free chunks."""
        return sum(map(len, self._free.values()))

    def used_bytes(self):
        """Bytes in use."""
        return self._used_bytes

    def free_bytes(self):
        """Bytes that were taken from the device and are not in use."""
        return self._total_bytes - self._used_bytes

    def total_bytes(self):
        """Bytes that were taken from the device."""
        return self._total_bytes

    def set_limit(self, size=None, fraction=None):
        """Take no more than so much from the device; 0 for no limit."""
        if size is not None and fraction is not None:
            raise ValueError("size and fraction cannot be specified at one time")
        self._limit = int(fraction * DEVICE_BYTES) if size is None else int(size)

    def get_limit(self):
        """Bytes that may be taken from the device, 0 for no limit."""
        return self._limit


default_pool = MemoryPool()
_allocators = [default_pool.malloc]


def alloc(size):
    """Memory from the current allocator."""
    return _allocators[-1](size)


def get_allocator():
    """The current allocator."""
    return _allocators[-1]


def set_allocator(allocator=None):
    """Use another allocator from now on."""
    if len(_allocators) > 1:
        raise ValueError(
            "Can't change the global allocator inside `using_allocator` context manager"
        )
    _allocators[0] = default_pool.malloc if allocator is None else allocator


@contextlib.contextmanager
def using_allocator(allocator=None):
    """Use another allocator within a `with` block."""
    _allocators.append(default_pool.malloc if allocator is None else allocator)
    try:
        yield
    finally:
        _allocators.pop()
