"""qwen2 (Yang 2024, arXiv:2407.10671): llama with biases on q, k, v, and windows in some layers."""

import reprlib

from hpcinfer.model.families import llama


def architecture(config, **differences):
    """Architecture of a qwen2, or of a family that shares its windows."""
    values = {
        "G": config.size("num_key_value_heads", default=32),
        "positions": config.size("max_position_embeddings", default=32768),
        "windows": windows(config),
        "qkv_bias": True,
        "o_bias": False,
        "ffn_bias": False,
    }
    return llama.architecture(config, **{**values, **differences})


def windows(config):
    """Sliding window of every layer: by `layer_types`, else from `max_window_layers` on."""
    N = config.layers("num_hidden_layers")
    if not config.flag("use_sliding_window", False) or config.get("sliding_window") is None:
        return (None,) * N
    window = config.size("sliding_window")
    types = config.get("layer_types")
    if types is None:
        first = int(config.number("max_window_layers", default=28))
        types = ["sliding_attention" if n >= first else "full_attention" for n in range(N)]
    if not isinstance(types, list) or len(types) != N:
        raise ValueError(
            f"config: got layer_types={reprlib.repr(types)}, need one word for each of {N} layers"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)
