"""Matrix products: of one token by kernels, with a gate in them, of more by cuBLAS."""

import functools

import numpy as np

from hpcinfer import array
from hpcinfer.ops.activation import Gate
from hpcinfer.ops.cuda import activation, blas
from hpcinfer.ops.cuda.launch import NAMES, aligned, launch
from hpcinfer.ops.quantize import Quantized

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


def linear(x, weight, bias=None):
    """As `ops.linear.linear`, for weights that are no codes."""
    if isinstance(weight, Quantized) or not (x.size and weight.size and weight.flags.c_contiguous):
        return NotImplemented
    x = array.namespace(x).ascontiguousarray(x)
    if _is_served(x, weight, 1):
        return _one_token(x, weight, bias)
    if _is_served(x, weight, _TOKENS[-1]) and not _has_matrix_units():
        return _by_rows(x, weight, bias)
    return _by_blocks(x, weight, bias)


def linear_pair(x, first, middle, second, bias=None):
    """As `ops.linear.linear_pair`, for a gate; what is between the products is rounded once."""
    if not (isinstance(middle, Gate) and middle.function.__name__ in activation.FUNCTIONS):
        return NotImplemented
    if isinstance(second, Quantized) or not array.is_half(second.dtype) or not x.size:
        return NotImplemented
    between = _one_gated(x, first, middle, second.dtype, bias)
    if between is None:
        from hpcinfer.ops.linear import linear as any_linear

        both = any_linear(x, first, bias)
        between = activation.gated(both, middle.function, middle.widths, second.dtype)
        if between is NotImplemented:
            return NotImplemented
    return linear(between, second)


@functools.cache
def _has_matrix_units():
    """True if cuBLAS multiplies both 16-bit types by matrix units here."""
    from cupy.cuda import device

    return int(device.get_compute_capability()) >= 80


def _is_served(x, weight, most_tokens):
    """True if a kernel for so many tokens serves a product."""
    return (
        array.is_half(weight.dtype)
        and len(x) <= most_tokens
        and x.shape[1] % 8 == 0
        and x.dtype in (np.float32, weight.dtype)
        and aligned(x, weight)
    )


def _one_token(x, weight, bias):
    """The product of one token: a warp for an output, or for a part of it."""
    n_out, n_in = weight.shape
    y = array.namespace(x).empty((1, n_out), np.float32)
    fused, parts = bias is None or _is_fused(bias), _parts(n_out, n_in)
    of = "float" if x.dtype == np.float32 else "held"
    launch(
        "linear", f"one_{of}", (-(-n_out * parts // _BLOCK_WARPS),), 32 * _BLOCK_WARPS,
        x, weight, bias if fused else None, y, n_in, n_out, parts,
        options=(f"-DWEIGHT={NAMES[weight.dtype.name]}",), early=True,
    )  # fmt: skip
    if not fused:
        y += bias
    return y


def _one_gated(x, weight, gate, dtype, bias):
    """(1, F), the first product of one token with its gate; None if the kernel serves it not."""
    if isinstance(weight, Quantized) or not (
        weight.size and weight.flags.c_contiguous and weight.dtype == dtype
    ):
        return None
    xp = array.namespace(x)
    x = xp.ascontiguousarray(x)
    if not _is_served(x, weight, 1) or not (bias is None or _is_fused(bias)):
        return None
    x, y, start = array.narrow(x, dtype), xp.empty((1, sum(gate.widths)), dtype), 0
    for n in gate.widths:
        parts = _parts(2 * n, x.shape[1])
        if n:
            launch(
                "linear", f"one_{gate.function.__name__}",
                (-(-n * parts // _BLOCK_WARPS),), 32 * _BLOCK_WARPS,
                x, weight[2 * start :], None if bias is None else bias[2 * start :],
                y[:, start:], x.shape[1], n, parts,
                options=(f"-DWEIGHT={NAMES[dtype.name]}",), early=True,
            )  # fmt: skip
        start += n
    return y


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
    if weight.dtype == array.BFLOAT16 and not _has_matrix_units():
        return NotImplemented
    y = array.namespace(x).empty((len(x), len(weight)), np.float32)
    x = array.narrow(array.widen(x) if weight.dtype == np.float32 else x, weight.dtype)
    blas.product(x, weight, y)
    if bias is not None:
        y += bias
    return y
