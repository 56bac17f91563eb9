"""Section 3 of the theory: attention over a cut sequence, in prefill and in decode.

Four sequences of uneven length lie end to end, and heads share keys and values in groups. A cut
deals the tokens of each sequence to the ranks; a rank may get none of a short one.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

from hpcinfer import partition
from hpcinfer.ops.attention import ragged_attention
from hpcinfer.parallel import gather, ring, split, tree, ulysses
from hpcinfer.verify import oracle
from hpcinfer.verify.row import Case, Trial

LENGTHS = (83, 1, 37, 6)
LONGEST = max(LENGTHS)
H, G, K = 6, 3, 8
WINDOW = 3  # so short that the ring ends early also where a rank has one token of a sequence
DEALT = partition.block_cyclic  # the cut of the engine, which deals pages
CHUNK = 2  # new tokens of each sequence at most, where queries are fewer than keys
TOKEN_BYTES, WORD = 8, 4  # sequence and position in int32; a number in float32
KEY_BYTES = 2 * G * K * WORD + TOKEN_BYTES


@dataclass(frozen=True)
class Problem:
    """Queries, keys and values of several sequences, whole.

    Attributes
    ----------
    q : (S, H, K) float32
    k, v : (L, G, K) float32
    q_tokens, k_tokens : (S, 2), (L, 2) int32, host: sequence and position of every token
    window : positions that a query sees; None for all
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    q_tokens: np.ndarray
    k_tokens: np.ndarray
    window: int | None = None

    @property
    def S(self):
        return len(self.q)

    @property
    def L(self):
        return len(self.k)

    def attend(self, q, k, v, q_tokens, k_tokens, between=None, groups=None):
        """(o, lse) of one rank's mathematics, for all heads or those of `groups`."""
        if groups is None:
            groups = partition.heads(H, G, 1)[0].groups
        return ragged_attention(
            q, k, v, q_tokens, k_tokens,
            scale=K**-0.5, groups=groups, window=self.window, between=between,
        )  # fmt: skip

    def whole(self):
        """(o, lse) by the definition."""
        return oracle.attention(
            self.q, self.k, self.v, self.q_tokens, self.k_tokens, K**-0.5, self.window
        )


def problem(rng, put=np.asarray, newest=LONGEST, window=None):
    """Random problem on the device, whose queries are the `newest` tokens of each sequence."""
    tokens = np.array([(b, i) for b, n in enumerate(LENGTHS) for i in range(n)], np.int32)
    new = tokens[:, 1] >= np.repeat(LENGTHS, LENGTHS) - newest
    q, k, v = (
        put(rng.normal(size=(n, heads, K)).astype(np.float32))
        for n, heads in ((new.sum(), H), (len(tokens), G), (len(tokens), G))
    )
    return Problem(q, k, v, tokens[new], tokens, window)


def deal(tokens, P, cut):
    """For every rank the rows of its tokens, each sequence dealt by the cut of that name."""
    sequences = [np.flatnonzero(tokens[:, 0] == b) for b in np.unique(tokens[:, 0])]
    dealt = [[rows[own] for own in partition.CUTS[cut](len(rows), P)] for rows in sequences]
    return [np.concatenate(parts) for parts in zip(*dealt, strict=True)]


# --- one operand cut -----------------------------------------------------------------------------


def split_q(comm, rng, put):
    x = problem(rng, put)
    counts, own = _block(comm, x.S)
    o = split.q_only(comm, x.q[own], x.k, x.v, x.q_tokens[own], x.k_tokens, counts, x.attend)
    return Trial((o,), x.whole()[:1], WORD * x.S * H * K * (comm.size - 1))


def split_v(comm, rng, put):
    x = problem(rng, put)
    counts, own = _block(comm, x.L)
    o = split.v_only(comm, x.q, x.k, x.v[own], x.q_tokens, x.k_tokens, counts, x.attend)
    return Trial((o,), x.whole()[:1], 2 * WORD * x.S * H * K * (comm.size - 1))


def split_k(comm, rng, put):
    x = problem(rng, put)
    counts, own = _block(comm, x.L)
    o = split.k_only(comm, x.q, x.k[own], x.v, x.q_tokens, x.k_tokens[own], counts, x.attend)
    return Trial((o,), x.whole()[:1], 2 * WORD * x.S * H * K * (comm.size - 1))


def split_gathered(comm, rng, put):
    """K and V are cut outside attention, and whole inside it."""
    x = problem(rng, put)
    counts, own = _block(comm, x.L)
    keys = split.gathered_keys(comm, x.k[own], x.v[own], x.k_tokens[own], counts)
    o, _ = x.attend(x.q[own], *keys[:2], x.q_tokens[own], keys[2])
    return Trial((o,), (x.whole()[0][own],), x.L * KEY_BYTES * (comm.size - 1))


# --- prefill -------------------------------------------------------------------------------------


def ring_keys(comm, rng, put, cut):
    x = problem(rng, put)
    rows = deal(x.k_tokens, comm.size, cut)
    return _ring(comm, x, rows, x.L * KEY_BYTES * (comm.size - 1))


def ring_window(comm, rng, put, cut):
    """The ring turns until the last block that any query sees; per sequence 16 bytes tell so."""
    x = problem(rng, put, window=WINDOW)
    rows = deal(x.k_tokens, comm.size, cut)
    owner = np.empty(x.L, int)
    for rank, own in enumerate(rows):
        owner[own] = rank
    distance = (owner[:, None] - owner) % comm.size
    n_shifts = distance[oracle.visible(x.q_tokens, x.k_tokens, WINDOW)].max()
    n_facts = sum(2 * len(np.unique(x.k_tokens[own, 0])) for own in rows)
    formula_bytes = int(n_shifts) * x.L * KEY_BYTES
    formula_bytes += (comm.size - 1) * (4 * comm.size + 16 * n_facts)
    return _ring(comm, x, rows, formula_bytes)


def ring_queries(comm, rng, put, cut):
    """Few new queries pass around, and come home by Alltoall with what they found."""
    x = problem(rng, put, newest=CHUNK)
    keys = deal(x.k_tokens, comm.size, cut)[comm.rank]
    counts, own = _block(comm, x.S)

    def attend_local(q, q_tokens):
        return x.attend(q, x.k[keys], x.v[keys], q_tokens, x.k_tokens[keys])

    got = ring.ring_queries(comm, x.q[own], x.q_tokens[own], counts, attend_local)
    query_bytes = WORD * H * K + TOKEN_BYTES + WORD * H * (K + 1)
    return Trial(got, tuple(y[own] for y in x.whole()), x.S * query_bytes * (comm.size - 1))


def ulysses_heads(comm, rng, put, cut):
    x = problem(rng, put)
    rows, heads = deal(x.k_tokens, comm.size, cut), partition.heads(H, G, comm.size)
    counts, own = [len(r) for r in rows], rows[comm.rank]
    tokens = x.k_tokens[np.concatenate(rows)]

    def attend(q, k, v, groups):
        return x.attend(q, k, v, tokens, tokens, groups=groups)[0]

    o = ulysses.ulysses(comm, x.q[own], x.k[own], x.v[own], counts, counts, heads, attend)

    # All tokens and heads move but those whose owner is the same before and after.
    h, g = (np.array([getattr(r, name) for r in heads]) for name in ("n_query", "n_kv"))
    moved_q, moved_kv = x.S * H - counts @ h, x.L * g.sum() - counts @ g
    formula_bytes = int(2 * WORD * K * (moved_q + moved_kv))
    return Trial((o,), (x.whole()[0][own],), formula_bytes)


# --- decode --------------------------------------------------------------------------------------


def decode_gather(comm, rng, put, cut):
    x = problem(rng, put, newest=1)
    record_bytes = WORD * x.S * H * (K + 1)
    bcast_bytes = record_bytes if comm.size > 1 else 0
    return _decode(comm, x, cut, gather.gather, record_bytes * (comm.size - 1) + bcast_bytes)


def decode_tree(comm, rng, put, cut):
    x = problem(rng, put, newest=1)
    return _decode(comm, x, cut, tree.tree, 2 * WORD * x.S * H * (K + 2) * (comm.size - 1))


def decode_tree_single(comm, rng, put, cut):
    x = problem(rng, put, newest=1)
    return _decode(comm, x, cut, tree.tree_single, 2 * WORD * x.S * H * (K + 1) * (comm.size - 1))


def decode_ring(comm, rng, put, cut):
    """Every rank has the same queries and meets all keys in turn."""
    x = problem(rng, put, newest=1)
    rows = deal(x.k_tokens, comm.size, cut)
    return _ring(comm, x, rows, x.L * KEY_BYTES * (comm.size - 1), q_cut=False)


ROWS = [
    Case("split Q only", "Q", split_q, engine=False),
    Case("split V only", "V", split_v, engine=False),
    Case("split K only", "K", split_k, equal=False, engine=False),
    Case("split, keys gathered", "Q, K, V", split_gathered),
    *(
        Case("ring", name.replace("_", "-"), partial(ring_keys, cut=name), engine=cut is DEALT)
        for name, cut in partition.CUTS.items()
    ),
    Case("ring, window", "contiguous", partial(ring_window, cut="contiguous"), engine=False),
    Case("ring, queries pass", "block-cyclic", partial(ring_queries, cut="block_cyclic")),
    Case("ulysses", "block-cyclic, heads", partial(ulysses_heads, cut="block_cyclic")),
    Case("decode, gather", "block-cyclic", partial(decode_gather, cut="block_cyclic")),
    Case("decode, tree", "block-cyclic", partial(decode_tree, cut="block_cyclic")),
    Case("decode, tree_single", "block-cyclic", partial(decode_tree_single, cut="block_cyclic")),
    Case("decode, ring", "block-cyclic", partial(decode_ring, cut="block_cyclic")),
]


def _block(comm, n):
    """Counts of every rank, and this rank's slice, of n tokens in one run per rank."""
    ranges = partition.block(n, comm.size)
    return partition.counts(ranges), slice(*ranges[comm.rank])


def _ring(comm, x, rows, formula_bytes, q_cut=True):
    """Trial of the ring with keys dealt as `rows`, and queries too unless each rank has all."""
    counts, own = [len(r) for r in rows], rows[comm.rank]
    queries = own if q_cut else slice(None)
    got = ring.ring(
        comm, x.q[queries], x.k[own], x.v[own], x.q_tokens[queries], x.k_tokens[own],
        counts, x.attend, x.window,
    )  # fmt: skip
    return Trial(got, tuple(y[queries] for y in x.whole()), formula_bytes)


def _decode(comm, x, cut, merge, formula_bytes):
    """Trial of a merge over the ranks, each of which has attended to its own keys."""
    own = deal(x.k_tokens, comm.size, cut)[comm.rank]
    o, lse = x.attend(x.q, x.k[own], x.v[own], x.q_tokens, x.k_tokens[own])
    return Trial(merge(comm, o, lse), x.whole(), formula_bytes)
