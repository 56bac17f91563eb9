"""The token loop: requests in, a step at a time through the model, results out as they finish."""

import time
from functools import partial

from hpcinfer.engine.pages import pages_for
from hpcinfer.engine.request import BadRequest, Choice, Result
from hpcinfer.engine.scheduler import Sequence
from hpcinfer.model.cache import PAGE
from hpcinfer.ops.sample import History, Rows
from hpcinfer.parallel import vocabulary


def generate(engine, feed, deliver):
    """Run every request of a stream.

    Parameters
    ----------
    engine : Engine
    feed : Feed of Request and BadRequest
    deliver : function of a Result or BadRequest, called on every rank as each one finishes
    """
    loop(engine, feed, deliver, _tokens, partial(_sequences, engine), partial(_choose, engine))


def loop(engine, feed, deliver, tokens_of, sequences_of, after_step):
    """Step until the stream is empty and every sequence has finished.

    Parameters
    ----------
    tokens_of : function of a Request, the tokens that the cache must be able to hold for it
    sequences_of : function of a Request, its sequences
    after_step : function (plan, step, hidden, deliver), which uses the hidden states of a step's
    rows
    """
    scheduler = engine.scheduler
    while True:
        # Keep enough sequences waiting to fill a step, and no more in memory.
        while not feed.done and len(scheduler.waiting) < engine.limits.sequences:
            for request in feed.take():
                refusal = _refusal(engine, request, tokens_of)
                if refusal is not None:
                    deliver(refusal)
                    continue
                for sequence in sequences_of(request):
                    scheduler.add(sequence)

        # Compute one step and use what it gives.
        start_s = time.perf_counter()
        plan = scheduler.next_step()
        if not plan:
            return
        held = scheduler.pages.held
        n_prompt = sum(min(n, max(0, s.n_prompt - s.computed)) for s, n in plan)
        step = engine.build_step(plan)
        hidden = engine.model.forward(step)
        after_step(plan, step, hidden, deliver)
        engine.record.step(step, n_prompt, time.perf_counter() - start_s, held)


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


def _tokens(request):
    """Tokens of a request's longest sequence."""
    return len(request.token_ids) + request.sampling.max_tokens


def _sequences(engine, request):
    """One sequence per sample; the last of them to finish delivers the request."""
    sampling, samples = request.sampling, []
    for sample in range(sampling.n):
        sequence = Sequence(request, sample, list(request.token_ids), len(request.token_ids))
        sequence.stream = engine.text.stream(sampling.stop, after_text=request.kind != "chat")
        sequence.siblings = samples
        if _has_penalties(sampling):
            sequence.history = History(request.token_ids)
        samples.append(sequence)
    return samples


def _has_penalties(sampling):
    neutral = (1.0, 0.0, 0.0)
    return neutral != (
        sampling.repetition_penalty,
        sampling.presence_penalty,
        sampling.frequency_penalty,
    )


def _choose(engine, plan, step, hidden, deliver):
    """Choose the next token of every sequence that is complete, and end those that are done."""
    ready = [s for s, _ in plan if s.computed == s.target]
    if not ready:
        return
    model = engine.model
    chosen = vocabulary.choose(
        model.grid.tp_cp,
        model.logits(hidden),
        model.head_range[0],
        model.arch.V,
        _rows(engine, ready),
    )
    token_ids = chosen.token_ids.tolist()
    for i, sequence in enumerate(ready):
        _append(engine, sequence, token_ids[i], chosen, i)
        if sequence.finish_reason is not None:
            engine.scheduler.finish(sequence)
            if all(s.finish_reason is not None for s in sequence.siblings):
                deliver(_result(sequence.siblings))


def _rows(engine, ready):
    """How to choose the next token of each sequence."""
    columns = [
        (
            s.request.sampling.temperature,
            s.request.sampling.top_k,
            s.request.sampling.top_p,
            s.request.sampling.min_p,
            s.request.sampling.repetition_penalty,
            s.request.sampling.presence_penalty,
            s.request.sampling.frequency_penalty,
            engine.seed if s.request.sampling.seed is None else s.request.sampling.seed,
            s.request.key,
            s.sample,
            len(s.tokens),
            -1 if s.request.sampling.logprobs is None else s.request.sampling.logprobs,
        )
        for s in ready
    ]
    names = (
        "temperature top_k top_p min_p repetition presence frequency "
        "seed key sample position logprobs"
    ).split()
    return Rows.make(
        len(ready),
        history=[s.history for s in ready],
        banned=[
            tuple(engine.stops(s.request.sampling))
            if s.n_new < s.request.sampling.min_tokens
            else ()
            for s in ready
        ],
        **dict(zip(names, map(list, zip(*columns, strict=True)), strict=True)),
    )


def _append(engine, sequence, token_id, chosen, i):
    """Add a chosen token to its sequence and decide whether the sequence ends with it."""
    sampling = sequence.request.sampling
    sequence.tokens.append(token_id)
    if sequence.history is not None:
        sequence.history.add(token_id)
    if sampling.logprobs is not None:
        sequence.logprobs.append(float(chosen.logprobs[i]))
        sequence.top_logprobs.append(chosen.top[i])

    # A token that ends the sequence is no part of its text.
    may_stop = sequence.n_new >= sampling.min_tokens
    if may_stop and token_id in engine.stops(sampling):
        sequence.finish_reason = "stop"
    elif sequence.stream.push(token_id, may_stop):
        sequence.finish_reason = "stop"
    elif sequence.n_new >= sampling.max_tokens or len(sequence.tokens) >= engine.context:
        sequence.finish_reason = "length"


def _result(samples):
    """The request's result from its finished samples."""
    request = samples[0].request
    asked = request.sampling.logprobs is not None
    choices = [
        Choice(
            index=s.sample,
            token_ids=s.tokens[s.n_prompt :],
            text=s.stream.text(),
            finish_reason=s.finish_reason,
            logprobs=s.logprobs if asked else None,
            top_logprobs=s.top_logprobs if asked else None,
        )
        for s in samples
    ]
    return Result(request, choices, len(request.token_ids))
