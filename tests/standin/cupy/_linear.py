"""Products of matrices, by cuBLAS as CuPy has it."""

import numpy as np

from cupy import _dtypes, _streams
from cupy._array import Array, produce, write


def refuse_cublas():
    """Refuse cuBLAS in a capture, as CuPy does."""
    if _streams.capturing() is not None:
        raise NotImplementedError(
            "calling cuBLAS API during stream capture is currently unsupported"
        )


def matmul(x1, x2, out=None):
    """Matrix product, of stacks of matrices too."""
    for x in (x1, x2):
        if not isinstance(x, Array):
            raise TypeError(f"Unsupported type {type(x)}")
    if not (x1.ndim and x2.ndim):
        raise ValueError("Scalar operands are not allowed, use '*' instead")
    refuse_cublas()
    dtype = np.promote_types(x1.dtype, x2.dtype)
    batched = max(x1.ndim, x2.ndim) > 2
    if batched and dtype == _dtypes.BFLOAT16:
        raise TypeError(f"stand-in: products of stacks of {dtype} are not written")
    x1, x2 = (_operand(x, dtype, batched) for x in (x1, x2))

    def product(a, b):
        with np.errstate(all="ignore"):
            a, b = (x.astype(_sums_in(dtype), copy=False) for x in (a, b))
            return np.asarray(a @ b).astype(dtype, copy=False)

    if out is None:
        return produce("gemm", product, x1, x2)
    return write("gemm", out, product, x1, x2)


def _sums_in(dtype):
    half = dtype.itemsize == 2 and dtype.kind in "fV"
    return np.float32 if half else dtype


def _operand(x, dtype, batched):
    """A matrix as cuBLAS takes it: copied, if its rows and columns lie otherwise."""
    if x.dtype != dtype:
        return x.astype(dtype)
    if not x.size or x.flags.c_contiguous:
        return x
    has_rows = x.ndim == 2 and x.itemsize in x.strides
    return x if has_rows and not batched else x.copy()


def dot(a, b, out=None):
    """Product of matrices."""
    return matmul(a, b, out=out)
