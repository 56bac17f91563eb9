"""What the engine asks of a rank's part of a model, whatever that part is."""

from typing import Any, Protocol

import numpy as np

from hpcinfer.array import Device
from hpcinfer.grid import Grid
from hpcinfer.model.architecture import Architecture
from hpcinfer.model.weights.parameters import Parameters


class ModelShard(Protocol):
    """One rank's part of a model; by default it has no cache and shares nothing.

    Attributes
    ----------
    weights : Parameters
    expert_load : ExpertLoad, counts the experts that tokens choose
    page_bytes : bytes of one cache page on this rank; 0 without a cache
    pools : ranks that the pages of a sequence are dealt to
    """

    arch: Architecture
    grid: Grid
    device: Device
    dtype: np.dtype
    weights: Parameters
    expert_load: Any
    page_bytes: int = 0
    pools: int = 1

    def share_weights(self) -> bool:
        """Let the ranks of a node have one copy of what they hold alike; every rank calls this.

        Returns
        -------
        False if this rank must read its weights alone after all
        """
        return True

    def allocate_cache(self, pages: int) -> None:
        """Give this rank a cache of `pages` pages, if it has one; every rank calls this."""

    def settle(self) -> None:
        """Wait for what is in flight, at the end of a run."""
