"""JSON lines of output that survive a killed job.

Each line goes to the file in one system call as soon as it is there, so a job that is killed keeps
what it finished, in the order of finishing. When all is done the lines are put in input order.

Beside the file stands ``<path>.index`` as long as it is unfinished: for every line the index of its
record, its length and its checksum, written after the line. Who resumes the file takes a line for
whole only if it agrees with its entry.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import zlib
from collections.abc import Iterator, KeysView, Sequence
from types import TracebackType
from typing import Any

from hpcinfer.io.atomic import AnyPath, lock, open_own, refuse_directory, replacing, writing

INDEX_SUFFIX = ".index"
_APPEND = os.O_WRONLY | os.O_APPEND

Entry = tuple[int, int, int]  # of the index: place of the record, bytes of its line, their crc32


class JsonlWriter:
    """Writes one line per record of the input.

    Parameters
    ----------
    path : of the file
    resume : True to keep the lines of an unfinished file up to the first one that is not whole;
        False to empty an existing file
    least : records that the file to resume must have

    Attributes
    ----------
    done : view of the indices written so far, those of a resumed file among them

    Raises
    ------
    ValueError
        If the file to resume has lost records; it is left as it is.
    RuntimeError
        Here and in all methods, if the file cannot be written.
    """

    def __init__(self, path: AnyPath, resume: bool = False, least: int = 0) -> None:
        self.path = os.fspath(path)
        self.index_path = self.path + INDEX_SUFFIX
        self._offset: dict[int, int] = {}
        self._end = self._index_end = 0

        # Open both files, as far as whole lines go
        with writing(self.path), contextlib.ExitStack() as stack:
            refuse_directory(self.path)
            self._descriptor = os.open(self.path, _APPEND | os.O_CREAT, 0o666)
            stack.callback(os.close, self._descriptor)
            lock(self._descriptor)
            if resume:
                self._resume(least)
            self._index = open_own(self.index_path, _APPEND)
            stack.callback(os.close, self._index)
            if os.path.isfile(self.path):
                os.ftruncate(self._descriptor, self._end)
                os.ftruncate(self._index, self._index_end)
            stack.pop_all()
        self._is_open = True

    @property
    def done(self) -> KeysView[int]:
        return self._offset.keys()

    def write(self, index: int, record: dict[str, Any] | bytes) -> None:
        """Append the line of input record `index`.

        Parameters
        ----------
        index : of the input record; if it was written before, the last line counts
        record : plain values, or a line without its end
        """
        line = (record if isinstance(record, bytes) else encode(record)) + b"\n"
        entry = b"%d %d %08x\n" % (index, len(line), zlib.crc32(line))
        with writing(self.path):
            try:
                _write(self._descriptor, line)
                _write(self._index, entry)
            except OSError:
                # Take back the part of a line for which there was space
                for descriptor, end in (
                    (self._descriptor, self._end),
                    (self._index, self._index_end),
                ):
                    with contextlib.suppress(OSError):
                        os.ftruncate(descriptor, end)
                raise
        self._offset[index] = self._end
        self._end += len(line)
        self._index_end += len(entry)

    def sync(self) -> None:
        """Bring all lines so far to the disk."""
        with writing(self.path):
            if os.path.isfile(self.path):
                os.fsync(self._descriptor)
                os.fsync(self._index)

    def lines(self, ordered: bool = True) -> Iterator[bytes]:
        """Yield every line (bytes with its end), in input order or in the order of finishing."""
        indices = sorted(self._offset) if ordered else list(self._offset)
        with open(self.path, "rb") as file:
            for index in indices:
                file.seek(self._offset[index])
                yield file.readline()

    def close(self, final: bool = True) -> None:
        """Close the file; if `final`, put its lines in input order first, on the disk."""
        if not self._is_open:
            return
        self._is_open = False
        os.close(self._descriptor)
        os.close(self._index)
        if final:
            with replacing(self.path) as partial, open(partial, "wb") as file:
                file.writelines(self.lines())
            self.remove_index()

    def remove_index(self) -> None:
        """Forget which line is whose: the file is finished, or not wanted any more."""
        with writing(self.path):
            os.unlink(self.index_path)

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(final=kind is None)

    def _resume(self, least: int) -> None:
        """Note where the whole lines begin and where the last of them ends."""
        entries: list[Entry] = []
        if os.path.exists(self.index_path):
            with open(self.index_path, "rb") as file:
                entries = list(map(_entry, itertools.takewhile(_is_entry, file)))
        whole = self._whole(entries)

        # A run that was killed at its very end has left the lines in input order
        if len(whole) < len(entries):
            ordered = sorted({entry[0]: entry for entry in entries}.values())
            if len(self._whole(ordered)) == len(ordered):
                whole = ordered
                with replacing(self.index_path) as partial, open(partial, "wb") as file:
                    file.writelines(b"%d %d %08x\n" % entry for entry in whole)

        # Go on behind the last whole line
        for index, nbytes, _ in whole:
            self._offset[index] = self._end
            self._end += nbytes
        self._index_end = sum(len(b"%d %d %08x\n" % entry) for entry in whole)
        if len(self._offset) < least:
            raise ValueError(
                f"output: got {len(self._offset)} whole records in {self.path} and its "
                f"{INDEX_SUFFIX}, need the {least} that its run had written; restore the files, or "
                "start over with --restart"
            )

    def _whole(self, entries: Sequence[Entry]) -> list[Entry]:
        """The first of `entries` that agree with the lines of the file, one after the other."""
        with open(self.path, "rb") as file:
            return list(itertools.takewhile(lambda e: zlib.crc32(file.read(e[1])) == e[2], entries))


def _write(descriptor: int, data: bytes) -> None:
    """Write all of `data`."""
    written = 0
    while written < len(data):
        written += os.write(descriptor, data[written:])


def _is_entry(line: bytes) -> bool:
    """True for a whole entry of an index."""
    parts = line.split(b" ")
    return (
        line.endswith(b"\n")
        and len(parts) == 3
        and all(part.isdigit() for part in parts[:2])
        and len(parts[2]) == 9
        and not parts[2].strip(b"0123456789abcdef\n")
    )


def _entry(line: bytes) -> Entry:
    """(index, bytes, crc32) of an entry."""
    index, nbytes, crc32 = line.split()
    return int(index), int(nbytes), int(crc32, 16)


def encode(record: dict[str, Any], strict: bool = True) -> bytes:
    """One line of JSON (bytes, without its end) for a record of plain values, NumPy's among them.

    Parameters
    ----------
    record : plain values
    strict : JSON knows no infinities and no NaN: if True they become null, if False they are
        written as Python's json reads them
    """

    def text(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=not strict, default=_plain)

    try:
        line = text(record)
    except ValueError:
        line = text(_finite(record))

    # Half of a surrogate pair has no UTF-8 form, but one as a JSON escape
    return line.encode("utf-8", "backslashreplace")


def _plain(value: Any) -> Any:
    """A NumPy array or scalar as Python values."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"output: got a {type(value).__name__} in a record, need plain values")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if hasattr(value, "tolist"):
        return _finite(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
