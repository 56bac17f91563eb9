"""Calls of compiled functions that are captured once and replayed without Python.

A step of few tokens makes some hundred calls that take microseconds each, beside which those of
Python from one to the next are not small. Steps of one shape make the same calls with the same
memory, where what differs between them lies in memory too: then the calls can be kept as addresses,
and one compiled loop makes them. CUDA calls it a graph.

A kept call is three addresses: of the function, of code that calls functions with arguments of its
types, and of words that say what the arguments are. A number is a word; an array is the word of its
address, one for each length, and one for each stride.
"""

from __future__ import annotations

import struct
import time
from bisect import bisect
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np import arrayobj

from hpcinfer.array import Array
from hpcinfer.heartbeat import here
from hpcinfer.ops.cpu.runtime.compile import compiled

_WORD = ir.IntType(64)

_found = {}  # by function and kinds of arguments, what `_addresses` has found


class Memory:
    """Memory for results of calls that are captured; graphs that run in turn may have one together.

    What an array is made of is used again when there is no view of the array any more, as in the
    calls that are captured: these then need no more memory than they did when Python made them.
    """

    def __init__(self):
        self.ranges, self._buffers, self._free = [], [], defaultdict(list)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Uninitialised array that begins a line of the cache."""
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        size = 1 << max(12, (nbytes - 1).bit_length())
        free = self._free[size]
        if not free:
            buffer = np.empty(size + 64, np.uint8)
            start = -_address_of(buffer) % 64
            self._buffers.append(buffer)
            self.ranges.append(bounds(buffer))
            free.append(buffer[start : start + size])
        return np.asarray(_Loan(free.pop(), free))[:nbytes].view(dtype).reshape(shape)

    def poison(self) -> None:
        """Fill everything with what no result is made of."""
        for buffer in self._buffers:
            buffer[:] = 0xFF  # NaN in float32, bfloat16 and float16


class _Loan:
    """Memory that goes back to where it is from when no array is a view of it any more."""

    def __init__(self, buffer, home):
        self._buffer, self._home = buffer, home
        self.__array_interface__ = buffer.__array_interface__

    def __del__(self):
        self._home.append(self._buffer)


@dataclass
class Sum:
    """A sum over ranks among the calls.

    Attributes
    ----------
    call : number of the call that completes it
    key : (verb, axis, purpose) for the ledger
    sent_bytes : for the ledger
    layer : that it belongs to
    """

    call: int
    key: tuple
    sent_bytes: float
    layer: int | None


class Capture:
    """What is called while a step is captured (`hpcinfer.capture`).

    Parameters
    ----------
    memory : Memory
    lasting : list of arrays that stay where they are for as long as the graph is used; a call on
        other memory than these, and than what is had from here, cannot be captured

    Attributes
    ----------
    refusal : why there will be no graph, or None
    defers : False, as the step is computed while it is captured
    """

    defers = False

    def __init__(self, memory, lasting):
        self._memory, self._lasting = memory, lasting
        ranges = sorted(bounds(x) for x in lasting if x.size)
        self._starts, self._stops = [r[0] for r in ranges], [r[1] for r in ranges]
        self._rows, self._words, self._breaks, self._sums = [], [], [], []
        self._reducer = self.refusal = None

    def begin(self) -> None:
        """Begin; nothing to do."""

    def end(self) -> None:
        """End; nothing to do."""

    def refuse(self, reason: str) -> None:
        """Note that what happens now cannot be captured."""
        self.refusal = self.refusal or reason

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Memory for a result."""
        return self._memory.empty(shape, dtype)

    def call(self, function: Callable, arguments: Sequence[Any]) -> None:
        """Keep a call of a compiled function that returns nothing."""
        for x in arguments:
            if isinstance(x, np.ndarray) and x.size and not self._lasts(x):
                self.refuse(f"{function.__name__}, called with memory of another")
        if self.refusal is None:
            words = np.array([word for x in arguments for word in _words(x)], np.int64)
            addresses = _addresses(function, arguments)
            self._rows.append((*addresses, _address_of(words)))
            self._words.append(words)

    def pause(self, function: Callable[[], None]) -> None:
        """Keep a call of a function of Python; it comes after the calls kept so far."""
        self._breaks.append((len(self._rows), function))

    def sum(self, key: Any, sent_bytes: int, reducer: Any) -> None:
        """The next two calls are a sum over ranks, in a reducer; without one, none are."""
        if reducer is not None:
            if self._reducer not in (None, reducer):
                self.refuse("sums over different ranks")
            self._reducer = reducer
        self._sums.append(Sum(len(self._rows) + 1, key, sent_bytes, here.layer))

    def graph(self) -> Graph:
        """Graph of what has been kept."""
        table = np.array(self._rows, np.int64).reshape(-1, 3)
        held = self._memory, self._lasting, self._words
        return Graph(table, self._breaks, self._sums, self._reducer, held)

    def _lasts(self, x):
        start, stop = bounds(x)
        i = bisect(self._starts, start) - 1
        if i >= 0 and stop <= self._stops[i]:
            return True
        return any(low <= start and stop <= high for low, high in self._memory.ranges)


class Graph:
    """Calls that are made again by `replay`; made by `Capture.graph`.

    Attributes
    ----------
    totals : list of (key, calls, sent_bytes) of the sums
    """

    def __init__(self, table, breaks, sums, reducer, held):
        self._table, self._breaks, self._held = table, breaks, held
        self._sums, self._reducer = sums, reducer
        self._late = np.zeros(1, np.int64) if reducer is None else reducer.late
        of_keys = defaultdict(list)
        for s in sums:
            of_keys[s.key].append(s.sent_bytes)
        self.totals = [(key, len(sent), sum(sent)) for key, sent in of_keys.items()]

    def replay(self) -> float:
        """Make all calls; returns the seconds spent in sums of the reducer.

        Raises
        ------
        MemoryError
            If a function has failed, which compiled ones do where they get no memory.
        """
        at, before_s = 0, self._reducer_s()
        for stop, function in (*self._breaks, (len(self._table), None)):
            while at < stop:
                at = _replay(self._table, at, stop, self._late)
                if at < 0:
                    raise MemoryError(f"got a failure of call {-1 - at} of a step, need memory")
                if at < stop:
                    self._wait(at)
            here.call = None
            if function is not None:
                function()
        return self._reducer_s() - before_s

    def _reducer_s(self):
        return 0.0 if self._reducer is None else self._reducer.time_s

    def _wait(self, at):
        """Wait for other ranks, in the call that is to be made again."""
        if here.call is None:
            found = next(s for s in self._sums if s.call == at)
            here.call, here.layer = (*found.key, time.perf_counter()), found.layer
        self._reducer.wait()


def bounds(x: Array) -> tuple[int, int]:
    """Addresses of an array's first byte and behind its last one."""
    start = stop = _address_of(x)
    for length, stride in zip(x.shape, x.strides, strict=True):
        if stride < 0:
            start += (length - 1) * stride
        else:
            stop += (length - 1) * stride
    return start, stop + x.itemsize


def _address_of(x):
    """Where the first item of an array is."""
    return x.__array_interface__["data"][0]


def _words(x):
    """What an argument is, as `_argument` reads it."""
    if isinstance(x, np.ndarray):
        return [_address_of(x), *x.shape, *x.strides]
    if isinstance(x, (float, np.floating)):
        return struct.unpack("q", struct.pack("d", x))
    return [int(x)]


def _addresses(function, arguments):
    """Where `_call_with` for arguments of these types is, and the function for them."""
    key = function, tuple(map(_kind, arguments))
    if key not in _found:
        kinds = tuple(map(numba.typeof, arguments))
        _found[key] = _code(_call_with, _types_of(kinds)), _code(function, kinds)
    return _found[key]


def _kind(x):
    """What Numba's type of an argument follows from."""
    if not isinstance(x, np.ndarray):
        return type(x)
    return x.dtype, x.ndim, x.flags.c_contiguous, x.flags.f_contiguous, x.flags.writeable


def _types_of(kinds):
    return types.intp, types.CPointer(types.Tuple(kinds))


def _code(function, kinds):
    """Where the code of a compiled function for some types is."""
    if kinds not in function.overloads:
        function.compile(kinds)
    result = function.overloads[kinds]
    return result.library.get_pointer_to_function(result.fndesc.llvm_func_name)


@intrinsic
def _apply(typing, function, words):
    """Call the function at an address with the arguments that words tell."""
    kinds = tuple(words.dtype)

    def generate(context, builder, signature, arguments):
        address, words = arguments
        read = _Words(builder, builder.bitcast(words, _WORD.as_pointer()))
        values = [_argument(context, builder, kind, read) for kind in kinds]
        kind = context.call_conv.get_function_type(types.none, kinds)
        parts = context.get_arg_packer(kinds).as_arguments(builder, values)
        return _invoked(builder, kind, address, parts)

    return types.int64(function, words), generate


@intrinsic
def _enter(typing, entry, function, words):
    """Call `_call_with` at the address `entry`."""
    kinds = _types_of((types.int64,))

    def generate(context, builder, signature, arguments):
        entry, function, words = arguments
        kind = context.call_conv.get_function_type(types.int64, kinds)
        pointer = builder.inttoptr(words, kind.args[-1])
        return _invoked(builder, kind, entry, [function, pointer])

    return types.int64(*[types.int64] * 3), generate


def _invoked(builder, kind, address, parts):
    """1 if the function at an address has failed, else what it gives where that is a number."""
    result, error = (cgutils.alloca_once(builder, place.pointee) for place in kind.args[:2])
    status = builder.call(builder.inttoptr(address, kind.as_pointer()), [result, error, *parts])
    failed = builder.zext(builder.icmp_signed("!=", status, status.type(0)), _WORD)
    if kind.args[0].pointee != _WORD:
        return failed
    return builder.or_(failed, builder.load(result))


class _Words:
    """Words in memory, one after the other."""

    def __init__(self, builder, pointer):
        self._builder, self._pointer, self._n = builder, pointer, 0

    def __call__(self):
        place = self._builder.gep(self._pointer, [_WORD(self._n)])
        self._n += 1
        return self._builder.load(place)


def _argument(context, builder, kind, read):
    """An argument of a Numba type, from the words that `_words` makes of it."""
    if isinstance(kind, types.Array):
        x = context.make_array(kind)(context, builder)
        data = builder.inttoptr(read(), x.data.type)
        shape, strides = ([read() for _ in range(kind.ndim)] for _ in range(2))
        itemsize = context.get_constant(types.intp, context.get_abi_sizeof(data.type.pointee))
        arrayobj.populate_array(x, data, shape, strides, itemsize, meminfo=None)
        return x._getvalue()
    if isinstance(kind, types.Float):
        number = builder.bitcast(read(), ir.DoubleType())
        return context.cast(builder, number, types.float64, kind)
    return context.cast(builder, read(), types.int64, kind)


@compiled
def _call_with(function, words):
    return _apply(function, words)


@compiled
def _replay(calls, first, stop, late):
    """Make calls first..stop; the number of one to be made again, -1 - that of one that failed."""
    for i in range(first, stop):
        if _enter(calls[i, 0], calls[i, 1], calls[i, 2]):
            return -1 - i
        if late[0]:
            return i
    return stop
