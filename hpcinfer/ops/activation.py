"""Pointwise non-linearities of the FFN, in float32, and the gate."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hpcinfer import array
from hpcinfer.ops.dispatch import dispatch


def sigmoid(x):
    """1 / (1 + e^-x), of the side on which the exponential is at most 1."""
    xp = array.namespace(x)
    e = xp.exp(-xp.abs(x))
    return xp.where(x >= 0, xp.float32(1), e) / (1 + e)


def silu(x):
    """x · sigmoid(x)."""
    xp = array.namespace(x)
    return x / (1 + xp.exp(-x))


def gelu_tanh(x):
    """GELU by its tanh approximation (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""
    xp = array.namespace(x)
    inner = xp.float32(math.sqrt(2 / math.pi)) * (x + xp.float32(0.044715) * x * x * x)
    return xp.float32(0.5) * x * (1 + xp.tanh(inner))


def gelu(x):
    """x · Φ(x), Φ being the cumulative normal distribution."""
    xp = array.namespace(x)
    return xp.float32(0.5) * x * (1 + erf(x / xp.float32(math.sqrt(2))))


def relu(x):
    """max(x, 0)."""
    return array.namespace(x).maximum(x, 0)


def erf(x):
    """Error function to 1.5e-7 absolute (Abramowitz & Stegun 1964, 7.1.26), in float64 inside."""
    xp = array.namespace(x)
    magnitude = xp.abs(x).astype(xp.float64)
    t = 1 / (1 + 0.3275911 * magnitude)
    series = t * (
        0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    )
    return xp.copysign(1 - series * xp.exp(-magnitude * magnitude), x).astype(xp.float32)


ACTIVATIONS = {
    "silu": silu,
    "swish": silu,
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": relu,
}


def activation(name):
    """Function named `name` in a model's config.

    Raises
    ------
    ValueError
        If the name is unknown.
    """
    try:
        return ACTIVATIONS[name]
    except KeyError:
        known = ", ".join(sorted(ACTIVATIONS))
        raise ValueError(f"activation: got {name!r}, need one of {known}") from None


@dispatch
def gated(gate_up, function, widths, dtype=np.float32):
    """function(gate) · up (Shazeer 2020, arXiv:2002.05202).

    Parameters
    ----------
    gate_up : (T, 2 F) float32, in blocks of columns: the gate of a block, then its up
    widths : columns of the gate in every block, adding up to F
    dtype : type that the result is rounded to, where nothing but a product in it follows

    Returns
    -------
    (T, F) of the type
    """
    xp = array.namespace(gate_up)
    y = xp.empty((gate_up.shape[0], sum(widths)), xp.float32)
    start = 0
    for width in widths:
        gate, up = gate_up[:, 2 * start :][:, :width], gate_up[:, 2 * start + width :][:, :width]
        y[:, start : start + width] = function(gate) * up
        start += width
    return array.narrow(y, dtype)


@dataclass(frozen=True)
class Gate:
    """What stands between the products of a gated FFN: `gated` as a function of the first alone."""

    function: Callable
    widths: tuple

    def __call__(self, gate_up):
        return gated(gate_up, self.function, self.widths)
