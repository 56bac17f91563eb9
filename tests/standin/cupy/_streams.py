"""Streams: work that is submitted, events, and the capture of work for a graph.

Work runs when it is submitted; what a device would do later shows all the same (`_clocks.py`,
`_copies.py`). While a stream captures, work is recorded and does not run.
"""

import itertools
import weakref
from dataclasses import dataclass

from cupy._clocks import everything, is_over, new_clock, null_clock, touch, wait
from cupy._facts import refuse
from cupy._notes import count

GLOBAL, THREAD_LOCAL, RELAXED = range(3)  # modes of a capture

_capturing = []  # clocks of the streams that capture


class CUDARuntimeError(RuntimeError):
    """What a call of CUDA's runtime answered."""


@dataclass(frozen=True)
class Node:
    """One piece of recorded work.

    Attributes
    ----------
    what, kind, n : as `submit` takes them
    work : function that does it
    spans : list of (Span, True if it is written)
    """

    what: str
    kind: str
    n: int
    work: object
    spans: list


class Capture:
    """Work that a stream records.

    Attributes
    ----------
    nodes : list of Node
    broken : True once something forbidden was tried
    """

    def __init__(self, mode):
        self.nodes, self.mode, self.broken = [], mode, False

    def allocate(self, span):
        """Note memory that is taken from a pool: what a launch finds there is garbage.

        Unless it is still in use then: whoever has it may have written there.
        """
        self.nodes.append(Node("alloc", "alloc", 0, lambda: span.is_whole or span.spoil(), []))


def submit(what, work, reads=(), writes=(), kind="launch", n=1):
    """Put work into the current stream: it runs now, or is recorded while the stream captures.

    Parameters
    ----------
    what : name, for the counts
    work : function without arguments
    reads, writes : arrays and pointers to memory of the device
    kind : what it is counted as
    n : how many of that kind
    """
    clock = current()._clock
    if clock is null_clock and any(c.waits_for_null for c in _capturing):
        break_capture("the null stream, which waits for the stream that captures", "Implicit")
    if clock.capture is not None:
        spans = [(x._span(), False) for x in reads] + [(x._span(), True) for x in writes]
        clock.capture.nodes.append(Node(what, kind, n, work, spans))
        return
    count(kind, n, what)
    clock.submit()
    for x in reads:
        touch(clock, x._chunk(), False)
    for x in writes:
        touch(clock, x._chunk(), True)
    work()


def wait_for_all(what):
    """Let the host wait for every stream, which is not allowed while one captures."""
    if _capturing:
        break_capture(f"{what}, a wait of the host")
    wait(what, everything())


# Rules of capture


def capturing():
    """The Capture that the current stream is recording, or None."""
    return current()._clock.capture


def refuse_in_capture(what):
    """Refuse what CUDA or CuPy does not do in a stream that captures."""
    if capturing() is not None:
        break_capture(what)


def break_capture(what, error="Unsupported"):
    """Spoil the captures under way, and say why."""
    for clock in _capturing:
        clock.capture.broken = True
    raise CUDARuntimeError(
        f"cudaErrorStreamCapture{error}: operation not permitted when stream is capturing ({what})"
    )


def is_any_capturing():
    """True if some stream captures."""
    return bool(_capturing)


def refuse_unsafe(what):
    """Refuse a call that CUDA allows beside captures of relaxed mode only."""
    if any(clock.capture.mode != RELAXED for clock in _capturing):
        break_capture(what)


class Stream:
    """A stream, as CuPy's.

    Attributes
    ----------
    ptr : its number, 0 for the null stream
    """

    null = None
    _known = weakref.WeakValueDictionary()
    _numbers = itertools.count(0x1000, 0x10)

    def __init__(self, null=False, non_blocking=False, ptds=False, priority=None):
        refuse("Stream", ptds=ptds or None, priority=priority)
        self.ptr, self.device_id = (0, -1) if null else (next(self._numbers), 0)
        self._clock = null_clock if null else new_clock(waits_for_null=not non_blocking)
        if not null:
            Stream._known[self.ptr] = self

    @classmethod
    def _of(cls, ptr):
        """The stream of a number."""
        return cls._known[ptr] if ptr else cls.null

    def __eq__(self, other):
        return isinstance(other, Stream) and self.ptr == other.ptr

    def __hash__(self):
        return self.ptr

    def __enter__(self):
        _current.append(self)
        return self

    def __exit__(self, *_):
        _current.pop()

    def use(self):
        """Make this the current stream."""
        _current[-1] = self
        return self

    @property
    def done(self):
        """True if the host knows that all work is over."""
        self._refuse_query("query of a stream")
        return is_over({self._clock: self._clock.time})

    def synchronize(self):
        """Let the host wait for all work of this stream."""
        self._refuse_query("Stream.synchronize")
        wait("stream", self._clock.known())

    def record(self, event=None):
        """Record an event, by default a new one."""
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event):
        """Let later work of this stream wait for an event."""
        if self._clock.capture is not None and event._capture is not self._clock.capture:
            break_capture("wait_event for work outside of the capture", "Isolation")
        if self._clock.capture is None and event._capture is not None:
            raise NotImplementedError("stand-in: a capture over several streams is not written")
        self._clock.learn(event._known)

    def begin_capture(self, mode=None):
        """Record work of this stream from now on, instead of doing it."""
        if self.ptr == 0:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        if self._clock.capture is not None:
            break_capture("begin_capture, of a stream that captures")
        self._clock.capture = Capture(RELAXED if mode is None else mode)
        _capturing.append(self._clock)
        count("capture")

    def end_capture(self):
        """The Graph of what was recorded."""
        from cupy._graphs import Graph

        capture, self._clock.capture = self._clock.capture, None
        if capture is None:
            raise CUDARuntimeError("cudaErrorIllegalState: the stream does not capture")
        _capturing.remove(self._clock)
        if capture.broken:
            raise CUDARuntimeError(
                "cudaErrorStreamCaptureInvalidated: operation failed due to a previous error "
                "during capture"
            )
        return Graph._of(capture)

    def is_capturing(self):
        """True between begin_capture and end_capture."""
        return self._clock.capture is not None

    @property
    def is_non_blocking(self):
        """True if this stream and the null stream do not wait for each other."""
        return not self._clock.waits_for_null and self.ptr != 0

    def _refuse_query(self, what):
        if self._clock.capture is not None:
            break_capture(what)


Stream.null = Stream(null=True)
_current = [Stream.null]


def current():
    """The current stream."""
    return _current[-1]


class Event:
    """A point in a stream. It is done only once the host has waited for it: the slowest device."""

    def __init__(self, block=False, disable_timing=False, interprocess=False):
        refuse("Event", interprocess=interprocess or None)
        self._known, self._capture = {}, None
        count("event")

    def record(self, stream=None):
        """Have the event stand for all work that a stream was given so far."""
        clock = (current() if stream is None else stream)._clock
        self._capture = clock.capture
        self._known = {} if self._capture is not None else clock.known()

    @property
    def done(self):
        """True if the host knows that the work is over."""
        self._refuse_captured()
        return is_over(self._known)

    def synchronize(self):
        """Let the host wait for the work."""
        self._refuse_captured()
        wait("event", self._known)

    def _refuse_captured(self):
        if self._capture is not None:
            raise CUDARuntimeError(
                "cudaErrorCapturedEvent: operation not permitted on an event last recorded in a "
                "capturing stream"
            )
