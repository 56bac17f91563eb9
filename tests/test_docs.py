"""The documents name what the code has, their links resolve, and their commands parse."""

import argparse
import ast
import re
import shlex

import pytest
from helpers.paths import ROOT

from hpcinfer.cli import main
from hpcinfer.layout import STRATEGIES, parse_layout
from hpcinfer.model.families import FAMILIES

pytestmark = pytest.mark.single

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in PAGES}
REFERENCE, LAYOUTS = TEXTS["reference.md"], TEXTS["layouts.md"]

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?:^|\s)hpcinfer (?:generate|score|extract|convert|inspect|verify|bench)\b")
FILE = re.compile(r"\b(?:jobs|tests|docs|data)/[\w/.-]*\w\.(?:py|sh|slurm|jsonl|md)\b")


def parsers():
    """(words, parser) of every command and bench."""
    found, waiting = [], [((), main.parser())]
    while waiting:
        words, parser = waiting.pop()
        below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        waiting += [((*words, name), own) for sub in below for name, own in sub.choices.items()]
        if not below:
            found.append((words, parser))
    return found


def options_of(parser):
    """The long options of a parser."""
    return {s for a in parser._actions for s in a.option_strings if s.startswith("--")}


def indented(text):
    """The lines of a page's examples."""
    return [line.strip() for line in text.splitlines() if line.startswith("    ")]


def commands():
    """(page, line, words before hpcinfer, words behind) of every whole command."""
    for page, text in TEXTS.items():
        for line in indented(text):
            line = line.partition("  # ")[0].partition(" #")[0].removeprefix("$ ").rstrip()
            if COMMAND.search(line) and "..." not in line:
                words = shlex.split(line)
                at = words.index("hpcinfer")
                yield page, line, words[:at], words[at + 1 :]


COMMANDS = list(commands())


def section(text, title):
    """What stands under a heading, up to the next of its level."""
    level, _, _ = title.partition(" ")
    return re.split(rf"^{level} ", text.partition(f"{title}\n")[2], flags=re.M)[0]


def test_every_family_is_named():
    assert {name for name in FAMILIES if not re.search(rf"\b{name}\b", TEXTS["README.md"])} == set()


def test_every_strategy_is_drawn():
    files = {path.name for path in (ROOT / "hpcinfer" / "parallel").glob("[a-z]*.py")}
    titles = "".join(line for line in LAYOUTS.splitlines() if line.startswith("### "))
    assert {name for name in files if f"`{name}`" not in titles} == set()


@pytest.mark.parametrize("word", STRATEGIES)
def test_every_value_of_a_layout_is_in_its_row(word):
    values = "\\|".join(STRATEGIES[word])
    assert f"| `{word}={values}` |" in LAYOUTS


@pytest.mark.parametrize(("words", "parser"), [p for p in parsers() if p[0][0] != "bench"])
def test_every_option_of_a_command_is_in_the_reference(words, parser):
    text = section(REFERENCE, "## Commands")
    assert {s for s in options_of(parser) if not re.search(rf"`{s}[ `]", text)} == set()


@pytest.mark.parametrize(("words", "parser"), [p for p in parsers() if p[0][0] == "bench"])
def test_every_option_of_a_bench_is_in_its_row(words, parser):
    """Its own row, or the lines on what all benches, or all of a model, have."""
    text = section(REFERENCE, "## Benches")
    rows = [line for line in text.splitlines() if line.startswith(f"| `{words[1]}` |")]
    assert len(rows) == 1
    around = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    shared, _, of_models = around.partition("Those of a model:")
    named = rows[0] + shared + (of_models if "of a model |" in rows[0] else "")
    known = {"--help", "--debug"}
    assert {s for s in options_of(parser) - known if not re.search(rf"`{s}[ `]", named)} == set()


def test_the_reference_has_no_option_that_is_none():
    text = section(REFERENCE, "## Commands") + section(REFERENCE, "## Benches")
    known = set().union(*(options_of(parser) for _, parser in parsers())) | {"--version"}
    assert set(re.findall(r"`(--[a-z-]+)", text)) <= known


def test_every_variable_is_in_the_reference():
    """Ours wherever they stand, others where the package reads the environment or a job is set."""
    sources = [*ROOT.glob("hpcinfer/**/*.py"), *ROOT.glob("jobs/*"), ROOT / "tests" / "run.sh"]
    texts = {path: path.read_text(encoding="utf-8") for path in sources}
    names = {name for text in texts.values() for name in re.findall(r"HPCINFER_[A-Z_]+", text)}
    for path in sources:
        if path.name in ("array.py", "launcher.py", "node.py") and path.parent.name == "hpcinfer":
            nodes = ast.walk(ast.parse(texts[path]))
            words = {n.value for n in nodes if isinstance(n, ast.Constant) and type(n.value) is str}
            names |= {word for word in words if re.fullmatch(r"[A-Z][A-Z0-9]*_\w+", word)}
        if path.parent.name == "jobs":
            names |= set(re.findall(r"\bSLURM_[A-Z_]+", texts[path]))
    text = section(REFERENCE, "## Environment variables")
    assert {name for name in names if f"`{name}`" not in text} == set()


def test_every_bench_and_job_is_named():
    jobs = {f"jobs/{path.name}" for path in (ROOT / "jobs").iterdir()}
    everything = "\n".join(TEXTS.values())
    assert {name for name in jobs if name not in everything} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    """Files are there, and so are the headings that a link names."""
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("http:", "https:")):
            continue
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if heading:
            lines = target.read_text(encoding="utf-8").splitlines()
            titles = [line.lstrip("#").strip().lower() for line in lines if line.startswith("#")]
            assert heading in {re.sub(r"[^\w -]", "", t).replace(" ", "-") for t in titles}, link


@pytest.mark.parametrize(("page", "line", "before", "words"), COMMANDS, ids=lambda x: str(x)[:60])
def test_commands_parse(page, line, before, words):
    """By the real parser; a layout fits the ranks that are started, where they are said."""
    arguments = main.parser().parse_args(words)
    layout = getattr(arguments, "layout", None)
    if layout and "-n" in before:
        parse_layout(layout, int(before[before.index("-n") + 1]))


def test_every_command_has_an_example():
    names = {module.__name__.rpartition(".")[2] for module in main.COMMANDS}
    assert {words[0] for _, _, _, words in COMMANDS} == names


def test_files_that_are_named_exist():
    named = {name for text in TEXTS.values() for name in FILE.findall(text)}
    assert {n for n in named if "NAME" not in n and not (ROOT / n).exists()} == set()
