"""Log-probabilities of given texts, in bounded memory.

The vocabulary is cut over the ranks and the tokens of a step are taken in blocks, so that neither
the length of a text nor V times T decides the memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hpcinfer.engine.sequence import Sequence
from hpcinfer.engine.task import Deliver, Plan
from hpcinfer.parallel import vocabulary
from hpcinfer.requests.request import Request, Score

if TYPE_CHECKING:
    from hpcinfer.engine.api import Engine
    from hpcinfer.model.forward import Model

# For each sequence of a step the tokens to score, and whether its text is then complete.
Targets = list[tuple[Sequence, list[int], bool]]


@dataclass(frozen=True)
class ScoreTask:
    """The `Task` of scoring texts."""

    engine: Engine

    def tokens_of(self, request: Request) -> int:
        """Tokens of a text that are computed; its last predicts nothing."""
        return len(request.token_ids) - 1

    def sequences_of(self, request: Request, deliver: Deliver) -> list[Sequence]:
        """The text as one sequence; a text of one token has its result at once."""
        if len(request.token_ids) == 1:
            deliver(_score(request, []))
            return []
        tokens = list(request.token_ids)
        sequence = Sequence(request, 0, tokens, len(tokens), wants_all_hidden=True)
        for _, logprobs, _ in request.progress:
            sequence.logprobs, sequence.n_known = list(logprobs), len(logprobs)
        return [sequence]

    def expect(self, plan: Plan) -> Targets:
        """The step's sequences with the tokens that follow those computed, and whether they end.

        Without tokens whose log-probabilities are known already.
        """
        return [
            (
                s,
                s.tokens[max(s.computed - n, s.n_known) + 1 : s.computed + 1],
                s.computed == s.target,
            )
            for s, n in plan
        ]

    def find(self, expected: Targets, hidden: np.ndarray) -> np.ndarray | None:
        """Log-probabilities of the tokens that follow: (T, D) -> (T,), None without tokens."""
        targets = [target for _, targets, _ in expected for target in targets]
        if not targets:
            return None
        return _log_probabilities(self.engine.model, hidden, np.array(targets))

    def use(self, expected: Targets, logprobs: np.ndarray | None, deliver: Deliver) -> None:
        """Add the log-probabilities, and end the texts that are complete."""
        start = 0
        for sequence, targets, complete in expected:
            if targets:
                sequence.logprobs += logprobs[start : start + len(targets)].tolist()
            start += len(targets)
            if complete:
                self.engine.scheduler.finish(sequence)
                deliver(_score(sequence.request, sequence.logprobs))


def _log_probabilities(model: Model, hidden: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """log p(target) of every row: (T, D), (T,) -> (T,) float32, host."""
    block = vocabulary.rows_at_a_time(model.arch.V, model.grid.tp_cp.size)
    parts = [
        vocabulary.log_softmax_of(
            model.grid.tp_cp,
            model.logits(hidden[start : start + block]),
            model.head_range[0],
            targets[start : start + block],
        )
        for start in range(0, len(targets), block)
    ]
    return np.concatenate(parts)


def _score(request: Request, logprobs: list[float]) -> Score:
    """Score of a text from the log-probabilities of all its tokens but the first."""
    total = math.fsum(logprobs)
    return Score(
        request,
        np.array([math.nan, *logprobs], np.float32),
        total,
        _perplexity(-total / len(logprobs)) if logprobs else math.nan,
    )


def _perplexity(mean: float) -> float:
    """e^mean, infinite where it is beyond all numbers."""
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf
