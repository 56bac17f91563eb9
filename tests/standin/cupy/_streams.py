"""Streams: the order of work, copies under way, events, and the capture of work for a graph.

Work runs when it is submitted. What a device would do later shows all the same:

- A copy between page-locked memory and the device ends when the host has waited for it. Until
  then the host finds garbage where it is to read, and what it writes where the device is to read
  is a hazard.
- All memory knows which stream has last read and written it, and when. Every stream knows how far
  the others had come when it last waited for them (vector clocks, Fidge 1988, Mattern 1989). So
  work of two streams on the same memory without an order is a hazard, whatever the timing.
- While a stream captures, work is recorded and does not run.
"""

import itertools
import os
import weakref
from dataclasses import dataclass

import numpy as np

from cupy._facts import refuse
from cupy._notes import count, hazard

DRY = os.environ.get("STANDIN_DRY") == "1"
GARBAGE = 0 if DRY else 0xFF  # NaN in every floating type


class CUDARuntimeError(RuntimeError):
    """What a call of CUDA's runtime answered."""


class Clock:
    """The work of one stream, numbered.

    Attributes
    ----------
    time : number of the last piece of work
    knows : clock -> number of its work that is over before what is submitted here from now on
    waits_for_null : True for streams that the null stream waits for, and they for it
    capture : Capture under way, or None
    """

    def __init__(self, waits_for_null):
        self.time, self.knows, self.capture = 0, {}, None
        self.waits_for_null = waits_for_null

    def learn(self, known):
        """Wait for work of other streams: clock -> number."""
        _merge(self.knows, known)

    def known(self):
        """What is over once all work submitted so far is: clock -> number, its own included."""
        self._meet_null()
        return self.knows | {self: self.time}

    def submit(self):
        """Number one more piece of work."""
        self._meet_null()
        self.time += 1

    def _meet_null(self):
        if self is null_clock:
            for clock in _waiting_for_null:
                self.learn(clock.knows | {clock: clock.time})
        elif self.waits_for_null:
            self.learn(null_clock.knows | {null_clock: null_clock.time})


null_clock = Clock(waits_for_null=False)
_waiting_for_null = []
_capturing = []  # clocks whose streams capture
_host = {}  # clock -> number of its work that the host knows to be over
_under_way = []  # (clock, number, function that ends the copy)


def _merge(known, more):
    for clock, number in more.items():
        if number > known.get(clock, 0):
            known[clock] = number


# Work


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
        touch(clock, x._log(), False)
    for x in writes:
        touch(clock, x._log(), True)
    work()


def touch(clock, log, writes):
    """Note in a memory's log that the last work of a stream uses it; a hazard if others still may.

    Parameters
    ----------
    log : pair of dict clock -> number, the last reads and the last writes; None without memory
    """
    if log is None:
        return
    for before in log if writes else log[1:]:
        for other, number in before.items():
            known = max(clock.knows.get(other, 0), _host.get(other, 0))
            if other is not clock and number > known:
                hazard("two streams use the same memory and neither waits for the other")
    log[1 if writes else 0][clock] = clock.time


def finished(log):
    """True if the host knows that all work on a memory is over."""
    return log is None or all(
        number <= _host.get(clock, 0) for part in log for clock, number in part.items()
    )


def until_waited(end):
    """Have a function called when the host has waited for the last work of the current stream."""
    clock = current()._clock
    _under_way.append((clock, clock.time, end))


def wait(what, known):
    """Let the host wait for work: clock -> number."""
    count("sync", what=what)
    _merge(_host, known)
    items, _under_way[:] = _under_way[:], []
    for clock, number, end in items:
        if number <= _host.get(clock, 0):
            end()
        else:
            _under_way.append((clock, number, end))


def wait_for_all(what):
    """Let the host wait for every stream, which is not allowed while one captures."""
    if _capturing:
        break_capture(f"{what}, a wait of the host")
    known = null_clock.known()
    for clock in _clocks:
        _merge(known, clock.known())
    wait(what, known)


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


def refuse_unsafe(what):
    """Refuse a call that CUDA allows beside captures of relaxed mode only."""
    if any(clock.capture.mode != RELAXED for clock in _capturing):
        break_capture(what)


GLOBAL, THREAD_LOCAL, RELAXED = range(3)


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
        self._clock = null_clock if null else Clock(waits_for_null=not non_blocking)
        if null:
            return
        Stream._known[self.ptr] = self
        _clocks.append(self._clock)
        if not non_blocking:
            _waiting_for_null.append(self._clock)

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
        return _host.get(self._clock, 0) >= self._clock.time

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


_clocks = []
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
        return all(number <= _host.get(clock, 0) for clock, number in self._known.items())

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


# Copies between the host and the device


def bytes_of(host):
    """The memory of a contiguous NumPy array, in either order."""
    return host.reshape(-1, order="A").view(np.uint8)


def copy_from_host(host, x, watched):
    """Submit a copy to a device array `x`; what is watched is read until the host has waited."""
    a = x._a

    def work():
        a[...] = host
        if watched:
            raw = bytes_of(host)
            until_waited(_unchanged(raw, raw.copy()))

    submit("set", work, writes=[x], kind="h2d")


def _unchanged(raw, before):
    def end():
        if not np.array_equal(raw, before):
            hazard("page-locked memory was written while an asynchronous copy read it")

    return end


def copy_to_host(x, host):
    """Submit a copy of a device array `x`; the host finds garbage until it has waited."""
    a = x._a

    def work():
        value = a.copy()
        bytes_of(host)[...] = GARBAGE
        until_waited(lambda: np.copyto(host, value))

    submit("get", work, reads=[x], kind="d2h")
