"""What the engine runs of the strategies, and what is there to be read and compared."""

import ast

import pytest
from helpers.paths import ROOT

pytestmark = pytest.mark.single

SOURCES = sorted((ROOT / "hpcinfer").rglob("*.py"))


def test_what_the_engine_does_not_run_says_so():
    """A function of a strategy is used by model or engine, or is a teaching form."""
    users = [path for path in SOURCES if {"model", "engine", "parallel"} & set(path.parts)]
    used = {function for path in users for function in strategies_used(path)}
    wrong = []
    for path in (ROOT / "hpcinfer" / "parallel").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and is_strategy(node):
                teaches = "\n    Teaching form: " in ast.get_docstring(node, clean=False)
                if teaches == ((path.stem, node.name) in used):
                    wrong.append(f"{path.stem}.{node.name}")
    assert not wrong


def is_strategy(node):
    """True of a public function that takes a communicator first."""
    arguments = node.args.args
    return bool(arguments) and arguments[0].arg == "comm" and not node.name.startswith("_")


def strategies_used(path):
    """(file, function) of `hpcinfer.parallel` that a source imports, or names in its own file."""
    modules, tree = set(), ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "hpcinfer.parallel":
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("hpcinfer.parallel."):
            yield from ((node.module.rpartition(".")[2], alias.name) for alias in node.names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in modules:
                yield node.value.id, node.attr
        elif isinstance(node, ast.Name) and path.parent.name == "parallel":
            yield path.stem, node.id
