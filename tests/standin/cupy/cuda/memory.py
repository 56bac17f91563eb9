"""`cupy.cuda.memory`: pools and pointers under their other names."""

from cupy._memory import (
    MemoryPointer,
    MemoryPool,
    OutOfMemoryError,
    PooledMemory,
    alloc,
    set_allocator,
    using_allocator,
)

__all__ = [
    "MemoryPointer",
    "MemoryPool",
    "OutOfMemoryError",
    "PooledMemory",
    "alloc",
    "set_allocator",
    "using_allocator",
]
