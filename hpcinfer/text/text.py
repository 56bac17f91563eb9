"""The text of a checkpoint as the engine sees it: prompts to token ids, token ids to text.

What a stranger has written for it runs elsewhere, see `hpcinfer.text.worker`. What comes back from
there is the vocabulary: a table with which any rank joins tokens to text by itself, without a
tokenizer. That needs no bounds of its own: a token has a bounded length, and none of the ways of
joining makes it much longer (`hpcinfer.text.joiners`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from hpcinfer.text.joiners import Joiner, joiner_of
from hpcinfer.text.worker import Worker, shared_worker

_FILES = (
    "tokenizer_json",
    "tokenizer_config",
    "special_tokens_map",
    "chat_template",
    "generation_config",
    "config",
)


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
    tables : those of a Text of the same checkpoint, on another rank; None to read the tokenizer
    worker : Worker that encodes; by default the one of this process

    Attributes
    ----------
    available : whether there is a tokenizer
    special_tokens : the named ones that there are, "bos_token", "eos_token", ...
    eos_ids : token ids that end a text, from generation_config, else config, else the tokenizer
    tables : plain values that make a Text on another rank

    Raises
    ------
    ValueError
        If the tokenizer or the end-of-sequence ids cannot be read. The chat template is compiled
        when it is first used, so a broken one does not hinder plain prompts.
    """

    def __init__(
        self,
        ckpt: TextFiles,
        tables: dict[str, Any] | None = None,
        worker: Worker | None = None,
    ) -> None:
        # Read the tokenizer, where no other rank has done so
        self._files = {name: getattr(ckpt, name) for name in _FILES}
        self._worker = shared_worker() if worker is None else worker
        self.tables = self._worker.open(self._files) if tables is None else tables

        # Take what makes text of tokens
        self.available = ckpt.tokenizer_json is not None
        self.special_tokens: dict[str, str] = self.tables["special_tokens"]
        self.eos_ids: tuple[int, ...] = tuple(self.tables["eos_ids"])
        self._hidden = frozenset(self.tables["hidden"])
        self._tokens = dict(zip(self.tables["ids"], self.tables["tokens"], strict=True))
        if ckpt.tokenizer_json is not None:
            self._make_joiner = joiner_of(self.tables["decoder"])

    def encode(
        self, text: str, add_special_tokens: bool = True, limit: int | None = None
    ) -> list[int]:
        """Token ids of `text`; special tokens written out in it are read as such.

        Parameters
        ----------
        text : what to read
        add_special_tokens : whether to add those that the tokenizer's post-processor adds
        limit : tokens that it may have: a text that is sure to have more is not read to its end

        Raises
        ------
        ValueError
            If there is no tokenizer, it cannot encode the text, or not within the budget, or the
            text is too long.
        """
        return self._ask("tokenizer", "encode", text, add_special_tokens, limit)

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        limit: int | None = None,
    ) -> list[int]:
        """Token ids of a conversation; the template writes the special tokens, none are added.

        `limit` is as in `encode`.
        """
        return self._ask("chat template", "encode_chat", messages, add_generation_prompt, limit)

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
        return self._ask("chat template", "render_chat", messages, add_generation_prompt)

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
        if not self.available:
            return ""
        joiner = self.joiner(after_text)
        tokens = (self.token(int(i), skip_special_tokens) for i in ids)
        return "".join(joiner.feed(t) for t in tokens if t is not None) + joiner.finish()

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
        token = self._tokens.get(int(token_id))
        return None if token is None else self.joiner(True).token_bytes(token)

    def offsets(self, ids: Sequence[int], after_text: bool = False) -> list[int]:
        """Characters of the decoded text that stand before each token; zeros without a tokenizer.

        A character made of several tokens begins where its first token does, and so do the others.
        """
        if not self.available:
            return [0] * len(ids)
        joiner, settled, offsets = self.joiner(after_text), 0, []
        for token_id in ids:
            offsets.append(settled + len(joiner.pending()))
            token = self.token(int(token_id))
            settled += 0 if token is None else len(joiner.feed(token))
        return offsets

    def token(self, token_id: int, skip_special_tokens: bool = True) -> str | None:
        """Token as the vocabulary writes it; None if it leaves no trace in the text."""
        self._need_tokenizer()
        token = self._tokens.get(token_id)
        return None if skip_special_tokens and token in self._hidden else token

    def holds_special(self, text: str) -> bool:
        """True if a special token is written out in a text."""
        return any(token in text for token in self._hidden)

    def joiner(self, after_text: bool) -> Joiner:
        """A new joiner of tokens to one text; `after_text` is as in `decode`."""
        self._need_tokenizer()
        return self._make_joiner(after_text)

    def _ask(self, subject: str, what: str, *arguments: Any) -> Any:
        """What a method of the Encoder returns."""
        return self._worker.ask(subject, self._files, what, *arguments)

    def _need_tokenizer(self) -> None:
        """Refuse what nothing goes without."""
        if not self.available:
            raise ValueError(
                "text: got a checkpoint without tokenizer.json, need one to read text; "
                "give prompt_token_ids"
            )
