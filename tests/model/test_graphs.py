"""Steps that are replayed give what they give when Python makes their calls, and so do windows."""

import time
from functools import partial

import numpy as np
import pytest
from mpi4py import MPI
from reference import models
from reference.parity import greedy, on_root

from hpcinfer import node

pytest.importorskip("numba")

import hpcinfer
from hpcinfer import array, capture, collectives
from hpcinfer.engine import placement
from hpcinfer.engine.expert_load import ExpertLoad
from hpcinfer.grid import Grid
from hpcinfer.heartbeat import here
from hpcinfer.layout import parse_layout
from hpcinfer.model import frames, graphs
from hpcinfer.ops import inplace, norm
from hpcinfer.ops.cpu.runtime import launch
from hpcinfer.ops.cpu.runtime.graph import Capture, Memory

# Families, ropes, windows and norms whose heads have widths that compiled attention knows.
CAPTURED = (
    "llama-gqa",
    "llama-bias",
    "llama-rope-longrope",
    "mistral-full",
    "qwen3-window",
    "mixtral-window",
)
LAYOUTS = {1: ["tp=1"], 2: ["tp=2", "pp=2"], 3: ["tp=3"], 4: ["tp=4", "tp=2,pp=2"]}


def numbers(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def one_thread(monkeypatch):
    before = node.threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    node.use_threads(1)
    yield
    node.use_threads(before)


# ---- calls ----


def normed_twice(x, weight):
    """Two results, of which the first is not needed any more when there is the second."""
    y = norm.rms_norm(x, weight, 1e-6)
    return inplace.add_into(norm.rms_norm(y, weight, 1e-6), x)


@pytest.mark.single
def test_calls_are_made_again(one_thread):
    x, weight, memory = numbers((3, 64)), numbers(64, 1), Memory()
    with capture.capturing(Capture(memory, [x, weight])) as captured:
        y = normed_twice(x, weight)
    assert captured.refusal is None and capture.under_way is None
    graph = captured.graph()
    for seed in range(3):
        x[...] = numbers((3, 64), seed)
        memory.poison()
        assert np.isnan(y).all()
        graph.replay()
        np.testing.assert_array_equal(y, normed_twice(x, weight))


@pytest.mark.single
def test_memory_is_used_again(one_thread):
    x, weight, memory = numbers((3, 64)), numbers(64, 1), Memory()
    with capture.capturing(Capture(memory, [x, weight])):
        y = x
        for _ in range(10):
            y = norm.rms_norm(y, weight, 1e-6)
    assert len(memory.ranges) == 2


@pytest.mark.single
def test_calls_on_memory_of_python_are_refused(one_thread):
    x, weight = numbers((3, 64)), numbers(64, 1)
    with capture.capturing(Capture(Memory(), [x, weight])) as captured:
        norm.rms_norm(x + 1, weight, 1e-6)
    assert "_rms" in captured.refusal


@pytest.mark.single
def test_several_threads_are_refused(one_thread):
    x, weight = numbers((512, 1024)), numbers(1024, 1)
    node.use_threads(2)
    with capture.capturing(Capture(Memory(), [x, weight])) as captured:
        norm.rms_norm(x, weight, 1e-6)
    assert "threads" in captured.refusal


@pytest.mark.single
def test_python_is_called_between(one_thread):
    x, weight, seen = numbers((3, 64)), numbers(64, 1), []
    with capture.capturing(Capture(Memory(), [x, weight])) as captured:
        y = norm.rms_norm(x, weight, 1e-6)
        captured.pause(lambda: seen.append(y.copy()))
        inplace.add_into(y, x)
    captured.graph().replay()
    np.testing.assert_array_equal(seen[0], norm.rms_norm(x, weight, 1e-6))
    np.testing.assert_array_equal(y, seen[0] + x)


# ---- sums of a node ----


@pytest.fixture
def grid(comm):
    grid = Grid(comm, parse_layout(f"tp={comm.size}", comm.size))
    placement.take_sums(grid, array.select_device("cpu", 0))
    assert (collectives.reducer_of(grid.tp) is None) == (comm.size == 1)
    return grid


@pytest.mark.parametrize("n", [1, 7, 896, 5000, 20_000])
def test_sums_in_common_memory(comm, grid, n):
    """The last length has no room in a window, and goes by MPI."""
    of_ranks = [numbers(n, rank) for rank in range(comm.size)]
    expected = np.sum(of_ranks, axis=0, dtype=np.float64)
    for turn in range(20):
        x = of_ranks[comm.rank] * np.float32(turn)
        collectives.Allreduce(grid.tp, x)
        np.testing.assert_allclose(x, expected * turn, atol=2e-6 * comm.size * max(1, turn))
        assert len(set(comm.allgather(x.tobytes()))) == 1


def test_other_reductions_go_by_mpi(comm, grid):
    x = collectives.Allreduce(grid.tp, np.array([comm.rank], np.float32), MPI.MAX)
    assert x.tolist() == [comm.size - 1]
    x = collectives.Allreduce(grid.tp, np.array([comm.rank], np.int64))
    assert x.tolist() == [sum(range(comm.size))]


def test_a_rank_that_waits_lets_messages_pass(comm, grid):
    """The message is too long to leave before it is asked for, which only MPI's part does."""
    if comm.size == 1:
        pytest.skip("needs 2 ranks")
    data, request = numbers(1 << 20), None
    if comm.rank == 0:
        request = comm.Isend(data, 1)
    elif comm.rank == 1:
        time.sleep(0.2)
        got = np.empty_like(data)
        comm.Recv(got, 0)
        np.testing.assert_array_equal(got, data)
    x = collectives.Allreduce(grid.tp, np.ones(3, np.float32))
    assert x.tolist() == [comm.size] * 3
    if request is not None:
        request.Wait()


def test_a_replay_says_what_it_waits_in(comm, grid, one_thread):
    """The last rank comes late: the others are in the sum, where a watchdog sees them."""
    x, seen, layer, shared = numbers((2, 64)), [], here.layer, collectives.reducer_of(grid.tp)
    here.layer = 7
    lasting = [x, *([] if shared is None else shared.arrays())]
    with capture.capturing(Capture(Memory(), lasting)) as captured:
        y = inplace.copy_into(launch.empty((2, 64, 1), np.float32), x[..., None])
        collectives.Allreduce(grid.tp, y, purpose="a test")
    graph, here.layer = captured.graph(), None
    if shared is not None:
        wait = shared.wait
        shared.wait = lambda: (seen.append((here.call[:-1], here.layer)), wait())
    if comm.rank == comm.size - 1:
        time.sleep(0.3)
    graph.replay()
    np.testing.assert_allclose(y[..., 0], x * comm.size, rtol=1e-6)
    assert graph.totals == [
        (("Allreduce", "tp", "a test"), 1, 2 * x.nbytes * (comm.size - 1) / comm.size)
    ]
    if comm.rank < comm.size - 1:
        assert set(seen) == {(("Allreduce", "tp", "a test"), 7)}
    assert here.call is None
    here.layer = layer


# ---- models ----


def load(comm, path, case, layout):
    model = on_root(comm, partial(models.write_model, case, path / case, 1, "bfloat16"))
    return hpcinfer.load(model, comm=comm, layout=layout, kv_memory=1 << 24)


def answers(engine, case, monkeypatch, steps=None, **bounds):
    """Greedy tokens of some prompts, what was sent for them, and which experts they chose."""
    if steps is not None:
        monkeypatch.setitem(graphs._STEPS, "cpu", steps)
    for name, value in bounds.items():
        monkeypatch.setattr(frames, name, value)
    engine._forget(engine.scheduler.pages.n)  # no prompt is in the cache
    engine.model.expert_load.clear()
    engine.ledger.clear()
    prompts = [models.tokens(case, n) for n in (3, 30, 61, 100)]
    tokens = greedy(engine, prompts, 40) + greedy(engine, prompts[:2], 70)
    sent = {
        key: (entry.calls, round(entry.sent_bytes))
        for key, entry in engine.ledger.entries.items()
        if key[2] in ("attention", "ffn")
    }
    return tokens, sent, engine.expert_load().tolist()


@pytest.mark.parametrize("case", CAPTURED)
@pytest.mark.parametrize("i", range(2))
def test_replayed_steps_answer_alike(comm, shared_path, monkeypatch, one_thread, case, i):
    layouts = LAYOUTS.get(comm.size, [f"tp={comm.size}"])
    if i >= len(layouts):
        pytest.skip("no more layouts of so many ranks")
    engine = load(comm, shared_path, case, layouts[i])
    few = answers(engine, case, monkeypatch, steps=2)

    # A rank without heads, of which a small model may have some, computes otherwise.
    idle = comm.allreduce(engine.model.heads.n_query == 0, MPI.LOR)
    assert bool(engine.model.graphs.refusals) == idle
    assert bool(engine.model.graphs._known) != idle

    # A frame without room to spare is given up at every page.
    engine.model.allocate_cache(engine.scheduler.pages.n)
    assert answers(engine, case, monkeypatch, _MORE_PAGES=0) == few
    engine.model.graphs.refusals[None] = "a test"
    assert answers(engine, case, monkeypatch) == few


def test_a_graph_counts_where_the_model_does(comm, shared_path, monkeypatch, one_thread):
    """Counts that are replaced are not written any more."""
    engine = load(comm, shared_path, "mixtral-window", f"tp={comm.size}")
    first = answers(engine, "mixtral-window", monkeypatch, steps=2)
    before = engine.model.expert_load
    engine.model.expert_load = ExpertLoad(engine.model.arch)
    assert answers(engine, "mixtral-window", monkeypatch) == first
    assert before.counts.sum() == engine.model.expert_load.counts.sum()


@pytest.mark.parametrize("case", ["gpt2", "qwen2", "olmoe", "deepseek_v2"])
def test_what_cannot_be_captured_goes_on(comm, shared_path, monkeypatch, one_thread, case):
    engine = load(comm, shared_path, case, f"tp={comm.size}")
    tried = answers(engine, case, monkeypatch, steps=2)
    assert engine.model.graphs.refusals
    assert answers(engine, case, monkeypatch) == tried


def test_a_replay_that_differs_is_given_up(comm, shared_path, monkeypatch, one_thread):
    """Python changes numbers in place, which no capture sees: the first replay shows it."""
    engine = load(comm, shared_path, "llama-gqa", f"tp={comm.size}")
    node.use_threads(1)
    normed = norm.rms_norm

    def changed(x, *arguments):
        y = normed(x, *arguments)
        y *= np.float32(1.5)
        return y

    monkeypatch.setattr("hpcinfer.model.layer.rms_norm", changed)
    tried = answers(engine, "llama-gqa", monkeypatch, steps=2)
    assert all("other numbers" in why for why in engine.model.graphs.refusals.values())
    assert engine.model.graphs.refusals
    assert answers(engine, "llama-gqa", monkeypatch)[0] == tried[0]
