"""Matrix-product parallelism: which axis of which operand is cut decides the one collective.

    before   C = A · Bᵀ with A (T, I) and B (O, I), each whole or cut along one axis
    after    see the table
    cost     see the table; bytes sent per rank, w bytes a number

    case            A          B          C                  collective         sent
    columns         whole      (O/P, I)   (T, O/P)           none               0
    gathered        (T/P, I)   (O/P, I)   (T, O/P)           Allgather of A     w T I (P-1)/P
    inner           (T, I/P)   (O, I/P)   (T, O)             Allreduce of C     2 w T O (P-1)/P
    inner_cut       (T, I/P)   (O, I/P)   (T/P, O)           ReduceScatter      w T O (P-1)/P

    source   Shoeybi et al. 2019, section 3 (arXiv:1909.08053); Korthikanti et al. 2022
    (arXiv:2205.05198)

A cut of an outer axis (T of A, O of B) cuts the result; a cut of the inner axis I, which both
operands share, leaves a partial sum of the whole result on every rank. So `columns` followed by
`inner` computes a chain of two products with one collective: the cut result of the first is the cut
operand of the second. B is stored (out, in), as weights are. Both halves of a layer are such
chains: `tensor` and `sequence` hand their partial sums to `inner` and `inner_cut`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpcinfer import collectives
from hpcinfer.array import Array
from hpcinfer.ops.inplace import add_into
from hpcinfer.ops.linear import linear

if TYPE_CHECKING:
    from mpi4py.MPI import Comm


def columns(comm: Comm, a: Array, b: Array, bias: Array | None = None) -> Array:
    """A · Bᵀ, B cut by its output: a (T, I), b (O/P, I), bias (O/P,) -> (T, O/P)."""
    return linear(a, b, bias)


def gathered(
    comm: Comm,
    a: Array,
    b: Array,
    counts: list[int],
    bias: Array | None = None,
    purpose: str = "matmul",
) -> Array:
    """A · Bᵀ, A cut by rows and B by its output: a (T/P, I), b (O/P, I) -> (T, O/P).

    `counts` are the rows of A that each rank holds.

    Teaching form: the engine gathers tokens for a chain of products instead, in `sequence`.
    """
    a_all = collectives.Allgather(comm, a, counts, purpose=purpose)
    return linear(a_all, b, bias)


def inner(comm: Comm, c_sum: Array, bias: Array | None = None, purpose: str = "matmul") -> Array:
    """A · Bᵀ, both cut along the inner axis: c_sum (T, O){sum}, bias (O,) whole -> (T, O).

    c_sum is the product of this rank's parts, a (T, I/P) and b (O, I/P); its memory is used.
    """
    c = collectives.Allreduce(comm, c_sum, purpose=purpose)
    return c if bias is None else add_into(c, bias)


def inner_cut(
    comm: Comm, c_sum: Array, counts: list[int], bias: Array | None = None, purpose: str = "matmul"
) -> Array:
    """As `inner`, the result cut by rows: c_sum (T, O){sum}, bias (O,) whole -> (T/P, O).

    `counts` are the rows of the result that each rank keeps.
    """
    c = collectives.ReduceScatter(comm, c_sum, counts, purpose=purpose)
    return c if bias is None else add_into(c, bias)
