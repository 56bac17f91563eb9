"""Results: what is written is what is read, in input order, and a killed run keeps its results."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcinfer.io import results as results_module
from hpcinfer.io.atomic import writing
from hpcinfer.io.inspect import describe
from hpcinfer.io.jsonl import JsonlWriter, encode
from hpcinfer.io.results import BATCH_RECORDS, Hdf5Writer, open_results

pytestmark = pytest.mark.single


def choice(index, text, ids, **more):
    return {"index": index, "text": text, "finish_reason": "stop", "token_ids": ids,
            "logprobs": None, "top_logprobs": None} | more  # fmt: skip


def generated(index, prompt=(1, 2), choices=(), error=None):
    return {"index": index, "line": index + 1, "custom_id": f"r-{index}", "error": error,
            "prompt_token_ids": list(prompt), "choices": list(choices)}  # fmt: skip


def failed(index):
    return {"index": index, "line": index + 1, "custom_id": "", "error": "no JSON"}


def scored(index, ids, logprobs):
    total = sum(logprobs[1:])
    return {"index": index, "line": index + 1, "custom_id": f"s-{index}", "error": None,
            "token_ids": ids, "logprobs": logprobs, "sum_logprob": total,
            "perplexity": float(np.exp(-total / (len(ids) - 1)))}  # fmt: skip


RECORDS = [
    generated(2, (5,), [choice(0, "zwei ü", [7, 8], logprobs=[-0.5, -1.5], top_logprobs=[
        [(7, -0.5), (1, -2.0)], [(3, -0.1)]])]),
    failed(1),
    generated(0, (), [choice(0, "a\0b", [9]), choice(1, "", [])]),
]  # fmt: skip


def write_all(path, records, kind="generate", **attributes):
    writer = open_results(path, kind, attributes, lambda record: {"id": record["custom_id"]})
    with writer:
        for record in records:
            writer.write(record)


def test_generate_file(tmp_path):
    path = tmp_path / "out.h5"
    write_all(path, RECORDS, command="generate", layout={"tp": 2}, steps=3)
    assert os.listdir(tmp_path) == ["out.h5"]
    with h5py.File(path) as f:
        assert (f.attrs["format"], f.attrs["format_version"]) == ("hpcinfer-results", 1)
        assert (f.attrs["kind"], f.attrs["complete"], f.attrs["steps"]) == ("generate", True, 3)
        assert json.loads(f.attrs["layout"]) == {"tp": 2}
        assert f["index"][:].tolist() == [0, 1, 2] and f["line"][:].tolist() == [1, 2, 3]
        assert f["custom_id"].asstr()[:].tolist() == ["r-0", "", "r-2"]
        assert f["error"].asstr()[:].tolist() == ["", "no JSON", ""]
        assert f["prompt_offsets"][:].tolist() == [0, 0, 0, 1]
        assert f["prompt_token_ids"][:].tolist() == [5]
        assert f["choice_offsets"][:].tolist() == [0, 2, 2, 3]
        assert f["choice_index"][:].tolist() == [0, 1, 0]
        assert f["text"].asstr()[:].tolist() == ["a\ufffdb", "", "zwei ü"]
        assert f["finish_reason"].asstr()[:].tolist() == ["stop"] * 3
        assert f["token_offsets"][:].tolist() == [0, 1, 1, 3]
        assert f["token_ids"][:].tolist() == [9, 7, 8]
        np.testing.assert_array_equal(f["logprobs"][:], [np.nan, -0.5, -1.5])
        assert f["top_ids"][:].tolist() == [[-1, -1], [7, 1], [3, -1]]
        np.testing.assert_array_equal(
            f["top_logprobs"][:],
            np.array([[np.nan, np.nan], [-0.5, -2], [-0.1, np.nan]], np.float32),
        )
        assert f["token_ids"].dtype == np.int32 and f["logprobs"].dtype == np.float32
        assert f["text"].dims[0].label == "choice" and f["top_ids"].dims[0].label == "token"
        assert all(f[name].attrs["description"] for name in f)


def test_five_lines_read_it(tmp_path):
    """The five lines of the module's docstring, as they stand there."""
    write_all(tmp_path / "results.h5", RECORDS)
    lines = results_module.__doc__.split("five lines::\n\n")[1].split("\n\n")[0].splitlines()
    assert len(lines) == 5
    code = "\n".join(line[4:] for line in lines).replace("results.h5", str(tmp_path / "results.h5"))
    printed = []
    exec(code, {"print": lambda *words: printed.append(words)})
    assert printed == [("r-0", "a\ufffdb", ""), ("",), ("r-2", "zwei ü")]


def test_score_file(tmp_path):
    records = [scored(1, [4, 5, 6], [None, -1.0, -0.25]), failed(0), scored(2, [4, 4], [None, -3])]
    write_all(tmp_path / "out.h5", records, "score")
    with h5py.File(tmp_path / "out.h5") as f:
        assert f["index"][:].tolist() == [0, 1, 2]
        assert f["token_offsets"][:].tolist() == [0, 0, 3, 5]
        assert f["token_ids"][:].tolist() == [4, 5, 6, 4, 4]
        np.testing.assert_array_equal(f["logprobs"][:], [np.nan, -1, -0.25, np.nan, -3])
        np.testing.assert_array_equal(f["sum_logprob"][:], [np.nan, -1.25, -3])
        np.testing.assert_allclose(f["perplexity"][1:], np.exp([0.625, 3]))
        assert "text" not in f


def test_more_records_than_one_batch(tmp_path):
    """Offsets run on over batches; no, one and several choices alternate."""
    n = 2 * BATCH_RECORDS + 7
    order = np.random.default_rng(1).permutation(n).tolist()
    records = [
        generated(i, range(i % 4), [choice(c, f"{i}.{c}", [i] * (i % 5)) for c in range(i % 3)])
        for i in order
    ]
    write_all(tmp_path / "out.h5", records)
    with h5py.File(tmp_path / "out.h5") as f:
        choices, tokens = f["choice_offsets"][:], f["token_offsets"][:]
        text, ids, prompts = f["text"].asstr()[:], f["token_ids"][:], f["prompt_offsets"][:]
        assert f["index"][:].tolist() == list(range(n)) and len(tokens) == len(text) + 1
        for i in range(n):
            assert prompts[i + 1] - prompts[i] == i % 4
            assert choices[i + 1] - choices[i] == i % 3
            for c, k in enumerate(range(choices[i], choices[i + 1])):
                assert text[k] == f"{i}.{c}"
                assert ids[tokens[k] : tokens[k + 1]].tolist() == [i] * (i % 5)


def test_no_records(tmp_path):
    for kind in ("generate", "score"):
        write_all(tmp_path / "out.h5", [], kind)
        with h5py.File(tmp_path / "out.h5") as f:
            assert len(f["index"]) == 0 and f["token_offsets"][:].tolist() == [0]
    write_all(tmp_path / "out.jsonl", [])
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_the_file_follows_the_run(tmp_path, monkeypatch):
    path = tmp_path / "out.h5"
    writer = Hdf5Writer(path, "generate", {})

    def indices():
        with h5py.File(path) as f:
            assert not f.attrs["complete"]
            return f["index"][:].tolist()

    # Empty at once, then with the first record
    assert indices() == []
    writer.write(RECORDS[0])
    assert indices() == [2]

    # Later records stand in the journal until a refresh is cheap again
    clock_s = time.perf_counter()
    monkeypatch.setattr(results_module.time, "perf_counter", lambda: clock_s)
    writer._refreshed_s, writer._cost_s = clock_s, 0.01
    writer.write(RECORDS[1])
    clock_s += 0.49
    writer.write(RECORDS[1])
    assert indices() == [2]
    journal = (tmp_path / "out.h5.journal").read_text().splitlines()
    assert [json.loads(line)["index"] for line in journal] == [2, 1, 1]
    clock_s += 0.02
    writer.write(RECORDS[2])
    assert indices() == [2, 1, 0]

    # An unfinished run keeps its journal, a finished one does not
    writer.close(final=False)
    assert indices() == [2, 1, 0] and (tmp_path / "out.h5.journal").exists()


def test_resumed_h5(tmp_path):
    path, journal = tmp_path / "out.h5", tmp_path / "out.h5.journal"
    with pytest.raises(KeyError), open_results(path, "generate", {}, dict) as writer:
        writer.write(RECORDS[0])
        writer.write(RECORDS[1])
        raise KeyError
    with open(journal, "ab") as file:
        file.write(b'{"index": 0, "torn')
    with open_results(path, "generate", {}, dict, resume=True) as writer:
        assert set(writer.done) == {1, 2}
        with h5py.File(path) as f:
            assert f["index"][:].tolist() == [2, 1]
        writer.write(RECORDS[2])
    assert sorted(os.listdir(tmp_path)) == ["out.h5"]
    write_all(tmp_path / "once.h5", RECORDS)
    with h5py.File(path) as a, h5py.File(tmp_path / "once.h5") as b:
        assert set(a) == set(b)
        for name in a:
            np.testing.assert_array_equal(a[name][()], b[name][()])

    # What was finished stays as it is, with or without the journal that a kill has left.
    content = path.read_bytes()
    for leftover in (None, "no result\n"):
        if leftover:
            journal.write_text(leftover)
        with open_results(path, "generate", {}, dict, resume=True, least=3) as writer:
            assert writer.done == {0, 1, 2}
            writer.write(RECORDS[0])
        assert path.read_bytes() == content and not journal.exists()


def test_jsonl_is_ordered_at_the_end(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("of an earlier run\n")
    writer = open_results(path, "generate", {}, lambda r: {"id": r["custom_id"], "x": "ü\n"})
    for index, record in zip((2, 1, 0), RECORDS, strict=True):
        writer.write(record)
        assert json.loads(path.read_bytes().splitlines()[-1])["id"] == record["custom_id"]
        assert index in writer.done
    writer.close()
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert [line["id"] for line in lines] == ["r-0", "", "r-2"] and lines[0]["x"] == "ü\n"
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_resumed_jsonl(tmp_path):
    path = tmp_path / "out.jsonl"
    with JsonlWriter(path) as writer:
        writer.write(3, {"i": 3})
        writer.write(1, b'{"i": 1}')
        writer.write(9, {"i": 9})
        writer.close(final=False)
    with open(path, "ab") as file:
        file.write(b'{"i": 2')
    with JsonlWriter(path, resume=True, least=3) as writer:
        assert set(writer.done) == {1, 3, 9}
        writer.write(2, {"i": 2})
        writer.write(2, {"i": 2, "again": True})
        writer.sync()
    expected = [b'{"i": 1}', b'{"i": 2, "again": true}', b'{"i": 3}', b'{"i": 9}']
    assert path.read_bytes().splitlines() == expected
    assert os.listdir(tmp_path) == ["out.jsonl"]


def unfinished_jsonl(path, n=5):
    """Lines of an unfinished file, and the entries of its index."""
    writer = JsonlWriter(path)
    for i in range(n):
        writer.write(n - i, {"i": n - i, "text": "x" * i})
    writer.close(final=False)
    index = Path(writer.index_path)
    return path.read_bytes().splitlines(True), index.read_bytes().splitlines(True), index


@pytest.mark.parametrize("kind", ["line", "entry", "zeros", "half entry", "foreign"])
@pytest.mark.parametrize("kept", [0, 1, 4])
def test_a_torn_tail_is_cut_off(tmp_path, kind, kept):
    """Of the first record that is not whole and all after it nothing is taken."""
    path = tmp_path / "out.jsonl"
    lines, entries, index = unfinished_jsonl(path)
    if kind == "line":
        path.write_bytes(b"".join(lines[:kept]) + lines[kept][:-2])
    elif kind == "zeros":
        path.write_bytes(b"".join(lines[:kept]) + bytes(len(b"".join(lines[kept:]))))
    elif kind == "foreign":
        index.write_bytes(b"".join(entries[:kept]) + b"no entry\n" + b"".join(entries[kept:]))
    else:
        torn = entries[kept][:-3] if kind == "half entry" else b""
        index.write_bytes(b"".join(entries[:kept]) + torn)
    with pytest.raises(ValueError, match=f"got {kept} whole records .* need the {kept + 1} "):
        JsonlWriter(path, resume=True, least=kept + 1)
    with JsonlWriter(path, resume=True, least=kept) as writer:
        assert set(writer.done) == {5 - i for i in range(kept)}
        for i in range(kept, 5):
            writer.write(5 - i, lines[i][:-1])
    assert path.read_bytes() == b"".join(reversed(lines))


def test_killed_between_ordering_and_the_end(tmp_path):
    """The lines are in input order already, the index is not."""
    path = tmp_path / "out.jsonl"
    lines, entries, index = unfinished_jsonl(path)
    path.write_bytes(b"".join(reversed(lines)))
    with JsonlWriter(path, resume=True, least=5) as writer:
        assert set(writer.done) == {1, 2, 3, 4, 5}
        writer.write(0, {"i": 0})
    assert path.read_bytes() == b'{"i": 0}\n' + b"".join(reversed(lines))


def test_encode():
    record = {"a": np.float32(0.5), "b": np.arange(2), "c": [float("-inf"), (1.0, np.nan)]}
    assert json.loads(encode(record)) == {"a": 0.5, "b": [0, 1], "c": [None, [1.0, None]]}
    assert json.loads(encode(record, strict=False))["c"][0] == -np.inf
    assert json.loads(encode({"a": "\ud800ü\u2028"})) == {"a": "\ud800ü\u2028"}
    with pytest.raises(TypeError, match="plain values"):
        encode({"a": object()})


def test_text_that_is_no_unicode(tmp_path):
    write_all(tmp_path / "out.h5", [generated(0, (), [choice(0, "a\udc80", [1])])])
    with h5py.File(tmp_path / "out.h5") as f:
        assert f["text"].asstr()[0] == "a?"


def test_contradictory_records_are_refused(tmp_path):
    with Hdf5Writer(tmp_path / "out.h5", "generate", {}) as writer:
        for name in ("logprobs", "top_logprobs"):
            with pytest.raises(ValueError, match=f"1 {name} for 2 tokens"):
                writer.write(generated(0, (), [choice(0, "x", [1, 2], **{name: [[]]})]))
    with Hdf5Writer(tmp_path / "out.h5", "score", {}) as writer:
        with pytest.raises(ValueError, match="1 logprobs for 2 tokens"):
            writer.write(scored(0, [1, 2], [None]))


def test_wrong_outputs(tmp_path):
    for name in ("out.txt", "out", "out.hdf5"):
        with pytest.raises(ValueError, match="jsonl or .h5"):
            open_results(tmp_path / name, "generate", {}, dict)
    with pytest.raises(ValueError, match="kind"):
        open_results(tmp_path / "out.h5", "train", {}, dict)
    for extension in (".h5", ".jsonl"):
        (tmp_path / f"folder{extension}").mkdir()
        with pytest.raises(RuntimeError, match="it is a folder"):
            open_results(tmp_path / f"folder{extension}", "generate", {}, dict)
        with pytest.raises(RuntimeError, match="does not exist"):
            open_results(tmp_path / "absent" / f"out{extension}", "generate", {}, dict)
        with open_results(tmp_path / f"out{extension}", "generate", {}, dict):
            with pytest.raises(RuntimeError, match="another run"):
                open_results(tmp_path / f"out{extension}", "generate", {}, dict)


def test_full_disk(tmp_path):
    os.symlink("/dev/full", tmp_path / "out.jsonl")
    writer = JsonlWriter(tmp_path / "out.jsonl")
    with pytest.raises(RuntimeError, match="out.jsonl: no space left") as caught:
        writer.write(0, {"a": 1})
    assert "\n" not in str(caught.value)
    writer.close(final=False)


@pytest.mark.parametrize("code, word", [
    (errno.EROFS, "read-only"), (errno.EDQUOT, "quota"), (errno.EIO, "Input/output error"),
])  # fmt: skip
def test_remedies(code, word):
    with pytest.raises(RuntimeError, match=f"cannot write out.h5: .*{word}"), writing("out.h5"):
        raise OSError(code, os.strerror(code))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    for name in ("out.h5", "out.jsonl"):
        with pytest.raises(RuntimeError, match="permission denied"):
            open_results(tmp_path / name, "generate", {}, dict)


def test_describe_results(tmp_path):
    write_all(tmp_path / "g.h5", RECORDS, model="data/model")
    text = describe(tmp_path / "g.h5")
    facts = dict(line.strip().split("  ", 1) for line in text.splitlines()[1:] if "  " in line[2:])
    facts = {word: value.strip() for word, value in facts.items()}
    expected = {"kind": "results of generate", "requests": "3", "finished": "2", "errors": "1",
                "tokens": "3", "choices": "3", "prompt tokens": "1", "model": "data/model",
                "complete": "True"}  # fmt: skip
    assert expected.items() <= facts.items()
    write_all(tmp_path / "s.h5", [scored(0, [1, 2], [None, -1])], "score")
    assert "results of score" in describe(tmp_path / "s.h5")
    with h5py.File(tmp_path / "s.h5", "r+") as f:
        del f["error"]
    with pytest.raises(ValueError, match="damaged"):
        describe(tmp_path / "s.h5")


# ------------------------------------------------------------------------------ killed runs

KILLED = """
import os, signal, sys
from hpcinfer.io.results import open_results

writer = open_results(sys.argv[1], "generate", {}, lambda record: record)
for index in range(10**9):
    writer.write({"index": index, "line": index + 1, "custom_id": str(index), "error": None,
        "prompt_token_ids": [1], "choices": [{"index": 0, "text": "x" * 50, "finish_reason": "stop",
        "token_ids": [index], "logprobs": None, "top_logprobs": None}]})
    if index == 200:
        print("running", flush=True)
"""


@pytest.mark.single
@pytest.mark.parametrize("delay_s", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("name", ["out.h5", "out.jsonl"])
def test_kill(tmp_path, name, delay_s):
    """After SIGKILL the .h5 opens, and every record handed over stands in the lines."""
    path = tmp_path / name
    job = subprocess.Popen([sys.executable, "-c", KILLED, path], stdout=subprocess.PIPE)
    assert job.stdout.readline() == b"running\n"
    time.sleep(delay_s)
    job.send_signal(signal.SIGKILL)
    job.wait(20)
    job.stdout.close()

    lines = path if name.endswith(".jsonl") else tmp_path / f"{name}.journal"
    complete = lines.read_bytes().split(b"\n")[:-1]
    indices = [json.loads(line)["index"] for line in complete]
    assert len(indices) > 200 and indices == list(range(len(indices)))
    if name.endswith(".h5"):
        with h5py.File(path) as f:
            n = len(f["index"])
            assert 1 <= n <= len(indices) and f["token_ids"][:].tolist() == list(range(n))
        open_results(path, "generate", {}, dict, resume=True).close()
        with h5py.File(path) as f:
            # The last line counts only if its entry in the index was written too
            assert f["token_ids"][:].tolist() in (indices, indices[:-1]) and f.attrs["complete"]


FULL_DISK = """
import resource, sys
from hpcinfer.io.results import open_results

writer = open_results(sys.argv[1], "generate", {}, dict)
resource.setrlimit(resource.RLIMIT_FSIZE, (600_000,) * 2)
try:
    with writer:
        for index in range(100_000):
            writer.write({"index": index, "line": 1, "custom_id": "", "error": None,
                "prompt_token_ids": list(range(50)), "choices": []})
except RuntimeError as error:
    print(error)
"""


@pytest.mark.single
def test_a_full_disk_costs_one_line(tmp_path):
    """A limit on the size of files stands for the full disk; HDF5 alone would crash."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path / "out.h5"],
        capture_output=True, text=True, timeout=50,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert len(done.stdout.splitlines()) == 1 and "size limit" in done.stdout
    with h5py.File(tmp_path / "out.h5") as f:
        assert len(f["index"]) >= 1
    lines = (tmp_path / "out.h5.journal").read_bytes().split(b"\n")
    assert lines.pop() == b"" and all(json.loads(line) for line in lines)
