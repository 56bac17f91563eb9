"""olmoe (Muennighoff 2024, arXiv:2409.02060): experts, and qk norms over all heads."""

from __future__ import annotations

from hpcinfer.model.architecture import Architecture, Config
from hpcinfer.model.families import llama


def architecture(config: Config) -> Architecture:
    """Architecture of an olmoe."""
    D, H, N = (
        config.size("hidden_size", default=2048),
        config.size("num_attention_heads", default=16),
        config.layers("num_hidden_layers", default=16),
    )
    E = config.size("num_experts", "num_local_experts", default=64)
    if D % H or config.size("head_dim", default=D // H) != D // H:
        raise ValueError(
            f"config: got width {D}, {H} heads and head_dim={config.get('head_dim')}, need heads "
            "that share the width"
        )
    clip = config.get("clip_qkv")

    # Say what differs from a llama.
    return llama.architecture(
        config,
        positions=config.size("max_position_embeddings", default=4096),
        eps=config.number("rms_norm_eps", default=1e-5),
        ffn_bias=False,
        qk_norm="whole",
        clip_qkv=clip if clip is None else config.positive("clip_qkv"),
        E=E,
        moe_F=config.size("intermediate_size", default=2048),
        router=config.router(E, 8, normalise=config.flag("norm_topk_prob", False)),
        sparse=(True,) * N,
    )
