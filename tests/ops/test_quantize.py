"""Quantised weights: near what they stand for, the same under every cut, in a file and in a job."""

import json
import re
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest
from helpers import layouts
from helpers.paths import ROOT
from mpi4py import MPI
from reference import models
from reference.parity import TOLERANCE, greedy, on_root, score_gap
from safetensors.numpy import save_file

import hpcinfer
from hpcinfer.io import convert as converter
from hpcinfer.io import hdf5, integrity
from hpcinfer.io.inspect import describe
from hpcinfer.io.models import open_checkpoint
from hpcinfer.layout import Layout
from hpcinfer.model.weights import stages
from hpcinfer.model.weights.quantize import recoding
from hpcinfer.model.weights.table import QUANTISED, table
from hpcinfer.ops import quantize as room
from hpcinfer.ops.linear import linear
from hpcinfer.ops.quantize import QuantFormat, Quantized, dequantize, pack, quantize, unpack

BF16, FULL = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
KINDS = [(bits, group) for bits in room.BITS for group in room.GROUPS]

SIZE, KV = MPI.COMM_WORLD.size, 1 << 24
HPCINFER = (sys.executable, "-m", "mpi4py", "-m", "hpcinfer")
DATA = ROOT / "data"
LENGTHS, NEW = (7, 33), 8

each_kind = pytest.mark.parametrize(("bits", "group"), KINDS)


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def packed(codes, scales, bits, group, offset=0, dtype=FULL):
    """Codes (..., O, I) with the scales of the groups in which they lie, as a weight in memory."""
    form = QuantFormat(bits, group, codes.shape[-1], offset, dtype)
    padded = np.zeros((*codes.shape[:-1], form.groups), np.float16)
    padded[..., : scales.shape[-1]] = scales
    return Quantized(form, pack(codes, bits, offset), padded)


def weight_of(shape, bits, group, dtype=FULL):
    return packed(*quantize(normal(shape), bits, group), bits, group, dtype=dtype)


@pytest.mark.single
@each_kind
@pytest.mark.parametrize("n_in", [1, 31, 32, 100, 128, 300])
def test_no_number_is_off_by_more_than_its_group_allows(bits, group, n_in):
    weight = normal((7, n_in))
    weight[3] = 0
    codes, scales = quantize(weight, bits, group)
    step = np.repeat(scales.astype(np.float32), group, axis=1)[:, :n_in]
    error = np.abs(codes * step - weight)
    assert not error[3].any() and np.abs(codes).max() <= (8 if bits == 4 else 127)
    if bits == 8:
        assert (error <= np.abs(step) * 0.5001).all()
    else:
        starts = np.arange(0, n_in, group)
        largest = np.maximum.reduceat(np.abs(weight), starts, axis=1)
        plain = np.repeat(largest / 7, group, axis=1)[:, :n_in] + 1e-30
        plain_error = np.rint(weight / plain) * plain - weight
        squares = [np.add.reduceat(e * e, starts, axis=1) for e in (error, plain_error)]
        assert (squares[0] <= squares[1] * 1.01 + 1e-6 * largest**2).all()


@pytest.mark.single
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1e4])
@pytest.mark.parametrize("bits", room.BITS)
def test_small_and_large_weights_keep_their_precision(bits, size):
    """Scales of float16 end at 6e-8: weights of 1e-6 lose, but not all."""
    weight = normal((4, 64)) * np.float32(size)
    codes, scales = quantize(weight, bits, 32)
    error = codes * np.repeat(scales.astype(np.float32), 32, axis=1) - weight
    bound = {4: 0.6, 8: 0.02}[bits] * size + 4e-6
    assert np.abs(error).max() < bound


@pytest.mark.single
@pytest.mark.parametrize("bits", room.BITS)
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_what_no_scale_reaches_is_refused(bits, value):
    weight = normal((2, 64))
    weight[1, 40] = value
    with pytest.raises(ValueError, match="quantize: got a weight of"):
        quantize(weight, bits, 32)


@pytest.mark.single
@each_kind
@pytest.mark.parametrize("offset", [0, 1, 29])
@pytest.mark.parametrize("n_in", [1, 63, 256, 301])
def test_packed_codes_come_back(bits, group, n_in, offset):
    rng = np.random.default_rng(1)
    codes = rng.integers(-(1 << bits - 1), 1 << bits - 1, (2, 3, n_in)).astype(np.int8)
    words = pack(codes, bits, offset)
    places = unpack(words, bits)
    np.testing.assert_array_equal(places[..., offset : offset + n_in], codes)
    assert not places[..., :offset].any() and not places[..., offset + n_in :].any()
    stored = room.to_bytes(codes[0], bits)
    assert stored.nbytes == 3 * -(-n_in * bits // 8)
    np.testing.assert_array_equal(room.from_bytes(stored, bits, 0, n_in), codes[0])


@pytest.mark.single
def test_the_order_of_a_block():
    """Place i of word j holds input 32 i + j, the lowest bits first."""
    for bits, mask in ((4, 15), (8, 255)):
        codes = np.random.default_rng(2).integers(-8, 8, (1, 512)).astype(np.int8)
        words, per_word = pack(codes, bits)[0], 16 // bits
        for at, code in enumerate(codes[0]):
            block, place = divmod(at, 32 * per_word)
            word = words[32 * block + place % 32]
            assert int(word) >> bits * (place // 32) & mask == int(code) & mask


@pytest.mark.single
@each_kind
@pytest.mark.parametrize("dtype", [FULL, BF16])
@pytest.mark.parametrize("T", [0, 1, 5])
def test_linear_is_the_product_with_what_it_stands_for(bits, group, dtype, T):
    weight, x, bias = weight_of((40, 300), bits, group, dtype), normal((T, 300), 1), normal(40, 2)
    y = linear.plain(x, weight, bias)
    oracle = x.astype(dtype).astype(float) @ dequantize(weight).astype(float).T + bias
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, oracle, rtol=0, atol=1e-4)

    # A fast form may round code · scale to the type of x, one number in 256 at most.
    sizes = np.abs(x) @ np.abs(dequantize(weight)).T
    assert (np.abs(linear(x, weight, bias) - oracle) <= 1e-4 + sizes / 256).all()


@pytest.mark.single
@each_kind
def test_any_columns_are_those_of_the_whole(bits, group):
    """Cut at load, cut as a view, and a view of a cut: the same numbers, bit by bit."""
    n_in = 420
    codes, scales = quantize(normal((3, n_in)), bits, group)
    whole = packed(codes, scales, bits, group)
    dense = dequantize(whole)
    cuts = np.random.default_rng(3).integers(0, n_in + 1, (60, 2))
    for start, stop in [(0, n_in), (7, 7), *np.sort(cuts, axis=1)]:
        view = whole[:, start:stop]
        assert (
            view.shape == (3, stop - start)
            and np.shares_memory(view.words, whole.words)
            or (start == stop)
        )
        np.testing.assert_array_equal(dequantize(view), dense[:, start:stop])
        first = start // group
        own = packed(
            codes[:, start:stop], scales[:, first : -(-stop // group)], bits, group, start % group
        )
        np.testing.assert_array_equal(dequantize(own), dense[:, start:stop])
        part = own[..., 1 : (stop - start) // 2]
        np.testing.assert_array_equal(
            dequantize(part), dense[:, start:stop][:, 1 : (stop - start) // 2]
        )
        x = normal((2, stop - start))
        np.testing.assert_allclose(linear(x, view), x @ dense[:, start:stop].T, rtol=0, atol=2e-4)
        placed = room.place(x, view.form)
        wide = (
            unpack(view.words, bits)
            * np.repeat(view.scales.astype(np.float32), group, axis=1)[:, : view.form.width]
        )
        np.testing.assert_allclose(placed @ wide.T, x @ dense[:, start:stop].T, atol=2e-4)


@pytest.mark.single
@each_kind
def test_rows_and_experts_are_taken_as_from_an_array(bits, group):
    codes, scales = quantize(normal((4 * 6, 70)), bits, group)
    weight = packed(codes.reshape(4, 6, 70), scales.reshape(4, 6, -1), bits, group)
    dense = dequantize(weight)
    assert weight.shape == dense.shape == (4, 6, 70) and len(weight) == 4
    assert weight.nbytes == weight.words.nbytes + weight.scales.nbytes
    whole = slice(None)
    for index in (2, slice(1, 3), (..., slice(2, 5), whole), (..., slice(9, 50)), (1, slice(0, 2))):
        np.testing.assert_array_equal(dequantize(weight[index]), dense[index])
    with pytest.raises(ValueError, match="neighbours"):
        weight[..., ::2]


def convert(source, target, bits=4, group=32, **options):
    recode = partial(recoding, bits=bits, group=group)
    return converter.convert(source, target, recode=recode, **options)


def decoded(path):
    """dict name -> float32 of a quantised file, by what the format says alone."""
    tensors = {}
    with h5py.File(path) as file:
        weights = file["weights"]
        for name, data in weights.items():
            values, attributes = data[()], dict(data.attrs)
            if "bits" in attributes:
                if attributes["bits"] == 4:
                    pairs = np.stack([values & 15, values >> 4], -1).reshape(len(values), -1)
                    values = (pairs.astype(np.int8) ^ 8) - 8
                group, columns = attributes["group"], attributes["columns"]
                scales = np.repeat(weights[name + ".scales"][()].astype(float), group, axis=1)
                values = values[:, :columns] * scales[:, :columns]
            if not name.endswith(".scales"):
                tensors[name] = values.astype(np.float32)
    return tensors


def write_both(case, bits, group, folder):
    """A case quantised, and a directory of float32 weights that are what its codes stand for."""
    convert(models.write_model(case, folder / case), folder / "q.h5", bits, group)
    with open_checkpoint(folder / "q.h5") as model:
        config, tensors = model.config, decoded(folder / "q.h5")
    transposed = [row[0] for row in stored_in_out(case)]
    for name in transposed:
        tensors[name] = np.ascontiguousarray(tensors[name].T)
    (folder / "plain").mkdir()
    (folder / "plain" / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "plain" / "model.safetensors")


def stored_in_out(case):

    rows = table(layouts.architecture(case))
    return [(r.name, r.key) for r in rows if r.transposed and r.key in QUANTISED]


class Pair:
    """Paths of a case that is quantised, and answers of one rank to what its codes stand for."""

    def __init__(self, comm, folder, case, bits, group):
        path = on_root(comm, partial(Path, tempfile.mkdtemp(dir=folder)))
        on_root(comm, partial(write_both, case, bits, group, path))
        self.path, self.case = path / "q.h5", case
        self.texts = [models.tokens(case, n) for n in LENGTHS]
        plain = hpcinfer.load(path / "plain", MPI.COMM_SELF, kv_memory=KV, dtype="float32")
        self.scores = [score.logprobs for score in plain.score(self.texts)]
        self.tokens = greedy(plain, self.texts, NEW)

    def compare(self, comm, layout):
        """Refuse a layout whose answers are others."""
        engine = hpcinfer.load(self.path, comm, layout, kv_memory=KV, dtype="float32")
        gap = score_gap(engine, self.texts, self.scores)
        assert gap < TOLERANCE, f"{self.case}/{layout}: {gap:.2e}"
        assert greedy(engine, self.texts, NEW) == self.tokens, layout
        return engine


@pytest.fixture(scope="module")
def pairs(comm):
    """Function of a case, bits and group: its Pair, made when it is first wanted."""
    folder, made = on_root(comm, tempfile.mkdtemp), {}

    def pair(*key):
        if key not in made:
            made[key] = Pair(comm, folder, *key)
        return made[key]

    yield pair
    comm.Barrier()
    if comm.rank == 0:
        shutil.rmtree(folder)


@pytest.mark.single
@pytest.mark.parametrize("case", ["gpt2", "gpt_neox-tied", "qwen2", "olmoe", "deepseek_v3"])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 128)])
def test_families_answer_as_what_their_codes_stand_for(comm, pairs, case, bits, group):
    pairs(case, bits, group).compare(comm, None)


def chosen():
    """case/layout: every strategy that this number of ranks has, widths that divide nowhere."""
    dense = [f"{axis}={SIZE}" for axis in ("tp", "cp", "pp", "dp")]
    dense += [f"tp={SIZE},sp=on", f"dp={SIZE},zero=allgather", f"cp={SIZE},zero=broadcast"]
    dense += [f"pp={SIZE},stages=memory"] + ["tp=2,cp=2"] * (SIZE == 4)
    mixed = [f"{axis}={SIZE},ep={SIZE}" for axis in ("tp", "cp", "dp")] + [f"cp={SIZE}"]
    mixed += [f"tp={SIZE}", f"cp={SIZE},zero=allgather", f"afd={SIZE - 1}:1"]
    for case, texts in (
        ("llama-gqa", dense), ("llama-tied", dense[:4]), ("mixtral", mixed),
        ("qwen2_moe", mixed[:3]), ("deepseek_v2", dense[:3] + mixed[1:2]), ("gpt2", dense[:2]),
    ):  # fmt: skip
        for text in texts:
            if layouts.is_legal(text, SIZE, layouts.architecture(case)):
                yield f"{case}/{text}"


@pytest.mark.parametrize("item", list(chosen()))
def test_layouts_answer_as_what_the_codes_stand_for(comm, pairs, item):
    case, _, layout = item.partition("/")
    pairs(case, *((8, 64) if case in ("mixtral", "llama-tied") else (4, 32))).compare(comm, layout)


@pytest.mark.parametrize("bits", room.BITS)
def test_half_precision_rounds_x_alone(comm, pairs, bits):
    """Weights are the same in any --dtype; x is rounded to it, as it is for 16-bit weights."""
    pair = pairs("llama-gqa", bits, 32)
    engine = hpcinfer.load(pair.path, comm, None, kv_memory=KV, dtype="bfloat16")
    up = engine.model.weights.layer(0).up
    assert up.dtype == BF16 and up.form.bits == bits
    assert 1e-5 < score_gap(engine, pair.texts, pair.scores) < 0.1


@pytest.mark.skipif(SIZE < 2, reason="needs two ranks")
def test_replicas_of_a_node_share_one_copy(comm, pairs):
    """Words and scales lie in the common memory, where they begin at a line of the cache."""
    engine = pairs("llama-tied", 8, 64).compare(comm, f"dp={SIZE}")
    weights = engine.model.weights
    assert engine.shares_weights and isinstance(weights.head, Quantized)
    for x in (weights.head, weights.layer(0).up, weights.layer(1).down):
        assert not x.words.flags.owndata and x.words.ctypes.data % 64 == 0
        assert x.words.flags.writeable == (comm.rank == 0)


@pytest.mark.parametrize("bits", room.BITS)
def test_a_rank_holds_its_part_of_the_codes(comm, pairs, bits):
    """Padding to blocks aside; bits · numbers / 8 bytes and the scales."""
    pair = pairs("llama-gqa", bits, 32)
    engine = hpcinfer.load(pair.path, comm, f"tp={SIZE}", kv_memory=KV)
    with open_checkpoint(pair.path) as model:
        name = "model.layers.0.mlp.up_proj.weight"
        coding, rows = model.tensors[name].coding, model.tensors[name].shape[0]
    up = engine.model.weights.layer(0).up
    assert comm.allreduce(len(up)) == 2 * rows
    width = -(-coding.columns // up.form.block) * up.form.block
    assert up.nbytes == len(up) * (width * bits // 8 + width // 32 * 2)


@pytest.fixture
def small(tmp_path):
    return models.write_model("llama-tied", tmp_path / "model", dtype="bfloat16")


@pytest.mark.single
def test_what_is_quantised(small, tmp_path):
    """Matrices and the head are; embedding and norms stay, and nothing is tied any more."""
    seen = []
    summary = convert(small, tmp_path / "q.h5", progress=lambda *at: seen.append(at))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]
    with open_checkpoint(small) as before, open_checkpoint(tmp_path / "q.h5") as model:
        assert summary.bytes == model.file_bytes and summary.tensors == len(model.tensors)
        untied = {"tie_word_embeddings": False, "untied_by_quantisation": True}
        assert model.config == before.config | untied
        for name, info in before.tensors.items():
            plain = "norm" in name or "embed" in name or "inv_freq" in name
            assert (model.tensors[name].coding is None) == plain, name
            if plain:
                assert model.read(name).tobytes() == before.read(name).tobytes()
            else:
                assert model.tensors[name + ".scales"].shape == (
                    info.shape[0],
                    -(-info.shape[1] // 32),
                )
        assert model.tensors["lm_head.weight"].coding.columns == 96
        head, embed = (
            decoded(tmp_path / "q.h5")["lm_head.weight"],
            before.read("model.embed_tokens.weight"),
        )
        assert 0 < np.abs(head - embed.astype(np.float32)).max() < 0.1 * np.abs(embed).max()
    text = describe(tmp_path / "q.h5", check=True)
    n_before = re.search(r"parameters +(\S+)", describe(small))[1]
    assert f" {n_before}\n" in text  # the head counts with the embedding
    assert (
        "int4 in groups of 32, 15 tensors, " in text
        and "int4" in text
        and "checksums are right" in text
    )
    with h5py.File(tmp_path / "q.h5") as file:
        assert file.attrs["format_version"] == 2
    assert integrity.check(tmp_path / "q.h5")[0] is None


@pytest.mark.single
def test_the_block_of_a_conversion_changes_nothing(small, tmp_path):
    """Nor does an .h5 as source, whose checksums are compared; a copy stays quantised."""
    convert(small, tmp_path / "a.h5", 8)
    convert(small, tmp_path / "b.h5", 8, block_bytes=1000)
    converter.convert(small, tmp_path / "plain.h5")
    convert(tmp_path / "plain.h5", tmp_path / "c.h5", 8)
    converter.convert(tmp_path / "a.h5", tmp_path / "d.h5")
    first = decoded(tmp_path / "a.h5")
    for name in "bcd":
        other = decoded(tmp_path / f"{name}.h5")
        assert other.keys() == first.keys()
        assert all(np.array_equal(first[key], other[key]) for key in first)
    with open_checkpoint(tmp_path / "plain.h5") as model:
        info = model.tensors["model.layers.1.mlp.up_proj.weight"]
    with open(tmp_path / "plain.h5", "r+b") as file:
        file.seek(info.offset + 99)
        file.write(b"\x11\x12")
    with pytest.raises(ValueError, match="the file is damaged"):
        convert(tmp_path / "plain.h5", tmp_path / "e.h5")
    assert not (tmp_path / "e.h5").exists()


@pytest.mark.single
def test_a_head_that_stands_in_the_place_of_the_embedding(tmp_path):
    """A file may hold the tied matrix under either name; both come of it."""
    tensors = models.weights("llama-tied")
    folder = models.write_model("llama-tied", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors")
    convert(folder, tmp_path / "q.h5", 8)
    with open_checkpoint(tmp_path / "q.h5") as model:
        assert model.tensors["lm_head.weight"].coding.bits == 8
        np.testing.assert_array_equal(
            model.read("model.embed_tokens.weight"), tensors["lm_head.weight"]
        )


@pytest.mark.single
def test_stages_of_equal_memory_count_codes_as_what_they_are(tmp_path):
    """A 16-bit embedding outweighs the layers of a small model whose codes have 4 bits."""
    folder = models.write_model("llama-bias", tmp_path / "model")
    convert(folder, tmp_path / "q.h5")
    arch, layout = layouts.architecture("llama-bias"), Layout(pp=2, stages="memory")
    with open_checkpoint(tmp_path / "q.h5") as model:
        first, head, of_layers = stages._bytes(arch, BF16, model.tensors)
        sizes = {name: info.nbytes for name, info in model.tensors.items()}
        runs = stages.layers_of_stage(arch, layout, BF16, model.tensors)
    of_head = sum(size for name, size in sizes.items() if name.startswith("lm_head"))
    assert head == of_head and first > 3 * head
    codes = sum(size for name, size in sizes.items() if ".layers.0." in name and "_proj.w" in name)
    assert codes < of_layers[0] < 1.1 * codes
    assert [len(run) for run in runs] == [0, 3]


def _attribute(name, value):
    return lambda weights: weights[UP].attrs.__setitem__(name, value)


def _delete(name):
    return lambda weights: weights.__delitem__(name)


def _plain(weights):
    """The gate as float32, the up as codes."""
    shape = weights[GATE].shape
    del weights[GATE], weights[GATE + ".scales"]
    weights[GATE] = np.ones((shape[0], 96), np.float32)


def _scales(dtype, columns):
    def spoil(weights):
        rows = len(weights[UP])
        del weights[UP + ".scales"]
        weights[UP + ".scales"] = np.ones((rows, columns), dtype)

    return spoil


GATE, UP = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))


@pytest.mark.single
@pytest.mark.parametrize(("spoil", "word"), [
    (_attribute("bits", 5), "bits = 5"),
    (_attribute("bits", 8), "bits = 8"),
    (_attribute("bits", "4"), "need 4 or 8 bits"),
    (_attribute("columns", 97), "columns = 97"),
    (_attribute("columns", 2**60), "columns = "),
    (_attribute("group", -32), "group = -32"),
    (_attribute("group", 16), "need float16"),
    (_delete(UP + ".scales"), "got none as scales"),
    (_scales(np.float32, 3), "float32 [171, 3] as scales"),
    (_scales(np.float16, 4), "float16 [171, 4] as scales"),
    (lambda weights: weights[UP].attrs.__delitem__("bits"), "(171, 48)"),
    (_plain, "in different ways"),
])  # fmt: skip
def test_damaged_files_are_refused(small, tmp_path, spoil, word):
    convert(small, tmp_path / "q.h5")
    with h5py.File(tmp_path / "q.h5", "r+", libver=hdf5.LIBVER) as file:
        spoil(file["weights"])
    with pytest.raises(ValueError, match=re.escape(word)) as caught:
        hpcinfer.load(tmp_path / "q.h5", MPI.COMM_SELF, kv_memory=KV)
    assert "\n" not in str(caught.value)


@pytest.mark.single
def test_a_tied_config_beside_a_quantised_head_is_refused(small, tmp_path):
    convert(small, tmp_path / "q.h5")
    with h5py.File(tmp_path / "q.h5", "r+", libver=hdf5.LIBVER) as file:
        config = json.loads(file.attrs["config"]) | {"tie_word_embeddings": True}
        file.attrs["config"] = json.dumps(config)
        del file.attrs["metadata_crc32"]
    with pytest.raises(ValueError, match="does not tie"):
        hpcinfer.load(tmp_path / "q.h5", MPI.COMM_SELF, kv_memory=KV)


@pytest.mark.single
def test_conversions_that_make_no_sense_are_refused(small, tmp_path):
    convert(small, tmp_path / "q.h5")
    with pytest.raises(ValueError, match="quantised already"):
        convert(tmp_path / "q.h5", tmp_path / "again.h5")
    tensors = models.weights("llama-tied")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    (small / "model.safetensors").unlink()
    save_file(tensors, small / "model.safetensors")
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.weight that cannot be quantised"):
        convert(small, tmp_path / "nan.h5")
    assert not (tmp_path / "nan.h5").exists() and not (tmp_path / "again.h5").exists()


@pytest.mark.single
@pytest.mark.parametrize(("options", "word"), [
    (["--quantize", "int3"], "--quantize"), (["--quantize", "int4", "--group", "48"], "--group"),
    (["--group", "64"], "got --group 64 alone"),
])  # fmt: skip
def test_bad_arguments_are_refused(mpirun, tmp_path, options, word):
    done = mpirun(1, *HPCINFER, "convert", "absent", tmp_path / "q.h5", *options, timeout_s=30)
    assert done.returncode == 2 and word in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.single
def test_the_shipped_model_hardly_loses(tmp_path):
    """Perplexity of its own prompts with their answers, beside that of the 16-bit weights."""
    texts = [json.loads(line) for line in (DATA / "prompts.jsonl").read_text().splitlines()]
    texts = [text["prompt"] for text in texts]
    losses = {}
    for bits in (16, 8, 4):
        path = DATA / "model"
        if bits < 16:
            path = tmp_path / f"{bits}.h5"
            convert(DATA / "model", path, bits)
        scores = hpcinfer.load(path, MPI.COMM_SELF, kv_memory=1 << 25).score(texts)
        losses[bits] = -np.concatenate([score.logprobs[1:] for score in scores]).mean()
    assert abs(losses[8] - losses[16]) < 0.01 and abs(losses[4] - losses[16]) < 0.1


@pytest.mark.single
def test_convert_and_score_from_the_command_line(mpirun, small, tmp_path):
    path = tmp_path / "q.h5"
    done = mpirun(1, *HPCINFER, "convert", small, path, "--quantize", "int8", "--group", "64")
    assert done.returncode == 0 and "tensors" in done.stdout, done.stderr
    done = mpirun(1, *HPCINFER, "inspect", path)
    assert "int8 in groups of 64, 15 tensors" in done.stdout, done.stderr
