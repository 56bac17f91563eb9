"""Blocks, heads, dealt pages, stages, experts: each covers its axis once. See also test_cuts.py."""

import itertools

import numpy as np
import pytest

from hpcinfer import partition

pytestmark = pytest.mark.single


@pytest.mark.parametrize("P", [1, 2, 3, 4, 7, 16, 61])
def test_blocks_cover_the_axis_once_and_are_balanced(P):
    for n in (0, 1, 2, 3, 5, 13, 14, 15, 16, 17, 60, 61, 1003, 2**40 + 3):
        ranges = partition.block(n, P)
        lengths = partition.counts(ranges)
        assert len(ranges) == P
        assert [start for start, _ in ranges] == [0, *np.cumsum(lengths)[:-1].tolist()]
        assert ranges[-1][1] == n
        assert max(lengths) - min(lengths) <= 1
        assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize(("n", "P"), [(-1, 2), (3, 0), (3, -1)])
def test_block_refuses(n, P):
    with pytest.raises(ValueError, match=f"partition: got {n} items over {P} ranks"):
        partition.block(n, P)


def test_heads_of_14_and_2_on_3_ranks():
    """Head 7 begins the second group: the middle rank needs both key/value heads."""
    first, middle, last = partition.heads(14, 2, 3)
    assert first == partition.Heads((0, 5), (0, 1), ((0, 5),))
    assert middle == partition.Heads((5, 10), (0, 2), ((0, 2), (2, 5)))
    assert last == partition.Heads((10, 14), (1, 2), ((0, 4),))


def test_two_kv_heads_on_4_ranks_are_copied():
    """Where P is a multiple of G, so that every rank needs one of them only."""
    heads = partition.heads(14, 2, 4)
    assert [h.kv for h in heads] == [(0, 1), (0, 1), (1, 2), (1, 2)]
    assert [h.query for h in heads] == [(0, 4), (4, 7), (7, 11), (11, 14)]


def test_ranks_beyond_the_heads_own_none():
    heads = partition.heads(3, 1, 5)
    assert [h.n_query for h in heads] == [1, 1, 1, 0, 0]
    assert [h.n_kv for h in heads] == [1, 1, 1, 0, 0]
    assert heads[4].groups == ()


@pytest.mark.parametrize("P", range(1, 18))
@pytest.mark.parametrize(("H", "G"), [(1, 1), (5, 5), (14, 2), (7, 1), (12, 4), (32, 8), (15, 3)])
def test_every_query_head_reads_its_own_kv_head(H, G, P):
    """The groups deal out the rank's query heads, each to key/value head h // (H/G)."""
    heads = partition.heads(H, G, P)
    ends = [0, *(h.query[1] for h in heads)]
    assert [h.query for h in heads] == list(itertools.pairwise(ends)) and ends[-1] == H
    lengths = [h.n_query for h in heads]
    assert max(lengths) - min(lengths) <= 1
    for own in heads:
        served = [
            (own.query[0] + j, own.kv[0] + g)
            for g, (start, stop) in enumerate(own.groups)
            for j in range(start, stop)
        ]
        assert served == [(h, h // (H // G)) for h in range(*own.query)]
        assert len(own.groups) == own.n_kv
        assert all(stop > start for start, stop in own.groups)


@pytest.mark.parametrize(("H", "G"), [(14, 3), (2, 4), (4, 0), (4, -2)])
def test_heads_refuse(H, G):
    with pytest.raises(ValueError, match="need G to divide H"):
        partition.heads(H, G, 2)


@pytest.mark.parametrize("P", [1, 2, 3, 5])
def test_items_are_dealt_in_turn(P):
    """Whoever has the first, and from wherever one looks on."""
    for first in range(P):
        for start, stop in ((0, 0), (0, 11), (4, 11), (11, 11), (7, 8)):
            hands = [partition.dealt(start, stop, P, first, rank) for rank in range(P)]
            assert sorted(np.concatenate(hands).tolist()) == list(range(start, stop))
            for rank, hand in enumerate(hands):
                assert (np.diff(hand) == P).all()
                assert ((first + hand) % P == rank).all()


# --- stages of a pipeline ------------------------------------------------------------------------


def all_stages(n, P):
    """Every way to cut n layers into P runs."""
    for ends in itertools.combinations_with_replacement(range(n + 1), P - 1):
        yield list(itertools.pairwise([0, *ends, n]))


WEIGHTS = [
    [],
    [3.0],
    [0, 0, 0],
    [1, 1, 1, 1, 1, 1, 1],
    [5, 1, 1, 1, 1, 1, 5],
    [1, 2, 3, 4, 5, 6],
    [9, 0, 0, 1, 7, 2.5, 1, 4],
    [1e-3, 2e-3, 1e-3, 5e-3, 1e-3],
]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("P", range(1, 6))
def test_the_heaviest_stage_is_as_light_as_can_be(weights, P):
    """By brute force; of those, the sum of squares is the least, so the others are even."""

    def loads(stages):
        return [sum(weights[a:b]) for a, b in stages]

    stages = partition.stages(weights, P)
    assert len(stages) == P and stages[0][0] == 0 and stages[-1][1] == len(weights)
    assert all(a <= b for a, b in stages)
    assert all(b == a for (_, b), (a, _) in itertools.pairwise(stages))

    every = [loads(s) for s in all_stages(len(weights), P)]
    heaviest = min(map(max, every))
    assert max(loads(stages)) == pytest.approx(heaviest)
    squares = min(sum(w * w for w in ws) for ws in every if max(ws) <= heaviest * (1 + 1e-9))
    assert sum(w * w for w in loads(stages)) == pytest.approx(squares)


@pytest.mark.parametrize("P", range(1, 10))
def test_equal_layers_are_cut_as_blocks(P):
    """By number: the first n % P stages have one layer more, and none is lost."""
    for n in range(14):
        assert partition.stages([1] * n, P) == partition.block(n, P)


def test_stages_by_memory_and_by_time_differ():
    """A heavy vocabulary at both ends asks for fewer layers there."""
    by_memory = partition.stages([4, *[1] * 8, 4], 4)
    assert [b - a for a, b in by_memory] == [1, 4, 4, 1]
    by_time = partition.stages([1] * 10, 4)
    assert [b - a for a, b in by_time] == [3, 3, 2, 2]


@pytest.mark.parametrize(("weights", "P"), [([1, 2], 0), ([1, -1], 2)])
def test_stages_refuse(weights, P):
    with pytest.raises(ValueError, match=f"partition: got {P} stages, need 1 or more"):
        partition.stages(weights, P)


# --- a queue -------------------------------------------------------------------------------------


@pytest.mark.parametrize("P", [1, 2, 5])
@pytest.mark.parametrize("n", [0, 1, 7, 1000])
def test_guided_shares_shrink_and_end_the_queue(P, n):
    shares, left = [], n
    while left:
        shares.append(partition.guided(left, P))
        left -= shares[-1]
    assert left == partition.guided(0, P) == 0
    assert shares == sorted(shares, reverse=True) and all(shares)
    assert len(shares) == min(n, 1) if P == 1 else shares[-1:] in ([1], [])


# --- experts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("E", [1, 2, 5, 8])
@pytest.mark.parametrize("F", [1, 7, 16])
@pytest.mark.parametrize(("ep", "tp"), [(1, 1), (1, 3), (3, 1), (2, 2), (7, 1), (4, 3), (16, 1)])
def test_every_column_of_every_expert_is_on_one_rank(E, F, ep, tp):
    shares = partition.experts(E, F, ep, tp)
    assert len(shares) == ep * tp
    owners = np.zeros((E, F), int)
    for share in shares:
        owners[slice(*share.experts), slice(*share.columns)] += 1
    assert (owners == 1).all()
    columns = [share.columns[1] - share.columns[0] for share in shares]
    n_experts = [share.experts[1] - share.experts[0] for share in shares]
    assert max(n_experts) - min(n_experts) <= 1 and min(n_experts) >= 1
    if ep <= E:
        assert max(columns) - min(columns) <= 1
    assert [share.is_empty for share in shares] == [n == 0 for n in columns]


def test_more_ranks_than_experts_cut_the_columns():
    """Seven ranks for two experts: four and three of them."""
    shares = partition.experts(2, 12, 7)
    assert [s.experts for s in shares] == [(0, 1)] * 4 + [(1, 2)] * 3
    assert [s.columns for s in shares[4:]] == [(0, 4), (4, 8), (8, 12)]


def test_experts_refuse():
    with pytest.raises(ValueError, match="partition: got 0 experts, need 1 or more"):
        partition.experts(0, 4, 2)


@pytest.mark.parametrize("T", [0, 1, 9])
def test_tokens_go_where_what_they_chose_is(T):
    """Pair by pair: a token is sent once to a rank, and never to one without columns."""
    E, F = 3, 2
    ids = np.random.default_rng(T).integers(-1, E, (T, 2))
    for ep, tp in ((1, 1), (2, 1), (3, 1), (1, 3), (8, 1), (3, 2)):
        shares = partition.experts(E, F, ep, tp)
        for common in (False, True):
            rows = partition.destinations(ids, shares, common)
            assert len(rows) == len(shares)
            for share, got in zip(shares, rows, strict=True):
                want = [
                    t
                    for t in range(T)
                    if common or (not share.is_empty and set(ids[t]) & set(range(*share.experts)))
                ]
                assert got.tolist() == want
