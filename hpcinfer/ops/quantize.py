"""Weights as integers of 4 or 8 bits, with a scale for every group of inputs.

A weight (O, I) is approximated by code[o, i] · scale[o, i // group], without a zero point. Scales
are float16, so a number takes bits + 16 / group bits: 4.5 or 8.5 with groups of 32. Decoding reads
every weight for each token, and its time falls with their bytes.

In memory 16-bit words hold the codes, in the order in which a vector of 32 words wants them. A
block is 32 words, and a word has 16 / bits places of `bits` bits, the lowest first: place i of word
j of a block holds the block's input 32 i + j. So one shift and one mask give 32 inputs that follow
one another, and those are of one group. A block has 128 inputs of 4 bits, or 64 of 8.

A rank may own inputs that begin inside a group. Its rows then begin with what is left of that
group, `offset` places that count for nothing, and end with a whole block. With them groups stand
where they stood in the whole weight, so that any cut of it has the same values.
"""

from dataclasses import dataclass, replace

import numpy as np

from hpcinfer import array

BITS, GROUPS = (4, 8), (32, 64, 128)
LANES = 32  # words of a block, and inputs that one place of them holds

# Largest codes that the greatest number of a group of 4-bit codes is tried at; negative ones reach
# -8. A value above 8 clips it, where the others gain more by finer steps.
_LARGEST = (-9.5, -9.0, -8.7, -8.4, -8.2, -8.0, -7.8, -7.6, -7.3, -7.0, 6.6, 7.0, 7.4)


@dataclass(frozen=True)
class QuantFormat:
    """How words and scales are to be read.

    Attributes
    ----------
    bits : 4 or 8
    group : inputs that share a scale: 32, 64 or 128
    inputs : I
    offset : places before the first input, in words as in scales
    dtype : type that x is rounded to where it meets the weight, as it is for 16-bit weights
    """

    bits: int
    group: int
    inputs: int
    offset: int
    dtype: np.dtype

    @property
    def block(self):
        """Inputs of one block."""
        return LANES * 16 // self.bits

    @property
    def blocks(self):
        """Blocks of a row."""
        return -(-(self.offset + self.inputs) // self.block)

    @property
    def width(self):
        """Places of a row: those before the first input, the inputs, those behind."""
        return self.blocks * self.block

    @property
    def groups(self):
        """Scales of a row; those of places without input are there too, and count for nothing."""
        return -(-self.width // self.group)


class Quantized:
    """A weight (O, I), or those of all experts (E, O, I), as words and scales.

    It is indexed as an array is: by slices, and by a number for one expert. Parts are views.

    Attributes
    ----------
    form : QuantFormat
    words : (..., O, form.blocks · 32) uint16; a row is unbroken, rows may lie apart
    scales : (..., O, form.groups) float16, likewise
    """

    def __init__(self, form, words, scales):
        self.form, self.words, self.scales = form, words, scales

    @property
    def shape(self):
        return (*self.words.shape[:-1], self.form.inputs)

    @property
    def ndim(self):
        return self.words.ndim

    @property
    def dtype(self):
        """Type that x is rounded to."""
        return self.form.dtype

    @property
    def itemsize(self):
        """Bytes of a code, 0.5 or 1."""
        return self.form.bits / 8

    @property
    def nbytes(self):
        return self.words.nbytes + self.scales.nbytes

    def __len__(self):
        return len(self.words)

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        if Ellipsis in index:
            at = index.index(Ellipsis)
            missing = self.ndim - len(index) + 1
            index = index[:at] + (slice(None),) * missing + index[at + 1 :]
        columns = index[self.ndim - 1] if len(index) == self.ndim else slice(None)
        rows = index[: self.ndim - 1]
        part = Quantized(self.form, self.words[rows], self.scales[rows])
        return part if columns == slice(None) else part._columns(*columns.indices(self.shape[-1]))

    def _columns(self, start, stop, step):
        """Some inputs: from the block and group in which they begin to those in which they end."""
        if step != 1:
            raise ValueError(f"quantize: got a step of {step}, need columns that are neighbours")
        form, first = self.form, self.form.offset + start
        skipped = first // max(form.block, form.group) * max(form.block, form.group)
        form = replace(form, inputs=max(0, stop - start), offset=first - skipped)
        word, scale = skipped // form.block * LANES, skipped // form.group
        return Quantized(
            form,
            self.words[..., word : word + form.blocks * LANES],
            self.scales[..., scale : scale + form.groups],
        )


def quantize(weight, bits, group):
    """Codes and scales that come near a weight.

    Codes of 8 bits are -127 ... 127, with the largest number of a group at the end. Codes of 4 bits
    are -8 ... 7, and of some scales the one with the least squared error is taken.

    Parameters
    ----------
    weight : (O, I) float32

    Returns
    -------
    codes : (O, I) int8
    scales : (O, ⌈I / group⌉) float16; those of 4-bit codes may be negative

    Raises
    ------
    ValueError
        If the weight is not finite, or too large for a float16 scale.
    """
    n_out, n_in = weight.shape
    n_groups = -(-n_in // group)
    grouped = np.zeros((n_out, n_groups * group), np.float32)
    grouped[:, :n_in] = weight
    grouped = grouped.reshape(n_out, n_groups, group)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        scales = _nearest_scales(grouped) if bits == 4 else _covering_scales(grouped)
        if not np.isfinite(scales).all():
            largest = float(np.abs(weight).max())
            raise ValueError(
                f"quantize: got a weight of {largest:g}, need finite ones that float16 scales reach"
            )
        inverse = _inverse(scales.astype(np.float32))
    low, high = (-8, 7) if bits == 4 else (-127, 127)
    codes = np.clip(np.rint(grouped * inverse[..., None]), low, high).astype(np.int8)
    return np.ascontiguousarray(codes.reshape(n_out, -1)[:, :n_in]), scales


def pack(codes, bits, offset=0):
    """Words of codes, `offset` places before the first: (..., I) int8 -> (..., words) uint16."""
    *lead, n_in = codes.shape
    places = 16 // bits
    blocks = -(-(offset + n_in) // (LANES * places))
    placed = np.zeros((*lead, blocks * LANES * places), np.uint8)
    placed[..., offset : offset + n_in] = codes.view(np.uint8) & (2**bits - 1)
    placed = placed.reshape(*lead, blocks, places, LANES)
    words = np.zeros((*lead, blocks, LANES), np.uint16)
    for i in range(places):
        words |= placed[..., i, :].astype(np.uint16) << np.uint16(bits * i)
    return words.reshape(*lead, blocks * LANES)


def unpack(words, bits):
    """Codes of all places of some words: (..., words) uint16 -> (..., places) int8."""
    xp = array.namespace(words)
    *lead, n_words = words.shape
    places, sign = 16 // bits, 1 << (bits - 1)
    blocks = words.reshape(*lead, n_words // LANES, 1, LANES)
    shifts = (bits * xp.arange(places, dtype=xp.uint16))[:, None]
    codes = ((blocks >> shifts) & xp.uint16(2**bits - 1)).astype(xp.int16)
    return ((codes ^ sign) - sign).astype(xp.int8).reshape(*lead, n_words * places)


def dequantize(weight):
    """The numbers that a Quantized stands for: (..., O, I) float32."""
    form, xp = weight.form, array.namespace(weight.words)
    inputs = slice(form.offset, form.offset + form.inputs)
    codes = unpack(weight.words, form.bits)[..., inputs].astype(xp.float32)
    codes *= xp.repeat(array.widen(weight.scales), form.group, axis=-1)[..., inputs]
    return codes


def to_arrays(weight):
    """The arrays that a parameter is made of: words and scales, or itself."""
    return (weight.words, weight.scales) if isinstance(weight, Quantized) else (weight,)


def form_of(weight):
    """Form of a parameter, None if it is an array."""
    return weight.form if isinstance(weight, Quantized) else None


def from_arrays(form, arrays):
    """The parameter that is made of these arrays."""
    return arrays[0] if form is None else Quantized(form, *arrays)


def place(x, form):
    """x where the words hold its inputs, zero elsewhere: (T, I) -> (T, form.width)."""
    if form.width == form.inputs:
        return x
    placed = array.namespace(x).zeros((len(x), form.width), x.dtype)
    placed[:, form.offset : form.offset + form.inputs] = x
    return placed


def to_bytes(codes, bits):
    """Codes as a file holds them: int8, or two of 4 bits in a byte of uint8, the low one first."""
    if bits == 8:
        return codes
    n_out, n_in = codes.shape
    pairs = np.zeros((n_out, -(-n_in // 2), 2), np.uint8)
    pairs.reshape(n_out, -1)[:, :n_in] = codes.view(np.uint8) & 15
    return pairs[..., 0] | pairs[..., 1] << 4


def from_bytes(stored, bits, first, n_in):
    """`n_in` codes from number `first` on of rows that a file holds: (O, n_in) int8."""
    if bits == 8:
        return stored[:, first : first + n_in]
    pairs = np.stack([stored & 15, stored >> 4], axis=-1).reshape(len(stored), -1)
    return ((pairs[:, first : first + n_in] ^ 8).astype(np.int8)) - np.int8(8)


def _covering_scales(grouped):
    """Scales with which no number is clipped: (O, groups, group) -> (O, groups) float16."""
    largest = np.abs(grouped).max(axis=-1, initial=0)
    scales = (largest / 127).astype(np.float16)
    short = scales.astype(np.float32) * 127 < largest
    return np.where(short, np.nextafter(scales, np.float16(np.inf)), scales)


def _nearest_scales(grouped):
    """Scales of the least squared error among some: (O, groups, group) -> (O, groups) float16.

    With codes q, the best scale of weights w is w · q / q · q, and takes (w · q)² / q · q off their
    squares.
    """
    at = np.abs(grouped).argmax(axis=-1)[..., None]
    inverse = _inverse(np.take_along_axis(grouped, at, axis=-1))
    scales = np.zeros(grouped.shape[:2], np.float32)
    most, codes = np.zeros_like(scales), np.empty_like(grouped)
    for largest in _LARGEST:
        np.multiply(grouped, inverse * np.float32(largest), out=codes)
        np.clip(np.rint(codes, out=codes), -8, 7, out=codes)
        along = np.einsum("ogi,ogi->og", grouped, codes)
        square = np.einsum("ogi,ogi->og", codes, codes)
        scale = along * _inverse(square)
        better = along * scale > most
        np.copyto(scales, scale, where=better)
        np.copyto(most, along * scale, where=better)
    if not np.isfinite(grouped).all():
        scales[...] = np.nan
    return scales.astype(np.float16)


def _inverse(x):
    """1 / x, and 0 for 0."""
    return np.divide(1, x, out=np.zeros_like(x), where=x != 0)
