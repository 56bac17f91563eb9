"""Strategy `vocabulary`: equals one rank, cost, refuses."""

import ml_dtypes
import numpy as np
import pytest
from helpers.logits import mixture
from pytest import approx

from hpcinfer import partition
from hpcinfer.ledger import ledger
from hpcinfer.ops import candidates, sample
from hpcinfer.ops.sampling_batch import SamplingBatch
from hpcinfer.parallel import vocabulary


def normal(shape, seed=0, scale=3.0):
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def cut(comm, x, axis):
    """This rank's block of an axis, and the number of its first item."""
    start, stop = partition.block(x.shape[axis], comm.size)[comm.rank]
    return np.ascontiguousarray(x.take(range(start, stop), axis)), start


def choose(comm, logits, rows):
    own, start = cut(comm, logits, 1)
    return vocabulary.choose(comm, own, start, logits.shape[1], rows)


def assert_equal(chosen, expected):
    np.testing.assert_array_equal(chosen.token_ids, expected.token_ids)
    np.testing.assert_array_equal(chosen.logprobs, expected.logprobs)
    assert chosen.top == expected.top


@pytest.mark.parametrize("V", [1, 2, 3, 37, 1003, 5003])
@pytest.mark.parametrize("kind", ["smooth", "ties", "flat", "sorted"])
def test_choose_equals_one_rank(comm, V, kind):
    """Also with fewer columns than ranks, equal logits, nuclei of nearly all the vocabulary, and
    one rank that owns all large logits."""
    R = 80
    logits = normal((R, V), seed=V, scale=0.01 if kind == "flat" else 3)
    if kind == "ties":
        logits = np.round(logits)
    if kind == "sorted":
        logits = np.sort(logits, axis=1)[:, ::-1]
    rows = mixture(R, V, seed=V)
    assert_equal(choose(comm, logits, rows), sample.choose(logits, rows))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_choose_widens_half_precision(comm, dtype):
    logits = normal((40, 301)).astype(dtype)
    rows = mixture(40, 301)
    assert_equal(choose(comm, logits, rows), sample.choose(logits, rows))


def test_choose_does_not_depend_on_the_batch(comm):
    R, V = 30, 501
    logits, rows = normal((R, V)), mixture(R, V)
    together = choose(comm, logits, rows)
    order = np.random.default_rng(1).permutation(R)
    shuffled = choose(comm, logits[order], rows.take(order))
    np.testing.assert_array_equal(shuffled.token_ids, together.token_ids[order])
    np.testing.assert_array_equal(shuffled.logprobs, together.logprobs[order])
    for r in range(0, R, 7):
        alone = choose(comm, logits[[r]], rows.take([r]))
        assert alone.token_ids[0] == together.token_ids[r]


def test_choose_of_no_rows(comm):
    chosen = choose(comm, normal((0, 11)), SamplingBatch.make(0))
    assert chosen.token_ids.shape == (0,) and chosen.top is None


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0, "top_p": 0.5}, {"temperature": 1}, {"temperature": 1, "top_k": 3001}],
    ids=str,
)
def test_cost_of_an_unfiltered_step(comm, settings):
    """One Allgather of 16 bytes a row, whatever the vocabulary."""
    R, V = 25, 3001
    rows = SamplingBatch.make(R, key=np.arange(R), **settings)
    ledger.clear()
    choose(comm, normal((R, V)), rows)
    assert ledger.calls() == ledger.calls("Allgather", purpose="choose") == 1
    assert ledger.sent_bytes() == (comm.size - 1) * 16 * R


def test_cost_of_a_filtered_step(comm):
    """Candidates of the filtered rows, totals of those with top-p alone, reports where asked."""
    R, V, P = 12, 3001, comm.size
    rows = SamplingBatch.make(
        R,
        temperature=[1] * 10 + [0, 0],
        top_p=[0.5] * 7 + [1] * 5,
        top_k=[0] * 4 + [20] * 6 + [0, 0],
        logprobs=[3] * 5 + [-1] * 7,
    )
    ledger.clear()
    choose(comm, normal((R, V), scale=6), rows)
    assert ledger.sent_bytes(purpose="choose") == (P - 1) * 16 * R
    assert ledger.sent_bytes(purpose="choose totals") == approx(2 * (P - 1) / P * 8 * 4)
    assert ledger.sent_bytes("Allgather", purpose="choose candidates") == (P - 1) * 8 * 10 * 64
    assert ledger.sent_bytes("Allgather", purpose="logprobs") == (P - 1) * 8 * 5 * (1 + 3)
    assert ledger.sent_bytes("Allreduce", purpose="logprobs") == approx(2 * (P - 1) / P * 8 * 5)
    assert ledger.calls() == 5


@pytest.mark.parametrize("settings", [{"top_p": 0.5}, {"min_p": 0.95}], ids=str)
def test_a_prefix_with_gaps_is_not_taken(comm, settings):
    """Rank 0 cannot offer all its large logits at once; what others offer lies behind them."""
    R, V = 50, 999
    logits = np.full((R, V), -20, np.float32)
    logits[:, :150], logits[:, 600:750] = 1, 0.9
    rows = SamplingBatch.make(R, temperature=1, position=np.arange(R), **settings)
    expected = sample.choose(logits, rows)
    assert (expected.token_ids < 600).all() and expected.token_ids.max() > 64
    assert_equal(choose(comm, logits, rows), expected)


def test_candidates_grow_to_the_whole_vocabulary(comm):
    """A flat softmax needs all of it; the ledger says so, and only that row pays."""
    V, P = 5003, comm.size
    logits = normal((3, V), scale=0.01)
    logits[1, 17] = 100
    rows = SamplingBatch.make(3, temperature=[1, 1, 0], top_p=0.99)
    ledger.clear()
    chosen = choose(comm, logits, rows)
    start, stop = partition.block(V, P)[comm.rank]
    assert_equal(chosen, sample.choose(logits, rows))
    widths = [w for w in (64, 512, 4096) if w < partition.counts(partition.block(V, P))[0]]
    sent = (P - 1) * 8 * (2 * widths[0] + sum(widths[1:]))
    assert ledger.sent_bytes(purpose="choose candidates") == sent
    assert ledger.calls(purpose="choose whole") == 1
    assert ledger.sent_bytes(purpose="choose whole") == (P - 1) * 8 * (stop - start)


def test_many_candidates_are_gathered_in_blocks(comm, monkeypatch):
    R, V = 20, 401
    monkeypatch.setattr(candidates, "BLOCK_ITEMS", 1000)
    monkeypatch.setattr(vocabulary, "GATHER_ITEMS", 700)
    logits, rows = normal((R, V)), mixture(R, V)
    assert_equal(choose(comm, logits, rows), sample.choose(logits, rows))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("T", "V"), [(1, 2), (40, 37), (0, 5)])
def test_embed_equals_one_rank(comm, T, V, dtype):
    D = 6
    weight = normal((V, D)).astype(dtype)
    token_ids = np.random.default_rng(4).integers(V, size=T)
    own, start = cut(comm, weight, 0)
    ledger.clear()
    x = vocabulary.embed(comm, token_ids, own, start)
    np.testing.assert_array_equal(x, weight[token_ids].astype(np.float32))
    assert x.dtype == np.float32
    assert ledger.calls() == ledger.calls("Allreduce") == 1
    assert ledger.sent_bytes() == approx(2 * (comm.size - 1) / comm.size * 4 * T * D)


@pytest.mark.parametrize(("R", "V"), [(1, 1), (3, 2), (40, 1003), (0, 5), (2, 200_003)])
def test_log_softmax_equals_one_rank(comm, R, V):
    """Within 1e-6, relatively, of float64: also where the probability is nearly one."""
    logits = normal((R, V), scale=4)
    logits[::2, 0] += 40
    targets = np.random.default_rng(5).integers(V, size=R)
    targets[::2] = 0
    x = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    others = np.exp(x)
    others[np.arange(R), x.argmax(axis=1)] = 0
    expected = x[np.arange(R), targets] - np.log1p(others.sum(axis=1))

    own, start = cut(comm, logits, 1)
    ledger.clear()
    logprobs = vocabulary.log_softmax_of(comm, own, start, targets)
    np.testing.assert_allclose(logprobs, expected, rtol=1e-6, atol=1e-12)
    assert logprobs.dtype == np.float32
    assert ledger.calls() == ledger.calls("Allreduce") == 2
    assert ledger.sent_bytes() == approx(2 * (comm.size - 1) / comm.size * 24 * R)


def test_log_softmax_of_an_id_that_no_rank_owns(comm):
    own, start = cut(comm, normal((2, 10)), 1)
    logprobs = vocabulary.log_softmax_of(comm, own, start, [10, 9])
    assert logprobs[0] == -np.inf and np.isfinite(logprobs[1])


def test_refuses(comm):
    own, start = cut(comm, normal((2, 10)), 1)
    with pytest.raises(ValueError, match="need 0 or more"):
        vocabulary.embed(comm, np.array([1, -1]), own.T, start)
    with pytest.raises(ValueError, match="need 0 or more"):
        vocabulary.log_softmax_of(comm, own, start, np.array([0, -2]))
    with pytest.raises(ValueError, match="need one per row"):
        vocabulary.log_softmax_of(comm, own, start, np.array([0, 1, 2]))
    with pytest.raises(ValueError, match="cut the vocabulary with partition.block"):
        vocabulary.choose(comm, own, start, 10, SamplingBatch.make(3))
    with pytest.raises(ValueError, match="cut the vocabulary with partition.block"):
        vocabulary.choose(comm, own, start + 1, 10, SamplingBatch.make(2))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_refuses_infinite_logits_on_every_rank(comm, value):
    """One rank alone has the bad number; all raise."""
    logits = normal((3, 10))
    logits[2, 7] = value
    for temperature in (0, 1):
        with pytest.raises(ValueError, match="row 2, need a finite logit"):
            choose(comm, logits, SamplingBatch.make(3, temperature=temperature))
