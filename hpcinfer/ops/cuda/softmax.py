"""Largest logit and sum of exponentials of every row, each row cut into slices."""

from __future__ import annotations

import numpy as np

from hpcinfer import array
from hpcinfer.array import Array
from hpcinfer.ops.cuda.runtime.launch import launch

OPTIONS = ((),)
KERNELS = ("softmax_parts",)

# Threads of a block, columns of a slice at least, and blocks that keep a large device busy.
_THREADS, _FEWEST_COLUMNS, _BUSY_BLOCKS = 256, 1024, 4096


def softmax_parts(x: Array, targets: Array, start: int) -> tuple[Array, Array, Array]:
    """As `ops.softmax.softmax_parts`."""
    R, n = x.shape
    if not (0 < R < 2**16 and 0 < n < 2**31) or x.dtype != np.float32 or not x.flags.c_contiguous:
        return NotImplemented
    xp = array.namespace(x)
    slices = max(1, min(n // _FEWEST_COLUMNS, _BUSY_BLOCKS // R))
    span = -(-n // slices)
    slices = -(-n // span)

    # The targets' columns, and a ticket for every row.
    column = np.asarray(targets, np.int64) - start
    places = np.zeros((2, R), np.int32)
    places[0] = np.where((column >= 0) & (column < n), column, -1)
    parts, result = xp.empty((R, slices, 2), np.float64), xp.empty((R, 3), np.float64)
    launch(
        "softmax", "softmax_parts", (slices, R), _THREADS,
        x, xp.asarray(places), parts, result, np.int64(n), n, span,
    )  # fmt: skip
    return tuple(np.ascontiguousarray(array.host(result).T))
