"""Attention over a cache that is cut along the sequence: which strategy serves which tokens.

A rank computes some tokens of a step (its part of cp), for its own query heads, and holds some
pages of the key/value heads that those read. In decoding all queries of a step meet every rank's
keys and the partial results are merged; in prefill keys and values, or queries, pass around. One
rank is the simplest case of it.

Where tp exceeds the number of key/value heads, the ranks that need the same head do not each keep
a copy: with cp, its keys are dealt over all of them (the shape of Helix, Bhatia 2025,
arXiv:2507.07120).
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from hpcinfer import array, collectives, partition
from hpcinfer.array import Array
from hpcinfer.grid import Grid
from hpcinfer.model.architecture import Architecture
from hpcinfer.model.cut import query_heads
from hpcinfer.model.layout_check import key_sharers
from hpcinfer.model.token_owners import At
from hpcinfer.ops import attention as ops
from hpcinfer.parallel.gather import gather
from hpcinfer.parallel.ring import cheaper_to_move_queries, ring, ring_queries
from hpcinfer.parallel.split import gathered_keys
from hpcinfer.parallel.tree import tree_by_size
from hpcinfer.parallel.ulysses import ulysses

if TYPE_CHECKING:
    from hpcinfer.model.forward_pass import Pass


class CachedAttention:
    """One rank's place in the cut of heads, tokens and keys.

    Its strategies take a Pass p, the number n of a layer, queries q and the TokenRun that they
    belong to, and give o and lse of those.

    Attributes
    ----------
    kv : communicator of the ranks that hold parts of the same key/value heads
    heads : Heads of this rank
    first_kv : (start, stop) among its key/value heads: those that no rank of tp before it has
    sharers : ranks of tp that read the same key/value head and share its keys; 1 as a rule
    by_columns : True if decoding may divide columns, not tokens, among the ranks of cp
    """

    def __init__(self, arch: Architecture, grid: Grid):
        self.arch, self.grid = arch, grid
        of_ranks = partition.heads(arch.H, arch.G, grid.tp.size)
        self.heads = of_ranks[grid.tp.rank]
        before = max((heads.kv[1] for heads in of_ranks[: grid.tp.rank]), default=0)
        self.first_kv = (max(0, before - self.heads.kv[0]), self.heads.n_kv)

        # Share out the keys of a head that several ranks of tp read.
        self.sharers = key_sharers(arch, grid.layout)
        self.kv = _kv_comm(grid, self.sharers)
        self._shares = [(0, self.heads.n_query)]
        if self.sharers > 1:
            self._shares = partition.block(arch.H // arch.G, self.sharers)

        # Take the strategies that the layout names.
        prefill, decode = grid.layout.prefill, grid.layout.decode
        self._prefill = {
            "ring": self._ring,
            "split-q": self._split_q,
            "ulysses": self._ulysses,
        }[prefill]
        self._merge_parts = {"tree": tree_by_size, "gather": gather, "ring": None}[decode]
        merges = self._merge_parts is not None
        self._decode = self._merged if merges else self._ring
        self.by_columns = grid.cp.size > 1 and self.sharers == 1 and merges and arch.mla is None

    def attend(self, p: Pass, n: int, q: Array) -> Array:
        """Attention of this rank's tokens and query heads to all keys of their sequences.

        Parameters
        ----------
        n : number of the layer
        q : (T/P, H/P, K) float32, of the tokens step.mine

        Returns
        -------
        (T/P, H/P, width of a value) float32; if the step divides columns, of the heads whose
        outputs this rank projects
        """
        step = p.step

        # Merge over all ranks where every one has all tokens.
        if step.columns:
            o, lse = self._merge(p, n, q, step.tokens)
            p.show("lse", n, lse, At.MINE)
            return o[:, slice(*query_heads(self.heads, self.grid.cp.size)[self.grid.cp.rank])]

        # Attend to the tokens of each strategy by themselves.
        runs = (step.decoding, self._decode), (step.prefilling, self._prefill)
        runs = [(run, strategy) for run, strategy in runs if run is not None]
        if len(runs) == 1:  # spares the results a copy
            (run, strategy), *_ = runs
            o, lse = strategy(p, n, q, run)
            p.show("lse", n, lse, At.MINE)
            return o

        # Put the results of both in their places.
        mla, xp = self.arch.mla, array.namespace(q)
        width = self.arch.K if mla is None else mla.kv_rank
        whole = self.kv.size == 1
        o = xp.empty((*q.shape[:2], width), p.model.operand_type if whole else xp.float32)
        lse = xp.empty(q.shape[:2], xp.float32)
        for run, strategy in runs:
            o[run.own], lse[run.own] = strategy(p, n, q[run.own], run)
        p.show("lse", n, lse, At.MINE)
        return o

    def _merged(self, p, n, q, run):
        """Every query to every rank's keys, and the partial results merged."""
        if self.kv.size == 1:  # spares a step of few tokens its copies
            return self._to_own_keys(p, n, q, run.tokens, p.model.operand_type)
        o, lse = self._merge(p, n, self._gathered_queries(q, run), run.tokens)

        # Keep the own tokens, and the own heads among those that share a key/value head.
        heads = slice(*self._shares[self.kv.rank // self.grid.cp.size])
        return o[run.chosen, heads], lse[run.chosen, heads]

    def _to_own_keys(self, p, n, q, tokens, dtype=np.float32):
        """Attention of queries to this rank's keys, of the heads that its own queries read."""
        k, v = p.model.cache.pages(n)
        table = p.step.block_table
        return ops.paged_attention(q, tokens, k, v, table, dtype=dtype, **self._local(n))

    def _merge(self, p, n, q, tokens):
        """Attention of queries that every rank has: partial results over own keys, merged."""
        k, v = p.model.cache.pages(n)
        local = self._local(n, shared=True)
        o, lse = ops.paged_attention(q, tokens, k, v, p.step.block_table, **local)
        return self._merge_parts(self.kv, o, lse)

    def _ring(self, p, n, q, run):
        """Keys and values, or queries, pass around, whichever are fewer bytes."""
        if self.kv.size == 1:  # spares the keys their way into a message
            return self._to_own_keys(p, n, q, run.tokens, p.model.operand_type)
        q_tokens, counts = run.tokens[run.chosen], self._key_counts(p, n, run)
        if self.sharers == 1 and self._cheaper_to_move_queries(p, n, run, counts):
            attend_local = partial(self._to_own_keys, p, n)
            return ring_queries(self.kv, q, q_tokens, run.counts, attend_local)

        # Pass keys and values where queries are many.
        k, v, k_tokens = self._own_keys(p, n, run)

        def attend(q, k, v, q_tokens, k_tokens, between):
            return ops.ragged_attention(
                q, k, v, q_tokens, k_tokens, between=between, **self._local(n)
            )

        return ring(self.kv, q, k, v, q_tokens, k_tokens, counts, attend)

    def _cheaper_to_move_queries(self, p, n, run, key_counts):
        k, v = p.model.cache.pages(n)
        itemsize = k.dtype.itemsize * (k.shape[-1] + v.shape[-1]) / (2 * self.arch.K)
        return cheaper_to_move_queries(
            run.counts, key_counts, self.heads.n_query, self.heads.n_kv, self.arch.K, itemsize
        )

    def _split_q(self, p, n, q, run):
        """Queries stay cut; keys and values are gathered whole."""
        counts = self._key_counts(p, n, run)
        k, v, k_tokens = gathered_keys(self.kv, *self._own_keys(p, n, run), counts)
        k, v, k_tokens = _in_order(k, v, k_tokens)
        q_tokens = run.tokens[run.chosen]
        return ops.ragged_attention(q, k, v, q_tokens, k_tokens, **self._local(n))

    def _ulysses(self, p, n, q, run):
        """Cut by tokens outside, by heads inside."""
        counts = self._key_counts(p, n, run)
        k, v, k_tokens = self._own_keys(p, n, run)
        k_tokens = collectives.Allgather(self.kv, k_tokens, counts, purpose="ulysses")
        share = partition.heads_of(self.heads, self.kv.size)
        lse_wanted = p.wants("lse")

        def attend(q, k, v, groups):
            k, v, in_order = _in_order(k, v, k_tokens)
            local = {**self._local(n), "groups": groups}
            order = array.namespace(q).asarray(run.order)
            o, lse = ops.ragged_attention(q[order], k, v, run.tokens, in_order, **local)
            if lse_wanted:
                o = array.namespace(o).concatenate([o, lse[..., None]], axis=-1)
            by_part = array.namespace(o).empty_like(o)
            by_part[order] = o
            return by_part

        # Let the log-sum-exps travel with the outputs, only if someone wants them.
        o = ulysses(self.kv, q, k, v, run.counts, counts, share, attend)
        return (o[..., :-1], o[..., -1]) if lse_wanted else (o, np.nan)

    def _local(self, n, shared=False):
        """What the mathematics of one rank must know of layer n."""
        groups = self.heads.groups
        if shared and self.sharers > 1:
            groups = ((0, self._shares[-1][1]),)
        return {
            "scale": self.arch.scales[n],
            "groups": groups,
            "window": self.arch.windows[n],
            "v_columns": None if self.arch.mla is None else self.arch.mla.kv_rank,
        }

    def _gathered_queries(self, q, run):
        """Queries of all tokens of a run in order, of all heads that read this rank's keys."""
        xp, width, n_tokens = array.namespace(q), q.shape[-1], len(run.tokens)
        shares = partition.counts(self._shares)
        rows = [n_heads * n for n_heads in shares for n in run.counts]
        flat = collectives.Allgather(self.kv, q.reshape(-1, width), rows, purpose="queries")

        # Bring the tokens of each sharer's block of rows in order, whose parts lie end to end.
        starts = np.cumsum([0, *(n_heads * n_tokens for n_heads in shares)])
        blocks = [
            flat[start:stop].reshape(n_tokens, n_heads, width)[xp.asarray(run.order)]
            for (start, stop), n_heads in zip(pairwise(starts), shares, strict=True)
        ]
        return blocks[0] if len(blocks) == 1 else xp.concatenate(blocks, axis=1)

    def _sequences(self, n, run):
        """(b, first token that is seen) of every sequence of a run in layer n."""
        window = self.arch.windows[n]
        return [
            (b, ops.window_start(run.tokens[rows, 1], window))
            for b, rows in ops.sequences(run.tokens)
        ]

    def _key_counts(self, p, n, run):
        """Cached keys that each rank brings to a run."""
        table = p.step.block_table
        return sum(table.keys(b, start) for b, start in self._sequences(n, run)).tolist()

    def _own_keys(self, p, n, run):
        """This rank's keys and values for a run: k, v (L/P, G, K) and k_tokens (L/P, 2)."""
        pages, table = p.model.cache.pages(n), p.step.block_table
        parts = [(b, *ops.cached(*pages, table, b, start)) for b, start in self._sequences(n, run)]
        xp = array.namespace(pages[0])
        k, v = (_joined(xp, [part[i] for part in parts]) for i in (1, 2))
        k_tokens = np.concatenate(
            [np.stack([np.full(len(k_pos), b), k_pos], axis=1) for b, _, _, k_pos in parts]
        )
        return k, v, k_tokens.astype(np.int32)


def _joined(xp, parts):
    """Arrays end to end; no copy of a single one."""
    return parts[0] if len(parts) == 1 else xp.concatenate(parts)


def _kv_comm(grid, sharers):
    """Communicator of the ranks that deal the same key/value heads' pages among them.

    Its rank r computes the tokens of part r % cp.
    """
    if sharers == 1:
        return grid.cp
    group, place = divmod(grid.tp.rank, sharers)
    return grid.split(group, place * grid.cp.size + grid.cp.rank, f"kv {sharers}")


def _in_order(k, v, k_tokens):
    """Keys of all ranks with sequences ascending and positions ascending in each."""
    order = np.lexsort((k_tokens[:, 1], k_tokens[:, 0]))
    where = array.namespace(k).asarray(order)
    return k[where], v[where], k_tokens[order]
