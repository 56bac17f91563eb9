"""A job on one rank: requests from the input, results to the outputs, and the report."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from hpcinfer import collectives
from hpcinfer.engine.activations.extract import ExtractTask
from hpcinfer.engine.feed import Feed
from hpcinfer.engine.generate import GenerateTask
from hpcinfer.engine.loop import run as run_loop
from hpcinfer.engine.loop import sequences_of
from hpcinfer.engine.score import ScoreTask
from hpcinfer.errors import Stopped, agreed
from hpcinfer.grid import agree, agree_all
from hpcinfer.io.lines import read_lines
from hpcinfer.io.trace import Trace
from hpcinfer.job.files import JobOutputs
from hpcinfer.job.kv_state import KvState
from hpcinfer.job.outbox import Outbox
from hpcinfer.job.progress import ornament
from hpcinfer.job.receipt import write_receipt
from hpcinfer.job.state import RunState, identity_of_model, under_way, unfinished
from hpcinfer.job.stop import Stop, stopped
from hpcinfer.requests.request import BadRequest, Request
from hpcinfer.requests.results import extract_record, generate_record, score_record

if TYPE_CHECKING:
    from hpcinfer.engine.api import Engine
    from hpcinfer.engine.task import Outcome
    from hpcinfer.job.settings import JobSettings

_KINDS = {
    "generate": (GenerateTask, generate_record),
    "score": (ScoreTask, score_record),
    "extract": (ExtractTask, extract_record),
}


@dataclass(frozen=True)
class Totals:
    """What has become of the requests of a job, on every rank.

    Attributes
    ----------
    finished, refused : requests that this run finished and refused
    before : those that earlier runs did
    """

    finished: int
    refused: int
    before: int

    @property
    def done(self) -> int:
        """Requests that nothing is left to do for."""
        return self.finished + self.refused + self.before


class Job:
    """A run of a loaded model over files; every rank makes one and calls `run`, then `report`.

    Parameters
    ----------
    settings : JobSettings
    engine : Engine
    lines : places of the requests that are to be done, among those of the input
    state : RunState, open on the root
    stop : Stop, entered
    """

    def __init__(
        self, settings: JobSettings, engine: Engine, lines: range, state: RunState, stop: Stop
    ):
        self._settings, self._engine, self._lines = settings, engine, lines
        self._grid, self._comm, self._state, self._stop = engine.grid, engine.grid.comm, state, stop
        task, self._record_of = _KINDS[settings.kind]
        selected = () if settings.selection is None else (settings.selection,)
        self._task = task(engine, *selected)
        self._defaults = engine.defaults(settings.sampling)
        self._counts, self._kv = np.zeros(2, np.int64), None
        if settings.trace:
            self._trace = Trace(settings.trace, self._comm.rank)
            engine.ledger.trace(self._trace.write)

        # Only the root has outputs; the others send it what they have.
        self._outputs, is_root = None, self._grid.is_root
        if is_root:
            self._outputs = JobOutputs(settings, engine, state, len(lines))
        self._outbox = Outbox(self._grid, self._outputs.take if is_root else None)

    def run(self) -> Totals:
        """Do every request of the input.

        Raises
        ------
        ValueError
            On every rank, if not one request could be run, or the state is another run's.
        Stopped
            On every rank, if the run was stopped before all requests were finished.
        """
        with self._engine.in_use():
            try:
                return self._run()
            except Stopped:
                raise
            except Exception:
                if self._grid.is_root:
                    self._state.forget_nothing()
                raise

    def _run(self) -> Totals:
        settings, grid, comm, task = self._settings, self._grid, self._comm, self._task

        # Let every leader see that it can read the input.
        agree_all(comm, lambda: grid.is_leader and next(read_lines(settings.input)))
        with ExitStack() as stack:
            # Open the outputs on the root, and the files of activations on every rank.
            before = agree(comm, self._open, stack)
            if settings.kind == "extract":
                stack.enter_context(task.into_parts(settings.targets[0]))

            # Take up what an earlier run has left: first what has its keys and values here.
            self._take_left()
            kept = self._resume()

            # Do the rest, and wait for the last result of every replica.
            with Feed(grid, self._rest(kept), len(self._lines) - before - len(kept)) as feed:
                run_loop(self._engine, feed, self._deliver, task, self._between, self._stop)
                self._snapshot(last=True)
                self._outbox.close()
            self._stop.settle(grid)

            # Keep the state of a run that was stopped.
            totals = Totals(*comm.allreduce(self._counts).tolist(), before)
            if totals.done < len(self._lines):
                self._leave(totals)
        agree(comm, self._finish, totals)
        self._refuse_nothing_done(totals)
        return totals

    def report(self, totals: Totals) -> None:
        """Write the trace, and print what the run has cost on the root; every rank calls this.

        Raises
        ------
        ValueError
            On every rank, if a request was refused and none may be.
        """
        # Every rank sends its part; what the root makes of them is worth no job.
        lines = None
        with ornament("report") if self._grid.is_root else nullcontext():
            lines = self._engine.stats.report(self._engine)

        # Show what the run has cost, and write the timeline.
        if self._settings.trace:
            with ornament("trace"):
                self._trace.close(self._engine.ledger.events)
        if lines is not None:
            before = f", {totals.before} before" if totals.before else ""
            print(*lines, *self._outputs.tally.lines(), sep="\n")
            print(
                f"done      {totals.finished} requests finished, {totals.refused} refused{before}"
                f" -> {', '.join(self._settings.output)}"
            )
        if self._settings.strict and totals.refused:
            raise agreed(
                ValueError(
                    f"input: got {totals.refused} requests that were refused, need none under "
                    "--strict; correct their lines, whose error records are in the output"
                )
            )

    # --- Start, on what an earlier run has left ---

    def _open(self, stack: ExitStack) -> int:
        """Open the outputs, on the root; how many requests an earlier run has finished."""
        settings, task = self._settings, self._task

        # Refuse to go on with another model or sampling.
        defaults = self._defaults if settings.kind == "generate" else None
        selected = {} if settings.selection is None else settings.selection.facts
        self._state.refuse_changed(identity_of_model(self._engine, defaults) | selected)

        # Open what results go to, and save what is under way if the job must be ended at once.
        open_file = task.open if settings.kind == "extract" else None
        before = self._outputs.open(stack, self._facts(), open_file)
        self._stop.last_resort = lambda: self._state.rescue(0, under_way(self._engine.scheduler))
        return before

    def _facts(self) -> dict:
        """What .h5 results say of their making."""
        return {
            "command": shlex.join(self._settings.command_line),
            "model": self._settings.model,
            "model_checksum": self._engine.checksum,
            "layout": str(self._grid.layout),
            "dtype": str(self._engine.model.dtype),
            "seed": self._settings.seed,
        }

    def _take_left(self) -> None:
        """Tell the leaders what is finished and what was under way; open the keys and values."""
        if self._state.keeps_kv:
            self._kv = KvState(self._engine, self._state)
        if self._grid.is_leader:
            left = self._outputs.left if self._grid.is_root else None
            self._done, self._under_way = self._grid.dp.bcast(left)

    def _resume(self) -> dict:
        """Queue the requests whose keys and values are kept in some replica; they are returned."""
        kept = {} if self._kv is None else self._kv.sequences
        if kept:
            # Read the own ones from the input, and hand them to the ranks of the replica.
            is_leader = self._grid.is_leader
            found = agree_all(self._comm, lambda: self._kept_here(kept) if is_leader else [])
            found = self._grid.replica.bcast(found)

            # Let their sequences go on, as far as they fit in the cache.
            agree_all(self._comm, self._queue, found)
        return kept

    def _kept_here(self, kept: dict) -> list[Request]:
        """Requests that this replica has kept, from a reading of the input of its own."""
        own = {index for index, (replica, _) in kept.items() if replica == self._grid.dp.rank}
        entries = unfinished(self._entries(), self._done, self._under_way)
        return list(islice((entry for entry in entries if entry.index in own), len(own)))

    def _queue(self, requests: list[Request]) -> None:
        """Queue requests with their keys and values."""
        engine, task = self._engine, self._task
        self._kv.resume(
            [s for entry in requests for s in sequences_of(engine, entry, self._deliver, task)]
        )

    def _rest(self, kept: dict) -> Iterator[Request | BadRequest] | None:
        """Requests that are neither finished nor kept, on the leaders; None elsewhere."""
        if not self._grid.is_leader:
            return None
        left = {index: samples for index, samples in self._under_way.items() if index not in kept}
        return unfinished(self._entries(), self._done | kept.keys(), left)

    def _entries(self) -> Iterator[Request | BadRequest]:
        """Entries of the input, read anew."""
        source, kind = self._settings.input, self._settings.kind
        plain, score = source.lower().endswith(".txt"), kind != "generate"
        reader = self._engine.reader(self._settings.sampling, plain, score)
        return islice(reader.read(read_lines(source)), self._lines.start, self._lines.stop)

    # --- While the loop runs ---

    def _deliver(self, outcome: Outcome) -> None:
        """Hand on the outcome of a request; on every rank of the replica."""
        self._engine.stats.answered += 1
        if self._grid.is_leader:
            self._counts[int(isinstance(outcome, BadRequest))] += 1
            self._outbox.put("record", self._record_of(outcome))

    def _between(self) -> None:
        """Let results move on after a round, and hand on a snapshot when one is due."""
        self._outbox.poll()
        due = self._state.due()
        if self._kv is not None:  # all ranks of the replica write theirs after the same round
            due = collectives.Bcast(self._grid.replica, np.array([due]), purpose="kv")[0]
        if due:
            self._snapshot()

    def _snapshot(self, last: bool = False) -> None:
        """Hand on what this replica has under way, and keep its keys and values."""
        of_cache = None
        if self._kv is not None and self._grid.role != "ffn":
            of_cache = self._kv.save()
        if self._grid.is_leader:
            tokens = under_way(self._engine.scheduler)
            self._outbox.put("under way", self._grid.dp.rank, tokens, last, of_cache)

    # --- End ---

    def _leave(self, totals: Totals) -> None:
        """Save the state of a run that was stopped, and say so on every rank."""
        comm, state = self._comm, self._state
        agree(comm, state.save)
        reason, n_under_way = comm.bcast((self._stop.reason, state.n_under_way))
        raise agreed(stopped(reason, totals.done, len(self._lines), n_under_way))

    def _finish(self, totals: Totals) -> None:
        """Forget the state of a run that is finished, and leave its receipt; on the root."""
        if totals.finished + totals.before:
            with ornament("receipt"):
                write_receipt(self._settings, self._engine.checksum)
        self._state.finish()

    def _refuse_nothing_done(self, totals: Totals) -> None:
        """Refuse an input of which no request could be run."""
        if not totals.finished + totals.before:
            raise agreed(
                ValueError(
                    f"input: got {totals.refused} requests in {self._settings.input} and none that "
                    "can be run, need at least one; see the error records in the output"
                )
            )
