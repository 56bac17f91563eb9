"""Heads and element type of the attention that is measured."""

from dataclasses import dataclass

import numpy as np

from hpcinfer import array, partition
from hpcinfer.ops.attention import ragged_attention

_NUMBERS = 1 << 20  # random numbers, repeated where more are needed: making them takes its time


@dataclass(frozen=True)
class Shape:
    """Attention of a model.

    Attributes
    ----------
    H, G, K : query heads, key/value heads, width of a head
    dtype : name of the type of keys and values; queries are float32
    """

    H: int
    G: int
    K: int
    dtype: str

    def __str__(self):
        return f"{self.H} heads, {self.G} KV, width {self.K}"

    @property
    def key_bytes(self):
        """Bytes of one token's keys and values."""
        return 2 * self.G * self.K * array.parse_dtype(self.dtype).itemsize

    def attend(self, q, k, v, q_tokens, k_tokens, between=None):
        """(o, lse) of one rank's mathematics."""
        (heads,) = partition.heads(self.H, self.G, 1)
        return ragged_attention(
            q, k, v, q_tokens, k_tokens,
            scale=self.K**-0.5, groups=heads.groups, between=between,
        )  # fmt: skip

    def queries(self, n):
        """Random queries (n, H, K) float32."""
        return _numbers((n, self.H, self.K), np.float32)

    def keys(self, n, copies=1):
        """Random keys and values, (copies, n, G, K) each."""
        dtype = array.parse_dtype(self.dtype)
        return tuple(_numbers((copies, n, self.G, self.K), dtype) for _ in "kv")

    def facts(self):
        """The shape as fields of a row."""
        return {"model": str(self), "dtype": self.dtype}


def attend_nothing(q, k, v, q_tokens, k_tokens, between=None):
    """Attention that computes nothing, so that a ring only passes its blocks."""
    return np.zeros((0, 1), np.float32), np.zeros(0, np.float32)


def tokens_of(sequence, positions):
    """Tokens of one sequence: (n, 2) int32."""
    return np.stack([np.full_like(positions, sequence), positions], axis=1).astype(np.int32)


def _numbers(shape, dtype):
    numbers = np.random.default_rng(0).standard_normal(_NUMBERS, np.float32)
    return np.resize(array.narrow(numbers, dtype), shape)
