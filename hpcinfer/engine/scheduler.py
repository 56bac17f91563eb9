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

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from hpcinfer import partition
from hpcinfer.engine.pages import digests, pages_for
from hpcinfer.model.cache import PAGE
from hpcinfer.model.step import Books, Step

# Tokens per rank of cp up to which decoding divides columns: reading weights takes longer than
# computing with them up to about this many.
COLUMNS_TOKENS = 32

# Tokens of a micro-batch at least, as far as there are as many.
_LEAST_TOKENS = 32


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
    all_rows : True if every token's hidden state is wanted, not only the last one's
    whole : True if with `all_rows` the last token is computed too, though it predicts nothing
    digests : hashes of the full pages of the text, as far as they were needed
    siblings : all samples of the request
    stream : text of the generated tokens, watched for stop strings
    stops : token ids that end it
    history : tokens seen so far, kept where penalties need them
    logprobs, top_logprobs : of the generated (or scored) tokens
    known : with `all_rows`, leading tokens whose hidden states are not wanted again
    finish_reason : "stop" or "length" when the sequence has ended, else None
    under_way : steps under way that compute tokens of it
    number : sequences that were put in the queue before it
    """

    request: object
    sample: int
    tokens: list
    n_prompt: int
    all_rows: bool = False
    whole: bool = False
    computed: int = 0
    pages: list = field(default_factory=list)
    digests: list = field(default_factory=list)
    siblings: list = field(default_factory=list)
    stream: object = None
    stops: frozenset = frozenset()
    history: object = None
    logprobs: list = field(default_factory=list)
    top_logprobs: list = field(default_factory=list)
    known: int = 0
    finish_reason: str | None = None
    under_way: int = 0
    number: int = 0

    @property
    def target(self):
        """Tokens to compute before the next is chosen; a scored text's last predicts nothing."""
        return len(self.tokens) - (self.all_rows and not self.whole)

    @property
    def n_new(self):
        """Tokens generated so far."""
        return len(self.tokens) - self.n_prompt


@dataclass
class Limits:
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
    pages : Pages
    limits : Limits
    rope : Rope or None, asked whether a token's key depends on the length of its text

    Attributes
    ----------
    room : tokens that the next step may have, within the limits; None for as many as these allow
    """

    def __init__(self, pages, limits, rope=None):
        self.pages, self.limits, self.room = pages, limits, None
        self.rope = rope if rope is not None and rope.depends_on_length else None
        self.waiting, self.running = deque(), []
        self.preemptions = self.reused_tokens = self.tokens_under_way = self._added = 0

    def add(self, sequence):
        """Put a sequence at the end of the queue."""
        sequence.number, self._added = self._added, self._added + 1
        self.waiting.append(sequence)

    def take_up(self, sequence, computed, pages):
        """Let a sequence run whose first `computed` tokens are in `pages`, which it holds."""
        sequence.number, self._added = self._added, self._added + 1
        sequence.computed, sequence.pages = computed, pages
        self.running.append(sequence)
        for page, digest in zip(pages, self._digests(sequence, computed), strict=False):
            self.pages.name(page, digest)

    def next_step(self):
        """Sequences of the next step with the number of tokens to compute of each.

        Returns
        -------
        list of (Sequence, n), empty when nothing waits or runs
        """
        plan, preempted = [], False
        most, room = self._share()

        # Go on with what runs; the youngest gives way where pages run out.
        position = 0
        while position < len(self.running) and room and len(plan) < most:
            sequence = self.running[position]
            n = min(room, sequence.target - sequence.computed)
            if n == 0:  # its next token is under way
                position += 1
                continue
            if not self.pages.fit(self._owners(sequence, sequence.computed + n)):
                if self.running[-1].under_way:
                    return self._in_order(plan)
                self._preempt(self.running.pop())
                preempted = True
                continue
            self._plan(plan, sequence, n)
            room -= n
            position += 1

        # Admit what waits, while there are pages for its whole text.
        while self.waiting and room and not preempted and len(self.running) < self.limits.sequences:
            sequence = self.waiting[0]
            if len(plan) >= most:
                break
            sequence.pages = self._found(sequence)
            if not self.pages.fit(self._owners(sequence, sequence.target), sequence.pages):
                sequence.pages = []
                break
            self.waiting.popleft()
            self.running.append(sequence)
            self.pages.hold(sequence.pages)
            sequence.computed = len(sequence.pages) * PAGE
            self.reused_tokens += sequence.computed
            n = min(room, sequence.target - sequence.computed)
            self._plan(plan, sequence, n)
            room -= n
        return self._in_order(plan)

    @property
    def held(self):
        """Sequences that run or wait."""
        return len(self.running) + len(self.waiting)

    def _share(self):
        """Sequences and tokens of the next step at most."""
        limits, room = self.limits, self.limits.tokens
        if self.room is not None:
            room = min(room, self.room)
        if limits.parts == limits.chunks == 1:
            return limits.sequences, room
        most = -(-min(self.held, limits.sequences) // limits.parts)
        pending = sum(s.target - s.computed for s in (*self.running, *self.waiting))
        share = -(-(pending + self.tokens_under_way) // limits.chunks)
        return most, min(room, max(_LEAST_TOKENS, share))

    @staticmethod
    def _in_order(plan):
        """Sequences with one token, as in decoding, stand first."""
        return sorted(plan, key=lambda entry: entry[1] > 1)

    def launch(self, plan):
        """Count a planned step as under way."""
        for sequence, n in plan:
            sequence.under_way += 1
            self.tokens_under_way += n

    def land(self, plan):
        """Count a step as over."""
        for sequence, n in plan:
            sequence.under_way -= 1
            self.tokens_under_way -= n

    def finish(self, sequence):
        """Take a finished sequence out and release its pages."""
        self.running.remove(sequence)
        self.pages.release(sequence.pages)
        sequence.pages = []

    def _plan(self, plan, sequence, n):
        """Enter n tokens of a sequence in the step, with the pages that they need."""
        end = sequence.computed + n
        sequence.pages += self.pages.take(self._owners(sequence, end))
        plan.append((sequence, n))
        if end // PAGE == sequence.computed // PAGE:
            return

        # The step writes its keys before any is read, so its full pages can be shared at once.
        known = self._digests(sequence, end)
        for page in range(sequence.computed // PAGE, len(known)):
            self.pages.name(sequence.pages[page], known[page])

    def _owners(self, sequence, end):
        """Ranks that own the pages which a sequence still lacks for its first `end` tokens.

        Pages are dealt in turn, from the rank of the first page on.
        """
        have, ranks = len(sequence.pages), self.pages.ranks
        if pages_for(end) <= have:
            return []
        first = self.pages.owner(sequence.pages[0]) if have else self.pages.emptiest
        return [(first + page) % ranks for page in range(have, pages_for(end))]

    def _found(self, sequence):
        """Cached pages of a waiting sequence's beginning; its last token is always computed."""
        return self.pages.find(self._digests(sequence, sequence.target - 1))

    def _digests(self, sequence, end):
        """Hashes of the full pages in the first `end` tokens; none where pages are not shared."""
        if sequence.all_rows:
            return []
        if self.rope is not None:
            end = min(end, sequence.n_prompt)
        if len(sequence.digests) < end // PAGE:
            seed = b""
            if self.rope is not None:
                seed = str(self.rope.length_class(sequence.n_prompt)).encode()
            sequence.digests = digests(sequence.tokens[:end], sequence.digests, seed)
        return sequence.digests[: end // PAGE]

    def _preempt(self, sequence):
        """Send a running sequence back to the head of the queue, without its pages."""
        self.pages.release(sequence.pages)
        sequence.pages, sequence.computed = [], 0
        sequence.known = len(sequence.logprobs) if sequence.all_rows else 0
        self.waiting.appendleft(sequence)
        self.preemptions += 1


def build_step(plan, pages, kv_rank=0, cp=1, by_columns=False, rope=None, tp=1):
    """Arrays of one step, from the scheduler's plan, whose tokens count as computed afterwards.

    Parameters
    ----------
    plan : list of (Sequence, n), those with one token first; empty for a step that this replica
        takes for the others' sake
    pages : Pages
    kv_rank : this rank's pool among those of `pages`
    cp : number of parts in which the tokens are cut; part i computes the tokens of the pools i,
        i + cp, ...
    by_columns : True if steps of few tokens, one of a sequence, divide columns instead of tokens
    rope : Rope or None
    tp : ranks over which sequence parallelism cuts the tokens of a part; 1 without it

    Returns
    -------
    Step; its `rows` are the last token of every sequence that is then complete, or all tokens of a
    sequence with `all_rows`
    """
    counts = np.array([n for _, n in plan], np.int64)
    bounds = np.concatenate([[0], np.cumsum(counts)])
    lengths = np.array([sequence.computed + n for sequence, n in plan], np.int64)
    positions = np.arange(bounds[-1]) - np.repeat(bounds[:-1] - (lengths - counts), counts)
    owner = np.repeat(np.arange(len(plan)), counts)

    # Find the page of every token, and its owner, in one table padded with page 0.
    table = np.zeros((len(plan), max((len(s.pages) for s, _ in plan), default=0)), np.int64)
    for b, (sequence, _) in enumerate(plan):
        table[b, : len(sequence.pages)] = sequence.pages
    pool, place = np.divmod(table, pages.n)
    token_pool = pool[owner, positions // PAGE]
    slots = place[owner, positions // PAGE] * PAGE + positions % PAGE

    token_ids, rows = [], []
    for b, (sequence, n) in enumerate(plan):
        token_ids += sequence.tokens[sequence.computed : sequence.computed + n]
        if sequence.all_rows:
            known = min(max(sequence.known - sequence.computed, 0), n)
            rows += range(bounds[b] + known, bounds[b + 1])
        elif lengths[b] == sequence.target:
            rows.append(bounds[b + 1] - 1)
        sequence.computed += n
    columns = by_columns and len(plan) == bounds[-1] <= COLUMNS_TOKENS * cp
    mine = np.arange(bounds[-1]) if columns else np.flatnonzero(token_pool % cp == kv_rank % cp)
    stored = np.flatnonzero(token_pool[mine] == kv_rank)
    part = token_pool % cp
    return Step(
        token_ids=np.array(token_ids, np.int32),
        tokens=np.stack([owner, positions], axis=1).astype(np.int32),
        lengths=lengths,
        numbers=np.array([sequence.number for sequence, _ in plan], np.int64),
        complete=np.array([sequence.computed == sequence.target for sequence, _ in plan], bool),
        n_single=int(np.sum(counts == 1)),
        rows=np.array(rows, np.int64),
        length_classes=_length_classes(plan, owner, positions, rope),
        columns=columns,
        parts=cp,
        part=part,
        home=np.full_like(part, -1) if columns else _homes(part, cp, tp),
        mine=mine,
        stored=stored,
        slots=slots[mine[stored]],
        books=Books(place, pool[:, 0] if plan else lengths, kv_rank, pages.ranks, lengths),
    )


def _homes(part, cp, tp):
    """Rank of tp that keeps each token between the halves of a layer; -1 if all do."""
    home = np.full_like(part, -1)
    for p in range(cp):
        tokens = np.flatnonzero(part == p)

        # With fewer tokens than ranks it costs less to let every rank keep them all.
        if tp > 1 and len(tokens) >= tp:
            for rank, (start, stop) in enumerate(partition.block(len(tokens), tp)):
                home[tokens[start:stop]] = rank
    return home


def _length_classes(plan, owner, positions, rope):
    """Class of the text's length for every token: the prompt's, then its own position + 1."""
    if rope is None or not rope.depends_on_length:
        return None
    prompts = np.array([sequence.n_prompt for sequence, _ in plan])
    lengths = np.maximum(prompts[owner], positions + 1)
    classes, which = np.unique(lengths, return_inverse=True)
    return np.array([rope.length_class(int(n)) for n in classes])[which]
