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

from tokenizers import Tokenizer

from hpcinfer.errors import integer, shown
from hpcinfer.text.added_tokens import extra_special_tokens, missing_tokens, special_tokens
from hpcinfer.text.chat_template import ChatTemplate
from hpcinfer.text.library import library_errors
from hpcinfer.text.prefix_space import set_prefix_space

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
        companions = files["tokenizer_config"], files["special_tokens_map"]
        self._special_tokens = special_tokens(*companions)
        self._tokenizer: Tokenizer | None = None
        self._decoder: dict[str, Any] | None = None
        self._hidden: set[str] = set()

        # Make the tokenizer, and note which tokens leave no trace in a text
        if files["tokenizer_json"] is not None:
            special = [*self._special_tokens.values(), *extra_special_tokens(*companions)]
            self._tokenizer = _tokenizer(files["tokenizer_json"], companions[0], special)
            if self._tokenizer.decoder is not None:
                self._decoder = json.loads(self._tokenizer.decoder.__getstate__())
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
        """As `hpcinfer.text.text.Text.encode`, where its budget is kept."""
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
        """As `Text.encode_chat`."""
        rendered = self.render_chat(messages, add_generation_prompt)
        return self.encode(rendered, add_special_tokens=False, limit=limit)

    def render_chat(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """As `Text.render_chat`."""
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
            **self._special_tokens,
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
