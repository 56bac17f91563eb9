"""Memory of the device: what is asked of it at a time, and the chunks that pools cut it into."""

import itertools
import os
import sys
import weakref
from dataclasses import dataclass

import numpy as np

from cupy import _streams
from cupy._notes import count

UNIT = 512  # bytes; every size is a multiple of it
DEVICE_BYTES = int(float(os.environ.get("STANDIN_MEMORY", 4 << 30)))
KEPT_BYTES = 512 << 20  # what a context and its libraries take

DRY = os.environ.get("STANDIN_DRY") == "1"
GARBAGE = 0 if DRY else 0xFF  # NaN in every floating type

_taken_bytes = [0]
_segments = weakref.WeakSet()
_serials = itertools.count(1)


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
        self.segment.bytes[self.start : self.stop] = GARBAGE


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
        """Give the memory back, which waits for the device, but for streams that capture."""
        self.released = True
        _taken_bytes[0] -= self.bytes.size
        if _streams.is_any_capturing():
            _streams.refuse_unsafe("cudaFree")
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
    capture : Capture that this allocation was made in, or None
    written : True once anything was written since then
    log : last reads and writes, clock -> number
    """

    def __init__(self, segment, start, size, stream):
        self.segment, self.start, self.size, self.stream = segment, start, size, stream
        self.previous = self.next = None
        self.serial, self.capture, self.written, self.log = 0, None, False, ({}, {})

    @property
    def whole(self):
        """True if nothing was cut off its segment."""
        return self.previous is None and self.next is None

    def take(self, capture):
        """Put the chunk to use; its memory has garbage in it."""
        self.serial, self.capture, self.written = next(_serials), capture, False
        self.span(self.start, self.size).spoil()

    def span(self, start, nbytes):
        """Span of bytes of the segment."""
        captured = self.capture is not None
        return Span(self.segment, start, start + nbytes, self.serial, captured)

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


def chunk_at(address):
    """The chunk that has an address; None if it is no memory of the device."""
    for segment in list(_segments):
        start = address - segment.address
        if not segment.released and 0 <= start < segment.bytes.size:
            return next(segment.overlapping(start, start + 1))
    return None


def span_at(address, nbytes):
    """Span of bytes at an address."""
    chunk = chunk_at(address)
    return Span() if chunk is None else chunk.span(address - chunk.segment.address, nbytes)
