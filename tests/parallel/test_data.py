"""Strategy `data`: a queue that ranks share gives every number once, and more to the fast."""

import time

import pytest

from hpcinfer.ledger import ledger
from hpcinfer.parallel.data import Queue
from hpcinfer.transfer import Counter


@pytest.fixture(autouse=True)
def empty_ledger():
    ledger.clear()


@pytest.fixture
def queue(comm):
    """Function queue(n) -> Queue, freed after the test."""
    queues = []

    def make(n):
        queues.append(Queue(comm, n))
        return queues[-1]

    yield make
    for made in queues:
        made.free()


def drain(queue, most, delay_s=0.0):
    """Blocks that this rank takes until nothing remains, working `delay_s` on each number."""
    blocks = []
    while True:
        start, stop = queue.take(most)
        if start == stop:
            return blocks
        blocks.append((start, stop))
        time.sleep(delay_s * (stop - start))


def numbers(comm, blocks):
    """All numbers given on all ranks, ascending."""
    return sorted(i for of_rank in comm.allgather(blocks) for b in of_rank for i in range(*b))


# --- every number once ---------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 2, 3, 100, 1009])
@pytest.mark.parametrize("most", [1, 7, 10**6])
def test_every_number_is_given_once(comm, queue, n, most):
    """Also fewer numbers than ranks, and none."""
    shared = queue(n)
    blocks = drain(shared, most)
    assert numbers(comm, blocks) == list(range(n))
    assert all(stop - start <= most for start, stop in blocks)
    assert blocks == sorted(blocks)
    assert shared.remaining == 0


def test_a_slow_rank_gets_fewer(comm, queue):
    """Nobody waits for it: while it works on its first block, the others take all that is left."""
    shared, slow, blocks = queue(240), comm.size - 1, []
    if comm.rank == slow:
        blocks = [shared.take(4)]
    comm.Barrier()
    if comm.rank != slow:
        blocks = drain(shared, 4)
    comm.Barrier()
    blocks += drain(shared, 4)
    assert numbers(comm, blocks) == list(range(240))
    taken = comm.allgather(sum(stop - start for start, stop in blocks))
    assert taken[slow] == (4 if comm.size > 1 else 240)


def test_ranks_of_any_speed_take_at_once(comm, queue):
    """Whoever is quick comes back earlier; no number is lost or given twice."""
    blocks = drain(queue(120), 3, delay_s=2e-4 * comm.rank)
    assert numbers(comm, blocks) == list(range(120))


def test_an_idle_rank_leaves_all_to_the_others(comm, queue):
    """A rank that does not ask is not needed."""
    shared, blocks = queue(50), []
    comm.Barrier()
    if comm.rank == 0:
        blocks = drain(shared, 50)
    comm.Barrier()
    assert numbers(comm, blocks) == list(range(50))
    if comm.rank != 0:
        start, stop = shared.take(50)
        assert start == stop == 50


def test_two_queues_do_not_meet(comm, queue):
    first, second = queue(30), queue(20)
    blocks = [drain(first, 3), drain(second, 3)]
    assert [numbers(comm, b) for b in blocks] == [list(range(30)), list(range(20))]


# --- shares --------------------------------------------------------------------------------------


def in_turn(comm, take):
    """Results of `take()` on the ranks one after the other, on every rank."""
    results = []
    for rank in range(comm.size):
        mine = take() if rank == comm.rank else None
        results.append(comm.bcast(mine, rank))
    return results


def test_shares_shrink_with_what_remains(comm, queue):
    shared, taken, left = queue(97), [], 97
    while left:
        for start, stop in in_turn(comm, lambda: shared.take(97)):
            assert stop - start == -(-left // (2 * comm.size - 1))
            assert start == 97 - left
            taken.append(stop - start)
            left -= stop - start
    assert taken == sorted(taken, reverse=True)
    assert sum(taken) == 97


def test_what_a_rank_holds_counts_as_its_share(comm, queue):
    """So that a rank with much room does not take what others will be idle for."""
    left, P = 60, comm.size
    shared = queue(left)
    if comm.rank == 0:
        for most, held in ((100, 60), (100, 25), (100, 7), (2, 1)):
            start, stop = shared.take(most, held)
            share = -(-(left + held) // (2 * P - 1)) - held
            assert stop - start == max(0, min(most, share))
            left -= stop - start


def test_remaining_is_what_was_left(comm, queue):
    shared = queue(20)
    assert shared.remaining == 20
    if comm.rank == 0:
        start, stop = shared.take(3)
        assert (start, stop) == (0, 3) and shared.remaining == 17
    comm.Barrier()
    shared.take(0)
    assert shared.remaining == 17


# --- cost ----------------------------------------------------------------------------------------


def test_cost(comm, queue):
    """2 calls a block, 1 for a refusal: 8 bytes each, but on the rank of the counter."""
    shared = queue(40)
    ledger.clear()
    mine = [shared.take(5) for _ in range(2)] if comm.rank == comm.size - 1 else []
    comm.Barrier()
    mine.append(shared.take(0))
    calls = 2 * sum(start < stop for start, stop in mine) + sum(a == b for a, b in mine)
    assert ledger.calls("Fetch_and_op", purpose="data") == ledger.calls() == calls
    assert ledger.sent_bytes() == (0 if comm.rank == 0 else 8 * calls)


# --- refuses -------------------------------------------------------------------------------------


def test_refuses_on_every_rank(comm):
    with pytest.raises(ValueError, match="data: got a queue of -1 items, need 0 or more"):
        Queue(comm, -1)


# --- the counter below ---------------------------------------------------------------------------


def test_a_counter_gives_every_rank_its_own_range(comm):
    counter = Counter(comm)
    before = [counter.add(3, "test") for _ in range(50)]
    starts = sorted(sum(comm.allgather(before), []))
    assert starts == list(range(0, 150 * comm.size, 3))
    assert counter.add(0) == 150 * comm.size
    counter.free()
