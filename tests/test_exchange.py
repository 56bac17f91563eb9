"""Alltoall, Gather, Shift and the reduction of records: results, ledger, refusals."""

import time

import numpy as np
import pytest

from hpcinfer import collectives
from hpcinfer.array import BFLOAT16
from hpcinfer.collectives import ledger

TYPES = [np.float32, np.int64, np.uint8, BFLOAT16]


@pytest.fixture(autouse=True)
def empty_ledger():
    ledger.clear()
    yield
    ledger.clear()


def rows_between(source, target):
    """Rows that `source` sends to `target`: uneven, none for some."""
    return (source + 2 * target) % 3


@pytest.mark.parametrize("dtype", TYPES)
def test_alltoall(comm, dtype):
    P, r = comm.size, comm.rank
    send, recv = [rows_between(r, p) for p in range(P)], [rows_between(p, r) for p in range(P)]
    x = np.repeat([10 * r + p for p in range(P)], send)[:, None].astype(dtype) * np.ones(2, dtype)
    received = collectives.Alltoall(comm, x, send, recv)
    expected = np.repeat([10 * p + r for p in range(P)], recv)[:, None] * np.ones(2)
    assert received.dtype == dtype
    assert np.array_equal(received.astype(np.float64), expected)
    sent_bytes = (sum(send) - send[r]) * 2 * np.dtype(dtype).itemsize
    assert ledger.sent_bytes("Alltoall") == sent_bytes


def test_alltoall_refuses(comm):
    x, counts = np.zeros((3, 2)), [0] * comm.size
    with pytest.raises(ValueError, match="Alltoall: got 3 rows, need send_counts"):
        collectives.Alltoall(comm, x, counts, counts)
    with pytest.raises(ValueError, match="Alltoall: got .* counts, need"):
        collectives.Alltoall(comm, x, [3, *counts], counts)


@pytest.mark.parametrize("dtype", TYPES)
def test_gather(comm, dtype):
    root = comm.size - 1
    x = np.full((3, 2), comm.rank, dtype)
    whole = collectives.Gather(comm, x, root)
    if comm.rank == root:
        assert whole.shape == (comm.size, 3, 2) and whole.dtype == dtype
        assert np.array_equal(whole[:, 0, 0].astype(int), np.arange(comm.size))
    else:
        assert whole is None
    assert ledger.sent_bytes("Gather") == (0 if comm.rank == root else x.nbytes)


@pytest.mark.parametrize("step", [1, -1, 2])
@pytest.mark.parametrize("rows", [0, 3, 100_000])
@pytest.mark.parametrize("tested", [True, False])
def test_shift(comm, step, rows, tested):
    """Sizes differ by rank; long messages need progress, short ones do not."""
    P, r = comm.size, comm.rank
    source = (r - step) % P
    x = np.full((rows + r, 2), r, BFLOAT16)
    out = np.empty((rows + source, 2), BFLOAT16)
    transfer = collectives.Shift(comm, x, out, step, "test")
    while tested and not transfer.test():
        pass
    assert transfer.wait() is out
    assert np.array_equal(out.astype(int), np.full((rows + source, 2), source))

    entry = ledger.entries["Shift", collectives.axis_name(comm), "test"]
    assert entry.calls == 1
    assert entry.sent_bytes == (0 if source == r else x.nbytes)
    assert entry.flight_s > 0 and entry.time_s > 0


def test_computing_is_flight_and_not_exposed_time(comm):
    transfer = collectives.Shift(comm, np.zeros(8), np.empty(8))
    time.sleep(0.05)
    while not transfer.test():
        pass
    transfer.wait()
    (entry,) = ledger.entries.values()
    assert entry.flight_s > 0.05 and entry.test_s > 0
    assert entry.time_s + entry.test_s < entry.flight_s - 0.02


def longest(a, b):
    """Of two records the longer vector: needs the records whole."""
    length_a, length_b = (np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return np.where(length_a > length_b, a, b)


def test_records_stay_whole(comm):
    """Long enough that MPI cuts the message, though never inside a record."""
    rng = np.random.default_rng(1)
    of_ranks = rng.standard_normal((comm.size, 4, 5000, 7)).astype(np.float32)
    records = of_ranks[comm.rank].copy()
    op = collectives.record_op(longest)
    collectives.AllreduceRecords(comm, records, op, "test")
    winner = np.linalg.norm(of_ranks, axis=-1).argmax(axis=0)
    expected = np.take_along_axis(of_ranks, winner[None, ..., None], axis=0)[0]
    assert np.array_equal(records, expected)
    sent_bytes = 2 * records.nbytes * (comm.size - 1) / comm.size
    assert ledger.sent_bytes("AllreduceRecords") == sent_bytes


def test_records_refuse_other_types(comm):
    op = collectives.record_op(longest)
    with pytest.raises(TypeError, match="AllreduceRecords: got float64, need records of float32"):
        collectives.AllreduceRecords(comm, np.zeros((2, 3)), op)


def test_no_record(comm):
    op = collectives.record_op(longest)
    assert collectives.AllreduceRecords(comm, np.zeros((0, 3), np.float32), op).shape == (0, 3)
