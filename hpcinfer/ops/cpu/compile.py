"""How this package's functions are compiled: once per machine, into a folder of the user's.

The folder's name follows from the sources of this package, since Numba by itself would see a change
of the file of a function only, and not of those it is built from. Ranks that start at once write
whole files and rename them, so that none reads another's half.
"""

import hashlib
from pathlib import Path

import numba

from hpcinfer import array

# Sums in any order and fused products, as libraries have them; NaN and infinity as they are.
_FLAGS = {"reassoc", "contract", "arcp", "nsz"}


def compiled(function):
    """The function compiled for the types that it is called with; it holds no lock meanwhile."""
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(folder())
    try:
        options = {"nogil": True, "cache": True, "fastmath": _FLAGS, "error_model": "numpy"}
        return numba.njit(**options)(function)
    finally:
        numba.config.CACHE_DIR = before


def folder():
    """Where compiled functions of these sources are kept."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return array.cache_folder() / f"kernels-{digest[:16]}"
