"""Tokenizers of many kinds, made in memory, and requests to be read with them."""

import json
import random
from copy import deepcopy
from types import SimpleNamespace

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from hpcinfer.requests.fields import PromptLimits
from hpcinfer.requests.sampling import Sampling
from hpcinfer.text.text import Text

SAMPLE = "hello world, the code of the river is 4821. ▁ naïve café 你好 😀 "


def byte_level() -> Tokenizer:
    """Byte-level BPE as of GPT-2, Qwen and Llama 3, with tokens added as plain text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SAMPLE] * 5, trainer)
    tokenizer.add_tokens(["<think> x", "日本"])
    return tokenizer


def byte_fallback(strip: bool = True) -> Tokenizer:
    """SentencePiece-like BPE with byte fallback, as of Llama 2 (strip) and Gemma (no strip)."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*"▁abcdefghijklmnopqrstuvwxyz.,é你", "▁▁", "▁h", "he", "▁he"]
    merges = [("▁", "▁"), ("▁", "h"), ("h", "e"), ("▁", "he")]
    model = models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=merges,
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * strip)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def metaspace(scheme: str) -> Tokenizer:
    """Pieces without bytes, as of T5 and XGLM."""
    tokenizer = byte_fallback()
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return tokenizer


def word_piece() -> Tokenizer:
    """A decoder that no joiner knows."""
    tokenizer = byte_fallback()
    tokenizer.decoder = decoders.WordPiece(prefix="h")
    return tokenizer


TOKENIZERS = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "byte_fallback_no_strip": lambda: byte_fallback(strip=False),
    "metaspace_always": lambda: metaspace("always"),
    "metaspace_never": lambda: metaspace("never"),
    "word_piece": word_piece,
}


CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {{- "# Tools" }}
    {%- for tool in tools %}{{ "\\n" }}{{ tool | tojson }}{%- endfor %}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first)
        or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' ~ message.content ~ '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


LLAMA3 = """\
{% set loop_messages = messages %}{% for message in loop_messages %}\
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>

'+ message['content'] | trim + '<|eot_id|>' %}\
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}\
{{ content }}{% endfor %}{% if add_generation_prompt %}\
{{ '<|start_header_id|>assistant<|end_header_id|>

' }}{% endif %}"""


CONTROLS = """\
{% set ns = namespace(seen=0) %}
{% for message in messages %}
    {% if message.role == 'skip' %}
        {% continue %}
    {% endif %}
    {% if ns.seen == 3 %}
        {% break %}
    {% endif %}
    {% set ns.seen = ns.seen + 1 %}
[{{ loop.index }}/{{ loop.length }} {{ loop.revindex0 }} {{ loop.cycle('a', 'b') }} \
{{ loop.last }}] {{ message.role | upper }}: \
{% generation %}{{ message.content }}{% endgeneration %}

    {% for key, value in message | dictsort if key != 'content' %}
{{ key }}={{ value | tojson }}{{ ', ' if not loop.last }}
    {% else %}
none
    {% endfor %}
{% endfor %}
{% macro end(times=2) %}{{ eos_token * times }}{% endmacro %}
{{ end(3) ~ 1 ~ none ~ '<é>' }}{{ messages | map(attribute='role') | join('|') }}
{% for i in range(3) recursive %}{{ i }}\
{% if i == 2 and loop.depth0 < 2 %}{{ loop([7, 2]) }}{% endif %}{% endfor %}
"""


LIMITS = PromptLimits(vocab_size=258, context=64, line_bytes=100_000)


DEFAULTS = Sampling(temperature=0.5, max_tokens=8)


USER = {"role": "user", "content": "hi"}


def bytes_only() -> str:
    """Content of a tokenizer.json whose tokens are the bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1} | {byte: i for i, byte in enumerate(alphabet, 2)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer.to_str()


def make_text(tokenizer: bool = True) -> Text:
    """Text of a tokenizer whose tokens are the bytes, with a template of one line per message."""
    template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
        "{{ 'a:' if add_generation_prompt }}"
    )
    checkpoint = SimpleNamespace(
        tokenizer_json=bytes_only() if tokenizer else None,
        tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"},
        special_tokens_map={},
        chat_template=template,
        generation_config={},
        config={},
    )
    return Text(checkpoint)


TEXT = make_text()


def batch(url="/v1/completions", **body):
    return {"custom_id": "c1", "method": "POST", "url": url, "body": body}


CHAT = "/v1/chat/completions"


SEEDS = [
    batch(prompt="a", n=2, stop=["x"], logprobs=2),
    batch(CHAT, messages=[USER], logprobs=True, top_logprobs=1),
    {"prompt_token_ids": [5, 6], "temperature": 0.5, "seed": 3},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "é😀"}]}]},
]


VALUES = [None, True, 0, -1, 10**30, 1e308, "", "a\0", "\ud800", [], [[]], {}, {"a": [{}]}, [None]]


def mutated(rng: random.Random) -> bytes:
    """A line of random bytes, one with bytes changed, or one with values changed."""
    choice = rng.random()
    if choice < 0.2:
        return rng.randbytes(rng.randrange(80))
    entry = json.loads(json.dumps(rng.choice(SEEDS)))
    if choice < 0.6:
        raw = bytearray(json.dumps(entry, ensure_ascii=rng.random() < 0.5).encode())
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(raw))
            raw[at : at + rng.randrange(3)] = rng.choice([b"", b'"', b"{", b"]", rng.randbytes(2)])
        return bytes(raw)
    for _ in range(rng.randrange(1, 4)):
        place = entry
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = rng.choice(keys)
            if not isinstance(place[key], dict | list) or rng.random() < 0.3:
                place[key] = deepcopy(rng.choice(VALUES))
                break
            place = place[key]
    return json.dumps(entry).encode()
