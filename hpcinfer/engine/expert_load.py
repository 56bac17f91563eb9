"""How many tokens each expert was chosen for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from hpcinfer import array
from hpcinfer.array import Array
from hpcinfer.model.architecture import Architecture
from hpcinfer.ops.route import count_into


class ExpertLoad:
    """How many tokens chose each expert of each layer, as far as this rank answers for them.

    Choices are counted where they are: nobody waits for a device before the counts are asked for.
    """

    def __init__(self, arch: Architecture):
        self._on_host = np.zeros((arch.N, arch.E), np.int64)
        self._on_device: Array | None = None

    @property
    def counts(self) -> np.ndarray:
        """(N, E) int64; what is counted into itself, as long as all choices are on the host."""
        if self._on_device is None:
            return self._on_host
        return self._on_host + array.host(self._on_device)

    def clear(self) -> None:
        """Forget all choices."""
        for counts in self._arrays():
            counts[...] = 0

    def add(self, n: int, ids: Array) -> None:
        """Count the choices of some tokens in layer n: ids (T, k)."""
        xp = array.namespace(ids)
        if xp is not np and self._on_device is None:
            self._on_device = xp.zeros(self._on_host.shape, np.int64)
        if ids.size:
            counts: Array = self._on_host if xp is np else self._on_device
            count_into(counts[n], ids)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Leave the counts as they are, whatever is counted in the body."""
        before = [counts.copy() for counts in self._arrays()]
        yield
        for counts, known in zip(self._arrays(), before, strict=True):
            counts[...] = known

    def _arrays(self) -> list[Array]:
        """Counts on the host, and on the device where it has any."""
        return [x for x in (self._on_host, self._on_device) if x is not None]
