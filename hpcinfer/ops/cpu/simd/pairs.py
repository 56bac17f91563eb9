"""Vector code of products of pairs of bfloat16: rows packed in pairs, and a tile of their product.

Two products are summed into each lane by one instruction. What stands in the lanes is packed
before: keys by `pack_keys`, as rows of x are for `gemm`, and values by `pack_values`.
"""

import itertools

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
    Bfloat16Pairs,
    addresses,
    lane_mask,
    load,
    shuffled,
    splat,
    splat_at,
    store,
    sums_from_zero,
    transposed,
    vector_addresses,
)


@intrinsic
def pack_keys(typing, row, next_key, n, n_pairs, out, next_pair):
    """Transpose up to 16 keys: pair p of key j becomes 32-bit word j of row p of the result.

    row and out are addresses, next_key and next_pair strides in bytes. Keys from the n-th on are
    zeros, and so are the rows up to the next multiple of 16, which must be there.
    """

    def generate(context, builder, signature, arguments):
        row, next_key, n, n_pairs, out, next_pair = arguments

        # Find the keys that there are; the others are read as the first, behind a mask.
        starts, masks = [], []
        for j in range(LANES):
            exists = builder.icmp_signed("<", I64(j), n)
            offset = builder.mul(next_key, I64(j))
            starts.append(builder.add(row, builder.select(exists, offset, I64(0))))
            masks.append(splat(builder, exists, LANES))

        # Transpose 16 pairs of each at a time.
        with cgutils.for_range_slice(builder, I64(0), n_pairs, I64(LANES), I64) as (p, _):
            inside = lane_mask(builder, builder.sub(n_pairs, p), LANES)
            offset = builder.mul(p, I64(4))
            words = [
                load(builder, builder.add(start, offset), I32, LANES, builder.and_(mask, inside))
                for start, mask in zip(starts, masks, strict=True)
            ]
            for i, word in enumerate(transposed(builder, words)):
                at = builder.mul(builder.add(p, I64(i)), next_pair)
                store(builder, word, builder.add(out, at))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


@intrinsic
def pack_values(typing, row, next_key, n, width, out):
    """Interleave up to 16 values: row p of the result has column d of keys 2p and 2p + 1 in word d.

    row and out are addresses, next_key a stride in bytes, width a multiple of 16. Keys from the
    n-th on are zeros.
    """

    order = [LANES * (i % 2) + i // 2 for i in range(2 * LANES)]

    def generate(context, builder, signature, arguments):
        row, next_key, n, width, out = arguments
        for p in range(LANES // 2):
            # Find the two keys; one that is not there is read as the first, and is zeros.
            exist = [builder.icmp_signed("<", I64(2 * p + i), n) for i in range(2)]
            offsets = [builder.mul(next_key, I64(2 * p + i)) for i in range(2)]
            starts = [
                builder.add(row, builder.select(exists, offset, I64(0)))
                for exists, offset in zip(exist, offsets, strict=True)
            ]

            # Interleave 16 columns at a time.
            to = builder.add(out, builder.mul(width, I64(4 * p)))
            with cgutils.for_range_slice(builder, I64(0), width, I64(LANES), I64) as (d, _):
                by, halves = builder.mul(d, I64(2)), []
                for start, exists in zip(starts, exist, strict=True):
                    values = load(builder, builder.add(start, by), I16, LANES)
                    halves.append(builder.select(exists, values, ir.Constant(values.type, None)))
                pairs = shuffled(builder, *halves, order)
                store(builder, pairs, builder.add(to, builder.mul(d, I64(4))))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


def paired_product(rows, vectors, add):
    """Intrinsic (a, next_a, n_pairs, b, next_b, y, next_y, factors): a tile of a product of pairs.

    All are addresses and strides in bytes: a (rows, n_pairs) and b (n_pairs, 16 · vectors) pairs of
    bfloat16, y (rows, 16 · vectors) float32. y becomes a · b or, if `add`, y · factor + a · b with
    one of `factors` (rows,) float32 for each row.
    """

    @intrinsic
    def product_of(typing, a, next_a, n_pairs, b, next_b, y, next_y, factors):
        def generate(context, builder, signature, arguments):
            _paired_product(builder, arguments, rows, vectors, add)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return product_of


def _paired_product(builder, arguments, rows, vectors, add):
    """The tile: sums in registers, from zero or from what y holds."""
    a, next_a, n_pairs, b, next_b, y, next_y, factors = arguments
    a_rows = addresses(builder, a, next_a, rows)
    places = vector_addresses(builder, y, next_y, rows, vectors)
    sums = sums_from_zero(builder, rows, vectors)
    if add:
        _load_scaled(builder, sums, places, factors)

    # Give each pair of a row of a to all columns.
    with cgutils.for_range_slice(builder, I64(0), n_pairs, I64(1), I64) as (p, _):
        start = builder.add(b, builder.mul(next_b, p))
        columns = [
            builder.bitcast(load(builder, at, I32, LANES), PAIRS)
            for at in addresses(builder, start, I64(64), vectors)
        ]
        for a_row, of_row in zip(a_rows, sums, strict=True):
            at = builder.add(a_row, builder.mul(p, I64(4)))
            pair = builder.bitcast(splat_at(builder, at, I32), PAIRS)
            for column, total in zip(columns, of_row, strict=True):
                value = Bfloat16Pairs.add_product(builder, builder.load(total), pair, column)
                builder.store(value, total)
    for total, place in zip(itertools.chain(*sums), itertools.chain(*places), strict=True):
        store(builder, builder.load(total), place)


def _load_scaled(builder, sums, places, factors):
    """Let the sums begin as what is at their places, times the factor of each row."""
    for r, (of_row, of_places) in enumerate(zip(sums, places, strict=True)):
        factor = splat_at(builder, builder.add(factors, I64(4 * r)), FLOAT)
        for total, place in zip(of_row, of_places, strict=True):
            held = load(builder, place, FLOAT, LANES)
            builder.store(builder.fmul(held, factor), total)
