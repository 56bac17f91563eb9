"""`cupy.ndarray`: an array of the device, of its parts, with operators."""

import numpy as np

from cupy._array import Array, allocate
from cupy._facts import refuse, unwritten
from cupy._indexing import Indexing
from cupy._linear import matmul
from cupy._methods import Methods
from cupy._shapes import Shapes
from cupy._transfer import Transfer
from cupy._ufunc import UFUNCS

_BINARY = {
    "add": "add",
    "sub": "subtract",
    "mul": "multiply",
    "truediv": "true_divide",
    "floordiv": "floor_divide",
    "mod": "remainder",
    "lshift": "left_shift",
    "rshift": "right_shift",
    "and": "bitwise_and",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
}
_COMPARED = {
    "lt": "less",
    "le": "less_equal",
    "eq": "equal",
    "ne": "not_equal",
    "gt": "greater",
    "ge": "greater_equal",
}
_UNARY = {"neg": "negative", "pos": "positive", "abs": "absolute", "invert": "invert"}
_OPERANDS = (Array, np.ndarray, np.generic, int, float, complex)


class ndarray(Transfer, Indexing, Shapes, Methods, Array):
    """An array of the device."""

    __slots__ = ()
    __array_priority__ = 100
    __hash__ = None
    __module__ = "cupy"

    def __new__(cls, shape, dtype=float, memptr=None, strides=None, order="C"):
        refuse("ndarray", strides=strides)
        return allocate(shape, dtype, order, memptr)

    __getattr__ = lambda self, name: unwritten("ndarray")(name)  # noqa: E731

    def __pow__(self, other):
        return UFUNCS["power"](self, other)

    def __matmul__(self, other):
        return matmul(self, other)

    def __rmatmul__(self, other):
        return matmul(other, self)

    def dot(self, b, out=None):
        """Product of matrices."""
        return matmul(self, b, out=out)


def _binary(function):
    def forward(self, other):
        return function(self, other) if isinstance(other, _OPERANDS) else NotImplemented

    def backward(self, other):
        return function(other, self) if isinstance(other, _OPERANDS) else NotImplemented

    def in_place(self, other):
        return function(self, other, self)

    return forward, backward, in_place


def _comparison(function):
    def compare(self, other):
        if isinstance(other, np.ndarray) and other.ndim == 0:
            other = other.item()
        return function(self, other) if isinstance(other, _OPERANDS) else NotImplemented

    return compare


for _name, _ufunc in _BINARY.items():
    for _prefix, _operator in zip(("", "r", "i"), _binary(UFUNCS[_ufunc]), strict=True):
        setattr(ndarray, f"__{_prefix}{_name}__", _operator)
for _name, _ufunc in _COMPARED.items():
    setattr(ndarray, f"__{_name}__", _comparison(UFUNCS[_ufunc]))
for _name, _ufunc in _UNARY.items():
    setattr(ndarray, f"__{_name}__", lambda self, function=UFUNCS[_ufunc]: function(self))
