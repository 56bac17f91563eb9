"""The grid of ranks: named axes, each a plain MPI communicator.

Ranks are numbered with tp running fastest, so that the axis with the most messages stays inside a
node, then cp, dp and pp::

    rank = ((pp_index · dp + dp_index) · cp + cp_index) · tp + tp_index

With attention and FFN on ranks of their own (afd=M:N) the first M ranks are such a grid, and the
other N, the FFN side, are N ranks along tp. Experts are spread over existing axes: over tp and cp
of a replica where ep divides their number, else over all ranks of a pipeline stage.
"""

import os
import sys
import threading
import time
from copy import copy
from dataclasses import dataclass, replace
from functools import cache

from hpcinfer.errors import UsageError, agreed
from hpcinfer.where import waiting

AXES = ("pp", "dp", "cp", "tp")
_STRATEGIES = {
    "prefill": ("ring", "ulysses", "split-q"),
    "decode": ("tree", "gather", "ring"),
    "sp": ("off", "on"),
    "zero": ("off", "broadcast", "allgather"),
    "stages": ("layers", "memory", "time"),
}
_WORDS = (*AXES, "ep", "afd", *_STRATEGIES)

# Seconds that a launcher is given to pass on what was printed before a job is aborted, which drops
# what it still holds; and that MPI is given to abort it.
_FORWARD_S, _ABORT_S = 0.3, 1.0

# Launchers tell a process its rank and number before MPI starts; the first that is set holds.
_RANK_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
_SIZE_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def launcher_rank():
    """Rank of this process as its launcher says, without starting MPI; 0 outside a launcher."""
    return _first_number(_RANK_VARIABLES, 0)


def launcher_size():
    """Number of ranks as the launcher says, without starting MPI; None if it does not."""
    return _first_number(_SIZE_VARIABLES, None)


def job_end_s():
    """When the batch system ends this job, in seconds since 1970; None if it does not say."""
    return _first_number(("SLURM_JOB_END_TIME",), None)


def abort(code):
    """End every rank of the job at once with exit code `code`; any thread may call this."""
    # What was printed needs a moment to get through the launcher; MPI may return, or never do so.
    time.sleep(_FORWARD_S)
    MPI = sys.modules.get("mpi4py.MPI")
    if MPI is not None and MPI.Is_initialized() and not MPI.Is_finalized():
        last = threading.Timer(_ABORT_S, os._exit, (code,))
        last.daemon = True
        last.start()
        MPI.COMM_WORLD.Abort(code)
    os._exit(code)


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
    pp, dp, cp, tp : lengths; of the attention side where there is one
    ep : ranks over which experts are spread, a divisor of cp · tp, of dp · cp · tp, or of the ranks
        of the FFN side, which are all of them where nothing is said
    afd : (M, N) ranks of attention and FFN side; None if every rank does both
    prefill : ring, ulysses or split-q, how several new tokens meet keys that are cut over cp
    decode : tree, gather or ring, how one new token of a sequence does
    sp : on or off, whether tokens are cut over tp outside the products
    zero : off, broadcast or allgather, how parameters that dp and cp hold alike are kept once
    stages : layers, memory or time, what is equal in the stages of the pipeline
    """

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    afd: tuple | None = None
    prefill: str = "ring"
    decode: str = "tree"
    sp: str = "off"
    zero: str = "off"
    stages: str = "layers"

    @property
    def size(self):
        """Number of ranks that the layout needs."""
        return self.pp * self.dp * self.cp * self.tp + (self.afd[1] if self.afd else 0)

    @property
    def lockstep(self):
        """True if the replicas meet inside a step, so that they must take their steps together."""
        return self.dp > 1 and (self.zero != "off" or self.afd is not None or self.experts_over_dp)

    @property
    def experts_over_dp(self):
        """True if experts are spread over the replicas too."""
        return self.afd is None and (self.cp * self.tp) % self.ep != 0

    def __str__(self):
        shown = dict.fromkeys(("dp", "pp", "cp", "tp"), True)
        shown |= {"ep": self.ep > 1 or self.afd is not None, "afd": self.afd is not None}
        shown |= {"prefill": self.cp > 1, "decode": self.cp > 1}
        shown |= {
            word: getattr(self, word) != _STRATEGIES[word][0] for word in ("sp", "zero", "stages")
        }
        values = {word: getattr(self, word) for word in shown} | {
            "afd": "{}:{}".format(*self.afd or "--")
        }
        return ",".join(f"{word}={values[word]}" for word, show in shown.items() if show)


def parse_layout(text, size):
    """Layout written as ``dp=1,pp=1,cp=1,tp=2`` for `size` ranks.

    Axes that are left out are 1; where none is named all ranks (of the attention side) are along
    tp.

    Raises
    ------
    UsageError
        For an unknown word, a length that is no positive integer, a product other than `size`, or a
        combination that makes no sense; with the nearest one that does.
    """
    values = {}
    for item in (text or "").split(",") if text else ():
        word, _, value = item.strip().partition("=")
        if word not in _WORDS:
            known = ", ".join(_WORDS)
            raise UsageError(f"layout: got {item.strip()!r}, need WORD=VALUE, WORD one of {known}")
        if word in values:
            raise UsageError(f"layout: got {word} twice in {text!r}, need each word once")
        values[word] = _value(word, value, item.strip())
    afd = values.get("afd")
    if not values.keys() & set(AXES):
        values["tp"] = afd[0] if afd else size
    if afd:
        values.setdefault("ep", afd[1])
    layout = Layout(**values)
    if layout.size != size and not afd:
        raise UsageError(
            f"layout: got {text!r}, which is {layout.size} ranks, need {size} as launched; "
            f"start {layout.size} ranks or write --layout tp={size}"
        )
    if afd:
        _refuse_sides(layout, text, size)
    refuse(layout, senseless)
    return layout


def _value(word, value, item):
    """Value of one word of a layout."""
    if word in _STRATEGIES:
        if value not in _STRATEGIES[word]:
            known = ", ".join(_STRATEGIES[word])
            raise UsageError(f"layout: got {item!r}, need {word} one of {known}")
        return value
    if word == "afd":
        sides = value.split(":")
        if len(sides) != 2 or not all(n.isdecimal() and int(n) > 0 for n in sides):
            raise UsageError(f"layout: got {item!r}, need afd=M:N, M attention and N FFN ranks")
        return tuple(int(n) for n in sides)
    if not value.isdecimal() or int(value) < 1:
        raise UsageError(f"layout: got {item!r}, need a length of 1 or more")
    return int(value)


def _refuse_sides(layout, text, size):
    """Refuse sides that are not the ranks launched and the axes' product."""
    M, N = layout.afd
    if M + N != size:
        raise UsageError(
            f"layout: got {text!r}, which is {M + N} ranks, need {size} as launched; start "
            f"{M + N} ranks or write --layout tp={size}"
        )
    axes = layout.pp * layout.dp * layout.cp * layout.tp
    if axes != M:
        nearest = nearest_without(senseless, replace(layout, pp=1, dp=1, cp=1, tp=M))
        raise UsageError(
            f"layout: got {text!r}, whose axes make {axes} ranks, need {M}, the attention side of "
            f"afd={M}:{N}; try --layout {nearest}"
        )


def senseless(layout):
    """Why a combination makes no sense for any model, and one that is better; None if it does."""
    if layout.afd and layout.pp > 1:
        reason = "afd gives every layer to both sides, pp gives layers to stages"
        return reason, replace(layout, pp=1, tp=layout.tp * layout.pp)
    if layout.afd and layout.zero != "off":
        reason = "with afd no rank holds weights that zero could cut beside another's"
        return reason, replace(layout, zero="off")
    if layout.sp == "on" and layout.tp == 1:
        return "sp cuts tokens over tp, which is 1", replace(layout, sp="off")
    if layout.zero != "off" and layout.dp * layout.cp == 1:
        reason = "zero cuts what the ranks of dp and cp hold alike, and both are 1"
        return reason, replace(layout, zero="off")
    over = layout.afd[1] if layout.afd else layout.dp * layout.cp * layout.tp
    if over % layout.ep:
        reason = f"experts are spread over {over} ranks, which ep={layout.ep} does not divide"
        divisors = [n for n in range(1, over + 1) if over % n == 0 and n <= layout.ep]
        return reason, replace(layout, ep=max(divisors))
    return None


def refuse(layout, fault):
    """Refuse a layout that has a fault, with the reason and the nearest one that has none.

    Parameters
    ----------
    fault : function of a layout: the reason and a better layout, or None

    Raises
    ------
    UsageError
    """
    found = fault(layout)
    if found is not None:
        reason, better = found
        raise UsageError(
            f"layout: got {layout}, need another: {reason}; "
            f"try --layout {nearest_without(fault, better)}"
        )


def nearest_without(fault, layout):
    """A layout bettered until `fault` finds nothing more in it."""
    while (found := fault(layout)) is not None:
        layout = found[1]
    return layout


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
    side : "attention" or "ffn"; "" if every rank does both
    inter : intercommunicator to the other side, or None
    node : the ranks of the grid that share memory with this one
    alike : those of the node that differ from this one along dp and cp only
    """

    def __init__(self, comm, layout):
        if comm.size != layout.size:
            raise UsageError(f"layout: got {layout} on {comm.size} ranks, need {layout.size}")
        from mpi4py import MPI

        self.layout, self._splits = layout, {}
        self.comm = comm.Dup()
        self.comm.Set_name("world")
        self.node = self.comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.node.Set_name("node")
        self.side, self.inter, self._base = "", None, self.comm
        self._lengths = {axis: getattr(layout, axis) for axis in AXES}
        if layout.afd:
            self._take_sides(*layout.afd)

        # Ranks with equal indices on all other axes form one communicator of the axis.
        index, rest = {}, self._base.rank
        for axis in reversed(AXES):
            rest, index[axis] = divmod(rest, self._lengths[axis])
        for axis in AXES:
            setattr(self, axis, self._split((axis,), index))
        self.tp_cp = self._split(("tp", "cp"), index)
        self.dp_cp = self._split(("dp", "cp"), index)
        self.replica = self._split(("pp", "cp", "tp"), index)
        self.stage = self._split(("dp", "cp", "tp"), index)
        alike = (int(self.side == "ffn") * layout.pp + index["pp"]) * comm.size + index["tp"]
        self.alike = self.node.Split(alike, self.comm.rank)
        self.alike.Set_name("alike")
        self.experts = None
        if self.side == "ffn":
            self.experts = self.tp
        elif layout.ep > 1 and not layout.afd:
            self.experts = self.stage if layout.experts_over_dp else self.tp_cp

    def split(self, colour, key, name):
        """Communicator of the ranks of tp x cp with equal `colour`, ordered by `key`; made once."""
        if name not in self._splits:
            comm = self.tp_cp.Split(colour, key)
            comm.Set_name(name)
            self._splits[name] = comm
        return self._splits[name]

    def _take_sides(self, M, N):
        """Divide the ranks in attention and FFN side, which meet over an intercommunicator."""
        attends = self.comm.rank < M
        self.side = "attention" if attends else "ffn"
        self._base = self.comm.Split(int(not attends))
        self.inter = self._base.Create_intercomm(0, self.comm, M if attends else 0)
        self.inter.Set_name("afd")
        if not attends:
            self._lengths = dict.fromkeys(AXES, 1) | {"tp": N}

    def _split(self, axes, index):
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
    def is_root(self):
        """True on the one rank that reads input, prints and writes results."""
        return self.comm.rank == 0

    @property
    def leaders(self):
        """Ranks of `comm` that are the leaders of their replicas."""
        layout = self.layout
        return [d * layout.cp * layout.tp for d in range(layout.dp)]

    @property
    def is_leader(self):
        """True on the one rank of a replica that reads its requests and hands on its results."""
        return self.replica.rank == 0 and self.side != "ffn"

    @property
    def shares(self):
        """(ep, tp) by which experts are cut over the ranks of `experts`."""
        return self.layout.ep, self.experts.size // self.layout.ep


def grid_of(comm, layout):
    """The grid of a layout on a communicator; its communicators are made once, as MPI has few.

    Collective over `comm`.
    """
    grids = comm.Get_attr(_grids_key())
    if grids is None:
        grids = {}
        comm.Set_attr(_grids_key(), grids)
    lengths = tuple(getattr(layout, word) for word in (*AXES, "ep", "afd"))
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
    with waiting("bcast", comm, "agree"):
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
    with waiting("allgather", comm, "agree"):
        errors = [e for e in comm.allgather(error) if e is not None]
    if errors:
        raise agreed(errors[0])
    return outcome


def _first_number(names, default):
    for name in names:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return default
