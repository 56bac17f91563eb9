"""The weights of a rank that keeps a part of them only, by the room `zero`.

The ranks of dp and cp hold equal layers, so each keeps a part of every layer. Experts that are
spread over cp are equal over dp only, and so is a head of its own, which is cut over cp. The final
norm stays whole.
"""

from dataclasses import fields, replace

import numpy as np

from hpcinfer.model.weights.parameters import Layer
from hpcinfer.ops.quantize import form_of, from_arrays, to_arrays
from hpcinfer.parallel import zero

_EXPERTS = ("experts_up", "experts_down")


class ZeroWeights:
    """In the place of `Weights`: parameters are whole from their fetching until the next ones'.

    Parameters
    ----------
    grid : Grid
    layers : range, those of this rank's stage
    xp : array module of the parameters

    Attributes
    ----------
    final_norm, final_norm_bias : (D,) float32
    """

    def __init__(self, grid, layers, xp):
        self._layers, self._xp = layers, xp
        self._small = np.inf if grid.layout.zero == "broadcast" else zero.SMALL_BYTES
        self._all, self._dp = grid.dp_cp, grid.dp

        # Experts are equal on fewer ranks than the rest, or on one alone.
        spread = grid.experts is not None
        self._experts_comm = None
        if spread and not grid.layout.experts_over_dp:
            self._experts_comm = grid.dp
        self._resident = spread and self._experts_comm is None
        self._common, self._experts, self._rest = [], [], []

    def keep_layer(self, n, layer):
        """Keep this rank's part of a layer, which is whole at hand now."""
        parameters = {f.name: x for f in fields(Layer) if (x := getattr(layer, f.name)) is not None}
        apart = {}
        if self._resident or self._experts_comm is not None:
            apart = {name: parameters.pop(name) for name in _EXPERTS if name in parameters}
        owner = n - self._layers.start
        self._common.append(self._cut(self._all, parameters, owner))
        if self._experts_comm is not None:
            self._experts.append(self._cut(self._experts_comm, apart, owner))
            apart = {}
        self._rest.append(Layer(**apart))

    def keep_rest(self, weights):
        """Keep this rank's part of what stands outside the layers; returns the pieces."""
        self.final_norm, self.final_norm_bias = weights.final_norm, weights.final_norm_bias
        outer = {"embed": weights.embed, "positions": weights.positions}
        outer = {name: x for name, x in outer.items() if x is not None}
        self._outer = self._cut(self._all, outer, 0)
        self._head_at = weights.tied_rows
        apart = weights.head is not None and weights.tied_rows is None
        head = {"head": weights.head} if apart else {}
        self._head = self._cut(self._dp, head, 0)
        self._gathered = [zero.Gathered(self._all, self._common, self._xp, around=True)]
        if self._experts_comm is not None:
            self._gathered.append(
                zero.Gathered(self._experts_comm, self._experts, self._xp, around=True)
            )
        self._output = None
        return self

    def layer(self, n):
        """Parameters of layer n, whole until the next layer is asked for."""
        i, whole = n - self._layers.start, {}
        for gathered in self._gathered:
            whole |= _parameters(gathered.get(i))
        return replace(self._rest[i], **whole)

    def embedding(self):
        """(embed, positions), whole as long as the caller keeps them."""
        whole = self._fetch(self._all, self._outer)
        return whole.get("embed"), whole.get("positions")

    def output(self):
        """The head, whole until `release`."""
        if self._output is None:
            if self._head_at is not None:
                self._output = self._fetch(self._all, self._outer)["embed"][self._head_at]
            else:
                self._output = self._fetch(self._dp, self._head)["head"]
        return self._output

    def release(self):
        """Forget the head."""
        self._output = None

    def test(self):
        """Let MPI move on what is in flight."""
        for gathered in self._gathered:
            gathered.test()

    def settle(self):
        """Wait for what is in flight."""
        for gathered in self._gathered:
            gathered.settle()
        self.release()

    @property
    def nbytes(self):
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
