"""Quantised weights: near what they stand for, the same under every cut, in a file and in a job."""

import ml_dtypes
import numpy as np
import pytest

from hpcinfer.ops import quantize as room
from hpcinfer.ops.linear import linear
from hpcinfer.ops.quantize import Form, Quantized, dequantize, pack, quantize, unpack

BF16, FULL = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
KINDS = [(bits, group) for bits in room.BITS for group in room.GROUPS]

each_kind = pytest.mark.parametrize(("bits", "group"), KINDS)


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def packed(codes, scales, bits, group, offset=0, dtype=FULL):
    """Codes (..., O, I) with the scales of the groups in which they lie, as a weight in memory."""
    form = Form(bits, group, codes.shape[-1], offset, dtype)
    padded = np.zeros((*codes.shape[:-1], form.groups), np.float16)
    padded[..., : scales.shape[-1]] = scales
    return Quantized(form, pack(codes, bits, offset), padded)


def weight_of(shape, bits, group, dtype=FULL):
    return packed(*quantize(normal(shape), bits, group), bits, group, dtype=dtype)


@pytest.mark.single
@each_kind
@pytest.mark.parametrize("n_in", [1, 31, 32, 100, 128, 300])
def test_no_number_is_off_by_more_than_its_group_allows(bits, group, n_in):
    weight = normal((7, n_in))
    weight[3] = 0
    codes, scales = quantize(weight, bits, group)
    step = np.repeat(scales.astype(np.float32), group, axis=1)[:, :n_in]
    error = np.abs(codes * step - weight)
    assert not error[3].any() and np.abs(codes).max() <= (8 if bits == 4 else 127)
    if bits == 8:
        assert (error <= np.abs(step) * 0.5001).all()
    else:
        starts = np.arange(0, n_in, group)
        largest = np.maximum.reduceat(np.abs(weight), starts, axis=1)
        plain = np.repeat(largest / 7, group, axis=1)[:, :n_in] + 1e-30
        plain_error = np.rint(weight / plain) * plain - weight
        squares = [np.add.reduceat(e * e, starts, axis=1) for e in (error, plain_error)]
        assert (squares[0] <= squares[1] * 1.01 + 1e-6 * largest**2).all()


@pytest.mark.single
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1e4])
@pytest.mark.parametrize("bits", room.BITS)
def test_small_and_large_weights_keep_their_precision(bits, size):
    """Scales of float16 end at 6e-8: weights of 1e-6 lose, but not all."""
    weight = normal((4, 64)) * np.float32(size)
    codes, scales = quantize(weight, bits, 32)
    error = codes * np.repeat(scales.astype(np.float32), 32, axis=1) - weight
    bound = {4: 0.6, 8: 0.02}[bits] * size + 4e-6
    assert np.abs(error).max() < bound


@pytest.mark.single
@pytest.mark.parametrize("bits", room.BITS)
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_what_no_scale_reaches_is_refused(bits, value):
    weight = normal((2, 64))
    weight[1, 40] = value
    with pytest.raises(ValueError, match="quantize: got a weight of"):
        quantize(weight, bits, 32)


@pytest.mark.single
@each_kind
@pytest.mark.parametrize("offset", [0, 1, 29])
@pytest.mark.parametrize("n_in", [1, 63, 256, 301])
def test_packed_codes_come_back(bits, group, n_in, offset):
    rng = np.random.default_rng(1)
    codes = rng.integers(-(1 << bits - 1), 1 << bits - 1, (2, 3, n_in)).astype(np.int8)
    words = pack(codes, bits, offset)
    places = unpack(words, bits)
    np.testing.assert_array_equal(places[..., offset : offset + n_in], codes)
    assert not places[..., :offset].any() and not places[..., offset + n_in :].any()
    stored = room.to_bytes(codes[0], bits)
    assert stored.nbytes == 3 * -(-n_in * bits // 8)
    np.testing.assert_array_equal(room.from_bytes(stored, bits, 0, n_in), codes[0])


@pytest.mark.single
def test_the_order_of_a_block():
    """Place i of word j holds input 32 i + j, the lowest bits first."""
    for bits, mask in ((4, 15), (8, 255)):
        codes = np.random.default_rng(2).integers(-8, 8, (1, 512)).astype(np.int8)
        words, per_word = pack(codes, bits)[0], 16 // bits
        for at, code in enumerate(codes[0]):
            block, place = divmod(at, 32 * per_word)
            word = words[32 * block + place % 32]
            assert int(word) >> bits * (place // 32) & mask == int(code) & mask


@pytest.mark.single
@each_kind
@pytest.mark.parametrize("dtype", [FULL, BF16])
@pytest.mark.parametrize("T", [0, 1, 5])
def test_linear_is_the_product_with_what_it_stands_for(bits, group, dtype, T):
    weight, x, bias = weight_of((40, 300), bits, group, dtype), normal((T, 300), 1), normal(40, 2)
    y = linear.plain(x, weight, bias)
    oracle = x.astype(dtype).astype(float) @ dequantize(weight).astype(float).T + bias
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, oracle, rtol=0, atol=1e-4)
    np.testing.assert_allclose(linear(x, weight, bias), oracle, rtol=0, atol=1e-4)


@pytest.mark.single
@each_kind
def test_any_columns_are_those_of_the_whole(bits, group):
    """Cut at load, cut as a view, and a view of a cut: the same numbers, bit by bit."""
    n_in = 420
    codes, scales = quantize(normal((3, n_in)), bits, group)
    whole = packed(codes, scales, bits, group)
    dense = dequantize(whole)
    cuts = np.random.default_rng(3).integers(0, n_in + 1, (60, 2))
    for start, stop in [(0, n_in), (7, 7), *np.sort(cuts, axis=1)]:
        view = whole[:, start:stop]
        assert (
            view.shape == (3, stop - start)
            and np.shares_memory(view.words, whole.words)
            or (start == stop)
        )
        np.testing.assert_array_equal(dequantize(view), dense[:, start:stop])
        first = start // group
        own = packed(
            codes[:, start:stop], scales[:, first : -(-stop // group)], bits, group, start % group
        )
        np.testing.assert_array_equal(dequantize(own), dense[:, start:stop])
        part = own[..., 1 : (stop - start) // 2]
        np.testing.assert_array_equal(
            dequantize(part), dense[:, start:stop][:, 1 : (stop - start) // 2]
        )
        x = normal((2, stop - start))
        np.testing.assert_allclose(linear(x, view), x @ dense[:, start:stop].T, rtol=0, atol=2e-4)
        placed = room.place(x, view.form)
        wide = (
            unpack(view.words, bits)
            * np.repeat(view.scales.astype(np.float32), group, axis=1)[:, : view.form.width]
        )
        np.testing.assert_allclose(placed @ wide.T, x @ dense[:, start:stop].T, atol=2e-4)


@pytest.mark.single
@each_kind
def test_rows_and_experts_are_taken_as_from_an_array(bits, group):
    codes, scales = quantize(normal((4 * 6, 70)), bits, group)
    weight = packed(codes.reshape(4, 6, 70), scales.reshape(4, 6, -1), bits, group)
    dense = dequantize(weight)
    assert weight.shape == dense.shape == (4, 6, 70) and len(weight) == 4
    assert weight.nbytes == weight.words.nbytes + weight.scales.nbytes
    whole = slice(None)
    for index in (2, slice(1, 3), (..., slice(2, 5), whole), (..., slice(9, 50)), (1, slice(0, 2))):
        np.testing.assert_array_equal(dequantize(weight[index]), dense[index])
    with pytest.raises(ValueError, match="neighbours"):
        weight[..., ::2]
