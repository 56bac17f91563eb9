"""The shipped model finds a fact in a text that is cut over the ranks, in every mode.

That it finds it is a test of the merge only if it would not without: with plain averages of the
ranks' results it fails.
"""

import random

import pytest
from helpers.layouts import MODES
from helpers.paths import SHIPPED
from helpers.shipped import accuracy, corpus

import hpcinfer
from hpcinfer import collectives
from hpcinfer.model import attention
from hpcinfer.parallel import ring

MODEL = SHIPPED


def load(comm, prefill="ring", decode="tree"):
    layout = f"cp={comm.size},prefill={prefill},decode={decode}"
    return hpcinfer.load(MODEL, comm=comm, layout=layout, dtype="float32", kv_memory=1 << 26)


def prompts(model, n=6, length=900):
    """Long texts with four facts each, the asked one anywhere, each text over every rank."""
    rng = random.Random("needle")
    return [
        corpus().recall_prompt(
            rng, 4, length, i / (n - 1), lambda text: len(model.text.encode(text))
        )
        for i in range(n)
    ]


@pytest.mark.parametrize("modes", MODES, ids="-".join)
def test_the_needle_is_found(comm, modes):
    """At most one of six is missed, which the model may do on one rank as well."""
    model = load(comm, *modes)
    assert accuracy(model, prompts(model)) >= 5 / 6


@pytest.mark.mpi(min_size=4)
def test_it_is_not_found_with_plain_averages(comm, monkeypatch):
    """The mean of four ranks' results instead of their merge: most answers are wrong.

    Of two ranks' results the mean is still near enough for the model to find most of them.
    """

    def average(comm, o, lse, purpose="average"):
        return collectives.Allreduce(comm, o / comm.size, purpose=purpose), lse

    def half(o_a, lse_a, o_b, lse_b):
        return (o_a + o_b) / 2, lse_a

    monkeypatch.setattr(attention, "tree_by_size", average)
    monkeypatch.setattr(ring, "merge", half)
    model = load(comm)
    assert accuracy(model, prompts(model)) <= 2 / 6
