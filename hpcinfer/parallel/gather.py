"""Gather decode: partial attention goes to one rank, which merges it and sends the result back.

    before   o (T, H, K), lse (T, H) on every rank: the same T queries over this rank's keys
    after    o (T, H, K), lse (T, H) on every rank: over all keys
    cost     1 Gather: T H (K+1) words of 4 bytes sent per rank, none by the root, where P-1 times
             as many arrive; 1 Bcast: T H (K+1) words sent by the root
    source   the baseline of Shyam et al. 2024, section 5 (arXiv:2408.04093)

The root takes the largest log-sum-exp, corrects the parts to it and sums them. It is the
bottleneck: what it receives and computes grows with P, while the others wait.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpcinfer import array, collectives
from hpcinfer.array import Array
from hpcinfer.ops.attention import merge_all

if TYPE_CHECKING:
    from mpi4py.MPI import Comm


def gather(
    comm: Comm, o: Array, lse: Array, root: int = 0, purpose: str = "gather"
) -> tuple[Array, Array]:
    """Merge partial attention over the ranks on one of them.

    Parameters
    ----------
    o : (T, H, K) float32, zero where this rank's keys are not visible
    lse : (T, H) float32, -inf where this rank's keys are not visible
    root : rank that merges

    Returns
    -------
    o : (T, H, K) float32, equal on every rank
    lse : (T, H) float32, equal on every rank

    Raises
    ------
    ValueError
        If `root` is no rank of the communicator.
    """
    if not 0 <= root < comm.size:
        raise ValueError(f"gather: got root {root}, need a rank of {comm.size}")

    # Bring all parts to the root, merge there, and send the result back.
    xp = array.namespace(o)
    records = xp.concatenate([o, lse[..., None]], axis=-1)
    of_ranks = collectives.Gather(comm, records, root, purpose)
    if comm.rank == root:
        records[..., :-1], records[..., -1] = merge_all(of_ranks[..., :-1], of_ranks[..., -1])
    collectives.Bcast(comm, records, root, purpose)
    return records[..., :-1], records[..., -1]
