"""Text and token ids: encoding, decoding as tokens arrive, chat templates, what ends a text.

The tokenizer is the tokenizer.json of the checkpoint, run by the `tokenizers` library. Its
post-processor alone says where special tokens are added: transformers, too, takes no notice of
`add_bos_token` where there is a tokenizer.json. A checkpoint without a tokenizer works with token
ids alone: its texts are empty, and asking for an encoding is an error.

The tokenizer and the chat template come with the checkpoint and are not trusted. The template runs
in jinja2's sandbox with a budget of steps and characters, so a hostile one ends in a ValueError.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from functools import wraps

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from tokenizers import AddedToken, Tokenizer

from hpcinfer.engine.request import integer, shown

SPECIAL_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# Characters that are always read, and how many times its length a text may have before it is
# normalised.
SHORT_TEXT, NORMALISED = 1 << 16, 4

MAX_TEMPLATE = 1 << 20
TEMPLATE_STEPS = 200_000
TEMPLATE_CHARACTERS = 1 << 26
TEMPLATE_INTEGER = 100_000
_WIDENING = {"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice", "round"}
_WIDENING |= {"tojson", "truncate", "wordwrap"}
_WIDE_FORMAT = re.compile(r"\d{6}|\*|\{[^{}]*\{")


class Text:
    """The tokenizer of a checkpoint, and its chat template.

    Parameters
    ----------
    ckpt
        Anything with the attributes `tokenizer_json`, `tokenizer_config`, `special_tokens_map`,
        `chat_template`, `generation_config` and `config` of an open checkpoint.

    Attributes
    ----------
    available : bool
        Whether there is a tokenizer.
    special_tokens : dict of str to str
        The named ones, "bos_token", "eos_token", ..., as far as the checkpoint has them.
    eos_ids : tuple of int
        Token ids that end a text, from generation_config, else config, else the tokenizer.

    Raises
    ------
    ValueError
        If the tokenizer or the end-of-sequence ids cannot be read. The chat template is compiled
        when it is first used, so a broken one does not hinder plain prompts.
    """

    def __init__(self, ckpt) -> None:
        config = ckpt.tokenizer_config
        self.special_tokens = _special_tokens(config, ckpt.special_tokens_map)
        self._tokenizer = None
        self._joiner = None
        self._hidden: set[str] = set()
        if ckpt.tokenizer_json is not None:
            special = [*self.special_tokens.values(), *_extra_special_tokens(config)]
            self._tokenizer = _tokenizer(ckpt.tokenizer_json, config, special)
            self._joiner = _joiner(ckpt.tokenizer_json, self._tokenizer)
            added = self._tokenizer.get_added_tokens_decoder().values()
            self._hidden = {token.content for token in added if token.special} | set(special)
        self.available = self._tokenizer is not None
        self.eos_ids = self._eos_ids(ckpt.generation_config, ckpt.config)
        self._template_source = ckpt.chat_template
        self._template = None
        self._pieces: dict[int, str | None] = {}
        self._longest: int | None = None

    def encode(
        self, text: str, add_special_tokens: bool = True, limit: int | None = None
    ) -> list[int]:
        """Token ids of `text`; special tokens written out in it are read as such.

        Parameters
        ----------
        text : str
        add_special_tokens : bool
        limit : int or None
            Tokens that are of use: a text that is sure to have more is not read to its end.

        Raises
        ------
        ValueError
            If there is no tokenizer, it cannot encode the text, or the text is far too long.
        """
        if self._tokenizer is None:
            raise ValueError(
                "text: got a checkpoint without tokenizer.json, need one to read text; "
                "give prompt_token_ids"
            )
        if limit is not None and len(text) > SHORT_TEXT:
            self._refuse_long(text, limit)
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:
            raise ValueError(_library_line(error, "a text that the tokenizer encodes")) from None

    def encode_chat(
        self, messages: list[dict], add_generation_prompt: bool = True, limit: int | None = None
    ) -> list[int]:
        """Token ids of a conversation; the template writes the special tokens, none are added.

        `limit` is as in `encode`.
        """
        rendered = self.render_chat(messages, add_generation_prompt)
        return self.encode(rendered, add_special_tokens=False, limit=limit)

    def render_chat(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """Conversation as the chat template writes it.

        Parameters
        ----------
        messages : list of dict
            Each with `role`, and `content` as a rule; fields that are None are left out.
        add_generation_prompt : bool
            Whether to open the assistant's answer at the end.

        Raises
        ------
        ValueError
            If there is no template, or it fails, refuses the conversation or exceeds its budget.
        """
        if self._template_source is None:
            raise ValueError(
                "chat template: got a checkpoint without one, need one to read messages; "
                "give prompt or prompt_token_ids"
            )
        if self._template is None:
            self._template = _ChatTemplate(self._template_source)
        plain = [{k: v for k, v in message.items() if v is not None} for message in messages]
        return self._template.render(
            **self.special_tokens,
            messages=plain,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
        )

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool = True, after_text: bool = False
    ) -> str:
        """Text of token ids, "" without a tokenizer.

        Parameters
        ----------
        ids : sequence of int
        skip_special_tokens : bool
        after_text : bool
            Whether the text follows other text: a tokenizer that marks words with a leading space
            then keeps the first one, so that prompt + text reads on.
        """
        if self._tokenizer is None:
            return ""
        if after_text:
            joiner = self._joiner(True)
            tokens = (self._token(int(i), skip_special_tokens) for i in ids)
            return "".join(joiner.feed(t) for t in tokens if t is not None) + joiner.finish()
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens)

    def stream(self, stop: Sequence[str] = (), after_text: bool = False) -> TextStream:
        """Text of a sequence that grows token by token, watched for the strings of `stop`."""
        return TextStream(self, stop, after_text)

    def token_text(self, token_id: int) -> str:
        r"""One token as a readable string, for reports of log-probabilities.

        Bytes that are no whole character appear as OpenAI writes them, "bytes:\xe4\xbd"; without a
        tokenizer, or for an id it does not know, the string is "token_id:7".
        """
        data = self.token_bytes(token_id)
        if data is None:
            return f"token_id:{token_id}"
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def token_bytes(self, token_id: int) -> bytes | None:
        """UTF-8 bytes one token stands for inside a text; None if the id is unknown."""
        token = None if self._tokenizer is None else self._tokenizer.id_to_token(int(token_id))
        return None if token is None else self._joiner(True).token_bytes(token)

    def offsets(self, ids: Sequence[int], after_text: bool = False) -> list[int]:
        """Characters of the decoded text that stand before each token; zeros without a tokenizer.

        A character made of several tokens begins where its first token does, and so do the others.
        """
        if self._tokenizer is None:
            return [0] * len(ids)
        joiner, settled, offsets = self._joiner(after_text), 0, []
        for token_id in ids:
            offsets.append(settled + len(joiner.pending()))
            token = self._token(int(token_id))
            settled += 0 if token is None else len(joiner.feed(token))
        return offsets

    def _refuse_long(self, text: str, limit: int) -> None:
        """Refuse a text with more characters than `limit` tokens can stand for.

        A tokenizer takes minutes for a text of megabytes. Normalisation may shorten a text, hence
        the slack.
        """
        if self._longest is None:
            self._longest = max(map(len, self._tokenizer.get_vocab()), default=1)
        most = NORMALISED * self._longest * limit
        if len(text) > most:
            raise ValueError(
                f"request: got a prompt of {len(text)} characters, need at most {most} for the "
                f"{limit} tokens that it may have; shorten the prompt"
            )

    def _token(self, token_id: int, skip_special_tokens: bool = True) -> str | None:
        """Token as the vocabulary writes it; None if it leaves no trace in the text."""
        if not skip_special_tokens:
            return self._tokenizer.id_to_token(token_id)
        if token_id not in self._pieces:
            token = self._tokenizer.id_to_token(token_id)
            self._pieces[token_id] = None if token in self._hidden else token
        return self._pieces[token_id]

    def _eos_ids(self, generation_config: dict, config: dict) -> tuple[int, ...]:
        """End-of-sequence ids from the first place that names any."""
        for name, source in (("generation_config", generation_config), ("config", config)):
            value = source.get("eos_token_id")
            if value is None:
                continue
            ids = [integer(i) for i in (value if isinstance(value, list) else [value])]
            if any(i is None or i < 0 for i in ids):
                raise ValueError(
                    f"{name}: got eos_token_id {shown(value)}, need a token id or a list of them; "
                    "correct the file"
                )
            return tuple(dict.fromkeys(ids))
        eos = self.special_tokens.get("eos_token")
        eos_id = self._tokenizer.token_to_id(eos) if self.available and eos else None
        return () if eos_id is None else (eos_id,)


class TextStream:
    """Text of a growing sequence, and the first place where a stop string stands in it.

    A stop string counts from the token with which the text so far contains it. A character that is
    still incomplete is not looked at. Without stop strings a push costs one list append.

    Parameters
    ----------
    text : Text
    stop : sequence of str
    after_text : bool
        As in `Text.decode`.
    """

    def __init__(self, text: Text, stop: Sequence[str] = (), after_text: bool = False) -> None:
        self._text = text
        self._stop = tuple(stop) if text.available else ()
        self._after_text = after_text
        self._ids: list[int] = []
        self._joiner = text._joiner(after_text) if self._stop else None
        self._reach = max(map(len, self._stop), default=1) - 1
        self._window = ""
        self._before = 0
        self._end: int | None = None

    def push(self, token_id: int, may_stop: bool = True) -> bool:
        """Take the next token; True if a stop string now stands in the text.

        With may_stop=False (below min_tokens) the text up to here is not searched, now or later.
        """
        self._ids.append(token_id)
        if not self._stop or self._end is not None:
            return self._end is not None
        token = self._text._token(token_id)
        if token is None:
            return False

        # Search the new text and the few characters before it that a stop string may begin in
        self._window += self._joiner.feed(token)
        visible = self._window + self._joiner.pending()
        found = [at for at in map(visible.find, self._stop) if at >= 0] if may_stop else []
        if found:
            self._end = self._before + min(found)
            return True

        # Keep what may be the beginning of a stop string
        keep = min(self._reach, len(self._window)) if may_stop else 0
        self._before += len(self._window) - keep
        self._window = self._window[len(self._window) - keep :]
        return False

    def text(self) -> str:
        """Text of all tokens so far, up to the stop string if there is one."""
        whole = self._text.decode(self._ids, after_text=self._after_text)
        return whole if self._end is None else whole[: self._end]


# --- Joining tokens to text, one token at a time -------------------------------------------------
#
# Every joiner is made with `after_text` and has four methods:
#   feed(token)         text that this token settles: no later token can change it
#   pending()           text of the tokens not settled yet, without incomplete characters
#   finish()            text still unsettled at the end of the sequence
#   token_bytes(token)  bytes one token stands for
# All feed() and finish() together are what the tokenizer's decoder makes of the whole sequence.


def _byte_alphabet() -> dict[str, int]:
    """Character that stands for each byte in byte-level BPE (Radford et al. 2019, GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


class _ByteLevelJoiner:
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
        data = [_BYTE_OF.get(character) for character in token]
        return token.encode() if None in data else bytes(data)


class _ByteFallbackJoiner:
    """SentencePiece with byte fallback: tokens are pieces of text, or single bytes "<0xE4>".

    A run of byte tokens becomes its characters if the whole run is valid UTF-8, else one U+FFFD per
    byte; so it settles when a piece of text ends it.

    Parameters
    ----------
    after_text : bool
    replace : list of (str, str)
        What each piece has replaced, such as ("▁", " ").
    strip : (str, int)
        Character, and how many of it are taken from the beginning of the text.
    """

    def __init__(self, after_text: bool, replace, strip) -> None:
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


class _MetaspaceJoiner:
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


class _WholeJoiner:
    """Any other decoder: nothing settles, and the library decodes the whole sequence each time."""

    def __init__(self, after_text: bool, decode) -> None:
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


def _fallback_byte(piece: str) -> int | None:
    """Byte that "<0xE4>" stands for; None for any other piece."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return int(piece[3:5], 16)
        except ValueError:
            return None
    return None


def _joiner(tokenizer_json: str, tokenizer: Tokenizer):
    """Function of `after_text` that makes the joiner for the tokenizer's decoder."""
    decoder = json.loads(tokenizer_json).get("decoder")
    if decoder and decoder["type"] == "Sequence" and len(decoder["decoders"]) == 1:
        decoder = decoder["decoders"][0]
    kind = decoder["type"] if decoder else None
    if kind == "ByteLevel":
        return _ByteLevelJoiner
    if kind == "Metaspace":
        mark = decoder.get("replacement", "▁")
        scheme = decoder.get("prepend_scheme", "always")
        drops_first = scheme != "never" and decoder.get("add_prefix_space", True)
        return lambda after_text: _MetaspaceJoiner(after_text, mark, drops_first)
    if kind == "Sequence" and (steps := _byte_fallback_steps(decoder["decoders"])):
        return lambda after_text: _ByteFallbackJoiner(after_text, *steps)
    join = tokenizer.decoder.decode if decoder else " ".join
    return lambda after_text: _WholeJoiner(after_text, join)


def _byte_fallback_steps(decoders: list[dict]):
    """Replacements and strip of [Replace, ..., ByteFallback, Fuse, Strip]; None for other lists."""
    kinds = [decoder["type"] for decoder in decoders]
    if "ByteFallback" not in kinds:
        return None
    at = kinds.index("ByteFallback")
    if kinds[:at] != ["Replace"] * at or kinds[at + 1 :] not in (["Fuse"], ["Fuse", "Strip"]):
        return None
    replace = [(d["pattern"].get("String"), d["content"]) for d in decoders[:at]]
    strip = decoders[-1] if kinds[-1] == "Strip" else {"content": " ", "start": 0, "stop": 0}
    if any(not old for old, _ in replace) or strip["stop"] != 0:
        return None
    return replace, (strip["content"], strip["start"])


# --- Reading the tokenizer -----------------------------------------------------------------------


def _tokenizer(content: str, config: dict, special: list[str]) -> Tokenizer:
    """Tokenizer of a tokenizer.json, with the special tokens that only its companions name."""
    try:
        tokenizer = Tokenizer.from_str(content)
    except BaseException as error:
        # A panic of the library is no Exception; only the user's own interruptions pass
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise ValueError(_library_line(error, "a tokenizer.json")) from None

    # Lengths are the engine's business
    tokenizer.no_padding()
    tokenizer.no_truncation()

    # Add what tokenizer_config names and tokenizer.json lacks, in the order of the ids
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    listed = _of_type(config, "added_tokens_decoder", dict) or {}
    extra = [_added_token(token) for _, token in sorted(listed.items(), key=_id_of)]
    tokenizer.add_tokens([token for token in extra if token.content not in known])
    tokenizer.add_special_tokens([_added_token(token) for token in special])
    return tokenizer


def _special_tokens(config: dict, special_tokens_map: dict) -> dict[str, str]:
    """Named special tokens: tokenizer_config, else the older special_tokens_map."""
    tokens = {}
    for name in SPECIAL_NAMES:
        value = config.get(name) or special_tokens_map.get(name)
        if value:
            tokens[name] = _added_token(value).content
    return tokens


def _extra_special_tokens(config: dict) -> list[str]:
    """Special tokens without a name of their own."""
    extra = _of_type(config, "extra_special_tokens", list | dict)
    extra = extra or _of_type(config, "additional_special_tokens", list) or []
    values = extra.values() if isinstance(extra, dict) else extra
    return [_added_token(value).content for value in values]


def _of_type(config: dict, name: str, types):
    """Value of a field, None if absent."""
    value = config.get(name)
    if value is not None and not isinstance(value, types):
        raise ValueError(
            f"tokenizer_config: got {name} {shown(value)}, need a list or an object of tokens; "
            "correct the file"
        )
    return value


def _added_token(value) -> AddedToken:
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


def _id_of(entry) -> int:
    """Token id of an entry of added_tokens_decoder, whose keys are ids written as strings."""
    try:
        return int(entry[0])
    except ValueError:
        raise ValueError(
            f"tokenizer_config: got a token id {shown(entry[0])} in added_tokens_decoder, "
            "need a whole number; correct the file"
        ) from None


def _library_line(error: BaseException, need: str) -> str:
    reason = " ".join(str(error).split())[:200]
    return f"tokenizer: got {reason or type(error).__name__}, need {need}; check tokenizer.json"


# --- Chat templates ------------------------------------------------------------------------------


class _ChatTemplate:
    """A compiled chat template.

    Settings and helpers are those of transformers (utils/chat_template_utils.py): trimmed blocks,
    loop controls, `{% generation %}`, tojson without HTML escapes, raise_exception, strftime_now.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_TEMPLATE:
            raise ValueError(
                f"chat template: got {len(source)} characters, need at most {MAX_TEMPLATE}; "
                "correct the file"
            )
        self._sandbox = _Sandbox()
        try:
            tree = _Metered().visit(self._sandbox.parse(source))
            self._template = self._sandbox.from_string(tree)
        except Exception as error:
            raise ValueError(_template_line(error)) from None

    def render(self, **variables) -> str:
        self._sandbox.refill()
        try:
            return self._template.render(variables)
        except Exception as error:
            raise ValueError(_template_line(error)) from None


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with a budget: loop steps, calls, and characters or items produced.

    The sandbox itself keeps a template from Python's internals and bounds `range`. Nested loops,
    recursive macros and strings that grow pass through the budget here.
    """

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self.refill()
        self.filters["tojson"] = _tojson
        self.filters = {name: self._metered(name, f) for name, f in self.filters.items()}
        self.filters["hpcinfer_items"] = self._items
        self.filters["hpcinfer_join"] = self._join
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        del self.globals["lipsum"]

    def refill(self) -> None:
        """Begin a rendering with the whole budget."""
        self._steps = TEMPLATE_STEPS
        self._characters = TEMPLATE_CHARACTERS

    def spend(self, produced=None):
        """Take one step, and the size of what it produced, off the budget; returns `produced`."""
        self._steps -= 1
        if isinstance(produced, str | list | tuple | dict):
            self._characters -= len(produced)
        if self._steps < 0 or self._characters < 0:
            raise jinja2.TemplateError(
                f"more than {TEMPLATE_STEPS} steps or {TEMPLATE_CHARACTERS} characters"
            )
        return produced

    def concat(self, parts: Iterable[str]) -> str:
        return "".join(self.spend(part) for part in parts)

    def call(__self, __context, __obj, *args, **kwargs):
        method = getattr(__obj, "__wrapped__", __obj)
        if isinstance(owner := getattr(method, "__self__", None), str):
            __self._bound_growth(method.__name__, (owner, *args, *kwargs.values()))
        return __self.spend(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context, operator, left, right):
        if operator == "*":
            self._bound_product(left, right)
        elif operator == "**":
            _bound_integers((left, right), limit=64)
        elif operator == "%":
            self._bound_growth("format", (left,))
        return self.spend(super().call_binop(context, operator, left, right))

    def _bound_growth(self, name: str, values) -> None:
        """Refuse a string method or filter whose result would exceed the budget."""
        if name in _WIDENING:
            _bound_integers(values, limit=TEMPLATE_INTEGER)
        if name in ("format", "format_map") and _WIDE_FORMAT.search(str(values[0])):
            raise jinja2.TemplateError("a format with a width that is very large or computed")
        if name == "replace" and len(values) > 2:
            self._bound_size(str(values[0]).count(str(values[1])) * len(str(values[2])))
        if name == "join" and len(values) > 1:
            self._bound_size(_size(values[0]) * _size(values[1]))

    def _bound_size(self, size: int) -> None:
        if size > self._characters:
            raise jinja2.TemplateError(f"a text of {shown(size)} characters")

    def _bound_product(self, left, right) -> None:
        for many, times in ((left, right), (right, left)):
            if isinstance(many, str | list | tuple) and isinstance(times, int):
                self._bound_size(len(many) * times)
            elif isinstance(many, int) and many.bit_length() > 4096:
                raise jinja2.TemplateError(f"a product with {shown(many)}")

    def _metered(self, name: str, function):
        # A filter that takes its context, environment or state first has its value second
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @wraps(function)
        def metered(*args, **kwargs):
            self._bound_growth(name, (*args[first:], *kwargs.values()))
            return self.spend(function(*args, **kwargs))

        return metered

    @jinja2.pass_context
    def _items(self, context, values) -> Iterator:
        for value in values:
            self.spend()
            yield value

    @jinja2.pass_context
    def _join(self, context, parts) -> str:
        return self.spend("".join(map(str, parts)))


class _Metered(NodeTransformer):
    """Puts loops and `~` of a parsed template on the sandbox's budget."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "hpcinfer_items")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "hpcinfer_join")


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks what the assistant said; kept as it is."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller):
        return caller()


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _size(value) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict) else 1


def _bound_integers(values, limit: int) -> None:
    """Refuse a width, count or exponent that would make one step very large."""
    for value in values:
        if isinstance(value, int) and abs(value) > limit:
            raise jinja2.TemplateError(f"the number {shown(value)} as an argument")


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message):
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _template_line(error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    where = f" at line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
    return (
        f"chat template: got {type(error).__name__}{where}: {reason or 'no reason'}, "
        "need a template that renders these messages; check the template and the messages"
    )
