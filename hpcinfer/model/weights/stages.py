"""Which layers each stage of a pipeline has: equal in number, in bytes, or in time.

The embedding stands on the first stage, the head on the last: they count as weight there.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike

from hpcinfer import partition
from hpcinfer.io.checkpoint import SCALES
from hpcinfer.layout import Layout
from hpcinfer.model.architecture import Architecture
from hpcinfer.model.weights.table import find, table


def layers_of_stage(
    arch: Architecture, layout: Layout, dtype: DTypeLike, tensors: dict = None
) -> list[range]:
    """Layers of every stage.

    Parameters
    ----------
    tensors : dict name -> TensorInfo of the checkpoint, of which those that are quantised count as
        what they are; None if none is

    Returns
    -------
    list of range, one per stage; some are empty where stages are more than layers
    """
    weigh = {"layers": _one, "memory": _bytes, "time": _work}[layout.stages]
    first, last, of_layers = weigh(arch, dtype, tensors or {})

    # The ends of the pipeline count as layers, and belong to its first and last stage all the same.
    runs = partition.stages([first, *of_layers, last], layout.pp)
    starts = [min(max(start - 1, 0), arch.N) for start, _ in runs]
    return [range(a, b) for a, b in zip(starts, [*starts[1:], arch.N], strict=True)]


def _one(arch, dtype, tensors):
    return 0, 0, [1] * arch.N


def _bytes(arch, dtype, tensors):
    """Bytes of the embedding, of the head, and of every layer."""
    sizes, width = dict.fromkeys([None, *range(arch.N)], 0), np.dtype(dtype).itemsize
    embed = head = arch.V * arch.D * width
    for row in table(arch):
        size = int(np.prod(row.shape)) * width
        info = tensors.get(find(row.name, tensors))
        if info is not None and info.coding is not None:
            size = info.nbytes + tensors[info.name + SCALES].nbytes
        sizes[row.layer] += size
        head = size if row.key == "head" else head
    return embed, head, [sizes[n] for n in range(arch.N)]


def _work(arch, dtype, tensors):
    """Numbers multiplied with each token: a layer's without the experts that it does not take."""
    _, head, layers = _bytes(arch, np.dtype(np.uint8), {})
    if arch.E:
        unused = 3 * arch.D * arch.moe_F * (arch.E - arch.router.k)
        layers = [n - unused * s for n, s in zip(layers, arch.sparse, strict=True)]
    return 0, head, layers
