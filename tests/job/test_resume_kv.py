"""Runs that keep their keys and values: what is computed is not computed again."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.paths import SHIPPED
from helpers.stopping import StopAt
from reference.parity import on_root

import hpcinfer
from hpcinfer.errors import Stopped
from hpcinfer.io import kv as io_kv
from hpcinfer.io.state import read_state
from hpcinfer.job import run as batch
from hpcinfer.job.state import RunState, identity_of_input
from hpcinfer.job.stop import Stop

STORY = "Once there was a shy hare named Nell who lived near the harbour. "
ANSWERS = [
    {"prompt": STORY * 3, "temperature": 0, "logprobs": 1},
    {"prompt": STORY * 3 + "She", "temperature": 1.1, "n": 3},
    {"prompt": STORY * 3 + "He", "temperature": 0.9, "repetition_penalty": 1.2},
    {"prompt": "The way was", "temperature": 1.5, "n": 2},
]


def options(P):
    """Layouts of the session's number of ranks; the first one's runs are stopped most often."""
    return {
        1: ["tp=1"],
        2: ["tp=2", "cp=2", "pp=2", "dp=2", "afd=1:1"],
        3: ["tp=3", "cp=3", "afd=2:1,dp=2"],
        4: ["cp=2,tp=2", "pp=2,dp=2", "afd=2:2,cp=2", "dp=2,cp=2,zero=allgather"],
    }.get(P, [f"tp={P}", f"cp={P}"])


def load(comm, layout, **limits):
    limits = {"kv_memory": 1 << 23, "step_tokens": 32} | limits
    return hpcinfer.load(SHIPPED, comm=comm, dtype="float32", seed=3, layout=layout, **limits)


@pytest.fixture(scope="module")
def engines(comm):
    return [load(comm, layout) for layout in options(comm.size)]


def run(engine, folder, kind="generate", stop_at=None, keeps_kv=True, name="out", every_s=60.0):
    """One start; (True if it was stopped, prompt tokens that all replicas computed)."""
    comm, outputs = engine.grid.comm, [str(folder / f"{name}.jsonl")]
    source, sampling = str(folder / "in.jsonl"), {"max_tokens": 8, "ignore_eos": True}
    before, stopped = engine.stats.prefill.tokens, False
    stop = Stop() if stop_at is None else StopAt(0, stop_at)
    n_lines = batch.check_files(comm, source, outputs)
    try:
        with RunState(comm, outputs, every_s, keeps_kv=keeps_kv) as state:
            state.refuse_changed(lambda: identity_of_input(kind, source, outputs, engine.seed))
            facts = {"model": str(SHIPPED)}
            sampling = sampling if kind == "generate" else {}
            batch.run(engine, kind, source, n_lines, sampling, facts, state, stop)
    except Stopped:
        stopped = True
    assert stopped or not any(engine.scheduler.pages._holders)
    engine._forget(engine.scheduler.pages.n)
    if engine.grid.role != "ffn":
        for _, x in engine.model.cache.arrays():
            x[:] = 9
    own = engine.stats.prefill.tokens - before if engine.grid.is_leader else 0
    return stopped, comm.allreduce(own)


def alone(engines):
    """Those whose first replica has all the work, and stops at the round that is said."""
    return [engine for engine in engines if engine.grid.layout.dp == 1]


def write(comm, folder, lines):
    text = "\n".join(map(json.dumps, lines)) + "\n"
    on_root(comm, lambda: folder.joinpath("in.jsonl").write_text(text))


def texts(folder, name="out"):
    """What every line says, without log-probabilities."""
    lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    return [
        [c["text"] for c in line["response"]["body"]["choices"]]
        if "response" in line
        else line["token_ids"]
        for line in lines
    ]


def assert_same(comm, folder):
    """The results of a straight run, and nothing left beside them."""

    def check():
        assert texts(folder) == texts(folder, "straight")
        assert {p.name for p in folder.iterdir()} == {"in.jsonl", "out.jsonl", "straight.jsonl"}

    on_root(comm, check)


def folder_of(folder):
    return folder / "out.jsonl.state.kv"


@pytest.mark.parametrize("every_s", [60.0, 1e-9])
def test_no_prompt_is_computed_again(comm, engines, shared_path, every_s):
    """Three stops in every layout: in the prompts, in the answers; shared prefixes, samples."""
    write(comm, shared_path, ANSWERS)
    for engine in engines:
        if every_s < 1 and engine.grid.layout.pp == 1 and engine is not engines[-1]:
            continue
        _, once = run(engine, shared_path, name="straight", keeps_kv=False)
        computed = []
        for stop_at in (3, 5, None):
            stopped, tokens = run(engine, shared_path, stop_at=stop_at, every_s=every_s)
            computed.append(tokens)
            if not stopped:
                break
            if comm.rank == 0:
                assert len(list(folder_of(shared_path).iterdir())) >= 1

        # Which replica gets which of the texts that begin alike is another matter.
        if engine.grid.layout.dp == 1:
            assert len(computed) > 2 and sum(computed) == once, (computed, once)
        assert_same(comm, shared_path)
        on_root(comm, lambda: (shared_path / "out.jsonl").unlink())


def test_a_long_prompt_gets_ahead_from_stop_to_stop(comm, engines, shared_path):
    write(comm, shared_path, [{"prompt": STORY * 30, "temperature": 0.7}])
    for engine in alone(engines):
        _, once = run(engine, shared_path, name="straight", keeps_kv=False)
        computed = [run(engine, shared_path, stop_at=3)[1] for _ in range(3)]
        assert all(0 < tokens < once / 2 for tokens in computed)
        assert sum(computed) + run(engine, shared_path)[1] == once
        assert_same(comm, shared_path)
        on_root(comm, lambda: (shared_path / "out.jsonl").unlink())


def test_scored_texts_go_on_too(comm, engines, shared_path):
    write(comm, shared_path, [{"prompt": STORY * 30}, {"prompt": STORY * 2}])
    for engine in alone(engines)[1:] or engines:
        _, once = run(engine, shared_path, "score", name="straight", keeps_kv=False)
        computed = [run(engine, shared_path, "score", stop_at=3)[1] for _ in range(2)]
        assert sum(computed) + run(engine, shared_path, "score")[1] == once
        assert_same(comm, shared_path)
        on_root(comm, lambda: (shared_path / "out.jsonl").unlink())


def test_a_killed_run_goes_on_from_its_last_snapshot(comm, engines, shared_path, monkeypatch):
    """What was on the disk at some moment, while steps were under way, serves a new start."""
    write(comm, shared_path, ANSWERS)
    for engine in alone(engines):
        if engine is not engines[0] and engine.grid.layout.pp == 1:
            continue
        _, once = run(engine, shared_path, name="straight", keeps_kv=False)
        copy, save, saves = Path(f"{shared_path}-copy"), RunState.save, []

        def saved(self, *arguments, copy=copy, save=save, saves=saves):
            save(self, *arguments)
            saves.append(self)
            if len(saves) == 6:
                shutil.copytree(shared_path, copy)

        with monkeypatch.context() as patch:
            patch.setattr(RunState, "save", saved)
            run(engine, shared_path, every_s=1e-9)
        on_root(comm, lambda copy=copy: (shutil.rmtree(shared_path), copy.rename(shared_path)))
        assert run(engine, shared_path)[1] < once
        assert_same(comm, shared_path)
        on_root(comm, lambda: (shared_path / "out.jsonl").unlink())


def test_without_the_option_nothing_is_written(comm, engines, shared_path):
    write(comm, shared_path, ANSWERS)
    assert run(engines[0], shared_path, stop_at=4, keeps_kv=False)[0]
    on_root(comm, lambda: _assert_without(shared_path))

    # What is left of a run with the option goes with the first state of one without it.
    assert run(engines[0], shared_path, stop_at=4)[0]
    assert run(engines[0], shared_path, stop_at=3, keeps_kv=False)[0]
    on_root(comm, lambda: _assert_without(shared_path))


@pytest.mark.single
def test_restart_keeps_them_under_another_name(comm, engines, shared_path):
    write(comm, shared_path, ANSWERS)
    assert run(engines[0], shared_path, stop_at=4)[0]
    outputs = [str(shared_path / "out.jsonl")]
    with RunState(comm, outputs, restart=True, keeps_kv=True) as state:
        assert f"{folder_of(shared_path)}.old-1" in state.kept and not state.resumes


@pytest.mark.single
def test_a_full_disk_for_them_does_not_end_the_run(engines, comm, shared_path, monkeypatch, capsys):
    write(comm, shared_path, ANSWERS)
    run(engines[0], shared_path, name="straight", keeps_kv=False)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(io_kv.os, "makedirs", full)
        run(engines[0], shared_path, every_s=1e-9, stop_at=6)
    assert "no space left on the device" in capsys.readouterr().err
    assert not list(folder_of(shared_path).glob("*"))
    run(engines[0], shared_path)
    assert_same(comm, shared_path)


def _assert_without(folder):
    assert not folder_of(folder).exists()
    assert "kv" not in read_state(str(folder / "out.jsonl.state"))


def test_another_layout_computes_again_and_says_so(comm, engines, shared_path, capsys):
    other = engines[-1]
    if comm.size == 1:
        other = load(comm, "tp=1", micro_batches=2)
    write(comm, shared_path, ANSWERS)
    run(engines[0], shared_path, name="straight", keeps_kv=False)
    assert run(engines[0], shared_path, stop_at=4)[0]
    capsys.readouterr()
    assert not run(other, shared_path)[0]
    err = capsys.readouterr().err
    if comm.rank == 0 and comm.size > 1:
        layouts = engines[0].grid.layout, other.grid.layout
        assert (
            "kv: saved under layout {}, this run has {}; prompts are computed again\n".format(
                *layouts
            )
            in err
        )
    assert_same(comm, shared_path)


@pytest.mark.parametrize("damage", ["missing", "torn", "flipped", "longer", "foreign", "older"])
def test_a_damaged_file_is_not_used(comm, engines, shared_path, damage, capsys):
    if comm.size > 1 and damage not in ("missing", "flipped"):
        pytest.skip("what one rank finds, and how all hear of it, is seen in the others")
    engine = engines[0]
    write(comm, shared_path, ANSWERS[:2])
    run(engine, shared_path, name="straight", keeps_kv=False)
    assert run(engine, shared_path, stop_at=4)[0]

    def spoil():
        path = sorted(folder_of(shared_path).iterdir())[-1]
        data = bytearray(path.read_bytes())
        if damage == "flipped":
            data[-len(data) // 3] ^= 1
        elif damage == "torn":
            del data[-9:]
        elif damage == "longer":
            data += b"x"
        elif damage == "foreign":
            data = b"{}\n"
        elif damage == "older":
            facts, sizes, _ = io_kv.read_facts(path)
            blocks = [np.frombuffer(block, np.uint8) for block in io_kv.read_blocks(path)]
            facts["generation"] -= 1
            io_kv.write_kv(str(path), facts, sizes, blocks, 60)
            return
        path.write_bytes(data)
        if damage == "missing":
            path.unlink()

    on_root(comm, spoil)
    capsys.readouterr()
    _, computed = run(engine, shared_path)
    err = capsys.readouterr().err
    if comm.rank == 0:
        lines = [line for line in err.splitlines() if "kv: " in line]
        assert len(lines) == 1 and lines[0].endswith("; prompts are computed again"), err
        assert damage != "older" or "kv: got generation 0, need generation 1; " in lines[0]
    assert computed > 0
    assert_same(comm, shared_path)


def test_a_smaller_cache_takes_up_what_fits(comm, engines, shared_path):
    """Fewer pages, fewer sequences at a time: the rest is computed again."""
    engine, lines = engines[0], [{"prompt": f"{i} " + STORY * 3} for i in range(5)]
    write(comm, shared_path, lines)
    _, once = run(engine, shared_path, name="straight", keeps_kv=False)
    page_bytes = engine.model.page_bytes
    for limits in ({"kv_memory": 9 // engine.model.pools * page_bytes}, {"sequences": 2}):
        small = load(comm, str(options(comm.size)[0]), **limits)
        assert run(engine, shared_path, stop_at=8)[0]
        assert 0 < run(small, shared_path)[1] < once
        assert_same(comm, shared_path)
        on_root(comm, lambda: (shared_path / "out.jsonl").unlink())


def test_a_slow_or_full_disk_leaves_them_out(comm, engines, shared_path, monkeypatch, capsys):
    engine = engines[0]
    write(comm, shared_path, ANSWERS)
    run(engine, shared_path, name="straight", keeps_kv=False)

    # Only one rank's disk is slow
    if comm.rank == comm.size - 1:
        monkeypatch.setattr(io_kv, "BLOCK_BYTES", 1)
        monkeypatch.setattr("hpcinfer.job.kv_state._PATIENCE_S", 1e-9)
    capsys.readouterr()
    assert run(engine, shared_path, stop_at=4)[0]
    err = capsys.readouterr().err
    if comm.rank == 0:
        assert err.count("kv: got ") == 1
        assert "s; write to a faster disk; the state goes without these keys and values\n" in err
        assert "kv" not in read_state(str(shared_path / "out.jsonl.state"))
    monkeypatch.undo()
    assert not run(engine, shared_path)[0]
    assert_same(comm, shared_path)
