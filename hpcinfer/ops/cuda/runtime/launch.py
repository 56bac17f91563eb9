"""CUDA kernels: their sources, compiled when first launched and kept for every device.

CuPy compiles them with NVRTC for the device at hand, and keeps what it has compiled in the user's
home folder.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from hpcinfer import array, capture
from hpcinfer.array import Array
from hpcinfer.ops.cuda.runtime import overlapped

# Names of the element types in the sources.
NAMES = {"float32": "float", "float16": "f16", "bfloat16": "bf16"}

# What some sources have before them, beside what is common to all.
_PRODUCTS = ("product.cuh", "codes.cuh")
_BEFORE = {"quantize": _PRODUCTS, "experts": _PRODUCTS}

# Counters that serve all but the largest steps.
_COUNTERS = 1 << 16

_FOLDER = Path(__file__).resolve().parents[1]
_NULL = np.uint64(0)


@functools.cache
def source(file: str) -> str:
    """CUDA C++ text of a file of `ops/cuda`, with what others have of it before it."""
    names = ("common.cuh", *_BEFORE.get(file, ()), f"{file}.cu")
    return "\n".join((_FOLDER / name).read_text(encoding="utf-8") for name in names)


def launch(
    file: str,
    kernel: str,
    grid: tuple[int, ...],
    threads: int,
    *args: Any,
    options: tuple[str, ...] = (),
    shared: int = 0,
    early: bool = False,
) -> None:
    """Start a kernel on the current stream.

    Parameters
    ----------
    file : name of its source, without the ending
    grid : blocks along each axis
    threads : threads of a block
    args : arrays, None for a null pointer, int for a C++ int, float for a float, or NumPy scalars
    options : of the compiler, definitions as a rule
    shared : bytes of shared memory whose size the source leaves open
    early : True if it may begin while the kernel before still runs, as it waits for it itself
    """
    function, arguments = _kernel(file, kernel, options), tuple(map(_argument, args))
    if shared:
        _make_room(file, kernel, options, shared)
        function(grid, (threads,), arguments, shared_mem=shared)
    elif not (early and _is_captured() and overlapped.start(function, grid, threads, arguments)):
        function(grid, (threads,), arguments)


def _is_captured():
    """True while a step is captured, where what a launch costs the host does not count."""
    return capture.under_way is not None and capture.under_way.defers


@functools.cache
def _kernel(file, kernel, options):
    return _module(file, options).get_function(kernel)


@functools.cache
def _make_room(file, kernel, options, shared):
    """Let the kernel have more shared memory than every kernel may."""
    _kernel(file, kernel, options).max_dynamic_shared_size_bytes = shared


@functools.cache
def _module(file, options):
    import cupy

    return cupy.RawModule(code=source(file), options=("-std=c++14", *options))


def _argument(x):
    """What CuPy hands to the kernel: a Python number would become one of 64 bits."""
    if type(x) is int:
        return np.int32(x)
    if type(x) is float:
        return np.float32(x)
    return _NULL if x is None else x


# What the layers of the last steps have asked for: of each step a few things.
_recent = deque(maxlen=64)


def kept(objects: tuple, values: tuple, build: Callable[[], Any]) -> Any:
    """What `build` makes of these very objects and equal values; every layer of a step asks again.

    Parameters
    ----------
    objects : tuple, compared by identity, and not to be changed
    values : tuple, compared by value
    """
    for known, equal, result in reversed(_recent):
        if (
            len(known) == len(objects)
            and all(a is b for a, b in zip(known, objects, strict=True))
            and equal == values
        ):
            return result
    result = build()
    _recent.append((objects, values, result))
    return result


def on_device(
    like: Array, objects: tuple, build: Callable[[], np.ndarray], late: bool = False
) -> Array:
    """Numbers that are found from host objects, on the device; every layer of a step asks again.

    Parameters
    ----------
    like : array of the device
    objects : tuple of what they are found from, as for `kept`
    build : function that returns them as a host array; where a step is captured
        (`hpcinfer.capture`) it is called again before each replay, when the objects hold what
        belongs to that step, and must return an array of the same shape
    late : True if the objects hold it at the last moment alone, as the tokens that were chosen
    """

    def send():
        if capture.under_way is None or array.namespace(like) is np:
            return array.to_device(build(), like)
        return capture.under_way.upload(build, late)

    return kept(objects, ("on device",), send)


def copied(like: Array, *arrays: Array | None) -> list[Array | None]:
    """Host arrays on the device, None for None; every layer of a step asks again for the same."""
    return [x if x is None else on_device(like, (x,), lambda x=x: x) for x in arrays]


def counters(xp: ModuleType, n: int) -> Array:
    """At least (n,) int32 of blocks that have come: zero before and after every launch.

    They are made by the first step that asks, large enough for those that are captured later.
    """
    return _zeros(xp, max(_COUNTERS, 1 << (n - 1).bit_length()))


@functools.cache
def _zeros(xp, n):
    return xp.zeros(n, np.int32)


def has_matrix_units(x: Array) -> bool:
    """True if both 16-bit types are multiplied by matrix units where x is."""
    return array.namespace(x) is np or _capability() >= 80


@functools.cache
def _capability():
    from cupy.cuda import device

    return int(device.get_compute_capability())


def aligned(*arrays: Array | None) -> bool:
    """True if every array that is not None begins at a multiple of 16 bytes."""
    return all(x is None or address(x) % 16 == 0 for x in arrays)


def address(x: Array) -> int:
    """Where an array begins in memory."""
    return x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr


def rows_of(x: Array) -> tuple | None:
    """How the rows (last axis) of an array lie, if they are at most two axes of whole rows.

    Returns
    -------
    inner : rows of the second axis but last, 1 for a matrix
    outer_stride, inner_stride : float32 values from row to row, int64; None if it is not so
    """
    if x.dtype != np.float32 or not 1 <= x.ndim <= 3 or not 0 < x.size < 2**31:
        return None
    shape, strides = x.shape, [stride // 4 for stride in x.strides]
    if shape[-1] > 1 and strides[-1] != 1:
        return None
    inner, inner_stride = (shape[1], strides[1]) if x.ndim == 3 else (1, 0)
    outer_stride = strides[0] if x.ndim > 1 else 0
    return inner, np.int64(outer_stride), np.int64(inner_stride)
