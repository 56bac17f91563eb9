"""Graphs: recorded work that is launched as one.

A graph knows addresses only. Whether what it uses is still there is looked up at every launch, as a
device would not. Memory that it has taken from a pool and given back begins with garbage each time.
"""

from cupy import _streams
from cupy._clocks import touch
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
        graph._nodes = capture.nodes
        graph._spans = {span for node in graph._nodes for span, _ in node.spans if span.segment}
        return graph

    def launch(self, stream=None):
        """Do all work of the graph, as one piece of work of a stream."""
        stream = _streams.current() if stream is None else stream
        if stream.is_capturing():
            raise NotImplementedError("stand-in: a graph within a graph is not written")
        count("launch", what="graph")
        count("graph")
        stream._clock.submit()
        for span in self._spans:
            _check(span)
        with stream:
            for node in self._nodes:
                count(f"graph_{node.kind}", node.n, node.what)
                for span, writes in node.spans:
                    _touch(stream._clock, span, writes)
                node.work()

    def upload(self, stream=None):
        """Bring the graph to the device, so that its first launch takes no longer than others."""


def _check(span):
    """Note memory that is no longer what it was when the work was recorded."""
    if span.segment.released:
        hazard("a graph uses memory that was given back to the device")
        return
    for chunk in span.segment.overlapping(span.start, span.stop):
        if chunk.serial == span.serial:
            continue
        if not chunk.serial and not span.captured:
            hazard("a graph uses memory that was freed")
        if chunk.serial and chunk.capture is None:
            hazard("a graph uses memory that belongs to another array by now")


def _touch(clock, span, writes):
    """Note an access to the chunks that have a span now."""
    if span.segment is not None:
        for chunk in span.segment.overlapping(span.start, span.stop):
            touch(clock, chunk, writes or chunk.serial != span.serial, in_graph=True)
