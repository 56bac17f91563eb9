"""What the companions of tokenizer.json say: prefix spaces, added tokens, special ones in a text.

The tokens are those that transformers 5.24 gives for the same files.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.texts import byte_fallback
from tokenizers import Tokenizer, normalizers

from hpcinfer.io.metadata import read_directory
from hpcinfer.text.text import Text

pytestmark = pytest.mark.single

MARKED, FIRST, NONE = "<s>▁he</s>▁he▁he", "<s>▁he</s>he▁he", "<s>he</s>he▁he"


def with_prepend() -> Tokenizer:
    """A tokenizer in the form that was converted with `legacy`: a space before every piece."""
    tokenizer = byte_fallback()
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return tokenizer


def text_of(tokenizer: Tokenizer, **config) -> Text:
    files = {"special_tokens_map": {}, "chat_template": None, "generation_config": {}, "config": {}}
    return Text(
        SimpleNamespace(tokenizer_json=tokenizer.to_str(), tokenizer_config=config, **files)
    )


@pytest.mark.parametrize(
    "kind, config, tokens",
    [
        ("LlamaTokenizer", {}, MARKED),
        ("LlamaTokenizer", {"legacy": True}, MARKED),
        ("LlamaTokenizer", {"legacy": False}, FIRST),
        ("LlamaTokenizerFast", {"legacy": False}, FIRST),
        ("LlamaTokenizer", {"add_prefix_space": False}, NONE),
        ("LlamaTokenizer", {"legacy": False, "add_prefix_space": False}, NONE),
        ("PreTrainedTokenizerFast", {"legacy": False}, MARKED),
    ],
)
def test_the_space_before_a_text(kind, config, tokens):
    text = text_of(with_prepend(), tokenizer_class=kind, **config)
    ids = text.encode("he</s>he he")
    assert "".join(text.token(i, skip_special_tokens=False) for i in ids) == tokens
    assert text.decode(text.encode("he he")) == "he he"


def test_special_tokens_of_a_text_are_split_where_the_file_says_so():
    assert text_of(byte_fallback()).encode("</s>") == [1, 2]
    ids = text_of(byte_fallback(), split_special_tokens=True).encode("</s>")
    assert 2 not in ids and len(ids) > 2


def write_tokenizer(folder, tokenizer: Tokenizer, **files):
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in ({"config": {}} | files).items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8-sig")


def test_tokens_that_older_files_name_are_not_split(tmp_path):
    tokenizer = byte_fallback()
    size = tokenizer.get_vocab_size()
    added = {"<tool>": size + 1, "<|im_end|>": size}
    extra = {"additional_special_tokens": ["<|im_end|>", "<only here>"]}
    write_tokenizer(tmp_path, tokenizer, added_tokens=added, special_tokens_map=extra)
    text = Text(read_directory(tmp_path))
    ids = text.encode("he<|im_end|><tool><only here>", add_special_tokens=False)
    assert ids[-3:] == [size, size + 1, size + 2]
    assert text.decode(ids) == "he<tool>"


def test_an_added_token_that_cannot_have_its_id_is_refused(tmp_path):
    tokenizer = byte_fallback()
    write_tokenizer(tmp_path, tokenizer, added_tokens={"<late>": 5000})
    with pytest.raises(ValueError, match="got id 5000 for the token '<late>' .*, the next free"):
        Text(read_directory(tmp_path))


@pytest.mark.parametrize("ids", [{"<a>": "x"}, {"<a>": -1}, {"<a>": 7, "<b>": 7}, {"<a>": np.pi}])
def test_added_tokens_without_ids_are_refused(tmp_path, ids):
    write_tokenizer(tmp_path, byte_fallback(), added_tokens=ids)
    with pytest.raises(ValueError, match="in added_tokens.json, need a whole number for each"):
        read_directory(tmp_path)
