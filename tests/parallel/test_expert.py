"""Strategy `expert`: tokens travel to the experts they chose, and come home as from one rank."""

import numpy as np
import pytest
from helpers.mixture import mixture

from hpcinfer import partition
from hpcinfer.array import BFLOAT16, narrow, widen
from hpcinfer.ledger import ledger
from hpcinfer.parallel import expert

K = 2  # choices of a token


def own(comm, n):
    """This rank's block of n tokens."""
    return slice(*partition.block(n, comm.size)[comm.rank])


def grids(P):
    """All ep, tp whose product is P."""
    return [(ep, P // ep) for ep in range(1, P + 1) if P % ep == 0]


def travel(comm, case, ep, tp=1, tokens=None, dtype=np.float32):
    """Result of this rank's tokens (a block of them, or those of the slice)."""
    shares = partition.experts(*case.sizes, ep, tp)
    tokens = own(comm, len(case.x)) if tokens is None else tokens
    return expert.experts(
        comm,
        case.x[tokens],
        case.ids[tokens],
        case.weights[tokens],
        shares,
        case.compute(shares[comm.rank]),
        dtype,
    )


def close(y, want):
    assert y.shape == want.shape and y.dtype == np.float32
    np.testing.assert_allclose(y, want, atol=1e-4)


@pytest.fixture(autouse=True)
def empty_ledger():
    ledger.clear()


# --- equals one rank -----------------------------------------------------------------------------


@pytest.mark.parametrize("T", [0, 1, 3, 23])
@pytest.mark.parametrize("E", [1, 2, 5, 8])
def test_equals_one_rank(comm, T, E):
    """Experts that do not divide, or are fewer than ranks; tokens too; with tp inside experts."""
    case = mixture(T, E, k=min(K, E))
    for ep, tp in grids(comm.size):
        close(travel(comm, case, ep, tp), case.whole()[own(comm, T)])


def test_columns_fewer_than_ranks(comm):
    """A rank without columns is sent nothing."""
    case = mixture(9, E=1, k=1, F=2)
    close(travel(comm, case, comm.size), case.whole()[own(comm, 9)])
    if comm.size > 2:
        shares = partition.experts(1, 2, comm.size)
        assert shares[-1].is_empty
        assert not len(partition.destinations(case.ids, shares)[-1])


@pytest.mark.parametrize("E", [3, 6])
@pytest.mark.parametrize("favourite", [0, 2])
def test_one_expert_gets_all_tokens_and_the_others_none(comm, E, favourite):
    case = mixture(13, E, ids=np.full((13, 1), favourite))
    close(travel(comm, case, comm.size), case.whole()[own(comm, 13)])


def test_ranks_without_tokens(comm):
    """All tokens on one rank, whichever it is; then none on any."""
    case = mixture(11, E=5)
    for holder in range(comm.size):
        tokens = slice(0, 11 if comm.rank == holder else 0)
        close(travel(comm, case, comm.size, tokens=tokens), case.whole()[tokens])
    close(travel(comm, case, comm.size, tokens=slice(0, 0)), np.zeros((0, 6)))


@pytest.mark.parametrize("T", [1, 12])
def test_negative_numbers_are_no_choice(comm, T):
    """A token may choose fewer experts than others, or none: its result is then 0."""
    case = mixture(T, E=4, k=3)
    case.ids[::2, 1] = -1
    case.ids[T // 2] = -1
    y = travel(comm, case, comm.size)
    close(y, case.whole()[own(comm, T)])
    assert not case.whole()[T // 2].any()


def test_two_experts_of_one_rank_send_one_row(comm):
    """And their weighted results come back added up."""
    case = mixture(10, E=2 * comm.size, k=2)
    case.ids[:] = [[0, 1]]
    close(travel(comm, case, comm.size), case.whole()[own(comm, 10)])
    n = own(comm, 10).stop - own(comm, 10).start
    dispatched = 0 if comm.rank == 0 else n * (6 * 4 + 2 * 8)
    returned = (10 - n) * 6 * 4 if comm.rank == 0 else 0
    assert ledger.sent_bytes() == (comm.size - 1) * 8 + dispatched + returned


def test_bfloat16_travels_as_it_is(comm):
    """Every rank computes with the rounded tokens, its own ones too."""
    case = mixture(17, E=5)
    y = travel(comm, case, comm.size, dtype=BFLOAT16)
    case.x[...] = widen(narrow(case.x, BFLOAT16))
    close(y, case.whole()[own(comm, 17)])


def test_the_same_bits_every_time(comm):
    """What comes back is added up in the order of the ranks, not of arrival."""
    case = mixture(40, E=8, k=5)
    first = travel(comm, case, comm.size)
    for _ in range(5):
        assert np.array_equal(travel(comm, case, comm.size), first)


def test_arguments_stay_as_they_are(comm):
    case = mixture(9, E=4)
    before = [x.copy() for x in (case.x, case.ids, case.weights)]
    travel(comm, case, comm.size)
    for x, y in zip((case.x, case.ids, case.weights), before, strict=True):
        assert np.array_equal(x, y)


# --- cost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("E", [1, 3, 8])
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_cost(comm, E, dtype):
    """R and R' are counted pair by pair: a token, and another rank that has what it chose."""
    T, D, P, k, w = 19, 6, comm.size, min(K, E), np.dtype(dtype).itemsize
    case = mixture(T, E, k)
    case.ids[3] = -1
    for ep, tp in grids(P):
        ledger.clear()
        travel(comm, case, ep, tp, dtype=dtype)
        shares = partition.experts(*case.sizes, ep, tp)
        home = [r for r, (a, b) in enumerate(partition.block(T, P)) for _ in range(a, b)]
        pairs = [
            (home[t], r)
            for t in range(T)
            for r, share in enumerate(shares)
            if home[t] != r
            and share.columns[0] < share.columns[1]
            and any(share.experts[0] <= e < share.experts[1] for e in case.ids[t])
        ]
        R, R_back = (sum(pair[side] == comm.rank for pair in pairs) for side in (0, 1))
        sent_bytes = 8 * (P - 1) + R * (D * w + 8 * k) + R_back * 4 * D
        assert ledger.sent_bytes("Alltoall", purpose="expert") == ledger.sent_bytes() == sent_bytes
        assert ledger.calls("Alltoall") == ledger.calls() == 3
        assert comm.allreduce(R) == comm.allreduce(R_back)


# --- refuses -------------------------------------------------------------------------------------


def test_refuses_on_every_rank(comm):
    x, ids, weights = np.zeros((3, 6), np.float32), np.zeros((3, 2), int), np.zeros((3, 2))
    shares = partition.experts(4, 7, comm.size)
    for wrong in (
        (x, ids, weights, shares[1:]),
        (x, ids[1:], weights[1:], shares),
        (x, ids, weights[:, 1:], shares),
    ):
        with pytest.raises(ValueError, match="expert: got .* need a share a rank and a row a tok"):
            expert.experts(comm, *wrong, compute=None)
    assert ledger.calls() == 0
