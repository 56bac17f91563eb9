"""Fields of one entry of the input: what each may hold, and what of a request it becomes.

An entry is an object of the short form, ``{"custom_id", fields ...}``, or of OpenAI Batch,
``{"custom_id", "method", "url", "body": {fields ...}}``. A null value counts as an absent field.
Whatever cannot run is a ValueError of one line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from hpcinfer.errors import integer, meant, shown
from hpcinfer.requests.sampling import Sampling
from hpcinfer.text.text import Text

MAX_CUSTOM_ID = 512
KINDS = {"/v1/completions": "completion", "/v1/chat/completions": "chat"}

# Fields of a body: those that name the prompt, those with a rule of their own, those that are one
# field of Sampling, those OpenAI defines that change nothing here, and those accepted only with a
# value that asks for nothing.
_PROMPT_FIELDS = ("prompt", "prompt_token_ids", "messages")
_RULED = {"max_tokens", "max_completion_tokens", "logprobs", "top_logprobs"}
_SAMPLING_FIELDS = {field.name for field in fields(Sampling)} - _RULED
_WITHOUT_EFFECT = {
    "model",
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
    "stream_options",
}
_ONLY: dict[str, list[Any]] = {
    "stream": [False],
    "echo": [False],
    "suffix": [""],
    "best_of": [1],
    "logit_bias": [{}],
    "modalities": [["text"]],
    "response_format": [{"type": "text"}],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "functions": [[]],
    "function_call": ["none", "auto"],
}
_BATCH_FIELDS = {"custom_id", "method", "url", "body"}


@dataclass(frozen=True)
class PromptLimits:
    """What a prompt must keep to.

    Attributes
    ----------
    vocab_size : V; token ids are in [0, V)
    context : tokens of prompt and answer together
    line_bytes : length of the longest input line
    """

    vocab_size: int
    context: int
    line_bytes: int = 1 << 26


# --- The entry -----------------------------------------------------------------------------------


def entry_of(item: Any) -> dict[str, Any]:
    """Item of the input as an object of the short or the batch form."""
    if isinstance(item, dict):
        return item
    if isinstance(item, str):
        return {"prompt": item}
    if hasattr(item, "tolist"):
        item = item.tolist()
    if isinstance(item, list | tuple):
        return {"prompt_token_ids": item}
    raise refusal(shown(item), "a string, a list of token ids or an object", "correct the item")


def custom_id_of(entry: dict[str, Any]) -> str:
    """custom_id of an entry, "" if there is none."""
    custom_id = entry.get("custom_id")
    if custom_id is None:
        return ""
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        need = f"a string of 1 to {MAX_CUSTOM_ID} characters"
        raise refusal(f"custom_id {shown(custom_id)}", need, "correct the field")
    return _clean("custom_id", custom_id)


def body_of(entry: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Kind ("completion" or "chat") and body of an entry in either form."""
    if entry.keys() & {"method", "url", "body"}:
        return _batch_body(entry)
    body = {name: value for name, value in entry.items() if name != "custom_id"}
    return ("chat" if body.get("messages") is not None else "completion"), body


def _batch_body(entry: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Kind and body of an entry in the form of OpenAI Batch."""
    for name in entry:
        if name not in _BATCH_FIELDS:
            raise _unknown(name, _BATCH_FIELDS)
    if not entry.get("custom_id"):
        raise refusal("a batch line without custom_id", "one", "give each line its own")
    if entry.get("method", "POST") != "POST":
        raise refusal(f"method {shown(entry['method'])}", '"POST"', "correct the field")

    # The url says where the body would be posted, and so what it must hold
    url, body = entry.get("url"), entry.get("body")
    if not isinstance(url, str) or url not in KINDS:
        raise refusal(f"url {shown(url)}", " or ".join(KINDS), "correct the field")
    if not isinstance(body, dict):
        raise refusal(f"body {shown(body)}", "a JSON object", "correct the field")
    kind = KINDS[url]
    if (body.get("messages") is not None) != (kind == "chat"):
        need = "messages" if kind == "chat" else "prompt"
        raise refusal(f"a body for {url} without {need}", "it and no other", "correct url or body")
    return kind, body


def check_names(body: dict[str, Any]) -> None:
    """Refuse by name what is unknown, or asks for what is not offered."""
    known = _RULED | _SAMPLING_FIELDS | _WITHOUT_EFFECT | set(_PROMPT_FIELDS)
    for name, value in body.items():
        if name not in known and name not in _ONLY:
            raise _unknown(name, {*known, *_ONLY})
        if name in _ONLY and value is not None:
            if not any(type(value) is type(one) and value == one for one in _ONLY[name]):
                got = f"{name} = {shown(value)}, which is not offered"
                need = " or ".join(json.dumps(one) for one in _ONLY[name])
                raise refusal(got, need, "leave the field out")


# --- Sampling ------------------------------------------------------------------------------------


def sampling_of(body: dict[str, Any], kind: str, defaults: Sampling) -> Sampling:
    """Sampling of a body over the defaults."""
    given = {name: body[name] for name in _SAMPLING_FIELDS if body.get(name) is not None}

    # OpenAI has two names for the number of new tokens
    lengths = [body.get(name) for name in ("max_completion_tokens", "max_tokens")]
    lengths = [length for length in lengths if length is not None]
    if lengths:
        if lengths[0] != lengths[-1]:
            got = f"max_completion_tokens {shown(lengths[0])} and max_tokens {shown(lengths[1])}"
            raise refusal(got, "one length", "leave one out")
        given["max_tokens"] = lengths[0]

    # Log-probabilities are a number in completions, a switch and a number in chat
    if kind == "chat":
        given |= _chat_logprobs(body)
    elif body.get("top_logprobs") is not None:
        raise refusal("top_logprobs with a prompt", "it with messages only", "give logprobs")
    elif body.get("logprobs") is not None:
        given["logprobs"] = body["logprobs"]

    _clean_all("stop", given.get("stop"))
    return over(defaults, given)


def over(defaults: Sampling, given: dict[str, Any]) -> Sampling:
    """Sampling of given fields over the defaults, whose least length gives way to a given most."""
    most = integer(given.get("max_tokens"))
    if "min_tokens" not in given and most is not None and 1 <= most < defaults.min_tokens:
        given = given | {"min_tokens": most}
    return replace(defaults, **given)


def _chat_logprobs(body: dict[str, Any]) -> dict[str, Any]:
    """Sampling.logprobs from OpenAI's chat fields `logprobs` (a switch) and `top_logprobs`."""
    switch, top = body.get("logprobs"), body.get("top_logprobs")
    if switch is not None and not isinstance(switch, bool):
        got = f"logprobs = {shown(switch)} with messages"
        raise refusal(got, "true or false", "give top_logprobs too")
    if top is not None and not switch:
        raise refusal("top_logprobs without logprobs", "logprobs = true", "add it")
    if switch is None:
        return {}
    return {"logprobs": (0 if top is None else top) if switch else None}


def fitted(sampling: Sampling, prompt_tokens: int, text: Text, limits: PromptLimits) -> Sampling:
    """Sampling that ends at the end of the context window, with stops that can occur."""
    if sampling.stop and not text.available:
        got = "stop strings and a checkpoint without tokenizer.json"
        raise refusal(got, "one", "give stop_token_ids")
    for token in sampling.stop_token_ids:
        if token >= limits.vocab_size:
            need = f"ids below {limits.vocab_size}"
            raise refusal(f"stop_token_ids with {token}", need, "correct them")
    left = limits.context - prompt_tokens
    if sampling.max_tokens <= left:
        return sampling
    return replace(sampling, max_tokens=left, min_tokens=min(sampling.min_tokens, left))


# --- The prompt ----------------------------------------------------------------------------------


def prompt_of(
    body: dict[str, Any], text: Text, limits: PromptLimits, score: bool
) -> tuple[int, ...]:
    """Token ids of the one prompt of a body, within the limits; of a text to score if `score`."""
    given = [name for name in _PROMPT_FIELDS if body.get(name) is not None]
    if len(given) != 1:
        need = f"one of {', '.join(_PROMPT_FIELDS)}"
        raise refusal(" and ".join(given) or "no prompt", need, "correct the line")

    # Bring conversations and texts to token ids
    [name] = given
    value = body[name]
    if name == "messages":
        value = text.encode_chat(_messages(value), not score, limits.context)
    elif name == "prompt" and isinstance(value := _only_one(value), str):
        value = text.encode(_clean("prompt", value), limit=limits.context)
    return _token_ids(value, name, limits, reserved=0 if score else 1)


def _only_one(prompt: Any) -> Any:
    """The prompt of a list with one prompt in it; OpenAI allows several, a line here holds one."""
    if isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], str | list | tuple):
        if len(prompt) > 1:
            raise refusal(f"a list of {len(prompt)} prompts", "one prompt", "use a line for each")
        return prompt[0]
    return prompt


def _token_ids(value: Any, name: str, limits: PromptLimits, reserved: int) -> tuple[int, ...]:
    """Token ids of a prompt, checked; `reserved` places of the context stay free."""
    if not isinstance(value, list | tuple):
        need = "text or a list of token ids"
        raise refusal(f"{name} {shown(value)}", need, "correct the field")
    if not value:
        raise refusal(f"{name} without tokens", "at least one token", "give a prompt")
    if len(value) > limits.context - reserved:
        need = f"at most {limits.context - reserved} of the context window of {limits.context}"
        raise refusal(f"a prompt of {len(value)} tokens", need, "shorten the prompt")

    # Every id must be one of the vocabulary
    token_ids = []
    for original in value:
        token = integer(original)
        if token is None or not 0 <= token < limits.vocab_size:
            got = f"token id {shown(original)} in {name}"
            need = f"whole numbers from 0 to {limits.vocab_size - 1}"
            raise refusal(got, need, "check that tokenizer and model belong together")
        token_ids.append(token)
    return tuple(token_ids)


def _messages(value: Any) -> list[dict[str, Any]]:
    """Messages, checked as far as every template relies on."""
    if not isinstance(value, list | tuple) or not value:
        raise refusal(f"messages {shown(value)}", "a list of messages", "correct the field")
    messages = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            got = f"the message {shown(message)}"
            raise refusal(got, "an object with role", "correct messages")
        content = message.get("content")
        if isinstance(content, dict):  # a part alone
            message = {**message, "content": [content]}
        _check_content(message.get("content"))
        messages.append(message)
    _clean_all("messages", messages)
    return messages


def _check_content(content: Any) -> None:
    """Refuse a message that is neither text nor a list of parts that are text."""
    if content is None or isinstance(content, str):
        return
    parts = content if isinstance(content, list | tuple) else []
    if not parts or not all(map(_is_text, parts)):
        raise refusal(f"content {shown(content)}", "text or text parts", "correct messages")


def _is_text(part: Any) -> bool:
    """True for a part of a message that is text."""
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


# --- Text and refusals ---------------------------------------------------------------------------


def refusal(got: str, need: str, remedy: str) -> ValueError:
    """Error about an entry of the input, in one line."""
    return ValueError(f"request: got {got}, need {need}; {remedy}")


def _unknown(name: Any, known: Iterable[str]) -> ValueError:
    need = f"a field of the format{meant(name, known)}"
    return refusal(f"the unknown field {shown(name)}", need, "leave it out")


def _clean(name: str, value: str) -> str:
    """Text without NUL and lone surrogates, which neither tokenizers nor files can carry."""
    if "\0" in value:
        raise refusal(f"a NUL character in {name}", "text", "remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        got = f"half a surrogate pair at character {error.start + 1} of {name}"
        raise refusal(got, "text", "remove it") from None
    return value


def _clean_all(name: str, value: Any) -> None:
    """`_clean` for every string inside a value, at whatever depth."""
    waiting, seen = [value], set()
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            _clean(name, one)
        elif isinstance(one, dict | list | tuple) and id(one) not in seen:
            seen.add(id(one))
            waiting += [*one.keys(), *one.values()] if isinstance(one, dict) else one
