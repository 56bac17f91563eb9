"""Answers to prompts: the next token of every sequence chosen, step after step, until it ends."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import is_
from typing import TYPE_CHECKING

import numpy as np

from hpcinfer.engine.sequence import Sequence
from hpcinfer.engine.task import Deliver, Plan
from hpcinfer.ops.sample import Chosen
from hpcinfer.ops.sampling_batch import History, SamplingBatch
from hpcinfer.parallel import vocabulary
from hpcinfer.requests.request import Choice, Request, Result
from hpcinfer.requests.sampling import Sampling
from hpcinfer.text.stream import TextStream

if TYPE_CHECKING:
    from hpcinfer.engine.api import Engine


@dataclass
class GenerateTask:
    """The `Task` of answering requests."""

    engine: Engine
    _settings: Settings = field(default_factory=lambda: Settings((), None))

    def tokens_of(self, request: Request) -> int:
        """Tokens of a request's longest sequence."""
        return len(request.token_ids) + request.sampling.max_tokens

    def sequences_of(self, request: Request, deliver: Deliver) -> list[Sequence]:
        """One sequence per sample; the last of them to finish delivers the request."""
        # Begin every sample with the prompt.
        sampling, samples = request.sampling, []
        stops = self.engine.stops(sampling)
        for sample in range(sampling.n):
            sequence = Sequence(request, sample, list(request.token_ids), len(request.token_ids))
            sequence.stream = TextStream(
                self.engine.text, sampling.stop, after_text=request.kind != "chat"
            )
            sequence.siblings, sequence.stops = samples, stops
            if _has_penalties(sampling):
                sequence.history = History(request.token_ids)
            samples.append(sequence)

        # Go on from the tokens that a stopped run had, with all that follows from them.
        for sequence, before in zip(samples, request.progress, strict=False):
            for token_id, *report in _tokens(*before):
                _append(self.engine, sequence, token_id, *report)
        if all(s.finish_reason is not None for s in samples):
            deliver(_result(samples))
        return [s for s in samples if s.finish_reason is None]

    def expect(self, plan: Plan) -> list[Sequence]:
        """Sequences whose next token the step decides."""
        return [s for s, _ in plan if s.computed == s.target]

    def find(self, ready: list[Sequence], hidden: np.ndarray) -> Chosen | None:
        """Choose the next token of every ready sequence: (R, D) -> Chosen or None."""
        if not ready:
            return None
        model = self.engine.model
        logits = model.logits(hidden)

        # Keep how to choose, as long as the sequences are the same.
        if not self._settings.serves(ready):
            self._settings = Settings(tuple(ready), _rows(self.engine, ready))
        rows = self._settings.at_hand()

        # Choose over the cut vocabulary, and prepare the next step meanwhile.
        start, V = model.head_range[0], model.arch.V
        ahead = self.engine.ahead
        between = ahead.prepare if ahead.serves else None
        return vocabulary.choose(model.grid.tp_cp, logits, start, V, rows, between)

    def use(self, ready: list[Sequence], chosen: Chosen | None, deliver: Deliver) -> None:
        """Add the chosen tokens, and end the sequences that are done."""
        token_ids = chosen.token_ids.tolist() if ready else []
        for i, sequence in enumerate(ready):
            report = ()
            if sequence.request.sampling.logprobs is not None:
                report = float(chosen.logprobs[i]), chosen.top[i]
            _append(self.engine, sequence, token_ids[i], *report)

            # Deliver the request with the last of its samples.
            if sequence.finish_reason is not None:
                self.engine.scheduler.finish(sequence)
                if all(s.finish_reason is not None for s in sequence.siblings):
                    deliver(_result(sequence.siblings))


@dataclass(frozen=True)
class Settings:
    """How to choose the next tokens of some sequences, which as a rule are those of the next step.

    Attributes
    ----------
    sequences : tuple of Sequence
    rows : sample.SamplingBatch, for some position and without banned tokens
    """

    sequences: tuple[Sequence, ...]
    rows: SamplingBatch | None

    def serves(self, ready: list[Sequence]) -> bool:
        """True if these are the very sequences."""
        return len(ready) == len(self.sequences) and all(map(is_, ready, self.sequences))

    def at_hand(self) -> SamplingBatch:
        """The rows for the tokens that the sequences have now."""
        banned = [
            tuple(s.stops) if s.n_new < s.request.sampling.min_tokens else ()
            for s in self.sequences
        ]
        return self.rows.at([len(s.tokens) for s in self.sequences], banned)


def _has_penalties(sampling: Sampling) -> bool:
    neutral = (1.0, 0.0, 0.0)
    return neutral != (
        sampling.repetition_penalty,
        sampling.presence_penalty,
        sampling.frequency_penalty,
    )


def _rows(engine: Engine, ready: list[Sequence]) -> SamplingBatch:
    """What stays the same of how to choose the tokens of each sequence."""
    # Write down the settings of every sequence, and turn them into one column for each.
    columns = [
        (
            s.request.sampling.temperature,
            s.request.sampling.top_k,
            s.request.sampling.top_p,
            s.request.sampling.min_p,
            s.request.sampling.repetition_penalty,
            s.request.sampling.presence_penalty,
            s.request.sampling.frequency_penalty,
            *_seed_and_key(engine, s.request),
            s.sample,
            -1 if s.request.sampling.logprobs is None else s.request.sampling.logprobs,
        )
        for s in ready
    ]

    # Name the columns, and make arrays of them.
    names = (
        "temperature top_k top_p min_p repetition presence frequency seed key sample logprobs"
    ).split()
    return SamplingBatch.make(
        len(ready),
        history=[s.history for s in ready],
        **dict(zip(names, map(list, zip(*columns, strict=True)), strict=True)),
    )


def _seed_and_key(engine: Engine, request: Request) -> tuple[int, int]:
    """What the random numbers of a request follow from.

    A request's own seed means the same numbers whatever its name is, as in OpenAI's interface. The
    engine's seed is spread by request, since all would draw alike.
    """
    own = request.sampling.seed
    return (engine.seed, request.key) if own is None else (own, 0)


def _tokens(token_ids: list[int], logprobs: list[float], top_logprobs: list) -> Iterable[tuple]:
    """Tokens of a stopped run's sample, each with its report if one was asked for."""
    if not logprobs:
        return zip(token_ids, strict=True)
    tops = ([tuple(pair) for pair in top] for top in top_logprobs)
    return zip(token_ids, logprobs, tops, strict=False)


def _append(
    engine: Engine,
    sequence: Sequence,
    token_id: int,
    logprob: float | None = None,
    top: list[tuple[int, float]] | None = None,
) -> None:
    """Add a chosen token to its sequence and decide whether the sequence ends with it.

    A log-probability, and the likeliest tokens at the place, come with it if they were asked for.
    """
    sampling = sequence.request.sampling
    sequence.tokens.append(token_id)
    if sequence.history is not None:
        sequence.history.add(token_id)
    if logprob is not None:
        sequence.logprobs.append(logprob)
        sequence.top_logprobs.append(top)

    # End the sequence at a stop or its length; a token that ends it is no part of its text.
    may_stop = sequence.n_new >= sampling.min_tokens
    if may_stop and token_id in sequence.stops:
        sequence.finish_reason = "stop"
    elif sequence.stream.push(token_id, may_stop):
        sequence.finish_reason = "stop"
    elif sequence.n_new >= sampling.max_tokens or len(sequence.tokens) >= engine.context:
        sequence.finish_reason = "length"


def _result(samples: list[Sequence]) -> Result:
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
