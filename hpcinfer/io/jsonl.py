"""JSON lines of output that survive a killed job.

Each line goes to the file in one system call as soon as it is there, so a job that is killed keeps
what it finished, in the order of finishing. When all is done the lines are put in input order.
"""

import contextlib
import json
import math
import os

from hpcinfer.io.atomic import lock, refuse_directory, replacing, writing


class JsonlWriter:
    """Writes one line per record of the input.

    Parameters
    ----------
    path : str
    index_of : callable (dict) -> int or None, or None
        If given, the complete lines of an existing file are kept (its torn last line is cut off);
        it says which record of the input a line belongs to, None for lines to leave out at the end.
        If None, an existing file is emptied.

    Attributes
    ----------
    done : view of the indices written so far, those of a resumed file among them

    Raises
    ------
    ValueError
        If a complete line of the file to resume is not JSON.
    RuntimeError
        Here and in all methods, if the file cannot be written.
    """

    def __init__(self, path, index_of=None):
        self.path = os.fspath(path)
        self._offset = {}
        self._end = 0
        with writing(self.path):
            refuse_directory(self.path)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            self._descriptor = os.open(self.path, flags, 0o666)
            try:
                lock(self._descriptor)
                if index_of:
                    self._resume(index_of)
                if os.path.isfile(self.path):
                    os.ftruncate(self._descriptor, self._end)
            except BaseException:
                os.close(self._descriptor)
                raise

    @property
    def done(self):
        return self._offset.keys()

    def write(self, index, record):
        """Append the line of input record `index`.

        Parameters
        ----------
        index : int; if it was written before, the last line counts
        record : dict, or bytes without line end
        """
        line = (record if isinstance(record, bytes) else encode(record)) + b"\n"
        with writing(self.path):
            written = 0
            try:
                while written < len(line):
                    written += os.write(self._descriptor, line[written:])
            except OSError:
                # Take back the part of a line for which there was room
                with contextlib.suppress(OSError):
                    os.ftruncate(self._descriptor, self._end)
                raise
        self._offset[index] = self._end
        self._end += len(line)

    def lines(self, ordered=True):
        """Yield every line (bytes with its end), in input order or in the order of finishing."""
        offsets = sorted(self._offset) if ordered else self._offset
        with open(self.path, "rb") as file:
            for index in offsets:
                file.seek(self._offset[index])
                yield file.readline()

    def close(self, final=True):
        """Close the file; if `final`, put its lines in input order first, on the disk."""
        if self._descriptor is None:
            return
        os.close(self._descriptor)
        self._descriptor = None
        if final:
            with replacing(self.path) as partial, open(partial, "wb") as file:
                file.writelines(self.lines())

    def __enter__(self):
        return self

    def __exit__(self, kind, *details):
        self.close(final=kind is None)

    def _resume(self, index_of):
        """Note where the complete lines begin and where the last of them ends."""
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                index = index_of(_decode(self.path, number, line))
                if index is not None:
                    self._offset[index] = self._end
                self._end += len(line)


def encode(record, strict=True):
    """One line of JSON (bytes, without its end) for a record of plain values, NumPy's among them.

    Parameters
    ----------
    record : dict
    strict : bool
        JSON knows no infinities and no NaN: if True they become null, if False they are written
        as Python's json reads them.
    """

    def text(value):
        return json.dumps(value, ensure_ascii=False, allow_nan=not strict, default=_plain)

    try:
        line = text(record)
    except ValueError:
        line = text(_finite(record))

    # Half of a surrogate pair has no UTF-8 form, but one as a JSON escape
    return line.encode("utf-8", "backslashreplace")


def _plain(value):
    """A NumPy array or scalar as Python values."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"output: got a {type(value).__name__} in a record, need plain values")


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if hasattr(value, "tolist"):
        return _finite(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _decode(path, number, line):
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise ValueError(
            f"output: got line {number} of {path} which is no result, need the unfinished output "
            "of an earlier run; choose another name or do not resume"
        )
    return record
