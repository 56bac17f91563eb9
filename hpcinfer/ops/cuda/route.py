"""The choice of experts in one launch, and counts of them on the device."""

from __future__ import annotations

import numpy as np

from hpcinfer import array
from hpcinfer.array import Array
from hpcinfer.ops.cuda.runtime.launch import launch
from hpcinfer.ops.route import Router

OPTIONS = ((),)
KERNELS = ("route", "count_into")

_SCORES, _GROUP_SCORES = ("sigmoid", "softmax"), ("max", "top2")
_MOST_EXPERTS, _MOST_GROUPS, _WARP, _THREADS = 1024, 32, 32, 256


def route(logits: Array, router: Router, bias: Array | None = None) -> tuple[Array, Array]:
    """As `ops.route.route`."""
    if logits.dtype != np.float32 or not (logits.size and logits.flags.c_contiguous):
        return NotImplemented
    (T, E), k, xp = logits.shape, router.k, array.namespace(logits)
    if not 0 < k <= E <= _MOST_EXPERTS or E % router.groups or router.groups > _MOST_GROUPS:
        return NotImplemented
    if bias is not None and not (
        bias.shape == (E,) and bias.dtype == np.float32 and bias.flags.c_contiguous
    ):
        return NotImplemented

    # Choose by a warp for each token.
    ids, weights = xp.empty((T, k), np.int32), xp.empty((T, k), np.float32)
    launch(
        "route", "route", (T,), _WARP,
        logits, bias, ids, weights, E, k, _SCORES.index(router.score), int(router.normalise),
        float(router.scale), router.groups, router.top_groups,
        _GROUP_SCORES.index(router.group_score),
    )  # fmt: skip
    return ids, weights


def count_into(counts: Array, ids: Array) -> Array:
    """As `ops.route.count_into`; nobody waits."""
    if counts.dtype != np.int64 or not (counts.flags.c_contiguous and ids.flags.c_contiguous):
        return NotImplemented
    if not ids.size:
        return counts
    if ids.dtype != np.int32 or array.namespace(ids) is not array.namespace(counts):
        return NotImplemented
    launch(
        "route", "count_into", (-(-ids.size // _THREADS),), _THREADS,
        ids, counts, ids.size, len(counts),
    )  # fmt: skip
    return counts
