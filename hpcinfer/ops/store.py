"""Writing keys and values into the pages of a cache."""

import numpy as np

from hpcinfer import array
from hpcinfer.ops.fastest import fastest


@fastest
def store(x, rows, pages, slots):
    """Write some rows of x, rounded to the pages' type, where they belong.

    Parameters
    ----------
    x : (T, G, K) float32
    rows : (n,) int64, host: which rows of x are written
    pages : (pages, G, page, K), written to
    slots : (n,) int64, host: page · page length + offset of each
    """
    xp = array.namespace(x)
    places, offsets = (xp.asarray(a) for a in np.divmod(slots, pages.shape[2]))
    pages[places, :, offsets] = array.narrow(x[xp.asarray(rows)], pages.dtype)
