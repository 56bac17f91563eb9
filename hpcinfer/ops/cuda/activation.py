"""The gate of an FFN in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from hpcinfer import array
from hpcinfer.array import Array
from hpcinfer.ops.cuda.runtime.launch import NAMES, aligned, launch

FUNCTIONS = ("silu", "gelu_tanh")

OPTIONS = tuple((f"-DTO={to}",) for to in NAMES.values())
KERNELS = tuple(f"gated_{function}_{width}" for function in FUNCTIONS for width in (1, 4))

_THREADS = 256


def gated(
    gate_up: Array,
    function: Callable[[Array], Array],
    widths: Sequence[int],
    dtype: np.dtype = np.float32,
) -> Array:
    """As `ops.activation.gated`, for silu and gelu_tanh."""
    if function.__name__ not in FUNCTIONS or gate_up.dtype != np.float32:
        return NotImplemented
    if not (gate_up.size and gate_up.flags.c_contiguous):
        return NotImplemented

    # Take four columns at a time where all blocks allow it.
    T, n_columns = gate_up.shape
    y = array.namespace(gate_up).empty((T, sum(widths)), dtype)
    fours = n_columns % 8 == 0 and all(n % 4 == 0 for n in widths) and aligned(gate_up)
    width, start = 4 if fours else 1, 0
    for n in widths:
        gate, up = gate_up[:, 2 * start :], gate_up[:, 2 * start + n :]
        if n:
            launch(
                "activation", f"gated_{function.__name__}_{width}",
                (-(-T * n // (width * _THREADS)),), _THREADS,
                gate, up, y[:, start:], T, n, np.int64(n_columns), y.shape[1],
                options=(f"-DTO={NAMES[y.dtype.name]}",),
            )  # fmt: skip
        start += n
    return y
