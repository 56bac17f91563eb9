"""Chat templates, which are programs of strangers: run in a sandbox of bounded time and memory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn, TypeVar

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from hpcinfer.errors import shown
from hpcinfer.text.conversation import first_rendered, forms_of, reads_of

# Characters of a template, and what one rendering may take: steps, characters or items produced,
# and the largest number as a width or count
MAX_TEMPLATE = 1 << 20
TEMPLATE_STEPS, TEMPLATE_CHARACTERS, TEMPLATE_INTEGER = 200_000, 1 << 26, 100_000

# Methods and filters that make a text or list as long as a number says
_WIDENING = {"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice", "round"}
_WIDENING |= {"tojson", "truncate", "wordwrap"}
_WIDE_FORMAT = re.compile(r"\d{6}|\*|\{[^{}]*\{")

_Produced = TypeVar("_Produced")


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
        self._sandbox = _Sandbox()
        try:
            tree = _Metered().visit(self._sandbox.parse(source))
            self._reads = reads_of(tree)
            self._template = self._sandbox.from_string(tree)
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
        """Text that the template makes of the variables, with the whole budget."""
        self._sandbox.refill()
        try:
            return self._template.render(variables)
        except Exception as error:
            raise ValueError(_template_line(error)) from None


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with a budget: loop steps, calls, and characters or items produced.

    The sandbox itself keeps a template from Python's internals and bounds `range`. Nested loops,
    recursive macros and strings that grow pass through the budget here.
    """

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self.refill()
        self.filters["tojson"] = _tojson
        self.filters = {name: self._metered(name, f) for name, f in self.filters.items()}
        self.filters["hpcinfer_items"] = self._items
        self.filters["hpcinfer_join"] = self._join
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        del self.globals["lipsum"]

    def refill(self) -> None:
        """Begin a rendering with the whole budget."""
        self._steps = TEMPLATE_STEPS
        self._characters = TEMPLATE_CHARACTERS

    def spend(self, produced: _Produced) -> _Produced:
        """Take one step, and the size of what it produced, off the budget; returns `produced`."""
        self._steps -= 1
        if isinstance(produced, str | list | tuple | dict):
            self._characters -= len(produced)
        if self._steps < 0 or self._characters < 0:
            raise jinja2.TemplateError(
                f"more than {TEMPLATE_STEPS} steps or {TEMPLATE_CHARACTERS} characters"
            )
        return produced

    def concat(self, parts: Iterable[str]) -> str:
        """Join what the parts of a template wrote, at its cost."""
        return "".join(self.spend(part) for part in parts)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method for the template, at its cost."""
        method = getattr(__obj, "__wrapped__", __obj)
        if isinstance(owner := getattr(method, "__self__", None), str):
            __self._bound_growth(method.__name__, (owner, *args, *kwargs.values()))
        return __self.spend(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator, at its cost."""
        if operator == "*":
            self._bound_product(left, right)
        elif operator == "**":
            _bound_integers((left, right), limit=64)
        elif operator == "%":
            self._bound_growth("format", (left,))
        return self.spend(super().call_binop(context, operator, left, right))

    def _bound_growth(self, name: str, values: Sequence[Any]) -> None:
        """Refuse a string method or filter whose result would exceed the budget."""
        if name in _WIDENING:
            _bound_integers(values, limit=TEMPLATE_INTEGER)
        if name in ("format", "format_map") and _WIDE_FORMAT.search(str(values[0])):
            raise jinja2.TemplateError("a format with a width that is very large or computed")
        if name == "replace" and len(values) > 2:
            self._bound_size(str(values[0]).count(str(values[1])) * len(str(values[2])))
        if name == "join" and len(values) > 1:
            self._bound_size(_size(values[0]) * _size(values[1]))

    def _bound_size(self, size: int) -> None:
        if size > self._characters:
            raise jinja2.TemplateError(f"a text of {shown(size)} characters")

    def _bound_product(self, left: Any, right: Any) -> None:
        for many, times in ((left, right), (right, left)):
            if isinstance(many, str | list | tuple) and isinstance(times, int):
                self._bound_size(len(many) * times)
            elif isinstance(many, int) and many.bit_length() > 4096:
                raise jinja2.TemplateError(f"a product with {shown(many)}")

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        # A filter that takes its context, environment or state first has its value second
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            self._bound_growth(name, (*args[first:], *kwargs.values()))
            return self.spend(function(*args, **kwargs))

        return metered

    @jinja2.pass_context
    def _items(self, context: Context, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.spend(None)
            yield value

    @jinja2.pass_context
    def _join(self, context: Context, parts: Iterable[Any]) -> str:
        return self.spend("".join(map(str, parts)))


class _Metered(NodeTransformer):
    """Puts loops and `~` of a parsed template on the sandbox's budget."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "hpcinfer_items")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "hpcinfer_join")


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks what the assistant said; kept as it is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict) else 1


def _bound_integers(values: Iterable[Any], limit: int) -> None:
    """Refuse a width, count or exponent that would make one step very large."""
    for value in values:
        if isinstance(value, int) and abs(value) > limit:
            raise jinja2.TemplateError(f"the number {shown(value)} as an argument")


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
