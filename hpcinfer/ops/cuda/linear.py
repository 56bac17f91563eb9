"""Matrix products: kernels that read the weight once for few tokens, cuBLAS for more."""

import functools

import numpy as np

from hpcinfer import array
from hpcinfer.ops.activation import Gate
from hpcinfer.ops.cuda import activation, blas
from hpcinfer.ops.cuda.launch import NAMES, aligned, launch
from hpcinfer.ops.quantize import Quantized

# Tokens that the kernels serve: by matrix units in tiles of eight, without them in any number.
_TILES, _TILE = (1, 2), 8
_TOKENS, _ROWS = (1, 2, 4, 8), (1, 2, 4)

OPTIONS = (("-DWEIGHT=f16",), ("-DWEIGHT=bf16",))
KERNELS = (
    *(f"product_{of}_{tiles}" for of in ("float", "held") for tiles in _TILES),
    *(f"{function}_product_{tiles}" for function in activation.FUNCTIONS for tiles in _TILES),
    *(f"matvec_{tokens}_{rows}" for tokens in _TOKENS for rows in _ROWS),
)

# Outputs and warps of a block; warps that keep the memory of a large device busy.
_BLOCK_OUTPUTS, _BLOCK_WARPS, _BUSY_WARPS = 16, 8, 2048


def linear(x, weight, bias=None):
    """As `ops.linear.linear`, for weights that are no codes."""
    if isinstance(weight, Quantized) or not (x.size and weight.size and weight.flags.c_contiguous):
        return NotImplemented
    x = array.namespace(x).ascontiguousarray(x)
    if _is_served(x, weight, _most_tokens(x)):
        return _by_tiles(x, weight, bias)
    if _is_served(x, weight, _TOKENS[-1]):
        return _by_rows(x, weight, bias)
    return _by_blocks(x, weight, bias)


def linear_pair(x, first, middle, second, bias=None):
    """As `ops.linear.linear_pair`, for a gate; what is between the products is rounded once."""
    if not (isinstance(middle, Gate) and middle.function.__name__ in activation.FUNCTIONS):
        return NotImplemented
    if isinstance(second, Quantized) or not array.is_half(second.dtype) or not x.size:
        return NotImplemented
    between = _gated_by_tiles(x, first, middle, second.dtype, bias)
    if between is None:
        from hpcinfer.ops.linear import linear as any_linear

        both = any_linear(x, first, bias)
        between = activation.gated(both, middle.function, middle.widths, second.dtype)
        if between is NotImplemented:
            return NotImplemented
    return linear(between, second)


def _most_tokens(x):
    """Tokens of a product by tiles, 0 where the device has no such matrix units."""
    served = array.namespace(x) is np or _capability() >= 80
    return _TILE * _TILES[-1] if served else 0


@functools.cache
def _capability():
    from cupy.cuda import device

    return int(device.get_compute_capability())


def _is_served(x, weight, most_tokens):
    """True if a kernel for so many tokens serves a product."""
    return (
        array.is_half(weight.dtype)
        and len(x) <= most_tokens
        and x.shape[1] % 8 == 0
        and x.dtype in (np.float32, weight.dtype)
        and aligned(x, weight)
    )


def _by_tiles(x, weight, bias):
    """Products of few tokens by matrix units: a block for 16 outputs."""
    (T, n_in), n_out = x.shape, len(weight)
    y = array.namespace(x).empty((T, n_out), np.float32)
    fused = bias is None or _is_fused(bias)
    of = "float" if x.dtype == np.float32 else "held"
    launch(
        "linear", f"product_{of}_{_tiles(T)}",
        (-(-n_out // _BLOCK_OUTPUTS),), 32 * _BLOCK_WARPS,
        x, weight, bias if fused else None, y, T, n_in, n_out,
        options=(f"-DWEIGHT={NAMES[weight.dtype.name]}",),
    )  # fmt: skip
    if not fused:
        y += bias
    return y


def _gated_by_tiles(x, weight, gate, dtype, bias):
    """(T, F), the first product of few tokens with its gate; None if the kernel serves it not."""
    if isinstance(weight, Quantized) or not (
        weight.size and weight.flags.c_contiguous and weight.dtype == dtype
    ):
        return None
    x = array.namespace(x).ascontiguousarray(x)
    if not _is_served(x, weight, _most_tokens(x)) or not (bias is None or _is_fused(bias)):
        return None
    (T, n_in), xp = x.shape, array.namespace(x)
    x, y, start = array.narrow(x, dtype), xp.empty((T, sum(gate.widths)), dtype), 0
    for n in gate.widths:
        if n:
            launch(
                "linear", f"{gate.function.__name__}_product_{_tiles(T)}",
                (-(-n // (_BLOCK_OUTPUTS // 2)),), 32 * _BLOCK_WARPS,
                x, weight[2 * start :], None if bias is None else bias[2 * start :],
                y[:, start:], T, n_in, n, y.shape[1],
                options=(f"-DWEIGHT={NAMES[dtype.name]}",),
            )  # fmt: skip
        start += n
    return y


def _tiles(T):
    return next(n for n in _TILES if _TILE * n >= T)


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
    blas.product(x, weight, y)
    if bias is not None:
        y += bias
    return y
