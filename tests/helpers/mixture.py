"""A mixture of experts by its definition, for the tests of the rooms that cut one."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Mixture:
    """Tokens, their choices, and experts down · relu(up · x).

    Attributes
    ----------
    x : (T, D) float32
    ids, weights : (T, k) int64, float32
    up, down : (E, F, D), (E, D, F) float32
    """

    x: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    up: np.ndarray
    down: np.ndarray

    @property
    def sizes(self):
        """E, F"""
        return self.up.shape[:2]

    def compute(self, share):
        """Function (x, ids, weights) -> (T, D) float32: a share's experts and columns, weighted."""
        columns = slice(*share.columns)

        def experts(x, ids, weights):
            y = np.zeros(x.shape)
            for e in range(*share.experts):
                hidden = np.maximum(x.astype(float) @ self.up[e, columns].T.astype(float), 0)
                weight = (weights * (ids == e)).sum(axis=1, keepdims=True)
                y += weight * (hidden @ self.down[e, :, columns].T.astype(float))
            return y.astype(np.float32)

        return experts

    def whole(self):
        """(T, D) float64: for every token the weighted sum of the experts that it chose."""
        y = np.zeros(self.x.shape)
        for t, (ids, weights) in enumerate(zip(self.ids, self.weights, strict=True)):
            for e, weight in zip(ids, weights, strict=True):
                if e >= 0:
                    hidden = np.maximum(self.up[e].astype(float) @ self.x[t], 0)
                    y[t] += weight * (self.down[e].astype(float) @ hidden)
        return y


def mixture(T, E, k=2, F=7, D=6, seed=0, ids=None):
    """A random mixture; `ids` (T, k) are the choices, None for random ones."""
    rng = np.random.default_rng(seed)
    if ids is None:
        ids = rng.random((T, E)).argsort(axis=1)[:, :k]
    weights = rng.random(ids.shape).astype(np.float32)
    x, up, down = (
        rng.normal(size=shape).astype(np.float32) for shape in ((T, D), (E, F, D), (E, D, F))
    )
    return Mixture(x, ids, weights, up, down)
