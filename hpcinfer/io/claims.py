"""What a command writes, held against what it reads, before anything is opened.

Files are told apart by device and inode, as one file may have several names. A command writes to
the file that an output's name leads to, so that a link stays one; beside it stand files of the
program's own, which are never links.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence

from hpcinfer.errors import UsageError
from hpcinfer.io.atomic import AnyPath, is_own

# How the names of files end that Hugging Face directories are made of.
_OF_MODELS = (".safetensors", ".json", ".jinja", ".txt", ".model", ".bin", ".pt", ".pth", ".py")

Identity = tuple[int, int] | str  # device and inode; the whole name of a file that is not there yet


def target_of(path: AnyPath) -> str:
    """The file that an output's name leads to, links followed; it need not be there."""
    return os.path.realpath(path)


def claim(
    outputs: Sequence[AnyPath],
    inputs: Sequence[AnyPath] = (),
    models: Sequence[AnyPath] = (),
    beside: Sequence[AnyPath] = (),
) -> list[str]:
    """Refuse to write what is read, written twice, or no plain file; nothing is opened.

    Parameters
    ----------
    outputs : as the user has named them
    inputs, models : what is read: files, and models, of which every file counts
    beside : files of the program's own that will be written, removed or locked

    Returns
    -------
    the files that the outputs lead to

    Raises
    ------
    UsageError
        In one line, with the name and the reason.
    """
    # Know everything that is read.
    read = {_identity(path): path for path in inputs}
    for model in models:
        read |= {_identity(path): path for path in _files_of(model)}

    # Hold each output against it, and against the others.
    targets = [target_of(path) for path in outputs]
    written: set[Identity] = set()
    for path, target in zip(outputs, targets, strict=True):
        _refuse_no_file(path, target)
        identity = _identity(target)
        if identity in read:
            raise UsageError(
                f"output: got {path}, which is {read[identity]} that is read, need a file that is "
                "not; choose another name"
            )
        if identity in written:
            raise UsageError(f"output: got one file twice ({path}), need each once")
        written.add(identity)

    # The files beside are none that somebody else has made.
    for name in [*beside, *(f"{path}.partial" for path in [*targets, *beside])]:
        if not is_own(name) or _identity(name) in read.keys() | written:
            raise UsageError(
                f"output: got {name}, which is a link, no plain file, or read, need a file of this "
                "program's own in its place; remove it or choose another name"
            )
    return targets


def refuse_existing(path: AnyPath, overwrite: bool = False) -> None:
    """Refuse to replace a file with something in it, unless that is wanted.

    Raises
    ------
    UsageError
    """
    if not overwrite and os.path.isfile(path) and os.path.getsize(path):
        raise UsageError(
            f"output: got {path}, which exists, need a new name; --overwrite replaces it"
        )


def _files_of(model: AnyPath) -> list[str]:
    """A model's file, or every file of its folder that belongs to a model; results may be there."""
    path = os.fspath(model)
    if not os.path.isdir(path):
        return [path]
    return [entry.path for entry in os.scandir(path) if entry.name.endswith(_OF_MODELS)]


def _identity(path: AnyPath) -> Identity:
    """What tells a file from all others, links followed."""
    try:
        status = os.stat(path)
    except OSError:
        return target_of(path)
    return status.st_dev, status.st_ino


def _refuse_no_file(path: AnyPath, target: str) -> None:
    """Refuse an output that is a folder, a pipe or a device, or that may not be written."""
    if not os.path.exists(target):
        return
    if not stat.S_ISREG(os.stat(target).st_mode):
        raise UsageError(
            f"output: got {path}, which is a folder, a pipe or a device, need the name of a file"
        )
    if not os.access(target, os.W_OK):
        raise UsageError(f"output: got {path}, which may not be written, need one that may")
