"""Cuts of a sequence over ranks, and of one rank's heads."""

import numpy as np
import pytest

from hpcinfer import partition


@pytest.mark.parametrize("cut", partition.CUTS)
@pytest.mark.parametrize("P", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [0, 1, 5, 16, 131])
def test_every_token_once(cut, n, P):
    parts = partition.CUTS[cut](n, P)
    assert len(parts) == P
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    assert all((np.diff(part) > 0).all() for part in parts)


def test_shapes_of_the_cuts():
    cuts = {name: [p.tolist() for p in cut(8, 2)] for name, cut in partition.CUTS.items()}
    assert cuts["contiguous"] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cuts["striped"] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert cuts["zigzag"] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert [p.tolist() for p in partition.block_cyclic(7, 2, 2)] == [[0, 1, 4, 5], [2, 3, 6]]


@pytest.mark.parametrize("cut", ["striped", "zigzag", "block_cyclic"])
def test_causal_work_is_balanced(cut):
    """A query at position i meets i + 1 keys; contiguous blocks differ sevenfold on 4 ranks."""
    work = [(part + 1).sum() for part in partition.CUTS[cut](4096, 4)]
    assert max(work) < 1.03 * min(work)
    contiguous = [(part + 1).sum() for part in partition.contiguous(4096, 4)]
    assert max(contiguous) > 6.9 * min(contiguous)


def test_refuses_empty_blocks():
    with pytest.raises(ValueError, match="partition: got blocks of 0 items"):
        partition.block_cyclic(8, 2, 0)


@pytest.mark.parametrize("groups", [[1, 1, 1, 1], [3, 3], [1, 3, 2, 1], [5], []])
@pytest.mark.parametrize("P", [1, 2, 3, 9])
def test_heads_cut_further(groups, P):
    """Every query head has one owner, which also has the key/value head that it reads."""
    ends = np.cumsum([0, *groups]).tolist()
    own = partition.Heads(
        query=(2, 2 + ends[-1]),
        kv=(1, 1 + len(groups)),
        groups=tuple(zip(ends[:-1], ends[1:], strict=True)),
    )
    read = np.repeat(np.arange(len(groups)), groups)
    parts = partition.heads_of(own, P)
    assert [h for p in parts for h in range(*p.query)] == list(range(ends[-1]))
    assert max(p.n_query for p in parts) - min(p.n_query for p in parts) <= 1
    for part in parts:
        assert len(part.groups) == part.n_kv
        reads = [part.kv[0] + g for g, (start, stop) in enumerate(part.groups)
                 for _ in range(start, stop)]  # fmt: skip
        assert reads == read[slice(*part.query)].tolist()


def test_uneven_heads_cut_further():
    own = partition.Heads(query=(3, 8), kv=(1, 4), groups=((0, 1), (1, 4), (4, 5)))
    parts = partition.heads_of(own, 2)
    assert [p.query for p in parts] == [(0, 3), (3, 5)]
    assert [p.kv for p in parts] == [(0, 2), (1, 3)]
    assert [p.groups for p in parts] == [((0, 1), (1, 3)), ((0, 1), (1, 2))]
