"""Who holds which page of the cache, and which pages hold what text.

Equal leading pages of two sequences are one page. A full page is known by the hash of all tokens up
to its end; a page that nobody holds any more keeps its content, and can be taken up again, until
its room is needed. Where the cache is cut over ranks, each owns a pool of pages, and the pages of a
sequence are dealt to the ranks in turn. Every rank of a replica keeps the same books, of all pools,
from the same requests, without a message.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from hpcinfer.model.cache import PAGE


class BlockManager:
    """The block table of a cache of `n` pages on each of `ranks` ranks.

    A page's number is rank · n + its place in the rank's pool.

    Attributes
    ----------
    total : number of pages of all ranks
    """

    def __init__(self, n: int, ranks: int = 1):
        self.n, self.ranks, self.total = n, ranks, n * ranks
        self._blank = [list(range((r + 1) * n - 1, r * n - 1, -1)) for r in range(ranks)]
        self._retained: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(ranks)]
        self._holders = [0] * self.total
        self._page_of: dict[bytes, int] = {}
        self._text_of: dict[int, bytes] = {}

    def owner(self, page: int) -> int:
        """Rank that has `page` in its pool."""
        return page // self.n

    def n_free(self, rank: int) -> int:
        """Pages of a rank's pool that nobody holds."""
        return len(self._blank[rank]) + len(self._retained[rank])

    @property
    def held(self) -> int:
        """Pages that sequences hold."""
        return self.total - sum(self.n_free(rank) for rank in range(self.ranks))

    @property
    def emptiest(self) -> int:
        """Rank with the most free pages."""
        return max(range(self.ranks), key=self.n_free)

    def match_prefix(self, block_hashes: Iterable[bytes]) -> list[int]:
        """Pages that hold the leading texts of `block_hashes`, as far as they are in the cache.

        They end before a page that is not in the next pool: the same text may have been dealt anew
        from another rank on while later pages of it were still here.
        """
        pages: list[int] = []
        for block_hash in block_hashes:
            page = self._page_of.get(block_hash)
            if page is None or (pages and self.owner(page) != self._next_owner(pages[-1])):
                break
            pages.append(page)
        return pages

    def can_allocate(self, owners: Sequence[int], found: Sequence[int] = ()) -> bool:
        """True if a page from each of `owners`, and holding the pages `found`, can be had."""
        if not owners and not found:  # as in most steps of most sequences
            return True
        needed = Counter(owners)
        needed.update(self.owner(page) for page in found if self._holders[page] == 0)
        return all(count <= self.n_free(rank) for rank, count in needed.items())

    def acquire(self, pages: Iterable[int]) -> None:
        """Hold pages that were found; they stay as they are until released."""
        for page in pages:
            self._holders[page] += 1
            self._retained[self.owner(page)].pop(page, None)

    def allocate(self, owners: Sequence[int]) -> list[int]:
        """Pages to write, one from each of `owners`: blank ones, then the longest released.

        Raises
        ------
        RuntimeError
            If they cannot be had.
        """
        if not self.can_allocate(owners):
            raise RuntimeError(f"pages: got too few free pages for {len(owners)} more")
        return [self._allocate(owner) for owner in owners]

    def register(self, page: int, block_hash: bytes) -> None:
        """Make a page known by its text; a text that is known already keeps its first page."""
        if block_hash not in self._page_of and page not in self._text_of:
            self._page_of[block_hash] = page
            self._text_of[page] = block_hash

    def free(self, pages: Sequence[int]) -> None:
        """Give pages back, the last of a text first, so that beginnings stay longest."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._text_of:
                    self._retained[self.owner(page)][page] = None
                else:
                    self._blank[self.owner(page)].append(page)

    def _next_owner(self, page: int) -> int:
        """Rank that has the page after this one."""
        return (self.owner(page) + 1) % self.ranks

    def _allocate(self, owner: int) -> int:
        """A page of a rank's pool, whose text is forgotten."""
        if self._blank[owner]:
            page = self._blank[owner].pop()
        else:
            page, _ = self._retained[owner].popitem(last=False)
            del self._page_of[self._text_of.pop(page)]
        self._holders[page] = 1
        return page


def pages_for(tokens: int) -> int:
    """Pages that `tokens` tokens take."""
    return -(-tokens // PAGE)


def block_hashes(
    tokens: Sequence[int], known: Sequence[bytes] = (), seed: bytes = b""
) -> list[bytes]:
    """Hash of the text up to the end of every full page of `tokens`.

    Parameters
    ----------
    tokens : sequence of int
    known : hashes of the first pages, if they were computed before
    seed : what else decides the keys and values, such as a rope's class of lengths

    Returns
    -------
    list of bytes, one per full page
    """
    # Go on from the hash of all that is before.
    result = list(known)
    previous = result[-1] if result else hashlib.sha256(seed).digest()
    for start in range(len(result) * PAGE, len(tokens) - PAGE + 1, PAGE):
        text = np.asarray(tokens[start : start + PAGE], np.int32).tobytes()
        previous = hashlib.sha256(previous + text).digest()
        result.append(previous)
    return result
