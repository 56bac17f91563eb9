"""Reading from memory as fast as the processor does: a limit that benches measure."""

import numpy as np

from hpcinfer.ops.cpu.runtime.compile import compiled


@compiled
def read(x):
    """Sum of `x` (n,) uint64, modulo 2⁶⁴, read as four streams.

    One stream leaves a processor's prefetchers idle that several keep at work.
    """
    n = x.size // 4
    a = b = c = d = np.uint64(0)
    for i in range(n):
        a += x[i]
        b += x[n + i]
        c += x[2 * n + i]
        d += x[3 * n + i]
    for i in range(4 * n, x.size):
        a += x[i]
    return a + b + c + d
