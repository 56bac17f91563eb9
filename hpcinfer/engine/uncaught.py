"""What an error that nobody catches does to the other ranks of a program that uses hpcinfer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from types import TracebackType

from hpcinfer.errors import exit_code, is_agreed, one_line
from hpcinfer.launcher import abort, launcher_rank


@cache
def end_all_ranks() -> None:
    """From now on, let an error that reaches the top of this rank's program end all ranks.

    Otherwise Python waits for the others at its end, and they for it. Errors that every rank raises
    end them in order. What the program catches is its own business.
    """
    sys.excepthook = partial(_report, sys.excepthook)


def _report(before: Callable, kind: type, error: BaseException, trace: TracebackType) -> None:
    """Print an error as `before` does, then end all ranks if it is this one's alone."""
    before(kind, error, trace)
    if not is_agreed(error):
        rank = launcher_rank()
        print(f"hpcinfer: rank {rank} ends all: {one_line(error)}", file=sys.stderr, flush=True)
        abort(exit_code(error))
