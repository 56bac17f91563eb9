"""Logits that try the choice of tokens."""

import numpy as np

from hpcinfer.ops.sampling_batch import History, SamplingBatch


def mixture(R, V, seed=0):
    """Rows of every kind, with every filter, penalty and report in many combinations."""
    rng = np.random.default_rng(seed)
    some = rng.choice
    history = [
        History(rng.integers(V, size=8), rng.integers(V, size=8)) if some(2) else None
        for _ in range(R)
    ]
    return SamplingBatch.make(
        R,
        temperature=some([0, 0.3, 1, 1, 5], R),
        top_k=some([0, 0, 1, 40, 70, 3000], R),
        top_p=some([1, 1, 0, 0.5, 0.9, 0.999], R),
        min_p=some([0, 0, 0.02, 0.3, 1], R),
        repetition=some([1, 1.3], R),
        presence=some([0, 0.5], R),
        frequency=some([0, -0.2], R),
        seed=some(np.array([0, 2**64 - 1], np.uint64), R),
        key=rng.integers(2**64, size=R, dtype=np.uint64),
        sample=some(3, R),
        position=rng.integers(2**32, size=R),
        logprobs=some([-1, -1, 0, 4], R),
        history=history,
        banned=[tuple(rng.integers(V, size=V // 5)) for _ in range(R)],
    )
