"""What is kept of an unfinished run beside its output, and the right to write that output.

``OUTPUT.state`` is one line that says what it is, how long the rest is and its checksum, and one
line of JSON. It is written whole under a temporary name, brought to the disk, and renamed, so that
it is either the last state or the one before. ``OUTPUT.done`` is of the same form, and says what a
finished run was. ``OUTPUT.lock`` belongs to one run as long as that lives; it names its host and
process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from hpcinfer.io.atomic import AnyPath, open_own, replacing, writing
from hpcinfer.io.jsonl import INDEX_SUFFIX
from hpcinfer.io.kv import kv_folder
from hpcinfer.io.parts import parts_folder
from hpcinfer.io.results import JOURNAL_SUFFIX

FORMAT, FORMAT_VERSION = "hpcinfer-state", 1
STATE_SUFFIX, DONE_SUFFIX, LOCK_SUFFIX, KEPT_SUFFIX = ".state", ".done", ".lock", ".old-"

# Of the files of an output, what belongs to its records
_OF_RECORDS = ("", INDEX_SUFFIX, JOURNAL_SUFFIX, JOURNAL_SUFFIX + INDEX_SUFFIX)
_HOLDER = re.compile(rb"process \d+ on .*\n|")


def write_state(path: AnyPath, state: dict[str, Any]) -> None:
    """Replace the state file `path`.

    Parameters
    ----------
    path : of the state file
    state : plain values

    Raises
    ------
    RuntimeError
        If it cannot be written; the one before is still there.
    """
    body = json.dumps(state, separators=(",", ":")).encode()
    head = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "bytes": len(body),
        "crc32": zlib.crc32(body),
    }
    with replacing(path) as partial, open(partial, "wb") as file:
        file.write(json.dumps(head).encode() + b"\n" + body + b"\n")


def read_state(path: AnyPath) -> dict[str, Any] | None:
    """State that `write_state` has written; None if there is no file of that name.

    Raises
    ------
    ValueError
        If the file is something else, of another version, or not whole.
    """
    # Read what the file says that it is, and the rest
    try:
        with open(path, "rb") as file:
            line, body = file.readline(), file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"state: cannot read {path}: {error.strerror}") from None

    # Refuse what is something else or torn
    try:
        head = json.loads(line)
        version = head["format_version"] if head["format"] == FORMAT else None
        whole = body == body[: head["bytes"]] + b"\n" and zlib.crc32(body[:-1]) == head["crc32"]
    except (ValueError, KeyError, TypeError):
        version = None
    if version is None:
        raise _refusal(path, "something else")
    if version != FORMAT_VERSION:
        raise _refusal(path, f"version {version} of it")
    if not whole:
        raise _refusal(path, "a part of it")
    return json.loads(body)


def remove_state(path: AnyPath) -> None:
    """Forget the state: the run is finished."""
    with writing(path), contextlib.suppress(FileNotFoundError):
        os.unlink(path)


@contextlib.contextmanager
def locked(path: AnyPath) -> Iterator[None]:
    """Hold the only right to write the output `path`, until the body or the process ends.

    File systems without locks let everyone have it.

    Raises
    ------
    RuntimeError
        If another process has it, or the folder cannot be written.
    """
    lock_path = f"{path}{LOCK_SUFFIX}"
    with writing(path):
        descriptor = _lock(path, lock_path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(lock_path)
        os.close(descriptor)


def names_of(path: AnyPath) -> list[str]:
    """The files that a run makes for the output `path`, which is the first; without its folders."""
    suffixes = ("", STATE_SUFFIX, DONE_SUFFIX, *_OF_RECORDS[1:])
    return [f"{path}{suffix}" for suffix in suffixes]


def records_there(path: AnyPath) -> str | None:
    """File with something in it that belongs to the records of an output; None without one."""
    names = [f"{path}{suffix}" for suffix in _OF_RECORDS]
    return next((name for name in names if os.path.exists(name) and os.path.getsize(name)), None)


def remove_records(path: AnyPath) -> None:
    """Remove an output, and what says that it is finished."""
    for name in (*(f"{path}{suffix}" for suffix in _OF_RECORDS), f"{path}{DONE_SUFFIX}"):
        with writing(name), contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def set_aside(paths: Sequence[AnyPath]) -> list[str]:
    """Give the files of a run other names, which keep them; they end in .old-1, .old-2, ...

    Parameters
    ----------
    paths : outputs

    Returns
    -------
    the new names
    """
    # Find the first number that no file of this run has yet
    names = [name for path in paths for name in names_of(path)]
    names += [kv_folder(path) for path in paths]
    names += [parts_folder(path) for path in paths if os.fspath(path).lower().endswith(".h5")]
    number = 1
    while any(os.path.lexists(f"{name}{KEPT_SUFFIX}{number}") for name in names):
        number += 1

    # Rename what is there
    kept = []
    for name in filter(os.path.lexists, names):
        with writing(name):
            os.rename(name, f"{name}{KEPT_SUFFIX}{number}")
        kept.append(f"{name}{KEPT_SUFFIX}{number}")
    return kept


def _lock(path: AnyPath, lock_path: str) -> int:
    """Descriptor of the lock's file, locked."""
    while True:
        descriptor = open_own(lock_path, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            raise RuntimeError(
                f"output: got {path}, which {holder or 'another process'} is writing, need an "
                "output of its own for each run; wait for that run or choose another name"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                os.close(descriptor)
                raise

        # Refuse what is no lock; a file system without locks has no more than this
        if not _is_lock(descriptor):
            os.close(descriptor)
            raise RuntimeError(
                f"output: got {lock_path}, which is no lock or that of another user, need one of "
                "your own; remove it or choose another name"
            )

        # Take the file that has the name now: whoever had the lock before may have removed it
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(lock_path)):
                os.ftruncate(descriptor, 0)
                holder = f"process {os.getpid()} on {socket.gethostname()}\n"
                os.pwrite(descriptor, holder.encode(), 0)
                return descriptor
        os.close(descriptor)


def _is_lock(descriptor: int) -> bool:
    """True if an open file is a lock that this user has made, not something of that name."""
    is_own = os.fstat(descriptor).st_uid == os.geteuid()
    return is_own and _HOLDER.fullmatch(os.pread(descriptor, 400, 0)) is not None


def _refusal(path: AnyPath, got: str) -> ValueError:
    return ValueError(
        f"state: got {got} in {path}, need a whole {FORMAT} of version {FORMAT_VERSION}; restore "
        "it, or start over with --restart"
    )
