"""Activations of given texts: a run of the engine whose model is tapped."""

from contextlib import contextmanager

import numpy as np

from hpcinfer.engine.activations.tap import Tap, spreads_of
from hpcinfer.engine.sequence import Sequence
from hpcinfer.errors import UsageError, is_agreed
from hpcinfer.grid import agree, agree_all
from hpcinfer.io.activations import ActivationsWriter
from hpcinfer.io.models import open_checkpoint
from hpcinfer.io.parts import PartFiles, next_generation
from hpcinfer.model.families import read_architecture
from hpcinfer.requests.request import Extracted


class ExtractTask:
    """What `loop.run` does with texts whose activations are extracted.

    Parameters
    ----------
    engine : Engine
    selection : Selection

    Attributes
    ----------
    fields : list of Field, all datasets
    """

    def __init__(self, engine, selection):
        self.engine, self.selection, self._generation = engine, selection, 0
        self.fields = selection.fields(engine.model.arch)
        self._row, self._first = 0, {}

    def open(self, path, facts, resume=False, least=0):
        """The file that joins the parts, on the root: an ActivationsWriter."""
        facts = facts | self.selection.facts
        return ActivationsWriter(path, self.fields, facts, self.selection.rows, resume, least)

    @contextmanager
    def into_parts(self, path):
        """While entered, every rank writes parts of the joined file `path`; collective."""
        grid = self.engine.grid
        self._generation = agree(grid.comm, next_generation, path)

        def open_parts(shares):
            numbers = self._generation, grid.dp.rank, grid.comm.rank
            return PartFiles(path, *numbers, shares, self.selection.compress)

        with self._tapped(open_parts) as parts:
            yield
        if parts is not None:
            record = self.engine.stats
            record.written_bytes, record.write_s = parts.written_bytes, parts.time_s

    @contextmanager
    def into_memory(self):
        """While entered, every rank keeps its rows; yields a ActivationMemory."""
        with self._tapped(ActivationMemory) as memory:
            yield memory

    @contextmanager
    def _tapped(self, open_sink):
        """While entered, the model hands what is selected to a sink; yields it, None without one.

        Parameters
        ----------
        open_sink : function (list of ColumnShare) -> object with `append(name, rows)`, `close()`
            and `abandon()`
        """
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

    def tokens_of(self, request):
        """Tokens of a text, all of which are computed."""
        return len(request.token_ids)

    def sequences_of(self, request, deliver):
        """The text as one sequence."""
        tokens = list(request.token_ids)
        return [
            Sequence(request, 0, tokens, len(tokens), wants_all_hidden=True, computes_last=True)
        ]

    def job(self, plan):
        """The step's sequences that are then complete, each with the first of its rows."""
        complete = []
        for sequence, n in sorted(plan, key=lambda entry: entry[0].number):
            if sequence.computed == n:
                self._first[sequence.number] = self._row
            if self.selection.pool is None:
                self._row += n
            if sequence.computed == sequence.target:
                first = self._first.pop(sequence.number)
                if self.selection.pool is not None:
                    first, self._row = self._row, self._row + 1
                complete.append((sequence, first))
        return complete

    def find(self, job, hidden):
        """Nothing: what is wanted was taken on the way."""

    def use(self, job, found, deliver):
        """End the texts that are complete."""
        for sequence, first in job:
            self.engine.scheduler.finish(sequence)
            n_rows = len(sequence.tokens) if self.selection.pool is None else 1
            replica = self.engine.grid.dp.rank
            deliver(Extracted(sequence.request, self._generation, replica, first, n_rows))


class ActivationMemory:
    """Keeps the rows of one rank.

    Parameters
    ----------
    shares : list of ColumnShare
    """

    def __init__(self, shares):
        self._shares = {share.field.name: share for share in shares}
        self._rows = {name: [] for name in self._shares}

    def append(self, name, rows):
        """Keep the next rows of a dataset: (n, own columns, ...)."""
        self._rows[name].append(rows.copy())

    def close(self):
        """Nothing is left to do."""

    abandon = close

    def own(self):
        """dict name -> (first own column, rows)"""
        return {
            name: (share.start, np.concatenate(self._rows[name]))
            for name, share in self._shares.items()
            if self._rows[name]
        }


def gathered(grid, memory):
    """Activations of all ranks, on every rank.

    Returns
    -------
    list of dict name -> (rows, columns, ...), one per replica
    """
    own = {} if memory is None else memory.own()
    of_ranks = grid.comm.allgather((grid.dp.rank, own))
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


def activations_of(outcome, replicas):
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


def check(comm, path, outputs, selection):
    """Refuse, before a model is loaded, what cannot be extracted from it, or not to these files.

    Raises
    ------
    UsageError
        On every rank.
    """
    if len(outputs) != 1 or not outputs[0].lower().endswith(".h5"):
        raise UsageError(
            f"output: got {', '.join(outputs)}, need one name that ends in .h5 for activations"
        )
    agree(comm, lambda: selection.fields(_architecture(path)))


def _architecture(path):
    with open_checkpoint(path) as checkpoint:
        return read_architecture(checkpoint.config)


def _first(part):
    return part[0]
