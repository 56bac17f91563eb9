"""New arrays: empty ones, filled ones, and copies of the host's."""

import builtins

import numpy as np

from cupy import _copies, _dtypes, _pinned, _streams
from cupy._array import Array, allocate, produce, values, write
from cupy._facts import refuse
from cupy._notes import count


def empty(shape, dtype=float, order="C"):
    """An array with garbage in it."""
    return allocate(shape, dtype, order)


def zeros(shape, dtype=float, order="C"):
    """An array of zeros."""
    return write("memset", allocate(shape, dtype, order), lambda: 0)


def ones(shape, dtype=float, order="C"):
    """An array of ones."""
    return write("fill", allocate(shape, dtype, order), lambda: 1)


def full(shape, fill_value, dtype=None, order="C"):
    """An array of one value."""
    if dtype is None:
        dtype = getattr(fill_value, "dtype", None) or np.asarray(fill_value).dtype
    x = allocate(shape, dtype, order)
    x.fill(fill_value)
    return x


def _like(a, dtype, shape):
    if not isinstance(a, Array):
        raise TypeError(f"Unsupported type {type(a)}")
    return a.shape if shape is None else shape, a.dtype if dtype is None else dtype


def empty_like(prototype, dtype=None, order="K", subok=None, shape=None):
    """An array with garbage, in the shape and type of another."""
    refuse("empty_like", subok=subok)
    return empty(*_like(prototype, dtype, shape))


def zeros_like(a, dtype=None, order="K", subok=None, shape=None):
    """An array of zeros, in the shape and type of another."""
    refuse("zeros_like", subok=subok)
    return zeros(*_like(a, dtype, shape))


def ones_like(a, dtype=None, order="K", subok=None, shape=None):
    """An array of ones, in the shape and type of another."""
    refuse("ones_like", subok=subok)
    return ones(*_like(a, dtype, shape))


def full_like(a, fill_value, dtype=None, order="K", subok=None, shape=None):
    """An array of one value, in the shape and type of another."""
    refuse("full_like", subok=subok)
    shape, dtype = _like(a, dtype, shape)
    return full(shape, fill_value, dtype)


def arange(start, stop=None, step=1, dtype=None):
    """Numbers in equal steps."""
    if any(isinstance(x, Array) for x in (start, stop, step)):
        raise TypeError("stand-in: arange of arrays is not written")
    bounds = (0, start) if stop is None else (start, stop)
    return produce("arange", lambda: np.arange(*bounds, step, dtype))


def array(obj, dtype=None, copy=True, order="K", subok=False, ndmin=0, *, blocking=False):
    """An array of the device with the values of another, of NumPy's, or of a list."""
    refuse("array", subok=subok or None, ndmin=ndmin or None)
    if isinstance(obj, Array):
        if dtype is not None and np.dtype(dtype) != obj.dtype:
            return obj.astype(dtype)
        return obj.copy() if copy else obj
    if isinstance(obj, (list, tuple)) and builtins.any(isinstance(x, Array) for x in obj):
        from cupy._joining import stack

        return stack(list(obj)).astype(dtype or obj[0].dtype, copy=False)
    a = np.array(obj, dtype=dtype, copy=None)
    _dtypes.checked(a.dtype)
    if copy is False and a.ndim:
        raise ValueError("Unable to avoid copy while creating an array as requested.")
    x = allocate(a.shape, a.dtype, "F" if a.flags.fnc else "C")
    if a.ndim == 0:
        return write("fill", x, lambda: a)
    if a.size:
        _from_host(a, x, obj)
    if blocking:
        _streams.current().synchronize()
    return x


def _from_host(a, x, given):
    """Copy to the device: from page-locked memory itself, or through some that CuPy takes."""
    page_locked = _pinned.seen_by_the_device(a) if a is given else None
    if page_locked is not None:
        _copies.copy_from_host(page_locked, x, True)
        return
    _streams.refuse_in_capture("a copy from pageable memory of the host")
    count("pinned", what="asarray")
    count("event", what="asarray")
    _copies.copy_from_host(a, x, False)


def asarray(a, dtype=None, order=None, *, copy=None, blocking=False):
    """As `array`, without a copy where that can be."""
    if isinstance(a, Array) and order in ("C", "F"):
        return ascontiguousarray(a, dtype)
    return array(a, dtype, copy, blocking=blocking)


def ascontiguousarray(a, dtype=None):
    """An array that lies in order, the same one if it does."""
    if not isinstance(a, Array):
        a = array(a, dtype, None)
    if dtype is not None and np.dtype(dtype) != a.dtype:
        a = a.astype(dtype)
    if a.flags.c_contiguous:
        return a if a.ndim else a.reshape(1)
    return a.copy()


def copy(a, order="K"):
    """The values in memory of their own."""
    return a.copy(order)


def copyto(dst, src, casting="same_kind", where=None):
    """Write values to an array, where a mask says so."""
    if isinstance(src, np.ndarray):
        if src.size != 1:
            raise ValueError("non-scalar numpy.ndarray cannot be used for copyto")
        src = src.squeeze()[()]
    if type(src) not in (bool, int, float, complex):
        _dtypes.refuse_cast(src.dtype, dst.dtype, casting)
    if where is not None and not isinstance(where, Array):
        _dtypes.of_scalar(where)
    mask = True if where is None else values(where)
    write("copyto", dst, lambda x, _: x, src, where, where=mask)
