"""Tokens that stand beside the vocabulary: what the companions of tokenizer.json say of them.

tokenizer_config.json names special tokens and lists added ones by id; older checkpoints have
special_tokens_map.json and added_tokens.json for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tokenizers import AddedToken, Tokenizer

from hpcinfer.errors import is_digits, shown

SPECIAL_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_EXTRA_NAMES = ("extra_special_tokens", "additional_special_tokens")


def special_tokens(config: dict[str, Any], special_tokens_map: dict[str, Any]) -> dict[str, str]:
    """Named special tokens: tokenizer_config, else the older special_tokens_map."""
    tokens = {}
    for name in SPECIAL_NAMES:
        value = config.get(name) or special_tokens_map.get(name)
        if value:
            tokens[name] = _added_token(value).content
    return tokens


def extra_special_tokens(config: dict[str, Any], special_tokens_map: dict[str, Any]) -> list[str]:
    """Special tokens without a name of their own, from either file."""
    for source in (config, special_tokens_map):
        for name in _EXTRA_NAMES:
            extra = _of_type(source, name, list | dict)
            if extra:
                values = extra.values() if isinstance(extra, dict) else extra
                return [_added_token(value).content for value in values]
    return []


def missing_tokens(
    tokenizer: Tokenizer, config: dict[str, Any], special: list[str]
) -> Iterator[tuple[AddedToken, int | None]]:
    """Tokens that tokenizer.json does not add, in the order of their ids.

    Parameters
    ----------
    tokenizer : as tokenizer.json gives it
    config : tokenizer_config, with its `added_tokens_decoder`
    special : the special tokens of the companions

    Yields
    ------
    (token, the id that it must have, or None where nothing says)
    """
    # Take those that are listed by id
    added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    listed = _of_type(config, "added_tokens_decoder", dict) or {}
    for key in sorted(listed, key=_id_of):
        token = _added_token(listed[key])
        if token.content not in added:
            token.special = token.special or token.content in special
            added[token.content] = token
            yield token, _id_of(key)

    # Take those that are special in name only
    for content in dict.fromkeys(special):
        if content not in added or not added[content].special:
            yield _added_token(content), None


def _of_type(config: dict[str, Any], name: str, types: Any) -> Any:
    """Value of a field, None if absent."""
    value = config.get(name)
    if value is not None and not isinstance(value, types):
        raise ValueError(
            f"tokenizer_config: got {name} {shown(value)}, need a list or an object of tokens; "
            "correct the file"
        )
    return value


def _added_token(value: Any) -> AddedToken:
    """AddedToken of a string, or of an object with its `content` and flags."""
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str):
        raise ValueError(
            f"tokenizer_config: got a special token {shown(value)}, need a string or an object "
            "with a string as content; correct the file"
        )
    flags = value if isinstance(value, dict) else {"special": True, "normalized": False}
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(content, **{name: bool(flags[name]) for name in names if name in flags})


def _id_of(key: str) -> int:
    """Token id of a key of added_tokens_decoder, whose keys are ids written as strings."""
    if not is_digits(key):
        raise ValueError(
            f"tokenizer_config: got a token id {shown(key)} in added_tokens_decoder, "
            "need a whole number; correct the file"
        )
    return int(key)
