"""Strategy `zero`: parameters kept in parts are whole when a layer is computed, and only then."""

import numpy as np
import pytest

from hpcinfer import collectives, partition
from hpcinfer.array import BFLOAT16
from hpcinfer.ledger import ledger
from hpcinfer.parallel import zero

THRESHOLDS = [0, 1000, np.inf]
ALIGN = 64


def parameters(i):
    """Mixed types, sizes that do not divide, an empty array; unit 1 has no small ones."""
    rng = np.random.default_rng(i)
    arrays = {
        "up": rng.normal(size=(30 + i, 7)).astype(np.float32),
        "down": rng.normal(size=(7, 101)).astype(BFLOAT16),
        "codes": rng.integers(-9, 9, 1003).astype(np.int8),
    }
    if i != 1:
        arrays["norm"] = rng.normal(size=5).astype(np.float32)
        arrays["none"] = np.zeros((0, 3), np.float32)
        arrays["scale"] = np.array(0.5 + i, np.float16)
    return arrays


UNITS = [parameters(i) for i in range(5)]


def cut(comm, small_bytes, units=UNITS):
    return [zero.cut(comm, u, small_bytes, i % comm.size) for i, u in enumerate(units)]


def equal(got, want):
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert got[name].dtype == x.dtype and got[name].shape == x.shape, name
        assert np.array_equal(got[name], x), name


def padded(arrays):
    """Bytes of arrays that begin at multiples of 64."""
    return sum(-(-x.nbytes // ALIGN) * ALIGN for x in arrays)


def divided(unit, small_bytes):
    """Bytes n that are cut and m that are broadcast, of a unit's parameters."""
    large = [x for x in unit.values() if x.nbytes >= small_bytes]
    small = [x for x in unit.values() if x.nbytes < small_bytes]
    return padded(large), padded(small)


@pytest.fixture(autouse=True)
def empty_ledger():
    ledger.clear()


# --- equals one rank -----------------------------------------------------------------------------


@pytest.mark.parametrize("small_bytes", THRESHOLDS)
@pytest.mark.parametrize("ahead", [True, False])
def test_parameters_come_back_in_every_round(comm, small_bytes, ahead):
    gathered = zero.Gathered(comm, cut(comm, small_bytes), ahead=ahead)
    for _ in range(2):
        for i, unit in enumerate(UNITS):
            equal(gathered.get(i), unit)
            gathered.test()
    gathered.settle()


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("around", [True, False])
def test_any_order_is_right(comm, ahead, around):
    """What was fetched ahead and is not wanted is waited for and forgotten."""
    gathered = zero.Gathered(comm, cut(comm, 1000), ahead=ahead, around=around)
    for i in (3, 0, 0, 2, 4, 4, 1, 2):
        equal(gathered.get(i), UNITS[i])
    gathered.settle()
    equal(gathered.get(1), UNITS[1])
    gathered.settle()
    gathered.settle()


@pytest.mark.parametrize("units", [[], [{}], [{}, UNITS[0], {}], [{"x": np.zeros((0, 2))}]])
def test_nothing_to_keep(comm, units):
    for small_bytes in THRESHOLDS:
        gathered = zero.Gathered(comm, cut(comm, small_bytes, units))
        for i, unit in enumerate(units):
            equal(gathered.get(i), unit)
        gathered.settle()


def test_fewer_bytes_than_ranks_need(comm):
    """One byte is still a run of 64, of which every rank keeps a part."""
    units = [{"x": np.array([7], np.uint8)}]
    gathered = zero.Gathered(comm, cut(comm, 0, units))
    equal(gathered.get(0), units[0])


def test_a_rank_keeps_its_part_only(comm):
    """The parts put together are the parameters laid end to end."""
    (unit,) = cut(comm, 0, UNITS[:1])
    n, _ = divided(UNITS[0], 0)
    assert unit.counts == partition.counts(partition.block(n, comm.size))
    assert len(unit.part) == unit.kept_bytes == unit.counts[comm.rank]
    whole = np.concatenate(comm.allgather(unit.part))
    for name, (start, _, _) in unit.specs.items():
        raw = UNITS[0][name].tobytes()
        assert start % ALIGN == 0 and whole[start : start + len(raw)].tobytes() == raw


def test_parameters_are_left_as_they_were_and_not_kept(comm):
    """A part is a copy, so that the whole can be freed; a strided array is laid out anew."""
    wide = np.arange(400, dtype=np.float32).reshape(20, 20)
    units = [{"x": wide[::2, 1::2]}]
    (unit,) = cut(comm, 0, units)
    assert not np.shares_memory(unit.part, wide)
    gathered = zero.Gathered(comm, [unit])
    equal(gathered.get(0), units[0])
    gathered.get(0)["x"][...] = -1
    assert wide[0, 1] == 1


# --- the buffers ---------------------------------------------------------------------------------


def test_the_next_unit_is_in_flight_before_it_is_asked_for(comm):
    """The gather is started in the `get` before, and ends without the `get` of its own."""
    gathered = zero.Gathered(comm, cut(comm, 1000))
    gathered.get(0)
    calls = ledger.calls()
    transfers = gathered._started[1]
    assert len(transfers) == 1 + any(x.nbytes < 1000 for x in UNITS[1].values())
    while not all(transfer.test() for transfer in transfers):
        gathered.test()
    assert ledger.calls() == calls
    equal(gathered.get(1), UNITS[1])
    assert ledger.calls() == calls + len(transfers)
    gathered.settle()


def test_without_ahead_nothing_is_in_flight(comm):
    gathered = zero.Gathered(comm, cut(comm, 1000), ahead=False)
    gathered.get(0)
    assert not gathered._started
    assert ledger.calls() == 2


def test_a_buffer_is_not_written_while_its_unit_is_in_use(comm):
    """Unit i stays as it is until the next `get`, and unit i + 1 arrives elsewhere."""
    gathered = zero.Gathered(comm, cut(comm, 0))
    for i in range(len(UNITS)):
        held = gathered.get(i)
        while not all(t.test() for ts in gathered._started.values() for t in ts):
            pass
        comm.Barrier()
        equal(held, UNITS[i])
        for name, x in gathered._views(i + 1).items() if i + 1 < len(UNITS) else ():
            assert not any(np.shares_memory(x, y) for y in held.values()), name
    gathered.settle()


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_round_and_round_the_first_unit_is_in_flight_during_the_last(comm, n):
    """Then each `get` but the very first finds its unit started; the last start is in vain."""
    gathered, rounds = zero.Gathered(comm, cut(comm, 0, UNITS[:n]), around=True), 3
    for turn in range(rounds):
        for i in range(n):
            assert (i in gathered._started) == ((turn > 0 or i > 0) and n > 1)
            equal(gathered.get(i), UNITS[i])
    gathered.settle()
    assert ledger.calls("Allgather") == (rounds * n + 1 if n > 1 else 1)


def test_a_unit_that_is_whole_is_not_fetched_again(comm):
    """And what is in flight stays in flight."""
    gathered = zero.Gathered(comm, cut(comm, 0))
    gathered.get(2)
    under_way = dict(gathered._started)
    equal(gathered.get(2), UNITS[2])
    assert gathered._started == under_way
    equal(gathered.get(3), UNITS[3])
    gathered.settle()
    assert ledger.calls("Allgather") == 3


def test_settle_leaves_nothing_in_flight(comm):
    gathered = zero.Gathered(comm, cut(comm, 0))
    gathered.get(2)
    assert gathered._started
    gathered.settle()
    assert not gathered._started
    assert ledger.calls("Allgather") == 2


@pytest.mark.parametrize("small_bytes", THRESHOLDS)
@pytest.mark.parametrize("ahead", [True, False])
def test_peak_bytes(comm, small_bytes, ahead):
    """n/P of every unit, m of the own ones, and the largest unit once or twice."""
    P, r = comm.size, comm.rank
    sizes = [divided(unit, small_bytes) for unit in UNITS]
    parts = sum(n // P + (r < n % P) for n, _ in sizes)
    owned = sum(m for i, (_, m) in enumerate(sizes) if i % P == r)
    gathered = zero.Gathered(comm, cut(comm, small_bytes), ahead=ahead)
    assert gathered.peak_bytes == parts + owned + (1 + ahead) * max(n + m for n, m in sizes)


# --- cost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("small_bytes", THRESHOLDS)
@pytest.mark.parametrize("ahead", [True, False])
def test_cost(comm, small_bytes, ahead):
    """A unit sends n (P-1) bytes in all, and m by its owner; ahead or not, the same."""
    P = comm.size
    gathered = zero.Gathered(comm, cut(comm, small_bytes), ahead=ahead)
    for i in range(len(UNITS)):
        gathered.get(i)
    sizes = [divided(unit, small_bytes) for unit in UNITS]
    assert ledger.calls("Allgather", purpose="zero") == sum(n > 0 for n, _ in sizes)
    assert ledger.calls("Bcast", purpose="zero") == sum(m > 0 for _, m in sizes)
    all_gathered, sent = (ledger.sent_bytes(verb) for verb in ("Allgather", "Bcast"))
    assert comm.allreduce(all_gathered) == (P - 1) * sum(n for n, _ in sizes)
    owned = sum(m for i, (_, m) in enumerate(sizes) if i % P == comm.rank)
    assert sent == (owned if P > 1 else 0)


# --- refuses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("excess", [0, 3])
def test_refuses_an_owner_that_is_no_rank(comm, excess):
    for owner in (-1, comm.size + excess):
        with pytest.raises(ValueError, match=f"zero: got owner {owner}, need a rank of"):
            zero.cut(comm, UNITS[0], owner=owner)
    assert ledger.calls() == 0


# --- the started collectives below ---------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 5, 300_000])
def test_started_gather_and_broadcast(comm, n):
    """Uneven parts, none of the last rank; every rank is the root once."""
    counts = [n * (r + 1) for r in range(comm.size - 1)] + [0]
    part = np.full(counts[comm.rank], comm.rank, np.uint8)
    whole = np.full(sum(counts), 255, np.uint8)
    transfer = collectives.Iallgather(comm, part, whole, counts, "test")
    assert transfer.wait() is whole
    assert np.array_equal(whole, np.repeat(np.arange(comm.size), counts))
    assert ledger.sent_bytes("Allgather") == part.nbytes * (comm.size - 1)

    for root in range(comm.size):
        x = np.full((n, 2), comm.rank, BFLOAT16)
        transfer = collectives.Ibcast(comm, x, root, "test")
        while not transfer.test():
            pass
        assert transfer.wait() is x and np.all(x == root)
    assert ledger.sent_bytes("Bcast") == (x.nbytes if comm.size > 1 else 0)
