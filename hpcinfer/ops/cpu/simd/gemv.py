"""Vector code of a matrix by one vector (BLAS's gemv), or by a few that share what is loaded of it.

`tiles` makes an intrinsic for some sizes of tile. Its body is a loop over the inner axis that keeps
all rows x columns sums in registers, so that each weight is loaded once for all rows of x, and each
x once for all rows of the weight.
"""

import functools
import itertools

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hpcinfer.ops.cpu.simd.vectors import (
    I64,
    addresses,
    cases,
    horizontal_sum,
    item_at,
    kind_of,
    lane_mask,
    number_at,
    prefetch,
    store,
    sums_from_zero,
)


def tiles(rows, most, unroll=1, ahead=0, lead=0):
    """Intrinsic (columns, w, x, x_stride, row, w_stride, n, y, y_stride, bias): y = x · wᵀ + bias.

    Of some rows of w, and of 1 to `most` rows of x, as many as `columns` says. w is an array, for
    its type alone: how it is multiplied is `kind_of` its items. x, row, y and bias are addresses,
    bias 0 for none; strides are bytes; y is float32, rows of x by rows of w.

    Parameters
    ----------
    rows : rows of w
    unroll : vectors of the inner axis in a turn of the loop, each with sums of its own, if there
        are few columns; one with more
    ahead : rows of w further on, the same columns of which are fetched into the cache meanwhile;
        what the processor fetches by itself follows a row to its end and no further
    lead : the same by bytes in place of rows, where rows lie one behind the other
    """

    @intrinsic
    def tiles_of(typing, columns, w, x, x_stride, row, w_stride, n, y, y_stride, bias):
        kind = kind_of(w.dtype)

        def generate(context, builder, signature, arguments):
            for c in cases(builder, arguments[0], range(1, most + 1)):
                turn = unroll if c * unroll <= 8 else 1
                _tile(builder, arguments[2:], kind, rows, c, turn, ahead, lead)
            return context.get_dummy_value()

        return types.void(types.int64, w, *[types.int64] * 8), generate

    return tiles_of


def _tile(builder, arguments, kind, rows, columns, unroll, ahead, lead):
    """One size of tile: sums over the inner axis, then y, then the bias where there is one."""
    x, x_stride, w, w_stride, n, y, y_stride, bias = arguments
    sums = [sums_from_zero(builder, columns, unroll) for _ in range(rows)]
    w_rows, x_rows = addresses(builder, w, w_stride, rows), addresses(builder, x, x_stride, columns)
    distance = None
    if ahead or lead:
        distance = builder.add(builder.mul(w_stride, I64(ahead)), I64(lead))

    # Add whole turns, then single vectors, then what is left behind a mask.
    turn = functools.partial(_add_turn, builder, kind, sums, w_rows, x_rows, distance)
    step = kind.step
    whole = builder.mul(builder.udiv(n, I64(step * unroll)), I64(step * unroll))
    single = builder.mul(builder.udiv(n, I64(step)), I64(step))
    with cgutils.for_range_slice(builder, I64(0), whole, I64(step * unroll), I64) as (k, _):
        turn(k, unroll, None)
    if unroll > 1:
        with cgutils.for_range_slice(builder, whole, single, I64(step), I64) as (k, _):
            turn(k, 1, None)
    left = builder.sub(n, single)
    with builder.if_then(builder.icmp_signed(">", left, I64(0)), likely=False):
        turn(single, 1, lane_mask(builder, left, step))
    _store_sums(builder, sums, addresses(builder, y, y_stride, columns), bias)


def _add_turn(builder, kind, sums, w_rows, x_rows, distance, k, count, mask):
    """Add the products of `count` vectors from item k on, to sums [row of w][row of x][vector]."""
    for u in range(count):
        at = builder.add(k, I64(u * kind.step))
        xs = [item_at(kind.load_x, builder, x, at, kind.x_bytes, mask) for x in x_rows]
        for w_row, of_row in zip(w_rows, sums, strict=True):
            # Fetch what lies further on, for a later turn.
            if distance is not None:
                further = builder.add(w_row, distance)
                prefetch(builder, builder.add(further, builder.mul(at, I64(kind.w_bytes))), 0)

            # Load the weights once for all rows of x.
            w_vector = item_at(kind.load_w, builder, w_row, at, kind.w_bytes, mask)
            for x, totals in zip(xs, of_row, strict=True):
                value = kind.add_product(builder, builder.load(totals[u]), x, w_vector)
                builder.store(value, totals[u])


def _store_sums(builder, sums, y_rows, bias):
    """Write y = the sums of all lanes + bias; an address, 0 for none."""
    rows, columns = range(len(sums)), range(len(y_rows))
    for c, r in itertools.product(columns, rows):
        total = functools.reduce(builder.fadd, map(builder.load, sums[r][c]))
        store(builder, horizontal_sum(builder, total), builder.add(y_rows[c], I64(4 * r)))
    with builder.if_then(builder.icmp_signed("!=", bias, I64(0)), likely=False):
        for r, c in itertools.product(rows, columns):
            b = number_at(builder, builder.add(bias, I64(4 * r)))
            place = builder.add(y_rows[c], I64(4 * r))
            store(builder, builder.fadd(number_at(builder, place), b), place)
