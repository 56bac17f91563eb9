"""The grid of ranks: named axes, each a plain MPI communicator.

Ranks are numbered with tp running fastest, so that the axis with the most messages stays inside a
node, then cp, dp and pp::

    rank = ((pp_index · dp + dp_index) · cp + cp_index) · tp + tp_index

With attention and FFN on ranks of their own (afd=A:F) the first A ranks are such a grid, and the
others, the FFN side, are all along tp. Experts are spread over existing axes: over tp and cp
of a replica where ep divides their number, else over all ranks of a pipeline stage.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from hpcinfer.errors import UsageError, agreed, portable
from hpcinfer.heartbeat import waiting
from hpcinfer.layout import AXES, Layout

if TYPE_CHECKING:
    from mpi4py.MPI import Comm, Intercomm, Intracomm


class Grid:
    """Communicators of one rank: the whole grid and one per axis.

    Attributes
    ----------
    layout : Layout
    comm : all ranks of the grid
    pp, dp, cp, tp : the ranks that differ from this one along that axis only; on the FFN side tp is
        all of it
    tp_cp : the ranks that differ from this one along tp and cp, numbered with cp running fastest
    dp_cp : those that differ along dp and cp
    replica : those of the same replica, along pp, cp and tp
    stage : those of the same pipeline stage, along dp, cp and tp
    experts : those over which experts are spread: `tp_cp`, `stage` or the FFN side; None for ep=1
        without sides
    role : "attention" or "ffn"; "" if every rank does both
    inter : intercommunicator to the other side, or None
    node : the ranks of the grid that share memory with this one
    same_weights : those of the node that differ from this one along dp and cp only
    """

    pp: Comm
    dp: Comm
    cp: Comm
    tp: Comm

    def __init__(self, comm: Intracomm, layout: Layout):
        if comm.size != layout.size:
            raise UsageError(f"layout: got {layout} on {comm.size} ranks, need {layout.size}")
        from mpi4py import MPI

        # Know who has the communicators: this grid, and copies of it (`grid_of`).
        self.layout = layout
        self._splits: dict[str, Comm] = {}
        self._first: Grid | None = self
        self._users = 1
        self._forget: Callable[[], Any] = _nothing

        # Take the ranks together, then those of a node, then those of a side.
        self.comm = comm.Dup()
        self.comm.Set_name("world")
        self.node = self.comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.node.Set_name("node")
        self.role = ""
        self._base: Any = self.comm
        self.inter: Intercomm | None = None
        self._lengths = {axis: getattr(layout, axis) for axis in AXES}
        if layout.afd:
            self._take_sides(*layout.afd)

        self._take_axes()

    def _take_axes(self) -> None:
        """Communicators along the axes: of the ranks with equal indices on all others."""
        layout, index = self.layout, self._index()
        for axis in AXES:
            setattr(self, axis, self._split((axis,), index))
        self.tp_cp = self._split(("tp", "cp"), index)
        self.dp_cp = self._split(("dp", "cp"), index)
        self.replica = self._split(("pp", "cp", "tp"), index)
        self.stage = self._split(("dp", "cp", "tp"), index)

        # Find those that have equal weights, and those over which experts are spread.
        alike = (int(self.role == "ffn") * layout.pp + index["pp"]) * layout.size + index["tp"]
        self.same_weights = self.node.Split(alike, self.comm.rank)
        self.same_weights.Set_name("same weights")
        self.experts: Comm | None = None
        if self.role == "ffn":
            self.experts = self.tp
        elif layout.ep > 1 and not layout.afd:
            self.experts = self.stage if layout.experts_over_dp else self.tp_cp

    def split(self, colour: int, key: int, name: str) -> Comm:
        """Communicator of the ranks of tp x cp with equal `colour`, ordered by `key`; made once."""
        if name not in self._splits:
            comm = self.tp_cp.Split(colour, key)
            comm.Set_name(name)
            self._splits[name] = comm
        return self._splits[name]

    def release(self) -> None:
        """Give the grid back, once or more often; collective over its ranks.

        Who has the communicators last frees them.
        """
        # Leave them to others that have them too.
        first, self._first = self._first, None
        if first is None:
            return
        first._users -= 1
        if first._users > 0:
            return

        # Free them.
        first._forget()
        for comm in first._own_communicators():
            comm.Free()

    def _own_communicators(self) -> list[Comm]:
        """Each communicator that was made for the grid, once; those of all ranks last."""
        made: list[Comm] = [*self._splits.values(), self.same_weights, self.stage, self.replica]
        made += [self.dp_cp, self.tp_cp, *(getattr(self, axis) for axis in AXES), self.node]
        if self.inter is not None:
            made += [self.inter, self._base]
        return [*made, self.comm]

    def _take_sides(self, attention: int, ffn: int) -> None:
        """Divide the ranks in attention and FFN side, which meet over an intercommunicator."""
        attends = self.comm.rank < attention
        self.role = "attention" if attends else "ffn"
        self._base = self.comm.Split(int(not attends))
        self.inter = self._base.Create_intercomm(0, self.comm, attention if attends else 0)
        self.inter.Set_name("afd")
        if not attends:
            self._lengths = dict.fromkeys(AXES, 1) | {"tp": ffn}

    def _index(self) -> dict[str, int]:
        """This rank's place along each axis of its side."""
        index, rest = {}, self._base.rank
        for axis in reversed(AXES):
            rest, index[axis] = divmod(rest, self._lengths[axis])
        return index

    def _split(self, axes: tuple[str, ...], index: dict[str, int]) -> Comm:
        """Communicator of the ranks that differ along `axes` only, the last running fastest."""
        colour = key = 0
        for axis in AXES:
            colour = colour * self._lengths[axis] + (0 if axis in axes else index[axis])
        for axis in axes:
            key = key * self._lengths[axis] + index[axis]
        comm = self._base.Split(colour, key)
        comm.Set_name(" x ".join(axes))
        return comm

    @property
    def is_root(self) -> bool:
        """True on the one rank that reads input, prints and writes results."""
        return self.comm.rank == 0

    @property
    def leaders(self) -> list[int]:
        """Ranks of `comm` that are the leaders of their replicas."""
        layout = self.layout
        return [d * layout.cp * layout.tp for d in range(layout.dp)]

    @property
    def is_leader(self) -> bool:
        """True on the one rank of a replica that reads its requests and hands on its results."""
        return self.replica.rank == 0 and self.role != "ffn"

    @property
    def shares(self) -> tuple[int, int]:
        """(ep, tp) by which experts are cut over the ranks of `experts`."""
        if self.experts is None:
            raise ValueError("grid: got shares of experts, need ranks over which these are spread")
        return self.layout.ep, self.experts.size // self.layout.ep


def grid_of(comm: Intracomm, layout: Layout) -> Grid:
    """The grid of a layout on a communicator, whose communicators engines have together.

    Collective over `comm`, as MPI's communicators are few: they are made for the first engine, and
    freed when the last one has given them back with `release`.
    """
    grids: Any = comm.Get_attr(_grids_key())
    if grids is None:
        grids = {}
        comm.Set_attr(_grids_key(), grids)

    # Make the communicators, or find them by the lengths that they follow from.
    lengths = tuple(getattr(layout, word) for word in (*AXES, "ep", "afd"))
    first = grids.get(lengths)
    if first is None:
        first = grids[lengths] = Grid(comm, layout)
        first._users, first._forget = 0, partial(grids.pop, lengths)

    # Hand out a grid of its own, which is given back by itself.
    first._users += 1
    grid = copy(first)
    grid.layout, grid._first = layout, first
    return grid


def _nothing() -> None:
    """Nothing knows a grid that was made by itself."""


@cache
def _grids_key() -> int:
    """Under what a communicator knows the grids that were made of it."""
    from mpi4py import MPI

    return MPI.Comm.Create_keyval()


def agree(comm: Comm, function: Callable, *arguments: Any) -> Any:
    """Result of `function` on the root, on every rank; its error is raised on every rank.

    For what one rank must do alone (open a file, parse a line): the others wait for the verdict, so
    that all go on or all stop.
    """
    # Let the root try.
    outcome = error = None
    if comm.rank == 0:
        try:
            outcome = function(*arguments)
        except BaseException as raised:
            error = portable(raised)

    # Hear how it went.
    with waiting("bcast", comm, "agree"):
        outcome, error = comm.bcast((outcome, error), 0)
    if error is not None:
        raise agreed(error)
    return outcome


def agree_all(comm: Comm, function: Callable, *arguments: Any) -> Any:
    """Own result of `function` on every rank; if it fails on any, the first error on all."""
    # Try, then hear whether any rank failed.
    outcome = error = None
    try:
        outcome = function(*arguments)
    except BaseException as raised:
        error = portable(raised)
    with waiting("allgather", comm, "agree"):
        errors = [e for e in comm.allgather(error) if e is not None]
    if errors:
        raise agreed(errors[0])
    return outcome
