"""Products with weights of every type, against float64."""

import ml_dtypes
import numpy as np
import pytest

from hpcinfer.ops import linear as room
from hpcinfer.ops.linear import linear

pytestmark = pytest.mark.single

BF16 = np.dtype(ml_dtypes.bfloat16)


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def oracle(x, weight, bias=None):
    """The product in float64, of x as it meets the weight: rounded to its type."""
    y = x.astype(weight.dtype).astype(np.float64) @ weight.astype(np.float64).T
    return y if bias is None else y + bias


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize(("T", "O", "width"), [(1, 1, 1), (1, 33, 70), (5, 7, 3), (17, 130, 257)])
@pytest.mark.parametrize("biased", [False, True])
def test_equals_float64(T, O, width, dtype, biased):  # noqa: E741
    x, weight = normal((T, width), 1), normal((O, width), 2).astype(dtype)
    bias = normal(O, 3) if biased else None
    y = linear(x, weight, bias)
    assert y.dtype == np.float32 and y.shape == (T, O)
    np.testing.assert_allclose(y, oracle(x, weight, bias), rtol=0, atol=2e-6 * width)


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize(("T", "O", "width"), [(0, 4, 3), (4, 0, 3), (4, 5, 0)])
def test_empty_axes(T, O, width, dtype):  # noqa: E741
    """A rank without columns multiplies with nothing; an empty inner axis adds nothing."""
    y = linear(normal((T, width)), normal((O, width)).astype(dtype), normal(O, 3))
    np.testing.assert_array_equal(y, np.broadcast_to(normal(O, 3), (T, O)))


@pytest.mark.parametrize("dtype", [np.float16, BF16])
def test_half_weights_are_summed_in_float32(dtype):
    """4096 ones: bfloat16 counts to 256, float16 to 2048."""
    ones = np.ones((1, 4096), dtype)
    np.testing.assert_array_equal(linear(np.ones((2, 4096), np.float32), ones), 4096)


@pytest.mark.parametrize("dtype", [np.float16, BF16])
def test_blocks_of_rows_make_the_whole(dtype, monkeypatch):
    """A block may hold one row only, even if that is longer than a block."""
    x, weight = normal((3, 50), 1), normal((23, 50), 2).astype(dtype)
    whole = linear(x, weight)
    for block_bytes in (1, 4 * 50 * 4, 4 * 50 * 23):
        monkeypatch.setattr(room, "_BLOCK_BYTES", block_bytes)
        np.testing.assert_allclose(linear(x, weight), whole, rtol=0, atol=1e-4)


def test_arguments_stay_as_they_are():
    x, weight, bias = normal((3, 4)), normal((5, 4)), normal(5)
    copies = x.copy(), weight.copy(), bias.copy()
    linear(x, weight, bias)
    for now, before in zip((x, weight, bias), copies, strict=True):
        np.testing.assert_array_equal(now, before)
