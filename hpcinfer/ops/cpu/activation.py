"""The gate of an FFN in one pass."""

import math

import numpy as np

from hpcinfer.ops import activation as plain
from hpcinfer.ops.cpu import parts
from hpcinfer.ops.cpu.compile import compiled
from hpcinfer.ops.cpu.rounding import bits
from hpcinfer.ops.cpu.simd import gate


def gated(gate_up, function, widths):
    """As `ops.activation.gated`, for silu and the tanh form of GELU."""
    kernel = kernel_of(function)
    if kernel is None or gate_up.dtype != np.float32 or gate_up.shape[1] != 2 * sum(widths):
        return NotImplemented
    if gate_up.strides[1] != 4:
        return NotImplemented
    y = parts.empty((len(gate_up), sum(widths)), np.float32)
    gate_into(kernel, gate_up, widths, y)
    return y


def kernel_of(function):
    """The compiled gate of a function, or None."""
    return {plain.silu: silu, plain.gelu_tanh: gelu_tanh}.get(function)


def gate_into(kernel, gate_up, widths, y):
    """Write the gate of (T, 2 F) to y (T, F), rows contiguous, each float32 or bfloat16."""
    start = 0
    for width in widths:
        columns = slice(2 * start, 2 * (start + width))
        blocks = bits(gate_up)[:, columns], bits(y)[:, start : start + width]
        parts.over_rows(kernel, len(y), *blocks, work_bytes=gate_up.nbytes)
        start += width


def _twice_tanh_argument(builder, number, g):
    """2 sqrt(2/π) (g + 0.044715 g³), as (1 + tanh u) / 2 is 1 / (1 + e^-2u)."""
    cubic = builder.fadd(builder.fmul(builder.fmul(g, g), number(0.044715)), number(1))
    return builder.fmul(builder.fmul(g, cubic), number(2 * math.sqrt(2 / math.pi)))


TWICE = {"silu": lambda builder, number, g: g, "gelu_tanh": _twice_tanh_argument}
_SILU, _GELU_TANH = gate(TWICE["silu"]), gate(TWICE["gelu_tanh"])


@compiled
def silu(start, stop, gate_up, y):
    n = y.shape[1]
    for t in range(start, stop):
        row = gate_up.ctypes.data + t * gate_up.strides[0]
        _SILU(gate_up, y, row, n, y.ctypes.data + t * y.strides[0])


@compiled
def gelu_tanh(start, stop, gate_up, y):
    n = y.shape[1]
    for t in range(start, stop):
        row = gate_up.ctypes.data + t * gate_up.strides[0]
        _GELU_TANH(gate_up, y, row, n, y.ctypes.data + t * y.strides[0])
