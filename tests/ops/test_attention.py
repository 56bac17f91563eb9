"""Blockwise, paged and merged attention against a dense softmax in float64."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from hpcinfer import partition
from hpcinfer.model.block_table import BlockTable
from hpcinfer.model.cache import PAGE, Cache, page_bytes
from hpcinfer.ops.attention import attention, merge, paged_attention
from hpcinfer.ops.cache import store

pytestmark = [pytest.mark.single, pytest.mark.usefixtures("plain_forms")]

BF16 = np.dtype(ml_dtypes.bfloat16)
NONE = np.zeros(0, np.int64)


class Host:
    """The device of the cache."""

    empty = staticmethod(np.empty)


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def problem(S, L, groups, K=8, seed=0):
    """Queries at the last S of L positions, with their keys and values."""
    q = normal((S, groups[-1][1], K), seed)
    k, v = normal((L, len(groups), K), seed + 1), normal((L, len(groups), K), seed + 2)
    return q, k, v, np.arange(L - S, L), np.arange(L)


def dense(q, k, v, q_pos, k_pos, *, scale, groups, window=None):
    """(o, lse) by the definition, in float64, with the whole matrix of scores."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    kv_head = np.concatenate([np.full(b - a, g) for g, (a, b) in enumerate(groups)])
    scores = np.einsum("shk,lhk->shl", q, k[:, kv_head]) * scale
    visible = k_pos[None, :] <= q_pos[:, None]
    if window is not None:
        visible &= k_pos[None, :] > q_pos[:, None] - window
    scores = np.where(visible[:, None, :], scores, -np.inf)
    top = np.maximum(scores.max(-1, keepdims=True, initial=-np.inf), -1e300)
    weights = np.exp(scores - top)
    total = weights.sum(-1)
    o = np.einsum("shl,lhk->shk", weights, v[:, kv_head]) / np.maximum(total, 1e-300)[..., None]
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0, top[..., 0] + np.log(total), -np.inf)
    return o, lse


def assert_equal(result, expected, atol=2e-5):
    o, lse = result
    assert o.dtype == lse.dtype == np.float32
    np.testing.assert_allclose(o, expected[0], atol=atol)
    np.testing.assert_allclose(lse, expected[1], atol=atol)


GROUPS = {
    "one head": ((0, 1),),
    "multi-head": tuple((h, h + 1) for h in range(5)),
    "multi-query": ((0, 7),),
    "uneven": partition.heads(14, 2, 3)[1].groups,
    "three": ((0, 1), (1, 5), (5, 7)),
}


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("window", [None, 1, 7, 1000])
@pytest.mark.parametrize(("S", "L"), [(1, 1), (1, 40), (33, 33), (5, 60)])
def test_equals_the_dense_softmax(S, L, groups, window):
    arguments = problem(S, L, groups)
    options = {"scale": 0.35, "groups": groups, "window": window}
    assert_equal(attention(*arguments, **options), dense(*arguments, **options))


@pytest.mark.parametrize("window", [None, 3, 300, 1024])
@pytest.mark.parametrize(("S", "L"), [(1, 2050), (255, 1023), (257, 1025), (512, 512), (513, 2049)])
def test_edges_of_blocks(S, L, window):
    """Numbers of queries and keys just below, at and above multiples of any likely block."""
    groups = ((0, 2), (2, 3))
    arguments = problem(S, L, groups, K=4)
    options = {"scale": 0.5, "groups": groups, "window": window}
    assert_equal(attention(*arguments, **options), dense(*arguments, **options))


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(("S", "L"), [(20, 50), (300, 1100)])
def test_order_of_keys_and_queries_does_not_matter(S, L, window):
    """Positions travel with the keys, so any cut of the sequence may be at hand."""
    groups = GROUPS["three"]
    q, k, v, q_pos, k_pos = problem(S, L, groups, K=4)
    options = {"scale": 0.35, "groups": groups, "window": window}
    o, lse = dense(q, k, v, q_pos, k_pos, **options)
    rng = np.random.default_rng(1)
    rows, columns = rng.permutation(S), rng.permutation(L)
    result = attention(q[rows], k[columns], v[columns], q_pos[rows], k_pos[columns], **options)
    assert_equal(result, (o[rows], lse[rows]))


def test_queries_that_see_no_key():
    """o = 0 and lse = -inf, without a warning, beside queries that see some."""
    q, k, v, _, _ = problem(4, 6, ((0, 2),))
    options = {"scale": 0.5, "groups": ((0, 2),), "window": 3}
    positions = np.array([0, 9, 5, 100]), np.array([5, 6, 7, 8, 9, 10])
    o, lse = attention(q, k, v, *positions, **options)
    assert_equal((o, lse), dense(q, k, v, *positions, **options))
    np.testing.assert_array_equal(o[[0, 3]], 0)
    np.testing.assert_array_equal(lse[[0, 3]], -np.inf)
    assert np.isfinite(lse[[1, 2]]).all()


@pytest.mark.parametrize(("S", "L"), [(0, 5), (3, 0), (0, 0)])
def test_no_queries_or_no_keys(S, L):
    q, k, v = normal((S, 2, 4)), normal((L, 1, 4)), normal((L, 1, 4))
    o, lse = attention(
        q, k, v, np.arange(S) + 10, np.arange(L), scale=0.5, groups=((0, 2),), window=None
    )
    assert o.shape == (S, 2, 4) and lse.shape == (S, 2)
    if not L:
        np.testing.assert_array_equal(o, 0)
        np.testing.assert_array_equal(lse, -np.inf)


# --- Merge ---------------------------------------------------------------------------------------


def split(pieces, window=None):
    """The (o, lse) of one problem over each of several sets of its keys, and over all."""
    groups = ((0, 2), (2, 3))
    q, k, v, q_pos, k_pos = problem(6, 40, groups)
    q_pos = np.array([0, 3, 12, 25, 39, 500])
    options = {"scale": 0.5, "groups": groups, "window": window}
    whole = dense(q, k, v, q_pos, k_pos, **options)
    return [attention(q, k[i], v[i], q_pos, k_pos[i], **options) for i in pieces], whole


SHUFFLED = np.random.default_rng(3).permutation(40)


@pytest.mark.parametrize("window", [None, 10])
@pytest.mark.parametrize(
    "pieces",
    [
        np.array_split(np.arange(40), 3),
        np.array_split(SHUFFLED, 4),
        [NONE, SHUFFLED[:7], NONE, SHUFFLED[7:]],
        [SHUFFLED[:1], SHUFFLED[1:2], SHUFFLED[2:]],
    ],
    ids=["runs", "shuffled", "empty sides", "single keys"],
)
def test_merge_in_any_order_is_the_whole(pieces, window):
    """Associative and commutative, also where a side saw no key, or none did."""
    parts, whole = split(pieces, window)
    assert np.isneginf(whole[1]).any() == (window is not None)
    for order in itertools.permutations(parts):
        left = order[0]
        for part in order[1:]:
            left = merge(*left, *part)
        assert_equal(left, whole)
        right = order[-1]
        for part in order[-2::-1]:
            right = merge(*part, *right)
        assert_equal(right, whole)


def test_merge_commutes_to_the_last_bit():
    (a, b), _ = split([SHUFFLED[:15], SHUFFLED[15:]])
    for x, y in zip(merge(*a, *b), merge(*b, *a), strict=True):
        np.testing.assert_array_equal(x, y)


def test_merge_with_nothing_changes_nothing():
    ((o, lse),), _ = split([SHUFFLED], window=10)
    nothing = np.zeros_like(o), np.full_like(lse, -np.inf)
    for merged in (merge(o, lse, *nothing), merge(*nothing, o, lse)):
        np.testing.assert_array_equal(merged[0], o)
        np.testing.assert_array_equal(merged[1], lse)


# --- Pages ---------------------------------------------------------------------------------------


def paged(sequences, G, K, dtype, pools):
    """Sequences whose pages are dealt to pools, and lie scattered in each.

    Parameters
    ----------
    sequences : list of lengths in tokens

    Returns
    -------
    BlockTable and pages (k, v) of every pool, k and v of every sequence whole in the cache's type
    """
    rng = np.random.default_rng(0)
    needed = [-(-n // PAGE) for n in sequences]
    places, first = np.zeros((len(sequences), max(needed)), int), rng.integers(pools, size=99)
    caches = [Cache(Host, [0], G, K, sum(needed) + 3, dtype) for _ in range(pools)]
    for pages in (page for cache in caches for page in (cache.k[0], cache.v[0])):
        pages[...] = np.nan
    free = [rng.permutation(sum(needed) + 3).tolist() for _ in range(pools)]
    whole = []
    for b, length in enumerate(sequences):
        k, v = (rng.normal(size=(length, G, K)).astype(np.float32) for _ in range(2))
        for i in range(needed[b]):
            pool, own = (first[b] + i) % pools, slice(i * PAGE, (i + 1) * PAGE)
            places[b, i] = free[pool].pop()
            slots = places[b, i] * PAGE + np.arange(len(k[own]))
            rows, cache = np.arange(len(k[own])), caches[pool]
            store(k[own], v[own], rows, cache.k[0], cache.v[0], slots)
        whole.append((k.astype(dtype), v.astype(dtype)))
    lengths = np.array(sequences)
    block_table = [BlockTable(places, first, pool, pools, lengths) for pool in range(pools)]
    return block_table, [(cache.k[0], cache.v[0]) for cache in caches], whole


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("window", [None, 1, PAGE, PAGE + 1, 50])
@pytest.mark.parametrize("pools", [1, 2, 3])
def test_scattered_pages_equal_whole_sequences(pools, window, dtype):
    """Prefill, chunk, decode; lengths at and around the edges of pages; pages of other ranks."""
    new = {5: 5, 110: 70, PAGE: 1, PAGE + 1: 1, 3 * PAGE + 8: 1, 2 * PAGE: 2 * PAGE}
    groups, K = ((0, 2), (2, 3)), 4
    block_table, pages, whole = paged(list(new), len(groups), K, dtype, pools)
    tokens = np.array(
        [(b, at) for b, (length, n) in enumerate(new.items()) for at in range(length - n, length)]
    )
    q = normal((len(tokens), 3, K), 9)
    options = {"scale": 0.5, "groups": groups, "window": window}
    parts = [
        paged_attention(q, tokens, *pages[pool], block_table[pool], **options)
        for pool in range(pools)
    ]
    o, lse = parts[0]
    for part in parts[1:]:
        o, lse = merge(o, lse, *part)
    for b, (k, v) in enumerate(whole):
        rows = tokens[:, 0] == b
        arguments = (q[rows], k, v, tokens[rows, 1], np.arange(len(k)))
        assert_equal((o[rows], lse[rows]), dense(*arguments, **options))


@pytest.mark.parametrize("pools", [1, 2, 3])
def test_books_count_the_keys_of_every_pool(pools):
    block_table, _, _ = paged([5, 110, PAGE, 3 * PAGE + 8], 1, 2, np.float32, pools)
    for b, length in enumerate(block_table[0].lengths.tolist()):
        for start in (0, 3, PAGE, length - 1):
            counts = block_table[0].keys(b, start)
            numbers = [book.pages(b, start)[1] for book in block_table]
            held = [sum(min(PAGE, length - n * PAGE) for n in own.tolist()) for own in numbers]
            assert counts.tolist() == held
            assert sum(held) == max(0, length - start // PAGE * PAGE)


def test_bytes_of_a_page():
    cache = Cache(Host, range(3), 2, 8, 5, BF16)
    held = sum(x.nbytes for x in (*cache.k.values(), *cache.v.values()))
    assert held == 5 * page_bytes(3, 2, 8, BF16)
    assert page_bytes(3, 0, 8, BF16) == 0
