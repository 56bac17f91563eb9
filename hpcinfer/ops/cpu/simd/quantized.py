"""Vector code of products with quantised weights, whose codes are widened in registers.

Where there are instructions for bfloat16, `quantized_rows` takes two rows of a weight at a time, by
up to eight of x. Codes become bfloat16 exactly, once for all rows of x, and scales meet sums in
float32. Every 32 inputs have a scale of their own, so a product would be followed by a
multiplication; but of four blocks that follow one another, quarters change places, as in a 4 x 4
matrix that is transposed. A vector then holds eight inputs of each of four groups, four vectors are
summed, and their sums meet four scales at once. x lies in memory in that order (`arranged`).

Elsewhere `quantized_tile` multiplies in float32.
"""

import functools
import itertools
from types import SimpleNamespace

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hpcinfer.ops.cpu.simd.vectors import (
    FLOAT,
    I16,
    I32,
    I64,
    LANES,
    PAIRS,
    VECTOR,
    ZERO,
    Bfloat16Pairs,
    addresses,
    as_bfloat16,
    call,
    cases,
    constant,
    fma,
    horizontal_sum,
    lane_mask,
    load,
    number_at,
    prefetch,
    shuffled,
    splat,
    splat_at,
    store,
    sums_from_zero,
    sums_of_lanes,
)

# Blocks whose quarters change places, and bytes of a block's words.
BLOCKS, _BLOCK_BYTES = 4, 64

# Rows of x in a tile: as many as leave all sums of two rows of a weight in registers; in float32.
MOST, MOST_FLOATS = 8, 4

_WORDS, _WHOLE = ir.VectorType(I16, 32), ir.VectorType(I32, LANES)

# bfloat16 bits of the numbers that codes of 4 bits stand for, twice, as an index has five bits.
_SIGNED = [0, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0]
_SIGNED = 2 * (_SIGNED + [0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80])


# ---- two rows of a weight in bfloat16 ----


@intrinsic
def quantized_rows(
    typing, columns, like, x, x_stride, words, w_stride, scales, s_stride, pairs, blocks, groups,
    shift, ahead, y, y_stride,
):  # fmt: skip
    """y = x · wᵀ for 1 to 8 rows of x and pairs of rows of a weight that follow one another.

    Codes and scales are as `ops.quantize` has them: a row has so many blocks and groups, and
    2^shift places share a scale. x is what `arranged` made; y is float32, rows of x by rows of w.
    All but `like` are numbers, addresses or bytes; `like` is an array for its type alone, as for
    `_bits_of`.

    Parameters
    ----------
    columns : rows of x
    pairs : pairs of rows of w
    ahead : rows of w further on that are fetched into the cache meanwhile
    """

    def generate(context, builder, signature, arguments):
        for c in cases(builder, arguments[0], range(1, MOST + 1)):
            _quantized_rows(builder, arguments[2:], _bits_of(like), c)
        return context.get_dummy_value()

    return types.void(types.int64, like, *[types.int64] * 13), generate


def _bits_of(like):
    """Bits of the codes in an array of words by its type: uint16 has them of 4, uint8 of 8."""
    return 8 if like.dtype == types.uint8 else 4


def _quantized_rows(builder, arguments, bits, columns):
    (x, x_stride, words, w_stride, scales, s_stride, pairs, blocks, groups, shift, ahead,
     y, y_stride) = arguments  # fmt: skip
    add, mul = builder.add, builder.mul
    of = SimpleNamespace(
        bits=bits, columns=columns, blocks=blocks, groups=groups, shift=shift,
        x=addresses(builder, x, x_stride, columns),
        w_ahead=mul(w_stride, ahead), s_ahead=mul(s_stride, ahead),
        scale_of=_places_of_scales(builder, bits, shift),
    )  # fmt: skip
    y_rows = addresses(builder, y, y_stride, columns)
    with cgutils.for_range_slice(builder, I64(0), pairs, I64(1), I64) as (pair, _):
        row = mul(pair, I64(2))
        w, s = add(words, mul(row, w_stride)), add(scales, mul(row, s_stride))
        of.w, of.s = (w, add(w, w_stride)), (s, add(s, s_stride))
        # The sums of a row of x, for both rows of w, stand side by side.
        sums = itertools.chain(*_sums_of_two(builder, of))
        total = sums_of_lanes(builder, _to_a_power_of_two(sums))
        for c, of_row in enumerate(y_rows):
            both = shuffled(builder, total, total, [2 * c, 2 * c + 1])
            store(builder, both, add(of_row, mul(pair, I64(8))))


def _places_of_scales(builder, bits, shift):
    """For each place of a word, where its scale is among those of four blocks, by lane."""
    per_word, by = 16 // bits, splat(builder, builder.trunc(shift, I32), LANES)
    return [
        builder.lshr(ir.Constant(_WHOLE, [n // 4 * per_word + i for n in range(LANES)]), by)
        for i in range(per_word)
    ]


def _to_a_power_of_two(vectors):
    vectors = list(vectors)
    return vectors + [ZERO] * ((1 << (len(vectors) - 1).bit_length()) - len(vectors))


def _sums_of_two(builder, of):
    """Sums by row of x, then by row of w, each of 16 lanes."""
    sums = sums_from_zero(builder, len(of.x), len(of.w))
    per_word = 16 // of.bits
    with cgutils.for_range_slice(builder, I64(0), of.blocks, I64(BLOCKS), I64) as (block, _):
        quarters = [_quarters(builder, of, w, block) for w in of.w]
        scales = [_scales(builder, of, s, block) for s in of.s]
        start = builder.mul(block, I64(_BLOCK_BYTES * per_word))
        for i in range(per_word):
            codes = [[_as_pairs(builder, v, of.bits, i) for v in of_row] for of_row in quarters]
            factors = [_permuted(builder, s, of.scale_of[i]) for s in scales]
            at = builder.add(start, I64(_BLOCK_BYTES * BLOCKS * i))
            for x, of_x in zip(of.x, sums, strict=True):
                _add_products(builder, builder.add(x, at), codes, factors, of_x)
    return [[builder.load(total) for total in of_x] for of_x in sums]


def _add_products(builder, x, codes, factors, sums):
    """Add to the sums of one row of x: codes by row of w, then by quarter."""
    found = [ZERO for _ in codes]
    for k in range(BLOCKS):
        numbers = Bfloat16Pairs.load_x(builder, builder.add(x, I64(_BLOCK_BYTES * k)), None)
        for r, of_row in enumerate(codes):
            found[r] = Bfloat16Pairs.add_product(builder, found[r], numbers, of_row[k])
    totals = [
        fma(builder, product, factor, builder.load(total))
        for product, factor, total in zip(found, factors, sums, strict=True)
    ]
    for value, total in zip(_before_what_follows(builder, totals), sums, strict=True):
        builder.store(value, total)


def _before_what_follows(builder, values):
    """The values, computed before anything is loaded for the next row of x.

    LLVM would load x for all rows together, and run out of registers.
    """
    kind = ir.LiteralStructType([v.type for v in values])
    places = ["=v"] * len(values) + [str(i) for i in range(len(values))]
    function = ir.FunctionType(kind, [v.type for v in values])
    held = builder.asm(function, "", ",".join([*places, "~{memory}"]), values, True)
    return [builder.extract_value(held, i) for i in range(len(values))]


def _quarters(builder, of, row, block):
    """Words of four blocks of a row: vector k has quarter k of each.

    Behind the last block of a row it is met again, by an x of zeros.
    """
    last, held = builder.sub(of.blocks, I64(1)), []
    for q in range(BLOCKS):
        number = builder.add(block, I64(q))
        number = builder.select(builder.icmp_signed("<", number, last), number, last)
        at = builder.add(row, builder.mul(number, I64(_BLOCK_BYTES)))
        prefetch(builder, builder.add(at, of.w_ahead), 3)
        held.append(load(builder, at, I16, 32))
    return _transposed(builder, held)


def _scales(builder, of, row, block):
    """Scales of four blocks of a row as float32, times what `_as_pairs` leaves to them."""
    first = builder.lshr(builder.mul(block, I64(16 // of.bits)), of.shift)
    at = builder.add(row, builder.mul(first, I64(2)))
    prefetch(builder, builder.add(at, of.s_ahead), 3)
    mask = lane_mask(builder, builder.sub(of.groups, first), LANES)
    half = load(builder, at, I16, LANES, mask)
    scales = builder.fpext(builder.bitcast(half, ir.VectorType(ir.HalfType(), LANES)), VECTOR)
    return builder.fmul(scales, constant(2.0**-24)) if of.bits == 8 else scales


def _as_pairs(builder, words, bits, place):
    """The codes at a place of 32 words as bfloat16; those of 8 bits times 2^24."""
    if bits == 4:
        return _looked_up(builder, builder.lshr(words, ir.Constant(_WORDS, [4 * place] * 32)))
    # Move each code to the upper end of 32 bits, whose float32 ends in zeros: a bfloat16.
    pairs, floats = builder.bitcast(words, _WHOLE), []
    for half in range(2):
        up = builder.shl(pairs, ir.Constant(_WHOLE, [24 - 16 * half - 8 * place] * LANES))
        code = builder.and_(up, ir.Constant(_WHOLE, [0xFF000000] * LANES))
        floats.append(builder.bitcast(builder.sitofp(code, VECTOR), _WHOLE))
    low = builder.lshr(floats[0], ir.Constant(_WHOLE, [16] * LANES))
    return builder.bitcast(builder.or_(low, floats[1]), PAIRS)


def _looked_up(builder, words):
    """The lowest four bits of 32 words as bfloat16."""
    name, table = "llvm.x86.avx512.permvar.hi.512", ir.Constant(_WORDS, _SIGNED)
    return builder.bitcast(call(builder, name, _WORDS, table, words), PAIRS)


def _permuted(builder, vector, lanes):
    return call(builder, "llvm.x86.avx512.permvar.sf.512", VECTOR, vector, lanes)


def _transposed(builder, vectors):
    """Four vectors of 32 words: quarter q of vector k becomes quarter k of vector q."""

    def by_quarters(a, b, quarters):
        return shuffled(builder, a, b, [8 * q + j for q in quarters for j in range(8)])

    a, b, c, d = vectors
    turned = []
    for quarters in ((0, 1, 4, 5), (2, 3, 6, 7)):
        first, last = by_quarters(a, b, quarters), by_quarters(c, d, quarters)
        turned += [by_quarters(first, last, (0, 2, 4, 6)), by_quarters(first, last, (1, 3, 5, 7))]
    return turned


@intrinsic
def arranged(typing, like, x, n, offset, blocks, per_word, out):
    """One row of x as `quantized_rows` wants it: n numbers become those of all places, bfloat16.

    x and out are addresses. x begins `offset` places behind the beginning of out, of which the rest
    is zero. A block has 32 · per_word inputs, and of four blocks those of a place follow one
    another. `like` is an array for its type alone: float32, or uint16 for bfloat16's bits.
    """
    item_bytes = 2 if like.dtype == types.uint16 else 4
    load_at = _bits_at if item_bytes == 2 else _rounded_at

    def generate(context, builder, signature, arguments):
        x, n, offset, blocks, per_word, out = arguments[1:]
        with cgutils.for_range_slice(builder, I64(0), blocks, I64(BLOCKS), I64) as (block, _):
            with cgutils.for_range_slice(builder, I64(0), per_word, I64(1), I64) as (i, _):
                # Load 32 inputs of each of four blocks, and let their quarters change places.
                held = []
                for q in range(BLOCKS):
                    place = builder.mul(builder.add(block, I64(q)), per_word)
                    first = builder.mul(builder.add(place, i), I64(32))
                    first = builder.sub(first, offset)
                    at = builder.add(x, builder.mul(first, I64(item_bytes)))
                    held.append(load_at(builder, at, first, n))

                # Store them one behind the other.
                place = builder.add(builder.mul(block, per_word), builder.mul(i, I64(BLOCKS)))
                at = builder.add(out, builder.mul(place, I64(_BLOCK_BYTES)))
                for k, vector in enumerate(_transposed(builder, held)):
                    store(builder, vector, builder.add(at, I64(_BLOCK_BYTES * k)))
        return context.get_dummy_value()

    return types.void(like, *[types.int64] * 6), generate


def _bits_at(builder, address, first, n):
    """32 bfloat16 from an address on, zero where first + lane is not one of n."""
    return load(builder, address, I16, 32, _inside(builder, first, n, 32))


def _rounded_at(builder, address, first, n):
    """As `_bits_at`, of float32."""
    halves = []
    for start in (0, LANES):
        mask = _inside(builder, builder.add(first, I64(start)), n, LANES)
        numbers = load(builder, builder.add(address, I64(4 * start)), FLOAT, LANES, mask)
        halves.append(as_bfloat16(builder, numbers))
    return shuffled(builder, *halves, range(32))


def _inside(builder, first, n, lanes):
    """Mask of the lanes of which first + lane is one of 0 ... n - 1."""
    first, n = (splat(builder, builder.trunc(v, I32), lanes) for v in (first, n))
    numbers = builder.add(first, ir.Constant(first.type, list(range(lanes))))
    return builder.icmp_unsigned("<", numbers, n)


# ---- one row of a weight in float32 ----


@intrinsic
def quantized_tile(
    typing, columns, like, x, x_stride, words, scales, blocks, shift, y, y_stride, bias
):
    """y = x · wᵀ + bias for 1 to 4 rows of x, float32, and one row of a weight.

    Codes are as `ops.quantize` packs them, and 2^shift places share a scale. All but `like`, an
    array for its type alone, are numbers, addresses or bytes; bias is 0 for none.
    """

    def generate(context, builder, signature, arguments):
        for c in cases(builder, arguments[0], range(1, MOST_FLOATS + 1)):
            _quantized_tile(builder, arguments[2:], _bits_of(like), c)
        return context.get_dummy_value()

    return types.void(types.int64, like, *[types.int64] * 9), generate


def _quantized_tile(builder, arguments, bits, columns):
    x, x_stride, words, scales, blocks, shift, y, y_stride, bias = arguments
    places = 16 // bits

    # Sums of each place apart where there are few: one has to wait for the one before.
    apart = places if columns * places <= 12 else 1
    sums = sums_from_zero(builder, columns, apart)
    x_rows = addresses(builder, x, x_stride, columns)
    with cgutils.for_range_slice(builder, I64(0), blocks, I64(1), I64) as (b, _):
        held = load(builder, builder.add(words, builder.mul(b, I64(_BLOCK_BYTES))), I16, 32)
        for i in range(places):
            slice_number = builder.add(builder.mul(b, I64(places)), I64(i))
            number = builder.lshr(slice_number, shift)
            at = builder.add(scales, builder.mul(number, I64(2)))
            half = builder.load(builder.inttoptr(at, ir.HalfType().as_pointer()), align=2)
            scale = splat(builder, builder.fpext(half, FLOAT), LANES)
            start = builder.mul(slice_number, I64(32 * 4))
            halves = _code_halves(builder, held, bits, i)
            for c in range(columns):
                total = sums[c][i % apart]
                found = _products(builder, builder.add(x_rows[c], start), halves)
                builder.store(fma(builder, found, scale, builder.load(total)), total)
    y_rows = addresses(builder, y, y_stride, columns)
    for of_row, place in zip(sums, y_rows, strict=True):
        total = functools.reduce(builder.fadd, map(builder.load, of_row))
        store(builder, horizontal_sum(builder, total), place)
    with builder.if_then(builder.icmp_signed("!=", bias, I64(0)), likely=False):
        for place in y_rows:
            value = builder.fadd(number_at(builder, place), number_at(builder, bias))
            store(builder, value, place)


def _products(builder, x, halves):
    """Products of 32 numbers of x, from an address on, with those of two vectors."""
    total = ZERO
    for i, half in enumerate(halves):
        numbers = load(builder, builder.add(x, I64(4 * LANES * i)), FLOAT, LANES)
        total = fma(builder, numbers, half, total)
    return total


# ---- a row of a weight made bfloat16 ----


@intrinsic
def widen_codes(typing, like, words, scales, blocks, shift, y):
    """One row of codes times scales, as bfloat16.

    words, scales (float32) and y (32 · 16 / bits numbers a block) are addresses; `like` is an array
    for its type alone.
    """
    bits = _bits_of(like)

    def generate(context, builder, signature, arguments):
        words, scales, blocks, shift, y = arguments[1:]
        with cgutils.for_range_slice(builder, I64(0), blocks, I64(1), I64) as (b, _):
            at = builder.add(words, builder.mul(b, I64(_BLOCK_BYTES)))
            held = load(builder, at, I16, 32)

            # Multiply the codes of each place by their scale.
            for i in range(16 // bits):
                number = builder.add(builder.mul(b, I64(16 // bits)), I64(i))
                of_scale = builder.mul(builder.lshr(number, shift), I64(4))
                scale = splat_at(builder, builder.add(scales, of_scale), FLOAT)
                at = builder.add(y, builder.mul(number, I64(64)))
                for half in _code_halves(builder, held, bits, i):
                    store(builder, as_bfloat16(builder, builder.fmul(half, scale)), at)
                    at = builder.add(at, I64(32))
        return context.get_dummy_value()

    return types.void(like, *[types.int64] * 5), generate


def _code_halves(builder, words, bits, place):
    """The codes at a place of 32 words as two vectors of float32."""
    # Move the code to the upper end of its word and back, so that its sign is the word's.
    up = builder.shl(words, ir.Constant(words.type, [16 - bits * (place + 1)] * 32))
    codes = builder.ashr(up, ir.Constant(words.type, [16 - bits] * 32))
    halves = []
    for start in (0, LANES):
        half = shuffled(builder, codes, codes, range(start, start + LANES))
        halves.append(builder.sitofp(builder.sext(half, _WHOLE), VECTOR))
    return halves
