"""Expert parallelism: experts live on different ranks, and tokens travel to those they chose.

    before   x (T/P, D), and each token's k experts and their weights; experts cut over the ranks
    after    y (T/P, D), the weighted sum of each token's experts
    cost     3 Alltoall: counts, (P-1) · 8 bytes sent per rank; dispatch, n (D w + 8 k) bytes, w
             bytes a number; combine, m 4 D bytes. n: pairs of an own token and another rank that
             has columns of an expert it chose; m: pairs of an own expert's token and another rank
             that it came from. Over all ranks the sums of n and of m are equal
    source   Lepikhin et al. 2020, GShard, Algorithm 1 (arXiv:2006.16668)

A token goes once to each rank that has any of its experts, with the numbers and weights of its
choices; that rank returns one row, its experts' results weighted and summed. Who sends how many
tokens is known only after routing, so the counts go first. An expert may get no token, or all of
them. Where ranks are more than experts, an expert's columns are cut over several ranks: its tokens
go to each of them, and the sum at the end completes the partial sums as it adds up the choices.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import DTypeLike

from hpcinfer import array, collectives, partition
from hpcinfer.array import Array
from hpcinfer.partition import ExpertShare

if TYPE_CHECKING:
    from mpi4py.MPI import Comm


def experts(
    comm: Comm,
    x: Array,
    ids: Array,
    weights: Array,
    shares: list[ExpertShare],
    compute: Callable,
    dtype: DTypeLike = np.float32,
    purpose: str = "expert",
) -> Array:
    """Send tokens to their experts, compute there, and bring the results home.

    Parameters
    ----------
    x : (T/P, D) float32
    ids : (T/P, k) int, experts that each token chose; negative ones are no choice
    weights : (T/P, k) float32
    shares : list of partition.ExpertShare, the experts and columns of every rank
    compute : function (x, ids, weights) -> (n, D) float32, the weighted sum of the results of this
        rank's experts, own columns; choices of other ranks' experts are left out
    dtype : element type in which tokens travel; that of the weights loses nothing, as products
        round to it

    Returns
    -------
    (T/P, D) float32

    Raises
    ------
    ValueError
        If the shares are not one for each rank, or the choices not one row for each token.
    """
    if len(shares) != comm.size or len(ids) != len(x) or weights.shape != ids.shape:
        raise ValueError(
            f"expert: got {len(shares)} shares, choices {ids.shape} and weights {weights.shape} "
            f"for {len(x)} tokens on {comm.size} ranks, need a share a rank and a row a token"
        )
    xp = array.namespace(x)
    rows = partition.destinations(array.host(ids), shares)
    counts = [len(of_rank) for of_rank in rows]

    # Dispatch: counts first, then every token to each rank that it needs.
    ones = [1] * comm.size
    arriving = collectives.Alltoall(comm, np.array(counts), ones, ones, purpose).tolist()
    travelling = (array.narrow(x, dtype), ids.astype(np.int32), weights)
    sent = array.pack_rows(*travelling)[xp.asarray(np.concatenate(rows))]
    received = collectives.Alltoall(comm, sent, counts, arriving, purpose)

    # Compute, and combine: the results go back the way the tokens came.
    x_in, ids_in, weights_in = array.unpack_rows(received, travelling)
    y_in = compute(array.widen(x_in), ids_in, weights_in)
    returned = collectives.Alltoall(comm, y_in, arriving, counts, purpose)
    return combine(xp, len(x), rows, returned)


def combine(xp: ModuleType, n: int, rows: list[np.ndarray], returned: Array) -> Array:
    """Sum what the ranks returned for each token: rows of rank 0's answer first -> (n, D)."""
    y, start = xp.zeros((n, returned.shape[1]), xp.float32), 0
    for of_rank in rows:
        y[xp.asarray(of_rank)] += returned[start : start + len(of_rank)]
        start += len(of_rank)
    return y
