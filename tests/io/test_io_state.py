"""The state file is whole or the one before, and an output has one writer at a time."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from hpcinfer.io import atomic
from hpcinfer.io.state import locked, read_state, remove_state, set_aside, write_state

pytestmark = pytest.mark.single

STATE = {"identity": {"seed": 3}, "under way": {"7": [[[1, 2], [-0.1, float("-inf")], []]]}}


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "out.jsonl.state"
    assert read_state(path) is None
    write_state(path, {})
    write_state(path, STATE)
    assert read_state(path) == STATE and os.listdir(tmp_path) == ["out.jsonl.state"]
    remove_state(path)
    remove_state(path)
    assert read_state(path) is None


def test_every_cut_of_the_file_is_noticed(tmp_path):
    path = tmp_path / "state"
    write_state(path, STATE)
    data = path.read_bytes()
    for n in range(len(data)):
        path.write_bytes(data[:n])
        with pytest.raises(ValueError, match="state: got .* --restart"):
            read_state(path)
    for n in range(data.index(b"\n") + 1, len(data)):
        path.write_bytes(data[:n] + bytes([data[n] ^ 1]) + data[n + 1 :])
        with pytest.raises(ValueError, match="state: got a part of it"):
            read_state(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="state: cannot read"):
        read_state(path)


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_full_disk_leaves_the_state_before(tmp_path, monkeypatch, fails):
    path = tmp_path / "state"
    write_state(path, STATE)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, fails, full)
    with pytest.raises(RuntimeError, match="no space left on the device; free space or choose"):
        write_state(path, {"identity": {}})
    monkeypatch.undo()
    assert read_state(path) == STATE and os.listdir(tmp_path) == ["state"]


# Writes states as fast as it can; a big one, so that the kill meets it at work.
WRITES = """
import sys
from hpcinfer.io.state import write_state
n = 0
while True:
    n += 1
    write_state(sys.argv[1], {"n": n, "tokens": [n] * 200_000})
    print(n, flush=True)
"""


@pytest.mark.parametrize("after", [1, 2, 5])
def test_a_killed_writer_leaves_a_whole_state(tmp_path, after):
    path = tmp_path / "state"
    job = subprocess.Popen([sys.executable, "-c", WRITES, path], stdout=subprocess.PIPE, text=True)
    written = [int(job.stdout.readline()) for _ in range(after)][-1]
    job.send_signal(signal.SIGKILL)
    job.wait(20)
    state = read_state(path)
    assert state["n"] >= written and state["tokens"] == [state["n"]] * 200_000
    job.stdout.close()
    write_state(path, STATE)
    assert os.listdir(tmp_path) == ["state"]


HOLDS = """
import sys, time
from hpcinfer.io.state import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_lock_names_its_holder_and_dies_with_it(tmp_path):
    path = tmp_path / "out.h5"
    job = subprocess.Popen([sys.executable, "-c", HOLDS, path], stdout=subprocess.PIPE)
    assert job.stdout.readline() == b"held\n"
    words = f"output: got {path}, which process {job.pid} on {os.uname().nodename} is writing"
    with pytest.raises(RuntimeError) as raised, locked(path):
        pass
    assert str(raised.value).startswith(words)
    job.send_signal(signal.SIGKILL)
    job.wait(20)
    job.stdout.close()
    with locked(path):
        with pytest.raises(RuntimeError, match=f"process {os.getpid()} on "), locked(path):
            pass
        with locked(tmp_path / "other.h5"):
            pass
    assert os.listdir(tmp_path) == []


def test_a_file_system_without_locks_is_written_all_the_same(tmp_path, monkeypatch):
    def refuses(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuses)
    with locked(tmp_path / "out.h5"), locked(tmp_path / "out.h5"):
        pass


def test_a_lock_needs_a_folder_that_can_be_written(tmp_path):
    with pytest.raises(RuntimeError, match="out.h5: its folder does not exist"):
        with locked(tmp_path / "absent" / "out.h5"):
            pass


def test_files_are_set_aside_under_one_number(tmp_path):
    path = str(tmp_path / "out.jsonl")
    assert set_aside([path]) == []
    (tmp_path / "out.jsonl.state.old-1").write_text("")
    for number, suffixes in ((2, ("", ".state", ".index")), (3, ("", ".journal"))):
        for suffix in suffixes:
            (tmp_path / f"out.jsonl{suffix}").write_text(str(number))
        assert set_aside([path]) == [f"{path}{suffix}.old-{number}" for suffix in suffixes]
    assert (tmp_path / "out.jsonl.old-2").read_text() == "2"

    # Activations are those of the .h5 of that name alone.
    (tmp_path / "out.parts").mkdir()
    assert set_aside([path]) == []
    assert set_aside([str(tmp_path / "out.h5")]) == [str(tmp_path / "out.parts.old-1")]
