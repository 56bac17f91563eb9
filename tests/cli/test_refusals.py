"""Layouts that make no sense: one line on every rank, with the reason and one that is taken."""

import random
import re
from functools import partial

import pytest
from helpers import layouts
from reference import models
from reference.parity import on_root

import hpcinfer
from hpcinfer.errors import UsageError, is_agreed
from hpcinfer.layout import Layout, parse_layout
from hpcinfer.model.layout_check import fault_of, refuse_unfit

CASES = ("llama-gqa", "mixtral", "deepseek_v3", "gpt2", "gpt_neox")
SIZES = (1, 2, 3, 4, 6, 8, 12)


def refusal(function, *arguments):
    """What a layout is refused with; "" if it is taken."""
    try:
        function(*arguments)
    except UsageError as error:
        return str(error)
    return ""


def suggestion(message):
    """The layout that a refusal names."""
    (text,) = re.findall(r"--layout (\S+)$", message)
    assert re.fullmatch(
        r"layout: got .+, need .+; (try|start \d+ ranks or write) --layout \S+", message
    )
    return text


def random_text(rng, size):
    """A layout of any words, whose axes often make the ranks launched."""
    words = {}
    if rng.random() < 0.3 and size > 1:
        M = rng.randint(1, size - 1)
        words = rng.choice(list(layouts.axes_of(M))) | {"afd": f"{M}:{size - M}"}
    elif rng.random() < 0.8:
        words = rng.choice(list(layouts.axes_of(size)))
    for word in ("pp", "dp", "cp", "tp"):
        if rng.random() < 0.05:
            words = words | {word: str(rng.choice([1, 2, 3, 4, 8]))}
    if rng.random() < 0.05:
        words = words | {"afd": f"{rng.randint(1, 5)}:{rng.randint(1, 5)}"}
    if rng.random() < 0.5:
        words = words | {"ep": str(rng.randint(1, 9))}
    for name, values in layouts.STRATEGIES.items():
        if rng.random() < 0.4:
            words = words | {name: rng.choice(values)}
    items = [f"{word}={value}" for word, value in words.items()]
    rng.shuffle(items)
    return ",".join(items)


@pytest.mark.single
@pytest.mark.parametrize("case", CASES)
def test_no_suggestion_is_refused_in_turn(case):
    """What the command line alone tells, then what the model tells."""
    rng, arch, refused = random.Random(case), layouts.architecture(case), 0
    for _ in range(2000):
        size = rng.choice(SIZES)
        text = text_before = random_text(rng, size)
        message = refusal(parse_layout, text, size)
        if message:
            refused += 1
            text = suggestion(message)
            assert not refusal(parse_layout, text, size), f"{message}, which is refused"

            # With the model at hand the offer is one that it takes
            message = refusal(parse_layout, text_before, size, fault_of(arch))
            offered = parse_layout(suggestion(message), size)
            assert not refusal(refuse_unfit, arch, offered), f"{message}, which is refused"
        message = refusal(refuse_unfit, arch, parse_layout(text, size))
        if message:
            text = suggestion(message)
            layout = parse_layout(text, size)
            assert not refusal(refuse_unfit, arch, layout), f"{message}, which is refused"
    assert 200 < refused < 1800


@pytest.mark.single
def test_a_layout_reads_as_it_is_written():
    """What a refusal or a report shows can be given to --layout again."""
    rng = random.Random(1)
    for _ in range(2000):
        size = rng.choice(SIZES)
        text = random_text(rng, size)
        if layouts.is_legal(text, size):
            layout = parse_layout(text, size)
            again = parse_layout(str(layout), size)
            assert str(again) == str(layout)
            if layout.cp > 1:
                assert again == layout


@pytest.mark.single
@pytest.mark.parametrize(
    ("text", "size", "reason", "nearest"),
    [
        ("pp=2,afd=2:2", 4, "afd gives every layer to both sides", "tp=2,ep=2,afd=2:2"),
        ("dp=2,afd=2:2,zero=allgather", 4, "no rank holds weights that zero", "dp=2,ep=2,afd=2:2"),
        ("pp=2,sp=on", 2, "sp cuts tokens over tp, which is 1", "pp=2"),
        ("tp=4,zero=broadcast", 4, "both are 1", "tp=4"),
        ("tp=4,ep=3", 4, "spread over 4 ranks, which ep=3 does not divide", "tp=4,ep=2"),
        ("dp=2,tp=2,pp=2,ep=8", 8, "spread over 4 ranks", "dp=2,pp=2,tp=2,ep=4"),
        ("afd=2:3,ep=2", 5, "spread over 3 ranks", "tp=2,ep=1,afd=2:3"),
        # Several faults at once: the first is named, none is left
        ("pp=2,dp=2,ep=3,afd=4:2,zero=allgather", 6, "afd gives", "dp=2,tp=2,ep=2,afd=4:2"),
        ("pp=2,sp=on,zero=allgather", 2, "sp cuts", "pp=2"),
        ("tp=4,cp=2,afd=2:2,sp=on", 4, "whose axes make 8 ranks", "tp=2,ep=2,afd=2:2,sp=on"),
        ("tp=3,afd=1:2,sp=on", 3, "whose axes make 3 ranks", "tp=1,ep=2,afd=1:2"),
        ("tp=2,afd=2:3", 4, "which is 5 ranks", "tp=4"),
    ],
)
def test_reason_and_nearest(text, size, reason, nearest):
    message = refusal(parse_layout, text, size)
    assert reason in message
    assert parse_layout(suggestion(message), size) == parse_layout(nearest, size)


@pytest.mark.single
@pytest.mark.parametrize(
    ("case", "layout", "reason", "nearest"),
    [
        ("llama-gqa", Layout(dp=2, ep=2), "llama has none", Layout(dp=2)),
        (
            "llama-gqa",
            Layout(cp=2, tp=4, prefill="ulysses"),
            "ranks already share the 2 key/value heads",
            Layout(cp=2, tp=4),
        ),
        (
            "llama-gqa",
            Layout(cp=2, tp=4, ep=2, prefill="ulysses"),
            "llama has none",
            Layout(cp=2, tp=4),
        ),
        ("llama-gqa", Layout(cp=2, tp=16), "there are 14 query heads", Layout(dp=2, tp=16)),
    ],
)
def test_reason_and_nearest_for_a_model(case, layout, reason, nearest):
    message = refusal(refuse_unfit, layouts.architecture(case), layout)
    assert reason in message
    assert parse_layout(suggestion(message), layout.size) == nearest


@pytest.mark.parametrize(
    "words", ["pp={P},sp=on", "tp={P},zero=allgather", "dp={P},ep={Q}", "afd=1:{P}", "tp={Q}"]
)
def test_every_rank_raises_the_same(comm, shared_path, words):
    path = on_root(comm, partial(models.write_model, "mixtral", shared_path / "model"))
    layout = words.format(P=comm.size, Q=comm.size + 1)
    with pytest.raises(UsageError) as raised:
        hpcinfer.load(path, comm, layout)
    assert is_agreed(raised.value)
    assert len(set(comm.allgather(str(raised.value)))) == 1
    assert layouts.is_legal(suggestion(str(raised.value)), comm.size)


def test_a_senseless_layout_is_answered_with_one_for_the_model(comm, shared_path):
    path = on_root(comm, partial(models.write_model, "llama-gqa", shared_path / "model"))
    with pytest.raises(UsageError, match="need another") as raised:
        hpcinfer.load(path, comm, f"tp={comm.size},ep={comm.size},zero=allgather")
    assert "ep=" not in suggestion(str(raised.value))
    with pytest.raises(UsageError, match="both are 1"):
        hpcinfer.load(shared_path / "nothing", comm, f"tp={comm.size},zero=allgather")


def test_a_model_without_experts_refuses_them_on_every_rank(comm, shared_path):
    path = on_root(comm, partial(models.write_model, "llama-gqa", shared_path / "model"))
    if comm.size == 1:
        pytest.skip("one rank has no ep but 1")
    with pytest.raises(UsageError, match="ep spreads experts, and llama has none") as raised:
        hpcinfer.load(path, comm, f"tp={comm.size},ep={comm.size}")
    assert len(set(comm.allgather(str(raised.value)))) == 1
    hpcinfer.load(path, comm, suggestion(str(raised.value)), kv_memory=1 << 24)
