"""Strategy `tensor`: a half layer equals one rank, costs one Allreduce, and keeps its order."""

import ml_dtypes
import numpy as np
import pytest
from pytest import approx

from hpcinfer import collectives, partition
from hpcinfer.ledger import ledger
from hpcinfer.ops import activation
from hpcinfer.ops.attention import attention
from hpcinfer.ops.linear import linear, linear_pair
from hpcinfer.parallel import tensor

BF16 = np.dtype(ml_dtypes.bfloat16)
T, D = 5, 12


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def own(comm, n):
    """This rank's block of n columns."""
    return slice(*partition.block(n, comm.size)[comm.rank])


def close(x, expected):
    np.testing.assert_allclose(x, expected, rtol=1e-6, atol=3e-5)
    assert x.dtype == np.float32


@pytest.fixture(autouse=True)
def empty_ledger():
    ledger.clear()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("F", [1, 3, 19, 64])
@pytest.mark.parametrize("biased", [False, True])
def test_ffn_without_gate_equals_one_rank(comm, F, dtype, biased):
    """F = 1 leaves all ranks but one without columns; both biases count once."""
    x, up, down = normal((T, D), 1), normal((F, D), 2).astype(dtype), normal((D, F), 3)
    down = (0.3 * down).astype(dtype)
    up_bias, down_bias = (normal(F, 4), normal(D, 5)) if biased else (None, None)
    whole = linear(activation.gelu(linear(x, up, up_bias)), down, down_bias)
    mine = own(comm, F)
    y = tensor.half_layer(
        comm,
        x,
        up[mine],
        activation.gelu,
        np.ascontiguousarray(down[:, mine]),
        None if up_bias is None else up_bias[mine],
        down_bias,
    )
    close(y, whole)
    assert ledger.calls() == ledger.calls("Allreduce", purpose="tensor") == 1
    assert ledger.sent_bytes() == approx(2 * (comm.size - 1) / comm.size * T * D * 4)


@pytest.mark.parametrize("F", [2, 19])
def test_gated_ffn_equals_one_rank(comm, F):
    """Gate and up are cut alike, so the gate of every column is at hand."""
    x, gate, up, down = normal((T, D), 1), normal((F, D), 2), normal((F, D), 3), normal((D, F), 4)
    whole = linear(activation.silu(linear(x, gate)) * linear(x, up), down)
    mine = own(comm, F)
    column = np.concatenate([gate[mine], up[mine]])
    width = mine.stop - mine.start
    y = tensor.half_layer(
        comm, x, column, lambda z: activation.gated(z, activation.silu, [width]), down[:, mine]
    )
    close(y, whole)


@pytest.mark.parametrize(("H", "G"), [(14, 2), (3, 1), (2, 2), (6, 3)])
@pytest.mark.parametrize("biased", [False, True])
def test_attention_equals_one_rank(comm, H, G, biased):
    """Cut by heads: uneven, copied key/value heads, ranks without a head."""
    K, per_kv = 4, H // G
    x, o = normal((T, D), 1), 0.3 * normal((D, H * K), 2)
    q, k, v = normal((H * K, D), 3), normal((G * K, D), 4), normal((G * K, D), 5)
    biases = [normal(len(w), seed) for seed, w in enumerate((q, k, v), 6)]
    o_bias = normal(D, 9) if biased else None

    def attend(heads):
        """Attention over some heads, from their queries, keys and values side by side."""

        def middle(qkv):
            n, g = heads.n_query, heads.n_kv
            q, k, v = np.split(qkv.reshape(T, n + 2 * g, K), [n, n + g], axis=1)
            at = np.arange(T)
            result, _ = attention(q, k, v, at, at, scale=0.5, groups=heads.groups)
            return result.reshape(T, n * K)

        return middle

    def columns(heads, parts):
        """Rows of q, k and v that belong to some heads."""
        spans = (heads.query, heads.kv, heads.kv)
        return np.concatenate([w[a * K : b * K] for (a, b), w in zip(spans, parts, strict=True)])

    (all_heads,) = partition.heads(H, G, 1)
    assert all_heads.groups == tuple((g * per_kv, (g + 1) * per_kv) for g in range(G))
    qkv = linear(x, columns(all_heads, (q, k, v)), columns(all_heads, biases) if biased else None)
    whole = linear(attend(all_heads)(qkv), o, o_bias)

    mine = partition.heads(H, G, comm.size)[comm.rank]
    y = tensor.half_layer(
        comm,
        x,
        columns(mine, (q, k, v)),
        attend(mine),
        o[:, mine.query[0] * K : mine.query[1] * K],
        columns(mine, biases) if biased else None,
        o_bias,
        purpose="attention",
    )
    close(y, whole)
    assert ledger.calls() == ledger.calls("Allreduce", purpose="attention") == 1


def test_partial_sums_of_two_halves_share_one_reduction(comm):
    """As in layers whose halves read the same input."""
    F, x = 19, normal((T, D), 1)
    halves = [(normal((F, D), s), normal((D, F), s + 1)) for s in (2, 4)]
    whole = sum(linear(activation.gelu(linear(x, up)), down) for up, down in halves)
    mine = own(comm, F)
    y_sum = sum(linear_pair(x, up[mine], activation.gelu, down[:, mine]) for up, down in halves)
    close(collectives.Allreduce(comm, y_sum), whole)


def test_a_partial_sum_may_not_pass_the_non_linearity(comm):
    """f(a + b) != f(a) + f(b): reducing first is right, reducing after f is far off."""
    F, x, weight = 40, normal((64, 40), 1), normal((30, 40), 2)
    mine = own(comm, F)
    x_sum = linear(np.ascontiguousarray(x[:, mine]), np.ascontiguousarray(weight[:, mine]))
    right = activation.gelu(linear(x, weight))
    close(activation.gelu(collectives.Allreduce(comm, x_sum.copy())), right)
    wrong = collectives.Allreduce(comm, activation.gelu(x_sum))
    error = np.abs(wrong - right).mean() / np.abs(right).mean()
    if comm.size == 1:
        assert error == 0
    else:
        assert error > 0.2, f"relative error {error:.3f}"


def test_input_is_left_as_it_was(comm):
    x, column, row = normal((T, D), 1), normal((7, D), 2), normal((D, 7), 3)
    mine = own(comm, 7)
    before = x.copy()
    tensor.half_layer(comm, x, column[mine], activation.relu, row[:, mine])
    np.testing.assert_array_equal(x, before)


def test_refuses_half_precision_sums_on_every_rank(comm, monkeypatch):
    """Whatever a product gives, the reduction is in float32 or not at all."""
    monkeypatch.setattr(tensor, "linear_pair", lambda x, *_: x.astype(np.float16))
    with pytest.raises(TypeError, match="Allreduce: got float16, need float32"):
        tensor.half_layer(comm, normal((T, D)), None, lambda y: y, None)
    assert ledger.calls() == 0


def test_refuses_shapes_that_do_not_fit_on_every_rank(comm):
    """Before the first message, so that no rank waits for another."""
    x = normal((T, D))
    with pytest.raises(ValueError):
        tensor.half_layer(comm, x, normal((7, D + 1)), activation.relu, normal((D, 7)))
    with pytest.raises(ValueError):
        tensor.half_layer(comm, x, normal((7, D)), activation.relu, normal((D, 8)))
    assert ledger.calls() == 0
