"""Sampling of requests that do not say: what the model's generation_config.json recommends."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from hpcinfer.errors import integer, shown
from hpcinfer.requests.fields import over, refusal
from hpcinfer.requests.sampling import Sampling

# Fields of generation_config that choose other tokens in transformers and are not offered here,
# with the value at which they do nothing; null never does anything.
_NOT_OFFERED: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "min_length": 0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "guidance_scale": 1.0,
    "penalty_alpha": 0.0,
    "diversity_penalty": 0.0,
    "bad_words_ids": [],
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "sequence_bias": {},
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "watermarking_config": None,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "max_time": None,
}


def defaults_from(
    generation_config: dict[str, Any], overrides: dict[str, Any] | None = None
) -> Sampling:
    """Sampling for the fields that a request leaves out.

    As in vLLM, the checkpoint's generation_config gives temperature, top_p, top_k, min_p,
    repetition_penalty and max_new_tokens, so that a model samples as its authors recommend; what it
    does not give is as in OpenAI's interface (temperature 1, 16 tokens). Beyond vLLM, an explicit
    `do_sample: false` means temperature 0, and min_new_tokens and stop_strings count.

    Parameters
    ----------
    generation_config : of the checkpoint
    overrides : fields of Sampling that the command line sets; None values are left out

    Raises
    ------
    ValueError
        For values out of range, naming the field and where it came from.
    """
    # Take what the checkpoint recommends
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    given = {name: generation_config[name] for name in names if name in generation_config}
    given["max_tokens"] = generation_config.get("max_new_tokens")
    given["stop"] = generation_config.get("stop_strings")
    given["min_tokens"] = generation_config.get("min_new_tokens")
    least = integer(given["min_tokens"])
    if given["max_tokens"] is None and least is not None:
        given["max_tokens"] = max(Sampling.max_tokens, least)
    if generation_config.get("do_sample") is False:
        given["temperature"] = 0.0
    try:
        recommended = Sampling(**{k: v for k, v in given.items() if v is not None})
    except ValueError as error:
        raise ValueError(f"generation_config: {error}, or give the option") from None

    # Put over it what the command line says
    chosen = {k: v for k, v in (overrides or {}).items() if v is not None}
    unknown = sorted(set(chosen) - {field.name for field in fields(Sampling)})
    if unknown:
        raise refusal(f"the option {shown(unknown[0])}", "a sampling option", "see the README")
    return over(recommended, chosen)


def without_effect(generation_config: dict[str, Any]) -> str | None:
    """A line that names what generation_config asks for and nothing here does; None for nothing."""
    asked = [
        f"{name} = {shown(generation_config[name])}"
        for name, neutral in _NOT_OFFERED.items()
        if generation_config.get(name) not in (None, neutral)
    ]
    if not asked:
        return None
    return f"sampling  {', '.join(asked)} of generation_config.json has no effect here"
