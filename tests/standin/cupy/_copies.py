"""Copies between the host and the device, which end when the host has waited for them.

Until then the host finds garbage where it is to read, and what it writes where the device is to
read is a hazard.
"""

import numpy as np

from cupy._clocks import until_waited
from cupy._notes import hazard
from cupy._segments import GARBAGE
from cupy._streams import current, submit


def bytes_of(host):
    """The memory of a contiguous NumPy array, in either order."""
    return host.reshape(-1, order="A").view(np.uint8)


def copy_from_host(host, x, watched):
    """Submit a copy to a device array `x`; what is watched is read until the host has waited."""
    a = x._a

    def work():
        a[...] = host
        if watched:
            raw = bytes_of(host)
            until_waited(current()._clock, _unchanged(raw, raw.copy()))

    submit("set", work, writes=[x], kind="h2d")


def _unchanged(raw, before):
    def end():
        if not np.array_equal(raw, before):
            hazard("page-locked memory was written while an asynchronous copy read it")

    return end


def copy_to_host(x, host):
    """Submit a copy of a device array `x`; the host finds garbage until it has waited."""
    a = x._a

    def work():
        value = a.copy()
        bytes_of(host)[...] = GARBAGE
        until_waited(current()._clock, lambda: np.copyto(host, value))

    submit("get", work, reads=[x], kind="d2h")
