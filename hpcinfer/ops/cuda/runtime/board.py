"""Arrays of the host that travel to the device in one copy, and come back in one."""

from __future__ import annotations

import numpy as np

from hpcinfer import array

_BYTES = 8  # every array begins at a multiple


class Board:
    """The arrays in device memory, one behind the other.

    Attributes
    ----------
    arrays : as they were given
    """

    def __init__(self, xp, *arrays):
        self.arrays = arrays
        ends = np.cumsum([-(-x.nbytes // _BYTES) * _BYTES for x in arrays]).tolist()
        self._starts = [0, *ends]
        whole = np.zeros(ends[-1], np.uint8)
        for x, start in zip(arrays, self._starts, strict=False):
            whole[start : start + x.nbytes] = x.reshape(-1).view(np.uint8)
        self._there = xp.asarray(whole)

    def __getitem__(self, i):
        """Array number `i` in device memory, as bytes."""
        return self._there[self._starts[i] : self._starts[i + 1]]

    def fetch(self, first: int) -> list[np.ndarray]:
        """The arrays from number `first` on, as they are now in device memory."""
        there, back = self._starts[first], []
        whole = array.host(self._there[there:])
        for x, start in zip(self.arrays[first:], self._starts[first:], strict=False):
            part = whole[start - there : start - there + x.nbytes]
            back.append(part.view(x.dtype).reshape(x.shape))
        return back
