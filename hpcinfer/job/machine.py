"""The machine as this program sees it: what it can use, what is missing, and how to start on it."""

import os
import sys

from hpcinfer import array, node
from hpcinfer.io.inspect import size_text
from hpcinfer.ops import cpu, cuda

# Instructions that matter here, and what they are for.
INSTRUCTIONS = {
    "avx2": "vectors of 256 bits",
    "avx512f": "vectors of 512 bits",
    "avx512_bf16": "bfloat16 products",
    "avx512_vnni": "8-bit products",
    "amx_bf16": "bfloat16 matrix unit",
    "amx_int8": "8-bit matrix unit",
}
_CPUINFO = "/proc/cpuinfo"
_HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage/enabled"


def describe():
    """Lines about the machine.

    Returns
    -------
    str, lines without a final line end
    """
    import psutil

    # Look at the machine.
    name, flags = _processor()
    n_cores = min(len(node.cores()), node.core_quota() or len(node.cores()))
    gpus = _gpus()

    # Say a word and a line of each.
    lines = [
        ("processor", name),
        ("instructions", ", ".join(f"{w} {'yes' if w in flags else 'no'}" for w in INSTRUCTIONS)),
        ("cores", f"{n_cores} usable of {os.cpu_count()}"),
        (
            "memory",
            f"{size_text(psutil.virtual_memory().total)}, {size_text(node.host_free_bytes())} "
            "free for this process",
        ),
        ("huge pages", _huge_pages()),
        ("GPUs", ", ".join(gpus) or f"none that CuPy can use: {array.gpu_trouble()}"),
        ("MPI", _mpi()),
        *_kernels("processor", cpu),
        *(_kernels("GPU", cuda) if gpus else []),
        ("start with", _advice(n_cores, gpus)),
    ]
    width = max(len(word) for word, _ in lines)
    return "\n".join(f"{word:<{width}}  {text}" for word, text in lines)


def _processor():
    """Name and flags of the processor, as the kernel lists them."""
    facts = {}
    for line in _text(_CPUINFO).splitlines():
        word, _, value = line.partition(":")
        facts.setdefault(word.strip(), value.strip())
    flags = facts.get("flags", facts.get("Features", "")).split()
    return facts.get("model name") or os.uname().machine, frozenset(flags)


def _huge_pages():
    """Whether memory of large pages can be had, which reading weights gains by."""
    chosen = _text(_HUGE_PAGES).partition("[")[2].partition("]")[0]
    if chosen == "never":
        return "never; reading is slower, ask the administrator for transparent_hugepage=madvise"
    return chosen or "unknown"


def _mpi():
    """Name of the MPI library; MPI is not started for it."""
    if "mpi4py.MPI" not in sys.modules:
        import mpi4py

        mpi4py.rc.initialize = mpi4py.rc.finalize = False
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        return f"cannot be loaded ({reason}); pip install mpich, or load the site's module"
    return " ".join(MPI.Get_library_version().splitlines()[0].split()).rstrip(",")


def _kernels(what, package):
    """Lines about the kernels for a device."""
    word, reason = f"{what} forms", package.missing()
    if reason is not None:
        return [(word, f"plain only: {reason}")]
    details = getattr(package, "describe", None)
    files = ", ".join(package.FILES) or "none yet, the plain ones run"
    return [(word, files), *(details() if details is not None else [])]


def _gpus():
    """Names of the GPUs that CuPy can use."""
    try:
        device = array.select_device("auto", 0)
        if device.name != "cuda":
            return []
        runtime = device.xp.cuda.runtime
        names = [runtime.getDeviceProperties(i)["name"] for i in range(runtime.getDeviceCount())]
    except Exception as error:  # a broken driver must not hide the rest
        return [f"cannot be used ({' '.join(str(error).split())})"]
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def _advice(n_cores, gpus):
    """How to start on this node."""
    on_cores = f"OMP_NUM_THREADS=1 mpirun -n {n_cores} hpcinfer ... (a rank for each core)"
    if not gpus:
        return on_cores
    return f"mpirun -n {len(gpus)} hpcinfer ... --device cuda (a rank for each GPU), or {on_cores}"


def _text(path):
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""
