"""The ledger's calls as a timeline that Chrome's tracing page and Perfetto show."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable

from hpcinfer.io.atomic import AnyPath, replacing, try_to_write, writing

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


def write_trace(
    folder: AnyPath, rank: int, events: Iterable[tuple[str, str, str, float, float, int]]
) -> str:
    """Write ``rank-R.json`` in `folder`.

    Parameters
    ----------
    folder : as `open_trace` has made it
    rank : number of this rank, the process in the picture
    events : (verb, axis, purpose, start_s, time_s, sent_bytes) of each call

    Returns
    -------
    path of the file
    """
    # The tracing page wants microseconds
    path = trace_file(folder, rank)
    rows = [
        {
            "name": f"{verb} {purpose}",
            "cat": axis,
            "ph": "X",
            "pid": rank,
            "tid": axis,
            "ts": start_s * 1e6,
            "dur": time_s * 1e6,
            "args": {"sent_bytes": sent_bytes},
        }
        for verb, axis, purpose, start_s, time_s, sent_bytes in events
    ]
    with replacing(path) as partial, open(partial, "w") as file:
        json.dump({"traceEvents": rows, "displayTimeUnit": "ms"}, file)
    return path
