"""Every family equals transformers: log-probabilities and greedy tokens recorded beforehand."""

import numpy as np
import pytest
from helpers.parity import assert_equals_record, load
from reference import models
from reference.parity import TOLERANCE, score_gap

import hpcinfer

DENSE = ("llama-gqa", "mistral-window", "qwen2", "qwen3", "gpt2", "gpt_neox")
SPARSE = ("mixtral", "qwen2_moe-step", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3")
ONE_PER_FAMILY = DENSE + SPARSE
CHUNKED = (
    *DENSE,
    "llama-rope-dynamic",
    "llama-rope-longrope",
    "qwen2-window",
    "mixtral-window",
    "qwen2_moe-step",
    "deepseek_v2",
)


@pytest.mark.parametrize("form", ["directory", "h5"])
@pytest.mark.parametrize("case", models.CASES)
def test_equals_transformers(comm, shared_path, case, form):
    """One batch of texts, one batch of prompts with common prefixes."""
    assert_equals_record(load(comm, case, form, shared_path), case)


@pytest.mark.parametrize("case", CHUNKED)
def test_chunked_prefill_equals_transformers(comm, shared_path, case):
    """Prompts and texts longer than a step; pages of one prompt at hand when the next starts."""
    engine = load(comm, case, "directory", shared_path, step_tokens=40)
    assert_equals_record(engine, case)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", ONE_PER_FAMILY)
def test_half_precision_weights(comm, shared_path, case, dtype):
    """Widened to float32 they equal transformers; as they are, they stay near the full ones."""
    arrays = models.record(case)["arrays"]
    text, full, rounded = models.tokens(case, 33), arrays["logprobs_33"], arrays[dtype]

    # transformers in float32 on the rounded weights
    engine = load(comm, case, "directory", shared_path, dtype)
    widened = hpcinfer.load(
        shared_path / "model", comm=comm, layout=f"tp={comm.size}", dtype="float32"
    )
    assert score_gap(widened, [text], [rounded]) < TOLERANCE

    # Rounding the weights changes this much; rounding on the way may add as much again
    change = np.nanmax(np.abs(rounded - full))
    assert score_gap(engine, [text], [full]) < 3 * change
