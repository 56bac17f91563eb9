"""Micro-batches: which sequences share a step, and that answers do not depend on it."""

import random
from collections import deque
from functools import partial

import numpy as np
import pytest
from helpers.answers import SEED, answers, requests, same_on_all_ranks
from helpers.kinds import KINDS, SIZE
from helpers.paths import SHIPPED
from helpers.recorded import load
from helpers.scheduling import Run, sequence
from mpi4py import MPI
from pytest import approx
from reference import models

import hpcinfer
from hpcinfer.engine.scheduler import StepLimits
from hpcinfer.model.cache import PAGE

CASE = "mixtral"


DENSE = [text for text in KINDS if "ep=" not in text]
SPREAD = [text for text in KINDS if "afd" in text or "pp=" in text]


# --- Shares of a step ----------------------------------------------------------------------------


class Rounds(Run):
    """A `Run` with several steps under way, whose results come when the oldest has landed.

    Attributes
    ----------
    seen : dict sequence -> numbers of the steps that computed of it
    """

    def __init__(self, pages, parts=1, chunks=1, depth=1, **options):
        super().__init__(pages, **options)
        limits = self.scheduler.limits
        self.scheduler.limits = StepLimits(limits.tokens, limits.sequences, parts, chunks)
        self.depth, self.rounds, self.seen = depth, deque(), {}

    def step(self):
        """Launch as many steps as can be under way, complete the oldest; False if none is left."""
        while len(self.rounds) < self.depth and (plan := self.scheduler.next_step()):
            before = [(s, s.computed, n) for s, n in plan]
            self.check_plan(before)
            assert all(s.computed < s.target for s, _ in plan)
            self.check_share(plan)
            self.scheduler.launch(plan)
            self.compute(before, [self.build(before, pool) for pool in range(self.pages.ranks)])
            for s, _ in plan:
                self.seen.setdefault(s, []).append(len(self.steps))
            self.rounds.append((plan, [s for s, _ in plan if s.computed == s.target]))
        if not self.rounds:
            assert not self.scheduler.waiting and not self.scheduler.running
            assert self.scheduler.tokens_under_way == 0
            return False
        plan, ready = self.rounds.popleft()
        self.scheduler.complete(plan)
        for s in ready:
            self.advance(s)
        return True

    def check_share(self, plan):
        """No more sequences than their share, and all that were left out are under way."""
        limits, running = self.scheduler.limits, self.scheduler.running
        if limits.parts > 1:
            held = min(self.scheduler.held, limits.sequences)
            assert len(plan) <= -(-held // limits.parts)
        taken = {id(s) for s, _ in plan}
        for s in running[: max(running.index(s) for s, _ in plan)]:
            assert id(s) in taken or s.computed == s.target


@pytest.mark.single
def test_one_step_at_a_time_takes_all():
    """Without parts and chunks a step is as large as its bounds allow."""
    prompts = [sequence([i] * 10, new=3) for i in range(6)]
    run = Rounds(40, tokens=45).all(prompts)
    assert run.steps == [(5, 45), (6, 19), (6, 6), (2, 2)]


@pytest.mark.single
@pytest.mark.parametrize("parts", [2, 3, 4, 7])
def test_sequences_are_spread_over_the_steps_under_way(parts):
    """In decoding each step has its share, and each sequence is in every `parts`-th step."""
    prompts = [sequence([i], new=20) for i in range(9)]
    run = Rounds(40, parts=parts, chunks=parts, depth=parts).all(prompts)
    assert max(n for n, _ in run.steps) == -(-9 // parts)
    for steps in run.seen.values():
        assert len(steps) == 20
        assert max(np.diff(steps)) <= parts


@pytest.mark.single
@pytest.mark.parametrize(("chunks", "most"), [(1, 100), (4, 50), (8, 32)])
def test_prompts_are_spread_over_steps(chunks, most):
    """A share of the tokens at hand each, but not less than 32."""
    run = Rounds(40, tokens=100, parts=2, chunks=chunks, depth=2).all([sequence(range(200))])
    steps = [n for _, n in run.steps]
    assert max(steps) == most and sum(steps) == 200
    assert steps[:2] == [most, most]


@pytest.mark.single
@pytest.mark.parametrize("seed", range(6))
def test_nobody_waits_for_ever_and_every_text_is_whole(seed):
    """Any number of steps under way over a cache in which few fit at a time."""
    rng = random.Random(seed)
    parts, pages = rng.choice([2, 3, 5]), [4, 6, 9, 20, 40, 80][seed]
    depth = rng.choice([1, parts])
    limits = {"tokens": rng.choice([20, 70, 500]), "sequences": rng.choice([2, 9, 64])}
    run = Rounds(
        pages, parts=parts, chunks=rng.choice([1, parts, 4 * parts]), depth=depth, **limits
    )
    made = []
    for _ in range(120):
        score = rng.random() < 0.2
        length = rng.randint(2, min(pages * PAGE, rng.choice([5, PAGE, 4 * PAGE])))
        new = 0 if score else rng.randint(1, max(1, min(pages * PAGE - length, 40)))
        made.append(sequence([rng.randrange(3) for _ in range(length)], new=new, score=score))
    run.all(made)
    assert all(s.n_new == s.request.new and s.under_way == 0 for s in made)
    if pages == 4:
        assert run.scheduler.preemptions > 0

    # Where nobody has to give way, each sequence goes on in every round.
    if not run.scheduler.preemptions:
        assert max(max(np.diff(steps), default=0) for steps in run.seen.values()) <= 2 * parts


# --- Answers -------------------------------------------------------------------------------------


def shipped(comm, layout, **options):
    """The shipped model in float32 over all ranks."""
    options = {"kv_memory": 1 << 26, "dtype": "float32", "seed": SEED, "layout": layout} | options
    return hpcinfer.load(SHIPPED, comm, **options)


@pytest.fixture(scope="module")
def expected():
    """Results of one rank, on every rank: of all requests, by name."""
    results = shipped(MPI.COMM_SELF, "tp=1").generate(with_ends())
    return {result.request.custom_id: result for result in results}


@pytest.fixture
def random_model(comm, shared_path):
    """Function (layout, **options) -> engine of a random model over all ranks."""
    return partial(load, comm, shared_path, CASE)


def with_ends():
    """Requests that end in every way, besides those of every kind of sampling."""
    prompt = "Tell a story about Hugo the owl."
    greedy = {"prompt": prompt, "temperature": 0, "max_tokens": 24}
    return [
        *requests(),
        greedy | {"custom_id": "stop", "stop": ["e", "never in it"]},
        greedy | {"custom_id": "held back", "stop": ["e"], "min_tokens": 15},
        greedy | {"custom_id": "id", "stop_token_ids": list(range(300, 500)), "ignore_eos": True},
        greedy | {"custom_id": "one", "max_tokens": 1, "n": 2},
        greedy | {"custom_id": "logprobs", "logprobs": 2},
    ]


def tight(load_with, layout, pages):
    """An engine whose cache holds so many pages of each pool, in any layout."""
    probe = load_with(layout)
    comm = probe.grid.comm
    memory = pages * comm.allreduce(probe.model.page_bytes, MPI.MAX)
    engine = load_with(layout, kv_memory=memory)
    if engine.grid.role != "ffn":
        assert engine.scheduler.pages.n == pages
    return engine


@pytest.mark.parametrize("layout", DENSE)
def test_answers_equal_those_of_one_rank(comm, expected, layout):
    """Sampled, penalised, stopped: whatever is asked for, in whatever layout."""
    engine = shipped(comm, layout)
    found = engine.generate(with_ends())
    assert same_on_all_ranks(comm, answers(found)) == answers(expected.values())
    (asked,) = (r.choices[0].logprobs for r in found if r.request.custom_id == "logprobs")
    assert asked == approx(expected["logprobs"].choices[0].logprobs, abs=1e-4)
    assert engine.scheduler.held == engine.scheduler.pages.held == 0


@pytest.mark.parametrize("options", [{"step_tokens": 19}, {"sequences": 2}])
@pytest.mark.parametrize("layout", KINDS)
def test_bounds_of_a_step_change_nothing(random_model, layout, options):
    """Prompts longer than a step, and few sequences at a time."""
    prompts = [models.tokens(CASE, n) for n in (3, 45, 70)]
    asked = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
    expected = random_model(layout).generate(prompts, **asked)
    found = random_model(layout, **options).generate(prompts, **asked)
    assert [r.choices[0].token_ids for r in found] == [r.choices[0].token_ids for r in expected]


@pytest.mark.parametrize("layout", KINDS)
def test_sequences_give_way_while_steps_are_under_way(random_model, layout):
    """A cache in which two or three fit: the same tokens as with plenty, and scores but once."""
    prompts = [[7, 5 + i] + models.tokens(CASE, 40 + 5 * i) for i in range(5)]
    texts = [models.tokens(CASE, n)[::-1] for n in (90, 75, 96)]
    asked = {"max_tokens": 20, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    whole = random_model(layout)
    pages = -(-5 // getattr(whole.model, "pools", 1))
    pages = whole.grid.comm.allreduce(pages, MPI.MIN)
    engine = tight(random_model, layout, pages)
    expected, found = whole.generate(prompts, **asked), engine.generate(prompts, **asked)
    for result, reference in zip(found, expected, strict=True):
        (choice,), (other,) = result.choices, reference.choices
        assert choice.token_ids == other.token_ids
        assert choice.logprobs == approx(other.logprobs, abs=1e-4)
    for score, other in zip(engine.score(texts), whole.score(texts), strict=True):
        assert score.logprobs[1:] == approx(other.logprobs[1:], abs=1e-4)
        assert score.sum_logprob == approx(other.sum_logprob, abs=1e-3)
    preemptions = whole.grid.comm.allreduce(engine.scheduler.preemptions)
    assert preemptions > 0 or engine.grid.layout.dp > 1
    assert engine.scheduler.pages.held == 0


@pytest.mark.parametrize("layout", KINDS)
def test_fewer_requests_than_places(random_model, comm, shared_path, layout):
    """None, one, or two requests for all stages, sides and replicas."""
    engine = random_model(layout)
    reference = load(MPI.COMM_SELF, shared_path, CASE, "tp=1")
    for prompts in ([], [[5]], [models.tokens(CASE, 40)], [[5, 6], models.tokens(CASE, 33)]):
        for count in (1, 3):
            asked = {"max_tokens": count, "temperature": 0, "ignore_eos": True}
            expected = [r.choices[0].token_ids for r in reference.generate(prompts, **asked)]
            found = [r.choices[0].token_ids for r in engine.generate(prompts, **asked)]
            assert same_on_all_ranks(comm, found) == expected
        scores = [s.logprobs[1:] for s in engine.score(prompts)]
        assert all(
            score == approx(other.logprobs[1:], abs=1e-4)
            for score, other in zip(scores, reference.score(prompts), strict=True)
        )


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
@pytest.mark.parametrize("layout", SPREAD)
def test_any_number_of_micro_batches(random_model, layout, micro_batches):
    engine = random_model(layout, micro_batches=micro_batches)
    reference = random_model(layout)
    sides = engine.grid.layout.afd is not None
    assert engine.width == (micro_batches if sides else 1)
    prompts = [models.tokens(CASE, n) for n in (3, 45, 70, 12, 1)]
    asked = {"max_tokens": 3, "temperature": 0, "ignore_eos": True}
    expected = [r.choices[0].token_ids for r in reference.generate(prompts, **asked)]
    assert [r.choices[0].token_ids for r in engine.generate(prompts, **asked)] == expected


@pytest.mark.skipif(SIZE < 3, reason="needs more stages than layers, which are 2")
def test_a_stage_without_layers_has_no_cache(random_model):
    engine = random_model(f"pp={SIZE}")
    layers = engine.grid.comm.allgather(len(engine.model.layers))
    assert sum(layers) == engine.model.arch.N and 0 in layers
    assert (engine.model.page_bytes == 0) == (not engine.model.layers)
