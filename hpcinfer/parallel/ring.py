"""Ring attention: queries stay, keys and values pass around; or keys stay and queries pass around.

    before   q (S/P, H, K), k, v (L/P, G, K), any cut of the tokens, even or not
    after    o (S/P, H, K) over all keys
    cost     ring: P-1 Shift: (P-1) · L/P (2 G K w + 8) bytes sent per rank, w bytes a number.
             With a window also 2 Allgather: (P-1) · 4 bytes, and (P-1) · 16 bytes for each own
             sequence of the queries and of the keys; and as many Shift fewer as the window allows.
             ring_queries: P-1 Shift: (P-1) · S/P (4 H K + 8) bytes, and
             1 Alltoall: (P-1) · S/P · 4 H (K+1) bytes
    source   Liu et al. 2023, Algorithm 1 (arXiv:2310.01889); passing queries: Yang et al. 2024,
             section 3 (arXiv:2411.01783)

In step t rank r computes against the block that came from rank r-t, while that block is on its way
to rank r+1 and the next one on its way here; the P partial results are merged. A block is the keys,
the values, and the tokens they belong to, in one message: masks come from positions, so any cut is
right, and only the balance of causal work depends on it. With few new queries and a long cache it
moves fewer bytes to send the queries round, keep each partial result where it was computed, and
return all of them to the queries' owners at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from hpcinfer import array, collectives
from hpcinfer.array import Array
from hpcinfer.ops.attention import merge, merge_all, sequences

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

_TOKEN_BYTES = 8  # sequence and position, int32 each


def ring(
    comm: Comm,
    q: Array,
    k: Array,
    v: Array,
    q_tokens: np.ndarray,
    k_tokens: np.ndarray,
    counts: list[int],
    attend: Callable,
    window: int | None = None,
    purpose: str = "ring",
) -> tuple[Array, Array]:
    """Attention of every rank's queries to the keys of all ranks, by passing K and V.

    Parameters
    ----------
    q : (S/P, H, K) float32
    k, v : (L/P, G, K) of one type, which they also have on the way
    q_tokens, k_tokens : (S/P, 2), (L/P, 2) integers, host: sequence and position of each token
    counts : keys of every rank
    attend : function (q, k, v, q_tokens, k_tokens, between) -> (o, lse) of this rank's mathematics,
        which calls `between` now and then so that the messages move meanwhile
    window : positions that a query looks back, its own included, so that the ring may end early;
        None if it looks back to the first. Teaching form: the engine gives None instead, as
        with pages dealt in turn a window meets most ranks' keys

    Returns
    -------
    o : (S/P, H, K) float32
    lse : (S/P, H) float32

    Raises
    ------
    ValueError
        If `counts` does not fit the ranks, or this rank's keys.
    """
    _check(comm, counts, len(k), "keys")
    steps = comm.size
    if window is not None:
        steps = _steps_needed(comm, q_tokens, k_tokens, window, purpose)
    travelling = (k_tokens.astype(np.int32), k, v)
    block, o, lse = array.pack(*travelling), None, None
    for t in range(steps):
        n, n_next = (counts[(comm.rank - s) % comm.size] for s in (t, t + 1))

        # Send the present block on, let the next one come in, and compute meanwhile.
        transfer = None
        if t + 1 < steps:
            transfer = _pass_on(comm, block, n_next, travelling, purpose)
        k_tokens, k, v = array.unpack(block, n, travelling)
        between = transfer.test if transfer else None
        part = attend(q, k, v, q_tokens, array.host(k_tokens), between)
        o, lse = part if o is None else merge(o, lse, *part)
        if transfer:
            block = transfer.wait()
    return o, lse


def ring_queries(
    comm: Comm,
    q: Array,
    q_tokens: np.ndarray,
    counts: list[int],
    attend_local: Callable,
    purpose: str = "ring queries",
) -> tuple[Array, Array]:
    """Attention of every rank's queries to the keys of all ranks, by passing Q.

    Parameters
    ----------
    q : (S/P, H, K) float32
    q_tokens : (S/P, 2) integers, host: sequence and position of each token
    counts : queries of every rank
    attend_local : function (q, q_tokens) -> (o, lse) of some rank's queries over this rank's keys

    Returns
    -------
    o : (S/P, H, K) float32
    lse : (S/P, H) float32

    Raises
    ------
    ValueError
        If `counts` does not fit the ranks, or this rank's queries.
    """
    _check(comm, counts, len(q), "queries")
    xp = array.namespace(q)
    travelling = (q_tokens.astype(np.int32), q)
    block, records = array.pack(*travelling), [None] * comm.size
    for t in range(comm.size):
        owner = (comm.rank - t) % comm.size

        # Send the present queries on and compute on them meanwhile.
        transfer = None
        if t + 1 < comm.size:
            transfer = _pass_on(comm, block, counts[owner - 1], travelling, purpose)
        q_tokens, q = array.unpack(block, counts[owner], travelling)
        o, lse = attend_local(q, array.host(q_tokens))
        records[owner] = xp.concatenate([o, lse[..., None]], axis=-1)
        if transfer:
            block = transfer.wait()

    # Return the partial results to the queries' owners, and merge.
    own = counts[comm.rank]
    received = collectives.Alltoall(
        comm, xp.concatenate(records), counts, [own] * comm.size, purpose
    )
    of_ranks = received.reshape(comm.size, own, *received.shape[1:])
    return merge_all(of_ranks[..., :-1], of_ranks[..., -1])


def cheaper_to_move_queries(
    n_queries: list[int], n_keys: list[int], H: int, G: int, K: int, itemsize: float
) -> bool:
    """True if passing queries and partial results moves fewer bytes than passing keys and values.

    Parameters
    ----------
    n_queries, n_keys : queries and keys of every rank
    H, G, K : query heads, key/value heads and width of a head
    itemsize : bytes of one number of K and V

    Returns
    -------
    bool, the same on every rank
    """
    query_bytes = _TOKEN_BYTES + 4 * H * K + 4 * H * (K + 1)
    key_bytes = _TOKEN_BYTES + 2 * G * K * itemsize
    return sum(n_queries) * query_bytes < sum(n_keys) * key_bytes


def _pass_on(comm, block, n_next, travelling, purpose):
    """Start sending `block` to the next rank and receiving the `n_next` tokens' block behind it."""
    size = n_next * sum(map(array.item_bytes, travelling))
    following = array.namespace(block).empty(size, np.uint8)
    return collectives.Shift(comm, block, following, purpose=purpose)


def _steps_needed(comm, q_tokens, k_tokens, window, purpose):
    """Steps after which no rank's queries see any block that is still to come, on every rank.

    Ranks tell each other, per sequence, the first and last position of their queries and keys.
    """
    own = np.array(
        [
            (side, b, tokens[rows, 1].min(), tokens[rows, 1].max())
            for side, tokens in enumerate((q_tokens, k_tokens))
            for b, rows in sequences(tokens)
        ],
        np.int32,
    ).reshape(-1, 4)
    lengths = collectives.Allgather(comm, np.array([len(own)], np.int32), purpose=purpose)
    facts = collectives.Allgather(comm, own, lengths.tolist(), purpose=purpose)
    owner = np.repeat(np.arange(comm.size), lengths)

    # A block is needed where one of its sequences has a key between window and query.
    queries, keys = facts[:, 0] == 0, facts[:, 0] == 1
    _, q_b, q_first, q_last = facts[queries].T[:, :, None]
    _, k_b, k_first, k_last = facts[keys].T[:, None]
    needed = (q_b == k_b) & (k_first <= q_last) & (k_last > q_first - window)
    distance = (owner[queries][:, None] - owner[keys]) % comm.size
    return 1 + int(distance.max(where=needed, initial=0))


def _check(comm, counts, n, what):
    if len(counts) != comm.size or min(counts) < 0:
        raise ValueError(f"ring: got counts {counts}, need the {what} of each of {comm.size} ranks")
    if counts[comm.rank] != n:
        raise ValueError(f"ring: got {n} {what} on rank {comm.rank}, need counts {counts}")
