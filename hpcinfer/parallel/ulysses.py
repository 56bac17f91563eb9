"""Ulysses: tokens are cut outside attention, heads inside it, and an Alltoall swaps the two.

    before   q (S/P, H, K), k, v (L/P, G, K), any cut of the tokens
    after    o (S/P, H, K)
    cost     3 Alltoall, for P that divides S, L, H and G: q and o (P-1)/P · S/P H K words of 4
             bytes sent per rank each; k and v together (P-1)/P · L/P 2 G K words of their own type
    source   Jacobs et al. 2023, section 3 (arXiv:2309.14509)

With whole sequences and some of the heads attention needs no message, and every rank has the same
work whatever the mask. The heads bound the ranks: beyond G a key/value head goes to each rank that
has query heads of its group, and beyond H ranks stay idle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hpcinfer import array, collectives
from hpcinfer.array import Array
from hpcinfer.partition import Heads

if TYPE_CHECKING:
    from mpi4py.MPI import Comm


def ulysses(
    comm: Comm,
    q: Array,
    k: Array,
    v: Array,
    counts_q: list[int],
    counts_k: list[int],
    heads: list[Heads],
    attend: Callable,
    purpose: str = "ulysses",
) -> Array:
    """Attention of all tokens, each rank with its own heads.

    Parameters
    ----------
    q : (S/P, H, K) float32
    k, v : (L/P, G, K) of one type and shape
    counts_q, counts_k : queries and keys of every rank
    heads : Heads of every rank, as `partition.heads` gives them
    attend : function (q, k, v, groups) -> o of this rank's mathematics: q (S, H_r, K), the tokens
        of rank 0 first, k and v (L, G_r, K) likewise, groups as for `ops.attention`

    Returns
    -------
    (S/P, H, K) float32

    Raises
    ------
    ValueError
        If counts or heads do not fit the ranks or the arrays.
    """
    query, kv = [h.query for h in heads], [h.kv for h in heads]
    _check(comm, k, counts_k, kv, "keys")
    _check_whole(query, q.shape[1])

    # Swap tokens for heads, attend, and swap back.
    q_heads = to_heads(comm, q, counts_q, query, purpose)
    both = array.namespace(k).concatenate([k, v], axis=-1)
    kv_heads = to_heads(comm, both, counts_k, kv, purpose)
    k_heads, v_heads = kv_heads[..., : k.shape[-1]], kv_heads[..., k.shape[-1] :]
    o = attend(q_heads, k_heads, v_heads, heads[comm.rank].groups)
    return to_tokens(comm, o, counts_q, query, purpose)


def to_heads(
    comm: Comm, x: Array, counts: list[int], ranges: list[tuple[int, int]], purpose: str = "ulysses"
) -> Array:
    """Some tokens of all heads -> all tokens of some heads.

    Parameters
    ----------
    x : (T/P, H, K) any type
    counts : tokens of every rank
    ranges : (start, stop) of the heads that each rank gets; may be empty, and may overlap

    Returns
    -------
    (T, H_r, K), the tokens of rank 0 first
    """
    _check(comm, x, counts, ranges, "tokens")
    xp, K = array.namespace(x), x.shape[-1]
    widths = [stop - start for start, stop in ranges]
    own_tokens, own_heads = len(x), widths[comm.rank]

    # To each rank its heads of the own tokens; from each rank the own heads of its tokens.
    sent = xp.concatenate([x[:, start:stop].reshape(-1, K) for start, stop in ranges])
    received = collectives.Alltoall(
        comm, sent, [own_tokens * n for n in widths], [n * own_heads for n in counts], purpose
    )
    return received.reshape(sum(counts), own_heads, K)


def to_tokens(
    comm: Comm, x: Array, counts: list[int], ranges: list[tuple[int, int]], purpose: str = "ulysses"
) -> Array:
    """All tokens of some heads -> some tokens of all heads: the inverse of `to_heads`.

    Parameters
    ----------
    x : (T, H_r, K) any type, the tokens of rank 0 first
    counts : tokens of every rank
    ranges : (start, stop) of the heads that each rank has; they follow one another

    Returns
    -------
    (T/P, H, K)

    Raises
    ------
    ValueError
        If the ranges leave out a head or have one twice, or do not fit x.
    """
    H = max((stop for _, stop in ranges), default=0)
    _check_whole(ranges, H)
    xp, K = array.namespace(x), x.shape[-1]
    widths = [stop - start for start, stop in ranges]
    own_tokens, own_heads = counts[comm.rank], widths[comm.rank]
    if x.shape[:2] != (sum(counts), own_heads):
        raise ValueError(
            f"ulysses: got {x.shape} on rank {comm.rank}, need ({sum(counts)}, {own_heads}, K)"
        )

    # To each rank the own heads of its tokens; from each rank its heads of the own tokens.
    received = collectives.Alltoall(
        comm,
        x.reshape(-1, K),
        [n * own_heads for n in counts],
        [own_tokens * n for n in widths],
        purpose,
    )
    result, first = xp.empty((own_tokens, H, K), x.dtype), 0
    for (start, stop), n in zip(ranges, widths, strict=True):
        part = received[first : first + own_tokens * n]
        result[:, start:stop] = part.reshape(own_tokens, n, K)
        first += own_tokens * n
    return result


def _check(comm, x, counts, ranges, what):
    if len(counts) != comm.size or len(ranges) != comm.size:
        raise ValueError(
            f"ulysses: got {len(counts)} counts of {what} and {len(ranges)} ranges of heads, need "
            f"one for each of {comm.size} ranks"
        )
    if any(not 0 <= start <= stop <= x.shape[1] for start, stop in ranges):
        raise ValueError(f"ulysses: got ranges {ranges}, need them within {x.shape[1]} heads")
    if counts[comm.rank] != len(x):
        raise ValueError(f"ulysses: got {len(x)} {what} on rank {comm.rank}, need {list(counts)}")


def _check_whole(ranges, H):
    """Refuse ranges that are not each of H heads once."""
    owned = sorted((start, stop) for start, stop in ranges if stop > start)
    ends = [0, *(stop for _, stop in owned)]
    if [start for start, _ in owned] != ends[:-1] or ends[-1] != H:
        raise ValueError(f"ulysses: got ranges {ranges}, need each of {H} heads once")
