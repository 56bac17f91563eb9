"""Activations of given texts: a run of the engine whose model is tapped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcinfer.engine.activations.selection import Selection
from hpcinfer.engine.activations.sink import ActivationMemory, Sink
from hpcinfer.engine.activations.tap import Tap, spreads_of
from hpcinfer.engine.sequence import Sequence as TextSequence
from hpcinfer.engine.task import Deliver, Plan
from hpcinfer.errors import UsageError, is_agreed
from hpcinfer.grid import Grid, agree, agree_all
from hpcinfer.io.activations import ActivationsWriter
from hpcinfer.io.models import open_checkpoint
from hpcinfer.io.parts import ColumnShare, PartFiles, next_generation
from hpcinfer.model.families import read_architecture
from hpcinfer.requests.request import Extracted, Request

if TYPE_CHECKING:
    from hpcinfer.engine.api import Engine


class ExtractTask:
    """The `Task` of extracting the activations of texts, by a tap in the model.

    Parameters
    ----------
    engine : Engine
    selection : Selection

    Attributes
    ----------
    fields : list of Field, all datasets
    """

    def __init__(self, engine: Engine, selection: Selection):
        self.engine, self.selection, self._generation = engine, selection, 0
        self.fields = selection.fields(engine.model.arch)
        self._row, self._first = 0, {}

    def open(
        self, path: str, facts: dict, resume: bool = False, least: int = 0
    ) -> ActivationsWriter:
        """The file that joins the parts, on the root: an ActivationsWriter."""
        facts = facts | self.selection.facts
        return ActivationsWriter(path, self.fields, facts, self.selection.rows, resume, least)

    @contextmanager
    def into_parts(self, path: str) -> Iterator[None]:
        """While entered, every rank writes parts of the joined file `path`; collective."""
        grid = self.engine.grid
        self._generation = agree(grid.comm, next_generation, path)

        def open_parts(shares: Sequence[ColumnShare]) -> PartFiles:
            numbers = self._generation, grid.dp.rank, grid.comm.rank
            return PartFiles(path, *numbers, shares, self.selection.compress)

        with self._tapped(open_parts) as parts:
            yield

        # Count what was written, the closing of the files included.
        if parts is not None:
            stats = self.engine.stats
            stats.written_bytes, stats.write_s = parts.written_bytes, parts.time_s

    @contextmanager
    def into_memory(self) -> Iterator[ActivationMemory | None]:
        """While entered, every rank keeps its rows; yields them, None on ranks of the FFN side."""
        with self._tapped(ActivationMemory) as memory:
            yield memory

    @contextmanager
    def _tapped(self, open_sink: Callable[[Sequence[ColumnShare]], Sink]) -> Iterator[Sink | None]:
        """While entered, the model hands what is selected to a sink; yields it, None without one.

        Parameters
        ----------
        open_sink : opens one for the columns of every dataset that this rank has a part in
        """
        # Put the tap where the attention and the residual are.
        model, grid, sink = self.engine.model, self.engine.grid, None
        if grid.role != "ffn":
            spreads = spreads_of(model, self.fields)
            sink = open_sink([s.share for s in spreads.values() if s.share.stop > s.share.start])
            model.tap = Tap(model, self.selection, spreads, sink)
        try:
            yield sink
        except BaseException as error:
            # Close the files together, unless the error is this rank's alone.
            if is_agreed(error):
                agree_all(grid.comm, lambda: sink and sink.close())
            elif sink:
                sink.abandon()
            raise
        else:
            agree_all(grid.comm, lambda: sink and sink.close())
        finally:
            model.tap = None

    def tokens_of(self, request: Request) -> int:
        """Tokens of a text, all of which are computed."""
        return len(request.token_ids)

    def sequences_of(self, request: Request, deliver: Deliver) -> list[TextSequence]:
        """The text as one sequence."""
        tokens = list(request.token_ids)
        return [
            TextSequence(request, 0, tokens, len(tokens), wants_all_hidden=True, computes_last=True)
        ]

    def expect(self, plan: Plan) -> list[tuple[TextSequence, int]]:
        """The step's sequences that are then complete, each with the first of its rows."""
        complete = []
        for sequence, n in sorted(plan, key=lambda entry: entry[0].number):
            # Count rows as the tap writes them: one for each token, or one for each text.
            if sequence.computed == n:
                self._first[sequence.number] = self._row
            if self.selection.pool is None:
                self._row += n

            # Note the first row of a text that is then complete.
            if sequence.computed == sequence.target:
                first = self._first.pop(sequence.number)
                if self.selection.pool is not None:
                    first, self._row = self._row, self._row + 1
                complete.append((sequence, first))
        return complete

    def find(self, complete: list, hidden: Any) -> None:
        """Nothing: what is wanted was taken on the way."""

    def use(self, complete: list[tuple[TextSequence, int]], found: None, deliver: Deliver) -> None:
        """End the texts that are complete."""
        for sequence, first in complete:
            self.engine.scheduler.finish(sequence)
            n_rows = len(sequence.tokens) if self.selection.pool is None else 1
            replica = self.engine.grid.dp.rank
            deliver(Extracted(sequence.request, self._generation, replica, first, n_rows))


def gathered(grid: Grid, memory: ActivationMemory | None) -> list[dict[str, np.ndarray]]:
    """Activations of all ranks, on every rank.

    Returns
    -------
    list of dict name -> (rows, columns, ...), one per replica
    """
    # Gather the columns of every rank.
    own = {} if memory is None else memory.own()
    of_ranks = grid.comm.allgather((grid.dp.rank, own))

    # Put those of a replica together in their order.
    replicas = []
    for replica in range(grid.layout.dp):
        parts = {}
        for _, of_rank in filter(lambda entry: entry[0] == replica, of_ranks):
            for name, (start, rows) in of_rank.items():
                parts.setdefault(name, []).append((start, rows))
        replicas.append(
            {
                name: np.concatenate([rows for _, rows in sorted(of_name, key=_first)], axis=1)
                for name, of_name in parts.items()
            }
        )
    return replicas


def activations_of(outcome: Extracted, replicas: list[dict[str, np.ndarray]]) -> dict:
    """What `Engine.extract` returns for one text."""
    rows = slice(outcome.first_row, outcome.first_row + outcome.n_rows)
    found = {
        "custom_id": outcome.request.custom_id,
        "token_ids": np.array(outcome.request.token_ids, np.int32),
    }
    for name, x in replicas[outcome.replica].items():
        point, _, n = name.partition("/")
        if n:
            found.setdefault(point, {})[int(n)] = x[rows]
        else:
            found[point] = x[rows]
    return found


def check_extract(path: str, outputs: Sequence[str], selection: Selection) -> None:
    """Refuse, before a model is loaded, what cannot be extracted from it, or not to these files.

    For one rank, which reads the config of the model.

    Raises
    ------
    UsageError
        If the outputs are not one .h5, or the model has no such point or layer.
    """
    if len(outputs) != 1 or not outputs[0].lower().endswith(".h5"):
        raise UsageError(
            f"output: got {', '.join(outputs)}, need one name that ends in .h5 for activations"
        )
    with open_checkpoint(path) as checkpoint:
        selection.fields(read_architecture(checkpoint.config))


def _first(part: tuple[int, np.ndarray]) -> int:
    return part[0]
