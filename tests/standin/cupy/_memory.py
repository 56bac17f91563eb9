"""Memory of the device: what is asked of it at a time, cut into chunks by pools, as in CuPy.

A pool has free chunks for every stream, takes the smallest that is large enough, cuts off the rest,
and joins neighbours when they are given back. So memory is used again as on a GPU, and what is
taken anew has garbage in it.
"""

import bisect
import contextlib
import gc
import itertools
import os
import sys
import weakref
from dataclasses import dataclass

import numpy as np

from cupy import _streams
from cupy._facts import refuse
from cupy._notes import count, hazard

UNIT = 512  # bytes; every size is a multiple of it
DEVICE_BYTES = int(float(os.environ.get("STANDIN_MEMORY", 4 << 30)))
KEPT_BYTES = 512 << 20  # what a context and its libraries take

_taken_bytes = [0]
_segments = weakref.WeakSet()
_serials = itertools.count(1)


class OutOfMemoryError(MemoryError):
    """No memory is left, or a pool may not have more."""


def free_bytes():
    """What the device could still give."""
    return DEVICE_BYTES - KEPT_BYTES - _taken_bytes[0]


@dataclass(frozen=True)
class Span:
    """Where recorded work has its operands.

    Attributes
    ----------
    segment : Segment, None for empty arrays
    start, stop : bytes within it
    serial : of the allocation that they belonged to
    captured : True if that was made in a capture: such memory may be freed and used again
    """

    segment: object = None
    start: int = 0
    stop: int = 0
    serial: int = 0
    captured: bool = False

    @property
    def is_whole(self):
        """True while all of it belongs to the same allocation."""
        chunks = self.segment.overlapping(self.start, self.stop)
        return all(chunk.serial == self.serial for chunk in chunks)

    def spoil(self):
        """Put garbage there."""
        self.segment.bytes[self.start : self.stop] = _streams.GARBAGE


class Segment:
    """What one cudaMalloc gave.

    Attributes
    ----------
    bytes : (size,) uint8
    address : of the first byte
    first : its first Chunk
    released : True once it was given back by cudaFree
    """

    def __init__(self, size):
        if size > free_bytes():
            raise _streams.CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")
        count("cudaMalloc")
        raw = np.empty(size + UNIT, np.uint8)
        start = -raw.ctypes.data % UNIT
        self.bytes, self.released = raw[start : start + size], False
        self.address = self.bytes.ctypes.data
        _segments.add(self)
        _taken_bytes[0] += size

    def release(self):
        """Give the memory back, which waits for the device."""
        self.released = True
        _taken_bytes[0] -= self.bytes.size
        if _streams.capturing() is not None:
            hazard("memory was given back, by cudaFree, while a graph was captured")
        elif not sys.is_finalizing():
            _streams.wait_for_all("cudaFree")

    def overlapping(self, start, stop):
        """The chunks that have a part of some bytes."""
        chunk = self.first
        while chunk is not None and chunk.start < stop:
            if chunk.start + chunk.size > start:
                yield chunk
            chunk = chunk.next


class Chunk:
    """A run of bytes of a segment, in use or free.

    Attributes
    ----------
    stream : number of the stream that alone gets it
    serial : number of its allocation, 0 while it is free
    captured : True if that allocation was made in a capture
    log : last reads and writes, clock -> number
    """

    def __init__(self, segment, start, size, stream):
        self.segment, self.start, self.size, self.stream = segment, start, size, stream
        self.previous = self.next = None
        self.serial, self.captured, self.log = 0, False, ({}, {})

    @property
    def whole(self):
        """True if nothing was cut off its segment."""
        return self.previous is None and self.next is None

    def cut(self, size):
        """Keep `size` bytes; returns the rest, None if there is none."""
        if size == self.size:
            return None
        rest = Chunk(self.segment, self.start + size, self.size - size, self.stream)
        rest.previous, rest.next = self, self.next
        rest.log = tuple(dict(part) for part in self.log)
        if self.next is not None:
            self.next.previous = rest
        self.next, self.size = rest, size
        return rest

    def join_next(self):
        """Take in the next chunk."""
        gone = self.next
        self.size += gone.size
        self.next = gone.next
        if self.next is not None:
            self.next.previous = self
        for mine, other in zip(self.log, gone.log, strict=True):
            for clock, number in other.items():
                mine[clock] = max(number, mine.get(clock, 0))


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
        return MemoryPointer(self.mem, self._offset + offset)

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
            _streams.submit("memset", lambda: to.fill(value), writes=[run])

    def copy_from_device_async(self, src, size, stream=None):
        """Copy bytes within the device."""
        with using(stream):
            to, source = self._bytes(size), src._bytes(size)
            reads, writes = [_Run(src, size)], [_Run(self, size)]
            _streams.submit("memcpy", lambda: np.copyto(to, source), reads, writes)


def using(stream):
    """A stream as the current one within a `with` block; None for the current one."""
    return contextlib.nullcontext() if stream is None else stream


class _Run:
    """Bytes from a pointer on, as an operand."""

    def __init__(self, pointer, size):
        self._mem, self._address, self._size = pointer.mem, pointer.ptr, size

    def _log(self):
        return log_of(self._mem)

    def _span(self):
        return span_of(self._mem, self._address, self._size)


def chunk_at(address):
    """The chunk that has an address; None if it is no memory of the device."""
    for segment in list(_segments):
        start = address - segment.address
        if not segment.released and 0 <= start < segment.bytes.size:
            return next(segment.overlapping(start, start + 1))
    return None


def log_at(address):
    """Last reads and writes of the memory at an address."""
    chunk = chunk_at(address)
    return None if chunk is None else chunk.log


def span_at(address, nbytes):
    """Span of bytes at an address."""
    chunk = chunk_at(address)
    return Span() if chunk is None else _span(chunk, address, nbytes)


def log_of(mem):
    """Last reads and writes of a PooledMemory; None for no memory."""
    return None if mem is None else mem.chunk.log


def span_of(mem, address, nbytes):
    """Span of bytes within a PooledMemory."""
    if mem is None:
        return Span()
    return _span(mem.chunk, address, nbytes)


def _span(chunk, address, nbytes):
    start = address - chunk.segment.address
    return Span(chunk.segment, start, start + nbytes, chunk.serial, chunk.captured)


class MemoryPool:
    """A pool, as CuPy's, for one device."""

    def __init__(self, allocator=None):
        refuse("MemoryPool", allocator=allocator)
        self._free = {}  # stream -> chunks by size
        self._used_bytes = self._total_bytes = self._limit = 0

    def __del__(self):
        self.free_all_blocks()

    def malloc(self, size):
        """Memory of at least `size` bytes, with garbage in it."""
        size = -(-size // UNIT) * UNIT
        if not size:
            return MemoryPointer(None, 0)
        count("alloc")
        chunk = self._take(size) or self._grow(size)
        self._used_bytes += chunk.size
        capture = _streams.capturing()
        chunk.serial, chunk.captured = next(_serials), capture is not None
        mem = PooledMemory(chunk, self)
        span = span_of(mem, chunk.segment.address + chunk.start, size)
        span.spoil()
        if capture is not None:
            capture.allocate(span)
        return MemoryPointer(mem, 0)

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
