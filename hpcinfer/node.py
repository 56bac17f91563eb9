"""The node that a rank runs on: cores, threads, shared memory, large arrays, folders."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hpcinfer.errors import is_digits

_HUGE, _LINE = 2 << 20, 64  # bytes of a huge page, of a line of the cache

# Options of the C library's allocator: freed bytes that it keeps, and those from which an array is
# mapped by itself, which glibc lets no higher than 32 MiB (malloc.h).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT, _MAPPED = 1 << 30, 32 << 20

# What another process needs to map memory: process, descriptor and bytes.
Handle = tuple[int, int, int]


def common_memory(nbytes: int) -> tuple[np.ndarray, Handle]:
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


def map_common(handle: Handle, write: bool = False) -> np.ndarray | None:
    """Memory of another process, for reading, or for writing too.

    Returns
    -------
    (nbytes,) uint8; None if it cannot be mapped
    """
    # Open it by the other's descriptor, and see that it is still what it was.
    process, descriptor, nbytes = handle
    try:
        with open(f"/proc/{process}/fd/{descriptor}", "r+b" if write else "rb") as file:
            if os.fstat(file.fileno()).st_size != max(1, nbytes):
                return None
            rights = mmap.PROT_READ | (mmap.PROT_WRITE if write else 0)
            view = mmap.mmap(file.fileno(), max(1, nbytes), prot=rights)
    except OSError:
        return None
    return np.frombuffer(view, np.uint8)[:nbytes]


def close_common(handle: Handle) -> None:
    """Let no other process map the memory any more; those that have keep it."""
    os.close(handle[1])


def host_free_bytes() -> int:
    """Host memory still free for this process, in bytes: the least of machine and control group."""
    import psutil

    # Take what the machine has, or less where the control group (version 2 or 1) allows less.
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


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def threads_per_rank() -> int | None:
    """Threads that numerical libraries may use, as the environment says; None if it does not."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        if is_digits(os.environ.get(name, "")):
            return int(os.environ[name])
    return None


# Of the process, as the threads of its libraries are: an engine sets its own when it works.
_threads = 1


def threads() -> int:
    """Threads that this rank's own kernels use."""
    return _threads


def use_threads(n: int) -> None:
    """Let this rank's own kernels and libraries use `n` threads from now on."""
    import threadpoolctl

    global _threads
    _threads = n
    threadpoolctl.threadpool_limits(n)


def large_empty(shape: int | Sequence[int], dtype: np.dtype | type) -> np.ndarray:
    """Uninitialised host array that begins a huge page, where it is large enough for one.

    Reading then touches 512 times fewer entries of the page table, and no vector lies across two
    lines of the cache.
    """
    # Begin a line of the cache where it is small.
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if nbytes < _HUGE:
        raw = np.empty(nbytes + _LINE, np.uint8)
        start = -raw.ctypes.data % _LINE
    else:
        # Begin a huge page; what fills none at the end takes small ones.
        memory = mmap.mmap(-1, nbytes + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        raw = np.frombuffer(memory, np.uint8)
        start = -raw.ctypes.data % _HUGE
        with contextlib.suppress(OSError, AttributeError):
            memory.madvise(mmap.MADV_HUGEPAGE, start, nbytes // _HUGE * _HUGE)
    return raw[start : start + nbytes].view(dtype).reshape(shape)


@functools.cache
def keep_freed_memory() -> None:
    """Let the C library keep what arrays give back, for the next ones.

    Otherwise it returns the end of its memory to the system after every large array, and each new
    array is made page by page at its first touch. What the environment says goes before.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt is None or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt(_TRIM_THRESHOLD, _KEPT)
    mallopt(_MMAP_THRESHOLD, _MAPPED)


def cache_folder(name: str) -> Path | None:
    """Folder `name` for what is made once per machine, such as compiled kernels.

    It is in the user's folder, or where that cannot be written in one for temporary files, if
    nobody else can write there; None if neither serves.
    """
    named = os.environ.get("HPCINFER_CACHE") or os.environ.get("XDG_CACHE_HOME")
    home = Path(named) if named else Path(os.path.expanduser("~")) / ".cache"
    return _found_folder(home / "hpcinfer" / name, name)


@functools.cache
def _found_folder(wanted: Path, name: str) -> Path | None:
    """The wanted folder if files can be made there, else the one for temporary files, or None."""
    if _is_writable(wanted):
        return wanted

    # Others may have made a folder of this name before
    private = Path(tempfile.gettempdir()) / f"hpcinfer-{os.getuid()}"
    with contextlib.suppress(OSError):
        private.mkdir(mode=0o700, exist_ok=True)
        status = private.lstat()
        own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
        if own and not status.st_mode & 0o022 and _is_writable(private / name):
            return private / name
    return None


def _is_writable(folder: Path) -> bool:
    """True if files can be made in a folder, which is made where it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def cores() -> set[int]:
    """Numbers of the cores of the node that this process may use."""
    return os.sched_getaffinity(0)


def core_quota() -> int | None:
    """Cores' worth of time that the control group may use; None without such a limit."""
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        return max(1, -(-int(quota) // int(period)))
    except (OSError, ValueError):
        return None


def oversubscription_is_meant() -> bool:
    """True if the user has said that more ranks than cores are meant."""
    return bool(os.environ.get("HPCINFER_OVERSUBSCRIBE"))
