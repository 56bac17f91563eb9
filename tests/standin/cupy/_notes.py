"""What the device was told, counted, and what went wrong unseen: hazards.

A hazard is a fault that a GPU answers by wrong numbers, now and then, or not at all. It is noted,
with the place in the program; STANDIN_STRICT=1 makes it an error. STANDIN_TRACE=1 notes the places
of everything that is counted, too.
"""

import contextlib
import functools
import os
import sys
from collections import Counter
from pathlib import Path

counts = Counter()  # kind -> number
places = Counter()  # (kind, what, place) -> number, where traced
hazards = Counter()  # (text, place) -> number

_HERE = str(Path(__file__).resolve().parent)
_DEPTH = 4
_TRACE = os.environ.get("STANDIN_TRACE") == "1"
_STRICT = os.environ.get("STANDIN_STRICT") == "1"
_muted = [False]


def count(kind, n=1, what=""):
    """Count `n` things of a kind.

    The kinds: launch, h2d, d2h (copies), sync (the host waits), alloc (of a pool), cudaMalloc,
    pinned (page-locked memory taken), cudaHostAlloc, event; graph (launches of graphs, which are
    launches too), and graph_launch, graph_h2d, graph_d2h for what lies inside of them.
    """
    counts[kind] += n
    if _TRACE:
        places[kind, what, place()] += n


def hazard(text):
    """Note a fault that a device would not report."""
    if _muted[0]:
        return
    where = place()
    hazards[text, where] += 1
    if _STRICT:
        raise RuntimeError(f"stand-in: {text}, at {where}")


@contextlib.contextmanager
def muted(quiet=True):
    """Note no hazards: what is computed has no values yet."""
    before, _muted[0] = _muted[0], quiet or _muted[0]
    try:
        yield
    finally:
        _muted[0] = before


def place():
    """The callers outside of the stand-in, the nearest first."""
    frame, found = sys._getframe(1), []
    while frame is not None and len(found) < _DEPTH:
        name = _shown(frame.f_code.co_filename)
        if name is not None:
            found.append(f"{name}:{frame.f_lineno} ({frame.f_code.co_name})")
        frame = frame.f_back
    return " < ".join(found)


@functools.cache
def _shown(path):
    """The end of a source's path; None for those of the stand-in."""
    return None if path.startswith((_HERE, "<")) else "/".join(Path(path).parts[-2:])


def clear():
    """Forget all that was noted."""
    for noted in (counts, places, hazards):
        noted.clear()
