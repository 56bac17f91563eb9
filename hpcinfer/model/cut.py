"""How the ranks of cp divide the work outside attention: by tokens, or by columns.

In prefill each rank computes its own tokens with all the columns that it shares out over tp only.
In decoding there are few tokens, and time goes into reading weights: then each rank computes all
tokens with its part of the columns, so that every weight is read once by all ranks together (the
shape of Helix, Bhatia 2025, arXiv:2507.07120). The columns are views of the same parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from hpcinfer import collectives, partition
from hpcinfer.model.weights import slice_columns
from hpcinfer.ops import activation
from hpcinfer.parallel import tensor


@dataclass(frozen=True)
class Cut:
    """One way to divide the products of a layer.

    Attributes
    ----------
    complete : function (x, products, bias, purpose) that completes the partial sums of `products`,
        as `tensor.complete` does
    layer : function of a layer's number, this rank's parameters
    middle : what stands between the FFN's two products
    whole : function (T, own columns) -> (T, C/P) that completes queries, keys and values
    """

    complete: Callable
    layer: Callable
    middle: Callable
    whole: Callable


def cut_by_tokens(arch, grid, ranges, weights):
    """Own tokens, all columns of the tensor-parallel shard."""
    widths = [stop - start for start, stop in _ffn_parts(ranges, grid.cp.size)]
    complete = partial(tensor.complete, grid.tp)
    return Cut(complete, weights.layer, _ffn_middle(arch, widths), lambda qkv: qkv)


def cut_by_columns(arch, grid, ranges, weights, heads):
    """All tokens, a part of the columns of the tensor-parallel shard."""
    cp, part, K = grid.cp.size, grid.cp.rank, arch.K
    blocks = partition.block(heads.n_query + 2 * heads.n_kv, cp)
    counts = [n * K for n in partition.counts(blocks)]
    start, stop = (bound - ranges["ffn"][0] for bound in _ffn_parts(ranges, cp)[part])
    rows = 2 if arch.gated else 1

    def layer(n):
        return slice_columns(
            weights.layer(n),
            qkv=_scaled(blocks[part], K),
            o=_scaled(query_heads(heads, cp)[part], K),
            up=slice(rows * start, rows * stop),
            down=slice(start, stop),
        )

    def whole(qkv):
        return collectives.Allgather(grid.cp, qkv, counts, axis=1, purpose="qkv")

    complete = partial(tensor.complete, grid.tp_cp)
    return Cut(complete, layer, _ffn_middle(arch, [stop - start]), whole)


def query_heads(heads, cp):
    """(start, stop) among a rank's query heads whose outputs each part of cp projects."""
    return partition.block(heads.n_query, cp)


def _ffn_middle(arch, widths):
    """The FFN's non-linearity, gated in blocks of columns or not."""
    function = activation.activation(arch.activation)
    if arch.gated:
        return lambda gate_up: activation.gated(function, gate_up, widths)
    return function


def _ffn_parts(ranges, cp):
    return [ranges[f"ffn {part}"] for part in range(cp)]


def _scaled(bounds, unit):
    return slice(bounds[0] * unit, bounds[1] * unit)
