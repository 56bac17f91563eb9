"""Strategy `pipeline`: layers on different ranks, micro-batches in order, results heard by all."""

import numpy as np
import pytest

from hpcinfer import partition
from hpcinfer.ledger import ledger
from hpcinfer.parallel.pipeline import Pipeline, bubble_share

D = 6
MICRO_BATCHES = [(3,), (2, 7, 1), (0, 4, 0, 5), (1,) * 9, (40_000, 3)]  # tokens of each


def layer(n):
    """Layer n of a model, of which no two commute."""
    rng = np.random.default_rng(n)
    weight, bias = rng.normal(size=(D, D)).astype(np.float32) / 2, np.float32(n + 1)
    return lambda x: np.tanh(x @ weight) + bias


def inputs(tokens):
    rng = np.random.default_rng(99)
    return [rng.normal(size=(T, D)).astype(np.float32) for T in tokens]


def through(comm, stages, xs):
    """Results of all micro-batches on the last rank, and what was heard on the others."""
    pipeline, ys = Pipeline(comm), []

    def compute(x):
        for n in range(*stages[comm.rank]):
            x = layer(n)(x)
        return x

    for x in xs:
        y = pipeline.forward(x if pipeline.is_first else np.full_like(x, np.nan), compute)
        assert (y is not None) == pipeline.is_last
        if pipeline.is_last:
            ys.append(y)
            pipeline.broadcast_result(_digest(y))
        pipeline.test()
    heard = (
        [_digest(y) for y in ys] if pipeline.is_last else [pipeline.receive_result() for _ in xs]
    )
    pipeline.wait()
    return ys, heard


def _digest(y):
    """What the last rank found: of a length of its own for each micro-batch."""
    return np.ascontiguousarray(y[::2]).reshape(-1).view(np.uint8)


@pytest.fixture(autouse=True)
def empty_ledger():
    ledger.clear()


# --- equals one rank -----------------------------------------------------------------------------


@pytest.mark.parametrize("N", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("tokens", MICRO_BATCHES)
def test_equals_one_rank(comm, N, tokens):
    """Fewer layers than stages, no multiple of them, none; micro-batches of any size."""
    xs = inputs(tokens)
    ys, heard = through(comm, partition.stages([1] * N, comm.size), xs)
    whole = list(xs)
    for n in range(N):
        whole = [layer(n)(x) for x in whole]
    if comm.rank == comm.size - 1:
        for y, want in zip(ys, whole, strict=True):
            np.testing.assert_allclose(y, want, atol=1e-5)
    of_last = comm.bcast(heard, comm.size - 1)
    assert len(heard) == len(tokens)
    assert all(np.array_equal(a, b) for a, b in zip(heard, of_last, strict=True))


def test_stages_of_any_length(comm):
    """All layers on the last rank, the ranks before pass on what they receive."""
    N, xs = 3, inputs((4, 0, 9))
    stages = [(0, 0)] * (comm.size - 1) + [(0, N)]
    ys, _ = through(comm, stages, xs)
    for y, x in zip(ys, xs, strict=False):
        np.testing.assert_allclose(y, layer(2)(layer(1)(layer(0)(x))), atol=1e-5)


def test_results_are_heard_in_order_while_micro_batches_pass(comm):
    """The token loop: what was found of one micro-batch is the input of a later one."""
    pipeline, m, rounds = Pipeline(comm), comm.size, 4
    values = [np.float32(b) for b in range(m)]
    for _ in range(rounds):
        for b in range(m):
            x = np.full((1, D), values[b] if pipeline.is_first else np.nan, np.float32)
            y = pipeline.forward(x, lambda x: x + 1)
            if pipeline.is_last:
                pipeline.broadcast_result(y[0].view(np.uint8))
                values[b] = y[0, 0]
        if not pipeline.is_last:
            values = [pipeline.receive_result().view(np.float32)[0] for _ in range(m)]
    pipeline.wait()
    assert values == [b + rounds * comm.size for b in range(m)]


def test_ends_are_the_first_and_the_last_rank(comm):
    pipeline = Pipeline(comm)
    assert comm.allgather(pipeline.is_first) == [r == 0 for r in range(comm.size)]
    assert comm.allgather(pipeline.is_last) == [r == comm.size - 1 for r in range(comm.size)]


# --- cost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", MICRO_BATCHES)
def test_cost(comm, tokens):
    P, xs = comm.size, inputs(tokens)
    _, heard = through(comm, partition.stages([1] * 5, P), xs)
    is_last = comm.rank == P - 1
    assert ledger.sent_bytes("Send", purpose="pipeline") == (0 if is_last else 4 * sum(tokens) * D)
    assert ledger.calls("Send", purpose="pipeline") == (0 if is_last else len(tokens))
    n = sum(len(found) for found in heard)
    assert ledger.sent_bytes(purpose="pipeline result") == (P - 1) * n * is_last
    assert ledger.calls("Send", purpose="pipeline result") == len(tokens) * (P - 1) * is_last
    assert ledger.calls("Recv", purpose="pipeline result") == len(tokens) * (not is_last)


def test_bubble_share():
    """What a drawing of the schedule says: m + P - 1 slots, of which a rank works in m."""
    assert bubble_share(1, 5) == 0
    for P in range(1, 7):
        for m in range(1, 9):
            slots = m + P - 1
            busy = sum(0 <= slot - rank < m for rank in range(P) for slot in range(slots))
            assert bubble_share(P, m) == pytest.approx(1 - busy / (P * slots))


# --- refuses -------------------------------------------------------------------------------------


def test_the_last_rank_refuses_to_wait_for_itself(comm):
    pipeline = Pipeline(comm)
    if pipeline.is_last:
        with pytest.raises(RuntimeError, match="pipeline: got rank .* need a rank before it"):
            pipeline.receive_result()
    assert ledger.calls() == 0
