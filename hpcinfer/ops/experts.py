"""The experts of one rank applied to the tokens that chose them."""

from itertools import pairwise

from hpcinfer import array
from hpcinfer.ops.dispatch import dispatch
from hpcinfer.ops.linear import linear_pair


@dispatch
def experts_ffn(x, ids, weights, up, down, first, function):
    """Sum over the own experts of weight · down · function(up · x), for every token.

    With a part of an expert's columns the sum is partial, as in tensor parallelism: every column
    adds its own share. Choices of experts that are not here add nothing.

    Parameters
    ----------
    x : (T, D) float32
    ids : (T, k) integers, chosen experts numbered over all ranks, none twice for a token; below 0
        for no choice
    weights : (T, k) float32
    up : (E/P, C, D), experts first, first + 1, ... with their own columns
    down : (E/P, D, F)
    first : number of the first own expert
    function : what stands between an expert's two products, (n, C) -> (n, F)

    Returns
    -------
    (T, D) float32
    """
    xp = array.namespace(x)
    y = xp.zeros(x.shape, xp.float32)
    n_experts, k = len(up), ids.shape[1]
    if not n_experts or not ids.size:
        return y

    # Order the choices by expert, those of other ranks' experts last.
    own = ids.reshape(-1) - first
    own = xp.where(own < 0, n_experts, own)
    order = xp.argsort(own, kind="stable")
    bounds = array.host(xp.searchsorted(own[order], xp.arange(n_experts + 1))).tolist()

    # Each expert computes its tokens in one product.
    factors = weights.reshape(-1)
    for e, (start, stop) in enumerate(pairwise(bounds)):
        if start < stop:
            chosen = order[start:stop]
            tokens = chosen // k
            found = linear_pair(x[tokens], up[e], function, down[e])
            y[tokens] += found * factors[chosen, None]
    return y
