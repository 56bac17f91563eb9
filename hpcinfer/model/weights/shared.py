"""One copy of equal weights on a node: ranks that differ along dp and cp only map the same memory.

The first of them reads the weights from the checkpoint and puts them in memory that has no name;
the others map it for reading. What differs among them (with cp the head, and experts that are
spread over them) each keeps for itself. Nothing is left behind when the ranks end, however they
end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from hpcinfer import node
from hpcinfer.grid import Grid
from hpcinfer.model.weights.parameters import Layer, Weights
from hpcinfer.model.weights.table import EXPERT_KEYS
from hpcinfer.ops.quantize import QuantFormat, form_of, from_arrays, to_arrays

if TYPE_CHECKING:
    from mpi4py.MPI import Comm


_ALIGN = 64
_OUTSIDE = ("embed", "positions", "final_norm", "final_norm_bias")


@dataclass(frozen=True)
class ParameterAddress:
    """Where one parameter lies in the common memory.

    Attributes
    ----------
    layer, key : which parameter it is
    form : QuantFormat if it is quantised, else None
    arrays : (start, shape, dtype) of the arrays that it is made of
    """

    layer: int | None
    key: str
    form: QuantFormat | None
    arrays: tuple


def private_keys(grid: Grid) -> frozenset:
    """Keys of the parameters that ranks of one node do not have alike."""
    own, over_cp = frozenset(), grid.cp.size > 1
    if over_cp:
        own |= {"head"}
    if grid.experts is not None and (over_cp or grid.layout.experts_over_dp):
        own |= {*EXPERT_KEYS}
    return own


def share_weights(weights: Weights, comm: Comm, own: frozenset, tied_rows: slice | None) -> bool:
    """Let all ranks of a communicator have the parameters that its first rank has read.

    Parameters
    ----------
    weights : Weights, on the first rank whole, elsewhere what it does not share
    comm : ranks of one node with equal weights
    own : keys that are not shared
    tied_rows : slice of the embedding that is this rank's head; None if it has no head that is tied

    Returns
    -------
    True if this rank has them now; on the first it is always so. False where memory of another
    process cannot be mapped (a container of its own, for example), or where the file holds a head
    beside the embedding that was to be tied: it must then read the weights itself
    """
    # Put what the first rank has in common memory.
    memory = places = handle = None
    if comm.rank == 0 and (tied_rows is None or weights.tied_rows is not None):
        places, size = _places(weights, own)
        memory, handle = node.common_memory(size)
        _take(weights, places, memory, fill=True)

    # Map it on the others; a tied head follows its embedding.
    places, handle = comm.bcast((places, handle))
    if comm.rank > 0 and handle is not None:
        memory = node.map_common(handle)
        if memory is not None:
            _take(weights, places, memory)
            weights.tied_rows = tied_rows
    if tied_rows is not None and memory is not None:
        weights.head = weights.embed if weights.embed is None else weights.embed[tied_rows]

    # Let go of the handle when all have mapped the memory.
    comm.Barrier()
    if comm.rank == 0 and handle is not None:
        node.close_common(handle)
    return comm.rank == 0 or memory is not None


def _places(weights, own):
    """Places of all parameters that are shared, and the bytes of them together."""
    places, size = [], 0
    for layer, key, x in parameters(weights):
        if key not in own:
            arrays = []
            for part in to_arrays(x):
                arrays.append((size, part.shape, part.dtype))
                size += -(-part.nbytes // _ALIGN) * _ALIGN
            places.append(ParameterAddress(layer, key, form_of(x), tuple(arrays)))
    return places, size


def parameters(weights: Weights) -> Iterator[tuple]:
    """(layer, key, array) of every parameter; a head that is part of the embedding is none."""
    outside = _OUTSIDE if weights.tied_rows is not None else (*_OUTSIDE, "head")
    yield from ((None, key, x) for key in outside if (x := getattr(weights, key)) is not None)
    for n, layer in enumerate(weights.layers):
        for field in fields(Layer):
            if (x := getattr(layer, field.name)) is not None:
                yield n, field.name, x


def _take(weights, places, memory, fill=False):
    """Have the parameters in the common memory; if `fill`, put them there first, one at a time."""
    for place in places:
        target = weights if place.layer is None else weights.layers[place.layer]
        views = []
        for start, shape, dtype in place.arrays:
            stop = start + int(np.prod(shape)) * dtype.itemsize
            views.append(memory[start:stop].view(dtype).reshape(shape))
        if fill:
            for view, x in zip(views, to_arrays(getattr(target, place.key)), strict=True):
                view[...] = x
        setattr(target, place.key, from_arrays(place.form, views))
