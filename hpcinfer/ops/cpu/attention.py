"""Attention: one query of a sequence after the other over cached pages, or blocks of many queries.

Decoding reads every cached key and value once, for all query heads that share it. Many queries of a
sequence meet keys and values that were packed for products of pairs, which costs one pass over
them: a block of queries at a time, and no key behind the last that one of them sees. Its scores
stay in the cache of a core. Where a processor has an instruction for products of whole tiles,
oneDNN computes them.
"""

from functools import cache

import numpy as np

from hpcinfer import array, capture
from hpcinfer.ops import attention as plain
from hpcinfer.ops.cpu.attention_decode import single_queries
from hpcinfer.ops.cpu.attention_onednn import BLOCK, RunningSoftmax, Space, cached_rows
from hpcinfer.ops.cpu.attention_prefill import block_queries, packs
from hpcinfer.ops.cpu.products import onednn
from hpcinfer.ops.cpu.runtime import launch

# Queries of one sequence up to which each is computed by itself.
_SINGLE = 8


# ---- one query after the other ----


def paged_attention(
    q, q_tokens, k_pages, v_pages, block_table, *,
    scale, groups, window=None, v_columns=None, dtype=np.float32,
):  # fmt: skip
    """As `ops.attention.paged_attention`, not rounded."""
    T, H, K = q.shape
    if dtype != np.float32:
        return NotImplemented
    page = k_pages.shape[2]
    width = v_pages.shape[-1] if v_columns is None else v_columns
    if page % 32 or K % 16 or width % 16 or not T or not groups:
        return NotImplemented
    bounds = _group_bounds(tuple(groups))
    if bounds is None or bounds[-1] != H or k_pages.shape[1:] != (len(groups), page, K):
        return NotImplemented
    table = block_table.table(q_tokens, window)
    if table.most_queries > _SINGLE and not packs(k_pages.dtype):
        return NotImplemented
    o, lse = launch.empty((T, H, width), np.float32), launch.empty((T, H), np.float32)
    keys = _bits(k_pages)
    values = keys if v_columns is not None else _bits(v_pages)
    if table.most_queries > _SINGLE:
        for rows, *span in table.spans:
            block_queries(
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


@cache
def _group_bounds(groups):
    """Query heads at which the groups begin, and at which the last one ends; None with gaps."""
    if [start for start, _ in groups] != [0, *(stop for _, stop in groups[:-1])]:
        return None
    return capture.constant(np.array([start for start, _ in groups] + [groups[-1][1]]))


def _bits(pages):
    """Pages as the kernels know their types: bfloat16 as uint16, float16 as int16."""
    if pages.dtype == array.BFLOAT16:
        return pages.view(np.uint16)
    return pages.view(np.int16) if pages.dtype == np.float16 else pages


# ---- many queries, keys and values packed ----


# ---- many queries, products by oneDNN ----


def attention(
    q, k, v, q_pos, k_pos, *, scale, groups, window=None, softcap=None, between=None, v_columns=None
):
    """As `ops.attention.attention`, for bfloat16 keys; queries and weights are rounded."""
    S, H, K = q.shape
    if k.dtype != array.BFLOAT16 or not (S and len(k) and groups):
        return NotImplemented
    width = v.shape[-1] if v_columns is None else v_columns
    bounds = _group_bounds(tuple(groups))
    if packs(k.dtype) and bounds is not None and bounds[-1] == H and not (K % 2 or width % 16):
        return _packed(q, k, v, q_pos, k_pos, bounds, scale, window, softcap, between, width)
    if not onednn.serves(k.dtype):
        return NotImplemented
    o, lse = np.zeros((S, H, width), np.float32), np.full((S, H), -np.inf, np.float32)
    running = [RunningSoftmax(S, stop - start, width) for start, stop in groups]
    queries = [cached_rows(q[:, start:stop], k.dtype) for start, stop in groups]
    space = Space()
    for columns, visible in plain.blocks(q_pos, k_pos, window, H / len(groups), BLOCK):
        for g, state in enumerate(running):
            k_block = k[columns, g]
            v_block = v[columns, g] if v_columns is None else k_block[:, :v_columns]
            for rows, hidden in visible:
                state.add(rows, queries[g], k_block, v_block, hidden, scale, softcap, space)
                if between is not None:
                    between()
    for (start, stop), state in zip(groups, running, strict=True):
        o[:, start:stop], lse[:, start:stop] = state.result()
    return o, lse


def _packed(q, k, v, q_pos, k_pos, bounds, scale, window, softcap, between, width):
    """Attention by packed keys and values; v (L, G, 0) if the values are columns of k."""
    if (np.diff(k_pos) < 0).any():
        order = np.argsort(k_pos, kind="stable")
        k, v, k_pos = k[order], v[order], k_pos[order]
    v = v if v.shape[-1] else k
    k, v = (x if x.strides[-1] == 2 else np.ascontiguousarray(x) for x in (k, v))
    o = np.empty((*q.shape[:2], width), np.float32)
    lse = np.empty(q.shape[:2], np.float32)
    first, last = plain.visible(q_pos, k_pos, window)

    # All keys are one page.
    pages = (x.view(np.uint16)[None].swapaxes(1, 2) for x in (k, v))
    block_queries(q, *pages, _FIRST, len(k), first, last, bounds, scale, softcap, between, o, lse)
    return o, lse


_FIRST = np.zeros(1, np.int64)
