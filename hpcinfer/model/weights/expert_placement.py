"""Which ranks have which experts, and which columns of an FFN that is spread over ranks."""

from functools import cache

from hpcinfer import partition


def expert_shares(arch, grid):
    """Experts and columns of every rank of `grid.experts`: list of partition.Share."""
    ep, tp = grid.shares
    return _experts(arch.E, arch.moe_F, ep, tp)


def ffn_shares(arch, grid, n):
    """What every rank of the FFN side has of layer n's FFN: list of partition.Share.

    A dense FFN is one expert.
    """
    ep, N = grid.layout.ep, grid.layout.afd[1]
    if arch.sparse[n]:
        return _experts(arch.E, arch.moe_F, ep, N // ep)
    return _experts(1, arch.F, N, 1)


@cache
def _experts(E, F, ep, tp):
    return partition.experts(E, F, ep, tp)
