"""Matrix products: of few tokens by kernels, with a gate in them, of more by cuBLAS."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hpcinfer import array
from hpcinfer.array import Array
from hpcinfer.ops.activation import Gate
from hpcinfer.ops.cuda import activation, quantized
from hpcinfer.ops.cuda.quantize import dequantize
from hpcinfer.ops.cuda.runtime import blas
from hpcinfer.ops.cuda.runtime.launch import NAMES, aligned, has_matrix_units, launch
from hpcinfer.ops.quantize import Quantized, place

# Tokens that a block serves by tiles of matrix units, where weights are quantised, and up to which
# there are so many blocks: it takes less time to read codes again, which the cache has, than to
# write and read their numbers.
_TILES, _TILE, _CODED_TOKENS = (1, 2), 8, 64

# Tokens that the kernels for devices without 16-bit matrix units serve, and outputs of a warp.
_TOKENS, _ROWS = (1, 2, 4, 8), (1, 2, 4)

OPTIONS = (("-DWEIGHT=f16",), ("-DWEIGHT=bf16",))
KERNELS = (
    *(f"one_{of}" for of in ("float", "held", *activation.FUNCTIONS)),
    *(f"matvec_{tokens}_{rows}" for tokens in _TOKENS for rows in _ROWS),
)

# Warps of a block; warps that keep the memory of a large device busy, where they have several
# outputs; inputs that make a part of a row worth a warp, and warps that are too many.
_BLOCK_WARPS, _BUSY_WARPS, _PART, _MOST_WARPS = 8, 2048, 1024, 1 << 18

# Outputs of a block by tiles, and of as many blocks as a grid has.
_BLOCK_OUTPUTS, _MOST_OUTPUTS = 16, 65535 * 8

# Numbers of quantised weights that are there at a time, for the product with many tokens, in bytes.
_NUMBERS_BYTES = 256 << 20


def linear(x: Array, weight: Array | Quantized, bias: Array | None = None) -> Array:
    """As `ops.linear.linear`."""
    if not (x.size and len(weight) and _lies_well(weight)):
        return NotImplemented
    x = array.namespace(x).ascontiguousarray(x)
    if _is_served_by_rows(x, weight, 1):
        product = _one_token
    elif _is_served_by_tiles(x, weight):
        product = _by_tiles
    elif _is_served_by_rows(x, weight, _TOKENS[-1]) and not has_matrix_units(x):
        product = _by_rows
    else:
        return _by_blocks(x, weight, bias)

    # A bias that the kernels cannot read is added behind them.
    if bias is None or _is_fused(bias):
        return product(x, weight, bias)
    y = product(x, weight, None)
    y += bias
    return y


def linear_pair(
    x: Array,
    first: Array | Quantized,
    between: Callable[[Array], Array],
    second: Array | Quantized,
    bias: Array | None = None,
) -> Array:
    """As `ops.linear.linear_pair`, for a gate; what is between the products is rounded once."""
    if not (isinstance(between, Gate) and between.function.__name__ in activation.FUNCTIONS):
        return NotImplemented
    if not array.is_half(second.dtype) or not x.size:
        return NotImplemented
    gated = _gated(x, first, between, second.dtype, bias)
    if gated is None:
        from hpcinfer.ops.linear import linear as any_linear

        both = any_linear(x, first, bias)
        gated = activation.gated(both, between.function, between.widths, second.dtype)
        if gated is NotImplemented:
            return NotImplemented
    return linear(gated, second)


def _lies_well(weight):
    """True if kernels can read a weight where it is."""
    if isinstance(weight, Quantized):
        return quantized.are_served(weight)
    return weight.flags.c_contiguous


def _is_served_by_rows(x, weight, most_tokens):
    """True if rows of a weight, not quantised, can be read by 16 bytes for so many tokens."""
    return (
        not isinstance(weight, Quantized)
        and len(x) <= most_tokens
        and _is_served(x, weight)
        and x.shape[1] % 8 == 0
        and aligned(weight)
    )


def _is_served_by_tiles(x, weight):
    """True if matrix units take few tokens and quantised weights as they are."""
    return (
        isinstance(weight, Quantized)
        and len(x) <= _CODED_TOKENS
        and _is_served(x, weight)
        and len(weight) <= _MOST_OUTPUTS
        and has_matrix_units(x)
    )


def _is_served(x, weight):
    """True if kernels know the types of a product, and can read x by 16 bytes."""
    return array.is_half(weight.dtype) and x.dtype in (np.float32, weight.dtype) and aligned(x)


def _one_token(x, weight, bias):
    """The product of one token: a warp for an output, or for a part of it."""
    n_out, n_in = weight.shape
    y, parts = array.namespace(x).empty((1, n_out), np.float32), _parts(n_out, n_in)
    of = "float" if x.dtype == np.float32 else "held"
    launch(
        "linear", f"one_{of}", (-(-n_out * parts // _BLOCK_WARPS),), 32 * _BLOCK_WARPS,
        x, weight, bias, y, n_in, n_out, parts,
        options=(f"-DWEIGHT={NAMES[weight.dtype.name]}",), early=True,
    )  # fmt: skip
    return y


def _by_tiles(x, weight, bias):
    """The product of few tokens by matrix units: a block for 16 outputs."""
    T, n_out = len(x), len(weight)
    y = array.namespace(x).empty((T, n_out), np.float32)
    of = "float" if x.dtype == np.float32 else "held"
    x, operands, options = _operands(x, weight)
    launch(
        "quantize", f"product_{of}_{_tiles(T)}", _grid(T, n_out), 32 * _BLOCK_WARPS,
        x, *operands, bias, y, T, x.shape[1], n_out,
        options=options, early=True,
    )  # fmt: skip
    return y


def _gated(x, weight, gate, dtype, bias):
    """(T, F), the first product of few tokens with its gate; None if no kernel serves it."""
    if not (len(weight) and weight.dtype == dtype and _lies_well(weight)):
        return None
    x = array.namespace(x).ascontiguousarray(x)
    by_rows = _is_served_by_rows(x, weight, 1)
    if not (by_rows or _is_served_by_tiles(x, weight)) or not (bias is None or _is_fused(bias)):
        return None

    # Take the gate's blocks of columns one after the other.
    x, start = array.narrow(x, dtype), 0
    y = array.namespace(x).empty((len(x), sum(gate.widths)), dtype)
    of_part = _one_gated if by_rows else _gated_by_tiles
    for n in gate.widths:
        if n:
            of_part_bias = None if bias is None else bias[2 * start :]
            of_part(x, weight[2 * start :], gate.function.__name__, of_part_bias, y[:, start:], n)
        start += n
    return y


def _one_gated(x, weight, function, bias, y, n):
    """The first `n` columns of y (1, F), of one token: a warp for a row of gate and one of up."""
    n_in = x.shape[1]
    parts = _parts(2 * n, n_in)
    launch(
        "linear", f"one_{function}", (-(-n * parts // _BLOCK_WARPS),), 32 * _BLOCK_WARPS,
        x, weight, bias, y, n_in, n, parts,
        options=(f"-DWEIGHT={NAMES[weight.dtype.name]}",), early=True,
    )  # fmt: skip


def _gated_by_tiles(x, weight, function, bias, y, n):
    """The first `n` columns of y (T, F), of few tokens: a block for eight of them."""
    T = len(x)
    x, operands, options = _operands(x, weight)
    launch(
        "quantize", f"{function}_product_{_tiles(T)}", _grid(T, 2 * n), 32 * _BLOCK_WARPS,
        x, *operands, bias, y, T, x.shape[1], n, y.strides[0] // y.itemsize,
        options=options, early=True,
    )  # fmt: skip


def _operands(x, weight):
    """What a kernel by tiles is given: x, the weights, options."""
    form, (*rows, offset) = weight.form, quantized.operands(weight)

    # Eight inputs that a lane reads begin at a multiple of 16 bytes.
    if form.offset % 8 or form.inputs % 8:
        x, offset = place(x, form), 0
    return x, (*rows, offset), quantized.options(form, form.dtype)


def _grid(T, n_out):
    """Blocks of a product by tiles: those of all tokens and the same outputs follow one another."""
    return -(-T // (_TILE * _tiles(T))), -(-n_out // _BLOCK_OUTPUTS)


def _tiles(T):
    """Tiles of a block."""
    return next((n for n in _TILES if _TILE * n >= T), _TILES[-1])


def _parts(n_out, n_in):
    """Warps that share an output: those of a block then read what lies together."""
    wanted = min(_MOST_WARPS // max(1, n_out), n_in // _PART)
    return max([1, *(n for n in (2, 4, 8) if n <= wanted)])


def _is_fused(bias):
    return bias.dtype == np.float32 and bias.flags.c_contiguous


def _by_rows(x, weight, bias):
    """Products of few tokens without matrix units: a warp for one or more outputs."""
    (T, n_in), n_out, x = x.shape, len(weight), array.widen(x)
    y = array.namespace(x).empty((T, n_out), np.float32)

    # More outputs to a warp read x less often, as long as there are enough warps.
    tokens = next(n for n in _TOKENS if n >= T)
    most = 2 if tokens <= 2 else 4
    rows = max([1, *(n for n in _ROWS if n <= most and n_out // n >= _BUSY_WARPS)])
    launch(
        "linear", f"matvec_{tokens}_{rows}",
        (-(-n_out // (rows * _BLOCK_WARPS)),), 32 * _BLOCK_WARPS,
        x, weight, bias, y, T, n_in, n_out,
        options=(f"-DWEIGHT={NAMES[weight.dtype.name]}",),
    )  # fmt: skip
    return y


def _by_blocks(x, weight, bias):
    """Products of many tokens by cuBLAS, whose matrix units sum in float32."""
    if array.namespace(x) is np or weight.dtype.name not in blas.TYPES:
        return NotImplemented
    if weight.dtype == array.BFLOAT16 and not has_matrix_units(x):
        return NotImplemented
    y = array.namespace(x).empty((len(x), len(weight)), np.float32)
    x = array.narrow(array.widen(x) if weight.dtype == np.float32 else x, weight.dtype)
    if isinstance(weight, Quantized):
        _by_numbers(x, weight, y)
    else:
        blas.product(x, weight, y)
    if bias is not None:
        y += bias
    return y


def _by_numbers(x, weight, y):
    """y = x · weightᵀ of quantised weights, whose numbers are written for cuBLAS."""
    form = weight.form
    rows = max(1, _NUMBERS_BYTES // (form.width * form.dtype.itemsize))
    for start in range(0, len(weight), rows):
        numbers = dequantize(weight[start : start + rows], form.dtype)
        blas.product(x, numbers, y[:, start : start + rows])
