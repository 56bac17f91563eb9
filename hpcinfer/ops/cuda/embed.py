"""Look-up of tokens in one pass."""

from __future__ import annotations

import numpy as np

from hpcinfer import array
from hpcinfer.array import Array
from hpcinfer.ops.cuda.runtime.launch import NAMES, aligned, launch, on_device

OPTIONS = tuple((f"-DHELD={held}",) for held in NAMES.values())
KERNELS = ("embed_1", "embed_8")

_THREADS = 256


def embed(weight: Array, token_ids: Array, start: int) -> Array:
    """As `ops.embed.embed`."""
    if weight.dtype.name not in NAMES or not (weight.size and token_ids.size):
        return NotImplemented
    if not weight.flags.c_contiguous or len(weight) >= 2**31:
        return NotImplemented

    # Find the rows on the host: -1 for tokens of other ranks.
    xp, (V_own, D), n = array.namespace(weight), weight.shape, token_ids.size

    def build():
        row = token_ids.astype(np.int64) - start
        return np.where((row >= 0) & (row < V_own), row, -1).astype(np.int32)

    # Copy them, eight numbers at a time where they are aligned.
    rows = on_device(weight, (token_ids,), build, late=True)
    x = xp.empty((n, D), np.float32)
    width = 8 if D % 8 == 0 and aligned(weight, x) else 1
    launch(
        "embed", f"embed_{width}", (-(-n * D // (width * _THREADS)),), _THREADS,
        weight, rows, x, np.int64(n * D), D, options=(f"-DHELD={NAMES[weight.dtype.name]}",),
    )  # fmt: skip
    return x
