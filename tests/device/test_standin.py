"""The stand-in for CuPy: what it computes, and that it catches every kind of planted fault.

Without these, `test_device_engine` would show little: a stand-in that lets everything pass finds
nothing.
"""

import ast
import importlib
import inspect
import sys

import ml_dtypes
import numpy as np
import pytest
from helpers.paths import TESTS

pytestmark = pytest.mark.single

FOLDER = TESTS / "standin"
BF16 = np.dtype(ml_dtypes.bfloat16)

KERNELS = """
extern "C" __global__ void scale(const float* x, float* y, int n, float factor) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = factor * x[i];
}

// Every thread takes what the one before it has left, and does not wait for it.
extern "C" __global__ void hasty(float* y, float first) {
    __shared__ float all[64];
    all[threadIdx.x] = first + threadIdx.x;
    y[threadIdx.x] = all[(threadIdx.x + 63) % 64];
}

extern "C" __global__ void divided(float* y) {
    if (threadIdx.x < 32) __syncthreads();
    y[threadIdx.x] = 1;
}
"""


def is_cupy(name):
    return name.partition(".")[0] == "cupy"


@pytest.fixture(scope="module")
def module(standin):
    """The stand-in under the name of CuPy, while the tests of this file run."""
    before = {name: sys.modules.pop(name) for name in [*sys.modules] if is_cupy(name)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STANDIN_CACHE", standin["STANDIN_CACHE"])
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("cupy")
        for name in [*sys.modules]:
            if is_cupy(name):
                del sys.modules[name]
        sys.modules.update(before)


@pytest.fixture
def cupy(module):
    """The stand-in, with nothing noted."""
    module._notes.clear()
    module.cuda.runtime.deviceSynchronize()
    yield module
    module._notes.clear()


@pytest.fixture
def stream(cupy):
    """The current stream, one that can capture."""
    with cupy.cuda.Stream(non_blocking=True) as stream:
        yield stream
        if stream.is_capturing():
            with pytest.raises(RuntimeError):
                stream.end_capture()


def hazards(cupy):
    """What was noted, and no more."""
    texts = [text for text, _ in cupy._notes.hazards]
    cupy._notes.clear()
    return texts


def put(cupy, *values, dtype=np.float32):
    return cupy.asarray(np.array(values, dtype))


def page_locked(cupy, n):
    return np.frombuffer(cupy.cuda.alloc_pinned_memory(4 * n), np.float32, n)


# What it has


def test_it_has_nothing_that_cupy_has_not(cupy):
    """Its names are CuPy's, and its functions take the same arguments in the same order."""
    facts = cupy._facts.FACTS
    for name, function in vars(cupy).items():
        if inspect.isfunction(function) and not name.startswith("_"):
            assert name in facts["names"]["cupy"]
            takes = [*inspect.signature(function).parameters]
            if takes != ["a", "args", "options"]:
                assert takes == facts["functions"].get(name, takes), name
    for kind in ("Device", "Event", "Graph", "MemoryPointer", "MemoryPool", "Stream"):
        own = {name for name in vars(getattr(cupy.cuda, kind)) if not name.startswith("_")}
        assert own <= {*facts["names"][kind]}
    own = {name for base in cupy.ndarray.__mro__[:-1] for name in vars(base)}
    assert {name for name in own if not name.startswith("_")} <= {*facts["names"]["ndarray"]}


def test_names_that_are_missing(cupy):
    with pytest.raises(NotImplementedError, match="stand-in: cupy.einsum is not written"):
        cupy.einsum  # noqa: B018
    with pytest.raises(NotImplementedError, match="stand-in: ndarray.trace"):
        cupy.zeros(2).trace  # noqa: B018
    for place in (cupy, cupy.cuda, cupy.zeros(2)):
        with pytest.raises(AttributeError):
            place.warp  # noqa: B018


def test_it_imports_nothing_of_hpcinfer():
    for path in (FOLDER / "cupy").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [alias.name for node in ast.walk(tree) for alias in getattr(node, "names", ())]
        names += [getattr(node, "module", None) or "" for node in ast.walk(tree)]
        assert not any(str(name).startswith("hpcinfer") for name in names)


# What it computes


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        (BF16, 2, BF16),
        (BF16, 0.5, np.float32),
        (np.float16, 0.5, np.float16),
        (BF16, np.float32(1), np.float32),
        (np.float16, 2, np.float16),
        (np.float32, np.float64(1), np.float64),
        (np.int32, 0.5, np.float64),
        (np.uint16, 3, np.uint16),
        (np.int32, np.float32, np.float64),
        (np.uint8, np.float16, np.float16),
        (np.int64, np.uint64, np.float64),
    ],
)
def test_types_of_results(cupy, left, right, expected):
    """As CuPy chooses them: a Python number gives way, a NumPy number does not."""
    x = cupy.zeros(2, left)
    y = cupy.zeros(2, right) if isinstance(right, (type, np.dtype)) else right
    assert (x + y).dtype == expected


def test_functions_agree_with_numpy(cupy):
    a = np.random.default_rng(1).standard_normal((4, 6)).astype(np.float32)
    x, rows = cupy.asarray(a), np.array([2, 0, 2])
    for got, expected in (
        (x[rows, 1:3], a[rows, 1:3]),
        (x[x > 0], a[a > 0]),
        (cupy.where(x > 0, x, 0), np.where(a > 0, a, 0)),
        (cupy.concatenate([x, x[:1]]), np.concatenate([a, a[:1]])),
        (cupy.take_along_axis(x, x.argsort(axis=1), 1), np.sort(a, axis=1)),
        (cupy.stack([x.max(axis=1), x.sum(axis=1)]), np.stack([a.max(axis=1), a.sum(axis=1)])),
        (x @ x.T, a @ a.T),
        (cupy.exp(x).T.reshape(3, 8), np.exp(a).T.reshape(3, 8)),
        (x.view(np.uint16)[0], a.view(np.uint16)[0]),
        (cupy.maximum(x, -x, x.copy()), abs(a)),
    ):
        np.testing.assert_allclose(got.get(), expected, rtol=1e-6, atol=1e-6)
    assert not hazards(cupy)


# Between the host and the device


def test_nothing_is_converted_silently(cupy):
    x, a = cupy.zeros(3, np.float32), np.ones(3, np.float32)
    for fault in (
        lambda: np.asarray(x),
        lambda: x + a,
        lambda: np.add(a, x),
        lambda: cupy.exp(a),
        lambda: cupy.concatenate([x, a]),
        lambda: cupy.maximum(x, x, a),
        lambda: x @ np.ones((3, 3), np.float32),
        lambda: a.__iadd__(x),
    ):
        with pytest.raises(TypeError):
            fault()
    with pytest.raises(ValueError, match="non-scalar numpy.ndarray cannot be used for fill"):
        x[:] = a
    with pytest.raises(TypeError, match="float64 array cannot be set to float32 array"):
        x.set(a.astype(np.float64))


def test_the_host_waits_before_it_reads(cupy, stream):
    """A copy that nobody has waited for has brought nothing yet."""
    x, buffer = put(cupy, 1, 2), page_locked(cupy, 2)
    x.get(out=buffer, blocking=False)
    assert np.isnan(buffer).all()
    event = stream.record()
    assert not event.done and np.isnan(buffer).all()
    event.synchronize()
    assert event.done and buffer.tolist() == [1, 2]


def test_a_library_is_handed_memory_that_was_waited_for(cupy, stream):
    x = put(cupy, 1, 2)
    x += 1
    assert x.__cuda_array_interface__["shape"] == (2,)
    assert hazards(cupy) == [
        "device memory is handed to a library before the host has waited for it"
    ]
    stream.synchronize()
    assert x.__cuda_array_interface__["data"] == (x.data.ptr, False)
    assert not hazards(cupy)


@pytest.mark.parametrize("fault", ["written", "given back"])
def test_page_locked_memory_stays_as_it_is_while_it_is_copied(cupy, stream, fault):
    x, buffer = cupy.empty(2, np.float32), page_locked(cupy, 2)
    buffer[:] = 1, 2
    x.set(buffer)
    if fault == "written":
        buffer[0] = 3
    else:
        del buffer
        page_locked(cupy, 2)
    stream.synchronize()
    assert hazards(cupy) == ["page-locked memory was written while an asynchronous copy read it"]
    assert x.tolist() == [1, 2]


def test_page_locked_memory_may_change_after_the_copy(cupy, stream):
    x, buffer = cupy.empty(2, np.float32), page_locked(cupy, 2)
    for value in (1, 2):
        buffer[:] = value
        x.set(buffer)
        stream.synchronize()
    assert x.tolist() == [2, 2] and not hazards(cupy)


def test_waits_are_counted(cupy, stream):
    """One wait too many in a step is one sync more; what is over is not waited for."""

    def step(x, waits=0):
        y = x + 1
        for _ in range(waits):
            stream.synchronize()
        return float(y.sum())

    x = put(cupy, 1, 2)
    cupy._notes.clear()
    step(x)
    counts = dict(cupy._notes.counts)
    assert {kind: counts[kind] for kind in ("launch", "d2h", "sync", "alloc")} == {
        "launch": 2, "d2h": 1, "sync": 1, "alloc": 2,
    }  # fmt: skip
    step(x, waits=2)
    assert cupy._notes.counts["sync"] == 2 * counts["sync"] + 1


# Memory


def test_fresh_memory_has_garbage_in_it(cupy):
    for dtype in (np.float32, np.float16, BF16):
        assert np.isnan(cupy.empty(3, dtype).get().astype(np.float32)).all()
    assert cupy.empty(3, np.int32).tolist() == [-1, -1, -1]
    assert set(hazards(cupy)) == {"memory is read before anything was written there"}
    with cupy.cuda.using_allocator(cupy.cuda.MemoryPool().malloc):
        x = put(cupy, 1, 2, 3)
        address = x.data.ptr
        del x
        again = cupy.empty(3, np.float32)
        assert again.data.ptr == address and np.isnan(again.get()).all()


def test_indices_out_of_range(cupy):
    x = put(cupy, 1, 2, 3)
    assert x[put(cupy, 4, 0, dtype=np.int32)].tolist() == [2, 1]
    assert hazards(cupy) == ["an index is out of range 0..2, and CuPy goes round silently"]
    x[put(cupy, 1, 1, dtype=np.int64)] = put(cupy, 5, 6)
    assert hazards(cupy) == ["several values are written to one place"]


def test_views_are_aligned(cupy):
    x = cupy.zeros(9, np.uint8)
    x[1:].view(np.float32)
    assert hazards(cupy) == ["a view as float32 begins at no multiple of 4 bytes"]
    assert x[:8].view(np.float32).tolist() == [0, 0]


def test_pools(cupy, stream):
    """Chunks are cut, joined, kept for their stream, and not to be had beyond a limit."""
    pool = cupy.cuda.MemoryPool()
    x = pool.malloc(2048)
    address, offsets = x.ptr, []
    del x
    parts = [pool.malloc(n) for n in (100, 600)]
    offsets = [part.ptr - address for part in parts]
    assert offsets == [0, 512] and pool.n_free_blocks() == 1
    assert (pool.used_bytes(), pool.free_bytes()) == (1536, 512)
    with cupy.cuda.Stream.null:
        assert not address <= pool.malloc(512).ptr < address + 2048
    parts.clear()
    assert pool.malloc(2048).ptr == address
    pool.set_limit(size=4096)
    with pytest.raises(cupy.cuda.memory.OutOfMemoryError, match="limit set to: 4,096 bytes"):
        pool.malloc(2049)
    pool.free_all_blocks()
    assert pool.total_bytes() == 0
    with cupy.cuda.using_allocator(pool.malloc):
        x = cupy.empty(3)
    assert pool.used_bytes() == 512 == cupy.ndarray(3, memptr=x.data).data.mem.chunk.size


def test_the_device_has_an_end(cupy):
    free, total = cupy.cuda.runtime.memGetInfo()
    assert 0 < free < total
    with pytest.raises(cupy.cuda.memory.OutOfMemoryError):
        cupy.empty(total, np.uint8)


# Kernels


@pytest.fixture
def kernel(cupy):
    """Function to a kernel by its name."""
    return cupy.RawModule(code=KERNELS, options=("-std=c++14",)).get_function


def scale(kernel, x, y, factor=2):
    kernel("scale")((1,), (32,), (x, y, np.int32(x.size), np.float32(factor)))


def test_kernels_run(cupy, kernel):
    x, y = put(cupy, 1, 2, 3), cupy.empty(3, np.float32)
    scale(kernel, x, y)
    assert y.tolist() == [2, 4, 6] and cupy._notes.counts["launch"] == 1


def test_arguments_of_kernels(cupy, kernel):
    """Their types are the kernel's; a Python number would be one of 64 bits."""
    x, one = put(cupy, 1, 2), np.float32(1)
    for args in (
        (x, x, np.int64(2), one),
        (x, x, 2, one),
        (x, x, np.int32(2), 1.0),
        (x, np.ones(2, np.float32), np.int32(2), one),
        (x, x, np.int32(2)),
    ):
        with pytest.raises(TypeError):
            kernel("scale")((1,), (32,), args)


def test_starts_of_kernels(cupy, kernel):
    """Grid, block and shared memory are what CUDA allows."""
    x = put(cupy, 1, 2)
    args, scaled = (x, x, np.int32(2), np.float32(1)), kernel("scale")
    for grid, block in (((1, 70000), (32,)), ((1,), (1025,))):
        with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
            scaled(grid, block, args)
    with pytest.raises(TypeError, match="grid"):
        scaled(1, (32,), args)
    with pytest.raises(RuntimeError, match="50000 bytes of shared memory"):
        scaled((1,), (32,), args, shared_mem=50000)
    scaled.max_dynamic_shared_size_bytes = 50000
    scaled((1,), (32,), args, shared_mem=50000)
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
        scaled.max_dynamic_shared_size_bytes = 300000
    with pytest.raises(RuntimeError, match="CUDA_ERROR_NOT_FOUND"):
        kernel("scales")


def test_launches_by_the_driver_itself(mpirun, standin):
    """As ctypes finds it, in a capture too."""
    code = """
import sys, cupy, numpy as np
from hpcinfer.ops.cuda.runtime import overlapped
scale = cupy.RawModule(code=sys.argv[1]).get_function("scale")
with cupy.cuda.Stream(non_blocking=True) as stream:
    x, y = cupy.ones(2, np.float32), cupy.empty(2, np.float32)
    stream.begin_capture()
    assert overlapped.start(scale, (1,), 32, (x, y, np.int32(2), np.float32(3)))
    graph = stream.end_capture()
    graph.launch()
    print(y.get(), *cupy._notes.hazards)
"""
    done = mpirun(1, sys.executable, "-c", code, KERNELS, **standin)
    assert done.stdout == "[3. 3.]\n", done.stdout + done.stderr


def test_the_order_of_threads_shows_what_does_not_wait(cupy, kernel, monkeypatch):
    found = []
    for order in range(2):
        monkeypatch.setenv("SHIM_ORDER", str(order))
        y = cupy.zeros(64, np.float32)
        kernel("hasty")((1,), (64,), (y, np.float32(100 * order)))
        found.append(y.tolist()[1:] == [100 * order + i for i in range(63)])
    assert found == [True, False]


def test_threads_that_wait_for_ever(cupy, kernel):
    y = cupy.zeros(64, np.float32)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="divided: threads wait for ever"):
            kernel("divided")((1,), (64,), (y,))


# Streams


def test_streams_wait_for_each_other(cupy, kernel):
    """Neither sees what the other writes, unless an event or the host is between them."""
    one, other = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    with one:
        x, y = put(cupy, 1, 2), cupy.empty(2, np.float32)
    with other:
        z = x + 1
    fault = "two streams use the same memory and neither waits for the other"
    assert hazards(cupy) == [fault]
    with other:
        other.wait_event(one.record())
        z = x + z
        scale(kernel, x, z)
    assert not hazards(cupy)
    with one:
        scale(kernel, x, y)  # both read x
    assert not hazards(cupy)
    with one:
        x += 1
    assert hazards(cupy) == [fault]
    one.synchronize()
    with other:
        scale(kernel, y, x)
    assert not hazards(cupy)


def test_the_null_stream_waits_for_the_streams_that_block(cupy):
    for blocking, expected in ((True, 0), (False, 1)):
        with cupy.cuda.Stream(non_blocking=not blocking):
            x = put(cupy, 1, 2)
        x + 1
        assert len(hazards(cupy)) == expected


# Graphs


def captured(stream, function):
    """Graph of what a function does, and its result."""
    stream.begin_capture()
    result = function()
    return stream.end_capture(), result


def test_a_graph_is_recorded_and_then_launched(cupy, stream, kernel):
    """Nothing is computed before; every launch computes anew, and counts as one."""
    x, y = put(cupy, 1, 2), cupy.empty(2, np.float32)

    def work():
        scale(kernel, x, y, 3)
        total = y.sum()
        y.data.copy_from_device_async(x.data, 4)
        return total

    cupy._notes.clear()
    graph, total = captured(stream, work)
    assert "launch" not in cupy._notes.counts
    assert np.isnan(y.get()).all() and np.isnan(total.get())
    for value in (9, 18):
        cupy._notes.clear()
        graph.launch(stream)
        counts = dict(cupy._notes.counts)
        assert (counts["launch"], counts["graph"], counts["graph_launch"]) == (1, 1, 3)
        assert total.item() == value and y.tolist() == [value / 9, value / 3 * 2]
        x *= 2
    assert not hazards(cupy)


def test_copies_in_a_graph(cupy, stream):
    """They read page-locked memory, and write it, when the graph is launched."""
    x, source, target = cupy.empty(2, np.float32), page_locked(cupy, 2), page_locked(cupy, 2)

    def work():
        x.data.memset_async(0, 8)
        x.set(source)
        (x + 1).get(out=target, blocking=False)

    graph, _ = captured(stream, work)
    for value in (1, 2):
        source[:] = value
        graph.launch(stream)
        assert np.isnan(target).all() or value == 2
        stream.synchronize()
        assert target.tolist() == [value + 1] * 2
    graph.launch(stream)
    source[:] = 7
    stream.synchronize()
    assert hazards(cupy) == ["page-locked memory was written while an asynchronous copy read it"]


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (lambda cupy, x, stream: x.get(), "cudaErrorStreamCaptureUnsupported"),
        (lambda cupy, x, stream: cupy.asnumpy(x), "cudaErrorStreamCaptureUnsupported"),
        (lambda cupy, x, stream: float(x[0]), "cudaErrorStreamCaptureUnsupported"),
        (lambda cupy, x, stream: x.nonzero(), "cudaErrorStreamCaptureUnsupported"),
        (lambda cupy, x, stream: x[x > 0], "cudaErrorStreamCaptureUnsupported"),
        (lambda cupy, x, stream: cupy.asarray(np.ones(2)), "cudaErrorStreamCaptureUnsupported"),
        (lambda cupy, x, stream: x[np.array([1])], "cudaErrorStreamCaptureUnsupported"),
        (lambda cupy, x, stream: x.set(np.ones(2, np.float32)), "cudaErrorStreamCapture"),
        (lambda cupy, x, stream: stream.synchronize(), "cudaErrorStreamCaptureUnsupported"),
        (lambda cupy, x, stream: stream.done, "cudaErrorStreamCaptureUnsupported"),
        (lambda cupy, x, stream: cupy.cuda.Device().synchronize(), "cudaErrorStreamCapture"),
        (lambda cupy, x, stream: stream.begin_capture(), "cudaErrorStreamCaptureUnsupported"),
    ],
)
def test_what_a_capture_does_not_take(cupy, stream, fault, error):
    """It is refused, and spoils the capture."""
    x = put(cupy, 1, 2)
    stream.begin_capture()
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match=error):
        fault(cupy, x, stream)
    with pytest.raises(RuntimeError, match="cudaErrorStreamCaptureInvalidated"):
        stream.end_capture()
    assert not stream.is_capturing() and x.tolist() == [1, 2]


def test_what_else_a_capture_does_not_take(cupy, stream):
    x = put(cupy, 1, 2)
    with pytest.raises(RuntimeError, match="cannot capture on the default"):
        cupy.cuda.Stream.null.begin_capture()
    stream.begin_capture()
    with pytest.raises(NotImplementedError, match="calling cuBLAS API during stream capture"):
        x @ x
    with pytest.raises(NotImplementedError, match="calling cuBLAS API during stream capture"):
        cupy.cuda.cublas.gemmEx(0, *range(18))
    event = stream.record()
    with pytest.raises(RuntimeError, match="cudaErrorCapturedEvent"):
        event.synchronize()
    assert stream.end_capture() is not None
    with pytest.raises(RuntimeError, match="cudaErrorIllegalState"):
        stream.end_capture()


def test_pools_that_grow_in_a_capture(cupy, stream):
    """CUDA lets them in relaxed captures, which are CuPy's, and in no other."""
    pool, runtime = cupy.cuda.MemoryPool(), cupy.cuda.runtime
    with cupy.cuda.using_allocator(pool.malloc):
        captured(stream, lambda: cupy.zeros(3))
        assert pool.total_bytes() == 512
        stream.begin_capture(runtime.streamCaptureModeGlobal)
        x = cupy.zeros(3)  # from what is free
        with pytest.raises(runtime.CUDARuntimeError, match="a memory pool must grow"):
            cupy.zeros(3)
    with pytest.raises(RuntimeError, match="cudaErrorStreamCaptureInvalidated"):
        stream.end_capture()
    assert x.shape == (3,)


def test_memory_of_a_graph(cupy, stream):
    """It is the graph's own, in a pool that nobody else takes from."""
    x, pool = put(cupy, 1, 2), cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc):
        graph, result = captured(stream, lambda: (x + 1) * 2 + x)
        graph.launch(stream)
        assert result.tolist() == [5, 8] and not hazards(cupy)

        # What another array has by now; then nothing is left of the pool
        other = cupy.zeros(2, np.float32)
        graph.launch(stream)
        assert set(hazards(cupy)) == {"a graph uses memory that belongs to another array by now"}
    del other, result, pool
    graph.launch(stream)
    assert set(hazards(cupy)) == {"a graph uses memory that was given back to the device"}


def test_a_graph_keeps_nothing_alive(cupy, stream):
    def graph_of(x):
        return captured(stream, lambda: x * 2)

    graph, result = graph_of(put(cupy, 1, 2))
    graph.launch(stream)
    assert hazards(cupy) == ["a graph uses memory that was freed"]
    assert result.shape == (2,)


def test_what_is_made_in_a_capture_is_there_once_the_graph_is_launched(cupy, stream, kernel):
    """A counter, say, that is set to zero when it is first asked for, and kept."""
    x, pool = put(cupy, 1, 2), cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc):
        graph, kept = captured(stream, lambda: cupy.zeros(2, np.float32))
        scale(kernel, x, kept)
        assert hazards(cupy) == [
            "memory that was taken in a capture is used before its graph is launched"
        ]
        graph.launch(stream)
        assert kept.tolist() == [0, 0]
        scale(kernel, x, kept)
        assert kept.tolist() == [2, 4] and not hazards(cupy)


def test_memory_of_a_graph_begins_with_garbage(cupy, stream):
    """What a launch has left there is not there at the next."""
    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc):

        def work():
            total = cupy.empty(2, np.float32)
            total.data.memset_async(0, 4)  # the second value is forgotten
            return total + 1

        graph, result = captured(stream, work)
        for _ in range(2):
            graph.launch(stream)
            found = result.get()
            assert found[0] == 1 and np.isnan(found[1])


# cuBLAS


def test_products_by_the_library_itself(cupy, stream):
    """As ctypes finds it, with a handle of one's own, in a capture too."""
    import ctypes

    version = cupy.cuda.cublas.getVersion(cupy.cuda.get_cublas_handle())
    library = ctypes.CDLL(f"libcublas.so.{version // 10000}")
    a, b = (np.random.default_rng(i).standard_normal((3, 8)).astype(BF16) for i in range(2))
    x, weight, y = cupy.asarray(a), cupy.asarray(b), cupy.empty((3, 3), np.float32)
    handle, one, zero = ctypes.c_void_p(), ctypes.c_float(1), ctypes.c_float(0)
    library.cublasCreate_v2(ctypes.byref(handle))
    library.cublasSetStream_v2(handle, ctypes.c_void_p(stream.ptr))

    def product():
        return library.cublasGemmEx(
            handle, 1, 0, 3, 3, 8, ctypes.byref(one), ctypes.c_void_p(weight.data.ptr), 14, 8,
            ctypes.c_void_p(x.data.ptr), 14, 8, ctypes.byref(zero), ctypes.c_void_p(y.data.ptr),
            0, 3, 68, -1,
        )  # fmt: skip

    assert product() == 3  # it has no workspace yet, and would allocate
    workspace = cupy.cuda.alloc(1 << 20)
    library.cublasSetWorkspace_v2(handle, ctypes.c_void_p(workspace.ptr), ctypes.c_size_t(1 << 20))
    graph, status = captured(stream, product)
    assert status == 0 and np.isnan(y.get()).all()
    graph.launch(stream)
    expected = a.astype(np.float32) @ b.astype(np.float32).T
    np.testing.assert_allclose(y.get(), expected, rtol=1e-5)
