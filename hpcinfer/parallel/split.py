"""One operand of attention cut along the sequence: Q, V, or K, and what each costs.

    function         before                                      after          cost
    q_only           q (S/P, H, K), k, v (L, G, K) whole         o (S, H, K)    1 Allgather:
                                                                 (P-1) · S/P H K words of 4 bytes
    v_only           v (L/P, G, K), q, k whole                   o (S, H, K)    1 Allreduce:
                                                                 2 (P-1)/P · S H K words
    k_only           k (L/P, G, K), q, v whole                   NOT equal      1 Allreduce: as V
    gathered_keys    k, v (L/P, G, K) of w bytes a number        k, v (L, G, K) 3 Allgather:
                                                                 (P-1) · L/P (2 G K w + 8) bytes

    source   section 3 of Vaswani et al. 2017 (arXiv:1706.03762) for the product that is cut;
             gathered_keys: Llama team 2024, section 3.3.2 (arXiv:2407.21783)

Softmax runs along the keys. A cut of the queries cuts the rows of the scores and leaves each row
whole, so the results need only be put together. A cut of V cuts the weights by columns after the
softmax, which leaves partial sums. A cut of K cuts the row inside the softmax: each rank normalises
its part as if it were all, and the result is wrong unless it is corrected by the log-sum-exp, as
ring and tree do. `gathered_keys` restores the whole K and V where tokens are cut, so that Q alone
is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from hpcinfer import array, collectives
from hpcinfer.array import Array
from hpcinfer.ops.attention import correction

if TYPE_CHECKING:
    from mpi4py.MPI import Comm


def q_only(
    comm: Comm,
    q: Array,
    k: Array,
    v: Array,
    q_tokens: np.ndarray,
    k_tokens: np.ndarray,
    counts: list[int],
    attend: Callable,
    purpose: str = "split",
) -> Array:
    """Queries cut, keys and values whole: equal to one rank.

    Teaching form: the engine makes keys and values whole by `gathered_keys` instead.

    Parameters
    ----------
    q : (S/P, H, K) float32, this rank's queries
    k, v : (L, G, K), whole on every rank
    q_tokens, k_tokens : (S/P, 2), (L, 2) integers, host: sequence and position of each token
    counts : queries of every rank
    attend : function (q, k, v, q_tokens, k_tokens) -> (o, lse) of this rank's mathematics

    Returns
    -------
    (S, H, K) float32, equal on every rank, the queries of rank 0 first

    Raises
    ------
    ValueError
        If `counts` does not fit the ranks, or this rank's queries.
    """
    _check(comm, counts, len(q), "queries")

    # Compute whole rows of the result, and put them together.
    o, _ = attend(q, k, v, q_tokens, k_tokens)
    return collectives.Allgather(comm, o, counts, purpose=purpose)


def v_only(
    comm: Comm,
    q: Array,
    k: Array,
    v: Array,
    q_tokens: np.ndarray,
    k_tokens: np.ndarray,
    counts: list[int],
    attend: Callable,
    purpose: str = "split",
) -> Array:
    """Values cut by rows, queries and keys whole: equal to one rank.

    The weights need every key, the product with them only the own values. Blockwise, the weights
    are never in memory: their normalisation is the log-sum-exp over all keys, to which the result
    over the own keys is corrected.

    Teaching form: the engine cuts K with V instead, as ring and tree do.

    Parameters
    ----------
    q : (S, H, K) float32, whole on every rank
    k : (L, G, K), whole on every rank, the keys of rank 0's values first
    v : (L/P, G, K), this rank's values
    q_tokens, k_tokens : (S, 2), (L, 2) integers, host: sequence and position of each token
    counts : values of every rank
    attend : as for `q_only`; also called with values of width 0

    Returns
    -------
    (S, H, K) float32, equal on every rank

    Raises
    ------
    ValueError
        If `counts` does not fit the ranks, the keys, or this rank's values.
    """
    _check(comm, counts, len(v), "values")
    own = _own_rows(comm, counts, len(k))

    # Find the normalisation over all keys, and sum what the own values give under it.
    no_values = array.namespace(k).empty((*k.shape[:2], 0), k.dtype)
    _, lse = attend(q, k, no_values, q_tokens, k_tokens)
    o_own, lse_own = attend(q, k[own], v, q_tokens, k_tokens[own])
    o_sum = o_own * correction(lse_own, lse)[..., None]
    return collectives.Allreduce(comm, o_sum, purpose=purpose)


def k_only(
    comm: Comm,
    q: Array,
    k: Array,
    v: Array,
    q_tokens: np.ndarray,
    k_tokens: np.ndarray,
    counts: list[int],
    attend: Callable,
    purpose: str = "split",
) -> Array:
    """Keys cut, a softmax on every rank, the weights side by side: NOT equal to one rank.

    It stands here to show that it fails. Each rank's weights add up to 1, so a row of them side by
    side adds up to the number of ranks that see a key, P as a rule, instead of 1. Dividing by that
    would not help: ranks whose keys matter little would weigh as much as the others. The product of
    the weights side by side with V is the sum of the ranks' products with their own rows of V.

    Teaching form: the engine corrects by the log-sum-exp instead, as ring and tree do.

    Parameters
    ----------
    q : (S, H, K) float32, whole on every rank
    k : (L/P, G, K), this rank's keys
    v : (L, G, K), whole on every rank, the values of rank 0's keys first
    q_tokens, k_tokens : (S, 2), (L/P, 2) integers, host: sequence and position of each token
    counts : keys of every rank
    attend : as for `q_only`

    Returns
    -------
    (S, H, K) float32, equal on every rank, and wrong for P > 1

    Raises
    ------
    ValueError
        If `counts` does not fit the ranks, the values, or this rank's keys.
    """
    _check(comm, counts, len(k), "keys")
    own = _own_rows(comm, counts, len(v))

    # Normalise over the own keys alone, which is the fault, and sum.
    o_sum, _ = attend(q, k, v[own], q_tokens, k_tokens)
    return collectives.Allreduce(comm, o_sum, purpose=purpose)


def gathered_keys(
    comm: Comm, k: Array, v: Array, k_tokens: np.ndarray, counts: list[int], purpose: str = "split"
) -> tuple[Array, Array, np.ndarray]:
    """Keys and values of all ranks on every rank, so that only the queries stay cut.

    Parameters
    ----------
    k, v : (L/P, G, K) any type
    k_tokens : (L/P, 2) integers, host: sequence and position of each token
    counts : keys of every rank

    Returns
    -------
    k, v : (L, G, K), those of rank 0 first
    k_tokens : (L, 2) int32, host

    Raises
    ------
    ValueError
        If `counts` does not fit the ranks, or this rank's keys.
    """
    _check(comm, counts, len(k), "keys")

    # Gather keys, values, and the tokens they belong to.
    tokens = k_tokens.astype("int32")
    return tuple(collectives.Allgather(comm, x, counts, purpose=purpose) for x in (k, v, tokens))


def _own_rows(comm, counts, n):
    """Slice of this rank's rows where the rows of all ranks lie in rank order."""
    if sum(counts) != n:
        raise ValueError(f"split: got {n} tokens of the whole operand, need counts {counts}")
    first = sum(counts[: comm.rank])
    return slice(first, first + counts[comm.rank])


def _check(comm, counts, n, what):
    if len(counts) != comm.size or min(counts) < 0:
        raise ValueError(
            f"split: got counts {counts}, need the {what} of each of {comm.size} ranks"
        )
    if counts[comm.rank] != n:
        raise ValueError(f"split: got {n} {what} on rank {comm.rank}, need counts {counts}")
