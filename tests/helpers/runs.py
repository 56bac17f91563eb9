"""Runs over files by an engine that is there already, as a job makes them."""

import os
from contextlib import contextmanager

from helpers.paths import SHIPPED
from hpcinfer.grid import agree
from hpcinfer.io.state import DONE_SUFFIX
from hpcinfer.job.files import open_state
from hpcinfer.job.run import Job
from hpcinfer.job.settings import JobSettings
from hpcinfer.job.state import RunState
from hpcinfer.job.stop import Stop


def start(engine, kind, source, outputs, sampling=None, stop=None, **options):
    """One start of a run of the shipped model; every rank calls this.

    It leaves no receipt, so that the next one replaces what is finished.

    Parameters
    ----------
    options : of `JobSettings`, such as `checkpoint_every`, `restart` and `checkpoint_kv`
    """
    options = {"seed": engine.seed, "overwrite": True} | options
    settings = JobSettings(kind, str(SHIPPED), source, outputs, sampling or {}, **options)
    with open_state(engine.grid.comm, settings) as (state, lines):
        Job(settings, engine, lines, state, stop or Stop()).run()
        if engine.grid.is_root:
            os.unlink(f"{outputs[0]}{DONE_SUFFIX}")


@contextmanager
def held(comm, outputs, **options):
    """The state of a run that holds its outputs and does nothing."""
    with RunState(outputs, 60.0, **options) as state:
        agree(comm, state.open)
        yield state
