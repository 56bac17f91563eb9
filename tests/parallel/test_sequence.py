"""Strategy `sequence`: cut tokens give what one rank computes, for the bytes of `tensor`."""

import numpy as np
import pytest
from pytest import approx

from hpcinfer import collectives, partition
from hpcinfer.array import BFLOAT16
from hpcinfer.ledger import ledger
from hpcinfer.ops import activation
from hpcinfer.ops.linear import linear
from hpcinfer.ops.norm import rms_norm
from hpcinfer.parallel import sequence, tensor

D, F = 12, 19
TOKENS = [0, 1, 2, 5, 23]  # none, fewer than ranks, no multiple of them


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def own(comm, n):
    """This rank's block of n items."""
    return slice(*partition.block(n, comm.size)[comm.rank])


def counts_of(comm, n):
    return partition.counts(partition.block(n, comm.size))


def close(x, expected):
    assert x.shape == expected.shape and x.dtype == np.float32
    np.testing.assert_allclose(x, expected, rtol=1e-6, atol=3e-5)


@pytest.fixture(autouse=True)
def empty_ledger():
    ledger.clear()


# --- equals one rank -----------------------------------------------------------------------------


@pytest.mark.parametrize("T", TOKENS)
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
@pytest.mark.parametrize("biased", [False, True])
def test_ffn_with_gelu_equals_one_rank(comm, T, dtype, biased):
    x, up, down = normal((T, D), 1), normal((F, D), 2).astype(dtype), normal((D, F), 3)
    down = (0.3 * down).astype(dtype)
    up_bias, down_bias = (normal(F, 4), normal(D, 5)) if biased else (None, None)
    whole = linear(activation.gelu(linear(x, up, up_bias)), down, down_bias)
    tokens, columns = own(comm, T), own(comm, F)
    y = sequence.half_layer(
        comm,
        x[tokens],
        counts_of(comm, T),
        up[columns],
        activation.gelu,
        np.ascontiguousarray(down[:, columns]),
        None if up_bias is None else up_bias[columns],
        down_bias,
    )
    close(y, whole[tokens])


@pytest.mark.parametrize("T", TOKENS)
def test_gated_ffn_equals_one_rank(comm, T):
    x, gate, up, down = normal((T, D), 1), normal((F, D), 2), normal((F, D), 3), normal((D, F), 4)
    whole = linear(activation.silu(linear(x, gate)) * linear(x, up), down)
    tokens, columns = own(comm, T), own(comm, F)
    width = columns.stop - columns.start
    y = sequence.half_layer(
        comm,
        x[tokens],
        counts_of(comm, T),
        np.concatenate([gate[columns], up[columns]]),
        lambda z: activation.gated(z, activation.silu, [width]),
        down[:, columns],
    )
    close(y, whole[tokens])


def test_any_cut_of_the_tokens(comm):
    """All tokens on one rank, whichever it is."""
    T = 7
    x, up, down = normal((T, D), 1), normal((F, D), 2), normal((D, F), 3)
    whole = linear(activation.gelu(linear(x, up)), down)
    columns = own(comm, F)
    for holder in range(comm.size):
        counts = [T if rank == holder else 0 for rank in range(comm.size)]
        mine = x if comm.rank == holder else x[:0]
        y = sequence.half_layer(comm, mine, counts, up[columns], activation.gelu, down[:, columns])
        close(y, whole if comm.rank == holder else whole[:0])


# --- the non-linearity ---------------------------------------------------------------------------


def test_a_partial_sum_through_gelu_is_wrong_and_sp_with_tp_is_right(comm):
    """f(a + b) != f(a) + f(b): both products are cut, only the place of the sum differs."""
    T, hidden = 24, 40
    x, up, down = normal((T, hidden), 1), normal((hidden, hidden), 2), normal((hidden, hidden), 3)
    right = linear(activation.gelu(linear(x, up)), down)
    tokens, mine, counts = own(comm, T), own(comm, hidden), counts_of(comm, T)
    y = sequence.half_layer(
        comm, x[tokens], counts, up[mine], activation.gelu, np.ascontiguousarray(down[:, mine])
    )
    np.testing.assert_allclose(y, right[tokens], atol=1e-5 * np.abs(right).max())

    # Cut the inner axis of the first product instead: what GeLU meets is {sum}.
    x_sum = linear(np.ascontiguousarray(x[:, mine]), np.ascontiguousarray(up[:, mine]))
    wrong = linear(collectives.Allreduce(comm, activation.gelu(x_sum)), down)
    error = np.linalg.norm(wrong - right) / np.linalg.norm(right)
    assert error == 0 if comm.size == 1 else error > 0.2, f"relative error {error:.3f}"


# --- cost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", TOKENS)
def test_cost(comm, T):
    """Over all ranks each collective sends (P-1) T D words, together the Allreduce of `tensor`."""
    x, up, down = normal((T, D), 1), normal((F, D), 2), normal((D, F), 3)
    tokens, columns, P = own(comm, T), own(comm, F), comm.size
    weights = up[columns], activation.gelu, down[:, columns]
    sequence.half_layer(comm, x[tokens], counts_of(comm, T), *weights)
    for verb in ("Allgather", "ReduceScatter"):
        assert ledger.calls(verb, purpose="sequence") == 1
        assert comm.allreduce(ledger.sent_bytes(verb)) == approx((P - 1) * 4 * T * D)
    assert ledger.calls() == 2

    sent_bytes = comm.allreduce(ledger.sent_bytes())
    ledger.clear()
    tensor.half_layer(comm, x, *weights)
    assert sent_bytes == approx(comm.allreduce(ledger.sent_bytes()))


@pytest.mark.parametrize("T", [2, 23])
def test_between_the_halves_a_rank_holds_its_own_tokens_only(comm, T):
    """Norms see T/P rows, and the residual has T/P rows, in a chain of half layers."""
    x, norm, columns = normal((T, D), 1), np.ones(D, np.float32), own(comm, F)
    counts, whole, rows = counts_of(comm, T), x, []

    def normed(x):
        rows.append(len(x))
        return rms_norm(x, norm, 1e-6)

    y = x[own(comm, T)]
    for n in range(3):
        up, down = normal((F, D), 10 + n), 0.1 * normal((D, F), 20 + n)
        whole = whole + linear(activation.gelu(linear(rms_norm(whole, norm, 1e-6), up)), down)
        y = y + sequence.half_layer(
            comm, normed(y), counts, up[columns], activation.gelu, down[:, columns]
        )
        rows.append(len(y))
    close(y, whole[own(comm, T)])
    assert set(rows) == {counts[comm.rank]}
    assert T // comm.size <= counts[comm.rank] <= -(-T // comm.size)


# --- refuses -------------------------------------------------------------------------------------


def test_refuses_counts_that_do_not_fit_on_every_rank(comm):
    x, P = normal((3, D)), comm.size
    for counts in ([3] * (P + 1), [2] * P, [-1] * P):
        with pytest.raises(ValueError, match=f"sequence: got 3 tokens .* each of {P} ranks"):
            sequence.half_layer(comm, x, counts, normal((F, D)), activation.gelu, normal((D, F)))
    assert ledger.calls() == 0


def test_refuses_half_precision_sums_on_every_rank(comm):
    T = 2 * comm.size
    x, counts = normal((2, D)), [2] * comm.size
    with pytest.raises(TypeError, match="ReduceScatter: got float16, need float32"):
        sequence.complete(comm, x, counts, lambda x: np.zeros((T, D), np.float16))


def test_input_is_left_as_it_was(comm):
    T, columns = 5, own(comm, F)
    x = normal((T, D), 1)[own(comm, T)]
    before = x.copy()
    up, down, bias = normal((F, D), 2)[columns], normal((D, F), 3)[:, columns], normal(D, 4)
    sequence.half_layer(comm, x, counts_of(comm, T), up, activation.relu, down, None, bias)
    np.testing.assert_array_equal(x, before)
