"""The command as users start it: answers, reports, exit codes, and how it ends when a rank dies."""

import json
import os
import re
import signal
import sys
import time

import h5py
import numpy as np
import pytest
from helpers.jobs import (
    HPCINFER,
    alive,
    kill_tree,
    launch,
    ranks_of,
    run_job,
    wait_for,
)
from helpers.lines import (
    BAD,
    KV,
    LINES,
    NAMES,
    STORY,
    finished_lines,
    read_jsonl,
    refused,
    write_lines,
)
from helpers.paths import SHIPPED
from helpers.speed import scaled
from pytest import approx

from hpcinfer import partition
from hpcinfer.cli import main as main_module
from hpcinfer.io.models import open_checkpoint
from hpcinfer.model.families import read_architecture
from hpcinfer.model.weights.table import table

pytestmark = pytest.mark.single


def choices(path):
    """Custom id with the choices of every line: text, tokens, end; None for an error."""
    return [
        (
            line["custom_id"],
            line["response"]
            and [
                (choice["text"], choice["token_ids"], choice["finish_reason"])
                for choice in line["response"]["body"]["choices"]
            ],
        )
        for line in read_jsonl(path)
    ]


# Words of the report that follow from the input
END = {"generate": {"refused", "line", "cut"}, "score": {"score"}}


class Runs:
    """Runs of the command on the shipped model, each made when it is first asked for."""

    def __init__(self, folder):
        self.folder, self.done = folder, {}
        self.input = write_lines(folder / "input.jsonl", LINES)
        self.texts = folder / "texts.txt"
        self.texts.write_text(f"{STORY}\nWhat is 2 + 3? 5\r\n\nA\n{STORY} {STORY}\n")

    def model(self, form):
        """The shipped model as a directory, or converted once."""
        if form == "directory":
            return SHIPPED
        path = self.folder / "model.h5"
        self.once("convert", 1, "convert", SHIPPED, path)
        return path

    def generate(self, ranks, form="directory"):
        """Finished command, results .jsonl and .h5."""
        return self.run("generate", self.input, ranks, form, "--max-tokens", 8, "--seed", 3)

    def score(self, ranks, form="directory"):
        return self.run("score", self.texts, ranks, form)

    def run(self, command, source, ranks, form, *options):
        name = f"{command}-{ranks}-{form}"
        outputs = self.folder / f"{name}.jsonl", self.folder / f"{name}.h5"
        done = self.once(
            name, ranks, command, self.model(form), "--input", source, *KV, "--dtype", "float32",
            "--output", outputs[0], "--output", outputs[1], "--layout", f"tp={ranks}", *options,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done, *outputs

    def once(self, name, ranks, *arguments):
        if name not in self.done:
            self.done[name] = run_job(ranks, *HPCINFER, *arguments)
        return self.done[name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("cli"))


# --- Generate ------------------------------------------------------------------------------------


def test_generate_answers_every_form_of_line(runs):
    done, jsonl, h5 = runs.generate(1)
    lines = read_jsonl(jsonl)
    assert [line["custom_id"] for line in lines] == NAMES
    for i, line in enumerate(lines):
        if i not in BAD:
            assert line["error"] is None and line["response"]["status_code"] == 200
            continue
        number, message = BAD[i]
        assert line["response"] is None
        assert line["error"]["line"] == number and message in line["error"]["message"]

    # Each as it asked
    answers = {i: line["response"]["body"]["choices"] for i, line in enumerate(lines[:6])}
    assert [len(answer) for answer in answers.values()] == [1, 1, 2, 1, 1, 1]
    assert len(answers[0][0]["token_ids"]) == 6 and answers[0][0]["finish_reason"] == "length"
    assert len(answers[0][0]["logprobs"]["token_logprobs"]) == 6
    assert answers[1][0]["message"]["content"] == answers[1][0]["text"]
    assert len(answers[1][0]["logprobs"]["content"]) == 6
    assert [choice["index"] for choice in answers[2]] == [0, 1]
    assert len(answers[3][0]["token_ids"]) == 4
    usage = lines[3]["response"]["body"]["usage"]
    assert usage == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert lines[0]["response"]["body"]["model"] == "model"


def test_both_outputs_hold_the_same(runs):
    _, jsonl, h5 = runs.generate(1)
    lines = read_jsonl(jsonl)
    with h5py.File(h5) as f:
        assert bool(f.attrs["complete"]) and f.attrs["kind"] == "generate"
        assert f.attrs["layout"].endswith("tp=1") and "--max-tokens 8" in f.attrs["command"]
        assert f.attrs["seed"] == 3 and f.attrs["dtype"] == "float32"
        names, errors = f["custom_id"].asstr()[:], f["error"].asstr()[:]
        first, at = f["choice_offsets"][:], f["token_offsets"][:]
        text, ends = f["text"].asstr()[:], f["finish_reason"].asstr()[:]
        tokens, logprobs = f["token_ids"][:], f["logprobs"][:]
        assert names.tolist() == NAMES
        assert f["line"][:].tolist() == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12]
        assert f["prompt_token_ids"][f["prompt_offsets"][3] : f["prompt_offsets"][4]].tolist() == [
            12, 7, 99,
        ]  # fmt: skip
    for i, line in enumerate(lines):
        if line["response"] is None:
            assert errors[i] == line["error"]["message"] and first[i] == first[i + 1]
            continue
        for c, choice in zip(
            range(first[i], first[i + 1]), line["response"]["body"]["choices"], strict=True
        ):
            own = slice(at[c], at[c + 1])
            assert (text[c], ends[c]) == (choice["text"], choice["finish_reason"])
            assert tokens[own].tolist() == choice["token_ids"]
            if i == 0:
                assert logprobs[own] == approx(choice["logprobs"]["token_logprobs"])
            elif i == 2:
                assert np.isnan(logprobs[own]).all()


@pytest.mark.parametrize(
    ("ranks", "form"), [(2, "directory"), (3, "directory"), (2, "h5"), (3, "h5")]
)
def test_answers_do_not_depend_on_ranks_nor_on_the_models_form(runs, ranks, form):
    _, jsonl, h5 = runs.generate(ranks, form)
    _, expected, expected_h5 = runs.generate(1)
    assert choices(jsonl) == choices(expected)
    with h5py.File(h5) as f, h5py.File(expected_h5) as g:
        np.testing.assert_array_equal(f["token_ids"], g["token_ids"])
        np.testing.assert_allclose(f["logprobs"], g["logprobs"], atol=1e-4)
        np.testing.assert_allclose(f["top_logprobs"], g["top_logprobs"], atol=1e-4)
        assert f.attrs["model_checksum"] == g.attrs["model_checksum"]


@pytest.mark.parametrize("command", ["generate", "score"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_report_is_printed_once(runs, command, ranks):
    done = getattr(runs, command)(ranks)[0]
    words = [line.split()[0] for line in done.stdout.splitlines()]
    phases = ["prefill", "decode"] if command == "generate" else ["prefill"]
    first = ["layout", "load", *phases, "cache", "memory", "memory"]
    assert words[: len(first)] == first
    assert words.count("done") == 1 and words[-1] == "done"
    assert set(words[len(first) : -1]) == ({"mpi"} if ranks > 1 else set()) | END[command]
    assert f"tp={ranks} on cpu, float32" in done.stdout
    counts = "6 requests finished, 5 refused" if command == "generate" else "4 requests finished"
    assert counts in done.stdout
    assert done.stderr.count(f"{command}: 100%") == 1


def sizes(text):
    """Bytes of every size in a text."""
    units = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}
    return [float(n) * units[unit] for n, unit in re.findall(r"([\d.]+) ([kMG]?B)\b", text)]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_report_says_what_each_rank_read(runs, ranks):
    """In all at most 1.05 times the file, and what is replicated by design."""
    with open_checkpoint(SHIPPED) as checkpoint:
        arch = read_architecture(checkpoint.config)
        file_bytes = checkpoint.file_bytes
    rows, width = table(arch), 2
    whole = sum(width * int(np.prod(row.shape)) for row in rows if row.cut is None)
    copies = sum(heads.n_kv for heads in partition.heads(arch.H, arch.G, ranks)) / arch.G - 1
    kv = sum(width * int(np.prod(row.shape)) for row in rows if row.cut == "kv")
    (line,) = re.findall(r"^load .*$", runs.generate(ranks)[0].stdout, re.MULTILINE)
    share = float(re.search(r"sum ([\d.]+) x", line).group(1))
    assert share * file_bytes <= 1.05 * file_bytes + (ranks - 1) * whole + copies * kv
    per_rank = sizes(line)
    assert per_rank[-1] == approx(file_bytes, rel=1e-3)
    assert max(per_rank[:-1]) < 1.3 * file_bytes / ranks


# --- Score, text, convert, inspect ---------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "form"), [(1, "directory"), (2, "directory"), (3, "h5")])
def test_score(runs, ranks, form):
    _, jsonl, h5 = runs.score(ranks, form)
    lines = read_jsonl(jsonl)
    expected = read_jsonl(runs.score(1)[1])
    assert len(lines) == 4
    with h5py.File(h5) as f:
        at, logprobs = f["token_offsets"][:], f["logprobs"][:]
        perplexity = f["perplexity"][:]
        assert f["line"][:].tolist() == [1, 2, 4, 5]
    for i, (line, other) in enumerate(zip(lines, expected, strict=True)):
        assert line["token_ids"] == other["token_ids"]
        assert line["logprobs"][0] is None
        assert line["logprobs"][1:] == approx(other["logprobs"][1:], abs=1e-4)
        assert logprobs[at[i] : at[i + 1]][1:] == approx(line["logprobs"][1:], abs=1e-6)
        assert line["sum_logprob"] == approx(sum(line["logprobs"][1:]), abs=1e-3)
        if line["perplexity"] is None:
            assert len(line["token_ids"]) == 1 and np.isnan(perplexity[i])
        else:
            assert line["perplexity"] == approx(perplexity[i])


def test_lines_of_text_are_prompts(runs, tmp_path):
    """Line ends are no part of a prompt, and blank lines are no prompt."""
    out = tmp_path / "out.jsonl"
    done = run_job(
        2, *HPCINFER, "generate", SHIPPED, "--input", runs.texts, "--output", out, *KV,
        "--max-tokens", 3, "--temperature", 0, "--ignore-eos", "--n", 2, "--show",
        "--trace", tmp_path / "trace",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = choices(out)
    assert [name for name, _ in answers] == [f"request-{i}" for i in range(4)]
    assert all(len(tokens) == 3 for _, found in answers for _, tokens, _ in found)
    assert all(len(found) == 2 for _, found in answers)

    # Each prompt is shown once with its answers; every rank has its timeline
    assert done.stdout.count("[request-1] 'What is 2 + 3? 5'\n") == 1
    assert done.stdout.count("    > ") == 8
    for rank in range(2):
        events = json.loads((tmp_path / "trace" / f"rank-{rank}.json").read_text())["traceEvents"]
        assert {event["name"].split()[0] for event in events} >= {"Allreduce", "Allgather"}


def test_convert_says_what_it_wrote(runs):
    path = runs.model("h5")
    done = runs.done["convert"]
    assert done.returncode == 0
    assert re.search(r"model.h5: \d+ tensors, [\d.]+ MB in [\d.]+ s", done.stdout)
    with open_checkpoint(path) as converted, open_checkpoint(SHIPPED) as original:
        assert converted.checksum == original.checksum


@pytest.mark.parametrize("ranks", [1, 2])
def test_inspect(runs, mpirun, ranks):
    """Model directory, converted model, results; printed by one rank."""
    _, _, results = runs.generate(1)
    for path, words in (
        (SHIPPED, ["Hugging Face directory", "llama"]),
        (runs.model("h5"), ["converted model", "llama"]),
        (results, ["results of generate", "11", "choices"]),
    ):
        if ranks > 1 and path != results:
            continue
        done = mpirun(ranks, *HPCINFER, "inspect", path)
        assert done.returncode == 0 and done.stderr == ""
        assert done.stdout.count(str(path)) >= 1
        assert done.stdout.count(words[0]) == 1
        assert all(word in done.stdout for word in words)


def test_help_and_version_are_printed_once(mpirun):
    done = mpirun(2, *HPCINFER, "--version")
    assert (done.returncode, done.stdout.count("hpcinfer")) == (0, 1)
    done = mpirun(2, *HPCINFER, "generate", "--help")
    assert (done.returncode, done.stdout.count("usage:")) == (0, 1)
    for option in ("--layout", "--kv-memory", "--seed", "--trace", "--top-p", "--ignore-eos"):
        assert option in done.stdout


# --- Refusals ------------------------------------------------------------------------------------


def test_the_command_alone_shows_its_help_once(mpirun):
    done = mpirun(2, *HPCINFER)
    assert done.returncode == 2 and done.stderr == ""
    assert done.stdout.count("usage: hpcinfer") == 1 and "generate" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "got 'frobnicate', need one of generate"),
        (["generate", "{model}"], "the following arguments are required: --input, --output"),
        (["convert", "{model}"], "the following arguments are required: OUT.h5"),
        (["{run}", "--nonsense"], "got the unknown option --nonsense"),
        (["{run}", "--layout", "xp=2"], "layout: got 'xp=2', need WORD=VALUE"),
        (["{run}", "--layout", "tp=3"], "which is 3 ranks, need 2 as launched"),
        (["{run}", "--layout", "ep=2"], "need another: ep spreads experts, and llama has none"),
        (["{run}", "--kv-memory", "5Q"], "got size '5Q', need a number with unit"),
        (["{run}", "--kv-memory", "0G"], "got size '0G', need more than nothing"),
        (["{run}", "--step-tokens", "0"], "got '0', need a whole number of 1 or more"),
        (["{run}", "--sequences", "-3"], "got '-3', need a whole number of 1 or more"),
        (["{run}", "--seed", "1e99"], "got seed '1e99', need a whole number"),
        (["{run}", "--max-tokens", "many"], "got 'many', need a whole number"),
        (["{run}", "--temperature", "-1"], "sampling: got temperature = -1.0, need"),
        (["{run}", "--top-p", "nan"], "sampling: got top_p = nan, need"),
        (["{run}", "--dtype", "int8"], "got 'int8', need one of float32"),
        (["{run}", "--device", "tpu"], "got 'tpu', need one of cpu"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage(mpirun, tmp_path, arguments, message):
    """Exit code 2 and one line, whatever the number of ranks; no result file."""
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "a"}])
    run = ["generate", SHIPPED, "--input", source, "--output", tmp_path / "out.h5"]
    words = []
    for word in arguments:
        words += run if word == "{run}" else [word.format(model=SHIPPED)]
    refused(mpirun(2, *HPCINFER, *words), 2, message)
    assert not (tmp_path / "out.h5").exists()


def broken_model(folder, **changes):
    """A model of changed config beside the shipped weights."""
    folder.mkdir()
    for file in SHIPPED.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((SHIPPED / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


FAILURES = {
    "no model": ({"model": "nowhere"}, "checkpoint: got nowhere, need an existing model"),
    "no config": ({"model": "{tmp}"}, "checkpoint: got "),
    "no JSON": ({"config": "{"}, "config.json"),
    "unknown family": ({"changes": {"model_type": "bert"}}, "config: got model_type 'bert'"),
    "giant": ({"changes": {"num_hidden_layers": 10**6}}, "config: got num_hidden_layers=1000000"),
    "wide": ({"changes": {"hidden_size": 2**30}}, "weights: got model.embed_tokens.weight of"),
    "no input": ({"input": "none.jsonl"}, "input: cannot read none.jsonl: No such file"),
    "other input": ({"input": "{tmp}/in.csv"}, "need a name that ends in .jsonl or .txt"),
    "empty input": ({"lines": []}, "input: got no request in"),
    "no folder": ({"output": "{tmp}/no/out.h5"}, "need a folder that exists and can be written"),
    "other output": ({"output": "{tmp}/out.csv"}, "need a name that ends in .h5 or .jsonl"),
    "small cache": ({"options": ["--kv-memory", "9"]}, "kv-memory: got 9 bytes, need"),
    "no GPU": ({"options": ["--device", "cuda"]}, "device: got cuda, need a visible GPU"),
    "all bad": ({"lines": [{"prompt": ""}, "x"]}, "got 2 requests in"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures(mpirun, tmp_path, name):
    """Exit code 1 and one line."""
    given, message = FAILURES[name]
    if name == "no GPU" and os.path.exists("/dev/nvidia0"):
        pytest.skip("there is one")
    source = write_lines(tmp_path / "in.jsonl", given.get("lines", [{"prompt": "a"}]))
    if given.get("lines") == []:
        source.write_text("\n")
    (tmp_path / "in.csv").write_text("a\n")
    model = given.get("model", SHIPPED)
    if "changes" in given or "config" in given:
        model = broken_model(tmp_path / "model", **given.get("changes", {}))
    if "config" in given:
        (model / "config.json").write_text(given["config"])
    words = [
        "generate",
        str(model).format(tmp=tmp_path),
        "--input",
        given.get("input", str(source)).format(tmp=tmp_path),
        "--output",
        given.get("output", "{tmp}/out.jsonl").format(tmp=tmp_path),
        *given.get("options", KV),
    ]
    refused(mpirun(2, *HPCINFER, *words), 1, message)


def test_all_bad_lines_are_in_the_output_all_the_same(mpirun, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": ""}, "x"])
    outputs = [tmp_path / "out.jsonl", tmp_path / "out.h5"]
    done = mpirun(
        1, *HPCINFER, "generate", SHIPPED, "--input", source, *KV,
        "--output", outputs[0], "--output", outputs[1],
    )  # fmt: skip
    refused(done, 1, "and none that can be run, need at least one")
    assert [line["error"]["line"] for line in read_jsonl(outputs[0])] == [1, 2]
    with h5py.File(outputs[1]) as f:
        assert (f["error"].asstr()[:] != "").all() and len(f["error"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["convert", "nowhere", "{tmp}/m.h5"], "checkpoint: got nowhere"),
        (["convert", "{model}", "{tmp}/no/m.h5"], "its folder does not exist"),
        (["inspect", "{tmp}/in.h5"], "need an existing model directory"),
    ],
)
def test_failures_of_one_rank_commands(mpirun, tmp_path, words, message):
    write_lines(tmp_path / "in.jsonl", [{"prompt": "a"}])
    words = [word.format(tmp=tmp_path, model=SHIPPED) for word in words]
    refused(mpirun(2, *HPCINFER, *words), 1, message)


# --- One rank fails or dies ----------------------------------------------------------------------

FAILING = """
import sys
from mpi4py import MPI
from hpcinfer.cli.main import main
{imports}
if MPI.COMM_WORLD.rank == {rank}:
    def fail(*_, **__):
        raise {error}
    {target} = fail
main(sys.argv[1:])
"""


def run_failing(mpirun, tmp_path, **parts):
    """`hpcinfer generate` on 3 ranks, of which one alone fails at some place."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(**parts))
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "a"}])
    return mpirun(
        3, sys.executable, script, "generate", SHIPPED, "--input", source,
        "--output", tmp_path / "out.jsonl", *KV,
    )  # fmt: skip


@pytest.mark.parametrize("rank", [0, 2])
def test_one_rank_that_cannot_read_the_model_ends_all(mpirun, tmp_path, rank):
    done = run_failing(
        mpirun,
        tmp_path,
        rank=rank,
        imports="from hpcinfer.io.checkpoint import Checkpoint",
        target="Checkpoint.read",
        error='OSError(5, "Input/output error", "model.safetensors")',
    )
    refused(done, 1, "file: Input/output error: model.safetensors")


def test_an_exit_of_one_rank_ends_all(monkeypatch, capsys):
    """As a library may do: only where others wait is it more than an exit."""
    monkeypatch.setattr(main_module.inspect, "run", lambda _: sys.exit(3))
    with pytest.raises(SystemExit, match="3"):
        main_module.main(["inspect"])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(main_module, "_in_parallel", lambda: True)
    monkeypatch.setattr(main_module, "abort", lambda code: sys.exit(f"abort {code}"))
    with pytest.raises(SystemExit, match="abort 1"):
        main_module.main(["inspect"])
    assert capsys.readouterr().err == "hpcinfer: SystemExit: 3\n"


PANIC = 'type("PanicException", (BaseException,), {})("called unwrap")'


@pytest.mark.parametrize(
    ("rank", "error", "line"),
    [
        (
            0,
            'MemoryError("got a full device")',
            "hpcinfer: memory: got a full device; use more ranks or a smaller --kv-memory",
        ),
        (2, PANIC, "hpcinfer (rank 2): PanicException: called unwrap"),
    ],
    ids=["error", "panic"],
)
def test_one_rank_that_fails_in_a_step_ends_all(mpirun, tmp_path, rank, error, line):
    """The others wait for it in a collective: the job is aborted."""
    done = run_failing(
        mpirun,
        tmp_path,
        rank=rank,
        imports="from hpcinfer.model.cache import Cache",
        target="Cache.place_heads",
        error=error,
    )
    assert done.returncode != 0 and done.seconds < scaled(20)
    assert [text for text in done.stderr.splitlines() if text.startswith("hpcinfer")] == [line]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("victim", ["first", "last"])
def test_a_killed_rank_ends_all_and_leaves_what_was_finished(tmp_path, victim):
    short = [{"custom_id": f"short-{i}", "prompt": "a", "max_tokens": 2 + i} for i in range(5)]
    long = [{"custom_id": f"long-{i}", "prompt": STORY, "max_tokens": 900} for i in range(3)]
    lines = [line | {"ignore_eos": True} for line in short + long]
    source = write_lines(tmp_path / "in.jsonl", lines)
    jsonl, h5 = tmp_path / "out.jsonl", tmp_path / "out.h5"
    job = launch(3, "generate", SHIPPED, "--input", source, "--output", jsonl, "--output", h5, *KV)
    try:
        wait_for(lambda: len(finished_lines(jsonl)) == 5, 40)
        time.sleep(0.5)
        processes = ranks_of(job)
        assert len(processes) == 3
        processes.sort(key=lambda process: int(process.environ().get("PMI_RANK", process.pid)))
        processes[0 if victim == "first" else -1].send_signal(signal.SIGKILL)

        # All are gone, the launcher too, and it says that something was wrong
        waited_s = wait_for(
            lambda: job.poll() is not None and not any(map(alive, processes)), limit_s=10
        )
        assert waited_s < scaled(10) and job.returncode != 0
    finally:
        if job.poll() is None:
            kill_tree(job.pid)

    # What was finished stands in both files; nothing else does
    names = {f"short-{i}" for i in range(5)}
    assert {line["custom_id"] for line in read_jsonl(jsonl)} == names
    with h5py.File(h5) as f:
        found = set(f["custom_id"].asstr()[:])
        assert f.attrs["kind"] == "generate" and not f.attrs["complete"]
    journal = tmp_path / "out.h5.journal"
    assert found and found <= names
    assert {line["custom_id"] for line in read_jsonl(journal)} == names
