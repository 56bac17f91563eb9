"""Attention of one rank: blocks, masks, caps, sinks, several sequences; and the merge."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from helpers.ragged import CASES, assert_close, ragged

from hpcinfer.ops import attention as ops

# Nearly to the bit, with 16-bit keys too.
pytestmark = pytest.mark.usefixtures("plain_forms")


@pytest.fixture(params=["default blocks", "small blocks"])
def blocks(request, monkeypatch):
    """Small blocks have whole, hidden and mixed ones in a short sequence."""
    if request.param == "small blocks":
        monkeypatch.setattr(ops, "_ROWS", 8)
        monkeypatch.setattr(ops, "_KEYS", 4)
        monkeypatch.setattr(ops, "_MOST_KEYS", 6)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_oracle(blocks, case):
    case = CASES[case]
    o, lse = case.attend(case.q, case.k, case.v, case.q_tokens, case.k_tokens)
    expected = case.oracle()
    assert o.dtype == lse.dtype == np.float32
    assert_close(o, expected[0])
    assert_close(lse, expected[1])


@pytest.mark.parametrize("case", CASES)
def test_any_order_of_tokens(blocks, case):
    case = CASES[case]
    rng = np.random.default_rng(3)
    q_order, k_order = rng.permutation(len(case.q)), rng.permutation(len(case.k))
    o, lse = case.attend(
        case.q[q_order],
        case.k[k_order],
        case.v[k_order],
        case.q_tokens[q_order],
        case.k_tokens[k_order],
    )
    expected = case.oracle()
    assert_close(o, expected[0][q_order])
    assert_close(lse, expected[1][q_order])


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_positions_in_any_order(blocks, window):
    """`attention` of one sequence takes keys and queries at any positions, sorted or not."""
    case = ragged([40], window=window)
    order = np.random.default_rng(0).permutation(40)[:23]
    part = replace(
        case, q=case.q[::-1], q_tokens=case.q_tokens[::-1],
        k=case.k[order], v=case.v[order], k_tokens=case.k_tokens[order],
    )  # fmt: skip
    o, lse = ops.attention(
        part.q, part.k, part.v, part.q_tokens[:, 1], part.k_tokens[:, 1],
        scale=part.scale, groups=part.groups, window=window,
    )  # fmt: skip
    expected = part.oracle()
    assert_close(o, expected[0])
    assert_close(lse, expected[1])


def test_large_scores_do_not_overflow(blocks):
    case = ragged([40])
    case = replace(case, q=case.q * 300)
    o, lse = case.attend(case.q, case.k, case.v, case.q_tokens, case.k_tokens)
    assert np.isfinite(o).all() and np.isfinite(lse).all() and lse.max() > 200


def test_values_of_another_width(blocks):
    case = ragged([20])
    case = replace(case, v=np.concatenate([case.v, case.v], axis=-1)[..., :11])
    assert_close(
        case.attend(case.q, case.k, case.v, case.q_tokens, case.k_tokens)[0], case.oracle()[0]
    )


def test_no_heads():
    """A rank beyond the last head computes nothing."""
    case = ragged([5])
    o, lse = ops.ragged_attention(
        case.q[:, :0], case.k[:, :0], case.v[:, :0], case.q_tokens, case.k_tokens,
        scale=1.0, groups=(),
    )  # fmt: skip
    assert o.shape == (5, 0, 8) and lse.shape == (5, 0)


def test_no_matrix_of_scores():
    case = ragged([3000], H=1, G=1)
    tracemalloc.start()
    case.attend(case.q, case.k, case.v, case.q_tokens, case.k_tokens)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 3000 * 3000 * 4 / 4


def test_between_is_called_for_every_block(monkeypatch):
    monkeypatch.setattr(ops, "_ROWS", 8)
    monkeypatch.setattr(ops, "_KEYS", 4)
    monkeypatch.setattr(ops, "_MOST_KEYS", 4)
    case = ragged([16], H=2, G=1)
    calls = []
    case.attend(
        case.q, case.k, case.v, case.q_tokens, case.k_tokens, between=lambda: calls.append(1)
    )
    assert len(calls) == 4 + 3 + 2 + 1  # blocks of 4 queries and 4 keys under the diagonal


def test_sink():
    case = ragged([13, 4])
    sink = np.array([-np.inf, -1, 0, 1, 3, 20], np.float32)
    o, lse = case.attend(case.q, case.k, case.v, case.q_tokens, case.k_tokens)
    expected = case.oracle(sink)
    o, lse = ops.with_sink(o, lse, sink)
    assert_close(o, expected[0])
    assert_close(lse, expected[1])


def parts(case, n):
    """Partial results over n parts of the keys, the last one empty: (n, S, H, K), (n, S, H)."""
    cut = [slice(p, len(case.k), n - 1) for p in range(n - 1)] + [slice(0, 0)]
    both = [case.attend(case.q, case.k[c], case.v[c], case.q_tokens, case.k_tokens[c]) for c in cut]
    return tuple(np.stack(x) for x in zip(*both, strict=True))


def test_merge_is_exact_in_any_order():
    case = CASES["several"]
    o, lse = parts(case, 5)
    expected = case.oracle()
    forwards, backwards = (o[0], lse[0]), (o[-1], lse[-1])
    for i in range(1, 5):
        forwards = ops.merge(*forwards, o[i], lse[i])
        backwards = ops.merge(o[-1 - i], lse[-1 - i], *backwards)
    for result in forwards, backwards, ops.merge_all(o, lse):
        assert_close(result[0], expected[0])
        assert_close(result[1], expected[1])


def test_merge_of_nothing():
    o, lse = np.zeros((2, 3, 4), np.float32), np.full((2, 3), -np.inf, np.float32)
    for result in ops.merge(o, lse, o, lse), ops.merge_all(o[None], lse[None]):
        assert not result[0].any() and np.isneginf(result[1]).all()


def test_averaging_is_not_the_merge():
    case = CASES["several"]
    o, _ = parts(case, 3)
    assert abs(o[:2].mean(axis=0) - case.oracle()[0]).max() > 0.1
