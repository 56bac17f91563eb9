"""The files of a job: its input, and its outputs with what an earlier run has left."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from hpcinfer.engine.activations.extract import check_extract
from hpcinfer.grid import agree
from hpcinfer.io.lines import read_lines
from hpcinfer.io.results import open_results
from hpcinfer.job.progress import Progress
from hpcinfer.job.state import RunState, identity_of_input
from hpcinfer.requests.results import completion_line, score_line

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

    from hpcinfer.engine.api import Engine
    from hpcinfer.job.settings import JobSettings

_EXTENSIONS = (".h5", ".jsonl")


@contextmanager
def open_state(comm: Comm, settings: JobSettings) -> Iterator[tuple[RunState, int]]:
    """Take the outputs, before a model is loaded, and hold them while entered; collective.

    Yields
    ------
    state : RunState, open on the root
    n_lines : lines of the input, on every rank

    Raises
    ------
    ValueError
        On every rank, for files that cannot be read or written, or are those of another run.
    """
    every_s, keeps_kv = settings.checkpoint_every, settings.checkpoint_kv
    with RunState(settings.output, every_s, settings.restart, keeps_kv) as state:
        n_lines = agree(comm, _open_state, settings, state)
        if state.kept:
            print(f"restart   what was there is kept as {', '.join(state.kept)}", flush=True)
        yield state, n_lines


def _open_state(settings: JobSettings, state: RunState) -> int:
    """Open the state on the root, once all files are known to be usable; lines of the input."""
    if settings.selection is not None:
        check_extract(settings.model, settings.output, settings.selection)
    n_lines = _check_files(settings.input, settings.output)
    state.open()
    state.refuse_changed(
        identity_of_input(settings.kind, settings.input, settings.output, settings.seed)
    )
    return n_lines


def _check_files(source: str, outputs: Sequence[str]) -> int:
    """Number of lines of the input, when all files can be used."""
    # Refuse outputs that cannot be written.
    for path in outputs:
        folder = os.path.dirname(os.path.abspath(path))
        if os.path.splitext(path)[1].lower() not in _EXTENSIONS:
            raise ValueError(f"output: got {path}, need a name that ends in .h5 or .jsonl")
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
            raise ValueError(f"output: got {path}, need a folder that exists and can be written")
        if os.path.isdir(path) or os.path.realpath(path) == os.path.realpath(source):
            raise ValueError(f"output: got {path}, need a file that is not the input or a folder")
    if len({os.path.realpath(path) for path in outputs}) < len(outputs):
        raise ValueError("output: got one file twice, need each once")

    # Refuse an input that has no request.
    if os.path.splitext(source)[1].lower() not in (".jsonl", ".txt"):
        raise ValueError(f"input: got {source}, need a name that ends in .jsonl or .txt")
    n_lines = sum(
        not isinstance(line, bytes) or bool(line.strip()) for _, line in read_lines(source)
    )
    if not n_lines:
        raise ValueError(f"input: got no request in {source}, need at least one line")
    return n_lines


class JobOutputs:
    """What the root writes of a job: the files of results, the state, the progress.

    Parameters
    ----------
    settings : JobSettings
    engine : Engine
    state : RunState, open
    n_lines : lines of the input

    Attributes
    ----------
    left : (done, under_way), what an earlier run has left; see `RunState.begin`
    """

    def __init__(self, settings: JobSettings, engine: Engine, state: RunState, n_lines: int):
        self._settings, self._engine, self._state = settings, engine, state
        self._n_lines, self._writers = n_lines, []

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
        for path in settings.output:
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
        self._progress.finished(record)

    def _line(self, record: dict) -> dict:
        """Line of a .jsonl output."""
        if self._settings.kind == "score":
            return score_line(record)
        return completion_line(record, self._name, self._created, self._engine.text)
