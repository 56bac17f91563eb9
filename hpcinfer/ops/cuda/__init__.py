"""Fast forms for NVIDIA GPUs: CUDA kernels, and cuBLAS for what is large, both through CuPy.

Each file has its kernels in a CUDA source of the same name, compiled when first launched; they
include no header, and call no library.
"""

import importlib.util
import sys

FILES = (
    "activation", "attention", "cache", "embed", "experts", "linear", "norm", "quantize", "rope",
    "route", "sample", "softmax",
)  # fmt: skip

# Files with more fast forms of a file's functions, which that file's own calls.
PARTS = {"decode": "attention", "prefill": "attention", "grouped": "experts"}


def missing():
    """Why nothing here can run: a line that says what is needed; None if it can."""
    cupy = sys.modules.get("cupy")
    if cupy is None and importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed; pip install hpcinfer[cuda12] or hpcinfer[cuda13]"
    if cupy is not None and cupy.cuda.runtime.is_hip:
        return "the kernels need CUDA, and CuPy is built for ROCm"
    return None
