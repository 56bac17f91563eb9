"""Values chosen by conditions and indices, and functions that are methods of the array."""

import numpy as np

from cupy._array import Array
from cupy._creation import arange
from cupy._ufunc import UFUNCS


def where(condition, x=None, y=None):
    """Values of one array or another."""
    if (x is None) != (y is None):
        raise ValueError("Must provide both 'x' and 'y' or neither.")
    if x is None:
        return condition.nonzero()
    if not hasattr(condition, "astype"):
        raise AttributeError(f"'{type(condition).__name__}' object has no attribute 'astype'")
    return UFUNCS["where"](condition.astype("?", copy=False), x, y)


def take_along_axis(a, indices, axis):
    """Values at indices of their own for every place."""
    if not isinstance(indices, Array) or indices.dtype.kind not in "iu":
        raise IndexError("`indices` must be an integer array")
    if axis is None:
        a, axis = a.ravel(), 0
    if a.ndim != indices.ndim:
        raise ValueError("`indices` and `a` must have the same number of dimensions")
    key = [
        arange(n).reshape([n if i == j else 1 for j in range(a.ndim)])
        for i, n in enumerate(a.shape)
    ]
    key[axis] = indices
    return a[tuple(key)]


def isneginf(x, out=None):
    """True for minus infinity."""
    return UFUNCS["logical_and"](UFUNCS["isinf"](x), UFUNCS["signbit"](x), out=out)


def flatnonzero(a):
    """Indices of values that are not zero, of the array as one axis."""
    return a.ravel().nonzero()[0]


def sort(a, axis=-1, kind=None):
    """A sorted copy."""
    x = a.copy()
    x.sort(axis, kind)
    return x


def partition(a, kth, axis=-1):
    """A copy with the kth smallest value at its place."""
    x = a.copy()
    x.partition(kth, axis)
    return x


def argmax(a, axis=None, dtype=None, out=None, keepdims=False):
    """Index of the largest value."""
    return a.argmax(axis, out, dtype, keepdims)


def argmin(a, axis=None, dtype=None, out=None, keepdims=False):
    """Index of the smallest value."""
    return a.argmin(axis, out, dtype, keepdims)


def _method(name):
    """The function that calls a method of its first argument."""

    def function(a, *args, **options):
        if not isinstance(a, Array):
            raise TypeError(f"{name}: Unsupported type {type(a)}")
        return getattr(a, name)(*args, **options)

    function.__name__ = name
    return function


METHODS = {
    name: _method(name)
    for name in (
        "sum prod mean max min any all cumsum clip repeat nonzero argsort searchsorted take "
        "reshape ravel squeeze swapaxes transpose"
    ).split()
}
METHODS |= {"amax": METHODS["max"], "amin": METHODS["min"]}


def get_array_module(*args):
    """CuPy if an array of the device is among the arguments, else NumPy."""
    import cupy

    return cupy if any(isinstance(x, Array) for x in args) else np
