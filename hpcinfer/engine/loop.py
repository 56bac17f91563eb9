"""The loop of steps: requests in, micro-batches through the model, results out as they finish.

A round is one step, or several micro-batches where two sides take turns; several rounds are under
way at a time where the model is a pipeline. Every rank of a replica plans the same rounds from the
same requests. What the last stage of a pipeline found in a round, it tells the others when they
take the round up again.
"""

from __future__ import annotations

import pickle
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hpcinfer import collectives
from hpcinfer.engine.block_manager import pages_for
from hpcinfer.engine.feed import Feed
from hpcinfer.engine.nonfinite import blame
from hpcinfer.engine.sequence import Sequence
from hpcinfer.engine.task import Deliver, Plan, Task
from hpcinfer.heartbeat import here
from hpcinfer.model.cache import PAGE
from hpcinfer.model.step import Step
from hpcinfer.requests.request import BadRequest, Request

if TYPE_CHECKING:
    from hpcinfer.engine.api import Engine
    from hpcinfer.engine.scheduler import Scheduler
    from hpcinfer.grid import Grid


@dataclass
class MicroBatch:
    """One planned step.

    Attributes
    ----------
    plan : its sequences, each with the number of its tokens
    step : their arrays
    expected : what is to be found for it; see `Task.expect`
    n_prompt : prompt tokens among its tokens
    found : what was found, None before it is
    """

    plan: Plan
    step: Step
    expected: Any
    n_prompt: int
    found: Any = None


class Interrupt(Protocol):
    """What may stop a run before its end, and bounds its steps; `hpcinfer.job.stop.Stop`.

    Attributes
    ----------
    pace : from the first round on, takes note of every round by `step(tokens, time_s)`
    """

    pace: Any

    def round(self, grid: Grid, scheduler: Scheduler) -> bool:
        """True, on every rank of a replica, if no further round is to be planned."""

    def tell(self, grid: Grid) -> None:
        """Let the replicas know if this rank, which plans no rounds, must stop."""


def run(
    engine: Engine,
    feed: Feed,
    deliver: Deliver,
    task: Task,
    between: Callable[[], None] | None = None,
    stop: Interrupt | None = None,
) -> None:
    """Step until the stream is empty and every sequence has finished, or the run is to stop.

    Parameters
    ----------
    engine : Engine
    feed : Feed of Request and BadRequest
    deliver : function of the outcome of a request, called on every rank of the replica
    task : what is done with the requests
    between : called after every round, or None
    stop : asked before every round, or None; what runs and waits is left in the queue when it stops
    """
    began_s = time.perf_counter()
    with np.errstate(all="ignore"):  # what is not finite is refused where tokens are chosen
        if engine.grid.role == "ffn":
            _serve(engine, stop)
        else:
            _steps(engine, feed, deliver, task, between, stop)
    engine.model.settle()
    engine.stats.loop_s += time.perf_counter() - began_s


def _steps(
    engine: Engine,
    feed: Feed,
    deliver: Deliver,
    task: Task,
    between: Callable[[], None] | None,
    stop: Interrupt | None,
) -> None:
    """The loop of a rank that has sequences."""
    rounds, before_s, stopping = deque(), time.perf_counter(), False
    while True:
        # Have as many rounds under way as there are stages.
        if stop is not None:
            stopping = stop.round(engine.grid, engine.scheduler)
        while len(rounds) < engine.depth and (
            batch := _plan(engine, feed, deliver, task, stopping)
        ):
            _launch(engine, batch, task)
            rounds.append(batch)
        if not rounds:
            break

        # Take up the oldest round.
        batch = rounds.popleft()
        held = engine.scheduler.pages.held
        for micro in batch:
            _take_up(engine, micro, task, deliver)

        # Count its time, which is what has passed since the one before.
        now_s = time.perf_counter()
        _count(engine, batch, (now_s - before_s) / len(batch), held)
        if stop is not None:
            stop.pace.step(max(micro.step.n_tokens for micro in batch), now_s - before_s)
        before_s = now_s
        if between is not None:
            between()
    if engine.grid.role == "attention":
        _announce_round(engine, 0)


def _count(engine: Engine, batch: list[MicroBatch], time_s: float, held: int) -> None:
    """Count micro-batches of `time_s` seconds each, and tell who observes the engine."""
    for micro in batch:
        engine.stats.step(micro.step, micro.n_prompt, time_s, held)
        for observe in engine.observers:
            observe(micro, time_s)


def _plan(
    engine: Engine, feed: Feed, deliver: Deliver, task: Task, stopping: bool
) -> list[MicroBatch]:
    """Micro-batches of the next round; empty if this replica, and those it meets, have none."""
    batch = []
    while len(batch) < engine.width:
        # Choose the sequences of a step, unless the run is to stop.
        plan = []
        if not stopping:
            _admit(engine, feed, deliver, task)
            plan = engine.scheduler.next_step()
        if not _anyone(engine, bool(plan)):
            break

        # Count them as computed, and note what the step is to find.
        engine.scheduler.launch(plan)
        n_prompt = sum(min(n, max(0, s.n_prompt - s.computed)) for s, n in plan)
        step = engine.ahead.step(plan)
        batch.append(MicroBatch(plan, step, task.expect(plan), n_prompt))
    return batch


def _admit(engine: Engine, feed: Feed, deliver: Deliver, task: Task) -> None:
    """Keep enough sequences waiting to fill a step, and no more in memory."""
    scheduler = engine.scheduler
    while feed.wants(len(scheduler.waiting), scheduler.held, engine.limits.sequences):
        for request in feed.take(scheduler.held):
            for sequence in sequences_of(engine, request, deliver, task):
                scheduler.add(sequence)


def sequences_of(
    engine: Engine, request: Request | BadRequest, deliver: Deliver, task: Task
) -> list[Sequence]:
    """Sequences to compute for a request; none if it is refused, or finished at once."""
    refusal = _refusal(engine, request, task)
    if refusal is not None:
        deliver(refusal)
        return []
    return task.sequences_of(request, deliver)


def _anyone(engine: Engine, planned: bool) -> bool:
    """True if this replica has planned a step, or another one that it meets inside of steps."""
    if not engine.grid.layout.lockstep:
        return planned
    flag = np.array([planned], np.int32)
    return bool(collectives.Allreduce(engine.grid.dp, flag, purpose="lockstep")[0])


def _launch(engine: Engine, batch: list[MicroBatch], task: Task) -> None:
    """Compute a round as far as this rank's part goes; the last stage finds its results."""
    here.step += 1
    if engine.grid.role == "attention":
        _announce_round(engine, len(batch))
    hidden = engine.model.forward([micro.step for micro in batch])

    # Find the results where the hidden states are, and tell the other stages.
    pipeline = engine.model.pipeline
    for micro, of_micro in zip(batch, hidden, strict=True):
        if pipeline.is_last:
            with blame(engine.path, engine.model):
                micro.found = task.find(micro.expected, of_micro)
            if not pipeline.is_first:
                pipeline.broadcast_result(np.frombuffer(pickle.dumps(micro.found), np.uint8))


def _take_up(engine: Engine, micro: MicroBatch, task: Task, deliver: Deliver) -> None:
    """Use what was found for a micro-batch."""
    if not engine.model.pipeline.is_last:
        micro.found = pickle.loads(engine.model.pipeline.receive_result().tobytes())
    engine.scheduler.complete(micro.plan)
    task.use(micro.expected, micro.found, deliver)


def _announce_round(engine: Engine, n: int) -> int:
    """Tell all ranks of both sides how many micro-batches the next round has; 0 ends the run."""
    header = np.array([n], np.int64)
    return int(collectives.Bcast(engine.grid.comm, header, purpose="round")[0])


def _serve(engine: Engine, stop: Interrupt | None) -> None:
    """The loop of the FFN side: as many micro-batches as the attention side says."""
    while n := _announce_round(engine, 0):
        here.step += 1
        engine.model.serve(n)
        if stop is not None:
            stop.tell(engine.grid)


def _refusal(engine: Engine, request: Request | BadRequest, task: Task) -> BadRequest | None:
    """A bad request itself, a refusal of one that the cache can never hold, else None."""
    if isinstance(request, BadRequest):
        return request

    # Compare the pages of its longest sequence with all that there are.
    needed = pages_for(min(task.tokens_of(request), engine.context))
    total = engine.scheduler.pages.total
    if needed <= total:
        return None
    return BadRequest(
        request.index,
        request.line,
        request.custom_id,
        f"kv-memory: got a cache of {total * PAGE} tokens, need {needed * PAGE} for this request; "
        "raise --kv-memory, use more ranks, or lower max_tokens",
    )
