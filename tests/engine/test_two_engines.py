"""Engines of one process do not touch each other, and give back what they hold."""

import numpy as np
import pytest
from helpers.paths import SHIPPED
from mpi4py import MPI

import hpcinfer
from hpcinfer import node
from hpcinfer.errors import is_agreed
from hpcinfer.grid import Grid, grid_of
from hpcinfer.layout import parse_layout
from hpcinfer.ledger import ledger
from hpcinfer.ops import dispatch

PROMPT = "What is 27 + 45?"


def shipped(comm, layout=None, **options):
    options = {"kv_memory": 20_000_000, "context": 256, "dtype": "float32"} | options
    return hpcinfer.load(SHIPPED, comm, layout, **options)


def answer(engine):
    """Tokens of one greedy answer."""
    [result] = engine.generate([PROMPT], max_tokens=4, temperature=0)
    return result.choices[0].token_ids


def sent(engine):
    """What an engine has sent, without seconds."""
    entries = engine.ledger.entries
    return {key: (entry.calls, entry.sent_bytes) for key, entry in entries.items()}


def test_a_second_load_leaves_the_first_ledger(comm):
    """Each of two engines on the same communicator counts its own calls, and no others."""
    with shipped(comm) as a:
        tokens, before = answer(a), sent(a)
        assert before and (comm.size == 1 or any(nbytes for _, nbytes in before.values()))
        with shipped(comm) as b:
            assert sent(a) == before and not sent(b)
            assert answer(b) == tokens and sent(b) == before
            b.score([PROMPT])
            assert sent(a) == before and sent(b) != before
        report = a.stats.report(a)
        assert (report is None) == (comm.rank > 0)
        lines = [] if report is None else [line for line in report if line.startswith("mpi")]
        assert len(lines) == sum(nbytes > 0 for _, nbytes in before.values()) * (comm.rank == 0)
        assert answer(a) == tokens


def test_calls_outside_of_engines_are_not_theirs(comm):
    with shipped(comm) as engine:
        before = sent(engine)
        hpcinfer.collectives.Allreduce(engine.grid.tp, np.ones(3, np.float32), purpose="mine")
        assert sent(engine) == before
        assert ledger.calls(purpose="mine") > 0


def test_engines_on_different_communicators(comm):
    """Halves of the ranks have an engine each, beside one of all ranks."""
    half = comm.Split(comm.rank * 2 // comm.size, comm.rank)
    with shipped(comm) as whole:
        tokens = answer(whole)
        with shipped(half) as own:
            assert answer(own) == tokens
            before = sent(whole)
            answer(own)
            assert sent(whole) == before
        assert answer(whole) == tokens
    half.Free()


def test_kernels_and_threads_are_those_of_the_engine(comm, monkeypatch):
    """They are set when an engine works, and others find theirs."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    a = shipped(comm, kernels="plain")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    b = shipped(comm)
    found = []
    for engine in (a, b, a):
        engine.observers = [lambda *_: found.append((dispatch.choice(), node.threads()))]
        answer(engine)
        assert set(found) == {("plain", 1) if engine is a else ("auto", 2)}
        found.clear()
    assert dispatch.choice() == "auto"
    node.use_threads(1)
    a.close()
    b.close()


def test_reports_of_interleaved_calls(comm, monkeypatch):
    """Each tells of its own tokens, messages and threads, whoever worked last."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with shipped(comm) as a:
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        with shipped(comm) as b:
            for engine in (a, b, a, b, b):
                answer(engine)
                engine.score([PROMPT])
            reports = [engine.stats.report(engine) for engine in (a, b)]
            assert a.stats.answered == 4 and b.stats.answered == 6
            assert a.stats.decode.steps * 3 == b.stats.decode.steps * 2
            calls = [engine.ledger.calls("Allreduce", "tp", "log_softmax") for engine in (a, b)]
            assert calls[0] * 3 == calls[1] * 2
    node.use_threads(1)
    if comm.rank == 0:
        for threads, lines in enumerate(reports, 1):
            assert lines[0].endswith(f"threads per rank {threads}")


def test_a_closed_engine_says_so(comm):
    engine = shipped(comm)
    engine.close()
    engine.close()
    for call in (engine.generate, engine.score, engine.extract):
        with pytest.raises(RuntimeError, match=r"^engine: got a call after close"):
            call([PROMPT])
    with pytest.raises(RuntimeError, match=r"^engine: got a call after close"):
        engine.stats.report(engine)


def test_an_error_does_not_wait_for_the_others(comm):
    """Who leaves the block by an error closes nothing, which would be collective."""
    with pytest.raises(KeyError), shipped(comm) as engine:
        raise KeyError
    assert answer(engine)
    engine.close()


@pytest.mark.timeout(120)
def test_communicators_are_given_back(comm):
    """More engines than MPI has communicators for, one after the other, and two at a time."""
    layout = f"tp={comm.size}"
    with shipped(comm, layout) as first:
        with shipped(comm, layout) as second:
            assert second.grid.tp is first.grid.tp
        assert answer(first)
    alone, parsed = comm.Dup(), parse_layout(layout, comm.size)
    for make in (grid_of, Grid):
        for _ in range(300):
            grid = make(alone, parsed)
            grid.release()
            grid.release()
            assert grid.comm == MPI.COMM_NULL
    alone.Free()


@pytest.mark.parametrize(
    "wrong",
    [
        {"layout": "tp=0"},
        {"kernels": "quick"},
        {"dtype": "int3"},
        {"seed": -1.5},
        {"kv_memory": 1},
        {"context": 0},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_load_that_fails_keeps_nothing(comm, wrong):
    """All ranks refuse alike, so that the communicators are given back, if there were any."""
    own = comm.Dup()
    layout = parse_layout(None, comm.size)
    with pytest.raises(ValueError) as raised:
        shipped(own, **wrong)
    assert is_agreed(raised.value)
    grid = grid_of(own, layout)
    grid.release()
    assert grid.comm == MPI.COMM_NULL
    own.Free()


@pytest.mark.mpi(min_size=2)
def test_each_kind_of_grid_is_freed(comm):
    """Sides, experts and split communicators too."""
    for layout in ("afd=1:1", "dp=2", "cp=2,decode=tree", "pp=2"):
        own = comm.Split(int(comm.rank > 1), comm.rank)
        if comm.rank < 2:
            with shipped(own, layout, kv_memory=2 << 20, context=64) as engine:
                assert engine.grid.comm != MPI.COMM_NULL and answer(engine)
            assert engine.grid.comm == MPI.COMM_NULL
        own.Free()
