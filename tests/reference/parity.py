"""What the parity tests share: work of one rank, and an engine compared with references."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

TOLERANCE = 1e-4  # on log-probabilities in float32


def on_root(comm, work: Callable):
    """Return on every rank what `work()` gives on rank 0; its error is raised on every rank."""
    result, error = None, None
    if comm.rank == 0:
        try:
            result = work()
        except Exception as e:
            error = e
    failed = comm.bcast(repr(error) if error else None)
    if failed:
        raise RuntimeError(f"rank 0: {failed}") from error
    return comm.bcast(result)


def score_gap(engine, texts: list[list[int]], expected: list[np.ndarray]) -> float:
    """Return the largest difference of a log-probability; the first of each text must be NaN."""
    gaps = [0.0]
    for score, reference in zip(engine.score(texts), expected, strict=True):
        assert score.logprobs.shape == reference.shape
        assert np.isnan(score.logprobs[0])
        gaps.append(np.abs(score.logprobs[1:] - reference[1:]).max(initial=0))
    return float(np.max(gaps))


def greedy(engine, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Return `count` greedy tokens for each prompt, past any end-of-sequence token."""
    results = engine.generate(prompts, max_tokens=count, temperature=0, ignore_eos=True)
    return [list(result.choices[0].token_ids) for result in results]
