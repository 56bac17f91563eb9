"""llama (Touvron 2023, arXiv:2302.13971; Grattafiori 2024, arXiv:2407.21783), the common form."""

from hpcinfer.model.architecture import Architecture, Config, context_of

NAMES = {
    "embed": "model.embed_tokens.weight",
    "norm1": "model.layers.{n}.input_layernorm.weight",
    "q": "model.layers.{n}.self_attn.q_proj.weight",
    "k": "model.layers.{n}.self_attn.k_proj.weight",
    "v": "model.layers.{n}.self_attn.v_proj.weight",
    "o": "model.layers.{n}.self_attn.o_proj.weight",
    "q_bias": "model.layers.{n}.self_attn.q_proj.bias",
    "k_bias": "model.layers.{n}.self_attn.k_proj.bias",
    "v_bias": "model.layers.{n}.self_attn.v_proj.bias",
    "o_bias": "model.layers.{n}.self_attn.o_proj.bias",
    "q_norm": "model.layers.{n}.self_attn.q_norm.weight",
    "k_norm": "model.layers.{n}.self_attn.k_norm.weight",
    "norm2": "model.layers.{n}.post_attention_layernorm.weight",
    "gate": "model.layers.{n}.mlp.gate_proj.weight",
    "up": "model.layers.{n}.mlp.up_proj.weight",
    "down": "model.layers.{n}.mlp.down_proj.weight",
    "gate_bias": "model.layers.{n}.mlp.gate_proj.bias",
    "up_bias": "model.layers.{n}.mlp.up_proj.bias",
    "down_bias": "model.layers.{n}.mlp.down_proj.bias",
    "router": "model.layers.{n}.mlp.gate.weight",
    "experts.gate": "model.layers.{n}.mlp.experts.{e}.gate_proj.weight",
    "experts.up": "model.layers.{n}.mlp.experts.{e}.up_proj.weight",
    "experts.down": "model.layers.{n}.mlp.experts.{e}.down_proj.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}


def architecture(config: Config, **differences) -> Architecture:
    """Architecture of a llama, with what another family states otherwise in `differences`."""
    D, H = config.size("hidden_size"), config.size("num_attention_heads")
    N = config.layers("num_hidden_layers")
    K = differences.get("K") or config.size("head_dim", default=D // H)
    positions = differences.pop("positions", None) or config.size(
        "max_position_embeddings", default=2048
    )

    # Rotate the whole head, or as the family says.
    theta, rope = differences.pop("theta", None), differences.get("rope")
    if rope is None:
        rope = config.rope(K, theta)
    if rope.dim != K and "rope" not in differences:
        raise ValueError(f"config: got {rope.dim} rotated columns, need the whole head of {K}")

    # Name every size and choice; what a family states otherwise goes before.
    bias = config.flag("attention_bias", False)
    values = {
        "family": config.family,
        "D": D,
        "H": H,
        "G": config.size("num_key_value_heads", default=H),
        "K": K,
        "F": config.size("intermediate_size"),
        "V": config.size("vocab_size"),
        "N": N,
        "context": context_of(rope, positions),
        "dtype": config.dtype(),
        "activation": config.word("hidden_act", default="silu"),
        "eps": config.number("rms_norm_eps", default=1e-6),
        "rope": rope,
        "qkv_bias": bias,
        "o_bias": bias,
        "ffn_bias": config.flag("mlp_bias", False),
        "tied": config.flag("tie_word_embeddings", False),
        "scales": (K**-0.5,) * N,
        "windows": (None,) * N,
        "names": NAMES,
    }
    return Architecture(**{**values, **differences})
