"""The space that SentencePiece puts before a text, as the files of Llama's tokenizers mean it."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers

_CLASSES = {"LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast"}
_MARK = "▁"


def set_prefix_space(tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    """Let `legacy` and `add_prefix_space` of a tokenizer_config count, where they say otherwise.

    A tokenizer.json with a step "Prepend" puts a space before every piece between special tokens.
    `legacy: false` means the first piece alone, `add_prefix_space: false` none, as in
    transformers 5 (models/llama/tokenization_llama.py). Tokenizers of bytes, some of which bear
    Llama's name, have no such space.
    """
    no_space, first_only = config.get("add_prefix_space") is False, config.get("legacy") is False
    if config.get("tokenizer_class") not in _CLASSES or not (no_space or first_only):
        return
    steps, before = _steps(tokenizer.normalizer, "normalizers"), tokenizer.pre_tokenizer
    if [step["type"] for step in steps[:1]] != ["Prepend"] and _kind(before) != "Metaspace":
        return

    # Mark spaces in the pieces instead of in the whole text
    marks = ("Prepend", "Replace")
    kept = [step for step in steps if step["type"] not in marks]
    if len(kept) < len(steps):
        tokenizer.normalizer = _normalizer(kept)
    scheme = "never" if no_space else "first"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_MARK, scheme, split=False)

    # Where no space was put before a text, none is taken off
    if no_space and _kind(tokenizer.decoder) == "Sequence":
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace(_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
        )


def _normalizer(steps: list[dict[str, Any]]) -> Any:
    """Normalizer of these steps, None for none."""
    if not steps:
        return None
    state = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}
    state["normalizer"] = {"type": "Sequence", "normalizers": steps}
    return Tokenizer.from_str(json.dumps(state)).normalizer


def _state(part: Any) -> dict[str, Any]:
    return {} if part is None else json.loads(part.__getstate__())


def _kind(part: Any) -> str | None:
    return _state(part).get("type")


def _steps(part: Any, name: str) -> list[dict[str, Any]]:
    """Steps of a part that may be a sequence."""
    state = _state(part)
    return state.get(name, [state] if state else [])
