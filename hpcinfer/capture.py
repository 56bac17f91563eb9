"""The capture under way in this process, if there is one: calls that are kept to be made again.

What computes on the CPU hands its compiled functions, and the memory of their results, to the
capture (`ops.cpu.runtime.launch`); on a GPU the driver notes what is launched, and
`ops.cuda.runtime.launch` hands over what host arrays a step's kernels read. `collectives` hands it
sums over ranks. All else that a step does must have no effect, or be the same in every step that
the capture is made for: what must not be captured says so by `refuse`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# `ops.cpu.runtime.graph.Capture` or `ops.cuda.runtime.graph.Capture`.
under_way: Any = None


class Refused(Exception):
    """What happens now cannot be captured, and cannot go on while a capture is under way."""


# Arrays outside of what a step has for itself that are never changed.
constants: list[Any] = []


@contextmanager
def capturing(into: Any) -> Iterator[Any]:
    """Let `into` have what happens in the body."""
    global under_way
    into.begin()
    under_way = into
    try:
        yield into
    finally:
        under_way = None
        into.end()


def constant(x: Any) -> Any:
    """x, an array that nobody changes and that stays as long as the process does."""
    constants.append(x)
    return x


def refuse(reason: str) -> None:
    """Say that what happens now cannot be captured."""
    if under_way is not None:
        under_way.refuse(reason)
