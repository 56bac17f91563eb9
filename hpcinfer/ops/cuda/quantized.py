"""Quantised weights as kernels find them: operands, and options of the compiler."""

from __future__ import annotations

import numpy as np

from hpcinfer import array
from hpcinfer.array import Array
from hpcinfer.ops.cuda.runtime.launch import NAMES, address
from hpcinfer.ops.quantize import LANES, QuantFormat, Quantized

# Loads of a block, of 16 bytes.
_LOAD_BYTES = 16
LOADS = 2 * LANES // _LOAD_BYTES


def are_served(weight: Quantized) -> bool:
    """True if rows of codes and scales are unbroken, and begin where a kernel's loads can."""
    form, words, scales = weight.form, weight.words, weight.scales
    of_block = 2 * max(1, form.block // form.group)  # bytes of a block's scales
    return (
        words.size > 0
        and words.strides[-1] == scales.strides[-1] == 2
        and not any(n % _LOAD_BYTES for n in (address(words), *words.strides[:-1]))
        and not any(n % of_block for n in (address(scales), *scales.strides[:-1]))
    )


def operands(weight: Quantized) -> tuple:
    """What kernels take for quantised matrices: where they lie, where inputs begin in them."""
    form, words, scales = weight.form, weight.words, weight.scales
    return (
        words, scales, words.strides[-2] // _LOAD_BYTES, scales.strides[-2] // 2,
        form.blocks, form.offset,
    )  # fmt: skip


def options(form: QuantFormat, dtype: np.dtype) -> tuple[str, ...]:
    """Of the compiler, for weights of a format that meet tokens of a type."""
    held = NAMES[dtype.name] if array.is_half(dtype) else "f16"
    return (f"-DWEIGHT={held}", f"-DBITS={form.bits}", f"-DGROUP={form.group}")


def of_experts(weight: Array | Quantized) -> tuple[tuple, tuple[str, ...]]:
    """What kernels take for experts' matrices (E, O, I), quantised or not; compiler's options."""
    if not isinstance(weight, Quantized):
        return (weight, np.int64(weight[0].size)), (f"-DWEIGHT={NAMES[weight.dtype.name]}",)
    words, scales = weight.words.strides[0] // _LOAD_BYTES, weight.scales.strides[0] // 2
    args = *operands(weight), np.int64(words), np.int64(scales)
    return args, options(weight.form, weight.form.dtype)
