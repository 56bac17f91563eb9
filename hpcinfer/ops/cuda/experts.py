"""The experts of one rank applied to their tokens, without the host knowing which they are.

Few choices take two launches: each block finds out itself for which tokens it reads an expert. More
are ordered by expert first (`grouped`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hpcinfer import array
from hpcinfer.array import Array
from hpcinfer.ops.activation import Gate
from hpcinfer.ops.cuda import activation, grouped, quantize, quantized
from hpcinfer.ops.cuda.runtime.launch import aligned, has_matrix_units, launch
from hpcinfer.ops.quantize import Quantized

OPTIONS = (("-DWEIGHT=f16",), ("-DWEIGHT=bf16",), *quantize.OPTIONS)
KERNELS = (
    *(f"{of}_{function}" for of in ("few", "item") for function in activation.FUNCTIONS),
    "few_sum",
    "item_product",
)

# Choices that are few; tokens and columns of a block.
_FEW, _TOKENS, _COLUMNS, _THREADS = 64, 8, 16, 256


def experts_ffn(
    x: Array,
    ids: Array,
    weights: Array,
    up: Array | Quantized,
    down: Array | Quantized,
    first: int,
    function: Callable[[Array], Array],
) -> Array:
    """As `ops.experts.experts_ffn`, for a gate and experts of 16 bits, or quantised."""
    if not (ids.size and len(up) and _is_served(x, ids, weights, up, down, function)):
        return NotImplemented
    xp = array.namespace(x)
    ids = ids.astype(np.int32, copy=False)
    x, ids, weights = (xp.ascontiguousarray(part) for part in (x, ids, weights))
    compute = _few if ids.size <= _FEW else grouped.experts_ffn
    return compute(x, ids, weights, up, down, first, function)


def _few(x, ids, weights, up, down, first, function):
    """As `experts_ffn`, for few choices."""
    (T, D), k, F, xp = x.shape, ids.shape[1], function.widths[0], array.namespace(x)
    h, y = xp.empty((ids.size, F), up.dtype), xp.empty((T, D), np.float32)

    # Compute the gate of every choice, then each token's sum of the second products.
    operands, options = quantized.of_experts(up)
    launch(
        "experts", f"few_{function.function.__name__}",
        (-(-F // (_COLUMNS // 2)), ids.size), _THREADS,
        *operands, x, ids, h, ids.size, k, first, len(up), D, F,
        options=options,
    )  # fmt: skip
    operands, options = quantized.of_experts(down)
    launch(
        "experts", "few_sum", (-(-D // _COLUMNS), -(-T // _TOKENS)), _THREADS,
        *operands, h, ids, weights, y, T, k, first, len(up), D, F,
        options=options,
    )  # fmt: skip
    return y


def _is_served(x, ids, weights, up, down, function):
    """True if the kernels know the gate, and how the experts lie in memory."""
    if not (isinstance(function, Gate) and function.function.__name__ in activation.FUNCTIONS):
        return False
    if len(function.widths) != 1 or up.dtype != down.dtype or not array.is_half(up.dtype):
        return False

    # Compare shapes with what the kernels count in 32 bits, and how all lie.
    D, F = x.shape[1], function.widths[0]
    if up.shape[1:] != (2 * F, D) or down.shape != (len(up), D, F):
        return False
    return (
        len(up) <= grouped.MOST_EXPERTS
        and 0 < max(D, F) * max(ids.size, 2 * min(D, F)) < 2**31
        and x.dtype == weights.dtype == np.float32
        and ids.shape == weights.shape == (len(x), ids.shape[1])
        and aligned(x)
        and all(map(_lies_well, (up, down)))
        and has_matrix_units(x)
    )


def _lies_well(weight):
    """True if kernels can read matrices, and the tokens that meet them, by 16 bytes."""
    if isinstance(weight, Quantized):
        form = weight.form
        return not (form.offset % 8 or form.inputs % 8) and quantized.are_served(weight)
    return weight.shape[2] % 8 == 0 and weight.flags.c_contiguous and aligned(weight)
