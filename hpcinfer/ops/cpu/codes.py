"""Products of activations with quantised weights, whose codes are widened in registers or in cache.

Few rows meet each code once it is in a register; many meet rows of the weight that were made
bfloat16 a megabyte at a time, by oneDNN.
"""

import numpy as np

from hpcinfer import array
from hpcinfer.ops.cpu import machine, onednn, parts
from hpcinfer.ops.cpu.compile import compiled
from hpcinfer.ops.cpu.rounding import narrowed
from hpcinfer.ops.cpu.simd import coded_tile, widen_codes
from hpcinfer.ops.quantize import LANES, place

# Rows of x up to which the code here is faster than the library.
FEW = 16

_NONE = np.empty(0, np.float32)

_FOUR_1, _FOUR_2, _FOUR_4 = (coded_tile(4, n) for n in (1, 2, 4))
_EIGHT_1, _EIGHT_2, _EIGHT_4 = (coded_tile(8, n) for n in (1, 2, 4))
_WIDEN_4, _WIDEN_8 = widen_codes(4), widen_codes(8)

# Rows of a quantised weight that are widened at a time, in bytes of bfloat16.
_WIDENED_BYTES = 1 << 20


def linear(x, weight, bias):
    """As `ops.linear.linear`, for a quantised weight."""
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
    """As `linear` for many rows of x: by the library, on rows of the weight made bfloat16."""
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
        onednn.multiply(xs, of_part.T, y[:, start : start + len(part)])
    return y if bias is None else np.add(y, bias, out=y)


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
