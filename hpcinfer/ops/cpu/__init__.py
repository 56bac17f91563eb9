"""Kernels for processors: Numba for what no library has, oneDNN for 16-bit matrix products.

FILES       the names of `ops/`: functions that check what they are given, and kernels of theirs
products/   matrix products: gemm, oneDNN, quantised weights
simd/       vector code, which becomes part of the kernels
runtime/    how kernels are compiled, called, captured and replayed; what the processor can do
"""

from __future__ import annotations

import importlib.util

from hpcinfer import array

FILES = tuple("activation attention experts inplace linear norm rope route cache".split())


def describe() -> list[tuple[str, str]]:
    """What runs here, and what would be faster.

    Returns
    -------
    list of (what, line)
    """
    if (why := missing()) is not None:
        return [("kernels", f"plain NumPy; {why}")]
    from hpcinfer.ops.cpu.products import onednn
    from hpcinfer.ops.cpu.runtime import features

    # Say what serves few rows of a product, and quantised weights.
    paired = features.has("avx512_bf16")
    lines = [
        ("few rows", "vdpbf16ps" if paired else "widened in registers, no avx512_bf16 here"),
        ("codes", "a table of 16 entries in a register" if paired else "arithmetic in registers"),
    ]

    # Say what serves many, for each type that has more than NumPy's library.
    own = paired and not features.has("amx_bf16")
    served = {array.BFLOAT16.name: "vdpbf16ps, rows in the lanes"} if own else {}
    found = onednn.library()
    if found is not None:
        version = ".".join(map(str, onednn.version_of(found)))
        for name, dtype in array.DTYPES.items():
            if name not in served and onednn.serves(dtype):
                served[name] = f"oneDNN {version}"
    words = [f"{way} for {name}" for name, way in served.items()] or ["NumPy's library"]
    if found is None:
        words.append("pip install onednn-cpu-gomp (needs libgomp) for more speed")
    return [*lines, ("many rows", "; ".join(words))]


def notice() -> str | None:
    """A line that says that functions are yet to be compiled; None if some are there already."""
    from hpcinfer.ops.cpu.runtime.compile import folder

    home = folder()
    if home is not None and any(home.rglob("*.nbi")):
        return None
    kept = "once" if home is not None else "at every start: no folder for them can be written"
    where = f"kept in {home}" if home is not None else "set HPCINFER_CACHE to one"
    return f"compile   kernels for this processor, some 20 seconds {kept}; {where}"


def missing() -> str | None:
    """Why nothing here can run: a line that says what is needed; None if it can."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed; pip install numba"
    return None
