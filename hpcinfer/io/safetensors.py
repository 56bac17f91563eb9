"""Hugging Face directories: config.json beside one or many *.safetensors.

A safetensors file is: 8 bytes length n, n bytes JSON ``{name: {dtype, shape, data_offsets}}``, then
the tensors end to end. All of it is checked here before anything is allocated for a tensor.

source: the format's description at https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import os
import reprlib
from typing import Any, TypeGuard

import numpy as np

from hpcinfer.array import BFLOAT16
from hpcinfer.io import metadata
from hpcinfer.io.atomic import AnyPath
from hpcinfer.io.checkpoint import Checkpoint, TensorInfo, table_entry

# Bytes of a header, of the index, and of all headers of a model; bytes of an entry for each list or
# object in it, as in `"a":{"dtype":"F32","shape":[],"data_offsets":[0,0]},`
MAX_HEADER_BYTES, MAX_ALL_HEADERS_BYTES, ENTRY_BYTES = 32_000_000, 64_000_000, 16
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DTYPES = {
    "BF16": BFLOAT16,
    **{
        name: np.dtype(code)
        for name, code in {
            "F64": "<f8", "F32": "<f4", "F16": "<f2", "BOOL": "?",
            "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1",
            "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "<u1",
        }.items()
    },
}  # fmt: skip


def open_directory(folder: str) -> Checkpoint:
    """Open a Hugging Face directory.

    The weights are model.safetensors, else the files that model.safetensors.index.json names, else
    all *.safetensors of the directory.

    Raises
    ------
    ValueError
        If a file is missing or damaged, or a tensor is missing or stands in two files.
    """
    documents = metadata.read_directory(folder)
    index_path = os.path.join(folder, INDEX_NAME)
    if os.path.exists(index_path) and not os.path.exists(os.path.join(folder, SINGLE_NAME)):
        tensors = _read_indexed(folder, index_path)
    else:
        tensors = _read_all(folder)
    return Checkpoint(folder, "safetensors", documents, tensors)


def read_header(path: AnyPath) -> dict[str, TensorInfo]:
    """Table of the tensors in one safetensors file by name, checked.

    Raises
    ------
    ValueError
        One line that names the file and what is wrong with it.
    """
    header, data_start, file_size = _read_json(path)
    header.pop("__metadata__", None)
    tensors: dict[str, TensorInfo] = {}
    spans = []
    for name, entry in header.items():
        dtype, shape, begin, end = _parse_entry(path, name, entry)
        if end > file_size - data_start:
            raise ValueError(
                f"checkpoint: got {name!r} in {path} up to byte {data_start + end}, need at most "
                f"the file's {file_size}; the file is truncated, fetch it again"
            )
        tensors[name] = table_entry(name, shape, dtype, end - begin, path, data_start + begin)
        spans.append((begin, end, name))

    # The tensors lie end to end: none overlaps the one before it, and no byte is left over
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise ValueError(
                f"checkpoint: got {name!r} in {path} at data byte {begin}, need {at}; tensors must "
                "neither overlap nor leave holes"
            )
        at = end
    if data_start + at != file_size:
        raise ValueError(
            f"checkpoint: got {path} of {file_size} bytes, need {data_start + at} by its header"
        )
    return tensors


def _read_json(path: AnyPath) -> tuple[dict[str, Any], int, int]:
    """Header object of a file, position of its data, size of the file."""
    file, file_size = metadata.open_regular(path)
    with file:
        # Read the header, once its length fits the file
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, file_size - 8):
            remedy = "fetch it again"
            if prefix == b"version ":
                remedy = "it is a Git LFS pointer, run `git lfs pull`"
            raise ValueError(
                f"checkpoint: got {path} of {file_size} bytes with a header of {length} bytes, "
                f"need one that fits the file and {MAX_HEADER_BYTES} bytes; {remedy}"
            )
        text = file.read(length)
    if len(text) != length or text[:1] != b"{":
        raise ValueError(f"checkpoint: got {path} without a safetensors header, need one")
    return _parse_table(text, f"the header of {path}"), 8 + length, file_size


def _parse_table(text: bytes, source: str) -> dict[str, Any]:
    """The JSON object of a header or index, unless it is made of more lists than a table is."""
    n = text.count(b"[") + text.count(b"{")
    if n > len(text) // ENTRY_BYTES + 8:
        raise ValueError(
            f"checkpoint: got {n} lists and objects in the {len(text)} bytes of {source}, need a "
            "table of tensors; fetch the file again"
        )
    return metadata.parse_object(text, source)


def _parse_entry(path: AnyPath, name: str, entry: Any) -> tuple[np.dtype, list[int], int, int]:
    """Element type, shape, begin and end of one entry of a header."""
    if not isinstance(entry, dict):
        raise ValueError(f"checkpoint: got no object for {name!r} in the header of {path}")
    code, shape, span = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(
            f"checkpoint: got element type {reprlib.repr(code)} of {name!r} in {path}, need one of "
            + ", ".join(DTYPES)
        )

    # Refuse a shape or a span of bytes that is none
    if not _is_naturals(shape) or not _is_naturals(span) or len(span) != 2 or span[0] > span[1]:
        raise ValueError(
            f"checkpoint: got shape {reprlib.repr(shape)} and data_offsets {reprlib.repr(span)} of "
            f"{name!r} in {path}, need whole numbers >= 0 and begin <= end"
        )
    return DTYPES[code], shape, span[0], span[1]


def _is_naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _read_headers(folder: str, names: list[str]) -> dict[str, dict[str, TensorInfo]]:
    """Table of each file, as long as all are of a bounded length together."""
    tables, n_bytes = {}, 0
    for name in names:
        path = os.path.join(folder, name)
        tables[name] = read_header(path)
        n_bytes += min((i.offset for i in tables[name].values()), default=8)
        if n_bytes > MAX_ALL_HEADERS_BYTES:
            raise ValueError(
                f"checkpoint: got more than {MAX_ALL_HEADERS_BYTES} bytes of headers up to {path}, "
                "need less; remove the files that do not belong to the model"
            )
    return tables


def _read_all(folder: str) -> dict[str, TensorInfo]:
    """Tensors of model.safetensors, or of every *.safetensors file if that is not there."""
    names = sorted(n for n in os.listdir(folder) if n.endswith(".safetensors") and n[0] != ".")
    if SINGLE_NAME in names:
        names = [SINGLE_NAME]
    if not names:
        raise ValueError(
            f"checkpoint: got {folder} without *.safetensors, need the weights in that format; "
            "other formats (pickles such as *.bin) are not read, save the model as safetensors"
        )

    # Put the tables of the files together
    tensors: dict[str, TensorInfo] = {}
    for table in _read_headers(folder, names).values():
        for tensor, info in table.items():
            if tensor in tensors:
                raise ValueError(
                    f"checkpoint: got {tensor!r} in both {tensors[tensor].file} and {info.file}, "
                    "need it once; remove the file that does not belong to the model"
                )
            tensors[tensor] = info
    return tensors


def _read_indexed(folder: str, index_path: str) -> dict[str, TensorInfo]:
    """Tensors that the index names, each from the file that it names."""
    text = metadata.read_text(index_path, MAX_HEADER_BYTES) or ""
    weight_map = _parse_table(text.encode(), index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"checkpoint: got {index_path} without weight_map, need tensor: file")

    # An index may only name files of its own directory
    for name in weight_map.values():
        if not isinstance(name, str) or name != os.path.basename(name) or "\0" in name:
            raise ValueError(
                f"checkpoint: got file name {reprlib.repr(name)} in {index_path}, need one of its "
                "own folder"
            )

    # Look each tensor up in the file that is named for it
    headers = _read_headers(folder, sorted(set(weight_map.values())))
    for tensor, name in weight_map.items():
        if tensor not in headers[name]:
            raise ValueError(
                f"checkpoint: got no {tensor!r} in {os.path.join(folder, name)}, need it as "
                f"{INDEX_NAME} says; fetch the file again"
            )
    return {tensor: headers[name][tensor] for tensor, name in weight_map.items()}
