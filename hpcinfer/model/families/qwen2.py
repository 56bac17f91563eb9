"""qwen2 (Yang 2024, arXiv:2407.10671): llama with biases on q, k, v, and windows in some layers."""

import reprlib

from hpcinfer.model.families import llama


def architecture(config, **differences):
    """Architecture of a qwen2, or of a family that shares its windows."""
    first = int(config.number("max_window_layers", default=28))
    values = {
        "G": config.size("num_key_value_heads", default=32),
        "positions": config.size("max_position_embeddings", default=32768),
        "windows": windows(config, lambda n: n >= first),
        "qkv_bias": True,
        "o_bias": False,
        "ffn_bias": False,
    }
    return llama.architecture(config, **{**values, **differences})


def windows(config, windowed):
    """Sliding window of every layer: by `layer_types`, else in the layers that are `windowed`."""
    N = config.layers("num_hidden_layers")
    if not config.flag("use_sliding_window", False) or config.get("sliding_window") is None:
        return (None,) * N
    window = config.size("sliding_window")
    types = config.get("layer_types")
    if types is None:
        types = ["sliding_attention" if windowed(n) else "full_attention" for n in range(N)]
    if not isinstance(types, list) or len(types) != N:
        raise ValueError(
            f"config: got layer_types={reprlib.repr(types)}, need one word for each of {N} layers"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)
