"""Which tokens of which sequences are computed in the next step: continuous batching.

Running sequences go first, oldest first, then waiting ones as long as there are pages and room in
the step. A prompt longer than the step's room is computed in chunks. Where pages run out, the
youngest sequence gives up its pages and waits; it is computed again later, from pages that are
still there. Every rank of a replica comes to the same decision from the same requests, without a
message.

Several steps may be under way at a time: the micro-batches of a pipeline, or of two sides that take
turns. A step then takes its share of the sequences, and leaves those out whose next token is still
to be chosen.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from hpcinfer.engine.block_manager import BlockManager, block_hashes, pages_for
from hpcinfer.engine.sequence import Sequence
from hpcinfer.engine.task import Plan
from hpcinfer.model.cache import PAGE
from hpcinfer.ops.rope import Rope

# Tokens of a micro-batch at least, as far as there are as many.
_LEAST_TOKENS = 32


@dataclass
class StepLimits:
    """Bounds of one step.

    Attributes
    ----------
    tokens : tokens computed in a step at most
    sequences : sequences that run at a time at most
    parts : steps that the running sequences are spread over, so that as many can be under way
    chunks : steps that the prompt tokens at hand are spread over
    """

    tokens: int = 2048
    sequences: int = 256
    parts: int = 1
    chunks: int = 1


class Scheduler:
    """The queue of sequences before a cache.

    Parameters
    ----------
    pages : BlockManager
    limits : StepLimits
    rope : Rope or None, asked whether a token's key depends on the length of its text

    Attributes
    ----------
    token_budget : tokens that the next step may have, within the limits; None for as many as they
        allow
    """

    def __init__(self, pages: BlockManager, limits: StepLimits, rope: Rope | None = None):
        self.pages, self.limits = pages, limits
        self.token_budget: int | None = None
        self.rope = rope if rope is not None and rope.depends_on_length else None
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = self.reused_tokens = self.tokens_under_way = self._added = 0

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the queue."""
        sequence.number, self._added = self._added, self._added + 1
        self.waiting.append(sequence)

    def resume(self, sequence: Sequence, computed: int, pages: list[int]) -> None:
        """Let a sequence run whose first `computed` tokens are in `pages`, which it holds."""
        sequence.number, self._added = self._added, self._added + 1
        sequence.computed, sequence.pages = computed, pages
        self.running.append(sequence)
        for page, block_hash in zip(pages, self._block_hashes(sequence, computed), strict=False):
            self.pages.register(page, block_hash)

    def next_step(self) -> Plan:
        """Sequences of the next step with the number of tokens to compute of each.

        Returns
        -------
        (sequence, n) of each, those with one token first, as in decoding; empty when nothing waits
        or runs
        """
        plan: Plan = []
        most, budget = self._share()
        left = self._go_on(plan, most, budget)
        self._admit(plan, most, left)
        return sorted(plan, key=lambda entry: entry[1] > 1)

    @property
    def held(self) -> int:
        """Sequences that run or wait."""
        return len(self.running) + len(self.waiting)

    def _share(self) -> tuple[int, int]:
        """Sequences and tokens of the next step at most."""
        # Take all that the limits allow, unless several steps are to be under way.
        limits, budget = self.limits, self.limits.tokens
        if self.token_budget is not None:
            budget = min(budget, self.token_budget)
        if limits.parts == limits.chunks == 1:
            return limits.sequences, budget

        # Spread what runs over them, and the tokens that are still to be computed.
        most = -(-min(self.held, limits.sequences) // limits.parts)
        pending = sum(s.target - s.computed for s in (*self.running, *self.waiting))
        share = -(-(pending + self.tokens_under_way) // limits.chunks)
        return most, min(budget, max(_LEAST_TOKENS, share))

    def _go_on(self, plan: Plan, most: int, budget: int) -> int:
        """Go on with what runs, oldest first; the youngest gives way where pages run out.

        Returns
        -------
        tokens that the step has left for what waits; none where pages ran out
        """
        position, enough = 0, True
        while position < len(self.running) and budget and len(plan) < most:
            sequence = self.running[position]
            n = min(budget, sequence.target - sequence.computed)
            if n == 0:  # its next token is under way
                position += 1
                continue

            # Take the pages of the youngest, unless a step under way writes to them.
            if not self.pages.can_allocate(self._owners(sequence, sequence.computed + n)):
                if self.running[-1].under_way:
                    return 0
                self._preempt(self.running.pop())
                enough = False
                continue
            self._plan(plan, sequence, n)
            budget -= n
            position += 1
        return budget if enough else 0

    def _admit(self, plan: Plan, most: int, budget: int) -> None:
        """Let what waits run, as long as there are pages for its whole text."""
        while self.waiting and budget and len(self.running) < self.limits.sequences:
            # Find the pages that hold the beginning of its text.
            sequence = self.waiting[0]
            if len(plan) >= most:
                break
            sequence.pages = self._found(sequence)
            if not self.pages.can_allocate(self._owners(sequence, sequence.target), sequence.pages):
                sequence.pages = []
                break

            # Hold them, and compute the rest.
            self.waiting.popleft()
            self.running.append(sequence)
            self.pages.acquire(sequence.pages)
            sequence.computed = len(sequence.pages) * PAGE
            self.reused_tokens += sequence.computed
            n = min(budget, sequence.target - sequence.computed)
            self._plan(plan, sequence, n)
            budget -= n

    def launch(self, plan: Plan) -> None:
        """Count a planned step as under way."""
        for sequence, n in plan:
            sequence.under_way += 1
            self.tokens_under_way += n

    def complete(self, plan: Plan) -> None:
        """Count a step as over."""
        for sequence, n in plan:
            sequence.under_way -= 1
            self.tokens_under_way -= n

    def finish(self, sequence: Sequence) -> None:
        """Take a finished sequence out and release its pages."""
        self.running.remove(sequence)
        self.pages.free(sequence.pages)
        sequence.pages = []

    def _plan(self, plan: Plan, sequence: Sequence, n: int) -> None:
        """Enter n tokens of a sequence in the step, with the pages that they need."""
        end = sequence.computed + n
        sequence.pages += self.pages.allocate(self._owners(sequence, end))
        plan.append((sequence, n))
        if end // PAGE == sequence.computed // PAGE:
            return

        # The step writes its keys before any is read, so its full pages can be shared at once.
        known = self._block_hashes(sequence, end)
        for page in range(sequence.computed // PAGE, len(known)):
            self.pages.register(sequence.pages[page], known[page])

    def _owners(self, sequence: Sequence, end: int) -> list[int]:
        """Ranks that own the pages which a sequence still lacks for its first `end` tokens.

        Pages are dealt in turn, from the rank of the first page on.
        """
        have, ranks = len(sequence.pages), self.pages.ranks
        if pages_for(end) <= have:
            return []
        first = self.pages.owner(sequence.pages[0]) if have else self.pages.emptiest
        return [(first + page) % ranks for page in range(have, pages_for(end))]

    def _found(self, sequence: Sequence) -> list[int]:
        """Cached pages of a waiting sequence's beginning; its last token is always computed."""
        return self.pages.match_prefix(self._block_hashes(sequence, sequence.target - 1))

    def _block_hashes(self, sequence: Sequence, end: int) -> list[bytes]:
        """Hashes of the full pages in the first `end` tokens; none where pages are not shared."""
        if sequence.wants_all_hidden:
            return []
        if self.rope is not None:
            end = min(end, sequence.n_prompt)

        # Compute those that were not needed before.
        if len(sequence.block_hashes) < end // PAGE:
            seed = b""
            if self.rope is not None:
                seed = str(self.rope.length_class(sequence.n_prompt)).encode()
            sequence.block_hashes = block_hashes(sequence.tokens[:end], sequence.block_hashes, seed)
        return sequence.block_hashes[: end // PAGE]

    def _preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to the head of the queue, without its pages."""
        self.pages.free(sequence.pages)
        sequence.pages, sequence.computed = [], 0
        sequence.n_known = len(sequence.logprobs) if sequence.wants_all_hidden else 0
        self.waiting.appendleft(sequence)
        self.preemptions += 1
