"""Normalisation over the last axis, in float32."""

import numpy as np

from hpcinfer import array
from hpcinfer.ops.dispatch import dispatch
from hpcinfer.ops.inplace import add_into


@dispatch
def rms_norm(x, weight, eps, dtype=np.float32):
    """x / sqrt(mean(x²) + eps) · weight over the last axis (Zhang 2019, arXiv:1910.07467).

    Parameters
    ----------
    x : (..., D) float32
    weight : (D,) float32
    eps : added to the mean square
    dtype : type that the result is rounded to, where nothing but a product in it follows

    Returns
    -------
    (..., D) of the type
    """
    xp = array.namespace(x)
    mean_square = xp.mean(x * x, axis=-1, keepdims=True)
    return array.narrow(x / xp.sqrt(mean_square + xp.float32(eps)) * weight, dtype)


@dispatch
def layer_norm(x, weight, bias, eps, dtype=np.float32):
    """(x - mean) / sqrt(variance + eps) · weight + bias, last axis (Ba 2016, arXiv:1607.06450).

    Parameters
    ----------
    x : (..., D) float32
    weight, bias : (D,) float32; bias may be None
    eps : added to the variance
    dtype : as for `rms_norm`

    Returns
    -------
    (..., D) of the type
    """
    xp = array.namespace(x)
    centred = x - xp.mean(x, axis=-1, keepdims=True)
    variance = xp.mean(centred * centred, axis=-1, keepdims=True)
    y = centred / xp.sqrt(variance + xp.float32(eps)) * weight
    return array.narrow(y if bias is None else y + bias, dtype)


@dispatch
def add_rms_norm(y, x, weight, eps, dtype=np.float32):
    """y + x in the memory of y, and its RMS norm.

    Parameters
    ----------
    y, x : (T, D) float32
    weight, eps, dtype : as for `rms_norm`

    Returns
    -------
    y : (T, D) float32
    normed : (T, D) of the type
    """
    y = add_into(y, x)
    return y, rms_norm(y, weight, eps, dtype)


@dispatch
def add_layer_norm(y, x, weight, bias, eps, dtype=np.float32):
    """y + x in the memory of y, and its layer norm.

    Parameters
    ----------
    y, x : (T, D) float32
    weight, bias, eps, dtype : as for `layer_norm`

    Returns
    -------
    y : (T, D) float32
    normed : (T, D) of the type
    """
    y = add_into(y, x)
    return y, layer_norm(y, weight, bias, eps, dtype)
