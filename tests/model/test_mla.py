"""Latent attention: one key per token is cached and travels, its values are columns of it."""

import numpy as np
import pytest
from helpers.parity import load
from reference import models
from reference.parity import greedy

from hpcinfer.errors import UsageError
from hpcinfer.layout import Layout
from hpcinfer.ledger import ledger
from hpcinfer.model.cache import PAGE
from hpcinfer.model.families import read_architecture
from hpcinfer.model.layout_check import refuse_unfit
from hpcinfer.ops.attention import attention, merge

CASE = "deepseek_v2"
ARCH = read_architecture(models.CASES[CASE])
WIDTH = ARCH.mla.kv_rank + ARCH.mla.rotated
TEXT = 150


def test_a_page_holds_one_latent_and_one_key_per_token(comm, shared_path):
    """Not those of H heads, and no values of their own."""
    model = load(comm, CASE, "directory", shared_path).model
    per_token = WIDTH * 4 if model.heads.n_query else 0
    assert model.page_bytes == ARCH.N * PAGE * per_token
    assert model.cache.k[0].shape[1:] == (min(1, model.heads.n_query), PAGE, WIDTH)
    assert model.cache.v[0].nbytes == 0


def test_values_do_not_travel(comm, shared_path):
    """A ring over P ranks sends every key P-1 times in each layer, with 8 bytes that name it."""
    engine = load(comm, CASE, "directory", shared_path, layout=f"cp={comm.size}", step_tokens=300)
    ledger.clear()
    engine.score([models.tokens(CASE, TEXT + 1)])  # the last token is scored, not computed
    sent = sum(comm.allgather(ledger.sent_bytes("Shift", purpose="ring")))
    assert sent == ARCH.N * (comm.size - 1) * TEXT * (4 * WIDTH + 8)


@pytest.mark.mpi(min_size=2)
def test_the_latents_of_ranks_with_the_same_tokens_are_cut(comm, shared_path):
    """With tp and cp all ranks hold parts of one sequence, and decode as one rank does."""
    if comm.size % 2:
        pytest.skip("needs an even number of ranks, 4 or more to have both axes")
    layout = f"tp=2,cp={comm.size // 2}"
    engine = load(comm, CASE, "directory", shared_path, layout=layout)
    assert engine.model.attention.kv.size == (comm.size if comm.size > 2 else 1)
    assert not engine.model.attention.by_columns
    [path] = [p for p in models.record(CASE)["greedy"] if p["prompt"] == 90]
    assert greedy(engine, [models.tokens(CASE, 90)], 64) == [path["tokens"]]


@pytest.mark.single
def test_more_of_tp_than_heads_is_refused_where_the_sequence_is_cut():
    with pytest.raises(UsageError, match="there are 5 query heads for tp=6"):
        refuse_unfit(ARCH, Layout(tp=6, cp=2))


@pytest.mark.single
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_values_that_are_columns_of_the_keys(dtype):
    """`v_columns` gives what the same values as an array of their own give, also merged."""
    rng = np.random.default_rng(4)
    q = rng.normal(size=(9, 3, 10)).astype(np.float32)
    k = rng.normal(size=(1100, 1, 10)).astype(dtype)
    q_pos, k_pos = np.arange(1091, 1100), np.arange(1100)
    rest = {"scale": 0.3, "groups": ((0, 3),)}
    o, lse = attention(q, k, k[..., :6], q_pos, k_pos, **rest)
    o_view, lse_view = attention(q, k, k[..., :0], q_pos, k_pos, v_columns=6, **rest)
    np.testing.assert_array_equal(o, o_view)
    np.testing.assert_array_equal(lse, lse_view)
    parts = [
        attention(q, k[rows], k[rows, :, :0], q_pos, k_pos[rows], v_columns=6, **rest)
        for rows in (slice(0, 500), slice(500, 1100))
    ]
    np.testing.assert_allclose(merge(*parts[0], *parts[1])[0], o, atol=1e-5)
