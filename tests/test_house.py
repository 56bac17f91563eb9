"""The rules of the house that a linter cannot see: what importing starts, who reads the
environment, how long files and functions may be, what they say of themselves."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from functools import cache
from graphlib import CycleError, TopologicalSorter

import pytest
from helpers.paths import ROOT

pytestmark = pytest.mark.single

SOURCES = sorted((ROOT / "hpcinfer").rglob("*.py"))
READ_ENVIRONMENT = {"hpcinfer/array.py", "hpcinfer/launcher.py", "hpcinfer/node.py"}

# Lines of a function without its docstring, its signature counting as one: COMMENTED of them and
# more need a comment, more than LONGEST are too many. Lines of a file: LONGEST_FILE at most.
COMMENTED, LONGEST, LONGEST_FILE = 20, 40, 450

# Functions of each file that still break a rule. The numbers must be right: they only fall.
WITHOUT_COMMENT: dict[str, int] = {}
TOO_LONG: dict[str, int] = {}
LONG_FILES: dict[str, str] = {}
SAME_CLASSES: dict[str, str] = {}


def name_of(path):
    """Name of a source below the root, with slashes."""
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


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


@cache
def functions_of(source):
    """(name, lines without the docstring, whether there is a comment) of every function."""
    found = []
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = range(node.lineno, node.end_lineno + 1)
            first = node.body[0]
            begin = first.lineno if ast.get_docstring(node) is None else first.end_lineno + 1
            n_lines = 1 + node.end_lineno + 1 - begin
            found.append((node.name, n_lines, not comments.isdisjoint(lines)))
    return found


def counted(breaks):
    """File -> number of its functions for which `breaks(lines, commented)` is true."""
    found = {}
    for path in SOURCES:
        functions = functions_of(path.read_text(encoding="utf-8"))
        if n := sum(breaks(lines, commented) for _, lines, commented in functions):
            found[name_of(path)] = n
    return found


def differences(found, allowed):
    """One line for each file whose number is not the one that is allowed."""
    return [
        f"{name}: found {found.get(name, 0)}, allowed {allowed.get(name, 0)}"
        for name in sorted(found.keys() | allowed.keys())
        if found.get(name, 0) != allowed.get(name, 0)
    ]


def imported(path, modules):
    """Modules of the package that a source imports when it is imported itself."""
    waiting = list(tree_of(path).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield from [whole if whole in modules else node.module] * (node.module in modules)
        elif not isinstance(node, ast.FunctionDef) and not is_for_types(node):
            waiting += ast.iter_child_nodes(node)


def is_for_types(node):
    """True for what a type checker alone reads."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def is_of_kernels(names):
    """True if classes of one name are the same thing in ops/, ops/cpu/ and ops/cuda/, once each."""
    kinds = [tuple(part for part in name.split("/") if part in ("cpu", "cuda")) for name in names]
    return all(name.startswith("hpcinfer/ops/") for name in names) and len({*kinds}) == len(kinds)


@pytest.mark.parametrize("source", ["os.environ['A']", "os.getenv('A')", "from os import environ"])
def test_a_reader_is_recognised(source):
    assert reads_environment(ast.parse(source))


def test_environment_is_read_in_three_files_only():
    readers = {name_of(path) for path in SOURCES if reads_environment(tree_of(path))}
    assert readers == READ_ENVIRONMENT


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
    assert not [name_of(path) for path in SOURCES if not ast.get_docstring(tree_of(path))]


def test_lines_and_comments_are_counted():
    source = 'def f(\n    a,\n):\n    """One.\n\n    Two.\n    """\n    b = "#"\n\n    return b\n'
    assert functions_of(source) == [("f", 4, False)]
    assert functions_of(source + "    # no\n") == [("f", 4, False)]
    assert functions_of(source.replace("\n\n    return", "\n    # Go\n    return")) == [
        ("f", 4, True)
    ]


def test_long_functions_have_a_comment():
    found = counted(lambda lines, commented: lines >= COMMENTED and not commented)
    assert not differences(found, WITHOUT_COMMENT), "comment, or correct WITHOUT_COMMENT"


def test_no_function_is_too_long():
    found = counted(lambda lines, _: lines > LONGEST)
    assert not differences(found, TOO_LONG), "divide, or correct TOO_LONG"


def test_no_file_is_too_long():
    lines = {name_of(path): path.read_bytes().count(b"\n") for path in SOURCES}
    long = {name for name, n in lines.items() if n > LONGEST_FILE}
    assert long == LONG_FILES.keys(), "divide, or correct LONG_FILES"


def test_a_class_name_stands_for_one_thing():
    places = {}
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name.lstrip("_"), []).append(name_of(path))
    twice = {name: at for name, at in places.items() if len(at) > 1 and not is_of_kernels(at)}
    assert twice.keys() == SAME_CLASSES.keys(), f"rename, or correct SAME_CLASSES: {twice}"


def test_modules_import_in_no_circle():
    modules = {}
    for path in SOURCES:
        module = name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        modules[module] = path
    imports = {name: set(imported(path, modules)) - {name} for name, path in modules.items()}
    assert "hpcinfer.errors" in imports["hpcinfer.layout"]
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_constants_that_stand_twice_are_equal():
    """The command line and requests name them without importing the mathematics."""
    from hpcinfer import array
    from hpcinfer.cli import common, convert, extract
    from hpcinfer.engine.activations.selection import POINTS
    from hpcinfer.ops import quantize, sampling_batch
    from hpcinfer.requests import sampling

    assert sampling.GREEDY_BELOW == sampling_batch.GREEDY_BELOW
    assert set(common.DTYPES) == set(array.DTYPES)
    assert extract._POINTS.split(", ") == list(POINTS)
    assert convert.GROUPS == quantize.GROUPS
    assert sorted(convert.CODES.values()) == sorted(quantize.BITS)
    assert convert.CODES == {f"int{bits}": bits for bits in quantize.BITS}


def test_floors_are_drawn_as_they_are_held():
    """`.importlinter` and docs/architecture.md name the same floors; every module is on one."""
    held = ROOT.joinpath(".importlinter").read_text(encoding="utf-8")
    layers = held.split("\nlayers =\n")[1].split("\nignore_imports")[0].splitlines()
    floors = [{*re.findall(r"\((\w+)\)", line)} for line in layers]

    # A line of the drawing is names, at least two spaces apart, then words on them.
    drawing = ROOT.joinpath("docs", "architecture.md").read_text(encoding="utf-8")
    lines = drawing.split("## Floors")[1].split("\n    ")[1:]
    drawn = [re.split(r"\s{2,}", line.split("\n")[0].strip()) for line in lines]
    drawn = [{name.strip("/") for name in line if re.fullmatch(r"\w+/?", name)} for line in drawn]
    assert drawn[: len(floors)] == floors

    standing = {path.relative_to(ROOT / "hpcinfer").parts[0] for path in SOURCES}
    standing -= {"__init__.py", "__main__.py"}
    assert {name.removesuffix(".py") for name in standing} == set().union(*floors)
