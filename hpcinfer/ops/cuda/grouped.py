"""The experts of one rank applied to many tokens, whose choices the device orders by expert.

It finds the items of the work too, an expert and some of its choices. There may be more blocks than
items: how many there are is known to the device alone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hpcinfer import array
from hpcinfer.array import Array
from hpcinfer.ops.cuda import activation, quantized
from hpcinfer.ops.cuda.runtime.launch import NAMES, launch
from hpcinfer.ops.quantize import Quantized

OPTIONS = (("-DWEIGHT=f16",), ("-DWEIGHT=bf16",))
KERNELS = (
    "group_choices",
    "combine_choices",
    *(f"tile_{name}" for name in (*activation.FUNCTIONS, "down")),
)

MOST_EXPERTS = 1024

# Choices of an item where an expert has few, and where it has many; what is many in the mean.
_ITEM, _TILE, _MANY = 16, 128, 24

# Numbers of the second products that are there at a time, in bytes.
_FOUND_BYTES = 512 << 20

_THREADS = 256


def experts_ffn(
    x: Array,
    ids: Array,
    weights: Array,
    up: Array | Quantized,
    down: Array | Quantized,
    first: int,
    function: Callable[[Array], Array],
) -> Array:
    """As `ops.experts.experts_ffn`, for what `experts` serves; some tokens after the other."""
    (T, D), k, xp = x.shape, ids.shape[1], array.namespace(x)
    y, step = xp.empty((T, D), np.float32), max(1, _FOUND_BYTES // (4 * k * D))
    narrow = isinstance(up, Quantized) or min(T, step) * k < _MANY * len(up)
    for start in range(0, T, step):
        some = slice(start, start + step)
        choices = x[some], ids[some], weights[some]
        _some_tokens(*choices, y[some], up, down, first, function, narrow)
    return y


def _some_tokens(x, ids, weights, y, up, down, first, function, narrow):
    """Write y (T, D) of some tokens."""
    (T, D), k, F, xp = x.shape, ids.shape[1], function.widths[0], array.namespace(x)
    n, E, dtype, gate = ids.size, len(up), up.dtype, function.function.__name__
    x, h, z = array.narrow(x, dtype), xp.empty((n, F), dtype), xp.empty((n, D), np.float32)

    # Order the choices by expert.
    tile = _ITEM if narrow else _TILE
    most_items = min(n, E + n // tile)
    order, items = xp.empty(n, np.int32), xp.empty((most_items, 3), np.int32)
    options = (f"-DWEIGHT={NAMES[dtype.name]}",)
    launch(
        "grouped", "group_choices", (E,), _THREADS,
        ids, order, items, n, first, E, tile, most_items,
        options=options,
    )  # fmt: skip

    # Multiply every choice by both matrices, then add up each token's.
    multiply = _by_items if narrow else _by_tiles
    multiply(x, order, items, up, down, h, z, k, gate)
    launch(
        "grouped", "combine_choices", (-(-T * (D // 4) // _THREADS),), _THREADS,
        z, ids, weights, y, T, k, first, E, D,
        options=options,
    )  # fmt: skip


def _by_items(x, order, items, up, down, h, z, k, gate):
    """Both products of every choice, of few choices or quantised weights: h, then z."""
    most_items, (F, D) = len(items), (h.shape[1], z.shape[1])
    operands, options = quantized.of_experts(up)
    launch(
        "experts", f"item_{gate}", (-(-F // 8), most_items), _THREADS,
        *operands, x, order, items, h, k, D, F,
        options=options,
    )  # fmt: skip
    operands, options = quantized.of_experts(down)
    launch(
        "experts", "item_product", (-(-D // 16), most_items), _THREADS,
        *operands, h, order, items, z, D, F,
        options=options,
    )  # fmt: skip


def _by_tiles(x, order, items, up, down, h, z, k, gate):
    """Both products of every choice, of many choices: h, then z."""
    most_items, (F, D) = len(items), (h.shape[1], z.shape[1])
    options = (f"-DWEIGHT={NAMES[x.dtype.name]}",)
    launch(
        "grouped", f"tile_{gate}", (-(-F // 64), most_items), _THREADS,
        up, x, order, items, h, k, D, F,
        options=options,
    )  # fmt: skip
    launch(
        "grouped", "tile_down", (-(-D // 128), most_items), _THREADS,
        down, h, order, items, z, D, F,
        options=options,
    )  # fmt: skip
