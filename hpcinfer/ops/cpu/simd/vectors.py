"""Vector code for Numba: vectors of LLVM's, how they are loaded and stored, and their arithmetic.

Functions that take a `builder` write instructions where it stands; the intrinsics of the other
files here are made of them. What a processor lacks, LLVM replaces; the product of pairs alone is
an instruction that must be there (AVX-512 BF16).
"""

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
    def load_x(builder, address, mask, lanes=LANES):
        return load(builder, address, FLOAT, lanes, mask)

    @staticmethod
    def add_product(builder, total, x, w):
        return fma(builder, x, w, total)


class Bfloat16(_Widened):
    """w bfloat16: the upper half of a float32."""

    w_bytes = 2

    @staticmethod
    def load_w(builder, address, mask, lanes=LANES):
        return widen_bfloat16(builder, load(builder, address, I16, lanes, mask))


class Float16(_Widened):
    """w float16."""

    w_bytes = 2

    @staticmethod
    def load_w(builder, address, mask, lanes=LANES):
        bits = load(builder, address, I16, lanes, mask)
        half = builder.bitcast(bits, ir.VectorType(ir.HalfType(), lanes))
        return builder.fpext(half, ir.VectorType(FLOAT, lanes))


class Float32(_Widened):
    """w float32."""

    w_bytes = 4
    load_w = _Widened.load_x


def kind_of(dtype):
    """How weights of a Numba type are multiplied: uint16 bfloat16's bits, int16 float16's."""
    if dtype == types.uint16:
        return Bfloat16Pairs if features.has("avx512_bf16") else Bfloat16
    return Float16 if dtype == types.int16 else Float32


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


def vector_addresses(builder, start, stride, rows, vectors):
    """Addresses of the first vectors of rows that lie `stride` bytes apart: [row][vector]."""
    starts = addresses(builder, start, stride, rows)
    return [addresses(builder, row, I64(4 * LANES), vectors) for row in starts]


def number_at(builder, address, item=FLOAT):
    """A number from an address."""
    return builder.load(builder.inttoptr(address, item.as_pointer()), align=4)


def splat_at(builder, address, item):
    """A vector of one number from an address."""
    return splat(builder, number_at(builder, address, item), LANES)


def item_at(load_items, builder, start, i, item_bytes, mask):
    """A vector of a kind's items, from number i of those that begin at an address."""
    return load_items(builder, builder.add(start, builder.mul(i, I64(item_bytes))), mask)


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


# ---- lanes ----


def lane_mask(builder, n, lanes):
    """Mask of the first n lanes."""
    kind = ir.VectorType(I32, lanes)
    numbers = ir.Constant(kind, list(range(lanes)))
    return builder.icmp_unsigned("<", numbers, splat(builder, builder.trunc(n, I32), lanes))


def constant(value):
    """A vector of one float32 that is known now."""
    return ir.Constant(VECTOR, [float(np.float32(value))] * LANES)


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


# ---- numbers ----


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


def larger(builder, a, b):
    """The larger of each two numbers; that of b if either is NaN."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


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

    # Split x.
    n = called("rint", builder.fmul(called("minnum", x, number(88)), number(1 / math.log(2))))
    r = called("fma", n, number(-0.693359375), called("minnum", x, number(88)))
    r = called("fma", n, number(2.12194440e-4), r)

    # Sum the series, and multiply it by 2^n.
    series = number(1 / math.factorial(7))
    for power in range(6, -1, -1):
        series = called("fma", series, r, number(1 / math.factorial(power)))
    shift = ir.Constant(whole, [23] * lanes if lanes else 23)
    exponent = builder.shl(builder.fptosi(called("maxnum", n, number(-127)), whole), shift)
    value = builder.bitcast(builder.add(builder.bitcast(series, whole), exponent), x.type)

    # What is too small is 0, what is no number stays none.
    value = builder.select(builder.fcmp_ordered("<", x, number(-87)), number(0), value)
    return builder.select(builder.fcmp_unordered("uno", x, x), x, value)
