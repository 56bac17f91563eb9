"""Other shapes and types of an array: views where that can be, else copies."""

import numpy as np

from cupy import _dtypes
from cupy._array import Array, produce, view, write
from cupy._notes import hazard


class Shapes:
    """The part of `ndarray` that lays values out anew."""

    __slots__ = ()

    T = property(lambda self: view(self, self._a.T))

    def reshape(self, *shape, order="C", copy=None):
        """Another shape, of the same memory where that can be."""
        if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
            shape = tuple(shape[0])
        if any(isinstance(n, Array) for n in shape):
            raise TypeError("'cupy.ndarray' object cannot be interpreted as an integer")
        a = self._a.reshape(shape, order=order)
        if not a.size or np.may_share_memory(a, self._a):
            return view(self, a)
        return produce("reshape", lambda a: a.reshape(shape, order=order), self)

    def ravel(self, order="C"):
        """One axis, of the same memory where that can be."""
        return self.reshape(-1)

    def flatten(self, order="C"):
        """A copy with one axis."""
        return self.reshape(-1).copy()

    def transpose(self, *axes):
        """The axes in another order."""
        if len(axes) == 1 and (axes[0] is None or isinstance(axes[0], (tuple, list))):
            axes = axes[0]
        return view(self, self._a.transpose(axes) if axes else self._a.T)

    def swapaxes(self, axis1, axis2):
        """Two axes for each other."""
        return view(self, self._a.swapaxes(axis1, axis2))

    def squeeze(self, axis=None):
        """No axes of one."""
        return view(self, self._a.squeeze(axis))

    def view(self, dtype=None, type=None):
        """The same memory as another type."""
        if dtype is None:
            return view(self, self._a.view())
        a, dtype = self._a, _dtypes.checked(dtype)
        other_size = dtype.itemsize != a.itemsize
        if other_size and not a.ndim:
            raise ValueError(
                "Changing the dtype of a 0d array is only supported if the itemsize is unchanged"
            )
        if other_size and a.size and a.shape[-1] != 1 and a.strides[-1] != a.itemsize:
            raise ValueError(
                "To change to a dtype of a different size, the last axis must be contiguous"
            )
        if a.size and a.ctypes.data % dtype.alignment:
            hazard(f"a view as {dtype} begins at no multiple of {dtype.alignment} bytes")
        return view(self, a.view(dtype))

    def astype(self, dtype, order="K", casting=None, subok=None, copy=True):
        """The values rounded to another type."""
        if casting is not None or subok is not None:
            raise TypeError("casting and subok are not supported yet")
        dtype = _dtypes.checked(dtype)
        if dtype == self.dtype and not copy:
            return self

        def cast(a):
            with np.errstate(all="ignore"):
                return a.astype(dtype, order=order)

        return produce("astype", cast, self)

    def copy(self, order="C"):
        """The values in memory of their own."""
        return produce("copy", lambda a: a.copy(order=order), self)

    def fill(self, value):
        """Write one value everywhere."""
        if not isinstance(value, Array):
            value = np.asarray(value, self.dtype)
        if value.shape != ():
            raise ValueError("non-scalar array cannot be used for fill")
        write("fill", self, lambda v: v, value)
