"""One interface to a model on disk, whether Hugging Face directory or converted .h5.

Both kinds store every tensor as one unbroken run of little-endian values in row-major order, so a
tensor is (file, offset, shape, element type) and one way of reading serves both. What differs is
only how that table is found and checked: `hpcinfer.io.safetensors` and `hpcinfer.io.hdf5`.

The safetensors library's own slices are not used: through NumPy it returns no bfloat16 slices, it
cannot fill a given array, and it maps the whole file, whose touched pages then count as memory
of the rank. Here unbroken ranges are read straight into the target; broken ones (columns of a
matrix) are picked from a map of the rows at hand, at most a block of the result at a time.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import EllipsisType
from typing import BinaryIO, cast

import numpy as np

from hpcinfer.array import BFLOAT16
from hpcinfer.io.atomic import AnyPath
from hpcinfer.io.metadata import Metadata

BLOCK_BYTES = 16 << 20
SAMPLE_ITEMS = 512
MAX_AXES = 32
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
Box = tuple[slice, ...]
Block = tuple[tuple[int, ...], np.ndarray]  # place of the first element, and the elements

SCALES = ".scales"  # behind the name of a quantised tensor, that of its scales


@dataclass(frozen=True)
class Coding:
    """How the values of a quantised tensor are stored: as codes, rows of `columns` of them.

    Attributes
    ----------
    bits : 8 for int8, 4 for two codes in a byte, of which the lower bits hold the first
    group : neighbours of a row that share a scale
    columns : codes of a row
    """

    bits: int
    group: int
    columns: int

    @property
    def dtype(self) -> np.dtype:
        """Element type of the stored codes."""
        return np.dtype(np.int8 if self.bits == 8 else np.uint8)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of codes."""
        return -(-self.columns * self.bits // 8)

    @property
    def row_scales(self) -> int:
        """Scales of a row."""
        return -(-self.columns // self.group)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint.

    Attributes
    ----------
    name, shape, nbytes : of the tensor as it is stored
    dtype : element type (ml_dtypes.bfloat16 for BF16)
    file : path of the file that holds it
    offset : byte of that file at which it begins
    crc32 : stored checksum of its bytes, None if there is none
    coding : how its values are codes, whose scales are the tensor `name` + ".scales"; None if they
        are the tensor's own
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    nbytes: int
    file: str
    offset: int
    crc32: int | None = None
    coding: Coding | None = None

    @property
    def n_values(self) -> int:
        """Numbers that the tensor stands for."""
        if self.coding is not None:
            return self.shape[0] * self.coding.columns
        return math.prod(self.shape)


class Checkpoint:
    """A model on disk: its metadata, the table of its tensors, and reading of their parts.

    Attributes
    ----------
    path : of the directory or file
    kind : "safetensors" or "hdf5"
    metadata : its fields (config, tokenizer_json, ...) are attributes of this object too
    tensors : name -> TensorInfo
    file_bytes : bytes of all tensors
    bytes_read : bytes of tensor data read so far
    block_bytes : size of the blocks in which data is converted, picked or streamed
    """

    def __init__(
        self, path: str, kind: str, metadata: Metadata, tensors: dict[str, TensorInfo]
    ) -> None:
        self.path, self.kind, self.metadata, self.tensors = path, kind, metadata, tensors
        self.config = metadata.config
        self.generation_config = metadata.generation_config
        self.tokenizer_config = metadata.tokenizer_config
        self.special_tokens_map = metadata.special_tokens_map
        self.tokenizer_json = metadata.tokenizer_json
        self.chat_template = metadata.chat_template
        self.file_bytes = sum(info.nbytes for info in tensors.values())
        self.bytes_read = 0
        self.block_bytes = BLOCK_BYTES
        self._files: dict[str, BinaryIO] = {}

    def read(
        self,
        name: str,
        axis: int = 0,
        pieces: Sequence[tuple[int, int]] | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Read a tensor, or only some ranges of one of its axes.

        Parameters
        ----------
        name : of the tensor
        axis : the axis that is cut
        pieces : (start, stop) of ranges of `axis`, concatenated along it in the given order; None
            for the whole tensor
        out : host array of the result's shape to fill; another floating type than the file's is
            converted to, block by block

        Returns
        -------
        `out`, or a new array of the file's element type

        Raises
        ------
        ValueError
            If there is no such tensor, a range leaves the axis, or `out` does not fit.
        RuntimeError
            If the file has changed or cannot be read.
        """
        info = self._info(name)
        axis, ranges = _check_pieces(info, axis, pieces)
        shape = list(info.shape)
        if shape:
            shape[axis] = sum(stop - start for start, stop in ranges)
        out = _check_out(info, tuple(shape), out)

        # Fill `out` piece by piece along the axis
        at = 0
        for start, stop in ranges:
            origin, target = [0] * len(shape), out
            if shape:
                origin[axis] = start
                target = out[(slice(None),) * axis + (slice(at, at + stop - start),)]
            self._read_box(info, origin, target)
            at += stop - start
        self.bytes_read += out.size * info.dtype.itemsize
        return out

    def stream(self, name: str) -> Iterator[Block]:
        """Read a tensor as unbroken blocks in the order of the file.

        Yields
        ------
        start : indices of the block's first element
        block : at most `block_bytes` long
        """
        info = self._info(name)
        for box in blocks(info.shape, self.block_bytes // info.dtype.itemsize):
            start = tuple(s.start for s in box)
            block = np.empty([s.stop - s.start for s in box], info.dtype)
            self._read_block(info, start, block)
            self.bytes_read += block.nbytes
            yield start, block

    @cached_property
    def checksum(self) -> str:
        """Identity of the weights (hex): names, shapes, types, and the first values of each tensor.

        It is cheap, as it reads 512 values per tensor and not the file, and it is the same for a
        directory and for the .h5 made from it. `integrity.check` reads everything.
        """
        digest = hashlib.blake2b(digest_size=16)
        for name, info in sorted(self.tensors.items()):
            digest.update(repr((name, info.shape, info.dtype.name)).encode())
            if info.nbytes:
                shape = [1] * len(info.shape)
                shape[-1:] = [min(n, SAMPLE_ITEMS) for n in info.shape[-1:]]
                sample = np.empty(shape, info.dtype)
                self._read_block(info, (0,) * len(shape), sample)
                digest.update(raw(sample))
        return digest.hexdigest()

    def close(self) -> None:
        """Close the files; reading again opens them anew."""
        while self._files:
            self._files.popitem()[1].close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise ValueError(
                f"checkpoint: got tensor name {name!r}, need one that {self.path} holds"
            ) from None

    def _read_box(self, info: TensorInfo, origin: Sequence[int], target: np.ndarray) -> None:
        """Fill `target` with the box of its shape at `origin`, converting block by block."""
        for box in blocks(target.shape, self.block_bytes // info.dtype.itemsize):
            place: tuple[slice | EllipsisType, ...] = (*box, ...)
            part = target[place]
            start = [o + s.start for o, s in zip(origin, box, strict=True)]
            if part.dtype == info.dtype and part.flags.c_contiguous:
                self._read_block(info, start, part)
            else:
                block = np.empty(part.shape, info.dtype)
                self._read_block(info, start, block)
                with np.errstate(over="ignore"):  # what becomes infinite is looked for elsewhere
                    part[...] = block

    def _read_block(self, info: TensorInfo, start: Sequence[int], block: np.ndarray) -> None:
        """Fill `block` (contiguous, of the file's type) with the box of its shape at `start`."""
        file = self._open(info)
        shape, size = info.shape, info.dtype.itemsize

        # A box is unbroken in the file if all axes before the last cut one have length one
        last_cut = max((a for a, n in enumerate(block.shape) if n < shape[a]), default=0)
        if math.prod(block.shape[:last_cut]) == 1:
            first = sum(i * math.prod(shape[a + 1 :]) for a, i in enumerate(start))
            _read_exactly(file, info.offset + first * size, raw(block), info)
            return

        # Map the rows that hold a broken one, only as long as it takes to pick the box
        first = info.offset + start[0] * math.prod(shape[1:]) * size
        rows = np.memmap(file, info.dtype, "r", first, (block.shape[0], *shape[1:]))
        inner = zip(start[1:], block.shape[1:], strict=True)
        block[...] = rows[(slice(None), *(slice(i, i + n) for i, n in inner))]

    def _open(self, info: TensorInfo) -> BinaryIO:
        if info.file not in self._files:
            try:
                self._files[info.file] = cast(BinaryIO, open(info.file, "rb", buffering=0))
            except OSError as error:
                raise RuntimeError(
                    f"checkpoint: cannot open {info.file}: {error.strerror}"
                ) from error

        # A file that shrank would end the process with SIGBUS when it is mapped
        file = self._files[info.file]
        if os.fstat(file.fileno()).st_size < info.offset + info.nbytes:
            raise _changed(info)
        return file


def blocks(shape: Sequence[int], limit: int) -> Iterator[Box]:
    """Cut an array into boxes of at most `limit` elements, each unbroken in row-major order.

    Yields
    ------
    slices, one per axis, in row-major order; nothing for an array without elements
    """
    if math.prod(shape) == 0:
        return
    if not shape:
        yield ()
        return

    # The cut axis is the first whose rows fit into the limit
    limit = max(1, limit)
    axis = next(a for a in range(len(shape)) if math.prod(shape[a + 1 :]) <= limit)
    step = limit // math.prod(shape[axis + 1 :])
    whole = tuple(slice(0, n) for n in shape[axis + 1 :])
    for lead in np.ndindex(*shape[:axis]):
        for start in range(0, shape[axis], step):
            stop = min(start + step, shape[axis])
            yield (*(slice(i, i + 1) for i in lead), slice(start, stop), *whole)


def raw(array: np.ndarray) -> memoryview:
    """Bytes of a contiguous `array`, to be read or written where they are."""
    return array.reshape(-1).view(np.uint8).data


def is_floating(dtype: np.dtype) -> bool:
    """True for floating types, bfloat16 among them (which NumPy does not count)."""
    return dtype == BFLOAT16 or bool(np.issubdtype(dtype, np.floating))


def table_entry(
    name: str,
    shape: Sequence[int],
    dtype: np.dtype,
    nbytes: int,
    file: AnyPath,
    offset: int,
    crc32: int | None = None,
    coding: Coding | None = None,
) -> TensorInfo:
    """TensorInfo of what a header declares, once its numbers agree with each other.

    Raises
    ------
    ValueError
        If the shape is none that an array can have or does not need `nbytes` bytes.
    """
    # Refuse what no array can have, before anything is computed of it
    if len(shape) > MAX_AXES or math.prod(max(n, 1) for n in shape) * dtype.itemsize >= 2**63:
        raise ValueError(
            f"checkpoint: got {name!r} in {file} of {len(shape)} axes, need at most {MAX_AXES} "
            "axes and 2**63 bytes"
        )
    if math.prod(shape) * dtype.itemsize != nbytes:
        raise ValueError(
            f"checkpoint: got {nbytes} bytes for {name!r} in {file}, need "
            f"{math.prod(shape) * dtype.itemsize} for shape {list(shape)} of {dtype.name}"
        )
    return TensorInfo(name, tuple(shape), dtype, nbytes, os.fspath(file), offset, crc32, coding)


def _check_pieces(
    info: TensorInfo, axis: int, pieces: Sequence[tuple[int, int]] | None
) -> tuple[int, list[tuple[int, int]]]:
    """Axis, counted from the first, and ranges of it; all of axis 0 if none are given."""
    rank = len(info.shape)
    if pieces is None:
        return 0, [(0, info.shape[0] if rank else 1)]

    # Refuse what leaves the tensor
    if not -rank <= axis < rank:
        raise ValueError(
            f"checkpoint: got axis {axis} for {info.name!r}, need one of its {rank} axes"
        )
    axis %= rank
    for start, stop in pieces:
        if not 0 <= start <= stop <= info.shape[axis]:
            raise ValueError(
                f"checkpoint: got range {start}:{stop} on axis {axis} of {info.name!r}, "
                f"need 0 <= start <= stop <= {info.shape[axis]}"
            )
    return axis, list(pieces)


def _check_out(info: TensorInfo, shape: tuple[int, ...], out: np.ndarray | None) -> np.ndarray:
    if out is None:
        return np.empty(shape, info.dtype)
    if out.shape != shape:
        raise ValueError(
            f"checkpoint: got an array of shape {out.shape} for {info.name!r}, need {shape}"
        )
    if out.dtype != info.dtype and not (is_floating(out.dtype) and is_floating(info.dtype)):
        raise ValueError(
            f"checkpoint: got an array of {out.dtype} for {info.name!r}, need {info.dtype} or, "
            "between floating types, any other"
        )
    return out


def _read_exactly(file: BinaryIO, offset: int, target: memoryview, info: TensorInfo) -> None:
    """Fill `target` from byte `offset` of the file on."""
    done = 0
    while done < len(target):
        try:
            count = os.preadv(file.fileno(), [target[done:]], offset + done)
        except OSError as error:
            raise RuntimeError(f"checkpoint: cannot read {info.file}: {error.strerror}") from error
        if count == 0:
            raise _changed(info)
        done += count


def _changed(info: TensorInfo) -> RuntimeError:
    return RuntimeError(
        f"checkpoint: got the end of {info.file} inside {info.name!r}; the file was changed "
        "while in use, start again"
    )
