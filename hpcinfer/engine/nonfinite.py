"""Naming the weight that is behind logits that are not finite, once there are such.

Nothing is looked for as long as all is well. Then the ranks that found the logits read the model
once more together, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from hpcinfer.errors import NotFinite, agreed
from hpcinfer.grid import agree_all
from hpcinfer.heartbeat import here, waiting
from hpcinfer.io import integrity
from hpcinfer.io.atomic import AnyPath

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

    from hpcinfer.model.forward import Model


@contextmanager
def blame(path: AnyPath, model: Model) -> Iterator[None]:
    """Turn logits that are not finite into an error that names the tensor to blame.

    Collective over the ranks that share the vocabulary, all of which see the same logits.

    Parameters
    ----------
    path : where the model was read from
    model : Model

    Raises
    ------
    ValueError
        Instead of NotFinite.
    """
    try:
        yield
    except NotFinite as error:
        comm = model.grid.tp_cp
        text = _blame(path, comm, np.dtype(model.dtype)) or (
            f"{error}; all weights are finite, so the numbers between grow too large: try "
            "--dtype float32"
        )
        raised = ValueError(text)
        raise (agreed(raised) if comm.size == model.grid.comm.size else raised) from None


def check_weights(comm: Comm, path: AnyPath, dtype: np.dtype | None = None) -> int:
    """Read all weights, each by one rank; every rank calls this.

    Returns
    -------
    number of tensors that have a checksum

    Raises
    ------
    ValueError
        On every rank, for the first tensor with a fault.
    """
    # Read the own share, then hear of the others' faults.
    found, n_checksums = agree_all(comm, lambda: _check(path, comm, dtype))
    with waiting("allgather", comm, "check"):
        shares = comm.allgather((found, n_checksums))
    faults = [fault for fault, _ in shares if fault is not None]
    if faults:
        raise agreed(ValueError(min(faults, key=lambda fault: fault[0])[1].line))
    return sum(n for _, n in shares)


def _blame(path: AnyPath, comm: Comm, dtype: np.dtype) -> str | None:
    """Line about the first tensor with a fault, None if there is none or the model is gone."""
    try:
        check_weights(comm, path, dtype)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None


def _check(
    path: AnyPath, comm: Comm, dtype: np.dtype | None
) -> tuple[tuple[int, integrity.Fault] | None, int]:
    """The own share; whoever waits sees from layer to layer that this rank is at work."""

    def note(name: str) -> None:
        here.layer = integrity.layer_of(name)

    return integrity.check(path, comm.rank, comm.size, dtype, note)
