"""Attention of many queries of other types: products by oneDNN, a running softmax between them."""

import numpy as np

from hpcinfer import node
from hpcinfer.ops.cpu.attention_decode import LOWEST
from hpcinfer.ops.cpu.products import onednn
from hpcinfer.ops.cpu.runtime import launch
from hpcinfer.ops.cpu.runtime.compile import compiled
from hpcinfer.ops.cpu.simd.rounding import narrowed
from hpcinfer.ops.cpu.simd.softmax import largest_of, weights_of
from hpcinfer.ops.cpu.simd.vectors import exp

# Rows and keys of a block of many queries, most keys of a smaller one.
BLOCK = 1024, 512, 1024


def cached_rows(q, dtype):
    """Queries of a group as rows of a matrix: (S, n, K) -> (S n, K) of 16 bits."""
    S, n, K = q.shape
    return narrowed(np.ascontiguousarray(q).reshape(S * n, K), dtype)


class Space:
    """Memory of the blocks' scores, weights and sums, used again by every block."""

    def __init__(self):
        self._held = {}

    def get(self, name, rows, columns, dtype):
        size = rows * columns
        held = self._held.get(name)
        if held is None or held.size < size:
            held = self._held[name] = node.large_empty(size, dtype)
        return held[:size].reshape(rows, columns)


class RunningSoftmax:
    """As `ops.attention.RunningSoftmax`, one row a query and head."""

    def __init__(self, S, n, width):
        self._n = n
        self._m = np.full(S * n, LOWEST, np.float32)
        self._total = np.zeros(S * n, np.float32)
        self._o = np.zeros((S * n, width), np.float32)

    def add(self, rows, queries, k, v, hidden, scale, softcap, space):
        """Add a block of keys for the queries `rows`."""
        n = self._n
        of_block = slice(rows.start * n, min(rows.stop * n, len(queries)))
        q, L = queries[of_block], len(k)
        o, m, total = self._o[of_block], self._m[of_block], self._total[of_block]
        scores = space.get("scores", len(q), L, np.float32)
        weights = space.get("weights", len(q), L, k.dtype)
        found = space.get("found", *o.shape, np.float32)
        corrections = np.empty(len(q), np.float32)

        # Scores, weights relative to the largest score so far, and the weighted values.
        onednn.multiply(q, k.T, scores)
        launch.over_rows(
            _soften, len(q), scores, _NOTHING if hidden is None else hidden, n, np.float32(scale),
            np.float32(softcap or 0), m, total, corrections, weights.view(np.uint16),
            work_bytes=scores.nbytes,
        )  # fmt: skip
        onednn.multiply(weights, v, found)
        launch.over_rows(_correct, len(q), o, corrections, found, work_bytes=found.nbytes)

    def result(self):
        """(o, lse) over all keys added: (S, n, K), (S, n)."""
        empty = self._total == 0
        divisor = np.where(empty, np.float32(1), self._total)
        self._o /= divisor[:, None]
        lse = np.where(empty, np.float32(-np.inf), self._m + np.log(divisor))
        return self._o.reshape(-1, self._n, self._o.shape[1]), lse.reshape(-1, self._n)


_NOTHING = np.zeros((0, 0), bool)


@compiled
def _soften(start, stop, scores, hidden, n, scale, softcap, m, total, corrections, weights):
    L, factor = scores.shape[1], scale
    if softcap > 0:
        factor = np.float32(1)
        for row in range(start, stop):
            for j in range(L):
                scores[row, j] = softcap * np.tanh(scores[row, j] * scale / softcap)
    for row in range(start, stop):
        if hidden.size:
            for j in range(L):
                scores[row, j] = -np.inf if hidden[row // n, j] else scores[row, j]
        score, weight = scores[row].ctypes.data, weights[row].ctypes.data
        largest = max(m[row], largest_of(score, L) * factor)
        corrections[row] = exp(m[row] - largest)
        found = weights_of(score, L, factor, largest, weight)
        total[row], m[row] = total[row] * corrections[row] + found, largest


@compiled
def _correct(start, stop, o, corrections, found):
    """Rows of o · correction + found, in o."""
    for row in range(start, stop):
        for d in range(o.shape[1]):
            o[row, d] = o[row, d] * corrections[row] + found[row, d]
