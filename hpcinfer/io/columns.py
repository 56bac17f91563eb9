"""The datasets of a results file: their columns, and appending of records to them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import h5py
import numpy as np

CHUNK_ITEMS = {"request": 1024, "choice": 1024, "token": 16384, "prompt token": 16384}
STRING = h5py.string_dtype()

Record = dict[str, Any]  # a neutral record, see `hpcinfer.io.results`


class Column(NamedTuple):
    """One dataset of a results file: name, element type, what its axis counts, meaning."""

    name: str
    dtype: Any
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


class ResultTables:
    """The datasets of one results file, to which batches of records are appended.

    Parameters
    ----------
    file : new
    kind : which of `TABLES`
    n_top : likeliest tokens at each place of which there are columns; 0 for none
    """

    def __init__(self, file: h5py.File, kind: str, n_top: int) -> None:
        self._kind, self._n_top = kind, n_top
        self._data: dict[str, h5py.Dataset] = {}
        for column in TABLES[kind]:
            self._create(file, column, ())
        if n_top:
            for column in TOP:
                self._create(file, column, (n_top,))
        for name, data in self._data.items():
            if name.endswith("_offsets"):
                data.resize((1,))

    def append(self, records: Sequence[Record]) -> None:
        """Write the next records to the ends of the datasets."""
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

    def _generated(self, records: Sequence[Record]) -> dict[str, Any]:
        """Columns of requests, of their choices, and of the tokens of these."""
        prompts = [r.get("prompt_token_ids") or [] for r in records]
        choices = [r.get("choices") or [] for r in records]
        flat = list(itertools.chain.from_iterable(choices))
        tokens = [c["token_ids"] for c in flat]

        # Offsets are given as the lengths between them
        columns: dict[str, Any] = {
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

    def _scored(self, records: Sequence[Record]) -> dict[str, Any]:
        """Columns of scored requests and of their tokens."""
        tokens = [r.get("token_ids") or [] for r in records]
        return {
            "token_offsets": [len(t) for t in tokens],
            "token_ids": _join(tokens),
            "logprobs": _join(r.get("logprobs") or [] for r in records),
            "sum_logprob": [r.get("sum_logprob") for r in records],
            "perplexity": [r.get("perplexity") for r in records],
        }

    def _extracted(self, records: Sequence[Record]) -> dict[str, Any]:
        """Columns of requests with activations, and of their tokens."""
        tokens = [r.get("token_ids") or [] for r in records]
        return {
            "token_offsets": [len(t) for t in tokens],
            "token_ids": _join(tokens),
            "first_row": [r.get("first_row") or 0 for r in records],
            "n_rows": [r.get("n_rows") or 0 for r in records],
        }

    def _create(self, file: h5py.File, column: Column, width: tuple[int, ...]) -> None:
        """Make an empty dataset, its axes labelled."""
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

    def _extend(self, name: str, values: Any) -> None:
        """Append values to a dataset; to offsets, where parts of the given lengths end."""
        data, count = self._data[name], len(values)
        if not count:
            return
        if name.endswith("_offsets"):
            values = int(data[-1]) + np.cumsum(values, dtype=np.int64)
        data.resize(len(data) + count, axis=0)
        data[-count:] = np.asarray(values, data.dtype)


def _join(lists: Iterable[Sequence[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(lists))


def _top_arrays(choices: Sequence[Record], n_top: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids (tokens, n_top), -1 where there is none, and log-probabilities, NaN there."""
    places = _join(c.get("top_logprobs") or [()] * len(c["token_ids"]) for c in choices)
    ids = np.full((len(places), n_top), -1, np.int32)
    logprobs = np.full((len(places), n_top), np.nan, np.float32)
    for row, place in enumerate(places):
        for column, (token, logprob) in enumerate(place):
            ids[row, column], logprobs[row, column] = token, logprob
    return ids, logprobs


def _text(value: str) -> str:
    """`value` as HDF5 can hold it: no zero bytes, no halves of surrogate pairs."""
    return value.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def top_width(record: Record) -> int:
    """Largest number of likeliest tokens that a record holds for one place."""
    places = (c.get("top_logprobs") or () for c in record.get("choices") or ())
    return max((len(place) for place in itertools.chain.from_iterable(places)), default=0)
