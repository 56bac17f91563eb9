"""Choice of the next token from logits: penalties, filters, and counter-based random numbers.

A token is drawn as argmax(logit / temperature + Gumbel noise) over the allowed ids, which is a draw
from their softmax (Gumbel-max, Maddison et al. 2014, arXiv:1411.0030). The noise is a function of
(seed, request key, sample, position, vocabulary id) alone, so a draw depends neither on the batch,
nor on its order, nor on how the vocabulary is cut.

Order of the steps, that of vLLM's sampler:

1. banned ids become -inf (stop ids while min_tokens is not reached);
2. repetition penalty over prompt and generated tokens (Keskar et al. 2019, arXiv:1909.05858), then
   frequency and presence penalty over the generated tokens only (OpenAI API);
3. greedy rows (temperature below 1e-5): the largest logit; the others divide by their temperature;
4. min-p (Nguyen et al. 2024, arXiv:2407.01082): keep what has min_p times the largest probability;
5. top-k: keep the k first in the order (logit descending, id ascending);
6. top-p (Holtzman et al. 2019, arXiv:1904.09751): of what is left, renormalised, keep a token while
   the probability before it in that order is below top_p; the first is always kept;
7. argmax of the noisy logits. All ties go to the lowest id.

Reported log-probabilities are those of the raw logits, before step 1.

Two devices make every result independent of the cut, to the last bit. Softmax weights are integers,
e^(z - max z) in units of 2^-s with V 2^s < 2^62, so their sums are exact in any order. And a
candidate is one 64-bit integer that holds the logit and the id, and sorts in the order of step 5
(`ops.candidates`). `choose` is the plain choice, on whole rows; over a cut vocabulary
`parallel.vocabulary.choose` makes it in three steps from what `columns` has of each rank's part.
"""

from dataclasses import dataclass

import numpy as np

from hpcinfer import array
from hpcinfer.errors import NotFinite
from hpcinfer.ops.candidates import (
    draw,
    keys_of,
    lowest_of_best,
    over_temperature,
    row_blocks,
    top_keys,
    units_of_one,
    weight_sums,
    weights,
)
from hpcinfer.ops.dispatch import dispatch
from hpcinfer.ops.penalties import penalise
from hpcinfer.ops.random import gumbel, gumbel_range


@dataclass(frozen=True)
class Chosen:
    """The next token of R sequences.

    Attributes
    ----------
    token_ids : (R,) int64
    logprobs : (R,) float32, log-probability of the token under the raw logits; NaN if not asked for
    top : R times a list of (token id, log-probability), most probable first, or None;
        None if no row asked for it
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    top: list | None


def choose(logits, rows):
    """Next tokens from the whole vocabulary on one rank: the plain form, one row after the other.

    Parameters
    ----------
    logits : (R, V) of any floating type
    rows : SamplingBatch, R of them

    Returns
    -------
    Chosen

    Raises
    ------
    ValueError
        If a row has no finite largest logit: NaN, or every id banned.
    """
    raw = array.host(array.widen(logits))
    penalised = penalise(raw, 0, rows)
    refuse_unbounded(penalised.max(axis=1).astype(np.float64))
    token_ids = np.array([_choose_row(x, rows, r) for r, x in enumerate(penalised)], np.int64)

    logprobs, top = unreported(len(rows))
    for r in np.flatnonzero(rows.logprobs >= 0):
        order = np.argsort(-raw[r], kind="stable")
        total = weights(raw[r].astype(np.float64) - raw[r].max(), raw.shape[1]).sum()
        logp = logprob(raw[r], raw[r].max(), total, raw.shape[1])
        logprobs[r] = logp[token_ids[r]]
        top[r] = [(int(i), float(logp[i])) for i in order[: rows.logprobs[r]]]
    return Chosen(token_ids, logprobs, top if (rows.logprobs >= 0).any() else None)


def _choose_row(x, rows, r):
    """Steps 3 to 7 for the penalised logits (V,) of row `r`."""
    if not rows.drawn[r]:
        return np.argmax(x)
    ids = np.argsort(-x, kind="stable")
    z = x[ids].astype(np.float64) / rows.temperature[r]

    # Each filter keeps a prefix of the sorted vocabulary.
    n = int(np.sum(z >= z[0] + rows.log_min_p[r]))
    if rows.top_k[r] > 0:
        n = min(n, int(rows.top_k[r]))
    if rows.top_p[r] < 1:
        weight = weights(z[:n] - z[0], x.size)
        before = np.cumsum(weight) - weight
        n = max(1, int(np.sum(before < rows.top_p[r] * weight.sum())))

    noise = gumbel(rows.seed[r], rows.key[r], rows.sample[r], rows.position[r], ids[:n])
    return lowest_of_best(z[None, :n] + noise, ids[None, :n])[0]


# ---- what a rank does with its own columns ----


@dispatch
def columns(logits, start, V, rows, width, between=None):
    """A rank's own columns of the logits, ready for the questions that a choice asks of them.

    Parameters
    ----------
    logits : (R, V/P) of any floating type
    start : vocabulary id of the first column
    V : length of the whole vocabulary
    rows : SamplingBatch, R of them, `SamplingBatch.within` the vocabulary
    width : candidates that the first round asks for
    between : function called while a device computes, or None

    Returns
    -------
    Columns
    """
    if between is not None:
        between()
    return Columns(logits, start, V, rows)


class Columns:
    """Answers of a rank's own columns, all on the host; the plain form.

    Row numbers `index` are arrays of integers; (R,) arguments and results have every row.
    """

    def __init__(self, logits, start, V, rows):
        self.raw, self.start, self.V, self.rows = array.widen(logits), start, V, rows
        self.x = penalise(self.raw, start, rows)

    def best(self):
        """Score (R,) float64 and id (R,) int64 of every row's best column, as `best` finds them."""
        return best(self.x, self.start, self.rows)

    def nucleus_totals(self, index, top):
        """Weights after min-p of rows with the largest logits `top` (R,): sums (len(index),)."""
        rows = self.rows
        return weight_sums(self.x, index, top, self.V, rows.temperature, rows.log_min_p)

    def candidates(self, index, width):
        """Keys of the largest penalised logits: (len(index), min(width, V/P)) uint64."""
        return top_keys(self.x, index, self.start, width)

    def draw(self, index, keys, floor, total):
        """As `draw`, from the candidates of all ranks for the rows `index`."""
        return draw(keys, floor, total, self.V, self.rows.take(index))

    def report(self, index, token_ids, n):
        """Keys of raw logits: of the tokens `token_ids` (R,), and of the most probable ones.

        Returns
        -------
        (len(index), 1 + min(n, V/P)) uint64; 0 first where the token is another rank's
        """
        chosen = keys_of(self.raw, index, token_ids[index], self.start)
        return np.concatenate([chosen, top_keys(self.raw, index, self.start, n)], axis=1)

    def report_totals(self, index, top):
        """Weights of the raw logits, the largest of which are `top` (R,): sums (len(index),)."""
        return weight_sums(self.raw, index, top, self.V)


# ---- steps on a rank's own columns ----


def best(x, start, rows):
    """Every row's best own column: by logit, or by noisy logit in rows that are drawn unfiltered.

    Parameters
    ----------
    x : (R, V/P) float32, penalised
    start : vocabulary id of the first column
    rows : SamplingBatch

    Returns
    -------
    score : (R,) float64 on the host; -inf if this rank has no column
    token_ids : (R,) int64 on the host
    """
    xp = array.namespace(x)
    R, V_own = x.shape
    if V_own == 0:
        return np.full(R, -np.inf), np.zeros(R, np.int64)
    column, score = _largest(x)

    # Draw in rows that nothing restricts.
    for block in row_blocks(np.flatnonzero(rows.drawn & ~rows.filtered), V_own):
        z = over_temperature(x, block, rows.temperature)
        random = (rows.seed, rows.key, rows.sample, rows.position)
        z += gumbel_range(*(c[block] for c in random), start, start + V_own, xp)
        column[block], score[block] = _largest(z)
    return score, column + start


def _largest(x):
    """Column (int64) and value (float64) of the first largest item of every row, on the host."""
    xp = array.namespace(x)
    column = xp.argmax(x, axis=1)
    value = xp.take_along_axis(x, column[:, None], axis=1)[:, 0]
    return array.host(column).astype(np.int64), array.host(value).astype(np.float64)


# ---- steps on gathered candidates ----


def logprob(value, top, total, V):
    """Log-probability of a raw logit.

    Parameters
    ----------
    value, top : float32, the logit and the largest one of its row
    total : int64, sum of the row's weights in the unit of `weights`

    Returns
    -------
    float32
    """
    below = np.asarray(value).astype(np.float64) - top
    return (below - np.log(total / units_of_one(V))).astype(np.float32)


def unreported(R):
    """Log-probabilities and alternatives of R rows before any is filled in."""
    return np.full(R, np.nan, np.float32), [None] * R


def refuse_unbounded(score):
    """Raise NotFinite unless the best score of every row, (R,) float64, is finite."""
    bad = np.flatnonzero(~np.isfinite(score))
    if bad.size:
        raise NotFinite(
            f"sample: got {score[bad[0]]} as the best score of row {bad[0]}, need a finite logit; "
            "the model gives NaN or infinity, or every token is banned"
        )
