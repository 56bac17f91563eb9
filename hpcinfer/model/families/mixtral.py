"""mixtral (Jiang 2024, arXiv:2401.04088): mistral with a mixture of experts in every layer."""

from __future__ import annotations

from hpcinfer.model.architecture import Architecture, Config
from hpcinfer.model.families import llama

NAMES = llama.NAMES | {
    "router": "model.layers.{n}.block_sparse_moe.gate.weight",
    "experts.gate": "model.layers.{n}.block_sparse_moe.experts.{e}.w1.weight",
    "experts.up": "model.layers.{n}.block_sparse_moe.experts.{e}.w3.weight",
    "experts.down": "model.layers.{n}.block_sparse_moe.experts.{e}.w2.weight",
}


def architecture(config: Config) -> Architecture:
    """Architecture of a mixtral; a config without sliding_window has none."""
    N = config.layers("num_hidden_layers")
    E = config.size("num_local_experts", "num_experts", default=8)
    window = config.get("sliding_window")

    # Say what differs from a llama.
    return llama.architecture(
        config,
        G=config.size("num_key_value_heads", default=8),
        positions=config.size("max_position_embeddings", default=131072),
        theta=1e6,
        eps=config.number("rms_norm_eps", default=1e-5),
        windows=(window and config.size("sliding_window"),) * N,
        qkv_bias=False,
        o_bias=False,
        ffn_bias=False,
        names=NAMES,
        E=E,
        moe_F=config.size("intermediate_size", default=14336),
        router=config.router(E, 2, normalise=True),
        sparse=(True,) * N,
    )
