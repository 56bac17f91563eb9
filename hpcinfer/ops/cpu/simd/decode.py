"""Vector code of attention of one query: the heads that share keys and values stand in the lanes.

Keys and values are met where they lie in the cache: each is read once and given to all the heads.
Between `page_scores` and `weigh` the scores become weights (`softmax.soften`).
"""

import itertools

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hpcinfer.ops.cpu.simd.softmax import HEADS
from hpcinfer.ops.cpu.simd.vectors import (
    FLOAT,
    I16,
    I32,
    I64,
    LANES,
    PAIRS,
    ZERO,
    Bfloat16Pairs,
    addresses,
    cases,
    fma,
    folded,
    kind_of,
    load,
    prefetch,
    shuffled,
    splat_at,
    store,
    vector_addresses,
)

_UNROLL = 4  # vectors in a turn of the loop over the items of a key


# ---- queries ----


@intrinsic
def deal_lanes(typing, rows, next_row, n_rows, n, lanes, out):
    """Rows of n items of 4 bytes as `page_scores` takes queries, for `lanes` heads; zeros behind.

    rows and out are addresses, next_row a stride in bytes; n a multiple of 16 / lanes, lanes 1, 2,
    4 or 8.
    """

    def generate(context, builder, signature, arguments):
        rows, next_row, n_rows, n, lanes, out = arguments
        each = builder.sdiv(I64(LANES), lanes)

        # Take one row after the other; those behind the last are read as the first, and are zeros.
        with cgutils.for_range_slice(builder, I64(0), lanes, I64(1), I64) as (c, _):
            exists = builder.icmp_signed("<", c, n_rows)
            row = builder.add(rows, builder.mul(next_row, builder.select(exists, c, I64(0))))
            to = builder.add(out, builder.mul(builder.mul(c, each), I64(4)))

            # Move two items at a time, which stay side by side.
            with cgutils.for_range_slice(builder, I64(0), n, I64(2), I64) as (i, _):
                within = builder.and_(i, builder.sub(each, I64(1)))
                turn = builder.mul(builder.sub(i, within), lanes)
                word = builder.inttoptr(builder.add(row, builder.mul(i, I64(4))), I64.as_pointer())
                held = builder.select(exists, builder.load(word, align=4), I64(0))
                at = builder.add(to, builder.mul(builder.add(turn, within), I64(4)))
                store(builder, held, at)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


@intrinsic
def fetch(typing, address, n_bytes):
    """Have the cache fetch some bytes from an address on, which need not be valid."""

    def generate(context, builder, signature, arguments):
        address, n_bytes = arguments
        with cgutils.for_range_slice(builder, I64(0), n_bytes, I64(64), I64) as (at, _):
            prefetch(builder, builder.add(address, at), 3)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


# ---- scores ----


@intrinsic
def page_scores(typing, heads, k, queries, row, next_key, n, out, ahead):
    """Scores of 16 keys for 1, 2, 4 or 8 heads.

    k is an array, for its type alone: how its items are multiplied is `kind_of` it. row is the
    address of the first key, of n items (pairs where they are multiplied so, else numbers), a
    multiple of 16 / heads. queries is the address of rows of 16 lanes, one for each 16 / heads
    items, with those of each head in turn; out becomes (16, heads) float32. Meanwhile the cache
    fetches as many bytes as are read here from `ahead` on, which need not be valid.
    """
    kind = kind_of(k.dtype)

    def generate(context, builder, signature, arguments):
        for count in cases(builder, arguments[0], HEADS):
            _page_scores(builder, arguments[2:], kind, LANES // count)
        return context.get_dummy_value()

    return types.void(types.int64, k, *[types.int64] * 6), generate


def _page_scores(builder, arguments, kind, each):
    """Scores for as many heads as leave `each` lanes to each."""
    queries, row, next_key, n, out, ahead = arguments
    keys = _key_addresses(builder, row, next_key)
    sums = [cgutils.alloca_once_value(builder, ZERO) for _ in keys]

    # Take several rows of the queries at a time, then the last ones.
    turns = builder.sdiv(n, I64(each))
    whole = builder.mul(builder.sdiv(turns, I64(_UNROLL)), I64(_UNROLL))
    with cgutils.for_range_slice(builder, I64(0), whole, I64(_UNROLL), I64) as (number, _):
        _add_turn(builder, kind, sums, keys, queries, ahead, each, number, _UNROLL)
    with cgutils.for_range_slice(builder, whole, turns, I64(1), I64) as (number, _):
        _add_turn(builder, kind, sums, keys, queries, ahead, each, number, 1)

    # Sum the lanes of each head, of as many keys at a time as fill a vector.
    totals = [builder.load(total) for total in sums]
    for i in range(0, LANES, each):
        vectors, width = totals[i : i + each], each
        while len(vectors) > 1:
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [folded(builder, a, b, LANES, width) for a, b in pairs]
            width //= 2
        store(builder, vectors[0], builder.add(out, I64(4 * LANES * (i // each))))


def _add_turn(builder, kind, sums, keys, queries, ahead, each, number, count):
    """Add the products of `count` rows of the queries, from one number on, with the 16 keys."""
    item_bytes = 4 if kind is Bfloat16Pairs else kind.w_bytes
    lines = max(1, each * item_bytes * LANES // 64)
    at = builder.add(queries, builder.mul(number, I64(64)))
    places = addresses(builder, at, I64(64), count)
    of_heads = [load(builder, place, FLOAT, LANES) for place in places]
    offset = builder.mul(number, I64(each * item_bytes))
    fetched_from = builder.add(ahead, builder.mul(number, I64(64 * lines)))
    fetched = addresses(builder, fetched_from, I64(64), count * lines)

    # One key after the other: the same items of several would be in the same bank of the cache.
    for j, ((key, further_on), total) in enumerate(zip(keys, sums, strict=True)):
        for address in fetched[j::LANES]:
            prefetch(builder, address, 3)
        at, value = builder.add(builder.add(key, offset), further_on), builder.load(total)
        for u, query in enumerate(of_heads):
            item = builder.add(at, I64(each * item_bytes * u))
            value = _add_items(builder, kind, value, query, item, each)
        builder.store(value, total)


def _key_addresses(builder, row, next_key):
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
        words = load(builder, address, I32, each)
        words = builder.bitcast(shuffled(builder, words, words, repeated), PAIRS)
        return kind.add_product(builder, total, builder.bitcast(query, PAIRS), words)
    numbers = kind.load_w(builder, address, None, each)
    return fma(builder, query, shuffled(builder, numbers, numbers, repeated), total)


# ---- values ----


def weigh(vectors):
    """Intrinsic (heads, v, p, next_p, n, row, next_key, o, next_o, ahead): a tile of o += p · v.

    heads is 1, 2, 4 or 8; v an array, for its type alone. The rest are addresses and strides in
    bytes: p the weights as `soften` leaves them, from some head on, next_p from one key (or pair of
    keys) to the next; row the first of n keys' values; o (heads, 16 · vectors) float32. Meanwhile
    the cache fetches as many bytes as are read here from `ahead` on, which need not be valid.

    Parameters
    ----------
    vectors : 1 or 2
    """

    @intrinsic
    def weigh_of(typing, heads, v, p, next_p, n, row, next_key, o, next_o, ahead):
        kind = kind_of(v.dtype)
        weigh_by = _weigh_pairs if kind is Bfloat16Pairs else _weigh_numbers

        def generate(context, builder, signature, arguments):
            for count in cases(builder, arguments[0], HEADS):
                weigh_by(builder, arguments[2:], kind, count, vectors)
            return context.get_dummy_value()

        return types.void(types.int64, v, *[types.int64] * 8), generate

    return weigh_of


def _weigh_numbers(builder, arguments, kind, heads, vectors):
    """o += p · v, one key after the other."""
    p, next_p, n, row, next_key, o, next_o, ahead = arguments
    outs = vector_addresses(builder, o, next_o, heads, vectors)
    sums = [
        [cgutils.alloca_once_value(builder, load(builder, at, FLOAT, LANES)) for at in of_head]
        for of_head in outs
    ]
    with cgutils.for_range_slice(builder, I64(0), n, I64(1), I64) as (j, _):
        start = builder.add(row, builder.mul(next_key, j))
        places = addresses(builder, start, I64(LANES * kind.w_bytes), vectors)
        values = [kind.load_w(builder, place, None) for place in places]
        _fetch_further(builder, ahead, j, vectors * LANES * kind.w_bytes)

        # Give each head its weight of the key.
        at = builder.add(p, builder.mul(next_p, j))
        for c, of_head in enumerate(sums):
            weight = splat_at(builder, builder.add(at, I64(4 * c)), FLOAT)
            for value, total in zip(values, of_head, strict=True):
                builder.store(fma(builder, weight, value, builder.load(total)), total)
    for total, place in zip(itertools.chain(*sums), itertools.chain(*outs), strict=True):
        store(builder, builder.load(total), place)


def _fetch_further(builder, ahead, turn, n_bytes):
    """Fetch from `ahead` on what a turn of a loop stands for that reads n_bytes in each."""
    lines = max(1, n_bytes // 64)
    start = builder.add(ahead, builder.mul(turn, I64(64 * lines)))
    for line in range(lines):
        prefetch(builder, builder.add(start, I64(64 * line)), 3)


def _weigh_pairs(builder, arguments, kind, heads, vectors):
    """o += p · v, two keys at a time, whose weights and values stand side by side."""
    p, next_p, n, row, next_key, o, next_o, ahead = arguments
    outs = vector_addresses(builder, o, next_o, heads, vectors)
    sums = []
    for of_head in outs:
        natural = [load(builder, at, FLOAT, LANES) for at in of_head]
        in_pairs = _reordered(builder, natural, _TO_PAIRS)
        sums.append([cgutils.alloca_once_value(builder, vector) for vector in in_pairs])
    n_pairs = builder.sdiv(builder.add(n, I64(1)), I64(2))
    with cgutils.for_range_slice(builder, I64(0), n_pairs, I64(1), I64) as (j, _):
        columns = _value_pairs(builder, row, next_key, n, j, vectors)
        _fetch_further(builder, ahead, j, vectors * LANES * 4)

        # Give each head its weights of both keys.
        at = builder.add(p, builder.mul(next_p, j))
        for c, of_head in enumerate(sums):
            pair = builder.bitcast(splat_at(builder, builder.add(at, I64(4 * c)), I32), PAIRS)
            for column, total in zip(columns, of_head, strict=True):
                builder.store(kind.add_product(builder, builder.load(total), pair, column), total)
    for of_head, places in zip(sums, outs, strict=True):
        in_pairs = [builder.load(total) for total in of_head]
        natural = _reordered(builder, in_pairs, _FROM_PAIRS)
        for vector, place in zip(natural, places, strict=True):
            store(builder, vector, place)


def _value_pairs(builder, row, next_key, n, j, vectors):
    """Values of keys 2j and 2j + 1 of n, side by side, in as many vectors as each key has."""
    # The last key of an odd number stands for the one behind it, whose weight is 0.
    key = builder.mul(j, I64(2))
    first = builder.add(row, builder.mul(next_key, key))
    another = builder.icmp_signed("<", builder.add(key, I64(1)), n)
    second = builder.add(first, builder.select(another, next_key, I64(0)))
    a, b = (load(builder, at, I16, LANES * vectors) for at in (first, second))
    return [builder.bitcast(x, PAIRS) for x in _interleaved(builder, a, b)]


# Two vectors' numbers as `_interleaved` has them, which stays within 128 bits, and back.
_TO_PAIRS = [[8 * (i // 4) + i % 4 + 4 * half for i in range(LANES)] for half in range(2)]
_FROM_PAIRS = [
    [16 * (d % 8 // 4) + 4 * (d // 8) + d % 4 for d in range(16 * half, 16 * half + 16)]
    for half in range(2)
]


def _reordered(builder, vectors, orders):
    """The numbers of two vectors in one of these orders; one vector as it is."""
    if len(vectors) == 1:
        return vectors
    return [shuffled(builder, *vectors, order) for order in orders]


def _interleaved(builder, a, b):
    """Items of a and b in turn: 16 of each as one vector, 32 as two in the order of `_TO_PAIRS`."""
    lanes = a.type.count
    orders = [range(LANES)] if lanes == LANES else _TO_PAIRS
    return [shuffled(builder, a, b, [i + lanes * odd for i in o for odd in (0, 1)]) for o in orders]
