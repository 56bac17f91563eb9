"""Strategy `ring`: equals one rank, cost, refuses."""

import numpy as np
import pytest
from helpers.ragged import CASES, CASES_AND_CUTS, assert_close, ragged

from hpcinfer import partition
from hpcinfer.array import BFLOAT16
from hpcinfer.ledger import ledger
from hpcinfer.parallel.ring import cheaper_to_move_queries, ring, ring_queries

# Nearly to the bit, with 16-bit keys too.
pytestmark = pytest.mark.usefixtures("plain_forms")


def cut_of(comm, n, cut):
    """This rank's items of n, and the number of items of every rank."""
    parts = partition.CUTS[cut](n, comm.size)
    return parts[comm.rank], [len(part) for part in parts]


def pass_keys(comm, case, cut, window=None, attend=None):
    """The ring on this rank's part of a case: its queries, and (o, lse)."""
    mine, _ = cut_of(comm, len(case.q), cut)
    own, counts = cut_of(comm, len(case.k), cut)
    result = ring(
        comm, case.q[mine], case.k[own], case.v[own], case.q_tokens[mine], case.k_tokens[own],
        counts, attend or case.attend, window,
    )  # fmt: skip
    return mine, result


def pass_queries(comm, case, cut):
    """The ring of queries on this rank's part of a case: its queries, and (o, lse)."""
    mine, counts = cut_of(comm, len(case.q), cut)
    own, _ = cut_of(comm, len(case.k), cut)

    def attend_local(q, q_tokens):
        return case.attend(q, case.k[own], case.v[own], q_tokens, case.k_tokens[own])

    return mine, ring_queries(comm, case.q[mine], case.q_tokens[mine], counts, attend_local)


def assert_equals_one_rank(case, mine, result):
    o, lse = case.oracle()
    assert_close(result[0], o[mine])
    assert_close(result[1], lse[mine])


@pytest.mark.parametrize("room", [pass_keys, pass_queries])
@pytest.mark.parametrize("case, cut", CASES_AND_CUTS)
def test_equals_one_rank(comm, case, cut, room):
    case = CASES[case]
    assert_equals_one_rank(case, *room(comm, case, cut))


@pytest.mark.parametrize("cut", partition.CUTS)
def test_window_equals_one_rank(comm, cut):
    """The ring that ends early equals the one that goes round."""
    for case in (CASES["window"], ragged([23, 4, 9], window=1), ragged([40], new=3, window=8)):
        assert_equals_one_rank(case, *pass_keys(comm, case, cut, case.window))


def test_window_ends_early(comm):
    """Contiguous blocks of 8 tokens and a window of 9: only the block before is needed."""
    case = ragged([8 * comm.size], window=9)
    ledger.clear()
    mine, result = pass_keys(comm, case, "contiguous", case.window)
    assert_equals_one_rank(case, mine, result)
    assert ledger.calls("Shift") == min(1, comm.size - 1)

    case = ragged([8 * comm.size], window=10)
    ledger.clear()
    pass_keys(comm, case, "contiguous", case.window)
    assert ledger.calls("Shift") == min(2, comm.size - 1)


def test_sequences_that_do_not_meet_end_the_ring(comm):
    """With a sequence per rank no block is needed elsewhere, whatever its positions."""
    case = ragged([8] * comm.size, window=100)
    ledger.clear()
    assert_equals_one_rank(case, *pass_keys(comm, case, "contiguous", case.window))
    assert ledger.calls("Shift") == 0


@pytest.mark.parametrize("holder", [0, -1])
def test_all_tokens_on_one_rank(comm, holder):
    case = CASES["several"]
    counts = [0] * comm.size
    counts[holder] = len(case.k)
    own = slice(None) if comm.rank == holder % comm.size else slice(0, 0)
    tokens = case.k_tokens[own]
    for window in (None, 100):
        result = ring(
            comm, case.q[own], case.k[own], case.v[own], tokens, tokens, counts, case.attend, window
        )
        assert_equals_one_rank(case, own, result)

    def attend_local(q, q_tokens):
        return case.attend(q, case.k[own], case.v[own], q_tokens, tokens)

    result = ring_queries(comm, case.q[own], tokens, counts, attend_local)
    assert_equals_one_rank(case, own, result)


def test_transfer_is_tested_during_compute(comm):
    """Every step but the last has a message under way, and something to move it with."""
    case, given = CASES["several"], []

    def attend(q, k, v, q_tokens, k_tokens, between):
        given.append(between is not None)
        return case.attend(q, k, v, q_tokens, k_tokens, between)

    mine, result = pass_keys(comm, case, "zigzag", attend=attend)
    assert_equals_one_rank(case, mine, result)
    assert given == [True] * (comm.size - 1) + [False]


@pytest.mark.parametrize("dtype, itemsize", [("float32", 4), ("bfloat16", 2)])
def test_cost(comm, dtype, itemsize):
    """Keys travel in their own type, each with 8 bytes of sequence and position."""
    P, G, K = comm.size, 3, 8
    case = ragged([4 * P], G=G, K=K, dtype=dtype)
    ledger.clear()
    pass_keys(comm, case, "striped")
    assert ledger.calls("Shift", purpose="ring") == ledger.calls() == P - 1
    assert ledger.sent_bytes() == (P - 1) * 4 * (2 * G * K * itemsize + 8)


def test_cost_of_uneven_blocks(comm):
    """A rank sends its own block and those behind it, but not the one of the next rank."""
    P, G, K = comm.size, 3, 8
    case = ragged([4 * P + 1], G=G, K=K)
    _, counts = cut_of(comm, len(case.k), "contiguous")
    ledger.clear()
    pass_keys(comm, case, "contiguous")
    sent = sum(counts[(comm.rank - t) % P] for t in range(P - 1))
    assert ledger.sent_bytes("Shift") == sent * (2 * G * K * 4 + 8)


def test_cost_of_queries(comm):
    P, H, K = comm.size, 6, 8
    case = ragged([4 * P + 3], H=H, K=K)
    _, counts = cut_of(comm, len(case.q), "contiguous")
    ledger.clear()
    pass_queries(comm, case, "contiguous")
    sent = sum(counts[(comm.rank - t) % P] for t in range(P - 1))
    returned = sum(counts) - counts[comm.rank]
    assert ledger.calls("Shift", purpose="ring queries") == P - 1
    assert ledger.sent_bytes("Shift") == sent * (4 * H * K + 8)
    assert ledger.sent_bytes("Alltoall", purpose="ring queries") == returned * 4 * H * (K + 1)


@pytest.mark.parametrize("new", [1, 10, 20, 40])
def test_choice_by_bytes(comm, new):
    """The choice is what the ledgers of all ranks would say."""
    case = ragged([40], H=6, G=3, K=8, new=new, dtype="bfloat16")
    sent_bytes = []
    for room in (pass_keys, pass_queries):
        ledger.clear()
        room(comm, case, "block_cyclic")
        sent_bytes.append(comm.allreduce(ledger.sent_bytes()))
    _, n_queries = cut_of(comm, len(case.q), "block_cyclic")
    _, n_keys = cut_of(comm, len(case.k), "block_cyclic")
    cheaper = cheaper_to_move_queries(n_queries, n_keys, 6, 3, 8, BFLOAT16.itemsize)
    if comm.size > 1:
        assert cheaper == (sent_bytes[1] < sent_bytes[0])
    assert cheaper == (new < 20 * 2 * 104 / (2 * 200 + 24))


def test_refuses(comm):
    case = CASES["several"]
    tokens, counts = case.k_tokens, [len(case.k)] * comm.size
    for wrong, words in (
        (counts + [0], "need the keys of each of"),
        ([-1] * comm.size, "need the keys of each of"),
        ([n + 1 for n in counts], f"got {len(case.k)} keys on rank {comm.rank}, need counts"),
    ):
        with pytest.raises(ValueError, match=f"ring: .*{words}"):
            ring(comm, case.q, case.k, case.v, tokens, tokens, wrong, case.attend)
        with pytest.raises(ValueError, match=f"ring: .*{words.replace('keys', 'queries')}"):
            ring_queries(comm, case.q, tokens, wrong, case.attend)


def test_arguments_stay_as_they_are(comm):
    case = CASES["bfloat16"]
    before = [x.copy() for x in (case.q, case.k, case.v, case.k_tokens)]
    pass_keys(comm, case, "striped")
    pass_queries(comm, case, "striped")
    for x, y in zip((case.q, case.k, case.v, case.k_tokens), before, strict=True):
        assert np.array_equal(x, y)
