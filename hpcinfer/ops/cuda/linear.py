"""Matrix products: a kernel that reads the weight once for few tokens, cuBLAS for more."""

import numpy as np

from hpcinfer import array
from hpcinfer.ops.cuda.launch import NAMES, aligned, launch
from hpcinfer.ops.quantize import Quantized

_TOKENS, _ROWS = (1, 2, 4, 8), (1, 2, 4)

OPTIONS = (("-DWEIGHT=f16",), ("-DWEIGHT=bf16",))
KERNELS = tuple(f"matvec_{tokens}_{rows}" for tokens in _TOKENS for rows in _ROWS)

# Warps of a block; warps that keep the memory of a large device busy.
_BLOCK_WARPS, _BUSY_WARPS = 8, 2048

# Numbers of cuBLAS: element types, sums in float32, the algorithm of its choice, transposed or not.
_TYPES, _FLOAT32 = {"float16": 2, "bfloat16": 14}, 0
_SUMS_FLOAT32, _ANY_ALGORITHM, _TRANSPOSED, _AS_IS = 68, -1, 1, 0
_ONE, _ZERO = np.ones(1, np.float32), np.zeros(1, np.float32)


def linear(x, weight, bias=None):
    """As `ops.linear.linear`, for 16-bit weights."""
    name = weight.dtype.name
    if isinstance(weight, Quantized) or name not in _TYPES:
        return NotImplemented
    if not (x.size and weight.size and weight.flags.c_contiguous):
        return NotImplemented
    xp = array.namespace(x)
    x = xp.ascontiguousarray(x)
    few = len(x) <= _TOKENS[-1] and x.shape[1] % 8 == 0 and aligned(x, weight)
    return _by_rows(x, weight, bias, name) if few else _by_blocks(x, weight, bias, name)


def _by_rows(x, weight, bias, name):
    """Products of few tokens: a warp for one or more outputs."""
    (T, n_in), n_out, x = x.shape, len(weight), array.widen(x)
    y = array.namespace(x).empty((T, n_out), np.float32)
    fused = bias is not None and bias.dtype == np.float32 and bias.flags.c_contiguous

    # More outputs to a warp read x less often, as long as there are enough warps.
    tokens = next(n for n in _TOKENS if n >= T)
    most = 2 if tokens <= 2 else 4
    rows = max([1, *(n for n in _ROWS if n <= most and n_out // n >= _BUSY_WARPS)])
    launch(
        "linear", f"matvec_{tokens}_{rows}",
        (-(-n_out // (rows * _BLOCK_WARPS)),), 32 * _BLOCK_WARPS,
        x, weight, bias if fused else None, y, T, n_in, n_out,
        options=(f"-DWEIGHT={NAMES[name]}",),
    )  # fmt: skip
    if bias is not None and not fused:
        y += bias
    return y


def _by_blocks(x, weight, bias, name):
    """Products of many tokens by cuBLAS, whose matrix units sum in float32."""
    from cupy.cuda import cublas, device

    if name == "bfloat16" and int(device.get_compute_capability()) < 80:
        return NotImplemented
    (T, n_in), n_out, kind = x.shape, len(weight), _TYPES[name]
    y = array.namespace(x).empty((T, n_out), np.float32)
    x = array.narrow(x, weight.dtype)

    # Columns are what cuBLAS calls our rows: it computes yᵀ = weight · xᵀ.
    cublas.gemmEx(
        device.get_cublas_handle(), _TRANSPOSED, _AS_IS, n_out, T, n_in,
        _ONE.ctypes.data, weight.data.ptr, kind, n_in, x.data.ptr, kind, n_in,
        _ZERO.ctypes.data, y.data.ptr, _FLOAT32, n_out, _SUMS_FLOAT32, _ANY_ALGORITHM,
    )  # fmt: skip
    if bias is not None:
        y += bias
    return y
