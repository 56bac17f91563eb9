"""Naming the weight that is behind logits that are not finite, once there are such.

Nothing is looked for as long as all is well. Then the ranks that found the logits read the model
once more together, tensor by tensor.
"""

from contextlib import contextmanager

from hpcinfer.errors import NotFinite, agreed
from hpcinfer.grid import agree_all
from hpcinfer.heartbeat import here, waiting
from hpcinfer.io import integrity


@contextmanager
def blame(path, model):
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
        text = _blame(path, comm, model.dtype) or (
            f"{error}; all weights are finite, so the numbers between grow too large: try "
            "--dtype float32"
        )
        raised = ValueError(text)
        raise (agreed(raised) if comm.size == model.grid.comm.size else raised) from None


def check_weights(comm, path, dtype=None):
    """Read all weights, each by one rank; every rank calls this.

    Returns
    -------
    number of tensors that have a checksum

    Raises
    ------
    ValueError
        On every rank, for the first tensor with a fault.
    """
    found, n_checksums = agree_all(comm, lambda: _check(path, comm, dtype))
    with waiting("allgather", comm, "check"):
        shares = comm.allgather((found, n_checksums))
    faults = [fault for fault, _ in shares if fault is not None]
    if faults:
        raise agreed(ValueError(min(faults, key=lambda fault: fault[0])[1].line))
    return sum(n for _, n in shares)


def _blame(path, comm, dtype):
    """Line about the first tensor with a fault, None if there is none or the model is gone."""
    try:
        check_weights(comm, path, dtype)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None


def _check(path, comm, dtype):
    """The own share; whoever waits sees from layer to layer that this rank is at work."""

    def note(name):
        here.layer = integrity.layer_of(name)

    return integrity.check(path, comm.rank, comm.size, dtype, note)
