"""Kernels for NVIDIA GPUs: CUDA sources, and cuBLAS for what is large, both through CuPy.

    FILES           the names of `ops/`: functions that check what they are given, and launch
    FURTHER_FILES   more for the functions of one of them, which asks there
    quantized, attention_shapes, jobs       what several files have in common
    runtime/        how kernels are compiled, launched, captured and replayed; the libraries

Each of both kinds of files has its kernels in a CUDA source of the same name, compiled when first
launched; they include no header, and call no library.
"""

from __future__ import annotations

import importlib.util
import sys

FILES = (
    "activation", "attention", "cache", "embed", "experts", "linear", "norm", "quantize", "rope",
    "route", "sample", "softmax",
)  # fmt: skip

# Files with more kernels for the functions of a file, by which they are called.
FURTHER_FILES = {"decode": "attention", "prefill": "attention", "grouped": "experts"}


def missing() -> str | None:
    """Why nothing here can run: a line that says what is needed; None if it can."""
    cupy = sys.modules.get("cupy")
    if cupy is None and importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed; pip install cupy-cuda12x[ctk] or cupy-cuda13x[ctk]"
    if cupy is not None and cupy.cuda.runtime.is_hip:
        return "the kernels need CUDA, and CuPy is built for ROCm"
    return None
