"""The ledger's calls as a timeline that Chrome's tracing page and Perfetto show."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable

from hpcinfer.io.atomic import AnyPath, try_to_write, writing

Event = tuple[str, str, str, float, float, float]

_BEGINNING = '{"traceEvents":'


def trace_file(folder: AnyPath, rank: int) -> str:
    """Name of a rank's timeline."""
    return os.path.join(folder, f"rank-{rank}.json")


def open_trace(folder: AnyPath, rank: int) -> None:
    """Make the folder, and make sure that this rank can write its timeline there.

    Raises
    ------
    RuntimeError
        If it cannot, or something else has its name.
    """
    path = trace_file(folder, rank)
    with writing(folder):
        os.makedirs(folder, exist_ok=True)
    try_to_write(path)

    # Another run's timeline is replaced, no other file is
    with writing(path), contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        if file.read(len(_BEGINNING)) not in (b"", _BEGINNING.encode()):
            raise RuntimeError(
                f"trace: got {path}, which is no timeline, need another folder for --trace"
            )


class Trace:
    """The timeline ``rank-R.json`` of a rank, written as it comes, in the form of Chrome's tracing.

    What a killed job has left ends in the middle of its list, which Perfetto takes.

    Parameters
    ----------
    folder : as `open_trace` has made it
    rank : number of this rank, the process in the picture
    """

    def __init__(self, folder: AnyPath, rank: int) -> None:
        self.path, self._rank, self._begun = trace_file(folder, rank), rank, False

    def write(self, events: Iterable[Event]) -> None:
        """Add calls: (verb, axis, purpose, start_s, time_s, sent_bytes) of each."""
        rows = [json.dumps(self._row(*event)) for event in events]
        before = ",\n" if self._begun else _BEGINNING + "[\n"
        with writing(self.path), open(self.path, "a" if self._begun else "w") as file:
            if rows or not self._begun:
                file.write((before if rows else _BEGINNING + "[") + ",\n".join(rows))
        self._begun = self._begun or bool(rows)

    def close(self, events: Iterable[Event]) -> None:
        """Add the last calls, and end the file."""
        self.write(events)
        with writing(self.path), open(self.path, "a") as file:
            file.write('\n],"displayTimeUnit":"ms"}\n')

    def _row(
        self, verb: str, axis: str, purpose: str, start_s: float, time_s: float, sent_bytes: float
    ) -> dict[str, object]:
        """A call as the tracing page wants it, in microseconds."""
        return {
            "name": f"{verb} {purpose}",
            "cat": axis,
            "ph": "X",
            "pid": self._rank,
            "tid": axis,
            "ts": start_s * 1e6,
            "dur": time_s * 1e6,
            "args": {"sent_bytes": sent_bytes},
        }
