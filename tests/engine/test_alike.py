"""Calls that differ from rank to rank are refused on all; a text alone is one prompt."""

import json
import shutil

import numpy as np
import pytest
from helpers.paths import SHIPPED
from mpi4py import MPI

import hpcinfer
from hpcinfer.engine.alike import OF_COMMAND, digest, refuse_different
from hpcinfer.errors import is_agreed
from hpcinfer.job import start
from hpcinfer.job.settings import JobSettings

PROMPT = "What is 27 + 45?"
SETTINGS = {"kv_memory": 1 << 24, "context": 256, "dtype": "float32"}


@pytest.fixture(scope="module")
def engine(comm):
    with hpcinfer.load(SHIPPED, comm, **SETTINGS) as loaded:
        yield loaded


def refused(comm, call):
    """What all ranks are refused with."""
    with pytest.raises(ValueError) as raised:
        call()
    assert is_agreed(raised.value)
    assert len(set(comm.allgather(str(raised.value)))) == 1
    return str(raised.value)


def test_a_text_or_an_object_is_one_prompt(engine):
    options = {"max_tokens": 4, "temperature": 0}
    expected = engine.generate([PROMPT], **options)[0].choices[0].text
    for items in (PROMPT, {"prompt": PROMPT}, iter([PROMPT])):
        [result] = engine.generate(items, **options)
        assert result.choices[0].text == expected
    assert len(engine.score(PROMPT)) == len(engine.extract(PROMPT, layers=[0])) == 1
    assert engine.generate([]) == []


def test_ranks_that_say_different_things_are_refused(comm, engine):
    if comm.size == 1:
        pytest.skip("one rank agrees with itself")
    for call in (engine.generate, engine.score, engine.extract):
        message = refused(comm, lambda call=call: call([f"{PROMPT} {comm.rank}"]))
        assert "other items on rank 1 than on rank 0" in message and "COMM_SELF" in message
    assert "options" in refused(comm, lambda: engine.generate(PROMPT, seed=comm.rank))
    assert "options" in refused(comm, lambda: engine.extract(PROMPT, layers=[comm.rank % 2]))
    items = None if comm.rank == 0 else PROMPT
    assert "no items on rank 0" in refused(comm, lambda: engine.score(items))


def test_ranks_may_leave_the_items_to_the_first(comm, engine):
    items = [PROMPT] if comm.rank == 0 else None
    [result] = engine.generate(items, max_tokens=2, temperature=0)
    assert len(set(comm.allgather(result.choices[0].text))) == 1


@pytest.mark.parametrize(
    "options", [{"seed": 1}, {"layout": "nonsense"}, {"dtype": "bfloat16"}, {"context": 64}]
)
def test_arguments_of_load_are_compared(comm, options):
    if comm.size == 1:
        pytest.skip("one rank agrees with itself")
    mine = options if comm.rank == comm.size - 1 else {}
    message = refused(comm, lambda: hpcinfer.load(SHIPPED, comm, **(SETTINGS | mine)))
    assert f"other arguments of load on rank {comm.size - 1}" in message


def test_each_rank_may_have_prompts_of_its_own(comm):
    with hpcinfer.load(SHIPPED, MPI.COMM_SELF, **SETTINGS) as alone:
        [result] = alone.generate(f"What is {comm.rank} + 45?", max_tokens=1, temperature=0)
    assert result.prompt_tokens > 0


@pytest.mark.single
def test_digests_tell_values_apart_and_not_their_kinds():
    same = [[1, 2], (1, 2), np.array([1, 2]), [np.int64(1), 2]]
    assert len({digest([value]) for value in same}) == 1
    others = ["12", ["1", 2], {"1": 2}, [1, 2, 3], [[1], 2], "\ud800"]
    assert len({digest([value]) for value in [same[0], *others]}) == len(others) + 1
    assert digest([{"a": 1, "b": 2}]) == digest([{"b": 2, "a": 1}])


def test_an_own_seed_means_the_same_under_any_name(engine):
    base = {"prompt": PROMPT, "temperature": 2.0, "max_tokens": 8, "ignore_eos": True}
    own = [base | {"custom_id": name, "seed": 5} for name in "ab"]
    spread = [base | {"custom_id": name} for name in "cd"]
    tokens = [r.choices[0].token_ids for r in engine.generate(own + spread)]
    assert tokens[0] == tokens[1] and tokens[2] != tokens[3]


def test_commands_that_differ_are_refused_but_for_paths_of_a_node(comm):
    def compare(**own):
        words = {"model": "M", "input": "in.jsonl", "output": ["out.h5"]} | own
        made = start._alike(JobSettings("generate", **words))
        refuse_different(comm, "options", made, remedy=OF_COMMAND)

    compare(model=f"/node{comm.rank}/M", trace=f"/node{comm.rank}/trace", kv_memory=comm.rank)
    if comm.size > 1:
        message = refused(comm, lambda: compare(output=[f"out-{comm.rank}.h5"]))
        assert message.endswith("start every rank with the same command")


def test_other_models_are_refused_before_their_weights_are_read(comm, tmp_path):
    if comm.size == 1:
        pytest.skip("one rank agrees with itself")
    path = SHIPPED
    if comm.rank == comm.size - 1:
        path = shutil.copytree(SHIPPED, tmp_path / "model")
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    message = refused(comm, lambda: hpcinfer.load(path, comm, **SETTINGS))
    assert f"other model on rank {comm.size - 1} than on rank 0" in message
