"""Jobs that tests start: their environment, their end, and what they print."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from helpers.paths import ROOT
from helpers.speed import scaled

HPCINFER = (sys.executable, "-m", "hpcinfer")


def launch(ranks, *arguments):
    """Start a command and leave it running."""
    return subprocess.Popen(
        ["bash", ROOT / "jobs" / "site.sh", str(ranks), *HPCINFER, *map(str, arguments)],
        cwd=ROOT,
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def ranks_of(job):
    """Processes of the job that run hpcinfer, as far as they are alive."""
    found = []
    for process in psutil.Process(job.pid).children(recursive=True):
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        if command[:3] == list(HPCINFER):
            found.append(process)
    return found


def wait_for(condition, limit_s):
    """Seconds until a condition holds; the test fails if it does not in `limit_s`, scaled."""
    start_s = time.monotonic()
    while not condition():
        assert time.monotonic() - start_s < scaled(limit_s)
        time.sleep(0.05)
    return time.monotonic() - start_s


def alive(process):
    """True if a process runs; one that only waits to be collected does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# What a launcher tells its processes; a launch inside a test must not inherit it
LAUNCHER_PREFIXES = (
    "PMI_", "PMIX_", "HYD", "MPIEXEC_", "MPI_LOCAL", "PALS_", "SLURM_", "PRTE_LAUNCHED",
    "OMPI_COMM_", "OMPI_UNIVERSE_", "OMPI_FILE_", "OMPI_APP_", "OMPI_MCA_ess", "OMPI_MCA_orte",
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS",
)  # fmt: skip


@dataclass(frozen=True)
class Finished:
    """A command that came to its end: exit status, output, error output, time in seconds."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float


def run_job(ranks, *command, timeout_s=60, cwd=ROOT, **environment):
    """Run `command` on `ranks` ranks; see the fixture `mpirun`."""
    start_s = time.monotonic()
    job = subprocess.Popen(
        ["bash", str(ROOT / "jobs" / "site.sh"), str(ranks), *map(str, command)],
        cwd=cwd,
        env=clean_environment() | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        stdout, stderr = job.communicate(timeout=scaled(timeout_s))
    except subprocess.TimeoutExpired:
        kill_tree(job.pid)
        stdout, stderr = job.communicate()
        pytest.fail(f"{command} did not end in {scaled(timeout_s):g} s\n{stdout}\n{stderr}")
    return Finished(job.returncode, stdout, stderr, time.monotonic() - start_s)


def clean_environment():
    """Return the environment without a launcher's part, this Python's folder first on PATH."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_PREFIXES)}
    programs = Path(sys.executable).parent
    paths = [str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | {
        "HPCINFER_OVERSUBSCRIBE": "yes",
        "PATH": os.pathsep.join([str(programs), kept.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join(paths),
    }


def kill_tree(process):
    """Kill a process and all that descend from it."""
    parent = psutil.Process(process)
    kill_all([*parent.children(recursive=True), parent])


def since_boot_s():
    """Seconds since the machine was started, less the grain in which it tells processes' starts."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - 0.02


def kill_children(start_s):
    """Kill what descends from this process and was started after `start_s` of `since_boot_s`.

    What leads a session of its own, as the daemons of a module's fixture do, is left.
    """
    boot_s, children = psutil.boot_time(), psutil.Process().children(recursive=True)
    young = [child for child in children if child.create_time() - boot_s >= start_s]
    kill_all([child for child in young if not leads_session(child.pid)])


def leads_session(process):
    """True if a process has a session of its own; False if it has ended."""
    try:
        return os.getsid(process) == process
    except ProcessLookupError:
        return False


def kill_all(processes):
    """Kill processes, as far as they are still there."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
