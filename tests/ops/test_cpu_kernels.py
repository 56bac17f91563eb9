"""Fast forms for processors against the plain ones, which are the oracle."""

import sys

import ml_dtypes
import numpy as np
import pytest
from helpers.jobs import run_job

from hpcinfer import node
from hpcinfer.ops.cpu import attention_prefill

pytest.importorskip("numba")

from hpcinfer import array
from hpcinfer.model.block_table import BlockTable
from hpcinfer.ops import (
    activation,
    attention,
    cache,
    dispatch,
    experts,
    linear,
    norm,
    quantize,
    rope,
    route,
)
from hpcinfer.ops.cpu import experts as cpu_experts
from hpcinfer.ops.cpu import linear as cpu_linear
from hpcinfer.ops.cpu.products import onednn, quantized
from hpcinfer.ops.cpu.runtime import features, launch
from hpcinfer.ops.cpu.simd import rounding

pytestmark = pytest.mark.single

BF16 = np.dtype(ml_dtypes.bfloat16)
HALF = [BF16, np.dtype(np.float16)]

# Largest difference relative to the largest result, where operands of 16 bits are rounded.
ROUNDED = {BF16: 8e-3, np.dtype(np.float16): 1e-3, np.dtype(np.float32): 2e-6}


@pytest.fixture(autouse=True)
def threads():
    before = node.threads()
    yield
    node.use_threads(before)
    dispatch.use("auto")


def normal(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def agree(got, expected, tolerance):
    assert got.shape == expected.shape and got.dtype == expected.dtype
    scale = max(1, np.abs(expected[np.isfinite(expected)]).max(initial=0))
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * scale)


# ---- products ----


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 40])
def test_products_with_16_bit_weights(T, dtype):
    for n_in, n_out in ((896, 71), (67, 5), (33, 1), (31, 2), (1024, 64)):
        x, w = normal((T, n_in)), normal((n_out, n_in), 1, dtype)
        for bias in (None, normal(n_out, 2)):
            agree(linear.linear(x, w, bias), linear.linear.plain(x, w, bias), 3e-6)


@pytest.mark.parametrize("T", [1, 3, 20])
def test_products_with_parts_of_a_weight(T):
    x, w = normal((T, 200)), normal((90, 300), 1, BF16)
    for part in (w[3:80, :200], w[::2, 50:250], w[:0, :200]):
        agree(linear.linear(x, part), linear.linear.plain(x, part), 3e-6)


def test_a_product_is_not_served_where_inputs_lie_apart():
    assert cpu_linear.linear(normal((2, 8)), normal((8, 4), 1, BF16).T) is NotImplemented
    x, w = normal((2, 8)), normal((8, 4), 1, BF16).T
    agree(linear.linear(x, w), linear.linear.plain(x, w), 3e-6)


def test_what_is_not_finite_stays_so():
    x, w = normal((2, 64)), normal((3, 64), 1, BF16)
    x[0, 5], w[1, 7] = np.nan, np.inf
    y = linear.linear(x, w)
    assert np.isnan(y[0]).all() and np.isinf(y[1, 1]) and np.isfinite(y[1, [0, 2]]).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")
def test_rounding_to_bfloat16_is_that_of_the_type():
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, np.uint32)
    special = np.array([np.nan, np.inf, -np.inf, 0, -0.0, 1e-42], np.float32)
    x = np.concatenate([bits.view(np.float32), special]).reshape(2, -1)
    got, expected = rounding.narrowed(x, BF16), x.astype(BF16)
    same = got.view(np.uint16) == expected.view(np.uint16)
    assert (same | (np.isnan(x) & np.isnan(got.astype(np.float32)))).all()


def coded(n_out, n_in, bits, group, dtype, seed=3):
    numbers, scales = quantize.quantize(normal((n_out, n_in), seed), bits, group)
    form = quantize.QuantFormat(bits, group, n_in, 0, np.dtype(dtype))
    held = np.zeros((n_out, form.groups), np.float16)
    held[:, : scales.shape[1]] = scales
    return quantize.Quantized(form, quantize.pack(numbers, bits), held)


def agree_by_sizes(w, x, bias=None):
    """The product of x with codes is that of the plain form, beside the sizes of what is summed."""
    few = len(x) <= (quantized.FEW_PAIRS if features.has("avx512_bf16") else quantized.FEW)
    tolerance = 1e-6 if few or w.dtype != BF16 else ROUNDED[BF16] / 2
    sizes = np.abs(array.widen(x)) @ np.abs(quantize.dequantize(w)).T + 1
    got, expected = linear.linear(x, w, bias), linear.linear.plain(x, w, bias)
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert (np.abs(got - expected) <= tolerance * sizes).all()


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16), np.dtype(np.float32)])
@pytest.mark.parametrize("group", quantize.GROUPS)
@pytest.mark.parametrize("bits", quantize.BITS)
def test_products_with_codes(bits, group, dtype):
    whole = coded(75, 900, bits, group, dtype)
    for w in (whole, whole[2:9], whole[:1], whole[::3], whole[:, 70:333], whole[::2, 391:]):
        for T in (*range(1, 10), 16, 20, 49):
            agree_by_sizes(w, normal((T, w.shape[1])), normal(len(w), 5))


@pytest.mark.parametrize("n_in", [1, 31, 32, 64, 65, 128, 256, 500, 512, 513, 640])
@pytest.mark.parametrize("bits", quantize.BITS)
def test_products_with_codes_of_any_number_of_blocks(bits, n_in):
    """Four blocks are met at a time: rows end with any number of them, or inside a block."""
    for n_out in (1, 2, 33):
        agree_by_sizes(coded(n_out, n_in, bits, 32, BF16), normal((3, n_in)))


@pytest.mark.parametrize("bits", quantize.BITS)
def test_products_with_all_codes(bits):
    """Every code is what it says, whichever word and place it has."""
    numbers = np.arange(512).reshape(2, 256).astype(np.uint8).view(np.int8)
    numbers = numbers if bits == 8 else ((numbers & 15) ^ 8) - 8
    form = quantize.QuantFormat(bits, 32, 256, 0, BF16)
    scales = (1 + np.arange(16).reshape(2, 8)).astype(np.float16)
    scales = np.pad(scales, ((0, 0), (0, form.groups - 8)))
    w = quantize.Quantized(form, quantize.pack(numbers, bits), scales)
    expected = numbers * np.repeat(scales.astype(np.float32), 32, axis=1)[:, :256]
    for start in range(0, 256, 8):
        np.testing.assert_array_equal(
            linear.linear(np.eye(256, dtype=np.float32)[start : start + 8], w),
            expected.T[start : start + 8],
        )


@pytest.mark.parametrize("bits", quantize.BITS)
def test_products_with_codes_of_what_is_rounded_or_not_finite(bits):
    w, x = coded(9, 300, bits, 32, BF16), normal((5, 700))[::2, 100:400]
    agree_by_sizes(w, x)
    assert (linear.linear(x.astype(BF16), w) == linear.linear(x, w)).all()
    x[1, 5] = np.nan
    y = linear.linear(x, w)
    assert np.isnan(y[1]).all() and np.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("bits", quantize.BITS)
def test_threads_share_the_rows_of_codes(bits):
    x, w = normal((9, 2048)), coded(1157, 2048, bits, 32, BF16)
    one = linear.linear(x, w)
    node.use_threads(3)
    assert (linear.linear(x, w) == one).all()


# ---- passes over rows ----


@pytest.mark.parametrize("shape", [(1, 64), (5, 63), (3, 4, 16)])
def test_norms(shape):
    x, weight, bias = normal(shape), normal(shape[-1], 1), normal(shape[-1], 2)
    agree(norm.rms_norm(x, weight, 1e-6), norm.rms_norm.plain(x, weight, 1e-6), 2e-6)
    agree(
        norm.layer_norm(x, weight, bias, 1e-5), norm.layer_norm.plain(x, weight, bias, 1e-5), 2e-6
    )


def test_norms_of_views_and_of_many_rows():
    x, weight = normal((70, 9, 32))[:, 2:5], normal(32, 1)
    agree(norm.rms_norm(x, weight, 1e-6), norm.rms_norm.plain(x, weight, 1e-6), 2e-6)


@pytest.mark.parametrize("half", [4, 8])
def test_rotation(half):
    x = normal((6, 5, 20))[:, 1:4]
    angle = normal((6, half), 1)
    cos, sin = np.cos(angle), np.sin(angle)
    agree(rope.rotate(x, cos, sin), rope.rotate.plain(x, cos, sin), 2e-6)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("function", [activation.silu, activation.gelu_tanh, activation.relu])
def test_gates(function):
    gate_up, widths = 8 * normal((4, 30)), [10, 5]
    gate_up[0, :3] = -200, 200, 0
    got = activation.gated(gate_up, function, widths)
    agree(got, activation.gated.plain(gate_up, function, widths), 3e-6)


@pytest.mark.parametrize("dtype", [*HALF, np.dtype(np.float32)])
def test_storing_keys_and_values(dtype):
    rows, slots = np.array([4, 1, 2]), np.array([70, 33, 5])
    for width in (16, 0):
        k, v = normal((6, 2, 16)), normal((6, 2, width), 1)
        pages = [np.zeros((3, 2, 32, n), dtype) for n in (16, width, 16, width)]
        cache.store(k, v, rows, pages[0], pages[1], slots)
        cache.store.plain(k, v, rows, pages[2], pages[3], slots)
        assert (pages[0] == pages[2]).all() and (pages[1] == pages[3]).all()


def test_a_rank_without_heads_stores_nothing():
    k, pages = normal((3, 1, 16)), np.zeros((2, 0, 32, 16), np.float32)
    cache.store(k, k[..., :0], np.arange(3), pages, pages[..., :0], np.array([0, 1, 40]))


# ---- attention ----


def paged(lengths, G, K, width, dtype, pools=1, pool=0):
    rng, counts = np.random.default_rng(0), [-(-n // 32) for n in lengths]
    places, total = np.zeros((len(lengths), max(counts)), int), sum(counts)
    order = rng.permutation(total)
    for b, n in enumerate(counts):
        places[b, :n], order = order[:n], order[n:]
    block_table = BlockTable(places, np.zeros(len(lengths), int), pool, pools, np.array(lengths))
    k, v = normal((total, G, 32, K), 1, dtype), normal((total, G, 32, width), 2, dtype)

    # What lies behind the last token is whatever was in memory.
    for b, n in enumerate(lengths):
        if n % 32:
            k[places[b, n // 32], :, n % 32 :] = v[places[b, n // 32], :, n % 32 :] = np.nan
    return block_table, k, v


@pytest.mark.parametrize("dtype", [*HALF, np.dtype(np.float32)])
@pytest.mark.parametrize(
    "heads",
    [
        *[(14, 2, 64, 64), (3, 1, 96, 32), (5, 1, 80, 0), (7, 7, 16, 16), (8, 1, 128, 128)],
        *[(1, 1, 192, 128), (20, 1, 64, 0), (2, 2, 80, 80), (4, 2, 64, 48)],
    ],
)
def test_decoding_over_pages(heads, dtype):
    H, G, K, width = heads
    groups = [(g * H // G, (g + 1) * H // G) for g in range(G)]
    for lengths in ([1], [33, 700, 64], [1030]):
        block_table, k, v = paged(lengths, G, K, width, dtype)
        tokens = np.array([(b, n - 1) for b, n in enumerate(lengths)], np.int32)
        q = normal((len(tokens), H, K), 3)
        for window in (None, 40):
            options = {"scale": K**-0.5, "groups": groups, "window": window}
            options["v_columns"] = None if width else 64
            got = attention.paged_attention(q, tokens, k, v, block_table, **options)
            dispatch.use("plain")
            expected = attention.paged_attention(q, tokens, k, v, block_table, **options)
            dispatch.use("auto")
            for a, b in zip(got, expected, strict=True):
                agree(a, b, ROUNDED[dtype])


def test_decoding_with_several_queries_and_pools():
    tokens = np.array([(0, 100), (0, 101), (0, 102), (1, 0), (2, 50), (2, 51)], np.int32)
    parts_of = []
    for pool in range(2):
        block_table, k, v = paged([103, 1, 52], 2, 16, 16, np.dtype(np.float32), 2, pool)
        q, options = normal((6, 4, 16), 3), {"scale": 0.3, "groups": [(0, 2), (2, 4)]}
        got = attention.paged_attention(q, tokens, k, v, block_table, **options)
        expected = attention.paged_attention.plain(q, tokens, k, v, block_table, **options)
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-6)
        parts_of.append(got)
    assert np.isneginf(parts_of[1][1][3]).all() and not parts_of[1][0][3].any()


@pytest.mark.skipif(not features.has("avx512_bf16"), reason="needs bfloat16 instructions")
@pytest.mark.parametrize(
    "heads", [(14, 2, 64, 64), (3, 1, 80, 96), (8, 1, 192, 0), (2, 2, 128, 128)]
)
@pytest.mark.parametrize("window", [None, 100])
def test_many_queries_over_pages(window, heads):
    """A text; several, one of them a chunk behind a longer cache and one a single token."""
    H, G, K, width = heads
    options = {"groups": [(g * H // G, (g + 1) * H // G) for g in range(G)], "window": window}
    options |= {"scale": K**-0.5, "v_columns": None if width else 128}
    for lengths, cached in (([150], [0]), ([70, 700, 1, 1100], [0, 688, 0, 1000])):
        block_table, k, v = paged(lengths, G, K, width, BF16)
        tokens = [(b, p) for b, n in enumerate(lengths) for p in range(cached[b], n)]
        tokens, q = np.array(tokens, np.int32), normal((len(tokens), H, K), 3)
        got = attention.paged_attention(q, tokens, k, v, block_table, **options)
        wide = k.astype(np.float32), v.astype(np.float32)
        expected = attention.paged_attention.plain(q, tokens, *wide, block_table, **options)
        for a, b in zip(got, expected, strict=True):
            agree(a, b, 1.5e-2)


@pytest.fixture(params=["packed", "oneDNN"])
def products(request, monkeypatch):
    """Both ways of computing the products of many queries, as far as this processor has them."""
    served = {"packed": features.has("avx512_bf16"), "oneDNN": onednn.serves(BF16)}
    if not served[request.param]:
        pytest.skip(f"{request.param} products need more than this processor has")
    monkeypatch.setattr(attention_prefill, "packs", lambda dtype: request.param == "packed")


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("S", [1, 64, 300])
def test_attention_of_many_queries(S, window, softcap, products):
    L, H, G, K = 700, 6, 2, 32
    q, k, v = normal((S, H, K)), normal((L, G, K), 1, BF16), normal((L, G, K), 2, BF16)
    q_pos, k_pos = np.arange(L - S, L), np.arange(L)
    for columns in (None, 16):
        options = {"scale": K**-0.5, "groups": [(0, 3), (3, 6)], "window": window}
        options |= {"softcap": softcap, "v_columns": columns}
        values = v if columns is None else v[..., :0]
        got = attention.attention(q, k, values, q_pos, k_pos, **options)
        expected = attention.attention.plain(q, k, values, q_pos, k_pos, **options)
        for a, b in zip(got, expected, strict=True):
            agree(a, b, 1.5e-2)


def test_keys_in_any_order_and_apart(products):
    """Keys of some positions only, in any order, some behind every query; messages move between."""
    rng, calls = np.random.default_rng(5), []
    k_pos = rng.permutation(900)[:333]
    q, q_pos = normal((200, 4, 48)), rng.permutation(700)[:200]
    k, v = normal((333, 4, 48), 1, BF16), normal((333, 4, 32), 2, BF16)
    q_pos[0] = k_pos.min() - 1
    options = {"scale": 0.2, "groups": [(0, 1), (1, 4)], "between": lambda: calls.append(1)}
    got = attention.attention(q, k[:, 1:3], v[:, 1:3], q_pos, k_pos, **options)
    assert calls
    expected = attention.attention.plain(q, k[:, 1:3], v[:, 1:3], q_pos, k_pos, **options)
    for a, b in zip(got, expected, strict=True):
        agree(a, b, 1.5e-2)
    assert np.isneginf(got[1][0]).all() and not got[0][0].any()


def test_threads_share_the_queries(products):
    q, k = normal((300, 7, 64)), normal((2000, 1, 64), 1, BF16)
    options = {"scale": 0.125, "groups": [(0, 7)]}
    arguments = q, k, k, np.arange(1700, 2000), np.arange(2000)
    one = attention.attention(*arguments, **options)
    node.use_threads(3)
    for a, b in zip(attention.attention(*arguments, **options), one, strict=True):
        agree(a, b, 1e-6)


# ---- choice, threads, other processors ----


def test_plain_forms_on_request():
    x, w = normal((2, 64)), normal((4, 64), 1, BF16)
    dispatch.use("plain")
    assert (linear.linear(x, w) == linear.linear.plain(x, w)).all()
    with pytest.raises(ValueError, match="kernels: got 'quick', need one of auto, plain"):
        dispatch.use("quick")


def test_threads_share_the_rows():
    x, w = normal((2, 512)), normal((2049, 512), 1, BF16)
    one = linear.linear(x, w)
    node.use_threads(3)
    assert (linear.linear(x, w) == one).all()


def test_an_error_in_a_thread_is_raised():
    def fails(start, stop):
        if start:
            raise ValueError("row")

    node.use_threads(2)
    with pytest.raises(ValueError, match="row"):
        launch.over_rows(fails, 10, work_bytes=1 << 30)


@pytest.mark.skipif(not features.has("avx2"), reason="emulates a smaller processor of this family")
def test_a_processor_without_avx512(tmp_path):
    """The same file on what LLVM and the library see as a processor with AVX2 and no more."""
    program = (
        "import sys, pytest\n"
        "from hpcinfer.ops.cpu.runtime import features\n"
        "features.flags = lambda: frozenset({'avx2'})\n"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-k', 'products or decoding',"
        f" {__file__!r}]))"
    )
    done = run_job(
        1, sys.executable, "-c", program, timeout_s=90,
        NUMBA_CPU_NAME="haswell", HPCINFER_CACHE=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


# ---- parts of a query ----


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_the_groups_of_a_query(threads):
    """Long enough for several threads: a part begins and ends between the groups of a query."""
    block_table, k, v = paged([900, 1500], 5, 64, 64, BF16)
    tokens, q = np.array([(0, 899), (1, 1499)], np.int32), normal((2, 15, 64), 3)
    options = {"scale": 0.125, "groups": [(3 * g, 3 * g + 3) for g in range(5)]}
    one = attention.paged_attention(q, tokens, k, v, block_table, **options)
    node.use_threads(threads)
    for a, b in zip(
        attention.paged_attention(q, tokens, k, v, block_table, **options), one, strict=True
    ):
        assert (a == b).all()


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)])
@pytest.mark.parametrize("function", [activation.silu, activation.gelu_tanh])
@pytest.mark.parametrize("T", [1, 3, 8, 20])
def test_experts_of_few_tokens(T, function, dtype):
    """One of the choices is no expert, some are on another rank."""
    node.use_threads(1)
    E, D, F, first = 5, 40, 24, 2
    up, down = normal((E, 2 * F, D), 1, dtype), normal((E, D, F), 2, dtype)
    rng = np.random.default_rng(3)
    ids = np.stack([rng.permutation(E + 3)[:3] for _ in range(T)]).astype(np.int32)
    ids[-1, 0] = -1
    weights, gate = rng.random((T, 3), np.float32), activation.Gate(function, (F,))
    operands = normal((T, D)), ids, weights, up, down, first, gate
    assert cpu_experts._serves(*operands[:5], gate)
    agree(experts.experts_ffn(*operands), experts.experts_ffn.plain(*operands), ROUNDED[dtype])


def test_choices_are_counted():
    ids = np.array([[0, 3], [3, -1], [2, 3]], np.int32)
    for count in (route.count_into, route.count_into.plain):
        assert count(np.array([1, 0, 0, 5], np.int64), ids).tolist() == [2, 0, 1, 8]


@pytest.mark.parametrize("T", [1, 2, 7, 16])
def test_few_rows_of_float32_weights(T):
    for n_in, n_out in ((896, 71), (67, 5), (33, 1), (1024, 64)):
        x, w = normal((T, n_in)), normal((n_out, n_in), 1)
        assert cpu_linear.linear(x, w) is not NotImplemented
        for bias in (None, normal(n_out, 2)):
            agree(linear.linear(x, w, bias), linear.linear.plain(x, w, bias), 3e-6)
    assert cpu_linear.linear(normal((17, 896)), normal((71, 896))) is NotImplemented
