"""Letters in the shapes of docstrings are those of the legend, each with one meaning."""

import ast
import re

import pytest
from helpers.paths import ROOT

import hpcinfer

pytestmark = pytest.mark.single

SOURCES = sorted((ROOT / "hpcinfer").rglob("*.py"))
ENTRY = re.compile(r"(?<= {2})([A-Za-z])  (?=\w)")  # of the legend: a letter and its meaning
SHAPE = re.compile(r"\(([^()]*(?:\([^()]*\)[^()]*)*)\)")  # in parentheses, products in inner ones
CAPITAL = re.compile(r"(?<![\w.-])[A-Z](?![\w'])")


def legend():
    """Letters of the legend in the package's docstring, in order."""
    return ENTRY.findall(hpcinfer.__doc__.partition("throughout::")[2].partition("``/P``")[0])


def shapes(path):
    """Shapes in the docstrings of a source: what stands in parentheses and has an axis."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            for shape in SHAPE.findall(ast.get_docstring(node) or ""):
                if "," in shape or "/" in shape:
                    yield shape


def test_every_letter_is_in_the_legend_once():
    letters = legend()
    assert len(letters) == len(set(letters)) >= 18
    unknown = {
        (str(path.relative_to(ROOT)), shape)
        for path in SOURCES
        for shape in shapes(path)
        if set(CAPITAL.findall(shape)) - set(letters)
    }
    assert not unknown


def test_the_glossary_has_the_same_letters():
    glossary = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    paragraph = glossary.split("\n\n")[1]
    assert set(re.findall(r"\b[A-Zk]\b", paragraph)) == set(legend())


@pytest.mark.parametrize("text", ["(T/P, D)", "(Z, D)", "(own experts, Q/P, D)"])
def test_a_letter_is_recognised(text):
    unknown = [c for s in SHAPE.findall(text) for c in CAPITAL.findall(s) if c not in legend()]
    assert unknown == [c for c in text if c in "ZQ"]
