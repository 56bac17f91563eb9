"""Rotary embedding in one pass."""

from __future__ import annotations

import numpy as np

from hpcinfer import array
from hpcinfer.array import Array
from hpcinfer.ops.cuda.runtime.launch import copied, launch, rows_of

OPTIONS = ((),)
KERNELS = ("rotate",)

_THREADS = 256


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """As `ops.rope.rotate`."""
    placed = rows_of(x) if x.ndim == 3 else None
    if placed is None or not all(_is_table(table, len(x)) for table in (cos, sin)):
        return NotImplemented
    (_, H, K), half = x.shape, cos.shape[1]
    cos, sin = copied(x, cos, sin)
    y = array.namespace(x).empty(x.shape, np.float32)
    items = x.size // K * (K - half)
    _, *strides = placed
    launch(
        "rope", "rotate", (-(-items // _THREADS),), _THREADS,
        x, cos, sin, y, items, H, K, half, *strides,
    )  # fmt: skip
    return y


def _is_table(x, n):
    return x.dtype == np.float32 and x.shape[0] == n and x.flags.c_contiguous
