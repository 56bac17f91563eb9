"""Tokens that may be chosen, as 64-bit keys that sort as the filters take them: steps 4 to 7."""

import numpy as np

from hpcinfer import array
from hpcinfer.ops.random import gumbel

BLOCK_ITEMS = 1 << 16  # logits handled at a time: temporaries stay bounded, and in cache


def keys_of(raw, index, token_ids, start):
    """Keys (n, 1) of one token for each of the rows `index`; 0 for those that are not here."""
    keys, column = np.zeros((len(index), 1), np.uint64), token_ids - start
    mine = np.flatnonzero((column >= 0) & (column < raw.shape[1]))
    value = array.host(raw[index[mine], column[mine]])
    keys[mine, 0] = pack(value, token_ids[mine])
    return keys


def top_keys(x, index, start, width):
    """The `width` largest own candidates of the rows `index`.

    Returns
    -------
    (len(index), min(width, V/P)) uint64 on the host
    """
    width = min(width, x.shape[1])
    if not (width and len(index)):
        return np.zeros((len(index), width), np.uint64)
    return np.concatenate(
        [_top_keys(x[block], start, width) for block in row_blocks(index, x.shape[1])]
    )


def _top_keys(x, start, width):
    """The `width` largest candidates of each of the logits (n, V/P): (n, width) uint64."""
    xp = array.namespace(x)
    first = x.shape[1] - width
    least = xp.partition(x, first, axis=1)[:, first : first + 1]
    r, column = (array.host(i) for i in xp.nonzero(x >= least))

    # Write the candidates of a row side by side; those equal to the least may be too many.
    slot = np.arange(r.size) - np.searchsorted(r, r)
    keys = np.zeros((len(x), max(width, slot.max(initial=0) + 1)), np.uint64)
    keys[r, slot] = pack(array.host(x[r, column]), column + start)
    return np.sort(keys, axis=1)[:, -width:]


def weight_sums(x, index, top, V, temperature=None, log_min_p=None):
    """Sums of the softmax weights of the own columns of the rows `index`.

    Parameters
    ----------
    x : (R, V/P) float32
    top : (R,) float64, largest logit of the whole vocabulary
    V : length of the whole vocabulary
    temperature, log_min_p : (R,) float64; None for 1 and for no restriction

    Returns
    -------
    (len(index),) int64 on the host, in the unit of `weights`
    """
    xp = array.namespace(x)
    temperature = np.ones(len(x)) if temperature is None else temperature
    log_min_p = np.full(len(x), -np.inf) if log_min_p is None else log_min_p
    sums = []
    for block in row_blocks(index, x.shape[1]):
        z = over_temperature(x, block, temperature)
        z_top = xp.asarray(top[block] / temperature[block])[:, None]
        kept = z >= z_top + xp.asarray(log_min_p[block])[:, None]
        sums.append(array.host((weights(z - z_top, V) * kept).sum(axis=1)))
    return np.concatenate(sums) if sums else np.zeros(0, np.int64)


def over_temperature(x, block, temperature):
    """Rows `block` of x divided by their temperatures, in float64."""
    xp = array.namespace(x)
    return x[block].astype(xp.float64) / xp.asarray(temperature[block])[:, None]


def draw(keys, floor, total, V, rows):
    """Steps 4 to 7 on the largest candidates of n rows, as far as these decide them.

    The candidates from `floor` upward are the true first ones of the whole vocabulary; below it
    some may be missing. Every filter keeps a prefix; a row is settled if that ends above the floor.

    Parameters
    ----------
    keys : (n, candidates) uint64, candidates of all ranks in any order
    floor : (n,) uint64, 0 where the candidates are the whole vocabulary
    total : (n,) int64, sum of the weights after min-p; not read in rows with top-k
    V : length of the whole vocabulary
    rows : SamplingBatch, n of them; each top_k at most the number of its candidates from the
        floor upward

    Returns
    -------
    token_ids : (n,) int64, valid where settled
    settled : (n,) bool
    """
    keys = np.sort(keys, axis=1)[:, ::-1]
    certain = keys >= floor[:, None]
    value, ids = unpack(keys)
    z = value.astype(np.float64) / rows.temperature[:, None]
    z_top = z[:, :1]

    # Shorten the prefix by min-p, then by top-k.
    kept = certain & (z >= z_top + rows.log_min_p[:, None])
    limited = rows.top_k > 0
    kept &= np.arange(keys.shape[1]) < np.where(limited, rows.top_k, keys.shape[1])[:, None]

    # Shorten it to the nucleus: the weight before a token is below top_p times that of all left.
    weight = weights(z - z_top, V) * kept
    share = rows.top_p * np.where(limited, weight.sum(axis=1), total)
    share = np.where(rows.top_p < 1, np.maximum(share, 1), np.inf)
    kept &= np.cumsum(weight, axis=1) - weight < share[:, None]
    n_kept = kept.sum(axis=1)
    settled = (floor == 0) | limited | (n_kept < certain.sum(axis=1))

    # Draw from the prefixes; columns that no row kept need no noise.
    longest = slice(0, n_kept.max(initial=0))
    random = (rows.seed, rows.key, rows.sample, rows.position)
    noise = gumbel(*(c[:, None] for c in random), ids[:, longest])
    score = np.where(kept[:, longest], z[:, longest] + noise, -np.inf)
    return lowest_of_best(score, ids[:, longest]), settled


def lowest_of_best(score, ids):
    """Lowest id among those of the largest score, for each row: two (n, ranks) -> (n,)."""
    largest = score.max(axis=1, keepdims=True)
    return np.where(score == largest, ids, np.iinfo(np.int64).max).min(axis=1)


def weights(z, V):
    """e^z in integer units of 2^-s: sums over a vocabulary of `V` are exact and below 2^62.

    Parameters
    ----------
    z : float64, at most 0; -inf has weight 0

    Returns
    -------
    int64 of the same shape
    """
    xp = array.namespace(z)
    return xp.rint(xp.exp(z) * units_of_one(V)).astype(xp.int64)


def pack(x, ids):
    """Logits and ids on the host as integers that sort by logit, among equals by falling id.

    The high word is the float32 pattern made monotonic, the low word the complement of the id.
    No key is 0.

    Parameters
    ----------
    x : (...) float32
    ids : integers of a shape that broadcasts

    Returns
    -------
    (...) uint64
    """
    bits = (x + np.float32(0)).view(np.uint32)
    high = np.where(bits >> 31 != 0, ~bits, bits | np.uint32(0x80000000))
    low = (0xFFFFFFFF - ids).astype(np.uint64)
    return high.astype(np.uint64) << np.uint64(32) | low


def unpack(keys):
    """Logits (float32) and ids (int64) of candidates on the host."""
    high = (keys >> np.uint64(32)).astype(np.uint32)
    bits = np.where(high >> 31 != 0, high ^ np.uint32(0x80000000), ~high)
    return bits.view(np.float32), 0xFFFFFFFF - (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)


def row_blocks(index, width, items=None):
    """Cut row numbers into arrays of `items` (BLOCK_ITEMS) at most, a row counting `width`."""
    size = max(1, (items or BLOCK_ITEMS) // max(1, width))
    return [index[i : i + size] for i in range(0, len(index), size)]


def units_of_one(V):
    return 2.0 ** (62 - int(V).bit_length())
