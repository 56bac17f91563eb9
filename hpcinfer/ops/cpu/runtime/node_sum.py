"""A sum over ranks in memory that they share: each writes its part, and reads the parts of all.

A part is written, and then a flag of the rank is set to the number of the sum; who reads waits for
the flags. There are two places for parts, used in turn: when a rank writes its part of a sum, all
others have set their flags for the sum before, and so have read what was there two sums ago.

The sum is made in the order of the ranks, and is the same number on all of them.
"""

import platform

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hpcinfer.ops.cpu.runtime.compile import compiled

# Words of a rank's state: the number of its latest sum; 1 while a sum is not complete; when it was
# begun, and ticks of the processor's clock spent in sums; turns of waiting before it gives up.
NUMBER, LATE, BEGUN, TICKS, PATIENCE = range(5)
WORDS = 8

_WORD = ir.IntType(64)


@compiled
def put(slots, flags, rank, state, x):
    """Begin a sum with this rank's part.

    Parameters
    ----------
    slots : (2, P, capacity) float32, shared
    flags : (P, 8) int64, shared, 0 at first
    state : (WORDS,) int64, of this rank
    x : (n,) float32
    """
    state[BEGUN] = _ticks()
    state[NUMBER] += 1
    part = slots[state[NUMBER] % 2, rank]
    for i in range(len(x)):
        part[i] = x[i]
    _release(flags[rank].ctypes.data, state[NUMBER])


@compiled
def take(slots, flags, state, x):
    """Complete the sum that was begun, in x; if `state` says late, call this once more."""
    # Wait for the flag of every rank, and give up after a while.
    for rank in range(len(flags)):
        turns = 0
        while _acquire(flags[rank].ctypes.data) < state[NUMBER]:
            turns += 1
            if turns > state[PATIENCE]:
                state[LATE] = 1
                return
            _pause()

    # Add the parts up in the order of the ranks.
    state[LATE] = 0
    parts = slots[state[NUMBER] % 2]
    for i in range(len(x)):
        total = parts[0, i]
        for rank in range(1, len(flags)):
            total += parts[rank, i]
        x[i] = total
    state[TICKS] += _ticks() - state[BEGUN]


@compiled
def ticks():
    """The processor's clock."""
    return _ticks()


@intrinsic
def _release(typing, address, value):
    """Write a word after all that was written before it."""

    def generate(context, builder, signature, arguments):
        address, value = arguments
        place = builder.inttoptr(address, _WORD.as_pointer())
        builder.store_atomic(value, place, "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def _acquire(typing, address):
    """A word, read before all that is read after it."""

    def generate(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], _WORD.as_pointer())
        return builder.load_atomic(place, "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def _pause(typing):
    """Let the processor know that this is a loop of waiting."""

    def generate(context, builder, signature, arguments):
        if platform.machine() == "x86_64":
            kind = ir.FunctionType(ir.VoidType(), [])
            pause = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause")
            builder.call(pause, [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _ticks(typing):
    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(_WORD, [])
        clock = cgutils.get_or_insert_function(builder.module, kind, "llvm.readcyclecounter")
        return builder.call(clock, [])

    return types.int64(), generate
