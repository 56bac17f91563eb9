"""Sums, extrema, orders: what makes fewer values of many, or sorts them."""

import numpy as np

from cupy import _dtypes, _streams
from cupy._array import Array, produce, view, write
from cupy._facts import refuse
from cupy._notes import count


class Methods:
    """The part of `ndarray` that sums and sorts."""

    __slots__ = ()

    def _reduced(self, name, axis, dtype=None, out=None, keepdims=False):
        """A reduction by NumPy; bfloat16 is summed in float32 and rounded at the end."""
        options = {"keepdims": keepdims} | ({} if dtype is None else {"dtype": dtype})
        axis = tuple(axis) if isinstance(axis, list) else axis
        same_type = dtype is None and name in ("sum", "prod", "mean", "max", "min")

        def compute(a):
            with np.errstate(all="ignore"):
                result = getattr(_dtypes.widened(a), name)(axis=axis, **options)
                back = same_type and a.dtype == _dtypes.BFLOAT16
                return np.asarray(result, a.dtype if back else None)

        if out is None:
            return produce(name, compute, self)
        return write(name, out, compute, self)

    def sum(self, axis=None, dtype=None, out=None, keepdims=False):
        """Sum along axes."""
        return self._reduced("sum", axis, dtype, out, keepdims)

    def prod(self, axis=None, dtype=None, out=None, keepdims=False):
        """Product along axes."""
        return self._reduced("prod", axis, dtype, out, keepdims)

    def mean(self, axis=None, dtype=None, out=None, keepdims=False):
        """Mean along axes."""
        return self._reduced("mean", axis, dtype, out, keepdims)

    def max(self, axis=None, out=None, keepdims=False):
        """Largest value along axes."""
        return self._reduced("max", axis, None, out, keepdims)

    def min(self, axis=None, out=None, keepdims=False):
        """Smallest value along axes."""
        return self._reduced("min", axis, None, out, keepdims)

    def any(self, axis=None, out=None, keepdims=False):
        """True where a value is."""
        return self._reduced("any", axis, None, out, keepdims)

    def all(self, axis=None, out=None, keepdims=False):
        """True where all values are."""
        return self._reduced("all", axis, None, out, keepdims)

    def argmax(self, axis=None, out=None, dtype=None, keepdims=False):
        """Index of the largest value."""
        refuse("argmax", dtype=dtype)
        return self._reduced("argmax", axis, None, out, keepdims)

    def argmin(self, axis=None, out=None, dtype=None, keepdims=False):
        """Index of the smallest value."""
        refuse("argmin", dtype=dtype)
        return self._reduced("argmin", axis, None, out, keepdims)

    def cumsum(self, axis=None, dtype=None, out=None):
        """Sums so far along an axis."""
        refuse("cumsum", out=out)
        return produce("cumsum", lambda a: a.cumsum(axis, dtype), self, n=2)

    def clip(self, min=None, max=None, out=None):
        """Values within bounds."""
        refuse("clip", out=out)
        for bound in (min, max):
            if bound is not None and not isinstance(bound, Array):
                _dtypes.of_scalar(bound)
        return produce("clip", np.clip, self, min, max)

    def repeat(self, repeats, axis=None):
        """Every value several times."""
        if isinstance(repeats, np.ndarray):
            raise TypeError("'repeats' does not accept numpy.ndarray; use cupy.array() first")
        n = 1
        if isinstance(repeats, Array):
            self._counted("repeat", "repeat by an array, which the host sums")
            n = 5
        return produce("repeat", lambda a, times: np.repeat(a, times, axis), self, repeats, n=n)

    def nonzero(self):
        """Indices of values that are not zero, an array for each axis."""
        self._counted("nonzero", "nonzero, whose results the host counts")
        at = produce("nonzero", lambda a: np.stack(np.nonzero(a), axis=1), self, n=3)
        return tuple(view(at, at._a[:, axis]) for axis in range(self.ndim))

    def _counted(self, what, why):
        """Copy a number to the host, which waits for it."""
        _streams.refuse_in_capture(why)
        count("d2h", what=what)
        _streams.current().synchronize()

    def sort(self, axis=-1, kind=None):
        """Sort along an axis, in place."""
        self._refuse_unsorted(kind)
        write("sort", self, lambda a: np.sort(a, axis, "stable"), self, n=4)

    def partition(self, kth, axis=-1):
        """Have the kth smallest value at its place, in place."""
        if not isinstance(kth, int) and not hasattr(kth, "__iter__"):
            raise TypeError(f"{type(kth).__name__!r} object is not iterable")
        self._refuse_unsorted(None)
        write("partition", self, lambda a: np.sort(a, axis), self, n=6)

    def argsort(self, axis=-1, kind=None):
        """Indices that sort."""
        _sortable(self.dtype, kind)
        return produce("argsort", lambda a: np.argsort(a, axis, "stable"), self, n=5)

    def _refuse_unsorted(self, kind):
        if not self.flags.c_contiguous:
            raise NotImplementedError("Sorting non-contiguous array is not supported.")
        _sortable(self.dtype, kind)

    def searchsorted(self, v, side="left", sorter=None):
        """Where values would stand in a sorted array."""
        refuse("searchsorted", sorter=sorter)
        if not isinstance(v, (Array, int, float, complex)):
            raise NotImplementedError("Only python scalars or ndarrays are supported for v")
        return produce("searchsorted", lambda a, v: np.searchsorted(a, v, side), self, v, n=2)


def _sortable(dtype, kind):
    if kind not in (None, "stable"):
        raise ValueError("kind can only be None or 'stable'")
    if dtype == _dtypes.BFLOAT16:
        raise TypeError(f"Sorting arrays with dtype '{dtype}' is not supported")
