"""How this package's functions are compiled: once per machine, into a folder of the user's.

Where that cannot be written a folder of the user's for temporary files serves, and without one
every process compiles for itself: Numba's own choice, beside the sources, would serve kernels of
other versions.

The folder's name follows from the sources that functions are built from, since Numba by itself
would see a change of a function's own file only. Ranks that start at once compile
one after the other, so that those that come later find what the first has kept; they write whole
files and rename them, so that none reads another's half.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

import numba

from hpcinfer import node

# Sums in any order and fused products, as libraries have them; NaN and infinity as they are.
_FLAGS = {"reassoc", "contract", "arcp", "nsz"}

_of_this_process, _depth = threading.RLock(), 0


def compiled(function: Callable) -> Callable:
    """The function compiled for the types that it is called with; it holds no lock meanwhile."""
    # Have Numba keep it in the folder of these sources, and nowhere else.
    before, home = numba.config.CACHE_DIR, folder()
    numba.config.CACHE_DIR = str(home or "")
    try:
        options = {"nogil": True, "fastmath": _FLAGS, "error_model": "numpy"}
        options["cache"] = home is not None
        dispatcher = numba.njit(**options)(function)
    finally:
        numba.config.CACHE_DIR = before
    # Compile for new types while no other process does.
    compile_or_load = dispatcher.compile

    def alone(signature):
        with _alone():
            return compile_or_load(signature)

    dispatcher.compile = alone
    return dispatcher


def inlined(function: Callable) -> Callable:
    """The function as a part of the compiled functions that call it, each of which has it anew."""
    return numba.njit(inline="always")(function)


def folder() -> Path | None:
    """Where compiled functions of these sources are kept; None where no folder can be written."""
    return node.cache_folder(f"kernels-{_digest()[:16]}")


def sources():
    """Files that compiled functions are built from: those of ops, but for ops/cuda."""
    ops = Path(__file__).parents[2]
    return sorted(path for path in ops.rglob("*.py") if ops / "cuda" not in path.parents)


@functools.cache
def _digest():
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources())).hexdigest()


@contextlib.contextmanager
def _alone():
    """While no other process compiles into the folder, where its file system has locks.

    A function is compiled within another that calls it: the lock is taken by the outermost.
    """
    global _depth
    with _of_this_process, contextlib.ExitStack() as held:
        if _depth == 0:
            if (home := folder()) is not None:
                with contextlib.suppress(OSError):
                    file = held.enter_context(open(home / "lock", "a"))
                    fcntl.flock(file, fcntl.LOCK_EX)
        _depth += 1
        try:
            yield
        finally:
            _depth -= 1
