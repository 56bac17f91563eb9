"""Vocabulary parallelism: embedding and logits are cut by vocabulary ids and are never gathered.

    before   embed: token ids (T,) on every rank, weight (V/P, D)
             log_softmax_of, choose: logits (R, V/P); the rows' targets, or settings, on every rank
    after    embed: (T, D); log_softmax_of: (R,); choose: R tokens; equal on every rank
    cost     embed: 1 Allreduce: 2 (P-1)/P · 4 T D bytes sent per rank; where tokens are cut over
             the ranks 1 ReduceScatter: (P-1)/P · 4 T D bytes
             log_softmax_of: 2 Allreduce: 2 (P-1)/P · 24 R bytes
             choose: 1 Allgather: (P-1) · 16 R bytes; greedy and unfiltered rows need no more.
             For f filtered rows 1 Allgather of c = min(64, V/P) candidates: (P-1) · 8 f c bytes,
             and for those with top-p and no top-k 1 Allreduce: 2 (P-1)/P · 8 f bytes.
             For l rows that report n log-probabilities 1 Allgather: (P-1) · 8 l (1 + max(1, n))
             bytes, and 1 Allreduce: 2 (P-1)/P · 8 l bytes
    source   Shoeybi et al. 2019, section 3 (arXiv:1909.08053); Maddison et al. 2014, Gumbel-max
             (arXiv:1411.0030)

The embedding of a token is looked up by the rank that owns its id and is zero elsewhere, so that
the sum is the whole. A softmax over a cut axis needs the maximum and the sum of exponentials only.
The largest logit is the largest of the ranks' largest, and so is the largest noisy logit: as every
rank knows the noise of its own ids, that is a draw from the whole softmax. Min-p, top-k and top-p
keep a prefix of the sorted vocabulary: each rank offers its c largest, and what lies above the
largest of the ranks' smallest offers is the true prefix. Rows whose filter reaches below it are
tried again with c grown eightfold, up to the whole vocabulary (ledger purpose "choose whole").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from mpi4py import MPI

from hpcinfer import array, collectives, partition
from hpcinfer.array import Array
from hpcinfer.ops import candidates, sample
from hpcinfer.ops.embed import embed as own_rows
from hpcinfer.ops.sampling_batch import SamplingBatch
from hpcinfer.ops.softmax import softmax_parts

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

CANDIDATES = 64  # offers of a rank in the first round
GROWTH = 8
GATHER_ITEMS = 1 << 20  # candidates in one Allgather: bounds the memory of rows that need many
LOGITS_BYTES = 64 << 20  # logits of a rank in memory at a time, where many rows have them

_BEST = np.dtype([("score", np.float64), ("token_id", np.int64)])


def rows_at_a_time(V: int, P: int) -> int:
    """Rows whose logits fit `LOGITS_BYTES` on the rank with the widest part of a vocabulary."""
    widest = max(partition.counts(partition.block(V, P)))
    return max(1, LOGITS_BYTES // (4 * widest))


def embed(
    comm: Comm, token_ids: Array, weight: Array, start: int, counts: list[int] | None = None
) -> Array:
    """Rows of a vocabulary-cut embedding.

    Parameters
    ----------
    token_ids : (T,) integers, equal on every rank
    weight : (V/P, D) of any floating type
    start : vocabulary id of the first own row
    counts : tokens that each rank keeps; None if every rank keeps all

    Returns
    -------
    (T, D) float32, equal on every rank, or (counts[rank], D); zero for an id that no rank owns

    Raises
    ------
    ValueError
        If a token id is negative.
    """
    token_ids = np.asarray(array.host(token_ids))
    _refuse_negative(token_ids)

    # Look up the own ids, zero for others', and sum over the ranks.
    x_sum = own_rows(weight, token_ids, start)
    if counts is not None:
        return collectives.ReduceScatter(comm, x_sum, counts, purpose="embed")
    return collectives.Allreduce(comm, x_sum, purpose="embed")


def log_softmax_of(comm: Comm, logits: Array, start: int, targets: Array) -> np.ndarray:
    """Log-probabilities of given tokens.

    Parameters
    ----------
    logits : (R, V/P) of any floating type
    start : vocabulary id of the first own column
    targets : (R,) integers, equal on every rank

    Returns
    -------
    (R,) float32 on the host, equal on every rank; -inf for a target that no rank owns

    Raises
    ------
    ValueError
        If there is not one target for each row, one is negative, or logits are not finite.
    """
    targets = np.asarray(array.host(targets))
    if targets.shape != logits.shape[:1]:
        raise ValueError(
            f"vocabulary: got targets {targets.shape} for logits {logits.shape}, need one per row"
        )
    _refuse_negative(targets)
    own_top, own_target, exp_sum = softmax_parts(array.widen(logits), targets, start)

    # Find the largest logit of each row, and the target's, which one rank alone knows.
    largest = np.stack([own_top, own_target], axis=1)
    collectives.Allreduce(comm, largest, MPI.MAX, purpose="log_softmax")
    top, target = largest.T

    # Sum the exponentials below the largest, in float64.
    with np.errstate(invalid="ignore", divide="ignore"):
        exp_sum *= np.where(own_top == top, 1, np.exp(own_top - top))
        collectives.Allreduce(comm, exp_sum, purpose="log_softmax")
        log_sum = top + np.log(exp_sum)
    sample.refuse_unbounded(log_sum)
    return (target - top - np.log(exp_sum)).astype(np.float32)


def choose(
    comm: Comm,
    logits: Array,
    start: int,
    V: int,
    rows: SamplingBatch,
    between: Callable | None = None,
) -> sample.Chosen:
    """Next tokens of R sequences: to the last bit those of `sample.choose` on the gathered logits.

    Parameters
    ----------
    logits : (R, V/P) of any floating type, cut by `partition.block`
    start : vocabulary id of the first own column
    V : length of the whole vocabulary
    rows : sample.SamplingBatch, R of them, equal on every rank
    between : function called while a device computes, or None

    Returns
    -------
    sample.Chosen, equal on every rank

    Raises
    ------
    ValueError
        If the logits are not this rank's block of R rows, or a row has no finite largest logit.
    """
    _check_cut(comm, logits.shape, start, V, len(rows))
    rows = rows.within(V)

    # Offer: make ready what this rank's columns have for every row.
    own = sample.columns(logits, start, V, rows, CANDIDATES, between)

    # Settle: the best of the ranks' best, and in rows with filters what they leave to draw from.
    score, token_ids = _best(comm, own)
    sample.refuse_unbounded(score)
    filtered = np.flatnonzero(rows.filtered)
    if filtered.size:
        token_ids[filtered] = _draw_filtered(comm, own, V, rows, filtered, score)[filtered]

    # Report: log-probabilities, in the rows that ask for them.
    logprobs, top = _report(comm, own, V, rows, token_ids)
    return sample.Chosen(token_ids, logprobs, top)


def _best(comm, own):
    """Best score (R,) and its lowest id (R,) over all ranks."""
    score, token_ids = own.best()
    part = np.empty(len(score), _BEST)
    part["score"], part["token_id"] = score, token_ids
    of_ranks = collectives.Allgather(comm, part, purpose="choose").reshape(comm.size, -1)
    score = of_ranks["score"].max(axis=0)
    return score, candidates.lowest_of_best(of_ranks["score"].T, of_ranks["token_id"].T)


def _draw_filtered(comm, own, V, rows, filtered, top):
    """Tokens (R,), valid in the rows `filtered`, from rounds of ever more candidates.

    Parameters
    ----------
    own : sample.Columns of this rank
    filtered : numbers of the rows that min-p, top-k or top-p restrict
    top : (R,) float64, their largest logits
    """
    counts = partition.counts(partition.block(V, comm.size))
    total = _nucleus_totals(comm, own, rows, filtered, top)
    token_ids, settled = np.zeros(len(rows), np.int64), np.zeros(len(rows), bool)

    pending, width = filtered, CANDIDATES
    while pending.size:
        # Offer the same number of candidates on every rank; rows with a larger top-k wait.
        offers = [min(width, n) for n in counts]
        purpose = "choose candidates" if max(offers) < max(counts) else "choose whole"
        ready = pending[rows.top_k[pending] <= width]

        for block in candidates.row_blocks(ready, sum(offers), GATHER_ITEMS):
            keys = collectives.Allgather(
                comm, own.candidates(block, width), offers, axis=1, purpose=purpose
            )
            token_ids[block], settled[block] = own.draw(
                block, keys, _floor(keys, offers, counts), total[block]
            )
        pending = pending[~settled[pending]]
        width *= GROWTH
    return token_ids


def _nucleus_totals(comm, own, rows, filtered, top):
    """Sums of the weights after min-p (R,), in the rows with top-p and no top-k."""
    total = np.zeros(len(rows), np.int64)
    nucleus = filtered[rows.nucleus[filtered]]
    if nucleus.size:
        sums = own.nucleus_totals(nucleus, top)
        total[nucleus] = collectives.Allreduce(comm, sums, purpose="choose totals")
    return total


def _floor(keys, offers, counts):
    """Key from which upward no rank's candidate is missing: (n,), 0 if every rank offered all."""
    floor, first = np.zeros(len(keys), np.uint64), 0
    for offered, owned in zip(offers, counts, strict=True):
        if offered < owned:
            floor = np.maximum(floor, keys[:, first : first + offered].min(axis=1))
        first += offered
    return floor


def _report(comm, own, V, rows, token_ids):
    """Log-probabilities of the chosen and of the most probable tokens, in the rows that ask."""
    logprobs, top = sample.unreported(len(rows))
    asked = np.flatnonzero(rows.logprobs >= 0)
    if not asked.size:
        return logprobs, None

    # Gather the most probable tokens, behind the chosen one, whose owner alone has a key for it.
    n = rows.reported(V)
    offers = [1 + min(n, c) for c in partition.counts(partition.block(V, comm.size))]
    keys = collectives.Allgather(
        comm, own.report(asked, token_ids, n), offers, axis=1, purpose="logprobs"
    )
    firsts = np.cumsum([0, *offers[:-1]])
    chosen, _ = candidates.unpack(keys[:, firsts].max(axis=1))
    others = np.sort(np.delete(keys, firsts, axis=1), axis=1)
    value, ids = candidates.unpack(others[:, : -n - 1 : -1])

    # Sum the weights of the whole vocabulary.
    largest = np.zeros(len(rows))
    largest[asked] = value[:, 0]
    total = own.report_totals(asked, largest)
    collectives.Allreduce(comm, total, purpose="logprobs")

    logprobs[asked] = sample.logprob(chosen, value[:, 0], total, V)
    logp = sample.logprob(value, value[:, :1], total[:, None], V)
    for i, r in enumerate(asked):
        pairs = zip(ids[i].tolist(), logp[i].tolist(), strict=True)
        top[r] = list(pairs)[: rows.logprobs[r]]
    return logprobs, top


def _refuse_negative(token_ids):
    if token_ids.size and token_ids.min() < 0:
        raise ValueError(f"vocabulary: got token id {token_ids.min()}, need 0 or more")


def _check_cut(comm, shape, start, V, R):
    first, stop = partition.block(V, comm.size)[comm.rank]
    if shape != (R, stop - first) or start != first:
        raise ValueError(
            f"vocabulary: got logits {shape} from id {start} for {R} rows on rank {comm.rank}, "
            f"need ({R}, {stop - first}) from id {first}; cut the vocabulary with partition.block"
        )
