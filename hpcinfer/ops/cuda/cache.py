"""Keys and values into the pages of a cache, and heads made ready for it in the same pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hpcinfer import array
from hpcinfer.array import Array
from hpcinfer.ops.cuda.runtime.launch import NAMES, copied, launch, on_device, rows_of

OPTIONS = tuple((f"-DHELD={held}",) for held in NAMES.values())
KERNELS = ("store_rows", "place_heads")

_THREADS = 256

# Heads of a block, and widest head.
_WARPS, _MOST_WIDTH = 4, 256


def store(k: Array, v: Array, rows: Array, k_pages: Array, v_pages: Array, slots: Array) -> None:
    """As `ops.cache.store`."""
    T, (_, G, page, K) = len(k), k_pages.shape
    if not len(rows) or not k_pages.size:
        return None
    k_placed, v_placed = rows_of(k), rows_of(v) if v.size else (0, np.int64(0), np.int64(0))
    if k_placed is None or v_placed is None or not _served(k_pages, v_pages):
        return NotImplemented
    widest, both = max(K, v_pages.shape[3]), 2 if v.size else 1
    launch(
        "cache", "store_rows", (-(-T * G * widest // _THREADS), both), _THREADS,
        k, v, _slots(k, T, rows, slots), k_pages, v_pages, T, G, page, K, v_pages.shape[3],
        *k_placed[1:], *v_placed[1:], options=(f"-DHELD={NAMES[k_pages.dtype.name]}",),
    )  # fmt: skip
    return None


def place_heads(
    qkv: Array,
    norms: Sequence[Array | None],
    eps: float,
    rotation: tuple[Array, Array] | None,
    rows: Array,
    k_pages: Array,
    v_pages: Array,
    slots: Array,
) -> Array:
    """As `ops.cache.place_heads`."""
    (T, heads, K), (_, G, page, _) = qkv.shape, k_pages.shape
    cos, sin = (None, None) if rotation is None else rotation
    half = 0 if cos is None else cos.shape[1]
    if not (qkv.size and k_pages.size and K <= _MOST_WIDTH and _served(k_pages, v_pages)):
        return NotImplemented
    if qkv.dtype != np.float32 or not qkv.flags.c_contiguous or k_pages.shape != v_pages.shape:
        return NotImplemented

    # Norm, rotate and store in one launch, a warp for each head of a token.
    xp, H = array.namespace(qkv), heads - 2 * G
    cos, sin = copied(qkv, cos, sin)
    y = xp.empty((T, H + G, K), np.float32)
    launch(
        "cache", "place_heads", (-(-T * heads // _WARPS),), 32 * _WARPS,
        qkv, *norms, cos, sin, _slots(qkv, T, rows, slots), y, k_pages, v_pages,
        T, H, G, K, half, page, float(eps),
        options=(f"-DHELD={NAMES[k_pages.dtype.name]}",), early=True,
    )  # fmt: skip
    return y


def _slots(x, T, rows, slots):
    """(T,) int32 of the device, where each token is stored, -1 for nowhere."""

    def build():
        of_tokens = np.full(T, -1, np.int32)
        of_tokens[rows] = slots
        return of_tokens

    return on_device(x, (rows, slots), build)


def _served(k_pages, v_pages):
    return (
        k_pages.dtype.name in NAMES
        and k_pages.dtype == v_pages.dtype
        and k_pages.flags.c_contiguous
        and v_pages.flags.c_contiguous
    )
