"""Sections 1 and 2 of the theory: matrix products, the halves of a layer, the vocabulary."""

from itertools import pairwise

import numpy as np

from hpcinfer import array, collectives, partition
from hpcinfer.ops.activation import gelu
from hpcinfer.ops.attention import ragged_attention
from hpcinfer.ops.linear import linear, linear_pair
from hpcinfer.ops.sampling_batch import SamplingBatch
from hpcinfer.parallel import matmul, sequence, tensor, vocabulary
from hpcinfer.verify import oracle
from hpcinfer.verify.row import Case, Trial

# Tokens, columns in and out of a product, and the model's widths: none divides by 2, 3, 4 or 8.
T, IN, OUT, D, F, V = 19, 31, 23, 29, 37, 101
H, G, K = 6, 3, 7


def normal(rng, put, *shapes):
    """Random float32 arrays on the device, the same on every rank."""
    return [put(rng.normal(size=shape).astype(np.float32)) for shape in shapes]


def own(comm, n):
    """This rank's block of an axis of n items."""
    return slice(*partition.block(n, comm.size)[comm.rank])


def counts(comm, n):
    return partition.counts(partition.block(n, comm.size))


def matmul_columns(comm, rng, put):
    a, b, bias = normal(rng, put, (T, IN), (OUT, IN), OUT)
    mine = own(comm, OUT)
    c = matmul.columns(comm, a, b[mine], bias[mine])
    return Trial((c,), (oracle.linear(a, b, bias)[:, mine],), 0)


def matmul_gathered(comm, rng, put):
    a, b, bias = normal(rng, put, (T, IN), (OUT, IN), OUT)
    rows, mine = own(comm, T), own(comm, OUT)
    c = matmul.gathered(comm, a[rows], b[mine], counts(comm, T), bias[mine])
    return Trial((c,), (oracle.linear(a, b, bias)[:, mine],), 4 * T * IN * (comm.size - 1))


def matmul_inner(comm, rng, put):
    a, b, bias = normal(rng, put, (T, IN), (OUT, IN), OUT)
    mine = own(comm, IN)
    c = matmul.inner(comm, linear(a[:, mine], b[:, mine]), bias)
    return Trial((c,), (oracle.linear(a, b, bias),), 2 * 4 * T * OUT * (comm.size - 1))


def matmul_inner_cut(comm, rng, put):
    a, b, bias = normal(rng, put, (T, IN), (OUT, IN), OUT)
    mine, rows = own(comm, IN), own(comm, T)
    c = matmul.inner_cut(comm, linear(a[:, mine], b[:, mine]), counts(comm, T), bias)
    return Trial((c,), (oracle.linear(a, b, bias)[rows],), 4 * T * OUT * (comm.size - 1))


def tensor_ffn(comm, rng, put):
    """GELU stands between the products: it may meet whole columns, never a partial sum."""
    x, up, up_bias, down, down_bias = normal(rng, put, (T, D), (F, D), F, (D, F), D)
    mine = own(comm, F)
    of_rank = products(up[mine], gelu, down[:, mine], up_bias[mine])
    y = tensor.complete(comm, x, of_rank, down_bias)
    whole = oracle.linear(gelu(oracle.linear(x, up, up_bias)), down, down_bias)
    return Trial((y,), (whole,), 2 * 4 * T * D * (comm.size - 1))


def tensor_attention(comm, rng, put):
    """Every rank has the columns of its query heads and of the KV heads that they read."""
    x, weights, whole = attention_half(comm, rng, put)
    y = tensor.complete(comm, x, products(*weights))
    return Trial((y,), (whole,), 2 * 4 * T * D * (comm.size - 1))


def tensor_sum_through_gelu(comm, rng, put):
    """The inner axis of the first product is cut, and its {sum} meets GELU: f(a+b) != f(a)+f(b)."""
    x, up = normal(rng, put, (T, D), (F, D))
    mine = own(comm, D)
    y_sum = gelu(linear(x[:, mine], up[:, mine]))
    y = collectives.Allreduce(comm, y_sum, purpose="tensor")
    return Trial((y,), (gelu(oracle.linear(x, up)),), 2 * 4 * T * F * (comm.size - 1))


def sequence_ffn(comm, rng, put):
    """Columns are whole when GELU meets them, and so are the tokens."""
    x, up, up_bias, down, down_bias = normal(rng, put, (T, D), (F, D), F, (D, F), D)
    tokens, mine = own(comm, T), own(comm, F)
    of_rank = products(up[mine], gelu, down[:, mine], up_bias[mine])
    y = sequence.complete(comm, x[tokens], counts(comm, T), of_rank, down_bias)
    whole = oracle.linear(gelu(oracle.linear(x, up, up_bias)), down, down_bias)
    return Trial((y,), (whole[tokens],), 2 * 4 * T * D * (comm.size - 1))


def sequence_attention(comm, rng, put):
    """Tokens are cut outside attention, heads inside it."""
    x, weights, whole = attention_half(comm, rng, put)
    tokens = own(comm, T)
    y = sequence.complete(comm, x[tokens], counts(comm, T), products(*weights))
    return Trial((y,), (whole[tokens],), 2 * 4 * T * D * (comm.size - 1))


def products(column, between, row, column_bias=None):
    """This rank's products of a half layer: function (T, D) -> (T, D){sum}."""
    return lambda x: linear_pair(x, column, between, row, column_bias)


def attention_half(comm, rng, put):
    """Attention of one sequence cut by heads.

    Returns
    -------
    x : (T, D)
    weights : columns, function between, rows of this rank
    whole : (T, D), result by the definition
    """
    # Cut the heads over the ranks.
    x, wq, wk, wv, wo = normal(rng, put, (T, D), (H, K, D), (G, K, D), (G, K, D), (D, H, K))
    wq, wk, wv = (w / np.float32(D**0.5) for w in (wq, wk, wv))
    heads, scale = partition.heads(H, G, comm.size)[comm.rank], K**-0.5
    tokens = np.stack([np.zeros(T, int), np.arange(T)], axis=1)
    query, kv = slice(*heads.query), slice(*heads.kv)
    xp = array.namespace(x)
    qkv = xp.concatenate([wq[query], wk[kv], wv[kv]]).reshape(-1, D)
    bounds = np.cumsum([0, heads.n_query, heads.n_kv, heads.n_kv]).tolist()

    def middle(qkv):
        qkv = qkv.reshape(T, -1, K)
        q, k, v = (qkv[:, a:b] for a, b in pairwise(bounds))
        o, _ = ragged_attention(q, k, v, tokens, tokens, scale=scale, groups=heads.groups)
        return o.reshape(T, -1)

    # Compute the whole on one rank.
    q, k, v = (oracle.linear(x, w.reshape(-1, D)).reshape(T, -1, K) for w in (wq, wk, wv))
    o, _ = oracle.attention(q, k, v, tokens, tokens, scale)
    whole = oracle.linear(o.reshape(T, -1), wo.reshape(D, -1))
    return x, (qkv, middle, wo[:, query].reshape(D, -1)), whole


def vocabulary_embed(comm, rng, put):
    (weight,) = normal(rng, put, (V, D))
    token_ids, mine = rng.integers(0, V, T), own(comm, V)
    x = vocabulary.embed(comm, token_ids, weight[mine], mine.start)
    return Trial((x,), (array.host(weight)[token_ids],), 2 * 4 * T * D * (comm.size - 1))


def vocabulary_log_softmax(comm, rng, put):
    (logits,) = normal(rng, put, (T, V))
    targets, mine = rng.integers(0, V, T), own(comm, V)
    logprobs = vocabulary.log_softmax_of(comm, logits[:, mine], mine.start, targets)
    whole = oracle.log_softmax(logits)[np.arange(T), targets]
    return Trial((logprobs,), (whole,), 2 * 24 * T * (comm.size - 1))


def vocabulary_greedy(comm, rng, put):
    (logits,) = normal(rng, put, (T, V))
    mine, rows = own(comm, V), SamplingBatch.make(T, temperature=0)
    chosen = vocabulary.choose(comm, logits[:, mine], mine.start, V, rows)
    formula_bytes = comm.size * (comm.size - 1) * 16 * T
    return Trial((chosen.token_ids,), (array.host(logits).argmax(axis=1),), formula_bytes)


ROWS = [
    Case("matmul columns", "B outer", matmul_columns),
    Case("matmul gathered", "A rows, B outer", matmul_gathered, engine=False),
    Case("matmul inner", "A, B inner", matmul_inner),
    Case("matmul inner_cut", "A, B inner, C rows", matmul_inner_cut),
    Case("tensor FFN", "columns, rows", tensor_ffn),
    Case("tensor attention", "heads", tensor_attention),
    Case("tensor, sum in GELU", "inner, rows", tensor_sum_through_gelu, equal=False, engine=False),
    Case("sequence FFN", "tokens; columns, rows", sequence_ffn),
    Case("sequence attention", "tokens; heads", sequence_attention),
    Case("vocabulary embed", "ids", vocabulary_embed),
    Case("vocabulary log_softmax", "ids", vocabulary_log_softmax),
    Case("vocabulary greedy", "ids", vocabulary_greedy),
]
