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
``offsets[i]:offsets[i + 1]``. The columns are listed in `GENERATE` and `SCORE` below; each dataset
carries its axis as a dimension label and its meaning as attribute ``description``. Root
attributes: format = "hpcinfer-results", format_version = 1, kind, hpcinfer_version, complete (the
run ended and requests are in input order), and what the command adds. Reading takes five lines::

    import h5py
    with h5py.File("results.h5") as f:
        ids, text, first = f["custom_id"].asstr()[:], f["text"].asstr()[:], f["choice_offsets"][:]
        for i, name in enumerate(ids):
            print(name, *text[first[i] : first[i + 1]])

A zero byte in a text stands as U+FFFD, since HDF5 ends strings at zero; the token ids tell.
"""

import contextlib
import itertools
import json
import os
import time
from typing import NamedTuple

import h5py
import numpy as np

from hpcinfer import __version__
from hpcinfer.io.atomic import refuse_directory, writing
from hpcinfer.io.hdf5 import replacing_h5
from hpcinfer.io.jsonl import INDEX_SUFFIX, JsonlWriter, encode

FORMAT, FORMAT_VERSION = "hpcinfer-results", 1
JOURNAL_SUFFIX = ".journal"

# A refresh of the .h5 may cost 2 % of the time, and comes at most five times a second
REFRESH_SHARE, REFRESH_EVERY_S = 0.02, 0.2
BATCH_RECORDS = 256
CHUNK_ITEMS = {"request": 1024, "choice": 1024, "token": 16384, "prompt token": 16384}

STRING = h5py.string_dtype()


class Column(NamedTuple):
    """One dataset of a results file: name, element type, what its axis counts, meaning."""

    name: str
    dtype: object
    axis: str
    description: str


REQUEST = (
    Column("index", np.int64, "request", "place of the request in the input, from 0"),
    Column("line", np.int64, "request", "line of the input, from 1"),
    Column("custom_id", STRING, "request", "name of the request"),
    Column("error", STRING, "request", "why the request failed, empty if it did not"),
)
GENERATE = (
    *REQUEST,
    Column("prompt_token_ids", np.int32, "prompt token", "tokens of all prompts, end to end"),
    Column("prompt_offsets", np.int64, "request", "where each request begins in prompt_token_ids"),
    Column("choice_offsets", np.int64, "request", "where each request begins among the choices"),
    Column("choice_index", np.int32, "choice", "number of the choice within its request"),
    Column("text", STRING, "choice", "generated text"),
    Column("finish_reason", STRING, "choice", "stop or length"),
    Column("token_offsets", np.int64, "choice", "where each choice begins in token_ids"),
    Column("token_ids", np.int32, "token", "generated tokens of all choices, end to end"),
    Column("logprobs", np.float32, "token", "natural log-probability; NaN if not asked for"),
)
TOP = (
    Column("top_ids", np.int32, "token", "likeliest tokens at each place, -1 if not asked for"),
    Column("top_logprobs", np.float32, "token", "their log-probabilities, NaN if not asked for"),
)
SCORE = (
    *REQUEST,
    Column("token_offsets", np.int64, "request", "where each request begins in token_ids"),
    Column("token_ids", np.int32, "token", "given tokens of all requests, end to end"),
    Column("logprobs", np.float32, "token", "natural log-probability; NaN for each first token"),
    Column("sum_logprob", np.float64, "request", "sum of the request's log-probabilities"),
    Column("perplexity", np.float64, "request", "exp(-mean log-probability)"),
)
EXTRACT = (
    *REQUEST,
    Column("token_offsets", np.int64, "request", "where each request begins in token_ids"),
    Column("token_ids", np.int32, "token", "tokens of all requests, end to end"),
    Column("first_row", np.int64, "request", "first of the request's rows in every other dataset"),
    Column("n_rows", np.int64, "request", "number of the request's rows; 0 if it failed"),
)
TABLES = {"generate": GENERATE, "score": SCORE, "extract": EXTRACT}


def open_results(path, kind, attributes, format_line, resume=False, least=0):
    """Open the output file of a command; its extension says which kind it is.

    Parameters
    ----------
    path : str, ending in .jsonl or .h5
    kind : "generate" | "score"
    attributes : dict, facts about the run that the .h5 keeps (command, model, layout, ...)
    format_line : callable (neutral record) -> dict, the line of a .jsonl
    resume : bool, keep what an unfinished run left under this name
    least : int, records that it must hold

    Returns
    -------
    Hdf5Writer or JsonlResults: ``write(record)``, ``done``, ``sync()``, ``close(final=True)``,
    context manager

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

    def __init__(self, writer, format_line):
        self._writer, self._format_line = writer, format_line

    @property
    def done(self):
        return self._writer.done

    def write(self, record):
        """Write the line of a neutral record."""
        self._writer.write(record["index"], self._format_line(record))

    def sync(self):
        """Bring all records so far to the disk."""
        self._writer.sync()

    def close(self, final=True):
        """Close the file; if `final`, put its lines in input order first."""
        self._writer.close(final)

    def __enter__(self):
        return self

    def __exit__(self, kind, *details):
        self.close(final=kind is None)


class Hdf5Writer:
    """Writes results to a .h5 that opens at any moment, also after the job was killed.

    HDF5 files torn by a kill do not open. So each record goes at once to an append-only journal
    ``<path>.journal``, and the .h5 is written whole from the journal under a temporary name and
    renamed: empty when the run starts, with the first record, and then as often as costs
    little. What is missing in the .h5 of a killed job is in its journal.

    Parameters
    ----------
    path : str
    kind : "generate" | "score"
    attributes : dict, root attributes; values that HDF5 does not know are kept as JSON text
    resume : bool, take over the records of an existing journal, or of the finished file
    least : int, records that there must be

    Attributes
    ----------
    done : view of the indices written so far, those of the journal among them

    Raises
    ------
    ValueError
        If `kind` is another one, the journal has lost records, or a record contradicts itself.
    RuntimeError
        Here and in all methods, if a file cannot be written.
    """

    def __init__(self, path, kind, attributes, resume=False, least=0):
        if kind not in TABLES:
            raise ValueError(f"output: got results of kind {kind!r}, need one of {list(TABLES)}")
        self.path, self.kind, self.attributes = os.fspath(path), kind, dict(attributes)
        with writing(self.path):
            refuse_directory(self.path)
        self._n_top, self._refreshed_s = 0, None
        self._journal, self._done = None, self._finished() if resume else None
        if self._done is not None:
            for suffix in (JOURNAL_SUFFIX, JOURNAL_SUFFIX + INDEX_SUFFIX):
                with writing(self.path), contextlib.suppress(FileNotFoundError):
                    os.unlink(self.path + suffix)
        else:
            self._journal = JsonlWriter(self.path + JOURNAL_SUFFIX, resume, least)
            self._done = self._journal.done
            for line in self._journal.lines(ordered=False):
                self._note(json.loads(line))
            self._refresh()
            self._refreshed_s = None

    @property
    def done(self):
        return self._done

    def write(self, record):
        """Keep a neutral record: in the journal at once, in the .h5 at its next refresh."""
        self._check(record)
        if self._journal is None:
            return
        self._note(record)
        self._journal.write(record["index"], encode(record, strict=False))

        # Refresh when the last one cost little compared with the time since
        pause_s = max(REFRESH_EVERY_S, self._cost_s / REFRESH_SHARE)
        if self._refreshed_s is None or time.perf_counter() - self._refreshed_s >= pause_s:
            self._refresh()

    def sync(self):
        """Bring all records so far to the disk."""
        if self._journal is not None:
            self._journal.sync()

    def close(self, final=True):
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

    def __enter__(self):
        return self

    def __exit__(self, kind, *details):
        self.close(final=kind is None)

    def _finished(self):
        """Indices of the records if the file is finished already, else None."""
        if not os.path.exists(self.path):
            return None
        try:
            with h5py.File(self.path) as file:
                return set(file["index"][:].tolist()) if file.attrs["complete"] else None
        except (OSError, KeyError):
            return None

    def _check(self, record):
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

    def _note(self, record):
        """Remember what all records together decide."""
        self._n_top = max(self._n_top, _top_width(record))

    def _refresh(self):
        began_s = time.perf_counter()
        self._write_file(self._journal, complete=False)
        self._refreshed_s = time.perf_counter()
        self._cost_s = self._refreshed_s - began_s

    def _write_file(self, journal, complete):
        """Write the .h5 anew from the journal."""
        with replacing_h5(self.path, sync=complete) as (file, disk):
            self._fill(file, disk, journal, complete)

    def _fill(self, file, disk, journal, complete):
        """Write attributes and datasets."""
        file.attrs["format"], file.attrs["format_version"] = FORMAT, FORMAT_VERSION
        file.attrs["hpcinfer_version"] = __version__
        file.attrs["kind"], file.attrs["complete"] = self.kind, complete
        for name, value in self.attributes.items():
            file.attrs[name] = value if np.isscalar(value) else json.dumps(value)

        # Batches keep the memory bounded and the number of writes small
        tables = _Tables(file, self.kind, self._n_top)
        records = self._records(journal, complete)
        while batch := list(itertools.islice(records, BATCH_RECORDS)):
            tables.append(batch)
            disk.check()

    def _records(self, journal, complete):
        """The records of the journal, in input order at the end."""
        return (json.loads(line) for line in journal.lines(ordered=complete))


class _Tables:
    """The datasets of one results file, to which batches of records are appended."""

    def __init__(self, file, kind, n_top):
        self._kind, self._n_top = kind, n_top
        self._data = {}
        for column in TABLES[kind]:
            self._create(file, column, ())
        if n_top:
            for column in TOP:
                self._create(file, column, (n_top,))
        for name, data in self._data.items():
            if name.endswith("_offsets"):
                data.resize((1,))

    def append(self, records):
        columns = {
            "index": [r["index"] for r in records],
            "line": [r["line"] for r in records],
            "custom_id": [_text(r["custom_id"]) for r in records],
            "error": [_text(r.get("error") or "") for r in records],
        }
        own = {"generate": self._generated, "score": self._scored, "extract": self._extracted}
        columns |= own[self._kind](records)
        for name, values in columns.items():
            self._extend(name, values)

    def _generated(self, records):
        """Columns of requests, of their choices, and of the tokens of these."""
        prompts = [r.get("prompt_token_ids") or [] for r in records]
        choices = [r.get("choices") or [] for r in records]
        flat = list(itertools.chain.from_iterable(choices))
        tokens = [c["token_ids"] for c in flat]
        columns = {
            "prompt_token_ids": _join(prompts),
            "prompt_offsets": [len(p) for p in prompts],
            "choice_offsets": [len(c) for c in choices],
            "choice_index": [c["index"] for c in flat],
            "text": [_text(c["text"]) for c in flat],
            "finish_reason": [_text(c["finish_reason"]) for c in flat],
            "token_offsets": [len(t) for t in tokens],
            "token_ids": _join(tokens),
            "logprobs": _join(c.get("logprobs") or [None] * len(c["token_ids"]) for c in flat),
        }
        if self._n_top:
            columns["top_ids"], columns["top_logprobs"] = _top_arrays(flat, self._n_top)
        return columns

    def _scored(self, records):
        """Columns of scored requests and of their tokens."""
        tokens = [r.get("token_ids") or [] for r in records]
        return {
            "token_offsets": [len(t) for t in tokens],
            "token_ids": _join(tokens),
            "logprobs": _join(r.get("logprobs") or [] for r in records),
            "sum_logprob": [r.get("sum_logprob") for r in records],
            "perplexity": [r.get("perplexity") for r in records],
        }

    def _extracted(self, records):
        """Columns of requests with activations, and of their tokens."""
        tokens = [r.get("token_ids") or [] for r in records]
        return {
            "token_offsets": [len(t) for t in tokens],
            "token_ids": _join(tokens),
            "first_row": [r.get("first_row") or 0 for r in records],
            "n_rows": [r.get("n_rows") or 0 for r in records],
        }

    def _create(self, file, column, width):
        data = file.create_dataset(
            column.name,
            (0, *width),
            column.dtype,
            maxshape=(None, *width),
            chunks=(CHUNK_ITEMS[column.axis], *width),
            fletcher32=column.dtype is not STRING,
        )
        data.dims[0].label = column.axis
        if width:
            data.dims[1].label = "rank"
        data.attrs["description"] = column.description
        self._data[column.name] = data

    def _extend(self, name, values):
        """Append values to a dataset; to offsets, where parts of the given lengths end."""
        data, count = self._data[name], len(values)
        if not count:
            return
        if name.endswith("_offsets"):
            values = int(data[-1]) + np.cumsum(values, dtype=np.int64)
        data.resize(len(data) + count, axis=0)
        data[-count:] = np.asarray(values, data.dtype)


def _join(lists):
    return list(itertools.chain.from_iterable(lists))


def _top_width(record):
    """Largest number of likeliest tokens that a record holds for one place."""
    places = (c.get("top_logprobs") or () for c in record.get("choices") or ())
    return max((len(place) for place in itertools.chain.from_iterable(places)), default=0)


def _top_arrays(choices, n_top):
    """Ids (tokens, n_top), -1 where there is none, and log-probabilities, NaN there."""
    places = _join(c.get("top_logprobs") or [()] * len(c["token_ids"]) for c in choices)
    ids = np.full((len(places), n_top), -1, np.int32)
    logprobs = np.full((len(places), n_top), np.nan, np.float32)
    for row, place in enumerate(places):
        for column, (token, logprob) in enumerate(place):
            ids[row, column], logprobs[row, column] = token, logprob
    return ids, logprobs


def _text(value):
    """`value` as HDF5 can hold it: no zero bytes, no halves of surrogate pairs."""
    return value.replace("\0", "\ufffd").encode("utf-8", "replace").decode()
