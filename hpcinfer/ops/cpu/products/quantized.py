"""Products of activations with quantised weights, whose codes are widened in registers or in cache.

Few rows of x meet each code once it is in a register; many meet rows of the weight that were made
bfloat16, some megabytes at a time.
"""

from __future__ import annotations

import numpy as np

from hpcinfer import array, node
from hpcinfer.array import Array
from hpcinfer.ops.cpu import inplace
from hpcinfer.ops.cpu.products import gemm, onednn
from hpcinfer.ops.cpu.runtime import features, launch
from hpcinfer.ops.cpu.runtime.compile import compiled
from hpcinfer.ops.cpu.simd.quantized import (
    BLOCKS,
    MOST,
    MOST_FLOATS,
    arranged,
    quantized_rows,
    quantized_tile,
    widen_codes,
)
from hpcinfer.ops.cpu.simd.rounding import bits, narrowed
from hpcinfer.ops.quantize import LANES, Quantized, place

# Rows of x up to which codes are widened in registers, in pairs of bfloat16 and in float32.
FEW_PAIRS, FEW = 48, 16

# Rows of the weight that all rows of x meet, a few at a time, while they are in the cache.
_ROWS = 32

# How far ahead of the codes in use others are fetched: memory takes as long as reading about this.
_AHEAD_BYTES = 8192

_NONE = np.empty(0, np.float32)

# Rows of a quantised weight that are widened at a time, in bytes of bfloat16.
_WIDENED_BYTES = 2 << 20


def linear(x: Array, weight: Quantized, bias: Array | None) -> Array:
    """As `ops.linear.linear`, for a quantised weight."""
    if not (x.size and len(weight)) or x.shape[1] != weight.shape[1]:
        return NotImplemented
    half = weight.form.dtype == array.BFLOAT16
    if half and features.has("avx512_bf16") and len(x) <= FEW_PAIRS:
        return _by_pairs(x, weight, bias)
    if len(x) <= FEW:
        return _by_float32(x, weight, bias)
    if half and (gemm.serves(weight) or onednn.serves(weight.form.dtype)):
        return _by_widened_rows(x, weight, bias)
    return NotImplemented


def _by_pairs(x, weight, bias):
    """As `linear` for few rows of x, rounded to bfloat16."""
    form, y = weight.form, launch.empty((len(x), len(weight)), np.float32)
    x = np.ascontiguousarray(bits(x if x.dtype == form.dtype else array.widen(x)))
    launch.over_rows(
        _pairs_of_rows, len(weight), x, form.offset, _words(weight), weight.scales.view(np.uint16),
        form.blocks, _shift(form), y, work_bytes=weight.nbytes,
    )  # fmt: skip
    return y if bias is None else inplace.add_into(y, bias)


def _by_float32(x, weight, bias):
    """As `linear` for few rows of x, where it is float32 or there is nothing better."""
    form, y = weight.form, launch.empty((len(x), len(weight)), np.float32)
    xs = array.widen(array.narrow(place(x, form), form.dtype))
    launch.over_rows(
        _single_rows, len(weight), xs, _words(weight), weight.scales.view(np.uint16),
        form.blocks, _shift(form), y, _NONE if bias is None else bias, work_bytes=weight.nbytes,
    )  # fmt: skip
    return y


def _words(weight):
    """The words of a weight, whose type says how many bits a code has: uint16 4, uint8 8."""
    return weight.words.view(np.uint8) if weight.form.bits == 8 else weight.words


def _shift(form):
    """2^shift places of a word share a scale."""
    return (form.group // LANES).bit_length() - 1


def _by_widened_rows(x, weight, bias):
    """As `linear` for many rows of x, which meet rows of the weight made bfloat16."""
    form = weight.form
    y = launch.empty((len(x), len(weight)), np.float32)
    xs = narrowed(place(x, form), form.dtype)
    rows = max(1, _WIDENED_BYTES // (2 * form.width))
    wide = node.large_empty((rows, form.width), form.dtype)
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows]
        of_part = wide[: len(part)]
        launch.over_rows(
            _widen_rows, len(part), _words(part), array.widen(part.scales), form.blocks,
            _shift(form), of_part.view(np.uint16), work_bytes=of_part.nbytes,
        )  # fmt: skip
        _multiply(xs, of_part, y[:, start : start + len(part)])
    return y if bias is None else inplace.add_into(y, bias)


def _multiply(x, weight, y):
    """y = x · weightᵀ, both bfloat16."""
    if gemm.serves(weight):
        operands = bits(x), bits(weight), y
        launch.over_rows(gemm.product, len(x), *operands, work_bytes=weight.nbytes)
    else:
        onednn.multiply(x, weight.T, y)


@compiled
def _arranged_rows(x, offset, blocks, per_word):
    """Rows of x (T, I) as `quantized_rows` wants them, each at the beginning of a cache line."""
    T, width = len(x), (blocks + BLOCKS - 1) // BLOCKS * BLOCKS * LANES * per_word
    room = np.empty(T * width + 32, np.uint16)
    first = (-room.ctypes.data % 64) // 2
    out = room[first : first + T * width].reshape(T, width)
    for t in range(T):
        x_at, out_at = x.ctypes.data + t * x.strides[0], out.ctypes.data + t * out.strides[0]
        arranged(x, x_at, x.shape[1], offset, blocks, per_word, out_at)
    return out


@compiled
def _pairs_of_rows(start, stop, x, offset, words, scales, blocks, shift, y):
    """y[:, start:stop] = x · wᵀ; words as `_words` has them."""
    xs = _arranged_rows(x, offset, blocks, 2 * words.itemsize)
    alone = np.empty((MOST, 2), np.float32)
    for first in range(start, stop, _ROWS):
        pairs = min(stop - first, _ROWS) // 2
        for t in range(0, len(xs), MOST):
            few, out = xs[t : t + MOST], y.ctypes.data + t * y.strides[0] + 4 * first
            _times_some(few, words, scales, first, 1, pairs, blocks, shift, out, y.strides[0])

    # A last row without another meets x as a pair with itself.
    if (stop - start) % 2:
        for t in range(0, len(xs), MOST):
            few, row = xs[t : t + MOST], stop - 1
            _times_some(few, words, scales, row, 0, 1, blocks, shift, alone.ctypes.data, 8)
            y[t : t + MOST, row] = alone[: len(few), 0]


@compiled
def _times_some(x, words, scales, row, step, pairs, blocks, shift, y, y_next):
    """Pairs of rows of a weight, from number `row` on, times up to MOST rows of x."""
    w, w_next = words.ctypes.data + row * words.strides[0], step * words.strides[0]
    s, s_next = scales.ctypes.data + row * scales.strides[0], step * scales.strides[0]
    groups, ahead = scales.shape[1], 2 * max(1, _AHEAD_BYTES // (128 * blocks))
    quantized_rows(
        len(x), words, x.ctypes.data, x.strides[0], w, w_next, s, s_next, pairs, blocks, groups,
        shift, ahead, y, y_next,
    )  # fmt: skip


@compiled
def _single_rows(start, stop, x, words, scales, blocks, shift, y, bias):
    """Codes of a row widened in registers; x float32."""
    T, x_next, y_next = len(x), x.strides[0], y.strides[0]
    for row in range(start, stop):
        b = bias.ctypes.data + 4 * row if bias.size else 0
        w = words.ctypes.data + row * words.strides[0]
        s = scales.ctypes.data + row * scales.strides[0]
        for t in range(0, T, MOST_FLOATS):
            few, xt = min(MOST_FLOATS, T - t), x.ctypes.data + t * x_next
            out = y.ctypes.data + t * y_next + 4 * row
            quantized_tile(few, words, xt, x_next, w, s, blocks, shift, out, y_next, b)


@compiled
def _widen_rows(start, stop, words, scales, blocks, shift, y):
    """Rows start..stop of a quantised weight as bfloat16: y (rows, places) uint16."""
    for row in range(start, stop):
        w = words.ctypes.data + row * words.strides[0]
        s, y_at = scales.ctypes.data + row * scales.strides[0], y.ctypes.data + row * y.strides[0]
        widen_codes(words, w, s, blocks, shift, y_at)
