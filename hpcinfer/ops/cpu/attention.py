"""Attention: which of three ways serves the queries, and what it is given.

Few queries of a sequence meet the cache as it lies, one after the other (`attention_decode`). Many
meet keys and values that were packed for products of pairs, which costs one pass over them, a block
of queries at a time, so that its scores stay in the cache of a core (`attention_prefill`). Where a
processor has an instruction for products of whole tiles, oneDNN computes them (`attention_onednn`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from hpcinfer import array, capture
from hpcinfer.array import Array
from hpcinfer.ops.cpu import attention_onednn, attention_prefill
from hpcinfer.ops.cpu.attention_decode import single_queries
from hpcinfer.ops.cpu.products import onednn
from hpcinfer.ops.cpu.runtime import launch
from hpcinfer.ops.cpu.simd.rounding import bits

# Queries of one sequence up to which each is computed by itself.
_SINGLE = 8


def paged_attention(
    q: Array,
    q_tokens: Array,
    k_pages: Array,
    v_pages: Array,
    block_table: Any,
    *,
    scale: float,
    groups: Sequence[tuple[int, int]],
    window: int | None = None,
    v_columns: int | None = None,
    dtype: np.dtype = np.float32,
) -> tuple[Array, Array]:
    """As `ops.attention.paged_attention`, not rounded."""
    (T, H, K), page = q.shape, k_pages.shape[2]
    width = v_pages.shape[-1] if v_columns is None else v_columns
    bounds = _group_bounds(tuple(groups), H)
    if dtype != np.float32 or bounds is None or not T or page % 32 or K % 16 or width % 16:
        return NotImplemented
    if k_pages.shape[1:] != (len(groups), page, K):
        return NotImplemented
    table = block_table.table(q_tokens, window)
    if table.most_queries > _SINGLE and not attention_prefill.packs(k_pages.dtype):
        return NotImplemented

    # Write the rows of all sequences where they belong.
    o, lse = launch.empty((T, H, width), np.float32), launch.empty((T, H), np.float32)
    keys = bits(k_pages)
    values = keys if v_columns is not None else bits(v_pages)
    if table.most_queries > _SINGLE:
        for rows, *span in table.spans:
            attention_prefill.block_queries(
                q[rows], keys, values, *span, bounds, scale, None, None, o[rows], lse[rows]
            )
        return o, lse
    starts, places, numbers = table.pages
    launch.over_rows(
        single_queries, T * len(groups),
        q, table.positions, starts, places, numbers, keys, values,
        bounds, float(scale), -1 if window is None else window, o, lse,
        work_bytes=places.size * page * (K + width) * k_pages.itemsize * len(groups),
    )  # fmt: skip
    return o, lse


def attention(
    q: Array,
    k: Array,
    v: Array,
    q_pos: Array,
    k_pos: Array,
    *,
    scale: float,
    groups: Sequence[tuple[int, int]],
    window: int | None = None,
    softcap: float | None = None,
    between: Callable[[], None] | None = None,
    v_columns: int | None = None,
) -> tuple[Array, Array]:
    """As `ops.attention.attention`, for bfloat16 keys; queries and weights are rounded."""
    S, H, K = q.shape
    if k.dtype != array.BFLOAT16 or not (S and len(k) and groups):
        return NotImplemented
    width = v.shape[-1] if v_columns is None else v_columns
    bounds = _group_bounds(tuple(groups), H)
    v = k[..., :width] if v_columns is not None else v
    options = {"scale": scale, "window": window, "softcap": softcap, "between": between}
    if bounds is not None and attention_prefill.packs(k.dtype) and not (K % 2 or width % 16):
        return attention_prefill.attention(q, k, v, q_pos, k_pos, bounds=bounds, **options)
    if onednn.serves(k.dtype):
        return attention_onednn.attention(q, k, v, q_pos, k_pos, groups=groups, **options)
    return NotImplemented


@cache
def _group_bounds(groups, H):
    """Query heads at which the groups begin, and at which the last one ends; None with gaps."""
    starts, stops = ([group[i] for group in groups] for i in (0, 1))
    if starts != [0, *stops[:-1]] or stops[-1:] != [H]:
        return None
    return capture.constant(np.array([*starts, H]))
