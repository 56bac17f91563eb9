"""Blocks, heads and dealt pages: each covers its axis once. Cuts of a sequence: test_cuts.py."""

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
