"""Ufuncs: NumPy's functions, with the types that CuPy would choose (`facts.json`)."""

import numpy as np

from cupy import _dtypes
from cupy._array import Array, produce, values, write
from cupy._facts import FACTS
from cupy._streams import submit

COMPARISONS = frozenset(("less", "less_equal", "greater", "greater_equal", "equal", "not_equal"))
_SCATTERED = {"add": "iIlLqQefd", "sub": "iI"}  # types that can be scattered; others: _ANY
_ANY = "iIlLqQfd"


class ufunc:
    """A function of elements.

    Parameters
    ----------
    name : of CuPy's and NumPy's function
    fact : its entry in `facts.json`
    """

    def __init__(self, name, fact):
        self.name = self.__name__ = name
        self.nin, self.nout, self._scatter = fact["in"], fact["out"], fact["scatter"]
        self.types = fact["loops"].split()
        self._numpy = getattr(np, name, None)
        self._found = {}
        self._loops = []
        for text in self.types:
            sides = text.split("->")
            self._loops.append(tuple(tuple(map(_dtypes.from_char, side)) for side in sides))

    def __repr__(self):
        return f"<ufunc 'cupy_{self.name}'>"

    def __call__(self, *args, out=None, dtype=None, casting="same_kind"):
        if self._numpy is None or self.nout > 1:
            raise NotImplementedError(f"stand-in: cupy.{self.name} is not written")
        operands, out = self._sorted(args, out)
        types_in, (type_out,) = self._types(operands, dtype)

        def compute(*given):
            cast = [_cast(x, t) for x, t in zip(given, types_in, strict=True)]
            with np.errstate(all="ignore"):
                result = self._numpy(*map(_dtypes.widened, cast))
                return np.asarray(result).astype(type_out, copy=False)

        if out is None:
            return produce(self.name, compute, *operands)
        _check_out(out, operands, type_out, casting)
        return write(self.name, out, compute, *operands)

    def at(self, a, indices, b=None):
        """Combine values with the places that indices name, each time they are named."""
        from cupy._indexing import numpy_key, prepared

        if self._scatter is None:
            raise NotImplementedError(f"`{self.name}.at` is not supported yet")
        if a.dtype.char not in _SCATTERED.get(self._scatter, _ANY):
            raise TypeError(f"cupy.{self.name}.at only supports some data types, got {a.dtype}")
        key = prepared(indices)
        to, at, added = a._a, [values(k) for k in key], values(b)

        def combine():
            self._numpy.at(to, numpy_key(to, at), added)

        reads = [x for x in (*key, b) if isinstance(x, Array)]
        submit(f"{self.name}.at", combine, reads, [a])

    def reduce(self, array, axis=0, dtype=None, out=None, keepdims=False):
        """Combine the values along an axis."""
        method = {"add": "sum", "multiply": "prod"}.get(self.name)
        if method is None:
            raise NotImplementedError(f"`{self.name}.reduce` is not supported yet")
        return getattr(array, method)(axis, dtype, out, keepdims)

    def _sorted(self, args, out):
        """Operands, and the output or None."""
        if not self.nin <= len(args) <= self.nin + self.nout:
            raise TypeError(f"Wrong number of arguments for {self.name!r}.")
        if len(args) > self.nin:
            if out is not None:
                raise ValueError("Cannot specify 'out' as both a positional and keyword argument")
            out = args[self.nin]
        if isinstance(out, tuple):
            (out,) = out
        if out is not None and not isinstance(out, Array):
            _dtypes.of_scalar(out)
            raise TypeError("return arrays must be of ArrayType")
        return args[: self.nin], out

    def _types(self, operands, dtype):
        """Types of operands and results, those of the first loop that fits."""
        pairs = [
            (x.dtype, None) if isinstance(x, Array) else _dtypes.of_scalar(x) for x in operands
        ]
        types, weak = tuple(t for t, _ in pairs), tuple(w for _, w in pairs)
        dtype = None if dtype is None else np.dtype(dtype)
        key = types, weak, dtype
        if key not in self._found:
            self._found[key] = self._find(types, weak, dtype)
        if self._found[key] is None:
            raise TypeError(f"Wrong type ({dtype or types}) of arguments for cupy_{self.name}")
        return self._found[key]

    def _find(self, types, weak, dtype):
        if dtype is not None:
            return next((op for op in self._loops if all(t == dtype for t in op[1])), None)
        if self.name in ("subtract", "negative") and all(t == np.bool_ for t in types):
            return None
        if self.name in COMPARISONS and np.dtype(np.uint64) in types and int in weak:
            signed = (np.dtype(np.int64) if w else t for t, w in zip(types, weak, strict=True))
            return tuple(signed), (np.dtype(bool),)
        give_way = _scalars_give_way(types, weak)
        for loop in self._loops:
            if all(map(_fits, types, weak, loop[0], [give_way] * self.nin)):
                return loop
        return None


def _scalars_give_way(types, weak):
    """True if there are Python scalars, and arrays of no lower kind."""
    of_arrays = [_dtypes.rank_of_kind(t.type) for t, w in zip(types, weak, strict=True) if not w]
    of_scalars = [_dtypes.rank_of_kind(w) for w in weak if w]
    return bool(of_arrays) and bool(of_scalars) and max(of_arrays) >= max(of_scalars)


def _fits(given, weak, wanted, give_way):
    """True if an operand can take part in a loop of a type."""
    if np.can_cast(given, wanted):
        return True
    if not (give_way and weak):
        return False
    try:
        return np.result_type(weak(0), wanted) == wanted
    except TypeError:
        return False


def _cast(x, dtype):
    """An operand in the type of the loop."""
    if isinstance(x, np.ndarray):
        return x.astype(dtype, copy=False)
    return np.array(x).astype(dtype)[()] if dtype == _dtypes.BFLOAT16 else dtype.type(x)


def _check_out(out, operands, dtype, casting):
    """Refuse an output of another shape, or of a type that the result is not cast to."""
    shape = np.broadcast_shapes(*(np.shape(values(x)) for x in operands))
    if np.broadcast_shapes(shape, out.shape) != out.shape:
        raise ValueError("Out shape is mismatched")
    _dtypes.refuse_cast(dtype, out.dtype, casting, "output")


UFUNCS = {name: ufunc(name, fact) for name, fact in FACTS["ufuncs"].items()}
