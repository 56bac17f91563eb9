"""A context cut over ranks: memory per rank, prefix reuse, queries that travel, what is refused."""

import numpy as np
import pytest
from helpers.layouts import STRATEGIES
from helpers.parity import load
from mpi4py import MPI
from reference import models
from reference.parity import greedy, on_root

import hpcinfer
from hpcinfer.errors import UsageError
from hpcinfer.model.cache import PAGE

CASE = "llama-gqa"


def context(comm, path, **options):
    """The reference llama with its sequences cut over all ranks."""
    modes = options.pop("modes", "")
    layout = f"cp={comm.size}{modes}"
    return load(comm, CASE, "directory", path, layout=layout, context=4096, **options)


def test_a_context_beyond_one_rank_fits_on_several(comm, shared_path):
    """With a cache of 3 pages a rank, a text of 3 P pages runs on P ranks and is refused on one."""
    probe = context(comm, shared_path)
    memory = 3 * probe.model.page_bytes
    text = models.tokens(CASE, 3 * PAGE * comm.size - 8)
    engine = context(comm, shared_path, kv_memory=memory)
    tokens = greedy(engine, [text], 8)
    assert tokens == greedy(probe, [text], 8)

    # One rank with the same memory says in one line what it lacks.
    if comm.size > 1:
        alone = hpcinfer.load(shared_path / "model", MPI.COMM_SELF, kv_memory=memory, context=4096)
        with pytest.raises(ValueError, match=r"kv-memory: got a cache of 96 tokens, need"):
            alone.generate([text], max_tokens=8, temperature=0)


def test_cache_memory_is_divided(comm, shared_path):
    """The pages of one long text are dealt evenly: each rank holds 1/P of them."""
    engine = context(comm, shared_path)
    pages, held = engine.scheduler.pages, []
    engine.observers.append(
        lambda *_: held.append([pages.n - pages.n_free(rank) for rank in range(pages.ranks)])
    )
    greedy(engine, [models.tokens(CASE, 4 * PAGE * comm.size - 4)], 2)
    assert len(held[0]) == comm.size
    assert set(held[0]) == {4}


def test_prefixes_are_reused(comm, shared_path):
    """A second text with the same beginning computes only what is new, with the same result."""
    engine = context(comm, shared_path)
    text = models.tokens(CASE, 150)
    first = greedy(engine, [text], 8)
    computed = engine.stats.prefill.tokens
    assert greedy(engine, [text], 8) == first
    assert engine.stats.prefill.tokens - computed == 150 - 150 // PAGE * PAGE
    assert engine.scheduler.reused_tokens == 150 // PAGE * PAGE


@pytest.mark.mpi(min_size=2)
def test_queries_travel_when_they_are_fewer_bytes(comm, shared_path):
    """The last chunk of a long text is short: the ring passes its queries, not the long cache."""
    engine = context(comm, shared_path, step_tokens=300, kv_memory=1 << 28)
    reference = load(comm, CASE, "directory", shared_path)
    text = (models.tokens(CASE, 150) * 4)[:590]
    engine.ledger.clear()
    whole = engine.score([text[:300]])[0].logprobs
    assert engine.ledger.calls("Shift", purpose="ring queries") == 0
    assert engine.ledger.calls("Shift", purpose="ring") > 0
    engine.limits.tokens = 12
    chunked = engine.score([text[:300]])[0].logprobs
    assert engine.ledger.calls("Shift", purpose="ring queries") > 0
    expected = reference.score([text[:300]])[0].logprobs
    assert np.abs(whole[1:] - expected[1:]).max() < 1e-4
    assert np.abs(chunked[1:] - expected[1:]).max() < 1e-4


def test_decoding_divides_columns(comm, shared_path):
    """In a step of few sequences every rank computes all tokens with its part of the columns."""
    engine = context(comm, shared_path)
    steps = []
    engine.observers.append(lambda micro, _: steps.append(micro.step))
    greedy(engine, [models.tokens(CASE, n) for n in (7, 33)], 4)
    assert [step.columns for step in steps] == [False] + 3 * [comm.size > 1]
    assert sum(comm.allgather(len(steps[0].mine))) == 40


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("word", ["prefill", "decode"])
def test_every_mode_is_run_by_its_name(comm, shared_path, word):
    """No mode is another one under its name: each sends messages that no other does."""
    found = {}
    for mode in STRATEGIES[word]:
        engine = context(comm, shared_path, modes=f",{word}={mode}")
        engine.ledger.clear()
        greedy(engine, [models.tokens(CASE, 33)], 3)
        messages = frozenset((verb, purpose) for verb, _, purpose in engine.ledger.entries)
        assert messages not in found, f"{word}={mode} runs as {found[messages]}"
        found[messages] = mode


def test_keys_are_cut_rather_than_copied(comm, shared_path):
    """With tp beyond the key/value heads and cp, ranks with the same head share its pages."""
    if comm.size < 8:
        pytest.skip("needs 8 ranks: 2 key/value heads, tp=4, cp=2")
    engine = load(comm, CASE, "directory", shared_path, layout="tp=4,cp=2")
    assert engine.model.attention.sharers == 2
    assert engine.scheduler.pages.ranks == 4
    text = models.tokens(CASE, 150)
    expected = load(comm, CASE, "directory", shared_path)
    assert greedy(engine, [text], 16) == greedy(expected, [text], 16)


def test_refusals(comm, shared_path):
    """A mode that is unknown, or that cannot be, is refused by every rank in one line."""
    on_root(comm, lambda: models.write_model(CASE, shared_path / "model", 1, "float32"))
    for layout, line in (
        (f"cp={comm.size},prefill=spiral", "need prefill one of ring, ulysses, split-q"),
        (f"cp={comm.size},decode=shrub", "need decode one of tree, gather, ring"),
        (f"cp={comm.size + 1}", f"need {comm.size} as launched"),
    ):
        with pytest.raises(UsageError, match=line):
            hpcinfer.load(shared_path / "model", comm, layout)
