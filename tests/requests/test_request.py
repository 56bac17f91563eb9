"""Sampling refuses what cannot be run, by name, and folds what means the same."""

import pickle

import numpy as np
import pytest

from hpcinfer.errors import integer, shown
from hpcinfer.requests.request import Request
from hpcinfer.requests.sampling import Sampling

pytestmark = pytest.mark.single


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 10**400),
        ("temperature", "1"),
        ("temperature", True),
        ("temperature", None),
        ("top_p", 0),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("top_k", -2),
        ("top_k", 1.5),
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("seed", 2**64),
        ("seed", -(2**63) - 1),
        ("seed", 0.5),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("stop", ["x" * 1025]),
        ("stop", [1]),
        ("stop", {"a": 1}),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", 5),
        ("stop_token_ids", [2**31]),
        ("min_tokens", 17),
        ("min_tokens", -1),
        ("max_tokens", 0),
        ("max_tokens", 10**400),
        ("logprobs", 21),
        ("logprobs", -1),
        ("logprobs", True),
        ("ignore_eos", 1),
    ],
)
def test_refuses_by_name(field, value):
    with pytest.raises(ValueError, match=f"^sampling: got {field} = .*, need .*; ") as caught:
        Sampling(**{field: value})
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_folds_what_means_the_same():
    sampling = Sampling(
        temperature=1e-6, top_k=-1, seed=-1, stop="end", stop_token_ids=[np.int64(3)], n=np.int32(2)
    )
    assert sampling.temperature == 0.0 and sampling.top_k == 0
    assert sampling.seed == 2**64 - 1 and Sampling(seed=2**64 - 1) == Sampling(seed=-1)
    assert sampling.stop == ("end",) and sampling.stop_token_ids == (3,)
    assert type(sampling.n) is int and type(Sampling(top_p=np.float32(0.5)).top_p) is float
    assert hash(sampling) == hash(pickle.loads(pickle.dumps(sampling)))


def test_limits_themselves_are_allowed():
    Sampling(temperature=1000, top_p=1, min_p=1, n=128, logprobs=20, min_tokens=16, max_tokens=16)
    Sampling(temperature=0, logprobs=0, seed=-(2**63), stop=["x"] * 16, presence_penalty=-2)


def test_request_is_picklable():
    request = Request(0, 1, "a", "chat", (1, 2), Sampling(), 7)
    assert pickle.loads(pickle.dumps(request)) == request


def test_integer_by_type():
    assert integer(np.int64(5)) == 5 and type(integer(np.uint8(5))) is int
    assert [integer(x) for x in (True, np.bool_(True), 1.5, "1", None)] == [None] * 5
    assert integer(4.0) == 4 and integer(float("inf")) is integer(float("nan")) is None


def test_shown_is_short_for_anything():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for value in ("x" * 10**6, b"x" * 10**6, list(range(10**5)), deep, {"a": deep}, [10**6000]):
        assert len(shown(value)) <= 120
