"""Writing keys and values into the pages of a cache."""

import numpy as np

from hpcinfer import array
from hpcinfer.ops.fastest import fastest


@fastest
def store(k, v, rows, k_pages, v_pages, slots):
    """Write some rows of k and v, rounded to the pages' type, where they belong.

    Parameters
    ----------
    k, v : (T, G, K), (T, G, columns of a value) float32
    rows : (n,) int64, host: which rows are written
    k_pages, v_pages : (pages, G, page, K), (pages, G, page, columns of a value), written to
    slots : (n,) int64, host: page · page length + offset of each
    """
    xp = array.namespace(k)
    rows, places, offsets = (xp.asarray(a) for a in (rows, *np.divmod(slots, k_pages.shape[2])))
    for x, pages in ((k, k_pages), (v, v_pages)):
        pages[places, :, offsets] = array.narrow(x[rows], pages.dtype)
