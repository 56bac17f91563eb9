"""Matrix products of activations with weights stored (out, in)."""

import numpy as np

from hpcinfer import array
from hpcinfer.ops.dispatch import dispatch
from hpcinfer.ops.quantize import Quantized, dequantize

# Rows of a 16-bit or quantised weight that are widened at a time, in bytes of float32.
_BLOCK_BYTES = 8 << 20


@dispatch
def linear(x, weight, bias=None):
    """x · weightᵀ + bias, accumulated in float32.

    A 16-bit weight meets an x rounded to the same type, as matrix units compute it, and every
    product is summed in float32. A quantised weight says which type x is rounded to.

    Parameters
    ----------
    x : (T, I) float32, or rounded already
    weight : (O, I) float32, float16, bfloat16 or Quantized
    bias : (O,) float32, or None

    Returns
    -------
    (T, O) float32
    """
    quantized = isinstance(weight, Quantized)
    if weight.dtype == np.float32 and not quantized:
        y = array.widen(x) @ weight.T
    else:
        wide = dequantize if quantized else array.widen
        y = _widened(array.widen(array.narrow(x, weight.dtype)), weight, wide)
    if bias is not None:
        y += bias
    return y


@dispatch
def linear_pair(x, first, between, second, bias=None):
    """Two products with something between: between(x · firstᵀ + bias) · secondᵀ.

    Parameters
    ----------
    x : (T, I) float32, or rounded already
    first, second : (C, I), (O, M), as the weight of `linear`
    between : function (T, C) -> (T, M); kernels know `activation.Gate`
    bias : (C,) float32, or None

    Returns
    -------
    (T, O) float32
    """
    return linear(between(linear(x, first, bias)), second)


def _widened(x, weight, wide):
    """x · weightᵀ with the weight made float32 by `wide`, in blocks of rows that stay in cache."""
    xp = array.namespace(x)
    n_out, n_in = weight.shape
    y = xp.empty((x.shape[0], n_out), xp.float32)
    rows = max(1, _BLOCK_BYTES // (4 * max(1, n_in)))
    for start in range(0, n_out, rows):
        y[:, start : start + rows] = x @ wide(weight[start : start + rows]).T
    return y
