"""What every call has sent: bytes, messages and seconds by collective, axis and purpose.

Calls are entered in the ledger of the engine at work (`entering`), others in `ledger`. Engines have
the communicators of a layout together, so that these cannot say whose a call is.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hpcinfer import capture
from hpcinfer.heartbeat import Call, here

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

Key = tuple[str, str, str]  # verb, axis and purpose
Event = tuple[str, str, str, float, float, float]

# Events that are held at most where somebody takes them.
_EVENTS = 10_000


@dataclass
class Entry:
    """Sum over the calls of one verb on one axis for one purpose.

    Attributes
    ----------
    calls : number of calls
    sent_bytes : bytes sent by this rank
    time_s : time that this rank spent starting calls and waiting in them: exposed, nothing hides it
    test_s : time in tests of calls under way; what MPI must copy itself it copies there
    flight_s : time from the start of a call under way until its end was noticed, the computation in
        between included; 0, as `test_s`, for blocking calls
    """

    calls: int = 0
    sent_bytes: float = 0.0
    time_s: float = 0.0
    test_s: float = 0.0
    flight_s: float = 0.0


@dataclass
class Ledger:
    """What this rank has sent: totals per (verb, axis, purpose), and on request every call.

    Attributes
    ----------
    entries : dict (verb, axis, purpose) -> Entry
    events : list of (verb, axis, purpose, start_s, time_s, sent_bytes), filled only if `tracing`,
        and handed on by the thousand where `trace` has said to whom
    """

    tracing: bool = False
    entries: dict[Key, Entry] = field(default_factory=lambda: defaultdict(Entry))
    events: list[Event] = field(default_factory=list)
    _take: Callable[[list[Event]], None] | None = None

    def begin(self, verb: str, comm: Comm, purpose: str) -> Call:
        """Note that this rank enters a call; returns what `enter` takes when it has ended."""
        if verb != "Allreduce":
            capture.refuse(verb)
        call = here.call = verb, axis_name(comm), purpose, time.perf_counter()
        return call

    def enter(
        self,
        call: Call,
        sent_bytes: float,
        time_s: float | None = None,
        test_s: float = 0.0,
        flight_s: float = 0.0,
    ) -> None:
        """Record a call that has just ended.

        The times are as in `Entry`; a blocking call gives none.
        """
        # Tell those that watch that the call has ended.
        here.call, here.calls = None, here.calls + 1

        # Add it to those of its kind.
        verb, axis, purpose, start_s = call
        if time_s is None:
            time_s = time.perf_counter() - start_s
        entry = self.entries[verb, axis, purpose]
        entry.calls += 1
        entry.sent_bytes += sent_bytes
        entry.time_s += time_s
        entry.test_s += test_s
        entry.flight_s += flight_s

        # Note it by itself for the timeline.
        if self.tracing:
            self.events.append((verb, axis, purpose, start_s, time_s, sent_bytes))
            if self._take is not None and len(self.events) >= _EVENTS:
                self._take(self.events)
                self.events.clear()

    def trace(self, take: Callable[[list[Event]], None]) -> None:
        """Note every call from now on, and hand lists of them to `take`, which keeps them."""
        self.tracing, self._take = True, take

    def enter_many(self, key: Key, calls: int, sent_bytes: float, time_s: float) -> None:
        """Record calls of one (verb, axis, purpose) that were made without Python."""
        here.calls += calls
        entry = self.entries[key]
        entry.calls += calls
        entry.sent_bytes += sent_bytes
        entry.time_s += time_s

    def sent_bytes(
        self, verb: str | None = None, axis: str | None = None, purpose: str | None = None
    ) -> float:
        """Bytes sent by this rank in the calls that match every argument that is given."""
        return sum(e.sent_bytes for e in self._select(verb, axis, purpose))

    def calls(
        self, verb: str | None = None, axis: str | None = None, purpose: str | None = None
    ) -> int:
        """Number of the calls that match every argument that is given."""
        return sum(e.calls for e in self._select(verb, axis, purpose))

    def clear(self) -> None:
        """Forget everything recorded so far."""
        self.entries.clear()
        self.events.clear()

    def _select(self, *wanted: str | None) -> Iterator[Entry]:
        for key, entry in self.entries.items():
            if all(w is None or w == k for w, k in zip(wanted, key, strict=True)):
                yield entry


# Of the calls that no engine makes.
ledger = Ledger()

_current = ledger


def current() -> Ledger:
    """The ledger that calls are entered in now."""
    return _current


@contextmanager
def entering(own: Ledger) -> Iterator[None]:
    """Enter the calls of the body in a ledger of its own."""
    global _current
    before, _current = _current, own
    try:
        yield
    finally:
        _current = before


def axis_name(comm: Comm) -> str:
    """Name of the grid axis that `comm` runs along (its MPI name)."""
    return comm.Get_name() or "comm"
