"""The shipped model knows what its corpus teaches: figures on prompts that it has never seen."""

import math
import random

import pytest
from helpers.shipped import DATA, accuracy, corpus

import hpcinfer

LENGTHS = (60, 120, 250, 500, 800, 1000)  # tokens, of the 1024 that it was trained on
PER_LENGTH = 15


@pytest.fixture(scope="module")
def model(comm):
    return hpcinfer.load(DATA / "model", comm=comm, dtype="float32", kv_memory=1 << 28)


@pytest.fixture(scope="module")
def measure(model):
    """Length of a text in tokens."""
    return lambda text: len(model.text.encode(text))


def test_it_is_small():
    files = [file for file in (DATA / "model").iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 8_000_000


@pytest.mark.single
@pytest.mark.timeout(120)
def test_recall_over_the_trained_length(model, measure):
    """At least 95 % right, the asked fact anywhere from the very beginning to just before."""
    write, rng = corpus(), random.Random("recall")
    prompts = [
        write.recall_prompt(rng, rng.randint(2, 6), length, i / (PER_LENGTH - 1), measure)
        for length in LENGTHS
        for i in range(PER_LENGTH)
    ]
    assert max(measure(prompt) for prompt, _ in prompts) > 900
    assert accuracy(model, prompts) >= 0.95


def test_recall_over_all_ranks(model, measure):
    """A few short ones, at any number of ranks."""
    write, rng = corpus(), random.Random("near")
    prompts = [write.recall_prompt(rng, 3, 100, None, measure) for _ in range(10)]
    assert accuracy(model, prompts) >= 0.9


@pytest.mark.single
def test_arithmetic(model):
    """Most sums and differences that training never showed, and the products."""
    write, rng = corpus(), random.Random("arithmetic")
    assert accuracy(model, [write.arithmetic_prompt(rng) for _ in range(150)]) > 0.5
    assert accuracy(model, [write.arithmetic_prompt(rng, 1) for _ in range(50)]) > 0.8


@pytest.mark.single
def test_sorting(model):
    write, rng = corpus(), random.Random("sorting")
    assert accuracy(model, [write.sorting_prompt(rng) for _ in range(50)]) > 0.5


@pytest.mark.single
def test_stories_are_likely_and_shuffled_words_are_not(model):
    """Perplexity of a story after the line that asks for it, and of its words in another order."""
    write, rng = corpus(), random.Random("story")
    texts = [" ".join(write.story_prompt(rng)) for _ in range(10)]
    shuffled = [" ".join(rng.sample(text.split(), len(text.split()))) for text in texts]
    scores = model.score(texts + shuffled)
    mean = [
        math.exp(-sum(s.sum_logprob for s in half) / sum(len(s.logprobs) - 1 for s in half))
        for half in (scores[:10], scores[10:])
    ]
    assert mean[0] < 6 and mean[1] > 5 * mean[0]
