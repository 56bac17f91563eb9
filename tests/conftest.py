"""Fixtures of the suite, and one verdict per test over all ranks.

Every rank runs the same tests in the same order. After each phase of a test (set-up, call,
teardown) the ranks tell each other how it went, without blocking, over a communicator of their own:

- a test that fails on one rank fails on every rank, so no rank runs on alone into the next test;
- a rank that has failed waits `GRACE_S` for the others. If some do not arrive, because they wait
  for it in a collective, the job ends with its failure and the stacks of all ranks;
- a test that takes too long is stopped on one rank. On several the job ends with every rank's
  stacks: nobody knows what messages are under way.

With `--record FILE` every report is written down at once, and a session that finds the file takes
the tests in it as they were, the one in which the job ended as failed, and goes on with the rest:
`tests/run.sh` starts the tests again until one session comes to the end.

Works as plain `pytest` (one rank), as `mpirun -n P python -m pytest --with-mpi`, and in
`tests/run.sh`.
"""

import json
import os
import shutil
import signal
import tempfile
from functools import partial
from pathlib import Path

import pytest
from helpers.jobs import kill_children, run_job, since_boot_s
from helpers.paths import ROOT
from helpers.ranks import Ranks, Verdict
from helpers.record import Record
from helpers.speed import scaled
from mpi4py import MPI

GRACE_S = 10.0  # how long a failed rank waits for the others


def pytest_addoption(parser):
    group = parser.getgroup("ranks")
    group.addoption("--record", metavar="FILE", help="write every report to FILE; go on from it")
    group.addoption("--give-up", action="store_true", help="run no test that is not in the record")
    group.addoption("--counts", metavar="FILE", help="write the numbers of the summary, as JSON")


def pytest_configure(config):
    config.ranks = Ranks()
    config.record = None
    if path := config.option.record:
        config.record = Record(config, path, config.ranks.comm.rank == 0, config.option.give_up)
        config.pluginmanager.register(config.record)


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
    verdicts = ranks.exchange(own, scaled(GRACE_S) if report.failed else float("inf"))

    # End the job if the others wait for this rank, or are somewhere else
    missing = [rank for rank in range(ranks.comm.size) if rank not in verdicts]
    if missing:
        end_job(
            item.config,
            f"{item.nodeid} failed in {call.when} on rank {ranks.comm.rank}:\n"
            f"{report.longreprtext}\n{ranks.stacks()}\n"
            f"tests: rank(s) {missing} did not arrive in {scaled(GRACE_S):g} s; ending the job",
        )
    if len({(v.test, v.phase) for v in verdicts.values()}) > 1:
        places = [f"  rank {r}: {v.phase} of {v.test}" for r, v in sorted(verdicts.items())]
        end_job(
            item.config,
            "\n".join(["tests: the ranks are at different tests; ending the job", *places]),
        )

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


def end_job(config, text):
    """Note that the job ends in this test, say why, and end it on all ranks."""
    if config.record is not None:
        config.record.end(text)
    config.ranks.end(f"\n{text}")


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item, settings):
    """Stop a test that takes too long where one can; end the job where one cannot."""
    ranks, limit_s = item.config.ranks, scaled(settings.timeout)
    ranks.watch(limit_s, partial(give_up, item, limit_s))
    if ranks.comm.size == 1:
        signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"did not end in {limit_s:g} s"))
        signal.setitimer(signal.ITIMER_REAL, limit_s)
    return True


def give_up(item, limit_s):
    """End the job in a test that takes too long."""
    text = f"{item.nodeid} did not end in {limit_s:g} s; ending the job"
    end_job(item.config, f"{text}\n{item.config.ranks.stacks()}")


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_cancel_timer(item):
    """Let the limit hold after a failure too: pytest-timeout would leave teardown without one."""
    return True


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """Take the limit away after the test, and the processes that a test which failed has left."""
    start_s, n_failed = since_boot_s(), item.session.testsfailed
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        item.config.ranks.unwatch()
        if item.session.testsfailed > n_failed and item.config.ranks.comm.size == 1:
            kill_children(start_s)


def pytest_terminal_summary(terminalreporter, config):
    """Write down the numbers of the closing line."""
    if path := config.option.counts:
        stats = terminalreporter.stats
        counts = {kind: len(reports) for kind, reports in stats.items() if kind}
        names = {kind: [r.nodeid for r in stats.get(kind, [])] for kind in ("failed", "error")}
        Path(path).write_text(json.dumps({"counts": counts, "names": names}))


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
    marked `single`. A job that does not end in `timeout_s`, more on a slow machine, is killed, and
    the test fails with its output.
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
