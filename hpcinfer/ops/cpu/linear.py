"""Products of activations with 16-bit weights: few rows by own code, many by oneDNN.

With few rows time goes into reading the weights. Each is loaded once for up to eight rows of x, and
the rows of the weight that come next are fetched into the cache meanwhile, so that memory never
waits. From about twenty rows on the products take longer than the reading, and a library that
blocks for all caches is faster.
"""

import numba
import numpy as np
from numba import types
from numba.extending import overload

from hpcinfer import array
from hpcinfer.ops.cpu import machine, onednn, parts
from hpcinfer.ops.cpu.compile import compiled
from hpcinfer.ops.cpu.simd import (
    Bfloat16Pairs,
    bits_of,
    coded_tile,
    float_of,
    kind_of,
    tile,
    widen_codes,
)
from hpcinfer.ops.quantize import LANES, Quantized, place

# Rows of x up to which the code here is faster than the library.
FEW = 16

# Rows of x in a tile: as many as leave all sums in registers, of which AVX2 has half as many of
# half the size.
_COLUMNS = 8 if machine.has("avx512f") else 2

_NONE = np.empty(0, np.float32)

# Tiles of two rows of the weight by 1 to 8 of x; one row is read fastest where x has one row.
_ONE = tile(1, 1, unroll=4)
_T1, _T2, _T3, _T4 = (tile(2, n, ahead=2) for n in (1, 2, 3, 4))
_T5, _T6, _T7, _T8 = (tile(2, n, ahead=2) for n in (5, 6, 7, 8))
_LAST = tile(1, 1)
_FOUR_1, _FOUR_2, _FOUR_4 = (coded_tile(4, n) for n in (1, 2, 4))
_EIGHT_1, _EIGHT_2, _EIGHT_4 = (coded_tile(8, n) for n in (1, 2, 4))
_WIDEN_4, _WIDEN_8 = widen_codes(4), widen_codes(8)

# Rows of a quantised weight that are widened at a time, in bytes of bfloat16.
_WIDENED_BYTES = 1 << 20


def linear(x, weight, bias=None):
    """As `ops.linear.linear`, for 16-bit and quantised weights whose rows are contiguous."""
    if isinstance(weight, Quantized):
        return _by_codes(x, weight, bias)
    if weight.itemsize != 2 or weight.strides[-1] != 2 or not (x.size and weight.size):
        return NotImplemented
    if x.shape[1] != weight.shape[1]:
        return NotImplemented
    T = len(x)
    if T > FEW and (y := _by_library(x, weight)) is not None:
        return y if bias is None else np.add(y, bias, out=y)
    if T > FEW and not (weight.dtype == array.BFLOAT16 and machine.has("avx512_bf16")):
        return NotImplemented  # NumPy's library on widened weights is faster
    y = np.empty((T, len(weight)), np.float32)
    few_rows(x, weight, y, bias)
    return y


def few_rows(x, weight, y, bias=None):
    """y = x · weightᵀ + bias, each weight read once for eight rows of x: (T, I), (O, I), (T, O)."""
    if weight.dtype == array.BFLOAT16:
        w = weight.view(np.uint16)
    else:
        w, x = weight.view(np.int16), array.widen(array.narrow(x, weight.dtype))
    parts.over_rows(
        _few_rows, len(w), x, w, y, _NONE if bias is None else bias, work_bytes=weight.nbytes
    )


def _by_codes(x, weight, bias):
    """The product with a quantised weight."""
    form, T = weight.form, len(x)
    if not (x.size and len(weight)) or x.shape[1] != weight.shape[1]:
        return NotImplemented
    if T > FEW:
        served = form.dtype == array.BFLOAT16 and onednn.serves(form.dtype)
        return _by_widened_rows(x, weight, bias) if served else NotImplemented
    xs, half = place(x, form), form.dtype == array.BFLOAT16
    if half and machine.has("avx512_bf16"):
        xs = narrowed(xs, form.dtype).view(np.uint16)
    else:
        xs = array.widen(array.narrow(xs, form.dtype))
    y = np.empty((T, len(weight)), np.float32)
    parts.over_rows(
        _few_coded_rows, len(weight), xs, weight.words, weight.scales.view(np.uint16),
        form.bits, _shift(form), y, _NONE if bias is None else bias, work_bytes=weight.nbytes,
    )  # fmt: skip
    return y


def _shift(form):
    """2^shift places of a word share a scale."""
    return (form.group // LANES).bit_length() - 1


def _by_widened_rows(x, weight, bias):
    """As `_by_codes` for many rows of x: by the library, on rows of the weight made bfloat16."""
    form = weight.form
    y = np.empty((len(x), len(weight)), np.float32)
    xs = narrowed(place(x, form), form.dtype)
    rows = max(1, _WIDENED_BYTES // (2 * form.width))
    wide = array.large_empty((rows, form.width), form.dtype)
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows]
        of_part = wide[: len(part)]
        parts.over_rows(
            _widen_codes, len(part), part.words, array.widen(part.scales), form.bits, _shift(form),
            of_part.view(np.uint16), work_bytes=of_part.nbytes,
        )  # fmt: skip
        product(xs, of_part.T, y[:, start : start + len(part)])
    return y if bias is None else np.add(y, bias, out=y)


def _by_library(x, weight):
    """The product by the library; None if it does not serve the type here."""
    if not onednn.serves(weight.dtype):
        return None
    y = np.empty((len(x), len(weight)), np.float32)
    return y if onednn.product(narrowed(x, weight.dtype), weight.T, y) else None


def product(a, b, y):
    """y = a · b of 16-bit matrices, by the library or without it."""
    if not onednn.product(a, b, y):
        np.matmul(array.widen(a), array.widen(b), out=y)


def narrowed(x, dtype):
    """x (n, m) float32 rounded to a 16-bit type, nearest even."""
    if dtype != array.BFLOAT16:
        return x.astype(dtype)
    y = np.empty(x.shape, dtype)
    parts.over_rows(narrow_rows, len(x), x, y.view(np.uint16), work_bytes=x.nbytes)
    return y


@compiled
def _few_rows(start, stop, x, w, y, bias):
    xs = _prepared(x, w)
    w_next, bias_at = w.strides[0], bias.ctypes.data if bias.size else 0
    if len(xs) == 1:
        _times_one(start, stop, xs, w, y, bias_at)
        return
    for row in range(start, stop - 1, 2):
        b = bias_at + 4 * row if bias_at else 0
        _two_rows(xs, w, w.ctypes.data + row * w_next, w_next, y, row, b)
    if (stop - start) % 2:
        b = bias_at + 4 * (stop - 1) if bias_at else 0
        _one_row(xs, w, w.ctypes.data + (stop - 1) * w_next, y, stop - 1, b)


@compiled
def _times_one(start, stop, xs, w, y, bias_at):
    """Rows of a weight times one row of x.

    A function of its own, as those below, so that xs is held while there is but its address.
    """
    x, n, w_next = xs.ctypes.data, xs.shape[1], w.strides[0]
    for row in range(start, stop):
        b = bias_at + 4 * row if bias_at else 0
        _ONE(w, x, 0, w.ctypes.data + row * w_next, 0, n, y.ctypes.data + 4 * row, 0, b)


@compiled
def _two_rows(xs, w, w_at, w_next, y, row, b):
    """Two rows of a weight, from address w_at on, times all rows of x; w is there for its type."""
    T, n = xs.shape
    x_next, y_next = xs.strides[0], y.strides[0]
    for t in range(0, T, _COLUMNS):
        x, out = xs.ctypes.data + t * x_next, y.ctypes.data + t * y_next + 4 * row
        columns = min(T - t, _COLUMNS)
        if columns == 8:
            _T8(w, x, x_next, w_at, w_next, n, out, y_next, b)
        elif columns == 1:
            _T1(w, x, x_next, w_at, w_next, n, out, y_next, b)
        elif columns == 2:
            _T2(w, x, x_next, w_at, w_next, n, out, y_next, b)
        elif columns == 3:
            _T3(w, x, x_next, w_at, w_next, n, out, y_next, b)
        elif columns == 4:
            _T4(w, x, x_next, w_at, w_next, n, out, y_next, b)
        elif columns == 5:
            _T5(w, x, x_next, w_at, w_next, n, out, y_next, b)
        elif columns == 6:
            _T6(w, x, x_next, w_at, w_next, n, out, y_next, b)
        else:
            _T7(w, x, x_next, w_at, w_next, n, out, y_next, b)


@compiled
def _one_row(xs, w, w_at, y, row, b):
    """As `_two_rows` for one."""
    T, n = xs.shape
    for t in range(T):
        x, out = xs.ctypes.data + t * xs.strides[0], y.ctypes.data + t * y.strides[0] + 4 * row
        _LAST(w, x, 0, w_at, 0, n, out, 0, b)


@compiled
def _few_coded_rows(start, stop, x, words, scales, bits, shift, y, bias):
    """Codes of a row widened in registers; x as bfloat16's bits or float32."""
    T, blocks, x_next, y_next = len(x), words.shape[1] // LANES, x.strides[0], y.strides[0]
    for row in range(start, stop):
        b = bias.ctypes.data + 4 * row if bias.size else 0
        w = words.ctypes.data + row * words.strides[0]
        s = scales.ctypes.data + row * scales.strides[0]
        t = 0
        while t < T:
            xt, out = x.ctypes.data + t * x_next, y.ctypes.data + t * y_next + 4 * row
            columns = 4 if T - t >= 4 else 2 if T - t >= 2 else 1
            if bits == 4:
                if columns == 4:
                    _FOUR_4(x, xt, x_next, w, s, blocks, shift, out, y_next, b)
                elif columns == 2:
                    _FOUR_2(x, xt, x_next, w, s, blocks, shift, out, y_next, b)
                else:
                    _FOUR_1(x, xt, x_next, w, s, blocks, shift, out, y_next, b)
            elif columns == 4:
                _EIGHT_4(x, xt, x_next, w, s, blocks, shift, out, y_next, b)
            elif columns == 2:
                _EIGHT_2(x, xt, x_next, w, s, blocks, shift, out, y_next, b)
            else:
                _EIGHT_1(x, xt, x_next, w, s, blocks, shift, out, y_next, b)
            t += columns


@compiled
def _widen_codes(start, stop, words, scales, bits, shift, y):
    """Rows start..stop of a quantised weight as bfloat16: y (rows, places) uint16."""
    blocks = words.shape[1] // LANES
    for row in range(start, stop):
        w = words.ctypes.data + row * words.strides[0]
        s, y_at = scales.ctypes.data + row * scales.strides[0], y.ctypes.data + row * y.strides[0]
        if bits == 4:
            _WIDEN_4(w, s, blocks, shift, y_at)
        else:
            _WIDEN_8(w, s, blocks, shift, y_at)


@numba.njit(inline="always")
def bfloat16_bits(value):
    """Bits of a float32 rounded to bfloat16, nearest even."""
    bits = bits_of(value)
    up = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.uint16(up if value == value else np.uint32(0x7FC0))


@compiled
def narrow_rows(start, stop, x, y):
    """Rows start..stop of x (n, m) float32 rounded to bfloat16, nearest even: y uint16."""
    for row in range(start, stop):
        for i in range(x.shape[1]):
            y[row, i] = bfloat16_bits(x[row, i])


def _prepared(x, w):
    """The rows of x as products with w take them, each at the beginning of a line of the cache."""


@overload(_prepared)
def _prepared_of(x, w):
    dtype = np.uint16 if kind_of(w.dtype) is Bfloat16Pairs else np.float32
    round_to = _ROUND[kind_of(w.dtype) is Bfloat16Pairs, w.dtype == types.uint16]

    def prepared(x, w):
        T, n = x.shape
        width = (n + 31) // 32 * 32
        room = np.empty(T * width + 64, dtype)
        first = (-room.ctypes.data % 64) // room.itemsize
        y = room[first : first + T * width].reshape(T, width)[:, :n]
        for t in range(T):
            for i in range(n):
                y[t, i] = round_to(x[t, i])
        return y

    return prepared


@numba.njit(inline="always")
def _rounded(value):
    return float_of(np.uint32(bfloat16_bits(value)) << np.uint32(16))


@numba.njit(inline="always")
def _same(value):
    return value


# By (in pairs, bfloat16): what becomes of a number of x.
_ROUND = {(True, True): bfloat16_bits, (False, True): _rounded, (False, False): _same}
