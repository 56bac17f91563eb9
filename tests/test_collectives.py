"""Every verb equals its NumPy oracle, moves the bytes that it says, and refuses what it must.

Alltoall, Gather, Shift and reductions of records stand in test_exchange.py.
"""

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI
from pytest import approx

from hpcinfer import collectives
from hpcinfer.ledger import ledger

BF16 = np.dtype(ml_dtypes.bfloat16)
HALVES = [BF16, np.dtype(np.float16)]


@pytest.fixture(autouse=True)
def empty_ledger():
    ledger.clear()


def uneven(P):
    """Lengths that differ, a zero among them: 1, 0, 3, 2, 1, ..."""
    return [(3 * r + 1) % 4 for r in range(P)]


def numbers(shape, dtype=np.float32, seed=0):
    """Small whole numbers, whose sums are exact in any order."""
    return np.random.default_rng(seed).integers(-50, 50, shape).astype(dtype)


def parts(P, counts, axis, shape=(4, 3, 2), dtype=np.float32):
    """Every rank's part, equal in shape but along `axis`."""
    shapes = [(*shape[:axis], c, *shape[axis + 1 :]) for c in counts]
    return [numbers(s, dtype, seed=r) for r, s in enumerate(shapes)]


def strided(x):
    """The same values, every second item of a larger array along each axis."""
    wide = np.zeros([2 * n for n in x.shape], x.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in x.shape)]
    view[...] = x
    return view


# --- Allreduce -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.int64, np.uint64])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (5, 3, 2)])
def test_allreduce(comm, shape, dtype):
    each = [np.asarray(abs(numbers(shape, seed=r)), dtype) for r in range(comm.size)]
    for op, oracle in ((MPI.SUM, np.sum), (MPI.MAX, np.max)):
        x = each[comm.rank].copy()
        y = collectives.Allreduce(comm, x, op)
        assert y is x
        np.testing.assert_array_equal(x, oracle(each, axis=0).astype(dtype))
    assert ledger.calls("Allreduce") == 2
    assert ledger.sent_bytes() == approx(2 * 2 * x.nbytes * (comm.size - 1) / comm.size)


def test_allreduce_into_a_view(comm):
    """What lies between the items of a view that is not contiguous stays as it is."""
    wide = np.full((6, 4), 9, np.float32)
    view = wide[::2, 1:3]
    view[...] = numbers((3, 2), seed=comm.rank)
    assert collectives.Allreduce(comm, view) is view
    np.testing.assert_array_equal(view, sum(numbers((3, 2), seed=r) for r in range(comm.size)))
    np.testing.assert_array_equal(wide[1::2], 9)
    np.testing.assert_array_equal(wide[:, [0, 3]], 9)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_reductions_are_refused(comm, dtype):
    """Their sums would depend on the number of ranks."""
    x = np.ones((comm.size, 2), dtype)
    with pytest.raises(TypeError, match="Allreduce: got .*float16, need float32"):
        collectives.Allreduce(comm, x)
    with pytest.raises(TypeError, match="ReduceScatter: got .*float16, need float32"):
        collectives.ReduceScatter(comm, x, [1] * comm.size)
    with pytest.raises(TypeError, match="AllreduceRecords: got .*float16, need records"):
        collectives.AllreduceRecords(comm, x, MPI.SUM)
    assert ledger.calls() == 0


# --- Allgather -----------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("view", [np.asarray, strided, np.asfortranarray])
def test_allgather_of_uneven_parts(comm, axis, view):
    counts = uneven(comm.size)
    each = parts(comm.size, counts, axis % 3)
    x = view(each[comm.rank])
    whole = collectives.Allgather(comm, x, counts, axis=axis)
    np.testing.assert_array_equal(whole, np.concatenate(each, axis))
    assert whole.flags.c_contiguous and whole.dtype == np.float32
    assert ledger.sent_bytes("Allgather") == (comm.size - 1) * each[comm.rank].nbytes


def test_allgather_of_equal_parts_needs_no_counts(comm):
    each = parts(comm.size, [2] * comm.size, 1, dtype=np.int64)
    whole = collectives.Allgather(comm, each[comm.rank], axis=1)
    np.testing.assert_array_equal(whole, np.concatenate(each, 1))


@pytest.mark.parametrize("axis", [0, 1])
def test_allgather_of_nothing(comm, axis):
    shape = (0, 3) if axis == 0 else (3, 0)
    whole = collectives.Allgather(comm, np.zeros(shape, BF16), [0] * comm.size, axis=axis)
    assert whole.shape == shape and whole.dtype == BF16
    assert ledger.sent_bytes() == 0


def test_allgather_of_rows_without_columns(comm):
    counts = uneven(comm.size)
    whole = collectives.Allgather(comm, np.zeros((counts[comm.rank], 0), np.float32), counts)
    assert whole.shape == (sum(counts), 0)


def test_allgather_moves_the_bits_of_bfloat16(comm):
    """Every pattern arrives as it is, those of NaNs among them."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    cuts = np.array_split(patterns, comm.size)
    own = cuts[comm.rank].view(BF16)
    whole = collectives.Allgather(comm, own, [len(c) for c in cuts])
    assert whole.dtype == BF16
    np.testing.assert_array_equal(whole.view(np.uint16), patterns)
    assert ledger.sent_bytes() == (comm.size - 1) * 2 * len(own)


def test_allgather_of_records(comm):
    kind = np.dtype([("score", np.float64), ("token_id", np.int64)])
    own = np.array([(comm.rank / 2, comm.rank)], kind)
    whole = collectives.Allgather(comm, own)
    np.testing.assert_array_equal(whole["token_id"], np.arange(comm.size))


@pytest.mark.parametrize("counts", ["too many", "off by one"])
def test_allgather_refuses_wrong_counts_on_every_rank(comm, counts):
    wrong = [2] * (comm.size + 1) if counts == "too many" else [3] * comm.size
    with pytest.raises(ValueError, match=f"Allgather: got 2 items on rank {comm.rank}, need"):
        collectives.Allgather(comm, np.zeros((2, 2), np.float32), wrong)
    assert ledger.calls() == 0


# --- ReduceScatter -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("view", [np.asarray, strided])
def test_reduce_scatter_of_uneven_parts(comm, view, axis, dtype):
    counts = uneven(comm.size)
    shape = [3, 2, 5]
    shape[axis] = sum(counts)
    each = [numbers(shape, dtype, seed=r) for r in range(comm.size)]
    part = collectives.ReduceScatter(comm, view(each[comm.rank]), counts, axis=axis)
    ends = np.cumsum(counts)[:-1]
    np.testing.assert_array_equal(part, np.split(sum(each), ends, axis)[comm.rank])
    assert part.flags.c_contiguous and part.dtype == dtype
    assert ledger.sent_bytes("ReduceScatter") == each[0].nbytes - part.nbytes


def test_reduce_scatter_then_allgather_is_allreduce(comm):
    """In values, and in bytes sent over all ranks."""
    counts = uneven(comm.size)
    x = numbers((sum(counts), 3), seed=comm.rank)
    part = collectives.ReduceScatter(comm, x, counts)
    whole = collectives.Allgather(comm, part, counts)
    apart = comm.allreduce(ledger.sent_bytes())
    ledger.clear()
    np.testing.assert_array_equal(whole, collectives.Allreduce(comm, x.copy()))
    assert comm.allreduce(ledger.sent_bytes()) == approx(apart)


def test_reduce_scatter_refuses(comm):
    x = np.zeros((comm.size, 2), np.float32)
    for counts in ([1] * (comm.size + 1), [2] * comm.size):
        with pytest.raises(ValueError, match=f"ReduceScatter: got {comm.size} items, need counts"):
            collectives.ReduceScatter(comm, x, counts)
    with pytest.raises(TypeError, match="ReduceScatter: got int64"):
        collectives.ReduceScatter(comm, x.astype(np.int64), [1] * comm.size)
    assert ledger.calls() == 0


# --- Bcast ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", [np.asarray, strided])
@pytest.mark.parametrize("dtype", [BF16, np.float32, np.int64])
def test_bcast_from_every_root(comm, view, dtype):
    for root in range(comm.size):
        x = view(numbers((3, 5), dtype, seed=comm.rank))
        assert collectives.Bcast(comm, x, root) is x
        np.testing.assert_array_equal(x, numbers((3, 5), dtype, seed=root))
    assert ledger.sent_bytes("Bcast") == (x.nbytes if comm.size > 1 else 0)


def test_bcast_moves_the_bits_of_bfloat16(comm):
    patterns = np.arange(1 << 16, dtype=np.uint16)
    x = (patterns if comm.rank == 0 else np.zeros_like(patterns)).view(BF16)
    np.testing.assert_array_equal(collectives.Bcast(comm, x).view(np.uint16), patterns)


# --- The ledger ----------------------------------------------------------------------------------


def test_ledger_tells_verbs_axes_and_purposes_apart(comm):
    row, column = comm.Dup(), comm.Dup()
    row.Set_name("row")
    column.Set_name("column")
    x = np.zeros(6, np.float32)
    collectives.Allreduce(row, x, purpose="a")
    collectives.Allreduce(row, x, purpose="a")
    collectives.Allreduce(column, x, purpose="b")
    collectives.Bcast(column, x, purpose="b")
    assert ledger.calls() == 4
    assert ledger.calls("Allreduce") == 3
    assert ledger.calls(axis="row") == ledger.calls(purpose="a") == 2
    assert ledger.calls("Bcast", "column", "b") == 1
    assert ledger.calls("Bcast", "row") == 0
    one = 2 * 24 * (comm.size - 1) / comm.size
    assert ledger.sent_bytes("Allreduce", "row") == approx(2 * one)
    assert all(entry.time_s > 0 for entry in ledger.entries.values())
    row.Free()
    column.Free()


def test_ledger_keeps_every_call_only_when_tracing(comm, monkeypatch):
    x = np.zeros(6, np.float32)
    collectives.Allreduce(comm, x)
    assert ledger.events == []
    monkeypatch.setattr(ledger, "tracing", True)
    collectives.Allreduce(comm, x, purpose="one")
    collectives.Allgather(comm, x, purpose="two")
    assert [event[0] for event in ledger.events] == ["Allreduce", "Allgather"]
    assert [event[2] for event in ledger.events] == ["one", "two"]
    starts = [event[3] for event in ledger.events]
    assert starts == sorted(starts)
    ledger.clear()
    assert ledger.events == [] and ledger.calls() == 0


def test_a_new_communicator_has_its_own_name(comm):
    """MPI gives the handle of a freed communicator to another axis."""
    for name in ("first", "second"):
        axis = comm.Dup()
        axis.Set_name(name)
        collectives.Bcast(axis, np.zeros(3, np.float32))
        assert ledger.calls(axis=name) == 1
        axis.Free()
