"""The arrays that differ between the steps of a graph, which stay where they are.

A graph is captured of a Pass whose step has the arrays of a frame; before a replay the frame is
filled with what the step at hand has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from hpcinfer import array, capture
from hpcinfer.array import Array
from hpcinfer.model.block_table import BlockTable
from hpcinfer.model.cache import PAGE
from hpcinfer.model.forward_pass import Pass

# Pages that a sequence may come to have, beside twice those that it has, before a new frame.
_MORE_PAGES = 16


@dataclass
class FramedIndex:
    """What `BlockTable.table` gives, in a frame.

    Attributes
    ----------
    positions : (T,) int64
    bounds, places, numbers : as `PageIndex.pages`, with room for more pages than there are
    """

    positions: np.ndarray
    bounds: np.ndarray
    places: np.ndarray
    numbers: np.ndarray
    most_queries: int = 1

    @property
    def pages(self) -> tuple:
        """(bounds, places, numbers)"""
        return self.bounds, self.places, self.numbers


class FramedBlockTable:
    """BlockTable whose indices are those of a frame."""

    def __init__(self, block_table: BlockTable, indices: dict):
        self._block_table, self._indices = block_table, indices

    def table(self, tokens: np.ndarray, window: int | None = None) -> FramedIndex:
        """As `BlockTable.table`."""
        return self._indices[window]

    def __getattr__(self, name):
        capture.refuse(f"{name} of the cache, which only a form that is not compiled asks for")
        return getattr(self._block_table, name)


class LentBlockTable:
    """The block table of the step at hand, with room in its indices for what later ones need.

    Attributes
    ----------
    now : BlockTable
    capacity : as in BlockTable
    """

    def __init__(self, block_table: BlockTable, capacity: tuple[int, int]):
        self.now, self.capacity = block_table, capacity

    def __getattr__(self, name):
        return getattr(self.now, name)


class Frame:
    """The arrays that differ between the steps of a graph.

    Parameters
    ----------
    p : Pass that is captured
    x : its tokens before the layers, or None if the graph begins with the embedding

    Attributes
    ----------
    load : ExpertLoad that the graph counts into
    """

    def __init__(self, p: Pass, x: Array | None):
        self.load, self.x = p.model.expert_load, None
        if x is not None:
            self.x = array.namespace(x).empty_like(x)
        self.rotation = None if p.rotation is None else tuple(map(np.empty_like, p.rotation))
        self.stored = np.empty_like(p.step.stored)
        self.slot_mapping = np.empty_like(p.step.slot_mapping)

    def fill(self, p: Pass, x: Array | None) -> None:
        """Write what a Pass has into the frame."""
        if x is not None:
            self.x[...] = x
        self.stored[...], self.slot_mapping[...] = p.step.stored, p.step.slot_mapping
        for into, of_step in zip(self.rotation or (), p.rotation or (), strict=True):
            into[...] = of_step

    def framed(self, p: Pass) -> Pass:
        """The Pass with the frame's arrays."""
        arrays = {"stored": self.stored, "slot_mapping": self.slot_mapping} | self._arrays(p)
        return replace(p, step=replace(p.step, **arrays), rotation=self.rotation)


class HostFrame(Frame):
    """A frame whose indices are host arrays, which compiled functions read where they are."""

    def __init__(self, p: Pass, x: Array | None):
        super().__init__(p, x)
        n_pages = 2 * int(_pages(p.step).sum()) + _MORE_PAGES
        self._indices = {}
        for window in {p.model.arch.windows[n] for n in p.model.layers}:
            sizes = len(x), len(x) + 1, n_pages, n_pages
            self._indices[window] = FramedIndex(*(np.zeros(n, np.int64) for n in sizes))

    def arrays(self) -> Iterator[Array]:
        """All arrays of the frame."""
        yield from (self.x, *(self.rotation or ()), self.stored, self.slot_mapping)
        for index in self._indices.values():
            yield from (index.positions, *index.pages)

    def serves(self, p: Pass) -> bool:
        """True if it counts there, and the pages that the step's sequences have fit in here."""
        return p.model.expert_load is self.load and all(
            len(index.places) >= _pages(p.step).sum() for index in self._indices.values()
        )

    def fill(self, p: Pass, x: Array | None) -> None:
        """Write what a Pass has into the frame."""
        super().fill(p, x)
        for window, into in self._indices.items():
            index = p.step.block_table.table(p.step.decoding.tokens, window)
            into.positions[...], (into.bounds[...], places, numbers) = index.positions, index.pages
            into.places[: len(places)], into.numbers[: len(numbers)] = places, numbers

    def _arrays(self, p):
        return {"block_table": FramedBlockTable(p.step.block_table, self._indices)}


class DeviceFrame(Frame):
    """A frame from which indices are made anew before a replay, and copied to the device."""

    def __init__(self, p: Pass, x: Array | None):
        super().__init__(p, x)
        self.tokens, self.token_ids = map(np.empty_like, (p.step.tokens, p.step.token_ids))
        pages = _pages(p.step)
        capacity = 2 * int(pages.sum()) + _MORE_PAGES, 2 * int(pages.max()) + _MORE_PAGES
        self.block_table = LentBlockTable(p.step.block_table, capacity)

    def serves(self, p: Pass) -> bool:
        """True if it counts there, and the pages that the step's sequences have fit in here."""
        pages, (of_all, of_one) = _pages(p.step), self.block_table.capacity
        fits = pages.sum() <= of_all and pages.max() <= of_one
        return p.model.expert_load is self.load and fits

    def fill(self, p: Pass, x: Array | None) -> None:
        """Write what a Pass has into the frame."""
        super().fill(p, x)
        self.tokens[...], self.block_table.now = p.step.tokens, p.step.block_table
        self.fill_tokens(p)

    def fill_tokens(self, p: Pass) -> None:
        """Write what is known of a step at the last moment."""
        self.token_ids[...] = p.step.token_ids

    def _arrays(self, p):
        names = "token_ids", "tokens", "block_table"
        return {name: getattr(self, name) for name in names}


def _pages(step):
    """(B,) pages that each sequence of a step has."""
    return -(-step.lengths // PAGE)
