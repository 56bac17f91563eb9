"""The gate of an FFN in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from hpcinfer.array import Array
from hpcinfer.ops import activation as plain
from hpcinfer.ops.cpu.runtime import launch
from hpcinfer.ops.cpu.runtime.compile import compiled
from hpcinfer.ops.cpu.simd.gate import gate
from hpcinfer.ops.cpu.simd.rounding import bits
from hpcinfer.ops.cpu.simd.vectors import constant


def gated(
    gate_up: Array,
    function: Callable[[Array], Array],
    widths: Sequence[int],
    dtype: np.dtype = np.float32,
) -> Array:
    """As `ops.activation.gated`, for silu and the tanh form of GELU."""
    number = number_of(function)
    if number is None or dtype != np.float32 or gate_up.dtype != np.float32:
        return NotImplemented
    if gate_up.shape[1] != 2 * sum(widths) or gate_up.strides[1] != 4:
        return NotImplemented
    y = launch.empty((len(gate_up), sum(widths)), np.float32)
    gate_into(number, gate_up, widths, y)
    return y


def number_of(function: Callable[[Array], Array]) -> int | None:
    """The number by which compiled functions know a function, or None."""
    return {plain.silu: 0, plain.gelu_tanh: 1}.get(function)


def gate_into(number: int, gate_up: Array, widths: Sequence[int], y: Array) -> None:
    """Write the gate of (T, 2 F) to y (T, F), rows contiguous, each float32 or bfloat16."""
    start = 0
    for width in widths:
        columns = slice(2 * start, 2 * (start + width))
        blocks = bits(gate_up)[:, columns], bits(y)[:, start : start + width]
        launch.over_rows(gate_rows, len(y), *blocks, number, work_bytes=gate_up.nbytes)
        start += width


def _twice_tanh_argument(builder, g):
    """2 sqrt(2/π) (g + 0.044715 g³), as (1 + tanh u) / 2 is 1 / (1 + e^-2u)."""
    cubic = builder.fadd(builder.fmul(builder.fmul(g, g), constant(0.044715)), constant(1))
    return builder.fmul(builder.fmul(g, cubic), constant(2 * math.sqrt(2 / math.pi)))


# By their numbers, what `gate` takes the exponential of.
TWICES = (lambda builder, g: g), _twice_tanh_argument
_GATE = gate(TWICES)


@compiled
def gate_rows(start, stop, gate_up, y, number):
    """Rows start..stop of the gate of one block of columns, (T, 2 F) -> y (T, F)."""
    n = y.shape[1]
    for t in range(start, stop):
        row = gate_up.ctypes.data + t * gate_up.strides[0]
        _GATE(number, gate_up, y, row, n, y.ctypes.data + t * y.strides[0])
