"""What is written is not what is read, nor what somebody else has made; links stay links."""

import os

import pytest

from hpcinfer.errors import UsageError
from hpcinfer.io.atomic import replacing, try_to_write
from hpcinfer.io.claims import claim, refuse_existing
from hpcinfer.io.jsonl import JsonlWriter
from hpcinfer.io.lines import digest, read_lines
from hpcinfer.io.rows import write_json
from hpcinfer.io.state import locked, names_of, records_there, remove_records
from hpcinfer.io.trace import Trace, open_trace

pytestmark = pytest.mark.single


@pytest.fixture
def folder(tmp_path):
    """A model of two files, one of them a link, an input, and names that lead to them."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "blob").write_text("weights")
    (tmp_path / "model" / "model.safetensors").symlink_to(tmp_path / "blob")
    (tmp_path / "in.jsonl").write_text("input\n")
    os.link(tmp_path / "in.jsonl", tmp_path / "hard.jsonl")
    (tmp_path / "soft.jsonl").symlink_to("in.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "device.jsonl").symlink_to("/dev/null")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "twice.jsonl").symlink_to("new.jsonl")
    return tmp_path


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["in.jsonl"], "in.jsonl that is read"),
        (["hard.jsonl"], "in.jsonl that is read"),
        (["new.h5", "soft.jsonl"], "in.jsonl that is read"),
        (["model/config.json"], "config.json that is read"),
        (["blob"], "model.safetensors that is read"),
        (["new.jsonl", "twice.jsonl"], "one file twice"),
        (["new.jsonl", "./new.jsonl"], "one file twice"),
        (["pipe.jsonl"], "which is a folder, a pipe or a device"),
        (["device.jsonl"], "which is a folder, a pipe or a device"),
        (["model"], "which is a folder, a pipe or a device"),
    ],
)
def test_outputs_that_are_refused(folder, monkeypatch, names, words):
    monkeypatch.chdir(folder)
    with pytest.raises(UsageError, match=words):
        claim(names, ["in.jsonl"], ["model"])
    assert (folder / "in.jsonl").read_text() == "input\n"


def test_results_may_stand_beside_a_model(folder):
    out = folder / "model" / "out.jsonl"
    for name in (out, *names_of(out)):
        open(name, "w").close()
    assert claim([out], models=[folder / "model"], beside=names_of(out)[1:]) == [str(out)]


def test_an_output_is_the_file_that_its_link_leads_to(folder):
    (folder / "scratch").mkdir()
    link = folder / "out.json"
    link.symlink_to("scratch/rows.json")
    target = str(folder / "scratch" / "rows.json")
    assert claim([link], [folder / "in.jsonl"], [folder / "model"]) == [target]
    write_json(link, [{"a": 1}])
    assert link.is_symlink() and "1" in (folder / "scratch" / "rows.json").read_text()
    with pytest.raises(UsageError, match="--overwrite"):
        refuse_existing(link)
    refuse_existing(link, overwrite=True)
    refuse_existing(folder / "empty.jsonl")


@pytest.mark.parametrize("made_by", [os.symlink, os.link])
def test_files_beside_an_output_are_no_others(folder, made_by):
    """A link in the place of a file of the program's own is neither written nor removed."""
    out, other = folder / "new.jsonl", folder / "other"
    other.write_text("other")
    writers = {".lock": locked, ".index": JsonlWriter, ".partial": replacing, ".state": None}
    for suffix, writer in writers.items():
        made_by(other, f"{out}{suffix}")
        with pytest.raises(UsageError, match=f"got .*{suffix}, which is a link"):
            claim([out], beside=[f"{out}.lock", *names_of(out)[1:]])
        if writer is not None:
            with pytest.raises(RuntimeError, match="which is a link"), writer(out):
                pass
        assert other.read_text() == "other" and os.path.lexists(f"{out}{suffix}")
        os.unlink(f"{out}{suffix}")


def test_a_file_that_is_no_lock_is_left_alone(folder):
    lock = folder / "new.jsonl.lock"
    lock.write_text("a letter")
    with pytest.raises(RuntimeError, match="which is no lock"), locked(folder / "new.jsonl"):
        pass
    assert lock.read_text() == "a letter"
    lock.write_text("process 1 on nowhere\n")
    with locked(folder / "new.jsonl"):
        assert lock.read_text().startswith(f"process {os.getpid()} on ")


def test_no_file_takes_the_place_of_a_pipe(folder):
    for name in ("pipe.jsonl", "model"):
        with pytest.raises(RuntimeError, match="give the name of a file"):
            try_to_write(folder / name)
    assert sorted(os.listdir(folder / "model")) == ["config.json", "model.safetensors"]


def test_a_pipe_is_no_input(folder):
    for read in (lambda path: list(read_lines(path)), digest):
        for name in ("pipe.jsonl", "device.jsonl"):
            with pytest.raises(ValueError, match="which is no plain file"):
                read(folder / name)


def test_timelines_are_tried_before_and_replace_their_own_alone(folder):
    for _ in range(2):
        open_trace(folder / "new" / "trace", 1)
        Trace(folder / "new" / "trace", 1).close([])
    assert os.listdir(folder / "new" / "trace") == ["rank-1.json"]
    (folder / "new" / "trace" / "rank-0.json").write_text("{}")
    with pytest.raises(RuntimeError, match="rank-0.json, which is no timeline"):
        open_trace(folder / "new" / "trace", 0)
    with pytest.raises(RuntimeError, match="cannot write"):
        open_trace(folder / "in.jsonl", 0)


def test_records_are_found_and_removed(folder):
    out = folder / "empty.jsonl"
    assert records_there(out) is None
    (folder / "empty.jsonl.index").write_text("0 1 2\n")
    assert records_there(out) == f"{out}.index"
    remove_records(out)
    assert not list(folder.glob("empty.*"))
