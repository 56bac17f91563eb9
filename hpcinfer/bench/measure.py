"""Clocks over ranks, and what they measure.

A function that is timed returns the arrays that it computes last: it is over when the device has
written them.
"""

import time
import tracemalloc
from statistics import median

import numpy as np

from hpcinfer import array, node
from hpcinfer.ledger import ledger

_POLL_S = 0.002
_CALLS_S = 0.1  # how long calls are repeated for one measurement


def await_arrays(result):
    """Wait until the device has written an array, or those of a tuple or list."""
    for x in result if isinstance(result, tuple | list) else (result,):
        array.synchronize(x)


def repeated(function, n):
    """Function that calls another one n times, and returns what it has returned last."""

    def calls():
        for _ in range(n):
            result = function()
        return result

    return calls


def alone_s(comm, function):
    """Seconds that rank 0 takes for `function()` while the others sleep; known to every rank."""
    comm.Barrier()
    start_s = time.perf_counter()
    if comm.rank == 0:
        await_arrays(function())
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
    await_arrays(function())
    return max(comm.allgather(time.perf_counter() - start_s))


def call_s(clock, function, repeat, most=100):
    """Median seconds of one call, over `repeat` runs of as many calls as fill a tenth of a second.

    Calls follow each other without a barrier, as those of a model's layers do.

    Parameters
    ----------
    clock : function (function) -> seconds, equal on every rank, such as `together_s` of a comm
    """
    n = max(1, min(most, int(_CALLS_S / clock(function))))
    calls = repeated(function, n)
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


def received_s(comm, function, verb="Recv"):
    """Seconds of the slowest rank for `function()`, and of every rank those in calls of `verb`."""
    ledger.clear()
    time_s = together_s(comm, function)
    mine = sum(entry.time_s for (v, _, _), entry in ledger.entries.items() if v == verb)
    return time_s, comm.allgather(mine)


def held_bytes(device, function):
    """Bytes held at most during `function()`, and after it: by NumPy and Python, or on the GPU.

    Of a GPU the most is what its pool has taken, which uses memory again where sizes are alike.
    """
    if device.name == "cuda":
        return _held_on_gpu(device, function)
    tracemalloc.start()
    try:
        kept = function()
        current, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    del kept
    return peak, current


def _held_on_gpu(device, function):
    pool = device.xp.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.used_bytes()
    kept = function()
    await_arrays(kept)
    peak, current = pool.total_bytes() - before, pool.used_bytes() - before
    del kept
    return peak, current


def saved(spent_s, alone_s):
    """Share of the time alone that was not spent; None where nothing is exchanged."""
    return max(0.0, 1 - spent_s / alone_s) if alone_s else None


def machine(row):
    """What a row was measured on, in words for the head of a table."""
    return f"device {row['device']}, threads per rank {row['threads'] or 'not set'}"


def row(bench, facts, strategy, ranks, batch, tokens, time_s, limit_s, **more):
    """The fields that every row has.

    Parameters
    ----------
    facts : dict with model, dtype and device
    batch, tokens : sequences or micro-batches, and the tokens of all of them together
    time_s : measured
    limit_s : what the machine needs at least, by its own limit measured in the same run
    more : fields of this bench, among them speedup and exchange_s
    """
    return {
        "bench": bench,
        **facts,
        "strategy": strategy,
        "batch": batch,
        "context": tokens // batch,
        "ranks": ranks,
        "threads": node.threads_per_rank(),
        "time_s": time_s,
        "tokens_per_s": tokens / time_s,
        "limit_tokens_per_s": tokens / limit_s,
        "share_of_limit": limit_s / time_s,
        "speedup": 1.0,
        "exchange_s": 0.0,
        **more,
    }
