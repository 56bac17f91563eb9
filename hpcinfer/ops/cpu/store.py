"""Writing keys and values into the pages of a cache, rounded on the way."""

import numpy as np

from hpcinfer import array
from hpcinfer.ops.cpu.compile import compiled
from hpcinfer.ops.cpu.linear import bfloat16_bits


def store(x, rows, pages, slots):
    """As `ops.store.store`, for bfloat16 and float32."""
    if pages.dtype == array.BFLOAT16:
        _store_rounded(x, rows, pages.view(np.uint16), slots)
    elif pages.dtype == np.float32:
        _store(x, rows, pages, slots)
    else:
        return NotImplemented
    return None


@compiled
def _store_rounded(x, rows, pages, slots):
    page = pages.shape[2]
    for i in range(len(rows)):
        for g in range(x.shape[1]):
            for d in range(x.shape[2]):
                value = bfloat16_bits(x[rows[i], g, d])
                pages[slots[i] // page, g, slots[i] % page, d] = value


@compiled
def _store(x, rows, pages, slots):
    page = pages.shape[2]
    for i in range(len(rows)):
        for g in range(x.shape[1]):
            for d in range(x.shape[2]):
                pages[slots[i] // page, g, slots[i] % page, d] = x[rows[i], g, d]
