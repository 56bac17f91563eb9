"""Standard output and error as what they are to a job: shown to people, and worth no job.

A character that the terminal lacks, a reader that has gone, a full disk or a closed stream never
raise. What fails is noted, and the rest is dropped; `trouble_of_output` says at the end what was
lost.
"""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO


class Console(io.TextIOWrapper):
    """A standard stream that drops what cannot be written, from the first failure on.

    Attributes
    ----------
    trouble : OSError of the first failure, None as long as all is well
    """

    trouble: OSError | None = None

    def write(self, text: str) -> int:
        """Write a text, as far as the stream takes any; returns its length."""
        if self.trouble is None:
            try:
                super().write(text)
            except OSError as error:
                self.trouble = error
        return len(text)

    def flush(self) -> None:
        """Bring to the stream what is held back."""
        if self.trouble is None:
            try:
                super().flush()
            except OSError as error:
                self.trouble = error


def take_streams() -> None:
    """Make the standard streams of this process `Console`s; before any other file is opened."""
    # A file that is opened while a standard stream is closed would take its number, and with it
    # what libraries print there.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)

    # A stream that someone else has put in the place of Python's own is his.
    if sys.stdout is sys.__stdout__:
        sys.stdout = sys.__stdout__ = _console(sys.stdout, 1)  # type: ignore[misc]
    if sys.stderr is sys.__stderr__:
        sys.stderr = sys.__stderr__ = _console(sys.stderr, 2)  # type: ignore[misc]


def trouble_of_output() -> OSError | None:
    """What kept standard output from being written; a reader that has gone is no trouble."""
    sys.stdout.flush()
    trouble = getattr(sys.stdout, "trouble", None)
    return None if isinstance(trouble, BrokenPipeError) else trouble


def _console(stream: TextIO | None, number: int) -> Console:
    """A stream as Console, with the encoding and buffering that it had; None is one that was
    closed."""
    if not isinstance(stream, io.TextIOWrapper):
        return Console(io.FileIO(number, "w", closefd=False), "utf-8", "backslashreplace")
    words = stream.encoding, "backslashreplace", None, stream.line_buffering, stream.write_through
    return Console(stream.detach(), *words)
