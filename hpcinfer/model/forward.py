"""A model on one rank of the grid, and its forward pass over the tokens of some steps."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from hpcinfer import array
from hpcinfer.array import Array, Device
from hpcinfer.grid import Grid
from hpcinfer.heartbeat import here
from hpcinfer.model.architecture import Architecture
from hpcinfer.model.attention import CachedAttention
from hpcinfer.model.cache import Cache, page_bytes
from hpcinfer.model.cut import Cut, cut_by_columns, cut_by_tokens, kept_at_home
from hpcinfer.model.forward_pass import Pass
from hpcinfer.model.graphs import Graphs, reason_against
from hpcinfer.model.layer import add_norm, attention_half, layer, norm
from hpcinfer.model.moe import choices_to_send
from hpcinfer.model.shard import ModelShard
from hpcinfer.model.step import Step
from hpcinfer.model.token_owners import At
from hpcinfer.model.weights import parameters as tables
from hpcinfer.model.weights.expert_placement import expert_shares, ffn_shares
from hpcinfer.model.weights.load import load
from hpcinfer.model.weights.shared import private_keys, share_weights
from hpcinfer.model.weights.stages import layers_of_stage
from hpcinfer.model.weights.table import FFN_KEYS, owned
from hpcinfer.model.weights.zero import ZeroWeights
from hpcinfer.ops.inplace import add_into
from hpcinfer.ops.rope import angles
from hpcinfer.parallel import disagg, matmul
from hpcinfer.parallel.pipeline import Pipeline


class Model(ModelShard):
    """One rank's shard of a model: weights, cache, and what it owns of every cut axis.

    Parameters
    ----------
    arch : Architecture
    checkpoint : open checkpoint, read here and not kept
    grid : Grid
    device : Device
    dtype : element type of weights and cache
    expert_load : ExpertLoad, counts the experts that tokens choose

    Attributes
    ----------
    layers : range, the layers of this rank's stage of the pipeline
    operand_type : type in which products are given what else is float32: on a GPU that of the
        weights, as rounding is one pass less there; on the CPU products round what they read
    pipeline : Pipeline, this rank's place in it
    cache : Cache, without pages until `allocate_cache`
    graphs : Graphs, of none until then
    tap : object or None; its `wants(point)` says whether a point is wanted in any layer, its
        `take(point, n, x, step, at)` gets what `Pass.show` is called with
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
        self.expert_load, self.tap, self._prepared = expert_load, None, None
        self.operand_type = np.dtype(np.float32) if device.name == "cpu" else np.dtype(dtype)
        self.pipeline = Pipeline(grid.pp)
        self.layers = layers_of_stage(arch, grid.layout, dtype, checkpoint.tensors)[grid.pp.rank]
        self.attention = CachedAttention(arch, grid)
        self.heads = self.attention.heads
        self.ranges = _ranges(arch, grid)
        self.embed_range, self.head_range = self.ranges["embed"], self.ranges["head"]

        # Read the weights, and say how their columns are divided.
        zero = grid.layout.zero != "off"
        self._shares = grid.same_weights.size > 1 and not zero and device.name == "cpu"
        self._private_keys = private_keys(grid)
        if zero:
            read = partial(self._load, checkpoint)
            self.weights = ZeroWeights(grid, self.layers, device.xp, read)
        else:
            self.read(checkpoint)
        self._by_tokens = cut_by_tokens(arch, grid, self.ranges, self._layer)
        self._by_columns = cut_by_columns(arch, grid, self.ranges, self._layer, self.heads)
        self.cache, self.graphs = self._cache(0), Graphs("there is no cache")

    @property
    def page_bytes(self) -> int:
        """Bytes of one cache page on this rank."""
        return page_bytes(
            len(self.layers), self.heads.n_kv, self.arch.K, self.dtype, self.arch.value_width
        )

    @property
    def pools(self) -> int:
        """Ranks that the pages of a sequence are dealt to."""
        return self.attention.kv.size

    def read(self, checkpoint: Any, alone: bool = False) -> None:
        """Read this rank's weights; unless `alone`, without those that it will share."""
        self.weights = self._load(checkpoint, alone=alone)

    def share_weights(self) -> bool:
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

    def allocate_cache(self, pages: int) -> None:
        """Give this rank a new cache of `pages` pages; every rank of tp and cp calls this."""
        self.cache, self.graphs = self._cache(pages), Graphs()
        self.graphs.agree(self.grid.tp_cp, None, reason_against(self))

    def cut(self, step: Step) -> Cut:
        """How the work outside attention is divided among the ranks of cp and tp in a step."""
        if step.columns:
            return self._by_columns
        counts = step.counts_at_home(self.grid.tp.size)
        return self._by_tokens if counts is None else kept_at_home(self._by_tokens, counts)

    def prepare(self, step: Step) -> None:
        """Make ready what a step reads, but for its tokens, while another one is computed."""
        self._prepared = self._pass(step)
        self.graphs.prepare(self._prepared)

    def forward(self, steps: list[Step]) -> list:
        """Hidden states of the wanted tokens of some micro-batches, after the final norm.

        Parameters
        ----------
        steps : list of Step; several where attention and FFN are on ranks of their own

        Returns
        -------
        list of (R, D) float32, or rounded where nothing but the head follows, equal on every rank
        of the tensor and context axes; None on a stage that is not the pipeline's last
        """
        passes = [self._pass(step) for step in steps]
        if self.grid.role == "attention":
            return self._beside_ffn(passes)
        return [self._through_stage(p) for p in passes]

    def logits(self, hidden: Array) -> Array:
        """Scores of this rank's part of the vocabulary: (R, D) -> (R, V/P)."""
        rounded = array.narrow(hidden, self.operand_type)
        return matmul.columns(self.grid.tp_cp, rounded, self.weights.output())

    def progress(self) -> None:
        """Let MPI move on what is in flight beside the computation."""
        self.pipeline.test()
        self.weights.test()

    def settle(self) -> None:
        """Wait for what is in flight, at the end of a run."""
        self.pipeline.wait()
        self.weights.settle()

    def _pass(self, step):
        """The way of a step through the layers, from what has been prepared if it is that."""
        if self._prepared is not None and self._prepared.step is step:
            return self._prepared
        rotation = None
        if self.arch.rope is not None:
            classes = None if step.length_classes is None else step.length_classes[step.mine]
            rotation = angles(self.arch.rope, step.positions[step.mine], classes)
        return Pass(self, step, self.cut(step), rotation)

    def _through_stage(self, p):
        """One micro-batch through the layers of this rank's stage."""
        # On a GPU what begins with tokens and ends with all hidden states does so in the graph.
        has_graph = self.device.name != "cpu" and self.tap is None and self.grid.cp.size == 1
        begins_there = has_graph and self.pipeline.is_first
        ends_there = has_graph and self.pipeline.is_last and p.cut.counts is None
        ends_there &= p.step.all_wanted
        layers = partial(self._layers, ends_there)

        def compute(x):
            x = self.graphs.layers(p, x, layers)
            return x if ends_there or not self.pipeline.is_last else p.hidden(x)

        return self.pipeline.forward(None if begins_there else p.begin(), compute)

    def _layers(self, ends, p, x):
        """x behind the layers of this stage; if it `ends` here, behind the final norm too."""
        x, y = p.begin() if x is None else x, None
        for n in self.layers:
            x, y = layer(p, n, x, y)
        if ends:
            return p.end(x, y)
        return x if y is None else add_into(y, x)

    def _beside_ffn(self, passes):
        """All micro-batches through the attention halves, the FFN halves on other ranks."""
        # Say what is done on this side, before and after the FFN ranks' part.
        shares = partial(ffn_shares, self.arch, self.grid)

        def attend(n, b, x):
            return _to_ffn(passes[b], n, x)

        def add(n, b, x, y):
            y = passes[b].cut.everywhere(y, len(x))
            passes[b].show("ffn", n, y, At.HOME)
            return x + y

        xs = [p.begin() for p in passes]
        xs = disagg.attention_side(
            self.grid.inter, self.layers, xs, attend, add, shares, self.dtype
        )
        return [p.hidden(x) for p, x in zip(passes, xs, strict=True)]

    def _layer(self, n):
        here.layer = n
        return self.weights.layer(n)

    def _cache(self, pages):
        arch, n_kv = self.arch, self.heads.n_kv
        return Cache(self.device, self.layers, n_kv, arch.K, pages, self.dtype, arch.value_width)

    def _load(self, checkpoint, keep_layer=None, alone=False):
        """Weights of this rank; unless `alone`, without those that it will share."""
        follows = self._shares and self.grid.same_weights.rank > 0 and not alone

        def keep(row):
            return self._keeps(row) and (not follows or row.key in self._private_keys)

        arch, cp, device = self.arch, self.grid.cp.size, self.device
        return load(arch, checkpoint, self.ranges, self.dtype, device, cp, keep, keep_layer)

    def _keeps(self, row):
        """True if a row of the table belongs to this rank's stage, and to its role."""
        if row.layer is not None:
            return row.layer in self.layers and not (
                self.grid.role == "attention" and row.key in FFN_KEYS
            )
        if row.key in ("embed", "positions"):
            return self.pipeline.is_first or (self.pipeline.is_last and self.arch.tied)
        return self.pipeline.is_last


def _ranges(arch, grid):
    """Items of every cut axis that this rank owns: dict cut -> (start, stop)."""
    ranges = owned(arch, grid.tp.size, grid.tp.rank, grid.cp.size, grid.cp.rank)
    if grid.experts is not None:
        share = expert_shares(arch, grid)[grid.experts.rank]
        ranges |= {"experts": share.experts, "moe": share.columns}
    return ranges


def _to_ffn(p, n, x):
    """The attention half of layer n, and what the FFN ranks are to be sent.

    Returns
    -------
    x : (T/P, D) float32, to which the FFN's result is added
    own : (T/P, D) float32, normed tokens for which this rank answers alone
    ids, weights, common : as `choices_to_send` returns them
    """
    # Attend, and norm for the FFN: what it is given if both halves read the same, else the sum.
    arch, w = p.model.arch, p.layer(n)
    if arch.parallel_residual:
        p.show("residual", n, x, At.HOME)
    before, y = attention_half(p, n, w, x, None)
    if arch.parallel_residual:
        tokens, x = norm(arch, x, w.norm2, w.norm2_bias), add_into(y, x)
    else:
        x, tokens = add_norm(arch, before, y, w.norm2, w.norm2_bias)

    # Send the tokens for which this rank answers alone.
    own = p.cut.own(tokens)
    return x, own, *choices_to_send(p, n, w, own)
