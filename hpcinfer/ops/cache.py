"""Writing keys and values into the pages of a cache, and making heads ready for it."""

import numpy as np

from hpcinfer import array
from hpcinfer.ops.dispatch import dispatch
from hpcinfer.ops.inplace import copy_into
from hpcinfer.ops.norm import rms_norm
from hpcinfer.ops.rope import rotate


@dispatch
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


@dispatch
def place_heads(qkv, norms, eps, rotation, rows, k_pages, v_pages, slots):
    """Norm and rotate queries and keys, and store keys and values.

    Parameters
    ----------
    qkv : (T, H + 2 G, K) float32: queries, keys and values; may be written to
    norms : (K,) float32 of the queries' RMS norm, and of the keys'; None for none
    eps : of the norms
    rotation : (cos, sin), each (T, dim/2) float32, host; None for none
    rows, k_pages, v_pages, slots : as for `store`

    Returns
    -------
    (T, H + G, K) float32: queries and keys
    """
    G = k_pages.shape[1]
    H = qkv.shape[1] - 2 * G
    for heads, weight in zip((slice(0, H), slice(H, H + G)), norms, strict=True):
        if weight is not None:
            copy_into(qkv[:, heads], rms_norm(qkv[:, heads], weight, eps))
    y = qkv[:, : H + G] if rotation is None else rotate(qkv[:, : H + G], *rotation)
    store(y[:, H:], qkv[:, H + G :], rows, k_pages, v_pages, slots)
    return y
