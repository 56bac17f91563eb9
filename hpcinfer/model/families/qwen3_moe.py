"""qwen3_moe (Yang 2025, arXiv:2505.09388): qwen3 with a mixture of experts."""

from __future__ import annotations

from hpcinfer.model.architecture import Architecture, Config
from hpcinfer.model.families import qwen2
from hpcinfer.model.families.qwen2_moe import experts


def architecture(config: Config) -> Architecture:
    """Architecture of a qwen3_moe; a window that is in use is in every layer."""
    N = config.layers("num_hidden_layers")
    bias = config.flag("attention_bias", False)
    return qwen2.architecture(
        config.without("layer_types"),
        G=config.size("num_key_value_heads", default=4),
        windows=qwen2.windows(config.without("layer_types"), lambda n: True),
        qk_norm="head",
        qkv_bias=bias,
        o_bias=bias,
        **experts(config, N, E=128, k=8, F=768),
    )
