"""Compiled functions are kept on disk under a digest of sources: it covers all they are built from.

A constant or function that a compiled function names is frozen in its code. What these names lead
to, from module to module, must lie in the sources of the digest.
"""

import ast
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
from helpers.paths import ROOT

pytest.importorskip("numba")
from hpcinfer.ops.cpu.runtime import compile as runtime  # noqa: E402

pytestmark = pytest.mark.single

COMPILES = {"compiled", "njit", "intrinsic", "overload"}


@dataclass
class Module:
    """What the names of a source stand for.

    Attributes
    ----------
    imports : name -> module that it is, or (module, name there)
    values : name -> node of its function, class or assigned value
    """

    imports: dict = field(default_factory=dict)
    values: dict = field(default_factory=dict)


def stored(node):
    """Names that a part of a source assigns to, or takes as arguments."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            yield part.id
        elif isinstance(part, ast.arg):
            yield part.arg


@cache
def module_of(path):
    """Module of a source, read without importing it."""
    module = Module()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                module.imports[alias.asname or alias.name] = node.module, alias.name
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            module.values[node.name] = node
        elif isinstance(node, ast.Assign):
            module.values |= dict.fromkeys(stored(node), node.value)
    return module


def file_of(root, name):
    """Source of a module of the package, None if it is none."""
    path = root.joinpath(*name.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def decorators(function):
    """Names that a function is decorated with."""
    for node in function.decorator_list:
        node = node.func if isinstance(node, ast.Call) else node
        yield node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def named(root, path, node):
    """(file, name) of all that a part of a source names in sources of the package."""
    module, own = module_of(path), set()
    statements = [node]
    if isinstance(node, ast.FunctionDef):
        statements, own = node.body, {*stored(node)}
    for part in (part for statement in statements for part in ast.walk(statement)):
        if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            place = module.imports.get(part.value.id)
            if place and (other := file_of(root, ".".join(place))):
                yield other, part.attr
        elif not isinstance(part, ast.Name) or part.id in own:
            continue
        elif part.id in module.values:
            yield path, part.id
        elif part.id in module.imports:
            other, name = module.imports[part.id]
            if (file := file_of(root, other)) and not file_of(root, f"{other}.{name}"):
                yield file, name


def outside(root, sources):
    """(file, name) of what compiled functions in some sources freeze that lies in none of these."""
    seen, waiting = set(), []
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and COMPILES & {*decorators(node)}:
                waiting += named(root, path, node)

    # Follow every name to where it is made, and what is named there.
    while waiting:
        file, name = place = waiting.pop()
        if place in seen:
            continue
        seen.add(place)
        if file in sources and name in module_of(file).values:
            waiting += named(root, file, module_of(file).values[name])
        elif file in sources and name in module_of(file).imports:
            other, name = module_of(file).imports[name]
            waiting += [(found, name)] if (found := file_of(root, other)) else []
    return {(file.relative_to(root).as_posix(), name) for file, name in seen if file not in sources}


def test_the_digest_covers_what_is_frozen():
    sources = runtime.sources()
    assert all(path.is_relative_to(ROOT / "hpcinfer" / "ops") for path in sources)
    assert not any("cuda" in path.parts for path in sources)
    found = outside(ROOT, set(sources))
    assert not found, found


def test_what_is_frozen_is_found(tmp_path):
    """By name, by attribute, by way of a constant, of a function and of another module."""
    texts = {
        "package/outer.py": "A = B = C = D = UNUSED = 1\ndef plain(): return D\n",
        "package/inner.py": "from package.outer import B\n",
        "package/kernels.py": "from package import inner, outer\n"
        "from package.outer import A, UNUSED, plain\n"
        "_C = outer.C + 1\n"
        "def build(): return A\n"
        "@compiled\ndef f(x): return inner.B + _C + build() + plain()\n"
        "def guard(): return UNUSED\n",
    }
    for name, text in texts.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    sources = {tmp_path / "package" / name for name in ("inner.py", "kernels.py")}
    names = {name for file, name in outside(Path(tmp_path), sources)}
    assert names == {"A", "B", "C", "plain"}
