"""Vector code of attention: packed keys and values, products with them, and weights of scores.

Numbers of 16 bits are multiplied in pairs, two products summed into each lane. Queries of many
tokens meet keys and values that were packed so before, as a row of the one times a column of the
other; a query of one token meets the cache as it lies, with the query heads in the lanes: each key
is read once and given to all of them. `simd` has the vectors that this is made of.
"""

import functools
import itertools
import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hpcinfer.ops.cpu.runtime import features
from hpcinfer.ops.cpu.simd import vectors as simd
from hpcinfer.ops.cpu.simd.vectors import (
    FLOAT,
    I16,
    I32,
    I64,
    LANES,
    PAIRS,
    VECTOR,
    Bfloat16Pairs,
)

_LOWEST = ir.Constant(VECTOR, [float("-inf")] * LANES)
_UNROLL = 4  # vectors in a turn of a loop over a row
_LEAST = -150  # 2 to the power of less is no float32
_LOG2_E = 1 / math.log(2)


# ---- many queries: keys and values in pairs ----


@intrinsic
def pack_keys(typing, row, next_key, n, n_pairs, out, next_pair):
    """Transpose up to 16 keys: pair p of key j becomes 32-bit word j of row p of the result.

    row and out are addresses, next_key and next_pair strides in bytes. Keys from the n-th on are
    zeros, and so are the rows up to the next multiple of 16, which must be there.
    """

    def generate(context, builder, signature, arguments):
        row, next_key, n, n_pairs, out, next_pair = arguments
        starts, masks = [], []
        for j in range(LANES):
            exists = builder.icmp_signed("<", I64(j), n)
            offset = builder.mul(next_key, I64(j))
            starts.append(builder.add(row, builder.select(exists, offset, I64(0))))
            masks.append(simd.splat(builder, exists, LANES))
        with cgutils.for_range_slice(builder, I64(0), n_pairs, I64(LANES), I64) as (p, _):
            inside = simd.lane_mask(builder, builder.sub(n_pairs, p), LANES)
            offset = builder.mul(p, I64(4))
            words = [
                simd.load(
                    builder, builder.add(start, offset), I32, LANES, builder.and_(mask, inside)
                )
                for start, mask in zip(starts, masks, strict=True)
            ]
            for i, word in enumerate(simd.transposed(builder, words)):
                at = builder.mul(builder.add(p, I64(i)), next_pair)
                simd.store(builder, word, builder.add(out, at))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


@intrinsic
def pack_values(typing, row, next_key, n, width, out):
    """Interleave up to 16 values: row p of the result has column d of keys 2p and 2p + 1 in word d.

    row and out are addresses, next_key a stride in bytes, width a multiple of 16. Keys from the
    n-th on are zeros.
    """

    def generate(context, builder, signature, arguments):
        row, next_key, n, width, out = arguments
        nothing = ir.Constant(ir.VectorType(I16, LANES), None)
        order = [LANES * (i % 2) + i // 2 for i in range(2 * LANES)]
        for p in range(LANES // 2):
            exist = [builder.icmp_signed("<", I64(2 * p + i), n) for i in range(2)]
            starts = [
                builder.add(
                    row, builder.select(exists, builder.mul(next_key, I64(2 * p + i)), I64(0))
                )
                for i, exists in enumerate(exist)
            ]
            to = builder.add(out, builder.mul(width, I64(4 * p)))
            with cgutils.for_range_slice(builder, I64(0), width, I64(LANES), I64) as (d, _):
                halves = [
                    builder.select(
                        exists,
                        simd.load(builder, builder.add(start, builder.mul(d, I64(2))), I16, LANES),
                        nothing,
                    )
                    for start, exists in zip(starts, exist, strict=True)
                ]
                pairs = simd.shuffled(builder, *halves, order)
                simd.store(builder, pairs, builder.add(to, builder.mul(d, I64(4))))
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
    a, next_a, n_pairs, b, next_b, y, next_y, factors = arguments
    a_rows = [builder.add(a, builder.mul(next_a, I64(r))) for r in range(rows)]
    y_rows = [builder.add(y, builder.mul(next_y, I64(r))) for r in range(rows)]
    sums = [[cgutils.alloca_once(builder, VECTOR) for _ in range(vectors)] for _ in range(rows)]
    for r in range(rows):
        if add:
            factor = simd.splat_at(builder, builder.add(factors, I64(4 * r)), FLOAT)
        for u in range(vectors):
            start = simd.ZERO
            if add:
                held = simd.load(builder, builder.add(y_rows[r], I64(64 * u)), FLOAT, LANES)
                start = builder.fmul(held, factor)
            builder.store(start, sums[r][u])
    with cgutils.for_range_slice(builder, I64(0), n_pairs, I64(1), I64) as (p, _):
        start = builder.add(b, builder.mul(next_b, p))
        columns = [
            builder.bitcast(simd.load(builder, builder.add(start, I64(64 * u)), I32, LANES), PAIRS)
            for u in range(vectors)
        ]
        for r in range(rows):
            at = builder.add(a_rows[r], builder.mul(p, I64(4)))
            pair = builder.bitcast(simd.splat_at(builder, at, I32), PAIRS)
            for u in range(vectors):
                total = builder.load(sums[r][u])
                total = Bfloat16Pairs.add_product(builder, total, pair, columns[u])
                builder.store(total, sums[r][u])
    for r, u in itertools.product(range(rows), range(vectors)):
        simd.store(builder, builder.load(sums[r][u]), builder.add(y_rows[r], I64(64 * u)))


@intrinsic
def weights_of(typing, row, n, scale, largest, out):
    """out = e^(row · scale - largest) as bfloat16, and the sum of them all.

    row is the address of n numbers, float32, of which none exceeds `largest` when scaled; out that
    of as many of 16 bits.
    """

    def generate(context, builder, signature, arguments):
        row, n, scale, largest, out = arguments
        log2_e = ir.Constant(FLOAT, _LOG2_E)
        factor = simd.splat(builder, builder.fmul(scale, log2_e), LANES)
        above = simd.splat(builder, builder.fneg(builder.fmul(largest, log2_e)), LANES)
        totals = [cgutils.alloca_once_value(builder, simd.ZERO) for _ in range(_UNROLL)]

        def turn(total, address, mask):
            scores = simd.load(builder, address, FLOAT, LANES, mask)
            scores = simd.fma(builder, scores, factor, above)
            weights = _power_of_two(builder, scores, half=True)
            if mask is not None:
                weights = builder.select(mask, weights, simd.ZERO)
            builder.store(builder.fadd(builder.load(total), weights), total)
            offset = builder.lshr(builder.sub(address, row), I64(1))
            half = simd.as_bfloat16(builder, weights)
            simd.store(builder, half, builder.add(out, offset), mask)

        _over_row(builder, row, n, totals, turn)
        total = functools.reduce(builder.fadd, map(builder.load, totals))
        return simd.horizontal_sum(builder, total)

    numbers = types.int64, types.int64, types.float32, types.float32, types.int64
    return types.float32(*numbers), generate


@intrinsic
def largest_of(typing, row, n):
    """The largest of n float32 numbers from an address on; -inf if there is none, NaN passed by."""

    def generate(context, builder, signature, arguments):
        row, n = arguments
        held = [cgutils.alloca_once_value(builder, _LOWEST) for _ in range(_UNROLL)]

        def turn(largest, address, mask):
            values = simd.load(builder, address, FLOAT, LANES, mask)
            if mask is not None:
                values = builder.select(mask, values, _LOWEST)
            builder.store(_larger(builder, values, builder.load(largest)), largest)

        _over_row(builder, row, n, held, turn)
        largest = functools.reduce(
            functools.partial(_larger, builder), [builder.load(part) for part in held]
        )
        kind = ir.FunctionType(FLOAT, (VECTOR,))
        name = f"llvm.vector.reduce.fmax.v{LANES}f32"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), (largest,))

    return types.float32(types.int64, types.int64), generate


def _over_row(builder, row, n, held, turn):
    """turn(one of held, address, mask) for every vector of a row of n float32, several at a time.

    So that none waits for the one before; the last vector is behind a mask, else it is None.
    """
    several = LANES * len(held)
    whole = builder.mul(builder.udiv(n, I64(several)), I64(several))
    single = builder.mul(builder.udiv(n, I64(LANES)), I64(LANES))

    def address(i, u=0):
        return builder.add(row, builder.add(builder.mul(i, I64(4)), I64(64 * u)))

    with cgutils.for_range_slice(builder, I64(0), whole, I64(several), I64) as (i, _):
        for u, part in enumerate(held):
            turn(part, address(i, u), None)
    with cgutils.for_range_slice(builder, whole, single, I64(LANES), I64) as (i, _):
        turn(held[0], address(i), None)
    left = builder.sub(n, single)
    with builder.if_then(builder.icmp_signed(">", left, I64(0)), likely=False):
        turn(held[-1], address(single), simd.lane_mask(builder, left, LANES))


# ---- one query: its heads in the lanes ----


def page_scores(heads):
    """Intrinsic (k, queries, row, next_key, n, out, ahead): scores of 16 keys.

    k is an array, for its type alone: how its items are multiplied is `simd.kind_of`. row is the
    address of the first key, of n items (pairs where they are multiplied so, else numbers), a
    multiple of 16 / heads. queries is the address of rows of 16 lanes, one for each 16 / heads
    items, with those of each head in turn; out becomes (16, heads) float32. Meanwhile the cache
    fetches as many bytes as are read here from `ahead` on, which need not be valid.
    """
    each = LANES // heads

    @intrinsic
    def scores_of(typing, k, queries, row, next_key, n, out, ahead):
        kind = simd.kind_of(k.dtype)

        def generate(context, builder, signature, arguments):
            _page_scores(builder, arguments[1:], kind, each)
            return context.get_dummy_value()

        return types.void(k, *[types.int64] * 6), generate

    return scores_of


def _page_scores(builder, arguments, kind, each):
    queries, row, next_key, n, out, *further = arguments
    item_bytes = 4 if kind is Bfloat16Pairs else kind.w_bytes
    lines = max(1, each * item_bytes * LANES // 64)
    keys = _addresses(builder, row, next_key)
    sums = [cgutils.alloca_once_value(builder, simd.ZERO) for _ in keys]

    def turn(number, count):
        at = builder.add(queries, builder.mul(number, I64(64)))
        of_heads = [
            simd.load(builder, builder.add(at, I64(64 * u)), FLOAT, LANES) for u in range(count)
        ]
        fetched = [(start, 64 * line) for line in range(count * lines) for start in further]
        offset = builder.mul(number, I64(each * item_bytes))
        fetched_offset = builder.mul(number, I64(64 * lines))

        # One key after the other: the same items of several would be in the same bank of the cache.
        for j, ((key, further_on), total) in enumerate(zip(keys, sums, strict=True)):
            for start, by in fetched[j::LANES]:
                address = builder.add(builder.add(start, fetched_offset), I64(by))
                simd.prefetch(builder, address, 3)
            at, value = builder.add(builder.add(key, offset), further_on), builder.load(total)
            for u, query in enumerate(of_heads):
                item = builder.add(at, I64(each * item_bytes * u))
                value = _add_items(builder, kind, value, query, item, each)
            builder.store(value, total)

    turns = builder.sdiv(n, I64(each))
    whole = builder.mul(builder.sdiv(turns, I64(_UNROLL)), I64(_UNROLL))
    with cgutils.for_range_slice(builder, I64(0), whole, I64(_UNROLL), I64) as (number, _):
        turn(number, _UNROLL)
    with cgutils.for_range_slice(builder, whole, turns, I64(1), I64) as (number, _):
        turn(number, 1)

    # The lanes of each head are summed, of as many keys at a time as fill a vector.
    totals = [builder.load(total) for total in sums]
    for i in range(0, LANES, each):
        vectors, width = totals[i : i + each], each
        while len(vectors) > 1:
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [simd.folded(builder, a, b, LANES, width) for a, b in pairs]
            width //= 2
        simd.store(builder, vectors[0], builder.add(out, I64(4 * LANES * (i // each))))


@intrinsic
def deal_lanes(typing, rows, next_row, n_rows, n, lanes, out):
    """Rows of n items of 4 bytes as `page_scores` takes queries, for `lanes` heads; zeros behind.

    rows and out are addresses, next_row a stride in bytes; n a multiple of 16 / lanes, lanes 1, 2,
    4 or 8.
    """

    def generate(context, builder, signature, arguments):
        rows, next_row, n_rows, n, lanes, out = arguments
        each = builder.sdiv(I64(LANES), lanes)
        with cgutils.for_range_slice(builder, I64(0), lanes, I64(1), I64) as (c, _):
            exists = builder.icmp_signed("<", c, n_rows)
            row = builder.add(rows, builder.mul(next_row, builder.select(exists, c, I64(0))))
            to = builder.add(out, builder.mul(builder.mul(c, each), I64(4)))
            with cgutils.for_range_slice(builder, I64(0), n, I64(2), I64) as (i, _):
                within = builder.and_(i, builder.sub(each, I64(1)))
                turn = builder.mul(builder.sub(i, within), lanes)
                word = builder.inttoptr(builder.add(row, builder.mul(i, I64(4))), I64.as_pointer())
                held = builder.select(exists, builder.load(word, align=4), I64(0))
                at = builder.add(to, builder.mul(builder.add(turn, within), I64(4)))
                simd.store(builder, held, at)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


@intrinsic
def fetch(typing, address, n_bytes):
    """Have the cache fetch some bytes from an address on, which need not be valid."""

    def generate(context, builder, signature, arguments):
        address, n_bytes = arguments
        with cgutils.for_range_slice(builder, I64(0), n_bytes, I64(64), I64) as (at, _):
            simd.prefetch(builder, builder.add(address, at), 3)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def _addresses(builder, row, next_key):
    """Addresses of 16 keys as two numbers each, which few registers hold.

    LLVM is kept from seeing how they follow from each other: it would compute each from the last.
    """
    kind = ir.FunctionType(I64, (I64,))

    def hidden(number):
        return builder.call(ir.InlineAsm(kind, "", "=r,0"), (number,))

    starts = [hidden(builder.add(row, builder.mul(next_key, I64(j)))) for j in range(0, LANES, 4)]
    twice, thrice = builder.shl(next_key, I64(1)), hidden(builder.mul(next_key, I64(3)))
    return [(start, by) for start in starts for by in (I64(0), next_key, twice, thrice)]


def _add_items(builder, kind, total, query, address, each):
    """total + query · the `each` items at an address, which are given to all heads."""
    repeated = [i % each for i in range(LANES)]
    if kind is Bfloat16Pairs:
        words = simd.load(builder, address, I32, each)
        words = builder.bitcast(simd.shuffled(builder, words, words, repeated), PAIRS)
        return kind.add_product(builder, total, builder.bitcast(query, PAIRS), words)
    numbers = _widened(builder, kind, address, each)
    return simd.fma(builder, query, simd.shuffled(builder, numbers, numbers, repeated), total)


def _widened(builder, kind, address, lanes):
    """Numbers at an address as float32."""
    if kind is simd.Float32:
        return simd.load(builder, address, FLOAT, lanes)
    bits = simd.load(builder, address, I16, lanes)
    if kind is simd.Float16:
        half = builder.bitcast(bits, ir.VectorType(ir.HalfType(), lanes))
        return builder.fpext(half, ir.VectorType(FLOAT, lanes))
    return simd.widen_bfloat16(builder, bits)


def soften(heads):
    """Intrinsic (k, scores, n, scale, state): scores (n, heads) float32 become weights, in place.

    k is an array, for its type alone. scores and state are addresses; n a multiple of 32. The
    weights are relative to the largest score so far; where items are multiplied in pairs they are
    bfloat16, (n / 2, heads, 2), in the first half of the memory. `state` is three vectors, each
    with the heads in turn, again and again: the largest score so far, times log2 e; the
    sum of all weights, in parts; and what sums of before are to be multiplied by, which is written.
    """

    @intrinsic
    def soften_of(typing, k, scores, n, scale, state):
        paired = simd.kind_of(k.dtype) is Bfloat16Pairs

        def generate(context, builder, signature, arguments):
            _soften(builder, arguments[1:], heads, paired)
            return context.get_dummy_value()

        return types.void(k, types.int64, types.int64, types.float32, types.int64), generate

    return soften_of


def _soften(builder, arguments, heads, paired):
    scores, n, scale, state = arguments
    stop = builder.mul(n, I64(4 * heads))
    factor = simd.splat(builder, builder.fmul(scale, ir.Constant(FLOAT, _LOG2_E)), LANES)
    m_at, total_at, correction_at = (builder.add(state, I64(64 * i)) for i in range(3))

    # The largest score of each head, and of those before.
    held = [cgutils.alloca_once_value(builder, _LOWEST) for _ in range(2)]
    with cgutils.for_range_slice(builder, I64(0), stop, I64(128), I64) as (at, _):
        for i, largest in enumerate(held):
            place = builder.add(builder.add(scores, at), I64(64 * i))
            values = simd.load(builder, place, FLOAT, LANES)
            builder.store(_larger(builder, values, builder.load(largest)), largest)
    largest = _larger(builder, *(builder.load(part) for part in held))
    shift = heads
    while shift < LANES:
        turned = simd.shuffled(
            builder, largest, largest, [(i + shift) % LANES for i in range(LANES)]
        )
        largest, shift = _larger(builder, largest, turned), 2 * shift
    before = simd.load(builder, m_at, FLOAT, LANES)
    m = _larger(builder, builder.fmul(largest, factor), before)
    correction = _power_of_two(builder, builder.fsub(before, m), half=False)
    simd.store(builder, m, m_at)
    simd.store(builder, correction, correction_at)

    # Weights relative to it, two vectors at a time, and their sum.
    above, total = builder.fneg(m), simd.load(builder, total_at, FLOAT, LANES)
    sums = [cgutils.alloca_once_value(builder, simd.ZERO) for _ in range(2)]
    with cgutils.for_range_slice(builder, I64(0), stop, I64(128), I64) as (at, _):
        weights = []
        for i, part in enumerate(sums):
            place = builder.add(builder.add(scores, at), I64(64 * i))
            values = simd.load(builder, place, FLOAT, LANES)
            values = simd.fma(builder, values, factor, above)
            values = _power_of_two(builder, values, paired)
            builder.store(builder.fadd(builder.load(part), values), part)
            weights.append(values)
        if paired:
            halves = [simd.as_bfloat16(builder, values) for values in weights]
            order = [
                (2 * pair + odd) * heads + head
                for pair in range(LANES // heads)
                for head in range(heads)
                for odd in range(2)
            ]
            pairs = simd.shuffled(builder, *halves, order)
            simd.store(builder, pairs, builder.add(scores, builder.lshr(at, I64(1))))
        else:
            for i, values in enumerate(weights):
                place = builder.add(builder.add(scores, at), I64(64 * i))
                simd.store(builder, values, place)
    found = builder.fadd(*(builder.load(part) for part in sums))
    simd.store(builder, simd.fma(builder, total, correction, found), total_at)


def weigh(heads, vectors):
    """Intrinsic (v, p, next_p, n, row, next_key, o, next_o, ahead): a tile of o += p · v.

    v is an array, for its type alone. The rest are addresses and strides in bytes: p the weights
    as `soften` leaves them, from some head on, next_p from one key (or pair of keys) to the next;
    row the first of n keys' values; o (heads, 16 · vectors) float32. Meanwhile the cache fetches as
    many bytes as are read here from `ahead` on, which need not be valid.
    """

    @intrinsic
    def weigh_of(typing, v, p, next_p, n, row, next_key, o, next_o, ahead):
        kind = simd.kind_of(v.dtype)

        def generate(context, builder, signature, arguments):
            weigh_by = _weigh_pairs if kind is Bfloat16Pairs else _weigh_numbers
            weigh_by(builder, arguments[1:], kind, heads, vectors)
            return context.get_dummy_value()

        return types.void(v, *[types.int64] * 8), generate

    return weigh_of


def _weigh_numbers(builder, arguments, kind, heads, vectors):
    p, next_p, n, row, next_key, o, next_o, ahead = arguments
    places = [
        [builder.add(builder.add(o, builder.mul(next_o, I64(c))), I64(64 * u))
         for u in range(vectors)]
        for c in range(heads)
    ]  # fmt: skip
    sums = [
        [cgutils.alloca_once_value(builder, simd.load(builder, at, FLOAT, LANES)) for at in row_]
        for row_ in places
    ]
    with cgutils.for_range_slice(builder, I64(0), n, I64(1), I64) as (j, _):
        start = builder.add(row, builder.mul(next_key, j))
        values = [
            _widened(builder, kind, builder.add(start, I64(LANES * kind.w_bytes * u)), LANES)
            for u in range(vectors)
        ]
        _fetch_further(builder, ahead, j, vectors * LANES * kind.w_bytes)
        at = builder.add(p, builder.mul(next_p, j))
        for c in range(heads):
            weight = simd.splat_at(builder, builder.add(at, I64(4 * c)), FLOAT)
            for value, total in zip(values, sums[c], strict=True):
                builder.store(simd.fma(builder, weight, value, builder.load(total)), total)
    for c, u in itertools.product(range(heads), range(vectors)):
        simd.store(builder, builder.load(sums[c][u]), places[c][u])


def _fetch_further(builder, ahead, turn, n_bytes):
    """Fetch from `ahead` on what a turn of a loop stands for that reads n_bytes in each."""
    lines = max(1, n_bytes // 64)
    start = builder.add(ahead, builder.mul(turn, I64(64 * lines)))
    for line in range(lines):
        simd.prefetch(builder, builder.add(start, I64(64 * line)), 3)


def _weigh_pairs(builder, arguments, kind, heads, vectors):
    p, next_p, n, row, next_key, o, next_o, ahead = arguments
    width = min(2, vectors)  # vectors of numbers that one row's load of 16-bit items becomes
    outs = [builder.add(o, builder.mul(next_o, I64(c))) for c in range(heads)]
    blocks = range(0, vectors, width)
    sums = [[] for _ in outs]
    for out, of_head in zip(outs, sums, strict=True):
        for u in blocks:
            natural = [
                simd.load(builder, builder.add(out, I64(64 * (u + i))), FLOAT, LANES)
                for i in range(width)
            ]
            for vector in _reordered(builder, natural, _TO_PAIRS):
                of_head.append(cgutils.alloca_once_value(builder, vector))
    n_pairs = builder.sdiv(builder.add(n, I64(1)), I64(2))
    with cgutils.for_range_slice(builder, I64(0), n_pairs, I64(1), I64) as (j, _):
        # The last key of an odd number stands for the one behind it, whose weight is 0.
        key = builder.mul(j, I64(2))
        first = builder.add(row, builder.mul(next_key, key))
        another = builder.icmp_signed("<", builder.add(key, I64(1)), n)
        second = builder.add(first, builder.select(another, next_key, I64(0)))
        columns = []
        for u in blocks:
            a, b = (
                simd.load(builder, builder.add(at, I64(2 * LANES * u)), I16, LANES * width)
                for at in (first, second)
            )
            columns += [builder.bitcast(x, PAIRS) for x in _interleaved(builder, a, b)]
        _fetch_further(builder, ahead, j, vectors * LANES * 4)
        at = builder.add(p, builder.mul(next_p, j))
        for c, of_head in enumerate(sums):
            word = simd.splat_at(builder, builder.add(at, I64(4 * c)), I32)
            pair = builder.bitcast(word, PAIRS)
            for column, total in zip(columns, of_head, strict=True):
                found = kind.add_product(builder, builder.load(total), pair, column)
                builder.store(found, total)
    for out, of_head in zip(outs, sums, strict=True):
        for u in blocks:
            vectors_of = [builder.load(total) for total in of_head[u : u + width]]
            for i, vector in enumerate(_reordered(builder, vectors_of, _FROM_PAIRS)):
                simd.store(builder, vector, builder.add(out, I64(64 * (u + i))))


# Two vectors' numbers as `_interleaved` has them, which stays within 128 bits, and back.
_TO_PAIRS = [[8 * (i // 4) + i % 4 + 4 * half for i in range(LANES)] for half in range(2)]
_FROM_PAIRS = [
    [16 * (d % 8 // 4) + 4 * (d // 8) + d % 4 for d in range(16 * half, 16 * half + 16)]
    for half in range(2)
]


def _reordered(builder, vectors, orders):
    if len(vectors) == 1:
        return vectors
    return [simd.shuffled(builder, *vectors, order) for order in orders]


def _interleaved(builder, a, b):
    """Items of a and b in turn: 16 of each as one vector, 32 as two in the order of `_TO_PAIRS`."""
    lanes = a.type.count
    orders = [range(LANES)] if lanes == LANES else _TO_PAIRS
    return [
        simd.shuffled(builder, a, b, [i + lanes * odd for i in o for odd in (0, 1)]) for o in orders
    ]


# ---- what both are made of ----


def _power_of_two(builder, x, half):
    """2^x of numbers that are not above 0, or NaN.

    To 2 units of the last place or, if `half`, so that rounding to bfloat16 is the larger error.
    """

    def number(value):
        return ir.Constant(VECTOR, [float(np.float32(value))] * LANES)

    def call(name, kinds, *operands):
        kind = ir.FunctionType(VECTOR, kinds)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), operands)

    if not features.has("avx512f"):
        return simd.exponential(builder, builder.fmul(x, number(math.log(2))))

    # x = n + r: 2^r by its Taylor series, times 2^n.
    x = _larger(builder, number(_LEAST), x)
    n = call("llvm.rint.v16f32", (VECTOR,), x)
    r, power = builder.fsub(x, n), 5 if half else 7
    terms = [number(math.log(2) ** i / math.factorial(i)) for i in range(power + 1)]
    series = terms[power]
    for term in reversed(terms[:power]):
        series = simd.fma(builder, series, r, term)
    name, present_rounding = "llvm.x86.avx512.mask.scalef.ps.512", I32(4)
    kinds = (VECTOR, VECTOR, VECTOR, I16, I32)
    return call(name, kinds, series, n, simd.ZERO, ir.Constant(I16, -1), present_rounding)


def _larger(builder, a, b):
    """The larger of each two numbers; that of b if either is NaN."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)
