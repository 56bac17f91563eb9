"""The loop of steps: requests in, micro-batches through the model, results out as they finish.

A round is one step, or several micro-batches where two sides take turns; several rounds are under
way at a time where the model is a pipeline. Every rank of a replica plans the same rounds from the
same requests. What the last stage of a pipeline found in a round, it tells the others when they
take the round up again.
"""

import pickle
import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from hpcinfer import collectives
from hpcinfer.engine.block_manager import pages_for
from hpcinfer.engine.nonfinite import blame
from hpcinfer.heartbeat import here
from hpcinfer.model.cache import PAGE
from hpcinfer.requests.request import BadRequest


@dataclass
class MicroBatch:
    """One planned step.

    Attributes
    ----------
    plan : list of (Sequence, n)
    step : Step
    job : what its results will be made of, as `work.job` says
    n_prompt : prompt tokens among its tokens
    """

    plan: list
    step: object
    job: object
    n_prompt: int
    result: object = None


def run(engine, feed, deliver, work, between=None, stop=None):
    """Step until the stream is empty and every sequence has finished, or the run is to stop.

    Parameters
    ----------
    engine : Engine
    feed : Feed of Request and BadRequest
    deliver : function of a result or BadRequest, called on every rank of the replica
    work : what is done with the requests: `tokens_of(request)`, the tokens that the cache must be
        able to hold for it; `sequences_of(request, deliver)`; `job(plan)`, what to find for a step,
        fixed when it starts; `find(job, hidden)`, found by the last stage; `use(job, found,
        deliver)`
    between : function called after every round, or None
    stop : Stop, asked before every round, or None; what runs and waits is then left in the queue
    """
    began_s = time.perf_counter()
    with np.errstate(all="ignore"):  # what is not finite is refused where tokens are chosen
        if engine.grid.role == "ffn":
            _serve(engine, stop)
        else:
            _steps(engine, feed, deliver, work, between, stop)
    engine.model.settle()
    engine.stats.loop_s += time.perf_counter() - began_s


def _steps(engine, feed, deliver, work, between, stop):
    """The loop of a rank that has sequences."""
    rounds, landed_s, stopping = deque(), time.perf_counter(), False
    while True:
        if stop is not None:
            stopping = stop.round(engine.grid, engine.scheduler)
        while len(rounds) < engine.depth and (
            batch := _plan(engine, feed, deliver, work, stopping)
        ):
            _launch(engine, batch, work)
            rounds.append(batch)
        if not rounds:
            break

        # Take up the oldest round; its time is what has passed since the one before.
        batch = rounds.popleft()
        held = engine.scheduler.pages.held
        for micro in batch:
            _land(engine, micro, work, deliver)
        now_s = time.perf_counter()
        share_s = (now_s - landed_s) / len(batch)
        for micro in batch:
            engine.stats.step(micro.step, micro.n_prompt, share_s, held)
        if stop is not None:
            stop.pace.step(max(micro.step.n_tokens for micro in batch), now_s - landed_s)
        landed_s = now_s
        if between is not None:
            between()
    if engine.grid.role == "attention":
        _announce_round(engine, 0)


def _plan(engine, feed, deliver, work, stopping):
    """Micro-batches of the next round; empty if this replica, and those it meets, have none."""
    batch = []
    while len(batch) < engine.width:
        plan = []
        if not stopping:
            _admit(engine, feed, deliver, work)
            plan = engine.scheduler.next_step()
        if not _anyone(engine, bool(plan)):
            break
        engine.scheduler.launch(plan)
        n_prompt = sum(min(n, max(0, s.n_prompt - s.computed)) for s, n in plan)
        step = engine.ahead.step(plan)
        batch.append(MicroBatch(plan, step, work.job(plan), n_prompt))
    return batch


def _admit(engine, feed, deliver, work):
    """Keep enough sequences waiting to fill a step, and no more in memory."""
    scheduler = engine.scheduler
    while feed.wants(len(scheduler.waiting), scheduler.held, engine.limits.sequences):
        for request in feed.take(scheduler.held):
            for sequence in sequences_of(engine, request, deliver, work):
                scheduler.add(sequence)


def sequences_of(engine, request, deliver, work):
    """Sequences to compute for a request; none if it is refused, or finished at once."""
    refusal = _refusal(engine, request, work.tokens_of)
    if refusal is not None:
        deliver(refusal)
        return []
    return work.sequences_of(request, deliver)


def _anyone(engine, planned):
    """True if this replica has planned a step, or another one that it meets inside of steps."""
    if not engine.grid.layout.lockstep:
        return planned
    flag = np.array([planned], np.int32)
    return bool(collectives.Allreduce(engine.grid.dp, flag, purpose="lockstep")[0])


def _launch(engine, batch, work):
    """Compute a round as far as this rank's part goes; the last stage finds its results."""
    here.step += 1
    if engine.grid.role == "attention":
        _announce_round(engine, len(batch))
    hidden = engine.model.forward([micro.step for micro in batch])
    pipeline = engine.model.pipeline
    for micro, of_micro in zip(batch, hidden, strict=True):
        if pipeline.is_last:
            with blame(engine.path, engine.model):
                micro.result = work.find(micro.job, of_micro)
            if not pipeline.is_first:
                pipeline.broadcast_result(np.frombuffer(pickle.dumps(micro.result), np.uint8))


def _land(engine, micro, work, deliver):
    """Use what was found in a micro-batch."""
    if not engine.model.pipeline.is_last:
        micro.result = pickle.loads(engine.model.pipeline.receive_result().tobytes())
    engine.scheduler.complete(micro.plan)
    work.use(micro.job, micro.result, deliver)


def _announce_round(engine, n):
    """Tell all ranks of both sides how many micro-batches the next round has; 0 ends the run."""
    header = np.array([n], np.int64)
    return int(collectives.Bcast(engine.grid.comm, header, purpose="round")[0])


def _serve(engine, stop):
    """The loop of the FFN side: as many micro-batches as the attention side says."""
    while n := _announce_round(engine, 0):
        here.step += 1
        engine.model.serve(n)
        if stop is not None:
            stop.tell(engine.grid)


def _refusal(engine, request, tokens_of):
    """A bad request itself, a refusal of one that the cache can never hold, else None."""
    if isinstance(request, BadRequest):
        return request
    needed = pages_for(min(tokens_of(request), engine.context))
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
