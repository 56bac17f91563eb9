"""One step of the engine: the tokens to compute now, of all sequences, laid end to end."""

from dataclasses import dataclass

import numpy as np


@dataclass
class Step:
    """Tokens of one step, equal on every rank of a tensor-parallel group.

    Attributes
    ----------
    token_ids : (T,) int32
    positions : (T,) int32, place of each token in its sequence
    bounds : (B+1,) int64, sequence b owns the tokens bounds[b]:bounds[b+1]
    tables : (B, pages of the longest) int32, pages of each sequence's cache in order
    lengths : (B,) int64, tokens of each sequence in the cache when this step's are in it
    slots : (T,) int64, place of each token's key and value in the cache: page · page size + offset
    rows : (R,) int64, tokens whose hidden state is wanted
    length_classes : (T,) int64 or None, for ropes that depend on the length of the text
    """

    token_ids: np.ndarray
    positions: np.ndarray
    bounds: np.ndarray
    tables: np.ndarray
    lengths: np.ndarray
    slots: np.ndarray
    rows: np.ndarray
    length_classes: np.ndarray | None = None

    @property
    def n_tokens(self):
        """T."""
        return len(self.token_ids)

    @property
    def n_sequences(self):
        """B."""
        return len(self.lengths)
