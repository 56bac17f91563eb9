"""Decoding without Python between the calls of a step: the layers as graphs.

Steps of one new token for each of the same number of sequences do the same; only numbers in arrays
differ. The first such steps run as any other; then one is captured, with its own arrays in a frame
that stays where it is; the following ones write theirs into the frame and replay the graph.
What is captured is replayed once before it is trusted, and must then give the same numbers: on the
CPU, where a capture computes, of the same step; on a GPU, where it does not, of the next one. A
model whose layers do anything that cannot be captured goes on as before.
"""

from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np

from hpcinfer import array, capture, collectives, node
from hpcinfer.heartbeat import waiting
from hpcinfer.ledger import current
from hpcinfer.model.cache import PAGE
from hpcinfer.model.weights.shared import parameters
from hpcinfer.ops import dispatch
from hpcinfer.ops.quantize import to_arrays

# Tokens of a step up to which it is worth it; and steps before one is captured, which costs as much
# as replaying saves in some twenty on the CPU, in three on a GPU.
_MOST_TOKENS, _STEPS = {"cpu": 32, "cuda": 256}, {"cpu": 16, "cuda": 3}

_OTHER_NUMBERS = "other numbers when it was replayed"

# Pages that a sequence may come to have, beside twice those that it has, before a new frame.
_MORE_PAGES = 16


@dataclass
class Table:
    """What `BlockTable.table` gives, in a frame.

    Attributes
    ----------
    positions : (T,) int64
    bounds, places, numbers : as `model.step.Table.pages`, with room for more pages than there are
    """

    positions: np.ndarray
    bounds: np.ndarray
    places: np.ndarray
    numbers: np.ndarray
    most_queries: int = 1

    @property
    def pages(self):
        """(bounds, places, numbers)"""
        return self.bounds, self.places, self.numbers


class FramedBooks:
    """BlockTable whose tables are those of a frame."""

    def __init__(self, block_table, tables):
        self._block_table, self._tables = block_table, tables

    def table(self, tokens, looks_back=None):
        """As `BlockTable.table`."""
        return self._tables[looks_back]

    def __getattr__(self, name):
        capture.refuse(f"{name} of the cache, which only a form that is not compiled asks for")
        return getattr(self._block_table, name)


class LentBooks:
    """The block table of the step at hand, with room in tables for what later ones need.

    Attributes
    ----------
    now : BlockTable
    room : as in BlockTable
    """

    def __init__(self, block_table, room):
        self.now, self.room = block_table, room

    def __getattr__(self, name):
        return getattr(self.now, name)


class Frame:
    """The arrays that differ between the steps of a graph.

    Parameters
    ----------
    step, x, rotation : of the step that is captured
    load : ExpertLoad that the graph counts into, or None
    """

    def __init__(self, step, x, rotation, load):
        self.load, self.x = load, None if x is None else array.namespace(x).empty_like(x)
        self.rotation = None if rotation is None else tuple(map(np.empty_like, rotation))
        self.stored, self.slot_mapping = (
            np.empty_like(step.stored),
            np.empty_like(step.slot_mapping),
        )

    def fill(self, step, x, rotation):
        """Write what a step has into the frame."""
        if x is not None:
            self.x[...] = x
        self.stored[...], self.slot_mapping[...] = step.stored, step.slot_mapping
        for into, of_step in zip(self.rotation or (), rotation or (), strict=True):
            into[...] = of_step


class HostFrame(Frame):
    """A frame whose tables are host arrays, which compiled functions read where they are.

    Parameters
    ----------
    windows : of attention, that the model's layers have
    """

    def __init__(self, step, x, rotation, windows, load):
        super().__init__(step, x, rotation, load)
        self.tables, pages = {}, 2 * int(_pages(step).sum()) + _MORE_PAGES
        for looks_back in windows:
            integers = [np.zeros(n, np.int64) for n in (len(x), len(x) + 1, pages, pages)]
            self.tables[looks_back] = Table(*integers)

    def arrays(self):
        """All arrays of the frame."""
        yield from (self.x, *(self.rotation or ()), self.stored, self.slot_mapping)
        for table in self.tables.values():
            yield from (table.positions, *table.pages)

    def serves(self, step, load):
        """True if it counts there, and the pages that the step's sequences have fit in here."""
        return load is self.load and all(
            len(t.places) >= _pages(step).sum() for t in self.tables.values()
        )

    def fill(self, step, x, rotation):
        """Write what a step has into the frame."""
        super().fill(step, x, rotation)
        for looks_back, into in self.tables.items():
            table = step.block_table.table(step.decoding.tokens, looks_back)
            into.positions[...], (into.bounds[...], places, numbers) = table.positions, table.pages
            into.places[: len(places)], into.numbers[: len(numbers)] = places, numbers

    def step(self, step):
        """The step with the frame's arrays."""
        block_table = FramedBooks(step.block_table, self.tables)
        return replace(
            step, stored=self.stored, slot_mapping=self.slot_mapping, block_table=block_table
        )


class DeviceFrame(Frame):
    """A frame from which tables are made anew before a replay, and copied to the device."""

    def __init__(self, step, x, rotation, load):
        super().__init__(step, x, rotation, load)
        self.tokens, pages = np.empty_like(step.tokens), _pages(step)
        self.token_ids = np.empty_like(step.token_ids)
        room = 2 * int(pages.sum()) + _MORE_PAGES, 2 * int(pages.max()) + _MORE_PAGES
        self.block_table = LentBooks(step.block_table, room)

    def serves(self, step, load):
        """True if it counts there, and the pages that the step's sequences have fit in here."""
        pages, (of_all, of_one) = _pages(step), self.block_table.room
        return load is self.load and pages.sum() <= of_all and pages.max() <= of_one

    def fill(self, step, x, rotation):
        """Write what a step has into the frame."""
        super().fill(step, x, rotation)
        self.tokens[...], self.block_table.now = step.tokens, step.block_table
        self.fill_tokens(step)

    def fill_tokens(self, step):
        """Write what is known of a step at the last moment."""
        self.token_ids[...] = step.token_ids

    def step(self, step):
        """The step with the frame's arrays."""
        arrays = {
            "token_ids": self.token_ids,
            "tokens": self.tokens,
            "block_table": self.block_table,
        }
        return replace(step, **arrays, stored=self.stored, slot_mapping=self.slot_mapping)


def _pages(step):
    """(B,) pages that each sequence of a step has."""
    return -(-step.lengths // PAGE)


@dataclass
class Known:
    """A graph, the frame that it reads, and what it writes.

    Attributes
    ----------
    frame : Frame
    graph : with `replay` and `totals`
    y : (T, D) float32, behind the layers
    trusted : False until it has given what another way gives
    prepared : Step that the frame has been filled with ahead, or None
    """

    frame: Frame
    graph: object
    y: object
    trusted: bool = True
    prepared: object = None


class Graphs:
    """The graphs of a model on one rank.

    Parameters
    ----------
    model : Model

    Attributes
    ----------
    refusals : dict, why there is none, of steps of some number of tokens; of any for None
    """

    def __init__(self, model):
        self._model, self.refusals = model, {}

    def begin(self):
        """Begin with a cache that is new; every rank of tp and cp calls this."""
        self._known, self._memory, self._steps = {}, None, Counter()
        self.refusals.clear()
        self._agreed(self._model.grid.tp_cp, None, _reason_against(self._model))

    def layers(self, step, cut, x, rotation, compute):
        """Hidden states behind the layers.

        Parameters
        ----------
        step : Step
        cut : Cut
        x : (T, D) float32, before them; None if `compute` begins with the embedding
        rotation : (cos, sin) or None
        compute : function (x, step, rotation) -> (T, D), the layers

        Returns
        -------
        (T, D) float32
        """
        if not self._serves(step, cut):
            return compute(x, step, rotation)
        T, known = step.n_tokens, self._known.get(step.n_tokens)
        if known is None or not known.frame.serves(step, self._model.expert_load):
            self._steps[T] += 1
            if self._steps[T] <= _STEPS[self._model.device.name]:
                return compute(x, step, rotation)
            kept = self._computed_and_kept if self._model.device.name == "cpu" else self._kept
            return kept(step, cut, x, rotation, compute)
        if known.prepared is step:
            known.frame.fill_tokens(step)
            self._replay(known.graph, prepared=True)
            return known.y.copy()
        known.frame.fill(step, x, rotation)
        if not known.trusted:
            return self._tried(known, step, cut, compute)
        self._replay(known.graph)
        return known.y.copy()

    def prepare(self, step, cut, rotation):
        """Fill the frame with a step whose tokens are not known yet, if it will be replayed."""
        known = self._known.get(step.n_tokens)
        if known is None or not known.trusted or known.frame.x is not None:
            return
        if self._serves(step, cut) and known.frame.serves(step, self._model.expert_load):
            known.frame.fill(step, None, rotation)
            known.graph.prepare()
            known.prepared = step

    def _replay(self, graph, **how):
        """Replay a graph, and enter its sums in the ledger."""
        time_s = graph.replay(**how)
        n_sums = sum(calls for _, calls, _ in graph.totals)
        for key, calls, sent_bytes in graph.totals:
            share_s = time_s * calls / n_sums
            current().enter_many(key, calls, sent_bytes, share_s)

    def _serves(self, step, cut):
        """True if a step is of the kind that graphs are for, on every rank alike."""
        most_tokens, T = _MOST_TOKENS[self._model.device.name], step.n_tokens
        if self.refusals.keys() & {None, T} or not 0 < T <= most_tokens:
            return False
        alone = step.n_single == T and not step.columns and cut.counts is None
        alone &= step.all_wanted or self._model.device.name == "cpu"
        watched = self._model.tap is not None or current().tracing
        return alone and not watched

    def _computed_and_kept(self, step, cut, x, rotation, compute):
        """Compute the layers on the CPU, and keep how if that can be done."""
        from hpcinfer.ops.cpu.runtime.graph import Capture, Memory

        model = self._model
        if self._memory is None:
            self._memory = Memory()
        windows = {model.arch.windows[n] for n in model.layers}
        load = model.expert_load
        frame = HostFrame(step, x, rotation, windows, load)
        frame.fill(step, x, rotation)
        lasting = [*self._lasting(cut, frame)]
        with capture.capturing(Capture(self._memory, lasting)) as captured:
            y = compute(frame.x, frame.step(step), frame.rotation)
        result = y.copy()
        if not self._agreed(cut.comm, len(x), captured.refusal):
            return result

        # Trust it if it makes the same of the frame where nothing is left of the first time.
        graph = captured.graph()
        self._memory.poison()
        with _uncounted(load):
            graph.replay()
        reason = None if np.array_equal(y, result) else _OTHER_NUMBERS
        if not self._agreed(cut.comm, len(x), reason):
            return compute(x, step, rotation)  # what the replay wrote into the cache is wrong
        self._known[len(x)] = Known(frame, graph, y)
        return result

    def _kept(self, step, cut, x, rotation, compute):
        """Compute the layers on a GPU, and keep how if that can be done."""
        from hpcinfer.ops.cuda.runtime.graph import Capture, Memory

        result = compute(x, step, rotation)
        if self._memory is None:
            self._memory = Memory()
        frame = DeviceFrame(step, x, rotation, self._model.expert_load)
        frame.fill(step, x, rotation)
        captured = Capture(self._memory)
        try:
            with capture.capturing(captured):
                y = compute(frame.x, frame.step(step), frame.rotation)
        except Exception as error:  # of a library that cannot be captured, or of the driver
            captured.refusal = captured.refusal or f"{type(error).__name__}: {error}"
        if self._agreed(cut.comm, step.n_tokens, captured.refusal):
            self._known[step.n_tokens] = Known(frame, captured.graph(), y, trusted=False)
        return result

    def _tried(self, known, step, cut, compute):
        """Replay a graph for the first time, and trust it if Python's calls give the same."""
        with _uncounted(known.frame.load):
            self._replay(known.graph)
        frame = known.frame
        result = compute(frame.x, frame.step(step), frame.rotation)
        known.trusted = np.array_equal(array.host(known.y), array.host(result))
        if not self._agreed(cut.comm, len(result), None if known.trusted else _OTHER_NUMBERS):
            del self._known[len(result)]
        return result

    def _agreed(self, comm, T, reason):
        """True if no rank has a reason against the graph of T tokens; else there will be none."""
        with waiting("allgather", comm, "graph"):
            reasons = [r for r in comm.allgather(reason) if r is not None]
        if reasons:
            self.refusals[T] = reasons[0]
        return not reasons

    def _lasting(self, cut, frame):
        """Arrays that stay where they are from one step to the next."""
        yield from capture.constants
        yield from frame.arrays()
        for _, _, x in parameters(self._model.weights):
            yield from to_arrays(x)
        for _, pages in self._model.cache.arrays():
            yield pages
        if self._model.expert_load is not None:
            yield self._model.expert_load.counts
        shared = collectives.reducer_of(cut.comm)
        if shared is not None:
            yield from shared.arrays()


def _uncounted(load):
    """Context in which choices are not counted: those of a step that is computed once more."""
    return nullcontext() if load is None else load.kept()


def _reason_against(model):
    """Why the layers of a model are not captured, or None."""
    arch, grid = model.arch, model.grid
    if dispatch.chosen(model.device.xp.__name__) is None:
        return "there are no compiled functions"
    if model.device.name == "cpu" and node.threads() > 1:
        return "several threads"
    if grid.cp.size > 1 or model.attention.kv.size > 1:
        return "attention passes between ranks"
    if arch.mla is not None:
        return "latent attention"
    if grid.experts is not None:
        return "tokens travel between ranks"
    if grid.layout.zero != "off" or grid.role:
        return "parameters or tokens come from other ranks"
    return None
