"""Rounding of float32 numbers to what products take."""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload

from hpcinfer import array
from hpcinfer.array import Array
from hpcinfer.ops.cpu.runtime import launch
from hpcinfer.ops.cpu.runtime.compile import compiled, inlined
from hpcinfer.ops.cpu.simd.vectors import Bfloat16Pairs, bits_of, float_of, kind_of


def bits(x: Array) -> Array:
    """An array as compiled functions know its type: bfloat16 as uint16, float16 as int16."""
    if x.dtype == array.BFLOAT16:
        return x.view(np.uint16)
    return x.view(np.int16) if x.dtype == np.float16 else x


def narrowed(x: Array, dtype: np.dtype) -> Array:
    """x (n, m) float32 rounded to a 16-bit type, nearest even; as it is if it has the type."""
    if x.dtype != np.float32 or dtype != array.BFLOAT16:
        return array.narrow(array.widen(x) if x.dtype != dtype else x, dtype)
    y = launch.empty(x.shape, dtype)
    launch.over_rows(narrow_rows, len(x), x, y.view(np.uint16), work_bytes=x.nbytes)
    return y


@inlined
def bfloat16_bits(value):
    """Bits of a float32 rounded to bfloat16, nearest even."""
    bits = bits_of(value)
    up = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.uint16(up if value == value else np.uint32(0x7FC0))


def as_item(value, y):
    """A float32 as an item of y: rounded to bfloat16's bits where those are uint16."""


@overload(as_item, inline="always")
def _as_item(value, y):
    if y.dtype == types.uint16:
        return lambda value, y: bfloat16_bits(value)
    return lambda value, y: value


@compiled
def narrow_rows(start, stop, x, y):
    """Rows start..stop of x (n, m) float32 rounded to bfloat16, nearest even: y uint16."""
    for row in range(start, stop):
        for i in range(x.shape[1]):
            y[row, i] = bfloat16_bits(x[row, i])


def prepared(x, w):
    """The rows of x as products with w take them, each at the beginning of a line of the cache."""


@overload(prepared)
def _prepared_as(x, w):
    # Say what a number of x becomes where it meets this type of weight.
    dtype = np.uint16 if kind_of(w.dtype) is Bfloat16Pairs else np.float32
    round_to = _ROUND[kind_of(w.dtype) is Bfloat16Pairs, w.dtype == types.uint16]
    if x.dtype == types.uint16:
        round_to = _same if kind_of(w.dtype) is Bfloat16Pairs else _widened

    def rounded_rows(x, w):
        T, n = x.shape
        width = (n + 31) // 32 * 32
        room = np.empty(T * width + 64, dtype)
        first = (-room.ctypes.data % 64) // room.itemsize
        y = room[first : first + T * width].reshape(T, width)[:, :n]
        for t in range(T):
            for i in range(n):
                y[t, i] = round_to(x[t, i])
        return y

    return rounded_rows


@inlined
def _rounded(value):
    return float_of(np.uint32(bfloat16_bits(value)) << np.uint32(16))


@inlined
def _widened(bits_of_value):
    return float_of(np.uint32(bits_of_value) << np.uint32(16))


@inlined
def _same(value):
    return value


# By (in pairs, bfloat16): what becomes of a number of x.
_ROUND = {(True, True): bfloat16_bits, (False, True): _rounded, (False, False): _same}
