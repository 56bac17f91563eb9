"""Strategy `ulysses`: equals one rank, cost, refuses."""

import numpy as np
import pytest
from helpers.ragged import CASES, CASES_AND_CUTS, assert_close, ragged

from hpcinfer import partition
from hpcinfer.array import BFLOAT16
from hpcinfer.ledger import ledger
from hpcinfer.ops.attention import ragged_attention
from hpcinfer.parallel.ulysses import to_heads, to_tokens, ulysses

# Nearly to the bit, with 16-bit keys too.
pytestmark = pytest.mark.usefixtures("plain_forms")


def run(comm, case, cut):
    """Ulysses on this rank's part of a case: its queries, and o."""
    of_ranks = partition.CUTS[cut](len(case.q), comm.size)
    keys_of_ranks = partition.CUTS[cut](len(case.k), comm.size)
    mine, own = of_ranks[comm.rank], keys_of_ranks[comm.rank]
    q_tokens = case.q_tokens[np.concatenate(of_ranks)]
    k_tokens = case.k_tokens[np.concatenate(keys_of_ranks)]
    whole = partition.Heads((0, case.q.shape[1]), (0, case.k.shape[1]), case.groups)

    def attend(q, k, v, groups):
        o, _ = ragged_attention(
            q, k, v, q_tokens, k_tokens,
            scale=case.scale, groups=groups, window=case.window, softcap=case.softcap,
        )  # fmt: skip
        return o

    counts = [[len(part) for part in parts] for parts in (of_ranks, keys_of_ranks)]
    heads = partition.heads_of(whole, comm.size)
    return mine, ulysses(comm, case.q[mine], case.k[own], case.v[own], *counts, heads, attend)


@pytest.mark.parametrize("case, cut", CASES_AND_CUTS)
def test_equals_one_rank(comm, case, cut):
    case = CASES[case]
    mine, o = run(comm, case, cut)
    assert_close(o, case.oracle()[0][mine])


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16, np.int64])
@pytest.mark.parametrize("H", [1, 3, 8])
def test_there_and_back(comm, H, dtype):
    counts = [(2 * r + 1) % 4 for r in range(comm.size)]
    ranges = partition.block(H, comm.size)
    first = sum(counts[: comm.rank])
    whole = np.arange(sum(counts) * H * 2).reshape(sum(counts), H, 2).astype(dtype)
    x = whole[first : first + counts[comm.rank]]

    start, stop = ranges[comm.rank]
    x_heads = to_heads(comm, x, counts, ranges)
    assert x_heads.dtype == dtype and np.array_equal(x_heads, whole[:, start:stop])
    x_tokens = to_tokens(comm, x_heads, counts, ranges)
    assert x_tokens.dtype == dtype and np.array_equal(x_tokens, x)


def test_heads_of_several_ranks(comm):
    """A head may go to more than one rank, where a key/value head serves both."""
    x = np.full((2, 3, 4), comm.rank, np.float32) + np.arange(3)[:, None] * 10
    ranges = [(r % 2, r % 2 + 2) for r in range(comm.size)]
    x_heads = to_heads(comm, x, [2] * comm.size, ranges)
    expected = np.repeat(np.arange(comm.size), 2)[:, None] + 10 * np.arange(*ranges[comm.rank])
    assert np.array_equal(x_heads, np.repeat(expected[..., None], 4, axis=-1))


def test_cost(comm):
    P, K = comm.size, 4
    H, G, n = 2 * P, P, 5
    case = ragged([n * P], H=H, G=G, K=K, dtype="bfloat16")
    ledger.clear()
    run(comm, case, "striped")
    assert ledger.calls("Alltoall", purpose="ulysses") == ledger.calls() == 3
    queries_bytes = (P - 1) / P * n * H * K * 4
    keys_bytes = (P - 1) / P * n * 2 * G * K * 2
    assert ledger.sent_bytes() == pytest.approx(2 * queries_bytes + keys_bytes)


def test_cost_of_uneven_heads(comm):
    P, K, H = comm.size, 4, 5
    counts = [r + 1 for r in range(P)]
    ranges = partition.block(H, P)
    x = np.zeros((counts[comm.rank], H, K), np.float32)
    ledger.clear()
    x_heads = to_heads(comm, x, counts, ranges)
    own_heads = partition.counts(ranges)[comm.rank]
    assert ledger.sent_bytes() == counts[comm.rank] * (H - own_heads) * K * 4
    ledger.clear()
    to_tokens(comm, x_heads, counts, ranges)
    assert ledger.sent_bytes() == (sum(counts) - counts[comm.rank]) * own_heads * K * 4


def test_refuses(comm):
    P = comm.size
    x = np.zeros((3, 4, 2), np.float32)
    counts, ranges = [3] * P, partition.block(4, P)
    for wrong_counts, wrong_ranges, words in (
        (counts + [3], ranges, "need one for each of"),
        (counts, ranges + [(0, 1)], "need one for each of"),
        (counts, [(0, 5)] * P, "need them within 4 heads"),
        ([2] * P, ranges, f"got 3 tokens on rank {comm.rank}"),
    ):
        with pytest.raises(ValueError, match=f"ulysses: .*{words}"):
            to_heads(comm, x, wrong_counts, wrong_ranges)
    gap = [(1, 4)] + [(4, 4)] * (P - 1)
    twice = [(0, 4)] * (P - 1) + [(3, 4)]
    for wrong in (gap, twice):
        with pytest.raises(ValueError, match="ulysses: got ranges .*, need each of 4 heads once"):
            to_tokens(comm, np.zeros((3 * P, 4, 2)), counts, wrong)
    with pytest.raises(ValueError, match="ulysses: got .* on rank"):
        to_tokens(comm, np.zeros((3 * P + 1, 4, 2)), counts, ranges)
