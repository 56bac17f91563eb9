"""What `generate` and `score` write: OpenAI Batch lines (.jsonl) or flat arrays (.h5).

The engine hands over one neutral record per request, a dict. For ``kind="generate"``::

    {"index": 0, "line": 1, "custom_id": "a", "error": None, "prompt_token_ids": [5, 6],
     "choices": [{"index": 0, "text": "hi", "finish_reason": "stop", "token_ids": [7],
                  "logprobs": [-0.1] | None, "top_logprobs": [[(7, -0.1), ...]] | None}]}

and for ``kind="score"``::

    {"index": 0, "line": 1, "custom_id": "a", "error": None, "token_ids": [5, 6],
     "logprobs": [None, -2.5], "sum_logprob": -2.5, "perplexity": 12.2}

A record with an error (a str) need only have the first four entries.

The .h5 holds N requests, C choices and their tokens in flat arrays; part i of a flat array is
``offsets[i]:offsets[i + 1]``. The columns are listed in `hpcinfer.io.columns`; each dataset has its
axis as a dimension label and its meaning as attribute ``description``. Root attributes: format =
"hpcinfer-results", format_version = 1, kind, hpcinfer_version, complete (the run ended and the
requests are in input order), and what the command adds. Reading takes five lines::

    import h5py
    with h5py.File("results.h5") as f:
        ids, text, first = f["custom_id"].asstr()[:], f["text"].asstr()[:], f["choice_offsets"][:]
        for i, name in enumerate(ids):
            print(name, *text[first[i] : first[i + 1]])

A zero byte in a text stands as U+FFFD, since HDF5 ends strings at zero; the token ids tell.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, KeysView
from collections.abc import Set as AbstractSet
from typing import Any

import h5py
import numpy as np

from hpcinfer import __version__
from hpcinfer.io.atomic import AnyPath, refuse_directory, writing
from hpcinfer.io.columns import TABLES, Record, ResultTables, top_width
from hpcinfer.io.hdf5 import Disk, replacing_h5
from hpcinfer.io.jsonl import INDEX_SUFFIX, JsonlWriter, encode

FORMAT, FORMAT_VERSION = "hpcinfer-results", 1
JOURNAL_SUFFIX = ".journal"

# A refresh of the .h5 may cost 2 % of the time, and comes at most five times a second
REFRESH_SHARE, REFRESH_EVERY_S = 0.02, 0.2
BATCH_RECORDS = 256


def open_results(
    path: AnyPath,
    kind: str,
    attributes: dict[str, Any],
    format_line: Callable[[Record], Record],
    resume: bool = False,
    least: int = 0,
) -> Hdf5Writer | JsonlResults:
    """Open the output file of a command; its extension says which kind it is.

    Parameters
    ----------
    path : ending in .jsonl or .h5
    kind : "generate" or "score"
    attributes : facts about the run that the .h5 keeps (command, model, layout, ...)
    format_line : function of a neutral record that gives the line of a .jsonl
    resume : keep what an unfinished run left under this name
    least : records that it must hold

    Returns
    -------
    a writer with ``write(record)``, ``done``, ``sync()``, ``close(final=True)``; a context manager

    Raises
    ------
    ValueError
        If the extension is another one, or the file to resume is not what a run left.
    RuntimeError
        If the file cannot be written.
    """
    extension = os.path.splitext(os.fspath(path))[1].lower()
    if extension == ".h5":
        return Hdf5Writer(path, kind, attributes, resume, least)
    if extension == ".jsonl":
        return JsonlResults(JsonlWriter(path, resume, least), format_line)
    raise ValueError(f"output: got {path}, need a name that ends in .jsonl or .h5")


class JsonlResults:
    """Formats neutral records for a `JsonlWriter`."""

    def __init__(self, writer: JsonlWriter, format_line: Callable[[Record], Record]) -> None:
        self._writer, self._format_line = writer, format_line

    @property
    def done(self) -> KeysView[int]:
        return self._writer.done

    def write(self, record: Record) -> None:
        """Write the line of a neutral record."""
        self._writer.write(record["index"], self._format_line(record))

    def sync(self) -> None:
        """Bring all records so far to the disk."""
        self._writer.sync()

    def close(self, final: bool = True) -> None:
        """Close the file; if `final`, put its lines in input order first."""
        self._writer.close(final)

    def __enter__(self) -> JsonlResults:
        return self

    def __exit__(self, kind: object, *details: object) -> None:
        self.close(final=kind is None)


class Hdf5Writer:
    """Writes results to a .h5 that opens at any moment, also after the job was killed.

    HDF5 files torn by a kill do not open. So each record goes at once to an append-only journal
    ``<path>.journal``, and the .h5 is written whole from the journal under a temporary name and
    renamed: empty when the run starts, with the first record, and then as often as costs
    little. What is missing in the .h5 of a killed job is in its journal.

    Parameters
    ----------
    path : of the file
    kind : "generate", "score" or "extract"
    attributes : root attributes; values that HDF5 does not know are kept as JSON text
    resume : take over the records of an existing journal, or of the finished file
    least : records that there must be

    Attributes
    ----------
    done : indices written so far, those of the journal among them

    Raises
    ------
    ValueError
        If `kind` is another one, the journal has lost records, or a record contradicts itself.
    RuntimeError
        Here and in all methods, if a file cannot be written.
    """

    def __init__(
        self,
        path: AnyPath,
        kind: str,
        attributes: dict[str, Any],
        resume: bool = False,
        least: int = 0,
    ) -> None:
        if kind not in TABLES:
            raise ValueError(f"output: got results of kind {kind!r}, need one of {list(TABLES)}")
        self.path, self.kind, self.attributes = os.fspath(path), kind, dict(attributes)
        with writing(self.path):
            refuse_directory(self.path)
        self._n_top = 0
        self._refreshed_s: float | None = None
        self._journal: JsonlWriter | None = None

        # Leave a finished file as it is
        finished = self._finished() if resume else None
        if finished is not None:
            self._done: AbstractSet[int] = finished
            for suffix in (JOURNAL_SUFFIX, JOURNAL_SUFFIX + INDEX_SUFFIX):
                with writing(self.path), contextlib.suppress(FileNotFoundError):
                    os.unlink(self.path + suffix)
            return

        # Take up the journal, and show at once what is in it
        self._journal = JsonlWriter(self.path + JOURNAL_SUFFIX, resume, least)
        self._done = self._journal.done
        for line in self._journal.lines(ordered=False):
            self._note(json.loads(line))
        self._cost_s = self._write_file(self._journal, complete=False)

    @property
    def done(self) -> AbstractSet[int]:
        return self._done

    def write(self, record: Record) -> None:
        """Keep a neutral record: in the journal at once, in the .h5 at its next refresh."""
        self._check(record)
        if self._journal is None:
            return
        self._note(record)
        self._journal.write(record["index"], encode(record, strict=False))

        # Refresh when the last one cost little compared with the time since
        pause_s = max(REFRESH_EVERY_S, self._cost_s / REFRESH_SHARE)
        if self._refreshed_s is None or time.perf_counter() - self._refreshed_s >= pause_s:
            self._cost_s = self._write_file(self._journal, complete=False)
            self._refreshed_s = time.perf_counter()

    def sync(self) -> None:
        """Bring all records so far to the disk."""
        if self._journal is not None:
            self._journal.sync()

    def close(self, final: bool = True) -> None:
        """Write all records to the .h5; if `final`, in input order, and remove the journal."""
        if self._journal is None:
            return
        journal, self._journal = self._journal, None
        try:
            self._write_file(journal, complete=final)
        finally:
            journal.close(final=False)
        if final:
            with writing(self.path):
                os.unlink(journal.path)
            journal.remove_index()

    def __enter__(self) -> Hdf5Writer:
        return self

    def __exit__(self, kind: object, *details: object) -> None:
        self.close(final=kind is None)

    def _finished(self) -> set[int] | None:
        """Indices of the records if the file is finished already, else None."""
        if not os.path.exists(self.path):
            return None
        try:
            with h5py.File(self.path) as file:
                return set(file["index"][:].tolist()) if file.attrs["complete"] else None
        except (OSError, KeyError):
            return None

    def _check(self, record: Record) -> None:
        """Raise ValueError unless the lists that run along the tokens have the same length."""
        for part in record.get("choices", ()) if self.kind == "generate" else (record,):
            n_tokens = len(part.get("token_ids", ()))
            for name in ("logprobs", "top_logprobs"):
                values = part.get(name)
                if values is not None and len(values) != n_tokens:
                    raise ValueError(
                        f"output: got {len(values)} {name} for {n_tokens} tokens of record "
                        f"{record.get('index')}, need as many"
                    )

    def _note(self, record: Record) -> None:
        """Remember what all records together decide."""
        self._n_top = max(self._n_top, top_width(record))

    def _write_file(self, journal: JsonlWriter, complete: bool) -> float:
        """Write the .h5 anew from the journal; returns the seconds that it took."""
        began_s = time.perf_counter()
        with replacing_h5(self.path, sync=complete) as (file, disk):
            self._fill(file, disk, journal, complete)
        return time.perf_counter() - began_s

    def _fill(self, file: h5py.File, disk: Disk, journal: JsonlWriter, complete: bool) -> None:
        """Write attributes and datasets."""
        file.attrs["format"], file.attrs["format_version"] = FORMAT, FORMAT_VERSION
        file.attrs["hpcinfer_version"] = __version__
        file.attrs["kind"], file.attrs["complete"] = self.kind, complete
        for name, value in self.attributes.items():
            file.attrs[name] = _attribute(value)

        # Batches keep the memory bounded and the number of writes small
        tables = ResultTables(file, self.kind, self._n_top)
        records = self._records(journal, complete)
        while batch := list(itertools.islice(records, BATCH_RECORDS)):
            tables.append(batch)
            disk.check()

    def _records(self, journal: JsonlWriter, complete: bool) -> Iterator[Record]:
        """The records of the journal, in input order at the end."""
        return (json.loads(line) for line in journal.lines(ordered=complete))


def _attribute(value: Any) -> Any:
    """`value` as HDF5 can hold it: bytes of a path that are no UTF-8 stand as escapes."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return value if np.isscalar(value) else json.dumps(value)
