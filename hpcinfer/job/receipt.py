"""What a finished run leaves beside its first output: what it was asked for, and what it wrote.

A job that is put back into the queue after its end finds it, and computes nothing again. Whether a
run is this very one is known before the model is loaded: what counts is what was asked for, not
what follows from it; the layout and the machine do not count.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from hpcinfer.io.activations import open_activations
from hpcinfer.io.lines import digest
from hpcinfer.io.models import open_checkpoint
from hpcinfer.io.state import DONE_SUFFIX, read_state, write_state
from hpcinfer.job.state import identity_of_input

if TYPE_CHECKING:
    from hpcinfer.job.settings import JobSettings


def write_receipt(settings: JobSettings, checksum: str) -> None:
    """Write ``OUTPUT.done``, once the outputs are complete; on the root.

    Parameters
    ----------
    settings : JobSettings
    checksum : of the model

    Raises
    ------
    RuntimeError
        If it cannot be written.
    """
    outputs = {os.path.basename(path): digest(path) for path in settings.targets}
    receipt = {"asked": _asked(settings, checksum), "outputs": outputs}
    write_state(f"{settings.targets[0]}{DONE_SUFFIX}", receipt)


def is_done(settings: JobSettings) -> bool:
    """True if the outputs are those that this very run has finished; on the root."""
    # Without a whole receipt nothing is known; the outputs must be what was written.
    try:
        receipt = read_state(f"{settings.targets[0]}{DONE_SUFFIX}")
        if receipt is None:
            return False
        written = {os.path.basename(path): digest(path) for path in settings.targets}
        if settings.kind == "extract":
            open_activations(settings.targets[0]).close()
    except ValueError:
        return False

    # The model is looked at last, as it may be large.
    with open_checkpoint(settings.model) as checkpoint:
        return receipt == {"asked": _asked(settings, checkpoint.checksum), "outputs": written}


def _asked(settings: JobSettings, checksum: str) -> dict:
    """All that decides the results, in plain values."""
    asked = identity_of_input(settings) | {
        "model": checksum,
        "dtype": settings.dtype,
        "context": settings.context,
        "sampling": {k: v for k, v in settings.sampling.items() if v is not None},
        "selection": None if settings.selection is None else settings.selection.facts,
    }
    return json.loads(json.dumps(asked))
