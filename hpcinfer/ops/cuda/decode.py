"""Attention of few queries by matrix units: keys split over the device, sequences in one launch.

Decoding reads every key and value once, and does little else; `decode.cu` says how. Keys and values
of 16 bits are met where they lie, in the pages of the cache. `attention` in this folder asks here,
and has another way for what is not served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcinfer import array
from hpcinfer.array import Array
from hpcinfer.ops import attention as plain
from hpcinfer.ops.cuda import prefill
from hpcinfer.ops.cuda.attention_shapes import PAGE, are_served
from hpcinfer.ops.cuda.runtime.launch import NAMES, counters, kept, launch, on_device

# Multiprocessors of a large device; splits that a block can merge; items that a grid has room for.
_MULTIPROCESSORS, _MOST_SPLITS, _MOST_ITEMS = 132, 128, (1 << 16) - 1

# Blocks of rows up to which a sequence has few queries: each block reads the keys for itself.
_MOST_BLOCKS = 1


@dataclass(frozen=True)
class _DecodeTile:
    """How a block computes; `decode.cu` says what the letters stand for."""

    sets: int
    warps: int
    keys: int
    blocks: int

    @property
    def rows(self) -> int:
        """Rows of a block: query heads of tokens."""
        return 8 * self.sets

    @property
    def fewest_pages(self) -> int:
        """Pages of a split in which every warp has a tile of keys."""
        return -(-self.warps * self.keys // PAGE)

    def splits(self, G: int) -> int:
        """Splits of all sequences together that keep the device busy."""
        return max(1, _MULTIPROCESSORS * self.blocks // G)

    def options(self, held: str, out: str, K: int, heads: int) -> tuple[str, ...]:
        """Options of the compiler."""
        given = {"HELD": held, "OUT": out, "K": K, "HEADS": heads, "SETS": self.sets}
        given |= {"WARPS": self.warps, "KEYS": self.keys, "BLOCKS": self.blocks}
        return tuple(f"-D{name}={x}" for name, x in given.items())


# Shapes for heads up to a width, by how many rows they serve.
_SHAPES = {
    64: (_DecodeTile(1, 8, 16, 2), _DecodeTile(2, 4, 32, 3), _DecodeTile(4, 4, 32, 2)),
    128: (_DecodeTile(1, 4, 32, 2), _DecodeTile(2, 4, 16, 3), _DecodeTile(4, 4, 16, 2)),
    256: (_DecodeTile(1, 4, 16, 2),),
}

OPTIONS = tuple(
    shape.options(held, out, K, heads)
    for held, out in (("bf16", "bf16"), ("f16", "float"))
    for K, width, heads in ((64, 64, 7), (80, 128, 1), (128, 128, 4), (256, 256, 2))
    for shape in _SHAPES[width]
)
KERNELS = ("decode",)


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
    dtype: np.dtype = np.float32,
) -> tuple[Array, Array]:
    """As `ops.attention.paged_attention`; sequences with many queries go to `prefill`."""
    if k_pages.shape[2] != PAGE or not are_served(q, k_pages, v_pages, groups):
        return NotImplemented
    xp, table = array.namespace(q), _table(q_tokens, block_table, groups, window, k_pages)

    # Sequences with few queries; rounded at once where there are no others.
    is_rounded = not table.has_others and dtype == k_pages.dtype
    o = xp.empty(q.shape, dtype if is_rounded else np.float32)
    lse = xp.empty(q.shape[:2], np.float32)
    if table.n_items:
        _launch(q, k_pages, v_pages, table, scale, o, lse)
    if table.has_others:
        options = {"scale": scale, "groups": groups, "window": window, "out": (o, lse)}
        options["more_than"] = table.most_queries
        prefill.paged_attention(q, q_tokens, k_pages, v_pages, block_table, **options)
    return array.narrow(o, dtype), lse


@dataclass(frozen=True)
class _DecodeTable:
    """What the kernel must know of a step; `decode.cu` says how it lies.

    Attributes
    ----------
    values : (n,) int32, of the device
    heads_at, ranges_at, pages_at : where its parts begin
    shape : _DecodeTile
    heads : rows of a token: query heads of the key/value head that has most
    n_items : splits of all sequences that there is room for
    most_queries : of a sequence that the kernel serves
    has_others : True if there are sequences with more
    """

    values: object
    heads_at: int
    ranges_at: int
    pages_at: int
    shape: _DecodeTile
    heads: int
    n_items: int
    most_queries: int
    has_others: bool


def _table(q_tokens, block_table, groups, window, k_pages):
    """Table of a step's queries."""
    groups, K = tuple(map(tuple, groups)), k_pages.shape[3]

    def build():
        return _build(q_tokens, block_table, groups, window, K, k_pages)

    return kept((q_tokens, block_table), ("decode", groups, window, K), build)


def _build(q_tokens, block_table, groups, window, K, like):
    G, heads = len(groups), max(stop - start for start, stop in groups)
    shapes = next(shapes for width, shapes in _SHAPES.items() if K <= width)
    most, (_, queries) = max(1, _MOST_BLOCKS * shapes[-1].rows // heads), _runs(q_tokens)
    few = queries[queries <= most]

    # The smallest shape that has all rows of a sequence in one block, or the largest.
    rows = int(few.max(initial=0)) * heads
    shape = next((shape for shape in shapes if shape.rows >= rows), shapes[-1])

    # Room for all that may come; a grid has no more than so much.
    n_pages = (
        block_table.capacity[0]
        if block_table.capacity
        else _count_pages(q_tokens, block_table, window, most)
    )
    blocks, in_all = -(-rows // shape.rows), int((-(-few * heads // shape.rows)).sum())
    n_items = in_all + min(shape.splits(G), n_pages * blocks // shape.fewest_pages)
    if n_items > _MOST_ITEMS:
        most, n_items = 0, 0

    def values():
        return _values(q_tokens, block_table, groups, window, most, shape, n_items, n_pages)

    at = np.cumsum([8 * n_items, 2 * G, 2 * len(q_tokens)]).tolist()
    values = on_device(like, (q_tokens, block_table, groups, window), values) if n_items else None
    return _DecodeTable(values, *at, shape, heads, n_items, most, bool((queries > most).any()))


def _runs(q_tokens):
    """(first tokens, numbers of tokens) of the sequences of some tokens."""
    starts = plain.starts(q_tokens)
    return starts, np.diff(starts, append=len(q_tokens))


def _pages(q_tokens, block_table, window, most):
    """(places, numbers) of the pages of every sequence with at most so many queries."""
    return [
        block_table.pages(b, plain.window_start(q_tokens[rows, 1], window))
        for b, rows in plain.sequences(q_tokens)
        if rows.stop - rows.start <= most
    ]


def _count_pages(q_tokens, block_table, window, most):
    return sum(len(places) for places, _ in _pages(q_tokens, block_table, window, most))


def _values(q_tokens, block_table, groups, window, most, shape, n_items, n_pages):
    """The table, with zeros where there is room for more items and pages; the last page is none."""
    position = q_tokens[:, 1].astype(np.int64)
    last = np.minimum(position, np.asarray(block_table.lengths)[q_tokens[:, 0]] - 1)
    first = np.zeros_like(last) if window is None else position - window + 1
    pages = _pages(q_tokens, block_table, window, most)
    heads = [(start, stop - start) for start, stop in groups]
    items = _items(q_tokens, last, [len(places) for places, _ in pages], most, heads, shape)

    # Lay all parts end to end.
    at = np.cumsum([8 * n_items, 2 * len(heads), 2 * len(last)])
    table = np.zeros(at[-1] + 2 * n_pages + 2, np.int32)
    table[: items.size] = items.reshape(-1)
    table[at[0] : at[1]] = np.reshape(heads, -1)
    table[at[1] : at[2]] = np.stack([first, last], axis=1).reshape(-1)
    for i in (0, 1):
        part = np.concatenate([page[i] for page in pages])
        table[at[2] + i :: 2][: len(part)] = part
    return table


def _items(q_tokens, last, n_pages, most, heads, shape):
    """What the blocks must know: (splits, 8), as in `decode.cu`.

    Parameters
    ----------
    last : (T,) last position that every query sees
    n_pages : pages of every sequence with at most `most` queries
    heads : (first query head, how many) of every key/value head
    """
    token, queries = _runs(q_tokens)
    last, few = np.maximum.reduceat(last, token), queries <= most
    n_rows, n_pages = queries[few] * max(n for _, n in heads), np.array(n_pages)
    pages_at = np.cumsum(n_pages) - n_pages

    # Blocks of rows of the sequences, then splits of their pages, of about equal size.
    index, row = _numbered(-(-n_rows // shape.rows))
    row *= shape.rows
    pages = n_pages[index]
    size = -(-int(pages.sum()) // shape.splits(len(heads)))
    size = max(shape.fewest_pages, size, -(-int(pages.max()) // _MOST_SPLITS))
    splits = np.maximum(1, -(-pages // size))
    block, split = _numbered(splits)
    begin = pages[block] * split // splits[block]
    end = pages[block] * (split + 1) // splits[block]

    of = index[block]
    rows = np.minimum(shape.rows, n_rows[of] - row[block])
    where = token[few][of], row[block], rows, pages_at[of] + begin, end - begin
    return np.stack([*where, last[few][of], np.arange(len(of)) - split, splits[block]], axis=1)


def _numbered(counts):
    """For each of so many parts of every thing: which thing, and which of its parts."""
    index = np.repeat(np.arange(len(counts)), counts)
    return index, np.arange(len(index)) - (np.cumsum(counts) - counts)[index]


def _launch(q, k_pages, v_pages, table, scale, o, lse):
    """Fill in the rows of o (T, H, K) and lse (T, H) that the table's queries have."""
    xp, (_, H, K), G, shape = array.namespace(q), q.shape, k_pages.shape[1], table.shape
    parts = table.n_items, G, shape.rows
    o_parts, lse_parts = xp.empty((*parts, K), np.float32), xp.empty(parts, np.float32)
    held, out = NAMES[k_pages.dtype.name], NAMES[o.dtype.name]
    launch(
        "decode", "decode", (G, table.n_items), 32 * shape.warps,
        q, k_pages, v_pages, table.values, o_parts, lse_parts, counters(xp, table.n_items * G),
        o, lse, table.heads_at, table.ranges_at, table.pages_at, q.strides[0] // (4 * K), H,
        float(scale), options=shape.options(held, out, K, table.heads), early=True,
    )  # fmt: skip
