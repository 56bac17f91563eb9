"""Attention of many queries: tiles of rows and keys by matrix units, all sequences in one launch.

Queries meet keys and values of 16 bits where these lie, in the pages of the cache or end to end,
and are rounded to their type first. `attention` in this folder asks here, and has other ways for
what is not served.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcinfer import array
from hpcinfer.array import Array
from hpcinfer.ops import attention as plain
from hpcinfer.ops.cuda.attention_shapes import PAGE, are_served, shared_memory
from hpcinfer.ops.cuda.runtime.launch import NAMES, kept, launch

# Blocks that keep a large device busy, fewer than the splits that can be merged; tiles below which
# a split costs more than it brings.
_BUSY_BLOCKS, _FEWEST_TILES = 264, 8

# First position of a page that no query sees; a window that reaches back to the first position.
_NOWHERE, _NO_WINDOW = 2**31 - 256, 2**31 - 1

_OTHER_SHARED = 4 << 10  # bytes that a block takes beside tiles and rows, at most


@dataclass(frozen=True)
class _PrefillTile:
    """How a block computes; `prefill.cu` says what the letters stand for."""

    warps: int
    tiles: int
    keys: int
    stages: int
    blocks: int

    @property
    def rows(self) -> int:
        """Rows of a block: query heads of tokens."""
        return 16 * self.tiles * self.warps

    @property
    def pages(self) -> int:
        """Pages of a tile of keys."""
        return self.keys // PAGE

    def shared(self, K: int) -> int:
        """Bytes of shared memory: rows, and tiles of keys and values, against bank conflicts."""
        return 2 * (K + 8) * (self.rows + 2 * self.stages * self.keys)

    def options(self, held: str, K: int, row_stride: int) -> tuple[str, ...]:
        """Options of the compiler."""
        given = {"HELD": held, "K": K, "ROW_STRIDE": row_stride, "WARPS": self.warps}
        given |= {"TILES": self.tiles, "KEYS": self.keys, "STAGES": self.stages}
        return tuple(f"-D{name}={x}" for name, x in (given | {"BLOCKS": self.blocks}).items())


# Shapes for heads up to a width, the best that a multiprocessor has room for before the others.
_SHAPES = {
    128: (_PrefillTile(4, 2, 64, 1, 2), _PrefillTile(4, 1, 32, 1, 2)),
    256: (_PrefillTile(4, 1, 64, 1, 1), _PrefillTile(4, 1, 32, 1, 1)),
}

OPTIONS = tuple(
    shape.options(held, K, K)
    for held in ("f16", "bf16")
    for K, width in ((16, 128), (80, 128), (128, 128), (256, 256))
    for shape in _SHAPES[width]
)
KERNELS = ("prefill", "merge_parts")


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
    between: Callable[[], None] | None = None,
) -> tuple[Array, Array]:
    """As `ops.attention.attention`, of keys whose positions run in pages; the last may be short."""
    firsts = _first_positions(k_pos) if are_served(q, k, v, groups) else None
    if firsts is None:
        return NotImplemented

    # Take all as one sequence, whose pages lie end to end.
    shape, (_, G, K) = _shape(k), k.shape

    def build():
        sequence = slice(0, len(q)), np.arange(len(firsts)), firsts, int(k_pos[-1]) + 1
        return _table([sequence], q_pos, groups, window, shape, k)

    what = "attention", _plain(groups), window, shape, q_pos.tobytes(), k_pos.tobytes()
    table, o_lse = kept((), what, build), _results(q)
    _launch(q, k, v, (G * K, PAGE * G * K, K), table, shape, scale, window, *o_lse)
    if between is not None:
        between()
    return o_lse


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
    more_than: int = 0,
    out: tuple[Array, Array] | None = None,
) -> tuple[Array, Array]:
    """As `ops.attention.paged_attention`, of the sequences with more queries than `more_than`.

    Parameters
    ----------
    out : o, lse to write the rows of those sequences to; None for new ones
    """
    if k_pages.shape[2] != PAGE or not are_served(q, k_pages, v_pages, groups):
        return NotImplemented

    # Look up the pages of the sequences that have so many queries.
    shape, (_, G, _, K) = _shape(k_pages), k_pages.shape

    def build():
        sequences = []
        for b, rows in plain.sequences(q_tokens):
            if rows.stop - rows.start > more_than:
                own = _own_pages(block_table, b, q_tokens[rows, 1], window)
                sequences.append((rows, *own, int(block_table.lengths[b])))
        return _table(sequences, q_tokens[:, 1], groups, window, shape, k_pages)

    what = "paged attention", _plain(groups), window, shape, more_than
    table, o_lse = kept((q_tokens, block_table), what, build), out or _results(q)
    strides = K, G * PAGE * K, PAGE * K
    _launch(q, k_pages, v_pages, strides, table, shape, scale, window, *o_lse)
    return o_lse


def _shape(k):
    """The first of the shapes that a multiprocessor has room for, or the smallest."""
    K, (of_block, of_all) = k.shape[-1], shared_memory(array.namespace(k))
    shapes = next(shapes for width, shapes in _SHAPES.items() if K <= width)
    for shape in shapes:
        needed = shape.shared(K) + _OTHER_SHARED
        if needed <= of_block and shape.blocks * needed <= of_all:
            return shape
    return shapes[-1]


def _plain(groups):
    return tuple(map(tuple, groups))


def _results(q):
    xp = array.namespace(q)
    return xp.empty(q.shape, np.float32), xp.empty(q.shape[:2], np.float32)


def _first_positions(k_pos):
    """First position of every page of keys that lie end to end; None if they are not in pages."""
    firsts = k_pos[::PAGE].astype(np.int64)
    in_pages = (firsts[:, None] + np.arange(PAGE)).reshape(-1)[: len(k_pos)]
    if not np.array_equal(k_pos, in_pages) or (np.diff(firsts) < PAGE).any():
        return None
    return firsts


def _own_pages(block_table, b, positions, window):
    """(places, first positions) of the pages of sequence b that any of its queries may see."""
    places, numbers = block_table.pages(b, plain.window_start(positions, window))
    return places, numbers.astype(np.int64) * PAGE


@dataclass(frozen=True)
class _PrefillTable:
    """What the kernels must know of a step; `prefill.cu` says how it lies.

    Attributes
    ----------
    values : (n,) int32, of the device
    entries_at, positions_at, pages_at : where its parts begin
    n_items : blocks of rows of each key/value head
    n : rows of a token: query heads of the key/value head that has most
    splits : of the keys of each item
    """

    values: object
    entries_at: int
    positions_at: int
    pages_at: int
    n_items: int
    n: int
    splits: int


def _table(sequences, positions, groups, window, shape, like):
    """Table of a step's queries.

    Parameters
    ----------
    sequences : list of (rows, places, firsts, length): slice of the queries of a sequence; its
        pages, which ascend, and the first position of each; and how many keys it has in all
    positions : (T,) integers of all queries, host
    like : array of the device
    """
    n, items, pages, pages_at = max(stop - start for start, stop in groups), [], [], 0
    for rows, places, firsts, length in sequences:
        own = _items(positions[rows], firsts, length, window, n, shape)
        own[:, 0], own[:, 3] = rows.start, own[:, 3] + pages_at
        items.append(own)

        # A tile reads all its pages, and keys of positions that nobody has are not visible.
        places = np.append(places, np.zeros(shape.pages, np.int64))
        firsts = np.append(firsts, np.full(shape.pages, _NOWHERE))
        pages.append(np.stack([places, firsts], axis=1))
        pages_at += len(places)

    # Heavy items first, for the sake of balance.
    items = np.concatenate(items) if items else np.zeros((0, 8), np.int64)
    items = items[np.argsort(-items[:, 4], kind="stable")]
    entries = [(start, stop - start) for start, stop in groups]
    parts = [np.asarray(part, np.int32).reshape(-1) for part in (items, entries, positions, *pages)]
    ends = np.cumsum([len(part) for part in parts[:3]]).tolist()
    most = -(-int(items[0, 4]) // shape.pages) if len(items) else 0
    splits = min(_BUSY_BLOCKS // max(1, len(items) * len(groups)), most // _FEWEST_TILES)
    values = array.to_device(np.concatenate(parts), like)
    return _PrefillTable(values, *ends, len(items), n, max(1, splits))


def _items(positions, firsts, length, window, n, shape):
    """What the blocks of rows of a sequence must know: (blocks, 8), as in `prefill.cu`."""
    count, last_of_page = len(positions) * n, firsts + (PAGE - 1)
    row = np.arange(0, count, shape.rows)
    rows = np.minimum(shape.rows, count - row)

    # Between which positions the queries of each block stand.
    low, high = positions[row // n].astype(np.int64), positions[(row + rows - 1) // n]
    if (np.diff(positions) < 0).any():
        low, high = np.full_like(low, positions.min()), np.full_like(low, positions.max())
    last = np.minimum(high, length - 1)

    # Pages that any of them sees, and among these the ones that all of them see whole.
    stop = np.searchsorted(firsts, last, "right")
    whole_stop = np.searchsorted(last_of_page, np.minimum(low, last), "right")
    start = whole_start = np.zeros_like(stop)
    if window is not None:
        start = np.searchsorted(last_of_page, low - window, "right")
        whole_start = np.searchsorted(firsts, high - window, "right")
    pages = np.maximum(stop - start, 0)
    whole = -(-(whole_start - start) // shape.pages), (whole_stop - start) // shape.pages
    return np.stack([np.zeros_like(row), row, rows, start, pages, *whole, last], axis=1)


def _launch(q, k, v, strides, table, shape, scale, window, o, lse):
    """Fill in the rows of o (T, H, K) and lse (T, H) that the table's queries have.

    Parameters
    ----------
    strides : from key to key, from page to page, from head to head
    """
    if not table.n_items:
        return

    # Write results at once, or those of the splits.
    xp, (_, H, K), G = array.namespace(q), q.shape, k.shape[1]
    row_stride, page_stride, head_stride = strides
    options = shape.options(NAMES[k.dtype.name], K, row_stride)
    o_parts, lse_parts = o, lse
    if table.splits > 1:
        parts = table.splits, table.n_items * G * shape.rows
        o_parts, lse_parts = xp.empty((*parts, K), np.float32), xp.empty(parts, np.float32)
    at = table.entries_at, table.positions_at
    launch(
        "prefill", "prefill", (G, table.n_items, table.splits), 32 * shape.warps,
        q, k, v, table.values, o_parts, lse_parts, *at, table.pages_at,
        q.strides[0] // (4 * K), H, table.n, _NO_WINDOW if window is None else window,
        float(scale), page_stride, head_stride, options=options, shared=shape.shared(K),
    )  # fmt: skip

    # Merge the splits.
    if table.splits > 1:
        grid = G, table.n_items, shape.rows // shape.warps
        launch(
            "prefill", "merge_parts", grid, 32 * shape.warps,
            o_parts, lse_parts, table.values, o, lse, *at, H, table.n, table.splits,
            options=options,
        )  # fmt: skip
