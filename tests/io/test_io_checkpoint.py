"""Reading models: parts of tensors equal NumPy's slices, damaged files are refused in one line.

The safetensors library and h5py write and read the files independently of hpcinfer.
"""

import json
import os
import struct

import h5py
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from hpcinfer.io import models, safetensors
from hpcinfer.io.checkpoint import blocks
from hpcinfer.io.convert import convert
from hpcinfer.io.models import open_checkpoint
from hpcinfer.io.safetensors import read_header
from hpcinfer.node import peak_memory_bytes

pytestmark = pytest.mark.single

BF16 = ml_dtypes.bfloat16


def sample_tensors():
    """One tensor of each kind that matters: types, ranks, odd sizes, without elements."""
    rng = np.random.default_rng(7)
    return {
        "model.layers.0.w": rng.standard_normal((13, 7)).astype(BF16),
        "model.layers.1.w": rng.standard_normal((13, 7)).astype(BF16),
        "half": rng.standard_normal((5, 6)).astype(np.float16),
        "single": rng.standard_normal((4, 3, 5)).astype(np.float32),
        "vector": rng.standard_normal(11).astype(np.float32),
        "double": rng.standard_normal((2, 2)),
        "scalar": np.array(2.5, BF16),
        "counts": np.arange(6, dtype=np.int64).reshape(2, 3),
        "ids": np.arange(5, dtype=np.int32),
        "bytes": np.arange(9, dtype=np.uint8).reshape(3, 3),
        "mask": np.array([[True, False, True]]),
        "nothing": np.empty((0, 4), np.float32),
    }


def write_directory(folder, tensors, config=None):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_raw(path, header, data=b""):
    """A safetensors file whose header is `header` (object or bytes), whether it is true or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.fixture(params=["safetensors", "hdf5"])
def stored(request, tmp_path):
    """(open checkpoint, the arrays it holds), in either form."""
    tensors = sample_tensors()
    path = write_directory(tmp_path / "model", tensors)
    if request.param == "hdf5":
        convert(path, tmp_path / "model.h5", block_bytes=32)
        path = tmp_path / "model.h5"
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.kind == request.param
        yield checkpoint, tensors


def test_whole_tensors(stored):
    checkpoint, tensors = stored
    assert set(checkpoint.tensors) == set(tensors)
    for name, array in tensors.items():
        info = checkpoint.tensors[name]
        assert (info.shape, info.dtype, info.nbytes) == (array.shape, array.dtype, array.nbytes)
        read = checkpoint.read(name)
        assert read.dtype == array.dtype and read.shape == array.shape
        assert read.tobytes() == array.tobytes()
    assert checkpoint.bytes_read == checkpoint.file_bytes == sum(a.nbytes for a in tensors.values())


@pytest.mark.parametrize("block_bytes", [1, 8, 40, 1 << 24])
@pytest.mark.parametrize("name, axis", [
    ("model.layers.0.w", 0), ("model.layers.0.w", 1), ("model.layers.0.w", -1),
    ("single", 0), ("single", 1), ("single", 2), ("half", 1), ("vector", 0), ("bytes", 1),
])  # fmt: skip
def test_pieces_equal_slices(stored, name, axis, block_bytes):
    checkpoint, tensors = stored
    checkpoint.block_bytes = block_bytes
    array = tensors[name]
    n = array.shape[axis]
    several = [(n - 1, n), (0, 2)], [(0, 1), (1, 1), (1, n)]
    for pieces in ([(0, n)], [(1, 3)], [(2, 2)], [], *several):
        before = checkpoint.bytes_read
        parts = [np.arange(start, stop) for start, stop in pieces]
        expected = array.take(np.concatenate([np.arange(0), *parts]).astype(int), axis)
        read = checkpoint.read(name, axis, pieces)
        assert read.shape == expected.shape and read.tobytes() == expected.tobytes()
        assert checkpoint.bytes_read - before == expected.nbytes


@pytest.mark.parametrize("block_bytes", [8, 1 << 24])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
def test_out_is_filled_and_converted(stored, dtype, block_bytes):
    checkpoint, tensors = stored
    checkpoint.block_bytes = block_bytes
    array = tensors["model.layers.1.w"]
    store = np.zeros((7, 30), dtype)
    out = store.T[3:29:2]
    assert checkpoint.read("model.layers.1.w", out=out) is out
    np.testing.assert_array_equal(out, array.astype(dtype))
    assert not store.T[:3].any() and not store.T[4::2].any()

    out = np.zeros((13, 4), dtype)
    checkpoint.read("model.layers.1.w", axis=1, pieces=[(5, 7), (1, 3)], out=out)
    np.testing.assert_array_equal(out, array[:, [5, 6, 1, 2]].astype(dtype))


def test_stream_gives_the_bytes_in_order(stored):
    checkpoint, tensors = stored
    for block_bytes in (4, 24, 1 << 20):
        checkpoint.block_bytes = block_bytes
        for name, array in tensors.items():
            pieces = list(checkpoint.stream(name))
            assert b"".join(block.tobytes() for _, block in pieces) == array.tobytes()
            assert all(b.nbytes <= max(block_bytes, array.itemsize) for _, b in pieces)


def test_wrong_questions_are_refused(stored):
    checkpoint, _ = stored
    with pytest.raises(ValueError, match="no_such"):
        checkpoint.read("no_such")
    for axis, pieces in [(2, [(0, 1)]), (0, [(0, 14)]), (0, [(3, 2)]), (0, [(-1, 2)])]:
        with pytest.raises(ValueError, match="model.layers.0.w"):
            checkpoint.read("model.layers.0.w", axis, pieces)
    with pytest.raises(ValueError, match="shape"):
        checkpoint.read("half", out=np.empty((6, 5), np.float16))
    with pytest.raises(ValueError, match="int64"):
        checkpoint.read("counts", out=np.empty((2, 3), np.float32))
    with pytest.raises(ValueError, match="axes"):
        checkpoint.read("scalar", pieces=[(0, 1)])


def test_file_that_shrinks_while_open(stored):
    checkpoint, _ = stored
    largest = max(checkpoint.tensors.values(), key=lambda info: info.offset + info.nbytes)
    os.truncate(largest.file, largest.offset + largest.nbytes - 1)
    with pytest.raises(RuntimeError, match="changed while in use"):
        checkpoint.read(largest.name)


def test_checksum_is_that_of_the_weights(tmp_path):
    tensors = sample_tensors()
    source = write_directory(tmp_path / "a", tensors)
    convert(source, tmp_path / "a.h5")
    tensors["half"][0, 0] += 1
    other = write_directory(tmp_path / "b", tensors)
    with open_checkpoint(source) as a, open_checkpoint(tmp_path / "a.h5") as h5:
        assert a.checksum == h5.checksum and a.bytes_read == 0
        with open_checkpoint(other) as b:
            assert a.checksum != b.checksum


@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5), (2, 3, 4), (1, 1, 9)])
@pytest.mark.parametrize("limit", [1, 2, 5, 100])
def test_blocks_cover_an_array_in_order(shape, limit):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    parts = [array[(*box, ...)] for box in blocks(shape, limit)]
    assert all(part.size <= limit and part.flags.c_contiguous for part in parts)
    flat = [value for part in parts for value in part.reshape(-1)]
    assert flat == list(range(array.size))


# ------------------------------------------------------------------- Hugging Face directories


def test_many_files_with_index(tmp_path):
    tensors = sample_tensors()
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    names = sorted(tensors)
    shards = {"s-1.safetensors": names[:5], "s-2.safetensors": names[5:]}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, folder / shard)
    save_file({"extra": np.ones(3)}, folder / "consolidated.safetensors")

    # Without an index all files count; with one, only those that it names
    with open_checkpoint(folder) as checkpoint:
        assert set(checkpoint.tensors) == {*names, "extra"}
    index = {"weight_map": {name: shard for shard, m in shards.items() for name in m}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with open_checkpoint(folder) as checkpoint:
        assert set(checkpoint.tensors) == set(names)
        for name in names:
            assert checkpoint.read(name).tobytes() == tensors[name].tobytes()


@pytest.mark.parametrize("weight_map, word", [
    ({"a": "../other.safetensors"}, "own folder"),
    ({"a": "/etc/passwd"}, "own folder"),
    ({"a": 5}, "own folder"),
    ({"a": ".."}, "regular"),
    ({"a": "absent.safetensors"}, "absent.safetensors"),
    ({"a": "s.safetensors", "b": "s.safetensors"}, "no 'b'"),
    ({}, "weight_map"),
    (None, "weight_map"),
])  # fmt: skip
def test_broken_index(tmp_path, weight_map, word):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"a": np.ones(3)}, folder / "s.safetensors")
    save_file({"a": np.ones(3)}, tmp_path / "other.safetensors")
    index = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    assert_refused(folder, word)


def test_tensor_in_two_files(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for name in ("a", "b"):
        save_file({"w": np.ones(3)}, folder / f"{name}.safetensors")
    assert_refused(folder, "need it once")


def test_directories_that_are_no_models(tmp_path):
    assert_refused(tmp_path, "config.json")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    assert_refused(tmp_path, "not read")
    assert_refused(tmp_path / "absent", "existing")
    assert_refused(tmp_path / "pytorch_model.bin", "no HDF5 file")
    save_file({"w": np.ones(3)}, tmp_path / "model.safetensors")
    assert_refused(tmp_path / "model.safetensors", "give the directory")


@pytest.mark.parametrize("text", [
    b"", b"{", b"[]", b"3", b'{"a": 1, "a": 2}', b"[" * 100_000, b'{"a": "\xff"}',
    b'{"a": ' + b"9" * 5000 + b"}",
])  # fmt: skip
def test_broken_config(tmp_path, text):
    folder = write_directory(tmp_path / "model", {"w": np.ones(3)})
    (folder / "config.json").write_bytes(text)
    assert_refused(folder, "config.json")


def test_config_too_large_or_no_file(tmp_path):
    folder = write_directory(tmp_path / "model", {"w": np.ones(3)})
    os.truncate(folder / "config.json", 4_000_001)
    assert_refused(folder, "at most 4000000")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    assert_refused(folder, "no regular file")


def test_metadata(tmp_path):
    folder = write_directory(tmp_path / "model", {"w": np.ones(3)}, {"vocab_size": 9, "x": [1.5]})
    with open_checkpoint(folder) as bare:
        assert bare.config == {"vocab_size": 9, "x": [1.5]}
        assert bare.generation_config == bare.tokenizer_config == bare.special_tokens_map == {}
        assert bare.tokenizer_json is None and bare.chat_template is None

    # The template of the tokenizer's config, by a file of either kind taken over
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    (folder / "tokenizer.json").write_text('{"ü": 1}', encoding="utf-8")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    for template, file, text in [
        ("D", None, None),
        ("J", "chat_template.json", '{"chat_template": "J"}'),
        ("{{ x }}\n", "chat_template.jinja", "{{ x }}\n"),
    ]:
        if file:
            (folder / file).write_text(text)
        convert(folder, tmp_path / "model.h5")
        for path in (folder, tmp_path / "model.h5"):
            with open_checkpoint(path) as full:
                assert full.chat_template == template
                assert full.tokenizer_json == '{"ü": 1}'
                assert full.tokenizer_config == {"chat_template": named}
                assert full.generation_config == {"eos_token_id": [1, 2]}
                assert full.special_tokens_map == {"bos_token": "<s>"}


# ------------------------------------------------------------------------ broken safetensors


def entry(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize("header, data_bytes, word", [
    ({"a": entry()}, 7, "truncated"),
    ({"a": entry()}, 9, "by its header"),
    ({"a": entry(shape=(3,))}, 8, "need 12"),
    ({"a": entry(shape=(2**40, 2**40))}, 8, "2\\*\\*63"),
    ({"a": entry(shape=(0, 2**62, 2**62), end=0)}, 0, "2\\*\\*63"),
    ({"a": entry(shape=(1,) * 40 + (2,))}, 8, "41 axes"),
    ({"a": entry(end=2**70)}, 8, "truncated"),
    ({"a": entry(begin=8, end=0)}, 8, "begin <= end"),
    ({"a": entry(begin=-8, end=0)}, 8, "whole numbers"),
    ({"a": entry(shape=(-2,))}, 8, "whole numbers"),
    ({"a": entry(shape=(True, 2))}, 8, "whole numbers"),
    ({"a": entry(shape=(2.0,))}, 8, "whole numbers"),
    ({"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}, 8, "whole numbers"),
    ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 9]}}, 8, "whole numbers"),
    ({"a": {"dtype": "F32", "shape": [2]}}, 8, "whole numbers"),
    ({"a": entry(dtype="F8_E4M3")}, 8, "F8_E4M3"),
    ({"a": entry(dtype=["F32"])}, 8, "element type"),
    ({"a": 5}, 8, "no object"),
    ({"a": entry(), "b": entry()}, 8, "overlap"),
    ({"a": entry(), "b": entry(begin=4, end=12)}, 12, "overlap"),
    ({"a": entry(), "b": entry(begin=12, end=20)}, 20, "holes"),
    ({"a": entry(begin=4, end=12)}, 12, "holes"),
    (b'{"a": 1, "a": 2}', 0, "twice"),
    (b"[1]", 0, "without a safetensors header"),
    (b" {}", 0, "without a safetensors header"),
    (b'{"a": ', 0, "invalid JSON"),
    (b'{"a": "\xff"}', 0, "invalid JSON"),
    (b'{"a":' + b"[" * 5_000 + b" " * 100_000, 0, "invalid JSON"),
    (b'{"a":' + b"[" * 100_000, 0, "got 100001 lists and objects in the 100005 bytes of the head"),
    (b'{"a":[' + b"[]," * 1_000_000 + b"[]]}", 0, "got 1000003 lists and objects"),
    (b'{"a":[' + b"0," * 16_000_000 + b"0]}", 0, "with a header of 32000009 bytes"),
])  # fmt: skip
def test_broken_headers(tmp_path, header, data_bytes, word):
    path = write_raw(tmp_path / "model.safetensors", header, bytes(data_bytes))
    (tmp_path / "config.json").write_text("{}")
    assert_refused(tmp_path, word)
    with pytest.raises(ValueError):
        read_header(path)


@pytest.mark.parametrize("content", [
    b"", b"abc", struct.pack("<Q", 3), struct.pack("<Q", 2**63) + b"{}",
    struct.pack("<Q", 100_000_001) + b"{}", b"version https://git-lfs.github.com/spec/v1\n",
])  # fmt: skip
def test_broken_prefix(tmp_path, content):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)
    assert_refused(tmp_path, "git lfs pull" if content[:3] == b"ver" else "header of")


def test_unaligned_header(tmp_path):
    """Files of other writers need not begin their data at a multiple of the element size."""
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    text = json.dumps({"a": entry(shape=(3, 4), end=48)}).encode()
    text += b" " * (len(text) % 2 + 1 - 2 * (len(text) % 2))
    write_raw(tmp_path / "model.safetensors", text, array.tobytes())
    (tmp_path / "config.json").write_text("{}")
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors["a"].offset % 2 == 1
        np.testing.assert_array_equal(checkpoint.read("a"), array)
        np.testing.assert_array_equal(checkpoint.read("a", 1, [(1, 3)]), array[:, 1:3])


# ------------------------------------------------------------------------------- broken HDF5


@pytest.fixture
def model_h5(tmp_path):
    """A converted model that a test may spoil."""
    folder = write_directory(tmp_path / "model", sample_tensors())
    (folder / "tokenizer.json").write_text("{}")
    convert(folder, tmp_path / "model.h5")
    return tmp_path / "model.h5"


def test_truncated_h5(model_h5):
    size = os.path.getsize(model_h5)
    for length in (size - 1, size // 2, 100, 8):
        os.truncate(model_h5, length)
        assert_refused(model_h5, "does not open as HDF5|damaged")
    os.truncate(model_h5, 0)
    assert_refused(model_h5, "no HDF5 file")


def _external_storage(file):
    del file["weights/half"]
    file.create_dataset(
        "weights/half", (5, 6), np.float16, external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)]
    )


def _virtual(file):
    del file["weights/half"]
    layout = h5py.VirtualLayout((5, 6), np.float16)
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (5, 6))
    file["weights"].create_virtual_dataset("half", layout)


def _replace(**options):
    def spoil(file):
        data = file["weights/half"][:]
        del file["weights/half"]
        file.create_dataset("weights/half", data=data, **options)

    return spoil


def _put(name, value):
    def spoil(file):
        if name in file:
            del file[name]
        file[name] = value

    return spoil


def _fixed(name, n_bytes):
    """A text of so many bytes that takes none in the file."""

    def spoil(file):
        if name in file:
            del file[name]
        file.create_dataset(name, (), f"S{n_bytes}")

    return spoil


def _attribute(name, value):
    return lambda file: file.attrs.__setitem__(name, value)


@pytest.mark.parametrize("spoil, word", [
    (_attribute("format", "other"), "'other'"),
    (_attribute("format", 5), "format"),
    (_attribute("format", ["hpcinfer-model"] * 2), "format"),
    (_attribute("format_version", 3), "format version 3"),
    (_attribute("format_version", "1"), "format version"),
    (_attribute("config", "{"), "attribute config"),
    (_attribute("config", "[]"), "attribute config"),
    (_attribute("config", b"\xff"), "attribute config"),
    (lambda file: file.attrs.__delitem__("config"), "attribute config"),
    (lambda file: file.__delitem__("weights"), "/weights"),
    (_put("weights", 5), "/weights"),
    (_put("tokenizer", 5), "/tokenizer"),
    (_put("tokenizer/tokenizer_json", 5), "no text"),
    (_fixed("tokenizer/tokenizer_json", 2_000_000_000), "no text"),
    (_put("weights", h5py.ExternalLink("other.h5", "/weights")), "/weights"),
    (_put("weights/half", h5py.ExternalLink("other.h5", "/x")), "no dataset of this file"),
    (_put("weights/half", h5py.SoftLink("/weights/ids")), "no dataset of this file"),
    (lambda file: file.create_group("weights/group"), "no dataset of this file"),
    (_put("weights/half", h5py.Empty("f4")), "no dataset of this file"),
    (_external_storage, "external"),
    (_virtual, "virtual"),
    (_replace(chunks=(5, 6)), "chunked"),
    (_replace(compression="gzip"), "compressed"),
    (_replace(dtype=">f2"), "element type"),
    (_put("weights/half", np.array(1 + 2j)), "element type"),
    (_put("weights/half", "text"), "element type"),
    (lambda file: file.create_dataset("weights/new", (9,), "f4"), "need 36"),
])  # fmt: skip
def test_spoiled_h5(model_h5, spoil, word):
    with h5py.File(model_h5, "r+") as file:
        spoil(file)
    assert_refused(model_h5, word)


LONG = "x" * 100_000_000


@pytest.mark.parametrize(
    "spoil", [_attribute("config", LONG), _put("tokenizer/chat_template", LONG)]
)
def test_h5_with_a_long_text(model_h5, spoil, monkeypatch):
    """How long it is only the library knows, which is refused the memory."""
    with h5py.File(model_h5, "r+") as file:
        spoil(file)
    monkeypatch.setattr(models, "METADATA_MEMORY", 50_000_000)
    before = peak_memory_bytes()
    assert_refused(model_h5, "damaged .*(memory|alloc)")
    assert peak_memory_bytes() - before < 60_000_000


def test_metadata_that_needs_much_memory(tmp_path, monkeypatch):
    """Python is refused it, too; afterwards it may have more again."""

    def much(path):
        return np.ones(50_000_000)

    monkeypatch.setattr(models, "_open", much)
    monkeypatch.setattr(models, "METADATA_MEMORY", 30 << 20)
    assert_refused(tmp_path, "whose metadata needs more than 30 MiB of memory")
    assert much(tmp_path).sum() == 50_000_000


def test_headers_that_are_long_together(tmp_path, monkeypatch):
    folder = write_directory(tmp_path / "model", {"w": np.ones(3)})
    os.rename(folder / "model.safetensors", folder / "a.safetensors")
    save_file({"v": np.ones(3)}, folder / "b.safetensors")
    assert open_checkpoint(folder).tensors.keys() == {"v", "w"}
    monkeypatch.setattr(safetensors, "MAX_ALL_HEADERS_BYTES", 100)
    assert_refused(folder, "more than 100 bytes of headers up to .*b.safetensors")


def test_h5_that_declares_more_than_it_holds(model_h5):
    """A shape changed by hand in the file, far beyond its end; then its storage size as well."""
    with open_checkpoint(model_h5) as checkpoint:
        offset = checkpoint.tensors["half"].offset
    content = model_h5.read_bytes()
    shape, storage = struct.pack("<QQ", 5, 6), struct.pack("<QQ", offset, 60)
    assert shape in content and content.count(storage) == 1
    content = content.replace(shape, struct.pack("<QQ", 2**20, 2**20))
    model_h5.write_bytes(content)
    assert_refused(model_h5, "damaged")
    model_h5.write_bytes(content.replace(storage, struct.pack("<QQ", offset, 2**41)))
    assert_refused(model_h5, "damaged|half")


def assert_refused(path, word):
    """`open_checkpoint` refuses in one line, and before it takes memory."""
    with pytest.raises(ValueError, match=word) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert str(caught.value).startswith("checkpoint: ")


def test_hidden_files_beside_shards_are_passed_over(tmp_path):
    folder = write_directory(tmp_path / "model", {"w": np.ones(3)})
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "._model-1.safetensors").write_bytes(b"\0\5\x16\7 of a Mac")
    with open_checkpoint(folder) as checkpoint:
        assert list(checkpoint.tensors) == ["w"]


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"GGUF\3\0\0\0", "which is a GGUF file"),
        (b"\x80\x02}q", "pickles can run programs and are not read"),
        (b"PK\3\4", "pickles can run programs and are not read"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"anything", "which is no HDF5 file"),
    ],
)
def test_files_of_other_kinds_are_named(tmp_path, start, words):
    (tmp_path / "model.bin").write_bytes(start)
    with pytest.raises(ValueError, match=words):
        open_checkpoint(tmp_path / "model.bin")
