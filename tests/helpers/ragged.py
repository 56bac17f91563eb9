"""Random attention over several sequences, and its float64 oracle, for the tests of the rooms."""

from dataclasses import dataclass

import numpy as np

from hpcinfer import partition
from hpcinfer.array import DTYPES
from hpcinfer.ops.attention import ragged_attention

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Ragged:
    """Queries and keys of several sequences, the same on every rank.

    Attributes
    ----------
    q : (S, H, K) float32
    k, v : (L, G, K)
    q_tokens, k_tokens : (S, 2), (L, 2) int32, sequence and position
    groups, window, softcap, scale : as for `attention`
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    q_tokens: np.ndarray
    k_tokens: np.ndarray
    groups: tuple
    window: int | None = None
    softcap: float | None = None

    @property
    def scale(self):
        return self.q.shape[-1] ** -0.5

    def attend(self, q, k, v, q_tokens, k_tokens, between=None):
        """One rank's mathematics."""
        return ragged_attention(
            q,
            k,
            v,
            q_tokens,
            k_tokens,
            scale=self.scale,
            groups=self.groups,
            window=self.window,
            softcap=self.softcap,
            between=between,
        )

    def oracle(self, sink=None):
        """(o, lse) in float64, from the whole matrix of scores."""
        (S, H, _), K = self.q.shape, self.v.shape[-1]
        o, lse = np.zeros((S, H, K)), np.full((S, H), -np.inf)
        q, k, v = (x.astype(np.float64) for x in (self.q, self.k, self.v))
        seen = self.q_tokens[:, None, 0] == self.k_tokens[:, 0]
        seen &= self.k_tokens[:, 1] <= self.q_tokens[:, None, 1]
        if self.window is not None:
            seen &= self.k_tokens[:, 1] > self.q_tokens[:, None, 1] - self.window
        for g, (start, stop) in enumerate(self.groups):
            for h in range(start, stop):
                scores = q[:, h] @ k[:, g].T * self.scale
                if self.softcap is not None:
                    scores = self.softcap * np.tanh(scores / self.softcap)
                weights = np.where(seen, np.exp(scores), 0)
                total = weights.sum(axis=1) + (0 if sink is None else np.exp(sink[h]))
                some = total > 0
                o[some, h] = (weights @ v[:, g])[some] / total[some, None]
                lse[some, h] = np.log(total[some])
        return o, lse


def ragged(
    lengths,
    H=6,
    G=3,
    K=8,
    new=None,
    groups=None,
    window=None,
    softcap=None,
    dtype="float32",
    seed=0,
):
    """Sequences of some lengths, of which the last `new` tokens of each are queries (None: all)."""
    rng = np.random.default_rng(seed)
    k_tokens = np.array([(b, i) for b, n in enumerate(lengths) for i in range(n)], np.int32)
    k_tokens = k_tokens.reshape(-1, 2)
    ends = np.array(lengths)[k_tokens[:, 0]]
    q_tokens = k_tokens if new is None else k_tokens[k_tokens[:, 1] >= ends - new]
    q = rng.standard_normal((len(q_tokens), H, K), dtype=np.float32)
    k, v = (
        rng.standard_normal((len(k_tokens), G, K), dtype=np.float32).astype(DTYPES[dtype])
        for _ in range(2)
    )
    groups = groups or partition.heads(H, G, 1)[0].groups
    return Ragged(q, k, v, q_tokens, k_tokens, tuple(groups), window, softcap)


# What each room is held to: several sequences, fewer tokens than ranks, no token at all, windows,
# uneven groups of heads as a rank of a tensor-parallel grid has them, and 16-bit keys and values.
CASES = {
    "several": ragged([13, 1, 40]),
    "one token": ragged([1], H=4, G=1),
    "no token": ragged([]),
    "window": ragged([50, 3], window=5),
    "softcap": ragged([17], H=4, G=4, softcap=1.5),
    "one head": ragged([9, 4], H=1, G=1),
    "uneven groups": ragged([9, 30], H=5, G=3, groups=[(0, 1), (1, 4), (4, 5)]),
    "bfloat16": ragged([13, 20], dtype="bfloat16"),
    "float16": ragged([13, 20], dtype="float16", window=7),
    "few new": ragged([60, 5, 1], new=2),
}

# Every case with the cut that the cache has, and every cut with one case.
CASES_AND_CUTS = [(case, "block_cyclic") for case in CASES] + [
    (case, cut) for case in ("several", "window") for cut in ("contiguous", "striped", "zigzag")
]


def assert_close(o, expected, tolerance=TOLERANCE):
    """Equal up to rounding; infinities equal too."""
    assert o.shape == expected.shape
    np.testing.assert_allclose(o, expected, rtol=tolerance, atol=tolerance)
