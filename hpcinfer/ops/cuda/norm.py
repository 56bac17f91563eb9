"""Norms, one block of threads for a row."""

import numpy as np

from hpcinfer import array
from hpcinfer.ops.cuda.launch import aligned, launch, rows_of

OPTIONS = ((),)
KERNELS = ("rms_norm_1", "rms_norm_4", "layer_norm_1", "layer_norm_4")

_MOST_THREADS = 256


def rms_norm(x, weight, eps, dtype=np.float32):
    """As `ops.norm.rms_norm`."""
    return _normed("rms_norm", x, (weight,), eps, dtype)


def layer_norm(x, weight, bias, eps, dtype=np.float32):
    """As `ops.norm.layer_norm`."""
    return _normed("layer_norm", x, (weight, bias), eps, dtype)


def _normed(kernel, x, parameters, eps, dtype):
    placed, D = rows_of(x), x.shape[-1]
    if placed is None or not all(p is None or _is_vector(p, D) for p in parameters):
        return NotImplemented
    inner, *strides = placed
    y = array.namespace(x).empty(x.shape, np.float32)

    # Four values at a time where they lie so.
    fours = D % 4 == 0 and all(s % 4 == 0 for s in strides) and aligned(x, y, *parameters)
    width = 4 if fours else 1
    threads = min(_MOST_THREADS, 32 * max(1, -(-D // (32 * width))))
    launch(
        "norm", f"{kernel}_{width}", (x.size // D,), threads,
        x, *parameters, y, D, inner, *strides, float(eps),
    )  # fmt: skip
    return array.narrow(y, dtype)


def _is_vector(x, n):
    return x.dtype == np.float32 and x.shape == (n,) and x.flags.c_contiguous
