"""Decoding: tokens per second at some numbers of sequences and contexts, by the engine's own steps.

The limit is that of the machine: a step reads every weight once, of the experts those that its
tokens choose, and the keys and values of all sequences, and computes its products; whichever takes
longer by the limits measured in the same run. All cases take turns in every repetition.
"""

import sys
from statistics import median

from hpcinfer.bench import work
from hpcinfer.bench.drive import Bench
from hpcinfer.bench.table import OF_LIMIT, BenchColumn, text_of
from hpcinfer.errors import agreed

# Numbers of sequences and of tokens that a sweep goes through.
_SWEEP = [1 << n for n in range(9)], [1 << n for n in (10, 12, 14, 16, 17)]

COLUMNS = (
    BenchColumn("sequences", "batch"),
    BenchColumn("context", "context"),
    BenchColumn("ms a step", "time_s", ".2f", 1e3),
    BenchColumn("tokens/s", "tokens_per_s", ".1f"),
    BenchColumn("limit tokens/s", "limit_tokens_per_s", ".1f"),
    BenchColumn("bound by", "bound"),
    OF_LIMIT,
)


def run(comm, setting, batch, context, new, repeat, sweep=False):
    """Measure decoding.

    Parameters
    ----------
    setting : drive.Setting
    batch, context : numbers of sequences, and of tokens that each has before; every combination
        is a case, as far as its cache fits
    new : steps of a repetition
    repeat : repetitions; the median of all steps counts
    sweep : True for 1 to 256 sequences at contexts of 1k to 128k tokens instead

    Returns
    -------
    list of rows, the same on every rank
    """
    batch, context = _SWEEP if sweep else (batch, context)
    bench = Bench(comm, setting, max(batch), max(context) + new + 2)
    cases = fitting(bench, [(B, C) for C in context for B in batch], new + 1)
    turns_s, touched = measured(bench, cases, new, repeat)
    facts = bench.facts()
    limits = bench.limits()
    return [
        row(bench, limits, facts, "decode", case, new, turns_s[case], touched[case])
        for case in cases
    ]


def fitting(bench, cases, more):
    """The cases whose cache fits, which is then allocated; says which do not.

    Parameters
    ----------
    cases : list of (batch, context)
    more : tokens of a sequence beside its context
    """
    pages = {case: bench.pages(case[0], case[1] + more) for case in cases}
    fit = [case for case in cases if pages[case] <= bench.most_pages]
    page_bytes = max(bench.comm.allgather(bench.model.page_bytes))
    for case in cases:
        if case not in fit and bench.comm.rank == 0:
            print(
                f"skipped   {case[0]} sequences of {case[1]} tokens: got room for "
                f"{bench.most_pages * page_bytes / 1e6:.1f} MB of cache a rank, need "
                f"{pages[case] * page_bytes / 1e6:.1f}",
                file=sys.stderr,
            )
    if not fit:
        raise agreed(
            ValueError("bench: got no case whose cache fits, need fewer or shorter sequences")
        )
    bench.allocate(max(pages[case] for case in fit))
    return fit


def measured(bench, cases, new, repeat):
    """Seconds of every step of every case, and the share of the experts that it touched.

    Returns
    -------
    turns_s : dict case -> list over replicas of lists of seconds
    touched : dict case -> share
    """
    spent, touched = {case: [] for case in cases}, {}
    for _ in range(repeat):
        for case in cases:
            B, C = case
            own = -(-B // bench.grid.layout.dp)
            one, touched[case] = bench.touched(own, lambda B=B, C=C: bench.decode(B, C, new))
            spent[case] += one.turns_s()
    return {case: bench.replicas(spent[case]) for case in cases}, touched


def row(bench, limits, facts, name, case, new, turns_s, touched):
    """Row of one case.

    Parameters
    ----------
    turns_s : list over replicas of the seconds of their steps
    touched : share of the experts that a step touched
    """
    # Add up what the replicas do in their own time.
    B, C = case
    counts = [n for n in bench.replicas(bench.own(B)) if n]
    medians = [median(turns) for turns in turns_s if turns]
    rate = sum(n / time_s for n, time_s in zip(counts, medians, strict=True))

    # Count what a step reads and computes at least, at the mean length.
    length = C + (new + 1) / 2
    read_bytes = bench.read_bytes(B, length, touched)
    of_token, of_head = work.token_flop(bench.arch)
    flop = B * (of_token + of_head + work.attention_flop(bench.arch, 1, round(length)))
    limit_s = limits.least_s(read_bytes, flop)

    return {
        "bench": name,
        **facts,
        "batch": B,
        "context": C,
        "time_s": max(medians),
        "tokens_per_s": rate,
        "limit_tokens_per_s": B / limit_s,
        "share_of_limit": rate * limit_s / B,
        "steps": max(map(len, turns_s)),
        "read_bytes": read_bytes,
        "flop": flop,
        "touched_share": touched,
        "bound": "memory" if limit_s > flop / limits.flop_per_s else "products",
        **limits.facts(),
    }


def head(rows, limits="reading every weight and the cache once, or the products of a step"):
    """Lines above the table of a loaded model."""
    first = rows[0]
    sizes = (first[f"{name}_bytes"] / 1e6 for name in ("weight", "cache", "peak"))
    memory = "weights {:.1f} MB, cache {:.1f} MB, peak of all {:.1f} MB".format(*sizes)
    return (
        f"{first['bench']}: {first['model']}, {model_words(first)}, {first['layout']} on "
        f"{first['device']}, kernels {first['kernels']}, threads per rank "
        f"{first['threads'] or 'not set'}\n"
        f"limit: {limits}; reading {first['limit_read_byte_per_s'] / 1e9:.1f} GB/s, products "
        f"{first['limit_flop_per_s'] / 1e9:.0f} GFLOP/s, all {first['ranks']} ranks together\n"
        f"an Allreduce of a token's hidden state takes {1e6 * first['limit_reduce_s']:.0f} us; "
        f"load of the machine before {first['load_before']:.1f}\n"
        f"memory of a rank: {memory}\n"
    )


def model_words(row):
    """Element type of a model, and how its weights are kept if otherwise."""
    return row["dtype"] + (f", {row['weights']}" if row["weights"] != row["dtype"] else "")


def table(rows):
    """The rows as text."""
    return text_of(head(rows), COLUMNS, rows)
