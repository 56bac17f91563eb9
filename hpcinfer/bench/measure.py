"""Clocks over ranks, and the limits of the machine measured with them."""

import time
from statistics import median

import numpy as np

from hpcinfer.collectives import ledger

_POLL_S = 0.002
_MATRIX = 2048  # rows and columns
_READ_BYTES = 1 << 30  # over all ranks, so that a large last-level cache does not flatter


def alone_s(comm, function):
    """Seconds that rank 0 takes for `function()` while the others sleep; known to every rank."""
    comm.Barrier()
    start_s = time.perf_counter()
    if comm.rank == 0:
        function()
    time_s = time.perf_counter() - start_s

    # Poll with sleeps: a blocking wait spins, and would take a core from the rank that works.
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(_POLL_S)
    return comm.bcast(time_s, 0)


def together_s(comm, function):
    """Seconds that the slowest rank takes for `function()`, started together; on every rank."""
    comm.Barrier()
    start_s = time.perf_counter()
    function()
    return max(comm.allgather(time.perf_counter() - start_s))


def call_s(clock, function, repeat, target_s=0.1, most=100):
    """Median seconds of one call, over `repeat` runs of as many calls as fill `target_s`.

    Calls follow each other without a barrier, as those of a model's layers do.

    Parameters
    ----------
    clock : function (function) -> seconds, equal on every rank, such as `together_s` of a comm
    """
    n = max(1, min(most, int(target_s / clock(function))))

    def calls():
        for _ in range(n):
            function()

    return median(clock(calls) for _ in range(repeat)) / n


def exchanged(comm, function):
    """What `function()` enters in the ledger.

    Returns
    -------
    calls : of each rank by verb, in words
    sent_bytes : by all ranks together
    waited_s, tested_s : seconds in MPI as `collectives.Entry` tells them apart, mean of the ranks
    """
    ledger.clear()
    function()
    entries = ledger.entries
    calls = ", ".join(f"{verb} x {entry.calls}" for (verb, _, _), entry in entries.items())
    mine = [(entry.sent_bytes, entry.time_s, entry.test_s) for entry in entries.values()]
    totals = np.sum(comm.allgather(np.sum(mine or [(0, 0, 0)], axis=0)), axis=0).tolist()
    sent_bytes, waited_s, tested_s = totals
    return calls or "none", round(sent_bytes), waited_s / comm.size, tested_s / comm.size


def matrix_rates(comm, repeat=5):
    """Floating-point operations per second in float32 matrix products: rank 0 alone, all ranks."""
    a, b = (np.full((_MATRIX, _MATRIX), x, np.float32) for x in (0.5, 0.25))
    c = np.empty_like(a)
    return _rates(comm, lambda: np.matmul(a, b, out=c), 2 * _MATRIX**3, repeat)


def read_rates(comm, repeat=5):
    """Bytes read from memory per second: by rank 0 alone, by all ranks together."""
    x = np.ones(_READ_BYTES // comm.size // 4, np.float32)
    return _rates(comm, lambda: np.dot(x, x), x.nbytes, repeat)


def _rates(comm, function, amount, repeat):
    """Amount per second of rank 0 alone, and of all ranks with one `amount` each."""
    function()
    one_s, all_s = (
        median(clock(comm, function) for _ in range(repeat)) for clock in (alone_s, together_s)
    )
    return amount / one_s, amount * comm.size / all_s
