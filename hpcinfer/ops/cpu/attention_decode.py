"""Attention of single queries: every cached key and value is read once for all heads that share it.

A query meets some pages at a time: their scores, the weights that these become, and the weighted
values, relative to the largest score so far (online softmax, as in `ops.attention`). While one page
is read, the cache fetches what comes some thousand bytes later. The query heads of a key/value head
stand in the lanes of vectors, 1, 2, 4 or 8 at a time; more of them take turns.
"""

from collections import namedtuple

import numpy as np
from numba.extending import overload

from hpcinfer.ops.cpu.runtime.compile import compiled, inlined
from hpcinfer.ops.cpu.simd.decode import deal_lanes, fetch, page_scores, weigh
from hpcinfer.ops.cpu.simd.rounding import prepared
from hpcinfer.ops.cpu.simd.softmax import soften
from hpcinfer.ops.cpu.simd.vectors import Bfloat16Pairs, kind_of

# Below every score, and a float32 still if multiplied by log2 e.
LOWEST, _LN2 = np.float32(-1e38), np.float32(np.log(2))

_KEYS = 128  # cached keys whose scores are held at a time
_AHEAD = 8192  # bytes from what is read to what is fetched meanwhile, at least

# Columns of values are taken by 32, then by 16.
_WEIGH_32, _WEIGH_16 = weigh(2), weigh(1)

# Where keys or values lie: an address, bytes from page to page, and from group to group. As these,
# not as arrays, they go to what is called for each page: Numba counts the holders of an array.
_Pages = namedtuple("_Pages", "at next_page next_group")

# What is computed of a query: its groups first..stop, by lanes that are dealt to heads, which take
# turns; the page behind its last one, the position before the first that it sees, and its own.
_Part = namedtuple("_Part", "first stop lanes turns end begin position")


@compiled
def single_queries(
    start, stop, q, positions, bounds, places, numbers, k, v, groups, scale, window, o, lse
):
    """Attention of groups start..stop, counted through the queries, in o and lse.

    Parameters
    ----------
    q : (T, H, K) float32
    positions : (T,) int64
    bounds : (T+1,) int64, where each query's pages begin in `places`, `numbers`
    places, numbers : (n,) int64, of pages: where in k and v, and which of the sequence
    k, v : (pages, G, page, K), (pages, G, page, ...); uint16 bfloat16's bits, int16 float16's
    groups : (G+1,) int64, query heads at which the groups begin and end
    window : positions that a query looks back, its own included; -1 for all
    o, lse : (T, H, columns of v that count), (T, H) float32
    """
    G, (lanes, turns) = k.shape[1], _deal(k, groups)
    queries, scores = aligned(G * turns, k.shape[3] * lanes), aligned(G * turns, _KEYS * lanes)
    state, out = aligned(G * turns, 48), aligned(G * turns * lanes, o.shape[2])
    keys = _Pages(k.ctypes.data, k.strides[0], k.strides[1])
    values = _Pages(v.ctypes.data, v.strides[0], v.strides[1])
    if start < stop and bounds[start // G] < bounds[start // G + 1]:
        fetch(_page(keys, places[bounds[start // G]], start % G), k.strides[1])
    while start < stop:
        # Take all groups of a query, or those of this part: a page has them side by side.
        t, first = start // G, start % G
        last, begin = min(G, stop - t * G), positions[t] - window if window >= 0 else -1
        part = _Part(first, last, lanes, turns, bounds[t + 1], begin, positions[t])
        start = t * G + last
        _load(q[t], k, groups, part, queries, state, out)

        # Meet as many of its pages at a time as there is room for scores.
        i = bounds[t]
        while i < part.end:
            i_stop = _pages_that_fit(k, numbers, part, i)
            if i_stop == i:
                break
            _score(k, keys, values, places, numbers, part, i, i_stop, queries, scores)
            _soften(k, part, (i_stop - i) * k.shape[2], np.float32(scale), scores, state, out)
            _weigh(v, keys, values, places, numbers, part, i, i_stop, scores, out)
            i = i_stop
        _finish(groups, part, state, out, o[t], lse[t])


@inlined
def _deal(k, groups):
    """Lanes that are dealt to the heads of a group, up to 8; and turns that these take."""
    G, K, most, lanes = k.shape[1], k.shape[3], 0, 1
    for g in range(G):
        most = max(most, groups[g + 1] - groups[g])
    while lanes < min(most, 8) or (lanes == 1 and K % 32):
        lanes *= 2
    return lanes, (most + lanes - 1) // lanes


@inlined
def _load(q, k, groups, part, queries, state, out):
    """Deal a query's heads (H, K) to the lanes, a row for each turn; let its sums begin."""
    lanes, before = part.lanes, groups[part.first]
    n_items = k.shape[3] // 2 if _in_pairs(k) else k.shape[3]
    rows = prepared(q[before : groups[part.stop]], k)
    for g in range(part.first, part.stop):
        for turn in range(part.turns):
            at = turn * lanes
            row = rows.ctypes.data + (groups[g] - before + at) * rows.strides[0]
            n, run = groups[g + 1] - groups[g] - at, g * part.turns + turn
            to = queries.ctypes.data + run * queries.strides[0]
            deal_lanes(row, rows.strides[0], n, n_items, lanes, to)
    state[:], out[:] = np.float32(0), np.float32(0)
    state[:, :16] = LOWEST


@inlined
def _pages_that_fit(k, numbers, part, i):
    """One behind the last page from i on that the query sees, if there is room for its scores."""
    first, page = i, k.shape[2]
    while i < part.end and (i + 1 - first) * page <= _KEYS:
        if numbers[i] * page > part.position:
            break
        i += 1
    return i


@inlined
def _score(k, keys, values, places, numbers, part, i, i_stop, queries, scores):
    """Scores of pages i..i_stop, a row for each turn; -inf of keys that the query does not see."""
    page, lanes, turns = k.shape[2], part.lanes, part.turns
    queries_at, next_queries = queries.ctypes.data, queries.strides[0]
    scores_at, next_scores = scores.ctypes.data, scores.strides[0]
    for u in range(i, i_stop):
        done, key_position = (u - i) * page, numbers[u] * page
        for g in range(part.first, part.stop):
            ahead, run = _ahead(keys, values, places, part, g, u, i, i_stop), g * turns
            _page_scores(
                k, lanes, turns, queries_at + run * next_queries, next_queries,
                _page(keys, places[u], g), ahead,
                scores_at + run * next_scores + done * lanes * 4, next_scores,
            )  # fmt: skip

        # Hide what comes after the query, or before its window.
        visible = min(page, part.position + 1 - key_position)
        if visible < page or key_position <= part.begin:
            for j in range(page):
                if j >= visible or key_position + j <= part.begin:
                    scores[:, (done + j) * lanes : (done + j + 1) * lanes] = -np.inf


@inlined
def _soften(k, part, n_keys, scale, scores, state, out):
    """Weights relative to the largest score so far; what was summed is corrected to it."""
    lanes, scores_at, state_at = part.lanes, scores.ctypes.data, state.ctypes.data
    for run in range(part.first * part.turns, part.stop * part.turns):
        at, to = scores_at + run * scores.strides[0], state_at + run * state.strides[0]
        soften(lanes, k, at, n_keys, scale, to)
        for c in range(lanes):
            for d in range(out.shape[1]):
                out[run * lanes + c, d] *= state[run, 32 + c]


@inlined
def _weigh(v, keys, values, places, numbers, part, i, i_stop, scores, out):
    """Add the weighted values of pages i..i_stop to `out`, a row for each lane of a turn."""
    page, lanes, turns = v.shape[2], part.lanes, part.turns
    scores_at, next_scores = scores.ctypes.data, scores.strides[0]
    out_at, next_out, width = out.ctypes.data, out.strides[0], out.shape[1]
    for u in range(i, i_stop):
        visible = min(page, part.position + 1 - numbers[u] * page)
        done = (u - i) * page * lanes * (2 if _in_pairs(v) else 4)
        for g in range(part.first, part.stop):
            ahead = _ahead(keys, values, places, part, g, i_stop + u - i, i, i_stop)
            _add_values(
                v, lanes, turns, scores_at + g * turns * next_scores + done, next_scores, visible,
                _page(values, places[u], g), ahead,
                out_at + g * turns * lanes * next_out, next_out, width,
            )  # fmt: skip


@inlined
def _finish(groups, part, state, out, o, lse):
    """Divide the sums by those of the weights: o (H, width), lse (H,) of one query."""
    lanes, turns = part.lanes, part.turns
    for g in range(part.first, part.stop):
        for c in range(groups[g + 1] - groups[g]):
            # Add up the parts that the lanes of a head have summed.
            run, lane = g * turns + c // lanes, c % lanes
            total = np.float32(0)
            for at in range(lane, 16, lanes):
                total += state[run, 16 + at]

            # Without a key that it sees, o is 0 and lse -inf.
            empty = total == 0
            factor = np.float32(1) / (np.float32(1) if empty else total)
            for d in range(o.shape[1]):
                o[groups[g] + c, d] = out[g * turns * lanes + c, d] * factor
            lse[groups[g] + c] = -np.inf if empty else state[run, lane] * _LN2 + np.log(total)


@compiled
def _ahead(keys, values, places, part, g, at, i, i_stop):
    """Address of what is read `_AHEAD` bytes behind group g of a page.

    Read are the keys of the pages i..i_stop, then their values, then the next keys: `at` counts
    pages so, from i on. A query's pages stop at its end, where the next one's begin.
    """
    g += max(1, _AHEAD // keys.next_group)
    while g >= part.stop:
        g -= part.stop - part.first
        at += 1
    if at < i_stop:
        return _page(keys, places[at], g)
    n = i_stop - i
    if at < i_stop + n:
        return _page(values, places[at - n], g)
    at -= n
    return _page(keys, places[min(at, len(places) - 1)], g if at < part.end else g - part.first)


@inlined
def _page(pages, place, g):
    """Address of the keys or values of group g in a page."""
    return pages.at + place * pages.next_page + g * pages.next_group


@compiled
def aligned(rows, columns):
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
def _page_scores(k, lanes, turns, queries, next_query, row, ahead, out, next_out):
    """Scores with the keys of a page at `row`; fetches as much from `ahead` on meanwhile."""
    page, next_key = k.shape[2], k.strides[2]
    n = k.shape[3] // 2 if _in_pairs(k) else k.shape[3]
    for turn in range(turns):
        for j in range(0, page, 16):
            to, offset = out + j * lanes * 4, j * next_key
            further = row if turn else ahead + offset
            page_scores(lanes, k, queries, row + offset, next_key, n, to, further)
        queries += next_query
        out += next_out


@compiled
def _add_values(v, lanes, turns, weights, next_weights, n_keys, row, ahead, out, next_out, width):
    """out += weights · the values of one page's first n_keys keys, from `row` on.

    Fetches as much from `ahead` on meanwhile.
    """
    next_key, next_weight, page = v.strides[2], 4 * lanes, v.shape[2]
    for turn in range(turns):
        weight, to_heads = weights + turn * next_weights, out + turn * lanes * next_out
        for d in range(0, width - 16, 32):
            value, to = row + d * v.itemsize, to_heads + d * 4
            further = row if turn else ahead + d * v.itemsize * page
            _WEIGH_32(lanes, v, weight, next_weight, n_keys, value, next_key, to, next_out, further)
        if width % 32:
            d = width - 16
            value, to = row + d * v.itemsize, to_heads + d * 4
            further = row if turn else ahead + d * v.itemsize * page
            _WEIGH_16(lanes, v, weight, next_weight, n_keys, value, next_key, to, next_out, further)
