"""The definitions, dense and in float64: what one rank computes that nothing was cut for.

They are computed on the host, wherever the arguments are.
"""

import numpy as np

from hpcinfer.array import host


def linear(x, weight, bias=None):
    """x · weightᵀ + bias: x (T, I), weight (O, I), bias (O,) -> (T, O)."""
    y = host(x).astype(np.float64) @ host(weight).T.astype(np.float64)
    return y if bias is None else y + host(bias)


def mixture(x, ids, weights, up, down, function):
    """Sum over the chosen experts of weight · down · function(up · x).

    Parameters
    ----------
    x : (T, D)
    ids, weights : (T, k) experts that each token chose, and their weights
    up, down : (E, F, D), (E, D, F)
    function : of the hidden columns, (F,) -> (F,)

    Returns
    -------
    (T, D) float64
    """
    y, ids, weights = np.zeros(x.shape), host(ids), host(weights)
    for t, k in np.ndindex(ids.shape):
        e = ids[t, k]
        y[t] += weights[t, k] * linear(function(linear(x[t], up[e])), down[e])
    return y


def attention(q, k, v, q_tokens, k_tokens, scale, window=None):
    """Causal attention with the whole matrix of scores.

    Parameters
    ----------
    q : (S, H, K)
    k, v : (L, G, K)
    q_tokens, k_tokens : (S, 2), (L, 2) sequence and position of every token
    scale : factor on the scores
    window : last positions that a query sees; None for all

    Returns
    -------
    o : (S, H, K) float64
    lse : (S, H) float64
    """
    per_kv = q.shape[1] // k.shape[1]
    k, v = (np.repeat(host(x), per_kv, axis=1).astype(np.float64) for x in (k, v))
    scores = scale * np.einsum("shk,lhk->shl", host(q).astype(np.float64), k)
    seen = visible(q_tokens, k_tokens, window)[:, None]
    top = scores.max(axis=-1, where=seen, initial=-np.inf, keepdims=True)
    weights = np.where(seen, np.exp(scores - top), 0)
    total = weights.sum(axis=-1)
    o = np.einsum("shl,lhk->shk", weights, v) / total[..., None]
    return o, top[..., 0] + np.log(total)


def visible(q_tokens, k_tokens, window=None):
    """(S, L) truth of "this query sees this key": same sequence, not later, inside the window."""
    (q_b, q_pos), (k_b, k_pos) = q_tokens.T[:, :, None], k_tokens.T[:, None]
    seen = (q_b == k_b) & (k_pos <= q_pos)
    return seen if window is None else seen & (k_pos > q_pos - window)


def log_softmax(logits):
    """Log-probabilities along the last axis: (R, V) -> (R, V)."""
    x = host(logits).astype(np.float64)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
