"""Sums and copies into arrays that are there."""

from __future__ import annotations

import numpy as np

from hpcinfer.array import Array
from hpcinfer.ops.cpu.runtime import launch
from hpcinfer.ops.cpu.runtime.compile import compiled


def add_into(y: Array, x: Array) -> Array:
    """As `ops.inplace.add_into`."""
    if y.dtype != np.float32 or x.dtype != np.float32 or y.ndim != 2:
        return NotImplemented
    rows = x.reshape(1, -1) if x.ndim == 1 else x
    if rows.shape[1:] != y.shape[1:] or len(rows) not in (1, len(y)):
        return NotImplemented
    launch.over_rows(_add, len(y), y, rows, work_bytes=2 * y.nbytes)
    return y


@compiled
def _add(start, stop, y, x):
    for t in range(start, stop):
        row = t if len(x) > 1 else 0
        for i in range(y.shape[1]):
            y[t, i] += x[row, i]


def copy_into(y: Array, x: Array) -> Array:
    """As `ops.inplace.copy_into`."""
    if y.dtype != np.float32 or x.dtype != np.float32 or y.ndim != 3 or y.shape != x.shape:
        return NotImplemented
    launch.over_rows(_copy, len(y), y, x, work_bytes=2 * y.nbytes)
    return y


@compiled
def _copy(start, stop, y, x):
    for t in range(start, stop):
        for h in range(y.shape[1]):
            for i in range(y.shape[2]):
                y[t, h, i] = x[t, h, i]
