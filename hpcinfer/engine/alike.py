"""Calls that every rank must make alike: compared by a digest before anything is done with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from hpcinfer.errors import agreed
from hpcinfer.heartbeat import waiting

if TYPE_CHECKING:
    from mpi4py.MPI import Comm


# What to do about ranks of a program, and of a command, that differ.
_OF_PROGRAM = "pass the same, or load with comm=MPI.COMM_SELF where each rank has its own"
OF_COMMAND = "start every rank with the same command"


def refuse_different(comm: Comm, what: str, *values: Any, remedy: str = _OF_PROGRAM) -> None:
    """Refuse a call whose arguments differ from rank to rank; collective over `comm`.

    Parameters
    ----------
    comm : communicator of the ranks that make the call
    what : name of the arguments, for the error
    values : plain values, arrays, and lists or dicts of such
    remedy : what the error tells the user to do

    Raises
    ------
    ValueError
        On every rank, naming the first rank that differs from rank 0.
    """
    compare(comm, what, digest(values), remedy)


def compare(comm: Comm, what: str, own: bytes | None, remedy: str = _OF_PROGRAM) -> None:
    """Refuse digests that differ from rank 0's; None is a rank that leaves the word to rank 0."""
    with waiting("allgather", comm, "alike"):
        digests = comm.allgather(own)
    others = [rank for rank, one in enumerate(digests) if one not in (None, digests[0])]
    if digests[0] is not None and not others:
        return
    got = f"no {what} on rank 0"
    if digests[0] is not None:
        got = f"other {what} on rank {others[0]} than on rank 0"
    raise agreed(
        ValueError(f"call: got {got}, need the same on every rank of the communicator; {remedy}")
    )


def digest(values: Iterable[Any]) -> bytes:
    """16 bytes that differ where values do, whichever kinds of sequences and numbers hold them."""
    state = blake2b(digest_size=16)
    for value in values:
        state.update(repr(_plain(value)).encode("utf-8", "surrogatepass"))
        state.update(b"\0")
    return state.digest()


def _plain(value: Any) -> Any:
    """Value of plain lists and numbers, dicts in the order of their keys."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return [(str(key), _plain(value[key])) for key in sorted(value, key=str)]
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value
