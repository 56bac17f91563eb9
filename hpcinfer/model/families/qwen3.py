"""qwen3 (Yang 2025, arXiv:2505.09388): qwen2 with norms on queries and keys instead of biases."""

from __future__ import annotations

from hpcinfer.model.architecture import Architecture, Config
from hpcinfer.model.families import qwen2


def architecture(config: Config) -> Architecture:
    """Architecture of a qwen3; the width of a head is its own number."""
    K = config.size("head_dim", default=128)
    bias = config.flag("attention_bias", False)
    return qwen2.architecture(config, K=K, qk_norm="head", qkv_bias=bias, o_bias=bias)
