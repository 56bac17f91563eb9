"""Bans and penalties: steps 1 and 2 of `ops.sample`, before anything is chosen."""

import numpy as np

from hpcinfer import array
from hpcinfer.ops.sampling_batch import NOTHING_SEEN


def penalise(logits, start, rows):
    """Steps 1 and 2 on the columns start.. of the logits.

    Parameters
    ----------
    logits : (R, V/P)
    start : vocabulary id of the first column
    rows : SamplingBatch

    Returns
    -------
    (R, V/P) float32: a changed copy, or the logits themselves where no row asks for a change
    """
    x = array.widen(logits)
    if rows.history is None and rows.banned is None:
        return x
    x = x.copy() if x is logits else x
    if rows.banned is not None:
        r, column, own = _entries(rows.banned, start, x.shape[1])
        x[r[own], column[own]] = -np.inf
    if rows.history is not None:
        _penalise_seen(x, start, rows)
    return x


def _penalise_seen(x, start, rows):
    """Apply the penalties to the logits of the tokens that each row has seen, in place."""
    xp = array.namespace(x)
    seen = [h or NOTHING_SEEN for h in rows.history] or [NOTHING_SEEN]
    r, column, own = _entries([h.ids for h in seen], start, x.shape[1])
    count = np.concatenate([h.counts for h in seen])[own]
    r, column = r[own], column[own]

    repetition, frequency, presence, count = (
        xp.asarray(c, xp.float32)
        for c in (rows.repetition[r], rows.frequency[r], rows.presence[r], count)
    )
    value = x[r, column]
    value = xp.where(value > 0, value / repetition, value * repetition)
    x[r, column] = value - frequency * count - presence * (count > 0)


def _entries(ids, start, width):
    """Ids of all rows, flat: row, column counted from `start`, whether it is one of `width`."""
    r = np.repeat(np.arange(len(ids)), [len(row) for row in ids])
    column = np.concatenate([np.asarray(row, np.int64) for row in ids]) - start
    return r, column, (column >= 0) & (column < width)
