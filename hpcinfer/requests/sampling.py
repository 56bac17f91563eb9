"""How a request wants its tokens chosen; refuses what makes no sense when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcinfer.errors import integer, shown
from hpcinfer.ops.sampling_batch import GREEDY_BELOW

# Largest values of n and of logprobs; stop strings, characters of one, and stop ids
MAX_SAMPLES, MAX_LOGPROBS = 128, 20
MAX_STOPS, MAX_STOP_CHARACTERS, MAX_STOP_IDS = 16, 1024, 1024

_REAL = int | float | np.integer | np.floating


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when a sequence ends.

    Attributes
    ----------
    temperature : 0 to 1000; 0 is greedy; below 1e-5 becomes 0, since logits / temperature would
        overflow
    top_k : keep the k most probable tokens; 0 is off (-1 is taken as 0)
    top_p : keep the smallest set of this probability, in (0, 1]
    min_p : keep tokens of at least this times the largest probability, in [0, 1]
    repetition_penalty : above 0, at most 1000; divides positive and multiplies negative logits of
        tokens seen in prompt or output (Keskar et al. 2019, arXiv:1909.05858)
    presence_penalty, frequency_penalty : -2 to 2; subtracted once, and per occurrence, from the
        logits of tokens seen in the output
    n : samples per prompt, 1 to 128
    seed : any 64-bit integer, or None; signed values are folded to 0 <= seed < 2**64
    stop : at most 16 strings that end the text and are left out of it
    stop_token_ids : ids that end the sequence
    min_tokens, max_tokens : bounds of the number of new tokens, 0 <= min_tokens <= max_tokens,
        1 <= max_tokens
    logprobs : None for no log-probabilities; 0 to 20 for those of the chosen tokens and of that
        many most probable tokens
    ignore_eos : generate past end-of-sequence tokens

    Raises
    ------
    ValueError
        For a value of the wrong type or out of range, in one line naming the field.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    n: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    max_tokens: int = 16
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        # Check numbers and bring them to plain Python types
        self._number("temperature", 0.0, 1000.0)
        self._number("top_p", 0.0, 1.0, above=True)
        self._number("min_p", 0.0, 1.0)
        self._number("repetition_penalty", 0.0, 1000.0, above=True)
        self._number("presence_penalty", -2.0, 2.0)
        self._number("frequency_penalty", -2.0, 2.0)

        # Check counts; min_tokens may not exceed max_tokens
        self._integer("top_k", -1, 2**31 - 1)
        self._integer("n", 1, MAX_SAMPLES)
        self._integer("max_tokens", 1, 2**31 - 1)
        self._integer("min_tokens", 0, self.max_tokens)
        if self.seed is not None:
            self._integer("seed", -(2**63), 2**64 - 1)
        if self.logprobs is not None:
            self._integer("logprobs", 0, MAX_LOGPROBS)
        if not isinstance(self.ignore_eos, bool | np.bool_):
            raise _refusal("ignore_eos", self.ignore_eos, "true or false")

        # Check what ends a sequence
        self._set("stop", _stop_strings(self.stop))
        self._set("stop_token_ids", _stop_ids(self.stop_token_ids))

        # Fold the values that mean the same
        self._set("ignore_eos", bool(self.ignore_eos))
        self._set("top_k", max(self.top_k, 0))
        if self.temperature < GREEDY_BELOW:
            self._set("temperature", 0.0)
        if self.seed is not None:
            self._set("seed", self.seed % 2**64)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _number(self, name: str, low: float, high: float, above: bool = False) -> None:
        value = getattr(self, name)
        need = f"a number from {low:g} to {high:g}" + (f", not {low:g} itself" if above else "")
        if isinstance(value, bool | np.bool_) or not isinstance(value, _REAL):
            raise _refusal(name, value, need)
        if not (low <= value <= high) or (above and value <= low):
            raise _refusal(name, value, need)
        self._set(name, float(value))

    def _integer(self, name: str, low: int, high: int) -> None:
        value = integer(getattr(self, name))
        if value is None or not low <= value <= high:
            raise _refusal(name, getattr(self, name), f"a whole number from {low} to {high}")
        self._set(name, value)


def _refusal(name: str, value: Any, need: str) -> ValueError:
    remedy = "correct the field"
    if isinstance(value, float) and not math.isfinite(value):
        remedy = "give a finite number"
    return ValueError(f"sampling: got {name} = {shown(value)}, need {need}; {remedy}")


def _stop_strings(value: Any) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else value
    need = f"a string or at most {MAX_STOPS} strings, of 1 to {MAX_STOP_CHARACTERS} characters each"
    if not isinstance(stops, list | tuple) or len(stops) > MAX_STOPS:
        raise _refusal("stop", value, need)
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_CHARACTERS:
            raise _refusal("stop", value, need)
    return tuple(stops)


def _stop_ids(value: Any) -> tuple[int, ...]:
    need = f"a list of at most {MAX_STOP_IDS} token ids"
    if not isinstance(value, list | tuple) or len(value) > MAX_STOP_IDS:
        raise _refusal("stop_token_ids", value, need)
    ids = [integer(token) for token in value]
    known = tuple(token for token in ids if token is not None and 0 <= token < 2**31)
    if len(known) < len(ids):
        raise _refusal("stop_token_ids", value, need)
    return known
