"""Alltoall, Gather, Shift, Send and the reduction of records: results, ledger, refusals.

Started gathers and broadcasts stand in test_zero.py, the counter in test_data.py.
"""

import time

import numpy as np
import pytest

from hpcinfer import array, collectives
from hpcinfer.array import BFLOAT16
from hpcinfer.ledger import axis_name, ledger
from hpcinfer.transfer import Outgoing

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

    entry = ledger.entries["Shift", axis_name(comm), "test"]
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


# --- Send and Recv -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [0, 3, 100_000])
def test_send_and_receive(comm, dtype, rows):
    """Each to the next, the last to the first: nobody waits before it has received."""
    P, r = comm.size, comm.rank
    source = (r - 1) % P
    wide = np.full((rows + r, 4), r, dtype)
    sent = collectives.Isend(comm, wide[:, ::2], (r + 1) % P, purpose="test")
    out = np.empty((rows + source, 2), dtype)
    assert collectives.Recv(comm, out, source, purpose="test") is out
    sent.wait()
    assert np.array_equal(out.astype(int), np.full(out.shape, source))
    n_bytes = (rows + r) * 2 * np.dtype(dtype).itemsize
    assert ledger.sent_bytes("Send", purpose="test") == ledger.sent_bytes() == n_bytes
    assert ledger.calls("Send") == ledger.calls("Recv") == 1


def test_tags_tell_messages_apart(comm):
    """The second is received first; what is sent twice under one tag keeps its order."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    outgoing = Outgoing()
    for value, tag in ((1, 7), (2, 8), (3, 7)):
        outgoing.add(collectives.Isend(comm, np.full(3, value, np.uint8), right, tag))
    received = [collectives.Recv(comm, np.empty(3, np.uint8), left, tag)[0] for tag in (8, 7, 7)]
    outgoing.wait()
    assert received == [2, 1, 3]


@pytest.mark.parametrize("rows", [0, 1, 50_000])
def test_a_message_of_any_length(comm, rows):
    """The receiver does not know how long it is, nor from whom it comes."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    x = np.arange(rows + comm.rank, dtype=np.int64)
    sent = collectives.Isend(comm, x, right, purpose="test")
    received = collectives.RecvBytes(comm, purpose="test")
    sent.wait()
    assert received.dtype == np.uint8
    assert np.array_equal(received.view(np.int64), np.arange(rows + left))
    assert ledger.calls("Recv", purpose="test") == 1


@pytest.mark.parametrize("n", [0, 1, 20])
def test_outgoing_messages_are_entered_when_they_have_left(comm, n):
    """Once each, whether they left during a test or the wait."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    outgoing = Outgoing()
    for i in range(n):
        outgoing.add(collectives.Isend(comm, np.full(1000 * i, i, np.uint8), right))
        outgoing.test()
    received = [collectives.RecvBytes(comm, left) for _ in range(n)]
    outgoing.wait()
    outgoing.wait()
    assert [len(x) for x in received] == [1000 * i for i in range(n)]
    assert all((x == i).all() for i, x in enumerate(received))
    assert ledger.calls("Send") == n
    assert ledger.sent_bytes("Send") == 1000 * sum(range(n))


# --- arrays as bytes -----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 5])
def test_arrays_packed_one_after_the_other_or_side_by_side(n):
    rng = np.random.default_rng(n)
    arrays = [
        rng.normal(size=(n, 3)).astype(BFLOAT16),
        rng.integers(-9, 9, (n, 2)).astype(np.int32),
        rng.normal(size=(n, 1)).astype(np.float32),
        np.empty((n, 0), np.float32),
    ]
    block, rows = array.pack(*arrays), array.pack_rows(*arrays)
    assert block.shape == (n * 18,) and rows.shape == (n, 18)
    order = np.random.default_rng(0).permutation(n)
    for kept, unpacked in (
        (slice(None), array.unpack(block, n, arrays)),
        (slice(None), array.unpack_rows(rows, arrays)),
        (order, array.unpack_rows(rows[order], arrays)),
        (slice(0, 0), array.unpack_rows(rows[:0], arrays)),
    ):
        for got, want in zip(unpacked, arrays, strict=True):
            assert got.dtype == want.dtype and np.array_equal(got, want[kept])


def test_a_pack_takes_arrays_that_are_not_contiguous():
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    for packed, unpack in (
        (array.pack(x[:, ::2], x.T[:4]), lambda b, like: array.unpack(b, 4, like)),
        (array.pack_rows(x[:, ::2], x.T[:4]), array.unpack_rows),
    ):
        a, b = unpack(packed, (x[:, ::2], x.T[:4]))
        assert np.array_equal(a, x[:, ::2]) and np.array_equal(b, x.T[:4])
