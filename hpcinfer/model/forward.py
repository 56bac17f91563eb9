"""A model on one rank of the grid, and its forward pass over the tokens of one step."""

import numpy as np

from hpcinfer import array, collectives
from hpcinfer.model import weights as tables
from hpcinfer.model.cache import Cache, page_bytes
from hpcinfer.model.context import Context
from hpcinfer.model.cut import cut_by_columns, cut_by_tokens
from hpcinfer.model.layer import add_positions, layer, norm
from hpcinfer.model.step import in_parts
from hpcinfer.ops.linear import linear
from hpcinfer.ops.rope import angles
from hpcinfer.parallel import vocabulary


class Model:
    """One rank's shard of a model: weights, cache, and what it owns of every cut axis.

    Parameters
    ----------
    arch : Architecture
    checkpoint : open checkpoint, read here and not kept
    grid : Grid
    device : Device
    dtype : element type of weights and cache
    """

    def __init__(self, arch, checkpoint, grid, device, dtype):
        self.arch, self.grid, self.device, self.dtype = arch, grid, device, dtype
        self.cache = self.expert_load = None
        self.context = Context(arch, grid, lambda n: (self.cache.k[n], self.cache.v[n]))
        self.heads = self.context.heads
        cp = grid.cp.size
        ranges = tables.owned(arch, grid.tp.size, grid.tp.rank, cp, grid.cp.rank)
        self.embed_range, self.head_range = ranges["embed"], ranges["head"]
        self.weights = tables.load(arch, checkpoint, ranges, dtype, device, cp)
        self._by_tokens = cut_by_tokens(arch, grid, ranges, self.weights)
        self._by_columns = cut_by_columns(arch, grid, ranges, self.weights, self.heads)

    @property
    def page_bytes(self):
        """Bytes of one cache page on this rank."""
        return page_bytes(
            self.arch.N, self.heads.n_kv, self.arch.K, self.dtype, self.arch.value_width
        )

    def cut(self, step):
        """How the work outside attention is divided among the ranks of cp in a step."""
        return self._by_columns if step.columns else self._by_tokens

    def allocate_cache(self, pages):
        """Give this rank a cache of `pages` pages."""
        self.cache = Cache(
            self.device,
            self.arch.N,
            self.heads.n_kv,
            self.arch.K,
            pages,
            self.dtype,
            self.arch.value_width,
        )

    def forward(self, step):
        """Hidden states of the wanted tokens, after the final norm.

        Parameters
        ----------
        step : Step

        Returns
        -------
        (R, D) float32, equal on every rank of the tensor and context axes
        """
        w, arch, mine = self.weights, self.arch, step.mine
        x = vocabulary.embed(self.grid.tp, step.token_ids[mine], w.embed, self.embed_range[0])
        if arch.learned_positions:
            x = add_positions(x, w.positions, step.positions[mine])
        rotation = None
        if arch.rope is not None:
            classes = None if step.length_classes is None else step.length_classes[mine]
            cos_sin = angles(arch.rope, step.positions[mine], classes)
            rotation = tuple(self.device.put(a) for a in cos_sin)
        for n in range(arch.N):
            x = layer(self, n, x, step, rotation)
        return norm(arch, self._wanted(x, step), w.final_norm, w.final_norm_bias)

    def logits(self, hidden):
        """Scores of this rank's part of the vocabulary: (R, D) -> (R, V/P)."""
        return linear(hidden, self.weights.head)

    def _wanted(self, x, step):
        """Hidden states of the wanted tokens on every rank: (T/P, D) -> (R, D)."""
        if step.columns:
            return x[array.namespace(x).asarray(step.rows)]
        xp, part = array.namespace(x), step.part[step.rows]
        own = np.searchsorted(step.mine, step.rows[part == self.grid.cp.rank])
        counts = np.bincount(part, minlength=step.parts).tolist()
        rows = collectives.Allgather(self.grid.cp, x[xp.asarray(own)], counts, purpose="wanted")
        return rows[xp.asarray(in_parts(part))]
