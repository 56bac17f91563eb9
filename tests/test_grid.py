"""Layouts, the communicators of every axis, and verdicts that all ranks share."""

import itertools
import math

import pytest

from hpcinfer.errors import Interrupted, Stopped, UsageError, exit_code, is_agreed
from hpcinfer.grid import Grid, agree, agree_all
from hpcinfer.launcher import _RANK_VARIABLES, _SIZE_VARIABLES, launcher_rank, launcher_size, world
from hpcinfer.layout import AXES, Layout, parse_layout


def products(size):
    """All layouts of `size` ranks."""
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    for lengths in itertools.product(divisors, repeat=len(AXES)):
        if math.prod(lengths) == size:
            yield Layout(**dict(zip(AXES, lengths, strict=True)))


def test_layout_as_text_and_back():
    for layout in products(12):
        assert parse_layout(str(layout), 12) == layout
    assert parse_layout(None, 6) == parse_layout("", 6) == Layout(tp=6)
    assert parse_layout(" tp=2 , dp=3", 6) == Layout(dp=3, tp=2)
    text = "dp=1,pp=1,cp=2,tp=3,prefill=ulysses,decode=gather"
    assert str(parse_layout(text, 6)) == text
    assert Layout(pp=2, dp=3, cp=4, tp=5).size == 120


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("xp=2", "got 'xp=2', need WORD=VALUE, WORD one of pp, dp, cp, tp, ep, afd"),
        ("4", "got '4', need WORD=VALUE"),
        ("tp=2,", "got '', need WORD=VALUE"),
        ("tp=2,tp=2", "got tp twice"),
        ("tp", "got 'tp', need a length of 1 or more"),
        ("tp=0", "got 'tp=0', need a length of 1 or more"),
        ("tp=-4", "got 'tp=-4', need a length of 1 or more"),
        ("tp=2.0", "got 'tp=2.0', need a length of 1 or more"),
        ("tp=two", "got 'tp=two', need a length of 1 or more"),
        ("tp=2,dp=3", "which is 6 ranks, need 4 as launched; start 6 ranks or write --layout tp=4"),
        ("tp=4,prefill=spiral", "got 'prefill=spiral', need prefill one of ring, ulysses, split-q"),
        ("tp=4,decode=", "got 'decode=', need decode one of tree, gather, ring"),
        ("dp=1", "which is 1 ranks, need 4 as launched"),
    ],
)
def test_layout_refuses(text, message):
    with pytest.raises(UsageError) as raised:
        parse_layout(text, 4)
    assert message in str(raised.value)
    assert str(raised.value).startswith("layout: ")


def test_every_axis_has_its_communicator(comm):
    """Ranks along an axis differ in its index alone; tp runs fastest, pp slowest."""
    for layout in products(comm.size):
        made = Grid(comm, layout)
        assert (made.comm.size, made.comm.rank) == (comm.size, comm.rank)
        index = {axis: getattr(made, axis).rank for axis in AXES}
        rank = ((index["pp"] * layout.dp + index["dp"]) * layout.cp + index["cp"]) * layout.tp
        assert rank + index["tp"] == comm.rank

        everywhere = made.comm.allgather(index)
        for axis in AXES:
            along = getattr(made, axis)
            assert along.size == getattr(layout, axis)
            assert along.Get_name() == axis
            alike = [
                r
                for r, other in enumerate(everywhere)
                if all(other[a] == index[a] for a in AXES if a != axis)
            ]
            assert along.allgather(comm.rank) == alike
        # Over tp and cp together, cp runs fastest.
        both = made.tp_cp
        assert both.size == layout.tp * layout.cp
        assert both.rank == index["tp"] * layout.cp + index["cp"]
        alike = [
            r for r in range(comm.size) if all(everywhere[r][a] == index[a] for a in ("pp", "dp"))
        ]
        assert sorted(both.allgather(comm.rank)) == alike
        assert made.node.allreduce(1) == made.node.size <= comm.size
        assert made.is_root == (comm.rank == 0)
        for name in ("comm", "node", "tp_cp", *AXES):
            getattr(made, name).Free()


def test_grid_refuses_another_number_of_ranks(comm):
    with pytest.raises(UsageError, match=f"on {comm.size} ranks, need {comm.size + 1}"):
        Grid(comm, Layout(tp=comm.size + 1))


def test_launcher_variables(monkeypatch):
    for name in (*_RANK_VARIABLES, *_SIZE_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    assert (launcher_rank(), launcher_size()) == (0, None)
    monkeypatch.setenv("SLURM_PROCID", "5")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert (launcher_rank(), launcher_size()) == (5, 8)
    monkeypatch.setenv("PMI_RANK", "3")
    monkeypatch.setenv("PMI_SIZE", "words")
    assert (launcher_rank(), launcher_size()) == (3, 8)


def test_world(comm):
    assert world().size == comm.size


@pytest.mark.single
def test_processes_that_do_not_know_each_other_are_refused(monkeypatch):
    """A launcher and an MPI that do not fit give N lone processes."""
    monkeypatch.setenv("PMI_SIZE", "3")
    with pytest.raises(RuntimeError, match="grid: got 3 processes that MPI sees as 1 each"):
        world()


def fail_on(ranks, comm):
    """Raise on the given ranks, each with a message of its own; else return the rank."""
    if comm.rank in ranks:
        raise ValueError(f"room: got rank {comm.rank}")
    return comm.rank


def messages(comm, function, *arguments):
    """Each rank's result of a call, or (type, message, agreed) of its error; gathered."""
    try:
        mine = function(comm, *arguments)
    except BaseException as error:
        mine = (type(error), str(error), is_agreed(error))
    return comm.allgather(mine)


def panic(*ranks, comm):
    """Raise on the given ranks what is no Exception and cannot be sent."""
    if comm.rank in ranks:
        raise type("PanicException", (BaseException,), {})("called unwrap")


def test_a_panic_is_agreed_on(comm):
    error = (RuntimeError, "PanicException: called unwrap", True)
    assert messages(comm, agree, lambda: panic(0, comm=comm)) == [error] * comm.size
    last = comm.size - 1
    assert messages(comm, agree_all, lambda: panic(last, comm=comm)) == [error] * comm.size


@pytest.mark.parametrize("error", [Interrupted(15), Stopped("stopped"), UsageError("no")])
def test_an_error_with_an_exit_code_keeps_it_on_all_ranks(comm, error):
    def fail():
        raise error

    with pytest.raises(type(error)) as caught:
        agree(comm, fail)
    assert str(caught.value) == str(error) and exit_code(caught.value) == exit_code(error)


def test_agree_gives_the_root_to_all(comm):
    assert (
        messages(comm, agree, lambda a: ("root", a, comm.rank), 7) == [("root", 7, 0)] * comm.size
    )


def test_agree_raises_the_error_of_the_root_on_all(comm):
    error = (ValueError, "room: got rank 0", True)
    assert messages(comm, agree, fail_on, {0}, comm) == [error] * comm.size


def test_agree_all_keeps_each_result(comm):
    assert messages(comm, agree_all, lambda: comm.rank**2) == [r**2 for r in range(comm.size)]


def test_agree_all_raises_the_first_error_on_all(comm):
    """Whether one rank fails or several."""
    last = comm.size - 1
    for ranks, first in (({last}, last), ({last, last // 2}, last // 2), (set(range(99)), 0)):
        error = (ValueError, f"room: got rank {first}", True)
        assert messages(comm, agree_all, fail_on, ranks, comm) == [error] * comm.size
