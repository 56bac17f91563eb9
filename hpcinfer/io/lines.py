"""Input files line by line in bounded memory. What the lines mean is decided elsewhere."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from typing import BinaryIO

from hpcinfer.io.atomic import AnyPath

MAX_LINE_BYTES = 64_000_000


# How packed files begin, what has packed them, and what unpacks them
_PACKED = (
    (b"\x1f\x8b", "gzip", "gunzip"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unzstd"),
    (b"BZh", "bzip2", "bunzip2"),
    (b"\xfd7zXZ\0", "xz", "unxz"),
    (b"PK\x03\x04", "zip", "unzip"),
)


@dataclass(frozen=True)
class LongLine:
    """Stands for a line that is too long to be held: its length in bytes, line end included."""

    nbytes: int


def read_lines(
    path: AnyPath, limit: int = MAX_LINE_BYTES
) -> Iterator[tuple[int, bytes | LongLine]]:
    """Read a file line by line.

    A UTF-8 byte order mark and line ends (LF or CR LF) are taken off. Blank lines of a .jsonl file
    are skipped; elsewhere they are lines as any other.

    Parameters
    ----------
    path : of the file
    limit : bytes of the longest line

    Yields
    ------
    line_number : from 1
    line : its bytes, or LongLine for one longer than `limit`

    Raises
    ------
    ValueError
        If the file cannot be read, is UTF-16, or is a pipe or a device.
    """
    skip_blank = os.fspath(path).lower().endswith(".jsonl")
    try:
        with _opened(path) as file:
            for number, line in enumerate(_bounded_lines(file, limit), 1):
                if number == 1 and isinstance(line, bytes):
                    line = _without_mark(path, line)
                if skip_blank and isinstance(line, bytes) and not line.strip():
                    continue
                yield number, line
    except OSError as error:
        raise ValueError(f"input: cannot read {path}: {error.strerror}") from None


def digest(path: AnyPath) -> str:
    """SHA-256 of a file's content (hex).

    Raises
    ------
    ValueError
        If the file cannot be read, or is a pipe or a device.
    """
    try:
        with _opened(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"input: cannot read {path}: {error.strerror}") from None


def _opened(path: AnyPath) -> BufferedReader:
    """The file `path`, opened for reading bytes; opening a pipe would wait for who writes it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        raise ValueError(
            f"input: got {path}, which is no plain file, need one, as it is read more than once; "
            "write it to a file first"
        )
    return os.fdopen(descriptor, "rb")


def _bounded_lines(file: BinaryIO, limit: int) -> Iterator[bytes | LongLine]:
    """Lines of a binary file without their ends; LongLine for those longer than `limit`."""
    most = limit + len(b"\r\n")
    while line := file.readline(most):
        # Pass over the rest of a line that does not fit
        nbytes, rest = len(line), line
        while len(rest) == most and not rest.endswith(b"\n"):
            rest = file.readline(most)
            nbytes += len(rest)

        line = line.removesuffix(b"\n").removesuffix(b"\r")
        yield line if nbytes <= most and len(line) <= limit else LongLine(nbytes)


def _without_mark(path: AnyPath, line: bytes) -> bytes:
    for magic, kind, command in _PACKED:
        if line.startswith(magic):
            raise ValueError(
                f"input: got {path} packed by {kind}, need plain text; unpack it by {command}"
            )
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"input: got {path} in UTF-16, need UTF-8; save it as UTF-8")
    return line.removeprefix(b"\xef\xbb\xbf")
