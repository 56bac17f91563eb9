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
