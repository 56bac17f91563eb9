"""Indices of arrays: views, and what arrays of indices pick out or fill in."""

import numpy as np

from cupy import _dtypes, _streams
from cupy._array import Array, produce, values, view, write
from cupy._clocks import wait
from cupy._notes import count, hazard


def prepared(slices):
    """The parts of an index, arrays of the host brought to the device."""
    return [_part(s) for s in (slices if isinstance(slices, tuple) else (slices,))]


def _part(s):
    if s is None or s is Ellipsis:
        return s
    if isinstance(s, slice):
        if any(isinstance(x, Array) for x in (s.start, s.stop, s.step)):
            raise TypeError("slice indices must be integers or None or have an __index__ method")
        return s
    if np.isscalar(s) and not isinstance(s, (bool, np.bool_)):
        return int(s)
    if not isinstance(s, Array):
        from cupy._creation import asarray

        empty = isinstance(s, (list, tuple)) and not len(s)
        s = asarray(np.array(s, np.int32 if empty else None))
    if s.dtype.kind not in "biu":
        raise IndexError(
            f"arrays used as indices must be of integer or boolean type. (actual: {s.dtype.type})"
        )
    return s


def numpy_key(a, key):
    """The index for NumPy, as the arrays in it are now: numbers that are too large go round.

    Parameters
    ----------
    a : NumPy array that is indexed
    key : parts of the index, NumPy arrays among them
    """
    if sum(_is_mask(k) for k in key) > 1:
        raise NotImplementedError("stand-in: an index of several masks is not written")
    n_axes = sum(_axes_of(k) for k in key)
    found, axis = [], 0
    for k in key:
        is_array = isinstance(k, np.ndarray) and not _is_mask(k)
        found.append(within(k, a.shape[axis]) if is_array else k)
        axis += a.ndim - n_axes if k is Ellipsis else _axes_of(k)
    return tuple(found)


def within(indices, length):
    """Indices as CuPy takes them, which goes round an axis without a word."""
    if indices.size and length and (indices.min() < -length or indices.max() >= length):
        hazard(f"an index is out of range 0..{length - 1}, and CuPy goes round silently")
        return indices % length
    return indices


def _is_mask(k):
    return isinstance(k, (Array, np.ndarray)) and k.dtype.kind == "b"


def _axes_of(k):
    if k is None or k is Ellipsis:
        return 0
    return k.ndim if _is_mask(k) else 1


class Indexing:
    """The part of `ndarray` that takes indices."""

    __slots__ = ()

    def __len__(self):
        if not self.ndim:
            raise TypeError("len() of unsized object")
        return self.shape[0]

    def __iter__(self):
        if not self.ndim:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(self.shape[0]))

    def __getitem__(self, slices):
        key = prepared(slices)
        if not any(k is Ellipsis for k in key):
            key.append(Ellipsis)  # what is left has no axis, and is an array all the same
        arrays = [k for k in key if isinstance(k, Array)]
        if not arrays:
            return view(self, self._a[tuple(key)])
        return produce(
            "take", lambda a, *key: a[numpy_key(a, key)].copy(), self, *key, n=_kernels(arrays)
        )

    def __setitem__(self, slices, value):
        key = prepared(slices)
        arrays = [k for k in key if isinstance(k, Array)]
        if not arrays:
            self._fill_part(tuple(key), value)
            return
        _refuse_doubles(arrays)
        _dtypes.checked(value.dtype if isinstance(value, Array) else np.asarray(value).dtype)
        if not isinstance(value, Array):
            from cupy._creation import asarray

            value = asarray(np.asarray(value, self.dtype))
        to, source, at = self._a, _without_ones(value._a), [values(k) for k in key]

        def scatter():
            with np.errstate(all="ignore"):
                to[numpy_key(to, at)] = source.astype(to.dtype)

        n = _kernels(arrays) + int(value.dtype != self.dtype)
        _streams.submit("scatter", scatter, [value, *arrays], [self], n=n)

    def _fill_part(self, key, value):
        part = view(self, self._a[key if Ellipsis in key else (*key, Ellipsis)])
        if isinstance(value, Array):
            if not _is_same(part, value):  # CuPy copies nothing after `x[...] += y` either
                write("copy", part, _without_ones, value)
            return
        value = np.asarray(value, self.dtype)
        if value.shape != ():
            raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
        write("fill", part, lambda: value)

    def take(self, indices, axis=None, out=None):
        """Values at indices along an axis."""
        if out is not None:
            raise NotImplementedError("stand-in: take(out=) is not written")
        if not isinstance(indices, Array):
            from cupy._creation import asarray

            indices = asarray(np.asarray(indices))
        length = self.size if axis is None else self.shape[axis]

        return produce("take", lambda a, at: np.take(a, within(at, length), axis), self, indices)


def _kernels(arrays):
    """Kernels of an index with arrays; masks are counted by the host, which waits for that."""
    if any(map(_is_mask, arrays)):
        _streams.refuse_in_capture("an index by a mask, whose true values the host counts")
        count("launch", 2, "mask")
        count("d2h", what="mask")
        wait("mask", _streams.current()._clock.known())
    return 1 if len(arrays) == 1 else 2 + len(arrays)


def _is_same(x, y):
    places = [(z.data.ptr, z.shape, z.strides, z.dtype) for z in (x, y)]
    return places[0] == places[1]


def _without_ones(a):
    """The values of an assignment, without leading axes of one."""
    while a.ndim and a.shape[0] == 1:
        a = a[0]
    return a


def _refuse_doubles(arrays):
    """Where several values meet in one place, a device keeps any of them."""
    if any(map(_is_mask, arrays)) or _streams.capturing() is not None:
        return
    indices = np.broadcast_arrays(*[x._a for x in arrays])
    flat = np.stack([i.reshape(-1) for i in indices], axis=1)
    if len(flat) > 1 and len(np.unique(flat, axis=0)) < len(flat):
        hazard("several values are written to one place")
