"""The ledger's calls as a timeline that Chrome's tracing page and Perfetto show."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable

from hpcinfer.io.atomic import AnyPath, replacing


def write_trace(
    folder: AnyPath, rank: int, events: Iterable[tuple[str, str, str, float, float, int]]
) -> str:
    """Write ``rank-R.json`` in `folder`.

    Parameters
    ----------
    folder : made if it does not exist
    rank : number of this rank, the process in the picture
    events : (verb, axis, purpose, start_s, time_s, sent_bytes) of each call

    Returns
    -------
    path of the file
    """
    # The tracing page wants microseconds
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"rank-{rank}.json")
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
