"""From the device to the host and back: nothing reaches the host but by a copy."""

import numpy as np

from cupy import _copies, _pinned, _streams
from cupy._array import produce, values
from cupy._notes import hazard
from cupy._pointers import using
from cupy._ufunc import COMPARISONS


class Transfer:
    """The part of `ndarray` that copies to the host and from it."""

    __slots__ = ()

    def get(self, stream=None, order="C", out=None, blocking=True):
        """The values as a NumPy array; the host waits for them, unless it is not to."""
        if out is None:
            out = np.empty(self.shape, self.dtype, order)
            if not self.size:
                return out
        self._refuse_out(out)
        with using(stream):
            if blocking:
                _streams.refuse_in_capture("ndarray.get, a wait of the host")
            lies_alike = any(
                out.flags[order] and self._a.flags[order]
                for order in ("C_CONTIGUOUS", "F_CONTIGUOUS")
            )
            x = self if lies_alike else produce("ascontiguousarray", np.copy, self)
            page_locked = _pinned.seen_by_the_device(out)
            _copies.copy_to_host(x, out if page_locked is None else page_locked)
            if blocking:
                _streams.current().synchronize()
        return out

    def _refuse_out(self, out):
        if not isinstance(out, np.ndarray):
            raise TypeError("Only numpy.ndarray can be obtained from cupy.ndarray")
        if self.dtype != out.dtype:
            raise TypeError(f"{out.dtype} array cannot be obtained from {self.dtype} array")
        if self.shape != out.shape:
            raise ValueError(
                f"Shape mismatch. Expected shape: {self.shape}, actual shape: {out.shape}"
            )
        if not (out.flags.c_contiguous or out.flags.f_contiguous):
            raise RuntimeError("`out` cannot be specified when copying to non-contiguous ndarray")

    def set(self, arr, stream=None):
        """Copy a NumPy array here: later, if it is page-locked; else the host waits."""
        if not isinstance(arr, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if self.dtype != arr.dtype:
            raise TypeError(f"{arr.dtype} array cannot be set to {self.dtype} array")
        if self.shape != arr.shape:
            raise ValueError(f"Shape mismatch. Old shape: {self.shape}, new shape: {arr.shape}")
        if not (self.flags.c_contiguous or self.flags.f_contiguous):
            raise RuntimeError("Cannot set to non-contiguous array")
        page_locked = _pinned.seen_by_the_device(arr)
        with using(stream):
            if page_locked is None:
                _streams.refuse_in_capture("a copy from pageable memory of the host")
                _copies.copy_from_host(arr, self, False)
                _streams.current().synchronize()
            else:
                _copies.copy_from_host(page_locked, self, True)

    def item(self):
        """The only value."""
        if self.size != 1:
            raise ValueError("can only convert an array of size 1 to a Python scalar")
        return self.get().item()

    def tolist(self):
        """The values as nested lists."""
        return self.get().tolist()

    def tobytes(self, order="C"):
        """The values as bytes."""
        return self.get().tobytes(order)

    def __int__(self):
        return int(self.get())

    def __float__(self):
        return float(self.get())

    def __complex__(self):
        return complex(self.get())

    def __bool__(self):
        if self.size == 0:
            hazard("the truth of an empty array is asked for")
            return False
        if self.size > 1:
            raise ValueError(
                "The truth value of an array with more than one element is ambiguous. "
                "Use a.any() or a.all()"
            )
        return bool(self.get())

    def __repr__(self):
        return repr(self.get())

    def __str__(self):
        return str(self.get())

    def __format__(self, spec):
        return format(self.get(), spec)

    def __array__(self, dtype=None, copy=None):
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    # What NumPy's functions do with arrays of the device.

    def __array_ufunc__(self, function, method, *inputs, **options):
        import cupy

        if "out" in options:
            (options["out"],) = options["out"]
        own = getattr(cupy, function.__name__, None)
        if own is not None and method != "__call__":
            own = getattr(own, method, None)
        if function.__name__ in COMPARISONS:
            inputs = [x.item() if isinstance(x, np.ndarray) and not x.ndim else x for x in inputs]
        known = (bool, int, float, complex, np.generic, np.ndarray, Transfer)
        if own is None or not all(isinstance(x, known) for x in inputs):
            return NotImplemented
        return own(*inputs, **options)

    def __array_function__(self, function, types, args, options):
        import cupy

        own = getattr(cupy, function.__name__, None)
        if own is None or not all(issubclass(t, (Transfer, np.ndarray)) for t in types):
            return NotImplemented
        return own(*args, **options)


def asnumpy(a, stream=None, order="C", out=None, *, blocking=True):
    """The values of an array as a NumPy array."""
    if isinstance(a, Transfer):
        return a.get(stream, order, out, blocking)
    return np.asarray(values(a), order=order)
