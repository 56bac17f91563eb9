"""Log-probabilities of given texts, in bounded memory.

The vocabulary is cut over the ranks and the tokens of a step are taken in blocks, so that neither
the length of a text nor V times T decides the memory.
"""

import math
from functools import partial

import numpy as np

from hpcinfer import partition
from hpcinfer.engine.generate import loop
from hpcinfer.engine.request import Score
from hpcinfer.engine.scheduler import Sequence
from hpcinfer.parallel import vocabulary

# Logits in memory at a time, in bytes.
_LOGITS_BYTES = 64 << 20


def score(engine, feed, deliver):
    """Score every text of a stream.

    Parameters
    ----------
    engine : Engine
    feed : Feed of Request and BadRequest
    deliver : function of a Score or BadRequest, called on every rank as each one finishes
    """

    def sequences_of(request):
        if len(request.token_ids) == 1:
            deliver(_score(request, []))
            return []
        tokens = list(request.token_ids)
        return [Sequence(request, 0, tokens, len(tokens), all_rows=True)]

    def tokens_of(request):
        return len(request.token_ids) - 1

    loop(engine, feed, deliver, tokens_of, sequences_of, partial(_collect, engine))


def _collect(engine, plan, step, hidden, deliver):
    """Add the log-probabilities of this step's next tokens, and end the texts that are complete."""
    targets = np.concatenate([s.tokens[s.computed - n + 1 : s.computed + 1] for s, n in plan])
    logprobs = _log_probabilities(engine.model, hidden, targets)
    start = 0
    for sequence, n in plan:
        sequence.logprobs += logprobs[start : start + n].tolist()
        start += n
        if sequence.computed == sequence.target:
            engine.scheduler.finish(sequence)
            deliver(_score(sequence.request, sequence.logprobs))


def _log_probabilities(model, hidden, targets):
    """log p(target) of every row: (T, D), (T,) -> (T,) float32, host."""
    widest = max(partition.counts(partition.block(model.arch.V, model.grid.tp_cp.size)))
    block = max(1, _LOGITS_BYTES // (4 * widest))
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


def _score(request, logprobs):
    """Score of a text from the log-probabilities of all its tokens but the first."""
    total = math.fsum(logprobs)
    return Score(
        request,
        np.array([math.nan, *logprobs], np.float32),
        total,
        math.exp(-total / len(logprobs)) if logprobs else math.nan,
    )
