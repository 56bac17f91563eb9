"""Tensor parallelism: a column cut, something local, a row cut, and one Allreduce.

    before   x (T, D) on every rank; column (C/P, D), row (D, M/P)
    after    y (T, D) on every rank
    cost     1 Allreduce per half layer: 2 (P-1)/P · T D words of 4 bytes sent per rank
    source   Shoeybi et al. 2019, section 3 (arXiv:1909.08053)

Both halves of a layer have this form. In the attention half the column product gives the queries,
keys and values of the rank's own heads, and `between` is attention over them; in the FFN half it
gives the rank's own columns, and `between` is the non-linearity. Neither mixes columns of different
ranks, so it can be applied to a part of the columns, but never to a partial sum: f(a + b) != f(a) +
f(b). The row product turns the parts into partial sums, which the Allreduce completes in float32.
The row bias belongs to the complete sum and is added once, after it. A rank may own no columns at
all; it then adds zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hpcinfer.array import Array
from hpcinfer.ops.linear import linear_pair
from hpcinfer.parallel import matmul

if TYPE_CHECKING:
    from mpi4py.MPI import Comm


def half_layer(
    comm: Comm,
    x: Array,
    column: Array,
    between: Callable,
    row: Array,
    column_bias: Array | None = None,
    row_bias: Array | None = None,
    purpose: str = "tensor",
) -> Array:
    """Column product, `between`, row product, Allreduce.

    Teaching form: the engine hands the products of its layers to `complete` instead.

    Parameters
    ----------
    x : (T, D) float32, or rounded for the column product; equal on every rank
    column, column_bias : (C/P, D), (C/P,) or None
    between : function (T, C/P) -> (T, M/P), of this rank's columns only
    row, row_bias : (D, M/P), (D,) or None; the bias is whole

    Returns
    -------
    (T, D) float32, equal on every rank
    """

    # Before the collective stands one rank's mathematics.
    def products(x):
        return linear_pair(x, column, between, row, column_bias)

    return complete(comm, x, products, row_bias, purpose)


def complete(
    comm: Comm, x: Array, products: Callable, bias: Array | None = None, purpose: str = "tensor"
) -> Array:
    """Partial sums of any products, completed by one Allreduce.

    Parameters
    ----------
    x : (T, D) float32, or rounded for the column product; equal on every rank
    products : function (T, D) -> (T, D){sum}, of this rank's columns only
    bias : (D,) or None, of the complete sum

    Returns
    -------
    (T, D) float32, equal on every rank
    """
    return matmul.inner(comm, products(x), bias, purpose)
