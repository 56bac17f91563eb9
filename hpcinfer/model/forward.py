"""A model on one rank of the grid, and its forward pass over the tokens of some steps."""

from functools import partial

import numpy as np

from hpcinfer import array, collectives
from hpcinfer.heartbeat import here
from hpcinfer.model.attention import CachedAttention
from hpcinfer.model.cache import Cache, page_bytes
from hpcinfer.model.cut import cut_by_columns, cut_by_tokens, kept_at_home
from hpcinfer.model.graphs import Graphs
from hpcinfer.model.layer import add_norm, add_positions, attention_half, layer, norm
from hpcinfer.model.moe import choices_to_send
from hpcinfer.model.token_owners import holders, in_parts
from hpcinfer.model.weights import parameters as tables
from hpcinfer.model.weights.expert_placement import expert_shares, ffn_shares
from hpcinfer.model.weights.load import load
from hpcinfer.model.weights.shared import private_keys, share_weights
from hpcinfer.model.weights.stages import layers_of_stage
from hpcinfer.model.weights.table import FFN_KEYS, owned
from hpcinfer.model.weights.zero import ZeroWeights
from hpcinfer.ops.inplace import add_into
from hpcinfer.ops.rope import angles
from hpcinfer.parallel import disagg, matmul, vocabulary
from hpcinfer.parallel.pipeline import Pipeline


class Model:
    """One rank's shard of a model: weights, cache, and what it owns of every cut axis.

    Parameters
    ----------
    arch : Architecture
    checkpoint : open checkpoint, read here and not kept
    grid : Grid
    device : Device
    dtype : element type of weights and cache

    Attributes
    ----------
    layers : range, the layers of this rank's stage of the pipeline
    operand_type : type in which products are given what else is float32: on a GPU that of the
        weights, as rounding is one pass less there; on the CPU products round what they read
    pipeline : Pipeline, this rank's place in it
    expert_load : ExpertLoad, or None; counts the experts that tokens choose
    tap : object or None; its `wants(point)` says whether a point is wanted in any layer, its
        `take(point, n, x, step, rows)` gets what `show` is called with
    """

    def __init__(self, arch, checkpoint, grid, device, dtype):
        self.arch, self.grid, self.device, self.dtype = arch, grid, device, dtype
        self.cache = self.expert_load = self.tap = self._prepared = None
        self.operand_type = np.dtype(np.float32) if device.name == "cpu" else np.dtype(dtype)
        self.pipeline = Pipeline(grid.pp)
        self.layers = layers_of_stage(arch, grid.layout, dtype, checkpoint.tensors)[grid.pp.rank]
        self.attention = CachedAttention(
            arch, grid, lambda n: (self.cache.k[n], self.cache.v[n]), self
        )
        self.heads = self.attention.heads
        cp = grid.cp.size
        ranges = owned(arch, grid.tp.size, grid.tp.rank, cp, grid.cp.rank)
        if grid.experts is not None:
            share = expert_shares(arch, grid)[grid.experts.rank]
            ranges |= {"experts": share.experts, "moe": share.columns}
        self.embed_range, self.head_range = ranges["embed"], ranges["head"]
        zero = grid.layout.zero != "off"
        pieces = ZeroWeights(grid, self.layers, device.xp) if zero else None
        self._shares = grid.same_weights.size > 1 and not zero and device.name == "cpu"
        self._private_keys = private_keys(grid)
        self.ranges = ranges
        self.read(checkpoint, pieces)
        self._by_tokens = cut_by_tokens(arch, grid, ranges, self._layer)
        self._by_columns = cut_by_columns(arch, grid, ranges, self._layer, self.heads)
        self.graphs = Graphs(self)

    @property
    def page_bytes(self):
        """Bytes of one cache page on this rank."""
        return page_bytes(
            len(self.layers), self.heads.n_kv, self.arch.K, self.dtype, self.arch.value_width
        )

    @property
    def pools(self):
        """Ranks that the pages of a sequence are dealt to."""
        return self.attention.kv.size

    def read(self, checkpoint, pieces=None, alone=False):
        """Read this rank's weights; unless `alone`, without those that it will share."""
        follows = self._shares and self.grid.same_weights.rank > 0 and not alone

        def keep(row):
            return self._keeps(row) and (not follows or row.key in self._private_keys)

        arch, cp = self.arch, self.grid.cp.size
        self.weights = load(
            arch, checkpoint, self.ranges, self.dtype, self.device, cp, keep, pieces
        )

    def share_weights(self):
        """Let the ranks of a node have one copy of what they hold alike; every rank calls this.

        Returns
        -------
        False if this rank must `read` its weights alone after all
        """
        if not self._shares:
            return True
        tied = self.arch.tied and self.pipeline.is_last
        tied_rows = tables.tied_rows(self.ranges) if tied else None
        return share_weights(self.weights, self.grid.same_weights, self._private_keys, tied_rows)

    def cut(self, step):
        """How the work outside attention is divided among the ranks of cp and tp in a step."""
        if step.columns:
            return self._by_columns
        counts = step.counts_at_home(self.grid.tp.size)
        return self._by_tokens if counts is None else kept_at_home(self._by_tokens, counts)

    def allocate_cache(self, pages):
        """Give this rank a cache of `pages` pages."""
        self.cache = Cache(
            self.device,
            self.layers,
            self.heads.n_kv,
            self.arch.K,
            pages,
            self.dtype,
            self.arch.value_width,
        )
        self.graphs.begin()

    def forward(self, steps):
        """Hidden states of the wanted tokens of some micro-batches, after the final norm.

        Parameters
        ----------
        steps : list of Step; several where attention and FFN are on ranks of their own

        Returns
        -------
        list of (R, D) float32, or rounded where nothing but the head follows, equal on every rank
        of the tensor and context axes; None on a stage that is not the pipeline's last
        """
        self.weights.release()
        if self.grid.role == "attention":
            return self._beside_ffn(steps)
        return [self._through_stage(step) for step in steps]

    def logits(self, hidden):
        """Scores of this rank's part of the vocabulary: (R, D) -> (R, V/P)."""
        rounded = array.narrow(hidden, self.operand_type)
        return matmul.columns(self.grid.tp_cp, rounded, self.weights.output())

    def count_choices(self, n, ids):
        """Count the experts that tokens of layer n chose: (T, k), each token on one rank alone."""
        if self.expert_load is not None:
            self.expert_load.add(n, ids)

    def wants(self, point):
        """True if someone wants to see what is computed at a point."""
        return self.tap is not None and self.tap.wants(point)

    def show(self, point, n, x, step, rows):
        """Show what was computed at a point of layer n to whoever wants to see it.

        Parameters
        ----------
        point : "residual", "attention", "ffn", "q", "k", "v", "lse", "router" or "final"
        x : (tokens, ...) array, or the pair (logits, ids) of a router
        step : Step
        rows : which tokens this rank has, as `step.holders` knows them
        """
        if self.tap is not None:
            self.tap.take(point, n, x, step, rows)

    def progress(self):
        """Let MPI move on what is in flight beside the computation."""
        self.pipeline.test()
        self.weights.test()

    def settle(self):
        """Wait for what is in flight, at the end of a run."""
        self.pipeline.wait()
        self.weights.settle()

    def _layer(self, n):
        here.layer = n
        return self.weights.layer(n)

    def _through_stage(self, step):
        """One micro-batch through the layers of this rank's stage."""
        cut, rotation = self.cut(step), self._rotation(step)

        def layers(x, step, rotation):
            x, y = self._begin(step, cut) if x is None else x, None
            for n in self.layers:
                x, y = layer(self, n, x, y, step, cut, rotation)
            if ends_there:
                return self._hidden(x, y)
            return x if y is None else add_into(y, x)

        def compute(x):
            x = self.graphs.layers(step, cut, x, rotation, layers)
            return x if ends_there or not self.pipeline.is_last else self._normed(x, step)

        # On a GPU what begins with tokens and ends with all hidden states does so in the graph.
        has_graph = self.device.name != "cpu" and self.tap is None and self.grid.cp.size == 1
        begins_there = has_graph and self.pipeline.is_first
        ends_there = has_graph and self.pipeline.is_last and cut.counts is None and step.all_wanted
        return self.pipeline.forward(None if begins_there else self._begin(step, cut), compute)

    def _beside_ffn(self, steps):
        """All micro-batches through the attention halves, the FFN halves on the other side."""
        cuts, rotations = [self.cut(s) for s in steps], [self._rotation(s) for s in steps]
        shares = partial(ffn_shares, self.arch, self.grid)

        def attend(n, b, x):
            w = cuts[b].layer(n)
            if self.arch.parallel_residual:
                self.show("residual", n, x, steps[b], "home")
            before, y = attention_half(self, n, x, None, steps[b], cuts[b], w, rotations[b])
            if self.arch.parallel_residual:
                tokens, x = norm(self.arch, x, w.norm2, w.norm2_bias), add_into(y, x)
            else:
                x, tokens = add_norm(self, before, y, w.norm2, w.norm2_bias)
            own = cuts[b].own(tokens)
            return x, own, *choices_to_send(self, n, w, own, steps[b])

        def add(n, b, x, y):
            y = cuts[b].everywhere(y, len(x))
            self.show("ffn", n, y, steps[b], "home")
            return x + y

        xs = [self._begin(step, cut) for step, cut in zip(steps, cuts, strict=True)]
        xs = disagg.attention_side(
            self.grid.inter, self.layers, xs, attend, add, shares, self.dtype
        )
        return [self._normed(x, step) for x, step in zip(xs, steps, strict=True)]

    def _begin(self, step, cut):
        """The embedding on the first stage; room for what arrives on the others: (T/P, D)."""
        arch, mine, counts = self.arch, step.mine, cut.counts
        n = len(mine) if counts is None else counts[self.grid.tp.rank]
        if not self.pipeline.is_first:
            return self.device.empty((n, arch.D), np.float32)
        embedding, positions = self.weights.embedding()
        all_mine = len(mine) == step.n_tokens
        token_ids = step.token_ids if all_mine else step.token_ids[mine]
        x = vocabulary.embed(self.grid.tp, token_ids, embedding, self.embed_range[0], counts)
        if arch.learned_positions:
            at_home = step.positions if all_mine else step.positions[mine]
            if counts is not None:
                start = sum(counts[: self.grid.tp.rank])
                at_home = at_home[start : start + n]
            x = add_positions(x, positions, at_home)
        return x

    def prepare(self, step):
        """Make ready what a step reads, but for its tokens, while another one is computed."""
        self._prepared = step, self._rotation(step)
        self.graphs.prepare(step, self.cut(step), self._prepared[1])

    def _rotation(self, step):
        """Cosine and sine of every own token's rotation, host; None without rope."""
        if self.arch.rope is None:
            return None
        if self._prepared is not None and self._prepared[0] is step:
            return self._prepared[1]
        classes = None if step.length_classes is None else step.length_classes[step.mine]
        return angles(self.arch.rope, step.positions[step.mine], classes)

    def _hidden(self, x, y):
        """Final norm of x + y, all tokens, in the type of operands: (T, D), (T, D) or None."""
        w = self.weights
        w.output()
        return add_norm(self, x, y, w.final_norm, w.final_norm_bias, self.operand_type)[1]

    def _normed(self, x, step):
        """Final norm of the wanted tokens: (T/P, D) -> (R, D) on every rank."""
        w = self.weights

        # Have the head ready: who fetches it together may not all need it in this step.
        w.output()
        hidden = norm(self.arch, self._wanted(x, step), w.final_norm, w.final_norm_bias)
        self.show("final", self.arch.N, hidden, step, "wanted")
        return hidden

    def _wanted(self, x, step):
        """Hidden states of the wanted tokens on every rank: (T/P, D) -> (R, D)."""
        xp = array.namespace(x)
        comm, held, owner = holders(step, "home", self.grid)
        if comm is None or comm.size == 1:
            return x if step.all_wanted else x[xp.asarray(step.rows)]
        owner = owner[step.rows]
        own = np.searchsorted(held, step.rows[owner == comm.rank])
        counts = np.bincount(owner, minlength=comm.size).tolist()
        rows = collectives.Allgather(comm, x[xp.asarray(own)], counts, purpose="wanted")
        return rows[xp.asarray(in_parts(owner))]

    def _keeps(self, row):
        """True if a row of the table belongs to this rank's stage, and to its side."""
        if row.layer is not None:
            return row.layer in self.layers and not (
                self.grid.role == "attention" and row.key in FFN_KEYS
            )
        if row.key in ("embed", "positions"):
            return self.pipeline.is_first or (self.pipeline.is_last and self.arch.tied)
        return self.pipeline.is_last
