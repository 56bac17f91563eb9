"""Every family equals transformers, live: models of odd shapes in the files that it saves itself.

Skipped where torch and transformers are not installed (`pip install -e .[parity]`).
"""

import importlib.util
from functools import partial

import numpy as np
import pytest
from reference import models
from reference.parity import TOLERANCE, greedy, on_root, score_gap

import hpcinfer
from hpcinfer.io.convert import convert

# Only rank 0 imports them: they are large
pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "transformers")),
    reason="torch and transformers are not installed",
)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox")
LENGTHS = (2, 45, 110)
NEW_TOKENS = 64
MARGIN = 1e-3  # least difference of the best two logits that decides a greedy token


def odd_config(family, rng):
    """Return the configuration of a small model of odd shape, in the family's own keys."""
    heads = int(rng.choice([3, 5, 6, 14]))
    groups = int(rng.choice([g for g in range(1, heads + 1) if heads % g == 0]))
    head_dim = int(rng.choice([16, 24, 64]))
    common = {
        "vocab_size": 1000 + int(rng.integers(1, 40)),
        "tie_word_embeddings": bool(rng.integers(2)),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    ffn, layers = 2 * int(rng.integers(60, 110)) + 1, int(rng.integers(2, 4))
    if family == "gpt2":
        return common | {
            "n_embd": heads * 8 * int(rng.integers(1, 3)),
            "n_head": heads,
            "n_inner": ffn,
            "n_layer": layers,
            "n_positions": 200,
            "scale_attn_by_inverse_layer_idx": bool(rng.integers(2)),
        }
    common |= {
        "hidden_size": heads * 8 * int(rng.integers(1, 3)),
        "num_attention_heads": heads,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "max_position_embeddings": 256,
    }
    if family == "gpt_neox":
        return common | {
            "rotary_pct": float(rng.choice([0.25, 0.5, 1.0])),
            "use_parallel_residual": bool(rng.integers(2)),
            "attention_bias": bool(rng.integers(2)),
        }
    common |= {"num_key_value_heads": groups, "head_dim": head_dim}
    window = int(rng.integers(9, 40))
    own = {
        "llama": {"attention_bias": bool(rng.integers(2)), "mlp_bias": bool(rng.integers(2))},
        "mistral": {"sliding_window": window if rng.integers(2) else None},
        "qwen2": {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1},
        "qwen3": {"attention_bias": bool(rng.integers(2))},
    }
    return common | own[family]


def oracle(family, seed, directory):
    """Have transformers build, save and run a model: texts, log-probabilities, greedy paths."""
    import torch
    from reference.oracle import greedy, logprobs, put_weights, saved_tensors
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)
    rng = np.random.default_rng([seed, FAMILIES.index(family)])
    config = AutoConfig.for_model(family, **odd_config(family, rng))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    tensors = saved_tensors(model)
    text = rng.integers(config.vocab_size, size=max(LENGTHS)).tolist()
    texts = [text[:n] for n in LENGTHS]

    # The first weights whose greedy choices are all clear
    for salt in range(20):
        key = f"{family}/{seed}/{salt}"
        put_weights(model, {name: models.tensor(key, name, shape) for name, shape in tensors})
        paths = [greedy(model, ids, NEW_TOKENS) for ids in texts[:2]]
        if min(margin for _, margin in paths) > MARGIN:
            break
    else:
        raise RuntimeError(f"oracle: no weights of 20 decide {family} {seed} by {MARGIN}")

    model.save_pretrained(directory, max_shard_size="300KB" if seed % 2 else "5GB")
    convert(directory, directory.with_suffix(".h5"))
    return texts, [logprobs(model, ids) for ids in texts], [path for path, _ in paths]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(comm, shared_path, family, seed):
    """As saved by `save_pretrained`, whole or in shards, and converted."""
    directory = shared_path / "model"
    texts, expected, paths = on_root(comm, partial(oracle, family, seed, directory))
    for model in (directory, directory.with_suffix(".h5")):
        engine = hpcinfer.load(model, comm=comm, layout=f"tp={comm.size}")
        assert score_gap(engine, texts, expected) < TOLERANCE
        assert greedy(engine, texts[:2], NEW_TOKENS) == paths
