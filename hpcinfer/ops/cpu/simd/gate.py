"""Vector code of the gate of an FFN, by itself or behind a product in registers."""

import functools

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hpcinfer.ops.cpu.simd.vectors import (
    I64,
    LANES,
    Bfloat16,
    Float32,
    as_bfloat16,
    cases,
    constant,
    exponential,
    item_at,
    lane_mask,
    store,
)

# By bfloat16 or float32: how numbers are read as float32, their bytes, how float32 is rounded.
_AS_FLOAT = {
    True: (Bfloat16.load_w, 2, as_bfloat16),
    False: (Float32.load_w, 4, lambda builder, value: value),
}


def gated(builder, twice, g, up):
    """g / (1 + e^-twice(g)) · up, of vectors; `twice` as for `gate`."""
    e = exponential(builder, builder.fneg(twice(builder, g)))
    return builder.fmul(builder.fdiv(g, builder.fadd(e, constant(1))), up)


def gate(twices):
    """Intrinsic (function, x, y, row, n, out): out = g / (1 + e^-twice(g)) · up of n numbers each.

    row is the address of n numbers g and n numbers up. x and y are arrays, for their types alone:
    what is read and written is bfloat16 where they are uint16, float32 otherwise.

    Parameters
    ----------
    twices : functions (builder, g) -> vector; `twice` is the one whose place among them is
        `function`
    """

    @intrinsic
    def gate_of(typing, function, x, y, row, n, out):
        load_x, x_bytes, _ = _AS_FLOAT[x.dtype == types.uint16]
        _, y_bytes, rounded = _AS_FLOAT[y.dtype == types.uint16]

        def generate(context, builder, signature, arguments):
            function, _, _, row, n, out = arguments
            up = builder.add(row, builder.mul(n, I64(x_bytes)))

            # Read a vector of g and of up, and write what the one lets through of the other.
            def turn(twice, i, mask):
                g = item_at(load_x, builder, row, i, x_bytes, mask)
                value = gated(builder, twice, g, item_at(load_x, builder, up, i, x_bytes, mask))
                place = builder.add(out, builder.mul(i, I64(y_bytes)))
                store(builder, rounded(builder, value), place, mask)

            for case in cases(builder, function, range(len(twices))):
                _over_lanes(builder, n, functools.partial(turn, twices[case]))
            return context.get_dummy_value()

        return types.void(types.int64, x, y, *[types.int64] * 3), generate

    return gate_of


def _over_lanes(builder, n, turn):
    """turn(i, mask) for every LANES of n numbers, the last ones behind a mask."""
    whole = builder.mul(builder.udiv(n, I64(LANES)), I64(LANES))
    with cgutils.for_range_slice(builder, I64(0), whole, I64(LANES), I64) as (i, _):
        turn(i, None)
    left = builder.sub(n, whole)
    with builder.if_then(builder.icmp_signed(">", left, I64(0)), likely=False):
        turn(whole, lane_mask(builder, left, LANES))
