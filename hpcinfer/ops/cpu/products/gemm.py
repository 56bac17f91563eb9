"""Matrix products in bfloat16 (BLAS's gemm): many rows of x, which stand in the lanes of vectors.

A block of rows of x is packed pair by pair, TILE of them side by side, and stays in the second
cache with as many columns of what lies between two products. Each few rows of a weight meet all its
tiles while they are in the first; beside the last of them those that come next are fetched.
"""

from __future__ import annotations

import numpy as np

from hpcinfer import array
from hpcinfer.array import Array
from hpcinfer.ops.cpu import activation
from hpcinfer.ops.cpu.runtime import features
from hpcinfer.ops.cpu.runtime.compile import compiled
from hpcinfer.ops.cpu.simd.gemm import ROWS, TILE, VECTORS, add_rows, gated_rows, turned
from hpcinfer.ops.cpu.simd.pairs import pack_keys

# Rows of a block of x at most and at least, and numbers in it beyond the least: half a megabyte.
_MOST, _LEAST, _NUMBERS = 256, 2 * TILE, 1 << 18
_COLUMNS = 960  # columns between two products at a time, a multiple of what a tile gives

_HALF, _LANES = ROWS // 2, TILE // VECTORS
_ADD, _ADD_4, _ADD_1 = (add_rows(n) for n in (ROWS, 4, 1))
_GATED, _GATED_2 = (gated_rows(n, activation.TWICES) for n in (_HALF, 2))


def serves(weight: Array) -> bool:
    """True if a weight can be met here, and no library has matrix units for it."""
    bfloat16 = weight.dtype == array.BFLOAT16 and features.has("avx512_bf16")
    return bfloat16 and not features.has("amx_bf16") and weight.shape[1] % 2 == 0


@compiled
def pair(start, stop, x, first, function, widths, second, y):
    """Rows start..stop of two products and the gate between them: y = gate(x · firstᵀ) · secondᵀ.

    Parameters
    ----------
    x : (T, I) bfloat16's bits, I even
    first, second : (2 F, I), (O, F) bfloat16's bits
    function : `activation.number_of` the gate's
    widths : (n,) even numbers adding up to F, as `activation.Gate` has them
    y : (T, O) float32
    """
    block = _rows_of_block(x.shape[1])
    for top in range(start, stop, block):
        # Pack a block of rows, which stays in the second cache.
        T = min(block, stop - top)
        xs = _packed(x, top, T)
        hidden = np.empty((len(xs), _COLUMNS // 2, TILE), np.uint32)
        sums = np.empty((len(xs), len(second), TILE), np.float32)

        # Take some columns of the gate at a time, and add their products.
        begin, done = 0, 0
        for width in widths:
            for f in range(0, width, _COLUMNS):
                n = min(_COLUMNS, width - f)
                gate, up = 2 * begin + f, 2 * begin + width + f
                _gate(xs, T, x.shape[1] // 2, first, gate, up, n, function, hidden)
                _add_product(hidden, T, n // 2, second, begin + f, done == 0, sums)
                done += n
            begin += width
        _turn(sums, T, y, top)


@compiled
def product(start, stop, x, w, y):
    """Rows start..stop of y = x · wᵀ: x (T, I), w (O, I) bfloat16's bits, I even, y float32."""
    block = _rows_of_block(x.shape[1])
    for top in range(start, stop, block):
        T = min(block, stop - top)
        xs = _packed(x, top, T)
        sums = np.empty((len(xs), min(_COLUMNS, len(w)), TILE), np.float32)
        for row in range(0, len(w), _COLUMNS):
            rows = w[row : row + _COLUMNS]
            _add_product(xs, T, x.shape[1] // 2, rows, 0, True, sums)
            _turn(sums[:, : len(rows)], T, y[:, row : row + len(rows)], top)


@compiled
def _rows_of_block(width):
    """Rows of x, of so many numbers each, that stay in the second cache."""
    return max(_LEAST, min(_MOST, _NUMBERS // width // TILE * TILE))


@compiled
def _packed(x, top, T):
    """T rows of x as tiles of pairs: (tiles, pairs and up to 15 more, TILE) uint32."""
    n_pairs = x.shape[1] // 2
    xs = np.empty(((T + TILE - 1) // TILE, (n_pairs + 15) // 16 * 16, TILE), np.uint32)
    for t in range(0, len(xs) * TILE, _LANES):
        row = x.ctypes.data + (top + min(t, T - 1)) * x.strides[0]
        out = xs[t // TILE, 0, t % TILE :].ctypes.data
        pack_keys(row, x.strides[0], max(0, min(_LANES, T - t)), n_pairs, out, 4 * TILE)
    return xs


@compiled
def _vectors(tile, T):
    """Vectors of a tile that have any of T rows of x."""
    return VECTORS if T - tile * TILE > _LANES else 1


@compiled
def _gate(xs, T, n_pairs, w, gate, up, n, function, hidden):
    """The gate of n columns, whose rows in w begin at `gate` and `up`, as pairs in `hidden`."""
    stride = w.strides[0]
    for f in range(0, n, _HALF):
        m = min(_HALF, n - f)
        g, u = w.ctypes.data + (gate + f) * stride, w.ctypes.data + (up + f) * stride
        for tile in range(len(xs)):
            x, vectors = xs.ctypes.data + tile * xs.strides[0], _vectors(tile, T)
            out = hidden.ctypes.data + tile * hidden.strides[0] + f // 2 * hidden.strides[1]
            ahead = _HALF * stride if tile == len(xs) - 1 else 0
            if m == _HALF:
                _GATED(function, vectors, g, u, stride, ahead, n_pairs, x, out)
                continue
            for i in range(0, m, 2):
                by, to = i * stride, out + 2 * i * TILE
                _GATED_2(function, vectors, g + by, u + by, stride, ahead, n_pairs, x, to)


@compiled
def _add_product(xs, T, n_pairs, w, column, first, sums):
    """sums (tiles, O, TILE) = or += columns of w, from one on, times T rows in tiles of pairs."""
    stride = w.strides[0]
    for row in range(0, len(w), ROWS):
        n = min(ROWS, len(w) - row)
        at = w.ctypes.data + row * stride + 2 * column
        for tile in range(len(xs)):
            x, vectors = xs.ctypes.data + tile * xs.strides[0], _vectors(tile, T)
            out = sums.ctypes.data + tile * sums.strides[0] + row * sums.strides[1]
            ahead = ROWS * stride if tile == len(xs) - 1 else 0
            _add_tile(x, vectors, n_pairs, at, stride, ahead, n, first, out)


@compiled
def _add_tile(x, vectors, n_pairs, w, stride, ahead, n, first, out):
    """Up to ROWS rows of a weight for one tile of x, by addresses."""
    if n == ROWS:
        _ADD(vectors, w, stride, ahead, n_pairs, x, out, first)
        return
    r = 0
    while r < n:
        at, to = w + r * stride, out + 4 * TILE * r
        if n - r >= 4:
            _ADD_4(vectors, at, stride, ahead, n_pairs, x, to, first)
            r += 4
        else:
            _ADD_1(vectors, at, stride, ahead, n_pairs, x, to, first)
            r += 1


@compiled
def _turn(sums, T, y, top):
    """The sums of T rows of x as rows of y from `top` on."""
    rows = sums.shape[1]
    for t in range(0, T, 16):
        tile, lane, n = t // TILE, t % TILE, min(16, T - t)
        whole = rows // 16 * 16 if n == 16 else 0
        for row in range(0, whole, 16):
            source = sums.ctypes.data + tile * sums.strides[0] + row * sums.strides[1] + 4 * lane
            out = y.ctypes.data + (top + t) * y.strides[0] + 4 * row
            turned(source, sums.strides[1], out, y.strides[0])
        for row in range(whole, rows):
            for i in range(n):
                y[top + t + i, row] = sums[tile, row, lane + i]
