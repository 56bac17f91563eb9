"""A model on one rank of the grid, and its forward pass over the tokens of one step."""

from hpcinfer import partition
from hpcinfer.model import weights as tables
from hpcinfer.model.cache import Cache, page_bytes
from hpcinfer.model.layer import add_positions, ffn_middle, layer, norm
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
        P, rank = grid.tp.size, grid.tp.rank
        self.heads = partition.heads(arch.H, arch.G, P)[rank]
        self.vocabulary_start = partition.block(arch.V, P)[rank][0]
        self.middle = ffn_middle(arch)
        self.weights = tables.load(arch, checkpoint, P, rank, dtype, device)
        self.cache = None

    @property
    def page_bytes(self):
        """Bytes of one cache page on this rank."""
        return page_bytes(self.arch.N, self.heads.n_kv, self.arch.K, self.dtype)

    def allocate_cache(self, pages):
        """Give this rank a cache of `pages` pages."""
        self.cache = Cache(
            self.device, self.arch.N, self.heads.n_kv, self.arch.K, pages, self.dtype
        )

    def forward(self, step):
        """Hidden states of the wanted tokens, after the final norm.

        Parameters
        ----------
        step : Step

        Returns
        -------
        (R, D) float32, equal on every rank of the tensor axis
        """
        w, arch = self.weights, self.arch
        x = vocabulary.embed(self.grid.tp, step.token_ids, w.embed, self.vocabulary_start)
        if arch.learned_positions:
            x = add_positions(x, w.positions, step.positions)
        rotation = None
        if arch.rope is not None:
            rotation = tuple(
                self.device.put(a) for a in angles(arch.rope, step.positions, step.length_classes)
            )
        for n in range(arch.N):
            x = layer(self, n, x, step, rotation)
        return norm(arch, x[self.device.put(step.rows)], w.final_norm, w.final_norm_bias)

    def logits(self, hidden):
        """Scores of this rank's part of the vocabulary: (R, D) -> (R, V/P)."""
        return linear(hidden, self.weights.head)
