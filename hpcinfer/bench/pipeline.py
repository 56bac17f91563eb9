"""The bubble of a pipeline: share of the time that ranks wait, beside (P-1)/(m+P-1).

Every stage has the same work. A rank waits where it receives: the next micro-batch while the
pipeline fills, and results while it drains. Ranks that outnumber the cores share them, and then the
others compute while one waits; work that sleeps shows the schedule on any machine.
"""

from functools import partial
from statistics import median

import numpy as np

from hpcinfer import array
from hpcinfer.bench import limits, measure
from hpcinfer.bench.shape import sleep
from hpcinfer.bench.table import OF_LIMIT, BenchColumn, percent, text_of
from hpcinfer.parallel.pipeline import Pipeline, bubble_share

SLEEP_S = 0.02  # work of a stage that sleeps, on one micro-batch


COLUMNS = (
    BenchColumn("strategy", "strategy"),
    BenchColumn("micro-batches", "batch"),
    BenchColumn("ms", "time_s", ".2f", 1e3),
    BenchColumn("speed-up", "speedup", ".2f"),
    percent("idle %", "idle_share", ".1f"),
    percent("by formula %", "bubble_share", ".1f"),
    OF_LIMIT,
)


def run(comm, device, ffn, tokens, layers, micro, work, repeat):
    """Measure numbers of micro-batches.

    Parameters
    ----------
    device : array.Device of this rank
    ffn : shape.Ffn
    tokens : of one micro-batch
    layers : of one stage
    micro : list of numbers of micro-batches
    work : "compute" or "sleep"
    repeat : repetitions, of which the median counts

    Returns
    -------
    list of rows, the same on every rank
    """
    P, x = comm.size, device.put(ffn.tokens(tokens))
    weights = [[device.put(w) for w in ffn.weights()] for _ in range(layers)]

    def compute(x):
        for up, down in weights:
            x = x + ffn.products(x, up, down)
        return x

    # What one rank needs for the work of all stages, and what the machine needs at least.
    stage = compute if work == "compute" else partial(sleep, SLEEP_S)
    one_s = median(measure.alone_s(comm, lambda: stage(x)) for _ in range(repeat))
    flop_rate = limits.matrix_rates(comm, device)[1] if work == "compute" else None
    limit_s = ffn.flop(tokens) * layers * P / flop_rate if flop_rate else SLEEP_S

    rows = []
    for m in micro:
        measured = [
            measure.received_s(comm, partial(_through, comm, stage, x, m)) for _ in range(repeat)
        ]
        time_s = median(time_s for time_s, _ in measured)
        rows.append(
            measure.row(
                "pipeline", ffn.facts(device), f"pipeline, {work}", P, m, m * tokens,
                time_s, m * limit_s,
                layers=layers * P,
                stage_s=one_s,
                speedup=m * P * one_s / time_s,
                waited_s=median(sum(waited) / P for _, waited in measured),
                idle_share=median(sum(waited) / P / time_s for time_s, waited in measured),
                bubble_share=bubble_share(P, m),
                limit_flop_per_s=flop_rate,
            )
        )  # fmt: skip
    return rows


def table(rows):
    """The rows as text."""
    first = rows[0]
    rate = first["limit_flop_per_s"]
    limit = f"float32 matrix products, {rate / 1e9:.0f} GFLOP/s" if rate else "the time slept"
    head = (
        f"pipeline: {first['model']}, {first['dtype']}, {first['layers']} layers on "
        f"{first['ranks']} ranks, micro-batches of {first['context']} tokens, "
        f"{measure.machine(first)}; a stage takes {1e3 * first['stage_s']:.2f} ms\n"
        f"limit: {limit}, all ranks together\n"
    )
    return text_of(head, COLUMNS, rows)


def _through(comm, stage, x, m):
    """`m` micro-batches through all stages, until every rank has heard of each."""
    pipeline = Pipeline(comm)
    for _ in range(m):
        y = pipeline.forward(x if pipeline.is_first else array.namespace(x).empty_like(x), stage)
        if pipeline.is_last:
            pipeline.broadcast_result(array.host(y[-1]).view(np.uint8))
        pipeline.test()
    if not pipeline.is_last:
        for _ in range(m):
            pipeline.receive_result()
    pipeline.wait()
