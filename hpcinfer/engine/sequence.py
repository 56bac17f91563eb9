"""A request under way: its tokens, its pages, and how far it is computed."""

from __future__ import annotations

from dataclasses import dataclass, field

from hpcinfer.ops.sampling_batch import History
from hpcinfer.requests.request import Request
from hpcinfer.text.stream import TextStream


@dataclass(eq=False)
class Sequence:
    """Tokens of one sample of a request, and how far they are computed.

    Attributes
    ----------
    request : Request
    sample : number of the sample within the request
    tokens : prompt, then the tokens generated so far
    n_prompt : tokens of the prompt
    target : tokens that must be in the cache before the next one can be chosen
    computed : tokens that are in the cache
    pages : pages that hold them
    wants_all_hidden : True if every token's hidden state is wanted, not only the last one's
    computes_last : True if with `wants_all_hidden` the last token is computed too, though it
        predicts nothing
    block_hashes : hashes of the full pages of the text, as far as they were needed
    siblings : all samples of the request
    stream : text of the generated tokens, watched for stop strings
    stops : token ids that end it
    history : tokens seen so far, kept where penalties need them
    logprobs, top_logprobs : of the generated (or scored) tokens
    n_known : with `wants_all_hidden`, leading tokens whose hidden states are not wanted again
    finish_reason : "stop" or "length" when the sequence has ended, else None
    under_way : steps under way that compute tokens of it
    number : sequences that were put in the queue before it
    """

    request: Request
    sample: int
    tokens: list[int]
    n_prompt: int
    wants_all_hidden: bool = False
    computes_last: bool = False
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    siblings: list[Sequence] = field(default_factory=list)
    stream: TextStream | None = None
    stops: frozenset[int] = frozenset()
    history: History | None = None
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list = field(default_factory=list)
    n_known: int = 0
    finish_reason: str | None = None
    under_way: int = 0
    number: int = 0

    @property
    def target(self) -> int:
        """Tokens to compute before the next is chosen; a scored text's last predicts nothing."""
        return len(self.tokens) - (self.wants_all_hidden and not self.computes_last)

    @property
    def n_new(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.n_prompt
