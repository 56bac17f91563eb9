"""Chat templates, which are programs of strangers.

jinja2's sandbox keeps them from Python's internals. What they take of time and memory is bounded by
the process that they run in (`hpcinfer.text.child`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hpcinfer.text.conversation import first_rendered, forms_of, reads_of

# Characters of a template
MAX_TEMPLATE = 1 << 20


class ChatTemplate:
    """A compiled chat template.

    Settings and helpers are those of transformers (utils/chat_template_utils.py): trimmed blocks,
    loop controls, `{% generation %}`, tojson without HTML escapes, raise_exception, strftime_now.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_TEMPLATE:
            raise ValueError(
                f"chat template: got {len(source)} characters, need at most {MAX_TEMPLATE}; "
                "correct the file"
            )
        try:
            sandbox = _Sandbox()
            tree = sandbox.parse(source)
            self._reads, self._template = reads_of(tree), sandbox.from_string(tree)
        except MemoryError:
            raise
        except Exception as error:
            raise ValueError(_template_line(error)) from None

    def render_chat(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        """Text of a conversation, in the first of its forms that the template takes.

        Raises
        ------
        ValueError
            If it takes none, with what it says of the first.
        """
        return first_rendered(
            lambda form: self.render(messages=form, **variables), forms_of(messages, self._reads)
        )

    def render(self, **variables: Any) -> str:
        """Text that the template makes of the variables."""
        try:
            return self._template.render(variables)
        except MemoryError:
            raise
        except Exception as error:
            raise ValueError(_template_line(error)) from None


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with the settings and helpers of transformers."""

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks what the assistant said; kept as it is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _template_line(error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    where = f" at line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
    return (
        f"chat template: got {type(error).__name__}{where}: {reason or 'no reason'}, "
        "need a template that renders these messages; check the template and the messages"
    )
