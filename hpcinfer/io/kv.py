"""Pages of the key/value cache on disk, beside the state of the run that they belong to.

``OUTPUT.state.kv/<replica>-<generation>-<rank>`` has the pages of one rank that sequences held: a
line that says what it is, how long the next line is and its checksum; a line of JSON, what the
pages are and the bytes of every block; then the blocks, each with its checksum behind it. A file
is written whole under a temporary name, brought to the disk, and renamed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np

from hpcinfer.io.atomic import AnyPath, replacing, writing

FORMAT, FORMAT_VERSION = "hpcinfer-kv", 1
KV_SUFFIX = ".state.kv"

# Bytes of a block at most, and between two times that what was written is brought to the disk.
BLOCK_BYTES = 16 << 20

_CRC_BYTES = 4
_NAME = re.compile(r"(\d+)-(\d+)-(\d+)(\.partial)?")


def kv_folder(path: AnyPath) -> str:
    """Folder of the pages that are kept for the output `path`."""
    return f"{os.fspath(path)}{KV_SUFFIX}"


def kv_file(path: AnyPath, replica: int, generation: int, rank: int) -> str:
    """Name of one rank's file."""
    return os.path.join(kv_folder(path), f"{replica}-{generation}-{rank}")


def write_kv(
    path: str,
    facts: dict[str, Any],
    sizes: list[int],
    blocks: Iterable[np.ndarray],
    patience_s: float,
) -> None:
    """Write one rank's pages.

    Parameters
    ----------
    path : as `kv_file` names it; its folder is made
    facts : plain values
    sizes : bytes of every block
    blocks : (bytes,) uint8 each
    patience_s : seconds that it may take

    Raises
    ------
    RuntimeError
        If it cannot be written, or not in time; no file of that name is there then.
    """
    body = json.dumps({"facts": facts, "blocks": sizes}, separators=(",", ":")).encode()
    head = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "bytes": len(body),
        "crc32": zlib.crc32(body),
    }
    with writing(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)

    # Write the blocks, each with its checksum behind it
    with replacing(path) as partial, open(partial, "wb") as file:
        file.write(json.dumps(head).encode() + b"\n" + body + b"\n")
        began_s, written, on_disk = time.monotonic(), 0, 0
        for number, block in enumerate(blocks):
            file.write(block.data)
            file.write(zlib.crc32(block.data, number).to_bytes(_CRC_BYTES, "little"))
            written += block.nbytes

            # The rate to the disk so far says how long the whole will take
            if written - on_disk >= BLOCK_BYTES:
                file.flush()
                os.fsync(file.fileno())
                on_disk = written
                _refuse_slow(sum(sizes), written, time.monotonic() - began_s, patience_s)


def read_facts(path: AnyPath) -> tuple[dict[str, Any], list[int], int]:
    """What `write_kv` was told of the pages in a file, if the file is whole up to there.

    Returns
    -------
    facts : as they were given
    sizes : bytes of every block
    start : where the first one begins

    Raises
    ------
    ValueError
        If the file is missing, something else, or damaged.
    """
    with _reading(path) as file:
        try:
            head = json.loads(file.readline())
            known = (head["format"], head["format_version"]) == (FORMAT, FORMAT_VERSION)
            body = file.read(head["bytes"]) if known else b""
            known = known and zlib.crc32(body) == head["crc32"] and file.read(1) == b"\n"
        except (ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise _damaged(path)
        pages = json.loads(body)
        return pages["facts"], pages["blocks"], file.tell()


def read_blocks(path: AnyPath) -> Iterator[bytes]:
    """Blocks of a file in order, each when its checksum is right.

    Raises
    ------
    ValueError
        At the first block that is damaged, or after the last one if more follows.
    """
    _, sizes, start = read_facts(path)
    with _reading(path) as file:
        file.seek(start)
        for number, size in enumerate(sizes):
            block = file.read(size)
            if zlib.crc32(block, number).to_bytes(_CRC_BYTES, "little") != file.read(_CRC_BYTES):
                raise _damaged(path)
            yield block
        if file.read(1):
            raise _damaged(path)


def next_kv_generation(path: AnyPath) -> int:
    """Number for the first pages that a new start keeps for the output `path`."""
    return 1 + max((generation for _, (_, generation) in _kept(path)), default=0)


def remove_kv_before(path: AnyPath, generations: dict[int, int], first: int) -> None:
    """Remove files that are older than the state.

    Parameters
    ----------
    path : output
    generations : replica -> generation that the state names
    first : generation from which on files are kept of other replicas, which may be writing
    """
    for name, (replica, generation) in _kept(path):
        if generation < generations.get(replica, first):
            remove_kv_file(name)


def remove_kv(path: AnyPath) -> None:
    """Remove all pages that are kept for the output `path`."""
    for name, _ in _kept(path):
        remove_kv_file(name)

    # What others have put there is theirs
    with contextlib.suppress(OSError):
        os.rmdir(kv_folder(path))


def remove_kv_file(path: AnyPath) -> None:
    """Remove one rank's file, if it is there."""
    with writing(path), contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _kept(path: AnyPath) -> Iterator[tuple[str, tuple[int, int]]]:
    """(name, (replica, generation)) of every file that is kept for an output."""
    folder = kv_folder(path)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for name in os.listdir(folder):
            if match := _NAME.fullmatch(name):
                yield os.path.join(folder, name), (int(match[1]), int(match[2]))


@contextlib.contextmanager
def _reading(path: AnyPath) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise ValueError(f"kv: cannot read {path}: {error.strerror}") from None


def _refuse_slow(total: int, written: int, passed_s: float, patience_s: float) -> None:
    """Give up where the whole would take too long."""
    expected_s = passed_s * total / written
    if expected_s > patience_s:
        raise RuntimeError(
            f"kv: got {total} bytes that take {expected_s:.1f} s to write, need at most "
            f"{patience_s:g} s; write to a faster disk"
        )


def _damaged(path: AnyPath) -> ValueError:
    return ValueError(f"kv: got damaged file {path}, need a whole {FORMAT} {FORMAT_VERSION}")
