"""Section 2 of the theory, between layers: experts, stages, two sides, parameters in parts, queue.

A layer is x + down · GELU(up · x), or the same with a mixture of experts; it stands for both halves
of a model's layer, whose tokens do not meet here.
"""

from functools import partial

import numpy as np

from hpcinfer import array, partition
from hpcinfer.ops.activation import gelu
from hpcinfer.ops.experts import experts_ffn
from hpcinfer.ops.linear import linear
from hpcinfer.parallel import disagg, zero
from hpcinfer.parallel.data import Queue
from hpcinfer.parallel.expert import experts
from hpcinfer.parallel.pipeline import Pipeline
from hpcinfer.verify import oracle
from hpcinfer.verify.linear import counts, normal, own
from hpcinfer.verify.row import Case, Trial

# Layers, tokens, widths, experts, choices of a token, items: none divides by 2, 3, 4 or 8.
N, T, D, F, E, TOP, ITEMS = 5, 19, 13, 11, 11, 2, 101
WORD, ALIGN = 4, 64  # bytes of a number, and of what a kept parameter is rounded up to
ROW_BYTES = WORD * (D + 2 * TOP + D)  # of a token with its choices, there, and of its result back


# --- parameters in parts -------------------------------------------------------------------------


def zero_units(comm, rng, put, small_bytes):
    """Every rank has tokens of its own, and a part of every layer."""
    x, *layers = _dense_layers(rng, put)
    names = ("up", "up_bias", "down")
    units = [
        zero.cut(comm, dict(zip(names, layer, strict=True)), small_bytes, n % comm.size)
        for n, layer in enumerate(layers)
    ]
    gathered, y = zero.Gathered(comm, units, array.namespace(x)), x[own(comm, T)]
    for n in range(N):
        y = _dense(y, **gathered.get(n))
        gathered.test()
    gathered.settle()

    # Above the limit (P-1) n bytes are sent, below it m by the owner.
    n_bytes = sum(-(-w.nbytes // ALIGN) * ALIGN for layer in layers for w in layer)
    formula_bytes = n_bytes * (comm.size - 1 if small_bytes == 0 else comm.size > 1)
    return Trial((y,), (_through(x, layers)[own(comm, T)],), formula_bytes)


# --- stages --------------------------------------------------------------------------------------


def pipeline_stages(comm, rng, put):
    """Uneven micro-batches, one of them empty; every rank hears the results."""
    x, *layers = _dense_layers(rng, put)
    micro = [x[:8], x[8:8], x[8:9], x[9:]]
    pipeline, stage = Pipeline(comm), partition.stages([1] * N, comm.size)[comm.rank]

    def compute(x):
        for layer in layers[slice(*stage)]:
            x = _dense(x, *layer)
        return x

    # Hand micro-batches on, and tell all ranks what the last stage has.
    heard = []
    for x_in in micro:
        y = pipeline.forward(
            x_in if pipeline.is_first else array.namespace(x).empty_like(x_in), compute
        )
        if pipeline.is_last:
            heard.append(array.host(y))
            pipeline.broadcast_result(heard[-1].reshape(-1).view(np.uint8))
    if not pipeline.is_last:
        heard = [pipeline.receive_result().view(np.float32).reshape(-1, D) for _ in micro]
    pipeline.wait()
    formula_bytes = 2 * WORD * T * D * (comm.size - 1)
    return Trial((np.concatenate(heard),), (_through(x, layers),), formula_bytes)


# --- experts -------------------------------------------------------------------------------------


def expert_cut(comm, rng, put, n_experts):
    """Tokens on every rank, which go to the ranks of the experts that they chose."""
    x, up, down = _mixture(rng, put, n_experts)
    ids, weights = _choices(rng, n_experts)
    shares, tokens = partition.experts(n_experts, F, comm.size), own(comm, T)
    compute = _experts_of(shares[comm.rank], up, down)
    y = experts(comm, x[tokens], put(ids[tokens]), put(weights[tokens]), shares, compute)

    home = np.repeat(np.arange(comm.size), counts(comm, T))
    formula_bytes = 8 * comm.size * (comm.size - 1) + _pairs(ids, shares, home) * ROW_BYTES
    return Trial((y,), (oracle.mixture(x, ids, weights, up, down, gelu)[tokens],), formula_bytes)


def few_experts(comm, rng, put):
    """Columns of an expert are cut where ranks are more than experts."""
    return expert_cut(comm, rng, put, -(-comm.size // 2))


def disagg_sides(comm, rng, put, n_experts):
    """Half the ranks attend, in two micro-batches; the others have the experts."""
    x, up, down = _mixture(rng, put, n_experts)
    choices = [_choices(rng, n_experts) for _ in range(N)]
    n_attention = -(-comm.size // 2)
    attends = comm.rank < n_attention
    shares = partition.experts(n_experts, F, comm.size - n_attention)
    start, stop = partition.block(T, n_attention)[comm.rank] if attends else (0, 0)
    micro = [slice(start, start + (stop - start) // 3), slice(start + (stop - start) // 3, stop)]

    # The two sides meet over an intercommunicator.
    side = comm.Split(int(attends), comm.rank)
    inter = side.Create_intercomm(0, comm, n_attention if attends else 0)
    if attends:
        y = disagg.attention_side(
            inter,
            range(N),
            [x[rows] for rows in micro],
            lambda n, b, x: (x, x, *(put(c[micro[b]]) for c in choices[n]), False),
            lambda n, b, x, y: x + y,
            lambda n: shares,
        )
    else:
        compute = _experts_of(shares[side.rank], up, down)
        disagg.ffn_side(
            inter, range(N), 2, lambda n, *sent: compute(*sent), D, lambda n: TOP,
            xp=array.namespace(x),
        )  # fmt: skip
    inter.Free()
    side.Free()

    # Every token leaves its rank for each FFN rank that it needs.
    nowhere = np.full(T, -1)
    formula_bytes = ROW_BYTES * sum(_pairs(ids, shares, nowhere) for ids, _ in choices)
    whole = array.host(x)
    for ids, weights in choices:
        whole = whole + oracle.mixture(whole, ids, weights, up, down, gelu)
    got = array.namespace(x).concatenate(y) if attends else x[:0]
    return Trial((got,), (whole[start:stop],), formula_bytes)


# --- replicas ------------------------------------------------------------------------------------


def data_queue(comm, rng, put):
    """The ranks take in turn, so that everybody's calls are known; 8 bytes each, but by rank 0."""
    queue, given = Queue(comm, ITEMS), []
    while len(given) < ITEMS:
        for rank in range(comm.size):
            block = comm.bcast(queue.take(ITEMS) if comm.rank == rank else None, rank)
            given += range(*block)
    queue.free()

    # A block is the share of what is left: a reading and an addition; then a reading alone.
    left, calls = ITEMS, 0
    while left:
        for rank in range(comm.size):
            calls += (2 if left else 1) * (rank > 0)
            left -= -(-left // (2 * comm.size - 1))
    return Trial((np.array(given),), (np.arange(ITEMS),), 8 * calls)


ROWS = [
    Case("zero, allgather", "parameters", partial(zero_units, small_bytes=0)),
    Case("zero, broadcast", "parameters", partial(zero_units, small_bytes=np.inf)),
    Case("pipeline", "layers", pipeline_stages),
    Case("expert", "experts", partial(expert_cut, n_experts=E)),
    Case("expert, E < P", "experts, columns", few_experts),
    Case("disagg", "experts apart", partial(disagg_sides, n_experts=E), least_ranks=2),
    Case("disagg, dense", "columns apart", partial(disagg_sides, n_experts=1), least_ranks=2),
    Case("data", "queue", data_queue),
]


def _dense_layers(rng, put):
    """Tokens x (T, D), and of every layer up (F, D), up_bias (F,), down (D, F)."""
    x, up, up_bias, down = normal(rng, put, (T, D), (N, F, D), (N, F), (N, D, F))
    return x, *zip(up, up_bias, down / np.float32(F), strict=True)


def _dense(x, up, up_bias, down):
    return x + linear(gelu(linear(x, up, up_bias)), down)


def _through(x, layers):
    """All layers of all tokens, by the definition."""
    x = array.host(x)
    for up, up_bias, down in layers:
        x = x + oracle.linear(gelu(oracle.linear(x, up, up_bias)), down)
    return x


def _mixture(rng, put, n_experts):
    """Tokens x (T, D), up (E, F, D), down (E, D, F)."""
    x, up, down = normal(rng, put, (T, D), (n_experts, F, D), (n_experts, D, F))
    return x, up, down / np.float32(F)


def _choices(rng, n_experts):
    """Choices of every token and their weights, (T, k) each; no choice where experts are fewer."""
    ids = rng.random((T, max(TOP, n_experts))).argsort(axis=1)[:, :TOP]
    weights = rng.random((T, TOP)).astype(np.float32)
    taken = ids < n_experts
    return np.where(taken, ids, -1), np.where(taken, weights, np.float32(0))


def _experts_of(share, up, down):
    """Function (x, ids, weights) -> (T, D), one rank's experts and columns."""
    experts, columns = slice(*share.experts), slice(*share.columns)
    own_up, own_down = up[experts, columns], down[experts, :, columns]
    return lambda x, ids, weights: experts_ffn(
        x, ids, weights, own_up, own_down, experts.start, gelu
    )


def _pairs(ids, shares, home):
    """Pairs of a token and a rank, not its home (T,), that has columns of an expert it chose."""
    return sum(
        rank != home[t]
        and share.columns[0] < share.columns[1]
        and any(share.experts[0] <= e < share.experts[1] for e in ids[t])
        for t in range(T)
        for rank, share in enumerate(shares)
    )
