"""The weights of a rank that keeps a part of them only, by the strategy `zero`.

The ranks of dp and cp hold equal layers, so each keeps a part of every layer. Experts that are
spread over cp are equal over dp only, and so is a head of its own, which is cut over cp. The final
norm stays whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from types import ModuleType

import numpy as np

from hpcinfer.array import Array
from hpcinfer.grid import Grid
from hpcinfer.model.weights.parameters import Layer, Parameters
from hpcinfer.model.weights.table import EXPERT_KEYS
from hpcinfer.ops.quantize import form_of, from_arrays, to_arrays
from hpcinfer.parallel import zero


@dataclass(frozen=True)
class LayerParts:
    """What a rank keeps of one layer.

    Attributes
    ----------
    common : Unit of what all ranks of dp and cp have alike
    experts : Unit of experts that only those of dp have alike, or None
    rest : Layer, parameters that no other rank has
    """

    common: zero.Unit
    experts: zero.Unit | None
    rest: Layer


class ZeroWeights(Parameters):
    """Parameters that are whole from their fetching until the next ones'.

    Parameters
    ----------
    grid : Grid
    layers : range, those of this rank's stage
    xp : array module of the parameters
    load : function (keep_layer) -> Weights, which reads them as `load.load` does
    """

    def __init__(self, grid: Grid, layers: range, xp: ModuleType, load: Callable):
        self._layers, self._xp = layers, xp
        self._small = {"broadcast": np.inf, "allgather": zero.SMALL_BYTES}[grid.layout.zero]
        self._all, self._dp, self._output = grid.dp_cp, grid.dp, None

        # Find who has equal experts: fewer ranks than have the rest alike, or none.
        self._experts_apart = grid.experts is not None
        self._experts_alike = self._experts_apart and not grid.layout.experts_over_dp

        # Read, and keep parts of each layer, of the embedding, and of a head of its own.
        weights = load(self._parts)
        parts = [weights.layers[n] for n in layers]
        self.final_norm, self.final_norm_bias = weights.final_norm, weights.final_norm_bias
        outer = {"embed": weights.embed, "positions": weights.positions}
        outer = {name: x for name, x in outer.items() if x is not None}
        head_apart = weights.head is not None and weights.tied_rows is None
        head = {"head": weights.head} if head_apart else {}
        self._outer = self._cut(self._all, outer, 0)
        self._head, self._head_at = self._cut(self._dp, head, 0), weights.tied_rows

        # Fetch layers in the order of computation, again and again.
        self._rest = [part.rest for part in parts]
        common = [part.common for part in parts]
        self._gathered = [zero.Gathered(self._all, common, xp, around=True)]
        if self._experts_alike:
            experts = [part.experts for part in parts]
            self._gathered.append(zero.Gathered(self._dp, experts, xp, around=True))

    def _parts(self, n, layer):
        """This rank's part of a layer, which is whole at hand now."""
        parameters = {f.name: x for f in fields(Layer) if (x := getattr(layer, f.name)) is not None}
        apart, experts = {}, None
        if self._experts_apart:
            apart = {name: parameters.pop(name) for name in EXPERT_KEYS if name in parameters}
        owner = n - self._layers.start
        common = self._cut(self._all, parameters, owner)
        if self._experts_alike:
            experts, apart = self._cut(self._dp, apart, owner), {}
        return LayerParts(common, experts, Layer(**apart))

    def layer(self, n: int) -> Layer:
        """Parameters of layer n, whole until the next layer is asked for."""
        self._output = None
        i, whole = n - self._layers.start, {}
        for gathered in self._gathered:
            whole |= _parameters(gathered.get(i))
        return replace(self._rest[i], **whole)

    def embedding(self) -> tuple:
        """(embed, positions), whole as long as the caller keeps them."""
        self._output = None
        whole = self._fetch(self._all, self._outer)
        return whole.get("embed"), whole.get("positions")

    def output(self) -> Array:
        """The head, whole until a layer or the embedding is asked for, or the run ends."""
        if self._output is None:
            if self._head_at is not None:
                self._output = self._fetch(self._all, self._outer)["embed"][self._head_at]
            else:
                self._output = self._fetch(self._dp, self._head)["head"]
        return self._output

    def test(self) -> None:
        """Let MPI move on what is in flight."""
        for gathered in self._gathered:
            gathered.test()

    def settle(self) -> None:
        """Wait for what is in flight."""
        for gathered in self._gathered:
            gathered.settle()
        self._output = None

    @property
    def nbytes(self) -> int:
        """Bytes of parameters that this rank ever holds at a time."""
        units = [self._outer, self._head]
        resident = sum(
            x.nbytes for layer in self._rest for x in vars(layer).values() if x is not None
        )
        layers = sum(gathered.peak_bytes for gathered in self._gathered)
        outside = sum(u.kept_bytes for u in units) + max(u.whole_bytes for u in units)
        return resident + layers + outside

    def _cut(self, comm, parameters, owner):
        return zero.cut(comm, _arrays(parameters), self._small, owner % comm.size)

    def _fetch(self, comm, unit):
        return _parameters(zero.Gathered(comm, [unit], self._xp, ahead=False).get(0))


def _arrays(parameters):
    """The arrays that some parameters are made of, under (name, form, number) each."""
    return {
        (name, form_of(x), i): part
        for name, x in parameters.items()
        for i, part in enumerate(to_arrays(x))
    }


def _parameters(arrays):
    """dict name -> parameter, from what `_arrays` returned."""
    parts = {}
    for (name, form, _), part in arrays.items():
        parts.setdefault((name, form), []).append(part)
    return {name: from_arrays(form, of_name) for (name, form), of_name in parts.items()}
