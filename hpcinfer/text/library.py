"""Errors of the `tokenizers` library, which panics where it does not expect what it is given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def library_errors(need: str) -> Iterator[None]:
    """Make one line of whatever the body raises: a panic is a BaseException and no Exception."""
    try:
        yield
    except (MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"tokenizer: got {reason}, need {need}; check tokenizer.json") from None
