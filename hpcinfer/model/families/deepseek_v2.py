"""deepseek_v2 (DeepSeek-AI 2024, arXiv:2405.04434): latent attention, and experts in groups."""

from __future__ import annotations

from hpcinfer.model.architecture import Architecture, Config, Latent
from hpcinfer.model.families import llama
from hpcinfer.ops.rope import yarn_magnitude

NAMES = llama.NAMES | {
    "q_a": "model.layers.{n}.self_attn.q_a_proj.weight",
    "q_a_bias": "model.layers.{n}.self_attn.q_a_proj.bias",
    "q_b": "model.layers.{n}.self_attn.q_b_proj.weight",
    "kv_a": "model.layers.{n}.self_attn.kv_a_proj_with_mqa.weight",
    "kv_a_bias": "model.layers.{n}.self_attn.kv_a_proj_with_mqa.bias",
    "kv_b": "model.layers.{n}.self_attn.kv_b_proj.weight",
    "q_norm": "model.layers.{n}.self_attn.q_a_layernorm.weight",
    "kv_norm": "model.layers.{n}.self_attn.kv_a_layernorm.weight",
    "router_bias": "model.layers.{n}.mlp.gate.e_score_correction_bias",
    "shared.gate": "model.layers.{n}.mlp.shared_experts.gate_proj.weight",
    "shared.up": "model.layers.{n}.mlp.shared_experts.up_proj.weight",
    "shared.down": "model.layers.{n}.mlp.shared_experts.down_proj.weight",
}


def architecture(config: Config) -> Architecture:
    """Architecture of a deepseek_v2."""
    method = config.word("topk_method", default="greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise ValueError(
            f"config: got topk_method={method!r:.99}, need greedy or group_limited_greedy"
        )
    for name, need in (("scoring_func", "softmax"), ("norm_topk_prob", False), ("mlp_bias", False)):
        refuse_other(config, name, need)
    grouped = method == "group_limited_greedy"
    E = config.size("n_routed_experts", "num_experts", default=64)
    router = config.router(
        E,
        None,
        scale=config.number("routed_scaling_factor", default=1.0),
        groups=config.size("n_group") if grouped else 1,
        top_groups=config.size("topk_group") if grouped else 1,
    )
    return latent(config, E, router, dense=0, shared=2, F=1407, positions=2048)


def latent(config, E, router, dense, shared, F, positions, interleaved=True, **differences):
    """Architecture of a family with latent attention and experts after the first layers.

    Parameters
    ----------
    E : routed experts
    dense, shared, F, positions : the family's own numbers of dense layers and shared experts, width
        of an expert, and positions
    """
    refuse_other(config, "moe_layer_freq", 1)
    H, N = config.size("num_attention_heads"), config.layers("num_hidden_layers")
    if config.size("num_key_value_heads", default=H) != H:
        raise ValueError(
            f"config: got num_key_value_heads={config.get('num_key_value_heads')}, need {H} as "
            "num_attention_heads; latent attention has no other"
        )
    # Read the widths of queries, keys and values, and how keys are rotated.
    bias = config.flag("attention_bias", False)
    mla = _widths(config, interleaved, bias)
    rope = config.rope(mla.rotated)
    if rope.dim != mla.rotated:
        raise ValueError(f"config: got {rope.dim} rotated columns, need all {mla.rotated}")

    # Let experts follow some dense layers.
    first = config.count("first_k_dense_replace", default=dense)
    moe_F = config.size("moe_intermediate_size", default=F)
    return llama.architecture(
        config,
        G=1,
        K=mla.kv_rank + mla.rotated,
        positions=config.size("max_position_embeddings", default=positions),
        rope=rope,
        scales=(_scale(config, mla, rope),) * N,
        mla=mla,
        qkv_bias=False,
        o_bias=bias,
        ffn_bias=False,
        names=NAMES,
        E=E,
        moe_F=moe_F,
        shared_F=moe_F * config.size("n_shared_experts", default=shared),
        router=router,
        sparse=tuple(n >= first for n in range(N)),
        **differences,
    )


def refuse_other(config, name, need):
    """Refuse a config that states something else than what is built here."""
    value = config.get(name, default=need)
    if value != need:
        raise ValueError(f"config: got {name}={value!r:.99}, need {need!r} for {config.family}")


def _widths(config, interleaved, bias):
    """Widths of latent attention, as the config names them."""
    q_rank = config.values.get("q_lora_rank", 1536)
    return Latent(
        q_rank=0 if q_rank is None else config.size("q_lora_rank", default=1536),
        kv_rank=config.size("kv_lora_rank", default=512),
        plain=config.size("qk_nope_head_dim", default=128),
        rotated=config.size("qk_rope_head_dim", default=64),
        value=config.size("v_head_dim", default=128),
        interleaved=interleaved,
        bias=bias,
    )


def _scale(config, mla, rope):
    """Factor of the scores, in which the temperature's growth with the context stands too."""
    scale = (mla.plain + mla.rotated) ** -0.5
    growth = config.rope_table().number("mscale_all_dim", default=0.0)
    if growth and rope.kind != "default":
        scale *= yarn_magnitude(rope.factor, growth) ** 2
    return scale
