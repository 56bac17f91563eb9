"""One row of the table: a strategy, its trial over the ranks, and the verdict."""

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hpcinfer import array
from hpcinfer.errors import one_line
from hpcinfer.ledger import ledger

TOLERANCE = 1e-5  # largest difference over largest value, float32
GRACE_S = 10.0  # how long a rank that failed waits for the others


@dataclass(frozen=True)
class Case:
    """A strategy in one of its cuts.

    Attributes
    ----------
    strategy : name
    cut : what is cut, and how
    function : function (comm, rng, put) -> Trial; rng yields the same numbers on every rank, and
        `put` brings a host array to the memory of the rank's device
    equal : whether the strategy equals one rank; if not, it must differ on more ranks than one
    least_ranks : ranks below which there is no such cut, and the row is not tried
    engine : False for a teaching form: the engine has another one, or another cut
    """

    strategy: str
    cut: str
    function: Callable
    equal: bool = True
    least_ranks: int = 1
    engine: bool = True

    @property
    def name(self):
        return f"{self.strategy} ({self.cut})"


@dataclass(frozen=True)
class Trial:
    """What one rank has of a row.

    Attributes
    ----------
    got, want : this rank's results by the strategy and by the definition; tuples of arrays, host or
        device
    formula_bytes : bytes that all ranks together send, by the strategy's formula
    """

    got: tuple
    want: tuple
    formula_bytes: int

    def sizes(self):
        """(results, 2): the largest difference of each result, and its largest value."""
        return [_sizes(g, w) for g, w in zip(self.got, self.want, strict=True)]


@dataclass(frozen=True)
class Outcome:
    """Verdict on a row, the same on every rank.

    Attributes
    ----------
    equal : None if the row raised an error, or was not tried
    difference : largest relative difference on any rank
    collectives : verb -> calls of each rank
    counted_bytes, formula_bytes : sent by all ranks together
    error : what the row raised, or ""
    """

    row: Case
    ranks: int
    equal: bool | None = None
    difference: float = math.inf
    collectives: dict | None = None
    counted_bytes: int = 0
    formula_bytes: int = 0
    error: str = ""

    @property
    def tried(self):
        """True if there are ranks enough for the row."""
        return self.ranks >= self.row.least_ranks

    @property
    def passed(self):
        """True if the row is equal, or differs, as it must, and its bytes are those it states.

        None if it was not tried.
        """
        if not self.tried:
            return None
        if self.error or self.counted_bytes != self.formula_bytes:
            return False
        if self.row.equal or self.ranks == 1:
            return self.equal
        return not self.equal and math.isfinite(self.difference)

    def facts(self):
        """The outcome as an item of the JSON list."""
        return {
            "strategy": self.row.strategy,
            "cut": self.row.cut,
            "ranks": self.ranks,
            "least_ranks": self.row.least_ranks,
            "engine": self.row.engine,
            "must_be_equal": self.row.equal or self.ranks == 1,
            "equal": self.equal,
            "difference": self.difference if math.isfinite(self.difference) else None,
            "collectives": self.collectives,
            "counted_bytes": self.counted_bytes,
            "formula_bytes": self.formula_bytes,
            "passed": self.passed,
            "error": self.error,
        }

    def cells(self):
        """The outcome as a line of the table."""
        strategy = self.row.strategy + ("" if self.row.engine else " *")
        if self.error or not self.tried:
            verdict = "FAILED" if self.error else f"needs {self.row.least_ranks} ranks"
            return [strategy, self.row.cut, *5 * ["-"], verdict]
        expected = "ok" if self.row.equal or self.ranks == 1 else "ok, must differ"
        verbs = ", ".join(f"{verb} x {calls}" for verb, calls in self.collectives.items())
        return [
            strategy,
            self.row.cut,
            "yes" if self.equal else "no",
            f"{self.difference:.1e}",
            verbs or "none",
            str(self.counted_bytes),
            str(self.formula_bytes),
            expected if self.passed else "FAILED",
        ]


HEADINGS = [
    "strategy", "cut", "equal", "difference", "collectives", "bytes counted", "by formula", "",
]  # fmt: skip


def run(comm, rows, seed=0, put=np.asarray):
    """Try rows over the ranks of a communicator.

    Parameters
    ----------
    rows : list of Case
    seed : of the random data, 0 or more
    put : as a row's function takes it

    Returns
    -------
    list of Outcome, equal on every rank
    """
    return [
        run_case(comm, row, np.random.default_rng([seed, i]), put) for i, row in enumerate(rows)
    ]


def run_case(comm, row, rng, put=np.asarray):
    """Outcome of one row, on a communicator of its own: an error leaves no message to the next."""
    if comm.size < row.least_ranks:
        return Outcome(row, comm.size)
    own = comm.Dup()
    own.Set_name("verify")
    ledger.clear()
    trial, error = None, None
    try:
        trial = row.function(own, rng, put)
    except BaseException as raised:
        error = raised
    _meet(comm, error)
    own.Free()

    # Gather the verdict.
    sizes = trial.sizes() if trial else None
    mine = sizes, ledger.sent_bytes(), None if error is None else one_line(error)
    sizes, sent_bytes, errors = zip(*comm.allgather(mine), strict=True)
    raised = [text for text in errors if text is not None]
    if raised:
        return Outcome(row, comm.size, error=raised[0])
    difference = _largest_relative(sizes)
    return Outcome(
        row,
        comm.size,
        equal=difference <= TOLERANCE,
        difference=difference,
        collectives=_calls(),
        counted_bytes=round(sum(sent_bytes)),
        formula_bytes=int(trial.formula_bytes),
    )


def _meet(comm, error):
    """Wait for all ranks; if they do not come, raise `error`, which ends the job."""
    request, start_s = comm.Ibarrier(), time.monotonic()
    if error is None:
        request.Wait()
        return
    while not request.Test():
        if time.monotonic() - start_s > GRACE_S:
            raise error
        time.sleep(0.001)


def _sizes(got, want):
    """(largest difference, largest value) of two arrays; (inf, 1) if they cannot be compared."""
    got, want = array.host(got), array.host(want)
    if got.shape != want.shape:
        return math.inf, 1.0
    difference, value = (float(np.abs(x).max(initial=0)) for x in (got - want, want))
    return difference if math.isfinite(difference) else math.inf, value


def _largest_relative(sizes):
    """Largest relative difference of any result, from the (ranks, results, 2) sizes."""
    difference, value = np.max(np.array(sizes, float), axis=0).T
    return float((difference / np.where(value == 0, 1, value)).max())


def _calls():
    """Calls of this rank by verb."""
    calls = Counter()
    for (verb, _, _), entry in ledger.entries.items():
        calls[verb] += entry.calls
    return dict(calls)
