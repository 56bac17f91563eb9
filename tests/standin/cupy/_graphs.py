"""Graphs: recorded work that is launched as one.

A graph knows addresses only. Whether what it uses is still there is looked up at every launch, as a
device would not; and the memory that it has for itself begins with garbage each time.
"""

from cupy import _streams
from cupy._notes import count, hazard


class Graph:
    """Work that a stream has captured; made by `Stream.end_capture`."""

    def __init__(self, *args, **options):
        raise NotImplementedError(
            "currently this class cannot be initiated by the user and must be created via stream "
            "capture"
        )

    @classmethod
    def _of(cls, capture):
        graph = object.__new__(cls)
        graph._nodes, graph._allocated = capture.nodes, capture.allocated
        graph._own = frozenset(span.serial for span in capture.allocated)
        return graph

    def launch(self, stream=None):
        """Do all work of the graph, as one piece of work of a stream."""
        stream = _streams.current() if stream is None else stream
        if stream.is_capturing():
            raise NotImplementedError("stand-in: a graph within a graph is not written")
        count("launch", what="graph")
        count("graph")
        stream._clock.submit()
        spans = {span: writes for node in self._nodes for span, writes in node.spans}
        for span in spans:
            self._check(span)
        self._spoil()
        with stream:
            for node in self._nodes:
                count(f"graph_{node.kind}", node.n, node.what)
                for span, writes in node.spans:
                    _touch(stream._clock, span, writes)
                node.work()

    def upload(self, stream=None):
        """Bring the graph to the device, so that its first launch takes no longer than others."""

    def _check(self, span):
        """Note memory that is no longer what it was when the work was recorded."""
        if span.segment is None:
            return
        if span.segment.released:
            hazard("a graph uses memory that was given back to the device")
            return
        for chunk in span.segment.overlapping(span.start, span.stop):
            own = chunk.serial == span.serial or chunk.captured
            if chunk.serial and not own:
                hazard("a graph uses memory that belongs to another array by now")
            if not chunk.serial and span.serial not in self._own:
                hazard("a graph uses memory that was freed")

    def _spoil(self):
        """Put garbage in memory that was allocated in the capture and freed since."""
        for span in self._allocated:
            for chunk in span.segment.overlapping(span.start, span.stop):
                if chunk.serial != span.serial:
                    start = max(span.start, chunk.start)
                    stop = min(span.stop, chunk.start + chunk.size)
                    span.segment.bytes[start:stop] = _streams.GARBAGE


def _touch(clock, span, writes):
    if span.segment is not None:
        for chunk in span.segment.overlapping(span.start, span.stop):
            _streams.touch(clock, chunk.log, writes)
