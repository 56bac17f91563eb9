"""Expert parallelism: the exchange beside the machine's copy limit, and the balance of the ranks.

Tokens choose experts evenly, or by a Zipf distribution, expert e with a chance that falls as
1/(e+1)^s, so that the first ranks have most of the work. A run that computes nothing tells how long
dispatch and combine take by themselves.
"""

from functools import partial

import numpy as np

from hpcinfer import partition
from hpcinfer.bench import limits, measure
from hpcinfer.bench.table import OF_LIMIT, BenchColumn, percent, text_of
from hpcinfer.errors import UsageError
from hpcinfer.ops.activation import relu
from hpcinfer.ops.experts import experts_ffn
from hpcinfer.parallel import expert

COLUMNS = (
    BenchColumn("routing", "strategy"),
    BenchColumn("tokens max/mean", "tokens_balance", ".2f"),
    BenchColumn("choices max/mean", "choices_balance", ".2f"),
    BenchColumn("bytes sent", "sent_bytes"),
    BenchColumn("exchange ms", "exchange_s", ".2f", 1e3),
    percent("of copying %", "exchange_share_of_limit"),
    BenchColumn("whole ms", "time_s", ".2f", 1e3),
    OF_LIMIT,
)


def run(comm, device, ffn, tokens, experts, top, zipf, repeat):
    """Measure routings.

    Parameters
    ----------
    device : array.Device of this rank
    ffn : shape.Ffn, of one expert
    tokens : of every rank
    experts : over all ranks
    top : experts that a token chooses
    zipf : list of exponents s, 0 for even routing
    repeat : repetitions, of which the median counts

    Returns
    -------
    list of rows, the same on every rank
    """
    if top > experts:
        raise UsageError(f"bench: got --top {top} of --experts {experts}, need experts enough")

    # Give every rank its experts.
    _, flop_rate = limits.matrix_rates(comm, device)
    _, copy_rate = limits.copy_rates(comm, device)
    clock = partial(measure.together_s, comm)
    shares = partition.experts(experts, ffn.F, comm.size)
    own = shares[comm.rank]
    compute, x, rows = _experts_of(device, ffn, own), device.put(ffn.tokens(tokens)), []
    facts = ffn.facts(device) | {"model": f"{experts} experts, {ffn}, top {top}"}
    rates = {"limit_flop_per_s": flop_rate, "limit_byte_per_s": copy_rate}

    # Time each routing whole, and its exchange by itself.
    for skew in zipf:
        ids = choices(comm.rank, tokens, experts, top, skew)
        weights, on_device = device.xp.full(ids.shape, 1 / top, np.float32), device.put(ids)
        half, exchange = (
            partial(expert.experts, comm, x, on_device, weights, shares, function)
            for function in (compute, lambda x, ids, weights: x)
        )
        time_s = measure.call_s(clock, half, repeat)
        exchange_s = measure.call_s(clock, exchange, repeat)
        calls, sent_bytes, _, _ = measure.exchanged(comm, exchange)

        # Enter what the exchange cost beside the whole.
        more = _balance(comm, ids, shares) | rates
        more |= {"skew": skew, "sent_bytes": sent_bytes, "calls": calls, "exchange_s": exchange_s}
        share = sent_bytes / copy_rate / exchange_s if sent_bytes else None
        more["exchange_share_of_limit"] = share
        name, all_tokens = f"Zipf {skew:g}" if skew else "even", tokens * comm.size
        limit_s = ffn.flop(tokens) * top * comm.size / flop_rate
        where = name, comm.size, comm.size, all_tokens
        rows.append(measure.row("expert", facts, *where, time_s, limit_s, **more))
    return rows


def choices(rank, tokens, n_experts, top, skew):
    """Random choices without repetition: (tokens, top) int32, other ones on every rank."""
    rng = np.random.default_rng(rank)
    chance = np.arange(1, n_experts + 1) ** -float(skew)

    # The largest of log(chance) + Gumbel noise are a draw without replacement.
    noise = rng.gumbel(size=(tokens, n_experts))
    return (-np.log(chance) - noise).argsort(axis=1)[:, :top].astype(np.int32)


def _experts_of(device, ffn, own):
    """Function (x, ids, weights) -> y of the experts that a rank owns."""
    weights = [ffn.weights(own.columns) for _ in range(*own.experts)]
    up, down = (device.put(np.stack(w)) for w in zip(*weights, strict=True))
    return lambda x, ids, weights: experts_ffn(x, ids, weights, up, down, own.experts[0], relu)


def table(rows):
    """The rows as text."""
    first = rows[0]
    head = (
        f"expert: {first['model']}, {first['dtype']}, {first['context']} tokens on each of "
        f"{first['ranks']} ranks, {measure.machine(first)}\n"
        f"limit: exchange beside copying, {first['limit_byte_per_s'] / 1e9:.1f} GB/s; whole beside "
        f"float32 matrix products, {first['limit_flop_per_s'] / 1e9:.0f} GFLOP/s; all ranks "
        "together\n"
    )
    return text_of(head, COLUMNS, rows)


def _balance(comm, ids, shares):
    """Most over mean of the tokens that ranks receive, and of the choices that they compute."""
    arriving = [len(rows) for rows in partition.destinations(ids, shares)]
    chosen = [((ids >= s.experts[0]) & (ids < s.experts[1])).sum() for s in shares]
    totals = np.sum(comm.allgather((arriving, chosen)), axis=0)
    tokens, choices = (totals.max(axis=1) / totals.mean(axis=1)).tolist()
    return {"tokens_balance": tokens, "choices_balance": choices}
