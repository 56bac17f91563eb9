"""Attention: queries over their pages, split over the device and merged, or large matrix products.

Queries over pages of 16 bits go to `decode`, many of a sequence to `prefill`, which take matrix
units. Of what these do not serve, few queries of a sequence read their keys and values once for all
query heads that share them; many are blocks of two products of all heads at a time, by cuBLAS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcinfer import array
from hpcinfer.array import Array
from hpcinfer.ops import attention as plain
from hpcinfer.ops.cuda import decode, prefill
from hpcinfer.ops.cuda.runtime.launch import NAMES, aligned, counters, kept, launch, on_device

_HEADS, _LANES, _THREADS = (1, 2, 4, 8), (4, 8, 16, 32), 128

OPTIONS = tuple(
    (f"-DHELD={held}", f"-DOUT={out}", f"-DLANES={lanes}")
    for held in NAMES.values()
    for out in dict.fromkeys(("float", held))
    for lanes in _LANES
)
KERNELS = tuple(f"decode_{heads}" for heads in _HEADS)

# Queries of a sequence up to which each reads the keys for itself; blocks that keep a large device
# busy; pages below which a split costs more than it brings; splits that a block can merge.
_FEW_QUERIES, _BUSY_BLOCKS, _FEWEST_PAGES, _MOST_SPLITS = 4, 2048, 2, 64

# Query heads and queries of a block, together, and keys of a block, at least; its most scores.
_ROWS, _KEYS, _SCORES = 4096, 512, 64 << 20
_LOWEST = np.float32(np.finfo(np.float32).min)


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
    """As `ops.attention.attention`, where all key/value heads have equally many query heads."""
    if softcap is None and v_columns is None:
        options = {"scale": scale, "groups": groups, "window": window, "between": between}
        result = prefill.attention(q, k, v, q_pos, k_pos, **options)
        if result is not NotImplemented:
            return result
    H, G = q.shape[1], len(groups)
    n = H // G if G else 0
    if not (n and len(q) and len(k)):
        return NotImplemented
    if list(map(tuple, groups)) != [(g * n, (g + 1) * n) for g in range(G)]:
        return NotImplemented
    return _by_blocks(q, k, v, q_pos, k_pos, n, scale, window, softcap, between, v_columns)


def _by_blocks(q, k, v, q_pos, k_pos, n, scale, window, softcap, between, v_columns):
    """Attention of n query heads to each key/value head, by blocks of queries and keys."""
    xp, (S, H, K), G = array.namespace(q), q.shape, k.shape[1]
    width = v.shape[-1] if v_columns is None else v_columns
    factor = np.float32(scale if softcap is None else scale / softcap)
    q = xp.ascontiguousarray((q * factor).reshape(S, G, n, K).swapaxes(0, 1))
    m, total = xp.full((G, S, n), _LOWEST, np.float32), xp.zeros((G, S, n), np.float32)
    o = xp.zeros((G, S, n, width), np.float32)

    # Add a block of keys to the sums of each block of queries that sees any of it.
    queries, keys = max(1, _ROWS // n), max(_KEYS, _SCORES // (G * _ROWS))
    there = xp.asarray(q_pos), xp.asarray(k_pos)
    for columns, k_first, k_last in _ranges(k_pos, keys):
        k_block = _by_heads(array.widen(k[columns]))
        v_block = k_block[..., :width]
        if v_columns is None:
            v_block = _by_heads(array.widen(v[columns]))
        for rows, q_first, q_last in _ranges(q_pos, queries):
            begin = -1 if window is None else q_first - window
            if k_first > q_last or k_last <= begin:
                continue
            hidden = None
            if k_last > q_first or (window is not None and k_first <= q_last - window):
                hidden = _hidden(*there, rows, columns, window)
            state = m[:, rows], total[:, rows], o[:, rows]
            _add(xp, state, q[:, rows], k_block, v_block, hidden, softcap)
            if between is not None:
                between()

    # Divide once, and put the heads side by side again.
    empty = total == 0
    divisor = xp.where(empty, np.float32(1), total)
    o /= divisor[..., None]
    lse = xp.where(empty, np.float32(-np.inf), m + xp.log(divisor))
    return (
        xp.ascontiguousarray(o.swapaxes(0, 1)).reshape(S, H, width),
        xp.ascontiguousarray(lse.swapaxes(0, 1)).reshape(S, H),
    )


def _hidden(q_pos, k_pos, rows, columns, window):
    """(s, l) truth of "this query does not see this key", made where the scores are."""
    hidden = k_pos[None, columns] > q_pos[rows, None]
    if window is not None:
        hidden |= k_pos[None, columns] <= q_pos[rows, None] - window
    return hidden


def _add(xp, state, q, k, v, hidden, softcap):
    """Add a block of keys to the sums so far of some queries.

    Parameters
    ----------
    state : m, total (G, s, n), o (G, s, n, width), as in `ops.attention`; written to
    q : (G, s, n, K), scaled
    k, v : (G, l, K), (G, l, width)
    hidden : (s, l) truth of "this query does not see this key", None if each sees all
    """
    # Score all heads at a time.
    (m_all, total, o), (G, s, n, K) = state, q.shape
    scores = (q.reshape(G, s * n, K) @ k.swapaxes(1, 2)).reshape(G, s, n, -1)
    if softcap is not None:
        xp.tanh(scores, out=scores)
        scores *= np.float32(softcap)
    if hidden is not None:
        xp.copyto(scores, np.float32(-np.inf), where=hidden[None, :, None])

    # Weigh relative to the largest score so far, to which the sums of before are corrected.
    m = xp.maximum(m_all, scores.max(axis=-1))
    correction = xp.exp(m_all - m)
    m_all[...] = m
    scores -= m[..., None]
    weights = xp.exp(scores, out=scores)
    total *= correction
    total += weights.sum(axis=-1)
    o *= correction[..., None]
    o += (weights.reshape(G, s * n, -1) @ v).reshape(o.shape)


def _ranges(positions, size):
    """(slice, least, largest position) of every `size` tokens."""
    for start in range(0, len(positions), size):
        part = positions[start : start + size]
        yield slice(start, start + size), int(part.min()), int(part.max())


def _by_heads(x):
    """(L, G, K) as (G, L, K)."""
    return array.namespace(x).ascontiguousarray(x.swapaxes(0, 1))


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
    """As `ops.attention.paged_attention`; what no kernel serves takes the plain form."""
    if v_columns is not None or not _served(q, k_pages, v_pages, groups):
        return NotImplemented
    xp = array.namespace(q)
    if not _has_whole_heads(q):
        q = xp.ascontiguousarray(q)
    if not aligned(q) or q.strides[0] % 16:
        return NotImplemented
    pages = k_pages, v_pages, block_table
    options = {"scale": scale, "groups": groups, "window": window}
    result = decode.paged_attention(q, q_tokens, *pages, **options, dtype=dtype)
    if result is not NotImplemented:
        return result
    table = _table(q_tokens, block_table, groups, window, k_pages)
    if table is None:
        return NotImplemented

    # Sequences with few queries; rounded at once where there are no others.
    is_rounded = not table.others and dtype == k_pages.dtype
    o = xp.empty(q.shape, dtype if is_rounded else np.float32)
    lse = xp.empty(q.shape[:2], np.float32)
    _decode(q, k_pages, v_pages, table, scale, o, lse)

    # Those with many, one by one.
    for b, rows in table.others:
        q_pos = q_tokens[rows, 1]
        k, v, k_pos = plain.cached(*pages, b, plain.window_start(q_pos, window))
        o[rows], lse[rows] = plain.attention(q[rows], k, v, q_pos, k_pos, **options)
    return array.narrow(o, dtype), lse


def _served(q, k_pages, v_pages, groups):
    """True if the kernels serve these types and shapes."""
    # Ask for one type, whole groups of heads, and loads of 16 bytes in pages of a power of two.
    K, page = q.shape[-1], k_pages.shape[2]
    return (
        q.dtype == np.float32
        and k_pages.dtype.name in NAMES
        and k_pages.dtype == v_pages.dtype
        and k_pages.shape == v_pages.shape
        and k_pages.shape[1] == len(groups)
        and sum(stop - start for start, stop in groups) == q.shape[1]
        and K == k_pages.shape[3]
        and K % 8 == 0
        and 0 < K <= 8 * _LANES[-1]
        and page & (page - 1) == 0
        and k_pages.flags.c_contiguous
        and v_pages.flags.c_contiguous
        and aligned(k_pages, v_pages)
    )


def _has_whole_heads(q):
    """True if the heads of every token lie end to end."""
    return q.strides[1:] == (4 * q.shape[2], 4)


@dataclass(frozen=True)
class _Table:
    """What the kernels must know of a step's queries; `attention.cu` says how it lies.

    Attributes
    ----------
    values : (n,) int32, of the device
    entries_at, places_at, numbers_at : where its parts begin
    n_queries, n_entries : queries, and parts of at most `heads` query heads of one key/value head
    splits : into how many blocks a query's pages are split at most
    others : list of (b, rows), sequences with more queries than the kernels serve
    """

    values: object
    entries_at: int
    places_at: int
    numbers_at: int
    n_queries: int
    n_entries: int
    heads: int
    splits: int
    others: list


def _table(q_tokens, block_table, groups, window, k_pages):
    """Table of a step's queries; None if the kernels serve none of them."""
    groups = tuple(map(tuple, groups))

    def build():
        return _build(q_tokens, block_table, groups, window, k_pages)

    return kept((q_tokens, block_table), (groups, window), build)


def _build(q_tokens, block_table, groups, window, k_pages):
    runs = list(plain.sequences(q_tokens))
    few = [(b, rows) for b, rows in runs if rows.stop - rows.start <= _FEW_QUERIES]
    if not few:
        return None

    # The query heads of a key/value head, at most so many together.
    largest = max(stop - start for start, stop in groups)
    heads = next((n for n in _HEADS if n >= largest), _HEADS[-1])
    entries = [
        (g, head, min(heads, stop - head))
        for g, (start, stop) in enumerate(groups)
        for head in range(start, stop, heads)
    ]

    # As many splits as keep the device busy, of so many pages that each is worth its merge.
    n_queries = sum(rows.stop - rows.start for _, rows in few)
    n_pages, longest = block_table.capacity or _pages_of(few, q_tokens, block_table, window)
    splits = min(-(-longest // _FEWEST_PAGES), _BUSY_BLOCKS // (n_queries * len(entries)))
    splits = min(splits, _MOST_SPLITS)

    def values():
        return _values(plain.sequences(q_tokens), q_tokens, block_table, window, entries, n_pages)

    places_at = 5 * n_queries + 3 * len(entries)
    return _Table(
        values=on_device(k_pages, (q_tokens, block_table, groups, window), values),
        entries_at=5 * n_queries,
        places_at=places_at,
        numbers_at=places_at + n_pages,
        n_queries=n_queries,
        n_entries=len(entries),
        heads=heads,
        splits=max(1, splits),
        others=[(b, rows) for b, rows in runs if rows.stop - rows.start > _FEW_QUERIES],
    )


def _pages_of(runs, q_tokens, block_table, window):
    """Pages that the queries of some sequences meet: of all, and of the one with the most."""
    counts = [
        len(block_table.pages(b, plain.window_start(q_tokens[rows, 1], window))[0])
        for b, rows in runs
    ]
    return sum(counts), max(counts)


def _values(runs, q_tokens, block_table, window, entries, room):
    """The table: a row for every query of sequences with few, the entries, pages with some room."""
    # Find the pages of each sequence with few queries, and what each of these sees.
    rows, places, numbers, n_pages = [], [], [], 0
    for b, tokens in runs:
        if tokens.stop - tokens.start > _FEW_QUERIES:
            continue
        positions = q_tokens[tokens, 1]
        own_places, own_numbers = block_table.pages(b, plain.window_start(positions, window))
        for token, position in enumerate(positions.tolist(), tokens.start):
            first = 0 if window is None else position - window + 1
            last = min(position, int(block_table.lengths[b]) - 1)
            rows.append((token, n_pages, len(own_places), first, last))
        places.append(own_places)
        numbers.append(own_numbers)
        n_pages += len(own_places)

    # Lay all parts end to end.
    left = np.zeros(room - n_pages, np.int32)
    parts = (rows, entries, *places, left, *numbers, left)
    return np.concatenate([np.asarray(part, np.int32).reshape(-1) for part in parts])


def _decode(q, k_pages, v_pages, table, scale, o, lse):
    """Fill in the rows of o (T, H, K) and lse (T, H) that the table's queries have."""
    xp, (_, H, K), (_, G, page, _) = array.namespace(q), q.shape, k_pages.shape
    lanes = next(n for n in _LANES if 8 * n >= K)
    out, held = NAMES[o.dtype.name], NAMES[k_pages.dtype.name]

    # Splits of a query's pages are merged by the block that ends last.
    o_parts = lse_parts = arrived = None
    if table.splits > 1:
        o_parts = xp.empty((table.n_queries, H, table.splits, K), np.float32)
        lse_parts = xp.empty((table.n_queries, H, table.splits), np.float32)
        arrived = counters(xp, table.n_queries * table.n_entries)
    launch(
        "attention", f"decode_{table.heads}",
        (table.splits, table.n_entries, table.n_queries), _THREADS,
        q, k_pages, v_pages, table.values, o_parts, lse_parts, arrived, o, lse,
        table.entries_at, table.places_at, table.numbers_at, H, G, K,
        page.bit_length() - 1, _FEWEST_PAGES, np.int64(q.strides[0] // 4), float(scale),
        options=(f"-DHELD={held}", f"-DOUT={out}", f"-DLANES={lanes}"), early=True,
    )  # fmt: skip
