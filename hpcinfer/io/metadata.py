"""Config, tokenizer and chat template: the small files that travel with the weights of a model."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from typing import Any, BinaryIO

from hpcinfer.errors import integer, shown
from hpcinfer.io.atomic import AnyPath

# Largest files, some times the largest that are known: a tokenizer_config.json of 1.2 MB, a
# tokenizer.json of 33 MB. Lists without end take some 25 times their JSON in memory.
MAX_JSON_BYTES = 4_000_000
MAX_TOKENIZER_BYTES = 100_000_000


@dataclass(frozen=True)
class Metadata:
    """What a model carries beside its weights.

    Attributes
    ----------
    config, generation_config, tokenizer_config, special_tokens_map : {} if absent
    tokenizer_json : content of tokenizer.json, None if absent
    chat_template : Jinja source of the default template, None if absent
    """

    config: dict[str, Any]
    generation_config: dict[str, Any]
    tokenizer_config: dict[str, Any]
    special_tokens_map: dict[str, Any]
    tokenizer_json: str | None
    chat_template: str | None


def read_directory(folder: AnyPath) -> Metadata:
    """Metadata of a Hugging Face directory.

    Raises
    ------
    ValueError
        If config.json is missing, or a file is no JSON object, too large or no regular file.
    """

    def read_object(name: str) -> dict[str, Any]:
        path = os.path.join(folder, name)
        text = read_text(path)
        return {} if text is None else parse_object(text, path)

    # Only config.json must be there
    if not os.path.exists(os.path.join(folder, "config.json")):
        raise ValueError(
            f"checkpoint: got {folder} without config.json, need a Hugging Face model directory"
        )
    tokenizer_config = _with_added_tokens(
        read_object("tokenizer_config.json"), read_object("added_tokens.json")
    )

    # The template has a file of its own, of two possible kinds, or stands in the tokenizer's config
    template = read_text(os.path.join(folder, "chat_template.jinja"))
    if template is None:
        template = pick_template(read_object("chat_template.json").get("chat_template"))
    if template is None:
        template = pick_template(tokenizer_config.get("chat_template"))

    return Metadata(
        config=read_object("config.json"),
        generation_config=read_object("generation_config.json"),
        tokenizer_config=tokenizer_config,
        special_tokens_map=read_object("special_tokens_map.json"),
        tokenizer_json=read_text(os.path.join(folder, "tokenizer.json"), MAX_TOKENIZER_BYTES),
        chat_template=template,
    )


def _with_added_tokens(config: dict[str, Any], added: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config with the older added_tokens.json (token -> id) in its present place.

    As in transformers, the file counts where `added_tokens_decoder` is absent.
    """
    if not added or config.get("added_tokens_decoder") is not None:
        return config
    listed: dict[str, Any] = {}
    for token, token_id in added.items():
        number = integer(token_id)
        if number is None or number < 0 or str(number) in listed:
            raise ValueError(
                f"checkpoint: got id {shown(token_id)} for {shown(token)} in added_tokens.json, "
                "need a whole number for each token; correct the file"
            )
        listed[str(number)] = {"content": token, "normalized": True, "special": False}
    return {**config, "added_tokens_decoder": listed}


def pick_template(value: Any) -> str | None:
    """The template in `value`: a string, or the "default" of a list of named ones; else None."""
    if isinstance(value, list):
        named = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def read_text(path: AnyPath, limit: int = MAX_JSON_BYTES) -> str | None:
    """Content of the UTF-8 file `path`, None if there is no such file.

    Raises
    ------
    ValueError
        If it is larger than `limit` bytes, cannot be read, or is not UTF-8.
    """
    if not os.path.exists(path):
        return None
    file, size = open_regular(path)
    with file:
        if size > limit:
            raise ValueError(f"checkpoint: got {path} of {size} bytes, need at most {limit}")
        try:
            return file.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"checkpoint: got {path} with {error}, need UTF-8 text") from None


def open_regular(path: AnyPath) -> tuple[BinaryIO, int]:
    """Open the regular file `path` (a link to one counts) for reading bytes.

    Returns
    -------
    file : binary file
    size : its length in bytes

    Raises
    ------
    ValueError
        If it is missing, something else (a pipe would block), or may not be read.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"checkpoint: got {path} which is no regular file, need one")
        return open(path, "rb"), status.st_size
    except OSError as error:
        raise ValueError(f"checkpoint: cannot read {path}: {error.strerror}") from None


def parse_object(text: str | bytes, source: str) -> dict[str, Any]:
    """The JSON object that `text` holds; errors say that it is of `source`.

    Raises
    ------
    ValueError
        If `text` is not valid JSON, is nested too deeply, names a key twice, holds half a surrogate
        pair, or is no object.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
        _refuse_surrogates(text, value)
    except (ValueError, RecursionError) as error:
        reason = "nesting too deep" if isinstance(error, RecursionError) else str(error)
        raise ValueError(
            f"checkpoint: got invalid JSON in {source} ({reason}); fetch the file again"
        ) from None
    if not isinstance(value, dict):
        raise ValueError(
            f"checkpoint: got a JSON {type(value).__name__} in {source}, need an object"
        )
    return value


def _refuse_surrogates(text: str | bytes, value: Any) -> None:
    """Raise ValueError for halves of surrogate pairs, which are no text; most come as escapes."""
    if isinstance(text, str):
        text = text.encode()
    if b"\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key stands twice")
    return table
