"""How many tokens chose each expert: every token counts once, whoever computes it."""

import numpy as np
import pytest
from helpers.kinds import KINDS, SIZE
from helpers.parity import spread
from helpers.recorded import load
from mpi4py import MPI
from reference import models
from reference.parity import greedy

CASES = ("mixtral", "deepseek_v2", "qwen2_moe")
LAYOUTS = [*KINDS, *(text for text in spread(SIZE) if text not in KINDS)]


def counts(engine, case):
    """Expert load of some texts that share no beginning, and the tokens that were computed."""
    text = models.tokens(case, 150)
    engine.score([text[:1], text[1:60], text[60:62]])
    greedy(engine, [text[n : n + m] for n, m in ((70, 5), (90, 50), (80, 1))], 4)
    record, grid = engine.stats, engine.grid
    tokens = record.prefill.tokens + record.decode.tokens if grid.is_leader else 0
    assert grid.comm.allreduce(engine.scheduler.reused_tokens) == 0
    return engine.expert_load(), grid.comm.allreduce(tokens)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_every_token_counts_once(comm, shared_path, case, layout):
    """In each layer as many choices as tokens times k, and those that one rank counts."""
    engine = load(comm, shared_path, case, layout)
    arch = engine.model.arch
    found, tokens = counts(engine, case)
    assert tokens == 0 + 58 + 1 + (5 + 50 + 1) + 3 * 3
    assert found.shape == (arch.N, arch.E)
    per_layer = [tokens * arch.router.k * sparse for sparse in arch.sparse]
    assert found.sum(axis=1).tolist() == per_layer
    expected, _ = counts(load(MPI.COMM_SELF, shared_path, case, "tp=1"), case)
    np.testing.assert_array_equal(found, expected)


def test_a_model_without_experts_has_no_load(comm, shared_path):
    engine = load(comm, shared_path, "llama-gqa", f"tp={comm.size}")
    engine.score([models.tokens("llama-gqa", 9)])
    assert engine.expert_load().shape == (2, 0)
