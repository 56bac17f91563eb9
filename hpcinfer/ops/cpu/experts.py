"""The experts of one rank applied to a few tokens, without sorting them by expert."""

import numpy as np

from hpcinfer.ops.linear import linear_pair

# Choices up to which lists are faster than sorted arrays.
_FEW = 64


def experts_ffn(x, ids, weights, up, down, first, function):
    """As `ops.experts.experts_ffn`, for a few choices."""
    if not 0 < ids.size <= _FEW or not len(up):
        return NotImplemented
    of_expert = {}
    for t, choices in enumerate(ids.tolist()):
        for j, e in enumerate(choices):
            if first <= e < first + len(up):
                of_expert.setdefault(e - first, []).append((t, j))
    y = np.zeros(x.shape, np.float32)
    for e in sorted(of_expert):
        # A slice where all tokens chose this expert: no copy of x, none of the sum.
        tokens, places = zip(*of_expert[e], strict=True)
        rows = slice(None) if len(tokens) == len(x) else list(tokens)
        found = linear_pair(x[rows], up[e], function, down[e])
        found *= weights[list(tokens), list(places), None]
        y[rows] += found
    return y
