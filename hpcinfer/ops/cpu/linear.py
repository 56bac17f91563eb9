"""Products of activations with 16-bit weights: few rows by own code, many by oneDNN.

With few rows time goes into reading the weights. Each is loaded once for up to eight rows of x, and
the rows of the weight that come next are fetched into the cache meanwhile, so that memory never
waits. From about twenty rows on the products take longer than the reading, and a library that
blocks for all caches is faster.
"""

import numpy as np

from hpcinfer import array
from hpcinfer.ops.cpu import codes, machine, onednn, parts
from hpcinfer.ops.cpu.compile import compiled
from hpcinfer.ops.cpu.rounding import narrowed, prepared
from hpcinfer.ops.cpu.simd import tile
from hpcinfer.ops.quantize import Quantized

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


def linear(x, weight, bias=None):
    """As `ops.linear.linear`, for 16-bit and quantised weights whose rows are contiguous."""
    if isinstance(weight, Quantized):
        return codes.linear(x, weight, bias)
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


def _by_library(x, weight):
    """The product by the library; None if it does not serve the type here."""
    if not onednn.serves(weight.dtype):
        return None
    y = np.empty((len(x), len(weight)), np.float32)
    return y if onednn.product(narrowed(x, weight.dtype), weight.T, y) else None


@compiled
def _few_rows(start, stop, x, w, y, bias):
    xs = prepared(x, w)
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
