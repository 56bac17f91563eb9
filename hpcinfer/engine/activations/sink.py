"""Where the rows of activations go: into the files of a rank (`hpcinfer.io.parts`), or memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from hpcinfer.io.parts import ColumnShare


class Sink(Protocol):
    """What a `Tap` hands the rows of one rank to; `PartFiles` and `ActivationMemory`."""

    def append(self, name: str, rows: np.ndarray) -> None:
        """Take the next rows of a dataset: (n, own columns, ...) of its element type, host."""

    def close(self) -> None:
        """Keep all rows; the other ranks do so at the same time."""

    def abandon(self) -> None:
        """Let go after an error of this rank alone, without waiting for anything."""


class ActivationMemory:
    """Keeps the rows of one rank in memory: a `Sink`.

    Parameters
    ----------
    shares : the columns of every dataset that this rank has a part in
    """

    def __init__(self, shares: Sequence[ColumnShare]):
        self._shares = {share.field.name: share for share in shares}
        self._rows = {name: [] for name in self._shares}

    def append(self, name: str, rows: np.ndarray) -> None:
        """Keep the next rows of a dataset: (n, own columns, ...)."""
        self._rows[name].append(rows.copy())

    def close(self) -> None:
        """Nothing is left to do."""

    abandon = close

    def own(self) -> dict[str, tuple[int, np.ndarray]]:
        """Of every dataset with rows: (first own column, rows)."""
        return {
            name: (share.start, np.concatenate(self._rows[name]))
            for name, share in self._shares.items()
            if self._rows[name]
        }
