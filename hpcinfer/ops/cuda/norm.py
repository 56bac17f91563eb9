"""Norms, one block of threads for a row, with the sum before them in the same pass."""

from __future__ import annotations

import numpy as np

from hpcinfer import array
from hpcinfer.array import Array
from hpcinfer.ops.cuda.runtime.launch import NAMES, aligned, launch, rows_of

OPTIONS = tuple((f"-DTO={to}",) for to in NAMES.values())
KERNELS = ("rms_norm_1", "rms_norm_4", "layer_norm_1", "layer_norm_4")

# Threads of a block at most, and where rows are so many that blocks beside each other keep the
# device busy; runs of values that a thread keeps.
_MOST_THREADS, _MANY_THREADS, _MANY_ROWS, _RUNS = 1024, 256, 256, 4


def rms_norm(x: Array, weight: Array, eps: float, dtype: np.dtype = np.float32) -> Array:
    """As `ops.norm.rms_norm`."""
    return _normed("rms_norm", x, None, (weight,), eps, dtype)


def layer_norm(
    x: Array, weight: Array, bias: Array | None, eps: float, dtype: np.dtype = np.float32
) -> Array:
    """As `ops.norm.layer_norm`."""
    return _normed("layer_norm", x, None, (weight, bias), eps, dtype)


def add_rms_norm(
    y: Array, x: Array, weight: Array, eps: float, dtype: np.dtype = np.float32
) -> tuple[Array, Array]:
    """As `ops.norm.add_rms_norm`."""
    normed = _normed("rms_norm", x, y, (weight,), eps, dtype)
    return NotImplemented if normed is NotImplemented else (y, normed)


def add_layer_norm(
    y: Array, x: Array, weight: Array, bias: Array | None, eps: float, dtype: np.dtype = np.float32
) -> tuple[Array, Array]:
    """As `ops.norm.add_layer_norm`."""
    normed = _normed("layer_norm", x, y, (weight, bias), eps, dtype)
    return NotImplemented if normed is NotImplemented else (y, normed)


def _normed(kernel, x, total, parameters, eps, dtype):
    placed, D = rows_of(x), x.shape[-1]
    if placed is None or not all(p is None or _is_vector(p, D) for p in parameters):
        return NotImplemented
    if total is not None and not (_is_whole(total) and total.shape == x.shape):
        return NotImplemented
    inner, *strides = placed
    y = array.namespace(x).empty(x.shape, dtype)

    # Four values at a time where they lie so.
    fours = D % 4 == 0 and all(s % 4 == 0 for s in strides)
    width = 4 if fours and aligned(x, total, y, *parameters) else 1
    rows, runs = x.size // D, -(-D // width)
    least = 32 * -(-runs // (32 * _RUNS))
    if least > _MOST_THREADS:
        return NotImplemented
    most = _MOST_THREADS if rows < _MANY_ROWS else max(least, _MANY_THREADS)
    threads = min(most, 32 * -(-runs // 32))
    launch(
        "norm", f"{kernel}_{width}", (rows,), threads,
        x, total, *parameters, y, D, inner, *strides, float(eps),
        options=(f"-DTO={NAMES[y.dtype.name]}",), early=True,
    )  # fmt: skip
    return y


def _is_vector(x, n):
    return _is_whole(x) and x.shape == (n,)


def _is_whole(x):
    return x.dtype == np.float32 and x.flags.c_contiguous
