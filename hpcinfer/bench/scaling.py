"""Decoding by 1 rank, 2, 3 and so on: speed-up and efficiency, beside what the memory allows.

Every number of ranks is a communicator of its own inside the same job, while the other ranks sleep.
Strong scaling: the same sequences over all ranks, which cut the model in tp. Weak scaling: as many
sequences more as ranks, each rank a replica (dp), or all one model (tp). The limit is that of
decoding, measured on the same ranks: where memory bandwidth does not grow with ranks, nor can they.
"""

import gc
import time
from dataclasses import replace

from mpi4py import MPI

from hpcinfer.bench import decode
from hpcinfer.bench.table import OF_LIMIT, BenchColumn, percent, text_of
from hpcinfer.errors import UsageError, agreed, is_agreed

_POLL_S = 0.005


COLUMNS = (
    BenchColumn("scaling", "scaling"),
    BenchColumn("axis", "axis"),
    BenchColumn("ranks", "ranks"),
    BenchColumn("sequences", "batch"),
    BenchColumn("ms a step", "time_s", ".2f", 1e3),
    BenchColumn("tokens/s", "tokens_per_s", ".1f"),
    BenchColumn("speed-up", "speedup", ".2f"),
    percent("efficiency %", "efficiency"),
    BenchColumn("limit's speed-up", "limit_speedup", ".2f"),
    OF_LIMIT,
)


def run(comm, setting, ranks, batch, context, new, repeat, weak="dp"):
    """Measure scaling.

    Parameters
    ----------
    setting : drive.Setting; its layout is not used
    ranks : numbers of ranks, None for 1 to all
    batch : sequences, of all ranks in strong scaling and of each rank in weak scaling
    context, new, repeat : as for decode
    weak : "dp" or "tp", the axis of weak scaling

    Returns
    -------
    list of rows, the same on every rank
    """
    ranks = sorted(set(ranks or range(1, comm.size + 1)))
    if ranks[-1] > comm.size:
        raise UsageError(f"bench: got --ranks {ranks[-1]}, need at most {comm.size} as launched")

    # Measure each number of ranks, those of weak scaling with more sequences.
    rows = []
    for kind, axis in (("strong", "tp"), ("weak", weak)):
        first = None
        for P in ranks:
            cases = [batch * (P if kind == "weak" else 1)], [context]
            of_ranks = replace(setting, layout=f"{axis}={P}")
            row = _on(comm, P, lambda sub, s=of_ranks, c=cases: decode.run(sub, s, *c, new, repeat))
            first = first or row
            speedup = row["tokens_per_s"] / first["tokens_per_s"]
            rows.append(
                row
                | {
                    "bench": "scaling",
                    "scaling": kind,
                    "axis": axis,
                    "speedup": speedup,
                    "efficiency": speedup * first["ranks"] / P,
                    "limit_speedup": row["limit_tokens_per_s"] / first["limit_tokens_per_s"],
                }
            )
    return rows


def table(rows):
    """The rows as text."""
    first = rows[0]
    head = (
        f"scaling: decoding of {first['model']}, {decode.model_words(first)} on "
        f"{first['device']}, kernels {first['kernels']}, after {first['context']} tokens, "
        f"threads per rank {first['threads'] or 'not set'}\n"
        "strong: the same sequences on all ranks; weak: as many more as ranks; limit: reading "
        "every weight and the cache once, or the products of a step\n"
    )
    return text_of(head, COLUMNS, rows)


def _on(comm, P, function):
    """The first row of `function(sub)` on the first P ranks; the others sleep meanwhile."""
    sub = comm.Split(0 if comm.rank < P else MPI.UNDEFINED, comm.rank)
    row = error = None
    if sub != MPI.COMM_NULL:
        try:
            row = function(sub)[0]
        except Exception as raised:
            if not is_agreed(raised):
                raise
            error = raised
        gc.collect()
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(_POLL_S)
    row, error = comm.bcast((row, error), 0)
    if error is not None:
        raise agreed(error)
    return row
