"""Attention of many queries in bfloat16: keys and values packed, scores in blocks.

Keys and values are packed once, for products of pairs. A block of queries then meets a block of
keys at a time, none behind the last that one of them sees: its scores, weights and sums of values
stay in the cache of a core.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hpcinfer import array, node
from hpcinfer.array import Array
from hpcinfer.ops import attention as plain
from hpcinfer.ops.cpu.attention_decode import LOWEST, aligned
from hpcinfer.ops.cpu.products import onednn
from hpcinfer.ops.cpu.runtime import features, launch
from hpcinfer.ops.cpu.runtime.compile import compiled, inlined
from hpcinfer.ops.cpu.simd.pairs import pack_keys, pack_values, paired_product
from hpcinfer.ops.cpu.simd.rounding import bfloat16_bits
from hpcinfer.ops.cpu.simd.softmax import largest_of, weights_of
from hpcinfer.ops.cpu.simd.vectors import exp

# Rows (queries times heads of a group) and keys of a block; rows and keys of a tile of products.
_ROWS, _BLOCK, _TILE_ROWS, _TILE = 84, 512, 6, 64

_PRODUCT, _ADD_PRODUCT = (paired_product(_TILE_ROWS, 4, add=add) for add in (False, True))
_ADD_COLUMN = paired_product(_TILE_ROWS, 1, add=True)

_FIRST = np.zeros(1, np.int64)  # place of the only page


def packs(dtype: np.dtype) -> bool:
    """True if keys and values of this type are packed here for products of pairs."""
    tiles = features.has("amx_bf16") and onednn.library() is not None
    return dtype == array.BFLOAT16 and features.has("avx512_bf16") and not tiles


def attention(
    q: Array,
    k: Array,
    v: Array,
    q_pos: Array,
    k_pos: Array,
    *,
    bounds: Array,
    scale: float,
    window: int | None,
    softcap: float | None,
    between: Callable[[], None] | None,
) -> tuple[Array, Array]:
    """As `ops.attention.attention`, bfloat16; `bounds` as for `block_queries`."""
    # Let the keys ascend, with their columns side by side.
    if (np.diff(k_pos) < 0).any():
        order = np.argsort(k_pos, kind="stable")
        k, v, k_pos = k[order], v[order], k_pos[order]
    k, v = (x if x.strides[-1] == 2 else np.ascontiguousarray(x) for x in (k, v))

    # All keys are one page.
    o = np.empty((*q.shape[:2], v.shape[-1]), np.float32)
    lse = np.empty(q.shape[:2], np.float32)
    first, last = plain.visible(q_pos, k_pos, window)
    pages = (x.view(np.uint16)[None].swapaxes(1, 2) for x in (k, v))
    block_queries(q, *pages, _FIRST, len(k), first, last, bounds, scale, softcap, between, o, lse)
    return o, lse


def block_queries(
    q: Array,
    k: Array,
    v: Array,
    places: Array,
    L: int,
    first: Array,
    last: Array,
    bounds: Array,
    scale: float,
    softcap: float | None,
    between: Callable[[], None] | None,
    o: Array,
    lse: Array,
) -> None:
    """Attention of many queries of a sequence to L keys in pages, in o and lse.

    Parameters
    ----------
    q : (S, H, K) float32
    k, v : (pages, G, page, K) uint16; the page a multiple of 16, or a single one
    places : (n,) int64, pages of the sequence
    first, last : (S,) int64, first key that each query sees, one behind the last
    bounds : (G+1,) query heads at which the groups begin and end
    between : function called after some blocks, or None
    o, lse : (S, H, width), (S, H) float32
    """
    G, K = k.shape[1], q.shape[2]
    tiles, n_pairs = -(-L // _TILE), -(-K // 32) * 16
    keys = node.large_empty((G, tiles, n_pairs, _TILE), np.uint32)
    values = node.large_empty((G, tiles * _TILE // 2, o.shape[2]), np.uint32)
    launch.over_rows(
        _pack, G * tiles, k, v, places, L, keys, values, work_bytes=keys.nbytes + values.nbytes
    )

    # Compute blocks of queries; between some of them messages are driven.
    of_block = max(1, _ROWS // int(np.diff(bounds).max()))
    tasks = -(-len(q) // of_block) * G
    step = tasks if between is None else 8
    for start in range(0, tasks, step):
        launch.over_rows(
            _many_queries, min(step, tasks - start),
            start, of_block, q, keys, values, first, last, bounds, np.float32(scale),
            np.float32(softcap or 0), o, lse, work_bytes=q.nbytes * L,
        )  # fmt: skip
        if between is not None:
            between()


@compiled
def _pack(start, stop, k, v, places, L, keys, values):
    """Tiles start..stop of 64 keys each, of the first group, then of the next ones."""
    page, tiles, width = k.shape[2], keys.shape[1], values.shape[2]
    for task in range(start, stop):
        g, tile = task // tiles, task % tiles
        for run in range(_TILE // 16):
            j = tile * _TILE + run * 16
            n = max(0, min(16, L - j))
            place, offset = (places[j // page], j % page) if n else (places[0], 0)
            row = k.ctypes.data + place * k.strides[0] + g * k.strides[1] + offset * k.strides[2]
            to = keys[g, tile].ctypes.data + run * 64
            pack_keys(row, k.strides[2], n, k.shape[3] // 2, to, _TILE * 4)
            row = v.ctypes.data + place * v.strides[0] + g * v.strides[1] + offset * v.strides[2]
            pack_values(row, v.strides[2], n, width, values[g, j // 2].ctypes.data)


@compiled
def _many_queries(
    start, stop, before, of_block, q, keys, values, first, last, bounds, scale, softcap, o, lse
):
    """Blocks of queries; each for the first group, then for the next ones."""
    G, most = len(keys), 0
    for g in range(G):
        most = max(most, bounds[g + 1] - bounds[g])
    rows = (of_block * most + _TILE_ROWS - 1) // _TILE_ROWS * _TILE_ROWS
    queries, weights = np.zeros((rows, q.shape[2]), np.uint16), np.zeros((rows, _BLOCK), np.uint16)
    scores, out, state = aligned(rows, _BLOCK), aligned(rows, o.shape[2]), aligned(4, rows)
    for task in range(before + start, before + stop):
        block, g = task // G, task % G
        s, s_stop = block * of_block, min(len(q), (block + 1) * of_block)
        head, n = bounds[g], bounds[g + 1] - bounds[g]
        n_rows = (s_stop - s) * n
        _round_queries(q, s, head, n, n_rows, queries)
        out[:], state[0], state[1] = np.float32(0), LOWEST, np.float32(0)

        # Meet the keys that any of the block sees, a block of them at a time.
        at, stop_at = first[s:s_stop].min() // _TILE * _TILE, last[s:s_stop].max()
        while at < stop_at:
            L = min(_BLOCK, stop_at - at)
            _block_scores(queries, n_rows, keys[g], at, L, scores)
            if softcap > 0:
                _cap(scores[:n_rows, :L], scale, softcap)
            factor = np.float32(1) if softcap > 0 else scale
            _block_weights(scores, n_rows, n, first[s:s_stop], last[s:s_stop], at, L, factor,
                           state, weights)  # fmt: skip
            _block_values(weights, n_rows, values[g], at, L, state[2], out)
            at += L
        _divide(out, state, s, head, n, n_rows, o, lse)


@inlined
def _round_queries(q, s, head, n, n_rows, queries):
    """Rows (queries from s on, times n heads from `head` on) of a block, as bfloat16."""
    for row in range(n_rows):
        for d in range(q.shape[2]):
            queries[row, d] = bfloat16_bits(q[s + row // n, head + row % n, d])


@inlined
def _divide(out, state, s, head, n, n_rows, o, lse):
    """The sums of a block divided by those of the weights, where their rows belong in o and lse."""
    for row in range(n_rows):
        total = state[1, row]
        empty = total == 0
        divisor = np.float32(1) / (np.float32(1) if empty else total)
        query, c = s + row // n, head + row % n
        for d in range(o.shape[2]):
            o[query, c, d] = out[row, d] * divisor
        lse[query, c] = -np.inf if empty else state[0, row] + np.log(total)


@compiled
def _block_scores(queries, n_rows, keys, at, L, scores):
    """Products of queries with the L keys from key `at` on, which begins a tile."""
    n_pairs, next_query, next_row = queries.shape[1] // 2, queries.strides[0], scores.strides[0]
    for j in range(0, L, _TILE):
        tile = keys[(at + j) // _TILE].ctypes.data
        for row in range(0, n_rows, _TILE_ROWS):
            query, out = queries[row].ctypes.data, scores[row, j:].ctypes.data
            _PRODUCT(query, next_query, n_pairs, tile, _TILE * 4, out, next_row, 0)


@compiled
def _cap(scores, scale, softcap):
    """Scores times `scale`, bounded by softcap · tanh(score / softcap)."""
    for row in range(scores.shape[0]):
        for j in range(scores.shape[1]):
            scores[row, j] = softcap * np.tanh(scores[row, j] * scale / softcap)


@compiled
def _block_weights(scores, n_rows, n, first, last, at, L, scale, state, weights):
    """Weights of the visible keys, relative to the largest score so far; 0 of the others."""
    m, total, corrections, found = state[0], state[1], state[2], state[3]
    at_scores, at_weights = scores.ctypes.data, weights.ctypes.data
    for s in range((n_rows + n - 1) // n):
        # Find the largest score of each row of a query.
        begin = min(max(first[s] - at, 0), L)
        end = max(min(last[s] - at, L), begin)
        rows = range(s * n, s * n + n)
        for row in rows:
            score = at_scores + row * scores.strides[0] + begin * 4
            corrections[row], m[row] = m[row], max(m[row], largest_of(score, end - begin) * scale)

        # Weigh those that the query sees, relative to it.
        for row in rows:
            score = at_scores + row * scores.strides[0] + begin * 4
            weight = at_weights + row * weights.strides[0] + begin * 2
            found[row] = weights_of(score, end - begin, scale, m[row], weight)
            for j in range(begin):
                weights[row, j] = 0
            for j in range(end, L + L % 2):
                weights[row, j] = 0

    # Correct the sums of before, and add theirs.
    for row in range(n_rows):
        corrections[row] = exp(corrections[row] - m[row])
        total[row] = total[row] * corrections[row] + found[row]


@compiled
def _block_values(weights, n_rows, values, at, L, corrections, out):
    """out = out · correction + weights · the L values from key `at` on."""
    n_pairs, width, next_value = (L + 1) // 2, out.shape[1], values.strides[0]
    next_weight, next_out, wide = weights.strides[0], out.strides[0], width // _TILE * _TILE
    for row in range(0, n_rows, _TILE_ROWS):
        weight, factors = weights[row].ctypes.data, corrections[row:].ctypes.data
        for d in range(0, wide, _TILE):
            value, to = values[at // 2, d:].ctypes.data, out[row, d:].ctypes.data
            _ADD_PRODUCT(weight, next_weight, n_pairs, value, next_value, to, next_out, factors)
        for d in range(wide, width, 16):
            value, to = values[at // 2, d:].ctypes.data, out[row, d:].ctypes.data
            _ADD_COLUMN(weight, next_weight, n_pairs, value, next_value, to, next_out, factors)
