"""Requests to the shipped model, and its answers on all ranks."""

import pytest

from hpcinfer.errors import is_agreed

SEED = 11


def requests():
    """Requests of every kind of sampling, each named, of different lengths."""
    story = "Once there was a shy hare named Nell who lived near the harbour. "
    common = {"max_tokens": 10, "ignore_eos": True}
    kinds = [
        {"prompt": "Tell a story about Mira the fox.", "temperature": 0},
        {"prompt": "Tell a story about Mira the fox.", "temperature": 1.0},
        {"prompt": story * 3, "temperature": 1.3, "seed": 5, "n": 3},
        {"prompt": story, "temperature": 0.8, "top_p": 0.9, "n": 2},
        {"prompt": "A", "temperature": 1.5, "top_k": 30, "min_p": 0.01},
        {"prompt": story * 2, "repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"prompt": "What is 27 + 45?", "temperature": 2.0, "frequency_penalty": 0.7},
        {"prompt": story + "He", "temperature": 0.9, "seed": 2**64 - 1, "max_tokens": 20},
    ]
    return [common | kind | {"custom_id": f"r{i}"} for i, kind in enumerate(kinds)]


def answers(results):
    """Tokens, text and end of every choice, by the name of the request."""
    return {
        result.request.custom_id: [
            (choice.token_ids, choice.text, choice.finish_reason) for choice in result.choices
        ]
        for result in results
    }


def same_on_all_ranks(comm, value):
    values = comm.allgather(value)
    assert all(other == values[0] for other in values)
    return value


def error_on_all_ranks(comm, function):
    """The one error that every rank raises."""
    with pytest.raises(ValueError) as raised:
        function()
    assert is_agreed(raised.value)
    return same_on_all_ranks(comm, str(raised.value))
