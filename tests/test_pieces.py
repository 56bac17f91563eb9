"""Messages in pieces: every verb gives what it gives in one, with pieces of 1000 bytes."""

import numpy as np
import pytest
from mpi4py import MPI

from hpcinfer import collectives, pieces
from hpcinfer.ledger import ledger
from hpcinfer.transfer import Outgoing

N = 999  # bytes of a rank's rows, times 1 to 4: fewer than a piece and more, and a whole piece


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 1000)
    ledger.clear()


def numbers(shape, dtype=np.float32, seed=0):
    """Small whole numbers, whose sums are exact in any order."""
    return np.random.default_rng(seed).integers(0, 50, shape).astype(dtype)


@pytest.mark.parametrize("n", [0, 1, 999, 1000, 1001, 2000, 4321])
def test_cut(n):
    cuts = pieces.cut(np.arange(n, dtype=np.uint8))
    assert [len(c) for c in cuts] == [1000] * (n // 1000) + [n % 1000]
    assert np.array_equal(np.concatenate(cuts), np.arange(n, dtype=np.uint8))


@pytest.mark.parametrize("n", [0, 250, 251, 1234])
def test_reductions(comm, n):
    each = [numbers(n, seed=r) for r in range(comm.size)]
    x = each[comm.rank].copy()
    assert np.array_equal(collectives.Allreduce(comm, x), sum(each))
    x = each[comm.rank].copy()
    assert np.array_equal(collectives.Allreduce(comm, x, MPI.MAX), np.max(each, axis=0))


@pytest.mark.parametrize("largest", [0, 1000])
@pytest.mark.parametrize("rows", [0, 1, 100])
def test_reduce_scatter(comm, monkeypatch, largest, rows):
    """By the library or by sums of this rank, whatever the size."""
    monkeypatch.setattr(pieces, "_LARGEST_SUM", largest)
    counts = [rows * (r % 3) for r in range(comm.size)]
    each = [numbers((sum(counts), 5), np.float64, seed=r) for r in range(comm.size)]
    part = collectives.ReduceScatter(comm, each[comm.rank], counts)
    assert np.array_equal(part, np.split(sum(each), np.cumsum(counts)[:-1])[comm.rank])


def test_records_stay_whole(comm):
    """An operation that needs both numbers of a record, 96 records in a piece of 1000 bytes."""
    larger = collectives.record_op(lambda a, b: np.where(a[:, :1] > b[:, :1], a, b))
    each = [numbers((777, 3), seed=r) + np.float32(r / 8) for r in range(comm.size)]
    best = collectives.AllreduceRecords(comm, each[comm.rank].copy(), larger)
    which = np.argmax([x[:, 0] for x in each], axis=0)
    assert np.array_equal(best, np.array(each)[which, np.arange(777)])


@pytest.mark.parametrize("size", [0, 100, N])
def test_gathers(comm, size):
    """Uneven parts, a rank without any; blocking and started; equal ones on a root."""
    counts = [size * ((3 * r + 1) % 4) for r in range(comm.size)]
    each = [numbers(c, np.uint8, seed=r) for r, c in enumerate(counts)]
    own = each[comm.rank]
    assert np.array_equal(collectives.Allgather(comm, own, counts), np.concatenate(each))
    whole = np.zeros(sum(counts), np.uint8)
    collectives.Iallgather(comm, own, whole, counts).wait()
    assert np.array_equal(whole, np.concatenate(each))
    assert ledger.sent_bytes("Allgather") == 2 * (comm.size - 1) * own.nbytes
    for root in range(comm.size):
        gathered = collectives.Gather(comm, np.full(size, comm.rank, np.int64), root)
        if comm.rank == root:
            assert np.array_equal(gathered, np.arange(comm.size)[:, None] + np.zeros(size))


@pytest.mark.parametrize("n", [0, 250, 1234])
def test_broadcasts(comm, n):
    for root in range(comm.size):
        x, y = (numbers(n, seed=comm.rank) for _ in range(2))
        collectives.Bcast(comm, x, root)
        collectives.Ibcast(comm, y, root).wait()
        assert np.array_equal(x, numbers(n, seed=root)) and np.array_equal(y, x)


@pytest.mark.parametrize("busy", [0, 1])
def test_alltoall_where_one_rank_alone_has_much(comm, busy):
    """A rank that counts rows, beside others that count bytes."""
    P, r = comm.size, comm.rank
    table = np.array(
        [[300 * (to == busy) * (source != to) + 1 for to in range(P)] for source in range(P)]
    )
    x = np.repeat(10 * r + np.arange(P), table[r])[:, None] * np.ones(2, np.float32)
    received = collectives.Alltoall(comm, x, list(table[r]), list(table[:, r]))
    assert np.array_equal(received[:, 1], np.repeat(10 * np.arange(P) + r, table[:, r]))
    assert ledger.sent_bytes("Alltoall") == 16 * (table[r].sum() - table[r, r])


@pytest.mark.parametrize("n", [0, 999, 1000, 1001, 5000])
def test_messages(comm, n):
    """Round the ring, and to one who knows the length, or does not; two on their way at once."""
    to, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    sent = [numbers(n + i, np.uint8, seed=comm.rank + i) for i in range(2)]
    wanted = [numbers(n + i, np.uint8, seed=source + i) for i in range(2)]
    out = np.empty_like(wanted[0])
    collectives.Shift(comm, sent[0], out).wait()
    assert np.array_equal(out, wanted[0])
    outgoing = Outgoing()
    for x in [*sent, *sent]:
        outgoing.add(collectives.Isend(comm, x, to, tag=3))
    assert np.array_equal(collectives.Recv(comm, out, source, tag=3), wanted[0])
    for x in (wanted[1], *wanted):
        assert np.array_equal(collectives.RecvBytes(comm, source, tag=3), x)
    outgoing.wait()
