"""Look-up of tokens in the part of an embedding that a rank owns."""

import numpy as np

from hpcinfer import array
from hpcinfer.ops.dispatch import dispatch


@dispatch
def embed(weight, token_ids, start):
    """Rows of an embedding.

    Parameters
    ----------
    weight : (V/P, D) of any floating type
    token_ids : (T,) integers, on the host
    start : vocabulary id of the first row

    Returns
    -------
    (T, D) float32, zero for ids that the part does not have
    """
    xp = array.namespace(weight)
    mine = np.flatnonzero((token_ids >= start) & (token_ids < start + len(weight)))
    x = xp.zeros((token_ids.size, weight.shape[1]), np.float32)
    x[mine] = array.widen(weight[token_ids[mine] - start])
    return x
