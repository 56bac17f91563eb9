"""The job scripts under a real SLURM of several simulated nodes on this machine.

`tests/slurm/cluster.sh` starts it for this file and ends it. Skipped where its programs are not
installed; as root on Debian or Ubuntu, `bash tests/slurm/cluster.sh install` gets them.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import h5py
import psutil
import pytest
from helpers.jobs import clean_environment, run_job
from helpers.paths import ROOT, SHIPPED
from helpers.speed import scaled

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")
SEARCHED = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
MISSING = [name for name in PROGRAMS if shutil.which(name, path=SEARCHED) is None]

pytestmark = [
    pytest.mark.single,
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"SLURM: {', '.join(MISSING)} not installed; bash tests/slurm/cluster.sh install",
    ),
]

STORY = "Once there was a shy hare named Nell who lived near the harbour."
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
OPTIONS = ("--dtype", "float32", "--kv-memory", "32M", "--seed", "5")

# The command on PATH of a job. STEP_S and LOAD_S have each step, or the reading of the model, take
# longer, so that a signal finds a run under way; until the job has been requeued SLOW_RUNS times.
COMMAND = f"""#!{sys.executable}
import os, time
from hpcinfer.cli.main import main
from hpcinfer.engine import loading
from hpcinfer.model.forward import Model

def slow(owner, name, delay_s):
    fast = getattr(owner, name)
    def slowly(*arguments, **options):
        time.sleep(delay_s)
        return fast(*arguments, **options)
    setattr(owner, name, slowly)

if int(os.environ.get("SLURM_RESTART_COUNT", 0)) < int(os.environ.get("SLOW_RUNS", 1)):
    slow(Model, "forward", float(os.environ.get("STEP_S", 0)))
    slow(loading, "open_checkpoint", float(os.environ.get("LOAD_S", 0)))
main()
"""

# Where each rank is, and the GPU it would take: CuPy counts what CUDA_VISIBLE_DEVICES shows
PLACES = """
import json, os, sys, types
def count():
    return len(visible())
def visible():
    return [int(n) for n in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if n]
class Device:
    def __init__(self, ordinal):
        self.use = lambda: None
cuda = types.SimpleNamespace(
    runtime=types.SimpleNamespace(getDeviceCount=count), Device=Device,
    Stream=lambda: Device(0),
)
sys.modules["cupy"] = types.SimpleNamespace(cuda=cuda)

from hpcinfer.array import select_device
from hpcinfer.grid import Grid
from hpcinfer.launcher import world
from hpcinfer.layout import Layout
comm = world()
grid = Grid(comm, Layout(tp=comm.size))
gpu = visible()[select_device("auto", grid.node.rank).ordinal] if visible() else None
threads = int(os.environ["OMP_NUM_THREADS"])
places = comm.gather([os.environ["SLURMD_NODENAME"], grid.node.rank, gpu, threads])
if comm.rank == 0:
    print("places", json.dumps(places))
"""


class Cluster:
    """A running SLURM, and how to use it.

    Parameters
    ----------
    folder : of its configuration and of the command that its jobs find
    environment : variables of `sbatch`, which its jobs inherit
    """

    def __init__(self, folder, environment):
        self.folder, self.environment = folder, environment

    def call(self, *words, **environment):
        """Output of a command of SLURM."""
        done = subprocess.run(
            [str(word) for word in words],
            cwd=ROOT,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def submit(self, log, options, script, *words, **environment):
        """Submit a script of jobs/, or a path; return its Job."""
        script = ROOT / "jobs" / script
        told = ["sbatch", "--parsable", f"--output={log}", *options.split(), script, *words]
        return Job(self, self.call(*told, **environment).strip(), Path(log))

    def node(self, name, state):
        """Tell SLURM that a node is down, or to resume it."""
        self.call("scontrol", "update", f"NodeName={name}", f"State={state}", "Reason=test")


class Job:
    """A job that was submitted.

    Parameters
    ----------
    cluster : Cluster
    number : its id
    log : path of what it prints
    """

    def __init__(self, cluster, number, log):
        self.cluster, self.number, self.log = cluster, number, log

    def facts(self):
        """What SLURM says of the job: a dict of words."""
        text = self.cluster.call("scontrol", "show", "job", self.number, "--oneliner")
        return dict(word.split("=", 1) for word in text.splitlines()[0].split() if "=" in word)

    def wait_for(self, condition, limit_s=40):
        """Facts of the job as soon as `condition`, a function of them, holds."""
        end_s = time.monotonic() + scaled(limit_s)
        while True:
            facts = self.facts()
            if condition(facts):
                return facts
            if time.monotonic() > end_s:
                pytest.fail(f"job {self.number} stays {facts}\n{self.printed()}")
            time.sleep(0.1)

    def end(self, limit_s=40):
        """(state, exit code) of the job when it has ended: as `scontrol` has them."""
        facts = self.wait_for(lambda facts: facts["JobState"] in OVER, limit_s)
        return facts["JobState"], facts["ExitCode"]

    def printed(self):
        return self.log.read_text() if self.log.exists() else ""

    def signal(self, name, *options):
        self.cluster.call("scancel", f"--signal={name}", *options, self.number)


@pytest.fixture(scope="module")
def cluster():
    """A SLURM of four nodes with 4 CPUs and 2 GPUs each, none of them with anything behind."""
    folder, start_s = Path(tempfile.mkdtemp(prefix="slurm-")), time.time()
    script = ["bash", str(ROOT / "tests" / "slurm" / "cluster.sh"), "hold", str(folder / "c")]
    holder = subprocess.Popen(
        script,
        env=clean_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert holder.stdout.readline() == "ready\n", "SLURM did not come up"
        programs = folder / "bin"
        programs.mkdir()
        (programs / "hpcinfer").write_text(COMMAND)
        (programs / "hpcinfer").chmod(0o755)
        own = clean_environment()
        yield Cluster(
            folder,
            own
            | {
                "SLURM_CONF": str(folder / "c" / "slurm.conf"),
                "PATH": f"{programs}:{own['PATH']}",
                "HPCINFER_VENV": "none",
                # Nodes share the cores of this machine, and do not know it
                "MPIR_CVAR_ENABLE_HEAVY_YIELD": "1",
            },
        )
    finally:
        holder.stdin.close()
        holder.wait(30)
        holder.stdout.close()
        remove_shared_memory(start_s)
        shutil.rmtree(folder, ignore_errors=True)


def remove_shared_memory(since_s):
    """Remove what killed ranks have left in shared memory: new, our own, and mapped by nobody."""
    left = [path for path in Path("/dev/shm").glob("mpich_sh*") if path.stat().st_ctime >= since_s]
    mapped = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            mapped |= {line.split()[-1] for line in maps.read_text().splitlines() if line}
    for path in left:
        if str(path) not in mapped:
            with suppress(OSError):
                path.unlink()


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A short input, and the output of one straight run of it on one rank, without SLURM."""
    folder = tmp_path_factory.mktemp("short")
    requests = [
        {"custom_id": f"r{i}", "prompt": f"{STORY} {i}", "max_tokens": 3 + i, "ignore_eos": True}
        for i in range(5)
    ]
    return straight(folder, requests)


def straight(folder, requests, command="generate"):
    """(input, output) of a straight run on one rank."""
    source, output = folder / "in.jsonl", folder / f"{command}.jsonl"
    source.write_text("".join(json.dumps(request) + "\n" for request in requests))
    words = [command, SHIPPED, "--input", source, "--output", output, *OPTIONS]
    done = run_job(1, sys.executable, "-m", "hpcinfer", *words, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    return source, output


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """An input of some 60 steps, sampled, and the output of one straight run of it."""
    folder = tmp_path_factory.mktemp("long")
    requests = [
        {"custom_id": f"r{i}", "prompt": f"{STORY} {i}", "max_tokens": 6 + 9 * i, "n": 1 + i % 2}
        | {"ignore_eos": True, "temperature": 0.8}
        for i in range(7)
    ]
    return straight(folder, requests)


@pytest.fixture(scope="module", autouse=True)
def limited(cluster, long):
    """A job with a time limit of one minute, and its output; it runs beside the other tests."""
    source, _ = long
    output = source.with_name("limited.jsonl")
    job = cluster.submit(
        source.with_name("log"), "-n1 -c1 -w n3 --time=1 --signal=B:USR1@45", "preemptible.slurm",
        SHIPPED, source, output, "generate", *OPTIONS, STEP_S="2",
    )  # fmt: skip
    return job, output


def answers(path):
    """Custom id and choices of every line of an output."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line["custom_id"], line["response"]["body"]["choices"]) for line in lines]


# --- One job -------------------------------------------------------------------------------------


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_generate(cluster, short, tmp_path, launcher):
    """The bytes of the output are those of a run on one rank; threads are those asked for."""
    source, expected = short
    output = tmp_path / "new" / "out.jsonl"
    job = cluster.submit(
        tmp_path / "log", "-n2 -c2", "generate.slurm", SHIPPED, source, output, *OPTIONS,
        HPCINFER_LAUNCHER=launcher,
    )  # fmt: skip
    assert job.end() == ("COMPLETED", "0:0"), job.printed()
    assert output.read_bytes() == expected.read_bytes()
    assert "tp=2 on cpu, float32, threads per rank 2" in job.printed()


def test_script_for_gpus(cluster, short, tmp_path):
    """Its layout, on nodes that have no GPU: a replica on each, its ranks in tp."""
    source, expected = short
    output = tmp_path / "out.jsonl"
    job = cluster.submit(
        tmp_path / "log", "-N2 --ntasks-per-node=2 -c1 --gpus-per-node=0", "generate-gpu.slurm",
        SHIPPED, source, output, *OPTIONS,
        HPCINFER_DEVICE="cpu", HPCINFER_EXTRAS="", HPCINFER_LAUNCHER_OPTIONS="",
    )  # fmt: skip
    assert job.end() == ("COMPLETED", "0:0"), job.printed()
    assert output.read_bytes() == expected.read_bytes()
    assert "dp=2,pp=1,cp=1,tp=2 on cpu, float32" in job.printed()


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_several_nodes(cluster, short, tmp_path, launcher):
    source, expected = short
    output = tmp_path / "out.jsonl"
    job = cluster.submit(
        tmp_path / "log", "-N2 --ntasks-per-node=2 -c1", "generate-nodes.slurm", SHIPPED, source,
        output, *OPTIONS, HPCINFER_LAUNCHER=launcher,
    )  # fmt: skip
    assert job.end() == ("COMPLETED", "0:0"), job.printed()
    assert output.read_bytes() == expected.read_bytes()
    assert job.facts()["NumNodes"] == "2"
    assert "pp=2,cp=1,tp=2 on cpu, float32, threads per rank 1" in job.printed()


def test_score(cluster, short, tmp_path):
    source, _ = short
    output = tmp_path / "out.jsonl"
    job = cluster.submit(
        tmp_path / "log", "-n2 -c1", "score.slurm", SHIPPED, source, output, *OPTIONS
    )
    assert job.end() == ("COMPLETED", "0:0"), job.printed()
    assert len(output.read_text().splitlines()) == 5


def test_extract(cluster, short, tmp_path):
    source, _ = short
    output = tmp_path / "out.h5"
    job = cluster.submit(
        tmp_path / "log", "-N2 -n2 -c1", "extract.slurm", SHIPPED, source, output, *OPTIONS
    )
    assert job.end() == ("COMPLETED", "0:0"), job.printed()
    with h5py.File(output) as f:
        assert len(f["custom_id"]) == 5


def test_array(cluster, short, tmp_path):
    """The shards one after the other are the straight run, ids and all."""
    source, expected = short
    job = cluster.submit(
        tmp_path / "log-%a", "-n1 -c1 --array=1-3%2", "array.slurm", SHIPPED, source,
        tmp_path / "out", "", *OPTIONS,
    )  # fmt: skip
    for shard in (1, 2, 3):
        part = Job(cluster, f"{job.number}_{shard}", tmp_path / f"log-{shard}")
        assert part.end() == ("COMPLETED", "0:0"), part.printed()
    outputs = sorted((tmp_path / "out").glob("shard-*-of-0003.jsonl"))
    assert len(outputs) == 3
    assert b"".join(path.read_bytes() for path in outputs) == expected.read_bytes()


# --- Launchers, places, exit codes ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "environment", "expected"),
    [
        # All ranks see the GPUs of their node
        ("gres", "-N2 -n4 -c2 --ntasks-per-node=2 --gres=gpu:2", {}, [(0, 2), (1, 2)] * 2),
        # Each rank sees its own
        (
            "bind",
            "-N2 -n4 -c1 --ntasks-per-node=2 --gres=gpu:2",
            {"HPCINFER_LAUNCHER_OPTIONS": "--gpu-bind=single:1"},
            [(0, 1), (1, 1)] * 2,
        ),
        ("none", "-N2 -n3 -c1 --ntasks-per-node=2", {}, [(None, 1)] * 3),
        ("own", "-N1 -n1 -c2", {"OMP_NUM_THREADS": "3"}, [(None, 3)]),
        ("mpirun", "-N2 -n4 -c1", {"HPCINFER_LAUNCHER": "mpirun"}, [(None, 1)] * 4),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isalpha() else "",
)
def test_places(cluster, tmp_path, name, options, environment, expected):
    """Ranks are dealt node by node; rank i of a node takes GPU i; threads as allocated."""
    (tmp_path / "places.py").write_text(PLACES)
    script = tmp_path / "job.slurm"
    script.write_text(
        "#!/bin/bash\nsource jobs/environment.sh\n"
        f'launch "$SLURM_NTASKS" python {tmp_path / "places.py"}\n'
    )
    environment = {"HPCINFER_LAUNCHER": "srun"} | environment
    job = cluster.submit(tmp_path / "log", options, script, **environment)
    assert job.end() == ("COMPLETED", "0:0"), job.printed()
    places = json.loads(re.search("^places (.*)$", job.printed(), re.M)[1])
    assert [(gpu, threads) for _, _, gpu, threads in places] == expected

    # Local ranks count up on each node
    nodes = list(dict.fromkeys(node for node, *_ in places))
    assert len(nodes) == int(job.facts()["NumNodes"])
    for node in nodes:
        local = [rank for where, rank, *_ in places if where == node]
        assert local == list(range(len(local)))


@pytest.mark.parametrize(
    ("environment", "words", "code", "message"),
    [
        (
            {"HPCINFER_SRUN_MPI": "none"},
            [],
            1,
            "hpcinfer: grid: got 2 processes that MPI sees as 1 each, need one job; launch with",
        ),
        ({"HPCINFER_LAUNCHER": "ssh"}, [], 2, "launcher: got ssh, need mpirun or srun"),
        ({}, ["--layout", "tp=3"], 2, "hpcinfer: layout: got 'tp=3', which is 3 ranks, need 2"),
        ({}, ["--kv-memory", "9"], 1, "hpcinfer: kv-memory: got 9 bytes, need"),
        (
            {"HPCINFER_LAUNCHER": "mpirun"},
            ["--kv-memory", "9"],
            1,
            "hpcinfer: kv-memory: got 9 bytes, need",
        ),
    ],
    ids=["PMI", "launcher", "usage", "memory", "mpirun"],
)
def test_exit_codes(cluster, short, tmp_path, environment, words, code, message):
    """A job that fails has the command's exit code in SLURM, and says why in one line, once."""
    source, _ = short
    job = cluster.submit(
        tmp_path / "log", "-n2 -c1", "generate.slurm", SHIPPED, source, tmp_path / "out.jsonl",
        *OPTIONS, *words, **environment,
    )  # fmt: skip
    assert job.end() == ("FAILED", f"{code}:0"), job.printed()
    assert job.printed().count(message) == 1
    assert "Traceback" not in job.printed()


# --- Stopped, requeued, resumed ------------------------------------------------------------------


def lines_in(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def begun(job, output, lines):
    """Wait until a job runs and its output has so many lines."""
    facts = job.wait_for(
        lambda facts: (
            facts["JobState"] in OVER
            or (facts["JobState"] == "RUNNING" and lines_in(output) >= lines)
        )
    )
    assert facts["JobState"] == "RUNNING", job.printed()


def processes_of(job):
    """The processes on this machine that are ranks of a job."""
    found = []
    for process in psutil.process_iter():
        try:
            environment, command = process.environ(), process.cmdline()
        except psutil.Error:
            continue
        if environment.get("SLURM_JOB_ID") == job.number and "hpcinfer" in " ".join(command[:2]):
            if "PMI_RANK" in environment and process.name() != "srun":
                found.append(process)
    return found


@pytest.mark.timeout(120)
def test_a_chain_of_interruptions_gives_the_bytes_of_a_straight_run(cluster, long, tmp_path):
    """A signal, a node that fails, a user who cancels; other nodes each time, then other ranks."""
    source, expected = long
    output = tmp_path / "out.jsonl"
    words = ("preemptible.slurm", SHIPPED, source, output, "generate", *OPTIONS)
    log = tmp_path / "log"
    job = cluster.submit(log, "-n2 -c1 -w n1", *words, STEP_S="0.1", SLOW_RUNS="3")
    begun(job, output, 1)

    # The signal before the time limit: code 75, and back into the queue, for another node
    job.signal("USR1", "--batch")
    job.wait_for(lambda facts: facts["Restarts"] == "1")
    cluster.call("scontrol", "update", f"JobId={job.number}", "ReqNodeList=n2")
    assert "hpcinfer: stopped by SIGUSR1 with" in job.printed()
    lines = lines_in(output)
    assert 1 <= lines < 7

    # The node fails: SLURM requeues the job, for a third node
    begun(job, output, lines + 1)
    cluster.node("n2", "down")
    try:
        job.wait_for(lambda facts: facts["Restarts"] == "2")
    finally:
        cluster.node("n2", "resume")
    cluster.call("scontrol", "update", f"JobId={job.number}", "ReqNodeList=n3")
    lines = lines_in(output)
    assert lines < 7

    # A user cancels it: it ends for good
    begun(job, output, min(lines + 1, 6))
    cluster.call("scancel", job.number)
    assert job.end()[0] == "CANCELLED"
    assert lines_in(output) < 7 and output.read_bytes() != expected.read_bytes()

    # And submits the same again, with more ranks on several nodes
    last = cluster.submit(tmp_path / "log-2", "-N2 -n3 -c1", *words)
    assert last.end() == ("COMPLETED", "0:0"), last.printed()
    assert output.read_bytes() == expected.read_bytes()
    assert not (tmp_path / "out.jsonl.state").exists()


def test_killed_ranks_end_the_job_and_leave_nothing_in_its_way(cluster, long, tmp_path):
    """A job whose ranks are killed fails; requeued on the same node it goes on to the end."""
    source, expected = long
    jobs = {}
    for launcher, node in (("srun", "n2"), ("mpirun", "n4")):
        output = tmp_path / f"{launcher}.jsonl"
        jobs[output] = cluster.submit(
            tmp_path / f"{launcher}.log", f"-n2 -c1 -w {node}", "preemptible.slurm", SHIPPED,
            source, output, "generate", *OPTIONS, STEP_S="0.1", HPCINFER_LAUNCHER=launcher,
        )  # fmt: skip
    for output, job in jobs.items():
        begun(job, output, 1)
        ranks = processes_of(job)
        assert len(ranks) == 2
        for process in ranks:
            process.kill()
    for output, job in jobs.items():
        state, code = job.end()
        assert state == "FAILED" and code != "0:0"
        assert 1 <= lines_in(output) < 7
        cluster.call("scontrol", "requeue", job.number)
    for output, job in jobs.items():
        job.wait_for(lambda facts: facts["Restarts"] == "1")
        assert job.end() == ("COMPLETED", "0:0"), job.printed()
        assert output.read_bytes() == expected.read_bytes()


def test_a_job_that_comes_no_further_is_not_requeued(cluster, short, tmp_path):
    """Stopped while the model is read, which ends all ranks at once: nothing to go on from."""
    source, _ = short
    output = tmp_path / "out.jsonl"
    job = cluster.submit(
        tmp_path / "log", "-n2 -c1", "preemptible.slurm", SHIPPED, source, output, "generate",
        *OPTIONS, LOAD_S="20",
    )  # fmt: skip
    job.wait_for(lambda facts: facts["JobState"] == "RUNNING")
    job.wait_for(lambda facts: len(processes_of(job)) == 2)
    time.sleep(2)
    job.signal("USR1", "--batch")
    assert job.end() == ("FAILED", "1:0"), job.printed()
    assert "stopped by SIGUSR1 before the first step" in job.printed()
    assert "jobs/requeue.sh: got no further than the run before" in job.printed()


@pytest.mark.timeout(120)
def test_a_job_at_its_time_limit_goes_on_in_another(limited, long):
    """SLURM signals a while before the limit, the job is requeued and ends as it would have."""
    _, expected = long
    job, output = limited
    job.wait_for(lambda facts: facts["Restarts"] == "1", 60)
    assert "hpcinfer: stopped by SIGUSR1 with" in job.printed()
    assert job.end() == ("COMPLETED", "0:0"), job.printed()
    assert output.read_bytes() == expected.read_bytes()
