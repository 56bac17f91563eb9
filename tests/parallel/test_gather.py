"""Strategy `gather`: equals one rank, cost, refuses."""

import numpy as np
import pytest
from helpers.ragged import CASES, CASES_AND_CUTS, assert_close

from hpcinfer import partition
from hpcinfer.ledger import ledger
from hpcinfer.parallel.gather import gather

# Nearly to the bit, with 16-bit keys too.
pytestmark = pytest.mark.usefixtures("plain_forms")


@pytest.mark.parametrize("case, cut", CASES_AND_CUTS)
def test_equals_one_rank(comm, case, cut):
    case = CASES[case]
    own = partition.CUTS[cut](len(case.k), comm.size)[comm.rank]
    part = case.attend(case.q, case.k[own], case.v[own], case.q_tokens, case.k_tokens[own])
    expected = case.oracle()
    for root in {0, comm.size - 1}:
        o, lse = gather(comm, *part, root)
        assert_close(o, expected[0])
        assert_close(lse, expected[1])
        assert len(set(comm.allgather(np.ascontiguousarray(o).tobytes()))) == 1


@pytest.mark.parametrize("root", [0, -1])
def test_cost(comm, root):
    T, H, K = 3, 6, 8
    root %= comm.size
    ledger.clear()
    gather(comm, np.ones((T, H, K), np.float32), np.zeros((T, H), np.float32), root)
    words = T * H * (K + 1)
    at_root = comm.rank == root
    assert ledger.calls("Gather", purpose="gather") == ledger.calls("Bcast") == 1
    assert ledger.sent_bytes("Gather") == (0 if at_root else 4 * words)
    assert ledger.sent_bytes("Bcast") == (4 * words if at_root and comm.size > 1 else 0)


def test_refuses_a_root_outside(comm):
    o, lse = np.ones((1, 2, 4), np.float32), np.zeros((1, 2), np.float32)
    for root in (-1, comm.size):
        with pytest.raises(ValueError, match=f"gather: got root {root}, need a rank of"):
            gather(comm, o, lse, root)
