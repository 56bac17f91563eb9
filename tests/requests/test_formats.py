"""Input lines become Requests or BadRequests, results become records and output lines."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
from helpers.texts import CHAT, DEFAULTS, LIMITS, TEXT, USER, batch, make_text, mutated

from hpcinfer.requests.defaults import defaults_from, without_effect
from hpcinfer.requests.reader import RequestReader, id_key, prompt_key
from hpcinfer.requests.request import BadRequest, Choice, Request, Result, Score
from hpcinfer.requests.results import completion_line, generate_record, score_line, score_record
from hpcinfer.requests.sampling import Sampling

pytestmark = pytest.mark.single


def parse(raw, line=3, text=TEXT, **options):
    raw = raw if isinstance(raw, bytes) else json.dumps(raw).encode()
    reader = RequestReader(text, DEFAULTS, LIMITS, **options)
    assert len(list(reader.read_items([None, "a"]))) == 2
    return reader.parse_line(line, raw)


# --- Lines that run ------------------------------------------------------------------------------


def test_batch_completion():
    body = {"prompt": "ab", "model": "m", "user": "u", "max_tokens": 5, "temperature": 0, "n": 2}
    body |= {"stop": "x", "logprobs": 3, "stream": False, "echo": False, "seed": None, "top_p": 1}
    request = parse(batch(**body))
    expected = Sampling(temperature=0, max_tokens=5, n=2, stop=("x",), logprobs=3)
    ids = tuple(TEXT.encode("ab"))
    assert request == Request(2, 3, "c1", "completion", ids, expected, id_key("c1"))


def test_batch_chat():
    body = {"messages": [{"role": "system", "content": "s"}, USER], "max_completion_tokens": 4}
    body |= {"logprobs": True, "top_logprobs": 2, "response_format": {"type": "text"}, "tools": []}
    request = parse(batch("/v1/chat/completions", **body))
    assert request.kind == "chat" and TEXT.decode(request.token_ids) == "s:s\nu:hi\na:"
    assert request.sampling == replace(DEFAULTS, max_tokens=4, logprobs=2)
    request = parse(batch("/v1/chat/completions", messages=[USER], logprobs=True))
    assert request.sampling == replace(DEFAULTS, logprobs=0)


def test_short_form_takes_every_sampling_field():
    fields = {"temperature": 0.3, "top_k": 4, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.1}
    fields |= {"presence_penalty": 0.2, "frequency_penalty": -0.2, "n": 3, "seed": 5, "stop": ["a"]}
    fields |= {"stop_token_ids": [7], "min_tokens": 1, "max_tokens": 9, "logprobs": 0}
    fields |= {"ignore_eos": True}
    expected = Sampling(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    assert parse({"prompt": "a", **fields}).sampling == expected


@pytest.mark.parametrize(
    "entry",
    [
        {"prompt_token_ids": [5, 6]},
        {"prompt": [5, 6]},
        {"prompt": [[5, 6]]},
        {"prompt": None, "prompt_token_ids": [5, 6], "messages": None},
        {"custom_id": None, "prompt_token_ids": [5, 6]},
    ],
)
def test_token_ids_as_prompt(entry):
    request = parse(entry)
    assert request.token_ids == (5, 6) and request.custom_id == ""
    assert request.key == prompt_key((5, 6), 0)


def test_text_lines_and_items():
    ids = tuple(TEXT.encode(" a b"))
    reader = RequestReader(TEXT, DEFAULTS, LIMITS)
    line = reader.parse_text_line(1, "\ufeff a b\r\n".encode())
    assert line.token_ids == ids and line.line == 1 and line.sampling == DEFAULTS
    for item in (" a b", ids, list(ids), np.array(ids), {"prompt": [" a b"]}):
        request = reader.parse_item(item)
        assert request.token_ids == ids and (request.index, request.line) == (0, 1)
        assert all(type(token) is int for token in request.token_ids)


def test_text_parts_of_a_message_are_joined():
    parts = [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]
    request = parse({"messages": [{"role": "user", "content": parts}]})
    assert TEXT.decode(request.token_ids) == "u:xy\na:"


def test_the_answer_is_cut_to_the_context_window():
    request = parse({"prompt_token_ids": [5] * 60, "max_tokens": 50, "min_tokens": 20})
    assert (request.sampling.max_tokens, request.sampling.min_tokens) == (4, 4)


def test_score_takes_the_text_as_it_stands():
    whole = parse({"prompt_token_ids": [5] * 64, "temperature": -3, "stop": 5}, score=True)
    assert len(whole.token_ids) == 64 and whole.sampling == Sampling()
    chat = parse({"messages": [USER]}, score=True)
    assert TEXT.decode(chat.token_ids) == "u:hi\n"
    assert "context window" in parse({"prompt_token_ids": [5] * 65}, score=True).message
    assert "unknown field 'x'" in parse({"prompt": "a", "x": 1}, score=True).message


def test_what_generation_config_asks_for_counts_or_is_named():
    config = {"min_new_tokens": 20, "stop_strings": ["END", "\n\n"], "num_beams": 1, "top_h": None}
    defaults = defaults_from(config)
    assert (defaults.min_tokens, defaults.max_tokens) == (20, 20)
    assert defaults.stop == ("END", "\n\n") and without_effect(config) is None
    assert defaults_from(config, {"max_tokens": 5}).min_tokens == 5
    parsed = RequestReader(TEXT, defaults, LIMITS).parse_item({"prompt": "a", "max_tokens": 3})
    assert (parsed.sampling.min_tokens, parsed.sampling.max_tokens) == (3, 3)
    line = without_effect({"num_beams": 4, "no_repeat_ngram_size": 3, "temperature": 1})
    assert "num_beams = 4, no_repeat_ngram_size = 3 of generation_config" in line


def test_defaults_from_generation_config():
    config = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1}
    config |= {"do_sample": True, "eos_token_id": 1, "max_new_tokens": 99, "min_p": None}
    expected = Sampling(
        temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.1, max_tokens=99, n=2
    )
    assert defaults_from(config, {"n": 2, "seed": None}) == expected
    assert defaults_from({}) == Sampling()
    assert defaults_from({"do_sample": False, "temperature": 0.6}).temperature == 0
    assert defaults_from(config, {"temperature": 0.0}).temperature == 0
    with pytest.raises(ValueError, match="^generation_config: sampling: got top_p = 'x'"):
        defaults_from({"top_p": "x"})
    with pytest.raises(ValueError, match="^sampling: got n = 0"):
        defaults_from({}, {"n": 0})
    with pytest.raises(ValueError, match="^request: got the option 'beam'"):
        defaults_from({}, {"beam": 4})


# --- Lines that do not ---------------------------------------------------------------------------

BAD_LINES = {
    "UTF-8": (b'{"prompt": "\xff"}', "got byte 0xff at byte 13, need UTF-8"),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16-le"), "got a NUL byte at byte 2"),
    "NUL": (b'{"prompt": "\0"}', "got a NUL byte at byte 13"),
    "escaped NUL": (b'{"prompt": "\\u0000"}', "got a NUL character in prompt"),
    "surrogate": (b'{"prompt": "a\\ud800"}', "half a surrogate pair at character 2 of prompt"),
    "not JSON": (b'{"prompt": a}', "got no JSON at character 12 (Expecting value)"),
    "cut": (b'{"prompt": "a', "got no JSON at character 12"),
    "two": (b'{"prompt": "a"} {}', "got no JSON at character 17 (Extra data)"),
    "NaN": (b'{"prompt": "a", "temperature": NaN}', "got the number NaN"),
    "Infinity": (b'{"prompt": "a", "top_p": -Infinity}', "got the number -Infinity"),
    "overflow": (b'{"prompt": "a", "temperature": 1e999}', "got temperature = inf"),
    "nested": (b"[" * 90_000, "got JSON nested too deeply"),
    "digits": (b'{"n": ' + b"9" * 5000 + b"}", "got a number of thousands of digits"),
    "big": (b'{"prompt": "a", "n": ' + b"9" * 4000 + b"}", "got n = 999"),
    "too long": (b'{"prompt": "' + b"a" * 100_000, "got a line of 100012 bytes"),
    "list": ([], "got a line with [], need a JSON object"),
    "string": ("a", "got a line with 'a'"),
    "null": (b"null", "got a line with None"),
    "no prompt": ({}, "got no prompt, need one of prompt, prompt_token_ids, messages"),
    "two prompts": ({"prompt": "a", "messages": [USER]}, "got prompt and messages"),
    "empty prompt": ({"prompt": ""}, "got prompt without tokens"),
    "empty ids": ({"prompt_token_ids": []}, "got prompt_token_ids without tokens"),
    "prompt type": ({"prompt": 5}, "got prompt 5, need text or a list of token ids"),
    "prompt object": ({"prompt_token_ids": {"a": 1}}, "got prompt_token_ids {'a': 1}"),
    "prompt list": ({"prompt": ["a", "b"]}, "got a list of 2 prompts, need one prompt"),
    "id too large": ({"prompt_token_ids": [1, 258]}, "got token id 258 in prompt_token_ids"),
    "id below": ({"prompt_token_ids": [-1]}, "got token id -1"),
    "id type": ({"prompt_token_ids": [True]}, "got token id True"),
    "id float": ({"prompt": [1.5]}, "got token id 1.5"),
    "id text": ({"prompt_token_ids": "ab"}, "got prompt_token_ids 'ab'"),
    "too many": ({"prompt": "a" * 64}, "got a prompt of 64 tokens, need at most 63"),
    "unknown": ({"prompt": "a", "beam": 2}, "got the unknown field 'beam'"),
    "echo": ({"prompt": "a", "echo": True}, "got echo = True, which is not offered, need false"),
    "stream": ({"prompt": "a", "stream": 0}, "got stream = 0, which is not offered"),
    "bias": ({"prompt": "a", "logit_bias": {"5": 1}}, "got logit_bias = {'5': 1}"),
    "tools": ({"messages": [USER], "tools": [{}]}, "got tools = [{}]"),
    "format": (
        {"messages": [USER], "response_format": {"type": "json_object"}},
        "got response_format = ",
    ),
    "temperature": ({"prompt": "a", "temperature": "1"}, "got temperature = '1'"),
    "bool": ({"prompt": "a", "n": True}, "got n = True"),
    "stop": ({"prompt": "a", "stop": 5}, "got stop = 5"),
    "stop NUL": ({"prompt": "a", "stop": ["\0"]}, "got a NUL character in stop"),
    "stop id": ({"prompt": "a", "stop_token_ids": [258]}, "got stop_token_ids with 258"),
    "lengths": ({"prompt": "a", "max_tokens": 1, "max_completion_tokens": 2}, "need one length"),
    "min": ({"prompt": "a", "min_tokens": 9}, "got min_tokens = 9, need a whole number"),
    "logprobs": ({"prompt": "a", "logprobs": True}, "got logprobs = True"),
    "top": ({"prompt": "a", "top_logprobs": 2}, "got top_logprobs with a prompt"),
    "chat logprobs": ({"messages": [USER], "logprobs": 2}, "need true or false"),
    "chat top": ({"messages": [USER], "top_logprobs": 2}, "got top_logprobs without logprobs"),
    "no messages": ({"messages": []}, "got messages []"),
    "messages type": ({"messages": "a"}, "got messages 'a'"),
    "message": ({"messages": ["a"]}, "got the message 'a'"),
    "role": ({"messages": [{"content": "a"}]}, "need an object with role"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "need text or text parts",
    ),
    "content": ({"messages": [{"role": "user", "content": 5}]}, "got content 5"),
    "message NUL": ({"messages": [{"role": "user", "content": "\0"}]}, "NUL character in messages"),
    "custom_id": ({"custom_id": 5, "prompt": "a"}, "got custom_id 5"),
    "custom_id empty": ({"custom_id": "", "prompt": "a"}, "got custom_id ''"),
    "custom_id long": ({"custom_id": "a" * 513, "prompt": "a"}, "need a string of 1 to 512"),
    "batch id": ({"url": "/v1/completions", "body": {"prompt": "a"}}, "without custom_id"),
    "batch field": ({**batch(prompt="a"), "prompt": "b"}, "got the unknown field 'prompt'"),
    "method": ({**batch(prompt="a"), "method": "GET"}, "got method 'GET'"),
    "url": (batch("/v1/embeddings", prompt="a"), "got url '/v1/embeddings'"),
    "url type": (batch(["a"], prompt="a"), "got url ['a']"),
    "body": ({**batch(), "body": "a"}, "got body 'a'"),
    "url of body": (batch(messages=[USER]), "got a body for /v1/completions without prompt"),
    "body of url": (batch(CHAT, prompt="a"), f"got a body for {CHAT} without messages"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_says_why(name):
    line, expected = BAD_LINES[name]
    bad = parse(line)
    assert isinstance(bad, BadRequest) and (bad.index, bad.line) == (2, 3)
    assert expected in bad.message and "; " in bad.message and "\n" not in bad.message
    assert bad.message.startswith(("request: got", "sampling: got")) and len(bad.message) <= 500
    json.dumps(completion_line(generate_record(bad), "m", 0, TEXT), allow_nan=False)
    json.dumps(score_line(score_record(bad)), allow_nan=False)


def test_a_bad_line_keeps_its_id():
    assert parse({"custom_id": "me", "prompt": ""}).custom_id == "me"
    assert parse(batch(prompt="a", beam=1)).custom_id == "c1"


def test_without_a_tokenizer_only_token_ids_run():
    text = make_text(tokenizer=False)
    assert parse({"prompt_token_ids": [5]}, text=text).token_ids == (5,)
    assert "without tokenizer.json" in parse({"prompt": "a"}, text=text).message
    assert "without tokenizer.json" in parse({"messages": [USER]}, text=text).message
    assert "stop strings" in parse({"prompt_token_ids": [5], "stop": "a"}, text=text).message


CIRCULAR = []
CIRCULAR.append({"role": "user", "content": CIRCULAR})
ITEMS = [None, 5, 1.5, object(), b"a", {1: 2}, [object()], {"n": object()}, {"messages": CIRCULAR}]


@pytest.mark.parametrize("item", ITEMS)
def test_odd_items_of_the_python_interface(item):
    assert isinstance(RequestReader(TEXT, DEFAULTS, LIMITS).parse_item(item), BadRequest)


def test_a_message_that_holds_itself_ends():
    messages = [dict(USER)]
    messages[0]["more"] = messages
    bad = RequestReader(TEXT, DEFAULTS, LIMITS).parse_item({"messages": messages})
    assert bad.message.startswith("request: got a value that JSON cannot hold (Circular ")


# --- The whole input -----------------------------------------------------------------------------


def test_reader_numbers_skips_and_refuses_duplicates():
    lines = [b'{"custom_id": "a", "prompt": "x"}\n', b"  \n", b"nonsense\n"]
    lines += [b'{"custom_id": "a", "prompt": "y"}\n', b'{"custom_id": "b", "prompt": ""}']
    lines += [b'{"custom_id": "b", "prompt": "z"}']
    entries = list(RequestReader(TEXT, DEFAULTS, LIMITS).read(enumerate(lines, 1)))
    places = [(entry.index, entry.line) for entry in entries]
    assert places == [(0, 1), (1, 3), (2, 4), (3, 5), (4, 6)]
    assert [isinstance(entry, Request) for entry in entries] == [True, False, False, False, False]
    assert "got custom_id 'a' of line 1 again" in entries[2].message
    assert "got custom_id 'b' of line 5 again" in entries[4].message


def test_keys_depend_neither_on_order_nor_on_neighbours():
    def keys(lines):
        reader = RequestReader(TEXT, DEFAULTS, LIMITS, plain=True)
        return [entry.key for entry in reader.read(enumerate(lines, 1))]

    first = keys([b"a\n", b"b\n", b"a\n"])
    assert len(set(first)) == 3 and all(0 <= key < 2**64 for key in first)
    assert keys([b"b\n", b"a\n", b"a\n"]) == [first[1], first[0], first[2]]
    reader = RequestReader(TEXT, DEFAULTS, LIMITS)
    items = list(reader.read_items(["a", {"custom_id": "a", "prompt": "a"}, "a"]))
    assert [item.key for item in items] == [first[0], id_key("a"), first[2]]


# --- Any bytes -----------------------------------------------------------------------------------


def test_whatever_a_line_holds_it_is_a_request_or_a_bad_one():
    rng, kinds = random.Random(0), {Request: 0, BadRequest: 0}
    reader = RequestReader(TEXT, DEFAULTS, LIMITS)
    for _ in range(3000):
        raw = mutated(rng)
        for score in (False, True):
            outcome = parse(raw, line=rng.randrange(1, 3), score=score)
            kinds[type(outcome)] += 1
            if isinstance(outcome, BadRequest):
                assert "got" in outcome.message and "need" in outcome.message
                outcome.message.encode()
        assert isinstance(reader.parse_text_line(1, raw), Request | BadRequest)
    assert min(kinds.values()) > 300


# --- Output --------------------------------------------------------------------------------------


def result_of(entry, **choice) -> Result:
    request = parse(entry)
    ids = TEXT.encode("é!")
    choices = [
        Choice(0, ids, "é!", "stop", **choice),
        Choice(1, ids[:2], "é", "length", **choice and {k: v[:2] for k, v in choice.items()}),
    ]
    return Result(request, choices, len(request.token_ids))


def test_completion_line():
    ids = TEXT.encode("é!")
    top = [[(ids[0], np.float32(-0.5)), (9, -1.0)], [(ids[1], -0.25)], [(5, -np.inf)]]
    result = result_of(batch(prompt="ab"), logprobs=np.float32([-0.5, -0.25, -3]), top_logprobs=top)
    line = completion_line(generate_record(result), "model", 77, TEXT)
    assert json.loads(json.dumps(line, allow_nan=False)) == line
    assert line["custom_id"] == "c1" and line["error"] is None and line["id"][:10] == "batch_req_"
    response = line["response"]
    assert response["status_code"] == 200 and response["request_id"][:4] == "req_"
    body = response["body"]
    assert (body["object"], body["created"], body["model"]) == ("text_completion", 77, "model")
    usage = {"prompt_tokens": 2, "completion_tokens": 5, "total_tokens": 7}
    assert body["usage"] == usage and body["id"][:5] == "cmpl-"
    first = body["choices"][0]
    assert (first["text"], first["token_ids"], first["finish_reason"]) == ("é!", ids, "stop")
    assert first["logprobs"] == {
        "tokens": ["bytes:\\xc3", "bytes:\\xa9", "!"],
        "token_logprobs": [-0.5, -0.25, -3.0],
        "top_logprobs": [
            {"bytes:\\xc3": -0.5, TEXT.token_text(9): -1.0},
            {"bytes:\\xa9": -0.25},
            {TEXT.token_text(5): -9999.0},
        ],
        "text_offset": [0, 0, 1],
    }
    assert body["choices"][1]["index"] == 1 and "message" not in first
    assert line == completion_line(generate_record(result), "model", 77, TEXT)


def test_chat_line():
    result = result_of({"messages": [USER]}, logprobs=[-0.5, -0.25, -3.0])
    line = completion_line(generate_record(result), "model", 77, TEXT)
    body = line["response"]["body"]
    assert line["custom_id"] == "request-2" and body["object"] == "chat.completion"
    first = body["choices"][0]
    assert first["message"] == {"role": "assistant", "content": "é!"} and first["text"] == "é!"
    assert first["logprobs"]["content"][2] == {
        "token": "!",
        "logprob": -3.0,
        "bytes": [33],
        "top_logprobs": [],
    }
    plain = completion_line(generate_record(result_of({"messages": [USER]})), "m", 1, TEXT)
    assert plain["response"]["body"]["choices"][0]["logprobs"] is None


def test_error_line():
    bad = BadRequest(4, 9, "", "request: got x, need y; z")
    line = completion_line(generate_record(bad), "m", 0, TEXT)
    error = {"code": "invalid_request", "message": bad.message, "line": 9}
    assert (line["custom_id"], line["response"], line["error"]) == ("request-4", None, error)
    assert score_line(score_record(bad)) == {"custom_id": "request-4", "error": error}


def test_score_line():
    request = parse({"custom_id": "a", "prompt_token_ids": [5, 6, 7]})
    logprobs = np.array([np.nan, -1.0, -np.inf], np.float32)
    record = score_record(Score(request, logprobs, np.float64(-np.inf), np.float64(np.inf)))
    assert record["logprobs"] == [None, -1.0, -np.inf] and record["token_ids"] == [5, 6, 7]
    line = score_line(record)
    assert json.loads(json.dumps(line, allow_nan=False)) == {
        "custom_id": "a",
        "token_ids": [5, 6, 7],
        "logprobs": [None, -1.0, -9999.0],
        "sum_logprob": None,
        "perplexity": None,
    }
