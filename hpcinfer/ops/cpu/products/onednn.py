"""Products of 16-bit matrices by oneDNN's C library, which knows AVX-512 BF16 and AMX.

The library is found beside Python (the wheels `onednn-cpu-*` put it there) or where the system's
loader looks. A product of given sizes and strides is prepared once and kept.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache, lru_cache
from pathlib import Path

import numpy as np

from hpcinfer import array, node
from hpcinfer.array import Array
from hpcinfer.ops.cpu.runtime import features

_OK, _CPU, _IN_ORDER = 0, 1, 1
_TYPES = {"float16": 1, "bfloat16": 2, "float32": 3}
_SOURCE, _WEIGHTS, _DESTINATION = 1, 33, 17
_PRIMITIVES = 512  # prepared products that are kept


class _Argument(ctypes.Structure):
    _fields_ = [("which", ctypes.c_int), ("memory", ctypes.c_void_p)]


class _Version(ctypes.Structure):
    _fields_ = [("major", ctypes.c_int), ("minor", ctypes.c_int), ("patch", ctypes.c_int)]


@cache
def library() -> ctypes.CDLL | None:
    """The library, or None."""
    beside = Path(sys.prefix) / "lib"
    names = [str(path) for path in sorted(beside.glob("libdnnl.so.3"))] + ["libdnnl.so.3"]
    for name in names:
        try:
            found = ctypes.CDLL(name)
        except OSError:
            continue
        if version_of(found)[0] == 3:
            node.use_threads(node.threads())  # of the library that came with this one, too
            return found
    return None


def version_of(found: ctypes.CDLL) -> tuple[int, int, int]:
    """(major, minor, patch) of a library."""
    found.dnnl_version.restype = ctypes.POINTER(_Version)
    v = found.dnnl_version().contents
    return v.major, v.minor, v.patch


@cache
def serves(dtype: np.dtype) -> bool:
    """True if the library is there, with more than its slow reference for a type."""
    if library() is None:
        return False
    if dtype == array.BFLOAT16:
        return features.has("avx512_bf16") or features.has("amx_bf16")
    return dtype == np.float32 or features.has("avx512_fp16")


def product(a: Array, b: Array, y: Array) -> bool:
    """y = a · b, summed in float32.

    Parameters
    ----------
    a : (T, I) of 16 bits or float32, any strides with one of them 1
    b : (I, O) of the same type, likewise
    y : (T, O) float32, or of the 16-bit type to be rounded to it; rows contiguous

    Returns
    -------
    False if the library cannot do this
    """
    strides = *_strides(a), *_strides(b), y.strides[0] // y.itemsize
    key = (*a.shape, b.shape[1], *strides, _name(a), _name(y))
    primitive = _primitive(*key)
    if primitive is None:
        return False
    primitive.run(a.ctypes.data, b.ctypes.data, y.ctypes.data)
    return True


def multiply(a: Array, b: Array, y: Array) -> None:
    """y = a · b of 16-bit matrices, by the library or without it; arguments as for `product`."""
    if not product(a, b, y):
        np.matmul(array.widen(a), array.widen(b), out=y)


def _strides(x):
    return x.strides[0] // x.itemsize, x.strides[1] // x.itemsize


def _name(x):
    return "bfloat16" if x.dtype in (array.BFLOAT16, "uint16") else str(x.dtype)


@cache
def _engine():
    """(engine, stream)."""
    engine, stream = ctypes.c_void_p(), ctypes.c_void_p()
    _check(library().dnnl_engine_create(ctypes.byref(engine), _CPU, ctypes.c_size_t(0)))
    _check(library().dnnl_stream_create(ctypes.byref(stream), engine, _IN_ORDER))
    return engine, stream


@lru_cache(_PRIMITIVES)
def _primitive(M, K, N, a_row, a_column, b_row, b_column, y_row, *names):
    try:
        return _Primitive(M, K, N, (a_row, a_column), (b_row, b_column), y_row, *names)
    except _NotDone:
        return None


class _NotDone(Exception):
    """The library does not do what was asked for."""


class _Primitive:
    """One prepared product, and the memories that it reads and writes."""

    def __init__(self, M, K, N, a_strides, b_strides, y_row, name, y_name):
        dnnl, (engine, self._stream) = library(), _engine()
        # Describe the matrices.
        kind = _TYPES[name]
        descriptors = [
            _descriptor((M, K), a_strides, kind),
            _descriptor((K, N), b_strides, kind),
            _descriptor((M, N), (y_row, 1), _TYPES[y_name]),
        ]

        # Prepare the product.
        described, self._primitive = ctypes.c_void_p(), ctypes.c_void_p()
        a, b, y = descriptors
        self._memories = []
        status = dnnl.dnnl_matmul_primitive_desc_create(
            ctypes.byref(described), engine, a, b, None, y, None
        )
        if status != _OK:
            raise _NotDone
        _check(dnnl.dnnl_primitive_create(ctypes.byref(self._primitive), described))
        dnnl.dnnl_primitive_desc_destroy(described)

        # Make memories whose addresses are set before each run.
        self._memories = [_memory(d) for d in descriptors]
        for descriptor in descriptors:
            dnnl.dnnl_memory_desc_destroy(descriptor)
        numbers = (_SOURCE, _WEIGHTS, _DESTINATION)
        pairs = zip(numbers, self._memories, strict=True)
        self._arguments = (_Argument * 3)(*(_Argument(n, m.value) for n, m in pairs))

    def run(self, *addresses: int) -> None:
        """Multiply what lies at the addresses of a, b and y."""
        dnnl = library()
        for memory, address in zip(self._memories, addresses, strict=True):
            dnnl.dnnl_memory_set_data_handle(memory, ctypes.c_void_p(address))
        _check(dnnl.dnnl_primitive_execute(self._primitive, self._stream, 3, self._arguments))
        _check(dnnl.dnnl_stream_wait(self._stream))

    def __del__(self):
        for memory in self._memories:
            library().dnnl_memory_destroy(memory)
        if self._primitive:
            library().dnnl_primitive_destroy(self._primitive)


def _descriptor(shape, strides, kind):
    descriptor, numbers = ctypes.c_void_p(), ctypes.c_int64 * 2
    _check(
        library().dnnl_memory_desc_create_with_strides(
            ctypes.byref(descriptor), 2, numbers(*shape), kind, numbers(*strides)
        )
    )
    return descriptor


def _memory(descriptor):
    memory = ctypes.c_void_p()
    engine, _ = _engine()
    _check(library().dnnl_memory_create(ctypes.byref(memory), descriptor, engine, None))
    return memory


def _check(status):
    if status != _OK:
        raise RuntimeError(f"onednn: got status {status}, need 0; use --kernels plain")
