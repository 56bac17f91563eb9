"""`cupy.cuda.cublas`: the product of two matrices at addresses, and cuBLAS's library for ctypes."""

import ctypes
import functools
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cupy import _dtypes, _segments, _streams
from cupy._linear import refuse_cublas
from cupy.cuda import _compile

_VERSION = 990000  # of a library that no machine has
_TYPES = {0: np.dtype(np.float32), 2: np.dtype(np.float16), 14: _dtypes.BFLOAT16}
_SERVED = ((2, 2, 0), (14, 14, 0), (0, 0, 0), (2, 2, 2), (14, 14, 14))  # of A, B and C
_SUMS = (68, 69, 77)  # float32, float32 by 16-bit units, float32 by TF32 units
_FAILED = 13


class CUBLASError(RuntimeError):
    """What cuBLAS answered."""


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
            raise CUBLASError("CUBLAS_STATUS_INVALID_VALUE: a leading dimension or a size")
        if self.address % self.dtype.itemsize:
            raise CUBLASError("CUBLAS_STATUS_INVALID_VALUE: a matrix is not aligned")

    @property
    def values(self):
        """(rows, columns) of the memory."""
        raw = (ctypes.c_ubyte * self._nbytes).from_address(self.address)
        return np.frombuffer(raw, self.dtype).reshape(self.columns, self.leading).T[: self.rows]

    @property
    def _nbytes(self):
        return self.leading * self.columns * self.dtype.itemsize

    def _chunk(self):
        return _segments.chunk_at(self.address)

    def _span(self):
        return _segments.span_at(self.address, self._nbytes)


def gemmEx(handle, *args):
    """C = alpha op(A) op(B) + beta C, of matrices that are stored by columns.

    Parameters
    ----------
    args : transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, C, Ctype, ldc,
        computeType, algo: integers, alpha and beta and the matrices addresses
    """
    for x in (handle, *args):
        if not isinstance(x, (int, np.integer)):
            raise TypeError(f"an integer is required (got type {type(x).__name__})")
    refuse_cublas()
    _submit(*args)


def _submit(
    transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, C, Ctype, ldc, sums, _algo
):
    if sums not in _SUMS or (Atype, Btype, Ctype) not in _SERVED:
        raise CUBLASError("CUBLAS_STATUS_NOT_SUPPORTED: types")
    a = _Matrix(A, _TYPES[Atype], *((k, m) if transa else (m, k)), lda)
    b = _Matrix(B, _TYPES[Btype], *((n, k) if transb else (k, n)), ldb)
    c = _Matrix(C, _TYPES[Ctype], m, n, ldc)
    alpha, beta = (ctypes.c_float.from_address(x).value for x in (alpha, beta))

    def product():
        x, y = a.values.astype(np.float32), b.values.astype(np.float32)
        with np.errstate(all="ignore"):
            z = alpha * ((x.T if transa else x) @ (y.T if transb else y))
            if beta:
                z += beta * c.values.astype(np.float32)
            c.values[...] = z.astype(c.dtype)

    _streams.submit("gemmEx", product, [a, b], [c])


def getVersion(handle):
    """Version of cuBLAS; the library of that version is there from now on."""
    _library()
    return _VERSION


@functools.cache
def _library():
    """Load cuBLAS under its name, by which `ctypes.CDLL` then finds it."""
    text = (Path(__file__).resolve().parent / "cublas.cc").read_text(encoding="utf-8")
    name = f"-Wl,-soname,libcublas.so.{_VERSION // 10000}"
    library = _compile.library(text, (name,))
    library.standin_product(_product)
    return library


# Types of the arguments from transa on: integers and pointers.
_ARGUMENTS = [ctypes.c_void_p if kind == "p" else ctypes.c_int for kind in "iiiiippiipiippiiii"]


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, *_ARGUMENTS)
def _product(stream, *args):
    """A product that was asked of the library: on the stream of its handle, captures included."""
    try:
        with _streams.Stream._of(stream or 0):
            _submit(*args)
    except Exception:
        traceback.print_exc(file=sys.stderr)
        return _FAILED
    return 0
