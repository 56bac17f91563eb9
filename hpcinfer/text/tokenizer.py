"""Text to token ids: the tokenizer and the chat template of a checkpoint.

The tokenizer is the tokenizer.json of the checkpoint, run by the `tokenizers` library. Its
post-processor alone says where special tokens are added: transformers, too, takes no notice of
`add_bos_token` where there is a tokenizer.json. A checkpoint without a tokenizer works with token
ids alone: its texts are empty, and asking for an encoding is an error.

Both come with the checkpoint and are not trusted. They run here as they are: this module is used in
`hpcinfer.text.child`, which bounds them.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import AddedToken, Tokenizer

from hpcinfer.errors import integer, shown
from hpcinfer.text.chat_template import ChatTemplate
from hpcinfer.text.library import library_errors

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
# normalised
SHORT_TEXT, NORMALISED = 1 << 16, 4

# Characters of a token, of which an answer may have many
MAX_TOKEN = 1 << 12


class Encoder:
    """The tokenizer of a checkpoint, and its chat template.

    Parameters
    ----------
    files : what a checkpoint says of text, by the names of `hpcinfer.text.text.TextFiles`

    Raises
    ------
    ValueError
        If the tokenizer or the end-of-sequence ids cannot be read. The chat template is compiled
        when it is first used, so a broken one does not hinder plain prompts.
    """

    def __init__(self, files: dict[str, Any]) -> None:
        config = files["tokenizer_config"]
        self._special_tokens = _special_tokens(config, files["special_tokens_map"])
        self._tokenizer: Tokenizer | None = None
        self._decoder: dict[str, Any] | None = None
        self._hidden: set[str] = set()

        # Make the tokenizer, and note which tokens leave no trace in a text
        if files["tokenizer_json"] is not None:
            special = [*self._special_tokens.values(), *_extra_special_tokens(config)]
            self._tokenizer = _tokenizer(files["tokenizer_json"], config, special)
            self._decoder = json.loads(files["tokenizer_json"]).get("decoder")
            added = self._tokenizer.get_added_tokens_decoder().values()
            self._hidden = {token.content for token in added if token.special} | set(special)
        self._eos = self._eos_ids(files["generation_config"], files["config"])

        # Leave to later what a text without template or of usual length does not need
        self._template_source = files["chat_template"]
        self._template: ChatTemplate | None = None
        self._longest: int | None = None

    def tables(self) -> dict[str, Any]:
        """What the other side needs to make text of tokens.

        Returns
        -------
        dict: decoder, of tokenizer.json; special_tokens, the named ones; eos_ids; hidden, tokens
        that leave no trace in a text; ids and tokens, those of the vocabulary, in the same order
        """
        ids: list[int] = []
        if self._tokenizer is not None:
            ids = sorted(set(self._tokenizer.get_vocab().values()))
        tokens = [self._needed().id_to_token(token_id) or "" for token_id in ids]
        if (longest := max(map(len, tokens), default=0)) > MAX_TOKEN:
            raise ValueError(
                f"tokenizer: got a token of {longest} characters, need at most {MAX_TOKEN}; check "
                "tokenizer.json"
            )
        return {
            "decoder": self._decoder,
            "special_tokens": self._special_tokens,
            "eos_ids": self._eos,
            "hidden": sorted(self._hidden),
            "ids": ids,
            "tokens": tokens,
        }

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
            If there is no tokenizer, it cannot encode the text, or the text is too long.
        """
        tokenizer = self._needed()
        if limit is not None and len(text) > SHORT_TEXT:
            self._refuse_long(text, limit)
        with library_errors("a text that the tokenizer encodes"):
            ids = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        if limit is not None and len(ids) > limit:
            raise ValueError(
                f"request: got a prompt of {len(ids)} tokens, need at most the {limit} of the "
                "context window; shorten the prompt"
            )
        return ids

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
        messages : each with `role`, and `content` as a rule; fields that are None are left out
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
        plain = [{k: v for k, v in message.items() if v is not None} for message in messages]
        return self._template.render(
            **self._special_tokens,
            messages=plain,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
        )

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
        eos = self._special_tokens.get("eos_token")
        if self._tokenizer is None or not eos:
            return ()
        eos_id = self._tokenizer.token_to_id(eos)
        return () if eos_id is None else (eos_id,)


# --- Reading the tokenizer -----------------------------------------------------------------------


def _tokenizer(content: str, config: dict[str, Any], special: list[str]) -> Tokenizer:
    """Tokenizer of a tokenizer.json, with the special tokens that only its companions name."""
    with library_errors("a tokenizer.json"):
        tokenizer = Tokenizer.from_str(content)

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


def _ids_in(name: str, value: Any) -> tuple[int, ...]:
    """Token ids, each once, of the eos_token_id of file `name`."""
    given = value if isinstance(value, list) else [value]
    ids = [i for i in map(integer, given) if i is not None and i >= 0]
    if len(ids) < len(given):
        raise ValueError(
            f"{name}: got eos_token_id {shown(value)}, need a token id or a list of them; "
            "correct the file"
        )
    return tuple(dict.fromkeys(ids))


def _special_tokens(config: dict[str, Any], special_tokens_map: dict[str, Any]) -> dict[str, str]:
    """Named special tokens: tokenizer_config, else the older special_tokens_map."""
    tokens = {}
    for name in SPECIAL_NAMES:
        value = config.get(name) or special_tokens_map.get(name)
        if value:
            tokens[name] = _added_token(value).content
    return tokens


def _extra_special_tokens(config: dict[str, Any]) -> list[str]:
    """Special tokens without a name of their own."""
    extra = _of_type(config, "extra_special_tokens", list | dict)
    extra = extra or _of_type(config, "additional_special_tokens", list) or []
    values = extra.values() if isinstance(extra, dict) else extra
    return [_added_token(value).content for value in values]


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


def _id_of(entry: tuple[str, Any]) -> int:
    """Token id of an entry of added_tokens_decoder, whose keys are ids written as strings."""
    try:
        return int(entry[0])
    except ValueError:
        raise ValueError(
            f"tokenizer_config: got a token id {shown(entry[0])} in added_tokens_decoder, "
            "need a whole number; correct the file"
        ) from None
