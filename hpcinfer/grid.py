"""The grid of ranks: named axes, each a plain MPI communicator.

Ranks are numbered with tp running fastest, so that the axis with the most messages stays inside a
node, then cp, dp and pp::

    rank = ((pp_index · dp + dp_index) · cp + cp_index) · tp + tp_index
"""

import os
from copy import copy
from dataclasses import dataclass
from functools import cache

from hpcinfer.errors import UsageError, agreed

AXES = ("pp", "dp", "cp", "tp")
_STRATEGIES = {"prefill": ("ring", "ulysses", "split-q"), "decode": ("tree", "gather", "ring")}

# Launchers tell a process its rank and number before MPI starts; the first that is set holds.
_RANK_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
_SIZE_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def launcher_rank():
    """Rank of this process as its launcher says, without starting MPI; 0 outside a launcher."""
    return _first_number(_RANK_VARIABLES, 0)


def launcher_size():
    """Number of ranks as the launcher says, without starting MPI; None if it does not."""
    return _first_number(_SIZE_VARIABLES, None)


def world():
    """COMM_WORLD, started now, and checked against the number of processes launched.

    Raises
    ------
    RuntimeError
        If the launcher and MPI do not know each other, so that every process would be alone.
    """
    from mpi4py import MPI

    expected = launcher_size()
    if MPI.COMM_WORLD.size == 1 and expected is not None and expected > 1:
        raise RuntimeError(
            f"grid: got {expected} processes that MPI sees as 1 each, need one job; launch with "
            "the mpirun of the MPI in use, or srun with the --mpi= it supports (try --mpi=pmi2)"
        )
    return MPI.COMM_WORLD


@dataclass(frozen=True)
class Layout:
    """Length of every axis of the grid, and the strategies over it.

    Attributes
    ----------
    pp, dp, cp, tp : lengths
    prefill : ring, ulysses or split-q, how several new tokens meet keys that are cut over cp
    decode : tree, gather or ring, how one new token of a sequence does
    """

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    prefill: str = "ring"
    decode: str = "tree"

    @property
    def size(self):
        """Number of ranks that the layout needs."""
        return self.pp * self.dp * self.cp * self.tp

    def __str__(self):
        words = ("dp", "pp", "cp", "tp") + (("prefill", "decode") if self.cp > 1 else ())
        return ",".join(f"{word}={getattr(self, word)}" for word in words)


def parse_layout(text, size):
    """Layout written as ``dp=1,pp=1,cp=1,tp=2`` for `size` ranks.

    Axes that are left out are 1; an empty or missing text means tp=size.

    Raises
    ------
    UsageError
        For an unknown axis, a length that is no positive integer, or a product other than `size`.
    """
    if not text:
        return Layout(tp=size)
    values = {}
    for item in text.split(","):
        word, _, value = item.strip().partition("=")
        if word not in AXES and word not in _STRATEGIES:
            known = ", ".join((*AXES, *_STRATEGIES))
            raise UsageError(f"layout: got {item.strip()!r}, need WORD=VALUE, WORD one of {known}")
        if word in values:
            raise UsageError(f"layout: got {word} twice in {text!r}, need each word once")
        if word in _STRATEGIES:
            if value not in _STRATEGIES[word]:
                known = ", ".join(_STRATEGIES[word])
                raise UsageError(f"layout: got {item.strip()!r}, need {word} one of {known}")
            values[word] = value
        elif not value.isdecimal() or int(value) < 1:
            raise UsageError(f"layout: got {item.strip()!r}, need a length of 1 or more")
        else:
            values[word] = int(value)
    layout = Layout(**values)
    if layout.size != size:
        raise UsageError(
            f"layout: got {text!r}, which is {layout.size} ranks, need {size} as launched; "
            f"start {layout.size} ranks or write --layout tp={size}"
        )
    return layout


class Grid:
    """Communicators of one rank: the whole grid and one per axis.

    Attributes
    ----------
    layout : Layout
    comm : all ranks of the grid
    pp, dp, cp, tp : the ranks that differ from this one along that axis only
    tp_cp : the ranks that differ from this one along tp and cp, numbered with cp running fastest
    node : the ranks of the grid that share memory with this one
    """

    def __init__(self, comm, layout):
        if comm.size != layout.size:
            raise UsageError(f"layout: got {layout} on {comm.size} ranks, need {layout.size}")
        from mpi4py import MPI

        self.layout, self._splits = layout, {}
        self.comm = comm.Dup()
        self.comm.Set_name("world")
        index, rest = {}, comm.rank
        for axis in reversed(AXES):
            rest, index[axis] = divmod(rest, getattr(layout, axis))

        # Ranks with equal indices on all other axes form one communicator of the axis.
        for axis in AXES:
            setattr(self, axis, self._split((axis,), index))
        self.tp_cp = self._split(("tp", "cp"), index)
        self.node = self.comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.node.Set_name("node")

    def split(self, colour, key, name):
        """Communicator of the ranks of tp x cp with equal `colour`, ordered by `key`; made once."""
        if name not in self._splits:
            comm = self.tp_cp.Split(colour, key)
            comm.Set_name(name)
            self._splits[name] = comm
        return self._splits[name]

    def _split(self, axes, index):
        """Communicator of the ranks that differ along `axes` only, the last running fastest."""
        colour = key = 0
        for axis in AXES:
            colour = colour * getattr(self.layout, axis) + (0 if axis in axes else index[axis])
        for axis in axes:
            key = key * getattr(self.layout, axis) + index[axis]
        comm = self.comm.Split(colour, key)
        comm.Set_name(" x ".join(axes))
        return comm

    @property
    def is_root(self):
        """True on the one rank that reads input, prints and writes results."""
        return self.comm.rank == 0


def grid_of(comm, layout):
    """The grid of a layout on a communicator; its communicators are made once, as MPI has few.

    Collective over `comm`.
    """
    grids = comm.Get_attr(_grids_key())
    if grids is None:
        grids = {}
        comm.Set_attr(_grids_key(), grids)
    lengths = tuple(getattr(layout, axis) for axis in AXES)
    if lengths not in grids:
        grids[lengths] = Grid(comm, layout)
    grid = copy(grids[lengths])
    grid.layout = layout
    return grid


@cache
def _grids_key():
    from mpi4py import MPI

    return MPI.Comm.Create_keyval()


def agree(comm, function, *arguments):
    """Result of `function` on the root, on every rank; its error is raised on every rank.

    For what one rank must do alone (open a file, parse a line): the others wait for the verdict, so
    that all go on or all stop.
    """
    outcome = error = None
    if comm.rank == 0:
        try:
            outcome = function(*arguments)
        except Exception as raised:
            error = raised
    outcome, error = comm.bcast((outcome, error), 0)
    if error is not None:
        raise agreed(error)
    return outcome


def agree_all(comm, function, *arguments):
    """Own result of `function` on every rank; if it fails on any, the first error on all."""
    outcome = error = None
    try:
        outcome = function(*arguments)
    except Exception as raised:
        error = raised
    errors = [e for e in comm.allgather(error) if e is not None]
    if errors:
        raise agreed(errors[0])
    return outcome


def _first_number(names, default):
    for name in names:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return default
