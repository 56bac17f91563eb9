"""Vector code for Numba: dot products of a few rows of x with a few rows of a weight at a time.

`tiles` makes an intrinsic for some sizes of tile. Its body is a loop over the inner axis that keeps
all rows x columns sums in registers, so that each weight is loaded once for all rows of x, and each
x once for all rows of the weight. What a processor lacks, LLVM replaces; the product of pairs alone
is an instruction that must be there (AVX-512 BF16).
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

FLOAT, I16, I32, I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
LANES = 16  # float32 numbers of a vector of 512 bits
VECTOR = ir.VectorType(FLOAT, LANES)
ZERO = ir.Constant(VECTOR, None)


class _Bfloat(ir.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    intrinsic_name = "bf16"

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _Bfloat)

    def __hash__(self):
        return hash("bfloat")


PAIRS = ir.VectorType(_Bfloat(), 2 * LANES)


class Bfloat16Pairs:
    """x and w bfloat16; two products are summed into each lane by one instruction (vdpbf16ps)."""

    step, x_bytes, w_bytes = 2 * LANES, 2, 2

    @staticmethod
    def load_x(builder, address, mask):
        return builder.bitcast(load(builder, address, I16, 2 * LANES, mask), PAIRS)

    load_w = load_x

    @staticmethod
    def add_product(builder, total, x, w):
        return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", VECTOR, total, w, x)


class _Widened:
    """x float32; w widened to float32 in registers."""

    step, x_bytes = LANES, 4

    @staticmethod
    def load_x(builder, address, mask):
        return load(builder, address, FLOAT, LANES, mask)

    @staticmethod
    def add_product(builder, total, x, w):
        return fma(builder, x, w, total)


class Bfloat16(_Widened):
    """w bfloat16: the upper half of a float32."""

    w_bytes = 2

    @staticmethod
    def load_w(builder, address, mask):
        return widen_bfloat16(builder, load(builder, address, I16, LANES, mask))


class Float16(_Widened):
    """w float16."""

    w_bytes = 2

    @staticmethod
    def load_w(builder, address, mask):
        half = builder.bitcast(
            load(builder, address, I16, LANES, mask), ir.VectorType(ir.HalfType(), LANES)
        )
        return builder.fpext(half, VECTOR)


class Float32(_Widened):
    """w float32."""

    w_bytes = 4
    load_w = _Widened.load_x


def kind_of(dtype):
    """How weights of a Numba type are multiplied: uint16 bfloat16's bits, int16 float16's."""
    if dtype == types.uint16:
        return Bfloat16Pairs if features.has("avx512_bf16") else Bfloat16
    return Float16 if dtype == types.int16 else Float32


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
    x, x_stride, w, w_stride, n, y, y_stride, bias = arguments
    sums = [sums_from_zero(builder, columns, unroll) for _ in range(rows)]
    w_rows, x_rows = addresses(builder, w, w_stride, rows), addresses(builder, x, x_stride, columns)

    def turn(k, count, mask):
        for u in range(count):
            at = builder.add(k, I64(u * kind.step))
            xs = [_at(kind.load_x, builder, a, at, kind.x_bytes, mask) for a in x_rows]
            for r in range(rows):
                if ahead or lead:
                    distance = builder.add(builder.mul(w_stride, I64(ahead)), I64(lead))
                    further = builder.add(w_rows[r], distance)
                    prefetch(builder, builder.add(further, builder.mul(at, I64(kind.w_bytes))), 0)
                w_vector = _at(kind.load_w, builder, w_rows[r], at, kind.w_bytes, mask)
                for c in range(columns):
                    total = sums[r][c][u]
                    builder.store(
                        kind.add_product(builder, builder.load(total), xs[c], w_vector), total
                    )

    # Whole turns, then single vectors, then what is left behind a mask.
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

    y_rows = addresses(builder, y, y_stride, columns)
    for c, r in itertools.product(range(columns), range(rows)):
        total = functools.reduce(builder.fadd, map(builder.load, sums[r][c]))
        store(builder, horizontal_sum(builder, total), builder.add(y_rows[c], I64(4 * r)))
    with builder.if_then(builder.icmp_signed("!=", bias, I64(0)), likely=False):
        for r, c in itertools.product(range(rows), range(columns)):
            b = number_at(builder, builder.add(bias, I64(4 * r)))
            place = builder.add(y_rows[c], I64(4 * r))
            store(builder, builder.fadd(number_at(builder, place), b), place)


def _at(load, builder, start, k, item_bytes, mask):
    return load(builder, builder.add(start, builder.mul(k, I64(item_bytes))), mask)


# ---- what vector code is made of ----


def call(builder, name, kind, *operands):
    """The result, of some type, of an LLVM intrinsic."""
    kind = ir.FunctionType(kind, [operand.type for operand in operands])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, operands)


def cases(builder, number, values):
    """Each of the values in turn; what is built until the next one runs if `number` is this one."""
    end = builder.append_basic_block("cases.end")
    switch = builder.switch(number, end)
    for value in values:
        block = builder.append_basic_block(f"cases.{value}")
        switch.add_case(I64(value), block)
        builder.position_at_end(block)
        yield value
        builder.branch(end)
    builder.position_at_end(end)


def sums_from_zero(builder, rows, columns):
    """Places in memory of sums that begin as vectors of zeros: [row][column]."""
    sums = [[cgutils.alloca_once(builder, VECTOR) for _ in range(columns)] for _ in range(rows)]
    for total in itertools.chain(*sums):
        builder.store(ZERO, total)
    return sums


def addresses(builder, start, stride, n):
    """Addresses of n rows that lie `stride` bytes apart."""
    return [builder.add(start, builder.mul(stride, I64(i))) for i in range(n)]


def number_at(builder, address, item=FLOAT):
    """A number from an address."""
    return builder.load(builder.inttoptr(address, item.as_pointer()), align=4)


def splat_at(builder, address, item):
    """A vector of one number from an address."""
    return splat(builder, number_at(builder, address, item), LANES)


def load(builder, address, item, lanes, mask=None):
    """A vector from an address, unaligned; zeros where the mask is off."""
    kind = ir.VectorType(item, lanes)
    pointer = builder.inttoptr(address, kind.as_pointer())
    if mask is None:
        return builder.load(pointer, align=1)
    name = f"llvm.masked.load.{_suffix(kind)}.p0"
    return call(builder, name, kind, pointer, I32(1), mask, ir.Constant(kind, None))


def store(builder, value, address, mask=None):
    """Write a number or vector to an address, unaligned; nothing where the mask is off."""
    pointer = builder.inttoptr(address, value.type.as_pointer())
    if mask is None:
        builder.store(value, pointer, align=1)
        return
    name = f"llvm.masked.store.{_suffix(value.type)}.p0"
    call(builder, name, ir.VoidType(), value, pointer, I32(1), mask)


def _suffix(kind):
    """A type of vectors in the names of LLVM's intrinsics."""
    return f"v{kind.count}" + ("f32" if kind.element == FLOAT else f"i{kind.element.width}")


def prefetch(builder, address, locality):
    """Fetch a line that will be read.

    Into all caches with locality 3; with 2 into the second, as the first takes few at a time; what
    is read once past the second, which keeps what it has, with 0.
    """
    pointer = builder.inttoptr(address, ir.IntType(8).as_pointer())
    read, data = I32(0), I32(1)
    call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, read, I32(locality), data)


def lane_mask(builder, n, lanes):
    """Mask of the first n lanes."""
    kind = ir.VectorType(I32, lanes)
    numbers = ir.Constant(kind, list(range(lanes)))
    return builder.icmp_unsigned("<", numbers, splat(builder, builder.trunc(n, I32), lanes))


def splat(builder, value, lanes):
    """A vector of one value."""
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    one = builder.insert_element(undefined, value, I32(0))
    return shuffled(builder, one, undefined, [0] * lanes)


def shuffled(builder, a, b, order):
    """Lanes of a and b by their numbers, those of b following those of a."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(order)), list(order)))


def transposed(builder, rows):
    """16 vectors of 16 words as 16 others, row i of which has word i of each."""
    width = 1
    while width < LANES:
        # Exchange the off-diagonal blocks of `width` words of each pair of rows.
        first = [i if not i & width else LANES + i - width for i in range(LANES)]
        second = [i + width if not i & width else LANES + i for i in range(LANES)]
        changed = list(rows)
        for i in range(LANES):
            if not i & width:
                a, b = rows[i], rows[i + width]
                changed[i] = shuffled(builder, a, b, first)
                changed[i + width] = shuffled(builder, a, b, second)
        rows, width = changed, 2 * width
    return rows


def fma(builder, a, b, c):
    """a · b + c, rounded once."""
    return call(builder, f"llvm.fma.{_suffix(a.type)}", a.type, a, b, c)


def widen_bfloat16(builder, bits):
    """bfloat16 (as i16) to float32."""
    lanes = bits.type.count
    wide = builder.zext(bits, ir.VectorType(I32, lanes))
    return builder.bitcast(
        builder.shl(wide, ir.Constant(wide.type, [16] * lanes)), ir.VectorType(FLOAT, lanes)
    )


def horizontal_sum(builder, vector):
    """Sum of the lanes, by halves."""
    lanes = vector.type.count
    while lanes > 1:
        lanes //= 2
        low, high = (
            shuffled(builder, vector, vector, range(start, start + lanes)) for start in (0, lanes)
        )
        vector = builder.fadd(low, high)
    return builder.extract_element(vector, I32(0))


def sums_of_lanes(builder, vectors):
    """The sum of each of 2, 4, 8 or 16 vectors, as one vector; halves are added, two at a time."""
    lanes, width = LANES, LANES
    while len(vectors) > 1:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors, width = [folded(builder, a, b, lanes, width) for a, b in pairs], width // 2
    total = vectors[0]
    while width > 1:
        undefined = ir.Constant(total.type, ir.Undefined)
        total = folded(builder, total, undefined, lanes, width, lanes // 2)
        lanes, width = lanes // 2, width // 2
    return total


def folded(builder, a, b, lanes, width, n=None):
    """Of each run of `width` lanes of a, then of b, its halves added; the first `n` lanes of it."""
    first = [run + i for run in range(0, 2 * lanes, width) for i in range(width // 2)][:n]
    low, high = (shuffled(builder, a, b, [i + by for i in first]) for by in (0, width // 2))
    return builder.fadd(low, high)


# ---- scalars, which LLVM turns into vectors where a loop allows it ----


@intrinsic
def bits_of(typing, x):
    """The bits of a float32 as uint32."""
    return types.uint32(types.float32), lambda c, b, s, a: b.bitcast(a[0], I32)


@intrinsic
def float_of(typing, bits):
    """The float32 of 32 bits."""
    return types.float32(types.uint32), lambda c, b, s, a: b.bitcast(a[0], FLOAT)


@intrinsic
def exp(typing, x):
    """e^x as `exponential` has it."""
    return types.float32(types.float32), lambda c, b, s, a: exponential(b, a[0])


def exponential(builder, x):
    """e^x to 2 units of the last place, float32; 0 below -87, and no more than e^88.

    x = n ln 2 + r with |r| <= ln 2 / 2; e^r by its Taylor series to the seventh power, 2^n by
    the exponent's bits.
    """
    lanes = x.type.count if isinstance(x.type, ir.VectorType) else 0
    suffix = f"v{lanes}f32" if lanes else "f32"
    whole = ir.VectorType(I32, lanes) if lanes else I32

    def called(name, *operands):
        return call(builder, f"llvm.{name}.{suffix}", x.type, *operands)

    def number(value):
        value = float(np.float32(value))
        return ir.Constant(x.type, [value] * lanes if lanes else value)

    n = called("rint", builder.fmul(called("minnum", x, number(88)), number(1 / math.log(2))))
    r = called("fma", n, number(-0.693359375), called("minnum", x, number(88)))
    r = called("fma", n, number(2.12194440e-4), r)
    series = number(1 / math.factorial(7))
    for power in range(6, -1, -1):
        series = called("fma", series, r, number(1 / math.factorial(power)))
    shift = ir.Constant(whole, [23] * lanes if lanes else 23)
    exponent = builder.shl(builder.fptosi(called("maxnum", n, number(-127)), whole), shift)
    value = builder.bitcast(builder.add(builder.bitcast(series, whole), exponent), x.type)
    value = builder.select(builder.fcmp_ordered("<", x, number(-87)), number(0), value)
    return builder.select(builder.fcmp_unordered("uno", x, x), x, value)


# ---- passes over a row ----


def gated(builder, twice, g, up):
    """g / (1 + e^-twice(g)) · up, of vectors; `twice` as for `gate`."""

    def number(value):
        return ir.Constant(VECTOR, [float(np.float32(value))] * LANES)

    e = exponential(builder, builder.fneg(twice(builder, number, g)))
    return builder.fmul(builder.fdiv(g, builder.fadd(e, number(1))), up)


def gate(twices):
    """Intrinsic (function, x, y, row, n, out): out = g / (1 + e^-twice(g)) · up of n numbers each.

    row is the address of n numbers g and n numbers up. x and y are arrays, for their types alone:
    what is read and written is bfloat16 where they are uint16, float32 otherwise.

    Parameters
    ----------
    twices : functions (builder, number, g) -> vector, number making a vector of one value; `twice`
        is the one whose place among them is `function`
    """

    @intrinsic
    def gate_of(typing, function, x, y, row, n, out):
        load_x, x_bytes, _ = _AS_FLOAT[x.dtype == types.uint16]
        _, y_bytes, rounded = _AS_FLOAT[y.dtype == types.uint16]

        def generate(context, builder, signature, arguments):
            function, _, _, row, n, out = arguments
            up = builder.add(row, builder.mul(n, I64(x_bytes)))

            def turn(twice, i, mask):
                g = _at(load_x, builder, row, i, x_bytes, mask)
                value = gated(builder, twice, g, _at(load_x, builder, up, i, x_bytes, mask))
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


def as_bfloat16(builder, x):
    """Numbers rounded to bfloat16, nearest even, as i16."""
    if features.has("avx512_bf16"):
        kind, name = ir.VectorType(_Bfloat(), LANES), "llvm.x86.avx512bf16.cvtneps2bf16.512"
        return builder.bitcast(call(builder, name, kind, x), ir.VectorType(I16, LANES))
    kind = ir.VectorType(I32, x.type.count)

    def number(value):
        return ir.Constant(kind, [value] * x.type.count)

    bits = builder.bitcast(x, kind)
    odd = builder.and_(builder.lshr(bits, number(16)), number(1))
    up = builder.add(builder.add(bits, number(0x7FFF)), odd)
    up = builder.select(builder.fcmp_unordered("uno", x, x), number(0x7FC00000), up)
    return builder.trunc(builder.lshr(up, number(16)), ir.VectorType(I16, x.type.count))


# By bfloat16 or float32: how numbers are read as float32, their bytes, how float32 is rounded.
_AS_FLOAT = {
    True: (Bfloat16.load_w, 2, as_bfloat16),
    False: (Float32.load_w, 4, lambda builder, value: value),
}
