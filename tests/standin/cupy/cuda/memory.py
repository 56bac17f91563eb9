"""`cupy.cuda.memory`: pools and pointers under their other names."""

from cupy._pointers import MemoryPointer, PooledMemory
from cupy._pools import MemoryPool, OutOfMemoryError, alloc, set_allocator, using_allocator

__all__ = [
    "MemoryPointer",
    "MemoryPool",
    "OutOfMemoryError",
    "PooledMemory",
    "alloc",
    "set_allocator",
    "using_allocator",
]
