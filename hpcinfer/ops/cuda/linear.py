"""Matrix products: kernels that read the weight once for few tokens, cuBLAS for more."""

import functools

import numpy as np

from hpcinfer import array
from hpcinfer.ops.activation import Gate
from hpcinfer.ops.cuda import activation, blas, codes
from hpcinfer.ops.cuda.launch import NAMES, aligned, launch
from hpcinfer.ops.cuda.quantize import dequantize
from hpcinfer.ops.quantize import Quantized, place

# Tokens that the kernels serve: by matrix units in tiles of eight, without them in any number.
_TILES, _TILE = (1, 2), 8
_TOKENS, _ROWS = (1, 2, 4, 8), (1, 2, 4)

# Tokens up to which codes are read in tiles: reading them again, which the cache has, takes less
# time than writing and reading their numbers.
_CODED_TOKENS = 64

# Numbers of codes that are there at a time, for the product with many tokens.
_NUMBERS_BYTES = 256 << 20

OPTIONS = (("-DWEIGHT=f16",), ("-DWEIGHT=bf16",))
KERNELS = (
    *(f"product_{of}_{tiles}" for of in ("float", "held") for tiles in _TILES),
    *(f"{function}_product_{tiles}" for function in activation.FUNCTIONS for tiles in _TILES),
    *(f"matvec_{tokens}_{rows}" for tokens in _TOKENS for rows in _ROWS),
)

# Outputs and warps of a block; warps that keep the memory of a large device busy.
_BLOCK_OUTPUTS, _BLOCK_WARPS, _BUSY_WARPS = 16, 8, 2048
_MOST_OUTPUTS = 65535 * _BLOCK_OUTPUTS // 2  # as a grid has blocks


def linear(x, weight, bias=None):
    """As `ops.linear.linear`."""
    if not (x.size and len(weight) and _lies_well(weight)):
        return NotImplemented
    x = array.namespace(x).ascontiguousarray(x)
    if _is_served(x, weight, _most_tokens(x, weight)):
        return _by_tiles(x, weight, bias)
    if not isinstance(weight, Quantized) and _is_served(x, weight, _TOKENS[-1]):
        return _by_rows(x, weight, bias)
    return _by_blocks(x, weight, bias)


def linear_pair(x, first, middle, second, bias=None):
    """As `ops.linear.linear_pair`, for a gate; what is between the products is rounded once."""
    if not (isinstance(middle, Gate) and middle.function.__name__ in activation.FUNCTIONS):
        return NotImplemented
    if not array.is_half(second.dtype) or not x.size:
        return NotImplemented
    between = _gated_by_tiles(x, first, middle, second.dtype, bias)
    if between is None:
        from hpcinfer.ops.linear import linear as any_linear

        both = any_linear(x, first, bias)
        between = activation.gated(both, middle.function, middle.widths, second.dtype)
        if between is NotImplemented:
            return NotImplemented
    return linear(between, second)


def _lies_well(weight):
    """True if kernels can read a weight where it is."""
    if isinstance(weight, Quantized):
        return codes.are_served(weight)
    return weight.flags.c_contiguous


def _most_tokens(x, weight):
    """Tokens of a product by tiles, 0 where the device has no such matrix units."""
    if not (array.namespace(x) is np or _capability() >= 80):
        return 0
    return _CODED_TOKENS if isinstance(weight, Quantized) else _TILE * _TILES[-1]


@functools.cache
def _capability():
    from cupy.cuda import device

    return int(device.get_compute_capability())


def _is_served(x, weight, most_tokens):
    """True if a kernel for so many tokens serves a product."""
    if not isinstance(weight, Quantized) and (x.shape[1] % 8 or not aligned(weight)):
        return False
    return (
        array.is_half(weight.dtype)
        and len(x) <= most_tokens
        and len(weight) <= _MOST_OUTPUTS
        and x.dtype in (np.float32, weight.dtype)
        and aligned(x)
    )


def _operands(x, weight):
    """What a kernel by tiles is given: its source, x, what the weight is, options."""
    if not isinstance(weight, Quantized):
        return "linear", x, (weight,), (f"-DWEIGHT={NAMES[weight.dtype.name]}",)
    form, (*rows, offset) = weight.form, codes.operands(weight)

    # Eight inputs that a lane reads begin at a multiple of 16 bytes.
    if form.offset % 8 or form.inputs % 8:
        x, offset = place(x, form), 0
    return "quantize", x, (*rows, offset), codes.options(form, form.dtype)


def _by_tiles(x, weight, bias):
    """Products of few tokens by matrix units: a block for 16 outputs."""
    T, n_out = len(x), len(weight)
    y = array.namespace(x).empty((T, n_out), np.float32)
    fused = bias is None or _is_fused(bias)
    of = "float" if x.dtype == np.float32 else "held"
    source, x, operands, options = _operands(x, weight)
    launch(
        source, f"product_{of}_{_tiles(T)}", _grid(T, n_out), 32 * _BLOCK_WARPS,
        x, *operands, bias if fused else None, y, T, x.shape[1], n_out,
        options=options,
    )  # fmt: skip
    if not fused:
        y += bias
    return y


def _gated_by_tiles(x, weight, gate, dtype, bias):
    """(T, F), the first product of few tokens with its gate; None if the kernel serves it not."""
    if not (len(weight) and weight.dtype == dtype and _lies_well(weight)):
        return None
    x = array.namespace(x).ascontiguousarray(x)
    if not _is_served(x, weight, _most_tokens(x, weight)):
        return None
    if not (bias is None or _is_fused(bias)):
        return None
    x, T, start = array.narrow(x, dtype), len(x), 0
    y = array.namespace(x).empty((T, sum(gate.widths)), dtype)
    for n in gate.widths:
        if n:
            source, placed, operands, options = _operands(x, weight[2 * start :])
            launch(
                source, f"{gate.function.__name__}_product_{_tiles(T)}",
                _grid(T, 2 * n), 32 * _BLOCK_WARPS,
                placed, *operands, None if bias is None else bias[2 * start :],
                y[:, start:], T, placed.shape[1], n, y.shape[1],
                options=options,
            )  # fmt: skip
        start += n
    return y


def _grid(T, n_out):
    """Blocks of a product by tiles: those of all tokens and the same outputs follow one another."""
    return -(-T // (_TILE * _tiles(T))), -(-n_out // _BLOCK_OUTPUTS)


def _tiles(T):
    """Tiles of a block."""
    return next((n for n in _TILES if _TILE * n >= T), _TILES[-1])


def _is_fused(bias):
    return bias.dtype == np.float32 and bias.flags.c_contiguous


def _by_rows(x, weight, bias):
    """Products of few tokens without matrix units: a warp for one or more outputs."""
    (T, n_in), n_out, x = x.shape, len(weight), array.widen(x)
    y = array.namespace(x).empty((T, n_out), np.float32)
    fused = bias is None or _is_fused(bias)

    # More outputs to a warp read x less often, as long as there are enough warps.
    tokens = next(n for n in _TOKENS if n >= T)
    most = 2 if tokens <= 2 else 4
    rows = max([1, *(n for n in _ROWS if n <= most and n_out // n >= _BUSY_WARPS)])
    launch(
        "linear", f"matvec_{tokens}_{rows}",
        (-(-n_out // (rows * _BLOCK_WARPS)),), 32 * _BLOCK_WARPS,
        x, weight, bias if fused else None, y, T, n_in, n_out,
        options=(f"-DWEIGHT={NAMES[weight.dtype.name]}",),
    )  # fmt: skip
    if not fused:
        y += bias
    return y


def _by_blocks(x, weight, bias):
    """Products of many tokens by cuBLAS, whose matrix units sum in float32."""
    if array.namespace(x) is np or weight.dtype.name not in blas.TYPES:
        return NotImplemented
    if weight.dtype == array.BFLOAT16 and _capability() < 80:
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
    """y = x · weightᵀ of codes, whose numbers are written for cuBLAS."""
    form = weight.form
    rows = max(1, _NUMBERS_BYTES // (form.width * form.dtype.itemsize))
    for start in range(0, len(weight), rows):
        numbers = dequantize(weight[start : start + rows], form.dtype)
        blas.product(x, numbers, y[:, start : start + rows])
