"""What the launcher says before MPI starts: rank and size; and how a job is started and aborted."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, NoReturn

from hpcinfer.errors import SIGNALLED, Interrupted, is_digits

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

# Seconds that a launcher is given to pass on what was printed before a job is aborted, which drops
# what it still holds; and that MPI is given to abort it.
_FORWARD_S, _ABORT_S = 0.3, 1.0

# Launchers tell a process its rank and number before MPI starts; the first that is set holds.
_RANK_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
_SIZE_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")

# What they tell begins so; a process that is no rank must not take itself for one.
_LAUNCHERS = ("PMI", "OMPI_", "PRTE", "HYD", "MPI", "PALS_", "SLURM_")


def launcher_rank() -> int:
    """Rank of this process as its launcher says, without starting MPI; 0 outside a launcher."""
    return _first_number(_RANK_VARIABLES) or 0


def launcher_size() -> int | None:
    """Number of ranks as the launcher says, without starting MPI; None if it does not."""
    return _first_number(_SIZE_VARIABLES)


def job_end_s() -> int | None:
    """When the batch system ends this job, in seconds since 1970; None if it does not say."""
    return _first_number(("SLURM_JOB_END_TIME",))


def abort(code: int) -> NoReturn:
    """End every rank of the job at once with exit code `code`; any thread may call this."""
    # What was printed needs a moment to get through the launcher; MPI may return, or never do so.
    time.sleep(_FORWARD_S)

    # End all ranks, and this one if MPI does not.
    MPI = sys.modules.get("mpi4py.MPI")
    if MPI is not None and MPI.Is_initialized() and not MPI.Is_finalized():
        last = threading.Timer(_ABORT_S, os._exit, (code,))
        last.daemon = True
        last.start()
        MPI.COMM_WORLD.Abort(code)
    os._exit(code)


def environment_of_child() -> dict[str, str]:
    """Environment for a process that this one starts: the same modules, but no rank."""
    kept = {name: v for name, v in os.environ.items() if not name.startswith(_LAUNCHERS)}
    folders = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    return kept | {"PYTHONPATH": folders}


class _Ending:
    """Handler of signals that raises `Interrupted` at the first and ends the process at another.

    What follows the first is the way out. A terminal and a launcher may both hand on one Ctrl-C, so
    that the next moment's signal is the same one.
    """

    _SAME_S = 1.0

    def __init__(self) -> None:
        self._first_s: float | None = None

    def __call__(self, number: int, frame: object) -> None:
        now_s = time.monotonic()
        if self._first_s is None:
            self._first_s = now_s
            raise Interrupted(number)
        if now_s - self._first_s > self._SAME_S:
            os._exit(SIGNALLED + number)


def raise_on_signals() -> None:
    """From now on SIGINT and SIGTERM end a command by `Interrupted`, in one line and tidied up.

    A run that can go on listens itself, see `hpcinfer.job.stop`.
    """
    ending = _Ending()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ending)


def world() -> Intracomm:
    """COMM_WORLD, started now, and checked against the number of processes launched.

    Raises
    ------
    RuntimeError
        If the launcher and MPI do not know each other, so that every process would be alone.
    """
    from mpi4py import MPI

    expected = launcher_size()
    if MPI.COMM_WORLD.size == 1 and expected is not None and expected > 1:
        raise RuntimeError(
            f"grid: got {expected} processes that MPI sees as 1 each, need one job; launch with "
            "the mpirun of the MPI in use, or srun with the --mpi= it supports (try --mpi=pmi2)"
        )
    return MPI.COMM_WORLD


def _first_number(names: Iterable[str]) -> int | None:
    """Value of the first variable that is set to a number; None without one."""
    for name in names:
        if is_digits(os.environ.get(name, "")):
            return int(os.environ[name])
    return None
