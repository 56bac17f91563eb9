"""Strategy `split`: Q or V cut equals one rank, K cut does not; cost, refuses."""

import numpy as np
import pytest
from helpers.ragged import CASES, CASES_AND_CUTS, assert_close, ragged
from pytest import approx

from hpcinfer import partition
from hpcinfer.ledger import ledger
from hpcinfer.parallel.split import gathered_keys, k_only, q_only, v_only

# Nearly to the bit, with 16-bit keys too.
pytestmark = pytest.mark.usefixtures("plain_forms")


def cut_of(comm, n, cut):
    """This rank's items of n, the items of all ranks end to end, and how many each has."""
    parts = partition.CUTS[cut](n, comm.size)
    return parts[comm.rank], np.concatenate(parts), [len(part) for part in parts]


def cut_queries(comm, case, cut):
    mine, order, counts = cut_of(comm, len(case.q), cut)
    o = q_only(
        comm, case.q[mine], case.k, case.v, case.q_tokens[mine], case.k_tokens, counts, case.attend
    )
    return o[np.argsort(order)]


def cut_values(comm, case, cut):
    own, order, counts = cut_of(comm, len(case.k), cut)
    return v_only(
        comm, case.q, case.k[order], case.v[own], case.q_tokens, case.k_tokens[order], counts,
        case.attend,
    )  # fmt: skip


def cut_keys(comm, case, cut):
    own, order, counts = cut_of(comm, len(case.k), cut)
    return k_only(
        comm, case.q, case.k[own], case.v[order], case.q_tokens, case.k_tokens[own], counts,
        case.attend,
    )  # fmt: skip


def gather_keys(comm, case, cut):
    mine, _, _ = cut_of(comm, len(case.q), cut)
    own, _, counts = cut_of(comm, len(case.k), cut)
    k, v, k_tokens = gathered_keys(comm, case.k[own], case.v[own], case.k_tokens[own], counts)
    assert k.dtype == v.dtype == case.k.dtype
    o, _ = case.attend(case.q[mine], k, v, case.q_tokens[mine], k_tokens)
    whole = np.zeros((len(case.q), *o.shape[1:]), np.float32)
    whole[mine] = o
    return comm.allreduce(whole)


@pytest.mark.parametrize("room", [cut_queries, cut_values, gather_keys])
@pytest.mark.parametrize("case, cut", CASES_AND_CUTS)
def test_equals_one_rank(comm, case, cut, room):
    case = CASES[case]
    assert_close(room(comm, case, cut), case.oracle()[0])


def test_cut_of_keys_is_not_equal(comm):
    """A row of the weights adds up to P where every rank sees a key; P times less is wrong too."""
    case = ragged([64], new=8)
    o, expected = cut_keys(comm, case, "striped"), case.oracle()[0]
    if comm.size == 1:
        assert_close(o, expected)
    else:
        assert abs(o - expected).max() > 0.1
        assert abs(o / comm.size - expected).max() > 0.1
    ones = ragged([64], new=8)
    ones.v[...] = 1
    assert_close(cut_keys(comm, ones, "striped"), np.full_like(o, comm.size))


def test_cost(comm):
    P, H, G, K, n = comm.size, 6, 3, 8, 4
    case = ragged([n * P], H=H, G=G, K=K, dtype="bfloat16")
    S = n * P
    for room, verb, calls, sent_bytes in (
        (cut_queries, "Allgather", 1, (P - 1) * n * H * K * 4),
        (cut_values, "Allreduce", 1, 2 * (P - 1) / P * S * H * K * 4),
        (cut_keys, "Allreduce", 1, 2 * (P - 1) / P * S * H * K * 4),
        (gather_keys, "Allgather", 3, (P - 1) * n * (2 * G * K * 2 + 8)),
    ):
        ledger.clear()
        room(comm, case, "contiguous")
        assert ledger.calls(verb, purpose="split") == ledger.calls() == calls
        assert ledger.sent_bytes() == approx(sent_bytes)


def test_cost_of_uneven_parts(comm):
    case = ragged([4 * comm.size + 1])
    mine, _, _ = cut_of(comm, len(case.q), "contiguous")
    ledger.clear()
    cut_queries(comm, case, "contiguous")
    assert ledger.sent_bytes() == (comm.size - 1) * case.q[mine].nbytes


def test_refuses(comm):
    case = CASES["several"]
    n, P = len(case.k), comm.size
    whole = (case.q, case.k, case.v, case.q_tokens, case.k_tokens)
    for room in (q_only, v_only, k_only):
        for wrong in ([n] * (P + 1), [-n] * P, [n + 1] * P):
            with pytest.raises(ValueError, match="split: got .* need"):
                room(comm, *whole, wrong, case.attend)
    part, too_long = np.zeros((5, 3, 8), np.float32), np.zeros((5 * P + 1, 3, 8), np.float32)
    for room, k, v in ((v_only, too_long, part), (k_only, part, too_long)):
        with pytest.raises(ValueError, match="split: got .* of the whole operand, need counts"):
            room(comm, case.q, k, v, *whole[3:], [5] * P, case.attend)
    with pytest.raises(ValueError, match="split: got .* need"):
        gathered_keys(comm, case.k, case.v, case.k_tokens, [n + 1] * P)
