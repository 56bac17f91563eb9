"""Two products and a gate in one call, and norms that round, against the plain forms."""

import ml_dtypes
import numpy as np
import pytest

from hpcinfer import array, node
from hpcinfer.ops import activation, dispatch, linear, norm

pytestmark = pytest.mark.single

BF16 = np.dtype(ml_dtypes.bfloat16)


def normal(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype)


def relative(got, expected):
    return abs(got - expected).max() / abs(expected).max()


@pytest.mark.parametrize("function", [activation.silu, activation.gelu_tanh])
@pytest.mark.parametrize("widths", [(70,), (33, 37), (64, 0, 6)])
@pytest.mark.parametrize("T", [1, 2, 8, 9, 16, 17, 40, 64, 300, 1300])
def test_the_pair_is_its_parts(function, widths, T):
    gate, columns = activation.Gate(function, widths), sum(widths)
    x = normal((T, 48))
    first, second = normal((2 * columns, 48), 1, BF16), normal((40, columns), 2, BF16)
    expected = linear.linear_pair.plain(x, first, gate, second)
    for given in (x, x.astype(BF16)):
        got = linear.linear_pair(given, first, gate, second)
        assert got.dtype == np.float32 and relative(got, expected) < (1e-5 if T <= 8 else 1e-2)


def test_the_pair_with_threads(monkeypatch):
    monkeypatch.setattr(node, "_threads", 2)
    gate = activation.Gate(activation.silu, (700,))
    first, second = normal((1400, 480), 1, BF16), normal((400, 700), 2, BF16)
    for T in (3, 1100):
        x = normal((T, 480))
        expected = linear.linear_pair.plain(x, first, gate, second)
        assert relative(linear.linear_pair(x, first, gate, second), expected) < 1e-2


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
def test_what_the_fast_pair_does_not_serve_is_served(dtype):
    gate, bias = activation.Gate(activation.relu, (20,)), normal(40, 3)
    first, second = normal((40, 48), 1, dtype), normal((16, 20), 2, dtype)
    for T in (2, 40):
        x = normal((T, 48))
        for middle, b in ((gate, None), (activation.Gate(activation.silu, (20,)), bias)):
            got = linear.linear_pair(x, first, middle, second, b)
            expected = middle(x @ array.widen(first).T + (0 if b is None else b))
            expected = expected @ array.widen(second).T
            assert relative(got, expected) < (1e-5 if dtype == np.float32 else 2e-2)


def test_a_number_that_is_not_finite_stays_so():
    x = normal((40, 48))
    x[3, 5], x[30, 7] = np.nan, np.inf
    gate = activation.Gate(activation.silu, (70,))
    first, second = normal((140, 48), 1, BF16), normal((40, 70), 2, BF16)
    for rows in (slice(0, 8), slice(0, 40)):
        with np.errstate(all="ignore"):
            y = linear.linear_pair(x[rows], first, gate, second)
        finite = np.isfinite(y).all(axis=1)
        assert finite.tolist() == np.isfinite(x[rows]).all(axis=1).tolist()


@pytest.mark.parametrize("weight_dtype", [np.float32, BF16])
@pytest.mark.parametrize("T", [3, 40])
def test_rows_may_be_rounded_before_the_product(weight_dtype, T):
    x, weight = normal((T, 48)).astype(BF16), normal((30, 48), 1, weight_dtype)
    expected = array.widen(x) @ array.widen(weight).T
    for form in (linear.linear, linear.linear.plain):
        assert relative(form(x, weight), expected) < 1e-5


@pytest.mark.parametrize("shape", [(5, 64), (3, 4, 24), (40, 100)])
def test_norms_round_to_the_type_asked_for(shape):
    x, weight, bias = normal(shape), normal(shape[-1], 1), normal(shape[-1], 2)
    for form, parameters in ((norm.rms_norm, (weight,)), (norm.layer_norm, (weight, bias))):
        expected = form.plain(x, *parameters, 1e-5)
        for dtype, bound in ((np.float32, 1e-5), (BF16, 2**-8), (np.float16, 2**-10)):
            got = form(x, *parameters, 1e-5, dtype)
            assert got.dtype == dtype
            assert abs(array.widen(got) - expected).max() <= bound * abs(expected).max()


@pytest.mark.parametrize("inputs", [2, 30, 96, 1000, 4098])
@pytest.mark.parametrize("outputs", [1, 11, 12, 29, 970])
def test_many_rows_of_every_size(inputs, outputs):
    for T in (9, 16, 31, 33, 65, 257):
        x, weight = normal((T, inputs)), normal((outputs, inputs), 1, BF16)
        expected = array.widen(x.astype(BF16)) @ array.widen(weight).T
        got = linear.linear(x, weight)
        assert abs(got - expected).max() <= 1e-5 * np.sqrt(inputs) * abs(expected).max()


def test_rows_of_a_larger_weight_and_columns_of_a_larger_x():
    x, weight = normal((40, 128)).astype(BF16), normal((100, 128), 1, BF16)
    part = weight[20:70, 32:96]
    expected = array.widen(x[:, 32:96]) @ array.widen(part).T
    assert relative(linear.linear(x[:, 32:96], part), expected) < 1e-5


def test_the_first_run_says_that_it_compiles(monkeypatch, tmp_path):
    pytest.importorskip("numba")
    monkeypatch.setenv("HPCINFER_CACHE", str(tmp_path))
    line = dispatch.notice()
    assert line.startswith("compile") and str(tmp_path) in line
    folder = tmp_path / "hpcinfer" / line.rpartition("/")[2]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernel.nbi").touch()
    assert dispatch.notice() is None
