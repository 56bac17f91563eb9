"""Rotary position embedding (Su 2021, arXiv:2104.09864) and its variants for longer contexts.

A variant is a choice of frequencies and a factor on cosine and sine. `dynamic` and `longrope`
choose by the length of the text: a prompt's tokens take the prompt's length, a generated token its
own position + 1.
"""

import math
from dataclasses import dataclass

import numpy as np

from hpcinfer import array
from hpcinfer.ops.dispatch import dispatch


@dataclass(frozen=True)
class Rope:
    """Parameters of one rotary embedding, as a config gives them.

    Attributes
    ----------
    kind : default, linear, dynamic, llama3, yarn or longrope
    dim : columns of a head that are rotated, at its front
    theta : base of the frequencies
    factor : extension of the context
    original_context : positions of the original training
    low_factor, high_factor : llama3, bounds on context / wavelength
    beta_fast, beta_slow, truncate : yarn, bounds of the ramp in rotations
    short, long : longrope, one divisor per frequency
    magnitude : factor on cosine and sine (computed by the config)
    """

    kind: str
    dim: int
    theta: float
    factor: float = 1.0
    original_context: int = 0
    low_factor: float = 1.0
    high_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short: tuple = ()
    long: tuple = ()
    magnitude: float = 1.0

    def length_class(self, length):
        """Which frequencies a text of `length` tokens takes: equal numbers for equal ones."""
        if self.kind == "dynamic":
            return max(length, self.original_context)
        if self.kind == "longrope":
            return int(length > self.original_context)
        return 0

    @property
    def depends_on_length(self):
        """True if the frequencies depend on the length of the text."""
        return self.kind in ("dynamic", "longrope")


def frequencies(rope, length_class=0):
    """Angle per position of each rotated pair.

    Parameters
    ----------
    rope : Rope
    length_class : as `Rope.length_class` returns it

    Returns
    -------
    (dim/2,) float32

    Sources: linear, Chen 2023 (arXiv:2306.15595); yarn and dynamic, Peng 2023 (arXiv:2309.00071);
    longrope, Ding 2024 (arXiv:2402.13753); llama3, the rule published with Llama 3.1
    (arXiv:2407.21783, section 3.4).
    """
    theta = rope.theta
    if rope.kind == "dynamic":
        stretch = rope.factor * length_class / rope.original_context - (rope.factor - 1)
        theta *= stretch ** (rope.dim / (rope.dim - 2))
    powers = theta ** (np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim)
    if rope.kind == "longrope":
        powers = powers * np.asarray(rope.long if length_class else rope.short, np.float64)
    plain = 1 / powers
    if rope.kind == "linear":
        plain = plain / rope.factor
    elif rope.kind == "llama3":
        plain = _by_wavelength(rope, plain)
    elif rope.kind == "yarn":
        plain = _by_ramp(rope, plain)
    return plain.astype(np.float32)


def angles(rope, positions, length_classes=None):
    """Cosine and sine of every token's rotation.

    Parameters
    ----------
    positions : (T,) integers, host
    length_classes : (T,) integers, host; needed where the frequencies depend on the length

    Returns
    -------
    cos, sin : (T, dim/2) float32, host
    """
    if rope.depends_on_length:
        classes, which = np.unique(length_classes, return_inverse=True)
        tables = [frequencies(rope, int(c)) for c in classes]
        table = np.array(tables, np.float32).reshape(-1, rope.dim // 2)[which.reshape(-1)]
    else:
        table = frequencies(rope)[None, :]
    angle = positions.astype(np.float32)[:, None] * table
    factor = np.float32(rope.magnitude)
    return np.cos(angle) * factor, np.sin(angle) * factor


@dispatch
def rotate(x, cos, sin):
    """Rotate the first columns of every head; the pairs are columns i and i + dim/2.

    Parameters
    ----------
    x : (T, H, K) float32
    cos, sin : (T, dim/2) float32, host

    Returns
    -------
    (T, H, K) float32
    """
    xp = array.namespace(x)
    half = cos.shape[-1]
    cos, sin = (xp.asarray(table)[:, None, :] for table in (cos, sin))
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return xp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def yarn_magnitude(factor, mscale=1.0):
    """Growth of the attention's temperature with the context: 0.1 · mscale · ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1


def _by_wavelength(rope, plain):
    """llama3: keep short wavelengths, divide long ones by the factor, blend between."""
    wavelength = 2 * math.pi / plain
    blend = (rope.original_context / wavelength - rope.low_factor) / (
        rope.high_factor - rope.low_factor
    )
    blend = np.clip(blend, 0, 1)
    return (1 - blend) * plain / rope.factor + blend * plain


def _by_ramp(rope, plain):
    """yarn: keep pairs with many rotations in the context, divide those with few, blend between."""

    def pair_with(rotations):
        ratio = rope.original_context / (rotations * 2 * math.pi)
        return rope.dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(rope.dim // 2) - low) / (high - low), 0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)
