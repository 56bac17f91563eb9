"""One file per family of models; each says how to read its config and how it differs from llama."""

from __future__ import annotations

from importlib import import_module

from hpcinfer.errors import meant, shown
from hpcinfer.model.architecture import Architecture, Config

FAMILIES = (
    "deepseek_v2",
    "deepseek_v3",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "mixtral",
    "olmoe",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
)


def read_architecture(config: Config) -> Architecture:
    """Architecture that a config.json describes.

    Parameters
    ----------
    config : dict, the content of config.json

    Raises
    ------
    ValueError
        If the family is unknown or a value is missing or senseless.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        near = meant(family, FAMILIES)
        raise ValueError(f"config: got model_type {shown(family)}, need one of {known}{near}")
    if config.get("quantization_config"):
        raise ValueError("config: got quantised weights, need float32, float16 or bfloat16")
    return import_module(f"{__name__}.{family}").architecture(Config(config))
