"""Hugging Face directory (or .h5) -> .h5 with weights whole, metadata inside and checksums."""

import os
import shutil
import time
from dataclasses import dataclass

from hpcinfer.io.atomic import refuse_directory, writing
from hpcinfer.io.checkpoint import BLOCK_BYTES, open_checkpoint
from hpcinfer.io.hdf5 import ALIGN_BYTES, MODEL_OPTIONS, ModelWriter, replacing_h5

SPARE_BYTES = 1 << 20


@dataclass(frozen=True)
class Summary:
    """What a conversion did: number of tensors, bytes of tensor data, seconds."""

    tensors: int
    bytes: int
    time_s: float


def convert(source, target, progress=None, overwrite=True, block_bytes=BLOCK_BYTES):
    """Write the model `source` as one file `target`.

    Tensors are moved in blocks of at most `block_bytes`, so that no tensor is ever held whole.
    The file is built under a temporary name in the folder of `target` and renamed at the end.

    Parameters
    ----------
    source : Hugging Face directory, or a converted .h5 (whose checksums are compared on the way)
    target : name of the new file
    progress : callable (done_bytes, total_bytes) or None, called after every block
    overwrite : bool, replace an existing file
    block_bytes : int

    Returns
    -------
    Summary

    Raises
    ------
    ValueError
        If `source` is damaged, or `target` exists and may not be replaced.
    RuntimeError
        If `target` is a folder, may not be written, or there is too little space.
    """
    began = time.perf_counter()
    target = os.fspath(target)
    if not overwrite and os.path.exists(target):
        raise ValueError(f"convert: got {target} which exists, need a new name; or overwrite it")
    with open_checkpoint(source) as model:
        model.block_bytes = block_bytes
        _require_space(target, model)

        # Stream tensor by tensor
        with replacing_h5(target, **MODEL_OPTIONS) as (file, disk):
            writer = ModelWriter(file, disk, model.metadata)
            for info in model.tensors.values():
                crc32 = writer.add(info, _reported(model, info.name, progress))
                if info.crc32 not in (None, crc32):
                    raise ValueError(
                        f"convert: got checksum {crc32:08x} of {info.name!r} in {source}, need the "
                        f"stored {info.crc32:08x}; the file is damaged, fetch it again"
                    )
        return Summary(len(model.tensors), model.file_bytes, time.perf_counter() - began)


def _reported(model, name, progress):
    """The blocks of a tensor, telling `progress` once each is done."""
    for start, block in model.stream(name):
        yield start, block
        if progress:
            progress(model.bytes_read, model.file_bytes)


def _require_space(target, model):
    with writing(target):
        refuse_directory(target)
        free = shutil.disk_usage(os.path.dirname(os.path.abspath(target))).free
    need = model.file_bytes + len(model.tensors) * ALIGN_BYTES + SPARE_BYTES
    if free < need:
        raise RuntimeError(
            f"convert: got {free} bytes of free space for {target}, need {need}; free space or "
            "choose another folder"
        )
