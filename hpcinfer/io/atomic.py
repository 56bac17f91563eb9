"""A file appears whole under its name or not at all, and a write that fails says so in one line.

The new content goes to ``<path>.partial`` in the same folder (a rename works within one file system
only) and takes the name when it is complete.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator

AnyPath = str | os.PathLike[str]

REMEDIES = {
    errno.ENOSPC: "no space left on the device; free space or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free space or choose another folder",
    errno.EFBIG: "the file would exceed the size limit; raise `ulimit -f` or choose another folder",
    errno.EACCES: "permission denied; choose a folder you may write to",
    errno.EPERM: "permission denied; choose a folder you may write to",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOENT: "its folder does not exist; create it first",
    errno.ENOTDIR: "its folder is not a folder; choose another path",
    errno.EAGAIN: "another run is writing it; wait for that run or choose another name",
    errno.EISDIR: "it is a folder; give the name of a file",
    errno.ENODEV: "it is a pipe or a device; give the name of a file",
}


@contextlib.contextmanager
def writing(path: AnyPath) -> Iterator[None]:
    """Turn an OSError of the body into one line that names `path` and the remedy.

    Raises
    ------
    RuntimeError
        Instead of any OSError.
    """
    try:
        yield
    except OSError as error:
        raise RuntimeError(f"output: cannot write {path}: {_remedy(error)}") from error


@contextlib.contextmanager
def replacing(path: AnyPath, sync: bool = True) -> Iterator[str]:
    """Yield the name of a temporary file that becomes `path` if the body succeeds.

    Parameters
    ----------
    path : output file; an existing one is replaced at the end, and so is a link of that name: who
        is to write through links takes `hpcinfer.io.claims.claim`
    sync : wait until the content is on the disk before the name changes

    Raises
    ------
    RuntimeError
        If it cannot be written; the temporary file is removed and `path` is as it was before.
    """
    partial = f"{path}.partial"
    with writing(path):
        refuse_others(path)
        with _locked(partial) as descriptor:
            # The name changes only once the content is there
            try:
                yield partial
                if sync:
                    os.fsync(descriptor)
                os.replace(partial, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(partial)
                raise
        if sync:
            _sync_folder(os.path.dirname(os.path.abspath(path)))


def try_to_write(path: AnyPath) -> None:
    """Make sure that `replacing` can begin, without touching what has the name.

    Raises
    ------
    RuntimeError
        As `replacing` does.
    """
    partial = f"{os.fspath(path)}.partial"
    with writing(path):
        refuse_others(path)
        with _locked(partial):
            os.unlink(partial)


def lock(descriptor: int) -> None:
    """Take the only right to write an open file, as long as it is open.

    Two runs with one output would otherwise spoil it. File systems without locks are written as
    they are.

    Raises
    ------
    BlockingIOError
        If another run has it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return


def refuse_directory(path: AnyPath) -> None:
    """Raise IsADirectoryError if `path` is a folder."""
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)


def refuse_others(path: AnyPath) -> None:
    """Raise OSError if `path` is a folder, a pipe or a device, whose name no file may take."""
    refuse_directory(path)
    with contextlib.suppress(FileNotFoundError):
        mode = os.lstat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), path)


def open_own(path: str, flags: int) -> int:
    """Descriptor of a file of this program's own, which is made if need be.

    Raises
    ------
    RuntimeError
        If a link, a pipe or a file with other names stands in its place: what is written there
        would go to a file that somebody else has made.
    """
    if not is_own(path):
        raise RuntimeError(
            f"output: got {path}, which is a link or no plain file, need one that this program has "
            "made; remove it"
        )
    return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def is_own(path: AnyPath) -> bool:
    """False if something has this name that the program does not make: no file, or one of several
    names."""
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


@contextlib.contextmanager
def _locked(path: str) -> Iterator[int]:
    """Yield a descriptor of the file `path`, made if need be, that no other run has locked."""
    descriptor = open_own(path, os.O_WRONLY)
    try:
        lock(descriptor)
        yield descriptor
    finally:
        os.close(descriptor)


def _sync_folder(path: str) -> None:
    """Bring a rename in the folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remedy(error: OSError) -> str:
    return REMEDIES.get(error.errno or 0) or " ".join(str(error).split())
