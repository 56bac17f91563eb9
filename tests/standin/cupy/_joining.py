"""Arrays put together, and axes moved."""

import numpy as np

from cupy import _dtypes
from cupy._array import Array, produce, view
from cupy._facts import refuse

_AT_A_TIME = 8  # arrays that CuPy joins by a copy each; more by one kernel


def concatenate(tup, axis=0, out=None, *, dtype=None, casting="same_kind"):
    """Arrays one after the other along an axis."""
    refuse("concatenate", out=out)
    arrays = list(tup)
    if not arrays:
        raise ValueError("Cannot concatenate from empty tuple")
    for x in arrays:
        if not isinstance(x, Array):
            _dtypes.of_scalar(x)
            raise TypeError("Only cupy arrays can be concatenated")
        if not x.ndim:
            raise TypeError("zero-dimensional arrays cannot be concatenated")
    if axis is None:
        arrays, axis = [x.ravel() for x in arrays], 0
    to = np.dtype(dtype) if dtype is not None else _promoted(arrays)
    for x in arrays:
        _dtypes.refuse_cast(x.dtype, to, casting)

    def join(*parts):
        return np.concatenate([a.astype(to, copy=False) for a in parts], axis)

    return produce("concatenate", join, *arrays, n=len(arrays) if len(arrays) <= _AT_A_TIME else 1)


def _promoted(arrays):
    to = arrays[0].dtype
    for x in arrays:
        to = to if x.dtype == to else np.promote_types(to, x.dtype)
    return to


def stack(tup, axis=0, out=None, *, dtype=None, casting="same_kind"):
    """Arrays along a new axis."""
    arrays = list(tup)
    for x in arrays:
        if not isinstance(x, Array):
            raise TypeError(f"Unsupported type {type(x)}")
        if x.shape != arrays[0].shape:
            raise ValueError("all input arrays must have the same shape")
    at = axis if axis >= 0 else axis + arrays[0].ndim + 1
    arrays = [expand_dims(x, at) for x in arrays]
    return concatenate(arrays, at, out, dtype=dtype, casting=casting)


def expand_dims(a, axis):
    """One axis more, of one."""
    return view(a, np.expand_dims(a._a, axis))


def moveaxis(a, source, destination):
    """Axes at other places."""
    return view(a, np.moveaxis(a._a, source, destination))


def broadcast_to(array, shape):
    """The values again and again."""
    return view(array, np.broadcast_to(array._a, shape))
