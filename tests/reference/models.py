"""Small models of every family, written as the Hugging Face directories that people have on disk.

A case is a `config.json` (`CASES`) and weights which depend on nothing but the case, its recorded
seed and the tensor's name, so that every machine writes the same model. Which tensors a case has,
and in what shape, was recorded from transformers (`record.py`) and is read from `<case>.json`.

All tensors are random, biases and norm weights too: transformers initialises biases to zero and
norm weights to one, and a program that forgot either would agree with such a model. For the same
reason some cases have a norm epsilon far above the usual.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent

# The two conventions of config.json: transformers 4 (rope_theta, rope_scaling, torch_dtype) and
# transformers 5 (rope_parameters, dtype). Keys that people's files lack are left out on purpose.
_V4 = {"torch_dtype": "float32", "transformers_version": "4.44.2", "use_cache": True}
_V5 = {"dtype": "float32", "transformers_version": "5.0.0", "use_cache": True}

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "intermediate_size": 171,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MISTRAL = _LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
_QWEN2 = _LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
_QWEN3 = _LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
_MIXTRAL = _LLAMA | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "intermediate_size": 43,
    "num_experts_per_tok": 2,
    "num_local_experts": 5,
    "router_jitter_noise": 0.0,
}
_QWEN2_MOE = _QWEN2 | {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "decoder_sparse_step": 1,
    "intermediate_size": 83,
    "max_position_embeddings": 512,
    "moe_intermediate_size": 37,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 41,
}
_QWEN3_MOE = _QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "intermediate_size": 83,
    "max_position_embeddings": 512,
    "moe_intermediate_size": 37,
    "num_experts": 7,
    "num_experts_per_tok": 3,
}
_DEEPSEEK_V2 = _LLAMA | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "attention_bias": False,
    "first_k_dense_replace": 1,
    "hidden_size": 75,
    "intermediate_size": 83,
    "kv_lora_rank": 22,
    "max_position_embeddings": 512,
    "moe_intermediate_size": 37,
    "moe_layer_freq": 1,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 5,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 5,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 10,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "v_head_dim": 11,
}
_DEEPSEEK_V3 = _DEEPSEEK_V2 | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "n_routed_experts": 9,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 4,
    "num_nextn_predict_layers": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
_GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "n_ctx": 256,
    "n_positions": 256,
    "n_embd": 100,
    "n_head": 5,
    "n_layer": 2,
    "attn_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "resid_pdrop": 0.1,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
_NEOX = {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "hidden_act": "gelu",
    "hidden_size": 120,
    "intermediate_size": 173,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "num_attention_heads": 5,
    "num_hidden_layers": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def _heads(hidden: int, query: int, key_value: int, width: int) -> dict:
    """Return the head geometry keys: width D, query heads H, key/value heads G, head width K."""
    return {
        "hidden_size": hidden,
        "num_attention_heads": query,
        "num_key_value_heads": key_value,
        "head_dim": width,
    }


CASES: dict[str, dict] = {
    # Llama: geometry, tying, biases
    "llama-gqa": _LLAMA
    | _V5
    | _heads(112, 14, 2, 64)
    | {
        "vocab_size": 1003,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "llama-tied": _LLAMA
    | _V4
    | {
        "hidden_size": 96,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "vocab_size": 1009,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "rope_theta": 500000.0,
        "rope_scaling": None,
    },
    "llama-bias": _LLAMA
    | _V4
    | _heads(98, 14, 2, 16)
    | {
        "vocab_size": 1011,
        "num_hidden_layers": 3,
        "rms_norm_eps": 0.02,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
        "pretraining_tp": 1,
    },
    # Llama: rope variants
    "llama-rope-linear": _LLAMA
    | _V4
    | {
        "hidden_size": 100,
        "num_attention_heads": 5,
        "vocab_size": 1007,
        "max_position_embeddings": 64,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "llama-rope-dynamic": _LLAMA
    | _V4
    | _heads(105, 7, 1, 24)
    | {
        "vocab_size": 1013,
        "max_position_embeddings": 48,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "dynamic", "factor": 4.0},
    },
    "llama-rope-llama3": _LLAMA
    | _V4
    | _heads(112, 14, 2, 64)
    | {
        "vocab_size": 1019,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 64,
            "rope_type": "llama3",
        },
    },
    "llama-rope-yarn": _LLAMA
    | _V5
    | _heads(102, 6, 2, 64)
    | {
        "vocab_size": 1021,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 10000.0,
            "rope_type": "yarn",
        },
    },
    "llama-rope-longrope": _LLAMA
    | _V5
    | _heads(102, 6, 3, 16)
    | {
        "vocab_size": 1021,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "long_factor": [1.0, 1.3, 1.9, 2.6, 3.5, 5.0, 8.0, 11.0],
            "original_max_position_embeddings": 64,
            "rope_theta": 10000.0,
            "rope_type": "longrope",
            "short_factor": [1.0, 1.0, 1.05, 1.1, 1.2, 1.4, 1.7, 2.0],
        },
    },
    # Mistral: with a window shorter than the texts, without one, and longrope as Phi-3 writes it
    "mistral-window": _MISTRAL
    | _V4
    | _heads(100, 6, 2, 24)
    | {
        "vocab_size": 1017,
        "max_position_embeddings": 512,
        "sliding_window": 21,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
    },
    "mistral-full": _MISTRAL
    | _V5
    | _heads(96, 8, 2, 16)
    | {
        "vocab_size": 1025,
        "max_position_embeddings": 512,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    },
    "mistral-longrope": _MISTRAL
    | _V4
    | _heads(96, 4, 4, 24)
    | {
        "vocab_size": 1027,
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 40,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "attention_factor": 1.25,
            "long_factor": [1.0, 1.1, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0],
            "short_factor": [1.0, 1.0, 1.0, 1.1, 1.1, 1.2, 1.2, 1.3, 1.5, 1.7, 1.8, 2.0],
            "type": "longrope",
        },
    },
    # Qwen2: bias on q, k, v; a window that is switched off, and one on the upper layers only
    "qwen2": _QWEN2
    | _V4
    | {
        "hidden_size": 112,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 1029,
        "max_position_embeddings": 512,
        "max_window_layers": 1,
        "sliding_window": 32,
        "tie_word_embeddings": True,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
    },
    "qwen2-window": _QWEN2
    | _V4
    | {
        "hidden_size": 120,
        "num_attention_heads": 6,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "vocab_size": 1031,
        "max_position_embeddings": 512,
        "max_window_layers": 1,
        "sliding_window": 17,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "use_sliding_window": True,
    },
    "qwen2-rope-yarn": _QWEN2
    | _V4
    | _heads(112, 14, 2, 64)
    | {
        "vocab_size": 1005,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "beta_fast": 12,
            "beta_slow": 2,
            "factor": 3.0,
            "mscale": 0.9,
            "mscale_all_dim": 0.4,
            "original_max_position_embeddings": 64,
            "rope_type": "yarn",
            "truncate": False,
        },
    },
    # Qwen3: qk-norm, head_dim a number of its own, layer_types written out
    "qwen3": _QWEN3
    | _V5
    | _heads(100, 14, 2, 24)
    | {
        "vocab_size": 1015,
        "rms_norm_eps": 0.01,
        "attention_bias": False,
        "layer_types": ["full_attention", "full_attention"],
        "max_position_embeddings": 512,
        "max_window_layers": 2,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "use_sliding_window": False,
    },
    "qwen3-window": _QWEN3
    | _V5
    | _heads(98, 5, 1, 64)
    | {
        "vocab_size": 1001,
        "attention_bias": True,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "max_position_embeddings": 512,
        "max_window_layers": 3,
        "num_hidden_layers": 3,
        "sliding_window": 19,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "use_sliding_window": True,
    },
    # Mixtral: weights of the choices that add up to 1; a window in every layer
    "mixtral": _MIXTRAL
    | _V4
    | {
        "hidden_size": 80,
        "num_attention_heads": 10,
        "num_key_value_heads": 2,
        "vocab_size": 1003,
        "max_position_embeddings": 512,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "rope_theta": 1000000.0,
    },
    "mixtral-window": _MIXTRAL
    | _V5
    | _heads(66, 3, 1, 16)
    | {
        "vocab_size": 1009,
        "max_position_embeddings": 512,
        "num_experts_per_tok": 1,
        "num_local_experts": 6,
        "sliding_window": 19,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    # Qwen2-MoE: a gated shared expert; a dense layer by the step and one by its number
    "qwen2_moe": _QWEN2_MOE
    | _V4
    | {
        "hidden_size": 84,
        "num_attention_heads": 7,
        "num_key_value_heads": 7,
        "vocab_size": 1011,
        "norm_topk_prob": False,
        "sliding_window": None,
        "use_sliding_window": False,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
    },
    "qwen2_moe-step": _QWEN2_MOE
    | _V5
    | {
        "hidden_size": 80,
        "num_attention_heads": 10,
        "num_key_value_heads": 5,
        "num_hidden_layers": 4,
        "vocab_size": 1007,
        "decoder_sparse_step": 2,
        "max_window_layers": 2,
        "mlp_only_layers": [3],
        "norm_topk_prob": True,
        "num_experts": 6,
        "qkv_bias": False,
        "sliding_window": 23,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    # Qwen3-MoE: a dense layer in the middle
    "qwen3_moe": _QWEN3_MOE
    | _V4
    | _heads(68, 6, 2, 24)
    | {
        "vocab_size": 1013,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
        "num_hidden_layers": 3,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
    },
    # OLMoE: norms over all heads together, with clipping and shared key/value heads, and without
    "olmoe": _LLAMA
    | _V4
    | {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "hidden_size": 80,
        "intermediate_size": 37,
        "num_attention_heads": 10,
        "num_key_value_heads": 5,
        "num_experts": 9,
        "num_experts_per_tok": 3,
        "clip_qkv": 0.9,
        "max_position_embeddings": 512,
        "norm_topk_prob": False,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": 1017,
    },
    # DeepSeek-V2: the large form (latent queries, groups, yarn) and the lite one
    "deepseek_v2": _DEEPSEEK_V2
    | _V4
    | {
        "vocab_size": 1003,
        "n_group": 3,
        "q_lora_rank": 26,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 8,
            "mscale": 0.9,
            "mscale_all_dim": 0.6,
            "original_max_position_embeddings": 64,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 1.6,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
    },
    "deepseek_v2-lite": _DEEPSEEK_V2
    | _V5
    | {
        "vocab_size": 1009,
        "hidden_size": 76,
        "n_group": 1,
        "n_routed_experts": 5,
        "num_attention_heads": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "routed_scaling_factor": 1.0,
        "topk_group": 1,
        "topk_method": "greedy",
    },
    # DeepSeek-V3: as released, and with what its config can say otherwise
    "deepseek_v3": _DEEPSEEK_V3
    | _V4
    | {
        "vocab_size": 1011,
        "ep_size": 1,
        "n_group": 3,
        "q_lora_rank": 26,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 8,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 64,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "topk_group": 2,
    },
    "deepseek_v3-plain": _DEEPSEEK_V3
    | _V5
    | {
        "vocab_size": 1013,
        "attention_bias": True,
        "first_k_dense_replace": 0,
        "n_group": 1,
        "norm_topk_prob": False,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "q_lora_rank": 26,
        "rms_norm_eps": 0.01,
        "rope_interleave": False,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "routed_scaling_factor": 1.0,
        "tie_word_embeddings": True,
        "topk_group": 1,
    },
    # GPT-2: odd FFN, the Hub's file form, and an untied head
    "gpt2": _GPT2
    | _V5
    | {
        "vocab_size": 1013,
        "layer_norm_epsilon": 0.01,
        "n_inner": 171,
        "tie_word_embeddings": True,
    },
    "gpt2-hub": _GPT2
    | {"vocab_size": 1023, "n_layer": 3, "n_head": 4, "scale_attn_by_inverse_layer_idx": True},
    "gpt2-untied": _GPT2
    | _V4
    | {
        "vocab_size": 1033,
        "activation_function": "gelu",
        "n_embd": 96,
        "n_head": 24,
        "n_inner": 173,
        "scale_attn_weights": False,
        "tie_word_embeddings": False,
    },
    # GPT-NeoX: parallel and sequential residual, rotary share 0.25, 1.0 and 0.5, bias and none
    "gpt_neox": _NEOX
    | _V4
    | {
        "vocab_size": 1019,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
    },
    "gpt_neox-sequential": _NEOX
    | _V5
    | {
        "vocab_size": 1009,
        "attention_bias": True,
        "layer_norm_eps": 0.02,
        "rope_parameters": {
            "partial_rotary_factor": 1.0,
            "rope_theta": 10000.0,
            "rope_type": "default",
        },
        "tie_word_embeddings": False,
        "use_parallel_residual": False,
    },
    "gpt_neox-tied": _NEOX
    | _V4
    | {
        "vocab_size": 1007,
        "attention_bias": False,
        "hidden_act": "gelu_new",
        "hidden_size": 112,
        "num_attention_heads": 14,
        "rope_scaling": {"factor": 2.0, "type": "linear"},
        "rotary_emb_base": 5000,
        "rotary_pct": 0.5,
        "tie_word_embeddings": True,
        "use_parallel_residual": True,
    },
}

# In how many files the tests write a case; the others are one file.
SHARDS = {"llama-gqa": 2, "gpt_neox": 3}


def record(case: str) -> dict:
    """Return what was recorded of a case; `record.py` lists the keys.

    Arrays (`logprobs_<n>`, `logits`, ...) come from `<case>.npz`, the rest from `<case>.json`.
    """
    facts = json.loads((HERE / f"{case}.json").read_text())
    with np.load(HERE / f"{case}.npz", allow_pickle=False) as arrays:
        facts["arrays"] = dict(arrays)
    return facts


def philox(key: str) -> np.random.Philox:
    """Return the bit generator of a key."""
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(digest, "little"))


def draw(key: str, shape: Iterable[int]) -> np.ndarray:
    """Return float32 normal numbers of `shape` that depend on `key` alone.

    The bits of Philox are the same in every NumPy; the normal law is made here (Box and Muller
    1958), because NumPy may change its own between versions.
    """
    shape = tuple(shape)
    bits = philox(key).random_raw(2 * int(np.prod(shape)))
    u, v = ((bits >> np.uint64(11)) + 0.5).reshape(2, -1) * 2.0**-53
    return (np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * v)).reshape(shape).astype(np.float32)


def tensor(key: str, name: str, shape: Iterable[int]) -> np.ndarray:
    """Return the weights of one tensor, with attention and logits neither flat nor peaked."""
    x = draw(f"{key}/{name}", shape)
    if name.endswith((".bias", "e_score_correction_bias")):
        return np.float32(0.2) * x
    # A final norm of both signs: with a tied head a token would else be its own best successor
    if name.endswith(("model.norm.weight", "ln_f.weight", "final_layer_norm.weight")):
        return x
    if x.ndim == 1:
        return np.float32(1) + np.float32(0.2) * x
    if "wpe" in name:
        return np.float32(0.5) * x
    if any(part in name for part in ("embed_tokens", "embed_in", "wte")):
        return np.float32(4 / np.sqrt(x.shape[1])) * x
    if "embed_out" in name or "lm_head" in name:
        return np.float32(2.5 / np.sqrt(x.shape[1])) * x
    # What GELU adds is mostly the same for all tokens: without less of it and sharper attention,
    # greedy decoding repeats a few tokens
    gain = 1.2
    # Routers that decide, so that few choices of experts are near
    if name.endswith((".mlp.gate.weight", "moe.gate.weight")):
        gain = 3.0
    if "4h_to_h" in name or "mlp.c_proj" in name:
        gain = 0.5
    if "query_key_value" in name or "c_attn" in name:
        gain = 1.7
    # Linear layers are stored (out, in), GPT-2's Conv1D layers (in, out)
    fan_in = x.shape[0] if ".c_" in name else x.shape[1]
    return np.float32(gain / np.sqrt(fan_in)) * x


def weights(case: str, facts: dict | None = None) -> dict[str, np.ndarray]:
    """Return the float32 weights of a case, by the names that `save_pretrained` gives them."""
    facts = facts or record(case)
    key = f"{case}/{facts['seed']}"
    return {name: tensor(key, name, shape) for name, shape in facts["tensors"]}


def tokens(case: str, length: int) -> list[int]:
    """Return the first `length` token ids of a case's text: all its prompts share their prefix."""
    bits = philox(f"{case}/tokens").random_raw(length)
    return (bits % np.uint64(CASES[case]["vocab_size"])).tolist()


def write_model(case: str, directory: Path, shards: int = 1, dtype: str = "float32") -> Path:
    """Write a case as a Hugging Face directory and return its path.

    Parameters
    ----------
    case : str
        A key of `CASES`.
    directory : Path
        Made if it does not exist.
    shards : int
        Number of safetensors files; with more than one, an index is written.
    dtype : str
        "float32", "bfloat16" or "float16".
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    stored = {
        name: array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        for name, array in weights(case).items()
    }
    write_weights(as_on_hub(case, stored), directory, shards)
    config = dict(CASES[case])
    config.update({key: dtype for key in ("dtype", "torch_dtype") if key in config})
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    return directory


def as_on_hub(case: str, stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Give some cases what files on the Hub carry: buffers, no prefix, a tied head stored twice."""
    if case == "gpt2-hub":
        mask = np.tril(np.ones((1, 1, 256, 256), np.float32))
        stored = {name.removeprefix("transformer."): array for name, array in stored.items()}
        return stored | {f"h.{n}.attn.bias": mask for n in range(3)}
    if case == "gpt_neox":
        mask = np.tril(np.ones((1, 1, 256, 256), bool))
        for n in range(2):
            stored[f"gpt_neox.layers.{n}.attention.bias"] = mask
            stored[f"gpt_neox.layers.{n}.attention.masked_bias"] = np.array(-1e9, np.float32)
            stored[f"gpt_neox.layers.{n}.attention.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    if case == "deepseek_v3":
        stored["model.layers.3.eh_proj.weight"] = np.ones((75, 150), np.float32)
        stored["model.layers.3.self_attn.o_proj.weight"] = np.ones((75, 55), np.float32)
    if case == "llama-tied":
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"].copy()
        stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    return stored


def write_weights(stored: dict[str, np.ndarray], directory: Path, shards: int) -> None:
    """Write the tensors into `shards` files, dealt in turn so that no layer stays together."""
    if shards == 1:
        save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
        return

    # Deal the tensors to the files
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map = {name: files[i % shards] for i, name in enumerate(sorted(stored))}
    for file in files:
        part = {name: stored[name] for name in stored if weight_map[name] == file}
        save_file(part, directory / file, metadata={"format": "pt"})

    # Write the index
    total = sum(array.nbytes for array in stored.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
