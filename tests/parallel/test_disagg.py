"""Strategy `disagg`: M attention ranks and N FFN ranks together compute what one rank does."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.mixture import mixture

from hpcinfer import partition
from hpcinfer.array import BFLOAT16, narrow, widen
from hpcinfer.ledger import ledger
from hpcinfer.parallel import disagg

D = 6
LAYERS = (0, 2, 3)  # need not be consecutive
MICRO_BATCHES = [(7,), (5, 2), (4, 0, 3), (0, 0), (3, 1, 2, 1)]  # tokens on every attention rank

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def sides(comm):
    """For every split M : N of the ranks, an intercommunicator to the other side."""
    if comm.size < 2:
        pytest.skip("an intercommunicator joins two groups, which need two ranks")
    made = {}
    for M in range(1, comm.size):
        attends = comm.rank < M
        side = comm.Split(int(attends), comm.rank)
        made[M] = side.Create_intercomm(0, comm, M if attends else 0, tag=M)
        made[M].Set_name("afd")
        side.Free()
    yield made
    for inter in made.values():
        inter.Free()


@pytest.fixture(autouse=True)
def empty_ledger():
    ledger.clear()


def model(case, n):
    """The case's experts as layer n has them: others in each layer."""
    return replace(case, up=case.up * np.float32(1 + n / 4), down=case.down - np.float32(n / 8))


def attend(n, x):
    """The attention half of layer n: of the own tokens only, unlike that of any other layer."""
    return (x + np.float32(0.1 * n)) * np.float32(0.9)


def add(n, b, x, y):
    """What layer n's FFN half gave, taken up as no other layer does."""
    return x + np.float32(1 + n / 16) * y


def ids_of(case, n, tokens):
    """Choices that change from layer to layer."""
    return np.where(case.ids[tokens] < 0, -1, (case.ids[tokens] + n) % case.sizes[0])


def whole(case, layers=LAYERS, common=None, dtype=np.float32):
    """All layers of all tokens, on one rank."""
    x = case.x
    for n in layers:
        x = attend(n, x)
        sent = widen(narrow(x, dtype))
        step = replace(model(case, n), x=sent, ids=ids_of(case, n, slice(None)))
        y = step.whole() + (0 if common is None else sent @ common)
        x = add(n, None, x, y.astype(np.float32))
    return x


def run(comm, sides, M, case, micro, layers=LAYERS, dtype=np.float32, common=None):
    """Micro-batches of this attention rank after the layers; None on an FFN rank.

    Every attention rank has sum(micro) tokens of the case, one rank's after the other's.
    """
    shares = partition.experts(*case.sizes, comm.size - M)
    rows = slices(comm.rank, micro)
    if comm.rank < M:
        return disagg.attention_side(
            sides[M],
            layers,
            [case.x[r] for r in rows],
            lambda n, b, x: (
                attend(n, x), attend(n, x), ids_of(case, n, rows[b]), case.weights[rows[b]],
                common is not None,
            ),
            add,
            lambda n: shares,
            dtype,
        )  # fmt: skip

    def compute(n, x, ids, weights):
        y = model(case, n).compute(shares[comm.rank - M])(x, ids, weights)
        if common is None:
            return y
        own = slice(*partition.block(D, comm.size - M)[comm.rank - M])
        return y + x[:, own] @ common[own]

    return disagg.ffn_side(
        sides[M], layers, len(micro), compute, D, lambda n: case.ids.shape[1], dtype
    )


def slices(rank, micro):
    """Rows of one attention rank's micro-batches."""
    ends = rank * sum(micro) + np.cumsum([0, *micro])
    return [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]


def check(comm, M, got, want, micro):
    if comm.rank >= M:
        assert got is None
        return
    assert len(got) == len(micro)
    for x, rows in zip(got, slices(comm.rank, micro), strict=True):
        assert x.dtype == np.float32
        np.testing.assert_allclose(x, want[rows], atol=1e-3)


# --- equals one rank -----------------------------------------------------------------------------


@pytest.mark.parametrize("micro", MICRO_BATCHES)
@pytest.mark.parametrize("E", [1, 2, 5])
def test_equals_one_rank(comm, sides, micro, E):
    """Every split; experts that do not divide, or fewer than FFN ranks; empty micro-batches."""
    for M in sides:
        case = mixture(M * sum(micro), E, k=min(2, E))
        check(comm, M, run(comm, sides, M, case, micro), whole(case), micro)


@pytest.mark.parametrize("F", [1, 2, 19])
def test_a_dense_ffn_is_one_expert_cut_over_the_ffn_ranks(comm, sides, F):
    """Columns fewer than ranks too: who has none is sent nothing."""
    micro = (4, 3)
    for M in sides:
        case = mixture(M * sum(micro), E=1, F=F, ids=np.zeros((M * sum(micro), 1), int))
        check(comm, M, run(comm, sides, M, case, micro), whole(case), micro)


def test_an_expert_that_all_tokens_choose(comm, sides):
    """It is cut over all FFN ranks, so every token goes to each of them, whatever it chose."""
    micro, common = (5, 0, 2), np.random.default_rng(3).normal(size=(D, D)).astype(np.float32)
    for M in sides:
        case = mixture(M * sum(micro), E=4)
        case.ids[::2] = -1
        got = run(comm, sides, M, case, micro, common=common)
        check(comm, M, got, whole(case, common=common), micro)


def test_an_expert_without_tokens_and_tokens_without_expert(comm, sides):
    micro = (6, 1)
    for M in sides:
        case = mixture(M * sum(micro), E=3, ids=np.full((M * sum(micro), 2), -1))
        case.ids[::3, 0] = 1
        check(comm, M, run(comm, sides, M, case, micro), whole(case), micro)


def test_bfloat16_travels(comm, sides):
    micro = (4, 3)
    for M in sides:
        case = mixture(M * sum(micro), E=5)
        got = run(comm, sides, M, case, micro, layers=LAYERS[:1], dtype=BFLOAT16)
        check(comm, M, got, whole(case, LAYERS[:1], dtype=BFLOAT16), micro)


@pytest.mark.parametrize(("layers", "micro"), [((), (3, 2)), (LAYERS, ())])
def test_no_layer_and_no_micro_batch(comm, sides, layers, micro):
    for M in sides:
        case = mixture(M * sum(micro), E=2)
        check(comm, M, run(comm, sides, M, case, micro, layers), whole(case, layers), micro)
    assert ledger.calls() == 0


def test_long_messages(comm, sides):
    """Longer than MPI sends unasked: nobody waits for a message that waits for him."""
    micro = (20_000, 20_000)
    for M in sides:
        case = mixture(M * sum(micro), E=1, F=1, ids=np.zeros((M * sum(micro), 1), int))
        got = run(comm, sides, M, case, micro, layers=(0,))
        if got is not None:
            x = attend(0, case.x)
            want = x + replace(case, x=x).compute(partition.experts(1, 1, 1)[0])(
                x, case.ids, case.weights
            )
            check(comm, M, got, want, micro)


def test_the_same_bits_every_time(comm, sides):
    """What comes back is added up in the order of the FFN ranks."""
    micro = (9, 4)
    for M in sides:
        case = mixture(M * sum(micro), E=6, k=4)
        first = run(comm, sides, M, case, micro)
        for _ in range(3):
            again = run(comm, sides, M, case, micro)
            assert first is None or all(map(np.array_equal, again, first))


def test_the_sides_meet_in_one_communicator_that_ends_with_theirs(comm, sides):
    """In which MPI may use memory that ranks share; attention ranks come first."""
    for M in sides:
        attends = comm.rank < M
        inter = sides[M].Dup()
        inter.Set_name("pair")
        joined = disagg._joined(inter, attends)
        assert not joined.Is_inter() and joined.rank == comm.rank and joined.size == comm.size
        assert joined.Get_name() == "pair"
        assert disagg._joined(inter, attends) == joined
        inter.Free()


# --- cost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", MICRO_BATCHES)
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_cost(comm, sides, micro, dtype):
    """R and R' are counted pair by pair; the numbers of calls are bounds."""
    k, w, E = 2, np.dtype(dtype).itemsize, 5
    for M in sides:
        ledger.clear()
        case, N = mixture(M * sum(micro), E, k), comm.size - M
        run(comm, sides, M, case, micro, dtype=dtype)
        shares = partition.experts(*case.sizes, N)
        pairs = [
            (rank, r)
            for n in LAYERS
            for rank in range(M)
            for rows in slices(rank, micro)
            for chosen in ids_of(case, n, rows)
            for r, share in enumerate(shares)
            if not share.is_empty and any(share.experts[0] <= e < share.experts[1] for e in chosen)
        ]
        steps = len(LAYERS) * len(micro)
        if comm.rank < M:
            R = sum(a == comm.rank for a, _ in pairs)
            assert ledger.sent_bytes() == R * (D * w + 8 * k)
            assert ledger.calls("Send", purpose="disagg") == steps * N
        else:
            R = sum(b == comm.rank - M for _, b in pairs)
            assert ledger.sent_bytes() == R * 4 * D
            assert ledger.calls("Recv", purpose="disagg") == steps * M
            assert ledger.calls("Send", purpose="disagg") <= steps * M


# --- refuses -------------------------------------------------------------------------------------


def test_attention_ranks_refuse_before_the_first_message(comm, sides):
    x, ids, weights = np.zeros((3, D), np.float32), np.zeros((3, 2), int), np.zeros((3, 2))
    for M, inter in sides.items():
        shares = partition.experts(4, 7, comm.size - M)
        for wrong in (
            (x, ids, weights, [*shares, shares[0]]),
            (x, ids[1:], weights[1:], shares),
            (x, ids, weights[:, 1:], shares),
        ):
            if comm.rank < M:
                with pytest.raises(ValueError, match="disagg: got .* need a share for each of"):
                    disagg.Dispatch(inter, *wrong)
    assert ledger.calls() == 0


def test_ffn_ranks_refuse_rows_of_another_width(comm, sides):
    """The two sides do not agree on the type in which tokens travel."""
    for M, inter in sides.items():
        if comm.rank < M:
            ids, shares = np.zeros((1, 1), int), partition.experts(1, 7, comm.size - M)
            sent = disagg.Dispatch(
                inter, np.zeros((1, D), np.float32), ids, ids.astype(np.float32), shares
            )
            for transfer in sent._sends:
                transfer.wait()
        else:
            with pytest.raises(ValueError, match=r"disagg: got messages of \[32.* need rows of 20"):
                disagg.ffn_side(inter, [0], 1, None, D, lambda n: 1, BFLOAT16)
