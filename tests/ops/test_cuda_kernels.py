"""The CUDA kernels: compiled for two kinds of GPU, run thread by thread on the host, and on a GPU.

Without a GPU their sources are compiled as C++ with `cuda/shim.h`, which lets the threads of a
block take turns, and are called by the very functions that start them on a device.
"""

import ctypes
import functools
import importlib
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers.logits import mixture
from helpers.paths import TESTS
from mpi4py import MPI

from hpcinfer import array, partition
from hpcinfer.model.block_table import BlockTable
from hpcinfer.ops import (
    activation,
    attention,
    cache,
    cuda,
    dispatch,
    embed,
    experts,
    linear,
    norm,
    penalties,
    quantize,
    rope,
    route,
    sample,
    softmax,
)
from hpcinfer.ops.cuda.runtime import launch
from hpcinfer.ops.sampling_batch import SamplingBatch
from hpcinfer.parallel import vocabulary

pytestmark = pytest.mark.single

SHIM = TESTS / "cuda" / "shim.h"
ARCHITECTURES = ("sm_80", "sm_90")
HALVES = ("float16", "bfloat16")


def fast(place):
    """The module of fast forms of a file."""
    return importlib.import_module(f"hpcinfer.ops.cuda.{place}")


def plain(function):
    return getattr(function, "plain", function)


# Compiling for a GPU


class Nvrtc:
    """NVIDIA's compiler at run time, the one that CuPy uses."""

    def __init__(self, path):
        for builtins in path.parent.glob("libnvrtc-builtins.so*"):
            ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
        self.library = ctypes.CDLL(str(path))

    def cubin(self, text, options):
        """(binary, log) of a source; the binary is None if it does not compile."""
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), text.encode(), b"", 0, None, None)
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = self.library.nvrtcCompileProgram(program, len(options), given)
        log = self._result("nvrtcGetProgramLog", program).rstrip(b"\0\n").decode()
        binary = None if status else self._result("nvrtcGetCUBIN", program)
        self._call("nvrtcDestroyProgram", ctypes.byref(program))
        return binary, log

    def _result(self, function, program):
        size = ctypes.c_size_t()
        self._call(f"{function}Size", program, ctypes.byref(size))
        result = ctypes.create_string_buffer(size.value)
        self._call(function, program, result)
        return result.raw

    def _call(self, function, *args):
        status = getattr(self.library, function)(*args)
        assert status == 0, f"{function}: {status}"


@functools.cache
def nvrtc():
    """NVRTC of a wheel or beside nvcc; None if there is none."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    if shutil.which("nvcc"):
        root = Path(shutil.which("nvcc")).resolve().parent.parent
        folders += [root / "lib64", *root.glob("targets/*/lib")]
    for folder in folders:
        for path in sorted(folder.rglob("libnvrtc.so*"), key=lambda path: len(path.name)):
            try:
                return Nvrtc(path)
            except OSError:
                continue
    return None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("file", [*cuda.FILES, *cuda.FURTHER_FILES])
def test_compiles(file, architecture):
    """Every source compiles without a word, and has the kernels that the Python side names."""
    compiler = nvrtc()
    if compiler is None:
        pytest.skip("neither a wheel nvidia-cuda-nvrtc nor nvcc is installed")

    # Of several variants each kind of GPU has every other.
    own = fast(file).OPTIONS[ARCHITECTURES.index(architecture) :: 2] or fast(file).OPTIONS
    for options in own:
        options = (f"--gpu-architecture={architecture}", "-std=c++14", *options)
        binary, log = compiler.cubin(launch.source(file), options)
        assert not log and binary is not None, f"{options}: {log}"
        found = {name.decode() for name in re.findall(rb"\.text\.(\w+)\0", binary)}
        assert found == set(fast(file).KERNELS)


def test_no_kernel_lacks_a_name():
    """Every file of fast forms has its source, and every function a plain form of its name."""
    folder = Path(cuda.__file__).parent
    places = {**{place: place for place in cuda.FILES}, **cuda.FURTHER_FILES}
    assert {path.stem for path in folder.glob("*.cu")} == set(places)
    for place, plain_place in places.items():
        module, oracle = fast(place), importlib.import_module(f"hpcinfer.ops.{plain_place}")
        own = [name for name in vars(module) if not name.startswith("_")]
        functions = [getattr(module, name) for name in own if callable(getattr(module, name))]
        functions = [f for f in functions if getattr(f, "__module__", "") == module.__name__]
        assert functions and all(hasattr(oracle, f.__name__) for f in functions)


# Running, on the host or on a GPU


@functools.cache
def compiled(folder, file, options):
    """A source as a library for the host."""
    name = "-".join([file, *(re.sub(r"\W", "", option) for option in options)])
    source, library = folder / f"{name}.cc", folder / f"{name}.so"
    runs = "\n".join(f"RUN({kernel})" for kernel in fast(file).KERNELS)
    source.write_text(f"{launch.source(file)}\n{runs}\n", encoding="utf-8")
    command = ["g++", "-std=c++14", "-O1", "-ffp-contract=off", "-fno-gnu-unique", "-w"]
    command += [
        "-shared",
        "-fPIC",
        "-include",
        str(SHIM),
        *options,
        str(source),
        "-o",
        str(library),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return ctypes.CDLL(str(library))


class HostKernel:
    """A kernel that runs on the host when it is started."""

    def __init__(self, library, name):
        self.run = getattr(library, f"run_{name}")
        text = ctypes.create_string_buffer(64)
        getattr(library, f"signature_{name}")(text)
        self.signature, self.name = text.value.decode(), name

    def __call__(self, grid, block, args, shared_mem=0):
        letters = {np.int32: "i", np.int64: "l", np.float32: "f"}
        given = "".join(letters.get(type(x), "p") for x in args)
        assert given == self.signature, f"{self.name} takes {self.signature}, got {given}"
        arrays = [x if np.isscalar(x) else np.uint64(launch.address(x)) for x in args]
        places = [np.array([x]) for x in arrays]
        pointers = (ctypes.c_void_p * len(args))(*(x.ctypes.data for x in places))
        shape = (ctypes.c_uint * 3)(*(grid + (1, 1))[:3])
        assert self.run(shape, block[0], pointers) == 0, f"{self.name}: threads wait for ever"


@pytest.fixture(scope="session")
def library_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cuda")


@pytest.fixture(params=["host", "device"])
def put(request, monkeypatch):
    """Function that brings an array to where the kernels run."""
    launch._recent.clear()
    dispatch.use("plain")
    request.addfinalizer(lambda: dispatch.use("auto"))
    if request.param == "device":
        if array.gpu_trouble():
            pytest.skip("no GPU")
        return array.Device("cuda").put
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    folder = request.getfixturevalue("library_folder")

    def kernel(file, name, options):
        return HostKernel(compiled(folder, file, options), name)

    monkeypatch.setattr(launch, "_kernel", kernel)
    monkeypatch.setattr(launch, "_make_room", lambda *args: None)
    return lambda x: x


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def normal(rng, *shape):
    return rng.standard_normal(shape, np.float32)


def agree(result, expected, tolerance=2e-6):
    """Compare results of a fast form with those of the plain one, on the host."""
    assert result is not NotImplemented
    result = result if isinstance(result, tuple) else (result,)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for got, wanted in zip(result, expected, strict=True):
        got = array.host(got)
        assert got.dtype == wanted.dtype and got.shape == wanted.shape
        np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance)


# Norms, rope, gate


@pytest.mark.parametrize("shape", [(3, 64), (2, 1000), (5, 7), (64,), (2, 3, 16)])
def test_norms(put, rng, shape):
    x, weight, bias = normal(rng, *shape), normal(rng, shape[-1]), normal(rng, shape[-1])
    agree(fast("norm").rms_norm(put(x), put(weight), 1e-5), plain(norm.rms_norm)(x, weight, 1e-5))
    for b in (bias, None):
        got = fast("norm").layer_norm(put(x), put(weight), None if b is None else put(b), 1e-5)
        agree(got, plain(norm.layer_norm)(x, weight, b, 1e-5))


@pytest.mark.parametrize("dtype", sorted(array.DTYPES))
@pytest.mark.parametrize("D", [64, 30])
def test_sum_before_a_norm(put, rng, dtype, D):
    """The sum stands in the memory of its first part; the norm is rounded."""
    x, y, weight, bias = (normal(rng, *shape) for shape in ((3, D), (3, D), (D,), (D,)))
    dtype = array.DTYPES[dtype]
    for name, parameters in (("rms", (weight,)), ("layer", (weight, bias))):
        there = put(y.copy())
        total, normed = getattr(fast("norm"), f"add_{name}_norm")(
            there, put(x), *map(put, parameters), 1e-5, dtype
        )
        assert total is there and normed.dtype == dtype
        agree(total, y + x)
        wanted = plain(getattr(norm, f"{name}_norm"))(y + x, *parameters, 1e-5)
        got, tolerance = array.host(array.widen(normed)), 1e-5 if dtype == np.float32 else 1e-2
        np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("columns", [slice(0, 2), slice(2, 5)])
def test_norm_of_heads_within_tokens(put, rng, columns):
    """Heads that lie within wider tokens are read where they are."""
    x, weight = normal(rng, 3, 6, 16), normal(rng, 16)
    got = fast("norm").rms_norm(put(x)[:, columns], put(weight), 1e-6)
    agree(got, plain(norm.rms_norm)(x[:, columns], weight, 1e-6))


@pytest.mark.parametrize(("K", "half"), [(16, 8), (16, 4), (10, 3)])
@pytest.mark.parametrize("columns", [slice(0, 4), slice(4, 6)])
def test_rotate(put, rng, K, half, columns):
    x, cos, sin = normal(rng, 5, 6, K), normal(rng, 5, half), normal(rng, 5, half)
    got = fast("rope").rotate(put(x)[:, columns], cos, sin)
    agree(got, plain(rope.rotate)(x[:, columns], cos, sin))


@pytest.mark.parametrize("widths", [(8,), (300,), (8, 4), (3, 5), (7, 0, 1)])
@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh"])
def test_gated(put, rng, name, widths):
    gate_up, function = 3 * normal(rng, 5, 2 * sum(widths)), activation.activation(name)
    got = fast("activation").gated(put(gate_up), function, widths)
    agree(got, plain(activation.gated)(gate_up, function, widths), 1e-5)


def test_other_activations_are_left_to_the_plain_form(put, rng):
    got = fast("activation").gated(put(normal(rng, 2, 8)), activation.relu, (4,))
    assert got is NotImplemented


# Keys and values


@pytest.mark.parametrize("dtype", sorted(array.DTYPES))
@pytest.mark.parametrize("width", [12, 4, 0])
def test_store(put, rng, dtype, width):
    """Some rows of heads within wider tokens, rounded; nothing else is written."""
    x, rows, slots = normal(rng, 5, 6, 12), np.array([0, 3, 4]), np.array([70, 31, 32])
    x[0, 2:4, :4] = np.inf, -np.inf, np.nan, 1e-6
    shapes, there = ((3, 2, 32, 12), (3, 2, 32, width)), put(x)
    pages = [normal(rng, *shape).astype(array.DTYPES[dtype]) for shape in shapes]
    got = [put(p.copy()) for p in pages]
    fast_store, plain_store = fast("cache").store, plain(cache.store)
    plain_store(x[:, 2:4], x[:, 4:, :width], rows, *pages, slots)
    assert fast_store(there[:, 2:4], there[:, 4:, :width], rows, *got, slots) is None
    for result, expected in zip(got, pages, strict=True):
        np.testing.assert_array_equal(array.host(array.widen(result)), array.widen(expected))


@pytest.mark.parametrize("dtype", sorted(array.DTYPES))
@pytest.mark.parametrize(("K", "half"), [(16, 8), (96, 48), (72, 9), (256, 128), (12, None)])
@pytest.mark.parametrize("with_norms", [False, True])
def test_place_heads(put, rng, dtype, K, half, with_norms):
    """Queries and keys normed and rotated, keys and values of some tokens in their pages."""
    qkv, rows, slots = normal(rng, 5, 7, K), np.array([0, 3, 4]), np.array([70, 31, 32])
    rotation = half and (normal(rng, 5, half), normal(rng, 5, half))
    norms = (normal(rng, K), normal(rng, K)) if with_norms else (None, None)
    pages = [normal(rng, 3, 2, 32, K).astype(array.DTYPES[dtype]) for _ in range(2)]
    got = [put(p.copy()) for p in pages]
    there = [None if w is None else put(w) for w in norms]
    result = fast("cache").place_heads(put(qkv), there, 1e-5, rotation, rows, *got, slots)
    expected = plain(cache.place_heads)(qkv, norms, 1e-5, rotation, rows, *pages, slots)
    agree(result, expected, 1e-5)
    for result, expected in zip(got, pages, strict=True):
        result, expected = array.host(array.widen(result)), array.widen(expected)
        tolerance = 1e-5 if dtype == "float32" else 1e-2
        np.testing.assert_allclose(result, expected, rtol=tolerance, atol=tolerance)


def test_store_of_nothing(put, rng):
    k, pages, none = put(normal(rng, 2, 1, 8)), put(normal(rng, 1, 1, 32, 8)), np.empty(0, np.int64)
    assert fast("cache").store(k, k, none, pages, pages, none) is None


# Products


def weight_of(rng, name, *shape):
    return normal(rng, *shape).astype(array.DTYPES[name])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("warps", [1, 80, 1000])
@pytest.mark.parametrize(("n_in", "n_out"), [(8, 1), (520, 37), (4104, 6)])
def test_linear_of_one_token(put, rng, monkeypatch, dtype, warps, n_in, n_out):
    """Outputs that fill no block, inputs that are shared by one warp or more."""
    monkeypatch.setattr(fast("linear"), "_MOST_WARPS", warps)
    monkeypatch.setattr(fast("linear"), "_PART", 64)
    x, weight, bias = normal(rng, 1, n_in), weight_of(rng, dtype, n_out, n_in), normal(rng, n_out)
    expected = plain(linear.linear)(x, weight, bias)
    agree(fast("linear").linear(put(x), put(weight), put(bias)), expected, 4e-4)
    rounded = x.astype(weight.dtype)
    agree(fast("linear").linear(put(rounded), put(weight)), expected - bias, 4e-4)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("T", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("n_in", "n_out"), [(8, 1), (520, 37)])
def test_linear_without_matrix_units(put, rng, monkeypatch, dtype, T, n_in, n_out):
    """Any number of outputs to a warp, with a last warp that has fewer."""
    monkeypatch.setattr(fast("linear"), "has_matrix_units", lambda x: False)
    x, weight, bias = normal(rng, T, n_in), weight_of(rng, dtype, n_out, n_in), normal(rng, n_out)
    expected = plain(linear.linear)(x, weight, bias)
    for busy in (1, 16, 1000):
        monkeypatch.setattr(fast("linear"), "_BUSY_WARPS", busy)
        agree(fast("linear").linear(put(x), put(weight), put(bias)), expected, 2e-4)
    agree(fast("linear").linear(put(x), put(weight)), plain(linear.linear)(x, weight), 2e-4)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("widths", [(24,), (13,), (9, 0, 15)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_pair(put, rng, dtype, name, widths, with_bias):
    """A gate in the first product of one token, in one block of columns or more."""
    F, function = sum(widths), activation.activation(name)
    x, first = normal(rng, 1, 72), weight_of(rng, dtype, 2 * F, 72)
    second, bias = weight_of(rng, dtype, 6, F), normal(rng, 2 * F) if with_bias else None
    first, middle = first * first.dtype.type(0.125), activation.Gate(function, widths)
    there = None if bias is None else put(bias)
    between = fast("linear")._gated(put(x), put(first), middle, second.dtype, there)
    wanted = middle(plain(linear.linear)(x, first, bias))
    between = array.host(array.widen(between))
    np.testing.assert_allclose(between, wanted, rtol=1e-2, atol=1e-3)
    if F % 8 == 0:
        got = fast("linear").linear_pair(put(x), put(first), middle, put(second), there)
        agree(got, plain(linear.linear_pair)(x, first, middle, second, bias), 1e-2)


def test_linear_pair_leaves_other_functions_to_the_plain_form(put, rng):
    x, weight = put(normal(rng, 2, 8)), put(weight_of(rng, "bfloat16", 8, 8))
    for middle in (activation.relu, activation.Gate(activation.relu, (4,))):
        got = fast("linear").linear_pair(x, weight, middle, weight)
        assert got is NotImplemented


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("T", "n_in"), [(2, 64), (9, 64), (3, 12), (40, 256)])
def test_linear_of_many_tokens(rng, dtype, T, n_in):
    """cuBLAS, which only a GPU has."""
    if array.gpu_trouble():
        pytest.skip("no GPU")
    put = array.Device("cuda").put
    x, weight, bias = normal(rng, T, n_in), weight_of(rng, dtype, 24, n_in), normal(rng, 24)
    got = fast("linear").linear(put(x), put(weight), put(bias))
    agree(got, plain(linear.linear)(x, weight, bias), 2e-4)


def test_linear_of_float32(put, rng):
    """cuBLAS again; the plain form where there is no GPU."""
    x, weight = normal(rng, 2, 8), normal(rng, 4, 8)
    got = fast("linear").linear(put(x), put(weight))
    if array.namespace(put(x)) is np:
        assert got is NotImplemented
    else:
        agree(got, plain(linear.linear)(x, weight))


# Products with codes


KINDS = [(bits, group) for bits in quantize.BITS for group in quantize.GROUPS]


def codes_of(rng, kind, dtype, n_out, n_in):
    """A weight as codes, of all that there are."""
    (bits, group), half = kind, 1 << kind[0] - 1
    codes = rng.integers(-half, half, (n_out, n_in), np.int8)
    form = quantize.QuantFormat(bits, group, n_in, 0, array.DTYPES[dtype])
    scales = (normal(rng, n_out, form.groups) / half).astype(np.float16)
    return quantize.Quantized(form, quantize.pack(codes, bits), scales)


def put_codes(put, weight):
    return quantize.Quantized(weight.form, put(weight.words), put(weight.scales))


@pytest.mark.parametrize("dtype", sorted(array.DTYPES))
@pytest.mark.parametrize("kind", KINDS)
def test_dequantize(put, rng, kind, dtype):
    """A whole weight, and parts that begin within a group."""
    weight = codes_of(rng, kind, dtype, 5, 300)
    there = put_codes(put, weight)
    for part in (slice(None), slice(1, 3), (slice(0, 2), slice(150, 299)), (1, slice(0, 3))):
        if isinstance(part, tuple) and part[0] == 1:
            part = (slice(1, 2), part[1])
        got = fast("quantize").dequantize(there[part], array.DTYPES[dtype])
        wanted = quantize.dequantize(weight[part]).astype(array.DTYPES[dtype])
        np.testing.assert_array_equal(array.host(got), wanted)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("T", "n_in", "n_out"), [(1, 4488, 16), (3, 300, 37), (19, 160, 9)])
def test_linear_of_codes(put, rng, dtype, kind, T, n_in, n_out):
    """Tokens of one block and of two; inputs that fill no block, and more than one for a warp."""
    x, bias = normal(rng, T, n_in), normal(rng, n_out)
    weight = codes_of(rng, kind, dtype, n_out, n_in)
    expected = plain(linear.linear)(x, weight, bias)
    there = put_codes(put, weight)
    agree(fast("linear").linear(put(x), there, put(bias)), expected, 3e-4)
    rounded = x.astype(weight.dtype)
    agree(fast("linear").linear(put(rounded), there), expected - bias, 3e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [(8, 200), (7, 200), (128, 320), (32, 168), (40, 100)])
def test_linear_of_a_part_of_the_codes(put, rng, kind, columns):
    """Rows that lie apart, and inputs that begin and end within a group."""
    weight, there = codes_of(rng, kind, "bfloat16", 30, 420), slice(*columns)
    x, part = normal(rng, 5, columns[1] - columns[0]), weight[3:25, there]
    got = fast("linear").linear(put(x), put_codes(put, weight)[3:25, there])
    agree(got, plain(linear.linear)(x, part), 3e-4)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("kind", "name"), [((4, 32), "silu"), ((8, 128), "gelu_pytorch_tanh")])
@pytest.mark.parametrize(("T", "widths"), [(1, (24,)), (17, (9, 0, 15))])
def test_linear_pair_of_codes(put, rng, dtype, kind, name, T, widths):
    """One launch for the first product, its bias and its gate."""
    F, function = sum(widths), activation.activation(name)
    middle, x, bias = activation.Gate(function, widths), normal(rng, T, 72), normal(rng, 2 * F)
    first, second = (codes_of(rng, kind, dtype, *shape) for shape in ((2 * F, 72), (6, F)))
    first.scales[...] *= np.float16(0.125)
    expected = plain(linear.linear_pair)(x, first, middle, second, bias)
    operands = put_codes(put, first), middle, put_codes(put, second), put(bias)
    got = fast("linear").linear_pair(put(x), *operands)
    agree(got, expected, 1e-2)


def test_linear_of_codes_that_meet_float32(put, rng):
    """cuBLAS; the plain form where there is no GPU."""
    x, weight = normal(rng, 2, 72), codes_of(rng, (4, 32), "float32", 9, 72)
    got = fast("linear").linear(put(x), put_codes(put, weight))
    if array.namespace(put(x)) is np:
        assert got is NotImplemented
    else:
        agree(got, plain(linear.linear)(x, weight), 2e-5)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", KINDS)
def test_linear_of_codes_and_many_tokens(rng, monkeypatch, dtype, kind):
    """Numbers of some rows at a time, rounded, and cuBLAS, which only a GPU has."""
    if array.gpu_trouble():
        pytest.skip("no GPU")
    monkeypatch.setattr(fast("linear"), "_NUMBERS_BYTES", 8192)
    put = array.Device("cuda").put
    x, bias, weight = normal(rng, 70, 300), normal(rng, 24), codes_of(rng, kind, dtype, 24, 300)
    for columns in (slice(0, 300), slice(7, 300)):
        part, there = weight[:, columns], put_codes(put, weight)[:, columns]
        rounded = quantize.dequantize(part).astype(array.DTYPES[dtype])
        expected = plain(linear.linear)(x[:, columns], rounded, bias)
        agree(fast("linear").linear(put(x[:, columns]), there, put(bias)), expected, 4e-4)


# Experts


def choices(rng, T, k, E, without=0.2):
    """Experts that tokens choose, none twice, some below 0; and their weights."""
    ids = np.argsort(rng.random((T, E)), axis=1)[:, :k].astype(np.int32)
    ids[rng.random((T, k)) < without] = -1
    return ids, rng.random((T, k), np.float32)


def apply_experts(put, x, ids, weights, up, down, first, name):
    """The fast form beside the plain one; `up` and `down` are arrays, or codes."""
    middle = activation.Gate(activation.activation(name), (down.shape[2],))
    expected = plain(experts.experts_ffn)(x, ids, weights, up, down, first, middle)
    there = [put_codes(put, w) if isinstance(w, quantize.Quantized) else put(w) for w in (up, down)]
    got = fast("experts").experts_ffn(put(x), put(ids), put(weights), *there, first, middle)
    assert got is not NotImplemented and got.dtype == np.float32
    scale = np.abs(expected).max() + 1e-6
    np.testing.assert_allclose(array.host(got) / scale, expected / scale, atol=1e-2)


def expert_weights(rng, dtype, E, D, F):
    up, down = weight_of(rng, dtype, E, 2 * F, D), weight_of(rng, dtype, E, D, F)
    return up * up.dtype.type(D**-0.5), down


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize(("T", "k"), [(1, 4), (9, 7), (13, 1), (64, 1)])
def test_few_choices(put, rng, dtype, name, T, k):
    """One token and several blocks of them, an expert that many chose, other ranks' experts."""
    x, (ids, weights) = normal(rng, T, 72), choices(rng, T, k, 7)
    ids[rng.random(T) < 0.4, 0] = 8
    up, down = expert_weights(rng, dtype, 5, 72, 24)
    apply_experts(put, x, ids, weights, up, down, 2, name)


def test_a_warp_goes_over_several_experts(put, rng):
    x, (ids, weights) = normal(rng, 8, 8), choices(rng, 8, 8, 30)
    apply_experts(put, x, ids, weights, *expert_weights(rng, "bfloat16", 30, 8, 40), 0, "silu")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("many", [1000, 0])
def test_many_choices(put, rng, monkeypatch, dtype, name, many):
    """Items of 16 choices and of 128; experts with none and with more than an item has."""
    monkeypatch.setattr(fast("grouped"), "_MANY", many)
    monkeypatch.setattr(fast("grouped"), "_FOUND_BYTES", 4 * 72 * 2 * 270)
    x, (ids, weights) = normal(rng, 300, 72), choices(rng, 300, 2, 6)
    ids[:, 0] = np.where(rng.random(300) < 0.6, 4, ids[:, 0])
    ids[ids == 3] = -1
    ids[:, 1] = np.where(ids[:, 1] == ids[:, 0], -1, ids[:, 1])
    up, down = expert_weights(rng, dtype, 4, 72, 24)
    apply_experts(put, x, ids, weights, up, down, 1, name)


@pytest.mark.parametrize(("D", "F"), [(200, 80), (24, 136)])
def test_tiles_of_choices(put, rng, monkeypatch, D, F):
    """Rows and inputs that fill no tile, and more than one."""
    monkeypatch.setattr(fast("grouped"), "_MANY", 0)
    x, (ids, weights) = normal(rng, 150, D), choices(rng, 150, 1, 2)
    apply_experts(put, x, ids, weights, *expert_weights(rng, "bfloat16", 2, D, F), 0, "silu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("T", "k"), [(3, 2), (40, 2)])
def test_experts_of_codes(put, rng, kind, T, k):
    """Few choices and more, of codes that are cut within a group."""
    x, (ids, weights) = normal(rng, T, 72), choices(rng, T, k, 3)
    up = codes_of(rng, kind, "bfloat16", 3 * 48, 72)
    down = codes_of(rng, kind, "bfloat16", 3 * 72, 56)[:, 8:32]
    up, down = (
        quantize.Quantized(w.form, *(a.reshape(3, -1, a.shape[1]) for a in (w.words, w.scales)))
        for w in (up, down)
    )
    up.scales[...] *= np.float16(0.125)
    apply_experts(put, x, ids, weights, up, down, 0, "silu")


def test_experts_that_are_left_to_the_plain_form(put, rng):
    """Other functions, several blocks of columns, columns that fill no load, float32."""
    x, (ids, weights) = normal(rng, 2, 16), choices(rng, 2, 2, 3)
    operands = put(x), put(ids), put(weights)
    for F, dtype, function, widths in (
        (8, "bfloat16", activation.relu, (8,)), (16, "bfloat16", activation.silu, (8, 8)),
        (12, "bfloat16", activation.silu, (12,)), (8, "float32", activation.silu, (8,)),
    ):  # fmt: skip
        up, down = expert_weights(rng, dtype, 3, 16, F)
        middle = activation.Gate(function, widths)
        got = fast("experts").experts_ffn(*operands, put(up), put(down), 0, middle)
        assert got is NotImplemented


ROUTERS = (
    route.Router(3),
    route.Router(8, normalise=True, scale=2.5),
    route.Router(4, "sigmoid", True, groups=8, top_groups=3),
    route.Router(6, "sigmoid", True, 2.5, 4, 2, "top2", corrected=True),
)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("E", [8, 96, 256])
def test_route(put, rng, router, E):
    """Ties, and scores that are no numbers."""
    logits, bias = 3 * normal(rng, 7, E), normal(rng, E) if router.corrected else None
    logits[1], logits[2, 1::2] = 0, logits[2, 0]
    logits[3, :4] = -300, 300, 0, 300
    got = fast("route").route(put(logits), router, None if bias is None else put(bias))
    ids, weights = plain(route.route)(logits, router, bias)
    np.testing.assert_array_equal(array.host(got[0]), ids)
    agree(got[1], weights, 3e-6)


def test_a_router_takes_what_is_no_number_last(put, rng):
    logits = normal(rng, 2, 40)
    logits[0, ::2], logits[1] = np.nan, np.nan
    ids, _ = fast("route").route(put(logits), route.Router(5, "sigmoid"))
    expected, _ = plain(route.route)(logits, route.Router(5, "sigmoid"))
    np.testing.assert_array_equal(array.host(ids), expected)


def test_count_into(put, rng):
    ids, _ = choices(rng, 300, 3, 40)
    counts = put(np.ones((2, 40), np.int64))
    assert fast("route").count_into(counts[1], put(ids)) is not NotImplemented
    expected = plain(route.count_into)(np.ones(40, np.int64), ids)
    np.testing.assert_array_equal(array.host(counts), [np.ones(40), expected])


# Attention


def in_pages(rng, lengths, n_heads, K, dtype, page=32, pool=0, pools=1):
    """Random keys and values of sequences in pages, and behind their ends what is no number.

    Returns
    -------
    k_pages, v_pages, block_table
    """
    n_pages = [-(-length // page) for length in lengths]
    places = np.zeros((len(lengths), max(n_pages)), np.int64)
    order = rng.permutation(sum(n_pages))
    for b, n in enumerate(n_pages):
        places[b, :n] = order[sum(n_pages[:b]) :][:n]
    block_table = BlockTable(
        places, np.arange(len(lengths)) % pools, pool, pools, np.array(lengths)
    )
    shape = (sum(n_pages), n_heads, page, K)
    k, v = (normal(rng, *shape).astype(array.DTYPES[dtype]) for _ in range(2))
    for b, length in enumerate(lengths):
        last, behind = places[b, (length - 1) // page], slice((length - 1) % page + 1, None)
        k[last, :, behind] = v[last, :, behind] = np.nan
    return k, v, block_table


def attend(put, q, tokens, k, v, block_table, groups, window, tolerance=1e-5):
    options = {"scale": q.shape[-1] ** -0.5, "groups": groups, "window": window}
    there = put(q), tokens, put(k), put(v), block_table
    got = fast("attention").paged_attention(*there, **options)
    expected = plain(attention.paged_attention)(q, tokens, k, v, block_table, **options)
    agree(got, expected, tolerance)

    # Rounded for a product that follows.
    o, lse = fast("attention").paged_attention(*there, **options, dtype=k.dtype)
    assert o.dtype == k.dtype
    agree((array.widen(o), lse), expected, 1e-2)


def tokens_at(*runs):
    """(T, 2) of runs (sequence, first position, tokens)."""
    rows = [(b, start + i) for b, start, n in runs for i in range(n)]
    return np.array(rows, np.int32)


@pytest.mark.parametrize(
    ("dtype", "K", "groups"),
    [
        ("bfloat16", 64, [(0, 2), (2, 4)]),
        ("float16", 64, [(0, 7), (7, 14)]),
        ("float16", 80, [(0, 3), (3, 4)]),
        ("bfloat16", 128, [(0, 4), (4, 8)]),
        ("bfloat16", 16, [(0, 1), (1, 2)]),
        ("float32", 16, [(0, 1)]),
        ("bfloat16", 72, [(0, 2)]),
        ("bfloat16", 256, [(0, 9)]),
    ],
)
@pytest.mark.parametrize("window", [None, 20])
def test_decode(put, rng, dtype, K, groups, window):
    """Sequences of several lengths, heads and a window; one split or more."""
    lengths = [1, 40, 333]
    k, v, block_table = in_pages(rng, lengths, len(groups), K, dtype)
    q = normal(rng, 3, groups[-1][1], K)
    tokens = tokens_at(*((b, n - 1, 1) for b, n in enumerate(lengths)))
    attend(put, q, tokens, k, v, block_table, groups, window)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("window", "softcap", "v_columns"), [(None, None, None), (9, 4.0, None), (9, None, 8)]
)
def test_prefill(put, rng, monkeypatch, dtype, window, softcap, v_columns):
    """Blocks of queries and keys, some whole, some cut by the masks, some not seen."""
    module, called = fast("attention"), []
    for name, value in (("_ROWS", 10), ("_KEYS", 6), ("_SCORES", 0)):
        monkeypatch.setattr(module, name, value)
    q, k, v = normal(rng, 20, 4, 16), weight_of(rng, dtype, 30, 2, 16), None
    v = k[..., :0] if v_columns else weight_of(rng, dtype, 30, 2, 12)
    q_pos, k_pos = np.arange(12, 32), rng.permutation(35)[:30]
    options = {"scale": 0.3, "groups": [(0, 2), (2, 4)], "window": window, "softcap": softcap}
    options |= {"v_columns": v_columns, "between": lambda: called.append(1)}
    got = module.attention(put(q), put(k), put(v), q_pos, k_pos, **options)
    assert called
    agree(got, plain(attention.attention)(q, k, v, q_pos, k_pos, **options), 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("pool", [0, 1, 2])
def test_decode_over_a_part_of_the_pages(put, rng, monkeypatch, dtype, splits, pool):
    """A rank that has every third page, of some sequences none."""
    monkeypatch.setattr(fast("attention"), "_FEWEST_PAGES", 1)
    monkeypatch.setattr(fast("attention"), "_BUSY_BLOCKS", 6 * splits)
    monkeypatch.setattr(fast("decode"), "_MULTIPROCESSORS", splits)
    lengths = [5, 290, 33]
    k, v, block_table = in_pages(rng, lengths, 2, 32, dtype, pool=pool, pools=3)
    tokens = tokens_at(*((b, n - 1, 1) for b, n in enumerate(lengths)))
    attend(put, normal(rng, 3, 4, 32), tokens, k, v, block_table, [(0, 2), (2, 4)], None)


@pytest.mark.parametrize(
    ("K", "groups", "queries"),
    [
        (64, [(0, 4)], 2),
        (64, [(0, 2), (2, 5)], 6),
        (128, [(0, 4)], 4),
        (128, [(0, 4)], 8),
        (128, [(0, 40)], 1),
        (256, [(0, 2), (2, 4)], 4),
    ],
)
@pytest.mark.parametrize("window", [None, 33])
def test_decode_of_some_queries(put, rng, K, groups, queries, window):
    """Those of a sequence share its keys, up to so many rows; more rows are in several blocks."""
    lengths = [queries, 71, 134]
    k, v, block_table = in_pages(rng, lengths, len(groups), K, "bfloat16")
    runs = ((0, 0, queries), (1, 70, 1), (2, 134 - queries, queries))
    tokens = tokens_at(*runs)
    q = normal(rng, len(tokens), groups[-1][1], K)
    assert not fast("decode")._table(tokens, block_table, groups, window, k).has_others
    attend(put, q, tokens, k, v, block_table, groups, window, 2e-5)


@pytest.mark.parametrize(
    ("multiprocessors", "most_splits"), [(1, 128), (132, 128), (132, 5), (2, 2)]
)
def test_splits_of_pages(put, rng, monkeypatch, multiprocessors, most_splits):
    """As many splits as keep the device busy, by the pages that the sequences have."""
    module, lengths, groups = fast("decode"), [30, 1500, 900, 1, 64], [(0, 4)]
    monkeypatch.setattr(module, "_MULTIPROCESSORS", multiprocessors)
    monkeypatch.setattr(module, "_MOST_SPLITS", most_splits)
    k, v, block_table = in_pages(rng, lengths, 1, 64, "bfloat16")
    tokens = tokens_at(*((b, n - 1, 1) for b, n in enumerate(lengths)))
    table = module._table(tokens, block_table, groups, None, k)
    items = array.host(table.values)[: 8 * table.n_items].reshape(-1, 8)
    used = items[items[:, 7] > 0]
    assert used[:, 4].sum() == sum(-(-n // 32) for n in lengths)
    assert len(used) <= len(lengths) + 4 * multiprocessors and used[:, 7].max() <= most_splits
    assert multiprocessors == 1 or used[:, 7].max() > 1
    attend(put, normal(rng, 5, 4, 64), tokens, k, v, block_table, groups, None)
    assert not array.host(launch.counters(array.namespace(put(k)), 1)).any()


def test_room_for_later_steps(put, rng, monkeypatch):
    """A table is filled anew for another step, which has more pages, as where one is replayed."""
    tables, groups = [], [(0, 4)]

    def on_device(like, objects, build):
        tables.append((put(build()), build))
        return tables[-1][0]

    monkeypatch.setattr(fast("decode"), "on_device", on_device)
    k, v, block_table = in_pages(rng, [40, 70], 1, 64, "bfloat16")
    block_table.capacity, tokens = (40, 30), tokens_at((0, 39, 1), (1, 69, 1))
    attend(put, normal(rng, 2, 4, 64), tokens, k, v, block_table, groups, None)
    k, v, later = in_pages(rng, [700, 3], 1, 64, "bfloat16")
    vars(block_table).update(vars(later), capacity=block_table.capacity)
    tokens[:, 1] = 699, 2
    for table, build in tables:
        table[...] = put(build())
    attend(put, normal(rng, 2, 4, 64), tokens, k, v, block_table, groups, None)
    assert len(tables) == 1


def test_decode_beside_prefill(put, rng):
    """Sequences with one query, with some and with many, whose queries see different keys."""
    k, v, block_table = in_pages(rng, [50, 70, 64], 1, 32, "float16")
    tokens = tokens_at((0, 49, 1), (1, 67, 3), (2, 40, 24))
    attend(put, normal(rng, len(tokens), 2, 32), tokens, k, v, block_table, [(0, 2)], 40, 2e-3)


def test_tables_are_kept_for_the_layers_of_a_step(put, rng):
    """Every layer asks with the same arrays; another step does not find them."""
    k, v, block_table = in_pages(rng, [40], 1, 16, "float32")
    tokens, table = tokens_at((0, 39, 1)), fast("attention")._table
    first = table(tokens, block_table, [(0, 2)], None, k)
    assert table(tokens, block_table, [(0, 2)], None, k) is first
    assert table(tokens, block_table, [(0, 2)], 8, k) is not first
    assert table(tokens.copy(), block_table, [(0, 2)], None, k) is not first


def test_decode_leaves_what_it_does_not_serve(put, rng):
    """Latent keys, wide or odd heads, and prefill alone."""
    groups, call = [(0, 2)], fast("attention").paged_attention
    for K, n, v_columns in ((264, 1, None), (12, 1, None), (16, 1, 8), (16, 9, None)):
        k, v, block_table = in_pages(rng, [40], 1, K, "float32")
        q, tokens = put(normal(rng, n, 2, K)), tokens_at((0, 40 - n, n))
        options = {"scale": 1.0, "groups": groups, "v_columns": v_columns}
        assert call(q, tokens, put(k), put(v), block_table, **options) is NotImplemented


# Attention of many queries


def rounded_queries(q, scale, dtype):
    """Queries that the kernel's rounding leaves as they are."""
    factor = np.float32(scale * np.log2(np.e))
    return array.widen((q * factor).astype(array.DTYPES[dtype])) / factor


def agree_rounded(got, expected, dtype):
    """The weights are rounded, so that outputs are less exact than log-sum-exps."""
    assert got is not NotImplemented
    (o, lse), tolerance = got, 6e-3 if dtype == "bfloat16" else 1e-3
    np.testing.assert_allclose(array.host(lse), expected[1], rtol=2e-5, atol=5e-5)
    np.testing.assert_allclose(array.host(o), expected[0], rtol=tolerance, atol=tolerance)
    assert o.dtype == np.float32


def attend_many(put, rng, lengths, runs, dtype, K, groups, window=None, **dealt):
    """Runs of queries (sequence, first position, tokens) over pages, beside the plain form."""
    k, v, block_table = in_pages(rng, lengths, len(groups), K, dtype, **dealt)
    tokens, scale = tokens_at(*runs), K**-0.5
    q = 10 * normal(rng, len(tokens), groups[-1][1] + 1, K)  # so that the largest scores grow
    q[:, 1:] = rounded_queries(q[:, 1:], scale, dtype)
    options = {"scale": scale, "groups": groups, "window": window}
    call = fast("attention").paged_attention
    got = call(put(q)[:, 1:], tokens, put(k), put(v), block_table, **options)
    expected = plain(attention.paged_attention)(q[:, 1:], tokens, k, v, block_table, **options)
    agree_rounded(got, expected, dtype)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(
    ("dtype", "K", "groups", "shape"),
    [
        ("bfloat16", 64, [(0, 1), (1, 4), (4, 6)], 0),
        ("bfloat16", 128, [(0, 4), (4, 8)], 1),
        ("float16", 80, [(0, 3)], 2),
        ("float16", 256, [(0, 1), (1, 2)], 0),
        ("bfloat16", 144, [(0, 8)], 1),
    ],
)
def test_many_queries(put, rng, monkeypatch, dtype, K, groups, shape, window):
    """Every shape of blocks; sequences of many queries beside some with few, which begin in the
    middle of a page, and see a tile of keys all, in part, or not."""
    shapes = next(shapes for width, shapes in fast("prefill")._SHAPES.items() if K <= width)
    monkeypatch.setattr(fast("prefill"), "_shape", lambda k: shapes[shape % len(shapes)])
    runs = [(0, 0, 7), (1, 49, 1), (2, 155, 23), (3, 60, 3)]
    attend_many(put, rng, [7, 50, 178, 63], runs, dtype, K, groups, window)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("pool", [0, 1, 2])
def test_many_queries_over_a_part_of_the_pages(put, rng, monkeypatch, splits, pool):
    """A rank that has every third page, so that some rows see nothing; keys in splits."""
    monkeypatch.setattr(fast("prefill"), "_BUSY_BLOCKS", 8 * splits)
    monkeypatch.setattr(fast("prefill"), "_FEWEST_TILES", 1)
    runs, groups = [(0, 0, 20), (1, 500, 40), (2, 0, 40)], [(0, 2), (2, 4)]
    attend_many(put, rng, [20, 540, 40], runs, "bfloat16", 64, groups, pool=pool, pools=3)


@pytest.mark.parametrize("window", [None, 50])
def test_queries_that_do_not_follow_one_another(put, rng, window):
    """As a cut of the sequence leaves them: blocks of positions, or in no order."""
    k, v, block_table = in_pages(rng, [400], 1, 64, "bfloat16")
    for positions in (np.r_[0:30, 200:260], rng.permutation(400)[:70]):
        tokens = np.stack([np.zeros(len(positions), np.int32), positions], axis=1)
        q = rounded_queries(normal(rng, len(tokens), 4, 64), 0.125, "bfloat16")
        options = {"scale": 0.125, "groups": [(0, 4)], "window": window}
        got = fast("attention").paged_attention(
            put(q), tokens, put(k), put(v), block_table, **options
        )
        expected = plain(attention.paged_attention)(q, tokens, k, v, block_table, **options)
        agree_rounded(got, expected, "bfloat16")


@pytest.mark.parametrize("window", [None, 50])
def test_keys_that_lie_end_to_end(put, rng, window):
    """As they do when they have been passed on: some pages of a sequence, the last one short."""
    called, k_pos = [], np.r_[32:64, 96:160, 224:235]
    k, v = (weight_of(rng, "bfloat16", len(k_pos), 2, 64) for _ in range(2))
    q, q_pos = rounded_queries(normal(rng, 50, 6, 64), 0.125, "bfloat16"), np.arange(190, 240)
    options = {"scale": 0.125, "groups": [(0, 3), (3, 6)], "window": window}
    options["between"] = lambda: called.append(1)
    got = fast("prefill").attention(put(q), put(k), put(v), q_pos, k_pos, **options)
    assert called
    agree_rounded(got, plain(attention.attention)(q, k, v, q_pos, k_pos, **options), "bfloat16")
    for other in (rng.permutation(k_pos), k_pos + np.arange(len(k_pos))):
        got = fast("prefill").attention(put(q), put(k), put(v), q_pos, other, **options)
        assert got is NotImplemented


# Vocabulary


@pytest.mark.parametrize("dtype", sorted(array.DTYPES))
@pytest.mark.parametrize("D", [16, 7])
def test_embed(put, rng, dtype, D):
    """Ids before, within and behind the part that a rank owns."""
    weight, token_ids = weight_of(rng, dtype, 9, D), np.array([3, 40, 35, 34, 43, 44, 41])
    got = fast("embed").embed(put(weight), token_ids, 35)
    np.testing.assert_array_equal(array.host(got), plain(embed.embed)(weight, token_ids, 35))
    nothing = put(weight[:0])
    assert fast("embed").embed(nothing, token_ids, 35) is NotImplemented


@pytest.mark.parametrize(("R", "V", "columns"), [(1, 1, 1024), (3, 7, 2), (5, 3001, 100)])
def test_softmax_parts(put, rng, monkeypatch, R, V, columns):
    """One slice or many, some of them -inf, and targets that are not here."""
    monkeypatch.setattr(fast("softmax"), "_FEWEST_COLUMNS", columns)
    x, targets = 5 * normal(rng, R, V), rng.integers(15, 30 + V, R)
    x[0, 1 : V // 2] = -np.inf
    targets[0] = 20
    got = fast("softmax").softmax_parts(put(x), targets, 20)
    agree(got, plain(softmax.softmax_parts)(x, targets, 20), 1e-12)


def test_softmax_parts_of_bad_logits(put):
    x = np.zeros((4, 50), np.float32)
    x[0, 3], x[1, 40], x[2] = np.nan, np.inf, -np.inf
    parts = fast("softmax").softmax_parts(put(x), np.zeros(4, int), 0)
    assert np.isnan(parts[2][:2]).all() and parts[0][2] == -np.inf and parts[2][2] == 0
    assert parts[2][3] == 50


def logits_of(kind, R, V):
    """Logits that are smooth, often equal, nearly equal or sorted."""
    x = np.random.default_rng(V).standard_normal((R, V), np.float32)
    if kind == "sorted":
        return np.ascontiguousarray(np.sort(3 * x, axis=1)[:, ::-1])
    return {"smooth": 3 * x, "ties": np.round(3 * x), "flat": 0.01 * x}[kind]


@pytest.fixture
def few_threads(monkeypatch):
    """Blocks that the host runs in good time."""
    for name in ("_THREADS", "_ROW_THREADS"):
        monkeypatch.setattr(fast("sample"), name, 64)


def choose(put, monkeypatch, logits, rows):
    monkeypatch.setattr(sample, "columns", fast("sample").columns)
    return vocabulary.choose(MPI.COMM_SELF, put(logits), 0, logits.shape[1], rows)


@pytest.mark.parametrize("kind", ["smooth", "ties", "flat", "sorted"])
@pytest.mark.parametrize("V", [1, 2, 7, 1000, 5003])
def test_choose(put, monkeypatch, few_threads, V, kind):
    """Every setting mixed in a batch, where one rank has the whole vocabulary."""
    logits, rows = logits_of(kind, 14, V), mixture(14, V, seed=V)
    chosen, expected = choose(put, monkeypatch, logits, rows), sample.choose(logits, rows)
    np.testing.assert_array_equal(chosen.token_ids, expected.token_ids)
    np.testing.assert_allclose(chosen.logprobs, expected.logprobs, rtol=1e-6)
    for own, others in zip(chosen.top, expected.top, strict=True):
        assert (own is None) == (others is None)
        assert [i for i, _ in own or ()] == [i for i, _ in others or ()]
        np.testing.assert_allclose([p for _, p in own or ()], [p for _, p in others or ()])


@pytest.mark.parametrize("settings", [{"top_k": 300}, {"top_p": 0.999}, {"logprobs": 100}], ids=str)
def test_choose_from_many(put, monkeypatch, few_threads, settings):
    """More candidates, or more to report, than the second pass gathers."""
    logits, rows = (
        logits_of("flat", 3, 5003),
        SamplingBatch.make(3, temperature=1, **settings),
    )
    chosen, expected = choose(put, monkeypatch, logits, rows), sample.choose(logits, rows)
    np.testing.assert_array_equal(chosen.token_ids, expected.token_ids)
    if "logprobs" in settings:
        assert [[i for i, _ in top] for top in chosen.top] == [
            [i for i, _ in top] for top in expected.top
        ]


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1}, {"temperature": 1, "top_p": 0.9}])
def test_choose_refuses_logits_without_a_largest(put, monkeypatch, few_threads, value, settings):
    logits = logits_of("smooth", 2, 300)
    logits[1, 7 if value > 0 or value != value else slice(None)] = value
    with pytest.raises(ValueError, match="row 1, need a finite logit"):
        choose(put, monkeypatch, logits, SamplingBatch.make(2, **settings))
    rows = SamplingBatch.make(2, banned=[(), tuple(range(300))], **settings)
    with pytest.raises(ValueError, match="every token is banned"):
        choose(put, monkeypatch, logits, rows)


@pytest.mark.parametrize(
    ("V", "kind", "P", "room"),
    [(5, "ties", 3, 2048), (1003, "smooth", 2, 2048), (1003, "sorted", 3, 80)],
)
def test_columns_of_several_ranks(put, monkeypatch, few_threads, V, kind, P, room):
    """Every answer that a strategy asks of a rank's own columns, and draws from those of all."""
    monkeypatch.setattr(fast("sample"), "_ROOM", room)
    R, width = 14, 64
    logits, rows = logits_of(kind, R, V), mixture(R, V, seed=V).within(V)
    cuts = partition.block(V, P)
    parts = [np.ascontiguousarray(logits[:, start:stop]) for start, stop in cuts]
    got, expected = (
        [make(bring(x), start, V, rows, width) for x, (start, _) in zip(parts, cuts, strict=True)]
        for make, bring in ((fast("sample").columns, put), (plain(sample.columns), np.array))
    )
    top = np.max([own.best()[0] for own in expected], axis=0)
    first, asked = rows.filtered & (rows.top_k <= width), np.flatnonzero(rows.logprobs >= 0)
    ready, nucleus = np.flatnonzero(first), np.flatnonzero(rows.nucleus)
    same(got, expected, lambda own: own.best())
    same(got, expected, lambda own: own.nucleus_totals(nucleus, top), 1e-12)
    keys = same(got, expected, lambda own: np.sort(own.candidates(ready, width), axis=1))
    same(got, expected, lambda own: np.sort(own.candidates(ready, 512), axis=1))

    # Draw from the keys of all ranks, with the floor that those leave that have more.
    floor = np.zeros(len(ready), np.uint64)
    for own, x in zip(keys, parts, strict=True):
        if own.shape[1] < x.shape[1]:
            floor = np.maximum(floor, own.min(axis=1))
    totals = [own.nucleus_totals(ready, top) for own in expected]
    keys, total = np.concatenate(keys, axis=1), np.sum(totals, axis=0)
    drawn, _ = same(got, expected, lambda own: settled(own.draw(ready, keys, floor, total)))[0]

    # Report the tokens drawn, or the best.
    token_ids = np.argmax(penalties.penalise(logits, 0, rows), axis=1)
    token_ids[ready[drawn >= 0]] = drawn[drawn >= 0]
    n, largest = rows.reported(V), logits.max(axis=1).astype(np.float64)
    same(got, expected, lambda own: sorted_report(own.report(asked, token_ids, n)))
    same(got, expected, lambda own: own.report_totals(asked, largest), 1e-12)


def same(got, expected, answer, tolerance=0):
    """Compare the ranks' answers; returns those expected."""
    answers = [answer(own) for own in expected]
    for own, wanted in zip(got, answers, strict=True):
        agree(answer(own), wanted, tolerance)
    return answers


def settled(result):
    """Tokens that are settled, -1 for the others, and whether they are."""
    return np.where(result[1], result[0], -1), result[1]


def sorted_report(keys):
    return np.concatenate([keys[:, :1], np.sort(keys[:, 1:], axis=1)], axis=1)


def test_columns_leave_what_they_do_not_serve(put):
    """A rank without columns, and no rows."""
    for shape in ((3, 0), (0, 5)):
        x, rows = put(np.zeros(shape, np.float32)), SamplingBatch.make(shape[0])
        assert fast("sample").columns(x, 0, 5, rows, 64) is NotImplemented
