"""qwen2_moe (Yang 2024, arXiv:2407.10671): qwen2 with experts, some of them for every token."""

from __future__ import annotations

import reprlib

from hpcinfer.model.architecture import Architecture, Config
from hpcinfer.model.families import llama, qwen2

NAMES = llama.NAMES | {
    "shared.gate": "model.layers.{n}.mlp.shared_expert.gate_proj.weight",
    "shared.up": "model.layers.{n}.mlp.shared_expert.up_proj.weight",
    "shared.down": "model.layers.{n}.mlp.shared_expert.down_proj.weight",
    "shared_gate": "model.layers.{n}.mlp.shared_expert_gate.weight",
}


def architecture(config: Config) -> Architecture:
    """Architecture of a qwen2_moe; without `layer_types` every other early layer has the window."""
    N = config.layers("num_hidden_layers")
    upto = config.count("max_window_layers", default=28)
    return qwen2.architecture(
        config,
        G=config.size("num_key_value_heads", default=16),
        windows=qwen2.windows(config, lambda n: n % 2 == 0 and n < upto),
        qkv_bias=config.flag("qkv_bias", True),
        names=NAMES,
        shared_F=config.size("shared_expert_intermediate_size", default=5632),
        shared_gate=True,
        **experts(config, N, E=60, k=4, F=1408),
    )


def experts(config, N, E, k, F):
    """What qwen's configs say of experts; `E`, `k`, `F` are the family's own numbers."""
    E = config.size("num_experts", "num_local_experts", default=E)
    step, dense = config.size("decoder_sparse_step", default=1), config.get("mlp_only_layers")
    dense = [] if dense is None else dense
    if not isinstance(dense, list) or any(type(n) is not int for n in dense):
        raise ValueError(
            f"config: got mlp_only_layers={reprlib.repr(dense)}, need a list of layers' numbers"
        )
    return {
        "E": E,
        "moe_F": config.size("moe_intermediate_size", default=F),
        "router": config.router(E, k, normalise=config.flag("norm_topk_prob", False)),
        "sparse": tuple(n not in dense and (n + 1) % step == 0 for n in range(N)),
    }
