"""Attention: one query of a sequence after the other over cached pages, or blocks of many queries.

Decoding reads every cached key and value once, for all query heads that share it. Many queries of a
sequence meet keys and values that were packed for products of pairs, which costs one pass over
them: a block of queries at a time, and no key behind the last that one of them sees. Its scores
stay in the cache of a core. Where a processor has an instruction for products of whole tiles,
oneDNN computes them.
"""

from functools import cache

import numpy as np
from numba.extending import overload

from hpcinfer import array, capture
from hpcinfer.ops import attention as plain
from hpcinfer.ops.cpu import machine, onednn, parts
from hpcinfer.ops.cpu.compile import compiled
from hpcinfer.ops.cpu.rounding import bfloat16_bits, narrowed, prepared
from hpcinfer.ops.cpu.simd import Bfloat16Pairs, exp, kind_of
from hpcinfer.ops.cpu.simd_attention import (
    deal_lanes,
    fetch,
    largest_of,
    pack_keys,
    pack_values,
    page_scores,
    paired_product,
    soften,
    weigh,
    weights_of,
)

# Queries of one sequence up to which each is computed by itself.
_SINGLE = 8

# Below every score, and a float32 still if multiplied by log2 e.
_LOWEST, _LN2 = np.float32(-1e38), np.float32(np.log(2))


# ---- one query after the other ----

_KEYS = 128  # cached keys whose scores are held at a time
_AHEAD = 8192  # bytes from what is read to what is fetched meanwhile, at least
_SCORES_1, _SCORES_2, _SCORES_4, _SCORES_8 = (page_scores(heads) for heads in (1, 2, 4, 8))
_SOFTEN_1, _SOFTEN_2, _SOFTEN_4, _SOFTEN_8 = (soften(heads) for heads in (1, 2, 4, 8))
_WEIGH_1, _WEIGH_2, _WEIGH_4, _WEIGH_8 = (weigh(heads, 2) for heads in (1, 2, 4, 8))
_WEIGH_1_1, _WEIGH_2_1, _WEIGH_4_1, _WEIGH_8_1 = (weigh(heads, 1) for heads in (1, 2, 4, 8))


def paged_attention(
    q, q_tokens, k_pages, v_pages, books, *,
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
    table = books.table(q_tokens, window)
    if table.most_queries > _SINGLE and not _packs(k_pages.dtype):
        return NotImplemented
    o, lse = parts.empty((T, H, width), np.float32), parts.empty((T, H), np.float32)
    keys = _bits(k_pages)
    values = keys if v_columns is not None else _bits(v_pages)
    if table.most_queries > _SINGLE:
        for rows, *span in table.spans:
            _blocks(q[rows], keys, values, *span, bounds, scale, None, None, o[rows], lse[rows])
        return o, lse
    starts, places, numbers = table.pages
    parts.over_rows(
        _single_queries, T * len(groups),
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


@compiled
def _single_queries(
    start, stop, q, positions, bounds, places, numbers, k, v, groups, scale, window, o, lse
):
    G, page, K, width = k.shape[1], k.shape[2], k.shape[3], o.shape[2]
    most = 0
    for g in range(G):
        most = max(most, groups[g + 1] - groups[g])

    n_items = K // 2 if _in_pairs(k) else K

    # Lanes are dealt to so many heads at a time; more of them in turns.
    lanes = 1
    while lanes < min(most, 8) or (lanes == 1 and K % 32):
        lanes *= 2
    turns = (most + lanes - 1) // lanes
    queries, scores = _aligned(G * turns, K * lanes), _aligned(G * turns, _KEYS * lanes)
    state, out = _aligned(G * turns, 48), _aligned(G * turns * lanes, width)
    k_at, v_at, scores_at = k.ctypes.data, v.ctypes.data, scores.ctypes.data
    queries_at, out_at, state_at = queries.ctypes.data, out.ctypes.data, state.ctypes.data
    if start < stop and bounds[start // G] < bounds[start // G + 1]:
        t, g = start // G, start % G
        fetch(k_at + places[bounds[t]] * k.strides[0] + g * k.strides[1], k.strides[1])
    while start < stop:
        # All groups of a query, or those of this part: a page has them side by side.
        t, g_first = start // G, start % G
        g_stop = min(G, stop - t * G)
        start = t * G + g_stop
        position, before = positions[t], groups[g_first]
        rows = prepared(q[t, before : groups[g_stop]], k)
        for g in range(g_first, g_stop):
            for turn in range(turns):
                at = turn * lanes
                row = rows.ctypes.data + (groups[g] - before + at) * rows.strides[0]
                n, run = groups[g + 1] - groups[g] - at, g * turns + turn
                to = queries_at + run * queries.strides[0]
                deal_lanes(row, rows.strides[0], n, n_items, lanes, to)
        state[:], out[:] = np.float32(0), np.float32(0)
        state[:, :16] = _LOWEST
        begin = position - window if window >= 0 else -1
        i = bounds[t]
        while i < bounds[t + 1]:
            # As many pages as fit, their scores, and how many of their keys the query sees.
            i_first = i
            while i < bounds[t + 1] and (i + 1 - i_first) * page <= _KEYS:
                if numbers[i] * page > position:
                    break
                i += 1
            if i == i_first:
                break
            n_keys = (i - i_first) * page
            for u in range(i_first, i):
                done, key_position = (u - i_first) * page, numbers[u] * page
                seen = min(page, position + 1 - key_position)
                for g in range(g_first, g_stop):
                    ahead = _ahead(
                        k, v, k_at, v_at, places, g, g_first, g_stop, u, i, i_first, bounds[t + 1]
                    )
                    _page_scores(
                        k, lanes, queries_at + g * turns * queries.strides[0], queries.strides[0],
                        turns, k_at + places[u] * k.strides[0] + g * k.strides[1],
                        ahead,
                        scores_at + g * turns * scores.strides[0] + done * lanes * 4,
                        scores.strides[0],
                    )  # fmt: skip
                if seen < page or key_position <= begin:
                    for j in range(page):
                        if j >= seen or key_position + j <= begin:
                            scores[:, (done + j) * lanes : (done + j + 1) * lanes] = -np.inf

            # Weights relative to the largest score so far; what was summed is corrected to it.
            for run in range(g_first * turns, g_stop * turns):
                at, to = scores_at + run * scores.strides[0], state_at + run * state.strides[0]
                _soften_scores(k, at, n_keys, np.float32(scale), to, lanes)
                for c in range(lanes):
                    for d in range(width):
                        out[run * lanes + c, d] *= state[run, 32 + c]
            for u in range(i_first, i):
                seen = min(page, position + 1 - numbers[u] * page)
                weights = scores_at + (u - i_first) * page * lanes * (2 if _in_pairs(v) else 4)
                at = i + u - i_first
                for g in range(g_first, g_stop):
                    ahead = _ahead(
                        k, v, k_at, v_at, places, g, g_first, g_stop, at, i, i_first, bounds[t + 1]
                    )
                    _add_values(
                        v, lanes, weights + g * turns * scores.strides[0], scores.strides[0], turns,
                        seen, v_at + places[u] * v.strides[0] + g * v.strides[1],
                        out_at + g * turns * lanes * out.strides[0], out.strides[0], width, ahead,
                    )  # fmt: skip
        for g in range(g_first, g_stop):
            for c in range(groups[g + 1] - groups[g]):
                run, lane = g * turns + c // lanes, c % lanes
                total = np.float32(0)
                for part in range(lane, 16, lanes):
                    total += state[run, 16 + part]
                empty = total == 0
                factor = np.float32(1) / (np.float32(1) if empty else total)
                for d in range(width):
                    o[t, groups[g] + c, d] = out[g * turns * lanes + c, d] * factor
                lse[t, groups[g] + c] = (
                    -np.inf if empty else state[run, lane] * _LN2 + np.log(total)
                )


@compiled
def _ahead(k, v, k_at, v_at, places, g, g_first, g_stop, at, i, i_first, end):
    """Address of what is read `_AHEAD` bytes behind group g of a page.

    Read are the keys of the pages i_first..i, then their values, then the next keys: `at` counts
    pages so, from i_first on. A query's pages stop at `end`, where the next one's begin.
    """
    g += max(1, _AHEAD // k.strides[1])
    while g >= g_stop:
        g -= g_stop - g_first
        at += 1
    if at < i:
        return k_at + places[at] * k.strides[0] + g * k.strides[1]
    n = i - i_first
    if at < i + n:
        return v_at + places[at - n] * v.strides[0] + g * v.strides[1]
    at -= n
    to = g if at < end else g - g_first
    return k_at + places[min(at, len(places) - 1)] * k.strides[0] + to * k.strides[1]


@compiled
def _aligned(rows, columns):
    """Memory (rows, columns) float32; it begins a line of the cache."""
    room = np.empty(rows * columns + 16, np.float32)
    first = (-room.ctypes.data % 64) // 4
    return room[first : first + rows * columns].reshape(rows, columns)


def _in_pairs(x):
    """True if numbers of the type of x are multiplied in pairs."""


@overload(_in_pairs, inline="always")
def _in_pairs_as(x):
    paired = kind_of(x.dtype) is Bfloat16Pairs
    return lambda x: paired


@compiled
def _page_scores(k, lanes, queries, next_query, turns, row, ahead, out, next_out):
    """Scores with the keys of a page at `row`; fetches as much from `ahead` on meanwhile."""
    page, next_key = k.shape[2], k.strides[2]
    n = k.shape[3] // 2 if _in_pairs(k) else k.shape[3]
    for turn in range(turns):
        for j in range(0, page, 16):
            to, offset = out + j * lanes * 4, j * next_key
            further = row if turn else ahead + offset
            if lanes == 8:
                _SCORES_8(k, queries, row + offset, next_key, n, to, further)
            elif lanes == 4:
                _SCORES_4(k, queries, row + offset, next_key, n, to, further)
            elif lanes == 2:
                _SCORES_2(k, queries, row + offset, next_key, n, to, further)
            else:
                _SCORES_1(k, queries, row + offset, next_key, n, to, further)
        queries += next_query
        out += next_out


@compiled
def _soften_scores(k, scores, n_keys, scale, state, lanes):
    if lanes == 8:
        _SOFTEN_8(k, scores, n_keys, scale, state)
    elif lanes == 4:
        _SOFTEN_4(k, scores, n_keys, scale, state)
    elif lanes == 2:
        _SOFTEN_2(k, scores, n_keys, scale, state)
    else:
        _SOFTEN_1(k, scores, n_keys, scale, state)


@compiled
def _add_values(v, lanes, weights, next_weights, turns, n_keys, row, out, next_out, width, ahead):
    """out += weights · the values of one page's first n_keys keys, from `row` on.

    Fetches as much from `ahead` on meanwhile.
    """
    next_key, next_weight, page = v.strides[2], 4 * lanes, v.shape[2]
    for turn in range(turns):
        weight, to_heads = weights + turn * next_weights, out + turn * lanes * next_out
        for d in range(0, width - 16, 32):
            value, to = row + d * v.itemsize, to_heads + d * 4
            further = row if turn else ahead + d * v.itemsize * page
            if lanes == 8:
                _WEIGH_8(v, weight, next_weight, n_keys, value, next_key, to, next_out, further)
            elif lanes == 4:
                _WEIGH_4(v, weight, next_weight, n_keys, value, next_key, to, next_out, further)
            elif lanes == 2:
                _WEIGH_2(v, weight, next_weight, n_keys, value, next_key, to, next_out, further)
            else:
                _WEIGH_1(v, weight, next_weight, n_keys, value, next_key, to, next_out, further)
        if width % 32:
            d = width - 16
            value, to = row + d * v.itemsize, to_heads + d * 4
            further = row if turn else ahead + d * v.itemsize * page
            if lanes == 8:
                _WEIGH_8_1(v, weight, next_weight, n_keys, value, next_key, to, next_out, further)
            elif lanes == 4:
                _WEIGH_4_1(v, weight, next_weight, n_keys, value, next_key, to, next_out, further)
            elif lanes == 2:
                _WEIGH_2_1(v, weight, next_weight, n_keys, value, next_key, to, next_out, further)
            else:
                _WEIGH_1_1(v, weight, next_weight, n_keys, value, next_key, to, next_out, further)


# ---- many queries, keys and values packed ----

# Rows (queries times heads of a group) and keys of a block; rows and keys of a tile of products.
_ROWS, _BLOCK, _TILE_ROWS, _TILE = 84, 512, 6, 64
_PRODUCT, _ADD_PRODUCT = paired_product(6, 4, add=False), paired_product(6, 4, add=True)
_ADD_COLUMN = paired_product(6, 1, add=True)


def _packs(dtype):
    """True if keys and values of this type are packed here for products of pairs."""
    tiles = machine.has("amx_bf16") and onednn.library() is not None
    return dtype == array.BFLOAT16 and machine.has("avx512_bf16") and not tiles


def _blocks(q, k, v, places, L, first, last, bounds, scale, softcap, between, o, lse):
    """Attention of many queries of a sequence to L keys in pages, in o and lse.

    Parameters
    ----------
    q : (S, H, K) float32
    k, v : (pages, G, page, K) uint16; the page a multiple of 16, or a single one
    places : (n,) int64, pages of the sequence
    first, last : (S,) int64, first key that each query sees, one behind the last
    bounds : (G+1,) query heads at which the groups begin and end
    """
    G, K = k.shape[1], q.shape[2]
    tiles, n_pairs = -(-L // _TILE), -(-K // 32) * 16
    keys = array.large_empty((G, tiles, n_pairs, _TILE), np.uint32)
    values = array.large_empty((G, tiles * _TILE // 2, o.shape[2]), np.uint32)
    parts.over_rows(
        _pack, G * tiles, k, v, places, L, keys, values, work_bytes=keys.nbytes + values.nbytes
    )
    of_block = max(1, _ROWS // int(np.diff(bounds).max()))
    tasks = -(-len(q) // of_block) * G
    step = tasks if between is None else 8
    for start in range(0, tasks, step):
        parts.over_rows(
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
    S, G, K, width = len(q), len(keys), q.shape[2], o.shape[2]
    most = 0
    for g in range(G):
        most = max(most, bounds[g + 1] - bounds[g])
    rows = (of_block * most + _TILE_ROWS - 1) // _TILE_ROWS * _TILE_ROWS
    queries = np.zeros((rows, K), np.uint16)
    scores, out, state = _aligned(rows, _BLOCK), _aligned(rows, width), _aligned(4, rows)
    weights = np.zeros((rows, _BLOCK), np.uint16)
    for task in range(before + start, before + stop):
        block, g = task // G, task % G
        s, s_stop = block * of_block, min(S, (block + 1) * of_block)
        head, n = bounds[g], bounds[g + 1] - bounds[g]
        n_rows = (s_stop - s) * n
        for row in range(n_rows):
            for d in range(K):
                queries[row, d] = bfloat16_bits(q[s + row // n, head + row % n, d])
        out[:], state[0], state[1] = np.float32(0), _LOWEST, np.float32(0)
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
        for row in range(n_rows):
            total = state[1, row]
            empty = total == 0
            divisor = np.float32(1) / (np.float32(1) if empty else total)
            query, c = s + row // n, head + row % n
            for d in range(width):
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
    for row in range(scores.shape[0]):
        for j in range(scores.shape[1]):
            scores[row, j] = softcap * np.tanh(scores[row, j] * scale / softcap)


@compiled
def _block_weights(scores, n_rows, n, first, last, at, L, scale, state, weights):
    """Weights of the keys that are seen, relative to the largest score so far; 0 of the others."""
    m, total, corrections, found = state[0], state[1], state[2], state[3]
    at_scores, at_weights = scores.ctypes.data, weights.ctypes.data
    for s in range((n_rows + n - 1) // n):
        begin = min(max(first[s] - at, 0), L)
        end = max(min(last[s] - at, L), begin)
        rows = range(s * n, s * n + n)
        for row in rows:
            score = at_scores + row * scores.strides[0] + begin * 4
            corrections[row], m[row] = m[row], max(m[row], largest_of(score, end - begin) * scale)
        for row in rows:
            score = at_scores + row * scores.strides[0] + begin * 4
            weight = at_weights + row * weights.strides[0] + begin * 2
            found[row] = weights_of(score, end - begin, scale, m[row], weight)
            for j in range(begin):
                weights[row, j] = 0
            for j in range(end, L + L % 2):
                weights[row, j] = 0
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


# ---- many queries, products by oneDNN ----

# Rows and keys of a block of many queries, most keys of a smaller one.
_SIZE = 1024, 512, 1024


def attention(
    q, k, v, q_pos, k_pos, *, scale, groups, window=None, softcap=None, between=None, v_columns=None
):
    """As `ops.attention.attention`, for bfloat16 keys; queries and weights are rounded."""
    S, H, K = q.shape
    if k.dtype != array.BFLOAT16 or not (S and len(k) and groups):
        return NotImplemented
    width = v.shape[-1] if v_columns is None else v_columns
    bounds = _group_bounds(tuple(groups))
    if _packs(k.dtype) and bounds is not None and bounds[-1] == H and not (K % 2 or width % 16):
        return _packed(q, k, v, q_pos, k_pos, bounds, scale, window, softcap, between, width)
    if not onednn.serves(k.dtype):
        return NotImplemented
    o, lse = np.zeros((S, H, width), np.float32), np.full((S, H), -np.inf, np.float32)
    running = [_Running(S, stop - start, width) for start, stop in groups]
    queries = [_rows(q[:, start:stop], k.dtype) for start, stop in groups]
    space = _Space()
    for columns, seen in plain.blocks(q_pos, k_pos, window, H / len(groups), _SIZE):
        for g, state in enumerate(running):
            k_block = k[columns, g]
            v_block = v[columns, g] if v_columns is None else k_block[:, :v_columns]
            for rows, hidden in seen:
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
    first, last = plain.seen(q_pos, k_pos, window)

    # All keys are one page.
    pages = (x.view(np.uint16)[None].swapaxes(1, 2) for x in (k, v))
    _blocks(q, *pages, _FIRST, len(k), first, last, bounds, scale, softcap, between, o, lse)
    return o, lse


_FIRST = np.zeros(1, np.int64)


def _rows(q, dtype):
    """Queries of a group as rows of a matrix: (S, n, K) -> (S n, K) of 16 bits."""
    S, n, K = q.shape
    return narrowed(np.ascontiguousarray(q).reshape(S * n, K), dtype)


class _Space:
    """Memory of the blocks' scores, weights and sums, used again by every block."""

    def __init__(self):
        self._held = {}

    def get(self, name, rows, columns, dtype):
        size = rows * columns
        held = self._held.get(name)
        if held is None or held.size < size:
            held = self._held[name] = array.large_empty(size, dtype)
        return held[:size].reshape(rows, columns)


class _Running:
    """As `ops.attention._Running`, one row a query and head."""

    def __init__(self, S, n, width):
        self._n = n
        self._m = np.full(S * n, _LOWEST, np.float32)
        self._total = np.zeros(S * n, np.float32)
        self._o = np.zeros((S * n, width), np.float32)

    def add(self, rows, queries, k, v, hidden, scale, softcap, space):
        """Add a block of keys for the queries `rows`."""
        n = self._n
        of_block = slice(rows.start * n, min(rows.stop * n, len(queries)))
        q, L = queries[of_block], len(k)
        o, m, total = self._o[of_block], self._m[of_block], self._total[of_block]
        scores = space.get("scores", len(q), L, np.float32)
        weights = space.get("weights", len(q), L, k.dtype)
        found = space.get("found", *o.shape, np.float32)
        corrections = np.empty(len(q), np.float32)

        # Scores, weights relative to the largest score so far, and the weighted values.
        onednn.multiply(q, k.T, scores)
        parts.over_rows(
            _soften, len(q), scores, _NOTHING if hidden is None else hidden, n, np.float32(scale),
            np.float32(softcap or 0), m, total, corrections, weights.view(np.uint16),
            work_bytes=scores.nbytes,
        )  # fmt: skip
        onednn.multiply(weights, v, found)
        parts.over_rows(_correct, len(q), o, corrections, found, work_bytes=found.nbytes)

    def result(self):
        """(o, lse) over all keys added: (S, n, K), (S, n)."""
        empty = self._total == 0
        divisor = np.where(empty, np.float32(1), self._total)
        self._o /= divisor[:, None]
        lse = np.where(empty, np.float32(-np.inf), self._m + np.log(divisor))
        return self._o.reshape(-1, self._n, self._o.shape[1]), lse.reshape(-1, self._n)


_NOTHING = np.zeros((0, 0), bool)


@compiled
def _soften(start, stop, scores, hidden, n, scale, softcap, m, total, corrections, weights):
    L, factor = scores.shape[1], scale
    if softcap > 0:
        factor = np.float32(1)
        for row in range(start, stop):
            for j in range(L):
                scores[row, j] = softcap * np.tanh(scores[row, j] * scale / softcap)
    for row in range(start, stop):
        if hidden.size:
            for j in range(L):
                scores[row, j] = -np.inf if hidden[row // n, j] else scores[row, j]
        score, weight = scores[row].ctypes.data, weights[row].ctypes.data
        largest = max(m[row], largest_of(score, L) * factor)
        corrections[row] = exp(m[row] - largest)
        found = weights_of(score, L, factor, largest, weight)
        total[row], m[row] = total[row] * corrections[row] + found, largest


@compiled
def _correct(start, stop, o, corrections, found):
    """Rows of o · correction + found, in o."""
    for row in range(start, stop):
        for d in range(o.shape[1]):
            o[row, d] = o[row, d] * corrections[row] + found[row, d]
