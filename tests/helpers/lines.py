"""Lines of input that commands are given, and what they answer."""

import json

KV = ("--kv-memory", "32M")


STORY = "Once there was a shy hare named Nell who lived near the harbour."


BODY = {"model": "any", "max_tokens": 6, "temperature": 0, "ignore_eos": True}


LINES = [
    # OpenAI Batch: a completion and a chat
    {
        "custom_id": "batch",
        "method": "POST",
        "url": "/v1/completions",
        "body": BODY | {"prompt": STORY, "logprobs": 2},
    },
    {
        "custom_id": "chat",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": BODY
        | {
            "messages": [{"role": "user", "content": "What is 2 + 3?"}],
            "logprobs": True,
            "top_logprobs": 1,
        },
    },
    # The short form: text, token ids, messages; several samples; a stop
    {"custom_id": "short", "prompt": STORY + " She", "n": 2, "seed": 1, "temperature": 0.7},
    {"prompt_token_ids": [12, 7, 99], "max_tokens": 4, "temperature": 0, "ignore_eos": True},
    {"custom_id": "ids", "prompt": [12, 7, 99, 100], "max_tokens": 4, "temperature": 0},
    {"messages": [{"role": "user", "content": "What is 2 + 3?"}], "stop": ["5", "6"]},
    # What cannot run
    "",
    "{not json",
    {"custom_id": "short", "prompt": "a second use of a name"},
    {"custom_id": "hot", "prompt": "x", "temperature": -1},
    {"custom_id": "odd", "prompt": "x", "temprature": 1},
    {"custom_id": "none"},
]


NAMES = "batch chat short request-3 ids request-5 request-6 short hot odd none".split()


BAD = {
    6: (8, "no JSON at character 2"),
    7: (9, "got custom_id 'short' of line 3 again"),
    8: (10, "got temperature = -1"),
    9: (11, "got the unknown field 'temprature'"),
    10: (12, "got no prompt"),
}


def write_lines(path, lines):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n")
    return path


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(done, code, message):
    """The command ended with this code, and said why once, in one line."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("hpcinfer")]
    assert done.returncode == code, done.stderr
    assert len(lines) == 1 and message in lines[0], done.stderr
    assert done.stderr.count(message) == 1
    assert "Traceback" not in done.stderr and "Abort" not in done.stderr
    assert done.stdout == ""


def finished_lines(path):
    """Whole lines of an output that is being written."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
