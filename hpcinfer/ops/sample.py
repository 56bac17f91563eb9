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
candidate is one 64-bit integer that holds the logit and the id, and sorts in the order of step 5.
"""

from dataclasses import dataclass, replace

import numpy as np

from hpcinfer import array
from hpcinfer.errors import NotFinite
from hpcinfer.ops.dispatch import dispatch
from hpcinfer.ops.random import gumbel, gumbel_range

GREEDY_BELOW = 1e-5  # a temperature below it means the largest logit, as in vLLM
BLOCK_ITEMS = 1 << 16  # logits handled at a time: temporaries stay bounded, and in cache

# Columns of `SamplingBatch`: element type, neutral value, smallest and largest value.
_COLUMNS = {
    "temperature": (np.float64, 0.0, 0.0, 1e30),
    "top_k": (np.int64, 0, 0, 2**63 - 1),
    "top_p": (np.float64, 1.0, 0.0, 1.0),
    "min_p": (np.float64, 0.0, 0.0, 1.0),
    "repetition": (np.float64, 1.0, 1e-30, 1e30),
    "presence": (np.float64, 0.0, -1e30, 1e30),
    "frequency": (np.float64, 0.0, -1e30, 1e30),
    "seed": (np.uint64, 0, 0, 2**64 - 1),
    "key": (np.uint64, 0, 0, 2**64 - 1),
    "sample": (np.uint64, 0, 0, 2**64 - 1),
    "position": (np.uint64, 0, 0, 2**32 - 1),
    "logprobs": (np.int64, -1, -1, 2**63 - 1),
}


class History:
    """The distinct token ids that one sequence has seen, and how often each was generated.

    Attributes
    ----------
    ids : (n,) int64, each id once
    counts : (n,) int64, times generated; 0 for an id of the prompt only
    """

    def __init__(self, prompt_ids, generated_ids=()):
        self._ids = np.unique(np.asarray(prompt_ids, np.int64))
        self._counts = np.zeros(self._ids.size, np.int64)
        self._slot = {token_id: slot for slot, token_id in enumerate(self._ids.tolist())}
        for token_id in generated_ids:
            self.add(token_id)

    def add(self, token_id):
        """Count one generated token."""
        slot = self._slot.setdefault(int(token_id), len(self._slot))
        if slot == self._ids.size:
            self._grow()
        self._ids[slot] = token_id
        self._counts[slot] += 1

    @property
    def ids(self):
        return self._ids[: len(self._slot)]

    @property
    def counts(self):
        return self._counts[: len(self._slot)]

    def _grow(self):
        room = np.zeros(max(16, self._ids.size), np.int64)
        self._ids = np.concatenate([self._ids, room])
        self._counts = np.concatenate([self._counts, room])


_NOTHING_SEEN = History(())


@dataclass(frozen=True)
class SamplingBatch:
    """How to choose the next token of R sequences, one item each; made by `SamplingBatch.make`.

    Attributes
    ----------
    temperature : (R,) float64, 0 for greedy
    top_k : (R,) int64, 0 for off
    top_p, min_p : (R,) float64, 1 and 0 for off
    repetition, presence, frequency : (R,) float64 penalties; 1, 0 and 0 are neutral
    seed, key, sample, position : (R,) uint64, what the random numbers are a function of
    logprobs : (R,) int64, alternatives to report beside the chosen token; -1 for no report at all
    history : R times History or None (no penalties); None if no row has any
    banned : R times a sequence of token ids that may not be chosen; None if no row has any
    """

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    repetition: np.ndarray
    presence: np.ndarray
    frequency: np.ndarray
    seed: np.ndarray
    key: np.ndarray
    sample: np.ndarray
    position: np.ndarray
    logprobs: np.ndarray
    history: tuple | None = None
    banned: tuple | None = None

    @classmethod
    def make(cls, R, history=None, banned=None, **columns):
        """Rows of `R` sequences; a column is a scalar or R values, neutral where it is left out.

        Raises
        ------
        ValueError
            For an unknown column, a wrong length, or a value out of range.
        """
        unknown = columns.keys() - _COLUMNS.keys()
        if unknown:
            raise ValueError(f"sample: got column {min(unknown)!r}, need {', '.join(_COLUMNS)}")
        filled = {name: _column(name, columns.get(name), R) for name in _COLUMNS}
        history = _ragged("history", history, R, lambda seen: seen is not None)
        banned = _ragged("banned", banned, R, len)
        return cls(**filled, history=history, banned=banned)

    def __len__(self):
        return self.temperature.size

    def take(self, index):
        """The rows numbered `index` (integers)."""
        columns = {name: getattr(self, name)[index] for name in _COLUMNS}
        history = self.history and tuple(self.history[i] for i in index)
        banned = self.banned and tuple(self.banned[i] for i in index)
        return SamplingBatch(**columns, history=history, banned=banned)

    def at(self, positions, banned):
        """The same rows for tokens at other positions, where other ids may be banned."""
        banned = _ragged("banned", banned, len(self), len)
        return replace(self, position=np.array(positions, np.uint64), banned=banned)

    def within(self, V):
        """The same rows with top_k off where it lets the whole vocabulary pass."""
        return replace(self, top_k=np.where(self.top_k < V, self.top_k, 0))

    @property
    def drawn(self):
        """(R,) bool: rows that are sampled, not greedy."""
        return self.temperature >= GREEDY_BELOW

    @property
    def filtered(self):
        """(R,) bool: sampled rows that min-p, top-k or top-p restrict."""
        return self.drawn & ((self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0))

    @property
    def nucleus(self):
        """(R,) bool: rows whose top-p needs the sum of all weights, as they have no top-k."""
        return self.filtered & (self.top_p < 1) & (self.top_k == 0)

    def reported(self, V):
        """Most probable tokens of a vocabulary `V` that a report needs: the largest, or more."""
        return min(max(1, int(self.logprobs.max())), V)

    @property
    def log_min_p(self):
        """(R,) float64: what min-p asks of z - max(z); -inf where it is off."""
        with np.errstate(divide="ignore"):
            return np.log(self.min_p)


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


# ---- random numbers ----


# ---- what a rank does with its own columns ----


@dispatch
def columns(logits, start, V, rows, width, between=None):
    """A rank's own columns of the logits, ready for the questions that a choice asks of them.

    Parameters
    ----------
    logits : (R, V/P) of any floating type
    start : vocabulary id of the first column
    V : length of the whole vocabulary
    rows : SamplingBatch, R of them, `Rows.within` the vocabulary
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


def keys_of(raw, index, token_ids, start):
    """Keys (n, 1) of one token for each of the rows `index`; 0 for those that are not here."""
    keys, column = np.zeros((len(index), 1), np.uint64), token_ids - start
    mine = np.flatnonzero((column >= 0) & (column < raw.shape[1]))
    value = array.host(raw[index[mine], column[mine]])
    keys[mine, 0] = pack(value, token_ids[mine])
    return keys


# ---- steps on a rank's own columns ----


def penalise(logits, start, rows):
    """Steps 1 and 2 on the columns start.. of the logits.

    Parameters
    ----------
    logits : (R, V/P)
    start : vocabulary id of the first column
    rows : SamplingBatch

    Returns
    -------
    (R, V/P) float32: a changed copy, or the logits themselves where no row asks for a change
    """
    x = array.widen(logits)
    if rows.history is None and rows.banned is None:
        return x
    x = x.copy() if x is logits else x
    if rows.banned is not None:
        r, column, own = _entries(rows.banned, start, x.shape[1])
        x[r[own], column[own]] = -np.inf
    if rows.history is not None:
        _penalise_seen(x, start, rows)
    return x


def _penalise_seen(x, start, rows):
    """Apply the penalties to the logits of the tokens that each row has seen, in place."""
    xp = array.namespace(x)
    seen = [h or _NOTHING_SEEN for h in rows.history]
    r, column, own = _entries([h.ids for h in seen], start, x.shape[1])
    count = np.concatenate([h.counts for h in seen])[own]
    r, column = r[own], column[own]

    repetition, frequency, presence, count = (
        xp.asarray(c, xp.float32)
        for c in (rows.repetition[r], rows.frequency[r], rows.presence[r], count)
    )
    value = x[r, column]
    value = xp.where(value > 0, value / repetition, value * repetition)
    x[r, column] = value - frequency * count - presence * (count > 0)


def _entries(ids, start, width):
    """Ids of all rows, flat: row, column counted from `start`, whether it is one of `width`."""
    r = np.repeat(np.arange(len(ids)), [len(row) for row in ids])
    column = np.concatenate([np.asarray(row, np.int64) for row in ids]) - start
    return r, column, (column >= 0) & (column < width)


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
        z = _over_temperature(x, block, rows.temperature)
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


def top_keys(x, index, start, width):
    """The `width` largest own candidates of the rows `index`.

    Returns
    -------
    (len(index), min(width, V/P)) uint64 on the host
    """
    width = min(width, x.shape[1])
    if not (width and len(index)):
        return np.zeros((len(index), width), np.uint64)
    return np.concatenate(
        [_top_keys(x[block], start, width) for block in row_blocks(index, x.shape[1])]
    )


def _top_keys(x, start, width):
    """The `width` largest candidates of each of the logits (n, V/P): (n, width) uint64."""
    xp = array.namespace(x)
    first = x.shape[1] - width
    least = xp.partition(x, first, axis=1)[:, first : first + 1]
    r, column = (array.host(i) for i in xp.nonzero(x >= least))

    # Write the candidates of a row side by side; those equal to the least may be too many.
    slot = np.arange(r.size) - np.searchsorted(r, r)
    keys = np.zeros((len(x), max(width, slot.max(initial=0) + 1)), np.uint64)
    keys[r, slot] = pack(array.host(x[r, column]), column + start)
    return np.sort(keys, axis=1)[:, -width:]


def weight_sums(x, index, top, V, temperature=None, log_min_p=None):
    """Sums of the softmax weights of the own columns of the rows `index`.

    Parameters
    ----------
    x : (R, V/P) float32
    top : (R,) float64, largest logit of the whole vocabulary
    V : length of the whole vocabulary
    temperature, log_min_p : (R,) float64; None for 1 and for no restriction

    Returns
    -------
    (len(index),) int64 on the host, in the unit of `weights`
    """
    xp = array.namespace(x)
    temperature = np.ones(len(x)) if temperature is None else temperature
    log_min_p = np.full(len(x), -np.inf) if log_min_p is None else log_min_p
    sums = []
    for block in row_blocks(index, x.shape[1]):
        z = _over_temperature(x, block, temperature)
        z_top = xp.asarray(top[block] / temperature[block])[:, None]
        kept = z >= z_top + xp.asarray(log_min_p[block])[:, None]
        sums.append(array.host((weights(z - z_top, V) * kept).sum(axis=1)))
    return np.concatenate(sums) if sums else np.zeros(0, np.int64)


def _over_temperature(x, block, temperature):
    """Rows `block` of x divided by their temperatures, in float64."""
    xp = array.namespace(x)
    return x[block].astype(xp.float64) / xp.asarray(temperature[block])[:, None]


# ---- steps on gathered candidates ----


def draw(keys, floor, total, V, rows):
    """Steps 4 to 7 on the largest candidates of n rows, as far as these decide them.

    The candidates from `floor` upward are the true first ones of the whole vocabulary; below it
    some may be missing. Every filter keeps a prefix; a row is settled if that ends above the floor.

    Parameters
    ----------
    keys : (n, candidates) uint64, candidates of all ranks in any order
    floor : (n,) uint64, 0 where the candidates are the whole vocabulary
    total : (n,) int64, sum of the weights after min-p; not read in rows with top-k
    V : length of the whole vocabulary
    rows : SamplingBatch, n of them; each top_k at most the number of its candidates from the
        floor upward

    Returns
    -------
    token_ids : (n,) int64, valid where settled
    settled : (n,) bool
    """
    keys = np.sort(keys, axis=1)[:, ::-1]
    certain = keys >= floor[:, None]
    value, ids = unpack(keys)
    z = value.astype(np.float64) / rows.temperature[:, None]
    z_top = z[:, :1]

    # Shorten the prefix by min-p, then by top-k.
    kept = certain & (z >= z_top + rows.log_min_p[:, None])
    limited = rows.top_k > 0
    kept &= np.arange(keys.shape[1]) < np.where(limited, rows.top_k, keys.shape[1])[:, None]

    # Shorten it to the nucleus: the weight before a token is below top_p times that of all left.
    weight = weights(z - z_top, V) * kept
    share = rows.top_p * np.where(limited, weight.sum(axis=1), total)
    share = np.where(rows.top_p < 1, np.maximum(share, 1), np.inf)
    kept &= np.cumsum(weight, axis=1) - weight < share[:, None]
    n_kept = kept.sum(axis=1)
    settled = (floor == 0) | limited | (n_kept < certain.sum(axis=1))

    # Draw from the prefixes; columns that no row kept need no noise.
    longest = slice(0, n_kept.max(initial=0))
    random = (rows.seed, rows.key, rows.sample, rows.position)
    noise = gumbel(*(c[:, None] for c in random), ids[:, longest])
    score = np.where(kept[:, longest], z[:, longest] + noise, -np.inf)
    return lowest_of_best(score, ids[:, longest]), settled


def lowest_of_best(score, ids):
    """Lowest id among those of the largest score, for each row: two (n, ranks) -> (n,)."""
    largest = score.max(axis=1, keepdims=True)
    return np.where(score == largest, ids, np.iinfo(np.int64).max).min(axis=1)


def weights(z, V):
    """e^z in integer units of 2^-s: sums over a vocabulary of `V` are exact and below 2^62.

    Parameters
    ----------
    z : float64, at most 0; -inf has weight 0

    Returns
    -------
    int64 of the same shape
    """
    xp = array.namespace(z)
    return xp.rint(xp.exp(z) * _units_of_one(V)).astype(xp.int64)


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
    return (below - np.log(total / _units_of_one(V))).astype(np.float32)


def pack(x, ids):
    """Logits and ids on the host as integers that sort by logit, among equals by falling id.

    The high word is the float32 pattern made monotonic, the low word the complement of the id.
    No key is 0.

    Parameters
    ----------
    x : (...) float32
    ids : integers of a shape that broadcasts

    Returns
    -------
    (...) uint64
    """
    bits = (x + np.float32(0)).view(np.uint32)
    high = np.where(bits >> 31 != 0, ~bits, bits | np.uint32(0x80000000))
    low = (0xFFFFFFFF - ids).astype(np.uint64)
    return high.astype(np.uint64) << np.uint64(32) | low


def unpack(keys):
    """Logits (float32) and ids (int64) of candidates on the host."""
    high = (keys >> np.uint64(32)).astype(np.uint32)
    bits = np.where(high >> 31 != 0, high ^ np.uint32(0x80000000), ~high)
    return bits.view(np.float32), 0xFFFFFFFF - (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)


def row_blocks(index, width, items=None):
    """Cut row numbers into arrays of `items` (BLOCK_ITEMS) at most, a row counting `width`."""
    size = max(1, (items or BLOCK_ITEMS) // max(1, width))
    return [index[i : i + size] for i in range(0, len(index), size)]


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


def _units_of_one(V):
    return 2.0 ** (62 - int(V).bit_length())


def _column(name, values, R):
    """One checked column of `SamplingBatch`, filled up where a scalar or nothing is given."""
    dtype, neutral, lowest, highest = _COLUMNS[name]
    if values is None:
        return np.full(R, neutral, dtype)
    try:
        if np.dtype(dtype).kind != "f" and getattr(values, "dtype", np.dtype(int)).kind == "f":
            raise TypeError("a number that need not be whole")
        column = np.broadcast_to(np.asarray(values, dtype), R)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"sample: got {name} {values!r}, need 1 or {R} numbers from {lowest} to {highest}"
        ) from None
    good = (column >= lowest) & (column <= highest)
    if not good.all():
        bad = column[~good][0]
        raise ValueError(f"sample: got {name} {bad}, need {lowest} to {highest}")
    return column


def _ragged(name, items, R, matters):
    """A tuple of R items, or None where no item matters."""
    if items is None or not any(matters(item) for item in items):
        return None
    if len(items) != R:
        raise ValueError(f"sample: got {len(items)} of {name}, need {R}")
    return tuple(items)
