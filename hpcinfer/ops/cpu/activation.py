"""The gate of an FFN in one pass."""

import math

import numpy as np

from hpcinfer.ops import activation as plain
from hpcinfer.ops.cpu import parts
from hpcinfer.ops.cpu.compile import compiled
from hpcinfer.ops.cpu.simd import exp

_TWICE_ROOT = np.float32(2 * math.sqrt(2 / math.pi))
_CUBIC = np.float32(0.044715)


def gated(gate_up, function, widths):
    """As `ops.activation.gated`, for silu and the tanh form of GELU."""
    kernel = {plain.silu: _silu, plain.gelu_tanh: _gelu_tanh}.get(function)
    if kernel is None or gate_up.dtype != np.float32 or gate_up.shape[1] != 2 * sum(widths):
        return NotImplemented
    y = np.empty((len(gate_up), sum(widths)), np.float32)
    start = 0
    for width in widths:
        blocks = gate_up[:, 2 * start : 2 * (start + width)], y[:, start : start + width]
        parts.over_rows(kernel, len(y), *blocks, work_bytes=gate_up.nbytes)
        start += width
    return y


@compiled
def _silu(start, stop, gate_up, y):
    n = y.shape[1]
    for t in range(start, stop):
        for i in range(n):
            gate = gate_up[t, i]
            y[t, i] = gate / (np.float32(1) + exp(-gate)) * gate_up[t, n + i]


@compiled
def _gelu_tanh(start, stop, gate_up, y):
    n = y.shape[1]
    for t in range(start, stop):
        for i in range(n):
            gate = gate_up[t, i]
            # (1 + tanh(u)) / 2 is 1 / (1 + e^-2u).
            twice = _TWICE_ROOT * (gate + _CUBIC * gate * gate * gate)
            y[t, i] = gate / (np.float32(1) + exp(-twice)) * gate_up[t, n + i]
