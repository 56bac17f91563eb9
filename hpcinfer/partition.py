"""The only place that divides by P: who owns which part of an axis.

A distribution is a list of (start, stop) ranges, one per rank, in rank order; they are disjoint,
cover the axis and differ in length by at most one item, also where P does not divide the axis or
exceeds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Range = tuple[int, int]  # start and stop


def block(n: int, P: int) -> list[Range]:
    """Contiguous blocks of an axis of `n` items over `P` ranks.

    Returns
    -------
    (start, stop) of every rank; the first n % P ranks own one item more
    """
    if n < 0 or P < 1:
        raise ValueError(f"partition: got {n} items over {P} ranks, need n >= 0 and P >= 1")
    size, rest = divmod(n, P)
    starts = [r * size + min(r, rest) for r in range(P + 1)]
    return [(starts[r], starts[r + 1]) for r in range(P)]


def counts(ranges: Iterable[Range]) -> list[int]:
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

    query: Range
    kv: Range
    groups: tuple[Range, ...]

    @property
    def n_query(self) -> int:
        return self.query[1] - self.query[0]

    @property
    def n_kv(self) -> int:
        return self.kv[1] - self.kv[0]


def heads(H: int, G: int, P: int) -> list[Heads]:
    """Heads of every rank: blocks of query heads, with the key/value heads that they read.

    The query heads are balanced, so that the projections and scores are; a key/value head is copied
    where its group of H/G query heads is spread over ranks. Where P is a multiple of G, each group
    is divided by itself, so that a rank reads one key/value head only. Ranks may own no head.
    """
    if G < 1 or H % G:
        raise ValueError(f"partition: got {H} query heads and {G} KV heads, need G to divide H")
    per_kv = H // G
    ranges = block(H, P)
    if P % G == 0:
        parts = block(per_kv, P // G)
        ranges = [(g * per_kv + a, g * per_kv + b) for g in range(G) for a, b in parts]
    owned = []
    for start, stop in ranges:
        kv = (start // per_kv, -(-stop // per_kv)) if stop > start else (0, 0)
        groups = tuple(
            (max(g * per_kv, start) - start, min((g + 1) * per_kv, stop) - start)
            for g in range(*kv)
        )
        owned.append(Heads((start, stop), kv, groups))
    return owned


def heads_of(own: Heads, P: int) -> list[Heads]:
    """The heads of one rank cut further, over `P` ranks that compute its tokens together.

    Parameters
    ----------
    own : heads of the one rank
    P : number of ranks

    Returns
    -------
    heads of every rank, numbered among the own heads
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


def contiguous(n: int, P: int) -> list[np.ndarray]:
    """Tokens in one run per rank: rank 0 has the first. Causal work grows with the rank."""
    return [np.arange(start, stop) for start, stop in block(n, P)]


def striped(n: int, P: int) -> list[np.ndarray]:
    """Tokens dealt one by one (Brandon et al. 2023, striped attention, arXiv:2311.09431)."""
    return [np.arange(r, n, P) for r in range(P)]


def zigzag(n: int, P: int) -> list[np.ndarray]:
    """Tokens in 2P runs, of which rank r has runs r and 2P-1-r: an early and a late one."""
    runs = [np.arange(start, stop) for start, stop in block(n, 2 * P)]
    return [np.concatenate([runs[r], runs[2 * P - 1 - r]]) for r in range(P)]


def block_cyclic(n: int, P: int, block: int = 16) -> list[np.ndarray]:
    """Blocks of `block` tokens dealt in turn, the last one as long as it is (ScaLAPACK's cut)."""
    if block < 1:
        raise ValueError(f"partition: got blocks of {block} items, need 1 or more")
    owner = np.arange(n) // block % P
    return [np.flatnonzero(owner == r) for r in range(P)]


# Cuts of a sequence of n tokens over P ranks: for every rank the (n/P,) numbers of its tokens,
# ascending. All but `contiguous` balance causal attention. The engine has the last one, with pages
# for blocks (`dealt`); the others are there to be compared with it.
CUTS = {cut.__name__: cut for cut in (contiguous, striped, zigzag, block_cyclic)}


def dealt(start: int, stop: int, P: int, first: int, rank: int) -> np.ndarray:
    """Items of start..stop-1 that `rank` owns when items are dealt in turn, item 0 to rank `first`.

    Returns
    -------
    (n,) int64 array, ascending
    """
    begin = start + (rank - first - start) % P
    return np.arange(begin, max(begin, stop), P)


def stages(weights: Sequence[float], P: int) -> list[Range]:
    """Runs of layers over the stages of a pipeline, the heaviest run as light as can be.

    Parameters
    ----------
    weights : one number per layer, 0 or more: 1 for each cuts by number, bytes by memory, seconds
        by time
    P : number of stages

    Returns
    -------
    (start, stop) of every stage; with fewer layers than stages some are empty
    """
    if P < 1 or any(w < 0 for w in weights):
        raise ValueError(f"partition: got {P} stages, need 1 or more, and weights of 0 or more")
    total = np.concatenate([[0.0], np.cumsum(weights)])
    runs = total[None, :] - total[:, None]
    runs[np.tril_indices(len(total), -1)] = np.inf

    # Find the weight that the heaviest run cannot go below; below it, even the runs out.
    heaviest, _ = _cut_runs(runs, P, np.maximum)
    runs[runs > heaviest * (1 + 1e-9)] = np.inf
    _, ends = _cut_runs(runs * runs, P, np.add)
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _cut_runs(
    cost: np.ndarray, P: int, join: Callable[[np.ndarray, np.ndarray], Any]
) -> tuple[float, list[int]]:
    """Best way to cut n items in P runs, of cost (n+1, n+1) from start to stop each, joined.

    Returns
    -------
    least joined cost, and where each run ends
    """
    least, starts = cost[0], []
    for _ in range(P - 1):
        joined = join(least[:, None], cost)

        # Of equal cuts take the last, so that earlier runs are the longer ones.
        starts.append(len(joined) - 1 - joined[::-1].argmin(axis=0))
        least = joined.min(axis=0)
    ends = [len(cost) - 1]
    for start in reversed(starts):
        ends.insert(0, int(start[ends[0]]))
    return least[-1], ends


def guided(remaining: int, P: int) -> int:
    """Items that one of P workers holds at most, so that they end together.

    A share of what remains with what it holds, which shrinks with it (Polychronopoulos and Kuck
    1987, guided self-scheduling); all of it for one worker.
    """
    return -(-remaining // (2 * P - 1))


@dataclass(frozen=True)
class ExpertShare:
    """Experts of one rank, and the columns of each that it has.

    Attributes
    ----------
    experts : (start, stop) among E
    columns : (start, stop) among F
    """

    experts: Range
    columns: Range

    @property
    def is_empty(self) -> bool:
        return self.experts[0] == self.experts[1] or self.columns[0] == self.columns[1]


def experts(E: int, F: int, ep: int, tp: int = 1) -> list[ExpertShare]:
    """Experts of every rank of ep x tp, tp running fastest: E cut over ep, F of each over tp.

    Where ep exceeds E, the ranks of an expert cut its columns among them.
    """
    if E < 1:
        raise ValueError(f"partition: got {E} experts, need 1 or more")
    if ep <= E:
        columns = block(F, tp)
        return [ExpertShare(owned, part) for owned in block(E, ep) for part in columns]
    return [
        ExpertShare((e, e + 1), part)
        for e, ranks in enumerate(counts(block(ep, E)))
        for part in block(F, ranks * tp)
    ]


def destinations(
    ids: np.ndarray, shares: Iterable[ExpertShare], common: bool = False
) -> list[np.ndarray]:
    """Tokens that each rank must see: those that chose an expert of which it has columns.

    Parameters
    ----------
    ids : (T, k) int, experts chosen by each token, host; negative ones are no choice
    shares : one per rank
    common : True if there is an expert beside these that all tokens choose and all ranks share

    Returns
    -------
    (n,) int64 of every rank, ascending
    """
    rows = []
    for share in shares:
        first, stop = share.experts
        chosen = ((ids >= first) & (ids < stop)).any(axis=1) & (not share.is_empty)
        rows.append(np.arange(len(ids)) if common else np.flatnonzero(chosen))
    return rows
