"""Element types of arrays and scalars, and which casts are allowed."""

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_CHARS = frozenset("?bhilqBHILQefdFD")


def checked(dtype):
    """The element type, if arrays of the device can have it."""
    dtype = np.dtype(dtype)
    if dtype.byteorder == ">":
        raise ValueError(f"Unsupported dtype {dtype} with big-endian byte-order")
    if dtype.char not in _CHARS and dtype != BFLOAT16:
        raise ValueError(f"Unsupported dtype {dtype}")
    return dtype


def from_char(char):
    """Element type of a letter in the types of a ufunc."""
    return BFLOAT16 if char == "E" else np.dtype(char)


def of_scalar(x):
    """Element type of a scalar, and its Python type if it gives way to the other operands' types.

    Raises
    ------
    TypeError
        For anything else, NumPy arrays included.
    """
    if type(x) is bool:
        return np.dtype(bool), None
    if type(x) is int:
        return np.dtype(np.uint64 if x >= 1 << 63 else np.int64), int
    if type(x) in (float, complex):
        return np.dtype(type(x)), type(x)
    if isinstance(x, np.generic):
        return x.dtype, None
    raise TypeError(f"Unsupported type {type(x)}")


def rank_of_kind(kind):
    """Where a type stands: booleans, integers, floating and complex numbers, others."""
    for rank, kinds in enumerate(((np.bool_,), (np.integer, int), (np.inexact, float, complex))):
        if issubclass(kind, kinds):
            return rank
    return 3


def refuse_cast(source, to, casting, what="array data"):
    """Refuse a cast that the rule does not allow."""
    if source == to or (casting == "same_kind" and source.kind == to.kind):
        return
    if not np.can_cast(source, to, casting):
        raise TypeError(
            f"Cannot cast {what} from {source!r} to {to!r} according to the rule '{casting}'"
        )


def widened(a):
    """A NumPy array that NumPy's functions can take: bfloat16 as float32."""
    return a.astype(np.float32) if getattr(a, "dtype", None) == BFLOAT16 else a
