"""Shapes and types that attention by matrix units serves, in `prefill` and `decode`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType

import numpy as np

from hpcinfer import array
from hpcinfer.array import Array
from hpcinfer.ops.cuda.runtime.launch import NAMES, aligned, has_matrix_units

PAGE = 32  # keys of a page
MOST_COLUMNS = 256  # of a head


@functools.cache
def shared_memory(xp: ModuleType) -> tuple[int, int]:
    """Bytes of shared memory of a block, and of a multiprocessor, of the device."""
    if xp is np:
        return 227 << 10, 228 << 10
    attributes = xp.cuda.Device().attributes
    names = "MaxSharedMemoryPerBlockOptin", "MaxSharedMemoryPerMultiprocessor"
    return tuple(attributes[name] for name in names)


def are_served(q: Array, k: Array, v: Array, groups: Sequence[tuple[int, int]]) -> bool:
    """True if the kernels serve these types and shapes, of keys (..., G, ..., K) in any way."""
    # Ask for the types, for whole groups of heads, and that loads of 16 bytes are aligned.
    (T, H, K), G = q.shape, k.shape[1]
    return (
        q.dtype == np.float32
        and k.dtype.name in NAMES
        and array.is_half(k.dtype)
        and k.dtype == v.dtype
        and k.shape == v.shape
        and K == k.shape[-1]
        and K % 16 == 0
        and 0 < K <= MOST_COLUMNS
        and 0 < T * H < 2**31
        and len(k) > 0
        and G == len(groups)
        and all(0 <= start <= stop <= H for start, stop in groups)
        and sum(stop - start for start, stop in groups) == H
        and q.strides[0] % (4 * K) == 0
        and q.strides[1:] == (4 * K, 4)
        and k.flags.c_contiguous
        and v.flags.c_contiguous
        and aligned(q, k, v)
        and has_matrix_units(k)
    )
