"""Which rank has which token of a step, at which point of the forward pass."""

from __future__ import annotations

from enum import Enum

import numpy as np

from hpcinfer import partition
from hpcinfer.grid import Grid
from hpcinfer.model.step import Step


class At(Enum):
    """Points of the forward pass, by who has which token there; `holders` says it in numbers."""

    MINE = "inside the products of a layer"
    """Each rank of cp has its part, all ranks of tp alike; all have all where columns are cut."""

    HOME = "between the halves of a layer"
    """As MINE; with sequence parallelism each rank of tp has a part of them."""

    OWN = "answered for alone"
    """One rank of tp x cp has each token: it counts its choices, or sends it to experts."""

    WANTED = "after the last layer"
    """Every rank of tp and cp of the last stage has all tokens whose hidden state is wanted."""


def holders(step: Step, at: At, grid: Grid) -> tuple:
    """Which ranks have which tokens at a point of the forward pass.

    Returns
    -------
    comm : ranks that have them together, or None if every rank has all tokens of the step
    held : (n,) int64, own: tokens that this rank has, ascending
    owner : (T,) int64, rank of `comm` that brings each token
    """
    tp, cp = grid.tp, grid.cp
    if at is At.WANTED or (step.columns and at is not At.OWN):
        return None, None, None
    if at is At.MINE or (at is At.HOME and grid.layout.sp == "off"):
        return cp, step.mine, step.part
    if at is At.HOME:
        at_home = step.home[step.mine]
        held = step.mine[(at_home == tp.rank) | (at_home < 0)]
        return grid.tp_cp, held, np.maximum(step.home, 0) * cp.size + step.part

    # Deal the tokens that several ranks keep to them in blocks.
    if step.columns:
        owner = _dealt(step.n_tokens, cp.size * tp.size)
    else:
        owner = step.home * cp.size + step.part
        for part in range(cp.size):
            tokens = np.flatnonzero((step.part == part) & (step.home < 0))
            owner[tokens] = _dealt(len(tokens), tp.size) * cp.size + part
    return grid.tp_cp, np.flatnonzero(owner == grid.tp_cp.rank), owner


def _dealt(n, P):
    """Rank of each of n tokens in blocks over P ranks: (n,) int64."""
    return np.repeat(np.arange(P), partition.counts(partition.block(n, P)))
