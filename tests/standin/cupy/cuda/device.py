"""`cupy.cuda.device`: the current device."""

import os

from cupy.cuda import runtime

# By capability: multiprocessors, bytes of shared memory of each, and of a block that asks for them.
_SIZES = {"80": (108, 164 << 10, 163 << 10), "90": (132, 228 << 10, 227 << 10)}


class Device:
    """A GPU."""

    def __init__(self, device=None):
        self.id, self._before = runtime.getDevice() if device is None else int(device), None

    def use(self):
        """Use this GPU from now on."""
        runtime.setDevice(self.id)
        return self

    def __enter__(self):
        self._before = runtime.getDevice()
        return self.use()

    def __exit__(self, *_):
        runtime.setDevice(self._before)

    def __int__(self):
        return self.id

    def __eq__(self, other):
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self):
        return self.id

    def synchronize(self):
        """Let the host wait for all streams."""
        runtime.deviceSynchronize()

    @property
    def compute_capability(self):
        """What the GPU is capable of, such as "90"."""
        return get_compute_capability()

    @property
    def attributes(self):
        """Numbers of an A100 or H100, whichever is as capable."""
        processors, shared, shared_of_block = _SIZES[get_compute_capability()]
        return {
            "MultiProcessorCount": processors,
            "MaxSharedMemoryPerBlock": 48 << 10,
            "MaxSharedMemoryPerBlockOptin": shared_of_block,
            "MaxSharedMemoryPerMultiprocessor": shared,
            "MaxThreadsPerBlock": 1024,
            "WarpSize": 32,
        }

    @property
    def mem_info(self):
        """Free and all bytes."""
        return runtime.memGetInfo()


def get_compute_capability():
    """What the current GPU is capable of, such as "90"."""
    return os.environ.get("STANDIN_CAPABILITY", "90")


def get_cublas_handle():
    """A number that cuBLAS wants."""
    return 1


def get_device_id():
    """Number of the current GPU."""
    return runtime.getDevice()
