"""Text and token ids: encoding, decoding, and what ends a text.

The tokenizer is the tokenizer.json of the checkpoint, run by the `tokenizers` library. Its
post-processor alone says where special tokens are added: transformers, too, takes no notice of
`add_bos_token` where there is a tokenizer.json. A checkpoint without a tokenizer works with token
ids alone: its texts are empty, and asking for an encoding is an error.

The tokenizer and the chat template come with the checkpoint and are not trusted. The template runs
in jinja2's sandbox with a budget of steps and characters, so a hostile one ends in a ValueError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer

from hpcinfer.errors import integer, shown
from hpcinfer.text.added_tokens import extra_special_tokens, missing_tokens, special_tokens
from hpcinfer.text.chat_template import ChatTemplate
from hpcinfer.text.joiners import Joiner, joiner_of
from hpcinfer.text.prefix_space import set_prefix_space

# Characters that are always read, and how many times its length a text may have before it is
# normalised
SHORT_TEXT, NORMALISED = 1 << 16, 4


class TextFiles(Protocol):
    """What an open checkpoint says of text: contents of its small files, {} or None if absent."""

    tokenizer_json: str | None
    tokenizer_config: dict[str, Any]
    special_tokens_map: dict[str, Any]
    chat_template: str | None
    generation_config: dict[str, Any]
    config: dict[str, Any]


class Text:
    """The tokenizer of a checkpoint, and its chat template.

    Parameters
    ----------
    ckpt : open checkpoint

    Attributes
    ----------
    available : whether there is a tokenizer
    special_tokens : the named ones that there are, "bos_token", "eos_token", ...
    eos_ids : token ids that end a text, from generation_config, else config, else the tokenizer

    Raises
    ------
    ValueError
        If the tokenizer or the end-of-sequence ids cannot be read. The chat template is compiled
        when it is first used, so a broken one does not hinder plain prompts.
    """

    def __init__(self, ckpt: TextFiles) -> None:
        self.special_tokens = special_tokens(ckpt.tokenizer_config, ckpt.special_tokens_map)
        self._tokenizer: Tokenizer | None = None
        self._hidden: set[str] = set()

        # Make the tokenizer, and note which tokens leave no trace in a text
        if ckpt.tokenizer_json is not None:
            extra = extra_special_tokens(ckpt.tokenizer_config, ckpt.special_tokens_map)
            special = [*self.special_tokens.values(), *extra]
            self._tokenizer = _tokenizer(ckpt.tokenizer_json, ckpt.tokenizer_config, special)
            self._make_joiner = joiner_of(self._tokenizer)
            added = self._tokenizer.get_added_tokens_decoder().values()
            self._hidden = {token.content for token in added if token.special} | set(special)
        self.available = self._tokenizer is not None
        self.eos_ids = self._eos_ids(ckpt.generation_config, ckpt.config)

        # Leave to later what a text without template or of usual length does not need
        self._template_source = ckpt.chat_template
        self._template: ChatTemplate | None = None
        self._pieces: dict[int, str | None] = {}
        self._longest: int | None = None

    def encode(
        self, text: str, add_special_tokens: bool = True, limit: int | None = None
    ) -> list[int]:
        """Token ids of `text`; special tokens written out in it are read as such.

        Parameters
        ----------
        text : what to read
        add_special_tokens : whether to add those that the tokenizer's post-processor adds
        limit : tokens that are of use: a text that is sure to have more is not read to its end

        Raises
        ------
        ValueError
            If there is no tokenizer, it cannot encode the text, or the text is far too long.
        """
        tokenizer = self._needed()
        if limit is not None and len(text) > SHORT_TEXT:
            self._refuse_long(text, limit)
        try:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:
            raise ValueError(_library_line(error, "a text that the tokenizer encodes")) from None

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        limit: int | None = None,
    ) -> list[int]:
        """Token ids of a conversation; the template writes the special tokens, none are added.

        `limit` is as in `encode`.
        """
        rendered = self.render_chat(messages, add_generation_prompt)
        return self.encode(rendered, add_special_tokens=False, limit=limit)

    def render_chat(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Conversation as the chat template writes it.

        Parameters
        ----------
        messages : each with `role`, and `content` as a rule: a text, a list of parts or None;
            other fields that are None are left out. See `hpcinfer.text.conversation`
        add_generation_prompt : whether to open the assistant's answer at the end

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

        # Compile the template once, and fill it in
        if self._template is None:
            self._template = ChatTemplate(self._template_source)
        return self._template.render_chat(
            messages,
            **self.special_tokens,
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
        ids : any, also such as the tokenizer does not know
        skip_special_tokens : whether special tokens leave no trace
        after_text : whether the text follows other text: a tokenizer that marks words with a
            leading space then keeps the first one, so that prompt + text reads on
        """
        if self._tokenizer is None:
            return ""
        if after_text:
            joiner = self.joiner(True)
            tokens = (self.token(int(i), skip_special_tokens) for i in ids)
            return "".join(joiner.feed(t) for t in tokens if t is not None) + joiner.finish()
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens)

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
        return None if token is None else self.joiner(True).token_bytes(token)

    def offsets(self, ids: Sequence[int], after_text: bool = False) -> list[int]:
        """Characters of the decoded text that stand before each token; zeros without a tokenizer.

        A character made of several tokens begins where its first token does, and so do the others.
        """
        if self._tokenizer is None:
            return [0] * len(ids)
        joiner, settled, offsets = self.joiner(after_text), 0, []
        for token_id in ids:
            offsets.append(settled + len(joiner.pending()))
            token = self.token(int(token_id))
            settled += 0 if token is None else len(joiner.feed(token))
        return offsets

    def token(self, token_id: int, skip_special_tokens: bool = True) -> str | None:
        """Token as the vocabulary writes it; None if it leaves no trace in the text."""
        if not skip_special_tokens:
            return self._needed().id_to_token(token_id)
        if token_id not in self._pieces:
            token = self._needed().id_to_token(token_id)
            self._pieces[token_id] = None if token in self._hidden else token
        return self._pieces[token_id]

    def holds_special(self, text: str) -> bool:
        """True if a special token is written out in a text."""
        return any(token in text for token in self._hidden)

    def joiner(self, after_text: bool) -> Joiner:
        """A new joiner of tokens to one text; `after_text` is as in `decode`."""
        self._needed()
        return self._make_joiner(after_text)

    def _needed(self) -> Tokenizer:
        """The tokenizer, where nothing goes without it."""
        if self._tokenizer is None:
            raise ValueError(
                "text: got a checkpoint without tokenizer.json, need one to read text; "
                "give prompt_token_ids"
            )
        return self._tokenizer

    def _refuse_long(self, text: str, limit: int) -> None:
        """Refuse a text with more characters than `limit` tokens can stand for.

        A tokenizer takes minutes for a text of megabytes. Normalisation may shorten a text, hence
        the slack.
        """
        if self._longest is None:
            self._longest = max(map(len, self._needed().get_vocab()), default=1)
        most = NORMALISED * self._longest * limit
        if len(text) > most:
            raise ValueError(
                f"request: got a prompt of {len(text)} characters, need at most {most} for the "
                f"{limit} tokens that it may have; shorten the prompt"
            )

    def _eos_ids(
        self, generation_config: dict[str, Any], config: dict[str, Any]
    ) -> tuple[int, ...]:
        """End-of-sequence ids from the first place that names any."""
        for name, source in (("generation_config", generation_config), ("config", config)):
            value = source.get("eos_token_id")
            if value is not None:
                return _ids_in(name, value)
        eos = self.special_tokens.get("eos_token")
        if self._tokenizer is None or not eos:
            return ()
        eos_id = self._tokenizer.token_to_id(eos)
        return () if eos_id is None else (eos_id,)


# --- Reading the tokenizer -----------------------------------------------------------------------


def _tokenizer(content: str, config: dict[str, Any], special: list[str]) -> Tokenizer:
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

    # Take what the companions say of spaces and of special tokens that are written out
    set_prefix_space(tokenizer, config)
    if config.get("split_special_tokens") is True:
        tokenizer.encode_special_tokens = True

    # Add the tokens that tokenizer.json lacks, each under the id that its companions give it
    for token, token_id in missing_tokens(tokenizer, config, special):
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        if token_id not in (None, tokenizer.token_to_id(token.content)):
            raise ValueError(
                f"tokenizer: got id {token_id} for the token {shown(token.content)} that "
                f"tokenizer.json lacks, need {tokenizer.token_to_id(token.content)}, the next "
                "free one; save the tokenizer again with tokenizer.json"
            )
    return tokenizer


def _ids_in(name: str, value: Any) -> tuple[int, ...]:
    """Token ids, each once, of the eos_token_id of file `name`."""
    ids = [integer(one) for one in (value if isinstance(value, list) else [value])]
    if None in ids:
        raise ValueError(
            f"{name}: got eos_token_id {shown(value)}, need a token id or a list of them; "
            "correct the file"
        )
    return tuple(dict.fromkeys(i for i in ids if i is not None and i >= 0))  # -1 stands for none


def _library_line(error: BaseException, need: str) -> str:
    reason = " ".join(str(error).split())[:200]
    return f"tokenizer: got {reason or type(error).__name__}, need {need}; check tokenizer.json"
