"""The harness itself: a failure, hang or disagreement of ranks ends the run, soon and in words."""

import json
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET

import pytest
from helpers import speed
from helpers.paths import TESTS
from helpers.speed import scaled

pytestmark = pytest.mark.single

SETTINGS = """
[pytest]
markers = single
filterwarnings = error
"""
CONFTEST = (TESTS / "conftest.py").read_text(encoding="utf-8")
HEAD = """
import pytest
from mpi4py import MPI
comm = MPI.COMM_WORLD
"""


@pytest.fixture
def session(mpirun, tmp_path):
    """Function session(ranks, source, *options): run the test file `source` under the harness."""

    def run(ranks, source, *options):
        (tmp_path / "conftest.py").write_text(CONFTEST.replace("GRACE_S = 10.0", "GRACE_S = 3.0"))
        shutil.copytree(TESTS / "helpers", tmp_path / "helpers", dirs_exist_ok=True)
        (tmp_path / "pytest.ini").write_text(SETTINGS)
        (tmp_path / "test_inner.py").write_text(HEAD + source)
        command = [sys.executable, "-m", "pytest", "--with-mpi", "-p", "no:cacheprovider"]
        where = {"cwd": tmp_path, "timeout_s": 50, "HPCINFER_TEST_SLOWDOWN": "1"}
        return mpirun(ranks, *command, "--color=no", *options, **where)

    return run


def test_passes_on_every_rank(session):
    """A good file passes, its shared folder is the same on all ranks, and the exit status is 0."""
    done = session(
        3,
        """
def test_folder(comm, shared_path):
    (shared_path / str(comm.rank)).touch()
    comm.Barrier()
    assert len(list(shared_path.iterdir())) == comm.size
""",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("1 passed") == 3


def test_failure_on_one_rank_fails_on_all(session):
    """No rank says that a test passed which failed elsewhere, and the tests after it still run."""
    done = session(
        3,
        """
def test_one_fails():
    assert comm.rank != 1

def test_after():
    assert comm.allreduce(1) == comm.size
""",
    )
    assert done.returncode != 0
    assert done.stdout.count("1 failed, 1 passed") == 3
    assert "rank 1: failed assert 1 != 1" in done.stdout


def test_failure_before_a_collective_ends_in_seconds(session):
    """A rank fails while the others wait for it: its failure and their stacks are printed."""
    done = session(
        3,
        """
def test_one_leaves():
    assert comm.rank != 1, "the reason"
    comm.Barrier()
""",
        "--timeout=45",
    )
    assert done.returncode != 0
    assert done.seconds < scaled(40)
    assert "the reason" in done.stderr
    assert "rank(s) [0, 2] did not arrive in 3 s" in done.stderr
    assert done.stderr.count('test_inner.py", line 8 in test_one_leaves') == 2


def test_failure_in_set_up_skips_the_call_on_all(session):
    """A fixture that fails on one rank keeps every rank from the test's collectives."""
    done = session(
        2,
        """
@pytest.fixture
def broken():
    if comm.rank == 1:
        raise OSError("no such device")

def test_collective(broken):
    comm.Barrier()
""",
    )
    assert done.returncode != 0
    assert done.seconds < scaled(30)
    assert done.stdout.count("1 error") == 2
    assert "no such device" in done.stdout


def test_a_test_that_takes_too_long_fails_alone(session):
    """On one rank it is stopped where it was; what it started ends too, and the others run."""
    done = session(
        1,
        """
import subprocess, time
left = []

@pytest.fixture
def resource():
    yield
    print("given back")

def test_slow(resource):
    left.append(subprocess.Popen(["sleep", "30"]))
    time.sleep(30)

def test_after():
    assert left[0].wait(5) == -9
""",
        "--timeout=2",
    )
    assert done.returncode == 1
    assert done.seconds < scaled(25)
    assert "1 failed, 1 passed" in done.stdout and "given back" in done.stdout
    assert re.search(r">\s+time.sleep\(30\)", done.stdout)
    assert "Failed: did not end in " in done.stdout


HANGS = """
def test_before():
    pass

def test_skipped():
    pytest.skip("not here")

@pytest.mark.timeout(2)
def test_hangs():
    comm.recv(source=comm.rank, tag=7)

def test_dies():
    import os
    if comm.rank == comm.size - 1:
        os.kill(os.getpid(), 9)
    comm.Barrier()

def test_after():
    assert comm.allreduce(1) == comm.size
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_test_that_ends_the_job_fails_alone(session, tmp_path, ranks):
    """One stuck in MPI, one whose rank is killed: jobs with the same record come to the end."""
    files = [f"--{kind}={tmp_path / kind}" for kind in ("record", "counts", "junitxml")]
    for job in range(2):
        done = session(ranks, HANGS, *files)
        assert done.returncode != 0
        assert done.seconds < scaled(25)
        assert not (tmp_path / "counts").exists()
        if job == 0:
            for rank in range(ranks):
                assert f"stacks of rank {rank}" in done.stderr
    done = session(ranks, HANGS, *files)
    assert done.returncode == 1

    # Its report has all of them, with the stacks of the test that hung.
    report = json.loads((tmp_path / "counts").read_text())
    assert (report["counts"]["failed"], report["counts"]["passed"]) == (2, 2)
    assert [name.rpartition("::")[2] for name in report["names"]["failed"]] == HANGING
    cases = {case.get("name"): case for case in ET.parse(tmp_path / "junitxml").iter("testcase")}
    assert list(cases) == ["test_before", "test_skipped", *HANGING, "test_after"]
    reason = cases["test_hangs"].find("failure").text
    assert "did not end in" in reason
    assert len(re.findall(r'test_inner.py", line \d+ in test_hangs', reason)) == ranks
    assert "the job ended in this test" in cases["test_dies"].find("failure").text


HANGING = ["test_hangs", "test_dies"]


def test_what_is_left_is_given_up_in_words(session, tmp_path):
    """A job that has ended too often runs no more test, and says so of each."""
    options = [f"--record={tmp_path / 'record'}", f"--counts={tmp_path / 'counts'}", "--give-up"]
    (tmp_path / "record").write_text('{"test": "test_inner.py::test_before"}\n')
    done = session(1, HANGS, *options)
    assert done.returncode == 1
    assert done.stdout.count("not run: the job had ended too often") >= 3
    assert json.loads((tmp_path / "counts").read_text())["counts"] == {"failed": 1, "error": 4}


def test_warnings_are_errors(session):
    done = session(1, "import warnings\ndef test_warns():\n    warnings.warn('old')")
    assert done.returncode == 1 and "1 failed" in done.stdout


def test_limits_are_scaled():
    """By a factor that is 1 or more, and measured in seconds."""
    start_s = time.monotonic()
    factor = speed.measure()
    assert (
        1
        <= factor
        == pytest.approx(max(1, (time.monotonic() - start_s) / speed.REFERENCE_S), rel=0.1)
    )
    assert scaled(10) == 10 * speed.SLOWDOWN


def test_skip_on_one_rank_only_is_a_failure(session):
    """Ranks that do not agree on skipping a test fail it."""
    done = session(
        2,
        """
def test_disagree():
    if comm.rank == 1:
        pytest.skip("not here")
""",
    )
    assert done.returncode != 0
    assert done.stdout.count("1 failed") == 2
    assert "the ranks do not agree" in done.stdout


def test_different_tests_are_refused(session):
    """Ranks that collected different tests stop before the first."""
    done = session(
        2,
        """
@pytest.mark.parametrize("rank", [comm.rank])
def test_own(rank):
    comm.Barrier()
""",
    )
    assert done.returncode != 0
    assert done.seconds < scaled(30)
    assert "the ranks collected different tests" in done.stderr


def test_killed_rank_ends_the_run(session):
    """A rank that is killed takes the others with it."""
    done = session(
        2,
        """
def test_dies():
    import os
    if comm.rank == 1:
        os.kill(os.getpid(), 9)
    comm.Barrier()
""",
    )
    assert done.returncode != 0
    assert done.seconds < scaled(30)


def test_single_runs_on_one_rank_only(session):
    """A test marked `single` is left out on more ranks than one."""
    source = """
@pytest.mark.single
def test_alone():
    assert comm.size == 1

def test_all():
    pass
"""
    assert session(1, source).stdout.count("2 passed") == 1
    assert session(2, source).stdout.count("1 passed, 1 deselected") == 2


def add_up(folder, *steps):
    """Run tests/total.py; return its exit status and its lines."""
    total = TESTS / "total.py"
    command = [sys.executable, str(total), str(folder), str(time.time()), *steps]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return done.returncode, done.stdout.splitlines()


def write_report(folder, ranks, names=None, **counts):
    """What a session on some ranks leaves."""
    report = {"counts": counts, "names": names or {}}
    (folder / f"ranks-{ranks}.json").write_text(json.dumps(report))


def test_sum_of_good_runs(tmp_path):
    """The closing line is the sum over all rank counts."""
    write_report(tmp_path, 1, passed=2, skipped=1, deselected=7)
    write_report(tmp_path, 2, passed=2, skipped=1, warnings=1)
    status, lines = add_up(tmp_path, "ruff:0", "ranks-1:0", "ranks-2:0")
    assert status == 0
    assert len(lines) == 1
    assert re.fullmatch(r"=+ 4 passed, 2 skipped, 1 warning in \d+\.\d\ds =+", lines[0])


def test_sum_names_what_failed(tmp_path):
    """A failed test, a crashed run, one without a report and a linter's complaint all count."""
    names = {"failed": ["tests/test_a.py::test_bad"], "error": ["b", "c"]}
    write_report(tmp_path, 1, names, failed=1, passed=1, skipped=1, error=2)
    write_report(tmp_path, 2, passed=3)
    status, lines = add_up(tmp_path, "ruff:1", "ranks-1:1", "ranks-2:137", "ranks-3:0")
    assert status == 1
    assert lines[:-1] == [
        "FAILED ruff ended with status 1",
        "FAILED ranks-1 tests/test_a.py::test_bad",
        "ERROR ranks-1 b",
        "ERROR ranks-1 c",
        "FAILED ranks-2 ended with status 137",
        "FAILED ranks-3 left no report",
    ]
    assert "4 failed, 4 passed, 1 skipped, 2 errors in" in lines[-1]
