"""gpt_neox (Black 2022, arXiv:2204.06745): parallel residual, partial rotary, qkv per head."""

from __future__ import annotations

from hpcinfer.model.architecture import Architecture, Config, context_of, head_width

NAMES = {
    "embed": "gpt_neox.embed_in.weight",
    "norm1": "gpt_neox.layers.{n}.input_layernorm.weight",
    "norm1_bias": "gpt_neox.layers.{n}.input_layernorm.bias",
    "fused_qkv": "gpt_neox.layers.{n}.attention.query_key_value.weight",
    "fused_qkv_bias": "gpt_neox.layers.{n}.attention.query_key_value.bias",
    "o": "gpt_neox.layers.{n}.attention.dense.weight",
    "o_bias": "gpt_neox.layers.{n}.attention.dense.bias",
    "norm2": "gpt_neox.layers.{n}.post_attention_layernorm.weight",
    "norm2_bias": "gpt_neox.layers.{n}.post_attention_layernorm.bias",
    "up": "gpt_neox.layers.{n}.mlp.dense_h_to_4h.weight",
    "up_bias": "gpt_neox.layers.{n}.mlp.dense_h_to_4h.bias",
    "down": "gpt_neox.layers.{n}.mlp.dense_4h_to_h.weight",
    "down_bias": "gpt_neox.layers.{n}.mlp.dense_4h_to_h.bias",
    "final_norm": "gpt_neox.final_layer_norm.weight",
    "final_norm_bias": "gpt_neox.final_layer_norm.bias",
    "head": "embed_out.weight",
}


def architecture(config: Config) -> Architecture:
    """Architecture of a gpt_neox."""
    D = config.size("hidden_size", default=6144)
    H = config.size("num_attention_heads", default=64)
    N = config.layers("num_hidden_layers", default=44)
    K = head_width(D, H)
    positions = config.size("max_position_embeddings", default=2048)
    bias = config.flag("attention_bias", True)

    # This family names its rope's base and share differently, and looks at no other name.
    rope = config.without("rope_theta", "partial_rotary_factor").rope(
        K,
        theta=config.number("rotary_emb_base", default=10000.0),
        partial=config.number("rotary_pct", default=0.25),
    )
    return Architecture(
        family="gpt_neox",
        D=D,
        H=H,
        G=H,
        K=K,
        F=config.size("intermediate_size", default=4 * D),
        V=config.size("vocab_size", default=50432),
        N=N,
        context=context_of(rope, positions),
        dtype=config.dtype(),
        activation=config.word("hidden_act", default="gelu"),
        eps=config.number("layer_norm_eps", default=1e-5),
        norm="layer",
        gated=False,
        rope=rope,
        parallel_residual=config.flag("use_parallel_residual", True),
        qkv_bias=bias,
        o_bias=bias,
        ffn_bias=True,
        tied=config.flag("tie_word_embeddings", False),
        scales=(K**-0.5,) * N,
        windows=(None,) * N,
        names=NAMES,
        qkv_per_head=True,
    )
