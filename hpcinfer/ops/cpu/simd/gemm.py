"""Vector code of matrix products (BLAS's gemm): the rows of x stand in the lanes, pair by pair.

A weight is read as it lies: of each of its rows one pair of bfloat16 after the other is given to
all lanes. So nothing of it is arranged anew, and the gate of an FFN is taken in registers.
"""

import itertools

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hpcinfer.ops.cpu.simd.gate import gated
from hpcinfer.ops.cpu.simd.vectors import (
    FLOAT,
    I32,
    I64,
    LANES,
    PAIRS,
    ZERO,
    Bfloat16Pairs,
    addresses,
    as_bfloat16,
    cases,
    load,
    prefetch,
    splat_at,
    store,
    sums_from_zero,
    transposed,
)

VECTORS = 2  # of rows of x in a tile
TILE = VECTORS * LANES
ROWS = 12  # of the weight in a tile: with the vectors, as many sums as registers hold

_WORDS = ir.VectorType(I32, LANES)


def _sums(builder, rows, ahead, x, n_pairs, vectors):
    """Sums of products of rows of a weight, by address, with vectors of a tile: [row][vector].

    Meanwhile the cache fetches what lies `ahead` bytes behind each row.
    """
    sums = sums_from_zero(builder, len(rows), vectors)

    def turn(p):
        offset, start = builder.mul(p, I64(4)), builder.add(x, builder.mul(p, I64(4 * TILE)))
        columns = [
            builder.bitcast(load(builder, builder.add(start, I64(64 * u)), I32, LANES), PAIRS)
            for u in range(vectors)
        ]
        for row, of_row in zip(rows, sums, strict=True):
            pair = builder.bitcast(splat_at(builder, builder.add(row, offset), I32), PAIRS)
            for column, total in zip(columns, of_row, strict=True):
                value = Bfloat16Pairs.add_product(builder, builder.load(total), column, pair)
                builder.store(value, total)

    # A line of the cache has LANES pairs: one of each row is fetched in as many turns.
    whole = builder.mul(builder.udiv(n_pairs, I64(LANES)), I64(LANES))
    with cgutils.for_range_slice(builder, I64(0), whole, I64(LANES), I64) as (p, _):
        further = builder.add(builder.mul(p, I64(4)), ahead)
        for i in range(LANES):
            turn(builder.add(p, I64(i)))
            for row in rows[i::LANES]:
                prefetch(builder, builder.add(row, further), 2)
    with cgutils.for_range_slice(builder, whole, n_pairs, I64(1), I64) as (p, _):
        turn(p)
    return [[builder.load(total) for total in of_row] for of_row in sums]


def add_rows(rows):
    """Intrinsic (vectors, w, w_stride, ahead, n_pairs, x, y, first): y (rows, TILE) = or += w · x.

    All are addresses and numbers; y is added to unless `first`. The first `vectors` of a tile
    count.
    """

    @intrinsic
    def rows_of(typing, vectors, w, w_stride, ahead, n_pairs, x, y, first):
        def generate(context, builder, signature, arguments):
            vectors, w, w_stride, ahead, n_pairs, x, y, first = arguments
            of_rows = addresses(builder, w, w_stride, rows)

            # Sum in registers, and add what y holds unless this is the first part.
            for count in cases(builder, vectors, range(1, VECTORS + 1)):
                sums = _sums(builder, of_rows, ahead, x, n_pairs, count)
                for r, u in itertools.product(range(rows), range(count)):
                    place = builder.add(y, I64(4 * (TILE * r + LANES * u)))
                    held = load(builder, place, FLOAT, LANES)
                    held = builder.select(first, ZERO, held)
                    store(builder, builder.fadd(sums[r][u], held), place)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7, types.boolean), generate

    return rows_of


def gated_rows(rows, twices):
    """Intrinsic (function, vectors, gate, up, w_stride, ahead, n_pairs, x, out): a gate's outputs.

    Of `rows` rows of the gate and as many of what it lets through; out (rows / 2, TILE) words, of
    which each has two rows' values of one row of x as bfloat16. The first `vectors` of a tile
    count.

    Parameters
    ----------
    rows : even
    twices : as for `gate.gate`, and so is `function`
    """

    @intrinsic
    def gated_of(typing, function, vectors, gate, up, w_stride, ahead, n_pairs, x, out):
        def generate(context, builder, signature, arguments):
            function, vectors, gate, up, w_stride, ahead, n_pairs, x, out = arguments
            weights = addresses(builder, gate, w_stride, rows)
            weights += addresses(builder, up, w_stride, rows)
            for count in cases(builder, vectors, range(1, VECTORS + 1)):
                sums = _sums(builder, weights, ahead, x, n_pairs, count)
                for case in cases(builder, function, range(len(twices))):
                    _store_gated(builder, twices[case], sums[:rows], sums[rows:], out)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), generate

    return gated_of


def _store_gated(builder, twice, gate, up, out):
    """Write the gate of vectors [row][vector] as words of two rows each."""
    shift = ir.Constant(_WORDS, [16] * LANES)
    for pair, u in itertools.product(range(len(gate) // 2), range(len(gate[0]))):
        halves = []
        for r in (2 * pair, 2 * pair + 1):
            value = as_bfloat16(builder, gated(builder, twice, gate[r][u], up[r][u]))
            halves.append(builder.zext(value, _WORDS))
        words = builder.or_(halves[0], builder.shl(halves[1], shift))
        store(builder, words, builder.add(out, I64(4 * (TILE * pair + LANES * u))))


@intrinsic
def turned(typing, source, next_source, out, next_out):
    """16 rows of 16 words become columns; addresses, and strides in bytes."""

    def generate(context, builder, signature, arguments):
        source, next_source, out, next_out = arguments
        rows = [
            load(builder, at, I32, LANES) for at in addresses(builder, source, next_source, LANES)
        ]
        places = addresses(builder, out, next_out, LANES)
        for word, place in zip(transposed(builder, rows), places, strict=True):
            store(builder, word, place)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate
