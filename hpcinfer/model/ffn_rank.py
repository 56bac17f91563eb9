"""An FFN rank of a model whose attention is on other ranks: weights of FFNs, and nothing else."""

from __future__ import annotations

from typing import Any

from numpy.typing import DTypeLike

from hpcinfer.array import Device
from hpcinfer.grid import Grid
from hpcinfer.heartbeat import here
from hpcinfer.model.architecture import Architecture
from hpcinfer.model.cut import cut_by_tokens
from hpcinfer.model.moe import routed_sum, shared_sum
from hpcinfer.model.shard import ModelShard
from hpcinfer.model.weights.expert_placement import expert_shares
from hpcinfer.model.weights.load import load
from hpcinfer.model.weights.table import FFN_KEYS, owned
from hpcinfer.ops.linear import linear_pair
from hpcinfer.parallel import disagg


class FfnRank(ModelShard):
    """One rank's shard of all FFNs; it has no cache and sees no sequence.

    Parameters
    ----------
    arch, checkpoint, grid, device, dtype, expert_load : as for `Model`
    """

    def __init__(
        self,
        arch: Architecture,
        checkpoint: Any,
        grid: Grid,
        device: Device,
        dtype: DTypeLike,
        expert_load,
    ):
        self.arch, self.grid, self.device, self.dtype = arch, grid, device, dtype
        self.expert_load = expert_load
        ranges = owned(arch, grid.tp.size, grid.tp.rank)
        if arch.E:
            share = expert_shares(arch, grid)[grid.experts.rank]
            ranges |= {"experts": share.experts, "moe": share.columns}
        self.weights = load(arch, checkpoint, ranges, dtype, device, keep=self._keeps)
        self._cut = cut_by_tokens(arch, grid, ranges, self.weights.layer)

    def serve(self, micro_batches: int) -> None:
        """Compute the FFN halves of all layers for the micro-batches of one round."""
        disagg.ffn_side(
            self.grid.inter,
            range(self.arch.N),
            micro_batches,
            self._compute,
            self.arch.D,
            self._choices,
            self.dtype,
            self.device.xp,
        )

    def _compute(self, n, x, ids, weights):
        """Own experts and columns of layer n for any attention ranks' tokens: (T, D) -> (T, D)."""
        here.layer = n
        w, cut = self._cut.layer(n), self._cut
        if not self.arch.sparse[n]:
            y = linear_pair(x, w.up, cut.between, w.down, w.up_bias)
            return y if w.down_bias is None else y + w.down_bias
        y = routed_sum(cut, w, x, ids, weights)
        return y + weights[:, -1:] * shared_sum(cut, w, x) if self.arch.shared_F else y

    def _choices(self, n):
        """Choices that come with each token of layer n."""
        return self.arch.router.k + (self.arch.shared_F > 0) if self.arch.sparse[n] else 1

    def _keeps(self, row):
        """True if a row of the table belongs to this side; the complete sum's bias to one rank."""
        if row.key == "down_bias" and self.grid.tp.rank > 0:
            return False
        return row.layer is not None and row.key in FFN_KEYS
