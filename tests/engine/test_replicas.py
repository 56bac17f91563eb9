"""Replicas with one queue: every request is answered once, as one replica answers it."""

import signal
import sys
import time
from functools import partial

import h5py
import numpy as np
import pytest
from helpers import layouts
from helpers.answers import SEED, answers, error_on_all_ranks, requests, same_on_all_ranks
from helpers.jobs import HPCINFER, alive, kill_tree, launch, ranks_of, wait_for
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
from helpers.recorded import load
from helpers.speed import scaled
from mpi4py import MPI
from pytest import approx
from reference import models

import hpcinfer

SIZE = MPI.COMM_WORLD.size
CASE = "mixtral"


def with_replicas():
    """Layouts of several replicas; in those behind the first two they take steps together."""
    texts = [f"dp={SIZE}", "dp=2,tp=2", "dp=2,pp=2"]
    texts += [f"dp={SIZE},zero=allgather", f"dp={SIZE},ep={SIZE}", "dp=2,afd=2:1", "dp=2,afd=2:2"]
    return [text for text in texts if "dp=1" not in text and layouts.is_legal(text, SIZE)]


REPLICAS = with_replicas()
DENSE = [text for text in REPLICAS if "ep=" not in text]

several = pytest.mark.skipif(SIZE < 2, reason="needs two ranks")


def shipped(comm, layout, **options):
    options = {"kv_memory": 1 << 25, "dtype": "float32", "seed": SEED, "layout": layout} | options
    return hpcinfer.load(SHIPPED, comm, **options)


@pytest.fixture(scope="module")
def alone():
    """The shipped model on one rank, on every rank for itself."""
    return shipped(MPI.COMM_SELF, "tp=1")


def prompts_of(n):
    """Prompts of many lengths, some equal."""
    text = models.tokens(CASE, 150)
    return [text[i % 7 : i % 7 + 1 + (11 * i) % 40] for i in range(n)]


def answered(engine):
    """Requests that each replica has answered since it was loaded, on every rank."""
    own = engine.stats.answered if engine.grid.is_leader else None
    return [n for n in engine.grid.comm.allgather(own) if n is not None]


# --- Answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", REPLICAS)
def test_each_request_is_answered_once_and_in_order(comm, shared_path, layout):
    engine = load(comm, shared_path, CASE, layout)
    reference = load(MPI.COMM_SELF, shared_path, CASE, "tp=1")
    prompts = prompts_of(60)
    asked = {"max_tokens": 3, "temperature": 0, "ignore_eos": True}
    expected = reference.generate(prompts, **asked)
    found = engine.generate(prompts, **asked)
    assert [r.request.index for r in found] == list(range(60))
    assert [r.choices[0].token_ids for r in found] == [r.choices[0].token_ids for r in expected]
    assert sum(answered(engine)) == 60

    # Texts, of which some have one token and are over before they begin
    scores = engine.score(prompts)
    assert [list(s.request.token_ids) for s in scores] == prompts
    for score, other in zip(scores, reference.score(prompts), strict=True):
        assert score.logprobs[1:] == approx(other.logprobs[1:], abs=1e-4)
    assert sum(answered(engine)) == 120
    same_on_all_ranks(comm, [score.logprobs.tobytes() for score in scores])
    assert engine.scheduler.held == engine.scheduler.pages.held == 0


@pytest.mark.parametrize("layout", DENSE)
def test_equal_prompts_are_different_draws_wherever_they_run(comm, alone, layout):
    """A request's draws depend on what stands before it in the input, not on its replica."""
    items = ["The way was"] * 5 + requests() + ["The way was"] * 3 + [STORY] * 4
    asked = {"temperature": 1.5, "max_tokens": 5}
    expected = [[c.token_ids for c in r.choices] for r in alone.generate(items, **asked)]
    engine = shipped(comm, layout)
    found = [[c.token_ids for c in r.choices] for r in engine.generate(items, **asked)]
    assert same_on_all_ranks(comm, found) == expected
    assert len({tuple(e[0]) for e in expected[:5]}) > 1


@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize(
    "items",
    [
        [{"prompt": "a", "custom_id": "x"}, {"prompt": "b"}, {"prompt": "c", "custom_id": "x"}],
        ["a"] * 20 + [{"prompt": "a", "temprature": 1}] + ["b"] * 20 + [7],
    ],
    ids=["the same name", "two bad ones"],
)
def test_bad_items_are_refused_as_by_one_replica(comm, alone, layout, items):
    engine = shipped(comm, layout)
    with pytest.raises(ValueError) as raised:
        alone.generate(items, max_tokens=2)
    message = error_on_all_ranks(comm, partial(engine.generate, items, max_tokens=2))
    assert message == str(raised.value)

    # The engine goes on
    again = answers(engine.generate(["A"], max_tokens=3))
    assert again == answers(alone.generate(["A"], max_tokens=3))


@pytest.mark.parametrize("layout", REPLICAS)
def test_more_replicas_than_requests(comm, shared_path, layout):
    """Nobody waits for a replica that has none."""
    engine = load(comm, shared_path, CASE, layout)
    for n in (0, 1, 2):
        before = answered(engine)
        engine.generate(prompts_of(n), max_tokens=4, temperature=0, ignore_eos=True)
        assert sum(answered(engine)) - sum(before) == n


@pytest.mark.parametrize("layout", REPLICAS)
def test_the_report_is_that_of_all_replicas(comm, shared_path, layout):
    """Tokens, reused tokens and preemptions are sums, pages the most of any."""
    engine = load(comm, shared_path, CASE, layout)
    engine.generate([models.tokens(CASE, 70)] * 12, max_tokens=3, temperature=0, ignore_eos=True)
    record, scheduler, grid = engine.stats, engine.scheduler, engine.grid
    own = scheduler.reused_tokens, record.prefill.tokens, record.decode.tokens
    own = own if grid.is_leader else (0, 0, 0)
    reused, computed, decoded = map(sum, zip(*comm.allgather(own), strict=True))
    pages = max(comm.allgather(record.most_pages))
    lines = comm.bcast(record.report(engine))
    assert reused + computed + decoded == 12 * (70 + 2) and reused > 0
    (cache,) = [line for line in lines if line.startswith("cache")]
    assert f"used at most {pages} of {scheduler.pages.total} pages" in cache
    assert f"; {reused} prompt tokens reused, 0 preemptions" in cache
    (prefill,) = [line for line in lines if line.startswith("prefill")]
    assert f" {computed} tokens in" in prefill


@pytest.mark.parametrize("layout", [text for text in REPLICAS if text.count("=") > 1])
def test_a_replica_without_requests_takes_steps_with_the_others(comm, shared_path, layout):
    """Where replicas meet inside of steps they count as time that it was not busy."""
    engine = load(comm, shared_path, CASE, layout)
    engine.generate(prompts_of(1), max_tokens=4, temperature=0, ignore_eos=True)
    record, grid = engine.stats, engine.grid
    steps = record.prefill.steps + record.decode.steps
    own = (steps, record.empty_s > 0) if grid.is_leader else None
    replicas = [r for r in comm.allgather(own) if r is not None]
    assert sum(n > 0 for n, _ in replicas) == 1
    assert any(empty for _, empty in replicas) == grid.layout.lockstep


def pace_of(dp, folder):
    """Observer by which the second replica takes one step for three of each other.

    Every step is a byte in a file of the replica. Who has taken no step for a second is done.
    """
    files = [folder / f"steps-{rank}" for rank in range(dp.size)]
    others = [path for path in files if path != files[dp.rank]]
    files[dp.rank].touch()
    seen = dict.fromkeys(others, 0)

    def observe(*_):
        with files[dp.rank].open("ab") as file:
            file.write(b".")
        if dp.rank == 1:
            for path in list(seen):
                seen[path] += 3
                if not grows(path, seen[path]):
                    del seen[path]

    return observe


def grows(path, nbytes):
    """True once a file has so many bytes, False if it does not grow for a second."""
    found, since_s = -1, 0.0
    while True:
        size = path.stat().st_size if path.exists() else 0
        if size >= nbytes:
            return True
        if size > found:
            found, since_s = size, time.monotonic()
        elif time.monotonic() - since_s > 1:
            return False
        time.sleep(0.005)


@several
@pytest.mark.parametrize("layout", [t for t in REPLICAS if t in (f"dp={SIZE}", "dp=2,tp=2")])
def test_a_slow_replica_answers_fewer(comm, shared_path, layout):
    """Who is done takes the next: no share is fixed beforehand."""
    engine = load(comm, shared_path, CASE, layout, sequences=2)
    if engine.grid.is_leader:
        engine.observers.append(pace_of(engine.grid.dp, shared_path))
    found = engine.generate(prompts_of(40), max_tokens=4, temperature=0, ignore_eos=True)
    assert [r.request.index for r in found] == list(range(40))
    assert answered(engine)[1] < 0.75 * 40 / engine.grid.dp.size


# --- The command ---------------------------------------------------------------------------------


def without_logprobs(line):
    """A line of input that asks for no numbers, whose last digits depend on the batch."""
    if isinstance(line, dict) and "body" in line:
        body = {k: v for k, v in line["body"].items() if "logprobs" not in k}
        return line | {"body": body}
    return line


class Runs:
    """`generate` and `score` in some layouts, each run once."""

    def __init__(self, folder, run):
        self.folder, self.run, self.done = folder, run, {}
        many = [
            {"custom_id": f"m{i}", "prompt": STORY[: 5 + i % 30], "temperature": 0.9 * (i % 2)}
            for i in range(70)
        ]
        huge = {"custom_id": "huge", "prompt": STORY * 30, "max_tokens": 600}
        lines = [*map(without_logprobs, LINES), *many[:40], huge, *many[40:]]
        self.input = write_lines(folder / "in.jsonl", lines)
        self.texts = folder / "texts.txt"
        self.texts.write_text("\n".join(STORY[: 1 + i % 40] for i in range(70)) + "\n\nA\n")

    def __call__(self, command, layout, ranks, *options):
        """Finished command, its results as .jsonl and as .h5."""
        name = f"{command}-{layout}"
        outputs = [self.folder / f"{name}{end}" for end in (".jsonl", ".h5")]
        if name not in self.done:
            source = self.input if command == "generate" else self.texts
            self.done[name] = self.run(
                ranks, *HPCINFER, command, SHIPPED, "--input", source, "--output", outputs[0],
                "--output", outputs[1], "--layout", layout, "--dtype", "float32",
                "--kv-memory", "1500k", *options,
            )  # fmt: skip
        done = self.done[name]
        assert done.returncode == 0, done.stdout + done.stderr
        return done, *outputs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    from helpers.jobs import run_job

    return Runs(tmp_path_factory.mktemp("replicas"), run_job)


LAYOUTS = [("dp=2", 2), ("dp=3", 3), ("dp=2,zero=broadcast", 2), ("dp=2,afd=2:1", 3)]


@pytest.mark.single
@pytest.mark.parametrize(("layout", "ranks"), LAYOUTS)
def test_generate_writes_what_one_rank_writes(runs, layout, ranks):
    """The lines to the byte, in input order; bad and refused requests once."""
    options = ("--max-tokens", 4, "--seed", 3, "--ignore-eos")
    alone, expected, expected_h5 = runs("generate", "tp=1", 1, *options)
    done, jsonl, h5 = runs("generate", layout, ranks, *options)
    assert jsonl.read_bytes() == expected.read_bytes()
    lines = read_jsonl(jsonl)
    assert len(lines) == len(NAMES) + 71
    assert [line["custom_id"] for line in lines[: len(NAMES)]] == NAMES
    assert [i for i, line in enumerate(lines) if line["error"]] == [*BAD, len(NAMES) + 40]
    assert "kv-memory: got a cache of" in lines[len(NAMES) + 40]["error"]["message"]
    for command in (alone, done):
        assert "76 requests finished, 6 refused" in command.stdout
    assert done.stderr.count("generate: 100%") == 1
    equal_files(h5, expected_h5)


@pytest.mark.single
@pytest.mark.parametrize(("layout", "ranks"), LAYOUTS[:2])
def test_score_writes_what_one_rank_writes(runs, layout, ranks):
    alone, expected, expected_h5 = runs("score", "tp=1", 1)
    done, jsonl, h5 = runs("score", layout, ranks)
    for line, other in zip(read_jsonl(jsonl), read_jsonl(expected), strict=True):
        assert line["token_ids"] == other["token_ids"]
        assert line["logprobs"][1:] == approx(other["logprobs"][1:], abs=1e-4)
    assert "71 requests finished, 0 refused" in done.stdout
    equal_files(h5, expected_h5)


def equal_files(path, other):
    """Every dataset of two results is equal, numbers up to rounding."""
    with h5py.File(path) as f, h5py.File(other) as g:
        assert set(f) == set(g) and bool(f.attrs["complete"])
        for name in g:
            if g[name].dtype.kind == "f":
                np.testing.assert_allclose(f[name], g[name], rtol=1e-3, atol=1e-4)
            else:
                assert f[name][:].tolist() == g[name][:].tolist(), name


@pytest.mark.single
def test_the_report_says_how_busy_replicas_were(runs):
    options = ("--max-tokens", 4, "--seed", 3, "--ignore-eos")
    done = runs("generate", "dp=3", 3, *options)[0]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("replicas")]
    counts = [int(n) for n in line.partition("with ")[2].split(" requests")[0].split(", ")]
    assert len(counts) == 3 and sum(counts) == len(NAMES) + 71


# --- One replica fails or dies -------------------------------------------------------------------

FAILING = """
import sys
from mpi4py import MPI
from hpcinfer.cli.main import main
{imports}
whole, calls = {target}, []

def fail(*arguments, **options):
    calls.append(1)
    if len(calls) > {after}:
        raise {error}
    return whole(*arguments, **options)

if MPI.COMM_WORLD.rank == {rank}:
    {target} = fail
main(sys.argv[1:])
"""

IN_A_STEP = {
    "imports": "from hpcinfer.model.cache import Cache",
    "target": "Cache.place_heads",
    "error": 'RuntimeError("model: got a failure, need none")',
}
IN_READING = {
    "imports": "from hpcinfer.requests.reader import RequestReader",
    "target": "RequestReader.read",
    "error": 'RuntimeError("input: got a failure, need none")',
}
IN_A_BLOCK = {
    "imports": "from hpcinfer.parallel.data import Queue",
    "target": "Queue.take",
    "error": 'RuntimeError("data: got a failure, need none")',
}


@pytest.mark.single
@pytest.mark.parametrize(
    ("layout", "ranks", "rank", "after", "parts"),
    [
        ("dp=3", 3, 2, 5, IN_A_STEP),
        ("dp=3", 3, 0, 5, IN_A_STEP),
        ("dp=2,tp=2", 4, 3, 5, IN_A_STEP),
        ("dp=2,tp=2", 4, 2, 1, IN_A_BLOCK),
        ("dp=3", 3, 1, 1, IN_A_BLOCK),
        ("dp=2", 2, 1, 0, IN_READING),
        ("dp=2,zero=allgather", 2, 1, 5, IN_A_STEP),
        ("dp=2,afd=2:1", 3, 1, 5, IN_A_STEP),
        ("pp=3", 3, 2, 5, IN_A_STEP),
    ],
)
def test_an_error_on_one_replica_ends_all(mpirun, tmp_path, layout, ranks, rank, after, parts):
    """Within seconds, with one line and exit code 1, while the others are busy or wait."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(rank=rank, after=after, **parts))
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": STORY, "max_tokens": 9}] * 300)
    done = mpirun(
        ranks, sys.executable, script, "generate", SHIPPED, "--input", source, "--layout", layout,
        "--output", tmp_path / "out.jsonl", *KV, "--ignore-eos",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("hpcinfer")]
    lines = [line for line in lines if "stopped by SIGTERM" not in line]  # Open MPI ends ranks so
    assert len(lines) == 1 and "got a failure, need none" in lines[0], done.stderr
    assert "Traceback" not in done.stderr
    assert done.seconds < scaled(20)


@pytest.mark.single
def test_all_requests_bad_on_all_replicas(mpirun, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": ""}, "x", {"prompt": 7}])
    done = mpirun(
        3, *HPCINFER, "generate", SHIPPED, "--input", source, *KV, "--layout", "dp=3",
        "--output", tmp_path / "out.jsonl",
    )  # fmt: skip
    refused(done, 1, "got 3 requests in")
    assert [line["error"]["line"] for line in read_jsonl(tmp_path / "out.jsonl")] == [1, 2, 3]


@pytest.mark.single
@pytest.mark.parametrize(("layout", "victim"), [("dp=3", 1), ("dp=3,zero=allgather", 2)])
def test_a_killed_rank_of_another_replica_ends_all(tmp_path, layout, victim):
    """The answers that had come by then are in the output."""
    short = [{"custom_id": f"short-{i}", "prompt": "a", "max_tokens": 2} for i in range(5)]
    long = [{"custom_id": f"long-{i}", "prompt": STORY, "max_tokens": 900} for i in range(12)]
    source = write_lines(tmp_path / "in.jsonl", [x | {"ignore_eos": True} for x in short + long])
    out = tmp_path / "out.jsonl"
    job = launch(
        3, "generate", SHIPPED, "--input", source, "--output", out, *KV, "--layout", layout
    )
    try:
        wait_for(lambda: len(finished_lines(out)) >= 5, 40)
        before = {line["custom_id"] for line in finished_lines(out)}
        processes = ranks_of(job)
        assert len(processes) == 3
        processes.sort(key=lambda process: int(process.environ().get("PMI_RANK", process.pid)))
        processes[victim].send_signal(signal.SIGKILL)
        wait_for(lambda: job.poll() is not None and not any(map(alive, processes)), limit_s=10)
        assert job.returncode != 0
    finally:
        if job.poll() is None:
            kill_tree(job.pid)
    assert before <= {line["custom_id"] for line in read_jsonl(out)}
