"""A strict stand-in for CuPy on the host: what runs on it without a word has a chance on a GPU.

Put the folder above this one first on PYTHONPATH, and `import cupy` works without a GPU. Arrays
are NumPy's inside. The rules outside are CuPy's: which names there are, which arguments and types
are taken, and that nothing goes between the host and the device but by a copy (`facts.json`). What
CuPy has and the stand-in has not is a NotImplementedError that begins with "stand-in:".

- Memory comes from pools as CuPy has them (`_pools.py`), and has garbage in it (NaN, -1).
- Streams, events and graphs keep the order of work (`_clocks.py`, `_streams.py`, `_graphs.py`).
- Kernels are compiled by g++ and run thread by thread (`cuda/_raw.py`, tests/cuda/shim.h).
- What the device is told is counted, and what it would not report is noted (`_notes.py`).

Not modelled: work that runs at the same time, warps that run apart, cuBLAS's rounding, several
devices in one process, and values that a kernel writes to page-locked memory before the host waits.

    STANDIN_DEVICES=1          GPUs that a process sees
    STANDIN_MEMORY=4294967296  bytes of each
    STANDIN_CAPABILITY=90      what they are capable of
    STANDIN_DRIVER=1           ctypes finds a driver, too
    STANDIN_CACHE=FOLDER       where compiled kernels are kept, ~/.cache/cupy-standin by default
    STANDIN_STRICT=1           hazards are errors
    STANDIN_TRACE=1            counts come with the places that they come from
    STANDIN_DRY=1              kernels do nothing, and memory is zero: for counts alone
    SHIM_ORDER=0               threads of a block upwards; 1 downwards, 2 shuffled
"""

import numpy as _np

from cupy import _choosing, _creation, _joining, _linear, cuda
from cupy._facts import FACTS as _FACTS
from cupy._facts import NAMES as _NAMES
from cupy._facts import unwritten as _unwritten
from cupy._ndarray import ndarray
from cupy._pinned import default_pool as _default_pinned_pool
from cupy._pools import default_pool as _default_pool
from cupy._transfer import asnumpy
from cupy._ufunc import UFUNCS, ufunc
from cupy.cuda._raw import RawKernel, RawModule

__version__ = _FACTS["version"]["cupy"] + "+standin"
__getattr__ = _unwritten("cupy")

_FROM_NUMPY = (
    "float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 intp uintp bool_ "
    "complex64 complex128 inf nan pi e newaxis dtype finfo iinfo generic integer floating number "
    "result_type promote_types"
).split()

globals().update({name: getattr(_np, name) for name in _FROM_NUMPY})
globals().update(UFUNCS)
globals().update(_choosing.METHODS)
for _module in (_choosing, _creation, _joining, _linear):
    for _name in _NAMES["cupy"] & vars(_module).keys():
        globals()[_name] = getattr(_module, _name)


def get_default_memory_pool():
    """The pool that memory comes from."""
    return _default_pool


def get_default_pinned_memory_pool():
    """The pool that page-locked memory comes from."""
    return _default_pinned_pool


def is_available():
    """True: there is always a device."""
    return cuda.runtime.getDeviceCount() > 0


__all__ = ["RawKernel", "RawModule", "asnumpy", "ndarray", "ufunc"]
