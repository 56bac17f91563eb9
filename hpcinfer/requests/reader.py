"""Input lines to requests, results to records and output lines.

Input: OpenAI Batch JSONL, a short form of it, plain text of one prompt per line, or items of the
Python interface. Whatever a line holds becomes a Request or a BadRequest, never an exception.

Output: a neutral record per entry (what the results file stores), and from it the JSON object of an
output line. Identifiers derive from the entry, so that equal runs write equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from hashlib import blake2b

import numpy as np

from hpcinfer.errors import integer, shown
from hpcinfer.io.lines import LongLine
from hpcinfer.requests.request import BadRequest, Request
from hpcinfer.requests.sampling import Sampling
from hpcinfer.text.tokenizer import Text

MAX_CUSTOM_ID = 512
KINDS = {"/v1/completions": "completion", "/v1/chat/completions": "chat"}

# Fields of a body: those that name the prompt, those that are one field of Sampling, those with a
# rule of their own, those OpenAI defines that change nothing here, and those accepted only with a
# value that asks for nothing. A null value counts as an absent field.
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
_ONLY = {
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
    vocab_size : int
        V; token ids are in [0, V).
    context : int
        Tokens of prompt and answer together.
    line_bytes : int
        Longest input line.
    """

    vocab_size: int
    context: int
    line_bytes: int = 1 << 26


# --- Input ---------------------------------------------------------------------------------------


class RequestReader:
    """Requests of a whole input, in order: refuses a second use of a custom_id, sets the keys.

    A request without custom_id is keyed by its prompt and by how many equal prompts without one
    came before. Ids and prompts are remembered as 64-bit hashes.

    Parameters
    ----------
    text : Text
    defaults : Sampling
        For the fields that an entry leaves out.
    limits : PromptLimits
    plain : bool
        Whether the lines are prompts, not JSON.
    score : bool
        Whether the entries are texts to score: sampling fields are then ignored.
    """

    def __init__(
        self,
        text: Text,
        defaults: Sampling,
        limits: PromptLimits,
        plain: bool = False,
        score: bool = False,
    ) -> None:
        self._context = (text, defaults, limits, score)
        self._parse = parse_text_line if plain else parse_line
        self._count = 0
        self._line_of: dict[int, int] = {}
        self._equal_prompts: dict[int, int] = {}

    def read(self, lines: Iterable[tuple[int, bytes | LongLine]]) -> Iterator[Request | BadRequest]:
        """Entries of (1-based line number, raw bytes) pairs; blank lines are passed over."""
        for line, raw in lines:
            if isinstance(raw, LongLine) or raw.strip():
                yield self._admit(self._parse(self._count, line, raw, *self._context))

    def read_items(self, items: Iterable) -> Iterator[Request | BadRequest]:
        """Entries of the Python interface; see `parse_item`."""
        for item in items:
            yield self._admit(parse_item(self._count, item, *self._context))

    def _admit(self, entry: Request | BadRequest) -> Request | BadRequest:
        self._count += 1
        if entry.custom_id:
            return self._admit_named(entry)
        if isinstance(entry, BadRequest):
            return entry

        # Tell equal prompts without an id apart by their number
        earlier = self._equal_prompts.get(entry.key, 0)
        self._equal_prompts[entry.key] = earlier + 1
        return replace(entry, key=prompt_key(entry.token_ids, earlier)) if earlier else entry

    def _admit_named(self, entry: Request | BadRequest) -> Request | BadRequest:
        first = self._line_of.setdefault(id_key(entry.custom_id), entry.line)
        if first == entry.line:
            return entry
        message = (
            f"request: got custom_id {shown(entry.custom_id)} of line {first} again, need each id "
            "once; rename it"
        )
        return BadRequest(entry.index, entry.line, entry.custom_id, message)


def parse_line(
    index: int,
    line: int,
    raw: bytes,
    text: Text,
    defaults: Sampling,
    limits: PromptLimits,
    score: bool = False,
) -> Request | BadRequest:
    """Entry of one JSONL line, in the form of OpenAI Batch or the short form.

    Parameters
    ----------
    index, line : int
        0-based place among the entries; 1-based line of the file.
    raw : bytes
        The line, with or without its line end.
    text : Text
    defaults : Sampling
    limits : PromptLimits
    score : bool
        Whether the prompt is a text to score as it stands.

    Returns
    -------
    Request, or BadRequest with the first reason found. The key takes no earlier lines into account;
    `RequestReader` does.
    """
    try:
        item = _json(_unicode(line, raw, limits))
        if not isinstance(item, dict):
            raise _refusal(f"a line with {shown(item)}", "a JSON object", "see the input formats")
    except ValueError as error:
        return BadRequest(index, line, "", _one_line(error))
    return parse_item(index, item, text, defaults, limits, score, line)


def parse_text_line(
    index: int,
    line: int,
    raw: bytes,
    text: Text,
    defaults: Sampling,
    limits: PromptLimits,
    score: bool = False,
) -> Request | BadRequest:
    """Entry of one line of plain text: the prompt is the line without its line end."""
    try:
        prompt = _unicode(line, raw, limits).rstrip("\r\n")
    except ValueError as error:
        return BadRequest(index, line, "", _one_line(error))
    return parse_item(index, prompt, text, defaults, limits, score, line)


def parse_item(
    index: int,
    item,
    text: Text,
    defaults: Sampling,
    limits: PromptLimits,
    score: bool = False,
    line: int | None = None,
) -> Request | BadRequest:
    """Entry of a prompt string, a sequence of token ids, or an object as on a JSONL line."""
    line = index + 1 if line is None else line
    custom_id = ""
    try:
        entry = _entry(item)
        custom_id = _custom_id(entry)
        kind, body = _body(entry)
        _check_fields(body)
        sampling = Sampling() if score else _sampling(body, kind, defaults)
        token_ids = _prompt(body, kind, text, limits, score)
        if not score:
            sampling = _fitted(sampling, len(token_ids), text, limits)
    except ValueError as error:
        return BadRequest(index, line, custom_id, _one_line(error))
    key = id_key(custom_id) if custom_id else prompt_key(token_ids, 0)
    return Request(index, line, custom_id, kind, token_ids, sampling, key)


def defaults_from(generation_config: dict, overrides: dict | None = None) -> Sampling:
    """Sampling for the fields that a request leaves out.

    As in vLLM, the checkpoint's generation_config gives temperature, top_p, top_k, min_p,
    repetition_penalty and max_new_tokens, so that a model samples as its authors recommend; what it
    does not give is as in OpenAI's interface (temperature 1, 16 tokens). Beyond vLLM, an explicit
    `do_sample: false` means temperature 0.

    Parameters
    ----------
    generation_config : dict
    overrides : dict or None
        Fields of Sampling that the command line sets; None values are left out.

    Raises
    ------
    ValueError
        For values out of range, naming the field and where it came from.
    """
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    given = {name: generation_config[name] for name in names if name in generation_config}
    given["max_tokens"] = generation_config.get("max_new_tokens")
    if generation_config.get("do_sample") is False:
        given["temperature"] = 0.0
    try:
        recommended = Sampling(**{k: v for k, v in given.items() if v is not None})
    except ValueError as error:
        raise ValueError(f"generation_config: {error}, or give the option") from None
    chosen = {k: v for k, v in (overrides or {}).items() if v is not None}
    unknown = sorted(set(chosen) - {field.name for field in fields(Sampling)})
    if unknown:
        raise _refusal(f"the option {shown(unknown[0])}", "a sampling option", "see the README")
    return replace(recommended, **chosen)


def id_key(custom_id: str) -> int:
    """64-bit key of a request with a custom_id."""
    return _hash(b"custom_id", custom_id.encode())


def prompt_key(token_ids: Iterable[int], earlier: int) -> int:
    """64-bit key of a prompt that `earlier` equal prompts without a custom_id precede."""
    return _hash(b"prompt", np.array([earlier, *token_ids], dtype="<u8").tobytes())


def _hash(purpose: bytes, data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8, person=purpose).digest(), "little")


def _unicode(line: int, raw: bytes, limits: PromptLimits) -> str:
    """Text of a raw line; a byte order mark before the first one is dropped."""
    n_bytes = raw.nbytes if isinstance(raw, LongLine) else len(raw)
    if n_bytes > limits.line_bytes or isinstance(raw, LongLine):
        raise _refusal(
            f"a line of {n_bytes} bytes", f"at most {limits.line_bytes}", "shorten the prompt"
        )
    if b"\0" in raw:
        at = raw.index(b"\0") + 1
        raise _refusal(f"a NUL byte at byte {at}", "text", "remove it or write the file as UTF-8")
    try:
        return bytes(raw).decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        raise _refusal(
            f"byte 0x{byte:02x} at byte {error.start + 1}", "UTF-8", "write the file as UTF-8"
        ) from None


def _json(content: str):
    """Value of a JSON text; NaN and Infinity are no JSON."""

    def refuse(constant: str):
        raise _refusal(f"the number {constant}", "JSON, which has none such", "correct the line")

    try:
        return json.loads(content, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise _refusal(
            f"no JSON at character {error.pos + 1} ({error.msg})",
            "one JSON object per line",
            "correct the line",
        ) from None
    except RecursionError:
        raise _refusal("JSON nested too deeply", "a flat object", "correct the line") from None
    except ValueError as error:
        if "digits" not in str(error):
            raise
        raise _refusal(
            "a number of thousands of digits", "numbers in range", "correct the line"
        ) from None


def _entry(item) -> dict:
    """Item as an object of the short or the batch form."""
    if isinstance(item, dict):
        return item
    if isinstance(item, str):
        return {"prompt": item}
    if hasattr(item, "tolist"):
        item = item.tolist()
    if isinstance(item, list | tuple):
        return {"prompt_token_ids": item}
    raise _refusal(shown(item), "a string, a list of token ids or an object", "correct the item")


def _custom_id(entry: dict) -> str:
    """custom_id of an entry, "" if there is none."""
    custom_id = entry.get("custom_id")
    if custom_id is None:
        return ""
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        raise _refusal(
            f"custom_id {shown(custom_id)}",
            f"a string of 1 to {MAX_CUSTOM_ID} characters",
            "correct the field",
        )
    return _clean("custom_id", custom_id)


def _body(entry: dict) -> tuple[str, dict]:
    """Kind and body of an entry in either form."""
    if not entry.keys() & {"method", "url", "body"}:
        body = {name: value for name, value in entry.items() if name != "custom_id"}
        return ("chat" if body.get("messages") is not None else "completion"), body

    # The form of OpenAI Batch names where the body would be posted
    for name in entry:
        if name not in _BATCH_FIELDS:
            raise _unknown(name)
    if not entry.get("custom_id"):
        raise _refusal("a batch line without custom_id", "one", "give each line its own")
    if entry.get("method", "POST") != "POST":
        raise _refusal(f"method {shown(entry['method'])}", '"POST"', "correct the field")
    url, body = entry.get("url"), entry.get("body")
    if not isinstance(url, str) or url not in KINDS:
        raise _refusal(f"url {shown(url)}", " or ".join(KINDS), "correct the field")
    if not isinstance(body, dict):
        raise _refusal(f"body {shown(body)}", "a JSON object", "correct the field")
    kind = KINDS[url]
    if (body.get("messages") is not None) != (kind == "chat"):
        need = "messages" if kind == "chat" else "prompt"
        raise _refusal(f"a body for {url} without {need}", "it and no other", "correct url or body")
    return kind, body


def _check_fields(body: dict) -> None:
    """Refuse by name what is unknown, or asks for what is not offered."""
    known = _RULED | _SAMPLING_FIELDS | _WITHOUT_EFFECT | set(_PROMPT_FIELDS)
    for name, value in body.items():
        if name not in known and name not in _ONLY:
            raise _unknown(name)
        if name in _ONLY and value is not None:
            if not any(type(value) is type(one) and value == one for one in _ONLY[name]):
                need = " or ".join(json.dumps(one) for one in _ONLY[name])
                raise _refusal(
                    f"{name} = {shown(value)}, which is not offered", need, "leave the field out"
                )


def _sampling(body: dict, kind: str, defaults: Sampling) -> Sampling:
    """Sampling of a body over the defaults."""
    given = {name: body[name] for name in _SAMPLING_FIELDS if body.get(name) is not None}

    # OpenAI has two names for the number of new tokens
    lengths = [body.get(name) for name in ("max_completion_tokens", "max_tokens")]
    lengths = [length for length in lengths if length is not None]
    if lengths:
        if lengths[0] != lengths[-1]:
            raise _refusal(
                f"max_completion_tokens {shown(lengths[0])} and max_tokens {shown(lengths[1])}",
                "one length",
                "leave one out",
            )
        given["max_tokens"] = lengths[0]

    # Log-probabilities are a number in completions, a switch and a number in chat
    if kind == "chat":
        given |= _chat_logprobs(body)
    elif body.get("top_logprobs") is not None:
        raise _refusal("top_logprobs with a prompt", "it with messages only", "give logprobs")
    elif body.get("logprobs") is not None:
        given["logprobs"] = body["logprobs"]

    _clean_all("stop", given.get("stop"))
    return replace(defaults, **given)


def _chat_logprobs(body: dict) -> dict:
    """Sampling.logprobs from OpenAI's chat fields `logprobs` (a switch) and `top_logprobs`."""
    switch, top = body.get("logprobs"), body.get("top_logprobs")
    if switch is not None and not isinstance(switch, bool):
        raise _refusal(
            f"logprobs = {shown(switch)} with messages", "true or false", "give top_logprobs too"
        )
    if top is not None and not switch:
        raise _refusal("top_logprobs without logprobs", "logprobs = true", "add it")
    if switch is None:
        return {}
    return {"logprobs": (0 if top is None else top) if switch else None}


def _prompt(
    body: dict, kind: str, text: Text, limits: PromptLimits, score: bool
) -> tuple[int, ...]:
    """Token ids of the one prompt of a body, within the limits."""
    given = [name for name in _PROMPT_FIELDS if body.get(name) is not None]
    if len(given) != 1:
        raise _refusal(
            " and ".join(given) or "no prompt",
            f"one of {', '.join(_PROMPT_FIELDS)}",
            "correct the line",
        )
    value = body[given[0]]
    if kind == "chat":
        token_ids = text.encode_chat(_messages(value), not score, limits.context)
    elif given[0] == "prompt" and isinstance(value := _only_one(value), str):
        token_ids = text.encode(_clean("prompt", value), limit=limits.context)
    else:
        token_ids = value
    return _token_ids(token_ids, given[0], limits, reserved=0 if score else 1)


def _only_one(prompt):
    """The prompt of a list with one prompt in it; OpenAI allows several, a line here holds one."""
    if isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], str | list | tuple):
        if len(prompt) > 1:
            raise _refusal(f"a list of {len(prompt)} prompts", "one prompt", "use a line for each")
        return prompt[0]
    return prompt


def _token_ids(value, name: str, limits: PromptLimits, reserved: int) -> tuple[int, ...]:
    """Token ids of a prompt, checked; `reserved` places of the context stay free."""
    if not isinstance(value, list | tuple):
        raise _refusal(f"{name} {shown(value)}", "text or a list of token ids", "correct the field")
    if not value:
        raise _refusal(f"{name} without tokens", "at least one token", "give a prompt")
    if len(value) > limits.context - reserved:
        raise _refusal(
            f"a prompt of {len(value)} tokens",
            f"at most {limits.context - reserved} of the context window of {limits.context}",
            "shorten the prompt",
        )
    token_ids = tuple(map(integer, value))
    for token, original in zip(token_ids, value, strict=True):
        if token is None or not 0 <= token < limits.vocab_size:
            raise _refusal(
                f"token id {shown(original)} in {name}",
                f"whole numbers from 0 to {limits.vocab_size - 1}",
                "check that tokenizer and model belong together",
            )
    return token_ids


def _messages(value) -> list[dict]:
    """Messages with their text parts joined, checked as far as every template relies on."""
    if not isinstance(value, list | tuple) or not value:
        raise _refusal(f"messages {shown(value)}", "a list of messages", "correct the field")
    messages = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _refusal(
                f"the message {shown(message)}", "an object with role", "correct messages"
            )
        messages.append({**message, "content": _content(message.get("content"))})
    _clean_all("messages", messages)
    return messages


def _content(content) -> str | None:
    """Text of a message; OpenAI also allows a list of parts, of which text is understood."""
    if content is None or isinstance(content, str):
        return content
    parts = content if isinstance(content, list | tuple) else [content]
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    kinds = {part.get("type") == "text" for part in parts if isinstance(part, dict)}
    if kinds != {True} or len(texts) < len(parts) or not all(isinstance(t, str) for t in texts):
        raise _refusal(f"content {shown(content)}", "text or text parts", "correct messages")
    return "\n".join(texts)


def _fitted(sampling: Sampling, prompt_tokens: int, text: Text, limits: PromptLimits) -> Sampling:
    """Sampling that ends at the end of the context window, with stops that can occur."""
    if sampling.stop and not text.available:
        raise _refusal(
            "stop strings and a checkpoint without tokenizer.json", "one", "give stop_token_ids"
        )
    for token in sampling.stop_token_ids:
        if token >= limits.vocab_size:
            raise _refusal(
                f"stop_token_ids with {token}", f"ids below {limits.vocab_size}", "correct them"
            )
    room = limits.context - prompt_tokens
    if sampling.max_tokens <= room:
        return sampling
    return replace(sampling, max_tokens=room, min_tokens=min(sampling.min_tokens, room))


def _clean(name: str, value: str) -> str:
    """Text without NUL and lone surrogates, which neither tokenizers nor files can carry."""
    if "\0" in value:
        raise _refusal(f"a NUL character in {name}", "text", "remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _refusal(
            f"half a surrogate pair at character {error.start + 1} of {name}", "text", "remove it"
        ) from None
    return value


def _clean_all(name: str, value) -> None:
    """`_clean` for every string inside a value, at whatever depth."""
    waiting, seen = [value], set()
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            _clean(name, one)
        elif isinstance(one, dict | list | tuple) and id(one) not in seen:
            seen.add(id(one))
            waiting += [*one.keys(), *one.values()] if isinstance(one, dict) else one


def _refusal(got: str, need: str, remedy: str) -> ValueError:
    return ValueError(f"request: got {got}, need {need}; {remedy}")


def _unknown(name) -> ValueError:
    return _refusal(f"the unknown field {shown(name)}", "a field of the format", "leave it out")


def _one_line(error: ValueError, width: int = 500) -> str:
    """Message of an error on one line of valid Unicode."""
    line = " ".join(str(error).split())[:width]
    return line.encode("utf-8", "replace").decode()


# --- Output --------------------------------------------------------------------------------------
