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
from hpcinfer.ops.cpu import onednn, parts
from hpcinfer.ops.cpu.compile import compiled
from hpcinfer.ops.cpu.simd import Bfloat16Pairs, bits_of, float_of, kind_of, tile

# Rows of x up to which the code here is faster than the library.
FEW = 16

_NONE = np.empty(0, np.float32)

# Tiles of two rows of the weight by 1 to 8 of x; one row is read fastest where x has one row.
_ONE = tile(1, 1, unroll=4)
_T1, _T2, _T3, _T4 = (tile(2, n, ahead=2) for n in (1, 2, 3, 4))
_T5, _T6, _T7, _T8 = (tile(2, n, ahead=2) for n in (5, 6, 7, 8))
_LAST = tile(1, 1)


def linear(x, weight, bias=None):
    """As `ops.linear.linear`, for 16-bit weights whose rows are contiguous."""
    if weight.itemsize != 2 or weight.strides[-1] != 2 or not (x.size and weight.size):
        return NotImplemented
    T = len(x)
    if T > FEW and (y := _by_library(x, weight)) is not None:
        return y if bias is None else np.add(y, bias, out=y)
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


def _by_library(x, weight):
    """The product by the library; None if it does not serve the type here."""
    if not onednn.serves(weight.dtype):
        return None
    y = np.empty((len(x), len(weight)), np.float32)
    return y if onednn.product(narrowed(x, weight.dtype), weight.T, y) else None


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
    T, n = xs.shape
    x_at, x_next, w_next, y_next = xs.ctypes.data, xs.strides[0], w.strides[0], y.strides[0]
    bias_at = bias.ctypes.data if bias.size else 0
    if T == 1:
        for row in range(start, stop):
            b = bias_at + 4 * row if bias_at else 0
            w_at, y_at = w.ctypes.data + row * w_next, y.ctypes.data + 4 * row
            _ONE(w, x_at, x_next, w_at, w_next, n, y_at, y_next, b)
        return

    for row in range(start, stop - 1, 2):
        b = bias_at + 4 * row if bias_at else 0
        w_at = w.ctypes.data + row * w_next
        for t in range(0, T, 8):
            xt, yt, left = x_at + t * x_next, y.ctypes.data + t * y_next + 4 * row, T - t
            if left >= 8:
                _T8(w, xt, x_next, w_at, w_next, n, yt, y_next, b)
            elif left == 1:
                _T1(w, xt, x_next, w_at, w_next, n, yt, y_next, b)
            elif left == 2:
                _T2(w, xt, x_next, w_at, w_next, n, yt, y_next, b)
            elif left == 3:
                _T3(w, xt, x_next, w_at, w_next, n, yt, y_next, b)
            elif left == 4:
                _T4(w, xt, x_next, w_at, w_next, n, yt, y_next, b)
            elif left == 5:
                _T5(w, xt, x_next, w_at, w_next, n, yt, y_next, b)
            elif left == 6:
                _T6(w, xt, x_next, w_at, w_next, n, yt, y_next, b)
            else:
                _T7(w, xt, x_next, w_at, w_next, n, yt, y_next, b)
    if (stop - start) % 2:
        row = stop - 1
        b = bias_at + 4 * row if bias_at else 0
        for t in range(T):
            w_at, y_at = w.ctypes.data + row * w_next, y.ctypes.data + t * y_next + 4 * row
            _LAST(w, x_at + t * x_next, x_next, w_at, w_next, n, y_at, y_next, b)


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
