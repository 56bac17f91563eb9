"""The experts of one rank against a loop over tokens: any experts, any columns, any choices."""

import numpy as np
import pytest

from hpcinfer import array
from hpcinfer.ops.activation import gated, silu
from hpcinfer.ops.experts import experts_ffn

pytestmark = pytest.mark.single

T, D, E, F, K = 17, 13, 5, 7, 3


def case(rng, T=T):
    """Tokens, distinct choices of which some are none, weights, and whole experts."""
    x = rng.normal(size=(T, D)).astype(np.float32)
    ids = np.argsort(rng.random((T, E)), axis=1)[:, :K].astype(np.int32)
    ids[rng.random((T, K)) < 0.2] = -1
    weights = rng.random((T, K)).astype(np.float32)
    gate, up = (rng.normal(size=(E, F, D)).astype(np.float32) for _ in range(2))
    down = rng.normal(size=(E, D, F)).astype(np.float32)
    return x, ids, weights, gate, up, down


def compute(x, ids, weights, gate, up, down, experts, columns):
    """`experts_ffn` with some experts and some columns of each."""
    (first, last), (start, stop) = experts, columns
    both = np.concatenate([gate[first:last, start:stop], up[first:last, start:stop]], axis=1)
    down = down[first:last, :, start:stop]
    return experts_ffn(x, ids, weights, both, down, first, lambda h: gated(h, silu, [stop - start]))


def loop(x, ids, weights, gate, up, down, experts, columns):
    """The same, one token and choice after the other, in float64."""
    y, chosen = np.zeros(x.shape), slice(*columns)
    for t in range(len(x)):
        for e, weight in zip(ids[t], weights[t], strict=True):
            if experts[0] <= e < experts[1]:
                a, b = gate[e, chosen] @ x[t].astype(float), up[e, chosen] @ x[t].astype(float)
                y[t] += weight * (down[e][:, chosen] @ (a / (1 + np.exp(-a)) * b))
    return y


@pytest.mark.parametrize("columns", [(0, F), (2, 5), (4, 4)])
@pytest.mark.parametrize("experts", [(0, E), (0, 2), (2, 5), (3, 3), (5, 5)])
def test_equals_a_loop_over_tokens(experts, columns):
    """All experts or some or none, all columns or some or none."""
    parts = case(np.random.default_rng(5))
    y = compute(*parts, experts, columns)
    assert y.shape == (T, D) and y.dtype == np.float32
    np.testing.assert_allclose(y, loop(*parts, experts, columns), rtol=1e-5, atol=1e-5)


def test_parts_add_up():
    """Experts on two ranks, their columns on two more: the four partial sums are the whole."""
    parts = case(np.random.default_rng(6))
    whole = compute(*parts, (0, E), (0, F))
    cut = [compute(*parts, e, c) for e in ((0, 2), (2, E)) for c in ((0, 3), (3, F))]
    np.testing.assert_allclose(sum(cut), whole, rtol=1e-5, atol=1e-5)


def test_no_tokens_and_no_choices():
    parts = case(np.random.default_rng(7), T=0)
    assert compute(*parts, (0, E), (0, F)).shape == (0, D)
    x, ids, *rest = case(np.random.default_rng(7))
    np.testing.assert_array_equal(compute(x, np.full_like(ids, -1), *rest, (0, E), (0, F)), 0)
    no_choice = compute(x, ids[:, :0], rest[0][:, :0], *rest[1:], (0, E), (0, F))
    np.testing.assert_array_equal(no_choice, np.zeros((T, D)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_experts(dtype):
    """Products of rounded operands, summed in float32."""
    kind = array.parse_dtype(dtype)
    x, ids, weights, *experts = case(np.random.default_rng(8))
    rounded = [w.astype(kind) for w in experts]
    y = compute(x, ids, weights, *rounded, (0, E), (0, F))
    full = loop(x, ids, weights, *(w.astype(np.float32) for w in rounded), (0, E), (0, F))
    assert np.abs(y - full).max() < 0.02 * np.abs(full).max()
