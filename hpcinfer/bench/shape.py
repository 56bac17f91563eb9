"""What is measured: attention of some heads, FFN halves of some widths, work that only sleeps."""

import time
from dataclasses import dataclass
from functools import cache

import numpy as np

from hpcinfer import array, partition
from hpcinfer.errors import UsageError
from hpcinfer.ops.activation import relu
from hpcinfer.ops.attention import ragged_attention
from hpcinfer.ops.linear import linear

_NUMBERS = 1 << 20  # random numbers, repeated where more are needed: making them takes its time


@dataclass(frozen=True)
class AttentionShape:
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

    @classmethod
    def of(cls, options):
        """Of the options heads, kv_heads, width (of a head) and dtype.

        Raises
        ------
        UsageError
            If the heads cannot share keys evenly.
        """
        H, G = options.heads, options.kv_heads
        if H % G:
            raise UsageError(
                f"bench: got --heads {H} --kv-heads {G}, need a multiple of the KV heads"
            )
        return cls(H, G, options.width, options.dtype)

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
        return numbers((n, self.H, self.K), np.float32)

    def keys(self, n, copies=1):
        """Random keys and values, (copies, n, G, K) each."""
        dtype = array.parse_dtype(self.dtype)
        return tuple(numbers((copies, n, self.G, self.K), dtype) for _ in "kv")

    def facts(self, device):
        """The shape, and what it is measured on, as fields of a row."""
        return {"model": str(self), "dtype": self.dtype, "device": device.name}


@dataclass(frozen=True)
class Ffn:
    """FFN half of a model in float32, with ReLU between its products.

    Attributes
    ----------
    D, F : model width, FFN width
    """

    D: int
    F: int

    @classmethod
    def of(cls, options):
        """Of the options width and ffn."""
        return cls(options.width, options.ffn)

    def __str__(self):
        return f"width {self.D}, FFN {self.F}"

    def weights(self, columns=None):
        """up (F, D) and down (D, F) of one layer, or some columns of them; random."""
        F = self.F if columns is None else columns[1] - columns[0]
        scale = np.float32((self.D * self.F) ** -0.25)
        return numbers((F, self.D)) * scale, numbers((self.D, F)) * scale

    def tokens(self, n):
        """Random x (n, D)."""
        return numbers((n, self.D))

    def products(self, x, up, down):
        """(T, D) -> (T, D), a partial sum for a part of the columns."""
        return linear(relu(linear(x, up)), down)

    def flop(self, tokens):
        """Floating-point operations of the products for some tokens."""
        return 4 * tokens * self.D * self.F

    def facts(self, device):
        """The shape, and what it is measured on, as fields of a row."""
        return {"model": str(self), "dtype": "float32", "device": device.name}


def sleep(seconds, x):
    """Work that takes its time and no core, so that a schedule shows on any machine; returns x."""
    time.sleep(seconds)
    return x


def attend_nothing(q, k, v, q_tokens, k_tokens, between=None):
    """Attention that computes nothing, so that a ring only passes its blocks."""
    xp = array.namespace(q)
    return xp.zeros((0, 1), xp.float32), xp.zeros(0, xp.float32)


def tokens_of(sequence, positions):
    """Tokens of one sequence: (n, 2) int32."""
    return np.stack([np.full_like(positions, sequence), positions], axis=1).astype(np.int32)


def numbers(shape, dtype=np.float32):
    """Random numbers of a normal distribution."""
    return np.resize(array.narrow(_few(), dtype), shape)


@cache
def _few():
    return np.random.default_rng(0).standard_normal(_NUMBERS, np.float32)
