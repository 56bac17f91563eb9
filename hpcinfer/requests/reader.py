"""Input lines to requests: reading a whole input, in order.

Input: OpenAI Batch JSONL, a short form of it, plain text of one prompt per line, or items of the
Python interface. Whatever a line holds becomes a Request or a BadRequest, never an exception. What
the fields of a line mean is said in `hpcinfer.requests.fields`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import numpy as np

from hpcinfer.errors import shown
from hpcinfer.io.lines import LongLine
from hpcinfer.requests.fields import (
    PromptLimits,
    body_of,
    check_names,
    custom_id_of,
    entry_of,
    fitted,
    prompt_of,
    refusal,
    sampling_of,
)
from hpcinfer.requests.request import BadRequest, Request
from hpcinfer.requests.sampling import Sampling
from hpcinfer.text.text import Text


class RequestReader:
    """Requests of a whole input, in order: refuses a second use of a custom_id, sets the keys.

    A request without custom_id is keyed by its prompt and by how many equal prompts without one
    came before. Ids and prompts are remembered as 64-bit hashes.

    Parameters
    ----------
    text : tokenizer and chat template of the model
    defaults : for the fields that an entry leaves out
    limits : what prompts must keep to
    plain : whether the lines are prompts, not JSON
    score : whether the entries are texts to score: sampling fields are then ignored
    """

    def __init__(
        self,
        text: Text,
        defaults: Sampling,
        limits: PromptLimits,
        plain: bool = False,
        score: bool = False,
    ) -> None:
        self._text, self._defaults, self._limits = text, defaults, limits
        self._plain, self._score = plain, score
        self._count = 0
        self._line_of: dict[int, int] = {}
        self._equal_prompts: dict[int, int] = {}

    def read(self, lines: Iterable[tuple[int, bytes | LongLine]]) -> Iterator[Request | BadRequest]:
        """Entries of (1-based line number, raw bytes) pairs; blank lines are passed over."""
        parse = self.parse_text_line if self._plain else self.parse_line
        for line, raw in lines:
            if isinstance(raw, LongLine) or raw.strip():
                yield self._admit(parse(line, raw))

    def read_items(self, items: Iterable[Any]) -> Iterator[Request | BadRequest]:
        """Entries of the Python interface; see `parse_item`."""
        for item in items:
            yield self._admit(self.parse_item(item))

    def parse_line(self, line: int, raw: bytes | LongLine) -> Request | BadRequest:
        """Entry of one JSONL line, in the form of OpenAI Batch or the short form.

        Parameters
        ----------
        line : number of the line in its file, from 1
        raw : the line, with or without its line end

        Returns
        -------
        Request, or BadRequest with the first reason found. It takes no earlier entry into account,
        and counts for none; `read` does both.
        """
        try:
            item = _json(self._unicode(line, raw))
            if not isinstance(item, dict):
                raise refusal(
                    f"a line with {shown(item)}", "a JSON object", "see the input formats"
                )
        except ValueError as error:
            return self._bad(line, "", error)
        return self.parse_item(item, line)

    def parse_text_line(self, line: int, raw: bytes | LongLine) -> Request | BadRequest:
        """Entry of one line of plain text: the prompt is the line without its line end."""
        try:
            prompt = self._unicode(line, raw).rstrip("\r\n")
        except ValueError as error:
            return self._bad(line, "", error)
        return self.parse_item(prompt, line)

    def parse_item(self, item: Any, line: int | None = None) -> Request | BadRequest:
        """Entry of a prompt string, a sequence of token ids, or an object as on a JSONL line."""
        line, custom_id = self._count + 1 if line is None else line, ""
        try:
            # Take the entry apart
            entry = entry_of(item)
            custom_id = custom_id_of(entry)
            kind, body = body_of(entry)
            check_names(body)

            # Read what is asked for, and of what prompt
            sampling = Sampling() if self._score else sampling_of(body, kind, self._defaults)
            token_ids = prompt_of(body, self._text, self._limits, self._score)
            if not self._score:
                sampling = fitted(sampling, len(token_ids), self._text, self._limits)
        except ValueError as error:
            return self._bad(line, custom_id, error)
        key = id_key(custom_id) if custom_id else prompt_key(token_ids, 0)
        return Request(self._count, line, custom_id, kind, token_ids, sampling, key)

    def _unicode(self, line: int, raw: bytes | LongLine) -> str:
        """Text of a raw line; a byte order mark before the first one is dropped."""
        most = self._limits.line_bytes
        if isinstance(raw, LongLine) or len(raw) > most:
            n_bytes = raw.nbytes if isinstance(raw, LongLine) else len(raw)
            raise refusal(f"a line of {n_bytes} bytes", f"at most {most}", "shorten the prompt")
        if b"\0" in raw:
            at = raw.index(b"\0") + 1
            remedy = "remove it or write the file as UTF-8"
            raise refusal(f"a NUL byte at byte {at}", "text", remedy)
        try:
            return bytes(raw).decode("utf-8-sig" if line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            got = f"byte 0x{raw[error.start]:02x} at byte {error.start + 1}"
            raise refusal(got, "UTF-8", "write the file as UTF-8") from None

    def _bad(self, line: int, custom_id: str, error: ValueError) -> BadRequest:
        return BadRequest(self._count, line, custom_id, _one_line(error))

    def _admit(self, entry: Request | BadRequest) -> Request | BadRequest:
        """The next entry of the input, held against those before it."""
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


def id_key(custom_id: str) -> int:
    """64-bit key of a request with a custom_id."""
    return _hash(b"custom_id", custom_id.encode())


def prompt_key(token_ids: Iterable[int], earlier: int) -> int:
    """64-bit key of a prompt that `earlier` equal prompts without a custom_id precede."""
    return _hash(b"prompt", np.array([earlier, *token_ids], dtype="<u8").tobytes())


def _hash(purpose: bytes, data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8, person=purpose).digest(), "little")


def _json(content: str) -> Any:
    """Value of a JSON text; NaN and Infinity are no JSON."""

    def refuse(constant: str) -> None:
        raise refusal(f"the number {constant}", "JSON, which has none such", "correct the line")

    try:
        return json.loads(content, parse_constant=refuse)
    except json.JSONDecodeError as error:
        got = f"no JSON at character {error.pos + 1} ({error.msg})"
        raise refusal(got, "one JSON object per line", "correct the line") from None
    except RecursionError:
        raise refusal("JSON nested too deeply", "a flat object", "correct the line") from None
    except ValueError as error:
        # Python refuses to read very long numbers
        if "digits" not in str(error):
            raise
        got = "a number of thousands of digits"
        raise refusal(got, "numbers in range", "correct the line") from None


def _one_line(error: ValueError, width: int = 500) -> str:
    """Message of an error on one line of valid Unicode."""
    line = " ".join(str(error).split())[:width]
    return line.encode("utf-8", "replace").decode()
