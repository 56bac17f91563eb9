"""Converted models: one .h5 that holds weights, config, tokenizer and chat template.

Layout, format version 1, or 2 where weights are quantised::

    /                   attributes: format = "hpcinfer-model", format_version = 1 or 2,
                        hpcinfer_version, and as JSON text: config, generation_config,
                        tokenizer_config, special_tokens_map; metadata_crc32: zlib.crc32 of these
                        texts and those of /tokenizer (the first files had none)
    /tokenizer/tokenizer_json   text of tokenizer.json           (absent if the model has none)
    /tokenizer/chat_template    text of the Jinja template       (absent if the model has none)
    /weights/<tensor name>      one contiguous dataset per tensor, dots kept in the name;
                                attribute crc32: zlib.crc32 of its bytes

A quantised tensor (O, I) is two datasets: under its name the codes, int8 (O, I) or, of 4 bits,
uint8 (O, I / 2) with the even input in the lower bits, with attributes bits, group and columns =
I; and its scales, float16 (O, I / group), under the name with ".scales" behind it. All are rounded
up. Input i of row o is code[o, i] · scale[o, i // group]. It is stored (out, in), also where the
family stores its matrices (in, out).

bfloat16 is a 16-bit float type of its own (8 exponent bits, 7 mantissa bits), so any HDF5 tool
reads it as float32. Datasets are neither chunked nor compressed nor external: each is one run of
bytes in this file. So the HDF5 library finds them, while their parts are read as those of a
safetensors file are, see `hpcinfer.io.checkpoint`; many ranks then read one file without locks.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import h5py
import numpy as np

from hpcinfer import __version__
from hpcinfer.array import BFLOAT16
from hpcinfer.io.atomic import AnyPath, replacing
from hpcinfer.io.checkpoint import (
    HDF5_SIGNATURE,
    SCALES,
    Block,
    Checkpoint,
    Coding,
    TensorInfo,
    raw,
    table_entry,
)
from hpcinfer.io.metadata import (
    MAX_JSON_BYTES,
    MAX_TOKENIZER_BYTES,
    Metadata,
    open_regular,
    parse_object,
)

FORMAT, FORMAT_VERSIONS = "hpcinfer-model", {"plain": 1, "quantised": 2}
OBJECTS = ("config", "generation_config", "tokenizer_config", "special_tokens_map")
TEXTS = ("tokenizer_json", "chat_template")

# Datasets from this size on begin at a page, so that mapping them maps nothing else
ALIGN_BYTES = 1 << 12
MODEL_OPTIONS: dict[str, Any] = {"alignment_threshold": 1 << 16, "alignment_interval": ALIGN_BYTES}

# The structures of HDF5 1.10 carry checksums. In those of before, damage makes the library answer
# wrongly, run without end or crash; their superblock has a number below 2 behind the signature.
LIBVER, OLDEST_SUPERBLOCK = ("v110", "v110"), 2

BF16_TYPE = h5py.h5t.IEEE_F32LE.copy()
BF16_TYPE.set_fields(15, 7, 8, 0, 7)
BF16_TYPE.set_size(2)
BF16_TYPE.set_ebias(127)

FILE_TYPES = {
    BFLOAT16: BF16_TYPE,
    **{
        np.dtype(code): h5py.h5t.py_create(np.dtype(code), logical=True)
        for code in "<f8 <f4 <f2 ? <i8 <i4 <i2 |i1 <u8 <u4 <u2 |u1".split()
    },
}


def open_model(path: str) -> Checkpoint:
    """Open a converted model and check its table of tensors against the file.

    Raises
    ------
    ValueError
        If it is no HDF5 file, is truncated, has another format or version, or declares tensors
        that do not lie whole and plain inside the file.
    """
    with open_h5(path) as file:
        try:
            _check_format(path, file)
            metadata = _read_metadata(path, file)
            tensors = _read_table(path, file)
        except Exception as error:
            # What is not said here is the library's, which raises errors of many kinds
            reason = " ".join(str(error).split())[:500]
            if isinstance(error, ValueError) and reason.startswith("checkpoint: "):
                raise
            raise ValueError(
                f"checkpoint: got {path} which is damaged ({reason}); convert the model again"
            ) from error
    return Checkpoint(path, "hdf5", metadata, tensors)


def open_h5(path: AnyPath) -> h5py.File:
    """Open the HDF5 file `path` for reading, without locking it (a finished file never changes).

    Raises
    ------
    ValueError
        If it is no HDF5 file, is truncated, or has structures without checksums.
    """
    _refuse_old(path)
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"checkpoint: got {path} which does not open as HDF5 ({reason}); make it again"
        ) from None


def _refuse_old(path: AnyPath) -> None:
    """Refuse a file whose structures carry no checksums, before the library sees it."""
    file, _ = open_regular(path)
    with file:
        head = file.read(len(HDF5_SIGNATURE) + 1)
    if head[:-1] == HDF5_SIGNATURE and head[-1] < OLDEST_SUPERBLOCK:
        raise ValueError(
            f"checkpoint: got {path} with an HDF5 superblock of version {head[-1]}, need "
            f"{OLDEST_SUPERBLOCK} or more, whose structures carry checksums; make it again"
        )


def file_format(file: h5py.File) -> str:
    """Name that an open HDF5 file gives its own format, "" if none."""
    return str(_attribute(file, "format") or "")


class Disk(io.FileIO):
    """The file under a new HDF5 file, which keeps a failed write to itself until it is asked.

    Where the disk is full the HDF5 library fails again and again while it closes its objects, and
    may crash. So a write that fails is noted, it and later ones are dropped, and `check` raises.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path, "w+")
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of `data`, unless a write has failed; says in either case that it did."""
        data = memoryview(data).cast("B")
        done = 0
        while done < len(data) and self._error is None:
            try:
                done += super().write(data[done:])
            except OSError as error:
                self._error = error
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        """Set the length of the file; a failure is noted as that of a write is."""
        try:
            return super().truncate(size)
        except OSError as error:
            self._error = self._error or error
            return size or 0

    def check(self) -> None:
        """Raise the OSError of the first write that failed, if one did."""
        if self._error:
            raise self._error


@contextlib.contextmanager
def replacing_h5(
    path: AnyPath, sync: bool = True, **options: Any
) -> Iterator[tuple[h5py.File, Disk]]:
    """Yield a new HDF5 file, and the `Disk` under it, that becomes `path` if the body succeeds.

    Parameters
    ----------
    path, sync : see `hpcinfer.io.atomic.replacing`
    options : of h5py.File

    Raises
    ------
    RuntimeError
        If it cannot be written. The body should call `Disk.check` now and then, to end early.
    """
    with replacing(path, sync) as partial, Disk(partial) as disk:
        try:
            with h5py.File(disk, "w", libver=LIBVER, **options) as file:
                yield file, disk
        finally:
            disk.check()


class ModelWriter:
    """Writes a converted model: metadata first, then tensor by tensor.

    Parameters
    ----------
    file : new, made by `replacing_h5` with `MODEL_OPTIONS`
    disk : under it
    metadata : what the model carries beside its weights
    """

    def __init__(self, file: h5py.File, disk: Disk, metadata: Metadata) -> None:
        self._file, self._disk = file, disk
        file.attrs["format"], file.attrs["format_version"] = FORMAT, FORMAT_VERSIONS["plain"]
        file.attrs["hpcinfer_version"] = __version__
        for name in OBJECTS:
            file.attrs[name] = json.dumps(getattr(metadata, name))
        tokenizer = file.create_group("tokenizer")
        for name in TEXTS:
            if getattr(metadata, name) is not None:
                tokenizer[name] = getattr(metadata, name)
        file.attrs["metadata_crc32"] = np.uint32(_crc32(metadata))
        self._weights = file.create_group("weights")

    def add(self, info: TensorInfo, stream: Iterable[Block]) -> int:
        """Write one tensor.

        Parameters
        ----------
        info : of the new tensor; its file and offset do not matter
        stream : (start, block) pairs, as `Checkpoint.stream` gives them

        Returns
        -------
        zlib.crc32 of the tensor's bytes
        """
        if "/" in info.name or info.name in ("", "."):
            raise ValueError(f"convert: got tensor name {info.name!r}, need one without '/'")

        # Declare the dataset, its bytes unbroken in the file
        space = _space(info.shape)
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_layout(h5py.h5d.CONTIGUOUS)
        plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        type_id = FILE_TYPES[info.dtype]
        data = h5py.h5d.create(self._weights.id, info.name.encode(), type_id, space, plan)

        # Move the bits block by block
        crc = 0
        for start, block in stream:
            crc = zlib.crc32(raw(block), crc)
            bits = block.view(np.uint16) if info.dtype == BFLOAT16 else block
            if info.shape:
                space.select_hyperslab(start, block.shape)
            data.write(_space(block.shape), space, bits, mtype=type_id)
            self._disk.check()

        # Note the checksum, and of codes how they are to be read
        attributes = h5py.Dataset(data).attrs
        attributes["crc32"] = np.uint32(crc)
        if info.coding is not None:
            self._file.attrs["format_version"] = FORMAT_VERSIONS["quantised"]
            for name, value in asdict(info.coding).items():
                attributes[name] = value
        return crc


def _check_format(path: str, file: h5py.File) -> None:
    found, version = file_format(file), _attribute(file, "format_version")
    if found != FORMAT:
        raise ValueError(
            f"checkpoint: got {path} of format {found!r}, need {FORMAT!r}; make one with "
            "`hpcinfer convert`"
        )
    if version not in FORMAT_VERSIONS.values():
        known = " or ".join(map(str, FORMAT_VERSIONS.values()))
        raise ValueError(
            f"checkpoint: got {path} of format version {version}, need {known}; convert the model "
            "again with this version of hpcinfer"
        )


def _read_metadata(path: str, file: h5py.File) -> Metadata:
    """What a model carries beside its weights, compared with its checksum."""
    # Read the objects and texts, where they are what they should be
    found: dict[str, Any] = {}
    for name in OBJECTS:
        text = _attribute(file, name)
        if not isinstance(text, str) or len(text) > MAX_JSON_BYTES:
            raise ValueError(f"checkpoint: got {path} without attribute {name}, need JSON text")
        found[name] = parse_object(text, f"attribute {name} of {path}")
    tokenizer = _own(file, "tokenizer")
    if tokenizer is not None and not isinstance(tokenizer, h5py.Group):
        raise ValueError(f"checkpoint: got /tokenizer in {path} which is no group, need one")
    for name in TEXTS:
        found[name] = _read_text(path, tokenizer, name)
    metadata = Metadata(**found)

    # Compare their checksum, which the first files had not
    stored, computed = _attribute(file, "metadata_crc32"), _crc32(metadata)
    if stored not in (None, computed):
        raise ValueError(
            f"checkpoint: got checksum {computed:08x} of the config and tokenizer in {path}, need "
            f"the stored {stored:08x}; the file is damaged, convert the model again"
        )
    return metadata


def _crc32(metadata: Metadata) -> int:
    """Checksum of all texts that a model carries beside its weights."""
    texts = [json.dumps(getattr(metadata, name)) for name in OBJECTS]
    texts += [getattr(metadata, name) or "" for name in TEXTS]
    return zlib.crc32("\0".join(texts).encode())


def _attribute(item: h5py.HLObject, name: str) -> Any:
    """Scalar attribute of a file or dataset as str or int; None if there is none of that kind."""
    attribute = item.attrs.get_id(name) if name in item.attrs else None
    if attribute is None or attribute.shape != ():
        return None
    large = attribute.get_type().get_size() > MAX_JSON_BYTES
    value = None if large else item.attrs[name]
    if isinstance(value, np.integer):
        return int(value)
    return value if isinstance(value, str) else None


def _own(group: h5py.Group, name: str) -> Any:
    """Object `name` of a group; None if there is none or only a link, perhaps to another file."""
    links, key = group.id.links, name.encode()
    if links.exists(key) and links.get_info(key).type == h5py.h5l.TYPE_HARD:
        return group[name]
    return None


def _read_text(path: str, group: h5py.Group | None, name: str) -> str | None:
    """Text of the scalar string dataset `name`, None if there is none."""
    data = None if group is None else _own(group, name)
    if data is None:
        return None

    # Refuse what is no text of this file, before reading it
    if (
        not isinstance(data, h5py.Dataset)
        or data.shape != ()
        or h5py.check_string_dtype(data.dtype) is None
        or data.id.get_create_plist().get_external_count()
        or data.id.get_type().get_size() > MAX_TOKENIZER_BYTES
    ):
        raise ValueError(f"checkpoint: got /tokenizer/{name} in {path} which is no text, need one")
    text = data[()]
    if len(text) > MAX_TOKENIZER_BYTES:
        raise ValueError(
            f"checkpoint: got {len(text)} bytes of /tokenizer/{name} in {path}, need at most "
            f"{MAX_TOKENIZER_BYTES}"
        )
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"checkpoint: got byte 0x{text[error.start]:02x} in /tokenizer/{name} of {path}, need "
            "UTF-8 text; the file is damaged, convert the model again"
        ) from None


def _read_table(path: str, file: h5py.File) -> dict[str, TensorInfo]:
    """Name -> TensorInfo of group /weights."""
    weights, size = _own(file, "weights"), os.path.getsize(path)
    if not isinstance(weights, h5py.Group):
        raise ValueError(f"checkpoint: got {path} without group /weights, need one")
    tensors = {name: _table_entry(path, weights, name, size) for name in weights}
    for info in tensors.values():
        _check_scales(path, info, tensors.get(info.name + SCALES))
    return tensors


def _table_entry(path: str, weights: h5py.Group, name: str, file_size: int) -> TensorInfo:
    """TensorInfo of dataset `name`, once it is known to lie plain and whole inside the file."""
    data = _own(weights, name)
    if not isinstance(data, h5py.Dataset) or data.shape is None:
        raise ValueError(
            f"checkpoint: got /weights/{name} in {path} which is no dataset of this file, need one"
        )
    plan = data.id.get_create_plist()
    if plan.get_layout() != h5py.h5d.CONTIGUOUS or plan.get_external_count() or plan.get_nfilters():
        raise ValueError(
            f"checkpoint: got /weights/{name} in {path} chunked, compressed, virtual or external, "
            "need it contiguous; convert the model again"
        )
    dtype = _element_type(path, name, data)

    # The declared bytes must stand in the file
    offset, nbytes = data.id.get_offset() or 0, data.id.get_storage_size()
    if nbytes and (offset == 0 or offset + nbytes > file_size):
        raise ValueError(
            f"checkpoint: got /weights/{name} in {path} up to byte {offset + nbytes}, need at most "
            f"the file's {file_size}; convert the model again"
        )
    crc32, coding = _attribute(data, "crc32"), _coding(path, name, data, dtype)
    return table_entry(name, data.shape, dtype, nbytes, path, offset, crc32, coding)


def _coding(path: str, name: str, data: h5py.Dataset, dtype: np.dtype) -> Coding | None:
    """Coding of a dataset that says of how many bits its codes are; None if it says nothing."""
    if "bits" not in data.attrs:
        return None
    bits, group, columns = (_attribute(data, key) for key in ("bits", "group", "columns"))
    numbers = all(isinstance(n, int) and 0 < n < 2**62 for n in (bits, group, columns))
    coding = Coding(bits, group, columns) if numbers and bits in (4, 8) else None
    if coding is None or dtype != coding.dtype or data.shape[1:] != (coding.row_bytes,):
        raise ValueError(
            f"checkpoint: got /weights/{name} in {path} of shape {data.shape} of {dtype.name} with "
            f"bits = {bits}, group = {group}, columns = {columns}, need 4 or 8 bits and what they "
            "make; convert the model again"
        )
    return coding


def _check_scales(path: str, info: TensorInfo, scales: TensorInfo | None) -> None:
    """Refuse codes without the scales that belong to them."""
    if info.coding is None:
        return
    need = (info.shape[0], info.coding.row_scales)
    if scales is None or scales.shape != need or scales.dtype != np.float16:
        found = "none" if scales is None else f"{scales.dtype.name} {list(scales.shape)}"
        raise ValueError(
            f"checkpoint: got {found} as scales of the quantised {info.name} in {path}, need "
            f"float16 {list(need)}; convert the model again"
        )


def _space(shape: tuple[int, ...]) -> Any:
    """HDF5 dataspace of an array of that shape."""
    return h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)


def _element_type(path: str, name: str, data: h5py.Dataset) -> np.dtype:
    type_id = data.id.get_type()
    for dtype, known in FILE_TYPES.items():
        if type_id.equal(known):
            return dtype
    raise ValueError(
        f"checkpoint: got /weights/{name} in {path} of element type {data.dtype}, need bfloat16 or "
        "a little-endian float, integer or bool"
    )
