"""The start of a command on all ranks: listen for signals, watch over the ranks, do the job."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from hpcinfer.launcher import job_end_s, launcher_rank, world

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

    from hpcinfer.array import Device
    from hpcinfer.job.settings import JobSettings

# Seconds before the end of the batch job at which a run stops.
_JOB_END_S = 30.0


def run_job(settings: JobSettings) -> None:
    """Load the model, run the input through it, and print the report on the first rank.

    Every rank calls this.
    """
    from hpcinfer.job.stop import Stop

    # Listen for signals before the rest is imported, which takes its time.
    with Stop(_end_s(settings.time_limit)) as stop:
        from hpcinfer.engine.alike import OF_COMMAND, refuse_different
        from hpcinfer.job.files import open_state
        from hpcinfer.job.load import load_engine
        from hpcinfer.job.run import Job
        from hpcinfer.job.watchdog import Watchdog

        # Refuse what can be refused before the model is loaded, then do the job.
        comm = world()
        refuse_different(comm, "options", _alike(settings), remedy=OF_COMMAND)
        with (
            Watchdog(comm, settings.hang_timeout, stop.rescue),
            open_state(comm, settings) as (state, lines),
        ):
            if lines:
                engine = load_engine(comm, settings)
                job = Job(settings, engine, lines, state, stop)
                job.report(job.run())


def device_of(comm: Comm, choice: str) -> Device:
    """The device of this rank for a command without a model; every rank calls this.

    What the user should hear of the choice is printed on the first rank.

    Parameters
    ----------
    comm : communicator of all ranks
    choice : "cpu", "cuda" or "auto"
    """
    from mpi4py import MPI

    from hpcinfer import array
    from hpcinfer.engine.placement import take_device

    # Take the own share of the node's devices.
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    node.Set_name("node")
    device, _ = take_device(comm, node, choice)
    node.Free()

    # Say why "auto" has found no GPU.
    warning = array.auto_warning(device) if choice == "auto" else None
    if comm.rank == 0 and warning is not None:
        print(warning, file=sys.stderr, flush=True)
    return device


def _alike(settings: JobSettings) -> dict[str, str]:
    """What must be equal on every rank: all but what a node may have of its own."""
    own = {"model", "trace", "device", "kv_memory", "command_line"}
    return {name: repr(value) for name, value in vars(settings).items() if name not in own}


def _end_s(time_limit_s: float | None) -> float | None:
    """When to stop, in seconds since 1970: after the time limit, or before the job's end."""
    ends_s = []
    if time_limit_s is not None:
        ends_s.append(time.time() + time_limit_s)
    end_s = job_end_s()
    if end_s is not None and end_s > time.time():
        ends_s.append(end_s - _JOB_END_S)
    elif end_s is not None and launcher_rank() == 0:
        # Of another job, or of one that was given more time
        print(
            "time      the end of the job that SLURM_JOB_END_TIME names is past, and is not kept "
            "to; --time-limit sets another",
            file=sys.stderr,
        )
    return min(ends_s, default=None)
