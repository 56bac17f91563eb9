"""Random numbers by counter: the same for a seed and a position, wherever they are made."""

import numpy as np

from hpcinfer import array


def philox4x32(counter, key):
    """Philox4x32-10: 128 random bits as a function of a 128-bit counter and a 64-bit key.

    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.

    Parameters
    ----------
    counter : four arrays of 32-bit words held in uint64, of shapes that broadcast
    key : two such arrays

    Returns
    -------
    four arrays of 32-bit words held in uint64
    """
    word, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = p1 >> half ^ c1 ^ k0, p1 & word, p0 >> half ^ c3 ^ k1, p0 & word
        k0, k1 = k0 + np.uint64(0x9E3779B9) & word, k1 + np.uint64(0xBB67AE85) & word
    return c0, c1, c2, c3


def gumbel(seed, key, sample, position, ids):
    """Gumbel noise of single vocabulary ids.

    Parameters
    ----------
    seed, key, sample, position : uint64 scalars or arrays that broadcast with `ids`
    ids : integers of any shape, on the host

    Returns
    -------
    float64 of the broadcast shape
    """
    ids = np.asarray(ids).astype(np.uint64)
    words = _random_words(ids >> np.uint64(2), seed, key, sample, position)
    lane = ids & np.uint64(3)
    return _gumbel_of(np.choose(lane.astype(np.intp), words))


def gumbel_range(seed, key, sample, position, start, stop, xp=np):
    """Gumbel noise of the ids start..stop-1 for R rows: one Philox call serves four ids.

    Parameters
    ----------
    seed, key, sample, position : (R,) uint64, on the host
    start, stop : range of vocabulary ids
    xp : array module to compute with

    Returns
    -------
    (R, stop - start) float64, equal to `gumbel` of those ids
    """
    columns = [xp.asarray(c)[:, None] for c in (seed, key, sample, position)]
    blocks = xp.arange(start // 4, -(-stop // 4), dtype=xp.uint64)
    words = xp.stack(_random_words(blocks, *columns), axis=-1)
    first = start - start // 4 * 4
    words = words.reshape(len(seed), -1)[:, first : first + stop - start]
    return _gumbel_of(words)


def _random_words(block, seed, key, sample, position):
    """Four random words for the vocabulary ids 4·block .. 4·block + 3."""
    word, half = np.uint64(0xFFFFFFFF), np.uint64(32)

    # Fold the sample into the request's 64-bit key, an odd step apart from the next one.
    with np.errstate(over="ignore"):
        stream = key + sample * np.uint64(0x9E3779B97F4A7C15)
    return philox4x32((block, position, stream & word, stream >> half), (seed & word, seed >> half))


def _gumbel_of(words):
    """-log(-log(u)) with u = (word + 1/2) / 2^32, which lies inside (0, 1)."""
    xp = array.namespace(words)
    return -xp.log(-xp.log((words + 0.5) * 2.0**-32))
