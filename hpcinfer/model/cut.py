"""How the ranks of cp and tp divide the work outside attention: by tokens, or by columns.

In prefill each rank computes its own tokens with all the columns that it shares out over tp only.
In decoding there are few tokens, and time goes into reading weights: then each rank computes all
tokens with its part of the columns, so that every weight is read once by all ranks together (the
shape of Helix, Bhatia 2025, arXiv:2507.07120). The columns are views of the same parameters.

The ranks that divide columns hold equal tokens between the halves of a layer, or, with sequence
parallelism, each keeps a part of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from hpcinfer import collectives, partition
from hpcinfer.array import Array
from hpcinfer.grid import Grid
from hpcinfer.model.architecture import Architecture
from hpcinfer.model.weights.parameters import slice_columns
from hpcinfer.model.weights.table import FFN_CUTS
from hpcinfer.ops import activation
from hpcinfer.parallel import sequence, tensor
from hpcinfer.partition import Heads

_MOE = FFN_CUTS.index("moe")


@dataclass(frozen=True)
class Cut:
    """One way to divide the products of a layer.

    Attributes
    ----------
    comm : communicator of the ranks that divide columns
    counts : tokens that each of them keeps between the halves of a layer; None if all keep all
    complete : function (x, products, bias, purpose) that completes the partial sums of `products`,
        as `tensor.complete` and `sequence.complete` do
    layer : function of a layer's number, this rank's parameters
    between, experts_between, shared_between : what stands between the two products of a dense FFN,
        of an expert, of the shared experts
    first_expert : number of the first expert that this rank owns
    whole : function (T, own columns) -> (T, C/P) that completes queries, keys and values
    """

    comm: object
    counts: list | None
    complete: Callable
    layer: Callable
    between: Callable
    experts_between: Callable
    shared_between: Callable
    first_expert: int
    whole: Callable

    def rows(self, T: int) -> slice:
        """Slice of this rank's tokens among the T that the ranks of `comm` compute together."""
        return slice(*partition.block(T, self.comm.size)[self.comm.rank])

    def own(self, x: Array) -> Array:
        """Tokens for which this rank answers alone: (T, D) or, if cut, (T/P, D) -> (T/P, D)."""
        return x if self.counts else x[self.rows(len(x))]

    def everywhere(self, y: Array, T: int) -> Array:
        """What each rank found for its own tokens, where the T tokens are: the inverse of `own`."""
        if self.counts:
            return y
        counts = partition.counts(partition.block(T, self.comm.size))
        return collectives.Allgather(self.comm, y, counts, purpose="own tokens")


def cut_by_tokens(arch: Architecture, grid: Grid, ranges: dict[str, tuple], layer: Callable) -> Cut:
    """Own tokens, all columns of the tensor-parallel shard."""
    widths = [partition.counts(_parts(ranges, c, grid.cp.size)) for c in FFN_CUTS]
    complete = partial(tensor.complete, grid.tp)
    middles = [_between(arch, of_parts) for of_parts in widths]
    first = ranges["experts"][0]
    return Cut(grid.tp, None, complete, layer, *middles, first, lambda qkv: qkv)


def kept_at_home(cut: Cut, counts: list[int]) -> Cut:
    """The same cut where each rank keeps `counts[rank]` of the tokens between the halves."""

    def complete(x, products, bias=None, purpose="sequence"):
        return sequence.complete(cut.comm, x, counts, products, bias, purpose)

    return replace(cut, counts=counts, complete=complete)


def cut_by_columns(
    arch: Architecture, grid: Grid, ranges: dict[str, tuple], whole_layer: Callable, heads: Heads
) -> Cut:
    """All tokens, a part of the columns of the tensor-parallel shard."""
    cp, part, K = grid.cp.size, grid.cp.rank, arch.K
    blocks = partition.block(heads.n_query + 2 * heads.n_kv, cp)
    counts = [n * K for n in partition.counts(blocks)]
    widths = [partition.counts(_parts(ranges, c, cp)) for c in FFN_CUTS]
    bounds = [_parts(ranges, c, cp)[part] for c in FFN_CUTS]
    slices = [_column_and_row(arch, *bound) for bound in bounds]
    middles = [_between(arch, [stop - start]) for start, stop in bounds]
    if grid.experts is not None:
        # Experts that live on one rank are not divided once more.
        slices[_MOE], middles[_MOE] = (slice(None), slice(None)), _between(arch, widths[_MOE])

    def layer(n):
        return slice_columns(
            whole_layer(n),
            _scaled(blocks[part], K),
            _scaled(query_heads(heads, cp)[part], K),
            *slices,
        )

    def whole(qkv):
        return collectives.Allgather(grid.cp, qkv, counts, axis=1, purpose="qkv")

    complete = partial(tensor.complete, grid.tp_cp)
    return Cut(grid.tp_cp, None, complete, layer, *middles, ranges["experts"][0], whole)


def query_heads(heads: Heads, cp: int) -> list[tuple[int, int]]:
    """(start, stop) among a rank's query heads whose outputs each part of cp projects."""
    return partition.block(heads.n_query, cp)


def _between(arch, widths):
    """An FFN's non-linearity, gated in blocks of columns or not."""
    function = activation.activation(arch.activation)
    if arch.gated:
        return activation.Gate(function, tuple(widths))
    return function


def _parts(ranges, cut, cp):
    """The columns of every part of cp among those of this rank."""
    start, stop = ranges[cut]
    return partition.block(stop - start, cp)


def _column_and_row(arch, start, stop):
    """Slices of the column cut's rows and of the row cut's inputs for some columns."""
    rows = 2 if arch.gated else 1
    return slice(rows * start, rows * stop), slice(start, stop)


def _scaled(bounds, unit):
    return slice(bounds[0] * unit, bounds[1] * unit)
