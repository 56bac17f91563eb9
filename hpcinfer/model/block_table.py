"""Which pages hold the keys of which sequences of a step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hpcinfer import partition
from hpcinfer.model.cache import PAGE
from hpcinfer.ops.attention import sequences, visible, window_start


@dataclass
class BlockTable:
    """Where the cached keys of a step's sequences are: pages dealt in turn to the pools of ranks.

    Attributes
    ----------
    places : (B, pages of the longest) int, place of every page in its owner's pool
    first : (B,) int, pool of each sequence's first page; the next page is in the next pool
    pool, pools : this rank's pool, and the number of pools
    lengths : (B,) int, tokens of each sequence in the cache when this step's are in it
    capacity : (pages of all sequences, of the longest) that tables are to have room for, or None
    """

    places: np.ndarray
    first: np.ndarray
    pool: int
    pools: int
    lengths: np.ndarray
    capacity: tuple | None = None

    def __post_init__(self):
        self._pages, self._tables = {}, {}

    def pages(self, b: int, start: int = 0) -> tuple:
        """This rank's pages of sequence b from token `start` on; every layer asks again.

        Returns
        -------
        places : (n,) int, in this rank's pool
        numbers : (n,) int, which page of the sequence each one is
        """
        key = b, start // PAGE
        if key not in self._pages:
            numbers = self._dealt(b, start, self.pool)
            self._pages[key] = self.places[b, numbers], numbers
        return self._pages[key]

    def table(self, tokens: np.ndarray, window: int | None = None) -> PageIndex:
        """This rank's pages of the sequences of some queries; every layer asks again.

        Parameters
        ----------
        tokens : (T, 2) int, sequence and position of every query, sequences ascending
        window : positions that a query looks back, its own included; None for all
        """
        key = id(tokens), window
        if key not in self._tables:
            self._tables[key] = PageIndex(self, tokens, window)
        return self._tables[key]

    def keys(self, b: int, start: int = 0) -> np.ndarray:
        """Number of cached keys of sequence b, from the page of token `start` on, in every pool."""
        counts = PAGE * np.array([len(self._dealt(b, start, pool)) for pool in range(self.pools)])
        length = int(self.lengths[b])
        last = -(-length // PAGE)
        if last > start // PAGE:
            counts[(int(self.first[b]) + last - 1) % self.pools] -= last * PAGE - length
        return counts

    def _dealt(self, b, start, pool):
        """Numbers of the pages of sequence b that a pool has, from token `start` on."""
        last = -(-int(self.lengths[b]) // PAGE)
        return partition.dealt(start // PAGE, last, self.pools, int(self.first[b]), pool)


class PageIndex:
    """The pages that some queries meet on this rank, as arrays; each is made when it is asked for.

    Parameters
    ----------
    block_table : BlockTable
    tokens : what it is made for; held, as `BlockTable.table` knows it by its identity
    window : as for `BlockTable.table`

    Attributes
    ----------
    positions : (T,) int64, of the queries
    most_queries : of one sequence
    """

    def __init__(self, block_table: BlockTable, tokens: np.ndarray, window: int | None):
        self.tokens, self._block_table, self._window = tokens, block_table, window
        self.positions = tokens[:, 1].astype(np.int64)
        self._sequences = list(sequences(tokens))
        self.most_queries = max((rows.stop - rows.start for _, rows in self._sequences), default=0)

    @cached_property
    def pages(self) -> tuple:
        """Pages of each query: of a sequence's, each meets those that the first one does.

        Returns
        -------
        bounds : (T+1,) int64, where each query's pages begin in `places`, `numbers`
        places, numbers : (n,) int64, in this rank's pool, and in the sequence
        """
        pages = []
        for b, rows in self._sequences:
            pages += [self._pages(b, rows)] * (rows.stop - rows.start)
        bounds = np.cumsum([0] + [len(places) for places, _ in pages])
        places, numbers = (
            np.concatenate([page[i] for page in pages]).astype(np.int64)
            if pages
            else np.empty(0, np.int64)
            for i in (0, 1)
        )
        return bounds, places, numbers

    @cached_property
    def spans(self) -> list:
        """What the queries of each sequence meet, for attention of many at a time.

        Returns
        -------
        list of (rows, places, L, first, last): slice of the queries; (n,) int64, places of the
        pages; the keys in them; and (s,) int64, first key that each query sees, one behind the last
        """
        spans = []
        for b, rows in self._sequences:
            places, numbers = self._pages(b, rows)
            k_pos = (numbers[:, None] * PAGE + np.arange(PAGE)).reshape(-1)
            L = int(np.searchsorted(k_pos, self._block_table.lengths[b]))
            first, last = visible(self.positions[rows], k_pos[:L], self._window)
            spans.append((rows, places.astype(np.int64), L, first, last))
        return spans

    def _pages(self, b, rows):
        return self._block_table.pages(b, window_start(self.positions[rows], self._window))
