"""What this processor can do, as the kernel lists it."""

from __future__ import annotations

from functools import cache

# Instructions that some code here asks for.
NOTED = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_bf16", "amx_int8")


@cache
def flags() -> frozenset[str]:
    """Names of the processor's features; empty where the kernel does not list them."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith(("flags", "Features")):
                    return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()


def has(feature: str) -> bool:
    """True if the processor has a feature."""
    return feature in flags()
