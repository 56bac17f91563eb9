"""The experts of one rank applied to a few tokens, without sorting them by expert."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hpcinfer import array, node
from hpcinfer.array import Array
from hpcinfer.ops.activation import Gate
from hpcinfer.ops.cpu import activation
from hpcinfer.ops.cpu.linear import gemv_rows
from hpcinfer.ops.cpu.runtime import launch
from hpcinfer.ops.cpu.runtime.compile import compiled
from hpcinfer.ops.cpu.simd.rounding import bits
from hpcinfer.ops.linear import linear_pair
from hpcinfer.ops.quantize import Quantized

# Choices up to which lists are faster than sorted arrays.
_FEW = 64

_NONE = np.empty(0, np.float32)


def experts_ffn(
    x: Array,
    ids: Array,
    weights: Array,
    up: Array | Quantized,
    down: Array | Quantized,
    first: int,
    function: Callable[[Array], Array],
) -> Array:
    """As `ops.experts.experts_ffn`, for a few choices."""
    if not 0 < ids.size <= _FEW or not len(up):
        return NotImplemented
    if node.threads() == 1 and _serves(x, ids, weights, up, down, function):
        y = launch.empty(x.shape, np.float32)
        gate, width = activation.number_of(function.function), function.widths[0]
        operands = x, ids, weights, bits(up), bits(down)
        launch.call(_few_tokens, *operands, first, gate, width, y)
        return y
    return _by_lists(x, ids, weights, up, down, first, function)


def _serves(x, ids, weights, up, down, function):
    """True if the compiled function knows the gate, and how the experts lie in memory."""
    if type(function) is not Gate or len(function.widths) != 1:
        return False
    if activation.number_of(function.function) is None or isinstance(up, Quantized):
        return False
    F, D = function.widths[0], x.shape[1]
    if up.shape[1:] != (2 * F, D) or down.shape != (len(up), D, F) or not F * D:
        return False
    if up.dtype != down.dtype or up.dtype not in (np.float32, array.BFLOAT16):
        return False
    rows = up.strides[2] == down.strides[2] == up.itemsize
    return rows and x.dtype == weights.dtype == np.float32 and ids.shape == weights.shape


@compiled
def _few_tokens(x, ids, weights, up, down, first, gate, width, y):
    """One expert after the other, with the tokens that chose it; y (T, D) is their sum."""
    T, D = x.shape
    chosen, factors = np.empty(T, np.int64), np.empty(T, np.float32)
    rows, found = np.empty((T, D), np.float32), np.empty((T, D), np.float32)
    gate_up, hidden = np.empty((T, 2 * width), np.float32), np.empty((T, width), np.float32)
    y[:] = np.float32(0)
    for e in range(len(up)):
        # Gather the tokens that chose it.
        n = 0
        for t in range(T):
            for j in range(ids.shape[1]):
                if ids[t, j] == first + e:
                    chosen[n], factors[n], rows[n] = t, weights[t, j], x[t]
                    n += 1

        # Apply it to them, and add what it gives by their weights.
        if n:
            gemv_rows(0, 2 * width, rows[:n], up[e], gate_up, _NONE)
            activation.gate_rows(0, n, gate_up, hidden, gate)
            gemv_rows(0, D, hidden[:n], down[e], found, _NONE)
            for i in range(n):
                for d in range(D):
                    y[chosen[i], d] += factors[i] * found[i, d]


def _by_lists(x, ids, weights, up, down, first, function):
    """One expert after the other, by the functions for any weights and gates."""
    of_expert = {}
    for t, choices in enumerate(ids.tolist()):
        for j, e in enumerate(choices):
            if first <= e < first + len(up):
                of_expert.setdefault(e - first, []).append((t, j))
    y = np.zeros(x.shape, np.float32)
    for e in sorted(of_expert):
        # A slice where all tokens chose this expert: no copy of x, none of the sum.
        tokens, places = zip(*of_expert[e], strict=True)
        rows = slice(None) if len(tokens) == len(x) else list(tokens)
        found = linear_pair(x[rows], up[e], function, down[e])
        found *= weights[list(tokens), list(places), None]
        y[rows] += found
    return y
