"""One step of the engine: the tokens to compute now, of all sequences, laid end to end."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hpcinfer import partition
from hpcinfer.model.cache import PAGE
from hpcinfer.ops.attention import reach, seen, sequences


@dataclass
class Books:
    """Where the cached keys of a step's sequences are: pages dealt in turn to the pools of ranks.

    Attributes
    ----------
    places : (B, pages of the longest) int, place of every page in its owner's pool
    first : (B,) int, pool of each sequence's first page; the next page is in the next pool
    pool, pools : this rank's pool, and the number of pools
    lengths : (B,) int, tokens of each sequence in the cache when this step's are in it
    room : (pages of all sequences, of the longest) that tables are to have room for, or None
    """

    places: np.ndarray
    first: np.ndarray
    pool: int
    pools: int
    lengths: np.ndarray
    room: tuple | None = None

    def __post_init__(self):
        self._pages, self._tables = {}, {}

    def pages(self, b, start=0):
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

    def table(self, tokens, window=None):
        """This rank's pages of the sequences of some queries; every layer asks again.

        Parameters
        ----------
        tokens : (T, 2) int, sequence and position of every query, sequences ascending
        window : positions that a query looks back, its own included; None for all
        """
        key = id(tokens), window
        if key not in self._tables:
            self._tables[key] = Table(self, tokens, window)
        return self._tables[key]

    def keys(self, b, start=0):
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


class Table:
    """The pages that some queries meet on this rank, as arrays; each is made when it is asked for.

    Parameters
    ----------
    books : Books
    tokens : what it is made for; held, as `Books.table` knows it by its identity
    window : as for `Books.table`

    Attributes
    ----------
    positions : (T,) int64, of the queries
    most_queries : of one sequence
    """

    def __init__(self, books, tokens, window):
        self.tokens, self._books, self._window = tokens, books, window
        self.positions = tokens[:, 1].astype(np.int64)
        self._sequences = list(sequences(tokens))
        self.most_queries = max((rows.stop - rows.start for _, rows in self._sequences), default=0)

    @cached_property
    def pages(self):
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
    def spans(self):
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
            L = int(np.searchsorted(k_pos, self._books.lengths[b]))
            first, last = seen(self.positions[rows], k_pos[:L], self._window)
            spans.append((rows, places.astype(np.int64), L, first, last))
        return spans

    def _pages(self, b, rows):
        return self._books.pages(b, reach(self.positions[rows], self._window))


@dataclass
class Phase:
    """A run of a step's tokens that one strategy serves.

    Attributes
    ----------
    tokens : (n, 2) int32, sequence and position of every token
    own : slice of the step's `mine`
    chosen : (n/P,) int64, which of `tokens` this rank computes
    counts : tokens that each part computes
    order : (n,) int64, where each token stands when the parts lie end to end
    """

    tokens: np.ndarray
    own: slice
    chosen: np.ndarray
    counts: list
    order: np.ndarray


@dataclass
class Step:
    """Tokens of one step; all but what is marked "own" is equal on every rank of a replica.

    Attributes
    ----------
    token_ids : (T,) int32
    tokens : (T, 2) int32, sequence and position of every token, sequences ascending
    lengths : (B,) int64, tokens of each sequence in the cache when this step's are in it
    numbers : (B,) int64, ascending in the order in which the sequences came
    complete : (B,) bool, sequences that have all their tokens then in the cache
    n_single : sequences with one token in this step; they stand first
    rows : (R,) int64, tokens whose hidden state is wanted
    length_classes : (T,) int64 or None, for ropes that depend on the length of the text
    columns : True if every rank of cp computes all tokens, with a part of the columns
    parts : ranks of cp
    part : (T,) int64, which part of the context-parallel cut computes each token, unless `columns`
    home : (T,) int64, which rank of tp keeps each token between the halves of a layer; -1 if all do
    mine : (T/P,) int64, own: the tokens that this rank computes
    stored : (n,) int64, own: which of `mine` have their key and value in this rank's cache
    slots : (n,) int64, own: place of each of `stored` in the cache: page · PAGE + offset
    books : Books, where the cached keys are
    """

    token_ids: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray
    numbers: np.ndarray
    complete: np.ndarray
    n_single: int
    rows: np.ndarray
    length_classes: np.ndarray | None
    columns: bool
    parts: int
    part: np.ndarray
    home: np.ndarray
    mine: np.ndarray
    stored: np.ndarray
    slots: np.ndarray
    books: Books

    @property
    def n_tokens(self):
        """T."""
        return len(self.token_ids)

    @property
    def n_sequences(self):
        """B."""
        return len(self.lengths)

    @property
    def all_wanted(self):
        """True if the hidden state of every token is wanted."""
        return len(self.rows) == self.n_tokens

    @property
    def positions(self):
        """(T,) place of every token in its sequence."""
        return self.tokens[:, 1]

    def counts_at_home(self, tp):
        """How many of `mine` each rank of tp keeps between the halves; None if all keep all."""
        home = self.home[self.mine]
        if not len(home) or home[0] < 0:
            return None
        return np.bincount(home, minlength=tp).tolist()

    @cached_property
    def decoding(self):
        """Phase of the sequences with one token in this step; None if there is none."""
        return self._phase(0, self.n_single)

    @cached_property
    def prefilling(self):
        """Phase of the sequences with several tokens in this step; None if there is none."""
        return self._phase(self.n_single, self.n_tokens)

    def _phase(self, start, stop):
        if start == stop:
            return None
        own = slice(*np.searchsorted(self.mine, (start, stop)))
        counts = np.bincount(self.part[start:stop], minlength=self.parts).tolist()
        order = in_parts(self.part[start:stop])
        return Phase(self.tokens[start:stop], own, self.mine[own] - start, counts, order)


def in_parts(part):
    """Where each item stands when the items of part 0 come first, then those of part 1, ..."""
    order = np.empty(len(part), np.int64)
    order[np.argsort(part, kind="stable")] = np.arange(len(part))
    return order


def holders(step, rows, grid):
    """Which ranks have which tokens at a point of the forward pass.

    Parameters
    ----------
    rows : "mine", tokens inside the products of a layer; "home", between its halves; "own", those
        for which a rank answers alone; "wanted", after the last layer
    grid : Grid

    Returns
    -------
    comm : ranks that have them together, or None if every rank has all tokens of the step
    held : (n,) int64, own: tokens that this rank has, ascending
    owner : (T,) int64, rank of `comm` that brings each token
    """
    tp, cp = grid.tp, grid.cp
    if rows == "wanted" or (step.columns and rows != "own"):
        return None, None, None
    if rows == "mine" or (rows == "home" and grid.layout.sp == "off"):
        return cp, step.mine, step.part
    if rows == "home":
        at_home = step.home[step.mine]
        held = step.mine[(at_home == tp.rank) | (at_home < 0)]
        return grid.tp_cp, held, np.maximum(step.home, 0) * cp.size + step.part

    # Tokens that several ranks keep are dealt to them in blocks.
    if step.columns:
        owner = _dealt(step.n_tokens, cp.size * tp.size)
    else:
        owner = step.home * cp.size + step.part
        for part in range(cp.size):
            tokens = np.flatnonzero((step.part == part) & (step.home < 0))
            owner[tokens] = _dealt(len(tokens), tp.size) * cp.size + part
    return grid.tp_cp, np.flatnonzero(owner == grid.tp_cp.rank), owner


def _dealt(n, P):
    """Rank of each of n tokens in blocks over P ranks: (n,) int64."""
    return np.repeat(np.arange(P), partition.counts(partition.block(n, P)))
