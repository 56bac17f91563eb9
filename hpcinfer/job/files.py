"""The files of a job: its input, and its outputs with what an earlier run has left."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from hpcinfer.engine.activations.extract import check_extract
from hpcinfer.errors import UsageError
from hpcinfer.grid import agree, agree_all
from hpcinfer.io.claims import claim, target_of
from hpcinfer.io.lines import read_lines
from hpcinfer.io.parts import part_names, parts_folder, try_parts
from hpcinfer.io.results import open_results
from hpcinfer.io.state import LOCK_SUFFIX, names_of, records_there
from hpcinfer.io.trace import open_trace, trace_file
from hpcinfer.job.progress import Progress
from hpcinfer.job.receipt import is_done
from hpcinfer.job.state import RunState, identity_of_input
from hpcinfer.job.tally import Tally
from hpcinfer.requests.results import completion_line, score_line

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

    from hpcinfer.engine.api import Engine
    from hpcinfer.job.settings import JobSettings

_EXTENSIONS = (".h5", ".jsonl")


@contextmanager
def open_state(comm: Comm, settings: JobSettings) -> Iterator[tuple[RunState, range]]:
    """Take the outputs, before a model is loaded, and hold them while entered; collective.

    Yields
    ------
    state : RunState, open on the root
    lines : places of this run's requests among those of the input, on every rank; none if there is
        nothing to do, which the root has said then

    Raises
    ------
    ValueError
        On every rank, for files that cannot be read or written, or are those of another run.
    """
    every_s, keeps_kv = settings.checkpoint_every, settings.checkpoint_kv
    with RunState(settings.targets, every_s, settings.restart, keeps_kv) as state:
        lines = agree(comm, _open_state, settings, state, comm.size)
        if state.kept:
            print(f"restart   what was there is kept as {', '.join(state.kept)}", flush=True)
        if lines:
            agree_all(comm, _try_to_write, settings, comm.rank)
        yield state, lines


def _open_state(settings: JobSettings, state: RunState, n_ranks: int) -> range:
    """Open the state on the root, once all files are known to be usable; places of the requests."""
    # Refuse what cannot be done, and files that are not this run's to write.
    if settings.selection is not None:
        check_extract(settings.model, settings.output, settings.selection)
    _check_names(settings)
    claim(settings.output, [settings.input], [settings.model], _beside(settings, n_ranks))
    lines = _lines_of(settings)

    # Do nothing where nothing is to be done; go on with an unfinished run of the same kind only.
    state.open()
    if not lines:
        print("done      no line of the input is in shard {}/{}".format(*settings.shard))
    elif not state.resumes and is_done(settings):
        print(f"done      {settings.output[0]} is finished already; --restart computes it again")
        return range(0)
    elif not state.resumes and not settings.overwrite:
        _refuse_finished(settings)
    state.refuse_changed(identity_of_input(settings))
    return lines


def _check_names(settings: JobSettings) -> None:
    """Refuse names of outputs and of an input whose kind is not known."""
    for path in settings.output:
        folder = os.path.dirname(target_of(path))
        if os.path.splitext(path)[1].lower() not in _EXTENSIONS:
            raise ValueError(f"output: got {path}, need a name that ends in .h5 or .jsonl")
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
            raise ValueError(f"output: got {path}, need a folder that exists and can be written")
    if os.path.splitext(settings.input)[1].lower() not in (".jsonl", ".txt"):
        raise ValueError(f"input: got {settings.input}, need a name that ends in .jsonl or .txt")


def _beside(settings: JobSettings, n_ranks: int) -> list[str]:
    """Files that a run writes, removes or locks beside what it was told to."""
    names = [f"{path}{LOCK_SUFFIX}" for path in settings.targets]
    for path in settings.targets:
        names += names_of(path)[1:]
        names += [name for _, name in part_names(path)]
    if settings.trace is not None:
        names += [trace_file(settings.trace, rank) for rank in range(n_ranks)]
    return names


def _lines_of(settings: JobSettings) -> range:
    """Places of the requests that this run is to do, among those of the input."""
    n_lines = sum(
        not isinstance(line, bytes) or bool(line.strip()) for _, line in read_lines(settings.input)
    )
    if not n_lines:
        raise ValueError(f"input: got no request in {settings.input}, need at least one line")
    i, n = settings.shard or (1, 1)
    return range(n_lines * (i - 1) // n, n_lines * i // n)


def _refuse_finished(settings: JobSettings) -> None:
    """Refuse outputs in which there is something, none of it this run's."""
    for path in settings.targets:
        there = records_there(path)
        if there is None and settings.kind == "extract" and part_names(path):
            there = parts_folder(path)
        if there is not None:
            raise UsageError(
                f"output: got {there}, which another run has left, need a new name; --overwrite "
                f"replaces it, --restart keeps it as {there}.old-1"
            )


def _try_to_write(settings: JobSettings, rank: int) -> None:
    """Make sure that this rank can write its files, which it does after all the work."""
    if settings.trace is not None:
        open_trace(settings.trace, rank)
    if settings.kind == "extract":
        try_parts(settings.targets[0], rank)


class JobOutputs:
    """What the root writes of a job: the files of results, the state, the progress.

    Parameters
    ----------
    settings : JobSettings
    engine : Engine
    state : RunState, open
    n_lines : requests that are to be done

    Attributes
    ----------
    left : (done, under_way), what an earlier run has left; see `RunState.begin`
    tally : Tally of the records that were written
    """

    def __init__(self, settings: JobSettings, engine: Engine, state: RunState, n_lines: int):
        self._settings, self._engine, self._state = settings, engine, state
        self._n_lines, self._writers = n_lines, []
        self.tally = Tally(engine.text, engine.context)

    def open(self, stack: ExitStack, facts: dict, open_file: Callable | None = None) -> int:
        """Open the files and the progress, which `stack` closes.

        Parameters
        ----------
        stack : ExitStack
        facts : kept in .h5 results: command, model and the like
        open_file : function (path, facts, resume, least) -> writer of an output; None for results

        Returns
        -------
        number of requests that an earlier run has finished
        """
        settings, state = self._settings, self._state
        self._name = os.path.basename(os.path.normpath(settings.model))
        self._created = int(os.stat(settings.input).st_mtime)

        # Open the outputs, with the records that they must hold already.
        state.begin_anew()
        for path in settings.targets:
            rest = state.resumes, state.least(path)
            if open_file is not None:
                writer = open_file(path, facts, *rest)
            else:
                writer = open_results(path, settings.kind, facts, self._line, *rest)
            self._writers.append(stack.enter_context(writer))

        # Write the first state, and begin to show how far the job is.
        self.left = state.begin(self._writers, self._engine.grid.layout.dp)
        before, stats = len(self.left[0]), self._engine.stats
        text = self._engine.text if settings.show else None
        self._progress = Progress(settings.kind, self._n_lines, before, stats, text)
        stack.enter_context(self._progress)
        return before

    def take(self, what: str, *message) -> None:
        """Take what a replica hands on: a record, or a snapshot of what it has under way."""
        if what == "record":
            self._write(*message)
        else:
            self._state.take(*message)

    def _write(self, record: dict) -> None:
        """Write the record of one finished request."""
        for writer in self._writers:
            writer.write(record)
        self.tally.add(record)
        self._progress.finished(record)

    def _line(self, record: dict) -> dict:
        """Line of a .jsonl output."""
        if self._settings.kind == "score":
            return score_line(record)
        return completion_line(record, self._name, self._created, self._engine.text)
