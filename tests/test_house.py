"""The rules of the house that a linter cannot see: what importing starts, who reads the
environment."""

import ast
import subprocess
import sys

import pytest
from helpers.paths import ROOT

pytestmark = pytest.mark.single

SOURCES = sorted((ROOT / "hpcinfer").rglob("*.py"))
READ_ENVIRONMENT = {"hpcinfer/array.py", "hpcinfer/launcher.py", "hpcinfer/node.py"}


def reads_environment(tree):
    """True if the source names os.environ, os.environb, os.getenv or os.putenv."""
    names = {"environ", "environb", "getenv", "putenv"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in names:
            if isinstance(node.value, ast.Name) and node.value.id == "os":
                return True
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            if names & {alias.name for alias in node.names}:
                return True
    return False


@pytest.mark.parametrize("source", ["os.environ['A']", "os.getenv('A')", "from os import environ"])
def test_a_reader_is_recognised(source):
    assert reads_environment(ast.parse(source))


def test_environment_is_read_in_three_files_only():
    readers = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        if reads_environment(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert readers <= READ_ENVIRONMENT


def test_importing_starts_nothing():
    """`import hpcinfer` starts no MPI, no GPU and no thread, and loads nothing heavy."""
    code = """
import sys, threading
import hpcinfer
heavy = {"mpi4py.MPI", "cupy", "h5py", "torch", "transformers"} & set(sys.modules)
assert not heavy, heavy
assert threading.active_count() == 1
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr


def test_every_module_has_a_docstring():
    bare = [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not bare


def test_what_the_engine_does_not_run_says_so():
    """A function of a strategy is used by model or engine, or is a teaching form."""
    strategies = [path for path in SOURCES if path.parent.name == "parallel"]
    users = [path for path in SOURCES if {"model", "engine", "parallel"} & set(path.parts)]
    used = {function for path in users for function in strategies_used(path)}
    wrong = []
    for path in strategies:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.args.args[:1]:
                if node.args.args[0].arg == "comm" and not node.name.startswith("_"):
                    teaches = "\n    Teaching form: " in ast.get_docstring(node, clean=False)
                    if teaches == ((path.stem, node.name) in used):
                        wrong.append(f"{path.stem}.{node.name}")
    assert not wrong


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
