"""Sequence parallelism: tokens are cut outside the products, whole inside them.

    before   x (T/P, D); column (C/P, D), row (D, M/P)
    after    y (T/P, D)
    cost     1 Allgather and 1 ReduceScatter per half layer: (P-1)/P · T D words of 4 bytes sent per
             rank each, together what tensor parallelism sends in its Allreduce; words of 2 in the
             Allgather where x was rounded for a 16-bit product
    source   Korthikanti et al. 2022, section 4.2.2 (arXiv:2205.05198)

Norms and residuals work token by token, so each rank computes those of its own tokens only, and
holds 1/P of the activations between the halves. The column product needs all tokens, because each
rank has only some of the columns: an Allgather puts them together. The row product leaves a partial
sum of all tokens on every rank: a ReduceScatter completes each rank's own. The non-linearity stands
between the two, where tokens and columns are whole, as f(a + b) != f(a) + f(b). The tokens need not
divide by P, and a rank may have none; where tokens are fewer than ranks, `tensor` sends less often.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hpcinfer import collectives
from hpcinfer.array import Array
from hpcinfer.ops.linear import linear_pair
from hpcinfer.parallel import matmul

if TYPE_CHECKING:
    from mpi4py.MPI import Comm


def half_layer(
    comm: Comm,
    x: Array,
    counts: list[int],
    column: Array,
    between: Callable,
    row: Array,
    column_bias: Array | None = None,
    row_bias: Array | None = None,
    purpose: str = "sequence",
) -> Array:
    """Allgather, column product, `between`, row product, ReduceScatter.

    Teaching form: the engine hands the products of its layers to `complete` instead.

    Parameters
    ----------
    x : (T/P, D) float32, or rounded for the column product
    counts : tokens of every rank
    column, column_bias : (C/P, D), (C/P,) or None
    between : function (T, C/P) -> (T, M/P), of this rank's columns only
    row, row_bias : (D, M/P), (D,) or None; the bias is whole

    Returns
    -------
    (T/P, D) float32
    """

    # Between the collectives stands one rank's mathematics.
    def products(x_all):
        return linear_pair(x_all, column, between, row, column_bias)

    return complete(comm, x, counts, products, row_bias, purpose)


def complete(
    comm: Comm,
    x: Array,
    counts: list[int],
    products: Callable,
    bias: Array | None = None,
    purpose: str = "sequence",
) -> Array:
    """Any products of all tokens, their partial sums completed for the own tokens.

    Parameters
    ----------
    x : (T/P, D) float32, or rounded for the column product
    counts : tokens of every rank
    products : function (T, D) -> (T, D){sum}, of this rank's columns only
    bias : (D,) or None, of the complete sum

    Returns
    -------
    (T/P, D) float32

    Raises
    ------
    ValueError
        If `counts` does not fit the ranks, or this rank's tokens.
    """
    if len(counts) != comm.size or min(counts) < 0 or counts[comm.rank] != len(x):
        raise ValueError(
            f"sequence: got {len(x)} tokens on rank {comm.rank} and counts {list(counts)}, need "
            f"the tokens of each of {comm.size} ranks"
        )

    # Put all tokens together, and keep the own ones of the sum.
    x_all = collectives.Allgather(comm, x, counts, purpose=purpose)
    return matmul.inner_cut(comm, products(x_all), counts, bias, purpose)
