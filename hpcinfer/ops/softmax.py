"""What a softmax over a cut vocabulary needs of a rank's own columns."""

import numpy as np

from hpcinfer import array
from hpcinfer.ops.dispatch import dispatch

BLOCK_ITEMS = 1 << 16  # logits handled at a time: temporaries stay in cache


@dispatch
def softmax_parts(x, targets, start):
    """Largest logit, logit of the target and sum of exponentials of every row.

    Parameters
    ----------
    x : (R, V/P) float32
    targets : (R,) integers, on the host
    start : vocabulary id of the first column

    Returns
    -------
    largest : (R,) float64 on the host; -inf without columns
    target : (R,) float64 on the host; -inf for an id that is not here
    exp_sum : (R,) float64 on the host, the sum of e^(x - largest); NaN if a logit is NaN or inf
    """
    R, V_own = x.shape
    largest, target, exp_sum = np.full(R, -np.inf), np.full(R, -np.inf), np.zeros(R)
    if not V_own:
        return largest, target, exp_sum
    mine = np.flatnonzero((targets >= start) & (targets < start + V_own))
    largest[:] = array.host(x.max(axis=1))
    target[mine] = array.host(x[mine, targets[mine] - start])

    # A row of nothing but -inf adds nothing.
    base = np.where(largest == -np.inf, 0, largest)
    rows = max(1, BLOCK_ITEMS // V_own)
    for block in (slice(r, r + rows) for r in range(0, R, rows)):
        exp_sum[block] = _exp_sum(x[block], base[block])
    return largest, target, exp_sum


def _exp_sum(x, base):
    xp = array.namespace(x)
    with np.errstate(invalid="ignore"):
        z = x.astype(np.float64) - xp.asarray(base)[:, None]
        return array.host(xp.exp(z).sum(axis=1))
