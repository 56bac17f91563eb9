"""A model on disk, of whichever kind: the one place that knows all of them."""

from __future__ import annotations

import os

from hpcinfer.io.atomic import AnyPath
from hpcinfer.io.bounds import bounded_memory
from hpcinfer.io.checkpoint import HDF5_SIGNATURE, Checkpoint
from hpcinfer.io.metadata import open_regular

# Bytes that config, tokenizer and the table of tensors may take while they are read
METADATA_MEMORY = 1 << 30


def open_checkpoint(path: AnyPath | Checkpoint) -> Checkpoint:
    """Open a model on disk and check everything that can be checked without reading weights.

    Parameters
    ----------
    path : Hugging Face directory or converted .h5, or a Checkpoint, which is returned as it is

    Raises
    ------
    ValueError
        If it is neither, or is damaged: one line that says what was found.
    """
    if isinstance(path, Checkpoint):
        return path
    path = os.fspath(path)
    try:
        with bounded_memory(METADATA_MEMORY):
            return _open(path)
    except MemoryError:
        raise ValueError(
            f"checkpoint: got {path} whose metadata needs more than {METADATA_MEMORY >> 20} MiB of "
            "memory, need less; fetch the model again"
        ) from None


def _open(path: str) -> Checkpoint:
    """The model, of whichever kind."""
    # h5py is imported only where there is an .h5
    if os.path.isdir(path):
        from hpcinfer.io.safetensors import open_directory

        return open_directory(path)
    if not os.path.exists(path):
        raise ValueError(f"checkpoint: got {path}, need an existing model directory or .h5 file")
    if has_hdf5_signature(path):
        from hpcinfer.io.hdf5 import open_model

        return open_model(path)
    kind, remedy = _kind_of(path)
    raise ValueError(
        f"checkpoint: got {path} which is {kind}, need a model directory or .h5 file; {remedy}"
    )


def _kind_of(path: str) -> tuple[str, str]:
    """What a file is that is no HDF5 file, and what to do about it."""
    file, _ = open_regular(path)
    with file:
        start = file.read(64)
    if path.endswith(".safetensors"):
        return "a file of weights alone", "give the directory that holds it"
    if start.startswith(b"GGUF"):
        return "a GGUF file", "give the model that it was made of, as safetensors"
    if start.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"PK\x03\x04")):
        remedy = "pickles can run programs and are not read; save the model as safetensors"
        return "a pickle or an archive, as torch saves them", remedy
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer", "run `git lfs pull`"
    return "no HDF5 file", "give the path of a model"


def has_hdf5_signature(path: AnyPath) -> bool:
    """True if the file `path` begins as HDF5 files do."""
    file, _ = open_regular(path)
    with file:
        return file.read(len(HDF5_SIGNATURE)) == HDF5_SIGNATURE
