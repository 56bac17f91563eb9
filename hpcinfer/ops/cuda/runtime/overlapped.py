"""Launches of kernels that may begin while the one before them still runs.

CUDA calls it programmatic dependent launch, which devices from compute capability 9.0 on have. A
kernel is at its first loads when its predecessor ends, instead of not begun: a step of few tokens
is some hundred kernels of microseconds. CuPy launches without attributes, so the driver is called.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

# The driver's number of the attribute.
_SERIALIZATION = 6


class _Attribute(ctypes.Structure):
    _fields_ = [("name", ctypes.c_int), ("_", ctypes.c_int), ("value", ctypes.c_int * 16)]


class _LaunchConfig(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("n_attributes", ctypes.c_uint),
    ]


def start(kernel: Any, grid: tuple[int, ...], threads: int, arguments: Sequence[Any]) -> bool:
    """Start a kernel on the current stream; False where that cannot be done in this way.

    Parameters
    ----------
    kernel : CuPy's RawKernel
    grid : blocks along each axis
    threads : threads of a block
    arguments : arrays and NumPy scalars
    """
    driver = _driver()
    if driver is None:
        return False
    import cupy

    # Lay the arguments out as C has them, a pointer to each.
    words = [x if isinstance(x, np.generic) else np.uint64(x.data.ptr) for x in arguments]
    places = [np.array([x]) for x in words]
    pointers = (ctypes.c_void_p * len(words))(*(x.ctypes.data for x in places))
    # Let the kernel begin when all blocks of the one before have.
    attribute = _Attribute(name=_SERIALIZATION)
    attribute.value[0] = 1
    config = _LaunchConfig(
        grid=(*grid, 1, 1)[:3],
        block=(threads, 1, 1),
        stream=cupy.cuda.get_current_stream().ptr,
        attributes=ctypes.pointer(attribute),
        n_attributes=1,
    )
    function = ctypes.c_void_p(kernel.kernel.ptr)
    status = driver.cuLaunchKernelEx(ctypes.byref(config), function, pointers, None)
    if status:
        raise RuntimeError(f"CUDA: got status {status} for the launch of a kernel, need 0")
    return True


@functools.cache
def _driver():
    """The driver's library, if it and the device know such launches; else None."""
    from cupy.cuda import device

    if int(device.get_compute_capability()) < 90:
        return None
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return driver if hasattr(driver, "cuLaunchKernelEx") else None
