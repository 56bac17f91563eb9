"""Large matrix products by cuBLAS, on the stream of this rank.

The library is called by its own names, with a handle and a workspace of ours: CuPy's functions for
it refuse to be captured (`graph`). They serve where the library cannot be found under its name, and
on GPUs that have another.
"""

from __future__ import annotations

import ctypes
import functools

import numpy as np

from hpcinfer.array import Array

# Numbers of cuBLAS: element types, sums in float32, the algorithm of its choice, transposed or not.
TYPES = {"float32": 0, "float16": 2, "bfloat16": 14}
_SUMS_FLOAT32, _ANY_ALGORITHM, _TRANSPOSED, _AS_IS = 68, -1, 1, 0
_ONE, _ZERO = np.ones(1, np.float32), np.zeros(1, np.float32)

_WORKSPACE = 32 << 20  # bytes, as NVIDIA recommends for Hopper


def product(x: Array, weight: Array, y: Array) -> Array:
    """y (T, O) float32 = x (T, I) · weightᵀ (O, I), x and the weight of one type.

    Rows are unbroken; those of the weight and of y may lie apart.
    """
    (T, n_in), n_out, kind = x.shape, len(weight), TYPES[weight.dtype.name]
    row, y_row = weight.strides[0] // weight.itemsize, y.strides[0] // 4

    # Columns are what cuBLAS calls our rows: it computes yᵀ = weight · xᵀ.
    _gemm()(
        _TRANSPOSED, _AS_IS, n_out, T, n_in,
        _ONE.ctypes.data, weight.data.ptr, kind, row, x.data.ptr, kind, n_in,
        _ZERO.ctypes.data, y.data.ptr, TYPES["float32"], y_row, _SUMS_FLOAT32, _ANY_ALGORITHM,
    )  # fmt: skip
    return y


def _gemm():
    """Function that takes cublasGemmEx's arguments behind the handle."""
    from cupy.cuda import Device, get_current_stream

    return _bound(Device().id, get_current_stream().ptr)


@functools.cache
def _bound(ordinal, stream):
    """The function on one stream of one device."""
    import cupy
    from cupy.cuda import cublas, device

    # Find the library that CuPy has, or take CuPy's function.
    library = None
    if not cupy.cuda.runtime.is_hip:
        library = _library(cublas.getVersion(device.get_cublas_handle()) // 10000)
    if library is None:
        return lambda *args: cublas.gemmEx(device.get_cublas_handle(), *args)

    # Bind a handle and a workspace of ours to the stream.
    handle, workspace = ctypes.c_void_p(), cupy.cuda.alloc(_WORKSPACE)
    _check(library.cublasCreate_v2(ctypes.byref(handle)))
    _check(library.cublasSetStream_v2(handle, ctypes.c_void_p(stream)))
    place = ctypes.c_void_p(workspace.ptr)
    _check(library.cublasSetWorkspace_v2(handle, place, ctypes.c_size_t(_WORKSPACE)))

    def gemm(*args, workspace=workspace):
        _check(library.cublasGemmEx(handle, *args))

    return gemm


def _library(version):
    """The library that CuPy has loaded; None if it has another name here."""
    try:
        library = ctypes.CDLL(f"libcublas.so.{version}")
    except OSError:
        return None
    number, pointer = ctypes.c_int, ctypes.c_void_p
    library.cublasGemmEx.argtypes = [
        pointer, *[number] * 5, pointer, pointer, number, number, pointer, number, number,
        pointer, pointer, number, number, number, number,
    ]  # fmt: skip
    return library


def _check(status):
    if status:
        raise RuntimeError(f"cuBLAS: got status {status}, need 0")
