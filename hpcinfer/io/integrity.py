"""Reading every weight of a model to see whether it is sound: checksums, and values that are none.

A damaged weight is a number as any other, and the answers that come of it are wrong without a word;
only the checksums of a converted model tell. NaN and infinity are found in either kind of model.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hpcinfer import array
from hpcinfer.io.atomic import AnyPath
from hpcinfer.io.checkpoint import Checkpoint, TensorInfo, is_floating, raw
from hpcinfer.io.models import open_checkpoint

_LAYER = re.compile(r"(?:^|\.)(\d{1,9})\.")


@dataclass(frozen=True)
class Fault:
    """What is wrong with one tensor.

    Attributes
    ----------
    name : of the tensor
    found, needed : what was got and what is needed
    """

    name: str
    found: str
    needed: str

    @property
    def line(self) -> str:
        """The fault as one line of an error."""
        layer = layer_of(self.name)
        where = self.name if layer is None else f"{self.name} (layer {layer})"
        return f"weights: got {self.found} in {where}, need {self.needed}"


def layer_of(name: str) -> int | None:
    """Number of the layer that a tensor belongs to, None outside of layers."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def check(
    path: AnyPath | Checkpoint,
    share: int = 0,
    shares: int = 1,
    dtype: np.dtype | None = None,
    note: Callable[[str], None] | None = None,
) -> tuple[tuple[int, Fault] | None, int]:
    """Read the tensors of a model, or one of equal shares of them, and find the first fault.

    Parameters
    ----------
    path : model directory or converted .h5
    share, shares : which of how many parts, tensor by tensor
    dtype : element type that matrices must fit into; None for that of the file
    note : function of a tensor's name, called before it is read, or None

    Returns
    -------
    fault : (number of the tensor, Fault), or None if all is well
    n_checksums : tensors of the share that have a checksum
    """
    # Deal the tensors out in turn
    n_checksums = 0
    with open_checkpoint(path) as model:
        for i, info in enumerate(model.tensors.values()):
            if i % shares != share:
                continue
            if note is not None:
                note(info.name)
            fault = _fault(model, info, dtype)
            if fault is not None:
                return (i, fault), n_checksums
            n_checksums += info.crc32 is not None
    return None, n_checksums


def _fault(model: Checkpoint, info: TensorInfo, dtype: np.dtype | None) -> Fault | None:
    """What is wrong with a tensor; its checksum counts first, as it tells of damage."""
    computed, fault = 0, None
    dtype = dtype if len(info.shape) > 1 else None

    # Read on after a value that is none only where a checksum may say more
    for start, block in model.stream(info.name):
        if info.crc32 is not None:
            computed = zlib.crc32(raw(block), computed)
        if fault is None and is_floating(block.dtype):
            fault = _not_finite(info, start, block, dtype)
        if fault is not None and info.crc32 is None:
            return fault
    if info.crc32 is not None and computed != info.crc32:
        return Fault(
            info.name,
            f"checksum {computed:08x}",
            f"the stored {info.crc32:08x}; the file is damaged, convert or fetch the model again",
        )
    return fault


def _not_finite(
    info: TensorInfo, start: Sequence[int], block: np.ndarray, dtype: np.dtype | None
) -> Fault | None:
    """The first value of a block that is not finite, or is not once it has the type `dtype`."""
    with np.errstate(all="ignore"):
        values = array.widen(block) if block.dtype != np.float64 else block
        bad = ~np.isfinite(values)
        overflow = not bad.any()
        if dtype is not None and overflow:
            bad = ~np.isfinite(array.widen(values.astype(dtype)))
    if not bad.any():
        return None

    # Say where the first one is
    at = np.unravel_index(int(bad.argmax()), bad.shape)
    place = [int(first + i) for first, i in zip(start, at, strict=True)]
    if overflow and dtype is not None:
        need = f"values that {np.dtype(dtype).name} can hold; choose another --dtype"
    else:
        need = "finite numbers; fetch the model again"
    return Fault(info.name, f"{float(values[at]):g} at {place}", need)
