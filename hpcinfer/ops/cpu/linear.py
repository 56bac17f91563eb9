"""Products of activations with weights: gemv for few rows of x, gemm for many of 16 bits.

With few rows time goes into reading the weights. Each is loaded once for up to eight rows of x, and
the rows of the weight that come next are fetched into the cache meanwhile, so that memory never
waits. From about ten rows on the products take longer than the reading: `products.gemm` then has x
in the lanes, for bfloat16. Other types, and all where there are matrix units (AMX), are multiplied
by oneDNN; quantised weights by `products.quantized`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from hpcinfer import array, capture, node
from hpcinfer.array import Array
from hpcinfer.ops.activation import Gate
from hpcinfer.ops.cpu import activation, inplace
from hpcinfer.ops.cpu.products import gemm, onednn, quantized
from hpcinfer.ops.cpu.runtime import features, launch
from hpcinfer.ops.cpu.runtime.compile import compiled
from hpcinfer.ops.cpu.simd.gemv import tiles
from hpcinfer.ops.cpu.simd.rounding import bits, narrowed, prepared
from hpcinfer.ops.quantize import Quantized

# Rows of x up to which `gemv` is faster than `products.gemm`, and than the library.
FEW, _FEW_FOR_LIBRARY = 8, 16

# Rows of x in a tile: as many as leave all sums in registers, of which AVX2 has half as many of
# half the size.
_COLUMNS = 8 if features.has("avx512f") else 2

# Rows of x, a thread, that the library multiplies at a time: its operands then stay in the caches.
_BLOCK = 512

_NONE = np.empty(0, np.float32)

# Bytes of x up to which it stays in the first cache beside what streams through. One row of the
# weight at a time is then read fastest; otherwise two rows share what is loaded of x.
_SMALL = 24 << 10
_ONE_ROW = tiles(1, _COLUMNS, unroll=4, lead=4096)
_TWO_ROWS = tiles(2, _COLUMNS, ahead=2)


def linear(x: Array, weight: Array | Quantized, bias: Array | None = None) -> Array:
    """As `ops.linear.linear`, for weights whose rows are contiguous; many rows of 16 bits alone."""
    if isinstance(weight, Quantized):
        return quantized.linear(x, weight, bias)
    if not _serves(x, weight):
        return NotImplemented
    if not _are_few(x, weight):
        if weight.dtype == np.float32:
            return NotImplemented
        y = _gemm(x, weight)
        if y is None:
            return NotImplemented
        return y if bias is None else inplace.add_into(y, bias)
    y = launch.empty((len(x), len(weight)), np.float32)
    gemv(x, weight, y, bias)
    return y


def linear_pair(
    x: Array,
    first: Array | Quantized,
    between: Callable[[Array], Array],
    second: Array | Quantized,
    bias: Array | None = None,
) -> Array:
    """As `ops.linear.linear_pair`, for a gate between products with bfloat16 weights."""
    if type(between) is not Gate or activation.number_of(between.function) is None:
        return NotImplemented
    if bias is not None or not _serves(x, first) or first.dtype != array.BFLOAT16:
        return NotImplemented
    if isinstance(second, Quantized) or second.dtype != first.dtype or not second.size:
        return NotImplemented
    if second.strides[1] != 2 or not len(first) == 2 * second.shape[1] == 2 * sum(between.widths):
        return NotImplemented
    if _are_few(x, first):
        return NotImplemented  # each product alone takes as long as its reading
    return _gemm_pair(x, first, between, second)


def gemv(x: Array, weight: Array, y: Array, bias: Array | None = None) -> None:
    """y = x · weightᵀ + bias, each weight read once for eight rows of x: (T, I), (O, I), (T, O)."""
    if weight.dtype == array.BFLOAT16:
        x = bits(x)
    else:
        x = array.widen(array.narrow(x, np.float16) if weight.dtype == np.float16 else x)
    bias = _NONE if bias is None else bias
    launch.over_rows(gemv_rows, len(weight), x, bits(weight), y, bias, work_bytes=weight.nbytes)


def _serves(x, weight):
    """True if the functions here know how both lie in memory."""
    if isinstance(weight, Quantized) or weight.strides[-1] != weight.itemsize:
        return False
    if x.dtype not in (np.float32, array.BFLOAT16):
        return False
    return bool(x.size and weight.size) and x.shape[1] == weight.shape[1]


def _are_few(x, weight):
    """True if the rows of x are too few for what many of them would meet."""
    return len(x) <= (FEW if gemm.serves(weight) else _FEW_FOR_LIBRARY)


def _gemm(x, weight):
    """The product of many rows, or None where NumPy's library on widened weights is faster."""
    own = gemm.serves(weight)
    if not own and not onednn.serves(weight.dtype):
        return None
    x, y = _rows(x, weight), launch.empty((len(x), len(weight)), np.float32)
    if own:
        w = weight.view(np.uint16)
        launch.over_rows(gemm.product, len(x), bits(x), w, y, work_bytes=weight.nbytes)
        return y
    done = all(onednn.product(x[rows], weight.T, y[rows]) for rows in _blocks(len(x)))
    return y if done else None


def _gemm_pair(x, first, between, second):
    """As `linear_pair` of many rows; what stands between is rounded as x is."""
    own = gemm.serves(first) and not any(width % 2 for width in between.widths)
    if not own and not onednn.serves(first.dtype):
        return NotImplemented
    # Let one kernel have both products and the gate, where it knows the weights.
    function = activation.number_of(between.function)
    x, y = _rows(x, first), launch.empty((len(x), len(second)), np.float32)
    if own:
        launch.over_rows(
            gemm.pair, len(x), bits(x), first.view(np.uint16), function,
            _widths(between.widths), second.view(np.uint16), y, work_bytes=first.nbytes,
        )  # fmt: skip
        return y

    # Else the library multiplies, some rows at a time.
    for rows in _blocks(len(x)):
        gate_up = np.empty((rows.stop - rows.start, len(first)), first.dtype)
        if not onednn.product(x[rows], first.T, gate_up):
            return NotImplemented
        hidden = np.empty((len(gate_up), second.shape[1]), first.dtype)
        activation.gate_into(function, gate_up, between.widths, hidden)
        onednn.multiply(hidden, second.T, y[rows])
    return y


@cache
def _widths(widths):
    """Widths of the blocks of a gate as an array."""
    return capture.constant(np.array(widths))


def _rows(x, weight):
    """x rounded to the weight's type, each row contiguous."""
    return np.ascontiguousarray(narrowed(x, weight.dtype))


def _blocks(T):
    """Slices of T rows that the library multiplies faster one by one, none of them much smaller."""
    block, start = _BLOCK * node.threads(), 0
    while start < T:
        stop = T if T - start <= block * 3 // 2 else start + block
        yield slice(start, stop)
        start = stop


@compiled
def gemv_rows(start, stop, x, w, y, bias):
    """Columns start..stop of y = x · wᵀ + bias; no bias if it is empty."""
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
