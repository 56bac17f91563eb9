"""Outputs that are there before a run: finished ones, links, and those of other shards."""

import json
import os

import h5py
import numpy as np
import pytest
from helpers.paths import SHIPPED
from helpers.stopping import StopAt
from reference.parity import on_root

import hpcinfer
from hpcinfer.engine.activations.selection import Selection
from hpcinfer.errors import Stopped, UsageError, is_agreed
from hpcinfer.io.activations import open_activations
from hpcinfer.job.files import open_state
from hpcinfer.job.run import Job
from hpcinfer.job.settings import JobSettings
from hpcinfer.job.stop import Stop

RESIDUAL = Selection(("residual",), (0,))
PROMPTS = ["Once", "Once", "The way was", "Once", "The"]


@pytest.fixture(scope="module")
def engine(comm):
    with hpcinfer.load(SHIPPED, comm=comm, dtype="float32", kv_memory=1 << 24) as engine:
        yield engine


@pytest.fixture
def folder(comm, shared_path):
    """Folder with an input of requests without ids."""
    lines = [json.dumps({"prompt": prompt, "temperature": 1.5}) for prompt in PROMPTS]
    on_root(comm, lambda: (shared_path / "in.jsonl").write_text("\n".join(lines)))
    return shared_path


def run(engine, folder, *names, source="in.jsonl", kind="generate", stop=None, **options):
    """True if a start of a run had something to do; every rank calls this."""
    sampling = {"max_tokens": 4, "ignore_eos": True} if kind == "generate" else {}
    outputs = [str(folder / name) for name in names]
    settings = JobSettings(kind, str(SHIPPED), str(folder / source), outputs, sampling, **options)
    with open_state(engine.grid.comm, settings) as (state, lines):
        if lines:
            Job(settings, engine, lines, state, stop or Stop()).run()
        return bool(lines)


def refused(engine, folder, words, *names, **options):
    """A start that is refused on every rank, as all files are."""
    before = on_root(engine.grid.comm, lambda: contents(folder))
    with pytest.raises(UsageError, match=words) as raised:
        run(engine, folder, *names, **options)
    assert is_agreed(raised.value)
    assert on_root(engine.grid.comm, lambda: contents(folder)) == before


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_finished_run_is_not_done_again_and_not_lost(comm, engine, folder):
    """Another start of it has nothing to do; another run is refused, unless it may replace it."""
    names = ("out.jsonl", "out.h5")
    assert run(engine, folder, *names)
    first = on_root(comm, lambda: contents(folder))
    for overwrite in (False, True):
        assert not run(engine, folder, *names, overwrite=overwrite)
    refused(engine, folder, "out.jsonl, which another run has left.*--overwrite", *names, seed=4)
    refused(engine, folder, "out.h5, which another run has left", "out.h5")
    assert on_root(comm, lambda: contents(folder)) == first

    # What has changed since is not what the run has left.
    on_root(comm, lambda: (folder / "out.jsonl").write_text("{}\n"))
    refused(engine, folder, "out.jsonl, which another run has left", *names)
    assert run(engine, folder, *names, overwrite=True)
    assert on_root(comm, lambda: contents(folder))["out.jsonl"] == first["out.jsonl"]
    assert run(engine, folder, *names, restart=True)
    assert (folder / "out.jsonl.done.old-1").exists()


def test_activations_are_not_lost(comm, engine, folder):
    """Nor are parts whose joined file is gone."""
    extract = {"kind": "extract", "selection": RESIDUAL}
    assert run(engine, folder, "out.h5", **extract)
    assert not run(engine, folder, "out.h5", **extract)
    on_root(comm, lambda: os.unlink(folder / "out.h5"))
    refused(engine, folder, "out.parts, which another run has left", "out.h5", **extract)
    assert run(engine, folder, "out.h5", overwrite=True, **extract)
    on_root(comm, lambda: h5py.File(folder / "out.h5")["residual/0"][:].any())


def test_files_that_are_not_the_runs(comm, engine, folder):
    def make():
        os.link(folder / "in.jsonl", folder / "same.jsonl")
        (folder / "other.jsonl.index").write_text("mine\n")

    on_root(comm, make)
    refused(engine, folder, "same.jsonl, which is .*in.jsonl that is read", "same.jsonl")
    refused(engine, folder, "other.jsonl.index, which another run has left", "other.jsonl")


def test_a_link_leads_to_the_output_and_stays(comm, engine, folder):
    def make():
        (folder / "scratch").mkdir()
        (folder / "out.jsonl").symlink_to("scratch/results.jsonl")

    on_root(comm, make)
    assert run(engine, folder, "out.jsonl") and not run(engine, folder, "out.jsonl")
    comm.Barrier()  # the first rank has let go of the lock
    assert (folder / "out.jsonl").is_symlink()
    assert sorted(os.listdir(folder / "scratch")) == ["results.jsonl", "results.jsonl.done"]


def test_names_may_be_bytes_that_are_no_text(comm, engine, folder):
    strange = os.fsdecode(b"\xff\xfe")
    words = {"command_line": ("hpcinfer", strange), "restart": True}
    assert run(engine, folder, f"{strange}.jsonl", "out.h5", **words)
    assert not run(engine, folder, f"{strange}.jsonl", "out.h5")
    assert run(engine, folder, f"{strange}.h5", kind="extract", selection=RESIDUAL, **words)

    def check():
        with h5py.File(folder / "out.h5") as file:
            assert "udcff" in file.attrs["command"].encode().decode()
        with open_activations(folder / f"{strange}.h5") as file:
            assert not np.isnan(file["residual/0"][:]).any()

    on_root(comm, check)


def test_shards_are_the_whole_cut_in_pieces(comm, engine, folder):
    """Ids, and what equal prompts draw, are those of the whole; a shard may have no line."""
    assert run(engine, folder, "all.jsonl")
    for n in (2, 7):
        began = [run(engine, folder, f"{i}-{n}.jsonl", shard=(i, n)) for i in range(1, n + 1)]
        assert sum(began) == min(n, len(PROMPTS))
        shards = [folder / f"{i}-{n}.jsonl" for i, some in enumerate(began, 1) if some]
        whole = (folder / "all.jsonl").read_text()
        assert "".join(path.read_text() for path in shards) == whole
    refused(engine, folder, "1-2.jsonl, which another run has left", "1-2.jsonl", shard=(1, 3))

    # An unfinished one goes on as the same alone.
    with pytest.raises(Stopped):
        run(engine, folder, "out.jsonl", stop=StopAt(0, 2), shard=(1, 2))
    engine._forget(engine.scheduler.pages.n)
    with pytest.raises(ValueError, match="got shard None, need shard 1/2"):
        run(engine, folder, "out.jsonl")
    assert run(engine, folder, "out.jsonl", shard=(1, 2))


@pytest.mark.parametrize("kind", ["score", "extract"])
def test_what_cannot_be_written_is_refused_before_the_work(comm, engine, folder, kind):
    """On every rank that writes, even where only the last one cannot."""
    options = {"kind": kind, "trace": str(folder / "trace")}
    if kind == "extract":
        options["selection"] = RESIDUAL
    place = folder / "trace" / f"rank-{comm.size - 1}.json"

    def spoil():
        place.parent.mkdir()
        place.write_text("mine")

    on_root(comm, spoil)
    with pytest.raises(RuntimeError, match="which is no timeline") as raised:
        run(engine, folder, "out.h5", **options)
    assert is_agreed(raised.value) and place.read_text() == "mine"
    assert not (folder / "out.h5").exists()
