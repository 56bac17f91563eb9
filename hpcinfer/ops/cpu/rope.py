"""Rotation of queries and keys in one pass."""

from __future__ import annotations

import numpy as np

from hpcinfer.array import Array
from hpcinfer.ops.cpu.runtime import launch
from hpcinfer.ops.cpu.runtime.compile import compiled


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """As `ops.rope.rotate`."""
    if x.dtype != np.float32 or len(cos) != len(x) or 2 * cos.shape[1] > x.shape[2]:
        return NotImplemented
    y = launch.empty(x.shape, np.float32)
    launch.over_rows(_rotate, len(x), x, cos, sin, y, work_bytes=x.nbytes)
    return y


@compiled
def _rotate(start, stop, x, cos, sin, y):
    half = cos.shape[1]
    for t in range(start, stop):
        for h in range(x.shape[1]):
            for i in range(half):
                first, second = x[t, h, i], x[t, h, half + i]
                y[t, h, i] = first * cos[t, i] - second * sin[t, i]
                y[t, h, half + i] = second * cos[t, i] + first * sin[t, i]
            for i in range(2 * half, x.shape[2]):
                y[t, h, i] = x[t, h, i]
