"""Norms in two passes over each row."""

from __future__ import annotations

import numpy as np

from hpcinfer import array
from hpcinfer.array import Array
from hpcinfer.ops.cpu.runtime import launch
from hpcinfer.ops.cpu.runtime.compile import compiled
from hpcinfer.ops.cpu.simd.rounding import as_item, bits

_TYPES = (np.float32, array.BFLOAT16)  # of results


def rms_norm(x: Array, weight: Array, eps: float, dtype: np.dtype = np.float32) -> Array:
    """As `ops.norm.rms_norm`, for weights of one row's length."""
    if x.dtype != np.float32 or weight.shape != x.shape[-1:] or dtype not in _TYPES:
        return NotImplemented
    y = launch.empty(x.shape, dtype)
    rows = x if x.ndim == 3 else x.reshape(-1, 1, x.shape[-1])
    out = bits(y).reshape(rows.shape)
    launch.over_rows(_rms, len(rows), rows, weight, np.float32(eps), out, work_bytes=x.nbytes)
    return y


def layer_norm(
    x: Array, weight: Array, bias: Array | None, eps: float, dtype: np.dtype = np.float32
) -> Array:
    """As `ops.norm.layer_norm`."""
    if x.dtype != np.float32 or bias is None or not weight.shape == bias.shape == x.shape[-1:]:
        return NotImplemented
    if dtype not in _TYPES:
        return NotImplemented
    y = launch.empty(x.shape, dtype)
    rows, out = (a.reshape(-1, x.shape[-1]) for a in (x, bits(y)))
    launch.over_rows(
        _layer, len(rows), rows, weight, bias, np.float32(eps), out, work_bytes=x.nbytes
    )
    return y


@compiled
def _rms(start, stop, x, weight, eps, y):
    n = x.shape[2]
    for row in range(start, stop):
        for h in range(x.shape[1]):
            total = np.float32(0)
            for i in range(n):
                total += x[row, h, i] * x[row, h, i]
            factor = np.float32(1) / np.sqrt(total / np.float32(n) + eps)
            for i in range(n):
                y[row, h, i] = as_item(x[row, h, i] * factor * weight[i], y)


@compiled
def _layer(start, stop, x, weight, bias, eps, y):
    n = x.shape[1]
    for row in range(start, stop):
        total = np.float32(0)
        for i in range(n):
            total += x[row, i]
        mean, squares = total / np.float32(n), np.float32(0)
        for i in range(n):
            squares += (x[row, i] - mean) * (x[row, i] - mean)
        factor = np.float32(1) / np.sqrt(squares / np.float32(n) + eps)
        for i in range(n):
            y[row, i] = as_item((x[row, i] - mean) * factor * weight[i] + bias[i], y)
