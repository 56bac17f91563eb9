"""Errors that end a command, and the exit code each one means.

Input and arguments raise ValueError, the machine raises RuntimeError; both carry one line of the
form ``<module>: got X, need Y; remedy``. `UsageError` is a ValueError about the command line.
"""

from __future__ import annotations

import difflib
import operator
import pickle
import reprlib
import signal
from collections.abc import Iterable
from typing import Any, TypeVar

DONE, FAILED, USAGE, REQUEUE, SIGNALLED = 0, 1, 2, 75, 128

_Error = TypeVar("_Error", bound=BaseException)


class UsageError(ValueError):
    """The command line cannot be run as it stands (exit code 2)."""


class NotFinite(ValueError):
    """Logits are NaN or infinite, so that no token can be chosen or scored."""


class Stopped(RuntimeError):
    """The run was stopped before its end, and goes on when it is started again (exit code 75)."""


class Interrupted(KeyboardInterrupt):
    """A signal has ended a command that keeps nothing to go on with.

    The exit code is 128 and the signal's number, as a shell says it.

    Parameters
    ----------
    number : of the signal
    """

    def __init__(self, number: int):
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number

    def __reduce__(self) -> tuple[type, tuple[int]]:
        """How other ranks are sent it."""
        return type(self), (self.number,)


def agreed(error: _Error) -> _Error:
    """`error`, marked as raised on every rank, so that all can end in order; returns it."""
    error.agreed = True  # type: ignore[attr-defined]
    return error


def portable(error: BaseException) -> BaseException:
    """`error` if other ranks can be sent it, else one of the same text.

    Libraries raise what cannot be: errors whose class no module holds, as a panic is, or which
    carry what their making does not take.
    """
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(one_line(error))
    return error


def is_agreed(error: BaseException) -> bool:
    """True if every rank raises this error too."""
    return isinstance(error, UsageError) or getattr(error, "agreed", False)


def is_reported(error: BaseException) -> bool:
    """True if another rank raises this error too and reports it for this one."""
    return getattr(error, "reported", False)


def exit_code(error: BaseException) -> int:
    """Exit code of a command that ends with `error`."""
    if isinstance(error, Stopped):
        return REQUEUE
    if isinstance(error, Interrupted):
        return SIGNALLED + error.number
    return USAGE if isinstance(error, UsageError) else FAILED


def one_line(error: BaseException) -> str:
    """Text of `error` on one line, with the class only where it was not raised on purpose."""
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, RuntimeError, Interrupted)) and text:
        return text
    if isinstance(error, MemoryError):
        return f"memory: {text or 'allocation refused'}; use more ranks or a smaller --kv-memory"
    if isinstance(error, OSError) and error.filename:
        return f"file: {error.strerror or text}: {error.filename}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def is_digits(text: str) -> bool:
    """True for a whole number in the digits 0 to 9, of which alphabets and powers have others."""
    return text.isascii() and text.isdecimal()


def integer(value: Any) -> int | None:
    """Value as a plain int, None if it is no whole number (bool is none, 4.0 is 4)."""
    if type(value).__name__.rstrip("_") == "bool":  # Python's, or NumPy's
        return None
    if isinstance(value, float) and value.is_integer():  # as some writers of JSON have it
        return int(value)
    try:
        return operator.index(value)
    except TypeError:
        return None


def meant(word: object, known: Iterable[str]) -> str:
    """Words to put behind "need", if a word that is not known looks like one that is."""
    close = difflib.get_close_matches(str(word)[:64], list(known), n=1, cutoff=0.7)
    return f" (did you mean {close[0]}?)" if close else ""


def shown(value: Any, width: int = 60) -> str:
    """Value as it is quoted in an error: its repr on one line, cut to `width` characters."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = brief.maxlong = width
    brief.maxlevel = 2
    try:
        return brief.repr(value)[: 2 * width]
    except ValueError:
        return f"a {type(value).__name__} with a very long number"
