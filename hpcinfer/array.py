"""NumPy or CuPy behind one name, element types, and the device a rank owns.

Code above this file is written once: it asks `namespace(x)` for the array module of its operands
and never names NumPy's or CuPy's own functions for data that may live on a device.
"""

import contextlib
import mmap
import os
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": BFLOAT16,
}


_HUGE, _LINE = 2 << 20, 64  # bytes of a huge page, of a line of the cache


def parse_dtype(name):
    """Element type named `name`.

    Raises
    ------
    ValueError
        If the name is none of float32, float16, bfloat16.
    """
    try:
        return DTYPES[str(name).removeprefix("torch.")]
    except KeyError:
        raise ValueError(f"dtype: got {name!r}, need one of {', '.join(DTYPES)}") from None


def is_half(dtype):
    """True for the 16-bit types, which are widened before anything is summed."""
    return np.dtype(dtype).itemsize == 2


def namespace(x):
    """Array module (numpy or cupy) that owns `x`."""
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(x, cupy.ndarray):
        return cupy
    return np


class Device:
    """The device one rank owns: host memory with NumPy, or one GPU with CuPy.

    Attributes
    ----------
    name : "cpu" or "cuda"
    xp : array module
    ordinal : number of the GPU on this node, None on the CPU
    """

    def __init__(self, name, local_rank=0):
        self.name, self.ordinal, self.xp = name, None, np
        if name == "cuda":
            self.xp = _cupy()
            self.ordinal = local_rank % self.xp.cuda.runtime.getDeviceCount()
            self.xp.cuda.Device(self.ordinal).use()

    def put(self, array):
        """`array` (host) in this device's memory; no copy on the CPU."""
        return self.xp.asarray(array) if self.name == "cuda" else array

    def empty(self, shape, dtype):
        """Uninitialised array in this device's memory."""
        if self.name == "cuda":
            return self.xp.empty(shape, dtype)
        return large_empty(shape, dtype)

    @property
    def identity(self):
        """What tells this GPU from the others of the node, whichever of them a rank sees."""
        if self.name != "cuda":
            return None
        return self.xp.cuda.runtime.deviceGetPCIBusId(self.ordinal)

    def free_bytes(self):
        """Memory that this device can still give, in bytes."""
        if self.name == "cuda":
            return int(self.xp.cuda.runtime.memGetInfo()[0])
        return host_free_bytes()

    def __str__(self):
        return self.name if self.ordinal is None else f"{self.name}:{self.ordinal}"


def select_device(choice, local_rank):
    """Device for `--device cpu|cuda|auto` on the rank that is number `local_rank` of its node."""
    if choice not in ("cpu", "cuda", "auto"):
        raise ValueError(f"device: got {choice!r}, need cpu, cuda or auto")
    if choice == "auto":
        choice = "cuda" if _gpu_count() else "cpu"
    if choice == "cuda" and not _gpu_count():
        raise ValueError("device: got cuda, need a visible GPU and CuPy; use --device cpu")
    return Device(choice, local_rank)


def host(x):
    """`x` in host memory, as a NumPy array."""
    return x if namespace(x) is np else namespace(x).asnumpy(x)


def synchronize(x):
    """Wait until the device has written `x`; nothing to do on the CPU."""
    xp = namespace(x)
    if xp is not np:
        xp.cuda.get_current_stream().synchronize()


def widen(x):
    """`x` in float32; no copy if it is float32 already."""
    if x.dtype == BFLOAT16:
        xp = namespace(x)
        return (x.view(xp.uint16).astype(xp.uint32) << 16).view(xp.float32)
    return x if x.dtype == np.float32 else x.astype(np.float32)


def narrow(x, dtype):
    """`x` (float32) rounded to `dtype`, nearest even; no copy if it has that type."""
    return x if x.dtype == dtype else x.astype(dtype)


def pack(*arrays):
    """Arrays of one length as one run of bytes, in the namespace of the last."""
    xp = namespace(arrays[-1])
    return xp.concatenate(
        [xp.ascontiguousarray(xp.asarray(x)).reshape(-1).view(np.uint8) for x in arrays]
    )


def unpack(block, n, like):
    """The arrays of `n` items that `pack` made a block of; types and other axes as in `like`."""
    arrays, start = [], 0
    for x in like:
        stop = start + n * item_bytes(x)
        arrays.append(block[start:stop].view(x.dtype).reshape(n, *x.shape[1:]))
        start = stop
    return arrays


def pack_rows(*arrays):
    """Matrices of one length as one matrix of bytes, side by side: (n, bytes of a row) uint8."""
    xp = namespace(arrays[0])
    return xp.concatenate([xp.ascontiguousarray(x).view(np.uint8) for x in arrays], axis=1)


def unpack_rows(records, like):
    """The matrices that `pack_rows` put side by side; types and widths as in `like`."""
    xp, arrays, start = namespace(records), [], 0
    for x in like:
        stop = start + item_bytes(x)
        arrays.append(xp.ascontiguousarray(records[:, start:stop]).view(x.dtype))
        start = stop
    return arrays


def item_bytes(x):
    """Bytes of one item along the first axis of `x`."""
    return x.itemsize * int(np.prod(x.shape[1:]))


def common_memory(nbytes):
    """Memory of this process that others of the node can map, until `close_common`.

    Returns
    -------
    memory : (nbytes,) uint8
    handle : what `map_common` needs in another process
    """
    descriptor = os.memfd_create("hpcinfer")
    os.ftruncate(descriptor, max(1, nbytes))
    memory = np.frombuffer(mmap.mmap(descriptor, max(1, nbytes)), np.uint8)[:nbytes]
    return memory, (os.getpid(), descriptor, nbytes)


def map_common(handle):
    """Memory of another process, for reading: (nbytes,) uint8; None if it cannot be mapped."""
    process, descriptor, nbytes = handle
    try:
        with open(f"/proc/{process}/fd/{descriptor}", "rb") as file:
            if os.fstat(file.fileno()).st_size != max(1, nbytes):
                return None
            view = mmap.mmap(file.fileno(), max(1, nbytes), prot=mmap.PROT_READ)
    except OSError:
        return None
    return np.frombuffer(view, np.uint8)[:nbytes]


def close_common(handle):
    """Let no other process map the memory any more; those that have keep it."""
    os.close(handle[1])


def host_free_bytes():
    """Host memory still free for this process, in bytes: the least of machine and control group."""
    import psutil

    free = psutil.virtual_memory().available
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        try:
            with open(limit) as a, open(used) as b:
                free = min(free, int(a.read()) - int(b.read()))
        except (OSError, ValueError):
            continue
    return max(0, free)


def peak_memory_bytes():
    """Largest resident size of this process so far, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def threads_per_rank():
    """Threads that numerical libraries may use, as the environment says; None if it does not."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return None


_threads = 1


def threads():
    """Threads that this rank's own kernels use."""
    return _threads


def use_threads(n):
    """Let this rank's own kernels use `n` threads from now on."""
    global _threads
    _threads = n


def large_empty(shape, dtype):
    """Uninitialised host array that begins a huge page, where it is large enough for one.

    Reading then touches 512 times fewer entries of the page table, and no vector lies across two
    lines of the cache.
    """
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    align = _HUGE if nbytes >= _HUGE else _LINE
    if align == _LINE:
        raw = np.empty(nbytes + align, np.uint8)
    else:
        memory = mmap.mmap(-1, nbytes + align, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError, AttributeError):
            memory.madvise(mmap.MADV_HUGEPAGE)
        raw = np.frombuffer(memory, np.uint8)
    start = -raw.ctypes.data % align
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def cache_folder():
    """Folder of the user's for what is made once per machine, such as compiled kernels."""
    named = os.environ.get("HPCINFER_CACHE") or os.environ.get("XDG_CACHE_HOME")
    home = Path(named) if named else Path(os.path.expanduser("~")) / ".cache"
    return home / "hpcinfer"


def cores():
    """Numbers of the cores of the node that this process may use."""
    return os.sched_getaffinity(0)


def core_quota():
    """Cores' worth of time that the control group may use; None without such a limit."""
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        return max(1, -(-int(quota) // int(period)))
    except (OSError, ValueError):
        return None


def crowd_is_meant():
    """True if the user has said that more ranks than cores are meant."""
    return bool(os.environ.get("HPCINFER_CROWD"))


def _cupy():
    import cupy

    return cupy


def _gpu_count():
    try:
        return _cupy().cuda.runtime.getDeviceCount()
    except Exception:  # no CuPy, no driver, or no device: all mean that there is no GPU to use
        return 0
