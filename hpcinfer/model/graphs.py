"""Decoding without Python between the calls of a step: the layers as graphs.

Steps of one new token for each of the same number of sequences do the same; only numbers in arrays
differ. The first such steps run as any other; then one is captured, with its own arrays in a frame
that stays where it is; the following ones write theirs into the frame and replay the graph.
What is captured is replayed once before it is trusted, and must then give the same numbers: on the
CPU, where a capture computes, of the same step; on a GPU, where it does not, of the next one. A
model whose layers do anything that cannot be captured goes on as before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hpcinfer import array, capture, collectives, node
from hpcinfer.array import Array
from hpcinfer.heartbeat import waiting
from hpcinfer.ledger import current
from hpcinfer.model.forward_pass import Pass
from hpcinfer.model.frames import DeviceFrame, Frame, HostFrame
from hpcinfer.model.step import Step
from hpcinfer.model.weights.shared import parameters
from hpcinfer.ops import dispatch
from hpcinfer.ops.quantize import to_arrays

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

    from hpcinfer.model.forward import Model


# Tokens of a step up to which it is worth it; and steps before one is captured, which costs as much
# as replaying saves in some twenty on the CPU, in three on a GPU.
_MOST_TOKENS, _STEPS = {"cpu": 32, "cuda": 256}, {"cpu": 16, "cuda": 3}

_OTHER_NUMBERS = "other numbers when it was replayed"


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
    prepared: Step | None = None


class Graphs:
    """The graphs of a model on one rank, for as long as its cache is the same.

    Parameters
    ----------
    refusal : why there will be none, or None

    Attributes
    ----------
    refusals : dict, why there is none, of steps of some number of tokens; of any for None
    """

    def __init__(self, refusal: str | None = None):
        self._known, self._memory, self._steps = {}, None, Counter()
        self.refusals = {} if refusal is None else {None: refusal}

    def layers(self, p: Pass, x: Array | None, compute: Callable) -> Array:
        """Hidden states behind the layers.

        Parameters
        ----------
        p : Pass
        x : (T, D) float32, before them; None if `compute` begins with the embedding
        compute : function (p, x) -> (T, D), the layers

        Returns
        -------
        (T, D) float32
        """
        if not self._serves(p):
            return compute(p, x)

        # Compute the first steps of so many tokens, then keep how.
        T, kind = p.step.n_tokens, p.model.device.name
        known = self._known.get(T)
        if known is None or not known.frame.serves(p):
            self._steps[T] += 1
            if self._steps[T] <= _STEPS[kind]:
                return compute(p, x)
            kept = self._computed_and_kept if kind == "cpu" else self._kept
            return kept(p, x, compute)

        # Fill the frame, unless that was done ahead, and replay.
        if known.prepared is p.step:
            known.frame.fill_tokens(p)
            _replay(known.graph, prepared=True)
            return known.y.copy()
        known.frame.fill(p, x)
        if not known.trusted:
            return self._tried(known, p, compute)
        _replay(known.graph)
        return known.y.copy()

    def prepare(self, p: Pass) -> None:
        """Fill the frame with a step whose tokens are not known yet, if it will be replayed."""
        known = self._known.get(p.step.n_tokens)
        if known is None or not known.trusted or known.frame.x is not None:
            return
        if self._serves(p) and known.frame.serves(p):
            known.frame.fill(p, None)
            known.graph.prepare()
            known.prepared = p.step

    def agree(self, comm: Comm, T: int | None, reason: str | None) -> bool:
        """True if no rank has a reason against the graph of T tokens; else there will be none."""
        with waiting("allgather", comm, "graph"):
            reasons = [r for r in comm.allgather(reason) if r is not None]
        if reasons:
            self.refusals[T] = reasons[0]
        return not reasons

    def _serves(self, p):
        """True if a step is of the kind that graphs are for, on every rank alike."""
        step, kind, T = p.step, p.model.device.name, p.step.n_tokens
        if self.refusals.keys() & {None, T} or not 0 < T <= _MOST_TOKENS[kind]:
            return False
        alone = step.n_single == T and not step.columns and p.cut.counts is None
        alone &= step.all_wanted or kind == "cpu"
        watched = p.model.tap is not None or current().tracing
        return alone and not watched

    def _computed_and_kept(self, p, x, compute):
        """Compute the layers on the CPU, and keep how if that can be done."""
        from hpcinfer.ops.cpu.runtime.graph import Capture, Memory

        # Compute with the frame's arrays while every call is noted.
        self._memory = self._memory or Memory()
        frame = HostFrame(p, x)
        frame.fill(p, x)
        with capture.capturing(Capture(self._memory, [*_lasting(p, frame)])) as captured:
            y = compute(frame.framed(p), frame.x)
        result = y.copy()
        if not self.agree(p.cut.comm, len(x), captured.refusal):
            return result

        # Trust it if it makes the same of the frame where nothing is left of the first time.
        graph = captured.graph()
        self._memory.poison()
        with frame.load.kept():
            graph.replay()
        reason = None if np.array_equal(y, result) else _OTHER_NUMBERS
        if not self.agree(p.cut.comm, len(x), reason):
            return compute(p, x)  # what the replay wrote into the cache is wrong
        self._known[len(x)] = Known(frame, graph, y)
        return result

    def _kept(self, p, x, compute):
        """Compute the layers on a GPU, and keep how if that can be done."""
        from hpcinfer.ops.cuda.runtime.graph import Capture, Memory

        # Compute the step as any other, then once more while launches are noted.
        result = compute(p, x)
        self._memory = self._memory or Memory()
        frame = DeviceFrame(p, x)
        frame.fill(p, x)
        captured = Capture(self._memory)
        try:
            with capture.capturing(captured):
                y = compute(frame.framed(p), frame.x)
        except Exception as error:  # of a library that cannot be captured, or of the driver
            captured.refusal = captured.refusal or f"{type(error).__name__}: {error}"
        if self.agree(p.cut.comm, p.step.n_tokens, captured.refusal):
            self._known[p.step.n_tokens] = Known(frame, captured.graph(), y, trusted=False)
        return result

    def _tried(self, known, p, compute):
        """Replay a graph for the first time, and trust it if Python's calls give the same."""
        frame = known.frame
        with frame.load.kept():
            _replay(known.graph)
        result = compute(frame.framed(p), frame.x)
        known.trusted = np.array_equal(array.host(known.y), array.host(result))
        if not self.agree(p.cut.comm, len(result), None if known.trusted else _OTHER_NUMBERS):
            del self._known[len(result)]
        return result


def reason_against(model: Model) -> str | None:
    """Why the layers of a model are not captured on this rank, or None."""
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


def _replay(graph, **how):
    """Replay a graph, and enter its sums in the ledger."""
    time_s = graph.replay(**how)
    n_sums = sum(calls for _, calls, _ in graph.totals)
    for key, calls, sent_bytes in graph.totals:
        current().enter_many(key, calls, sent_bytes, time_s * calls / n_sums)


def _lasting(p, frame):
    """Arrays that stay where they are from one step to the next."""
    yield from capture.constants
    yield from frame.arrays()
    for _, _, x in parameters(p.model.weights):
        yield from to_arrays(x)
    for _, pages in p.model.cache.arrays():
        yield pages
    yield p.model.expert_load.counts
    shared = collectives.reducer_of(p.cut.comm)
    if shared is not None:
        yield from shared.arrays()
