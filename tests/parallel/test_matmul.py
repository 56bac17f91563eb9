"""Strategy `matmul`: the four cut cases equal the whole product, cost what their table says."""

import ml_dtypes
import numpy as np
import pytest
from pytest import approx

from hpcinfer import partition
from hpcinfer.ledger import ledger
from hpcinfer.ops.linear import linear
from hpcinfer.parallel import matmul

BF16 = np.dtype(ml_dtypes.bfloat16)
SIZES = [(7, 13, 11), (1, 5, 3), (2, 1, 1), (64, 30, 17)]  # T, I, O; some below the ranks


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def operands(T, width, O, dtype=np.float32):  # noqa: E741
    """A (T, I), B (O, I), a bias (O,) and A · Bᵀ of one rank, without and with the bias."""
    a, b, bias = normal((T, width), 1), normal((O, width), 2).astype(dtype), normal(O, 3)
    return a, b, bias, linear(a, b), linear(a, b, bias)


def cut(comm, x, axis):
    """This rank's block of an axis, and the lengths of all blocks."""
    ranges = partition.block(x.shape[axis], comm.size)
    part = x.take(range(*ranges[comm.rank]), axis)
    return np.ascontiguousarray(part), partition.counts(ranges)


def close(x, expected):
    np.testing.assert_allclose(x, expected, atol=1e-5)
    assert x.dtype == np.float32


@pytest.fixture(autouse=True)
def empty_ledger():
    ledger.clear()


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize(("T", "width", "O"), SIZES)
def test_columns(comm, T, width, O, dtype):  # noqa: E741
    """B cut by its output: the result is cut, nothing is sent."""
    a, b, bias, product, with_bias = operands(T, width, O, dtype)
    (b_own, _), (bias_own, _) = cut(comm, b, 0), cut(comm, bias, 0)
    close(matmul.columns(comm, a, b_own), cut(comm, product, 1)[0])
    close(matmul.columns(comm, a, b_own, bias_own), cut(comm, with_bias, 1)[0])
    assert ledger.calls() == 0


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize(("T", "width", "O"), SIZES)
def test_gathered(comm, T, width, O, dtype):  # noqa: E741
    """A cut by rows, B by its output: one Allgather of A."""
    a, b, bias, product, with_bias = operands(T, width, O, dtype)
    a_own, counts = cut(comm, a, 0)
    (b_own, _), (bias_own, _) = cut(comm, b, 0), cut(comm, bias, 0)
    close(matmul.gathered(comm, a_own, b_own, counts), cut(comm, product, 1)[0])
    close(matmul.gathered(comm, a_own, b_own, counts, bias_own), cut(comm, with_bias, 1)[0])

    # A ring sends the own part P-1 times: w T I (P-1)/P bytes on average.
    assert ledger.calls() == ledger.calls("Allgather", purpose="matmul") == 2
    assert ledger.sent_bytes() == 2 * a_own.nbytes * (comm.size - 1)
    formula = 4 * T * width * (comm.size - 1) / comm.size
    assert comm.allreduce(ledger.sent_bytes()) / comm.size == approx(2 * formula)


@pytest.mark.parametrize(("T", "width", "O"), SIZES)
def test_inner(comm, T, width, O):  # noqa: E741
    """Both cut along the inner axis: one Allreduce; the bias is added once, not P times."""
    a, b, bias, product, with_bias = operands(T, width, O)
    (a_own, _), (b_own, _) = cut(comm, a, 1), cut(comm, b, 1)
    close(matmul.inner(comm, linear(a_own, b_own)), product)
    close(matmul.inner(comm, linear(a_own, b_own), bias), with_bias)
    assert ledger.calls() == ledger.calls("Allreduce", purpose="matmul") == 2
    assert ledger.sent_bytes() == approx(2 * 2 * 4 * T * O * (comm.size - 1) / comm.size)


@pytest.mark.parametrize(("T", "width", "O"), SIZES)
def test_inner_cut(comm, T, width, O):  # noqa: E741
    """The same with a result cut by rows: one ReduceScatter, half the bytes."""
    a, b, bias, product, with_bias = operands(T, width, O)
    (a_own, _), (b_own, _) = cut(comm, a, 1), cut(comm, b, 1)
    own, counts = cut(comm, product, 0)
    close(matmul.inner_cut(comm, linear(a_own, b_own), counts), own)
    close(matmul.inner_cut(comm, linear(a_own, b_own), counts, bias), cut(comm, with_bias, 0)[0])
    assert ledger.calls() == ledger.calls("ReduceScatter", purpose="matmul") == 2
    assert ledger.sent_bytes() == 2 * (product.nbytes - own.nbytes)
    formula = 4 * T * O * (comm.size - 1) / comm.size
    assert comm.allreduce(ledger.sent_bytes()) / comm.size == approx(2 * formula)


def test_rows_may_be_cut_in_any_way(comm):
    """Counts that are no block cut, an empty part among them."""
    counts = [(5 * r + 3) % 4 for r in range(comm.size)]
    start = sum(counts[: comm.rank])
    rows = slice(start, start + counts[comm.rank])
    a, b, bias, _, with_bias = operands(sum(counts), 6, 5)
    close(matmul.gathered(comm, a[rows], b, counts, bias), with_bias)
    part = slice(*partition.block(6, comm.size)[comm.rank])
    close(matmul.inner_cut(comm, linear(a[:, part], b[:, part]), counts, bias), with_bias[rows])


def test_a_chain_of_two_products_needs_one_collective(comm):
    """A · B · C with B cut by columns and C by rows."""
    a, b, c = normal((9, 8), 1), normal((13, 8), 2), normal((6, 13), 3)
    middle = matmul.columns(comm, a, cut(comm, b, 0)[0])
    c_sum = linear(middle, cut(comm, c, 1)[0])
    close(matmul.inner(comm, c_sum, purpose="chain"), a @ b.T @ c.T)
    assert ledger.calls() == ledger.calls("Allreduce", purpose="chain") == 1


def test_half_precision_weights_are_summed_in_float32(comm):
    """The result does not depend on the number of ranks but for float32's rounding."""
    a = np.ones((2, 1000), np.float32)
    b = np.full((3, 1000), 1 + 2**-7, BF16)
    c = matmul.inner(comm, linear(cut(comm, a, 1)[0], cut(comm, b, 1)[0]))
    np.testing.assert_array_equal(c, 1000 * (1 + 2**-7))


def test_refuses_on_every_rank(comm):
    """Counts that do not fit, before any message."""
    a, b = normal((2, 4)), normal((3, 4))
    for counts in ([2] * (comm.size + 1), [3] * comm.size):
        with pytest.raises(ValueError, match="Allgather: got 2 items"):
            matmul.gathered(comm, a, b, counts)
        with pytest.raises(ValueError, match="ReduceScatter: got 2 items"):
            matmul.inner_cut(comm, linear(a, b), counts)
    assert ledger.calls() == 0
