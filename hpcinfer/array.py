"""NumPy or CuPy behind one name, element types, and the device a rank owns.

Code above this file is written once: it asks `namespace(x)` for the array module of its operands
and never names NumPy's or CuPy's own functions for data that may live on a device.
"""

from __future__ import annotations

import functools
import os
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from hpcinfer import capture
from hpcinfer.node import host_free_bytes, keep_freed_memory, large_empty

# How libraries are told to take device memory: Cray MPICH and MPICH, MVAPICH, Open MPI.
_GPU_MPI = ("MPICH_GPU_SUPPORT_ENABLED", "MV2_USE_CUDA", "OMPI_MCA_opal_cuda_support")

# An array of NumPy or CuPy, for hints.
Array = Any

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": BFLOAT16,
}

# Part of a GPU's free memory that arrays may take: libraries and kernels need some for themselves.
_GPU_SHARE = 0.92

# What a driver of GPUs leaves in the file system, with a device or a broken one.
_GPU_FILES = ("/dev/nvidia0", "/dev/kfd")


def parse_dtype(name: str | np.dtype) -> np.dtype:
    """Element type named `name`.

    Raises
    ------
    ValueError
        If the name is none of float32, float16, bfloat16.
    """
    try:
        return DTYPES[str(name).removeprefix("torch.")]
    except KeyError:
        raise ValueError(f"dtype: got {name!r}, need one of {', '.join(DTYPES)}") from None


def is_half(dtype: np.dtype | type) -> bool:
    """True for the 16-bit types, which are widened before anything is summed."""
    return np.dtype(dtype).itemsize == 2


def namespace(x: Array) -> ModuleType:
    """Array module (numpy or cupy) that owns `x`."""
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(x, cupy.ndarray):
        return cupy
    return np


class Device:
    """The device one rank owns: host memory with NumPy, or one GPU with CuPy.

    Attributes
    ----------
    name : "cpu" or "cuda"
    xp : array module
    ordinal : number of the GPU on this node, None on the CPU
    """

    def __init__(self, name: str, local_rank: int = 0):
        self.name = name
        self.xp: ModuleType = np
        self.ordinal: int | None = None
        self._limit: int | None = None
        keep_freed_memory()
        if name == "cuda":
            self.xp = _cupy()
            self.ordinal = local_rank % self.xp.cuda.runtime.getDeviceCount()
            self.xp.cuda.Device(self.ordinal).use()
            _stream(self.ordinal).use()

    def put(self, array: np.ndarray) -> Array:
        """`array` (host) in this device's memory; no copy on the CPU."""
        return self.xp.asarray(array) if self.name == "cuda" else array

    def empty(self, shape: int | Sequence[int], dtype: np.dtype | type) -> Array:
        """Uninitialised array in this device's memory."""
        if self.name == "cuda":
            return self.xp.empty(shape, dtype)
        return large_empty(shape, dtype)

    @property
    def identity(self) -> str | None:
        """What tells this GPU from the others of the node, whichever of them a rank sees."""
        if self.name != "cuda":
            return None
        return self.xp.cuda.runtime.deviceGetPCIBusId(self.ordinal)

    def share(self, ranks: int) -> None:
        """Take no more than one of `ranks` equal parts of what a GPU can give now.

        For all ranks of the GPU at a time, when each has made its Device and before any allocates.
        """
        if self.name == "cuda":
            self._limit = int(_GPU_SHARE * self.free_bytes()) // ranks
            self.xp.get_default_memory_pool().set_limit(size=self._limit)

    def free_bytes(self) -> int:
        """Memory that this device can still give, in bytes: to this rank, once it is shared."""
        if self.name == "cuda":
            pool = self.xp.get_default_memory_pool()
            free = int(self.xp.cuda.runtime.memGetInfo()[0]) + pool.free_bytes()
            return free if self._limit is None else min(free, self._limit - pool.used_bytes())
        return host_free_bytes()

    def peak_bytes(self) -> int:
        """Most memory of this GPU that arrays of this rank have taken so far; 0 on the CPU."""
        if self.name != "cuda":
            return 0
        return self.xp.get_default_memory_pool().total_bytes()

    def trim(self) -> None:
        """Give back page-locked host memory that nothing uses any more."""
        if self.name == "cuda":
            self.xp.get_default_pinned_memory_pool().free_all_blocks()

    def __str__(self) -> str:
        return self.name if self.ordinal is None else f"{self.name}:{self.ordinal}"


def select_device(choice: str, local_rank: int) -> Device:
    """Device for `--device cpu|cuda|auto` on the rank that is number `local_rank` of its node."""
    if choice not in ("cpu", "cuda", "auto"):
        raise ValueError(f"device: got {choice!r}, need cpu, cuda or auto")
    if choice == "cpu" or not (trouble := gpu_trouble()):
        return Device("cpu" if choice == "cpu" else "cuda", local_rank)
    if choice == "cuda":
        raise ValueError(
            f"device: got cuda, need a visible GPU and CuPy; use --device cpu ({trouble})"
        )
    return Device("cpu", local_rank)


def gpu_trouble() -> str | None:
    """Why no GPU can be used, in the words of who says so; None if one can."""
    try:
        n = _cupy().cuda.runtime.getDeviceCount()
    except ImportError as error:
        return f"{error} (pip install cupy-cuda12x or cupy-cuda13x)"
    except Exception as error:  # of the driver, whose type only CuPy knows
        return str(error)
    return None if n else "no GPU is visible"


def auto_warning(device: Device) -> str | None:
    """What `--device auto` says where it takes the CPU of a node that has a GPU; else None."""
    if device.name != "cpu" or not any(Path(place).exists() for place in _GPU_FILES):
        return None
    trouble = gpu_trouble()
    return trouble and f"warning: device auto takes the CPU, though there is a GPU here: {trouble}"


def host(x: Array) -> np.ndarray:
    """`x` in host memory, as a NumPy array."""
    if namespace(x) is np:
        return x
    capture.refuse("the host reads what is computed")
    return namespace(x).asnumpy(x, blocking=True)


def synchronize(x: Array) -> None:
    """Wait until the device has written `x`; nothing to do on the CPU."""
    xp = namespace(x)
    if xp is not np:
        xp.cuda.get_current_stream().synchronize()


# Copies to the device under way: (event after it, host array that it reads).
_copies: deque[tuple[Any, np.ndarray]] = deque()


def staged(x: Array) -> np.ndarray:
    """Values of a device array in page-locked host memory, contiguous, once they are computed."""
    capture.refuse("the host reads what is computed")
    buffer = page_locked(x.shape, x.dtype)
    if x.size:
        namespace(x).ascontiguousarray(x).get(out=buffer, blocking=True)
    return buffer


def unstage(buffer: np.ndarray, x: Array) -> None:
    """Write a page-locked host array to a device array, in the order of its stream.

    The host goes on before the device has read the array, which is not to be written again.
    """
    if not x.size:
        return

    # Copy in the order of the stream.
    capture.refuse("the host writes what is computed with")
    xp = namespace(x)
    whole = x if x.flags.c_contiguous else xp.empty(x.shape, x.dtype)
    whole.set(buffer, stream=xp.cuda.get_current_stream())

    # Keep what is copied until the device has read it.
    event = xp.cuda.Event(disable_timing=True)
    event.record()
    while _copies and _copies[0][0].done:
        _copies.popleft()
    _copies.append((event, buffer))
    if whole is not x:
        x[...] = whole


def to_device(x: np.ndarray, like: Array) -> Array:
    """Host array `x` in the memory that `like` is in; the host goes on at once and may change x."""
    xp = namespace(like)
    if xp is np:
        return x
    buffer, result = page_locked(x.shape, x.dtype), xp.empty(x.shape, x.dtype)
    buffer[...] = x
    unstage(buffer, result)
    return result


def page_locked(shape: int | Sequence[int], dtype: np.dtype | type) -> np.ndarray:
    """Uninitialised host array that a GPU reads and writes itself.

    Locking pages takes long, so sizes are rounded up to powers of 2 and memory that is given back
    is used again.
    """
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if not nbytes:
        return np.empty(shape, dtype)
    memory = _cupy().cuda.alloc_pinned_memory(1 << (nbytes - 1).bit_length())
    return np.frombuffer(memory, np.uint8, nbytes).view(dtype).reshape(shape)


def widen(x: Array) -> Array:
    """`x` in float32; no copy if it is float32 already."""
    if x.dtype == BFLOAT16:
        xp = namespace(x)
        return (x.view(xp.uint16).astype(xp.uint32) << 16).view(xp.float32)
    return x if x.dtype == np.float32 else x.astype(np.float32)


def narrow(x: Array, dtype: np.dtype | type) -> Array:
    """`x` (float32) rounded to `dtype`, nearest even; no copy if it has that type."""
    return x if x.dtype == dtype else x.astype(dtype)


def pack(*arrays: Array) -> Array:
    """Arrays of one length as one run of bytes, in the namespace of the last."""
    xp = namespace(arrays[-1])
    return xp.concatenate(
        [xp.ascontiguousarray(xp.asarray(x)).reshape(-1).view(np.uint8) for x in arrays]
    )


def unpack(block: Array, n: int, like: Sequence[Array]) -> list[Array]:
    """The arrays of `n` items that `pack` made a block of; types and other axes as in `like`."""
    arrays, start = [], 0
    for x in like:
        stop = start + n * item_bytes(x)
        arrays.append(block[start:stop].view(x.dtype).reshape(n, *x.shape[1:]))
        start = stop
    return arrays


def pack_rows(*arrays: Array) -> Array:
    """Matrices of one length as one matrix of bytes, side by side: (n, bytes of a row) uint8."""
    xp = namespace(arrays[0])
    return xp.concatenate([xp.ascontiguousarray(x).view(np.uint8) for x in arrays], axis=1)


def unpack_rows(records: Array, like: Sequence[Array]) -> list[Array]:
    """The matrices that `pack_rows` put side by side; types and widths as in `like`."""
    xp, arrays, start = namespace(records), [], 0
    for x in like:
        stop = start + item_bytes(x)
        arrays.append(xp.ascontiguousarray(records[:, start:stop]).view(x.dtype))
        start = stop
    return arrays


def item_bytes(x: Array) -> int:
    """Bytes of one item along the first axis of `x`."""
    return x.itemsize * int(np.prod(x.shape[1:]))


def mpi_reads_device_memory() -> bool:
    """True if the environment says that MPI takes pointers to a GPU's memory."""
    named = os.environ.get("HPCINFER_GPU_MPI")
    if named is not None:
        return named == "1"
    return any(os.environ.get(name, "").lower() in ("1", "true") for name in _GPU_MPI)


def nccl_is_wanted() -> bool:
    """True if the user has said that sums over GPUs go by NCCL."""
    return os.environ.get("HPCINFER_NCCL") == "1"


def _cupy() -> ModuleType:
    """CuPy, which is not installed everywhere."""
    import cupy

    return cupy


@functools.cache
def _stream(ordinal: int) -> Any:
    """The stream of this process on a GPU, whose work can be captured.

    It and the default stream wait for each other: some functions of CuPy know that one alone.
    """
    return _cupy().cuda.Stream()
