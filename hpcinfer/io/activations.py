"""Activations on disk: every rank writes files of its own, one file joins them.

``NAME.h5`` is the file to open. It holds no activations itself: its datasets are virtual, cut in
rows over the runs of the replicas and in columns over the ranks of each, and their sources are the
parts in ``NAME.parts/``, named relative to it. Moved together they stay readable.

Layout, format version 1::

    /                    attributes: format = "hpcinfer-activations", format_version = 1,
                         hpcinfer_version, kind = "extract", complete (every request of the input
                         is there, or has an error), and what the command adds
    /index, /line, /custom_id, /error, /token_offsets, /token_ids, /first_row, /n_rows
                         the requests, see `hpcinfer.io.results`. Rows of request i are
                         first_row[i] : first_row[i] + n_rows[i] of every dataset below: one for
                         each of its tokens, or a single one with pooling
    /<point>/<layer>     (rows, columns ...), labelled; /logits without a layer
    /parts               attribute folder; name, rows, bytes and checksum of the files it is joined
                         from: rows in use, size, and crc32 of /state

The parts are described in `hpcinfer.io.parts`. The joined file is written anew from time to time,
as results are; a request counts as finished when all ranks have its rows.

Reading takes four lines; `open_activations` also checks that all parts are there::

    from hpcinfer.io.activations import open_activations
    with open_activations("hidden.h5") as f:
        first, n = f["first_row"][3], f["n_rows"][3]
        x = f["residual/12"][first : first + n]

With h5py alone a missing part reads as NaN, -1 in integers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import h5py
import numpy as np

from hpcinfer.array import BFLOAT16
from hpcinfer.io.atomic import AnyPath, writing
from hpcinfer.io.columns import STRING, Record
from hpcinfer.io.hdf5 import Disk, file_format, open_h5
from hpcinfer.io.jsonl import JsonlWriter
from hpcinfer.io.parts import Field, clear_parts, create, label, part_names, parts_folder
from hpcinfer.io.read_parts import Part, checksum, damaged_datasets, read_part, read_parts
from hpcinfer.io.results import Hdf5Writer

FORMAT, FORMAT_VERSION = "hpcinfer-activations", 1

Run = tuple[int, int]  # generation and replica
Place = tuple[Run, int, int]  # of a request's rows: run, first row of it, number of rows


class ActivationsWriter(Hdf5Writer):
    """Writes the joined file; on one rank, while all others write parts.

    Parameters
    ----------
    path : ending in .h5
    fields : the datasets
    attributes : root attributes
    rows : what a row is, "tokens" or "requests"
    resume, least : see `Hdf5Writer`

    Attributes
    ----------
    done : indices of the requests that earlier runs have finished, all ranks having written their
        rows, and of those written by this one

    Raises
    ------
    ValueError
        If the parts to resume are of other fields, besides what `Hdf5Writer` refuses.
    """

    def __init__(
        self,
        path: AnyPath,
        fields: Sequence[Field],
        attributes: dict[str, Any],
        rows: str = "tokens",
        resume: bool = False,
        least: int = 0,
    ) -> None:
        self._fields, self._rows = fields, rows
        self._places: dict[int, Place] = {}

        # Keep those parts of earlier runs that can be joined
        folder = parts_folder(path)
        if not resume:
            clear_parts(path)
        with writing(folder):
            os.makedirs(folder, exist_ok=True)
        self._refuse_others(path)
        self._drop_torn(path)
        super().__init__(path, "extract", attributes, resume, least)

        # Do again what earlier runs have noted, but not all their ranks have written
        runs = self._runs()
        self._there = {i for i in self._done if self._is_there(self._places.get(i), runs)}

    @property
    def done(self) -> set[int]:
        return self._there

    def write(self, record: Record) -> None:
        """Keep a record; see `Hdf5Writer`."""
        super().write(record)
        self._there.add(record["index"])

    def close(self, final: bool = True) -> None:
        """Write the joined file; if `final`, remove the parts that it does not need."""
        open_before = self._journal is not None
        super().close(final)
        if final and open_before:
            used = {name for name, *_ in self._used}
            for _, path in part_names(self.path):
                if os.path.basename(path) not in used:
                    with writing(path):
                        os.unlink(path)

    def _note(self, record: Record) -> None:
        """Remember where the rows of a request are."""
        super()._note(record)
        if record.get("n_rows"):
            run = record["generation"], record["replica"]
            self._places[record["index"]] = run, record["first_row"], record["n_rows"]

    def _refuse_others(self, path: AnyPath) -> None:
        """Refuse parts of another selection, which would not join."""
        known = {f.name: f for f in self._fields}
        for part in read_parts(path):
            for name, (_, stop) in part.columns.items():
                if name not in known or stop > known[name].shape[0]:
                    raise ValueError(
                        f"activations: got {part.path} with {name}, need parts of the same points, "
                        "layers and model; use the options of the run to go on with, or start over"
                    )

    @staticmethod
    def _drop_torn(path: AnyPath) -> None:
        """Remove parts that a machine went down with before their rows were on the disk."""
        for part in read_parts(path):
            if part.n_rows < part.capacity and damaged_datasets(part.path):
                with writing(part.path):
                    os.unlink(part.path)

    def _runs(self) -> dict[Run, tuple[int, list[Part]]]:
        """Rows that all ranks of each run have, and its parts."""
        runs: dict[Run, list[Part]] = {}
        for part in read_parts(self.path):
            runs.setdefault(part.run, []).append(part)
        return {run: (_whole_rows(parts, self._fields), parts) for run, parts in runs.items()}

    def _lost(self, runs: dict[Run, tuple[int, list[Part]]]) -> list[int]:
        """Indices of the requests whose rows are not there."""
        return [i for i, place in sorted(self._places.items()) if not self._is_there(place, runs)]

    @staticmethod
    def _is_there(place: Place | None, runs: dict[Run, tuple[int, list[Part]]]) -> bool:
        """True if the rows of a request are written, or there are none."""
        if place is None:
            return True
        run, first_row, n_rows = place
        return run in runs and first_row + n_rows <= runs[run][0]

    def _records(self, journal: JsonlWriter, complete: bool) -> Iterator[Record]:
        """Records whose rows are there, with the row of the joined file at which each begins."""
        for record in super()._records(journal, complete):
            place = self._places.get(record["index"])
            if place is not None:
                run, first_row, n_rows = place
                if run not in self._bases or first_row + n_rows > self._lengths[run]:
                    continue
                record["first_row"] = first_row + self._bases[run]
            yield record

    def _fill(self, file: h5py.File, disk: Disk, journal: JsonlWriter, complete: bool) -> None:
        """Write the table of requests, and join the parts."""
        runs = self._runs()
        n_rows = self._lay_out(runs, complete)
        super()._fill(file, disk, journal, complete)
        file.attrs["format"], file.attrs["format_version"] = FORMAT, FORMAT_VERSION

        # Take from each part the rows that requests need
        used = [
            (part, min(part.n_rows, self._lengths[run] - part.first_row))
            for run in sorted(runs)
            for part in runs[run][1]
            if part.first_row < self._lengths[run]
        ]
        for spec in self._fields:
            self._join(file, spec, used, n_rows)
            disk.check()
        self._list_parts(file, used)

    def _lay_out(self, runs: dict[Run, tuple[int, list[Part]]], complete: bool) -> int:
        """Say where each run begins in the joined file; returns the rows of all."""
        # End each run with its last request that is there
        self._lengths = dict.fromkeys(runs, 0)
        for run, first_row, n_rows in self._places.values():
            if self._is_there((run, first_row, n_rows), runs):
                self._lengths[run] = max(self._lengths[run], first_row + n_rows)
        if complete and len(lost := self._lost(runs)):
            raise RuntimeError(
                f"activations: got {len(lost)} requests without rows in {parts_folder(self.path)}, "
                f"the first is request {lost[0]}, need all parts of the run; start it again"
            )

        # Lay the runs end to end
        starts = np.cumsum([0, *(self._lengths[run] for run in sorted(runs))]).tolist()
        self._bases = dict(zip(sorted(runs), starts[:-1], strict=True))
        return starts[-1]

    def _join(
        self, file: h5py.File, spec: Field, used: Sequence[tuple[Part, int]], n_rows: int
    ) -> None:
        """The virtual dataset of one field."""
        space = h5py.h5s.create_simple((n_rows, *spec.shape))
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_layout(h5py.h5d.VIRTUAL)
        plan.set_fill_value(np.array(-1 if spec.dtype.kind == "i" else np.nan, _native(spec.dtype)))

        # Map each part to its rows and columns
        folder = os.path.basename(parts_folder(self.path))
        for part, n in used:
            if spec.name not in part.columns:
                continue
            first, stop = part.columns[spec.name]
            block = (n, stop - first, *spec.shape[1:])
            corner = (self._bases[part.run] + part.first_row, first, *[0] * (len(block) - 2))
            space.select_hyperslab(corner, block)
            source = h5py.h5s.create_simple((part.capacity, *block[1:]))
            source.select_hyperslab((0,) * len(block), block)
            name = f"./{folder}/{os.path.basename(part.path)}".replace("%", "%%")
            plan.set_virtual(space, os.fsencode(name), f"/{spec.name}".encode(), source)
        space.select_all()
        data = create(file, spec.name, (n_rows, *spec.shape), spec.dtype, plan)
        label(data, spec, self._rows)

    def _list_parts(self, file: h5py.File, used: Sequence[tuple[Part, int]]) -> None:
        """The table of parts, and what is remembered of it."""
        self._used = [
            (os.path.basename(part.path), n, os.path.getsize(part.path), checksum(part.state))
            for part, n in used
        ]

        # Write it column by column
        columns = list(zip(*self._used, strict=True)) or [(), (), (), ()]
        group = file.create_group("parts")
        folder = os.fsencode(os.path.basename(parts_folder(self.path)))
        group.attrs.create("folder", folder, dtype=STRING)
        for name, dtype, values in zip(
            ("name", "rows", "bytes", "checksum"),
            (STRING, np.uint64, np.uint64, np.uint32),
            columns,
            strict=True,
        ):
            group.create_dataset(name, data=np.array(list(values), dtype))


def _native(dtype: np.dtype) -> np.dtype:
    """Element type that NumPy has itself: float32 for bfloat16."""
    return np.dtype(np.float32) if dtype == BFLOAT16 else dtype


def _whole_rows(parts: Sequence[Part], fields: Sequence[Field]) -> int:
    """Rows of a run that every rank has written, of all columns of all fields."""
    # Count the rows of each rank, as far as its parts follow on each other
    rows: dict[int, int] = {}
    columns: dict[int, dict[str, tuple[int, int]]] = {}
    for part in sorted(parts, key=lambda part: part.first_row):
        if part.first_row == rows.get(part.rank, 0):
            rows[part.rank] = part.first_row + part.n_rows
            columns[part.rank] = part.columns

    # Without all columns of a field there is no whole row
    whole = min(rows.values(), default=0)
    for spec in fields:
        at = 0
        for first, stop in sorted(own[spec.name] for own in columns.values() if spec.name in own):
            at = stop if first == at else at
        whole = whole if at == spec.shape[0] else 0
    return whole


# --- Reading -------------------------------------------------------------------------------------


def open_activations(path: AnyPath, verify: bool = False) -> h5py.File:
    """Open a joined file for reading, once all its parts are known to be there.

    Parameters
    ----------
    path : of the joined file
    verify : whether to read all parts and compare their checksums

    Raises
    ------
    ValueError
        If it is no such file, or a part is missing or is not the one that it was joined from.
    """
    file = open_h5(path)
    try:
        if file_format(file) != FORMAT:
            raise ValueError(f"activations: got {path}, need what `hpcinfer extract` wrote")
        check_parts(file, path, verify)
    except BaseException:
        file.close()
        raise
    return file


def joined_datasets(file: h5py.File) -> dict[str, h5py.Dataset]:
    """Name -> dataset of the activations in an open joined file."""
    found: dict[str, h5py.Dataset] = {}
    for name, item in file.items():
        if isinstance(item, h5py.Group) and name != "parts":
            layers = sorted(item, key=int)
            found |= {f"{name}/{n}": item[n] for n in layers}
        elif isinstance(item, h5py.Dataset) and item.is_virtual:
            found[name] = item
    return found


def check_parts(file: h5py.File, path: AnyPath, verify: bool = False) -> None:
    """Refuse an open joined file whose parts are not those that it was joined from.

    Raises
    ------
    ValueError
        In one line, with the first part that is missing or changed.
    """
    table, complete = file["parts"], bool(file.attrs["complete"])
    folder = os.path.join(os.path.dirname(os.path.realpath(path)), table.attrs["folder"])
    names = table["name"].asstr()[:]
    for i, name in enumerate(names):
        part_path, got = os.path.join(folder, name), None
        if not os.path.exists(part_path):
            got = "no file"
        else:
            part, nbytes = read_part(part_path), os.path.getsize(part_path)

            # An unfinished run may have gone on since the files were joined
            same = nbytes == table["bytes"][i] and checksum(part.state) == table["checksum"][i]
            if part.n_rows < table["rows"][i] or (complete and not same):
                got = "another file"
            elif verify and (damaged := damaged_datasets(part_path)):
                got = f"other bytes of {damaged[0]}"
        if got:
            raise ValueError(
                f"activations: got {got} for {part_path}, need the {len(names)} parts that {path} "
                "was joined from; move and copy both together, or extract again"
            )
