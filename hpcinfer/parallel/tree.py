"""Tree decode: queries meet a cache that is cut along the sequence; Allreduces merge the parts.

    before   o (T, H, K), lse (T, H) on every rank: the same T queries over this rank's keys
    after    o (T, H, K), lse (T, H) on every rank: over all keys
    cost     tree: 2 Allreduce: 2 (P-1)/P · T H (K+2) words of 4 bytes sent per rank
             tree_single: 1 Allreduce: 2 (P-1)/P · T H (K+1) words
             tree_by_size: the one or the other
    source   Shyam et al. 2024, Algorithm 3 (arXiv:2408.04093)

The merge of partial results is associative and commutative, so it can run as a reduction, whose
latency grows with log P where a gather or a ring grows with P. `tree` agrees on the largest
log-sum-exp first; corrected to it, the parts are plain sums, and numerator and denominator travel
together. `tree_single` halves the messages: the operation of its Allreduce is the merge itself, on
records (o, lse) that MPI may not split. Python computes that operation, which bounds its use to the
few queries of decoding.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from mpi4py import MPI

from hpcinfer import array, collectives
from hpcinfer.array import Array
from hpcinfer.ops.attention import merge, numerators, quotient

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

# Bytes of o up to which one Allreduce is faster than two, although its operation is Python: about
# what 4 hosts at 500 µs and 1 Gbit/s showed.
SINGLE_BYTES = 1 << 16


def tree(comm: Comm, o: Array, lse: Array, purpose: str = "tree") -> tuple[Array, Array]:
    """Merge partial attention over the ranks by two Allreduces.

    Parameters
    ----------
    o : (T, H, K) float32, zero where this rank's keys are not visible
    lse : (T, H) float32, -inf where this rank's keys are not visible

    Returns
    -------
    o : (T, H, K) float32, equal on every rank
    lse : (T, H) float32, equal on every rank
    """
    m = collectives.Allreduce(comm, lse.copy(), MPI.MAX, purpose)
    total = collectives.Allreduce(comm, numerators(o, lse, m), purpose=purpose)
    return quotient(total, m)


def tree_single(
    comm: Comm, o: Array, lse: Array, purpose: str = "tree single"
) -> tuple[Array, Array]:
    """Merge partial attention over the ranks by one Allreduce; as `tree`."""
    records = _packed(o, lse)
    collectives.AllreduceRecords(comm, records, _merge_op(), purpose)
    return records[..., :-1], records[..., -1]


def tree_by_size(comm: Comm, o: Array, lse: Array, purpose: str = "tree") -> tuple[Array, Array]:
    """Merge by one Allreduce where few bytes leave time to latency, else by two; as `tree`."""
    merge_all_ranks = tree_single if o.nbytes <= SINGLE_BYTES else tree
    return merge_all_ranks(comm, o, lse, purpose)


def _packed(o, lse):
    """Records (o, lse): (T, H, K+1)."""
    return array.namespace(o).concatenate([o, lse[..., None]], axis=-1)


@cache
def _merge_op():
    """The merge as an MPI operation, made once per process."""
    return collectives.record_op(
        lambda a, b: _packed(*merge(a[:, :-1], a[:, -1], b[:, :-1], b[:, -1]))
    )
