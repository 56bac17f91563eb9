"""Tokens to text as they arrive: each kind of tokenizer joins them in its own way."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

from hpcinfer.errors import shown
from hpcinfer.text.library import library_errors

# Characters of what a decoder writes in the place of a string, such as a space for a mark
MAX_REPLACEMENT = 8


class Joiner(Protocol):
    """Joins the tokens of one text; made with whether the text follows other text.

    All `feed` and `finish` together are what the tokenizer's decoder makes of the whole sequence.
    """

    def feed(self, token: str) -> str:
        """Text that this token settles: no later token can change it."""

    def pending(self) -> str:
        """Text of the tokens not settled yet, without incomplete characters."""

    def finish(self) -> str:
        """Text still unsettled at the end of the sequence."""

    def token_bytes(self, token: str) -> bytes:
        """Bytes that one token stands for."""


def joiner_of(decoder: dict[str, Any] | None) -> Callable[[bool], Joiner]:
    """Function that makes joiners for a decoder.

    Parameters
    ----------
    decoder : of tokenizer.json, None if it has none

    Returns
    -------
    function of whether the text follows other text, which gives a Joiner

    Raises
    ------
    ValueError
        If the decoder could make a text much longer than its tokens, or run for long.
    """
    _refuse_growth(decoder)
    if decoder and decoder["type"] == "Sequence" and len(decoder["decoders"]) == 1:
        decoder = decoder["decoders"][0]
    kind = decoder["type"] if decoder else None

    # Take the joiner that settles a token as soon as that kind of decoder allows
    if decoder is None or kind is None:
        return lambda after_text: WholeJoiner(after_text, " ".join)
    if kind == "ByteLevel":
        return ByteLevelJoiner
    if kind == "Metaspace":
        mark = decoder.get("replacement", "▁")
        scheme = decoder.get("prepend_scheme", "always")
        drops_first = scheme != "never" and decoder.get("add_prefix_space", True)
        return lambda after_text: MetaspaceJoiner(after_text, mark, drops_first)
    if kind == "Sequence" and (steps := _byte_fallback_steps(decoder["decoders"])):
        return lambda after_text: ByteFallbackJoiner(after_text, *steps)
    join = _library_decode(decoder)
    return lambda after_text: WholeJoiner(after_text, join)


class ByteLevelJoiner:
    """Byte-level BPE: tokens are bytes, their sequence is UTF-8."""

    def __init__(self, after_text: bool) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: str) -> str:
        return self._utf8.decode(self.token_bytes(token))

    def pending(self) -> str:
        return ""

    def finish(self) -> str:
        return self._utf8.decode(b"", True)

    def token_bytes(self, token: str) -> bytes:
        # A character outside the alphabet marks an added token that is written as plain text
        try:
            return _bytes_of(token)
        except KeyError:
            return token.encode()


class ByteFallbackJoiner:
    """SentencePiece with byte fallback: tokens are pieces of text, or single bytes "<0xE4>".

    A run of byte tokens becomes its characters if the whole run is valid UTF-8, else one U+FFFD per
    byte; so it settles when a piece of text ends it.

    Parameters
    ----------
    after_text : whether the text follows other text
    replace : what each piece has replaced, such as ("▁", " ")
    strip : character, and how many of it are taken from the beginning of the text
    """

    def __init__(
        self, after_text: bool, replace: list[tuple[str, str]], strip: tuple[str, int]
    ) -> None:
        self._replace = replace
        self._strip, self._strips_left = strip[0], 0 if after_text else strip[1]
        self._run = bytearray()

    def feed(self, token: str) -> str:
        byte = _fallback_byte(self._replaced(token))
        if byte is not None:
            self._run.append(byte)
            return ""
        return self._stripped(self._end_run() + self._replaced(token))

    def pending(self) -> str:
        try:
            text = self._run.decode()
        except UnicodeDecodeError:
            return ""
        left = self._strips_left
        return text[min(left, len(text) - len(text.lstrip(self._strip))) :] if left else text

    def finish(self) -> str:
        return self._stripped(self._end_run())

    def token_bytes(self, token: str) -> bytes:
        piece = self._replaced(token)
        byte = _fallback_byte(piece)
        return piece.encode() if byte is None else bytes([byte])

    def _replaced(self, token: str) -> str:
        for old, new in self._replace:
            token = token.replace(old, new)
        return token

    def _end_run(self) -> str:
        try:
            text = self._run.decode()
        except UnicodeDecodeError:
            text = "\ufffd" * len(self._run)
        self._run.clear()
        return text

    def _stripped(self, text: str) -> str:
        # Take the leading characters off until one is met that stays
        while self._strips_left and text:
            if not text.startswith(self._strip):
                self._strips_left = 0
                break
            text = text[1:]
            self._strips_left -= 1
        return text


class MetaspaceJoiner:
    """SentencePiece without bytes: a mark stands for a space, which the first token drops."""

    def __init__(self, after_text: bool, mark: str, drops_first: bool) -> None:
        self._mark = mark
        self._space = "" if drops_first and not after_text else " "

    def feed(self, token: str) -> str:
        text = token.replace(self._mark, self._space)
        self._space = " "
        return text

    def pending(self) -> str:
        return ""

    def finish(self) -> str:
        return ""

    def token_bytes(self, token: str) -> bytes:
        return token.replace(self._mark, " ").encode()


class WholeJoiner:
    """Any other decoder: nothing settles, and the library decodes the whole sequence each time."""

    def __init__(self, after_text: bool, decode: Callable[[list[str]], str]) -> None:
        self._decode = decode
        self._tokens: list[str] = []

    def feed(self, token: str) -> str:
        self._tokens.append(token)
        return ""

    def pending(self) -> str:
        return self._decode(self._tokens)

    def finish(self) -> str:
        return self._decode(self._tokens)

    def token_bytes(self, token: str) -> bytes:
        return self._decode([token]).encode()


def _byte_alphabet() -> dict[str, int]:
    """Byte that each character stands for in byte-level BPE (Radford et al. 2019, GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


@cache
def _bytes_of(token: str) -> bytes:
    """Bytes that the characters of a token stand for; KeyError if one stands for none."""
    return bytes(map(_BYTE_OF.__getitem__, token))


def _fallback_byte(piece: str) -> int | None:
    """Byte that "<0xE4>" stands for; None for any other piece."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return int(piece[3:5], 16)
        except ValueError:
            return None
    return None


def _byte_fallback_steps(
    decoders: list[dict[str, Any]],
) -> tuple[list[tuple[str, str]], tuple[str, int]] | None:
    """Replacements and strip of [Replace, ..., ByteFallback, Fuse, Strip]; None for other lists."""
    kinds = [decoder["type"] for decoder in decoders]
    if "ByteFallback" not in kinds:
        return None
    at = kinds.index("ByteFallback")
    if kinds[:at] != ["Replace"] * at or kinds[at + 1 :] not in (["Fuse"], ["Fuse", "Strip"]):
        return None

    # Take what each step does, as far as it can be done token by token
    replace = [(d["pattern"].get("String"), d["content"]) for d in decoders[:at]]
    strip: dict[str, Any] = {"content": " ", "start": 0, "stop": 0}
    if kinds[-1] == "Strip":
        strip = decoders[-1]
    if any(not old for old, _ in replace) or strip["stop"] != 0:
        return None
    return replace, (strip["content"], strip["start"])


def _refuse_growth(decoder: dict[str, Any] | None) -> None:
    """Refuse a decoder with a long replacement, or one of what a regular expression finds."""
    waiting = [decoder] if decoder else []
    while waiting:
        step = waiting.pop()
        waiting += step.get("decoders", [])
        if step["type"] == "Replace":
            if "String" not in step["pattern"] or len(step["content"]) > MAX_REPLACEMENT:
                raise ValueError(
                    f"tokenizer: got the decoder {shown(step)}, need one that replaces strings by "
                    f"at most {MAX_REPLACEMENT} characters; check tokenizer.json"
                )


def _library_decode(decoder: dict[str, Any]) -> Callable[[list[str]], str]:
    """Function of the library that makes text of tokens as a decoder says."""
    from tokenizers import Tokenizer

    # A tokenizer needs a model, which the decoder has no use for
    model = {"type": "WordLevel", "vocab": {}, "unk_token": ""}
    with library_errors("a decoder"):
        library = Tokenizer.from_str(json.dumps({"model": model, "decoder": decoder})).decoder

    def decode(tokens: list[str]) -> str:
        with library_errors("tokens that the decoder joins"):
            text = library.decode(tokens)
        return text

    return decode
