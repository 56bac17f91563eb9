"""Attention over a cache that is cut along the sequence: which strategy serves which tokens.

A rank computes some tokens of a step (the part `cp_index` of `cp`), for its own query heads, and
holds some pages of the key/value heads that those read. In decoding all queries of a step meet
every rank's keys and the partial results are merged; in prefill keys and values, or queries, pass
around. One rank is the simplest case of it.

Where tp exceeds the number of key/value heads, the ranks that need the same head do not each keep
a copy: with cp, its keys are dealt over all of them (the shape of Helix, Bhatia 2025,
arXiv:2507.07120).
"""

from itertools import pairwise

import numpy as np

from hpcinfer import array, collectives, partition
from hpcinfer.model.cut import query_heads
from hpcinfer.model.layout_check import key_sharers
from hpcinfer.ops import attention as ops
from hpcinfer.parallel.gather import gather
from hpcinfer.parallel.ring import cheaper_to_move_queries, ring, ring_queries
from hpcinfer.parallel.split import gathered_keys
from hpcinfer.parallel.tree import tree_by_size
from hpcinfer.parallel.ulysses import ulysses


class CachedAttention:
    """One rank's place in the cut of heads, tokens and keys.

    Parameters
    ----------
    arch : Architecture
    grid : Grid
    cache : function of a layer's number, its (k, v) pages
    model : Model that this is a part of; it may want to `show` the log-sum-exps

    Attributes
    ----------
    kv : communicator of the ranks that hold parts of the same key/value heads
    heads : Heads of this rank
    first_kv : (start, stop) among its key/value heads: those that no rank of tp before it has
    sharers : ranks of tp that read the same key/value head and share its keys; 1 as a rule
    by_columns : True if decoding may divide columns, not tokens, among the ranks of cp
    """

    def __init__(self, arch, grid, cache, model):
        self.arch, self.grid, self._cache, self._model = arch, grid, cache, model
        C, P = grid.cp.size, grid.tp.size
        of_ranks = partition.heads(arch.H, arch.G, P)
        self.heads = of_ranks[grid.tp.rank]
        before = max((heads.kv[1] for heads in of_ranks[: grid.tp.rank]), default=0)
        self.first_kv = (max(0, before - self.heads.kv[0]), self.heads.n_kv)
        self.sharers = key_sharers(arch, grid.layout)
        self.kv = _kv_comm(grid, self.sharers)
        self._shares = [(0, self.heads.n_query)]
        if self.sharers > 1:
            self._shares = partition.block(arch.H // arch.G, self.sharers)
        self.by_columns = (
            C > 1 and self.sharers == 1 and grid.layout.decode != "ring" and arch.mla is None
        )
        self._prefill = {
            "ring": self._ring,
            "split-q": self._split_q,
            "ulysses": self._ulysses,
        }[grid.layout.prefill]
        self._decode = {
            "tree": self._merged,
            "gather": self._merged,
            "ring": self._ring,
        }[grid.layout.decode]

    def attend(self, n, q, step):
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
        if step.columns:
            o, lse = self._merge(n, q, step, step.tokens)
            self._model.show("lse", n, lse, step, "mine")
            return o[:, slice(*query_heads(self.heads, self.grid.cp.size)[self.grid.cp.rank])]
        phases = (step.decoding, self._decode), (step.prefilling, self._prefill)
        phases = [(phase, strategy) for phase, strategy in phases if phase is not None]
        if len(phases) == 1:  # spares the results a copy
            (phase, strategy), *_ = phases
            o, lse = strategy(n, q, step, phase)
            self._model.show("lse", n, lse, step, "mine")
            return o
        mla, xp = self.arch.mla, array.namespace(q)
        width = self.arch.K if mla is None else mla.kv_rank
        whole = self.kv.size == 1
        o = xp.empty((*q.shape[:2], width), self._model.operand_type if whole else xp.float32)
        lse = xp.empty(q.shape[:2], xp.float32)
        for phase, strategy in phases:
            o[phase.own], lse[phase.own] = strategy(n, q[phase.own], step, phase)
        self._model.show("lse", n, lse, step, "mine")
        return o

    def _merged(self, n, q, step, phase):
        """Every query to every rank's keys, and the partial results merged."""
        if self.kv.size == 1:  # spares a step of few tokens its copies
            return self._to_own_keys(n, q, phase.tokens, step, self._model.operand_type)
        o, lse = self._merge(n, self._gathered_queries(q, phase), step, phase.tokens)

        # Keep the own tokens, and the own heads among those that share a key/value head.
        heads = slice(*self._shares[self.kv.rank // self.grid.cp.size])
        return o[phase.chosen, heads], lse[phase.chosen, heads]

    def _to_own_keys(self, n, q, tokens, step, dtype=np.float32):
        """Attention of queries to this rank's keys, of the heads that its own queries read."""
        return ops.paged_attention(
            q, tokens, *self._cache(n), step.block_table, dtype=dtype, **self._local(n)
        )

    def _merge(self, n, q, step, tokens):
        """Attention of queries that every rank has: partial results over own keys, merged."""
        o, lse = ops.paged_attention(
            q, tokens, *self._cache(n), step.block_table, **self._local(n, shared=True)
        )
        merged = tree_by_size if self.grid.layout.decode == "tree" else gather
        return merged(self.kv, o, lse)

    def _ring(self, n, q, step, phase):
        """Keys and values, or queries, pass around, whichever are fewer bytes."""
        if self.kv.size == 1:  # spares the keys their way into a message
            return self._to_own_keys(n, q, phase.tokens, step, self._model.operand_type)
        q_tokens, counts = phase.tokens[phase.chosen], self._key_counts(n, step, phase)
        if self.sharers == 1 and self._cheaper_to_move_queries(n, phase, counts):

            def attend_local(q, q_tokens):
                return self._to_own_keys(n, q, q_tokens, step)

            return ring_queries(self.kv, q, q_tokens, phase.counts, attend_local)
        k, v, k_tokens = self._own_keys(n, step, phase)

        def attend(q, k, v, q_tokens, k_tokens, between):
            return ops.ragged_attention(
                q, k, v, q_tokens, k_tokens, between=between, **self._local(n)
            )

        return ring(self.kv, q, k, v, q_tokens, k_tokens, counts, attend)

    def _cheaper_to_move_queries(self, n, phase, key_counts):
        k_pages, v_pages = self._cache(n)
        columns = k_pages.shape[-1] + v_pages.shape[-1]
        itemsize = k_pages.dtype.itemsize * columns / (2 * self.arch.K)
        return cheaper_to_move_queries(
            phase.counts, key_counts, self.heads.n_query, self.heads.n_kv, self.arch.K, itemsize
        )

    def _split_q(self, n, q, step, phase):
        """Queries stay cut; keys and values are gathered whole."""
        counts = self._key_counts(n, step, phase)
        k, v, k_tokens = gathered_keys(self.kv, *self._own_keys(n, step, phase), counts)
        k, v, k_tokens = _in_order(k, v, k_tokens)
        q_tokens = phase.tokens[phase.chosen]
        return ops.ragged_attention(q, k, v, q_tokens, k_tokens, **self._local(n))

    def _ulysses(self, n, q, step, phase):
        """Cut by tokens outside, by heads inside."""
        counts = self._key_counts(n, step, phase)
        k, v, k_tokens = self._own_keys(n, step, phase)
        k_tokens = collectives.Allgather(self.kv, k_tokens, counts, purpose="ulysses")
        share = partition.heads_of(self.heads, self.kv.size)

        def attend(q, k, v, groups):
            k, v, in_order = _in_order(k, v, k_tokens)
            local = {**self._local(n), "groups": groups}
            order = array.namespace(q).asarray(phase.order)
            o, lse = ops.ragged_attention(q[order], k, v, phase.tokens, in_order, **local)
            if lse_wanted:
                o = array.namespace(o).concatenate([o, lse[..., None]], axis=-1)
            in_parts = array.namespace(o).empty_like(o)
            in_parts[order] = o
            return in_parts

        # The log-sum-exps travel with the outputs, only if someone wants them.
        lse_wanted = self._model.wants("lse")
        o = ulysses(self.kv, q, k, v, phase.counts, counts, share, attend)
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

    def _gathered_queries(self, q, phase):
        """Queries of all tokens of a phase in order, of all heads that read this rank's keys."""
        xp, width, n_tokens = array.namespace(q), q.shape[-1], len(phase.tokens)
        shares = partition.counts(self._shares)
        rows = [n_heads * n for n_heads in shares for n in phase.counts]
        flat = collectives.Allgather(self.kv, q.reshape(-1, width), rows, purpose="queries")

        # One block of rows per sharer of the key/value head, its parts end to end.
        starts = np.cumsum([0, *(n_heads * n_tokens for n_heads in shares)])
        blocks = [
            flat[start:stop].reshape(n_tokens, n_heads, width)[xp.asarray(phase.order)]
            for (start, stop), n_heads in zip(pairwise(starts), shares, strict=True)
        ]
        return blocks[0] if len(blocks) == 1 else xp.concatenate(blocks, axis=1)

    def _sequences(self, n, phase):
        """(b, first token that is seen) of every sequence of a phase in layer n."""
        window = self.arch.windows[n]
        return [
            (b, ops.window_start(phase.tokens[rows, 1], window))
            for b, rows in ops.sequences(phase.tokens)
        ]

    def _key_counts(self, n, step, phase):
        """Cached keys that each rank brings to a phase."""
        return sum(
            step.block_table.keys(b, start) for b, start in self._sequences(n, phase)
        ).tolist()

    def _own_keys(self, n, step, phase):
        """This rank's keys and values for a phase: k, v (L/P, G, K) and k_tokens (L/P, 2)."""
        pages = self._cache(n)
        parts = [
            (b, *ops.cached(*pages, step.block_table, b, start))
            for b, start in self._sequences(n, phase)
        ]
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
    C, t = grid.cp.size, grid.tp.rank
    return grid.split(t // sharers, (t % sharers) * C + grid.cp.rank, f"kv {sharers}")


def _in_order(k, v, k_tokens):
    """Keys of all ranks with sequences ascending and positions ascending in each."""
    order = np.lexsort((k_tokens[:, 1], k_tokens[:, 0]))
    where = array.namespace(k).asarray(order)
    return k[where], v[where], k_tokens[order]
