"""Steps that are captured once and replayed as CUDA graphs, with one copy of what differs.

While a step is captured its kernels are noted, not run. A sum over ranks by MPI cuts the step in
two graphs, between which the host makes the call. What host arrays a step's kernels read
(`launch.on_device`) lies end to end in one block of the device, which every replay fills anew.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import cupy
import numpy as np

from hpcinfer import array
from hpcinfer.array import Array
from hpcinfer.capture import Refused
from hpcinfer.heartbeat import here
from hpcinfer.ops.cuda.runtime.launch import counters

_ALIGN = 256  # bytes at which each part of the block begins
_ROOM = 1 << 20  # bytes of the block, unless more is asked for at once


class Memory:
    """Memory for what is made while capturing; graphs that run in turn may have one together.

    Attributes
    ----------
    pool : of the results of kernels
    block : (_ROOM,) uint8 of the device, what goes over before a replay
    """

    def __init__(self):
        self.pool = cupy.cuda.MemoryPool()
        self.block = cupy.empty(_ROOM, np.uint8)

        # Set counters to zero now: a capture would do so only once its graph is launched.
        counters(cupy, 1)

        # Two of the host take turns: the device may still read one while the next is written.
        self._staging = [array.page_locked((_ROOM,), np.uint8) for _ in range(2)]
        self._events = [cupy.cuda.Event(disable_timing=True) for _ in range(2)]
        self._turn = 0

    def staging(self) -> np.ndarray:
        """(_ROOM,) uint8, page-locked, that no copy reads any more."""
        self._turn = 1 - self._turn
        self._events[self._turn].synchronize()
        return self._staging[self._turn]

    def send(self, staging: np.ndarray, nbytes: int) -> None:
        """Start copying the first bytes of what `staging` has given last."""
        self.block[:nbytes].set(staging[:nbytes], stream=cupy.cuda.get_current_stream())
        self._events[self._turn].record()


class Capture:
    """What is done while a step is captured (`hpcinfer.capture`).

    Parameters
    ----------
    memory : Memory

    Attributes
    ----------
    refusal : why there will be no graph, or None
    defers : True, as nothing of the step is computed now
    """

    defers = True

    def __init__(self, memory):
        self._memory, self.refusal = memory, None
        self._stream = cupy.cuda.get_current_stream()
        self._parts, self._totals, self._uploads = [], [], Uploads(memory)

    def begin(self) -> None:
        """Begin to note what is launched."""
        self._allocator = cupy.cuda.using_allocator(self._memory.pool.malloc)
        self._allocator.__enter__()
        self._stream.begin_capture()

    def end(self) -> None:
        """End it, whatever has happened."""
        self._cut()
        self._allocator.__exit__(None, None, None)

    def refuse(self, reason: str) -> None:
        """Give the capture up: what would follow cannot be done now."""
        self.refusal = self.refusal or reason
        raise Refused(reason)

    def upload(self, build: Callable[[], np.ndarray], late: bool = False) -> Array:
        """Part of the block that holds what `build` returns before each replay."""
        return self._uploads.add(build, late)

    def pause(self, function: Callable[[], None]) -> None:
        """Have a function of Python called, behind what has been noted so far."""
        self._cut()
        self._parts.append(function)
        self._stream.begin_capture()

    def sum(self, key: Any, sent_bytes: int, window: Any) -> None:
        """Note a sum over one rank."""
        del window
        self._totals.append((key, sent_bytes))

    def graph(self) -> Graph:
        """Graph of what has been noted."""
        return Graph(self._parts, self._totals, self._uploads)

    def _cut(self):
        """End the graph under way, and keep it."""
        try:
            graph = self._stream.end_capture()
        except Exception as error:  # CUDA's own words for what it could not note
            self.refusal = self.refusal or str(error)
            return
        self._parts.append(partial(graph.launch, self._stream))


class Uploads:
    """Host arrays that go to the device in one copy."""

    def __init__(self, memory):
        self._memory, self._entries, self._used = memory, [], 0
        self._staging = None

    def add(self, build: Callable[[], np.ndarray], late: bool) -> Array:
        """Array of the device for what `build` returns; `send` writes it."""
        x = build()
        start, stop = self._used, self._used + x.nbytes
        if stop > _ROOM:
            raise Refused(f"{stop} bytes of tables")
        self._used = -(-stop // _ALIGN) * _ALIGN
        self._entries.append((late, build, start, x.dtype, x.shape))
        return self._memory.block[start:stop].view(x.dtype).reshape(x.shape)

    def prepare(self) -> None:
        """Have all entries at hand as they are now."""
        self._staging = self._memory.staging()
        self._write(self._entries)

    def send(self, prepared: bool) -> None:
        """Copy what all entries are now, of which only the late ones have changed if `prepared`."""
        if prepared:
            self._write(entry for entry in self._entries if entry[0])
        else:
            self.prepare()
        if self._used:
            self._memory.send(self._staging, self._used)

    def _write(self, entries):
        for _, build, start, dtype, shape in entries:
            x = build()
            if x.shape != shape or x.dtype != dtype:
                raise RuntimeError(f"graph: got {x.dtype} {x.shape}, need {dtype} {shape}")
            self._staging[start : start + x.nbytes].view(dtype).reshape(shape)[...] = x


class Graph:
    """A captured step; made by `Capture.graph`.

    Attributes
    ----------
    totals : list of (key, calls, sent_bytes) of the sums that are made without Python
    """

    def __init__(self, parts, sums, uploads):
        self._parts, self._uploads = parts, uploads
        of_keys = defaultdict(list)
        for key, sent_bytes in sums:
            of_keys[key].append(sent_bytes)
        self.totals = [(key, len(sent), sum(sent)) for key, sent in of_keys.items()]

    def prepare(self) -> None:
        """Make ready what the next replay reads, but for what is known at the last moment."""
        self._uploads.prepare()

    def replay(self, prepared: bool = False) -> None:
        """Start the step; returns 0 s, as only calls wait in it that count for themselves."""
        self._uploads.send(prepared)
        for part in self._parts:
            here.call = None
            part()
        return 0.0
