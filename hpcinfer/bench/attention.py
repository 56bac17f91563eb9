"""Prefill: causal attention of one sequence, by one rank and by the ring over all ranks.

A ring that computes nothing tells how long the exchange takes by itself. During the ring the ledger
tells how long a rank waited for it, and how long it spent in tests, in which MPI copies what no
hardware copies for it. The share that no rank waited for is overlapped; the share that took no time
of the computation either is hidden. One rank and all cuts take turns in every repetition, so that
other load on the machine meets them alike.
"""

import time
from statistics import median

import numpy as np

from hpcinfer import node, partition
from hpcinfer.bench import limits, measure
from hpcinfer.bench.shape import attend_nothing, tokens_of
from hpcinfer.bench.table import OF_LIMIT, BenchColumn, percent, text_of
from hpcinfer.parallel.ring import ring

COLUMNS = (
    BenchColumn("strategy", "strategy"),
    BenchColumn("cut", lambda row: (row["cut"] or "-").replace("_", "-")),
    BenchColumn("ranks", "ranks"),
    BenchColumn("seconds", "time_s", ".3f"),
    BenchColumn("speed-up", "speedup", ".2f"),
    BenchColumn("balance", "balance", ".2f"),
    BenchColumn("exchange ms", "exchange_s", ".2f", 1e3),
    BenchColumn("waited ms", "waited_s", ".2f", 1e3),
    BenchColumn("tested ms", "tested_s", ".2f", 1e3),
    percent("overlapped %", "overlapped_share"),
    percent("hidden %", "hidden_share"),
    OF_LIMIT,
)


def run(comm, device, shape, tokens, cuts, repeat):
    """Measure prefill.

    Parameters
    ----------
    device : array.Device of this rank
    shape : AttentionShape
    tokens : length of the sequence
    cuts : names of `partition.CUTS`
    repeat : repetitions, of which the median counts

    Returns
    -------
    list of rows, the same on every rank
    """
    one_rate, all_rate = limits.matrix_rates(comm, device)
    whole, problems = _problems(comm, device, shape, tokens, cuts)

    # Let every way take its turn in every repetition.
    one, alone, rings = [], {cut: [] for cut in cuts}, {cut: [] for cut in cuts}
    for _ in range(repeat):
        one.append(measure.alone_s(comm, lambda: shape.attend(*whole)))
        for cut in cuts:
            alone[cut].append(_timed(comm, problems[cut], attend_nothing))
            rings[cut].append(_timed(comm, problems[cut], shape.attend))

    one_s = median(one)
    rows = [_row(shape, device, tokens, "one rank", 1, one_s, one_rate)]
    for cut in cuts:
        _, _, *by_itself = np.median(alone[cut], axis=0).tolist()
        time_s, balance, waited_s, tested_s = np.median(rings[cut], axis=0).tolist()
        rows.append(_row(shape, device, tokens, "ring", comm.size, time_s, all_rate))
        rows[-1] |= {
            "cut": cut,
            "speedup": one_s / time_s,
            "balance": balance,
            "exchange_s": sum(by_itself),
            "waited_s": waited_s,
            "tested_s": tested_s,
            "overlapped_share": measure.saved(waited_s, sum(by_itself)),
            "hidden_share": measure.saved(waited_s + tested_s, sum(by_itself)),
        }
    return rows


def table(rows):
    """The rows as text."""
    first, last = rows[0], rows[-1]
    head = (
        f"prefill attention: {first['model']}, {first['dtype']}, {first['context']} tokens, "
        f"{measure.machine(first)}\n"
        f"limit: float32 matrix products, {first['limit_flop_per_s'] / 1e9:.0f} GFLOP/s by one "
        f"rank, {last['limit_flop_per_s'] / 1e9:.0f} by {last['ranks']}\n"
    )
    return text_of(head, COLUMNS, rows)


def _problems(comm, device, shape, tokens, cuts):
    """Arguments of `attend` on one rank, and for each cut those of `ring`."""
    dealt = {cut: partition.CUTS[cut](tokens, comm.size) for cut in cuts}

    # Make the numbers once: the time does not depend on them.
    most = max(len(of_ranks[comm.rank]) for of_ranks in dealt.values())
    n = tokens if comm.rank == 0 else most
    q, k, v = (device.put(x) for x in (shape.queries(n), *(x[0] for x in shape.keys(n))))
    at = tokens_of(0, np.arange(tokens))
    problems = {}
    for cut, of_ranks in dealt.items():
        counts, own = [len(positions) for positions in of_ranks], of_ranks[comm.rank]
        own_at, n = tokens_of(0, own), len(own)
        problems[cut] = (q[:n], k[:n], v[:n], own_at, own_at, counts)
    return (q, k, v, at, at), problems


def _timed(comm, problem, attend):
    """Seconds of the slowest rank, balance of the ranks' computing time, waited_s, tested_s."""
    spent = {"busy": 0.0, "ring": 0.0}

    def timed_attend(*arguments):
        start_s = time.perf_counter()
        result = attend(*arguments)
        measure.await_arrays(result)
        spent["busy"] += time.perf_counter() - start_s
        return result

    def turn():
        spent["ring"] = measure.together_s(comm, lambda: ring(comm, *problem, timed_attend))

    _, _, waited_s, tested_s = measure.exchanged(comm, turn)
    busy = comm.allgather(spent["busy"])
    return spent["ring"], sum(busy) / comm.size / max(busy), waited_s, tested_s


def _row(shape, device, tokens, strategy, ranks, time_s, flop_per_s):
    """Row of one rank, or of a ring before what only a ring has."""
    # Count the scores and weighted sums of every query with the keys up to its own.
    limit_s = 2 * shape.H * shape.K * tokens * (tokens + 1) / flop_per_s
    return {
        "bench": "attention",
        **shape.facts(device),
        "strategy": strategy,
        "cut": None,
        "batch": 1,
        "context": tokens,
        "ranks": ranks,
        "threads": node.threads_per_rank(),
        "time_s": time_s,
        "tokens_per_s": tokens / time_s,
        "limit_flop_per_s": flop_per_s,
        "limit_tokens_per_s": tokens / limit_s,
        "share_of_limit": limit_s / time_s,
        "speedup": 1.0,
        "balance": 1.0,
        "exchange_s": 0.0,
        "waited_s": 0.0,
        "tested_s": 0.0,
        "overlapped_share": None,
        "hidden_share": None,
    }
