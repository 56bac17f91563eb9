"""Attention of many queries by oneDNN's products, with a running softmax between them.

A block of queries meets a block of keys: their scores, the weights that these become, and the
weighted values are matrices of their own, which the next block uses again (`Space`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from hpcinfer import node
from hpcinfer.array import Array
from hpcinfer.ops import attention as plain
from hpcinfer.ops.cpu.attention_decode import LOWEST
from hpcinfer.ops.cpu.products import onednn
from hpcinfer.ops.cpu.runtime import launch
from hpcinfer.ops.cpu.runtime.compile import compiled
from hpcinfer.ops.cpu.simd.rounding import narrowed
from hpcinfer.ops.cpu.simd.softmax import largest_of, weights_of
from hpcinfer.ops.cpu.simd.vectors import exp

# Rows and keys of a block of many queries, most keys of a smaller one.
_BLOCK = 1024, 512, 1024

_NOTHING = np.zeros((0, 0), bool)


def attention(
    q: Array,
    k: Array,
    v: Array,
    q_pos: Array,
    k_pos: Array,
    *,
    groups: Sequence[tuple[int, int]],
    scale: float,
    window: int | None,
    softcap: float | None,
    between: Callable[[], None] | None,
) -> tuple[Array, Array]:
    """As `ops.attention.attention`, for keys of a type that the library serves."""
    (S, H, _), width = q.shape, v.shape[-1]
    o, lse = np.zeros((S, H, width), np.float32), np.full((S, H), -np.inf, np.float32)
    running = [RunningSoftmax(S, stop - start, width) for start, stop in groups]
    queries = [_rows(q[:, start:stop], k.dtype) for start, stop in groups]

    # Add a block of keys to the sums of all queries that see any of it.
    space = Space()
    for columns, visible in plain.blocks(q_pos, k_pos, window, H / len(groups), _BLOCK):
        for g, state in enumerate(running):
            block = k[columns, g], v[columns, g]
            for rows, hidden in visible:
                state.add(rows, queries[g], *block, hidden, scale, softcap, space)
                if between is not None:
                    between()
    for (start, stop), state in zip(groups, running, strict=True):
        o[:, start:stop], lse[:, start:stop] = state.result()
    return o, lse


def _rows(q, dtype):
    """Queries of a group as rows of a matrix: (S, n, K) -> (S n, K) of 16 bits."""
    S, n, K = q.shape
    return narrowed(np.ascontiguousarray(q).reshape(S * n, K), dtype)


class Space:
    """Memory of the blocks' scores, weights and sums, used again by every block."""

    def __init__(self):
        self._held = {}

    def get(self, name: str, rows: int, columns: int, dtype: np.dtype) -> Array:
        """Memory (rows, columns) under a name, contents undefined."""
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

    def add(
        self,
        rows: slice,
        queries: Array,
        k: Array,
        v: Array,
        hidden: Array | None,
        scale: float,
        softcap: float | None,
        space: Space,
    ) -> None:
        """Add a block of keys for the queries `rows`.

        Parameters
        ----------
        rows : slice of the queries
        queries : (S n, K), all of them as `_rows` makes them
        k, v : (L, K), (L, width)
        hidden : as for `_soften`, or None
        """
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

    def result(self) -> tuple[Array, Array]:
        """(o, lse) over all keys added: (S, n, K), (S, n)."""
        empty = self._total == 0
        divisor = np.where(empty, np.float32(1), self._total)
        self._o /= divisor[:, None]
        lse = np.where(empty, np.float32(-np.inf), self._m + np.log(divisor))
        return self._o.reshape(-1, self._n, self._o.shape[1]), lse.reshape(-1, self._n)


@compiled
def _soften(start, stop, scores, hidden, n, scale, softcap, m, total, corrections, weights):
    """Rows of scores become weights, relative to the largest of each row so far.

    Parameters
    ----------
    scores : (S n, L) float32
    hidden : (S, L) truth of "this query does not see this key", (0, 0) if each sees all
    n : query heads of the group
    m, total : (S n,) float32, largest score and sum of weights so far; brought up to date
    corrections : (S n,) float32, what sums of before are to be multiplied by; written
    weights : (S n, L) bfloat16's bits; written
    """
    L, factor = scores.shape[1], scale
    if softcap > 0:
        factor = np.float32(1)
        for row in range(start, stop):
            for j in range(L):
                scores[row, j] = softcap * np.tanh(scores[row, j] * scale / softcap)

    # Hide, find the largest, and weigh, while a row is in the cache.
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
