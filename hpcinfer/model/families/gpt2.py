"""gpt2 (Radford 2019): LayerNorm, learned positions, no gate, fused q, k, v stored (in, out)."""

from __future__ import annotations

from hpcinfer.model.architecture import Architecture, Config, head_width

NAMES = {
    "embed": "transformer.wte.weight",
    "positions": "transformer.wpe.weight",
    "norm1": "transformer.h.{n}.ln_1.weight",
    "norm1_bias": "transformer.h.{n}.ln_1.bias",
    "fused_qkv": "transformer.h.{n}.attn.c_attn.weight",
    "fused_qkv_bias": "transformer.h.{n}.attn.c_attn.bias",
    "o": "transformer.h.{n}.attn.c_proj.weight",
    "o_bias": "transformer.h.{n}.attn.c_proj.bias",
    "norm2": "transformer.h.{n}.ln_2.weight",
    "norm2_bias": "transformer.h.{n}.ln_2.bias",
    "up": "transformer.h.{n}.mlp.c_fc.weight",
    "up_bias": "transformer.h.{n}.mlp.c_fc.bias",
    "down": "transformer.h.{n}.mlp.c_proj.weight",
    "down_bias": "transformer.h.{n}.mlp.c_proj.bias",
    "final_norm": "transformer.ln_f.weight",
    "final_norm_bias": "transformer.ln_f.bias",
    "head": "lm_head.weight",
}


def architecture(config: Config) -> Architecture:
    """Architecture of a gpt2."""
    D = config.size("n_embd", "hidden_size", default=768)
    H = config.size("n_head", "num_attention_heads", default=12)
    N = config.layers("n_layer", "num_hidden_layers", default=12)
    K = head_width(D, H)
    positions = config.size("n_positions", "max_position_embeddings", default=1024)
    scale = K**-0.5 if config.flag("scale_attn_weights", True) else 1.0
    by_layer = config.flag("scale_attn_by_inverse_layer_idx", False)

    # Name every size and choice; queries are scaled by the layer's number if it says so.
    return Architecture(
        family="gpt2",
        D=D,
        H=H,
        G=H,
        K=K,
        F=config.size("n_inner", default=4 * D),
        V=config.size("vocab_size", default=50257),
        N=N,
        context=positions,
        dtype=config.dtype(),
        activation=config.word("activation_function", default="gelu_new"),
        eps=config.number("layer_norm_epsilon", default=1e-5),
        norm="layer",
        gated=False,
        learned_positions=positions,
        qkv_bias=True,
        o_bias=True,
        ffn_bias=True,
        tied=config.flag("tie_word_embeddings", True),
        scales=tuple(scale / (n + 1 if by_layer else 1) for n in range(N)),
        windows=(None,) * N,
        names=NAMES,
        stored_in_out=True,
    )
