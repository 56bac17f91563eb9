"""Fast forms for processors: Numba for what no library has, oneDNN for 16-bit matrix products."""

import importlib.util

from hpcinfer import array

FILES = ("activation", "attention", "experts", "linear", "norm", "rope", "route", "store")


def describe():
    """What runs here, and what would be faster.

    Returns
    -------
    list of (what, line)
    """
    if (why := missing()) is not None:
        return [("kernels", f"plain NumPy; {why}")]
    from hpcinfer.ops.cpu import machine, onednn

    paired = machine.has("avx512_bf16")
    lines = [
        ("few rows", "vdpbf16ps" if paired else "widened in registers, no avx512_bf16 here"),
        ("codes", "a table of 16 entries in a register" if paired else "arithmetic in registers"),
    ]
    found = onednn.library()
    if found is None:
        lines.append(
            ("many rows", "own code; for more speed pip install onednn-cpu-gomp (needs libgomp)")
        )
    else:
        version = ".".join(map(str, onednn.version_of(found)))
        serves = [name for name in array.DTYPES if onednn.serves(array.DTYPES[name])]
        lines.append(("many rows", f"oneDNN {version} for {', '.join(serves)}"))
    return lines


def missing():
    """Why nothing here can run: a line that says what is needed; None if it can."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed; pip install hpcinfer[cpu]"
    return None
