"""Norms, non-linearities and rotary embeddings against their formulae in float64."""

import math

import numpy as np
import pytest

from hpcinfer.ops import activation
from hpcinfer.ops.norm import layer_norm, rms_norm
from hpcinfer.ops.rope import Rope, angles, frequencies, rotate, yarn_magnitude

pytestmark = pytest.mark.single


def normal(shape, seed=0, scale=1.0, mean=0.0):
    return (mean + scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


# --- Norms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (3, 14, 24), (0, 7)])
@pytest.mark.parametrize("eps", [1e-6, 0.02])
@pytest.mark.parametrize(("scale", "mean"), [(1.0, 0.0), (1e-3, 0.0), (30.0, 100.0)])
def test_norms(shape, eps, scale, mean):
    x = normal(shape, 1, scale, mean)
    weight, bias = normal(shape[-1], 2), normal(shape[-1], 3)
    wide = x.astype(np.float64)

    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps) * weight
    np.testing.assert_allclose(rms_norm(x, weight, eps), expected, rtol=2e-6, atol=1e-7)

    centred = wide - wide.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight
    atol = 1e-6 * max(1, abs(mean))
    for given, plus in ((None, 0), (bias, bias)):
        y = layer_norm(x, weight, given, eps)
        np.testing.assert_allclose(y, expected + plus, rtol=2e-6, atol=atol)
        assert y.dtype == np.float32 and y.shape == shape


# --- Activations ---------------------------------------------------------------------------------


def gelu(x):
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


def gelu_tanh(x):
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("silu", silu),
        ("swish", silu),
        ("gelu", gelu),
        ("gelu_new", gelu_tanh),
        ("gelu_fast", gelu_tanh),
        ("gelu_pytorch_tanh", gelu_tanh),
        ("relu", lambda x: max(x, 0.0)),
    ],
)
def test_activations(name, formula):
    x = np.concatenate([np.linspace(-12, 12, 2401), [0, -0.0, 1e-20, 60, -60]]).astype(np.float32)
    y = activation.activation(name)(x)
    np.testing.assert_allclose(y, [formula(float(v)) for v in x], rtol=1e-6, atol=1e-6)
    assert y.dtype == np.float32


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("name", activation.ACTIVATIONS)
def test_activations_of_huge_numbers(name):
    """No NaN where an exponential leaves the range of float32."""
    y = activation.activation(name)(np.array([-3e4, 3e4], np.float32))
    np.testing.assert_array_equal(y, [0, 3e4])


def test_erf():
    x = np.linspace(-6, 6, 4001).astype(np.float32)
    np.testing.assert_allclose(activation.erf(x), [math.erf(v) for v in x], atol=2.1e-7)


def test_unknown_activation():
    with pytest.raises(ValueError, match="activation: got 'snake', need one of gelu, "):
        activation.activation("snake")


@pytest.mark.parametrize("widths", [[5], [2, 3], [0, 4, 1]])
def test_gate_stands_first_in_every_block(widths):
    gate_up, start = normal((3, 10), 1), 0
    expected = []
    for width in widths:
        gate, up = np.split(gate_up[:, start : start + 2 * width], 2, axis=1)
        expected.append(activation.silu(gate) * up)
        start += 2 * width
    result = activation.gated(gate_up, activation.silu, widths)
    np.testing.assert_allclose(result, np.concatenate(expected, axis=1), atol=1e-6)


# --- Rope ----------------------------------------------------------------------------------------

DIM, THETA = 16, 10000.0
PAIR = np.arange(DIM // 2)
PLAIN = THETA ** (-2 * PAIR / DIM)


def yarn(factor, context, fast, slow, truncate):
    """Frequencies of yarn pair by pair, as section 3.4 of its paper has them: arXiv:2309.00071."""

    def pair_of(rotations):
        return DIM * math.log(context / (2 * math.pi * rotations)) / (2 * math.log(THETA))

    low, high = pair_of(fast), pair_of(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, DIM - 1)
    result = []
    for i, plain in zip(PAIR, PLAIN, strict=True):
        interpolated = min(max((i - low) / (high - low), 0), 1)
        result.append(plain / factor * interpolated + plain * (1 - interpolated))
    return result


def llama3(factor, context, low_factor, high_factor):
    """Frequencies of llama3 pair by pair: three bands of wavelengths."""
    result = []
    for plain in PLAIN:
        wavelength = 2 * math.pi / plain
        if wavelength < context / high_factor:
            result.append(plain)
        elif wavelength > context / low_factor:
            result.append(plain / factor)
        else:
            smooth = (context / wavelength - low_factor) / (high_factor - low_factor)
            result.append((1 - smooth) * plain / factor + smooth * plain)
    return result


def dynamic(factor, context, length):
    base = THETA * (factor * length / context - (factor - 1)) ** (DIM / (DIM - 2))
    return base ** (-2 * PAIR / DIM)


SHORT, LONG = tuple(1 + 0.1 * PAIR), tuple(2.0 + PAIR)
ROPE_LONG = Rope("longrope", DIM, THETA, original_context=64, short=SHORT, long=LONG)
ROPE_DYNAMIC = Rope("dynamic", DIM, THETA, factor=4.0, original_context=48)


@pytest.mark.parametrize(
    ("rope", "length", "expected"),
    [
        (Rope("default", DIM, THETA), 5000, PLAIN),
        (Rope("linear", DIM, THETA, factor=4.0), 5000, PLAIN / 4),
        (ROPE_DYNAMIC, 10, PLAIN),
        (ROPE_DYNAMIC, 48, PLAIN),
        (ROPE_DYNAMIC, 49, dynamic(4, 48, 49)),
        (ROPE_DYNAMIC, 200, dynamic(4, 48, 200)),
        (
            Rope("llama3", DIM, THETA, 8.0, 64, low_factor=1.0, high_factor=4.0),
            5000,
            llama3(8, 64, 1, 4),
        ),
        (Rope("yarn", DIM, THETA, 4.0, 2048), 5000, yarn(4, 2048, 32, 1, True)),
        (
            Rope("yarn", DIM, THETA, 3.0, 1024, beta_fast=12, beta_slow=2, truncate=False),
            5000,
            yarn(3, 1024, 12, 2, False),
        ),
        (ROPE_LONG, 64, PLAIN / SHORT),
        (ROPE_LONG, 65, PLAIN / LONG),
    ],
)
def test_frequencies(rope, length, expected):
    result = frequencies(rope, rope.length_class(length))
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_yarn_and_llama3_change_some_pairs_and_leave_others():
    """The oracle above meets all of its bands."""
    for stretched in (yarn(4, 2048, 32, 1, True), llama3(8, 64, 1, 4)):
        ratio = PLAIN / np.array(stretched)
        assert ratio.min() == pytest.approx(1)
        assert ratio.max() > 3.9
        assert ((ratio > 1.01) & (ratio < ratio.max() - 0.01)).any()


def test_yarn_magnitude():
    assert yarn_magnitude(1.0) == yarn_magnitude(0.5) == 1
    assert yarn_magnitude(4.0) == pytest.approx(0.1 * math.log(4) + 1)
    assert yarn_magnitude(4.0, 0.5) == pytest.approx(0.05 * math.log(4) + 1)


@pytest.mark.parametrize("rope", [ROPE_LONG, ROPE_DYNAMIC], ids=lambda rope: rope.kind)
def test_angles_of_texts_of_different_lengths(rope):
    """Tokens of one step have the frequencies of their own text."""
    lengths, positions = [10, 100, 64, 100], np.array([3, 3, 63, 99])
    cos, sin = angles(rope, positions, np.array([rope.length_class(n) for n in lengths]))
    for t, length in enumerate(lengths):
        angle = positions[t] * frequencies(rope, rope.length_class(length)).astype(np.float64)
        np.testing.assert_allclose(cos[t], np.cos(angle), atol=1e-5)
        np.testing.assert_allclose(sin[t], np.sin(angle), atol=1e-5)


def test_magnitude_scales_cosine_and_sine():
    cos, sin = angles(Rope("yarn", DIM, THETA, 4.0, 2048, magnitude=1.5), np.arange(50))
    np.testing.assert_allclose(cos**2 + sin**2, 1.5**2, rtol=1e-5)
    assert cos.dtype == sin.dtype == np.float32 and cos.shape == (50, DIM // 2)


@pytest.mark.parametrize("dim", [4, 16, 24])
def test_rotation_of_pairs(dim):
    """Columns i and i + dim/2 turn as a complex number; columns beyond dim stay."""
    T, H, K = 7, 3, 24
    x, rope = normal((T, H, K)), Rope("default", dim, THETA)
    positions = np.array([0, 1, 2, 50, 100, 101, 1000])
    y = rotate(x, *angles(rope, positions))
    half = dim // 2
    pairs = x[..., :half].astype(np.complex128) + 1j * x[..., half:dim]
    turn = np.exp(1j * positions[:, None] * THETA ** (-2 * np.arange(half) / dim))
    turned = pairs * turn[:, None, :]
    np.testing.assert_allclose(y[..., :half], turned.real, atol=2e-4)
    np.testing.assert_allclose(y[..., half:dim], turned.imag, atol=2e-4)
    np.testing.assert_array_equal(y[..., dim:], x[..., dim:])


def test_scores_depend_on_the_distance_alone():
    rope, q, k = Rope("default", DIM, THETA), normal((1, 1, DIM), 1), normal((1, 1, DIM), 2)

    def score(q_pos, k_pos):
        turned = [rotate(x, *angles(rope, np.array([p]))) for x, p in ((q, q_pos), (k, k_pos))]
        return float((turned[0] * turned[1]).sum())

    assert score(7, 3) == pytest.approx(score(107, 103), abs=1e-4)
    assert abs(score(7, 3) - score(7, 2)) > 1e-2
