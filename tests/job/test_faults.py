"""Models and inputs that are damaged, as a user meets them: one clear line, and no wrong answer."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers.jobs import run_job
from helpers.paths import SHIPPED
from helpers.speed import scaled

import hpcinfer
from hpcinfer.io import integrity
from hpcinfer.io.convert import convert

HPCINFER = (sys.executable, "-m", "hpcinfer")
NORM, EMBED = "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"
DOWN = "model.layers.2.mlp.down_proj.weight"
NAN, INFINITY = 0x7FC0, 0x7F80  # of bfloat16


@pytest.fixture(scope="module")
def model_h5(comm):
    """The shipped model, converted once; the same file on all ranks."""
    import tempfile

    folder = comm.bcast(tempfile.mkdtemp(prefix="hpcinfer-") if comm.rank == 0 else None)
    if comm.rank == 0:
        convert(SHIPPED, Path(folder) / "model.h5")
    comm.Barrier()
    yield Path(folder) / "model.h5"
    comm.Barrier()
    if comm.rank == 0:
        shutil.rmtree(folder)


def spoilt(comm, model_h5, folder, name, bits, keep_checksum=True):
    """Copy of the model in which the second value of a tensor has other bits."""
    path = folder / "spoilt.h5"
    if comm.rank == 0:
        shutil.copy(model_h5, path)
        with h5py.File(path) as file:
            offset = file["weights"][name].id.get_offset()
        with open(path, "r+b") as file:
            file.seek(offset + 2)
            file.write(int(bits).to_bytes(2, "little"))
        if not keep_checksum:
            with h5py.File(path, "r+") as file:
                for data in file["weights"].values():
                    del data.attrs["crc32"]
    comm.Barrier()
    return path


def untied(folder):
    """The shipped model with a head of its own, and NaN in the embedding of token 7."""
    shutil.copytree(SHIPPED, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    content = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8:start]), bytearray(content[start:])

    # The head is what the embedding was
    begin, end = header[EMBED]["data_offsets"]
    span = [len(data), len(data) + end - begin]
    header["lm_head.weight"] = header[EMBED] | {"data_offsets": span}
    data += data[begin:end]
    at = begin + 7 * 2 * header[EMBED]["shape"][1]
    data[at : at + 2] = NAN.to_bytes(2, "little")
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + data
    (folder / "model.safetensors").write_bytes(content)
    return folder


def raises_everywhere(comm, function, pattern):
    with pytest.raises(ValueError, match=pattern) as caught:
        function()
    lines = comm.allgather(str(caught.value))
    assert len(set(lines)) == 1 and "\n" not in lines[0]


@pytest.mark.parametrize("work", ["generate", "score"])
@pytest.mark.parametrize(
    ("name", "bits", "words"),
    [
        (DOWN, NAN, rf"^weights: got nan at \[0, 1\] in {DOWN} \(layer 2\), need finite numbers; "),
        (NORM, INFINITY, rf"^weights: got inf at \[1\] in {NORM} \(layer 1\), need finite"),
        (EMBED, NAN, rf"^weights: got nan at \[0, 1\] in {EMBED}, need finite numbers"),
    ],
    ids=["matrix", "norm", "embedding"],
)
def test_the_tensor_behind_bad_logits_is_named(
    comm, shared_path, model_h5, work, name, bits, words
):
    path = spoilt(comm, model_h5, shared_path, name, bits, keep_checksum=False)
    model = hpcinfer.load(path, kv_memory=1 << 24)
    raises_everywhere(comm, lambda: getattr(model, work)([[0, 5, 9], [7, 0, 3]]), words)


def test_bad_logits_of_sound_weights(comm, shared_path, model_h5, monkeypatch):
    """Numbers that grow too large on their way are not blamed on the weights."""
    model = hpcinfer.load(model_h5, kv_memory=1 << 24)
    monkeypatch.setattr(model.model, "logits", lambda hidden: hidden[:, :0] + np.nan)
    logits = type(model.model).logits
    monkeypatch.setattr(
        model.model, "logits", lambda x: logits(model.model, x) * np.float32(np.nan)
    )
    raises_everywhere(
        comm, lambda: model.generate([[1, 2]]), "^sample: got nan .*; all weights are finite, .*try"
    )


@pytest.mark.parametrize("name", [DOWN, NORM, EMBED])
def test_a_check_finds_what_no_run_would(comm, shared_path, model_h5, name):
    """One bit of a weight: only the checksum tells."""
    path = spoilt(comm, model_h5, shared_path, name, 0x3F81)
    hpcinfer.load(path, kv_memory=1 << 24)
    raises_everywhere(
        comm,
        lambda: hpcinfer.load(path, kv_memory=1 << 24, check_weights=True),
        rf"^weights: got checksum [0-9a-f]{{8}} in {name}.*, need the stored .*; the file is dam",
    )
    assert hpcinfer.load(model_h5, kv_memory=1 << 24, check_weights=True)


def test_a_check_knows_what_a_type_can_hold(comm, shared_path, model_h5):
    path = spoilt(comm, model_h5, shared_path, DOWN, 0x7F00, keep_checksum=False)  # 1.7e38
    assert integrity.check(path) == (None, 0)
    found, _ = integrity.check(path, dtype=np.dtype(np.float16))
    assert "need values that float16 can hold; choose another --dtype" in found[1].line
    assert integrity.check(model_h5)[0] is None and integrity.check(model_h5)[1] > 30


# --- As commands ---------------------------------------------------------------------------------


def one_line(done, code, pattern):
    lines = [line for line in done.stderr.splitlines() if line.startswith("hpcinfer")]
    assert done.returncode == code, done.stderr
    assert len(lines) == 1 and re.search(pattern, lines[0]), done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr


@pytest.mark.single
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("command", ["generate", "score"])
def test_nan_as_a_command(comm, tmp_path, model_h5, command, ranks):
    """What was finished before the fault was met is in the output, and the run can go on."""
    path = untied(tmp_path / "model")
    lines = [{"prompt_token_ids": [5, 9]}, {"prompt_token_ids": [7, 0, 3]}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = run_job(
        ranks, *HPCINFER, command, path, "--input", tmp_path / "in.jsonl", "--output",
        tmp_path / "out.jsonl", "--kv-memory", "32M", "--sequences", "1",
    )  # fmt: skip
    one_line(done, 1, rf"weights: got nan at \[7, 0\] in {EMBED}, need finite numbers")
    (line,) = (tmp_path / "out.jsonl").read_text().splitlines()
    assert json.loads(line)["custom_id"] == "request-0"


@pytest.mark.single
def test_check_as_a_command(comm, tmp_path, model_h5):
    path = spoilt(comm, model_h5, tmp_path, DOWN, 0x3F80)
    (tmp_path / "in.txt").write_text("a\n")
    words = r"weights: got checksum \w+ in model.layers.2.mlp.down_proj.weight \(layer 2\), need"
    run = ("--input", tmp_path / "in.txt", "--output", tmp_path / "out.jsonl", "--check")
    one_line(run_job(2, *HPCINFER, "generate", path, *run), 1, words)
    assert not (tmp_path / "out.jsonl").exists()
    one_line(run_job(1, *HPCINFER, "inspect", path, "--check"), 1, words)
    done = run_job(1, *HPCINFER, "inspect", model_h5, "--check")
    assert re.search(r"checked +all weights are finite, 38 checksums are right", done.stdout)


@pytest.mark.single
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "in.txt").write_text("a\n")
    (tmp_path / "no").mkdir(mode=0o555)
    out = tmp_path / "no" / "out.jsonl"
    done = run_job(2, *HPCINFER, "score", SHIPPED, "--input", tmp_path / "in.txt", "--output", out)
    one_line(done, 1, "output: got .*out.jsonl, need a folder that exists and can be written")


@pytest.mark.single
def test_lines_that_cannot_run_do_not_hold_up_the_others(tmp_path):
    """Ten megabytes on one line are refused unread, as are bytes that are no text."""
    lines = [
        b'{"prompt": "\xff\xfe"}',
        json.dumps({"prompt": "a " * 5_000_000}).encode(),
        json.dumps({"messages": [{"role": "user", "content": "a " * 5_000_000}]}).encode(),
        b'{"prompt": "' + b"a" * 70_000_000 + b'"}',
        b'{"prompt": ""}',
        b'{"prompt_token_ids": [1, 99999999]}',
        b'{"prompt_token_ids": [-1]}',
        b'{"prompt": "a\0b"}',
        b'{"prompt": "a\\u0000b"}',
        b'{"prompt": "fine", "max_tokens": 2}',
    ]
    words = [
        "byte 0xff at byte 13, need UTF-8", "prompt of 10000000 characters, need at most",
        "characters, need at most", "line of 70000015 bytes, need at most", "without tokens",
        "token id 99999999", "token id -1", "a NUL byte at byte 14", "a NUL character",
    ]  # fmt: skip
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    out = tmp_path / "out.jsonl"
    done = run_job(
        2, *HPCINFER, "generate", SHIPPED, "--input", tmp_path / "in.jsonl", "--output", out,
        "--kv-memory", "32M",
    )  # fmt: skip
    assert done.returncode == 0 and done.seconds < scaled(20), done.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    for record, word in zip(records, words, strict=False):
        assert word in record["error"]["message"]
    assert len(records) == len(lines) and records[-1]["error"] is None


def stranger(folder, regex=None, template=None):
    """The shipped model with another expression that cuts its words, or with a chat template."""
    shutil.copytree(SHIPPED, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    if regex is not None:
        cut = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"}
        tokenizer["pre_tokenizer"] = cut | {"invert": False}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.single
def test_what_a_stranger_wrote_costs_only_the_line_that_meets_it(tmp_path):
    """A panic of the tokenizer and a template beyond its memory; other lines are answered."""
    template = "{{ 'a' * (10 ** 11 if messages[0].content == 'much' else 9) }}"
    path = stranger(tmp_path / "model", "(a|aa)+$", template)
    chat = [{"messages": [{"role": "user", "content": word}]} for word in ("much", "little")]
    lines = [{"prompt": "a" * 60 + "b"}, {"prompt": "fine"}, *chat]
    (tmp_path / "in.jsonl").write_text(
        "\n".join(json.dumps(line | {"max_tokens": 2}) for line in lines)
    )
    out = tmp_path / "out.jsonl"
    done = run_job(
        2, *HPCINFER, "generate", path, "--input", tmp_path / "in.jsonl", "--output", out,
        "--kv-memory", "32M",
    )  # fmt: skip
    assert done.returncode == 0 and done.seconds < scaled(40), done.stderr
    assert "panicked" not in done.stderr and "Traceback" not in done.stderr
    records = {r["custom_id"]: r["error"] for r in map(json.loads, out.read_text().splitlines())}
    errors = [records[f"request-{i}"] for i in range(4)]
    assert errors[1] is errors[3] is None
    assert "tokenizer: got Onig: Regex search error" in errors[0]["message"]
    assert re.match("chat template: got more than 1.. GiB of memory for", errors[2]["message"])


PROGRAM = """
import sys
import hpcinfer
from mpi4py import MPI
model = hpcinfer.load(sys.argv[1], kv_memory=1 << 24)
if MPI.COMM_WORLD.rank == 1:
    raise type("PanicException", (BaseException,), {})("called unwrap")
model.generate(["a"])
"""


@pytest.mark.single
def test_a_program_that_fails_on_one_rank_ends_on_all(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    done = run_job(2, sys.executable, tmp_path / "program.py", SHIPPED)
    assert done.returncode != 0 and done.seconds < scaled(40)
    lines = [line for line in done.stderr.splitlines() if line.startswith("hpcinfer")]
    assert lines == ["hpcinfer: rank 1 ends all: PanicException: called unwrap"]
