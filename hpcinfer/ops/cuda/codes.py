"""Weights that are kept as codes, as kernels find them."""

from hpcinfer import array
from hpcinfer.ops.cuda.launch import NAMES, address
from hpcinfer.ops.quantize import LANES

# Loads of a block, of 16 bytes.
_LOAD_BYTES = 16
LOADS = 2 * LANES // _LOAD_BYTES


def are_served(weight):
    """True if rows of codes and scales are unbroken, and begin where a kernel's loads can."""
    form, words, scales = weight.form, weight.words, weight.scales
    of_block = 2 * max(1, form.block // form.group)  # bytes of a block's scales
    return (
        words.ndim == 2
        and words.size > 0
        and words.strides[1] == scales.strides[1] == 2
        and words.strides[0] % _LOAD_BYTES == address(words) % _LOAD_BYTES == 0
        and scales.strides[0] % of_block == address(scales) % of_block == 0
    )


def operands(weight):
    """What kernels take for a matrix of codes: where it lies, and where its inputs begin in it."""
    form, words, scales = weight.form, weight.words, weight.scales
    return (
        words, scales, words.strides[0] // _LOAD_BYTES, scales.strides[0] // 2,
        form.blocks, form.offset,
    )  # fmt: skip


def options(form, dtype):
    """Of the compiler, for codes of a form that meet tokens of a type."""
    held = NAMES[dtype.name] if array.is_half(dtype) else "f16"
    return (f"-DWEIGHT={held}", f"-DBITS={form.bits}", f"-DGROUP={form.group}")
