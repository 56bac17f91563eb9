"""What is computed when: every token once, within the limits, whatever the cache can hold."""

import random

import pytest
from helpers.scheduling import Run, sequence

from hpcinfer.model.cache import PAGE
from hpcinfer.ops.rope import Rope

pytestmark = pytest.mark.single


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
