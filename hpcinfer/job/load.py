"""Loading the model of a job, and what the user should hear of the machine that it runs on."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from hpcinfer import array
from hpcinfer.engine.api import Engine, load
from hpcinfer.engine.placement import advice, spread_advice
from hpcinfer.ops import dispatch
from hpcinfer.requests.defaults import without_effect

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

    from hpcinfer.job.settings import JobSettings


def load_engine(comm: Comm, settings: JobSettings) -> Engine:
    """The engine of a job; every rank of the communicator calls this."""
    engine = load(
        settings.model,
        comm,
        settings.layout,
        settings.dtype,
        settings.device,
        kv_memory=settings.kv_memory,
        step_tokens=settings.step_tokens,
        sequences=settings.sequences,
        context=settings.context,
        seed=settings.seed,
        micro_batches=settings.micro_batches,
        check_weights=settings.check,
        kernels=settings.kernels,
    )
    _advise(engine, settings)
    return engine


def _advise(engine: Engine, settings: JobSettings) -> None:
    """Print, on the first rank, what keeps the run from being fast; every rank calls this."""
    device = engine.model.device
    lines = [
        advice(engine.grid.node, device),
        spread_advice(engine.grid),
        array.auto_warning(device) if settings.device == "auto" else None,
        without_effect(engine.generation_config) if settings.kind == "generate" else None,
        dispatch.notice() if device.name == "cpu" and settings.kernels == "auto" else None,
    ]
    if engine.grid.is_root:
        for line in filter(None, lines):
            print(line, file=sys.stderr, flush=True)
