"""What every call has sent: bytes, messages and seconds by collective, axis and purpose."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from hpcinfer import capture
from hpcinfer.heartbeat import here


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
    events : list of (verb, axis, purpose, start_s, time_s, sent_bytes), filled only if `tracing`
    """

    tracing: bool = False
    entries: dict = field(default_factory=lambda: defaultdict(Entry))
    events: list = field(default_factory=list)

    def begin(self, verb, comm, purpose):
        """Note that this rank enters a call; returns what `enter` takes when it has ended."""
        if verb != "Allreduce":
            capture.refuse(verb)
        call = here.call = verb, axis_name(comm), purpose, time.perf_counter()
        return call

    def enter(self, call, sent_bytes, time_s=None, test_s=0.0, flight_s=0.0):
        """Record a call that has just ended.

        The times are as in `Entry`; a blocking call gives none.
        """
        here.call, here.calls = None, here.calls + 1
        verb, axis, purpose, start_s = call
        if time_s is None:
            time_s = time.perf_counter() - start_s
        entry = self.entries[verb, axis, purpose]
        entry.calls += 1
        entry.sent_bytes += sent_bytes
        entry.time_s += time_s
        entry.test_s += test_s
        entry.flight_s += flight_s
        if self.tracing:
            self.events.append((verb, axis, purpose, start_s, time_s, sent_bytes))

    def enter_many(self, key, calls, sent_bytes, time_s):
        """Record calls of one (verb, axis, purpose) that were made without Python."""
        here.calls += calls
        entry = self.entries[key]
        entry.calls += calls
        entry.sent_bytes += sent_bytes
        entry.time_s += time_s

    def sent_bytes(self, verb=None, axis=None, purpose=None):
        """Bytes sent by this rank in the calls that match every argument that is given."""
        return sum(e.sent_bytes for e in self._select(verb, axis, purpose))

    def calls(self, verb=None, axis=None, purpose=None):
        """Number of the calls that match every argument that is given."""
        return sum(e.calls for e in self._select(verb, axis, purpose))

    def clear(self):
        """Forget everything recorded so far."""
        self.entries.clear()
        self.events.clear()

    def _select(self, *wanted):
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


def axis_name(comm):
    """Name of the grid axis that `comm` runs along (its MPI name)."""
    return comm.Get_name() or "comm"
