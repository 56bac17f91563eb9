"""How compiled functions are called, by the threads of a rank for a part of the rows each.

While a step is captured (`runtime.graph`), the calls are kept, and results lie in its memory.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np

from hpcinfer import capture, node

# Work below which a thread is not woken: it takes about this many bytes of reading to do so.
_LEAST_BYTES = 1 << 20


def over_rows(function: Callable, n: int, *arguments: Any, work_bytes: int = 0) -> None:
    """Call function(start, stop, *arguments) for parts that make up 0..n, and wait for all.

    Parameters
    ----------
    function : compiled, holds no lock while it runs
    work_bytes : bytes that all parts read together, about
    """
    if work_bytes < _LEAST_BYTES or (threads := node.threads()) == 1 or n < threads:
        call(function, 0, n, *arguments)
        return
    capture.refuse("a rank with several threads")
    bounds = [n * i // threads for i in range(threads + 1)]
    waiting = [
        _pool(threads).submit(function, start, stop, *arguments)
        for start, stop in zip(bounds[1:-1], bounds[2:], strict=True)
    ]
    function(0, bounds[1], *arguments)
    for future in waiting:
        future.result()


def call(function: Callable, *arguments: Any) -> None:
    """Call a compiled function."""
    if capture.under_way is not None:
        capture.under_way.call(function, arguments)
    function(*arguments)


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory for a result of compiled functions, contents undefined."""
    if capture.under_way is not None:
        return capture.under_way.empty(shape, dtype)
    return np.empty(shape, dtype)


@cache
def _pool(threads):
    return ThreadPoolExecutor(threads - 1, "hpcinfer-kernel")
