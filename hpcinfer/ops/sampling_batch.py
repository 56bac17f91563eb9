"""How each row of a batch chooses its next token, and what it has seen before."""

from dataclasses import dataclass, replace

import numpy as np

GREEDY_BELOW = 1e-5  # a temperature below it means the largest logit, as in vLLM


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


NOTHING_SEEN = History(())


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
