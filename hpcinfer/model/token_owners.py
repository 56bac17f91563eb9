"""Which rank computes which token of a step."""

import numpy as np

from hpcinfer import partition


def in_parts(part):
    """Where each item stands when the items of part 0 come first, then those of part 1, ..."""
    order = np.empty(len(part), np.int64)
    order[np.argsort(part, kind="stable")] = np.arange(len(part))
    return order


def holders(step, rows, grid):
    """Which ranks have which tokens at a point of the forward pass.

    Parameters
    ----------
    rows : "mine", tokens inside the products of a layer; "home", between its halves; "own", those
        for which a rank answers alone; "wanted", after the last layer
    grid : Grid

    Returns
    -------
    comm : ranks that have them together, or None if every rank has all tokens of the step
    held : (n,) int64, own: tokens that this rank has, ascending
    owner : (T,) int64, rank of `comm` that brings each token
    """
    tp, cp = grid.tp, grid.cp
    if rows == "wanted" or (step.columns and rows != "own"):
        return None, None, None
    if rows == "mine" or (rows == "home" and grid.layout.sp == "off"):
        return cp, step.mine, step.part
    if rows == "home":
        at_home = step.home[step.mine]
        held = step.mine[(at_home == tp.rank) | (at_home < 0)]
        return grid.tp_cp, held, np.maximum(step.home, 0) * cp.size + step.part

    # Tokens that several ranks keep are dealt to them in blocks.
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
