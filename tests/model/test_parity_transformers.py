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

DENSE = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox")
SPARSE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3")
FAMILIES = DENSE + SPARSE
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
    if family in own:
        return common | own[family]
    if family in ("olmoe", "deepseek_v2", "deepseek_v3"):
        del common["head_dim"]
    return common | odd_experts(family, rng, heads, window)


def odd_experts(family, rng, heads, window):
    """Return what a small model of an odd number of experts says beside the common keys."""
    groups, per_group = int(rng.integers(2, 4)), int(rng.integers(2, 4))
    some, width = groups * per_group, 2 * int(rng.integers(12, 24)) + 1
    keys = {"num_experts_per_tok": int(rng.integers(1, 4)), "moe_intermediate_size": width}
    windowed = {"use_sliding_window": bool(rng.integers(2)), "sliding_window": window}
    if family == "mixtral":
        return {
            "intermediate_size": width,
            "num_experts_per_tok": keys["num_experts_per_tok"],
            "num_local_experts": some,
            "sliding_window": window if rng.integers(2) else None,
        }
    if family == "olmoe":
        return {
            "intermediate_size": width,
            "num_experts": some,
            "num_experts_per_tok": keys["num_experts_per_tok"],
            "clip_qkv": float(rng.choice([0.5, 2.0])) if rng.integers(2) else None,
            "norm_topk_prob": bool(rng.integers(2)),
        }
    if family in ("qwen2_moe", "qwen3_moe"):
        return (keys | windowed) | {
            "num_experts": some,
            "norm_topk_prob": bool(rng.integers(2)),
            "decoder_sparse_step": int(rng.integers(1, 3)),
            "mlp_only_layers": [0] if rng.integers(2) else [],
            "shared_expert_intermediate_size": 2 * int(rng.integers(12, 24)) + 1,
        }
    keys |= {
        "num_key_value_heads": heads,
        "q_lora_rank": int(rng.integers(20, 40)) if rng.integers(2) else None,
        "kv_lora_rank": 2 * int(rng.integers(9, 16)),
        "qk_nope_head_dim": 2 * int(rng.integers(5, 10)),
        "qk_rope_head_dim": 2 * int(rng.integers(3, 9)),
        "v_head_dim": int(rng.integers(9, 20)),
        "n_routed_experts": some,
        "n_shared_experts": int(rng.integers(1, 3)),
        "n_group": groups,
        "topk_group": 2,
        "first_k_dense_replace": int(rng.integers(0, 2)),
        "routed_scaling_factor": float(rng.choice([1.0, 2.5])),
    }
    if rng.integers(2):
        keys["rope_parameters"] = {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "mscale": float(rng.choice([0.7, 1.0])),
            "mscale_all_dim": float(rng.choice([0.0, 0.7, 1.0])),
        }
    if family == "deepseek_v2":
        return keys | {"topk_method": str(rng.choice(["greedy", "group_limited_greedy"]))}
    return keys | {
        "attention_bias": bool(rng.integers(2)),
        "norm_topk_prob": bool(rng.integers(2)),
        "rope_interleave": bool(rng.integers(2)),
    }


def oracle(family, seed, directory):
    """Have transformers build, save and run a model: texts, log-probabilities, greedy paths."""
    import torch
    from reference.oracle import (
        greedy,
        logprobs,
        nudged,
        put_weights,
        same_experts,
        saved_tensors,
    )
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)
    rng = np.random.default_rng([seed, FAMILIES.index(family)])
    config = AutoConfig.for_model(family, **odd_config(family, rng))
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    model = model.float().eval()
    tensors = saved_tensors(model)
    text = rng.integers(config.vocab_size, size=max(LENGTHS)).tolist()
    texts = [text[:n] for n in LENGTHS]

    # The first weights whose greedy choices, and choices of experts, are all clear
    for salt in range(20):
        key = f"{family}/{seed}/{salt}"
        put_weights(model, {name: models.tensor(key, name, shape) for name, shape in tensors})
        paths = [greedy(model, ids, NEW_TOKENS) for ids in texts[:2]]
        chosen = [text] + [ids + path for ids, (path, _) in zip(texts, paths, strict=False)]
        clear = min(margin for _, margin in paths) > MARGIN
        if clear and all(same_experts(model, nudged(model), ids) for ids in chosen):
            break
    else:
        raise RuntimeError(f"oracle: no weights of 20 decide {family} {seed} by {MARGIN}")

    model.save_pretrained(directory, max_shard_size="300KB" if seed % 2 else "5GB")
    convert(directory, directory.with_suffix(".h5"))
    return texts, [logprobs(model, ids) for ids in texts], [path for path, _ in paths]


@pytest.mark.parametrize(
    ("family", "seed"),
    [(family, seed) for family in FAMILIES for seed in range(4 if family in DENSE else 3)],
)
def test_equals_transformers(comm, shared_path, family, seed):
    """As saved by `save_pretrained`, whole or in shards, and converted."""
    directory = shared_path / "model"
    texts, expected, paths = on_root(comm, partial(oracle, family, seed, directory))
    for model in (directory, directory.with_suffix(".h5")):
        engine = hpcinfer.load(model, comm=comm, layout=f"tp={comm.size}")
        assert score_gap(engine, texts, expected) < TOLERANCE
        assert greedy(engine, texts[:2], NEW_TOKENS) == paths
