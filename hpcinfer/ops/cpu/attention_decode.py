"""Attention of single queries: every cached key and value is read once."""

import numpy as np
from numba.extending import overload

from hpcinfer.ops.cpu.runtime.compile import compiled
from hpcinfer.ops.cpu.simd.attention import deal_lanes, fetch, page_scores, soften, weigh
from hpcinfer.ops.cpu.simd.rounding import prepared
from hpcinfer.ops.cpu.simd.vectors import Bfloat16Pairs, kind_of

# Below every score, and a float32 still if multiplied by log2 e.
LOWEST, _LN2 = np.float32(-1e38), np.float32(np.log(2))


_KEYS = 128  # cached keys whose scores are held at a time


_AHEAD = 8192  # bytes from what is read to what is fetched meanwhile, at least


_SCORES_1, _SCORES_2, _SCORES_4, _SCORES_8 = (page_scores(heads) for heads in (1, 2, 4, 8))


_SOFTEN_1, _SOFTEN_2, _SOFTEN_4, _SOFTEN_8 = (soften(heads) for heads in (1, 2, 4, 8))


_WEIGH_1, _WEIGH_2, _WEIGH_4, _WEIGH_8 = (weigh(heads, 2) for heads in (1, 2, 4, 8))


_WEIGH_1_1, _WEIGH_2_1, _WEIGH_4_1, _WEIGH_8_1 = (weigh(heads, 1) for heads in (1, 2, 4, 8))


@compiled
def single_queries(
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
    queries, scores = aligned(G * turns, K * lanes), aligned(G * turns, _KEYS * lanes)
    state, out = aligned(G * turns, 48), aligned(G * turns * lanes, width)
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
        state[:, :16] = LOWEST
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
                visible = min(page, position + 1 - key_position)
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
                if visible < page or key_position <= begin:
                    for j in range(page):
                        if j >= visible or key_position + j <= begin:
                            scores[:, (done + j) * lanes : (done + j + 1) * lanes] = -np.inf

            # Weights relative to the largest score so far; what was summed is corrected to it.
            for run in range(g_first * turns, g_stop * turns):
                at, to = scores_at + run * scores.strides[0], state_at + run * state.strides[0]
                _soften_scores(k, at, n_keys, np.float32(scale), to, lanes)
                for c in range(lanes):
                    for d in range(width):
                        out[run * lanes + c, d] *= state[run, 32 + c]
            for u in range(i_first, i):
                visible = min(page, position + 1 - numbers[u] * page)
                weights = scores_at + (u - i_first) * page * lanes * (2 if _in_pairs(v) else 4)
                at = i + u - i_first
                for g in range(g_first, g_stop):
                    ahead = _ahead(
                        k, v, k_at, v_at, places, g, g_first, g_stop, at, i, i_first, bounds[t + 1]
                    )
                    _add_values(
                        v, lanes, weights + g * turns * scores.strides[0], scores.strides[0], turns,
                        visible, v_at + places[u] * v.strides[0] + g * v.strides[1],
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
