"""`cupy.cuda`: devices, streams, graphs, memory."""

from cupy._facts import unwritten
from cupy._graphs import Graph
from cupy._pinned import PinnedMemoryPool, alloc_pinned_memory
from cupy._pointers import MemoryPointer
from cupy._pools import (
    MemoryPool,
    OutOfMemoryError,
    alloc,
    get_allocator,
    set_allocator,
    using_allocator,
)
from cupy._streams import Event, Stream
from cupy._streams import current as _current
from cupy.cuda import cublas, device, memory, nccl, runtime
from cupy.cuda.device import Device, get_cublas_handle, get_device_id

__getattr__ = unwritten("cupy.cuda")


def get_current_stream(device_id=-1):
    """The stream that work goes to."""
    return _current()


def is_available():
    """True if there is a device."""
    return runtime.getDeviceCount() > 0


__all__ = [
    "Device",
    "Event",
    "Graph",
    "MemoryPointer",
    "MemoryPool",
    "OutOfMemoryError",
    "PinnedMemoryPool",
    "Stream",
    "alloc",
    "alloc_pinned_memory",
    "cublas",
    "device",
    "get_allocator",
    "get_cublas_handle",
    "get_device_id",
    "memory",
    "nccl",
    "runtime",
    "set_allocator",
    "using_allocator",
]
