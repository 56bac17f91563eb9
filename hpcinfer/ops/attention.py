"""Attention of ragged tokens with positions, and the merge of partial results.

Every function returns the pair (o, lse): the output and the log-sum-exp of its scores, both
float32, so that results over different keys can be merged exactly. Masks come from positions, so
that any subset of the keys, in any order, may be at hand.
"""

from itertools import pairwise

import numpy as np

from hpcinfer import array
from hpcinfer.ops.dispatch import dispatch

# Rows (queries times heads of a group) and keys of one block: 1 MB of scores stays in an L2 cache
# of 2 MB beside its keys and values. Fewer rows meet more keys at a time.
_ROWS, _KEYS, _MOST_KEYS = 512, 512, 1024
_LOWEST = np.finfo(np.float32).min


@dispatch
def attention(
    q, k, v, q_pos, k_pos, *, scale, groups, window=None, softcap=None, between=None, v_columns=None
):
    """Causal attention of one sequence, blockwise: no (S, L) score matrix is ever in memory.

    Parameters
    ----------
    q : (S, H, K) float32
    k, v : (L, G, K) float32, float16 or bfloat16
    q_pos, k_pos : (S,), (L,) integers, host; a query sees the keys at positions up to its own
    scale : factor on the scores, 1/sqrt(K) as a rule
    groups : (start, stop) among the H query heads for each of the G key/value heads
    window : a query sees only the last `window` positions, its own included; None for all
    softcap : bound of the scores, which become softcap · tanh(score / softcap); None for none
    between : function called after every block, to drive messages under way; None for none
    v_columns : leading columns of k that are the values, v is then (L, G, 0); None if v has them

    Returns
    -------
    o : (S, H, width of a value) float32; zero where no key is visible
    lse : (S, H) float32; -inf where no key is visible
    """
    # Begin a running softmax for the heads of every group.
    xp = array.namespace(q)
    S, H, _ = q.shape
    width = v.shape[-1] if v_columns is None else v_columns
    running = [_RunningSoftmax(xp, S, stop - start, width) for start, stop in groups]
    factor = xp.float32(scale if softcap is None else scale / softcap)
    q_scaled = [q[:, start:stop] * factor for start, stop in groups]

    # Let every query meet the keys, block by block.
    for columns, visible in blocks(q_pos, k_pos, window, H / max(1, len(groups))):
        visible = [
            (rows, None if hidden is None else xp.asarray(hidden)) for rows, hidden in visible
        ]
        for g, state in enumerate(running):
            k_block = array.widen(k[columns, g])
            v_block = array.widen(v[columns, g]) if v_columns is None else k_block[:, :v_columns]
            for rows, hidden in visible:
                state.add(rows, q_scaled[g][rows], k_block, v_block, hidden, softcap)
                if between is not None:
                    between()

    # Divide by the sums.
    o, lse = xp.zeros((S, H, width), xp.float32), xp.full((S, H), -xp.inf, xp.float32)
    for (start, stop), state in zip(groups, running, strict=True):
        o[:, start:stop], lse[:, start:stop] = state.result()
    return o, lse


class _RunningSoftmax:
    """Attention of one group's query heads over the blocks of keys met so far.

    The same sums as `merge`, in the form of flash attention (Dao 2022, arXiv:2205.14135): o stays
    a numerator relative to the largest score so far, and is divided once, at the end. So a block
    costs no division, no logarithm, and four passes over its scores beside the two products.

    Attributes
    ----------
    m : (S, n) largest score so far; the lowest float32 before the first, so that m - m is 0
    total : (S, n) sum of e^(score - m)
    o : (S, n, K) sum of e^(score - m) · v
    """

    def __init__(self, xp, S, n, K):
        self.xp = xp
        self.m = xp.full((S, n), _LOWEST, xp.float32)
        self.total = xp.zeros((S, n), xp.float32)
        self.o = xp.zeros((S, n, K), xp.float32)

    def add(self, rows, q, k, v, hidden, softcap):
        """Add a block of keys: q (s, n, K) of the queries `rows`, scaled; k, v (L, K) float32."""
        xp, (s, n, K) = self.xp, q.shape

        # Score, cap, and hide what is not visible.
        scores = (q.reshape(s * n, K) @ k.T).reshape(s, n, -1)
        if softcap is not None:
            xp.tanh(scores, out=scores)
            scores *= xp.float32(softcap)
        if hidden is not None:
            xp.copyto(scores, xp.float32(-xp.inf), where=hidden[:, None])

        # Correct the sums so far to the new largest score, and add the block's.
        m = xp.maximum(self.m[rows], scores.max(axis=-1))
        correction = xp.exp(self.m[rows] - m)
        self.m[rows] = m
        scores -= m[..., None]
        weights = xp.exp(scores, out=scores)
        self.total[rows] *= correction
        self.total[rows] += weights @ xp.ones(len(k), xp.float32)
        self.o[rows] *= correction[..., None]
        self.o[rows] += (weights.reshape(s * n, -1) @ v).reshape(s, n, -1)

    def result(self):
        """(o, lse) over all keys added."""
        empty = self.total == 0
        divisor = self.xp.where(empty, self.xp.float32(1), self.total)
        self.o /= divisor[..., None]
        return self.o, self.xp.where(empty, -self.xp.inf, self.m + self.xp.log(divisor))


def blocks(q_pos, k_pos, window, n, size=None):
    """Blocks of keys, and for each the blocks of queries that see any of it.

    Parameters
    ----------
    n : query heads per key/value head, on average
    size : rows of a block, its keys, and most keys of one with fewer rows; None for those here

    Yields
    ------
    columns : slice of the keys
    visible : list of (rows, hidden): slice of the queries, and the (s, l) truth of "this query does
        not see this key", None if each sees all
    """
    if not (n and len(q_pos) and len(k_pos)):
        return
    most_rows, most, limit = size or (_ROWS, _KEYS, _MOST_KEYS)
    s = max(1, int(most_rows / n))
    keys = min(limit, max(most, int(most_rows * most / (n * min(s, len(q_pos))))))
    q_ranges, k_ranges = _position_ranges(q_pos, s), _position_ranges(k_pos, keys)
    for columns, k_first, k_last in k_ranges:
        visible = []
        for rows, q_first, q_last in q_ranges:
            begin = -1 if window is None else q_first - window
            if k_first > q_last or k_last <= begin:
                continue
            whole = k_last <= q_first and (window is None or k_first > q_last - window)
            visible.append((rows, None if whole else _hidden(q_pos[rows], k_pos[columns], window)))
        if visible:
            yield columns, visible


def _position_ranges(pos, size):
    """(slice, least, largest position) of every `size` tokens."""
    starts = np.arange(0, len(pos), size)
    least, largest = np.minimum.reduceat(pos, starts), np.maximum.reduceat(pos, starts)
    slices = [slice(start, start + size) for start in starts.tolist()]
    return list(zip(slices, least.tolist(), largest.tolist(), strict=True))


def _hidden(q_pos, k_pos, window):
    """(S, L) truth of "this query does not see this key"."""
    hidden = k_pos[None, :] > q_pos[:, None]
    if window is not None:
        hidden |= k_pos[None, :] <= q_pos[:, None] - window
    return hidden


def ragged_attention(
    q,
    k,
    v,
    q_tokens,
    k_tokens,
    *,
    scale,
    groups,
    window=None,
    softcap=None,
    between=None,
    v_columns=None,
):
    """Causal attention of tokens of several sequences, each to the keys of its own sequence.

    Parameters
    ----------
    q : (T, H, K) float32
    k, v : (L, G, K) float32, float16 or bfloat16
    q_tokens, k_tokens : (T, 2), (L, 2) integers, host: sequence and position of every token. In any
        order; where sequences are not ascending the tokens are sorted, which copies them
    scale, groups, window, softcap, between, v_columns : as for `attention`

    Returns
    -------
    o : (T, H, width of a value) float32; zero where no key is visible
    lse : (T, H) float32; -inf where no key is visible
    """
    xp = array.namespace(q)
    if not _in_order(q_tokens):
        order, back = _order(q_tokens)
        o, lse = ragged_attention(
            q[xp.asarray(order)], k, v, q_tokens[order], k_tokens,
            scale=scale, groups=groups, window=window, softcap=softcap, between=between,
            v_columns=v_columns,
        )  # fmt: skip
        return o[xp.asarray(back)], lse[xp.asarray(back)]
    if not _in_order(k_tokens):
        order, _ = _order(k_tokens)
        k, v, k_tokens = k[xp.asarray(order)], v[xp.asarray(order)], k_tokens[order]

    width = v.shape[-1] if v_columns is None else v_columns
    o = xp.zeros((*q.shape[:2], width), xp.float32)
    lse = xp.full(q.shape[:2], -xp.inf, xp.float32)
    keys_of = dict(sequences(k_tokens))
    for b, rows in sequences(q_tokens):
        if b in keys_of:
            keys = keys_of[b]
            o[rows], lse[rows] = attention(
                q[rows], k[keys], v[keys], q_tokens[rows, 1], k_tokens[keys, 1],
                scale=scale, groups=groups, window=window, softcap=softcap, between=between,
                v_columns=v_columns,
            )  # fmt: skip
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
    m = array.namespace(o_a).maximum(lse_a, lse_b)
    return quotient(numerators(o_a, lse_a, m) + numerators(o_b, lse_b, m), m)


def merge_all(o, lse):
    """The merge of any number of partial results, which lie along axis 0: (P, ..., K), (P, ...)."""
    m = lse.max(axis=0)
    return quotient(numerators(o, lse, m).sum(axis=0), m)


def numerators(o, lse, m):
    """Partial results made ready to be summed over sets of keys.

    Parameters
    ----------
    o : (..., K) float32
    lse : (...) float32
    m : (...) float32, largest lse of all sets

    Returns
    -------
    (..., K+1) float32: o e^(lse-m), and behind it e^(lse-m)
    """
    xp = array.namespace(o)
    result = xp.empty((*o.shape[:-1], o.shape[-1] + 1), xp.float32)
    result[..., -1] = correction(lse, m)
    xp.multiply(o, result[..., -1:], out=result[..., :-1])
    return result


def quotient(total, m):
    """(o, lse) over all keys, from the summed `numerators` (..., K+1) and the largest lse (...)."""
    xp = array.namespace(total)
    weight = total[..., -1]
    divisor = xp.where(weight == 0, xp.float32(1), weight)
    return total[..., :-1] / divisor[..., None], m + xp.log(divisor)


def correction(lse, m):
    """e^(lse-m), the weight of a set of keys whose largest lse is m; 0 where no set saw a key."""
    xp = array.namespace(lse)
    return xp.exp(lse - xp.where(xp.isneginf(m), xp.float32(0), m))


def with_sink(o, lse, sink):
    """Attention with an attention sink: one more score per head, which weighs and brings no value.

    It is the merge with one more set of keys, whose output is zero and whose log-sum-exp is `sink`.
    Apply it once, after the last merge over ranks, or it counts once per rank.

    Parameters
    ----------
    o : (T, H, K) float32
    lse : (T, H) float32
    sink : (H,) float32

    Returns
    -------
    o, lse : as the arguments
    """
    xp = array.namespace(o)
    return merge(o, lse, xp.zeros_like(o), xp.broadcast_to(sink, lse.shape).astype(xp.float32))


def sequences(tokens):
    """The sequences of some tokens laid end to end.

    Yields
    ------
    b : number of the sequence
    rows : slice of its tokens
    """
    for start, stop in pairwise([*starts(tokens).tolist(), len(tokens)]):
        yield int(tokens[start, 0]), slice(start, stop)


def starts(tokens):
    """First token of every sequence of some tokens laid end to end."""
    return np.flatnonzero(np.diff(tokens[:, 0], prepend=-1))


def _in_order(tokens):
    """True if the sequences ascend, so that each is one run."""
    return bool((np.diff(tokens[:, 0]) >= 0).all())


def _order(tokens):
    """Order of the tokens by sequence and position, and the order that undoes it."""
    order = np.lexsort((tokens[:, 1], tokens[:, 0]))
    return order, np.argsort(order)


@dispatch
def paged_attention(
    q, q_tokens, k_pages, v_pages, block_table, *,
    scale, groups, window=None, v_columns=None, dtype=np.float32,
):  # fmt: skip
    """Attention of some tokens of a step to the keys and values in this rank's pages.

    Parameters
    ----------
    q : (T, H, K) float32
    q_tokens : (T, 2) int, sequence and position of every query, host; sequences ascending
    k_pages, v_pages : (pages, G, page, K), this step's keys and values already written
    block_table : object whose `pages(b, start)` gives this rank's pages of sequence b, and which
        page of the sequence each one is; and `lengths`, the keys of every sequence
    scale, groups, window, v_columns : as for `attention`
    dtype : type that o is rounded to, where nothing but a product in it follows

    Returns
    -------
    o : (T, H, width of a value) of the type, over this rank's keys only; zero where it has none
    lse : (T, H) float32
    """
    xp = array.namespace(q)
    width = v_pages.shape[-1] if v_columns is None else v_columns
    o = xp.empty((*q.shape[:2], width), xp.float32)
    lse = xp.empty(q.shape[:2], xp.float32)
    for b, rows in sequences(q_tokens):
        q_pos = q_tokens[rows, 1]
        k, v, k_pos = cached(k_pages, v_pages, block_table, b, window_start(q_pos, window))
        o[rows], lse[rows] = attention(
            q[rows], k, v, q_pos, k_pos,
            scale=scale, groups=groups, window=window, v_columns=v_columns,
        )  # fmt: skip
    return array.narrow(o, dtype), lse


def cached(k_pages, v_pages, block_table, b, start=0):
    """Keys and values of sequence b in this rank's pages, from the page of token `start` on.

    Returns
    -------
    k, v : (L, G, K)
    k_pos : (L,) int64, host
    """
    page = k_pages.shape[2]
    places, numbers = block_table.pages(b, start)
    k_pos = (numbers[:, None] * page + np.arange(page)).reshape(-1)
    length = len(k_pos)
    if length and k_pos[-1] >= block_table.lengths[b]:
        length -= int(k_pos[-1]) + 1 - int(block_table.lengths[b])
    places = array.namespace(k_pages).asarray(places)
    k, v = (_flat(_taken(pool, places))[:length] for pool in (k_pages, v_pages))
    return k, v, k_pos[:length]


def window_start(q_pos, window):
    """First position that the queries at `q_pos` see: 0, or where the first one's window begins."""
    return 0 if window is None else max(0, int(q_pos.min()) - window + 1)


def visible(q_pos, k_pos, window):
    """Which keys each query sees, of keys whose positions ascend.

    Returns
    -------
    first, last : (S,) int64, the first of them, and one behind the last one; equal for none
    """
    last = np.searchsorted(k_pos, q_pos, side="right")
    if window is None:
        return np.zeros(len(q_pos), np.int64), last
    return np.searchsorted(k_pos, q_pos - window, side="right"), last


def _taken(pool, places):
    """Pages of a pool; as plain 16 bits, which NumPy copies many times faster than bfloat16."""
    if pool.dtype != array.BFLOAT16:
        return pool[places]
    return pool.view(np.uint16)[places].view(pool.dtype)


def _flat(gathered):
    """Pages (n, G, page, K) as one run of keys (n · page, G, K)."""
    n, G, page, K = gathered.shape
    return gathered.swapaxes(1, 2).reshape(n * page, G, K)
