"""One step of the engine: the tokens to compute now, of all sequences, laid end to end."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hpcinfer.model.block_table import BlockTable


@dataclass
class TokenRun:
    """A run of a step's tokens that one strategy serves.

    Attributes
    ----------
    tokens : (n, 2) int32, sequence and position of every token
    own : slice of the step's `mine`
    chosen : (n/P,) int64, which of `tokens` this rank computes
    counts : tokens that each part computes
    order : (n,) int64, where each token stands when the parts lie end to end
    """

    tokens: np.ndarray
    own: slice
    chosen: np.ndarray
    counts: list
    order: np.ndarray


@dataclass
class Step:
    """Tokens of one step; all but what is marked "own" is equal on every rank of a replica.

    Attributes
    ----------
    token_ids : (T,) int32
    tokens : (T, 2) int32, sequence and position of every token, sequences ascending
    lengths : (B,) int64, tokens of each sequence in the cache when this step's are in it
    numbers : (B,) int64, ascending in the order in which the sequences came
    complete : (B,) bool, sequences that have all their tokens then in the cache
    n_single : sequences with one token in this step; they stand first
    wanted : (R,) int64, tokens whose hidden state is wanted
    length_classes : (T,) int64 or None, for ropes that depend on the length of the text
    columns : True if every rank of cp computes all tokens, with a part of the columns
    parts : ranks of cp
    part : (T,) int64, which part of the context-parallel cut computes each token, unless `columns`
    home : (T,) int64, which rank of tp keeps each token between the halves of a layer; -1 if all do
    mine : (T/P,) int64, own: the tokens that this rank computes
    stored : (n,) int64, own: which of `mine` have their key and value in this rank's cache
    slot_mapping : (n,) int64, own: place of each of `stored` in the cache: page · PAGE + offset
    block_table : BlockTable, where the cached keys are
    """

    token_ids: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray
    numbers: np.ndarray
    complete: np.ndarray
    n_single: int
    wanted: np.ndarray
    length_classes: np.ndarray | None
    columns: bool
    parts: int
    part: np.ndarray
    home: np.ndarray
    mine: np.ndarray
    stored: np.ndarray
    slot_mapping: np.ndarray
    block_table: BlockTable

    @property
    def n_tokens(self) -> int:
        """T."""
        return len(self.token_ids)

    @property
    def all_wanted(self) -> bool:
        """True if the hidden state of every token is wanted."""
        return len(self.wanted) == self.n_tokens

    @property
    def positions(self) -> np.ndarray:
        """(T,) place of every token in its sequence."""
        return self.tokens[:, 1]

    def counts_at_home(self, tp: int) -> list[int] | None:
        """How many of `mine` each rank of tp keeps between the halves; None if all keep all."""
        home = self.home[self.mine]
        if not len(home) or home[0] < 0:
            return None
        return np.bincount(home, minlength=tp).tolist()

    @cached_property
    def decoding(self) -> TokenRun | None:
        """Tokens of the sequences with one token in this step; None if there is none."""
        return self._run(0, self.n_single)

    @cached_property
    def prefilling(self) -> TokenRun | None:
        """Tokens of the sequences with several tokens in this step; None if there is none."""
        return self._run(self.n_single, self.n_tokens)

    def _run(self, start, stop):
        if start == stop:
            return None
        own = slice(*np.searchsorted(self.mine, (start, stop)))
        counts = np.bincount(self.part[start:stop], minlength=self.parts).tolist()
        order = part_order(self.part[start:stop])
        return TokenRun(self.tokens[start:stop], own, self.mine[own] - start, counts, order)


def part_order(part: np.ndarray) -> np.ndarray:
    """Where each item stands when the items of part 0 come first, then those of part 1, ..."""
    order = np.empty(len(part), np.int64)
    order[np.argsort(part, kind="stable")] = np.arange(len(part))
    return order
