"""A bound on the memory that reading a stranger's file may take."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def bounded_memory(more_bytes: int) -> Iterator[None]:
    """Let the process map at most so much more memory than now; what asks for more is refused it.

    For all of its threads, so the body should be short. What is refused raises MemoryError in
    Python, and errors of their own in libraries.
    """
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [n for n in (now + more_bytes, soft) if n != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
