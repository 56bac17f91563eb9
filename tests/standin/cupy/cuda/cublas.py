"""`cupy.cuda.cublas`: the product of two matrices at addresses."""

import ctypes
from dataclasses import dataclass

import numpy as np

from cupy import _dtypes, _memory, _streams
from cupy._linear import refuse_cublas

_TYPES = {
    0: np.dtype(np.float32),
    2: np.dtype(np.float16),
    14: _dtypes.BFLOAT16,
}
_SERVED = ((2, 2, 0), (14, 14, 0), (0, 0, 0), (2, 2, 2), (14, 14, 14))  # of A, B and C
_SUMS = (68, 69)  # float32, and float32 that may use the 16-bit units


@dataclass
class _Matrix:
    """Columns at an address, `leading` values from one to the next."""

    address: int
    dtype: np.dtype
    rows: int
    columns: int
    leading: int

    def __post_init__(self):
        if self.leading < self.rows or min(self.rows, self.columns) <= 0:
            raise RuntimeError("CUBLAS_STATUS_INVALID_VALUE: an invalid value was given")
        if self.address % self.dtype.itemsize:
            raise RuntimeError("CUBLAS_STATUS_INVALID_VALUE: a matrix is not aligned")

    @property
    def values(self):
        """(rows, columns) of the memory."""
        nbytes = self.leading * self.columns * self.dtype.itemsize
        raw = (ctypes.c_ubyte * nbytes).from_address(self.address)
        return np.frombuffer(raw, self.dtype).reshape(self.columns, self.leading).T[: self.rows]

    def _log(self):
        chunk = _memory.chunk_at(self.address)
        return None if chunk is None else chunk.log


def gemmEx(
    handle, transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, C, Ctype, ldc,
    computeType, algo,
):  # fmt: skip
    """C = alpha op(A) op(B) + beta C, of matrices that are stored by columns."""
    given = (handle, transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, C, Ctype)
    for x in (*given, ldc, computeType, algo):
        if not isinstance(x, (int, np.integer)):
            raise TypeError(f"an integer is required (got type {type(x).__name__})")
    if computeType not in _SUMS or (Atype, Btype, Ctype) not in _SERVED:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED: the requested functionality is not")
    refuse_cublas()
    a = _Matrix(A, _TYPES[Atype], *((k, m) if transa else (m, k)), lda)
    b = _Matrix(B, _TYPES[Btype], *((n, k) if transb else (k, n)), ldb)
    c = _Matrix(C, _TYPES[Ctype], m, n, ldc)

    def product():
        x, y = a.values.astype(np.float32), b.values.astype(np.float32)
        with np.errstate(all="ignore"):
            z = _scalar(alpha) * ((x.T if transa else x) @ (y.T if transb else y))
            if _scalar(beta):
                z += _scalar(beta) * c.values.astype(np.float32)
            c.values[...] = z.astype(c.dtype)

    _streams.submit("gemmEx", product, [a, b], [c])


def _scalar(address):
    return ctypes.c_float.from_address(address).value
