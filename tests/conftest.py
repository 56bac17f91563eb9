"""Fixtures of the suite, and one verdict per test over all ranks.

Every rank runs the same tests in the same order. After each phase of a test (set-up, call,
teardown) the ranks tell each other how it went, without blocking, over a communicator of their own:

- a test that fails on one rank fails on every rank, so no rank runs on alone into the next test;
- a rank that has failed waits `GRACE_S` for the others. If some do not arrive, because they wait
  for it in a collective, it has their stacks printed, prints its own failure, and ends the job;
- a hang without a failure ends at the time limit of pytest-timeout, every rank's stack printed.

Works as plain `pytest` (one rank), as `mpirun -n P python -m pytest --with-mpi`, and in
`tests/run.sh`.
"""

import faulthandler
import os
import shutil
import signal
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.jobs import run_job
from helpers.paths import ROOT
from mpi4py import MPI

GRACE_S = 10.0  # how long a failed rank waits for the others
STACKS_S = 1.0  # how long before the time limit the stacks are printed


@dataclass(frozen=True)
class Verdict:
    """How one phase of one test went on one rank."""

    test: str
    phase: str
    outcome: str
    message: str = ""


class Ranks:
    """The ranks of this session, able to exchange verdicts.

    Attributes
    ----------
    comm : communicator of the verdicts alone, so that no message of a test can be taken for one
    processes : (host, process id) of every rank
    stderr : the terminal or log behind pytest's capture
    """

    def __init__(self):
        self.comm = MPI.COMM_WORLD.Dup()
        self.processes = self.comm.allgather((socket.gethostname(), os.getpid()))
        self.stderr = os.fdopen(os.dup(2), "w")
        faulthandler.register(signal.SIGUSR2, self.stderr, all_threads=True)

    def exchange(self, verdict, grace_s=float("inf")):
        """Return the verdicts by rank: of all ranks, or of those that arrived within `grace_s`."""
        comm, start_s = self.comm, time.monotonic()
        sends = [comm.isend(verdict, rank) for rank in range(comm.size) if rank != comm.rank]
        verdicts = {comm.rank: verdict}
        while len(verdicts) < comm.size:
            for rank in range(comm.size):
                if rank not in verdicts and comm.iprobe(rank):
                    verdicts[rank] = comm.recv(source=rank)
            waited_s = time.monotonic() - start_s
            if waited_s > grace_s:
                return verdicts
            time.sleep(0 if waited_s < 0.01 else 0.002)
        MPI.Request.waitall(sends)
        return verdicts

    def print_stacks(self, ranks):
        """Have `ranks` print their stacks, as far as they run on this host."""
        for rank in ranks:
            host, process = self.processes[rank]
            if host == socket.gethostname():
                os.kill(process, signal.SIGUSR2)
        time.sleep(1.0)

    def abort(self, text):
        """Print `text` and end the job on every rank."""
        print(text, file=self.stderr, flush=True)
        self.comm.Abort(1)
        os._exit(1)  # MPI_Abort may return


def pytest_configure(config):
    config.ranks = Ranks()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Leave the tests marked `single` to the session of one rank."""
    if MPI.COMM_WORLD.size > 1:
        single = [item for item in items if item.get_closest_marker("single")]
        items[:] = [item for item in items if not item.get_closest_marker("single")]
        config.hook.pytest_deselected(items=single)


def pytest_collection_finish(session):
    """Stop on every rank if the ranks do not hold the same tests."""
    names = "\n".join(item.nodeid for item in session.items)
    verdict = Verdict(names, "collection", "failed" if session.testsfailed else "passed")
    if len(set(session.config.ranks.exchange(verdict).values())) > 1:
        raise pytest.UsageError("tests: the ranks collected different tests; see each rank's log")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item, call):
    """Make the report of one phase, with the verdict of all ranks in it."""
    report = yield
    ranks = item.config.ranks
    own = Verdict(item.nodeid, call.when, report.outcome, headline(report))
    verdicts = ranks.exchange(own, GRACE_S if report.failed else float("inf"))

    # End the job if the others wait for this rank, or are somewhere else
    missing = [rank for rank in range(ranks.comm.size) if rank not in verdicts]
    if missing:
        ranks.print_stacks(missing)
        ranks.abort(
            f"\n{item.nodeid} failed in {call.when} on rank {ranks.comm.rank}:\n"
            f"{report.longreprtext}\n"
            f"tests: rank(s) {missing} did not arrive in {GRACE_S:g} s; ending the job"
        )
    if len({(v.test, v.phase) for v in verdicts.values()}) > 1:
        places = [f"  rank {r}: {v.phase} of {v.test}" for r, v in sorted(verdicts.items())]
        ranks.abort("\n".join(["tests: the ranks are at different tests; ending the job", *places]))

    # Fail here if it failed elsewhere, or if the ranks do not agree
    if len({v.outcome for v in verdicts.values()}) > 1 and not report.failed:
        lines = [f"  rank {r}: {v.outcome} {v.message}" for r, v in sorted(verdicts.items())]
        report.outcome = "failed"
        report.longrepr = "\n".join(["the ranks do not agree:", *lines])
        vars(report).pop("wasxfail", None)
    return report


def headline(report):
    """Return the first words of a failure, in one line."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else report.longreprtext if report.failed else ""
    return " ".join(text.split())[:300]


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item, settings):
    """Print this rank's stacks shortly before pytest-timeout ends it, and with it the others."""
    delay_s = max(settings.timeout - STACKS_S, settings.timeout / 2)
    faulthandler.dump_traceback_later(delay_s, file=item.config.ranks.stderr)


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_cancel_timer(item):
    faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    """Let rank 0 alone carry the exit status: another's would have it killed while it reports."""
    if session.config.ranks.comm.rank > 0:
        session.exitstatus = 0


def pytest_unconfigure(config):
    """Stay until rank 0 has printed its report."""
    config.ranks.exchange(Verdict("", "end", ""))


@pytest.fixture(scope="session")
def comm():
    """All ranks of this session."""
    return MPI.COMM_WORLD


@pytest.fixture
def shared_path(comm):
    """Empty folder, the same on all ranks; removed after the test."""
    path = comm.bcast(Path(tempfile.mkdtemp(prefix="hpcinfer-")) if comm.rank == 0 else None)
    yield path
    if comm.rank == 0:
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def mpirun():
    """Function mpirun(ranks, *command, timeout_s=60, cwd=ROOT, **environment) -> Finished.

    Runs a command, `hpcinfer` with its arguments for example, as an MPI job of its own. For tests
    marked `single`. A job that does not end in `timeout_s` is killed, and the test fails with its
    output.
    """
    return run_job


@pytest.fixture(scope="session")
def standin(tmp_path_factory):
    """Environment in which `import cupy` finds the stand-in of tests/standin, for `mpirun`."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    cache = os.environ.get("STANDIN_CACHE") or str(tmp_path_factory.mktemp("standin"))
    paths = [ROOT / "tests" / "standin", ROOT / "tests", ROOT]
    return {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "STANDIN_CACHE": cache,
        "STANDIN_DRIVER": "1",
    }


@pytest.fixture
def plain_forms():
    """Run the plain forms of all functions, which round no operand: the oracle of the fast ones."""
    from hpcinfer.ops import dispatch

    dispatch.use("plain")
    yield
    dispatch.use("auto")
