"""The paged key/value cache of one rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import DTypeLike

from hpcinfer.array import Array, Device
from hpcinfer.ops.cache import place_heads, store

if TYPE_CHECKING:
    from hpcinfer.model.step import Step


# Tokens per page: prefixes are shared, and sequences cut, in whole pages.
PAGE = 32


class Cache:
    """Keys and values of this rank's heads and layers, in pages of PAGE tokens.

    Attributes
    ----------
    k, v : dict layer -> (pages, G, PAGE, K) arrays; values that are columns of the keys
        take no columns of their own
    """

    def __init__(
        self,
        device: Device,
        layers: range,
        n_kv: int,
        width: int,
        pages: int,
        dtype: DTypeLike,
        value_width: int | None = None,
    ):
        value_width = width if value_width is None else value_width
        shape = (pages, n_kv, PAGE)
        self.k = {n: device.empty((*shape, width), dtype) for n in layers}
        self.v = {n: device.empty((*shape, value_width), dtype) for n in layers}

    def pages(self, n: int) -> tuple[Array, Array]:
        """Keys and values of layer n, as `k` and `v` have them."""
        return self.k[n], self.v[n]

    def arrays(self) -> list:
        """(name, (pages, G, PAGE, columns)) of every layer's keys and values that have columns."""
        named = [(f"{word}/{n}", x[n]) for word, x in (("k", self.k), ("v", self.v)) for n in x]
        return [(name, x) for name, x in named if x.shape[-1]]

    def write(self, n: int, step: Step, k: Array, v: Array) -> None:
        """Store the keys and values of one step, as far as they belong to this rank.

        Parameters
        ----------
        k, v : (T/P, G, K) float32, of the tokens step.mine; rounded to the cache's type. v is
            (T/P, G, 0) if it is in k
        """
        store(k, v, step.stored, *self.pages(n), step.slot_mapping)

    def place_heads(
        self, n: int, step: Step, qkv: Array, norms: tuple, eps: float, rotation: tuple | None
    ) -> Array:
        """Norm and rotate queries and keys, and store keys and values, as `ops.cache` does.

        Parameters
        ----------
        qkv : (T/P, H + 2 G, K) float32, of the tokens step.mine

        Returns
        -------
        (T/P, H + G, K) float32: queries and keys
        """
        pages = self.pages(n)
        return place_heads(qkv, norms, eps, rotation, step.stored, *pages, step.slot_mapping)


def page_bytes(
    layers: int, n_kv: int, width: int, dtype: DTypeLike, value_width: int | None = None
) -> int:
    """Bytes of one page over all layers, keys and values together."""
    columns = width + (width if value_width is None else value_width)
    return layers * n_kv * PAGE * columns * np.dtype(dtype).itemsize
