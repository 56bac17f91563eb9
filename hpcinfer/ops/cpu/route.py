"""The choice of experts, one token after the other."""

from __future__ import annotations

import numpy as np

from hpcinfer.array import Array
from hpcinfer.ops.cpu.runtime import launch
from hpcinfer.ops.cpu.runtime.compile import compiled, inlined
from hpcinfer.ops.cpu.simd.vectors import exp
from hpcinfer.ops.route import Router


def route(logits: Array, router: Router, bias: Array | None = None) -> tuple[Array, Array]:
    """As `ops.route.route`, for routers without groups."""
    E = logits.shape[1]
    if router.groups > 1 or logits.dtype != np.float32 or not 0 < router.k <= E:
        return NotImplemented
    if bias is not None and bias.shape != (E,):
        return NotImplemented
    T = len(logits)
    ids = launch.empty((T, router.k), np.int32)
    weights = launch.empty((T, router.k), np.float32)
    launch.over_rows(
        _route, T, logits, router.score == "softmax", _NONE if bias is None else bias,
        router.normalise, np.float32(router.scale), ids, weights, work_bytes=logits.nbytes,
    )  # fmt: skip
    return ids, weights


def count_into(counts: Array, ids: Array) -> Array:
    """As `ops.route.count_into`."""
    if counts.dtype != np.int64 or not counts.flags.c_contiguous or ids.ndim != 2:
        return NotImplemented
    launch.call(_count, counts, ids)
    return counts


_NONE = np.empty(0, np.float32)


@compiled
def _count(counts, ids):
    for t in range(ids.shape[0]):
        for j in range(ids.shape[1]):
            if 0 <= ids[t, j] < len(counts):
                counts[ids[t, j]] += 1


@inlined
def _better(a, b):
    """True if a is larger than b, or is a number where b is none."""
    return a > b or (b != b and a == a)


@compiled
def _route(start, stop, logits, softmax, bias, normalise, scale, ids, weights):
    E, k = logits.shape[1], ids.shape[1]
    scores, choice = np.empty(E, np.float32), np.empty(E, np.float32)
    free = np.empty(E, np.bool_)
    for t in range(start, stop):
        largest, total = logits[t, 0], np.float32(0)
        for e in range(E):
            largest = max(largest, logits[t, e])
        for e in range(E):
            if softmax:
                scores[e] = exp(logits[t, e] - largest)
                total += scores[e]
            else:
                scores[e] = np.float32(1) / (np.float32(1) + exp(-logits[t, e]))
        for e in range(E):
            if softmax:
                scores[e] /= total
            choice[e] = scores[e] + bias[e] if bias.size else scores[e]
            free[e] = True

        # The largest first, of equal ones the lowest number; what is no number comes last.
        taken = np.float32(0)
        for j in range(k):
            best = -1
            for e in range(E):
                if free[e] and (best < 0 or _better(choice[e], choice[best])):
                    best = e
            ids[t, j], weights[t, j] = best, scores[best]
            taken += scores[best]
            free[best] = False
        for j in range(k):
            if normalise:
                weights[t, j] /= taken + np.float32(1e-20)
            weights[t, j] *= scale
