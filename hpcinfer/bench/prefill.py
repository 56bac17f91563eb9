"""Prefill: prompt tokens per second at some numbers of prompts and lengths, by the engine's steps.

The limit is that of the machine's matrix products: those of every token with the weights, of the
experts those that it chooses, and with the keys before it, and the head once a prompt. All cases
take turns in every repetition.
"""

from statistics import median

from hpcinfer.bench import decode, work
from hpcinfer.bench.drive import Bench
from hpcinfer.bench.table import OF_LIMIT, BenchColumn, text_of

COLUMNS = (
    BenchColumn("prompts", "batch"),
    BenchColumn("tokens", "context"),
    BenchColumn("seconds", "time_s", ".3f"),
    BenchColumn("tokens/s", "tokens_per_s", ".1f"),
    BenchColumn("limit tokens/s", "limit_tokens_per_s", ".1f"),
    OF_LIMIT,
)


def run(comm, setting, batch, context, repeat):
    """Measure prefill.

    Parameters
    ----------
    setting : drive.Setting
    batch, context : numbers of prompts, and of tokens of each; every combination is a case, as
        far as its cache fits
    repeat : repetitions, of which the median counts, after one that does not count

    Returns
    -------
    list of rows, the same on every rank
    """
    bench = Bench(comm, setting, max(batch), max(context) + 2)
    cases = decode.fitting(bench, [(B, C) for C in context for B in batch], 1)
    spent = {case: [] for case in cases}
    for n in range(repeat + 1):
        for case in cases:
            time_s = bench.prefill(*case).prompts_s()
            spent[case] += [time_s] if n else []
    spent = {case: bench.replicas(spent[case]) for case in cases}
    facts = bench.facts()
    limits = bench.limits()
    return [_row(bench, limits, facts, case, spent[case]) for case in cases]


def table(rows):
    """The rows as text."""
    return text_of(decode.head(rows, "the matrix products of all tokens"), COLUMNS, rows)


def _row(bench, limits, facts, case, spent):
    """Row of one case; `spent` has the seconds of each repetition of every replica."""
    # Add up what the replicas do in their own time.
    B, C = case
    counts = bench.replicas(bench.own(B))
    medians = [median(times) for times in spent]
    rate = sum(n * C / time_s for n, time_s in zip(counts, medians, strict=True) if n)

    # Count what the prompts compute and read at least.
    of_token, of_head = work.token_flop(bench.arch)
    flop = B * (C * of_token + of_head + work.attention_flop(bench.arch, C, C))
    read_bytes = bench.read_bytes(B, 0)
    limit_s = limits.least_s(read_bytes, flop)

    return {
        "bench": "prefill",
        **facts,
        "batch": B,
        "context": C,
        "time_s": max(medians),
        "tokens_per_s": rate,
        "limit_tokens_per_s": B * C / limit_s,
        "share_of_limit": rate * limit_s / (B * C),
        "read_bytes": read_bytes,
        "flop": flop,
        **limits.facts(),
    }
