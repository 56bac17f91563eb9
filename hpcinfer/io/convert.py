"""Hugging Face directory (or .h5) -> .h5 with weights whole, metadata inside and checksums."""

from __future__ import annotations

import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hpcinfer import array
from hpcinfer.io.atomic import AnyPath, writing
from hpcinfer.io.checkpoint import (
    BLOCK_BYTES,
    SCALES,
    Block,
    Checkpoint,
    Coding,
    TensorInfo,
    raw,
    table_entry,
)
from hpcinfer.io.claims import claim, refuse_existing
from hpcinfer.io.hdf5 import ALIGN_BYTES, MODEL_OPTIONS, ModelWriter, replacing_h5
from hpcinfer.io.models import open_checkpoint

SPARE_BYTES = 1 << 20

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Summary:
    """What a conversion did.

    Attributes
    ----------
    tensors : number of tensors
    bytes : of all of them
    time_s : seconds that it took
    """

    tensors: int
    bytes: int
    time_s: float


@dataclass(frozen=True)
class Coded:
    """A tensor of the new file that is codes and scales.

    Attributes
    ----------
    source : name in the source
    transposed : True if the source stores it (in, out)
    """

    source: str
    transposed: bool


@dataclass(frozen=True)
class Recoding:
    """What a new file holds otherwise than its source.

    Attributes
    ----------
    coded : new name -> Coded
    copied : new name -> name in the source, of tensors that are needed once more
    config : what the config says otherwise
    bits, group : as in `Coding`
    encode : function of (n, I) float32 that returns codes as they are stored, and scales; raises
        ValueError for what cannot be quantised
    """

    coded: dict[str, Coded]
    copied: dict[str, str]
    config: dict[str, Any]
    bits: int
    group: int
    encode: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


AS_IT_IS = Recoding(coded={}, copied={}, config={}, bits=8, group=1, encode=lambda x: (x, x))


def convert(
    source: AnyPath | Checkpoint,
    target: AnyPath,
    progress: Progress | None = None,
    overwrite: bool = True,
    block_bytes: int = BLOCK_BYTES,
    recode: Callable[[Checkpoint], Recoding] | None = None,
) -> Summary:
    """Write the model `source` as one file `target`.

    Tensors are moved in blocks, so that no tensor is ever held whole; of a quantised one its scales
    are. The file is built under a temporary name in the folder of `target` and renamed at the end.

    Parameters
    ----------
    source : Hugging Face directory, or a converted .h5 (whose checksums are compared on the way)
    target : name of the new file
    progress : called with (done_bytes, total_bytes) after every block
    overwrite : replace an existing file
    block_bytes : size of the blocks, about
    recode : function of the open Checkpoint that returns its Recoding; None to change nothing

    Raises
    ------
    ValueError
        If `source` is damaged or cannot be recoded, or `target` is read, exists and may not be
        replaced, or is no file.
    RuntimeError
        If `target` may not be written, or there is too little space.
    """
    # Refuse to write what is read, or what another run has made
    began = time.perf_counter()
    source_path = source.path if isinstance(source, Checkpoint) else source
    refuse_existing(target, overwrite)
    (target,) = claim([target], models=[source_path])
    with open_checkpoint(source) as model:
        model.block_bytes = block_bytes
        outputs = _Outputs(model, AS_IT_IS if recode is None else recode(model), progress)
        _require_space(target, outputs)

        # Stream tensor by tensor
        with replacing_h5(target, **MODEL_OPTIONS) as (file, disk):
            writer = ModelWriter(file, disk, outputs.metadata)
            for info, stream in outputs:
                crc32 = writer.add(info, stream)
                _compare(source, info, crc32)
        return Summary(outputs.n_tensors, outputs.bytes, time.perf_counter() - began)


class _Outputs:
    """The tensors of the new file, one after the other: pairs (TensorInfo, stream of blocks).

    Attributes
    ----------
    metadata : Metadata of the new file
    n_tensors, bytes : of all of them
    """

    def __init__(self, model: Checkpoint, recoding: Recoding, progress: Progress | None) -> None:
        self._model, self._recoding, self._progress = model, recoding, progress
        self.metadata = replace(model.metadata, config=model.config | recoding.config)

        # Part what becomes codes from what is copied: new name -> name in the source
        tensors, coded = model.tensors, recoding.coded
        named = dict(zip(tensors, tensors, strict=True)) | recoding.copied
        kept = {name: source for name, source in named.items() if name not in coded}
        self._coded, self._kept = coded, kept

        # Count what will be written, and what will be read
        codes_and_scales = [info for name in coded for info in self._stored(name)]
        infos = [tensors[name] for name in kept.values()] + codes_and_scales
        self.n_tensors, self.bytes = len(infos), sum(info.nbytes for info in infos)
        sources = [*kept.values(), *(tensor.source for tensor in coded.values())]
        self._total_bytes = sum(tensors[name].nbytes for name in sources)
        self._done_bytes = 0

    def __iter__(self) -> Iterator[tuple[TensorInfo, Iterable[Block]]]:
        for name, source in self._kept.items():
            info = self._model.tensors[source]
            yield replace(info, name=name), self._reported(self._model.stream(source))
        for name in self._coded:
            codes, scales = self._stored(name)
            found: list[np.ndarray] = []
            yield codes, self._reported(self._encoded(name, found))
            yield scales, [((0, 0), np.concatenate(found))]

    def _reported(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """The blocks of a tensor, telling `progress` once each is done."""
        before = self._model.bytes_read
        for start, block in blocks:
            yield start, block
            self._done_bytes += self._model.bytes_read - before
            before = self._model.bytes_read
            if self._progress:
                self._progress(self._done_bytes, self._total_bytes)

    def _encoded(self, name: str, scales: list[np.ndarray]) -> Iterator[Block]:
        """Codes of a tensor in blocks of rows; their scales are appended to `scales`."""
        tensor, model = self._coded[name], self._model
        info = model.tensors[tensor.source]
        _check_source(model, info)

        # Read, turn and encode some rows at a time
        n_out, n_in = _out_in(info, tensor.transposed)
        step = max(1, model.block_bytes // (4 * n_in))
        for start in range(0, n_out, step):
            rows = [(start, min(n_out, start + step))]
            block = model.read(info.name, int(tensor.transposed), rows)
            block = array.widen(block.T if tensor.transposed else block)
            try:
                codes, of_codes = self._recoding.encode(np.ascontiguousarray(block))
            except ValueError as error:
                raise ValueError(
                    f"convert: got {info.name} that cannot be quantised ({error}); fetch the model "
                    "again, or convert it without --quantize"
                ) from None
            scales.append(of_codes)
            yield (start, 0), codes

    def _stored(self, name: str) -> tuple[TensorInfo, TensorInfo]:
        """TensorInfo of a quantised tensor's codes, and of its scales."""
        tensor, (bits, group) = self._coded[name], (self._recoding.bits, self._recoding.group)
        n_out, n_in = _out_in(self._model.tensors[tensor.source], tensor.transposed)
        coding = Coding(bits, group, n_in)
        codes = _new(name, (n_out, coding.row_bytes), coding.dtype)
        scales = _new(name + SCALES, (n_out, coding.row_scales), np.dtype(np.float16))
        return replace(codes, coding=coding), scales


def _new(name: str, shape: tuple[int, ...], dtype: np.dtype) -> TensorInfo:
    return table_entry(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize, "", 0)


def _out_in(info: TensorInfo, transposed: bool) -> tuple[int, ...]:
    """Outputs and inputs of a matrix."""
    return info.shape[::-1] if transposed else info.shape


def _check_source(model: Checkpoint, info: TensorInfo) -> None:
    """Compare a tensor that is not written as it is with its stored checksum, if it has one."""
    if info.crc32 is not None:
        crc32, before = 0, model.bytes_read
        for _, block in model.stream(info.name):
            crc32 = zlib.crc32(raw(block), crc32)
        model.bytes_read = before
        _compare(model.path, info, crc32)


def _compare(source: AnyPath | Checkpoint, info: TensorInfo, crc32: int) -> None:
    if info.crc32 not in (None, crc32):
        raise ValueError(
            f"convert: got checksum {crc32:08x} of {info.name!r} in {source}, need the stored "
            f"{info.crc32:08x}; the file is damaged, fetch it again"
        )


def _require_space(target: str, outputs: _Outputs) -> None:
    with writing(target):
        free = shutil.disk_usage(os.path.dirname(os.path.abspath(target))).free
    need = outputs.bytes + outputs.n_tensors * ALIGN_BYTES + SPARE_BYTES
    if free < need:
        raise RuntimeError(
            f"convert: got {free} bytes of free space for {target}, need {need}; free space or "
            "choose another folder"
        )
