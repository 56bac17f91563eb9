"""Clocks: which work is over when other work begins, for streams and for the host.

All memory knows which stream has last read and written it, and when. Every stream knows how far the
others had come when it last waited for them (vector clocks, Fidge 1988, Mattern 1989). So work of
two streams on the same memory without an order is a hazard, whatever the timing.
"""

from cupy._notes import count, hazard


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
            for clock in _clocks:
                if clock.waits_for_null:
                    self.learn(clock.knows | {clock: clock.time})
        elif self.waits_for_null:
            self.learn(null_clock.knows | {null_clock: null_clock.time})


null_clock = Clock(waits_for_null=False)
_clocks = [null_clock]
_host = {}  # clock -> number of its work that the host knows to be over
_under_way = []  # (clock, number, function that ends the copy)


def _merge(known, more):
    for clock, number in more.items():
        if number > known.get(clock, 0):
            known[clock] = number


def new_clock(waits_for_null):
    """Clock of a new stream."""
    _clocks.append(Clock(waits_for_null))
    return _clocks[-1]


def everything():
    """All work of all streams so far: clock -> number."""
    known = {}
    for clock in _clocks:
        _merge(known, clock.known())
    return known


def touch(clock, chunk, writes, in_graph=False):
    """Note that the last work of a stream uses a chunk of memory, and what is wrong with that.

    Parameters
    ----------
    chunk : Chunk, or None for no memory
    """
    if chunk is None:
        return
    if chunk.serial and not chunk.written:
        if not writes:
            hazard("memory is read before anything was written there")
        elif chunk.capture is not None and not in_graph:
            hazard("memory that was taken in a capture is used before its graph is launched")
        chunk.written = True
    for before in chunk.log if writes else chunk.log[1:]:
        for other, number in before.items():
            known = max(clock.knows.get(other, 0), _host.get(other, 0))
            if other is not clock and number > known:
                hazard("two streams use the same memory and neither waits for the other")
    chunk.log[1 if writes else 0][clock] = clock.time


def finished(chunk):
    """True if the host knows that all work on a chunk of memory is over."""
    return chunk is None or all(map(is_over, chunk.log))


def until_waited(clock, end):
    """Have a function called when the host has waited for the last work of a stream."""
    _under_way.append((clock, clock.time, end))


def wait(what, known):
    """Let the host wait for work, which counts unless it is known to be over: clock -> number."""
    count("sync", 0 if is_over(known) else 1, what)
    _merge(_host, known)
    items, _under_way[:] = _under_way[:], []
    for clock, number, end in items:
        if number <= _host.get(clock, 0):
            end()
        else:
            _under_way.append((clock, number, end))


def is_over(known):
    """True if the host knows that some work is over: clock -> number."""
    return all(number <= _host.get(clock, 0) for clock, number in known.items())
