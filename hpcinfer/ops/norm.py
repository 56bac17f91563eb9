"""Normalisation over the last axis, in float32."""

from hpcinfer import array
from hpcinfer.ops.fastest import fastest


@fastest
def rms_norm(x, weight, eps):
    """x / sqrt(mean(x²) + eps) · weight over the last axis (Zhang 2019, arXiv:1910.07467).

    Parameters
    ----------
    x : (..., D) float32
    weight : (D,) float32
    eps : added to the mean square

    Returns
    -------
    (..., D) float32
    """
    xp = array.namespace(x)
    mean_square = xp.mean(x * x, axis=-1, keepdims=True)
    return x / xp.sqrt(mean_square + xp.float32(eps)) * weight


@fastest
def layer_norm(x, weight, bias, eps):
    """(x - mean) / sqrt(variance + eps) · weight + bias, last axis (Ba 2016, arXiv:1607.06450).

    Parameters
    ----------
    x : (..., D) float32
    weight, bias : (D,) float32; bias may be None
    eps : added to the variance

    Returns
    -------
    (..., D) float32
    """
    xp = array.namespace(x)
    centred = x - xp.mean(x, axis=-1, keepdims=True)
    variance = xp.mean(centred * centred, axis=-1, keepdims=True)
    y = centred / xp.sqrt(variance + xp.float32(eps)) * weight
    return y if bias is None else y + bias
