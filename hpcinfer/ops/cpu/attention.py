"""Attention: one query of a sequence after the other over cached pages, or blocks of many queries.

Decoding reads every cached key and value once, for all query heads that share it. Many queries of a
sequence are blocks of two matrix products, which oneDNN computes on 16-bit operands; what stands
between the products is one pass over the scores.
"""

from functools import cache

import numpy as np

from hpcinfer import array
from hpcinfer.ops import attention as plain
from hpcinfer.ops.cpu import onednn, parts
from hpcinfer.ops.cpu.compile import compiled
from hpcinfer.ops.cpu.rounding import narrowed, prepared
from hpcinfer.ops.cpu.simd import exp, exponentials, largest_of, tile, weigh

# Queries of one sequence up to which each is computed by itself.
_SINGLE = 8

_KEYS = 512  # cached keys whose scores are held at a time
_LOWEST = np.float32(np.finfo(np.float32).min)
_SIZE = 1024, 512, 1024  # rows and keys of a block of many queries, most keys of a smaller one

_SCORES = tile(16, 1)
_WEIGH_1_4, _WEIGH_2_4, _WEIGH_4_4 = (weigh(columns, 4) for columns in (1, 2, 4))
_WEIGH_1_1 = weigh(1, 1)
_WEIGHTS, _WEIGHTS_BFLOAT16 = exponentials(half=False), exponentials(half=True)


def paged_attention(
    q, q_tokens, k_pages, v_pages, books, *, scale, groups, window=None, v_columns=None
):
    """As `ops.attention.paged_attention`, for a few queries of each sequence."""
    T, H, K = q.shape
    page = k_pages.shape[2]
    width = v_pages.shape[-1] if v_columns is None else v_columns
    if page % 16 or K % 16 or width % 16 or not T or not groups:
        return NotImplemented
    bounds = _group_bounds(tuple(groups))
    if bounds is None or bounds[-1] != H or k_pages.shape[1:] != (len(groups), page, K):
        return NotImplemented
    table = books.table(q_tokens, window)
    if table.most_queries > _SINGLE:
        return NotImplemented
    o, lse = np.empty((T, H, width), np.float32), np.empty((T, H), np.float32)
    keys = _bits(k_pages)
    values = keys if v_columns is not None else _bits(v_pages)
    parts.over_rows(
        _single_queries, T * len(groups),
        q, table.positions, table.bounds, table.places, table.numbers, keys, values,
        bounds, np.float32(scale), -1 if window is None else window, o, lse,
        work_bytes=table.places.size * page * (K + width) * k_pages.itemsize * len(groups),
    )  # fmt: skip
    return o, lse


@cache
def _group_bounds(groups):
    """Query heads at which the groups begin, and at which the last one ends; None with gaps."""
    if [start for start, _ in groups] != [0, *(stop for _, stop in groups[:-1])]:
        return None
    return np.array([start for start, _ in groups] + [groups[-1][1]])


def _bits(pages):
    """Pages as the kernels know their types: bfloat16 as uint16, float16 as int16."""
    if pages.dtype == array.BFLOAT16:
        return pages.view(np.uint16)
    return pages.view(np.int16) if pages.dtype == np.float16 else pages


@compiled
def _single_queries(
    start, stop, q, positions, bounds, places, numbers, k, v, groups, scale, window, o, lse
):
    G, page, width = k.shape[1], k.shape[2], o.shape[2]
    most = 0
    for g in range(G):
        most = max(most, groups[g + 1] - groups[g])
    scores = np.empty((most, _KEYS), np.float32)
    m, total = np.empty(most, np.float32), np.empty(most, np.float32)
    for task in range(start, stop):
        t, g = task // G, task % G
        first, n, position = groups[g], groups[g + 1] - groups[g], positions[t]
        qs, out = prepared(q[t, first : first + n], k), o[t, first : first + n]
        m[:], total[:], out[:] = _LOWEST, np.float32(0), np.float32(0)
        begin = position - window if window >= 0 else -1
        i = bounds[t]
        while i < bounds[t + 1]:
            # Scores of as many pages as fit, and how many of their keys the query sees.
            i_first, n_keys = i, 0
            while i < bounds[t + 1] and n_keys + page <= _KEYS:
                key_position = numbers[i] * page
                if key_position > position:
                    break
                _page_scores(qs, n, k, places[i], g, scores, n_keys)
                seen = min(page, position + 1 - key_position)
                if seen < page or key_position <= begin:
                    for c in range(n):
                        for j in range(page):
                            if j >= seen or key_position + j <= begin:
                                scores[c, n_keys + j] = -np.inf
                n_keys += page
                i += 1
            if i == i_first:
                break

            # Weights relative to the largest score so far; what was summed is corrected to it.
            for c in range(n):
                row = scores[c].ctypes.data
                largest = max(m[c], largest_of(row, n_keys) * scale)
                correction = exp(m[c] - largest)
                total[c] = total[c] * correction + _WEIGHTS(row, n_keys, scale, largest, row)
                m[c] = largest
                for d in range(width):
                    out[c, d] *= correction
            for u in range(i_first, i):
                seen = min(page, position + 1 - numbers[u] * page)
                _add_values(scores, n, (u - i_first) * page, seen, v, places[u], g, width, out)
        for c in range(n):
            empty = total[c] == 0
            divisor = np.float32(1) if empty else total[c]
            for d in range(width):
                out[c, d] /= divisor
            lse[t, first + c] = -np.inf if empty else m[c] + np.log(divisor)


@compiled
def _page_scores(qs, n, k, place, g, scores, at):
    """Scores of n queries with the keys of one page, written from column `at` on."""
    K, page, next_key = k.shape[3], k.shape[2], k.strides[2]
    start = k.ctypes.data + place * k.strides[0] + g * k.strides[1]
    for j in range(0, page, 16):
        for c in range(n):
            query, out = qs.ctypes.data + c * qs.strides[0], scores[c, at + j :].ctypes.data
            _SCORES(k, query, qs.strides[0], start + j * next_key, next_key, K, out, 0, 0)


@compiled
def _add_values(p, n, at, n_keys, v, place, g, width, out):
    """out += p · v over the first n_keys keys of one page, whose weights begin at column `at`."""
    start, next_key = v.ctypes.data + place * v.strides[0] + g * v.strides[1], v.strides[2]
    p_next, o_next = p.strides[0], out.strides[0]
    wide = width // 64 * 64
    for d in range(0, wide, 64):
        row, c = start + d * v.itemsize, 0
        while c < n:
            p_at, o_at = p[c, at:].ctypes.data, out[c, d:].ctypes.data
            if n - c >= 4:
                _WEIGH_4_4(v, p_at, p_next, n_keys, row, next_key, o_at, o_next)
                c += 4
            elif n - c >= 2:
                _WEIGH_2_4(v, p_at, p_next, n_keys, row, next_key, o_at, o_next)
                c += 2
            else:
                _WEIGH_1_4(v, p_at, p_next, n_keys, row, next_key, o_at, o_next)
                c += 1
    for d in range(wide, width, 16):
        for c in range(n):
            p_at, o_at, row = p[c, at:].ctypes.data, out[c, d:].ctypes.data, start + d * v.itemsize
            _WEIGH_1_1(v, p_at, p_next, n_keys, row, next_key, o_at, o_next)


def attention(
    q, k, v, q_pos, k_pos, *, scale, groups, window=None, softcap=None, between=None, v_columns=None
):
    """As `ops.attention.attention`, for 16-bit keys and values; queries and weights are rounded."""
    S, H, K = q.shape
    if not onednn.serves(k.dtype) or k.dtype != array.BFLOAT16 or not (S and len(k) and groups):
        return NotImplemented
    width = v.shape[-1] if v_columns is None else v_columns
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
        found = _WEIGHTS_BFLOAT16(score, L, factor, largest, weight)
        total[row], m[row] = total[row] * corrections[row] + found, largest


@compiled
def _correct(start, stop, o, corrections, found):
    """Rows of o · correction + found, in o."""
    for row in range(start, stop):
        for d in range(o.shape[1]):
            o[row, d] = o[row, d] * corrections[row] + found[row, d]
