"""Keys and values into the pages of a cache, rounded on the way."""

import numpy as np

from hpcinfer import array
from hpcinfer.ops.cuda.launch import NAMES, kept, launch, rows_of

OPTIONS = tuple((f"-DHELD={held}",) for held in NAMES.values())
KERNELS = ("store_rows",)

_THREADS = 256


def store(k, v, rows, k_pages, v_pages, slots):
    """As `ops.store.store`."""
    n, (_, G, page, K) = len(rows), k_pages.shape
    if not n or not k_pages.size:
        return None
    k_placed, v_placed = rows_of(k), rows_of(v) if v.size else (0, np.int64(0), np.int64(0))
    if k_placed is None or v_placed is None or not _served(k_pages, v_pages):
        return NotImplemented
    xp = array.namespace(k)
    places = kept(
        (rows, slots), (xp,), lambda: xp.asarray(np.concatenate([rows, slots]).astype(np.int32))
    )
    widest, both = max(K, v_pages.shape[3]), 2 if v.size else 1
    launch(
        "store", "store_rows", (-(-n * G * widest // _THREADS), both), _THREADS,
        k, v, places, k_pages, v_pages, n, G, page, K, v_pages.shape[3],
        *k_placed[1:], *v_placed[1:], options=(f"-DHELD={NAMES[k_pages.dtype.name]}",),
    )  # fmt: skip
    return None


def _served(k_pages, v_pages):
    return (
        k_pages.dtype.name in NAMES
        and k_pages.dtype == v_pages.dtype
        and k_pages.flags.c_contiguous
        and v_pages.flags.c_contiguous
    )
