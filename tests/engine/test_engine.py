"""Generation and scoring through the Python interface: what a request gets is its own affair."""

import json
import math
import random
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers.answers import SEED, answers, error_on_all_ranks, requests, same_on_all_ranks
from helpers.paths import SHIPPED
from pytest import approx
from reference import models
from reference.parity import on_root

import hpcinfer
from hpcinfer import partition
from hpcinfer.engine.feed import Feed
from hpcinfer.engine.generate import GenerateTask
from hpcinfer.engine.loop import run
from hpcinfer.errors import UsageError
from hpcinfer.model.cache import page_bytes
from hpcinfer.model.families import read_architecture
from hpcinfer.parallel import vocabulary
from hpcinfer.requests.request import BadRequest


@pytest.fixture(scope="module")
def engine(comm):
    """The shipped model in float32, with a cache of plenty."""
    return load(comm)


def load(comm, path=SHIPPED, pages=200, **options):
    """Load a model with a cache of so many pages per rank."""
    options = {"dtype": "float32", "seed": SEED} | options
    config = json.loads((Path(path) / "config.json").read_text())
    arch = read_architecture(config)
    n_kv = max(heads.n_kv for heads in partition.heads(arch.H, arch.G, comm.size))
    if "cp" in options.get("layout", ""):
        n_kv = arch.G
    memory = pages * page_bytes(arch.N, n_kv, arch.K, np.float32)
    loaded = hpcinfer.load(path, comm=comm, kv_memory=memory, **options)
    assert loaded.scheduler.pages.n <= pages
    return loaded


def random_model(comm, case, path, **options):
    """A random model of `reference.models` over all ranks."""
    on_root(comm, partial(models.write_model, case, path / case))
    return load(comm, path / case, **options)


# --- Independence --------------------------------------------------------------------------------


def test_a_request_depends_neither_on_the_batch_nor_on_the_order(comm, engine):
    """In one batch, one by one, and shuffled: the same tokens, also when sampling."""
    items = requests()
    together = same_on_all_ranks(comm, answers(engine.generate(items)))
    assert [len(together[f"r{i}"]) for i in range(8)] == [1, 1, 3, 2, 1, 1, 1, 1]
    alone = {}
    for item in items:
        alone |= answers(engine.generate([item]))
    assert alone == together
    random.Random(1).shuffle(items)
    assert answers(engine.generate(items)) == together


def test_equal_prompts_without_names_differ_and_come_again(engine):
    """The second of two equal prompts is another draw, the same in every run."""
    first, second = engine.generate(["The way was"] * 2, temperature=1.5, max_tokens=12)
    assert first.choices[0].token_ids != second.choices[0].token_ids
    again = engine.generate(["The way was"], temperature=1.5, max_tokens=12)
    assert again[0].choices[0].token_ids == first.choices[0].token_ids


def test_seeds_and_samples_are_different_draws(engine):
    item = {"prompt": "Once there was", "max_tokens": 12, "temperature": 1.5, "custom_id": "a"}
    seeds = [SEED, 0, 1, 2**63]
    drawn = [
        tuple(engine.generate([item | {"seed": seed}])[0].choices[0].token_ids) for seed in seeds
    ]
    (result,) = engine.generate([item | {"n": 4, "seed": SEED}])
    samples = [tuple(choice.token_ids) for choice in result.choices]
    assert [choice.index for choice in result.choices] == [0, 1, 2, 3]
    assert len(set(samples + drawn[1:])) == 7
    assert samples[0] == drawn[0]


@pytest.mark.parametrize("options", [{"step_tokens": 19}, {"pages": 6}, {"sequences": 2}])
def test_limits_of_step_and_cache_change_nothing(comm, engine, options):
    """Chunked prefill, preemption, few at a time: the same tokens and log-probabilities."""
    items = [item | {"logprobs": 2} for item in requests()]
    expected = engine.generate(items)
    other = load(comm, **options)
    results = other.generate(items)
    assert answers(results) == answers(expected)
    for result, reference in zip(results, expected, strict=True):
        for choice, other_choice in zip(result.choices, reference.choices, strict=True):
            assert choice.logprobs == approx(other_choice.logprobs, abs=1e-4)
    if "pages" in options:
        assert other.scheduler.preemptions > 0
        assert other.stats.most_pages <= 6
    assert other.scheduler.pages.held == 0


def test_cutting_the_sequences_changes_nothing(comm, engine):
    """Over cp, in chunks, with more texts than pages: the same tokens, also when sampling."""
    items = [
        {"prompt_token_ids": list(range(40 * i, 40 * i + 20)), "temperature": 0.9 * (i > 0)}
        for i in range(5)
    ]
    options = {"max_tokens": 20, "ignore_eos": True}
    expected = [result.choices[0].token_ids for result in engine.generate(items, **options)]
    layout = f"cp={comm.size}"
    whole = load(comm, layout=layout)
    tight = load(comm, layout=layout, pages=-(-6 // comm.size), step_tokens=19)
    for other in (whole, tight):
        results = other.generate(items, **options)
        assert [result.choices[0].token_ids for result in results] == expected
        assert other.scheduler.pages.held == 0
    assert tight.scheduler.preemptions > 0


@pytest.mark.parametrize("case", ["qwen2-window", "gpt2", "llama-rope-dynamic"])
def test_preempted_random_models_go_on_as_if_nothing_was(comm, shared_path, case):
    """Windows, learned positions, and a rope that depends on the length of the text."""
    prompts = [[7, 5 + i] + models.tokens(case, 20 + 11 * i) for i in range(5)]
    options = {"max_tokens": 35, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    expected = random_model(comm, case, shared_path).generate(prompts, **options)
    tight = load(comm, shared_path / case, pages=7, step_tokens=33)
    results = tight.generate(prompts, **options)
    assert tight.scheduler.preemptions > 0
    for result, reference in zip(results, expected, strict=True):
        assert result.choices[0].token_ids == reference.choices[0].token_ids
        assert result.choices[0].logprobs == approx(reference.choices[0].logprobs, abs=1e-4)


def test_equal_beginnings_are_computed_once(comm):
    fresh = load(comm, pages=60)
    common = list(range(100, 196))
    fresh.generate([common + [i] for i in range(4)], max_tokens=2, ignore_eos=True)
    assert fresh.scheduler.reused_tokens == 3 * 96
    assert fresh.stats.prefill.tokens == 97 + 3


# --- Ends ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_answer(engine):
    """Prompt and greedy answer that go on for 40 tokens."""
    prompt = "Tell a story about Hugo the owl."
    (result,) = engine.generate([prompt], temperature=0, max_tokens=40, ignore_eos=True)
    (choice,) = result.choices
    assert (len(choice.token_ids), choice.finish_reason) == (40, "length")
    return prompt, choice


def run_one(engine, prompt, **sampling):
    (result,) = engine.generate([prompt], temperature=0, **({"max_tokens": 40} | sampling))
    return result.choices[0]


def test_stop_strings_end_the_text_before_them(engine, long_answer):
    prompt, whole = long_answer
    stop = whole.text[18:23]
    choice = run_one(engine, prompt, stop=["never in it", stop])
    assert choice.finish_reason == "stop"
    assert choice.text == whole.text[: whole.text.index(stop)]
    n = len(choice.token_ids)
    assert n < 40 and choice.token_ids == whole.token_ids[:n]


def test_stop_ids_end_the_text(engine, long_answer):
    prompt, whole = long_answer
    stop = whole.token_ids[12]
    choice = run_one(engine, prompt, stop_token_ids=[stop], ignore_eos=True)
    first = whole.token_ids.index(stop)
    assert choice.token_ids == whole.token_ids[: first + 1]
    assert choice.finish_reason == "stop"
    assert whole.text.startswith(choice.text)


def test_min_tokens_hold_the_stops_back(engine, long_answer):
    """Stop ids are not drawn before; a stop string does not count before."""
    prompt, whole = long_answer
    stop = whole.token_ids[3]
    choice = run_one(engine, prompt, stop_token_ids=[stop], min_tokens=20)
    assert len(choice.token_ids) >= 20
    assert stop not in choice.token_ids[:20]
    choice = run_one(engine, prompt, stop=[whole.text[2:5]], min_tokens=20, ignore_eos=True)
    assert 20 <= len(choice.token_ids) and choice.token_ids[:20] == whole.token_ids[:20]


def test_max_tokens(engine, long_answer):
    prompt, whole = long_answer
    for n in (1, 2, 33):
        choice = run_one(engine, prompt, max_tokens=n, ignore_eos=True)
        assert choice.token_ids == whole.token_ids[:n] and choice.finish_reason == "length"


def test_end_of_text_ends_or_is_ignored(comm, shared_path, long_answer):
    """A token of the answer, made the one that ends texts: it is no part of the text."""
    prompt, whole = long_answer
    eos = whole.token_ids[9]
    n = whole.token_ids.index(eos) + 1
    engine = load(comm, on_root(comm, partial(with_eos, shared_path / "model", eos)))
    choice = run_one(engine, prompt)
    assert (choice.finish_reason, choice.token_ids) == ("stop", whole.token_ids[:n])
    assert choice.text == engine.text.decode(whole.token_ids[: n - 1], after_text=True)
    beyond = run_one(engine, prompt, ignore_eos=True)
    assert (beyond.finish_reason, beyond.token_ids) == ("length", whole.token_ids)
    assert eos not in run_one(engine, prompt, min_tokens=n + 5).token_ids[: n + 5]


def with_eos(path, token_id):
    """Copy of the shipped model in which another token ends texts."""
    shutil.copytree(SHIPPED, path)
    for name in ("config.json", "generation_config.json"):
        config = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(config | {"eos_token_id": token_id}))
    return path


def test_the_context_window_ends_every_answer(comm):
    small = load(comm, context=40)
    prompts = [list(range(50, 50 + n)) for n in (39, 30)]
    results = small.generate(prompts, max_tokens=100, ignore_eos=True)
    assert [len(result.choices[0].token_ids) for result in results] == [1, 10]
    assert {result.choices[0].finish_reason for result in results} == {"length"}
    with pytest.raises(ValueError, match="item 0: request: got a prompt of 40 tokens, need"):
        small.generate([list(range(40))])


# --- Log-probabilities ---------------------------------------------------------------------------


@pytest.mark.parametrize("top", [0, 1, 7, 20])
def test_logprobs_of_chosen_and_top_tokens(comm, engine, top):
    items = [item | {"logprobs": top} for item in requests()[:5]]
    results = engine.generate(items)
    for result in results:
        for choice in result.choices:
            assert len(choice.logprobs) == len(choice.top_logprobs) == len(choice.token_ids)
            rows = zip(choice.token_ids, choice.logprobs, choice.top_logprobs, strict=True)
            for token, logprob, others in rows:
                values = [p for _, p in others]
                assert len(others) == top and values == sorted(values, reverse=True)
                assert sum(map(math.exp, values)) <= 1 + 1e-5
                if others and token in dict(others):
                    assert dict(others)[token] == logprob
                elif others:
                    assert logprob <= values[-1]
    greedy = results[0].choices[0]
    if top:
        assert [others[0][0] for others in greedy.top_logprobs] == greedy.token_ids
    same_on_all_ranks(comm, [[c.logprobs for c in result.choices] for result in results])


def test_score_gives_the_logprobs_of_generate(engine):
    """Prefill and decode compute the same; sampling settings do not count."""
    items = [item | {"logprobs": 0} for item in requests()]
    results = engine.generate(items)
    texts = [(result.request, choice) for result in results for choice in result.choices]
    scores = engine.score([[*request.token_ids, *c.token_ids] for request, c in texts])
    for (request, choice), score in zip(texts, scores, strict=True):
        n = len(request.token_ids)
        assert score.logprobs[n:].tolist() == approx(choice.logprobs, abs=1e-4)


# --- Score ---------------------------------------------------------------------------------------


def test_scores(comm, engine):
    texts = ["Once there was a shy hare.", "What is 2 + 3? 5", [5], [5, 6], list(range(300))]
    scores = engine.score(texts)
    for text, score in zip(texts, scores, strict=True):
        ids = engine.text.encode(text) if isinstance(text, str) else text
        assert list(score.request.token_ids) == list(ids)
        assert score.logprobs.shape == (len(ids),) and score.logprobs.dtype == np.float32
        assert math.isnan(score.logprobs[0]) and (score.logprobs[1:] < 0).all()
        assert score.sum_logprob == approx(score.logprobs[1:].sum(dtype=float), abs=1e-3)
        if len(ids) > 1:
            mean = score.sum_logprob / (len(ids) - 1)
            assert score.perplexity == approx(math.exp(-mean))
    assert scores[2].sum_logprob == 0 and math.isnan(scores[2].perplexity)
    assert scores[0].perplexity < scores[4].perplexity
    same_on_all_ranks(comm, [score.logprobs.tobytes() for score in scores])


def test_blocks_of_a_score_do_not_matter(comm, engine, monkeypatch):
    """Rows of logits at a time, and tokens of a step: the memory, not the result."""
    texts = [list(range(30, 200)), [7] * 40, [3, 4]]
    whole = engine.score(texts)
    chunked = load(comm, step_tokens=13)
    for rows in (1, 3, 17):
        monkeypatch.setattr(vocabulary, "LOGITS_BYTES", rows * 4 * 1024)
        for other in (engine, chunked):
            for score, expected in zip(other.score(texts), whole, strict=True):
                np.testing.assert_allclose(score.logprobs, expected.logprobs, atol=1e-4)


def test_a_long_text_needs_no_more_logits_than_a_block(comm, engine, monkeypatch):
    """Not T x V floats, however long the text is."""
    seen = []
    logits = engine.model.logits

    def watched(hidden):
        seen.append(len(hidden))
        return logits(hidden)

    monkeypatch.setattr(engine.model, "logits", watched)
    monkeypatch.setattr(vocabulary, "LOGITS_BYTES", 4 * 1024 * 10)
    engine.score([list(range(500))])
    assert max(seen) <= 10 * comm.size and sum(seen) == 499


# --- Refusals ------------------------------------------------------------------------------------


def test_requests_that_never_fit_become_records(comm):
    """The others run; the message says what is there and what is needed."""
    small = load(comm, pages=3)
    items = [[5] * 30, [6] * 120, [7] * 90, {"prompt_token_ids": [8] * 60, "max_tokens": 60}]
    reader = small.reader({"max_tokens": 4, "ignore_eos": True})
    outcomes = {}

    def deliver(outcome):
        index = outcome.index if isinstance(outcome, BadRequest) else outcome.request.index
        outcomes[index] = outcome

    with Feed(small.grid, reader.read_items(items), len(items)) as feed:
        run(small, feed, deliver, GenerateTask(small))
    assert [isinstance(outcomes[i], BadRequest) for i in range(4)] == [False, True, False, True]
    assert outcomes[1].message == (
        "kv-memory: got a cache of 96 tokens, need 128 for this request; raise --kv-memory, use "
        "more ranks, or lower max_tokens"
    )
    assert len(outcomes[2].choices[0].token_ids) == 4
    assert small.scheduler.pages.held == 0
    same_on_all_ranks(comm, outcomes)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("", "item 1: request: got prompt without tokens"),
        ([], "item 1: request: got prompt_token_ids without tokens"),
        ([1024], "item 1: request: got token id 1024"),
        ({"prompt": "a", "temprature": 1}, "item 1: request: got the unknown field 'temprature'"),
        ({"prompt": "a", "temperature": -1}, "item 1: sampling: got temperature = -1"),
        (7, "item 1: request: got 7"),
    ],
)
def test_bad_items_are_refused_on_every_rank(comm, engine, item, message):
    refused = error_on_all_ranks(comm, lambda: engine.generate(["A", item], max_tokens=2))
    assert message in refused
    assert engine.scheduler.pages.held == 0


def test_an_engine_goes_on_after_an_error(comm, monkeypatch):
    """Nothing of the failed run stays in the queue, and no page that was never written is found."""
    engine, prompt = load(comm, pages=20), list(range(300, 400))
    forward = engine.model.forward

    def fail(step):
        raise RuntimeError("model: got a failure")

    monkeypatch.setattr(engine.model, "forward", fail)
    with pytest.raises(RuntimeError, match="got a failure"):
        engine.generate([prompt], max_tokens=5)
    monkeypatch.setattr(engine.model, "forward", forward)
    (result,) = engine.generate([prompt], max_tokens=5, temperature=0, logprobs=0)
    (score,) = engine.score([prompt + result.choices[0].token_ids])
    assert score.logprobs[100:].tolist() == approx(result.choices[0].logprobs, abs=1e-4)
    assert engine.scheduler.pages.held == 0


def test_load_refuses_on_every_rank(comm, tmp_path):
    """Also where one rank alone cannot read the model."""
    for path in ("nowhere", tmp_path if comm.rank == comm.size - 1 else SHIPPED):
        assert "checkpoint: got " in error_on_all_ranks(comm, partial(hpcinfer.load, path, comm))
    message = error_on_all_ranks(comm, partial(hpcinfer.load, SHIPPED, comm, kv_memory=1))
    assert message.startswith("kv-memory: got 1 bytes, need ")
    for options in ({"dtype": "int8"}, {"device": "tpu"}, {"layout": "tp=99"}, {"layout": "x"}):
        error_on_all_ranks(comm, partial(hpcinfer.load, SHIPPED, comm, **options))
    with pytest.raises(UsageError, match="zero cuts what the ranks of dp and cp hold alike"):
        hpcinfer.load(SHIPPED, comm=comm, layout=f"tp={comm.size},zero=allgather")


def test_learned_positions_bound_the_context(comm, shared_path):
    path = on_root(comm, partial(models.write_model, "gpt2", shared_path / "gpt2"))
    message = error_on_all_ranks(comm, partial(hpcinfer.load, path, comm, context=257))
    assert message.startswith("context: got 257, need at most 256")
    assert hpcinfer.load(path, comm=comm, context=9, kv_memory=1 << 22).context == 9


# --- Cost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["llama-gqa", "gpt_neox"])
def test_messages_of_a_run(comm, shared_path, case):
    """One Allreduce per half layer, one per layer where both halves share it, one for embeddings:
    each 2 (P-1)/P · T D words of 4 bytes."""
    engine = random_model(comm, case, shared_path)
    engine.score([models.tokens(case, 50), models.tokens(case, 7)])
    T, arch = 49 + 6, engine.model.arch
    one = 2 * (comm.size - 1) / comm.size * T * arch.D * 4
    purposes = ["layer"] if arch.parallel_residual else ["attention", "ffn"]
    for purpose in purposes:
        assert engine.ledger.calls("Allreduce", "tp", purpose) == arch.N
        assert engine.ledger.sent_bytes("Allreduce", "tp", purpose) == approx(arch.N * one)
    assert engine.ledger.sent_bytes("Allreduce", "tp", "embed") == approx(one)
    log_softmax = 2 * (comm.size - 1) / comm.size * 24 * T
    assert engine.ledger.sent_bytes("Allreduce", purpose="log_softmax") == approx(log_softmax)
    assert engine.ledger.sent_bytes() == approx((1 + len(purposes) * arch.N) * one + log_softmax)
