"""Timelines are written as they come: memory stays bounded, what a killed job left can be read."""

import json
from types import SimpleNamespace

import pytest

from hpcinfer import ledger
from hpcinfer.io.trace import Trace, open_trace

pytestmark = pytest.mark.single

EVENT = ("Allreduce", "tp", "half", 1.5, 0.25, 64.0)


def test_events_come_in_pieces_to_one_file(tmp_path):
    open_trace(tmp_path, 3)
    trace = Trace(tmp_path, 3)
    for n in (2, 0, 3):
        trace.write([EVENT] * n)
    left = json.loads((tmp_path / "rank-3.json").read_text() + "]}")["traceEvents"]
    trace.close([EVENT])
    events = json.loads((tmp_path / "rank-3.json").read_text())["traceEvents"]
    assert len(left) == 5 and len(events) == 6 and events[:5] == left
    assert events[0]["ts"] == 1.5e6 and events[0]["dur"] == 0.25e6 and events[0]["pid"] == 3

    # The next run's replaces it; one without calls is whole too
    open_trace(tmp_path, 3)
    Trace(tmp_path, 3).close([])
    assert json.loads((tmp_path / "rank-3.json").read_text())["traceEvents"] == []


def test_a_ledger_holds_few_events(monkeypatch):
    monkeypatch.setattr(ledger, "_EVENTS", 10)
    own, taken = ledger.Ledger(), []
    own.trace(lambda events: taken.extend(events))
    comm = SimpleNamespace(Get_name=lambda: "tp")
    for _ in range(25):
        own.enter(own.begin("Bcast", comm, "test"), 8.0)
        assert len(own.events) < 10
    assert len(taken) == 20 and len(own.events) == 5 and own.calls() == 25
