"""The numbers that quantised weights stand for; products with these are those of `linear`."""

from __future__ import annotations

from itertools import product

import numpy as np

from hpcinfer import array
from hpcinfer.array import Array
from hpcinfer.ops.cuda import activation, quantized
from hpcinfer.ops.cuda.runtime.launch import launch
from hpcinfer.ops.quantize import BITS, GROUPS, Quantized

OPTIONS = tuple(
    (f"-DWEIGHT={held}", f"-DBITS={bits}", f"-DGROUP={group}")
    for group, bits, held in product(GROUPS, BITS, ("f16", "bf16"))
)
KERNELS = (
    *(f"product_{of}_{tiles}" for of in ("float", "held") for tiles in (1, 2)),
    *(f"{function}_product_{tiles}" for function in activation.FUNCTIONS for tiles in (1, 2)),
    *(f"dequantize_{to}" for to in ("float", "held")),
)

_THREADS = 256


def dequantize(weight: Quantized, dtype: np.dtype = np.float32) -> Array:
    """As `ops.quantize.dequantize`, of a matrix, rounded to a type; rows may lie apart."""
    if weight.ndim != 2 or not quantized.are_served(weight):
        return NotImplemented
    form, n_out = weight.form, len(weight)
    y = array.namespace(weight.words).empty((n_out, form.width), dtype)
    n_loads = n_out * form.blocks * quantized.LOADS
    launch(
        "quantize", f"dequantize_{'held' if array.is_half(dtype) else 'float'}",
        (-(-n_loads // _THREADS),), _THREADS,
        *quantized.operands(weight)[:-1], y, n_out,
        options=quantized.options(form, y.dtype),
    )  # fmt: skip
    return y[:, form.offset : form.offset + form.inputs]
