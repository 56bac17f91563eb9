"""mistral (Jiang 2023, arXiv:2310.06825): llama with a sliding window in every layer, no biases."""

from __future__ import annotations

from hpcinfer.model.architecture import Architecture, Config
from hpcinfer.model.families import llama


def architecture(config: Config) -> Architecture:
    """Architecture of a mistral; a config without sliding_window means 4096, null means none."""
    N = config.layers("num_hidden_layers")
    window = config.values.get("sliding_window", 4096)
    window = None if window is None else config.size("sliding_window", default=4096)
    return llama.architecture(
        config,
        G=config.size("num_key_value_heads", default=8),
        positions=config.size("max_position_embeddings", default=131072),
        windows=(window,) * N,
        qkv_bias=False,
        o_bias=False,
        ffn_bias=False,
    )
