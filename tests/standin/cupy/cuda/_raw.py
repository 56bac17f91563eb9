"""Kernels from CUDA sources: compiled for the host, and run thread by thread by tests/cuda/shim.h.

They are started as CuPy starts them: the types of the arguments are compared with the kernel's,
grid and block with what CUDA allows.
"""

import ctypes
import functools
import re
from pathlib import Path

import numpy as np

from cupy import _dtypes, _segments, _streams
from cupy._array import Array
from cupy._pointers import MemoryPointer, using
from cupy._segments import DRY
from cupy.cuda import _compile
from cupy.cuda._driver import Function
from cupy.cuda.device import Device

SHIM = (Path(__file__).resolve().parents[3] / "cuda" / "shim.h").read_text(encoding="utf-8")

_KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(([^)]*)\)")
_LETTERS = {"int32": "i", "int64": "l", "float32": "f", "uint64": "p"}  # as in the shim
_GRID, _BLOCK = (2**31 - 1, 65535, 65535), 1024


class RawModule:
    """The kernels of a source."""

    def __init__(self, *, code=None, path=None, options=(), backend="nvrtc"):
        if type(options) is not tuple:
            raise TypeError("Argument 'options' has incorrect type (expected tuple)")
        self._code, self._options = code, options

    def get_function(self, name):
        """A kernel by its name."""
        return RawKernel(self._code, name, self._options)


class RawKernel:
    """A kernel.

    Attributes
    ----------
    signature : a letter for the type of every argument, as the shim gives them
    kernel : what the driver knows of it
    max_dynamic_shared_size_bytes : shared memory that a launch may ask for
    """

    def __init__(self, code, name, options=(), backend="nvrtc"):
        defined = tuple(option for option in options if option.startswith("-D"))
        library, kernels = compiled(code, defined)
        if name not in kernels:
            raise RuntimeError(f"CUDA_ERROR_NOT_FOUND: named symbol not found ({name})")
        self.name, self._pointers = name, kernels[name]
        self.kernel, self._shared = Function(self), 48 << 10
        self._run = getattr(library, f"run_{name}")
        text = ctypes.create_string_buffer(64)
        getattr(library, f"signature_{name}")(text)
        self.signature = text.value.decode()

    def __call__(self, grid, block, args, *, shared_mem=0, stream=None):
        if type(grid) is not tuple or type(block) is not tuple:
            raise TypeError("Argument 'grid' has incorrect type (expected tuple)")
        grid, block = ([max(1, int(n)) for n in (*sizes, 1, 1)[:3]] for sizes in (grid, block))
        if any(map(int.__gt__, grid, _GRID)) or np.prod(block) > _BLOCK:
            raise RuntimeError(f"CUDA_ERROR_INVALID_VALUE: grid {grid}, block {block}")
        if shared_mem > self._shared:
            raise RuntimeError(f"CUDA_ERROR_INVALID_VALUE: {shared_mem} bytes of shared memory")
        if block[1:] != [1, 1]:
            raise NotImplementedError("stand-in: blocks of several axes are not written")
        given = "".join(map(_letter, args))
        if given != self.signature:
            raise TypeError(f"stand-in: {self.name} takes {self.signature}, got {given}")
        reads, writes = self._memory(args)
        shape, values = (ctypes.c_uint * 3)(*grid), [_value(x) for x in args]

        def work():
            if DRY:
                return
            pointers = (ctypes.c_void_p * len(values))(*(x.ctypes.data for x in values))
            if self._run(shape, block[0], pointers):
                raise RuntimeError(f"{self.name}: threads wait for ever")

        with using(stream):
            _streams.submit(self.name, work, reads, writes)

    @property
    def max_dynamic_shared_size_bytes(self):
        """Bytes of shared memory that a launch may ask for, no more than the device has."""
        return self._shared

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, nbytes):
        if nbytes > Device().attributes["MaxSharedMemoryPerBlockOptin"]:
            raise RuntimeError(f"CUDA_ERROR_INVALID_VALUE: {nbytes} bytes of shared memory")
        self._shared = nbytes

    def _memory(self, args):
        """Operands among the arguments: what is read only, and what may be written."""
        operands = {"const": [], "other": [], "value": []}
        for x, kind in zip(args, self._pointers, strict=True):
            is_address = kind != "value" and not isinstance(x, Array)
            operands[kind].append(_Address(x) if is_address else x)
        return operands["const"], operands["other"]


class _Address:
    """Memory that an argument points to, of which no more is known."""

    def __init__(self, x):
        self._at = int(x or 0)

    def _chunk(self):
        return _segments.chunk_at(self._at)

    def _span(self):
        return _segments.span_at(self._at, 1)


def _kind(parameter):
    """ "const" or "other" for what a parameter points to; "value" for the rest."""
    if "*" not in parameter:
        return "value"
    return "const" if parameter.split()[0] == "const" else "other"


def _letter(x):
    if x is None or isinstance(x, (Array, MemoryPointer)):
        return "p"
    if isinstance(x, np.ndarray):
        raise TypeError(f"Unsupported type {type(x)}")
    return _LETTERS.get(_dtypes.of_scalar(x)[0].name, "?")


def _value(x):
    """An argument in memory of the host."""
    if x is None:
        return np.zeros(1, np.uint64)
    if isinstance(x, (Array, MemoryPointer)):
        return np.array([x.data.ptr if isinstance(x, Array) else x.ptr], np.uint64)
    return np.array([x], _dtypes.of_scalar(x)[0])


@functools.cache
def compiled(code, options):
    """A source as a library for the host, and its kernels: name -> what each argument is."""
    text = _compile.run(["g++", "-E", "-P", *options, "-xc++", "-"], code)
    kernels = {
        name: [_kind(parameter) for parameter in parameters.split(",")]
        for name, parameters in _KERNEL.findall(text)
    }
    runs = (f"RUN({name})" for name in kernels)
    return _compile.library("\n".join([SHIM, code, *runs, ""]), options), kernels
