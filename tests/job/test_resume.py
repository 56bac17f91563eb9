"""Runs that are stopped or killed and started again: nothing lost, nothing done twice.

A run is stopped at random rounds, goes on in other layouts, and must end with the results of one
that was never stopped. Real jobs get real signals.
"""

import json
import os
import random
import shutil
import signal
import threading
import time

import h5py
import numpy as np
import pytest
from helpers.paths import SHIPPED
from helpers.stopping import StopAt
from pytest import approx
from reference.parity import on_root

import hpcinfer
from hpcinfer.errors import REQUEUE, Stopped, exit_code, is_agreed
from hpcinfer.job import run as batch
from hpcinfer.job.state import RunState, identity_of_input
from hpcinfer.job.stop import Pace, Stop

STORY = "Once there was a shy hare named Nell who lived near the harbour."
ANSWERS = [
    {"prompt": STORY, "temperature": 0, "logprobs": 2},
    {"prompt": STORY + " She", "temperature": 1.1, "n": 3},
    {"prompt": "Tell a story about Mira the fox.", "repetition_penalty": 1.3, "seed": 7},
    {"messages": [{"role": "user", "content": "What is 2 + 3?"}], "logprobs": True},
    {"prompt": STORY * 3, "temperature": 0.8, "stop": ["e", "ou"], "min_tokens": 6},
    {"prompt": "no such field", "temprature": 1},
    {"prompt": "The way was", "temperature": 1.5, "frequency_penalty": 0.5, "top_p": 0.9},
    {"prompt": "The way was", "temperature": 1.5, "presence_penalty": 0.5, "n": 2, "logprobs": 1},
    {"custom_id": "last", "prompt": "A", "temperature": 2, "min_tokens": 9, "max_tokens": 30},
]
TEXTS = [STORY, "A", STORY * 4, "What is 2 + 3? 5", "", STORY * 2, "The way was", STORY[:30] * 9]


def inputs(folder):
    """The input of each kind of run."""
    lines = [json.dumps(line) for line in ANSWERS]
    folder.joinpath("prompts.jsonl").write_text("\n".join([*lines, "{no JSON"]) + "\n")
    folder.joinpath("texts.txt").write_text("\n".join(TEXTS) + "\n")


def run(engine, kind, folder, name="out", stop=None, every_s=60.0, restart=False, **sampling):
    """One start of a run to a .jsonl and a .h5; the stop's words if it was stopped, else None."""
    comm = engine.grid.comm
    source = str(folder / {"generate": "prompts.jsonl", "score": "texts.txt"}[kind])
    outputs = [str(folder / f"{name}{extension}") for extension in (".jsonl", ".h5")]
    n_lines = batch.check_files(comm, source, outputs)
    sampling = {"max_tokens": 15, "ignore_eos": True} | sampling if kind == "generate" else {}
    try:
        with RunState(comm, outputs, every_s, restart) as state:
            state.refuse_changed(lambda: identity_of_input(kind, source, outputs, engine.seed))
            facts = {"model": str(SHIPPED)}
            batch.run(engine, kind, source, n_lines, sampling, facts, state, stop or Stop())
    except Stopped as error:
        assert is_agreed(error) and exit_code(error) == REQUEUE
        engine._forget(engine.scheduler.pages.n)
        return str(error)
    return None


def layouts(P):
    """Options of the runs that take turns."""
    several = {
        1: ["tp=1"],
        2: ["tp=2", "dp=2", "pp=2", "cp=2", "afd=1:1"],
        3: ["tp=3", "dp=3", "afd=2:1,dp=2"],
        4: ["tp=4", "dp=2,pp=2", "dp=2,cp=2,zero=allgather", "dp=4", "afd=2:2,dp=2"],
    }
    limits = ({}, {"step_tokens": 40}, {"sequences": 2}, {"kv_memory": 2_500_000})
    found = []
    for i, layout in enumerate(several.get(P, [f"tp={P}", f"dp={P}"])):
        found.append({"layout": layout, "kv_memory": 1 << 24} | limits[i % len(limits)])
    return found if P > 1 else [found[0] | limit for limit in limits]


@pytest.fixture(scope="module")
def engines(comm):
    return [
        hpcinfer.load(SHIPPED, comm=comm, dtype="float32", seed=3, **options)
        for options in layouts(comm.size)
    ]


@pytest.fixture(scope="module")
def straight(comm, engines, tmp_path_factory):
    """Folder with the inputs, and the results of runs that were never stopped."""
    path = comm.bcast(tmp_path_factory.mktemp("straight") if comm.rank == 0 else None)
    on_root(comm, lambda: inputs(path))
    for kind in ("generate", "score"):
        assert run(engines[0], kind, path, kind) is None
    return path


@pytest.fixture
def folder(comm, straight, shared_path):
    """Empty folder with the inputs."""
    if comm.rank == 0:
        for name in ("prompts.jsonl", "texts.txt"):
            shutil.copy2(straight / name, shared_path)
    comm.barrier()
    return shared_path


def without_figures(value):
    """A record without its log-probabilities, which depend on the order of sums in the last digit,
    and these in order."""
    if isinstance(value, float):
        return None, [value]
    if isinstance(value, dict):
        parts = {key: without_figures(item) for key, item in value.items()}
        return {k: p for k, (p, _) in parts.items()}, sum((f for _, f in parts.values()), [])
    if isinstance(value, list):
        parts = [without_figures(item) for item in value]
        return [p for p, _ in parts], sum((f for _, f in parts), [])
    return value, []


def assert_equal_results(folder, straight, kind, name="out"):
    """The same lines, byte for byte without log-probabilities; the same datasets; nothing else."""
    lines, expected = (
        path.read_bytes().splitlines()
        for path in (folder / f"{name}.jsonl", straight / f"{kind}.jsonl")
    )
    assert len(lines) == len(expected)
    for line, other in zip(lines, expected, strict=True):
        a, b = json.loads(line), json.loads(other)
        (a, figures), (b, other_figures) = without_figures(a), without_figures(b)
        assert a == b and figures == approx(other_figures, abs=2e-4, rel=1e-4)
        assert line == other or figures
    with h5py.File(folder / f"{name}.h5") as a, h5py.File(straight / f"{kind}.h5") as b:
        assert a.attrs["complete"] and set(a) == set(b)
        for column in a:
            values, others = a[column][()], b[column][()]
            if values.dtype.kind == "f":
                np.testing.assert_allclose(values, others, atol=2e-4, rtol=1e-4)
            else:
                np.testing.assert_array_equal(values, others)
    left = {path.name for path in folder.iterdir()} - {"prompts.jsonl", "texts.txt"}
    assert left == {f"{name}.jsonl", f"{name}.h5"}


# --- Stopped in order ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["generate", "score"])
def test_stopped_at_any_round_and_gone_on_in_any_layout(
    comm, engines, straight, folder, kind, seed
):
    """Some stops of any rank, in this layout and that; the results are those of a straight run."""
    draw, texts = random.Random(seed), []
    for i in range(4):
        engine = engines[(seed + i) % len(engines)]
        at = draw.randrange(1, 9 if kind == "generate" else 4)
        stop = StopAt(draw.randrange(comm.size), at)
        texts.append(run(engine, kind, folder, stop=stop, every_s=draw.choice([1e-9, 60])))
        if texts[-1] is None:
            break
        if comm.rank == 0:
            assert (folder / "out.jsonl.state").exists()
            assert not list(folder.glob("*.lock")) and not list(folder.glob("*.partial"))
    else:
        assert run(engines[seed % len(engines)], kind, folder) is None
    on_root(comm, lambda: assert_equal_results(folder, straight, kind))
    if kind == "generate":
        assert texts[0].startswith("stopped ") and " of 10 requests finished and " in texts[0]
        assert texts[0].endswith(" under way; run the same command again to go on")


@pytest.mark.parametrize("reason", ["SIGTERM", "SIGUSR1", "time limit"])
def test_signals_and_the_time_limit(comm, engines, straight, folder, reason):
    """To any rank; a signal that comes when the run is over already changes nothing."""
    rank = comm.size - 1 if reason == "SIGUSR1" else 0
    ends_s = time.time() + 0.15 if reason == "time limit" else None
    with Stop(ends_s) as stop:
        if ends_s is None and comm.rank == rank:
            delay_s, number = 0.15, getattr(signal, reason)
            threading.Timer(delay_s, os.kill, (os.getpid(), number)).start()
        text = run(engines[0], "generate", folder, stop=stop, max_tokens=500)
        words = "on another rank" if rank else f"at its {reason}" if ends_s else f"by {reason}"
        assert text.startswith(f"stopped {words} with ")
    assert run(engines[-1], "score", folder, "other") is None
    on_root(comm, lambda: [path.unlink() for path in folder.glob("other.*")])
    assert "max-tokens 15, need max-tokens 500" in refusal(
        comm, lambda: run(engines[-1], "generate", folder)
    )


def test_what_was_generated_is_not_generated_again(comm, engines, straight, folder):
    """A second start decodes only what is left."""
    engine = engines[0]
    counts = []
    for stop in (StopAt(0, 10), None):
        before = engine.stats.decode.tokens + engine.stats.answered
        run(engine, "generate", folder, stop=stop)
        counts.append(engine.stats.decode.tokens + engine.stats.answered - before)
    once = engine.stats.decode.tokens + engine.stats.answered
    run(engine, "generate", folder, "again")
    once = engine.stats.decode.tokens + engine.stats.answered - once
    assert counts[0] > 0 and sum(counts) <= once


def test_log_probabilities_that_are_known_are_not_computed_again(
    comm, engines, folder, monkeypatch
):
    engine, rows = engines[0], []
    logits = engine.model.logits

    def counted(hidden):
        rows.append(len(hidden))
        return logits(hidden)

    monkeypatch.setattr(engine.model, "logits", counted)
    assert run(engine, "score", folder, stop=StopAt(0, 2))
    run(engine, "score", folder)
    stopped = sum(rows)
    rows.clear()
    run(engine, "score", folder, "again")
    assert 0 < stopped == sum(rows)


# --- Refusals ------------------------------------------------------------------------------------


def refusal(comm, function, error=ValueError):
    """One line, the same on all ranks."""
    with pytest.raises(error) as raised:
        function()
    assert is_agreed(raised.value)
    text = str(raised.value)
    assert "\n" not in text and len(set(comm.allgather(text))) == 1
    return text


def test_another_run_is_refused_and_restart_keeps_the_old_files(
    comm, engines, straight, folder, monkeypatch
):
    engine = engines[0]
    assert run(engine, "generate", folder, stop=StopAt(0, 4))
    files = on_root(comm, lambda: contents(folder))
    changes = [
        ("temperature 0.5, need temperature ", {"temperature": 0.5}, None),
        ("seed 4, need seed 3", {}, lambda: monkeypatch.setattr(engine, "seed", 4)),
        ("model 0abc, need model ", {}, lambda: monkeypatch.setattr(engine, "checksum", "0abc")),
        ("input ", {}, lambda: on_root(comm, lambda: add_line(folder / "prompts.jsonl"))),
    ]
    for words, sampling, change in changes:
        if change:
            change()
        text = refusal(comm, lambda s=sampling: run(engine, "generate", folder, **s))
        monkeypatch.undo()
        assert text.startswith(f"resume: got {words}") and "--restart" in text
    text = refusal(comm, lambda: run(engine, "score", folder))
    assert text.startswith("resume: got kind score, input ") and "need kind generate, " in text
    if comm.rank == 0:
        shutil.copy2(straight / "prompts.jsonl", folder)
        assert contents(folder) == files
    comm.barrier()

    # Begin anew, twice
    for number in (1, 2):
        assert run(engine, "generate", folder, stop=StopAt(0, 4), restart=True)
        if comm.rank == 0:
            now = contents(folder)
            for name in ("out.jsonl", "out.jsonl.state", "out.jsonl.index", "out.h5.journal"):
                assert f"{name}.old-{number}" in now
            assert number > 1 or now["out.jsonl.old-1"] == files["out.jsonl"]
    assert run(engine, "generate", folder) is None
    if comm.rank == 0:
        for path in folder.glob("*.old-*"):
            path.unlink()
        assert_equal_results(folder, straight, "generate")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def add_line(path):
    path.write_bytes(path.read_bytes() + b'{"prompt": "one more"}\n')


@pytest.mark.single
@pytest.mark.parametrize("damage", ["torn", "empty", "foreign", "newer"])
def test_a_damaged_state_is_refused(comm, engines, folder, damage):
    assert run(engines[0], "generate", folder, stop=StopAt(0, 4))
    path = folder / "out.jsonl.state"

    def spoil():
        data = path.read_bytes()
        changed = data.replace(b'"format_version": 1', b'"format_version": 9')
        path.write_bytes(
            {"torn": data[:-9], "empty": b"", "foreign": b"{}\n", "newer": changed}[damage]
        )

    on_root(comm, spoil)
    text = refusal(comm, lambda: run(engines[0], "generate", folder))
    assert text.startswith("state: got ") and "--restart" in text


@pytest.mark.single
@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.index", "out.h5.journal"])
def test_lost_records_are_refused_and_torn_tails_are_not(comm, engines, straight, folder, name):
    assert run(engines[0], "generate", folder, stop=StopAt(0, 16))

    def spoil(keep):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2] if keep else data + b'{"torn')
        return data

    data = on_root(comm, lambda: spoil(True))
    text = refusal(comm, lambda: run(engines[0], "generate", folder))
    assert text.startswith("output: got ") and " whole records in " in text
    on_root(comm, lambda: (folder / name).write_bytes(data) and spoil(False))
    assert run(engines[-1], "generate", folder) is None
    on_root(comm, lambda: assert_equal_results(folder, straight, "generate"))


def test_two_runs_with_one_output(comm, engines, folder):
    engine = engines[0]
    with RunState(comm, [str(folder / "out.jsonl")]):
        text = refusal(comm, lambda: run(engine, "generate", folder), RuntimeError)
        holder = comm.bcast(f"process {os.getpid()} on ")
        assert f"out.jsonl, which {holder}" in text
    assert run(engine, "generate", folder, stop=StopAt(0, 3))
    with pytest.raises(ValueError, match="of another unfinished run"):
        with RunState(comm, [str(folder / "other.jsonl"), str(folder / "out.jsonl")]):
            pass


def test_a_full_disk_stops_and_the_run_goes_on(comm, engines, straight, folder, monkeypatch):
    """First a record does not fit, then a state does not."""
    for fails in ("write", "fsync"):
        calls, real = [0], getattr(os, fails)

        def full(*arguments, real=real, calls=calls, limit=13 if fails == "write" else 6):
            calls[0] += 1
            if calls[0] >= limit:
                raise OSError(28, "No space left on device")
            return real(*arguments)

        if comm.size == 1:
            with monkeypatch.context() as patch:
                patch.setattr(os, fails, full)
                with pytest.raises(RuntimeError, match="no space left on the device; free space"):
                    run(engines[0], "generate", folder, every_s=1e-9)
            engines[0]._forget(engines[0].scheduler.pages.n)
    assert run(engines[0], "generate", folder) is None
    on_root(comm, lambda: assert_equal_results(folder, straight, "generate"))


# --- The pace ------------------------------------------------------------------------------------


@pytest.mark.single
@pytest.mark.parametrize("fixed_s", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("token_s", [1e-6, 1e-3, 2e-2, 0.2])
def test_the_pace_keeps_steps_short_and_no_shorter(fixed_s, token_s):
    pace, most = Pace(2048), 2048
    for _ in range(40):
        time_s = fixed_s + pace.tokens * token_s
        pace.step(pace.tokens, time_s)
        pace.step(1, fixed_s + token_s)
    time_s = fixed_s + pace.tokens * token_s
    assert time_s <= 3.3 and (pace.tokens == most or time_s > 2)


@pytest.mark.single
def test_steps_that_are_long_whatever_they_hold_are_not_shortened():
    pace = Pace(2048)
    for _ in range(9):
        pace.step(64, 20.0)
    assert pace.tokens == 64
    assert Pace(10).tokens == 10
