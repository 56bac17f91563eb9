"""Parts of activations on disk: the files of one rank, to which rows are written as they are made.

A part is ``NAME.parts/<generation>-<replica>-<rank>-<segment>.h5``: rows of one rank's columns. A
run that goes on where another was killed is a generation of its own. Layout, format version 1::

    /                    attributes: format = "hpcinfer-activations-part", format_version = 1,
                         hpcinfer_version, generation, replica, rank, first_row (among those of the
                         replica)
    /<point>/<layer>     (rows, own columns, ...); attributes: first_column, number
    /state               (datasets, 2) uint64: rows written and their crc32, by `number`

A part is made with place for its rows, contiguous and empty, and closed. Rows are then put there by
plain writes, and after them their number in /state. So nothing that HDF5 needs ever changes: a part
opens at any moment, also after a kill, and writing is as fast as to any file. When it is full, or
the run ends, it is brought to the disk. Places that are left are a hole, which takes no space;
where it is most of the file, the rows are copied to a file without it. Compressed parts are written
whole, when they are full. They are read by `hpcinfer.io.read_parts`.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
import zlib
from collections.abc import Container, Iterable
from typing import Any, NamedTuple

import h5py
import numpy as np

from hpcinfer import __version__
from hpcinfer.array import BFLOAT16
from hpcinfer.io.atomic import AnyPath, try_to_write, writing
from hpcinfer.io.checkpoint import raw
from hpcinfer.io.hdf5 import FILE_TYPES, MODEL_OPTIONS, replacing_h5

FORMAT, FORMAT_VERSION = "hpcinfer-activations-part", 1
PARTS_SUFFIX = ".parts"

# Bytes of the first file of a rank, and of its largest; each is twice the one before
_FIRST_BYTES, _MOST_BYTES = 1 << 22, 1 << 30

# Share of a part's rows up to which they are copied to a smaller one, as well as few bytes
_LITTLE, _FEW_BYTES = 0.25, 1 << 24

# Bytes that a rank holds before it compresses them, of a compressed chunk, and of a copy
_PACKED_BYTES, _CHUNK_BYTES, _COPY_BYTES = 1 << 24, 1 << 18, 1 << 23

_NAME = re.compile(r"(\d+)-(\d+)-(\d+)-(\d+)\.h5")
_LEFT = re.compile(r"\d+-\d+-(\d+)-\d+\.h5(\.new)?(\.partial)?")


class Field(NamedTuple):
    """One dataset: name, shape and element type of a row, labels of its axes, meaning."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    labels: tuple[str, ...]
    description: str


class ColumnShare(NamedTuple):
    """A field with the columns of its first axis that one rank writes."""

    field: Field
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of this rank's part of a row."""
        return (self.stop - self.start, *self.field.shape[1:])

    @property
    def row_bytes(self) -> int:
        """Bytes of this rank's part of a row."""
        return int(np.prod(self.shape)) * self.field.dtype.itemsize


def parts_folder(path: AnyPath) -> str:
    """Folder of the parts of the joined file `path`."""
    return os.path.splitext(os.fspath(path))[0] + PARTS_SUFFIX


def part_names(path: AnyPath) -> list[tuple[tuple[int, ...], str]]:
    """((generation, replica, rank, segment), file) of every part of the joined file `path`."""
    folder = parts_folder(path)
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    found = [(_NAME.fullmatch(name), os.path.join(folder, name)) for name in names]
    return [(tuple(map(int, match.groups())), name) for match, name in found if match]


def next_generation(path: AnyPath) -> int:
    """Number for the parts of a new run into `path`."""
    return 1 + max((generation for (generation, *_), _ in part_names(path)), default=0)


def try_parts(path: AnyPath, rank: int) -> None:
    """Make the folder of the parts, and make sure that this rank can write there.

    Raises
    ------
    RuntimeError
        If it cannot.
    """
    folder = parts_folder(path)
    with writing(folder):
        os.makedirs(folder, exist_ok=True)
    try_to_write(os.path.join(folder, f"try-{rank}"))


def clear_parts(path: AnyPath, ranks: Container[int] | None = None) -> None:
    """Remove the parts that earlier runs, or some ranks of them, have left for `path`."""
    folder = parts_folder(path)
    with writing(folder), contextlib.suppress(FileNotFoundError):
        for name in os.listdir(folder):
            left = _LEFT.fullmatch(name)
            if left and (ranks is None or int(left[1]) in ranks):
                os.unlink(os.path.join(folder, name))


Shares = dict[str, ColumnShare]


class PartFiles:
    """The files of one rank.

    Parameters
    ----------
    path : joined file
    generation, replica, rank : numbers in the files' names
    shares : what this rank writes, none of it empty
    compress : whether to compress the rows

    Attributes
    ----------
    written_bytes, time_s : bytes of the rows so far, and seconds that writing them took

    Raises
    ------
    RuntimeError
        Here and in all methods, if a file cannot be written.
    """

    def __init__(
        self,
        path: AnyPath,
        generation: int,
        replica: int,
        rank: int,
        shares: Iterable[ColumnShare],
        compress: bool = False,
    ) -> None:
        self._folder = parts_folder(path)
        self._stem = f"{generation:03d}-{replica:03d}-{rank:05d}"
        self._facts = {"generation": generation, "replica": replica, "rank": rank}
        self._shares = {share.field.name: share for share in shares}

        # Start without a file: how large the first is depends on the rows
        self._row_bytes = max(1, sum(share.row_bytes for share in self._shares.values()))
        self._compress, self._made = compress, 0
        self._segments: list[_Segment | _PackedSegment] = []
        self._next_row, self.written_bytes, self.time_s = 0, 0, 0.0

    def append(self, name: str, rows: np.ndarray) -> None:
        """Write the next rows of a dataset: (n, own columns, ...) of its element type, host."""
        began_s, rows = time.perf_counter(), np.ascontiguousarray(rows)
        self.written_bytes += rows.nbytes

        # Fill the segments that lack rows of this dataset, and close the full ones
        for segment in self._segments:
            rows = segment.append(name, rows)
        while len(rows):
            self._segments.append(self._new_segment())
            rows = self._segments[-1].append(name, rows)
        while self._segments and self._segments[0].is_full:
            self._segments.pop(0).close()
        self.time_s += time.perf_counter() - began_s

    def close(self) -> None:
        """Bring everything to the disk, without space for more."""
        began_s = time.perf_counter()
        while self._segments:
            self._segments.pop(0).close()
        self.time_s += time.perf_counter() - began_s

    def abandon(self) -> None:
        """Leave the files as they are."""
        while self._segments:
            self._segments.pop(0).abandon()

    def _new_segment(self) -> _Segment | _PackedSegment:
        """A segment that can take the next rows."""
        path = os.path.join(self._folder, f"{self._stem}-{self._made:05d}.h5")
        nbytes = min(_FIRST_BYTES << min(self._made, 32), _MOST_BYTES)
        kind: type[_Segment | _PackedSegment] = _Segment
        if self._compress:
            nbytes, kind = _PACKED_BYTES, _PackedSegment
        n_rows = max(1, nbytes // self._row_bytes)
        segment = kind(path, self._shares, n_rows, self._facts | {"first_row": self._next_row})
        self._made, self._next_row = self._made + 1, self._next_row + n_rows
        return segment


class _Segment:
    """One part to which rows are written as they come.

    Parameters
    ----------
    path : file to make
    shares : name -> what this rank writes
    n_rows : rows that it can take
    facts : attributes of the file
    """

    def __init__(self, path: str, shares: Shares, n_rows: int, facts: dict[str, int]) -> None:
        self.path, self._shares, self._n_rows, self._facts = path, shares, n_rows, facts
        self._numbers = {name: number for number, name in enumerate(shares)}
        self._state = np.zeros((len(shares), 2), np.uint64)
        self._offsets, self._state_offset = _make_part(path, shares, n_rows, facts)
        with writing(path):
            self._descriptor = os.open(path, os.O_RDWR)

    @property
    def is_full(self) -> bool:
        """True if every dataset has all its rows."""
        return bool((self._state[:, 0] == self._n_rows).all())

    def append(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Write rows as far as they fit; returns the others."""
        number, row_bytes = self._numbers[name], self._shares[name].row_bytes
        start, crc = map(int, self._state[number])
        now, later = np.split(rows, [self._n_rows - start])
        if len(now):
            # First the rows, then their number and checksum
            data = raw(now)
            self._write(data, self._offsets[name] + start * row_bytes)
            self._state[number] = start + len(now), zlib.crc32(data, crc)
            entry = self._state[number]
            self._write(raw(entry), self._state_offset + number * entry.nbytes)
        return later

    def close(self) -> None:
        """Bring the rows to the disk, without most of the space that was not needed."""
        n_rows = int(self._state[:, 0].min(initial=self._n_rows))
        nbytes = n_rows * sum(share.row_bytes for share in self._shares.values())
        with writing(self.path):
            if n_rows < self._n_rows and (n_rows <= _LITTLE * self._n_rows or nbytes <= _FEW_BYTES):
                self._shorten(n_rows)
            os.fsync(self._descriptor)
        os.close(self._descriptor)

    def abandon(self) -> None:
        """Leave the file as it is."""
        os.close(self._descriptor)

    def _shorten(self, n_rows: int) -> None:
        """Put the file in the place of which it is the beginning: the same with fewer rows."""
        path = f"{self.path}.new"
        offsets, state_offset = _make_part(path, self._shares, n_rows, self._facts)
        with open(path, "r+b", buffering=0) as file:
            for name, share in self._shares.items():
                stop = n_rows * share.row_bytes
                for at in range(0, stop, _COPY_BYTES):
                    block = os.pread(
                        self._descriptor, min(_COPY_BYTES, stop - at), self._offsets[name] + at
                    )
                    _write_at(file.fileno(), block, offsets[name] + at)
            _write_at(file.fileno(), raw(self._state), state_offset)
            os.dup2(file.fileno(), self._descriptor)
        os.replace(path, self.path)

    def _write(self, data: memoryview, offset: int) -> None:
        with writing(self.path):
            _write_at(self._descriptor, data, offset)


class _PackedSegment:
    """One part that is held in memory until it is compressed; as `_Segment`."""

    def __init__(self, path: str, shares: Shares, n_rows: int, facts: dict[str, int]) -> None:
        self.path, self._shares, self._n_rows, self._facts = path, shares, n_rows, facts
        self._held: dict[str, list[np.ndarray]] = {name: [] for name in shares}
        self._counts = dict.fromkeys(shares, 0)

    @property
    def is_full(self) -> bool:
        return all(n == self._n_rows for n in self._counts.values())

    def append(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Keep rows as far as they fit; returns the others."""
        now, later = np.split(rows, [self._n_rows - self._counts[name]])
        if len(now):
            self._held[name].append(now.copy())
            self._counts[name] += len(now)
        return later

    def close(self) -> None:
        """Write the file."""
        n_rows = min(self._counts.values())
        rows = {name: np.concatenate(held) for name, held in self._held.items()}
        _make_part(self.path, self._shares, n_rows, self._facts, rows)

    def abandon(self) -> None:
        """Nothing was written."""


def _make_part(
    path: str,
    shares: Shares,
    n_rows: int,
    facts: dict[str, int],
    rows: dict[str, np.ndarray] | None = None,
) -> tuple[dict[str, int], int]:
    """Make a part: with space for rows, or with compressed ones.

    Parameters
    ----------
    rows : name -> (n_rows, own columns, ...) to compress, or None

    Returns
    -------
    offsets : name -> byte of the file at which its rows begin
    state_offset : byte at which /state begins
    """
    offsets: dict[str, int] = {}
    state = np.zeros((len(shares), 2), np.uint64)
    with replacing_h5(path, sync=rows is not None, **MODEL_OPTIONS) as (file, disk):
        file.attrs["format"], file.attrs["format_version"] = FORMAT, FORMAT_VERSION
        file.attrs["hpcinfer_version"] = __version__
        file.attrs.update(facts)

        # Make each dataset, and write its rows if they are here
        for number, (name, share) in enumerate(shares.items()):
            shape = (n_rows, *share.shape)
            data = create(file, name, shape, share.field.dtype, _part_plan(shape, share, rows))
            data.attrs["first_column"], data.attrs["number"] = share.start, number
            label(data, share.field)
            if rows is None:
                offsets[name] = data.id.get_offset()
            elif n_rows:
                data.id.write(
                    h5py.h5s.ALL, h5py.h5s.ALL, _bits(rows[name]), mtype=data.id.get_type()
                )
                state[number] = n_rows, zlib.crc32(raw(rows[name]))
            disk.check()

        # Say how far it is written, behind all rows
        table = create(file, "state", state.shape, state.dtype, _plan(h5py.h5d.CONTIGUOUS))
        table[...] = state
        return offsets, table.id.get_offset()


def _part_plan(
    shape: tuple[int, ...], share: ColumnShare, rows: dict[str, np.ndarray] | None
) -> Any:
    """How a part stores a dataset of some shape: as one run of bytes, or in compressed chunks."""
    if rows is None or 0 in shape:
        return _plan(h5py.h5d.CONTIGUOUS)
    plan = _plan(h5py.h5d.CHUNKED)
    plan.set_chunk((min(shape[0], max(1, _CHUNK_BYTES // share.row_bytes)), *shape[1:]))
    plan.set_shuffle()
    plan.set_deflate(1)
    return plan


def _plan(layout: int) -> Any:
    """Creation properties of a dataset, its place fixed at once."""
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_layout(layout)
    plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    return plan


def create(
    file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype, plan: Any
) -> h5py.Dataset:
    """New dataset with the creation properties `plan`, in a group that is made if need be."""
    group, _, last = name.rpartition("/")
    parent = file.require_group(group) if group else file
    space = h5py.h5s.create_simple(shape)
    return h5py.Dataset(
        h5py.h5d.create(parent.id, last.encode(), FILE_TYPES[np.dtype(dtype)], space, plan)
    )


def label(data: h5py.Dataset, field: Field, rows: str = "tokens") -> None:
    """Name the axes of a dataset, and say what it is."""
    for dim, label in zip(data.dims, (rows, *field.labels), strict=True):
        dim.label = label
    data.attrs["description"] = field.description


def _bits(x: np.ndarray) -> np.ndarray:
    """An array as HDF5 moves it: bfloat16 as the numbers that its bits are."""
    return x.view(np.uint16) if x.dtype == BFLOAT16 else x


def _write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` from a byte of the file on."""
    data = memoryview(data)
    while len(data):
        n = os.pwrite(descriptor, data, offset)
        data, offset = data[n:], offset + n
