"""Arrays of the device: NumPy's inside, in memory of a pool; what computes and writes them."""

import math
import operator

import numpy as np

from cupy import _clocks, _dtypes, _pointers, _pools, _segments, _streams
from cupy._notes import hazard, muted


class Flags:
    """How an array lies in memory."""

    def __init__(self, a):
        self.c_contiguous, self.f_contiguous = a.flags.c_contiguous, a.flags.f_contiguous
        self.owndata = a.flags.owndata
        self.fnc = self.f_contiguous and not self.c_contiguous
        self.forc = self.f_contiguous or self.c_contiguous

    def __getitem__(self, name):
        return getattr(self, name.lower())


class Array:
    """What all arrays of the device have; `ndarray` is made of this and its other bases.

    Attributes
    ----------
    _a : NumPy array in the memory
    _mem : PooledMemory, None for empty arrays
    base : the array that this is a view of, or None
    """

    __slots__ = ("_a", "_mem", "base", "__weakref__")

    def __init_subclass__(cls):
        Array._final = cls

    shape = property(lambda self: self._a.shape)
    strides = property(lambda self: self._a.strides)
    dtype = property(lambda self: self._a.dtype)
    ndim = property(lambda self: self._a.ndim)
    size = property(lambda self: self._a.size)
    itemsize = property(lambda self: self._a.itemsize)
    nbytes = property(lambda self: self._a.nbytes)
    flags = property(lambda self: Flags(self._a))

    @property
    def data(self):
        """Pointer to the first element."""
        if self._mem is None:
            return _pointers.MemoryPointer(None, 0)
        chunk = self._mem.chunk
        offset = self._a.ctypes.data - chunk.segment.address - chunk.start
        return _pointers.MemoryPointer(self._mem, offset)

    @property
    def __cuda_array_interface__(self):
        a, chunk = self._a, self._chunk()
        if not _clocks.finished(chunk):
            hazard("device memory is handed to a library before the host has waited for it")
        if chunk is not None:
            chunk.written = True  # the library may write there
        return {
            "shape": a.shape,
            "typestr": a.dtype.str,
            "descr": a.dtype.descr,
            "stream": 1,
            "version": 3,
            "strides": None if a.flags.c_contiguous else a.strides,
            "data": (a.ctypes.data if a.size else 0, False),
        }

    def _chunk(self):
        return _pointers.chunk_of(self._mem)

    def _span(self):
        if not self._a.size:
            return _segments.Span()
        low, high = np.lib.array_utils.byte_bounds(self._a)
        return _pointers.span_of(self._mem, low, high - low)


def _wrapped(a, mem, base=None):
    x = object.__new__(Array._final)
    x._a, x._mem, x.base = a, mem, base
    return x


def view(x, a):
    """A NumPy view of an array's memory as an array of the device."""
    return _wrapped(a, x._mem, x if x.base is None else x.base)


def allocate(shape, dtype, order="C", pointer=None):
    """An array with garbage in it, or with what is at a pointer."""
    dtype = _dtypes.checked(dtype)
    if isinstance(shape, Array):
        raise TypeError("'cupy.ndarray' object cannot be interpreted as an integer")
    shape = tuple(map(operator.index, shape if np.iterable(shape) else (shape,)))
    nbytes = math.prod(shape) * dtype.itemsize
    pointer = _pools.alloc(nbytes) if pointer is None else pointer
    a = pointer._bytes(nbytes).view(dtype)
    a = a.reshape(shape[::-1]).T if order in ("F", "f") else a.reshape(shape)
    return _wrapped(a, pointer.mem)


def produce(what, function, *operands, n=1):
    """A new array with what `function` gives: now, or when the graph that it is in is launched.

    Recorded work knows memory, not arrays: it keeps none of them.

    Parameters
    ----------
    what : name, for the counts
    function : function of the operands' NumPy arrays, to a NumPy array or scalar
    operands : arrays, and anything else that the function takes
    n : kernels that CuPy launches for it
    """
    given, recorded = [values(x) for x in operands], _streams.capturing() is not None
    with muted(recorded):
        value = np.asarray(function(*given))
    order = "F" if value.flags.f_contiguous and not value.flags.c_contiguous else "C"
    x = allocate(value.shape, value.dtype, order)
    if recorded:
        return write(what, x, function, *operands, n=n)
    return write(what, x, lambda *_: value, *operands, n=n)


def write(what, x, function, *operands, n=1, where=True):
    """Write what `function` of operands gives to an array, rounded to its type; returns it."""
    if x.size:
        a, given = x._a, [values(y) for y in operands]
        reads = [y for y in operands if isinstance(y, Array)]
        _streams.submit(what, lambda: put(a, function(*given), where), reads, [x], n=n)
    return x


def put(a, value, where=True):
    """Write a value to a NumPy array, as a device does: without warnings."""
    with np.errstate(all="ignore"):
        np.copyto(a, value, casting="unsafe", where=where)


def values(x):
    """The NumPy array of an array of the device; anything else as it is."""
    return x._a if isinstance(x, Array) else x
