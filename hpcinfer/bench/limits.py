"""The limits of the machine: reading memory, matrix products, and the latency of a small Allreduce.

All ranks measure at the same time, as they work at the same time. A limit is the best of several
runs: other load only takes from it. Memory is one for all ranks, so of reading a run counts as a
whole; of products, which a rank makes on its own cores, each rank's best. Where a strategy stands
beside one rank, rank 0 measures alone too, and a limit is a median, as the strategy's time is.
"""

import importlib
import mmap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median

import numpy as np
from mpi4py import MPI

from hpcinfer import array, collectives, node
from hpcinfer.bench import measure
from hpcinfer.bench.shape import numbers
from hpcinfer.ops import dispatch
from hpcinfer.ops.linear import linear

_READ_BYTES = 1 << 30  # over all ranks, so that a large last-level cache does not flatter

# Rows, inputs, outputs: on the CPU so that what is written is not mapped anew each time, on a GPU
# so that all of it works. A GPU is given several calls before one wait.
_PRODUCT = {"cpu": (1024, 2048, 4096), "cuda": (8192, 8192, 8192)}
_CALLS = {"cpu": 1, "cuda": 8}
_RUNS = 10

# Rows and columns of what rank 0 measures alone, and all ranks; and of how many runs the median is.
_MATRIX = {"cpu": 2048, "cuda": 8192}
_TURNS = 5


@dataclass(frozen=True)
class MachineLimits:
    """What the ranks can do at most, all together.

    Attributes
    ----------
    read_byte_per_s : bytes read from memory
    flop_per_s : floating-point operations of matrix products with weights of a type
    reduce_s : seconds of an Allreduce of a token's hidden state
    """

    read_byte_per_s: float
    flop_per_s: float
    reduce_s: float

    def least_s(self, nbytes, flop):
        """Seconds that reading so much and computing so much takes, one behind the other."""
        return max(nbytes / self.read_byte_per_s, flop / self.flop_per_s)

    def facts(self):
        """The limits as fields of a row."""
        return {f"limit_{name}": value for name, value in asdict(self).items()}

    def __str__(self):
        return (
            f"reading {self.read_byte_per_s / 1e9:.1f} GB/s, matrix products "
            f"{self.flop_per_s / 1e9:.0f} GFLOP/s, all ranks together; "
            f"Allreduce of a token {1e6 * self.reduce_s:.0f} us"
        )


def measured(comm, device, dtype, width, kernels="auto"):
    """Limits of the ranks of a communicator, each with its device.

    Parameters
    ----------
    dtype : element type of weights
    width : D, of the Allreduce
    kernels : choice of `hpcinfer.ops.dispatch` to go back to: the limit is that of kernels
    """
    before = dispatch.choice()
    dispatch.use("auto")
    try:
        read, flop = read_rate(comm, device), matrix_rate(comm, device, dtype)
    finally:
        dispatch.use(before)
    return MachineLimits(read, flop, reduce_s(comm, width))


def read_rate(comm, device):
    """Bytes that all ranks together read from memory in a second."""
    nbytes = max(64, _READ_BYTES // comm.size // 64 * 64)
    if device.name == "cuda":
        x, calls = device.xp.ones(nbytes // 4, np.float32), _CALLS["cuda"]
        reads = measure.repeated(x.sum, calls)
        best_s = _best_s(comm, lambda: array.synchronize(reads()))
        return calls * comm.size * x.nbytes / best_s
    x, threads = _memory(nbytes), _threads(comm)
    with ThreadPoolExecutor(threads) as pool:
        parts = np.array_split(x, threads)
        return comm.size * nbytes / _best_s(comm, lambda: list(pool.map(_reader(), parts)))


def matrix_rate(comm, device, dtype):
    """Floating-point operations per second of all ranks: in `dtype`, or in float32 if faster."""
    (T, inputs, outputs), calls, rates = _PRODUCT[device.name], _CALLS[device.name], []
    for of_type in dict.fromkeys((np.dtype(dtype), np.dtype(np.float32))):  # in order on all ranks
        weight = device.put(numbers((outputs, inputs), of_type))
        x = device.put(numbers((T, inputs), of_type if device.name == "cuda" else np.float32))
        products = measure.repeated(partial(linear, x, weight), calls)
        best_s = _own_best_s(comm, lambda products=products: array.synchronize(products()))
        rates.append(sum(comm.allgather(calls * 2 * T * inputs * outputs / best_s)))
    return max(rates)


def matrix_rates(comm, device):
    """Floating-point operations per second in float32 products: rank 0 alone, all ranks."""
    n, xp = _MATRIX[device.name], device.xp
    a, b = (xp.full((n, n), x, np.float32) for x in (0.5, 0.25))
    c = xp.empty_like(a)
    return _rates(comm, device, lambda: xp.matmul(a, b, out=c), 2 * n**3)


def read_rates(comm, device):
    """Bytes read from memory per second: by rank 0 alone, by all ranks together."""
    x = device.xp.ones(_READ_BYTES // comm.size // 4, np.float32)
    return _rates(comm, device, x.sum if device.name == "cuda" else lambda: np.dot(x, x), x.nbytes)


def copy_rates(comm, device):
    """Bytes copied in memory per second: by rank 0 alone, by all ranks together."""
    x = device.xp.ones(_READ_BYTES // comm.size // 8, np.float32)
    y = device.xp.empty_like(x)

    def copy():
        y[...] = x
        return y

    return _rates(comm, device, copy, x.nbytes)


def reduce_s(comm, width):
    """Seconds of an Allreduce of `width` float32 numbers: the median of many calls."""
    x = np.zeros(width, np.float32)
    calls = [
        measure.together_s(comm, lambda: collectives.Allreduce(comm, x, purpose="bench"))
        for _ in range(10 * _RUNS)
    ]
    return median(calls)


def _rates(comm, device, function, amount):
    """Amount per second of rank 0 alone, and of all ranks with one `amount` each."""
    calls = _CALLS[device.name]
    run = measure.repeated(function, calls)
    measure.await_arrays(run())
    one_s, all_s = (
        median(clock(comm, run) for _ in range(_TURNS))
        for clock in (measure.alone_s, measure.together_s)
    )
    return calls * amount / one_s, calls * amount * comm.size / all_s


def _best_s(comm, function):
    """Seconds of the slowest rank in the best of some runs, after one that does not count."""
    function()
    return min(measure.together_s(comm, function) for _ in range(_RUNS))


def _own_best_s(comm, function):
    """Seconds of this rank in the best of some runs, which all ranks start together."""
    function()
    spent = []
    for _ in range(_RUNS):
        comm.Barrier()
        start_s = time.perf_counter()
        function()
        spent.append(time.perf_counter() - start_s)
    comm.Barrier()
    return min(spent)


def _memory(nbytes):
    """Words in memory of large pages, all touched: (nbytes / 8,) uint64."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    x = np.frombuffer(memory, np.uint64, nbytes // 8)
    x[:] = 1
    return x


def _reader():
    """Function that reads an array of words once."""
    package = dispatch.backend("numpy")
    if package is None:
        return lambda x: np.dot(x.view(np.float32), x.view(np.float32))
    return importlib.import_module(f"{package.__name__}.runtime.limits").read


def _threads(comm):
    """Threads of a rank: as the environment says, else its share of the node's cores."""
    on_node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    ranks = on_node.size
    on_node.Free()
    cores = min(len(node.cores()), node.core_quota() or len(node.cores()))
    return node.threads_per_rank() or max(1, cores // ranks)
