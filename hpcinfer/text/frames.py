"""What this process and the one that encodes for it send each other.

A request is its length, what answering it may take, and JSON; an answer is its length and JSON.
"""

from __future__ import annotations

import json
import os
import select
import struct
import time
from dataclasses import dataclass
from typing import Any

# Bytes of the JSON, bytes of memory, seconds of processor time
REQUEST, ANSWER = struct.Struct("<QQd"), struct.Struct("<Q")

# Exit code of a process that Python could get no memory for
OUT_OF_MEMORY = 77


@dataclass(frozen=True)
class Allowance:
    """What one request may take: memory of the whole process, and processor time."""

    memory_bytes: int
    seconds: float


def as_json(value: Any) -> bytes:
    """JSON of a value; half a surrogate pair stays what it is, as an escape."""
    return json.dumps(value, separators=(",", ":")).encode()


def send(pipe: int, head: bytes, body: bytes) -> None:
    """Write a frame, at once where the pipe takes it; raises OSError if nobody reads any more."""
    left = memoryview(head + body)
    while left:
        left = left[os.write(pipe, left) :]


def receive(pipe: int, n_bytes: int, seconds: float | None = None) -> bytearray:
    """The next bytes of a pipe.

    Parameters
    ----------
    pipe : descriptor to read from
    n_bytes : how many
    seconds : to wait for all of them, None for ever

    Raises
    ------
    EOFError
        If the pipe is closed before.
    TimeoutError
        If they do not come in time.
    """
    end_s = None if seconds is None else time.monotonic() + seconds
    data = bytearray()
    while len(data) < n_bytes:
        if end_s is not None:
            left_s = max(0.0, end_s - time.monotonic())
            if not select.select([pipe], [], [], left_s)[0]:
                raise TimeoutError
        part = os.read(pipe, min(n_bytes - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return data
