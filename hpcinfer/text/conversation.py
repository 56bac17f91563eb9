"""Conversations in the forms that chat templates read.

Templates differ in three things that OpenAI's format leaves no choice in: a message's text is a
string or a list of parts, the arguments of a tool call are an object or the JSON text of one, and
a content of null is asked for or not. What a template reads of the first is seen in its syntax
tree; for the others the forms are tried in turn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from jinja2 import nodes

Messages = list[dict[str, Any]]

# Filters that take a list of parts, and tests that tell it from a text
_LIST_FILTERS = {"selectattr", "rejectattr", "map", "select", "reject"}
_TYPE_TESTS = {"string", "iterable", "sequence", "mapping"}


@dataclass(frozen=True)
class Reads:
    """What a template reads as a message's content: strings, lists of parts, or both."""

    texts: bool
    parts: bool


@dataclass(frozen=True)
class Form:
    """A conversation in one form, and whether a null in it may have been written as "None"."""

    messages: Messages
    has_null: bool


class Arguments(dict):
    """Arguments of a tool call: an object whose text is JSON, where a template wants its text."""

    def __init__(self, content: dict[str, Any], text: str) -> None:
        super().__init__(content)
        self._text = text

    def __str__(self) -> str:
        return self._text


# --- What a template reads -----------------------------------------------------------------------


def reads_of(tree: nodes.Template) -> Reads:
    """What the template of a syntax tree reads as content."""
    # Follow content into the variables that are set to it
    names = {"content"}
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name) and _is_content(assign.node, names):
            names.add(assign.target.name)

    # Look for what is done with it: gone through as a list, asked for its type
    parts = any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))
    parts = parts or any(
        one.name in _LIST_FILTERS and one.node is not None and _is_content(one.node, names)
        for one in tree.find_all(nodes.Filter)
    )
    asks = any(
        test.name in _TYPE_TESTS and _is_content(test.node, names)
        for test in tree.find_all(nodes.Test)
    )
    return Reads(texts=asks or not parts, parts=parts)


def _is_content(node: nodes.Node, names: set[str]) -> bool:
    """True if an expression is the content of a message, as it is or filtered."""
    if isinstance(node, nodes.Filter) and node.node is not None:
        return _is_content(node.node, names)
    if isinstance(node, nodes.CondExpr):
        branches = (node.expr1, node.expr2)
        return any(branch is not None and _is_content(branch, names) for branch in branches)
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return isinstance(node, nodes.Name) and node.name in names


# --- Forms of a conversation ---------------------------------------------------------------------


def forms_of(messages: Messages, reads: Reads) -> Iterator[Form]:
    """A conversation in the forms to try, the likeliest first.

    Arguments are tried as objects, then as text; null as it is, then as an empty text.
    """
    # Leave out what is null elsewhere, and bring contents to what the template reads
    plain = []
    for message in messages:
        given = {k: v for k, v in message.items() if v is not None or k == "content"}
        if isinstance(given.get("content"), str | list | tuple):
            given["content"] = _content(given["content"], reads)
        plain.append(given)

    # Give every form that differs from those before it
    has_null = any(message.get("content") is None for message in plain)
    has_calls = any(message.get("tool_calls") for message in plain)
    for as_object in (True, False) if has_calls else (True,):
        called = [_with_arguments(message, as_object) for message in plain]
        yield Form(called, has_null)
        if has_null:
            emptied = [{"content": "", **_without_null(message)} for message in called]
            yield Form(emptied, False)


def first_rendered(render: Callable[[Messages], str], forms: Iterable[Form]) -> str:
    """What `render` makes of the first form that it takes.

    A text in which a null became the word "None" gives way to the next form's.

    Raises
    ------
    ValueError
        What was raised for the first form, if none is taken.
    """
    refused, written = None, None
    for form in forms:
        try:
            text = render(form.messages)
        except ValueError as error:
            refused = refused or error
            continue
        if written is not None:
            return text if written.count("None") > text.count("None") else written
        if not (form.has_null and "None" in text):
            return text
        written = text
    if written is None:
        raise refused or ValueError("chat template: got no messages, need one or more")
    return written


def _content(content: str | list[Any] | tuple[Any, ...], reads: Reads) -> str | list[Any]:
    """Content as text or parts; parts that become one text follow each other as they are."""
    if isinstance(content, str):
        return content if reads.texts else [{"type": "text", "text": content}]
    return list(content) if reads.parts else "".join(part["text"] for part in content)


def _without_null(message: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if value is not None}


def _with_arguments(message: dict[str, Any], as_object: bool) -> dict[str, Any]:
    """Message with the arguments of its tool calls as objects, or as JSON text."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list | tuple):
        return message
    return {**message, "tool_calls": [_call(call, as_object) for call in calls]}


def _call(call: Any, as_object: bool) -> Any:
    """One tool call; the function stands in a field of that name, or is the call itself."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call(call["function"], as_object)}
    if "arguments" not in call:
        return call
    return {**call, "arguments": _arguments(call["arguments"], as_object)}


def _arguments(given: Any, as_object: bool) -> Any:
    """Arguments, which OpenAI's format has as the JSON text of an object."""
    if isinstance(given, str):
        try:
            content = json.loads(given)
        except (ValueError, RecursionError):
            return given
        text = given
    else:
        content, text = given, json.dumps(given, ensure_ascii=False)
    if not as_object or not isinstance(content, dict):
        return text
    return Arguments(content, text)
