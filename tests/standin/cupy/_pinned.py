"""Page-locked memory of the host, from a pool: sizes are powers of two, 512 at least, as in CuPy.

What is given back is used again at once, although a copy may still read it; taken memory is
overwritten, so that this shows.
"""

import ctypes
import functools
import weakref

import numpy as np

from cupy._notes import count

_buffers = weakref.WeakValueDictionary()  # address -> _Buffer in use


class _Buffer:
    def __init__(self, raw, address):
        self.raw, self.start, self.stop = raw, address, address + len(raw)


def seen_by_the_device(host):
    """A NumPy array in page-locked memory as copies have it, which keep no memory from being freed.

    Returns
    -------
    NumPy array of the same memory; None if that is not page-locked
    """
    start, stop = host.ctypes.data, host.ctypes.data + host.nbytes
    for b in list(_buffers.values()):
        if b.start <= start and stop <= b.stop:
            return np.ndarray(host.shape, host.dtype, b.raw, start - b.start, host.strides)
    return None


@functools.cache
def _pointer_type(size):
    """A type that exports a buffer; arrays in it keep it, and its end can be watched."""
    return type("PinnedMemoryPointer", (ctypes.c_byte * size,), {"ptr": property(ctypes.addressof)})


class PinnedMemoryPool:
    """The pool behind `alloc_pinned_memory`."""

    def __init__(self):
        self._free = {}  # size -> list of bytearray

    def malloc(self, size):
        """Memory of at least `size` bytes: an object with a buffer, and its address in `ptr`."""
        size = 1 << (max(512, size) - 1).bit_length()
        count("pinned")
        blocks = self._free.setdefault(size, [])
        if not blocks:
            count("cudaHostAlloc")
            blocks.append(bytearray(size))
        raw = blocks.pop()
        np.frombuffer(raw, np.uint8)[...] = 0xEE
        pointer = _pointer_type(size).from_buffer(raw)
        pointer.watched = _buffers[pointer.ptr] = _Buffer(raw, pointer.ptr)
        weakref.finalize(pointer, blocks.append, raw).atexit = False
        return pointer

    def n_free_blocks(self):
        """Number of free blocks."""
        return sum(map(len, self._free.values()))

    def free_all_blocks(self):
        """Give free blocks back to the system."""
        self._free.clear()


default_pool = PinnedMemoryPool()


def alloc_pinned_memory(size):
    """Page-locked memory from the pool."""
    if not isinstance(size, (int, np.integer)):
        raise TypeError(f"'{type(size).__name__}' object cannot be interpreted as an integer")
    return default_pool.malloc(int(size))
