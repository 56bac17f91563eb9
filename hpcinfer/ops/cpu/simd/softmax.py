"""Vector code of the softmax in attention: weights of scores, relative to the largest so far.

Scores of many queries lie in rows, one after the other (`largest_of`, `weights_of`); those of one
query have its heads side by side (`soften`).
"""

import functools
import math

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hpcinfer.ops.cpu.runtime import features
from hpcinfer.ops.cpu.simd.vectors import (
    FLOAT,
    I16,
    I32,
    I64,
    LANES,
    VECTOR,
    ZERO,
    Bfloat16Pairs,
    addresses,
    as_bfloat16,
    call,
    cases,
    constant,
    exponential,
    fma,
    horizontal_sum,
    kind_of,
    lane_mask,
    larger,
    load,
    shuffled,
    splat,
    store,
)

HEADS = 1, 2, 4, 8  # that stand side by side in the lanes

_LOWEST = constant(float("-inf"))
_UNROLL = 4  # vectors in a turn of a loop over a row
_LEAST = -150  # 2 to the power of less is no float32
_LOG2_E = 1 / math.log(2)


# ---- rows of scores ----


@intrinsic
def weights_of(typing, row, n, scale, largest, out):
    """out = e^(row · scale - largest) as bfloat16, and the sum of them all.

    row is the address of n numbers, float32, of which none exceeds `largest` when scaled; out that
    of as many of 16 bits.
    """

    def generate(context, builder, signature, arguments):
        row, n, scale, largest, out = arguments
        log2_e = ir.Constant(FLOAT, _LOG2_E)
        factor = splat(builder, builder.fmul(scale, log2_e), LANES)
        above = splat(builder, builder.fneg(builder.fmul(largest, log2_e)), LANES)

        # Sum in several vectors, so that none waits for the one before.
        totals = [cgutils.alloca_once_value(builder, ZERO) for _ in range(_UNROLL)]

        def turn(total, address, mask):
            scores = load(builder, address, FLOAT, LANES, mask)
            scores = fma(builder, scores, factor, above)
            weights = power_of_two(builder, scores, half=True)
            if mask is not None:
                weights = builder.select(mask, weights, ZERO)
            builder.store(builder.fadd(builder.load(total), weights), total)
            offset = builder.lshr(builder.sub(address, row), I64(1))
            half = as_bfloat16(builder, weights)
            store(builder, half, builder.add(out, offset), mask)

        _over_row(builder, row, n, totals, turn)
        total = functools.reduce(builder.fadd, map(builder.load, totals))
        return horizontal_sum(builder, total)

    numbers = types.int64, types.int64, types.float32, types.float32, types.int64
    return types.float32(*numbers), generate


@intrinsic
def largest_of(typing, row, n):
    """The largest of n float32 numbers from an address on; -inf if there is none, NaN passed by."""

    def generate(context, builder, signature, arguments):
        row, n = arguments
        held = [cgutils.alloca_once_value(builder, _LOWEST) for _ in range(_UNROLL)]

        def turn(largest, address, mask):
            values = load(builder, address, FLOAT, LANES, mask)
            if mask is not None:
                values = builder.select(mask, values, _LOWEST)
            builder.store(larger(builder, values, builder.load(largest)), largest)

        # Compare vector by vector, then the vectors, then the lanes.
        _over_row(builder, row, n, held, turn)
        largest = functools.reduce(functools.partial(larger, builder), map(builder.load, held))
        return call(builder, f"llvm.vector.reduce.fmax.v{LANES}f32", FLOAT, largest)

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

    # Several at a time, then one, then what is left behind a mask.
    with cgutils.for_range_slice(builder, I64(0), whole, I64(several), I64) as (i, _):
        for u, part in enumerate(held):
            turn(part, address(i, u), None)
    with cgutils.for_range_slice(builder, whole, single, I64(LANES), I64) as (i, _):
        turn(held[0], address(i), None)
    left = builder.sub(n, single)
    with builder.if_then(builder.icmp_signed(">", left, I64(0)), likely=False):
        turn(held[-1], address(single), lane_mask(builder, left, LANES))


# ---- scores with the heads side by side ----


@intrinsic
def soften(typing, heads, k, scores, n, scale, state):
    """Scores (n, heads) float32 become weights, in place.

    heads is one of `HEADS`; k an array, for its type alone; scores and state are addresses; n a
    multiple of 32. The weights are relative to the largest score so far; where items are multiplied
    in pairs they are bfloat16, (n / 2, heads, 2), in the first half of the memory. `state` is three
    vectors, each with the heads in turn, again and again: the largest score so far, times log2 e;
    the sum of all weights, in parts; and what sums of before are to be multiplied by, which is
    written.
    """
    paired = kind_of(k.dtype) is Bfloat16Pairs

    def generate(context, builder, signature, arguments):
        heads, _, scores, n, scale, state = arguments
        factor = splat(builder, builder.fmul(scale, ir.Constant(FLOAT, _LOG2_E)), LANES)
        for count in cases(builder, heads, HEADS):
            stop = builder.mul(n, I64(4 * count))
            m = _update_largest(builder, scores, stop, factor, state, count)
            _write_weights(builder, scores, stop, factor, m, state, count, paired)
        return context.get_dummy_value()

    word = types.int64
    return types.void(word, k, word, word, types.float32, word), generate


def _update_largest(builder, scores, stop, factor, state, heads):
    """Largest score of each head so far, scaled; it goes to the state, as the correction does."""
    # Find the largest of the lanes, two vectors of scores at a time.
    held = [cgutils.alloca_once_value(builder, _LOWEST) for _ in range(2)]
    with cgutils.for_range_slice(builder, I64(0), stop, I64(128), I64) as (at, _):
        for largest, place in zip(held, _two_vectors(builder, scores, at), strict=True):
            values = load(builder, place, FLOAT, LANES)
            builder.store(larger(builder, values, builder.load(largest)), largest)

    # Exchange it between the lanes of each head.
    largest, shift = larger(builder, *map(builder.load, held)), heads
    while shift < LANES:
        order = [(i + shift) % LANES for i in range(LANES)]
        turned = shuffled(builder, largest, largest, order)
        largest, shift = larger(builder, largest, turned), 2 * shift

    # Compare it with those of before.
    m_at, _, correction_at = addresses(builder, state, I64(64), 3)
    before = load(builder, m_at, FLOAT, LANES)
    m = larger(builder, builder.fmul(largest, factor), before)
    store(builder, m, m_at)
    store(builder, power_of_two(builder, builder.fsub(before, m), half=False), correction_at)
    return m


def _write_weights(builder, scores, stop, factor, m, state, heads, paired):
    """Weights relative to m in place of the scores; their sum is added to that of the state."""
    _, total_at, correction_at = addresses(builder, state, I64(64), 3)
    above, sums = builder.fneg(m), [cgutils.alloca_once_value(builder, ZERO) for _ in range(2)]
    with cgutils.for_range_slice(builder, I64(0), stop, I64(128), I64) as (at, _):
        places, weights = _two_vectors(builder, scores, at), []
        for place, part in zip(places, sums, strict=True):
            values = fma(builder, load(builder, place, FLOAT, LANES), factor, above)
            values = power_of_two(builder, values, paired)
            builder.store(builder.fadd(builder.load(part), values), part)
            weights.append(values)

        # Store them, pairs of keys side by side where they are multiplied so.
        if paired:
            pairs = _paired(builder, weights, heads)
            store(builder, pairs, builder.add(scores, builder.lshr(at, I64(1))))
        else:
            for place, values in zip(places, weights, strict=True):
                store(builder, values, place)

    # Correct the sum of before, and add theirs.
    found = builder.fadd(*map(builder.load, sums))
    total, correction = (load(builder, at, FLOAT, LANES) for at in (total_at, correction_at))
    store(builder, fma(builder, total, correction, found), total_at)


def _two_vectors(builder, start, offset):
    """Addresses of the two vectors that lie `offset` bytes behind an address."""
    return addresses(builder, builder.add(start, offset), I64(64), 2)


def _paired(builder, weights, heads):
    """Two vectors of weights (keys, heads) as bfloat16: two keys of a head side by side."""
    order = [
        (2 * pair + odd) * heads + head
        for pair in range(LANES // heads)
        for head in range(heads)
        for odd in range(2)
    ]
    return shuffled(builder, *(as_bfloat16(builder, values) for values in weights), order)


# ---- what both are made of ----


def power_of_two(builder, x, half):
    """2^x of numbers that are not above 0, or NaN.

    To 2 units of the last place or, if `half`, so that rounding to bfloat16 is the larger error.
    """
    if not features.has("avx512f"):
        return exponential(builder, builder.fmul(x, constant(math.log(2))))

    # Split x = n + r, and sum the Taylor series of 2^r.
    x = larger(builder, constant(_LEAST), x)
    n = call(builder, f"llvm.rint.v{LANES}f32", VECTOR, x)
    r, power = builder.fsub(x, n), 5 if half else 7
    terms = [constant(math.log(2) ** i / math.factorial(i)) for i in range(power + 1)]
    series = terms[power]
    for term in reversed(terms[:power]):
        series = fma(builder, series, r, term)

    # Multiply it by 2^n.
    name, all_lanes, present_rounding = "llvm.x86.avx512.mask.scalef.ps.512", I16(-1), I32(4)
    return call(builder, name, VECTOR, series, n, ZERO, all_lanes, present_rounding)
