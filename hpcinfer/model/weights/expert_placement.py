"""Which ranks have which experts, and which columns of an FFN that is spread over ranks."""

from functools import cache

from hpcinfer import partition
from hpcinfer.grid import Grid
from hpcinfer.model.architecture import Architecture


def expert_shares(arch: Architecture, grid: Grid) -> list[partition.ExpertShare]:
    """Experts and columns of every rank of `grid.experts`: list of ExpertShare."""
    ep, tp = grid.shares
    return _experts(arch.E, arch.moe_F, ep, tp)


def ffn_shares(arch: Architecture, grid: Grid, n: int) -> list[partition.ExpertShare]:
    """What every FFN rank has of layer n's FFN: list of ExpertShare.

    A dense FFN is one expert.
    """
    ep, ffn_ranks = grid.layout.ep, grid.layout.afd[1]
    if arch.sparse[n]:
        return _experts(arch.E, arch.moe_F, ep, ffn_ranks // ep)
    return _experts(1, arch.F, ffn_ranks, 1)


@cache
def _experts(E, F, ep, tp):
    return partition.experts(E, F, ep, tp)
