"""Who holds which page of the cache, and which pages hold what text.

Equal leading pages of two sequences are one page. A full page is known by the hash of all tokens up
to its end; a page that nobody holds any more keeps its content, and can be taken up again, until
its room is needed. Every rank of a replica keeps the same books, from the same requests, without a
message.
"""

import hashlib
from collections import OrderedDict

import numpy as np

from hpcinfer.model.cache import PAGE


class Pages:
    """The books of a cache of `n` pages.

    Attributes
    ----------
    total : number of pages
    """

    def __init__(self, n):
        self.total = n
        self._blank = list(range(n - 1, -1, -1))
        self._retained = OrderedDict()
        self._holders = [0] * n
        self._page_of = {}
        self._text_of = {}

    @property
    def free(self):
        """Pages that nobody holds."""
        return len(self._blank) + len(self._retained)

    @property
    def held(self):
        """Pages that sequences hold."""
        return self.total - self.free

    def find(self, digests):
        """Pages that hold the leading texts of `digests`, as far as they are in the cache."""
        pages = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def unheld(self, pages):
        """How many of `pages` nobody holds, so that holding them takes free ones."""
        return sum(self._holders[page] == 0 for page in pages)

    def hold(self, pages):
        """Hold pages that were found; they stay as they are until released."""
        for page in pages:
            self._holders[page] += 1
            self._retained.pop(page, None)

    def take(self, n):
        """`n` pages to write, blank ones first, then those that were released longest ago.

        Raises
        ------
        RuntimeError
            If fewer than `n` are free.
        """
        if n > self.free:
            raise RuntimeError(f"pages: got {self.free} free pages, need {n}")
        pages = []
        for _ in range(n):
            if self._blank:
                page = self._blank.pop()
            else:
                page, _ = self._retained.popitem(last=False)
                del self._page_of[self._text_of.pop(page)]
            self._holders[page] = 1
            pages.append(page)
        return pages

    def name(self, page, digest):
        """Make a page known by its text; a text that is known already keeps its first page."""
        if digest not in self._page_of and page not in self._text_of:
            self._page_of[digest] = page
            self._text_of[page] = digest

    def release(self, pages):
        """Give pages back, the last of a text first, so that beginnings stay longest."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._text_of:
                    self._retained[page] = None
                else:
                    self._blank.append(page)


def pages_for(tokens):
    """Pages that `tokens` tokens take."""
    return -(-tokens // PAGE)


def digests(tokens, known=(), seed=b""):
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
    result = list(known)
    previous = result[-1] if result else hashlib.sha256(seed).digest()
    for start in range(len(result) * PAGE, len(tokens) - PAGE + 1, PAGE):
        text = np.asarray(tokens[start : start + PAGE], np.int32).tobytes()
        previous = hashlib.sha256(previous + text).digest()
        result.append(previous)
    return result
