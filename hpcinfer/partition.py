"""The only place that divides by P: who owns which part of an axis.

A distribution is a list of (start, stop) ranges, one per rank, in rank order; they are disjoint,
cover the axis and differ in length by at most one item, also where P does not divide the axis or
exceeds it.
"""

from dataclasses import dataclass

import numpy as np


def block(n, P):
    """Contiguous blocks of an axis of `n` items over `P` ranks.

    Returns
    -------
    list of (start, stop), length P; the first n % P ranks own one item more.
    """
    if n < 0 or P < 1:
        raise ValueError(f"partition: got {n} items over {P} ranks, need n >= 0 and P >= 1")
    size, rest = divmod(n, P)
    starts = [r * size + min(r, rest) for r in range(P + 1)]
    return [(starts[r], starts[r + 1]) for r in range(P)]


def counts(ranges):
    """Length of every rank's range."""
    return [stop - start for start, stop in ranges]


@dataclass(frozen=True)
class Heads:
    """Query and key/value heads that one rank owns.

    Attributes
    ----------
    query : (start, stop) among H
    kv : (start, stop) among G; heads that serve query heads of two ranks stand on both
    groups : for each own key/value head its (start, stop) among the rank's own query heads
    """

    query: tuple
    kv: tuple
    groups: tuple

    @property
    def n_query(self):
        return self.query[1] - self.query[0]

    @property
    def n_kv(self):
        return self.kv[1] - self.kv[0]


def heads(H, G, P):
    """Heads of every rank: blocks of query heads, with the key/value heads that they read.

    The query heads are balanced, so that the projections and scores are; a key/value head is copied
    where its group of H/G query heads is spread over ranks. Ranks beyond H own no head.

    Returns
    -------
    list of Heads, length P
    """
    if G < 1 or H % G:
        raise ValueError(f"partition: got {H} query heads and {G} KV heads, need G to divide H")
    per_kv = H // G
    owned = []
    for start, stop in block(H, P):
        kv = (start // per_kv, -(-stop // per_kv)) if stop > start else (0, 0)
        groups = tuple(
            (max(g * per_kv, start) - start, min((g + 1) * per_kv, stop) - start)
            for g in range(*kv)
        )
        owned.append(Heads((start, stop), kv, groups))
    return owned


def heads_of(own, P):
    """The heads of one rank cut further, over `P` ranks that compute its tokens together.

    Parameters
    ----------
    own : Heads
    P : number of ranks

    Returns
    -------
    list of Heads, length P, numbered among the own heads
    """
    parts = []
    for start, stop in block(own.n_query, P):
        kv = [g for g, (first, last) in enumerate(own.groups) if first < stop and start < last]
        groups = tuple(
            (max(first, start) - start, min(last, stop) - start)
            for first, last in (own.groups[g] for g in kv)
        )
        parts.append(Heads((start, stop), (kv[0], kv[-1] + 1) if kv else (0, 0), groups))
    return parts


def contiguous(n, P):
    """Tokens in one run per rank: rank 0 has the first. Causal work grows with the rank."""
    return [np.arange(start, stop) for start, stop in block(n, P)]


def striped(n, P):
    """Tokens dealt one by one (Brandon et al. 2023, striped attention, arXiv:2311.09431)."""
    return [np.arange(r, n, P) for r in range(P)]


def zigzag(n, P):
    """Tokens in 2P runs, of which rank r has runs r and 2P-1-r: an early and a late one."""
    runs = [np.arange(start, stop) for start, stop in block(n, 2 * P)]
    return [np.concatenate([runs[r], runs[2 * P - 1 - r]]) for r in range(P)]


def block_cyclic(n, P, block=16):
    """Blocks of `block` tokens dealt in turn, the last one as long as it is (ScaLAPACK's cut)."""
    if block < 1:
        raise ValueError(f"partition: got blocks of {block} items, need 1 or more")
    owner = np.arange(n) // block % P
    return [np.flatnonzero(owner == r) for r in range(P)]


# Cuts of a sequence of n tokens over P ranks: for every rank the (n/P,) numbers of its tokens,
# ascending. All but `contiguous` balance causal attention.
CUTS = {cut.__name__: cut for cut in (contiguous, striped, zigzag, block_cyclic)}
