"""Messages of device arrays, staged and direct, and the share of a GPU, with a device that is none.

The arrays of the device are NumPy's under another name: whatever takes one for a host array, or
forgets to wait for the device, is found.
"""

import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
from mpi4py import MPI

from hpcinfer import array, staging
from hpcinfer.collectives import (
    Allgather,
    Allreduce,
    AllreduceRecords,
    Alltoall,
    Bcast,
    Gather,
    Iallgather,
    Ibcast,
    Isend,
    Recv,
    ReduceScatter,
    Shift,
    record_op,
)


class DeviceArray(np.ndarray):
    """An array that the host cannot read, but by copies."""

    def get(self, out, blocking):
        assert type(out) is np.ndarray and out.flags.c_contiguous and self.flags.c_contiguous
        out[...] = self.view(np.ndarray)

    def set(self, buffer, stream):
        assert type(buffer) is np.ndarray and buffer.shape == self.shape
        assert buffer.dtype == self.dtype and self.flags.c_contiguous
        self.view(np.ndarray)[...] = buffer


class Device(types.ModuleType):
    """Of CuPy what messages need."""

    ndarray = DeviceArray

    def __init__(self):
        super().__init__("cupy")
        self.waits, self.pinned = 0, []
        event = SimpleNamespace(record=lambda: None, done=False)
        self.cuda = SimpleNamespace(
            Event=lambda disable_timing: event,
            alloc_pinned_memory=self._alloc,
            get_current_stream=lambda: SimpleNamespace(synchronize=self._wait),
        )

    def __getattr__(self, name):
        function = getattr(np, name)

        def call(*args, **options):
            result = function(*args, **options)
            return result.view(DeviceArray) if isinstance(result, np.ndarray) else result

        return call

    def asnumpy(self, x, blocking):
        return np.array(x.view(np.ndarray))

    def _alloc(self, size):
        self.pinned.append(size)
        return bytearray(size)

    def _wait(self):
        self.waits += 1


@pytest.fixture(params=["staged", "direct"])
def device(request, monkeypatch):
    device = Device()
    monkeypatch.setitem(sys.modules, "cupy", device)
    monkeypatch.setattr(staging, "_direct", request.param == "direct")
    yield device
    array._copies.clear()


def same(got, expected):
    assert isinstance(got, DeviceArray)
    np.testing.assert_array_equal(got.view(np.ndarray), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gathers(comm, device, dtype):
    """Parts of unequal length along the second axis, the type as it is."""
    host = np.arange(2 * (comm.rank + 1)).reshape(2, -1).astype(array.DTYPES[dtype])
    x, counts = device.asarray(host), [rank + 1 for rank in range(comm.size)]
    same(Allgather(comm, x, counts, axis=1), Allgather(comm, host, counts, axis=1))
    same(Allgather(comm, x[:, :1]), Allgather(comm, host[:, :1]))
    whole = Gather(comm, x[:, :1])
    assert (whole is None) == (comm.rank != 0)
    if whole is not None:
        same(whole[0], host[:, :1])


def test_reductions(comm, device):
    host = np.arange(12, dtype=np.float32).reshape(3, 4) + comm.rank
    for cut in (slice(None), slice(1, 3)):
        x, expected = device.asarray(host.copy()), host.copy()
        Allreduce(comm, x[:, cut], MPI.MAX)
        Allreduce(comm, expected[:, cut], MPI.MAX)
        same(x, expected)
    counts = [4, *[0] * (comm.size - 1)]
    x = device.asarray(host.copy())
    same(ReduceScatter(comm, x, counts, axis=1), ReduceScatter(comm, host, counts, axis=1))
    records, op = device.asarray(host.copy()), record_op(np.maximum)
    same(AllreduceRecords(comm, records, op), AllreduceRecords(comm, host.copy(), op))


def test_exchanges(comm, device):
    P, rank = comm.size, comm.rank
    host = np.arange(3 * P, dtype=np.int32).reshape(P, 3) + 100 * rank
    got = Alltoall(comm, device.asarray(host), [1] * P, [1] * P)
    same(got, Alltoall(comm, host, [1] * P, [1] * P))
    out = device.zeros((P, 3), np.int32)
    same(Shift(comm, device.asarray(host), out).wait(), host + 100 * ((rank - 1) % P - rank))
    sent = Isend(comm, device.asarray(host), (rank + 1) % P)
    wide = device.zeros((P, 6), np.int32)
    Recv(comm, wide[:, ::2], (rank - 1) % P)
    same(wide[:, ::2], host + 100 * ((rank - 1) % P - rank))
    sent.wait()


def test_broadcasts(comm, device):
    for start in (Bcast, lambda *args: Ibcast(*args).wait()):
        x = device.full(5, comm.rank + 7, np.int64)
        start(comm, x, comm.size - 1)
        same(x, np.full(5, comm.size + 6))
    part, whole = device.full(2, comm.rank, np.uint8), device.zeros(2 * comm.size, np.uint8)
    same(Iallgather(comm, part, whole, [2] * comm.size).wait(), np.repeat(np.arange(comm.size), 2))


def test_the_device_is_waited_for(comm, device):
    """Directly before MPI reads its memory; a copy to the host waits by itself."""
    if comm.size == 1:
        return
    Allreduce(comm, device.ones(3, np.float32))
    assert bool(device.waits) == staging._direct != bool(device.pinned)


def test_staged_sizes_are_few(comm, device):
    """Memory is asked for in powers of two, and what is copied still is kept."""
    if staging._direct or comm.size == 1:
        return
    for n in (3, 4, 5, 100):
        Allreduce(comm, device.ones(n, np.float32))
    assert device.pinned == [16, 16, 32, 512]
    assert len(array._copies) == 4


def test_direct_messages_are_tried_first(comm, device, monkeypatch):
    assert staging.use_device_memory(comm, device, True)
    assert not staging.use_device_memory(comm, device, comm.rank != 0)
    assert not staging.use_device_memory(comm, np, True)
    monkeypatch.setattr(staging, "_device_memory_works", lambda *_: comm.rank != 0)
    assert not staging.use_device_memory(comm, device, True)


@pytest.mark.single
def test_who_says_that_mpi_reads_device_memory(monkeypatch):
    for name in ("HPCINFER_GPU_MPI", *array._GPU_MPI):
        monkeypatch.delenv(name, raising=False)
    assert not array.mpi_reads_device_memory()
    monkeypatch.setenv("MPICH_GPU_SUPPORT_ENABLED", "1")
    assert array.mpi_reads_device_memory()
    monkeypatch.setenv("HPCINFER_GPU_MPI", "0")
    assert not array.mpi_reads_device_memory()


@pytest.mark.single
def test_ranks_share_a_gpu(monkeypatch):
    """Each takes its part of what is free, and counts what it has given back as free."""
    limits = []
    pool = SimpleNamespace(
        set_limit=lambda size: limits.append(size), free_bytes=lambda: 50, used_bytes=lambda: 200
    )
    runtime = SimpleNamespace(getDeviceCount=lambda: 1, memGetInfo=lambda: (950, 2000))
    cupy = SimpleNamespace(
        cuda=SimpleNamespace(runtime=runtime, Device=lambda _: SimpleNamespace(use=lambda: None)),
        get_default_memory_pool=lambda: pool,
    )
    monkeypatch.setattr(array, "_cupy", lambda: cupy)
    monkeypatch.setattr(array, "_stream", lambda _: SimpleNamespace(use=lambda: None))
    device = array.Device("cuda")
    assert device.free_bytes() == 1000
    device.share(2)
    assert limits == [460] and device.free_bytes() == 260
    array.Device("cpu").share(2)
