"""What a run is asked for and what it answers: sampling, requests, choices, scores.

Plain dataclasses with no behaviour but their own validation; picklable, so they cross ranks as they
are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hpcinfer.requests.sampling import Sampling


@dataclass(frozen=True)
class Request:
    """One prompt with its sampling, as parsed from one entry of the input.

    Attributes
    ----------
    index : place in the input, from 0
    line : line of the input file, from 1; index + 1 for the Python interface
    custom_id : as the input gave it; "" if it gave none
    kind : "completion" or "chat"
    token_ids : the prompt, special tokens included
    sampling : how its tokens are chosen
    key : of the request's random stream, 64 bits, independent of batch, order and layout
    progress : what a run that was stopped had of it: for every sample its new tokens, their
        log-probabilities, and the likeliest tokens at each place
    """

    index: int
    line: int
    custom_id: str
    kind: str
    token_ids: tuple[int, ...]
    sampling: Sampling
    key: int
    progress: list[Any] = field(default_factory=list, compare=False, repr=False)


@dataclass(frozen=True)
class BadRequest:
    """An entry of the input that cannot run, with the reason in one line.

    `custom_id` is "" if the input gave none or it could not be read.
    """

    index: int
    line: int
    custom_id: str
    message: str


@dataclass
class Choice:
    """One sample of a request.

    Attributes
    ----------
    index : number of the sample, from 0
    token_ids : the new tokens, the one that ended the sequence included
    text : their text, without special tokens and without the stop string
    finish_reason : "stop" or "length"
    logprobs : natural-log probability of each new token
    top_logprobs : for each new token the most probable ids with their log-probabilities, largest
        first
    """

    index: int
    token_ids: list[int]
    text: str
    finish_reason: str
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None


@dataclass
class Result:
    """The samples of a request, in order of their index; `prompt_tokens` counts the prompt."""

    request: Request
    choices: list[Choice]
    prompt_tokens: int


@dataclass(eq=False)
class Score:
    """Log-probabilities of a given text.

    Attributes
    ----------
    request : what was asked
    logprobs : (T,) float32, natural-log probability of each token given those before it; the first
        is NaN, as nothing stands before it
    sum_logprob : sum of all but the first
    perplexity : exp(-sum_logprob / (T - 1)); NaN for T = 1
    """

    request: Request
    logprobs: np.ndarray
    sum_logprob: float
    perplexity: float


@dataclass(eq=False)
class Extracted:
    """Where the activations of a given text are.

    Attributes
    ----------
    request : what was asked
    generation, replica : run and replica of it that computed them
    first_row, n_rows : its rows among those of the replica
    """

    request: Request
    generation: int
    replica: int
    first_row: int
    n_rows: int
