"""Text and tokens: encoding, decoding token by token, stop strings, chat templates."""

import json
import random
from types import SimpleNamespace

import pytest
from helpers.texts import CHATML, CONTROLS, LLAMA3, TOKENIZERS, byte_fallback, byte_level
from tokenizers import Tokenizer

from hpcinfer.text.stream import TextStream
from hpcinfer.text.text import Text
from hpcinfer.text.worker import Budget, Worker

pytestmark = pytest.mark.single


def text_of(tokenizer: Tokenizer | None, worker: Worker | None = None, **files) -> Text:
    checkpoint = {
        "tokenizer_json": None if tokenizer is None else tokenizer.to_str(),
        "tokenizer_config": {"bos_token": "<s>", "eos_token": {"content": "</s>"}},
        "special_tokens_map": {},
        "chat_template": None,
        "generation_config": {},
        "config": {},
    }
    return Text(SimpleNamespace(**(checkpoint | files)), worker=worker)


def random_ids(text: Text, size: int, rng: random.Random) -> list[int]:
    """Half of the time any tokens, half of the time those of a text of many scripts."""
    if rng.random() < 0.5:
        return [rng.randrange(size) for _ in range(rng.randrange(14))]
    written = "".join(rng.choice("hé llo 你好😀 a") for _ in range(10))
    return text.encode(written)[: rng.randrange(30)]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_joining_token_by_token_equals_the_whole(name):
    tokenizer, rng = TOKENIZERS[name](), random.Random(name)
    text = text_of(tokenizer)
    for _ in range(1000):
        ids = random_ids(text, tokenizer.get_vocab_size(), rng)
        joiner, settled = text.joiner(False), ""
        for token_id in ids:
            if (token := text.token(token_id)) is not None:
                settled += joiner.feed(token)
        assert settled + joiner.finish() == text.decode(ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_stop_string_ends_where_the_text_first_contains_it(name):
    tokenizer, rng = TOKENIZERS[name](), random.Random(name)
    text = text_of(tokenizer)
    stopped = 0
    for _ in range(400):
        ids = random_ids(text, tokenizer.get_vocab_size(), rng)
        whole = text.decode(ids).replace("\ufffd", "")
        at = rng.randrange(len(whole) + 1)
        stops = [s for s in (whole[at : at + rng.randrange(1, 4)], "qz") if s]
        stream = TextStream(text, stops)

        # Expect to stop at the first token by which the decoded text holds a stop string
        expected = None
        for count in range(1, len(ids) + 1):
            so_far = text.decode(ids[:count])
            found = [so_far.find(s) for s in stops if s in so_far]
            if found:
                expected = so_far[: min(found)]
                break
        pushed = 0
        for token_id in ids:
            pushed += 1
            if stream.push(token_id):
                assert pushed == count and stream.text() == expected
                stopped += 1
                break
        else:
            assert expected is None and stream.text() == text.decode(ids)
    assert stopped > 100


def test_a_stop_string_does_not_count_below_min_tokens():
    text = text_of(byte_level())
    ids = text.encode("stop now stop")
    stream = TextStream(text, ["stop"])
    half = len(ids) // 2
    seen = [stream.push(i, may_stop=at >= half) for at, i in enumerate(ids)]
    assert seen[-1] and not any(seen[:half]) and stream.text() == "stop now "


def test_a_stop_may_be_or_hold_a_special_token():
    text = text_of(byte_level(), special_tokens_map={"additional_special_tokens": ["<end>"]})
    ids = text.encode("one<end> two")
    for stop, written in (("<end>", "one"), ("e<end>", "on"), ("<end> t", "one"), ("e two", "on")):
        stream = TextStream(text, [stop])
        seen = [stream.push(token_id) for token_id in ids]
        assert seen[-1] and stream.text() == written, stop
    stream = TextStream(text, ["<end>"])
    assert [stream.push(i, may_stop=False) for i in ids] == [False] * len(ids)


def test_text_that_follows_keeps_its_space():
    tokenizer = byte_fallback()
    text = text_of(tokenizer)
    he, space = tokenizer.token_to_id("▁he"), tokenizer.token_to_id("▁")
    assert text.decode([he, space, he]) == "he  he"
    assert text.decode([he, space, he], after_text=True) == " he  he"
    stream = TextStream(text, [" he"], after_text=True)
    assert stream.push(he) and stream.text() == ""


def test_special_tokens_are_added_once_and_hidden():
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = byte_fallback()
    text = text_of(tokenizer, chat_template=template)
    he = tokenizer.token_to_id("▁he")
    assert text.encode("he")[0] == 1 and 1 not in text.encode("he", add_special_tokens=False)
    chat = text.encode_chat([{"role": "user", "content": "he"}])
    assert chat[0] == 1 and chat.count(1) == 1
    assert text.decode([1, he, 2]) == "he"
    assert text.decode([1, he, 2], skip_special_tokens=False) == "<s> he</s>"


def test_padding_and_truncation_of_the_file_are_switched_off():
    tokenizer = byte_level()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    text = text_of(tokenizer)
    assert text.decode(text.encode("hello world")) == "hello world"


def test_tokens_that_only_the_companion_files_name():
    tokenizer = byte_level()
    size = tokenizer.get_vocab_size()
    late, early = {"content": "<late>"}, {"content": "<early>"}
    config = {
        "eos_token": "<end>",
        "added_tokens_decoder": {str(size + 1): late, str(size): early},
        "additional_special_tokens": ["<think> x"],
    }
    text = text_of(tokenizer, tokenizer_config=config, special_tokens_map={"bos_token": "<s>"})
    assert text.encode("<early><late><end>") == [size, size + 1, size + 2]
    assert text.decode(text.encode("a<think> x<end>b")) == "ab"
    assert text.special_tokens == {"bos_token": "<s>", "eos_token": "<end>"}
    assert text.eos_ids == (size + 2,)
    stream = TextStream(text, ["ab"])
    assert [stream.push(i) for i in text.encode("a<think> xb")][-1]


def test_eos_ids_from_the_first_file_that_names_them():
    generation, config = {"eos_token_id": [7, 9, 7]}, {"eos_token_id": 3}
    assert text_of(byte_level(), generation_config=generation, config=config).eos_ids == (7, 9)
    assert text_of(byte_level(), config=config).eos_ids == (3,)
    assert text_of(byte_level()).eos_ids == (1,)
    assert text_of(None).eos_ids == ()
    assert text_of(None, config={"eos_token_id": -1}).eos_ids == ()
    assert text_of(None, config={"eos_token_id": [3.0, -1]}).eos_ids == (3,)
    for wrong in ("2", True, [1, None], 1.5):
        with pytest.raises(ValueError, match="^config: got eos_token_id .*; correct the file$"):
            text_of(None, config={"eos_token_id": wrong})


def test_token_strings_and_offsets():
    tokenizer = byte_level()
    text = text_of(tokenizer)
    ids = text.encode("a你")
    assert text.token_text(ids[0]) == "a" and text.token_bytes(ids[0]) == b"a"
    assert b"".join(map(text.token_bytes, ids)) == "a你".encode()
    split = tokenizer.token_to_id("ä")
    assert text.token_text(split) == "bytes:\\xe4"
    assert text.token_text(99999) == "token_id:99999" and text.token_bytes(99999) is None
    assert text.offsets(ids) == [0] + [1] * (len(ids) - 1)
    tokenizer = byte_fallback()
    fallback = text_of(tokenizer)
    ids = [tokenizer.token_to_id(piece) for piece in ("▁he", "▁")]
    ids += [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "😀".encode()] + ids[:1]
    assert fallback.decode(ids) == "he 😀 he"
    assert fallback.offsets(ids) == [0, 2, 3, 3, 3, 3, 4]
    assert fallback.offsets(ids, after_text=True) == [0, 3, 4, 4, 4, 4, 5]
    assert fallback.token_bytes(tokenizer.token_to_id("<0xF0>")) == b"\xf0"


def test_without_a_tokenizer():
    text = text_of(None)
    assert not text.available and text.decode([1, 2]) == "" and text.offsets([1, 2]) == [0, 0]
    stream = TextStream(text, ["x"])
    assert not stream.push(5) and stream.text() == ""
    assert text.token_text(5) == "token_id:5"
    with pytest.raises(ValueError, match="^text: got a checkpoint without tokenizer.json"):
        text.encode("a")
    with pytest.raises(ValueError, match="^chat template: got a checkpoint without one"):
        text.encode_chat([{"role": "user", "content": "a"}])


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"model": {"type": "BPE"}}', "x"])
def test_a_broken_tokenizer_is_one_line(content):
    with pytest.raises(ValueError, match="^tokenizer: got .*; check tokenizer.json$"):
        text_of(None, tokenizer_json=content)


@pytest.mark.parametrize(
    "config",
    [
        {"eos_token": 5},
        {"eos_token": {"text": "a"}},
        {"added_tokens_decoder": {"x": {"content": "a"}}},
        {"added_tokens_decoder": {"1": {}}},
        {"added_tokens_decoder": ["a"]},
        {"additional_special_tokens": [1]},
        {"additional_special_tokens": 1},
    ],
)
def test_a_broken_tokenizer_config_is_one_line(config):
    with pytest.raises(ValueError, match="^tokenizer_config: got .*; correct the file$"):
        text_of(byte_level(), tokenizer_config=config)


# --- Chat templates: the expected strings are what transformers 5.23 renders ---------------------

SPECIAL = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
MESSAGES = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Grüße <b> & 你好\n"},
    {"role": "skip", "content": "x"},
    {"role": "assistant", "content": "a", "extra": {"k": ["<é>", 1.5, None]}},
    {"role": "tool", "content": "42"},
    {"role": "user", "content": "last"},
]
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "controls": CONTROLS}
EXPECTED = {
    "chatml": (
        "<|im_start|>system\n Be brief. <|im_end|>\n"
        "<|im_start|>user\nGrüße <b> & 你好\n<|im_end|>\n"
        "<|im_start|>assistant\na<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n"
        "<|im_start|>user\nlast<|im_end|>\n"
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nGrüße <b> & 你好<|eot_id|>"
        "<|start_header_id|>skip<|end_header_id|>\n\nx<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\na<|eot_id|>"
        "<|start_header_id|>tool<|end_header_id|>\n\n42<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nlast<|eot_id|>"
    ),
    "controls": (
        '[1/6 5 a False] SYSTEM:  Be brief. \nrole="system"\n'
        '[2/6 4 b False] USER: Grüße <b> & 你好\n\nrole="user"\n'
        '[4/6 2 b False] ASSISTANT: a\nextra={"k": ["<é>", 1.5, null]}, \nrole="assistant"\n'
        "<|eot_id|><|eot_id|><|eot_id|>1None<é>system|user|skip|assistant|tool|user\n0127272"
    ),
}
OPENED = {
    "chatml": "<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "controls": "",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_as_in_transformers(name):
    text = text_of(None, tokenizer_config=SPECIAL, chat_template=TEMPLATES[name])
    for _ in range(2):
        assert text.render_chat(MESSAGES, False) == EXPECTED[name]
        assert text.render_chat(MESSAGES) == EXPECTED[name] + OPENED[name]


def test_helpers_of_templates():
    template = (
        "{{ strftime_now('%Y') | length }}{{ tools is none }}{{ documents is none }}"
        "{{ messages[0].name is defined }}{{ messages | tojson(indent=1) }}"
    )
    text = text_of(None, chat_template=template)
    messages = [{"role": "user", "name": None}]
    expected = "4TrueTrueFalse" + json.dumps([{"role": "user"}], indent=1)
    assert text.render_chat(messages) == expected


HOSTILE = {
    "syntax": "{% for %}",
    "too large": "x" * (1 << 21),
    "refuses": "{{ raise_exception('roles must\nalternate') }}",
    "undefined": "{{ messages[0].nothing.more }}",
    "internals": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "import": "{% include '/etc/passwd' %}",
    "mutates": "{{ messages.append(1) }}",
    "range": "{% for i in range(10000000) %}{% endfor %}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "repeats": "{{ 'a' * 10000000000 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "factorial": "{% set ns = namespace(x=10**60) %}{% for i in range(999) %}"
    "{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "doubles": "{% set ns = namespace(x='aa') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "adds": "{% set ns = namespace(x='aa') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "captures": "{% set ns = namespace(x='aa') %}{% for i in range(60) %}"
    "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "macro": "{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{{ f(100) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "tree": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(40) }}",
    "center": "{{ 'a' | center(1000000000) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "replace": "{% set x = 'a' * 1000000 %}{{ x.replace('a', x) }}",
    "replace filter": "{% set x = 'a' * 1000000 %}{{ x | replace('a', x) }}",
    "join": "{% set x = 'a' * 1000000 %}{{ x.join(range(99999) | list) }}",
    "long": "{% for i in range(99999) %}" + "x" * 1000 + "{% endfor %}",
    "lipsum": "{{ lipsum(n=100000000) }}",
}


@pytest.fixture(scope="module")
def small():
    """A worker with little to spend."""
    worker = Worker(Budget(memory_bytes=1 << 28, seconds=0.2))
    yield worker
    worker.close()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_one_line(name, small):
    text = text_of(None, small, chat_template=HOSTILE[name])
    with pytest.raises(ValueError, match="^chat template: got .*, need .*; ") as caught:
        text.render_chat([{"role": "user", "content": "a"}])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
