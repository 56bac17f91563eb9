"""A scheduler that is run without a model."""

from itertools import accumulate
from types import SimpleNamespace

from hpcinfer.engine.block_manager import BlockManager, pages_for
from hpcinfer.engine.build_step import build_step
from hpcinfer.engine.scheduler import Scheduler, StepLimits
from hpcinfer.engine.sequence import Sequence
from hpcinfer.model.cache import PAGE


def sequence(tokens, new=0, score=False):
    """A sequence that generates `new` tokens after its prompt, or is scored."""
    return Sequence(SimpleNamespace(new=new), 0, list(tokens), len(tokens), wants_all_hidden=score)


def hashes(tokens):
    """Hash of the text up to every token."""
    return list(accumulate(tokens, lambda before, token: hash((before, token)), initial=0))[1:]


class Run:
    """A scheduler with a model that only writes down what it is told to compute.

    Parameters
    ----------
    pages : of each of `pools` pools
    cp : parts in which the tokens are cut

    Attributes
    ----------
    text : dict (pool, slot) -> hash of the text up to the token there, as a model would have it
    computed : tokens computed in all
    steps : list of (number of sequences, number of tokens)
    """

    def __init__(self, pages, tokens=2048, sequences=256, rope=None, pools=1, cp=1, columns=False):
        self.pages = BlockManager(pages, pools)
        self.scheduler = Scheduler(self.pages, StepLimits(tokens, sequences), rope)
        self.options = {"cp": cp, "by_columns": columns, "rope": rope}
        self.text, self.computed, self.steps, self.finished = {}, 0, [], []

    def step(self):
        """One step, checked in every way; False when there is nothing to do."""
        plan = self.scheduler.next_step()
        if not plan:
            assert not self.scheduler.waiting and not self.scheduler.running
            return False
        before = [(s, s.computed, n) for s, n in plan]
        self.check_plan(before)
        self.compute(before, [self.build(before, pool) for pool in range(self.pages.ranks)])
        for s, _ in plan:
            self.advance(s)
        return True

    def build(self, plan, pool):
        """The step as the rank with this pool builds it; each counts the tokens as computed."""
        for s, start, _ in plan:
            s.computed = start
        return build_step([(s, n) for s, _, n in plan], self.pages, pool, **self.options)

    def check_plan(self, plan):
        """Within the limits, single tokens first, and no page is written that another has."""
        limits, held = self.scheduler.limits, {}
        counts = [n for _, _, n in plan]
        assert len({id(s) for s, _, _ in plan}) == len(plan)
        assert 0 < sum(counts) <= limits.tokens
        assert [n == 1 for n in counts] == sorted([n == 1 for n in counts], reverse=True)
        assert len(self.scheduler.running) <= limits.sequences
        for s in self.scheduler.running:
            owners = [self.pages.owner(page) for page in s.pages]
            assert owners == [(owners[0] + i) % self.pages.ranks for i in range(len(owners))]
            assert len(s.pages) == len(set(s.pages))
            for page in s.pages:
                held.setdefault(page, []).append(s)
        assert self.pages.held == len(held) <= self.pages.total
        for s, start, n in plan:
            assert n > 0 and start + n <= s.target
            assert len(s.pages) == pages_for(start + n)
            for page in s.pages[start // PAGE : pages_for(start + n)]:
                assert [x for x, at, _ in plan if page in x.pages[at // PAGE :]] == [s]

    def compute(self, plan, steps):
        """Write the step's tokens, then check that every sequence finds its whole text."""
        first = steps[0]
        self.computed += first.n_tokens
        self.steps.append((len(plan), first.n_tokens))
        tokens = [(b, at) for b, (_, start, n) in enumerate(plan) for at in range(start, start + n)]
        texts = [hashes(s.tokens) for s, _, _ in plan]
        assert first.tokens.tolist() == [list(pair) for pair in tokens]
        assert first.token_ids.tolist() == [plan[b][0].tokens[at] for b, at in tokens]
        assert first.lengths.tolist() == [start + n for _, start, n in plan]
        assert all(s.computed == start + n for s, start, n in plan)
        wanted = [plan[b][0].wants_all_hidden or at + 1 == plan[b][0].target for b, at in tokens]
        assert first.wanted.tolist() == [t for t, want in enumerate(wanted) if want]

        # Every part computes its tokens; every token's key is stored once
        cp = self.options["cp"]
        parts = sorted(t for step in steps[:cp] for t in step.mine.tolist())
        everyone = list(range(len(tokens)))
        assert parts == (sorted(everyone * cp) if first.columns else everyone)
        stored = []
        for pool, step in enumerate(steps):
            for t, slot in zip(
                step.mine[step.stored].tolist(), step.slot_mapping.tolist(), strict=True
            ):
                b, at = tokens[t]
                self.text[pool, slot] = texts[b][at]
                stored.append(t)
        assert sorted(stored) == everyone

        # All ranks together find the whole text of every sequence; long runs look now and then
        if len(self.steps) > 50 and len(self.steps) % 5:
            return
        for b, (_, start, n) in enumerate(plan):
            found = {}
            for pool, step in enumerate(steps):
                for place, number in zip(*step.block_table.pages(b), strict=True):
                    for at in range(number * PAGE, min((number + 1) * PAGE, start + n)):
                        found[at] = self.text[pool, place * PAGE + at % PAGE]
            assert found == dict(enumerate(texts[b][: start + n]))

    def advance(self, s):
        """Generate a token where the text is complete; end what has all its tokens."""
        if s.computed < s.target:
            return
        if s.n_new < s.request.new:
            s.tokens.append(1000 + s.n_new)
        if s.n_new == s.request.new:
            self.scheduler.finish(s)
            self.finished.append(s)

    def all(self, sequences):
        """Run these sequences to their end; nothing may be held afterwards."""
        for s in sequences:
            self.scheduler.add(s)
        while self.step():
            assert len(self.steps) < 100_000
        assert self.pages.held == 0
        assert all(s.pages == [] for s in sequences)
        assert {id(s) for s in self.finished} == {id(s) for s in sequences}
        return self
