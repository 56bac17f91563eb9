"""`cupy.cuda.runtime`: which devices there are, and what they are."""

import os

from cupy import _segments, _streams
from cupy._facts import unwritten
from cupy._streams import CUDARuntimeError

__getattr__ = unwritten("cupy.cuda.runtime")

streamCaptureModeGlobal = _streams.GLOBAL
streamCaptureModeThreadLocal = _streams.THREAD_LOCAL
streamCaptureModeRelaxed = _streams.RELAXED

is_hip = False

_current = [0]


def getDeviceCount():
    """GPUs that the process sees."""
    return int(os.environ.get("STANDIN_DEVICES", "1"))


def getDevice():
    """Number of the current GPU."""
    return _current[0]


def setDevice(device):
    """Use another GPU from now on."""
    _current[0] = _checked(device)


def _checked(device):
    if not 0 <= device < getDeviceCount():
        raise CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
    return device


def memGetInfo():
    """Free and all bytes of the device."""
    return _segments.free_bytes(), _segments.DEVICE_BYTES


def deviceGetPCIBusId(device):
    """What tells a GPU from others of the machine."""
    return f"0000:{_checked(device):02X}:00.0"


def deviceSynchronize():
    """Let the host wait for all streams."""
    _streams.wait_for_all("device")


def runtimeGetVersion():
    """Version of CUDA."""
    return 12090


def driverGetVersion():
    """Version that the driver serves."""
    return 12090
