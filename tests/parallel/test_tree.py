"""Strategy `tree`: equals one rank, cost, refuses."""

import numpy as np
import pytest
from helpers.ragged import CASES, CASES_AND_CUTS, assert_close, ragged
from mpi4py import MPI
from pytest import approx

from hpcinfer import collectives, partition
from hpcinfer.ledger import ledger
from hpcinfer.parallel.tree import tree, tree_single

# Nearly to the bit, with 16-bit keys too.
pytestmark = pytest.mark.usefixtures("plain_forms")

ROOMS = {"tree": tree, "tree_single": tree_single}


def partial(comm, case, cut="block_cyclic"):
    """Attention of all queries over this rank's keys."""
    own = partition.CUTS[cut](len(case.k), comm.size)[comm.rank]
    return case.attend(case.q, case.k[own], case.v[own], case.q_tokens, case.k_tokens[own])


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("case, cut", CASES_AND_CUTS)
def test_equals_one_rank(comm, case, cut, room):
    case = CASES[case]
    o, lse = ROOMS[room](comm, *partial(comm, case, cut))
    expected = case.oracle()
    assert_close(o, expected[0])
    assert_close(lse, expected[1])

    # Equal on every rank to the last bit, so that ranks go on with the same numbers.
    for x in (o, lse):
        assert len(set(comm.allgather(np.ascontiguousarray(x).tobytes()))) == 1


@pytest.mark.parametrize("room", ROOMS)
def test_all_keys_on_one_rank(comm, room):
    case = CASES["several"]
    rows = slice(None) if comm.rank == comm.size - 1 else slice(0, 0)
    part = case.attend(case.q, case.k[rows], case.v[rows], case.q_tokens, case.k_tokens[rows])
    o, lse = ROOMS[room](comm, *part)
    assert_close(o, case.oracle()[0])
    assert_close(lse, case.oracle()[1])


def test_arguments_stay_as_they_are(comm):
    case = CASES["several"]
    for room in ROOMS.values():
        o, lse = partial(comm, case)
        before = o.copy(), lse.copy()
        room(comm, o, lse)
        assert np.array_equal(o, before[0]) and np.array_equal(lse, before[1])


def test_cost(comm):
    T, H, K, P = 3, 6, 8, comm.size
    o, lse = np.ones((T, H, K), np.float32), np.zeros((T, H), np.float32)
    ledger.clear()
    tree(comm, o, lse)
    assert ledger.calls("Allreduce", purpose="tree") == ledger.calls() == 2
    assert ledger.sent_bytes() == approx(2 * (P - 1) / P * T * H * (K + 2) * 4)

    ledger.clear()
    tree_single(comm, o, lse)
    assert ledger.calls("AllreduceRecords", purpose="tree single") == ledger.calls() == 1
    assert ledger.sent_bytes() == approx(2 * (P - 1) / P * T * H * (K + 1) * 4)


def test_averaging_instead_of_the_merge_fails(comm):
    """Shows that these tests can fail: without the log-sum-exp the answer is far off."""
    case = ragged([40], new=1)
    o, _ = partial(comm, case)
    average = collectives.Allreduce(comm, o) / comm.size
    error = abs(average - case.oracle()[0]).max()
    assert error < 1e-5 if comm.size == 1 else error > 0.05


def test_refuses_half_precision(comm):
    """Sums in half precision would depend on the number of ranks."""
    o, lse = np.ones((1, 2, 4), np.float32), np.zeros((1, 2), np.float16)
    with pytest.raises(TypeError, match="Allreduce: got float16"):
        tree(comm, o, lse)
    with pytest.raises(TypeError, match="AllreduceRecords: got float16"):
        tree_single(comm, o.astype(np.float16), lse)


def test_maximum_travels_first(comm):
    """Scores whose exponentials overflow float32 need the common maximum before any sum."""
    o = np.full((1, 1, 2), comm.rank, np.float32)
    lse = np.full((1, 1), 500.0 * comm.rank, np.float32)
    for room in ROOMS.values():
        o_all, lse_all = room(comm, o, lse)
        assert np.array_equal(o_all, np.full((1, 1, 2), comm.size - 1))
        assert lse_all == comm.allreduce(float(lse[0, 0]), MPI.MAX)
