"""What the real CuPy has: names, arguments, types of loops (`facts.json`, of `record.py`)."""

import json
from pathlib import Path

FACTS = json.loads((Path(__file__).resolve().parent / "facts.json").read_text(encoding="utf-8"))
NAMES = {place: frozenset(names) for place, names in FACTS["names"].items()}


def unwritten(place):
    """`__getattr__` of a module: names that CuPy has and the stand-in lacks, or that neither has.

    Parameters
    ----------
    place : key of the names in `facts.json`
    """

    def get(name):
        if name in NAMES[place]:
            raise NotImplementedError(f"stand-in: {place}.{name} is not written")
        raise AttributeError(f"module {place!r} has no attribute {name!r}")

    return get


def refuse(function, **given):
    """Refuse arguments that CuPy takes and the stand-in does not, unless they are None."""
    for name, value in given.items():
        if value is not None:
            raise NotImplementedError(f"stand-in: {function}({name}={value!r}) is not written")
