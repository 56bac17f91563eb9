"""The threads of a rank: compiled functions over a part of the rows each."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache

from hpcinfer import array

# Work below which a thread is not woken: it takes about this many bytes of reading to do so.
_LEAST_BYTES = 1 << 20


def over_rows(function, n, *arguments, work_bytes=0):
    """Call function(start, stop, *arguments) for parts that make up 0..n, and wait for all.

    Parameters
    ----------
    function : compiled, holds no lock while it runs
    work_bytes : bytes that all parts read together, about
    """
    if work_bytes < _LEAST_BYTES or (threads := array.threads()) == 1 or n < threads:
        function(0, n, *arguments)
        return
    bounds = [n * i // threads for i in range(threads + 1)]
    waiting = [
        _pool(threads).submit(function, start, stop, *arguments)
        for start, stop in zip(bounds[1:-1], bounds[2:], strict=True)
    ]
    function(0, bounds[1], *arguments)
    for future in waiting:
        future.result()


@cache
def _pool(threads):
    return ThreadPoolExecutor(threads - 1, "hpcinfer-kernel")
