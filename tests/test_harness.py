"""The harness itself: a failure, hang or disagreement of ranks ends the run, soon and in words."""

import re
import shutil
import subprocess
import sys
import time

import pytest
from helpers.paths import TESTS

pytestmark = pytest.mark.single

SETTINGS = """
[pytest]
markers = single
timeout_method = thread
"""
HEAD = """
import pytest
from mpi4py import MPI
comm = MPI.COMM_WORLD
"""


@pytest.fixture
def session(mpirun, tmp_path):
    """Function session(ranks, source, *options): run the test file `source` under the harness."""

    def run(ranks, source, *options):
        shutil.copy(TESTS / "conftest.py", tmp_path)
        shutil.copytree(TESTS / "helpers", tmp_path / "helpers", dirs_exist_ok=True)
        (tmp_path / "pytest.ini").write_text(SETTINGS)
        (tmp_path / "test_inner.py").write_text(HEAD + source)
        command = [sys.executable, "-m", "pytest", "--with-mpi", "-p", "no:cacheprovider"]
        return mpirun(ranks, *command, "--color=no", *options, cwd=tmp_path, timeout_s=50)

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
    assert done.seconds < 40
    assert "the reason" in done.stderr
    assert "rank(s) [0, 2] did not arrive in 10 s" in done.stderr
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
    assert done.seconds < 30
    assert done.stdout.count("1 error") == 2
    assert "no such device" in done.stdout


def test_hang_ends_at_the_time_limit_with_stacks(session):
    """Ranks that wait for a message that never comes are ended, every one's stack printed."""
    done = session(
        2,
        """
def test_waits():
    comm.recv(source=comm.rank, tag=7)
""",
        "--timeout=4",
    )
    assert done.returncode != 0
    assert 3 < done.seconds < 30
    assert done.stderr.count("Timeout (0:00:03)!") == 2
    assert done.stderr.count('test_inner.py", line 7 in test_waits') >= 2


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
    assert done.seconds < 30
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
    assert done.seconds < 30


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


REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_good"/>
<testcase classname="tests.test_a" name="test_left_out"><skipped type="pytest.skip"/></testcase>
<testcase classname="tests.test_a" name="test_{last}">{failure}</testcase>
</testsuite></testsuites>"""


def add_up(folder, *steps):
    """Run tests/total.py; return its exit status and its lines."""
    total = TESTS / "total.py"
    command = [sys.executable, str(total), str(folder), str(time.time()), *steps]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return done.returncode, done.stdout.splitlines()


def test_sum_of_good_runs(tmp_path):
    """The closing line is the sum over all rank counts."""
    for ranks in (1, 2):
        report = REPORT.format(last="too", failure="")
        (tmp_path / f"ranks-{ranks}.xml").write_text(report)
    status, lines = add_up(tmp_path, "ruff:0", "ranks-1:0", "ranks-2:0")
    assert status == 0
    assert len(lines) == 1
    assert re.fullmatch(r"=+ 4 passed, 2 skipped in \d+\.\d\ds =+", lines[0])


def test_sum_names_what_failed(tmp_path):
    """A failed test, a crashed run, one without a report and a linter's complaint all count."""
    report = REPORT.format(last="bad", failure='<failure message="assert 0"/>')
    (tmp_path / "ranks-1.xml").write_text(report)
    (tmp_path / "ranks-2.xml").write_text(report[:100])
    status, lines = add_up(tmp_path, "ruff:1", "ranks-1:1", "ranks-2:137", "ranks-3:0")
    assert status == 1
    assert lines[:-1] == [
        "FAILED ruff ended with status 1",
        "FAILED ranks-1 tests.test_a::test_bad",
        "FAILED ranks-2 ended with status 137",
        "FAILED ranks-3 left no report",
    ]
    assert "4 failed, 1 passed, 1 skipped in" in lines[-1]
