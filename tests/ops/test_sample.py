"""Choice of tokens on one rank: random numbers, penalties, filters, ties, log-probabilities."""

import ml_dtypes
import numpy as np
import pytest

from hpcinfer.ops import candidates, penalties, sample
from hpcinfer.ops.random import gumbel, gumbel_range, philox4x32
from hpcinfer.ops.sampling_batch import History, SamplingBatch

pytestmark = pytest.mark.single


def normal(shape, seed=0, scale=3.0):
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


# Counter, key and output of philox4x32-10 from the file kat_vectors of the Random123 library.
KNOWN_ANSWERS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    counter, key, expected = (
        [np.full(3, int(word, 16), np.uint64) for word in text.split()]
        for text in (counter, key, expected)
    )
    np.testing.assert_array_equal(philox4x32(counter, key), expected)


def test_noise_is_a_function_of_the_id_alone():
    """Any range, aligned to four or not, gives the noise of its single ids to the last bit."""
    streams = np.array([[7, 2**63 + 5], [11, 2**64 - 1], [0, 3], [5, 2**32 - 1]], np.uint64)
    ids = np.arange(1003)
    expected = gumbel(*(s[:, None] for s in streams), ids[None])
    for start, stop in [(0, 1003), (1, 2), (5, 5), (6, 1001), (399, 803)]:
        part = gumbel_range(*streams, start, stop)
        np.testing.assert_array_equal(part, expected[:, start:stop])


def test_noise_has_the_gumbel_distribution():
    noise = gumbel(1, 2, 3, 4, np.arange(200_000))
    assert abs(noise.mean() - np.euler_gamma) < 0.01
    assert abs(noise.var() - np.pi**2 / 6) < 0.03
    assert abs(np.mean(noise < 0) - np.exp(-1)) < 0.005
    assert np.isfinite(noise).all()


def test_every_coordinate_changes_the_noise():
    ids = np.arange(64)
    origin = (1, 2, 3, 4)
    streams = [origin]
    for i in range(4):
        streams += [(*origin[:i], origin[i] + 1, *origin[i + 1 :])]
    for i in (0, 1):
        streams += [(*origin[:i], origin[i] + 2**32, *origin[i + 1 :])]
    noises = {gumbel(*map(np.uint64, stream), ids).tobytes() for stream in streams}
    assert len(noises) == len(streams)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [({}, 12), ({"top_k": 5}, 5), ({"temperature": 2.0, "min_p": 0.3}, None)],
)
def test_frequencies_are_those_of_the_softmax(settings, kept):
    R, V = 6000, 12
    settings = {"temperature": 0.8, "seed": 5, "key": 99} | settings
    x = normal(V, seed=3, scale=1.0)
    z = x.astype(np.float64) / settings["temperature"]
    probability = np.exp(z - z.max())
    if kept is None:
        probability[probability < settings["min_p"]] = 0
    else:
        probability[np.argsort(-x)[kept:]] = 0
    probability /= probability.sum()

    rows = SamplingBatch.make(R, position=np.arange(R), **settings)
    drawn = sample.choose(np.broadcast_to(x, (R, V)), rows).token_ids
    count = np.bincount(drawn, minlength=V)
    possible = probability > 0
    assert not count[~possible].any()
    expected = R * probability[possible]
    # The 1e-6 quantile of chi-square with 11 degrees of freedom is 49.
    assert np.sum((count[possible] - expected) ** 2 / expected) < 49


def allowed_ids(x, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """Ids that may be drawn, by loops over a list of (logit, id)."""
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    probability = [np.exp((float(x[i]) - float(x[order[0]])) / temperature) for i in order]
    n = sum(p >= min_p for p in probability)
    n = min(n, top_k) if top_k else n
    if top_p < 1:
        total, before = sum(probability[:n]), 0.0
        for i in range(n):
            if i and before >= top_p * total:
                n = i
                break
            before += probability[i]
    return set(order[:n])


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 1},
        {"top_k": 4},
        {"top_k": 1000},
        {"top_p": 0.0},
        {"top_p": 0.35},
        {"top_p": 0.77},
        {"min_p": 0.25},
        {"min_p": 1.0},
        {"top_k": 6, "top_p": 0.72},
        {"min_p": 0.11, "top_p": 0.81},
        {"min_p": 0.21, "top_k": 5, "top_p": 0.91},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", range(4))
def test_filters_keep_the_right_set(settings, seed):
    """Logits in halves, so that many are equal and the cut often falls among them."""
    R, V = 600, 23
    x = np.round(normal(V, seed, 1.5) * 2) / 2
    rows = SamplingBatch.make(R, temperature=1.3, key=seed, position=np.arange(R), **settings)
    drawn = sample.choose(np.broadcast_to(x, (R, V)), rows).token_ids
    expected = allowed_ids(x, 1.3, **settings)
    likely = {i for i in expected if x[i] > x.max() - 3}
    assert likely <= set(drawn.tolist()) <= expected


def test_greedy_takes_the_lowest_id_of_equals():
    logits = np.array([[0, 2, 2, 1], [-1, -1, -1, -1], [-0.0, 0.0, -0.0, 0.0]], np.float32)
    rows = SamplingBatch.make(3, temperature=[0, 0, 1e-6], top_k=2, top_p=0.5)
    np.testing.assert_array_equal(sample.choose(logits, rows).token_ids, [1, 0, 0])


def test_penalties_as_defined():
    """Repetition over prompt and generated tokens, the others over the generated ones only."""
    x = np.array([[2, -2, 4, 3, -1, 0.5]], np.float32)
    seen = History([0, 1, 1, 0], [2, 2, 1])
    rows = SamplingBatch.make(
        1, history=[seen], banned=[(3, 5)], repetition=2, frequency=0.25, presence=1
    )
    expected = [[1, -4 - 0.25 - 1, 2 - 0.5 - 1, -np.inf, -1, -np.inf]]
    np.testing.assert_array_equal(penalties.penalise(x, 0, rows), expected)
    np.testing.assert_array_equal(x, [[2, -2, 4, 3, -1, 0.5]])


def test_penalties_of_a_part_are_the_part_of_the_penalties():
    R, V = 9, 41
    x = normal((R, V))
    rng = np.random.default_rng(1)
    history = [History(rng.integers(V, size=r), rng.integers(V, size=9)) for r in range(R)]
    history[4] = None
    rows = SamplingBatch.make(
        R,
        history=history,
        banned=[tuple(range(r)) for r in range(R)],
        repetition=rng.uniform(0.5, 2, R),
        presence=rng.normal(size=R),
        frequency=rng.normal(size=R),
    )
    whole = penalties.penalise(x, 0, rows)
    for start, stop in [(0, 20), (20, 41), (7, 7), (40, 41)]:
        part = penalties.penalise(x[:, start:stop], start, rows)
        np.testing.assert_array_equal(part, whole[:, start:stop])


def test_neutral_rows_leave_the_logits_alone():
    x = normal((3, 7))
    assert penalties.penalise(x, 0, SamplingBatch.make(3, history=[None] * 3, banned=[()] * 3)) is x


def test_history_counts_like_a_dictionary():
    rng = np.random.default_rng(2)
    prompt, generated = rng.integers(50, size=20), rng.integers(200, size=500)
    history = History(prompt, generated)
    expected = dict.fromkeys(prompt.tolist(), 0)
    for token_id in generated.tolist():
        expected[token_id] = expected.get(token_id, 0) + 1
    assert dict(zip(history.ids.tolist(), history.counts.tolist(), strict=True)) == expected


def test_logprobs_are_those_of_the_raw_logits():
    R, V = 4, 301
    logits = normal((R, V))
    rows = SamplingBatch.make(
        R, temperature=[0, 2, 2, 0.5], banned=[(int(x.argmax()),) for x in logits],
        logprobs=[-1, 0, 5, 1000], top_k=3,
    )  # fmt: skip
    chosen = sample.choose(logits, rows)
    x = logits.astype(np.float64)
    expected = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    assert np.isnan(chosen.logprobs[0]) and chosen.top[0] is None and chosen.top[1] == []
    for r in (1, 2, 3):
        assert chosen.logprobs[r] == pytest.approx(expected[r, chosen.token_ids[r]], abs=1e-6)
    for r, n in ((2, 5), (3, V)):
        order = np.argsort(-logits[r], kind="stable")[:n]
        assert [i for i, _ in chosen.top[r]] == order.tolist()
        np.testing.assert_allclose([p for _, p in chosen.top[r]], expected[r, order], atol=2e-6)
    assert sample.choose(logits, SamplingBatch.make(R)).top is None


def test_keys_sort_by_logit_then_id():
    x = np.array([3, -np.inf, 0.0, -0.0, -1e-40, 1e-40, 3, -5, np.inf], np.float32)
    ids = np.arange(x.size) + 1000
    keys = np.sort(candidates.pack(x, ids))[::-1]
    values, sorted_ids = candidates.unpack(keys)
    order = sorted(range(x.size), key=lambda i: (-x[i], i))
    np.testing.assert_array_equal(sorted_ids, ids[order])
    np.testing.assert_array_equal(values, x[order])


@pytest.mark.parametrize("V", [1, 1000, 262_144])
def test_weights_sum_the_same_in_any_order(V):
    z = np.random.default_rng(0).uniform(-30, 0, V)
    z[0] = 0
    weights = candidates.weights(z, V)
    assert sum(weights.tolist()) == weights.sum() < 2**62
    total = weights.sum() / candidates.weights(np.zeros(1), V)[0]
    assert total == pytest.approx(np.exp(z).sum(), rel=1e-8)
    assert candidates.weights(np.zeros(1), V)[0] * V < 2**62


def test_result_does_not_depend_on_the_batch():
    R, V = 12, 97
    logits = normal((R, V))
    rows = SamplingBatch.make(
        R, temperature=np.linspace(0, 2, R), top_k=np.arange(R), seed=3, key=np.arange(R) % 5,
        sample=np.arange(R) % 2, position=np.arange(R), banned=[(r,) for r in range(R)],
        history=[History([r]) for r in range(R)], repetition=1.5,
    )  # fmt: skip
    together = sample.choose(logits, rows).token_ids
    order = np.random.default_rng(0).permutation(R)
    np.testing.assert_array_equal(
        sample.choose(logits[order], rows.take(order)).token_ids, together[order]
    )
    alone = [sample.choose(logits[[r]], rows.take([r])).token_ids[0] for r in range(R)]
    np.testing.assert_array_equal(alone, together)


def test_half_precision_logits_are_widened():
    logits = normal((5, 50)).astype(ml_dtypes.bfloat16)
    rows = SamplingBatch.make(5, temperature=1, top_p=0.9, key=np.arange(5))
    expected = sample.choose(logits.astype(np.float32), rows).token_ids
    np.testing.assert_array_equal(sample.choose(logits, rows).token_ids, expected)


@pytest.mark.parametrize(
    "columns",
    [
        {"temperatur": 1},
        {"temperature": [1, 2]},
        {"temperature": -0.1},
        {"temperature": np.nan},
        {"temperature": np.inf},
        {"top_p": 1.1},
        {"min_p": -1},
        {"top_k": -1},
        {"repetition": 0},
        {"seed": -1},
        {"key": 2**64},
        {"key": np.ones(3)},
        {"position": 2**32},
        {"logprobs": "many"},
        {"history": [History([1])]},
        {"banned": [(1,)]},
    ],
    ids=str,
)
def test_rows_refuse(columns):
    with pytest.raises(ValueError, match="^sample: got .* need "):
        SamplingBatch.make(3, **columns)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_refuses_logits_without_a_largest(value):
    logits = np.zeros((2, 4), np.float32)
    logits[1] = value
    with pytest.raises(ValueError, match="row 1, need a finite logit"):
        sample.choose(logits, SamplingBatch.make(2))


def test_refuses_a_row_of_banned_tokens_only():
    with pytest.raises(ValueError, match="every token is banned"):
        sample.choose(np.zeros((1, 2), np.float32), SamplingBatch.make(1, banned=[(0, 1)]))


@pytest.mark.parametrize("width", [0, 1, 5, 29, 30, 64])
def test_top_keys_are_the_largest_also_among_equals(width):
    x = np.round(normal((7, 30), scale=1.0))
    x[2], x[3, 4:] = 0, -np.inf
    index = np.array([6, 0, 2, 3])
    expected = np.sort(candidates.pack(x[index], np.arange(30) + 100), axis=1)[:, ::-1][:, :width]
    keys = candidates.top_keys(x, index, 100, width)
    np.testing.assert_array_equal(np.sort(keys, axis=1)[:, ::-1], expected)
