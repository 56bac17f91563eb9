"""ZeRO: each rank keeps a part of the parameters, and a layer is whole only while it is computed.

    before   every layer's parameters in P parts, one on each rank; small ones whole on one rank
    after    the parameters of one layer whole on every rank
    cost     per layer 1 Allgather of its n large bytes: n (P-1)/P sent per rank, and 1 Bcast of its
             m small bytes: m sent by their owner; every parameter counts as a multiple of 64 bytes
    memory   n/P of every layer, m of the layers a rank owns, and two layers whole (one if nothing
             is fetched ahead)
    source   Rajbhandari et al. 2019, section 5.3, stage 3 (arXiv:1910.02054)

Ranks that hold equal parameters (replicas, or parts of a sequence) need not each keep them. The
parameters of a layer lie end to end in one run of bytes, which is cut in P equal parts whatever
their shapes; one Allgather brings the layer back. Norms and biases are too small to be worth that:
one rank owns them and broadcasts them. The next layer's gather is in flight while this layer
computes, into the buffer that the layer before has left.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from hpcinfer import array, collectives, partition
from hpcinfer.array import Array

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

SMALL_BYTES = 1 << 16  # parameters below it are broadcast
ALIGN = 64  # every parameter begins at a multiple of this many bytes


@dataclass
class Unit:
    """Parameters that are fetched together, as one rank keeps them.

    Attributes
    ----------
    specs : dict name -> (offset, shape, dtype), offsets in `large` or in `small`
    large : names of the parameters that are cut; the others are broadcast
    counts : bytes of the cut parameters that every rank keeps
    part : (counts[rank],) uint8, this rank's
    small : (m,) uint8 on the owner, None elsewhere
    small_bytes : m
    owner : rank that broadcasts
    """

    specs: dict
    large: frozenset
    counts: list
    part: np.ndarray
    small: np.ndarray | None
    small_bytes: int
    owner: int

    @property
    def kept_bytes(self) -> int:
        """Bytes that this rank keeps."""
        return self.part.nbytes + (0 if self.small is None else self.small.nbytes)

    @property
    def whole_bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(self.counts) + self.small_bytes


def cut(
    comm: Comm, parameters: dict[object, Array], small_bytes: float = SMALL_BYTES, owner: int = 0
) -> Unit:
    """What one rank keeps of some parameters. Sends nothing.

    Parameters
    ----------
    parameters : dict name -> array, equal on every rank
    small_bytes : parameters of fewer bytes are broadcast by `owner`; infinity for all
    owner : rank

    Returns
    -------
    Unit

    Raises
    ------
    ValueError
        If `owner` is no rank of the communicator.
    """
    if not 0 <= owner < comm.size:
        raise ValueError(f"zero: got owner {owner}, need a rank of {comm.size}")
    large = frozenset(name for name, x in parameters.items() if x.nbytes >= small_bytes)
    specs, ends = {}, {True: 0, False: 0}
    for name, x in parameters.items():
        start = ends[name in large]
        specs[name] = start, x.shape, x.dtype
        ends[name in large] = start + -(-x.nbytes // ALIGN) * ALIGN

    # Lay the parameters end to end and keep the own bytes.
    ranges = partition.block(ends[True], comm.size)
    start, stop = ranges[comm.rank]
    small = _flat(parameters, specs, parameters.keys() - large, 0, ends[False])
    return Unit(
        specs,
        large,
        partition.counts(ranges),
        _flat(parameters, specs, large, start, stop),
        small if comm.rank == owner else None,
        ends[False],
        owner,
    )


class Gathered:
    """Units in the order of computation, each whole from its `get` until the next.

    Parameters
    ----------
    comm : communicator of the ranks that keep the parts
    units : list of Unit
    xp : array module of the parameters
    ahead : True to fetch the next unit while this one is in use
    around : True to fetch the first unit while the last is in use, for who goes through the units
        again and again; `settle` then ends the last round
    """

    def __init__(
        self,
        comm: Comm,
        units: list[Unit],
        xp: ModuleType = np,
        ahead: bool = True,
        purpose: str = "zero",
        around: bool = False,
    ):
        self.comm, self.units, self.purpose = comm, units, purpose
        self._ahead, self._around = ahead, around
        size = max((unit.whole_bytes for unit in units), default=0)
        self._buffers = [xp.empty(size, np.uint8) for _ in range(1 + ahead)]
        self._started, self._whole, self._buffer_of = {}, None, {}

    @property
    def peak_bytes(self) -> int:
        """Bytes of parameters that this rank ever holds: its parts and the buffers."""
        return sum(unit.kept_bytes for unit in self.units) + sum(b.nbytes for b in self._buffers)

    def get(self, i: int) -> dict:
        """Parameters of unit i, whole: dict name -> array, good until the next `get`.

        Every rank must ask in the same order. The order of the units is the fast one; any other is
        right too. Of a unit that is whole already nothing is fetched.
        """
        if i == self._whole:
            return self._views(i)
        if i not in self._started:
            self.settle()
            self._start(i)
        for transfer in self._started.pop(i):
            transfer.wait()
        self._whole = i

        # Fetch what follows into the buffer that the unit before has left.
        after = (i + 1) % len(self.units)
        if self._ahead and after != i and (after > i or self._around):
            self._start(after)
        return self._views(i)

    def test(self) -> None:
        """Let MPI move on what is in flight."""
        for transfers in self._started.values():
            for transfer in transfers:
                transfer.test()

    def settle(self) -> None:
        """Wait for what is in flight and not wanted any more."""
        while self._started:
            for transfer in self._started.popitem()[1]:
                transfer.wait()

    def _start(self, i):
        unit = self.units[i]
        busy = self._buffer_of.get(self._whole, -1)
        self._buffer_of = {self._whole: busy, i: (busy + 1) % len(self._buffers)}
        large, small = self._halves(i)
        transfers = []
        if len(large):
            transfers.append(
                collectives.Iallgather(self.comm, unit.part, large, unit.counts, self.purpose)
            )
        if len(small):
            if unit.small is not None:
                small[...] = unit.small
            transfers.append(collectives.Ibcast(self.comm, small, unit.owner, self.purpose))
        self._started[i] = transfers

    def _halves(self, i):
        """Where the cut and the broadcast parameters of unit i stand when they are whole."""
        unit, buffer = self.units[i], self._buffers[self._buffer_of[i]]
        middle = sum(unit.counts)
        return buffer[:middle], buffer[middle : unit.whole_bytes]

    def _views(self, i):
        unit, (large, small) = self.units[i], self._halves(i)
        views = {}
        for name, (start, shape, dtype) in unit.specs.items():
            nbytes = int(np.prod(shape)) * dtype.itemsize
            flat = large if name in unit.large else small
            views[name] = flat[start : start + nbytes].view(dtype).reshape(shape)
        return views


def _flat(parameters, specs, names, start, stop):
    """Bytes start..stop-1 of the parameters `names` laid end to end."""
    arrays = [parameters[name] for name in names]
    xp = array.namespace(arrays[0]) if arrays else np
    flat = xp.zeros(stop - start, np.uint8)
    for name in names:
        offset, x = specs[name][0], parameters[name]
        first, last = max(start, offset), min(stop, offset + x.nbytes)
        if first < last:
            raw = xp.ascontiguousarray(x).reshape(-1).view(np.uint8)
            flat[first - start : last - start] = raw[first - offset : last - offset]
    return flat
