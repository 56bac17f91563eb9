"""Reading the parts of activations: what each is, how far it is written, whether it is sound."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import h5py
import numpy as np

from hpcinfer.array import BFLOAT16
from hpcinfer.io.atomic import AnyPath
from hpcinfer.io.checkpoint import raw
from hpcinfer.io.hdf5 import FILE_TYPES, file_format, open_h5
from hpcinfer.io.parts import FORMAT, part_names

_READ_BYTES = 1 << 23  # of a dataset at a time


@dataclass
class Part:
    """What the joined file knows of a part.

    Attributes
    ----------
    path : file
    run : generation and replica
    rank : of the run that wrote it
    first_row : of its rows among those of the run
    capacity : rows that it can take
    columns : name -> (first, stop) among the columns of the field
    state : (datasets, 2) uint64, rows written and their crc32
    """

    path: str
    run: tuple[int, int]
    rank: int
    first_row: int
    capacity: int
    columns: dict[str, tuple[int, int]]
    state: np.ndarray

    @property
    def n_rows(self) -> int:
        """Rows that all its datasets have."""
        return int(self.state[:, 0].min(initial=2**62))


def read_parts(path: AnyPath) -> list[Part]:
    """Every part of the joined file `path`."""
    return [read_part(name) for _, name in part_names(path)]


def read_part(path: str) -> Part:
    """What a part is and how far it is written.

    Raises
    ------
    ValueError
        If it is no part, or damaged.
    """
    with open_h5(path) as file:
        if file_format(file) != FORMAT:
            raise ValueError(f"activations: got {path}, need a part that `hpcinfer extract` wrote")

        # Every dataset has the same rows, and some columns of its field
        columns, capacity, facts = {}, 0, file.attrs
        try:
            for name in _dataset_names(file):
                data = file[name]
                first, capacity = int(data.attrs["first_column"]), data.shape[0]
                columns[name] = (first, first + data.shape[1])
            run = int(facts["generation"]), int(facts["replica"])
            rank, first_row = int(facts["rank"]), int(facts["first_row"])
            return Part(path, run, rank, first_row, capacity, columns, file["state"][:])
        except (KeyError, OSError, RuntimeError) as error:
            raise ValueError(f"activations: got damaged part {path} ({error})") from error


def checksum(state: np.ndarray) -> int:
    """Checksum of all that a part's state says."""
    return zlib.crc32(raw(np.ascontiguousarray(state)))


def damaged_datasets(path: str) -> list[str]:
    """Names of the datasets of a part whose rows do not have their checksum."""
    damaged, state = [], read_part(path).state
    with open_h5(path) as file:
        for name in _dataset_names(file):
            data = file[name]
            n_rows, crc = map(int, state[data.attrs["number"]])

            # Read its rows piece by piece
            row_bytes = data.dtype.itemsize * int(np.prod(data.shape[1:]))
            step, found = max(1, _READ_BYTES // row_bytes), 0
            for start in range(0, n_rows, step):
                found = zlib.crc32(raw(_read_bits(data, start, min(start + step, n_rows))), found)
            if found != crc:
                damaged.append(name)
    return damaged


def _dataset_names(file: h5py.File) -> list[str]:
    """Names of the datasets that hold rows."""
    names: list[str] = []

    def visit(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset) and name != "state":
            names.append(name)

    file.visititems(visit)
    return names


def _read_bits(data: h5py.Dataset, start: int, stop: int) -> np.ndarray:
    """Rows as they are stored; those of bfloat16 as the numbers that their bits are."""
    shape, type_id = (stop - start, *data.shape[1:]), data.id.get_type()
    is_bfloat16 = type_id.equal(FILE_TYPES[BFLOAT16])
    rows = np.empty(shape, np.uint16 if is_bfloat16 else data.dtype)
    space = data.id.get_space()
    space.select_hyperslab((start, *[0] * (len(shape) - 1)), shape)
    data.id.read(h5py.h5s.create_simple(shape), space, rows, mtype=type_id)
    return rows
