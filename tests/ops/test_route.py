"""The router against a loop over tokens: scores, groups, corrections, ties."""

import numpy as np
import pytest

from hpcinfer.ops.route import Router, route

pytestmark = pytest.mark.single

ROUTERS = {
    "softmax": Router(3),
    "normalised": Router(2, normalise=True),
    "scaled": Router(4, scale=2.5),
    "groups": Router(3, groups=3, top_groups=2, scale=1.5),
    "sigmoid": Router(3, score="sigmoid", normalise=True),
    "corrected": Router(
        4, "sigmoid", True, 2.5, groups=3, top_groups=2, group_score="top2", corrected=True
    ),
    "all": Router(9, normalise=True),
}


def one_token(router, logits, bias):
    """Choices and weights of one token, in float64, step by step."""
    logits = logits.astype(np.float64)
    if router.score == "softmax":
        scores = np.exp(logits - logits.max())
        scores /= scores.sum()
    else:
        scores = 1 / (1 + np.exp(-logits))
    choice = scores + (0 if bias is None else bias)
    size = len(logits) // router.groups
    groups = [sorted(choice[g * size : (g + 1) * size], reverse=True) for g in range(router.groups)]
    kept = 2 if router.group_score == "top2" else 1
    best = sorted(range(router.groups), key=lambda g: (-sum(groups[g][:kept]), g))
    best = best[: router.top_groups] if router.groups > 1 else best
    allowed = [e for e in range(len(logits)) if e // size in best]
    ids = sorted(allowed, key=lambda e: (-choice[e], e))[: router.k]
    weights = scores[ids]
    if router.normalise:
        weights = weights / weights.sum()
    return ids, weights * router.scale


@pytest.mark.parametrize("T", [0, 1, 23])
@pytest.mark.parametrize("name", ROUTERS)
def test_equals_a_loop_over_tokens(name, T):
    router, rng = ROUTERS[name], np.random.default_rng(3)
    logits = rng.normal(0, 2, (T, 9)).astype(np.float32)
    bias = rng.normal(0, 0.3, 9).astype(np.float32) if router.corrected else None
    ids, weights = route(logits, router, bias)
    assert ids.shape == weights.shape == (T, router.k)
    assert ids.dtype == np.int32 and weights.dtype == np.float32
    for t in range(T):
        expected_ids, expected = one_token(router, logits[t], bias)
        assert ids[t].tolist() == expected_ids
        np.testing.assert_allclose(weights[t], expected, rtol=2e-6)


def test_ties_go_to_the_lowest_number():
    ids, weights = route(np.zeros((2, 8), np.float32), Router(3))
    assert ids.tolist() == [[0, 1, 2]] * 2
    np.testing.assert_allclose(weights, 1 / 8)
    ids, _ = route(np.zeros((1, 8), np.float32), Router(3, groups=4, top_groups=2))
    assert ids.tolist() == [[0, 1, 2]]


def test_a_correction_moves_the_choice_and_not_the_weight():
    logits = np.array([[2, 1, 0, -1]], np.float32)
    router = Router(1, "sigmoid", corrected=True)
    ids, weights = route(logits, router, np.array([0, 0, 0, 1], np.float32))
    assert ids.tolist() == [[3]]
    np.testing.assert_allclose(weights, 1 / (1 + np.exp(1)), rtol=1e-6)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_extreme_logits_give_finite_weights(score):
    logits = np.array([[-300, 300, 0, 300]], np.float32)
    with np.errstate(all="raise", under="ignore"):
        ids, weights = route(logits, Router(2, score, normalise=True))
    assert ids.tolist() == [[1, 3]]
    np.testing.assert_allclose(weights, 0.5)
