"""Conversations in OpenAI's form, as the idioms of public templates read them."""

import pytest

from hpcinfer.text.chat_template import ChatTemplate
from hpcinfer.text.conversation import reads_of

pytestmark = pytest.mark.single

ARGUMENTS = '{"city": "Köln", "days": 3}'
PARTS = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "world"}]
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}

# How public models' templates read a message's content and its tool calls, each written down here
# in short: (content, calls, what is written of the call)
TOJSON = "{% for t in m.tool_calls %}{{ t.function.arguments | tojson }}{% endfor %}"
WHOLE = "{% for t in m.tool_calls %}{{ t.function | tojson }}{% endfor %}"
GLUED = "{% for t in m['tool_calls'] %}{{ 'a:' + t['function']['arguments'] }}{% endfor %}"
PLAIN = "{% for t in m.tool_calls %}{{ t.function.arguments }}{% endfor %}"
ASKED = (
    "{% for t in m.tool_calls %}{% set a = t.function.arguments %}"
    "{{ a if a is string else a | tojson }}{% endfor %}"
)
ITEMS = (
    "{% for t in m.tool_calls %}{% for k, v in t.function.arguments | items %}"
    "<{{ k }}>{{ v }}{% endfor %}{% endfor %}"
)
LOOP = (
    "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}"
)
EITHER = "{% if m.content is string %}{{ m.content }}{% else %}" + LOOP + "{% endif %}"
MACRO = (
    "{% macro seen(content) %}{% if content is string %}{{ content }}{% elif content is iterable "
    "and content is not mapping %}{% for p in content %}{{ p.text }}{% endfor %}{% else %}"
    "{{ content }}{% endif %}{% endmacro %}"
)
TEMPLATES = {
    "qwen2.5": ("{{ m.content }}", WHOLE, ARGUMENTS),
    "qwen3": (
        "{% set content = m.content if m.content is string else '' %}{{ content }}",
        ASKED,
        ARGUMENTS,
    ),
    "llama3.1": ("{{ m['content'] | trim }}", TOJSON, ARGUMENTS),
    "llama3.2-vision": (EITHER, TOJSON, ARGUMENTS),
    "deepseek-v3": ("{{ '' if m['content'] is none else m['content'] }}", GLUED, "a:" + ARGUMENTS),
    "glm4.5": (MACRO + "{{ seen(m.content) }}", ITEMS, "<city>Köln<days>3"),
    "qwen3-coder": ("{{ m.content }}", ITEMS, "<city>Köln<days>3"),
    "hermes": ("{{ m.content }}", TOJSON, ARGUMENTS),
    "smolvlm": (LOOP, "", ""),
    "llava": (
        "{{ m['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join }}",
        "",
        "",
    ),
    "gemma3": (EITHER, "", ""),
    "functionary": ("{% if m.content is not none %}{{ m.content }}{% endif %}", PLAIN, ARGUMENTS),
    "command-r": (
        "{% if m.content %}{{ m.content }}{% endif %}",
        "{{ m.tool_calls | tojson }}",
        ARGUMENTS,
    ),
    "gpt-oss": ("{% if m.content is string %}{{ m.content }}{% endif %}", TOJSON, ARGUMENTS),
}


def template(name: str) -> ChatTemplate:
    content, calls, _ = TEMPLATES[name]
    calls = "{% if m.tool_calls %}" + calls + "{% endif %}"
    return ChatTemplate("{% for m in messages %}[" + content + calls + "]{% endfor %}")


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_parts_reach_every_template(name):
    written = template(name).render_chat(
        [{"role": "user", "content": PARTS}, {"role": "user", "content": "one text"}]
    )
    assert written == "[Hello world][one text]"


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("content", ["", None, "absent"])
@pytest.mark.parametrize("as_text", [True, False])
def test_arguments_are_encoded_once_and_null_is_nothing(name, content, as_text):
    function = {
        "name": "weather",
        "arguments": ARGUMENTS if as_text else {"city": "Köln", "days": 3},
    }
    message = {"role": "assistant", "tool_calls": [{**CALL, "function": function}], "refusal": None}
    if content != "absent":
        message["content"] = content
    written = template(name).render_chat([message])
    assert TEMPLATES[name][2] in written
    assert "None" not in written and "\\" not in written and "'city'" not in written


def test_a_template_may_ask_for_null():
    asks = ChatTemplate("{% for m in messages %}{{ m.content is none }}{% endfor %}")
    assert asks.render_chat([{"role": "assistant", "content": None}]) == "True"


def test_the_word_none_stays_where_it_was_said():
    plain = ChatTemplate("{% for m in messages %}{{ m.content }};{% endfor %}")
    said = [{"role": "user", "content": "None"}, {"role": "assistant", "content": None}]
    assert plain.render_chat(said) == "None;;"


def test_a_refusal_is_that_of_the_first_form():
    refuses = ChatTemplate(
        "{% for m in messages %}{% if m.tool_calls %}{{ raise_exception('no tools, ' ~ "
        "m.tool_calls[0].function.arguments) }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="no tools, {.city"):
        refuses.render_chat([{"role": "assistant", "content": None, "tool_calls": [CALL]}])


@pytest.mark.parametrize(
    "arguments", ["", "no JSON", "[1, 2]", '"text"', "null", "[" * 100_000, '{"a": NaN}']
)
def test_arguments_that_are_no_object_stay_as_they_are(arguments):
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    written = ChatTemplate(
        "{% for m in messages %}{{ m.tool_calls[0].function.arguments }}{% endfor %}"
    ).render_chat([{"role": "assistant", "content": "", "tool_calls": [call]}])
    assert written == arguments


@pytest.mark.parametrize(
    "source, texts, parts",
    [
        ("{{ m.content }}", True, False),
        ("{% for line in m.content.split('x') %}{% endfor %}", True, False),
        ("{% for p in m.content %}{% endfor %}", False, True),
        ("{% set c = m['content'] %}{% for p in c %}{% endfor %}", False, True),
        ("{% for p in m.content %}{% endfor %}{{ m.content is string }}", True, True),
        ("{% for p in m.parts %}{% endfor %}", True, False),
    ],
)
def test_what_a_template_reads_is_seen_in_its_tree(source, texts, parts):
    import jinja2

    reads = reads_of(jinja2.Environment().parse(source))
    assert (reads.texts, reads.parts) == (texts, parts)
