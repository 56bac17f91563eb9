"""Sections 1 and 2 of the theory: matrix products, half layers, the vocabulary."""

import numpy as np

from hpcinfer import partition
from hpcinfer.ops import sample
from hpcinfer.ops.activation import gelu
from hpcinfer.ops.attention import ragged_attention
from hpcinfer.parallel import matmul, tensor, vocabulary
from hpcinfer.verify import oracle
from hpcinfer.verify.row import Row, Trial

# Tokens, columns in and out of a product, and the model's widths: none divides by 2, 3, 4 or 8.
T, IN, OUT, D, F, V = 19, 31, 23, 29, 37, 101
H, G, K = 6, 3, 7


def matmul_columns(comm, rng):
    a, b, bias = _normal(rng, (T, IN), (OUT, IN), OUT)
    own = _own(comm, OUT)
    c = matmul.columns(comm, a, b[own], bias[own])
    return Trial((c,), (oracle.linear(a, b, bias)[:, own],), 0)


def matmul_gathered(comm, rng):
    a, b, bias = _normal(rng, (T, IN), (OUT, IN), OUT)
    rows, own = _own(comm, T), _own(comm, OUT)
    c = matmul.gathered(comm, a[rows], b[own], _counts(comm, T), bias[own])
    return Trial((c,), (oracle.linear(a, b, bias)[:, own],), 4 * T * IN * (comm.size - 1))


def matmul_inner(comm, rng):
    a, b, bias = _normal(rng, (T, IN), (OUT, IN), OUT)
    own = _own(comm, IN)
    c = matmul.inner(comm, a[:, own], b[:, own], bias)
    return Trial((c,), (oracle.linear(a, b, bias),), 2 * 4 * T * OUT * (comm.size - 1))


def matmul_inner_cut(comm, rng):
    a, b, bias = _normal(rng, (T, IN), (OUT, IN), OUT)
    own, rows = _own(comm, IN), _own(comm, T)
    c = matmul.inner_cut(comm, a[:, own], b[:, own], _counts(comm, T), bias)
    return Trial((c,), (oracle.linear(a, b, bias)[rows],), 4 * T * OUT * (comm.size - 1))


def tensor_ffn(comm, rng):
    """GELU stands between the products: it may meet whole columns, never a partial sum."""
    x, up, up_bias, down, down_bias = _normal(rng, (T, D), (F, D), F, (D, F), D)
    own = _own(comm, F)
    y = tensor.half_layer(comm, x, up[own], gelu, down[:, own], up_bias[own], down_bias)
    whole = oracle.linear(gelu(oracle.linear(x, up, up_bias)), down, down_bias)
    return Trial((y,), (whole,), 2 * 4 * T * D * (comm.size - 1))


def tensor_attention(comm, rng):
    """Every rank has the columns of its query heads and of the KV heads that they read."""
    x, wq, wk, wv, wo = _normal(rng, (T, D), (H, K, D), (G, K, D), (G, K, D), (D, H, K))
    wq, wk, wv = (w / np.float32(D**0.5) for w in (wq, wk, wv))
    heads, scale = partition.heads(H, G, comm.size)[comm.rank], K**-0.5
    tokens = np.stack([np.zeros(T, int), np.arange(T)], axis=1)
    query, kv = slice(*heads.query), slice(*heads.kv)
    qkv = np.concatenate([wq[query], wk[kv], wv[kv]]).reshape(-1, D)
    split_at = np.cumsum([heads.n_query, heads.n_kv])

    def middle(qkv):
        q, k, v = np.split(qkv.reshape(T, -1, K), split_at, axis=1)
        o, _ = ragged_attention(q, k, v, tokens, tokens, scale=scale, groups=heads.groups)
        return o.reshape(T, -1)

    y = tensor.half_layer(comm, x, qkv, middle, wo[:, query].reshape(D, -1))

    q, k, v = (np.einsum("td,hkd->thk", x.astype(np.float64), w) for w in (wq, wk, wv))
    o, _ = oracle.attention(q, k, v, tokens, tokens, scale)
    whole = oracle.linear(o.reshape(T, -1), wo.reshape(D, -1))
    return Trial((y,), (whole,), 2 * 4 * T * D * (comm.size - 1))


def vocabulary_embed(comm, rng):
    (weight,) = _normal(rng, (V, D))
    token_ids, own = rng.integers(0, V, T), _own(comm, V)
    x = vocabulary.embed(comm, token_ids, weight[own], own.start)
    return Trial((x,), (weight[token_ids],), 2 * 4 * T * D * (comm.size - 1))


def vocabulary_log_softmax(comm, rng):
    (logits,) = _normal(rng, (T, V))
    targets, own = rng.integers(0, V, T), _own(comm, V)
    logprobs = vocabulary.log_softmax_of(comm, logits[:, own], own.start, targets)
    whole = oracle.log_softmax(logits)[np.arange(T), targets]
    return Trial((logprobs,), (whole,), 2 * 24 * T * (comm.size - 1))


def vocabulary_greedy(comm, rng):
    (logits,) = _normal(rng, (T, V))
    own, rows = _own(comm, V), sample.Rows.make(T, temperature=0)
    chosen = vocabulary.choose(comm, logits[:, own], own.start, V, rows)
    formula_bytes = comm.size * (comm.size - 1) * 16 * T
    return Trial((chosen.token_ids,), (logits.argmax(axis=1),), formula_bytes)


ROWS = [
    Row("matmul columns", "B outer", matmul_columns),
    Row("matmul gathered", "A rows, B outer", matmul_gathered),
    Row("matmul inner", "A, B inner", matmul_inner),
    Row("matmul inner_cut", "A, B inner, C rows", matmul_inner_cut),
    Row("tensor FFN", "columns, rows", tensor_ffn),
    Row("tensor attention", "heads", tensor_attention),
    Row("vocabulary embed", "ids", vocabulary_embed),
    Row("vocabulary log_softmax", "ids", vocabulary_log_softmax),
    Row("vocabulary greedy", "ids", vocabulary_greedy),
]


def _normal(rng, *shapes):
    """Random float32 arrays, the same on every rank."""
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def _own(comm, n):
    """This rank's block of an axis of n items."""
    return slice(*partition.block(n, comm.size)[comm.rank])


def _counts(comm, n):
    return partition.counts(partition.block(n, comm.size))
