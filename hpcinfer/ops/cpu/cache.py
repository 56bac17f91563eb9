"""Writing keys and values into the pages of a cache, rounded on the way."""

from __future__ import annotations

import numpy as np

from hpcinfer import array
from hpcinfer.array import Array
from hpcinfer.ops.cpu.runtime import launch
from hpcinfer.ops.cpu.runtime.compile import compiled
from hpcinfer.ops.cpu.simd.rounding import bfloat16_bits


def store(k: Array, v: Array, rows: Array, k_pages: Array, v_pages: Array, slots: Array) -> None:
    """As `ops.cache.store`, for bfloat16 and float32."""
    if (k.shape[1:], v.shape[1:]) != tuple(
        (pages.shape[1], pages.shape[3]) for pages in (k_pages, v_pages)
    ):
        return NotImplemented  # a rank without heads has pages without keys
    if k_pages.dtype == array.BFLOAT16:
        pages = k_pages.view(np.uint16), v_pages.view(np.uint16)
        launch.call(_store_rounded, k, v, rows, *pages, slots)
    elif k_pages.dtype == np.float32:
        launch.call(_store, k, v, rows, k_pages, v_pages, slots)
    else:
        return NotImplemented
    return None


@compiled
def _store_rounded(k, v, rows, k_pages, v_pages, slots):
    page = k_pages.shape[2]
    for i in range(len(rows)):
        row, place, offset = rows[i], slots[i] // page, slots[i] % page
        for g in range(k.shape[1]):
            for d in range(k.shape[2]):
                k_pages[place, g, offset, d] = bfloat16_bits(k[row, g, d])
            for d in range(v.shape[2]):
                v_pages[place, g, offset, d] = bfloat16_bits(v[row, g, d])


@compiled
def _store(k, v, rows, k_pages, v_pages, slots):
    page = k_pages.shape[2]
    for i in range(len(rows)):
        row, place, offset = rows[i], slots[i] // page, slots[i] % page
        for g in range(k.shape[1]):
            for d in range(k.shape[2]):
                k_pages[place, g, offset, d] = k[row, g, d]
            for d in range(v.shape[2]):
                v_pages[place, g, offset, d] = v[row, g, d]
