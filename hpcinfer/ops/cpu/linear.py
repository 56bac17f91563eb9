"""Products of activations with 16-bit weights: few rows by own code, many by oneDNN.

With few rows time goes into reading the weights. Each is loaded once for up to eight rows of x, and
the rows of the weight that come next are fetched into the cache meanwhile, so that memory never
waits. From about twenty rows on the products take longer than the reading, and a library that
blocks for all caches is faster.
"""

import numpy as np

from hpcinfer import array
from hpcinfer.ops.activation import Gate
from hpcinfer.ops.cpu import activation, codes, machine, onednn, parts
from hpcinfer.ops.cpu.compile import compiled
from hpcinfer.ops.cpu.rounding import bits, narrowed, prepared
from hpcinfer.ops.cpu.simd import tiles
from hpcinfer.ops.quantize import Quantized

# Rows of x up to which the code here is faster than the library.
FEW = 16

# Rows of x in a tile: as many as leave all sums in registers, of which AVX2 has half as many of
# half the size.
_COLUMNS = 8 if machine.has("avx512f") else 2

# Rows of x, a thread, that the library multiplies at a time: its operands then stay in the caches.
_BLOCK = 512

# Rows of x that the library is given as columns: it arranges anew what it takes as the second
# matrix, and that should not be a weight that few rows meet. They are padded to a multiple of
# another number, as it is fast with some sizes only.
_AS_COLUMNS, _PADDED = range(25, 49), 16
_TURNED_BYTES = 1 << 19  # of such a product, a thread, that are turned at a time

_NONE = np.empty(0, np.float32)

# Bytes of x up to which it stays in the first cache beside what streams through. One row of the
# weight at a time is then read fastest; otherwise two rows share what is loaded of x.
_SMALL = 24 << 10
_ONE_ROW = tiles(1, _COLUMNS, unroll=4, lead=4096)
_TWO_ROWS = tiles(2, _COLUMNS, ahead=2)


def linear(x, weight, bias=None):
    """As `ops.linear.linear`, for 16-bit and quantised weights whose rows are contiguous."""
    if isinstance(weight, Quantized):
        return codes.linear(x, weight, bias)
    if not _serves(x, weight):
        return NotImplemented
    T = len(x)
    if T > FEW and (y := _by_library(x, weight)) is not None:
        return y if bias is None else np.add(y, bias, out=y)
    if T > FEW and not (weight.dtype == array.BFLOAT16 and machine.has("avx512_bf16")):
        return NotImplemented  # NumPy's library on widened weights is faster
    y = np.empty((T, len(weight)), np.float32)
    few_rows(x, weight, y, bias)
    return y


def linear_pair(x, first, middle, second, bias=None):
    """As `ops.linear.linear_pair`, for a gate between products with bfloat16 weights."""
    if type(middle) is not Gate or bias is not None or not _serves(x, first):
        return NotImplemented
    columns = sum(middle.widths)
    hidden = np.empty((len(x), columns), array.BFLOAT16)
    if len(first) != 2 * columns or not _serves(hidden, second) or first.dtype != array.BFLOAT16:
        return NotImplemented
    kernel = activation.kernel_of(middle.function)
    if kernel is None or second.dtype != first.dtype:
        return NotImplemented
    if len(x) > FEW:
        return _pair_by_library(x, first, kernel, middle.widths, second, hidden)
    if array.threads() > 1:
        return NotImplemented  # a part for each thread, one product after the other
    y = np.empty((len(x), len(second)), np.float32)
    tanh, widths = kernel is activation.gelu_tanh, np.array(middle.widths)
    _few_rows_pair(bits(x), first.view(np.uint16), tanh, widths, second.view(np.uint16), y)
    return y


def few_rows(x, weight, y, bias=None):
    """y = x · weightᵀ + bias, each weight read once for eight rows of x: (T, I), (O, I), (T, O)."""
    if weight.dtype == array.BFLOAT16:
        w, x = weight.view(np.uint16), bits(x)
    else:
        w, x = weight.view(np.int16), array.widen(array.narrow(x, weight.dtype))
    parts.over_rows(
        _few_rows, len(w), x, w, y, _NONE if bias is None else bias, work_bytes=weight.nbytes
    )


def _serves(x, weight):
    """True if the functions here know how both lie in memory."""
    if isinstance(weight, Quantized) or weight.dtype.itemsize != 2 or weight.strides[-1] != 2:
        return False
    if x.dtype not in (np.float32, array.BFLOAT16):
        return False
    return bool(x.size and weight.size) and x.shape[1] == weight.shape[1]


def _by_library(x, weight):
    """The product by the library; None if it does not serve the type here."""
    if not onednn.serves(weight.dtype):
        return None
    if len(x) in _AS_COLUMNS:
        y = np.empty((len(x), len(weight)), np.float32)
        return y if _by_columns(weight, _as_columns(x, weight.dtype), y) else None
    x, y = narrowed(x, weight.dtype), np.empty((len(x), len(weight)), np.float32)
    done = all(onednn.product(x[rows], weight.T, y[rows]) for rows in _blocks(len(x)))
    return y if done else None


def _pair_by_library(x, first, kernel, widths, second, hidden):
    """As `linear_pair`, of many rows; what stands between is rounded twice, as `hidden` is."""
    if not onednn.serves(first.dtype):
        return NotImplemented
    if len(x) in _AS_COLUMNS:
        return _pair_of_columns(x, first, kernel, widths, second)
    x, y = narrowed(x, first.dtype), np.empty((len(x), len(second)), np.float32)
    gate_up = np.empty((_BLOCK * array.threads() * 3 // 2, len(first)), first.dtype)
    for rows in _blocks(len(x)):
        of_block = gate_up[: rows.stop - rows.start]
        if not onednn.product(x[rows], first.T, of_block):
            return NotImplemented
        activation.gate_into(kernel, of_block, widths, hidden[rows])
        onednn.multiply(hidden[rows], second.T, y[rows])
    return y


def _pair_of_columns(x, first, kernel, widths, second):
    """As `_pair_by_library` with the rows of x as columns, of which the gate takes no notice."""
    T = _padded(len(x))
    gate_up, hidden = (np.empty((len(w), T), first.dtype) for w in (first, second.T))
    if not onednn.product(first, _as_columns(x, first.dtype), gate_up):
        return NotImplemented
    of_rows = [n * T for n in widths]
    activation.gate_into(kernel, gate_up.reshape(1, -1), of_rows, hidden.reshape(1, -1))
    y = np.empty((len(x), len(second)), np.float32)
    return y if _by_columns(second, hidden, y) else NotImplemented


def _padded(T):
    return -(-T // _PADDED) * _PADDED


def _as_columns(x, dtype):
    """The rows of x, rounded and padded with zeros, as columns: (T, I) -> (I, padded T)."""
    rows = np.zeros((_padded(len(x)), x.shape[1]), dtype)
    rows[: len(x)] = narrowed(x, dtype)
    return rows.T


def _by_columns(weight, x, y):
    """y = (weight · x)ᵀ without the padding, (O, I), (I, padded T), (T, O); False if not served."""
    most = _TURNED_BYTES // (4 * x.shape[1]) * array.threads()
    turned = np.empty((min(most, len(weight)), x.shape[1]), np.float32)
    for start in range(0, len(weight), most):
        rows = weight[start : start + most]
        if not onednn.product(rows, x, turned[: len(rows)]):
            return False
        out = y[:, start : start + len(rows)]
        parts.over_rows(_turn, len(rows), turned, out, work_bytes=out.nbytes)
    return True


@compiled
def _turn(start, stop, turned, y):
    for first in range(start, stop, 16):
        last = min(first + 16, stop)
        for t in range(len(y)):
            for row in range(first, last):
                y[t, row] = turned[row, t]


def _blocks(T):
    """Slices of T rows that the library multiplies faster one by one, none of them much smaller."""
    block, start = _BLOCK * array.threads(), 0
    while start < T:
        stop = T if T - start <= block * 3 // 2 else start + block
        yield slice(start, stop)
        start = stop


@compiled
def _few_rows_pair(x, first, tanh, widths, second, y):
    """Both products and the gate between them, for a few rows of x."""
    T, none = len(x), np.empty(0, np.float32)
    gate_up = np.empty((T, len(first)), np.float32)
    hidden = np.empty((T, second.shape[1]), np.float32)
    _few_rows(0, len(first), x, first, gate_up, none)
    start = 0
    for width in widths:
        block, out = gate_up[:, 2 * start : 2 * (start + width)], hidden[:, start : start + width]
        if tanh:
            activation.gelu_tanh(0, T, block, out)
        else:
            activation.silu(0, T, block, out)
        start += width
    _few_rows(0, len(second), hidden, second, y, none)


@compiled
def _few_rows(start, stop, x, w, y, bias):
    xs = prepared(x, w)
    if xs.size * xs.itemsize <= _SMALL:
        _by_one_row(start, stop, xs, w, y, bias)
        return
    last = stop - (stop - start) % 2
    _by_two_rows(start, last, xs, w, y, bias)
    _by_one_row(last, stop, xs, w, y, bias)


@compiled
def _by_one_row(start, stop, xs, w, y, bias):
    """Rows of a weight times all rows of x.

    A function of its own, as the next, so that xs is held while there is but its address.
    """
    (T, n), x_next, w_next, y_next = xs.shape, xs.strides[0], w.strides[0], y.strides[0]
    for row in range(start, stop):
        at, b = w.ctypes.data + row * w_next, bias.ctypes.data + 4 * row if bias.size else 0
        for t in range(0, T, _COLUMNS):
            x, out = xs.ctypes.data + t * x_next, y.ctypes.data + t * y_next + 4 * row
            _ONE_ROW(min(T - t, _COLUMNS), w, x, x_next, at, w_next, n, out, y_next, b)


@compiled
def _by_two_rows(start, stop, xs, w, y, bias):
    """As `_by_one_row` for two at a time."""
    (T, n), x_next, w_next, y_next = xs.shape, xs.strides[0], w.strides[0], y.strides[0]
    for row in range(start, stop, 2):
        at, b = w.ctypes.data + row * w_next, bias.ctypes.data + 4 * row if bias.size else 0
        for t in range(0, T, _COLUMNS):
            x, out = xs.ctypes.data + t * x_next, y.ctypes.data + t * y_next + 4 * row
            _TWO_ROWS(min(T - t, _COLUMNS), w, x, x_next, at, w_next, n, out, y_next, b)
