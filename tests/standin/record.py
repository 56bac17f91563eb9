"""Record what the real CuPy has: `cupy/facts.json`, which the stand-in is held to.

    python -P tests/standin/record.py

Needs CuPy, and no GPU; `-P` keeps Python from finding the stand-in instead. Names, arguments of
functions, and the types of every ufunc.
"""

import inspect
import json
from pathlib import Path

import cupy
from cupy._sorting.search import _where_ufunc

HERE = Path(__file__).resolve().parent
CLASSES = ("Device", "Event", "Graph", "MemoryPointer", "MemoryPool", "Stream")


def public(thing):
    """Names that are no one's private matter."""
    return sorted(name for name in dir(thing) if not name.startswith("_"))


def arguments(function):
    """Names of a function's arguments in order; None if it does not say."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    return [p.name for p in parameters]


def ufunc(function):
    """Types of the loops in the order in which they are tried, and what can be scattered."""
    return {
        "in": function.nin,
        "out": function.nout,
        "scatter": function._scatter_op,
        "loops": " ".join(function.types),
    }


def facts():
    """Sections of the file."""
    functions = {
        name: arguments(getattr(cupy, name))
        for name in public(cupy)
        if inspect.isroutine(getattr(cupy, name)) and arguments(getattr(cupy, name)) is not None
    }
    ufuncs = {
        name: ufunc(getattr(cupy, name))
        for name in public(cupy)
        if isinstance(getattr(cupy, name), cupy.ufunc)
    }
    names = {
        "cupy": public(cupy),
        "cupy.cuda": public(cupy.cuda),
        "cupy.cuda.runtime": public(cupy.cuda.runtime),
        "ndarray": public(cupy.ndarray),
    }
    names |= {name: public(getattr(cupy.cuda, name)) for name in CLASSES}
    return {
        "version": {"cupy": cupy.__version__},
        "names": names,
        "functions": functions,
        "ufuncs": ufuncs | {"where": ufunc(_where_ufunc)},
    }


def main():
    """Write the sections, one entry a line."""
    if "standin" in cupy.__version__:
        raise SystemExit("record: got the stand-in, need CuPy; run python -P")
    sections = []
    for title, section in facts().items():
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in section.items()]
        sections.append(f" {json.dumps(title)}: {{\n" + ",\n".join(lines) + "\n }")
    text = "{\n" + ",\n".join(sections) + "\n}\n"
    (HERE / "cupy" / "facts.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
