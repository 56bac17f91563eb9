"""Conversion: exact, in bounded memory, whole or not at all; `inspect` describes what came."""

import json
import os
import resource
import subprocess
import sys
import tracemalloc
import zlib

import h5py
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from hpcinfer.errors import UsageError
from hpcinfer.io import convert as convert_module
from hpcinfer.io import integrity
from hpcinfer.io.convert import convert
from hpcinfer.io.inspect import collapse, describe
from hpcinfer.io.models import open_checkpoint

pytestmark = pytest.mark.single

CONFIG = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "intermediate_size": None,
}  # fmt: skip


def make_model(folder, rows=300):
    """Directory with layers in bfloat16 and a norm in float32."""
    rng, bfloat16 = np.random.default_rng(3), ml_dtypes.bfloat16
    tensors = {
        f"model.layers.{i}.mlp.experts.{e}.w": rng.standard_normal((6, 8)).astype(bfloat16)
        for i in range(2)
        for e in range(3)
    }
    tensors["model.embed.weight"] = rng.standard_normal((rows, 8)).astype(bfloat16)
    tensors["model.norm.weight"] = rng.standard_normal(8).astype(np.float32)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    save_file(tensors, folder / "model.safetensors")
    return tensors


@pytest.fixture
def model(tmp_path):
    return tmp_path / "model", make_model(tmp_path / "model")


def test_h5py_reads_what_was_written(model, tmp_path):
    source, tensors = model
    calls = []
    summary = convert(source, tmp_path / "m.h5", lambda *at: calls.append(at), block_bytes=100)
    total = sum(array.nbytes for array in tensors.values())
    assert (summary.tensors, summary.bytes) == (len(tensors), total) and summary.time_s > 0
    assert calls == sorted(calls) and calls[-1] == (total, total) and len(calls) > len(tensors)

    with h5py.File(tmp_path / "m.h5") as file:
        assert file.attrs["format"] == "hpcinfer-model" and file.attrs["format_version"] == 1
        assert json.loads(file.attrs["config"]) == CONFIG
        assert file["tokenizer/tokenizer_json"].asstr()[()] == '{"version": "1.0"}'
        assert set(file["weights"]) == set(tensors)
        for name, array in tensors.items():
            data = file["weights"][name]
            assert data.attrs["crc32"] == zlib.crc32(array.tobytes())
            assert data.chunks is None and data.id.get_type().get_size() == array.itemsize
            np.testing.assert_array_equal(data[()], array.astype(np.float32))
    assert sorted(os.listdir(tmp_path)) == ["m.h5", "model"]


def test_copy_of_an_h5(model, tmp_path):
    source, tensors = model
    convert(source, tmp_path / "a.h5")
    convert(tmp_path / "a.h5", tmp_path / "b.h5")
    with pytest.raises(UsageError, match="b.h5 that is read"):
        convert(tmp_path / "b.h5", tmp_path / "b.h5")
    with open_checkpoint(tmp_path / "b.h5") as copy:
        for name, array in tensors.items():
            assert copy.read(name).tobytes() == array.tobytes()
    assert integrity.check(tmp_path / "b.h5") == (None, len(tensors))


def test_damage_is_found(model, tmp_path):
    source, _ = model
    path = tmp_path / "m.h5"
    convert(source, path)
    with open_checkpoint(path) as opened:
        info = opened.tensors["model.embed.weight"]
    with open(path, "r+b") as file:
        file.seek(info.offset + 77)
        file.write(b"\xaa\x55")
    (_, fault), _ = integrity.check(path)
    assert fault.name == "model.embed.weight" and f"{info.crc32:08x}" in fault.needed
    with pytest.raises(ValueError, match="damaged"):
        convert(path, tmp_path / "copy.h5")
    assert not (tmp_path / "copy.h5").exists() and not (tmp_path / "copy.h5.partial").exists()


def test_memory_is_bounded_by_the_block(tmp_path):
    tensors = make_model(tmp_path / "model", rows=200_000)
    tracemalloc.start()
    try:
        convert(tmp_path / "model", tmp_path / "m.h5", block_bytes=1 << 16)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1_500_000 < tensors["model.embed.weight"].nbytes


def test_large_metadata(model, tmp_path):
    """Some tokenizer configs exceed the 64 KiB that an HDF5 attribute of plain kind can hold."""
    source, _ = model
    large = {"added_tokens_decoder": {str(i): {"content": f"<{i}>"} for i in range(40_000)}}
    (source / "tokenizer_config.json").write_text(json.dumps(large))
    convert(source, tmp_path / "m.h5")
    with open_checkpoint(tmp_path / "m.h5") as opened:
        assert opened.tokenizer_config == large


def test_failure_leaves_the_old_file(model, tmp_path):
    source, tensors = model
    path = tmp_path / "m.h5"
    path.write_text("old")

    def stop(done_bytes, total_bytes):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, path, stop)
    with pytest.raises(ValueError, match="exists"):
        convert(source, path, overwrite=False)
    assert path.read_text() == "old" and not (tmp_path / "m.h5.partial").exists()

    bad = tmp_path / "bad"
    make_model(bad)
    save_file({"a/b": np.ones(2)}, bad / "model.safetensors")
    with pytest.raises(ValueError, match="'a/b'"):
        convert(bad, path)
    assert path.read_text() == "old"
    convert(source, path)
    assert integrity.check(path) == (None, len(tensors))


def test_places_that_cannot_be_written(model, tmp_path, monkeypatch):
    source, _ = model
    with pytest.raises(UsageError, match="which is a folder"):
        convert(source, tmp_path)
    with pytest.raises(RuntimeError, match="does not exist"):
        convert(source, tmp_path / "absent" / "m.h5")
    with pytest.raises(RuntimeError, match="not a folder"):
        convert(source, source / "config.json" / "m.h5")
    usage = convert_module.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RuntimeError, match="1000 bytes of free space"):
        convert(source, tmp_path / "m.h5")
    assert os.listdir(tmp_path) == ["model"]


FULL_DISK = """
import resource, sys
from hpcinfer.io.convert import convert
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    convert(sys.argv[1], sys.argv[2])
except RuntimeError as error:
    print(error)
"""


@pytest.mark.single
@pytest.mark.parametrize("limit", [50, 3000, 8000])
def test_a_full_disk_costs_one_line(model, tmp_path, limit):
    """A limit on the file's size stands for the full disk; HDF5 alone would crash."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] < 0
    source, _ = model
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, source, tmp_path / "m.h5", str(limit)],
        capture_output=True, text=True, timeout=50,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert len(done.stdout.splitlines()) == 1 and "size limit" in done.stdout
    assert os.listdir(tmp_path) == ["model"]


def test_describe_models(model, tmp_path):
    source, tensors = model
    convert(source, tmp_path / "m.h5")
    texts = [describe(source), describe(tmp_path / "m.h5")]
    for text in texts:
        assert "model.layers.{0..1}.mlp.experts.{0..2}.w" in text and "6 x" in text
        for fact in ("llama", "layers N", "query heads H", "[300, 8]", "bfloat16", "2,696"):
            assert fact in text, fact
        assert "FFN width" not in text
    assert "Hugging Face" in texts[0] and "8 of 8 tensors" in texts[1]
    identities = [line.split()[1] for t in texts for line in t.splitlines() if "identity" in line]
    assert identities[0] == identities[1]


def test_collapse():
    names = [f"h.{i}.w" for i in (0, 1, 2, 5)] + ["h.9.b1", "7", "a.b"]
    assert set(collapse(names)) == {"h.{0..2,5}.w", "h.9.b1", "7", "a.b"}


def test_describe_refuses_other_files(tmp_path):
    (tmp_path / "x").write_text("x")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["a"] = 1
    for name in ("x", "x.h5", "absent"):
        with pytest.raises(ValueError):
            describe(tmp_path / name)
