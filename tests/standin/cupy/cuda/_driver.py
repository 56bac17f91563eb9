"""The driver's library for ctypes: launches with attributes, which CuPy does not make.

STANDIN_DRIVER=1 loads it; the process can then not find a real one.
"""

import ctypes
import functools
import os
import sys
import traceback
import weakref
from pathlib import Path

import numpy as np

from cupy._streams import Stream
from cupy.cuda import _compile

_INVALID_VALUE = 1
_TYPES = {"p": np.uint64, "i": np.int32, "l": np.int64, "f": np.float32}  # letters of the shim

_functions = weakref.WeakValueDictionary()  # number -> RawKernel


class Function:
    """What `RawKernel.kernel` is: a kernel as the driver knows it.

    Attributes
    ----------
    ptr : number that the driver takes for the kernel
    """

    def __init__(self, kernel):
        if os.environ.get("STANDIN_DRIVER") == "1":
            _load()
        self.ptr = id(kernel)
        _functions[self.ptr] = kernel


@functools.cache
def _load():
    """Load the driver under its name, by which `ctypes.CDLL` then finds it."""
    text = (Path(__file__).resolve().parent / "driver.cc").read_text(encoding="utf-8")
    library = _compile.library(text, ("-Wl,-soname,libcuda.so.1",))
    library.standin_launch(_launch)
    return library


@ctypes.CFUNCTYPE(
    ctypes.c_int, *[ctypes.POINTER(ctypes.c_uint)] * 2, ctypes.c_uint, *[ctypes.c_void_p] * 2,
    ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip
def _launch(grid, block, shared_bytes, stream, function, arguments):
    """A launch that was asked of the library, on a stream, captures included."""
    try:
        kernel = _functions[function]
        args = [
            np.frombuffer(ctypes.string_at(place, _TYPES[letter]().nbytes), _TYPES[letter])[0]
            for letter, place in zip(kernel.signature, arguments, strict=False)
        ]
        with Stream._of(stream or 0):
            kernel(tuple(grid[:3]), tuple(block[:3]), args, shared_mem=shared_bytes)
    except Exception:
        traceback.print_exc(file=sys.stderr)
        return _INVALID_VALUE
    return 0
