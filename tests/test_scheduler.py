"""What is computed when: every token once, within the limits, whatever the cache can hold."""

import random
from itertools import accumulate
from types import SimpleNamespace

import pytest

from hpcinfer.engine.block_manager import BlockManager, pages_for
from hpcinfer.engine.build_step import build_step
from hpcinfer.engine.scheduler import Scheduler, StepLimits
from hpcinfer.engine.sequence import Sequence
from hpcinfer.model.cache import PAGE
from hpcinfer.ops.rope import Rope

pytestmark = pytest.mark.single


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


def test_one_sequence():
    """The last token that is generated need not be computed."""
    run = Run(10).all([sequence(range(5), new=4)])
    assert run.steps == [(1, 5), (1, 1), (1, 1), (1, 1)]


def test_a_scored_text_computes_all_but_its_last_token():
    run = Run(10).all([sequence(range(5), score=True), sequence(range(2), score=True)])
    assert run.steps == [(2, 5)]


@pytest.mark.parametrize("tokens", [1, 7, PAGE, 50])
@pytest.mark.parametrize("score", [False, True])
def test_a_long_prompt_goes_in_chunks_that_cover_it_once(tokens, score):
    prompt = range(3 * PAGE + 5)
    made = sequence(prompt, new=0 if score else 2, score=score)
    run = Run(10, tokens=tokens).all([made])
    n = len(prompt) - 1 if score else len(prompt)
    assert run.computed == (n if score else n + 1)
    assert [k for _, k in run.steps[: n // tokens]] == [tokens] * (n // tokens)


def test_equal_beginnings_are_computed_once():
    """Of later prompts only what follows the common full pages, and at least one token."""
    common = list(range(2 * PAGE))
    prompts = [common + [900, 901], common + [950], common, common[:PAGE] + [7] * PAGE]
    run = Run(40)
    for i, prompt in enumerate(prompts):
        before = run.computed
        run.all([sequence(prompt, new=1)])
        run.finished.clear()
        assert run.computed - before == [2 * PAGE + 2, 1, PAGE, PAGE][i]
    assert run.scheduler.reused_tokens == 2 * PAGE + PAGE + PAGE


def test_equal_beginnings_are_shared_within_a_step():
    """As the samples of one prompt are: its full pages once, its last token for each."""
    prompt = list(range(3 * PAGE + 1))
    run = Run(40).all([sequence(prompt, new=3) for _ in range(5)])
    assert run.steps[0] == (5, len(prompt) + 4)
    assert run.scheduler.reused_tokens == 4 * 3 * PAGE


def test_generated_text_is_reused_as_a_prompt():
    run = Run(40)
    first = sequence(range(PAGE), new=PAGE + 2)
    run.all([first])
    run.finished.clear()
    before = run.computed
    follow_up = sequence(first.tokens + [5], new=1)
    run.all([follow_up])
    assert run.computed - before == len(follow_up.tokens) - 1 - 2 * PAGE


def test_scored_texts_share_nothing():
    """Every one of their tokens is wanted."""
    prompt = list(range(3 * PAGE))
    run = Run(40).all([sequence(prompt, score=True) for _ in range(3)])
    assert run.computed == 3 * (3 * PAGE - 1)
    assert run.scheduler.reused_tokens == 0


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_texts_whose_lengths_turn_them_differently_share_nothing(kind):
    rope = Rope(kind, 4, 1e4, factor=2.0, original_context=3 * PAGE, short=(1, 1), long=(2, 2))
    common = list(range(2 * PAGE))
    run = Run(60, rope=rope)
    run.all([sequence(common + [1], new=1)])
    run.finished.clear()
    run.all([sequence(common + [2] * (2 * PAGE), new=1)])
    assert run.scheduler.reused_tokens == 0
    run.finished.clear()
    run.all([sequence(common + [3], new=1)])
    assert run.scheduler.reused_tokens == 2 * PAGE


def test_limits_of_sequences_and_tokens():
    prompts = [sequence([i] * 10, new=3) for i in range(20)]
    run = Run(100, tokens=25, sequences=4).all(prompts)
    assert max(n for n, _ in run.steps) == 4
    assert max(n for _, n in run.steps) == 25


def test_finished_sequences_make_room_at_once():
    """Continuous batching: the queue moves up while others still run."""
    long, short = sequence([1] * 4, new=30), [sequence([i] * 4, new=2) for i in range(2, 12)]
    run = Run(100, sequences=2).all([long, *short])
    assert run.finished[-1] is long
    assert len(run.steps) <= 30


def test_the_youngest_gives_way_and_is_computed_again():
    old, young = sequence([1] * PAGE, new=2 * PAGE), sequence([2] * PAGE, new=2 * PAGE)
    run = Run(4).all([old, young])
    assert run.scheduler.preemptions >= 1
    assert run.finished[0] is old
    assert old.n_new == young.n_new == 2 * PAGE


def test_a_preempted_sequence_takes_up_what_is_left_of_its_pages():
    """Its released pages keep their content until somebody needs their room."""
    old, young = sequence([1] * (PAGE - 1), new=3 * PAGE), sequence(range(3 * PAGE), new=PAGE)
    run = Run(5).all([old, young])
    assert run.scheduler.preemptions >= 1
    assert run.scheduler.reused_tokens >= PAGE


def test_pages_are_dealt_to_the_pools_in_turn():
    """A long text takes as many pages of each; the next begins where most room is."""
    run = Run(4, pools=3, cp=3)
    long, short = sequence(range(7 * PAGE), new=2), sequence([5] * 3, new=2)
    for s in (long, short):
        run.scheduler.add(s)
    run.step()
    owners = [run.pages.owner(page) for page in long.pages]
    assert owners == [0, 1, 2, 0, 1, 2, 0, 1][: len(owners)]
    assert run.pages.owner(short.pages[0]) == 1
    while run.step():
        pass


def test_few_tokens_divide_columns():
    """A step of one token per sequence is computed by all parts, up to 32 tokens for each."""
    for n, expected in ((1, True), (64, True), (65, False)):
        run = Run(99, pools=2, cp=2, columns=True)
        prompts = [sequence([i, i], new=2) for i in range(n)]
        for s in prompts:
            run.scheduler.add(s)
        run.step()
        plan = [(s, s.computed, n) for s, n in run.scheduler.next_step()]
        assert run.build(plan, 0).columns == expected


@pytest.mark.parametrize(
    "options",
    [{}, {"pools": 2, "cp": 2}, {"pools": 3, "cp": 3, "columns": True}, {"pools": 4, "cp": 2}],
    ids=["one", "two pools", "three pools, columns", "four pools, two parts"],
)
@pytest.mark.parametrize("seed", range(4))
def test_every_run_ends_with_every_text_whole(seed, options):
    """Thousands of requests of any length through a cache in which few fit at a time.

    `Run.step` checks each step: what every sequence finds in its pages is its own text.
    """
    rng, pools = random.Random(seed), options.get("pools", 1)
    pages = -(-[3, 5, 8, 20][seed] // pools)
    most = pages * pools * PAGE
    limits = {"tokens": rng.choice([1 + PAGE // 3, 70, 500]), "sequences": rng.choice([2, 9, 64])}
    run, made = Run(pages, **limits, **options), []
    for _ in range(150):
        score = rng.random() < 0.1
        length = rng.randint(2 if score else 1, min(most, rng.choice([5, PAGE, 4 * PAGE])))
        prompt = ([rng.randrange(2)] * PAGE + [rng.randrange(3)] * length)[:length]
        new = 0 if score else rng.randint(1, max(1, min(most - length, rng.choice([2, 10, 80]))))
        made.append(sequence(prompt, new=new, score=score))
    run.all(made)
    assert all(s.n_new == s.request.new for s in made)


def test_lengths_of_texts_travel_with_their_tokens():
    """A prompt's tokens take the prompt's length, a generated token its position + 1."""
    rope = Rope("dynamic", 4, 1e4, factor=2.0, original_context=4)
    run = Run(9, rope=rope)
    a, b = sequence([1] * 6, new=3), sequence([2] * 2, new=3)
    b.tokens += [7, 7, 7]
    for s in (a, b):
        run.scheduler.add(s)
    step = run.build([(s, 0, n) for s, n in run.scheduler.next_step()], 0)
    assert step.length_classes.tolist() == [6] * 6 + [4, 4, 4, 4, 5]
    assert step.wanted.tolist() == [5, 10]
