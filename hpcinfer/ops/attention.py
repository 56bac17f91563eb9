"""Attention of ragged tokens with positions, and the merge of partial results.

Every function returns the pair (o, lse): the output and the log-sum-exp of its scores, both
float32, so that results over different keys can be merged exactly. Masks come from positions, so
that any subset of the keys, in any order, may be at hand.
"""

import numpy as np

from hpcinfer import array

# Keys and queries per block: scores of one block and head stay in cache.
_KEYS, _QUERIES = 1024, 256


def attention(q, k, v, q_pos, k_pos, *, scale, groups, window=None):
    """Causal attention of one sequence, blockwise: no (S, L) score matrix is ever in memory.

    Parameters
    ----------
    q : (S, H, K) float32
    k, v : (L, G, K) float32, float16 or bfloat16
    q_pos, k_pos : (S,), (L,) integers, host; a query sees the keys at positions up to its own
    scale : factor on the scores, 1/sqrt(K) as a rule
    groups : (start, stop) among the H query heads for each of the G key/value heads
    window : a query sees only the last `window` positions, its own included; None for all

    Returns
    -------
    o : (S, H, K) float32; zero where no key is seen
    lse : (S, H) float32; -inf where no key is seen
    """
    xp = array.namespace(q)
    S, H, K = q.shape
    o = xp.zeros((S, H, v.shape[-1]), xp.float32)
    lse = xp.full((S, H), -xp.inf, xp.float32)
    for q_start in range(0, S, _QUERIES):
        rows = slice(q_start, q_start + _QUERIES)
        for k_start in range(0, k.shape[0], _KEYS):
            columns = slice(k_start, k_start + _KEYS)
            hidden = _hidden(q_pos[rows], k_pos[columns], window)
            if hidden is not None:
                if hidden.all():
                    continue
                hidden = xp.asarray(hidden)
            k_block, v_block = array.widen(k[columns]), array.widen(v[columns])
            for g, (h_start, h_stop) in enumerate(groups):
                heads = slice(h_start, h_stop)
                part = _block(q[rows, heads], k_block[:, g], v_block[:, g], hidden, scale)
                o[rows, heads], lse[rows, heads] = merge(o[rows, heads], lse[rows, heads], *part)
    return o, lse


def merge(o_a, lse_a, o_b, lse_b):
    """Attention over the union of two disjoint sets of keys, from the results over each.

    m = max(lse_a, lse_b); o = (o_a e^(lse_a-m) + o_b e^(lse_b-m)) / s; lse = m + log s with
    s = e^(lse_a-m) + e^(lse_b-m). Associative and commutative: the one operation under blockwise,
    ring, tree and cascade attention (Liu 2023, arXiv:2310.01889; Shyam 2024, arXiv:2408.04093).

    Parameters
    ----------
    o_a, o_b : (..., K) float32
    lse_a, lse_b : (...) float32, -inf where a side saw no key

    Returns
    -------
    o, lse : as the arguments
    """
    xp = array.namespace(o_a)
    m = xp.maximum(lse_a, lse_b)
    finite_m = xp.where(xp.isneginf(m), xp.float32(0), m)
    weight_a, weight_b = xp.exp(lse_a - finite_m), xp.exp(lse_b - finite_m)
    total = weight_a + weight_b
    divisor = xp.where(total == 0, xp.float32(1), total)
    o = (o_a * weight_a[..., None] + o_b * weight_b[..., None]) / divisor[..., None]
    return o, finite_m + xp.where(total == 0, -xp.inf, xp.log(divisor)).astype(xp.float32)


def paged_attention(q, k_pages, v_pages, step, *, scale, groups, window=None):
    """Attention of the tokens of one step to the cached keys and values of their sequences.

    Parameters
    ----------
    q : (T, H, K) float32
    k_pages, v_pages : (pages, G, page, K), this step's keys and values already written
    step : hpcinfer.model.step.Step
    scale, groups, window : as for `attention`

    Returns
    -------
    o : (T, H, K) float32
    lse : (T, H) float32
    """
    xp = array.namespace(q)
    o = xp.empty((*q.shape[:2], v_pages.shape[-1]), xp.float32)
    lse = xp.empty(q.shape[:2], xp.float32)
    page = k_pages.shape[2]
    for b in range(step.n_sequences):
        rows = slice(step.bounds[b], step.bounds[b + 1])
        q_pos = step.positions[rows]

        # Leave out the pages that lie wholly before the window of the first query.
        first = 0 if window is None else max(0, int(q_pos[0]) - window + 1) // page
        length = int(step.lengths[b])
        pages = step.tables[b, first : -(-length // page)]
        k_pos = np.arange(first * page, length)
        k, v = (_sequence(pool, pages, length - first * page) for pool in (k_pages, v_pages))
        o[rows], lse[rows] = attention(
            q[rows], k, v, q_pos, k_pos, scale=scale, groups=groups, window=window
        )
    return o, lse


def _sequence(pool, pages, length):
    """Keys (or values) of one sequence, (L, G, K), gathered from its pages."""
    gathered = pool[array.namespace(pool).asarray(pages)].swapaxes(1, 2)
    return gathered.reshape(-1, *gathered.shape[2:])[:length]


def _hidden(q_pos, k_pos, window):
    """(S, L) truth of "this query does not see this key"; None if every query sees every key."""
    if k_pos.max() <= q_pos.min() and (
        window is None or int(k_pos.min()) > int(q_pos.max()) - window
    ):
        return None
    hidden = k_pos[None, :] > q_pos[:, None]
    if window is not None:
        hidden |= k_pos[None, :] <= q_pos[:, None] - window
    return hidden


def _block(q, k, v, hidden, scale):
    """(o, lse) of one group's query heads over one block of keys: q (S, n, K), k and v (L, K)."""
    xp = array.namespace(q)
    S, n, K = q.shape
    scores = (q.reshape(S * n, K) @ k.T).reshape(S, n, -1) * xp.float32(scale)
    if hidden is not None:
        scores = xp.where(hidden[:, None, :], -xp.inf, scores)
    m = scores.max(axis=-1, keepdims=True)
    m = xp.where(xp.isneginf(m), xp.float32(0), m)
    weights = xp.exp(scores - m)
    total = weights.sum(axis=-1)
    o = (weights.reshape(S * n, -1) @ v).reshape(S, n, -1)
    divisor = xp.where(total == 0, xp.float32(1), total)
    lse = m[..., 0] + xp.where(total == 0, -xp.inf, xp.log(divisor))
    return o / divisor[..., None], lse.astype(xp.float32)
