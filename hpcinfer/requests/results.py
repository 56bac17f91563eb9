"""Results to records, and records to lines of OpenAI's Batch format."""

from __future__ import annotations

import math
from hashlib import blake2b
from typing import Any

from hpcinfer.requests.request import BadRequest, Choice, Extracted, Request, Result, Score
from hpcinfer.text.text import Text

LOWEST_LOGPROB = -9999.0


def generate_record(outcome: Result | BadRequest) -> dict[str, Any]:
    """Neutral record of a generation: `error` is None, or the reason why there are no choices."""
    if isinstance(outcome, BadRequest):
        return _bad_record(outcome) | {"kind": "", "prompt_token_ids": [], "choices": []}
    request = outcome.request
    return _record(request) | {
        "kind": request.kind,
        "prompt_token_ids": list(request.token_ids),
        "choices": [_choice_record(choice) for choice in outcome.choices],
    }


def score_record(outcome: Score | BadRequest) -> dict[str, Any]:
    """Neutral record of a scored text; the first log-probability is None."""
    if isinstance(outcome, BadRequest):
        return _bad_record(outcome) | {
            "token_ids": [],
            "logprobs": [],
            "sum_logprob": None,
            "perplexity": None,
        }
    return _record(outcome.request) | {
        "token_ids": list(outcome.request.token_ids),
        "logprobs": [None, *(float(logprob) for logprob in outcome.logprobs[1:])],
        "sum_logprob": float(outcome.sum_logprob),
        "perplexity": float(outcome.perplexity),
    }


def extract_record(outcome: Extracted | BadRequest) -> dict[str, Any]:
    """Neutral record of a text whose activations were extracted."""
    if isinstance(outcome, BadRequest):
        return _bad_record(outcome) | {"token_ids": []}
    return _record(outcome.request) | {
        "token_ids": list(outcome.request.token_ids),
        "generation": outcome.generation,
        "replica": outcome.replica,
        "first_row": outcome.first_row,
        "n_rows": outcome.n_rows,
    }


def completion_line(record: dict[str, Any], model: str, created: int, text: Text) -> dict[str, Any]:
    """Output line of a generation: a response of OpenAI Batch, to be written as JSON.

    Parameters
    ----------
    record : what `generate_record` gave
    model : name that the line states
    created : seconds since 1970 that the line states
    text : for the strings of tokens

    Returns
    -------
    dict with id, custom_id, response and error. Each choice has `text`, `token_ids`,
    `finish_reason` and `logprobs` in both kinds; a chat's has `message` too.
    """
    name = _identity(record)
    line = {"id": f"batch_req_{name}", "custom_id": record["custom_id"]}
    if record["error"] is not None:
        return line | {"response": None, "error": _error(record)}

    # Count the tokens, and put the choices into a body of the kind that was asked for
    chat = record["kind"] == "chat"
    prompt_tokens = len(record["prompt_token_ids"])
    new_tokens = sum(len(choice["token_ids"]) for choice in record["choices"])
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{name}",
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": model,
        "choices": [_choice(choice, chat, text) for choice in record["choices"]],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": new_tokens,
            "total_tokens": prompt_tokens + new_tokens,
        },
    }
    response = {"status_code": 200, "request_id": f"req_{name}", "body": body}
    return line | {"response": response, "error": None}


def score_line(record: dict[str, Any]) -> dict[str, Any]:
    """Output line of a scored text, to be written as JSON; figures that are not finite are null."""
    if record["error"] is not None:
        return {"custom_id": record["custom_id"], "error": _error(record)}
    return {
        "custom_id": record["custom_id"],
        "token_ids": record["token_ids"],
        "logprobs": [None if p is None else _json_logprob(p) for p in record["logprobs"]],
        "sum_logprob": _finite(record["sum_logprob"]),
        "perplexity": _finite(record["perplexity"]),
    }


def _record(request: Request) -> dict[str, Any]:
    return {
        "index": request.index,
        "line": request.line,
        "custom_id": request.custom_id or f"request-{request.index}",
        "error": None,
    }


def _choice_record(choice: Choice) -> dict[str, Any]:
    """A sample in plain values."""
    logprobs, tops = choice.logprobs, choice.top_logprobs
    if tops is not None:
        tops = [[(int(token), float(p)) for token, p in top] for top in tops]
    return {
        "index": choice.index,
        "text": choice.text,
        "finish_reason": choice.finish_reason,
        "token_ids": [int(token) for token in choice.token_ids],
        "logprobs": None if logprobs is None else [float(p) for p in logprobs],
        "top_logprobs": tops,
    }


def _bad_record(bad: BadRequest) -> dict[str, Any]:
    return {
        "index": bad.index,
        "line": bad.line,
        "custom_id": bad.custom_id or f"request-{bad.index}",
        "error": bad.message,
    }


def _error(record: dict[str, Any]) -> dict[str, Any]:
    return {"code": "invalid_request", "message": record["error"], "line": record["line"]}


def _identity(record: dict[str, Any]) -> str:
    """Hexadecimal name of an entry, the same in every run."""
    data = f"{record['index']}:{record['custom_id']}".encode()
    return blake2b(data, digest_size=12, person=b"output").hexdigest()


def _choice(choice: dict[str, Any], chat: bool, text: Text) -> dict[str, Any]:
    """Choice of an output line."""
    logprobs = None
    if choice["logprobs"] is not None:
        logprobs = (_chat_logprob_lists if chat else _completion_logprobs)(choice, text)
    message = {"message": {"role": "assistant", "content": choice["text"]}} if chat else {}
    return {
        "index": choice["index"],
        **message,
        "text": choice["text"],
        "token_ids": choice["token_ids"],
        "finish_reason": choice["finish_reason"],
        "logprobs": logprobs,
    }


def _completion_logprobs(choice: dict[str, Any], text: Text) -> dict[str, Any]:
    """Log-probabilities as OpenAI's completions list them; offsets count from the choice's text."""
    tops = None
    if choice["top_logprobs"] is not None:
        tops = [_named_logprobs(top, text) for top in choice["top_logprobs"]]
    offsets = text.offsets(choice["token_ids"], after_text=True)
    return {
        "tokens": [text.token_text(token) for token in choice["token_ids"]],
        "token_logprobs": [_json_logprob(p) for p in choice["logprobs"]],
        "top_logprobs": tops,
        "text_offset": [min(offset, len(choice["text"])) for offset in offsets],
    }


def _named_logprobs(top: list[tuple[int, float]], text: Text) -> dict[str, float]:
    """Log-probability by token string; of tokens that read the same the more probable stands."""
    named: dict[str, float] = {}
    for token, logprob in top:
        named.setdefault(text.token_text(token), _json_logprob(logprob))
    return named


def _chat_logprob_lists(choice: dict[str, Any], text: Text) -> dict[str, Any]:
    """Log-probabilities as OpenAI's chat lists them."""
    tops = choice["top_logprobs"] or [[]] * len(choice["token_ids"])
    chosen = zip(choice["token_ids"], choice["logprobs"], tops, strict=True)
    return {
        "content": [
            _token_logprob(token, p, text)
            | {"top_logprobs": [_token_logprob(t, q, text) for t, q in top]}
            for token, p, top in chosen
        ]
    }


def _token_logprob(token: int, logprob: float, text: Text) -> dict[str, Any]:
    data = text.token_bytes(token)
    return {
        "token": text.token_text(token),
        "logprob": _json_logprob(logprob),
        "bytes": None if data is None else list(data),
    }


def _json_logprob(logprob: float) -> float:
    """Log-probability that JSON can carry; OpenAI writes -9999 for none."""
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
