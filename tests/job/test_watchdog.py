"""A rank that does not come: the job ends in time and says which rank is missing, in which call."""

import json
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
from helpers.jobs import clean_environment, kill_tree, run_job
from helpers.paths import ROOT, SHIPPED

from hpcinfer import collectives
from hpcinfer.heartbeat import here
from hpcinfer.ledger import Ledger

LIMIT_S = 3

# The command, with what rank 1 does in the 7th layer that it computes.
SCRIPT = """
import os, signal, sys, time
from hpcinfer.cli.main import main
from hpcinfer.launcher import launcher_rank
from hpcinfer.model import forward

whole_layer, count = forward.layer, 0

def layer(p, n, x, *others):
    global count
    count += 1
    if launcher_rank() == 1 and count == 7:
        {trouble}
    return whole_layer(p, n, x, *others)

forward.layer = layer
main(sys.argv[1:])
"""
SLEEPS = "time.sleep(300)"
STOPS = "os.kill(os.getpid(), signal.SIGSTOP)"
OTHER_CALL = "p.model.grid.comm.Set_name('other'); from hpcinfer import collectives; "
OTHER_CALL += "collectives.Recv(p.model.grid.comm, x, 0, purpose='lost')"
SLOW = "time.sleep(5)"


def command(folder, trouble, *options):
    (folder / "job.py").write_text(SCRIPT.format(trouble=trouble))
    lines = [{"prompt": "Once there was", "max_tokens": 4, "temperature": 0, "ignore_eos": True}]
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return [
        sys.executable, folder / "job.py", "generate", SHIPPED, "--input", folder / "in.jsonl",
        "--output", folder / "out.jsonl", "--kv-memory", "32M", *map(str, options),
    ]  # fmt: skip


@pytest.mark.single
@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (SLEEPS, r"^hpcinfer: rank 1: in no call, step 2, layer 1, after \d+ calls$"),
        (STOPS, r"^hpcinfer: rank 1: stopped \(process \d+ on .*\)$"),
        (
            OTHER_CALL,
            r"^hpcinfer: rank 1: in Recv \(other, lost\), step 2, layer 1, after \d+ calls$",
        ),
    ],
    ids=["sleeps", "stopped", "other call"],
)
def test_the_missing_rank_is_named(tmp_path, trouble, words):
    done = run_job(3, *command(tmp_path, trouble, "--hang-timeout", LIMIT_S))
    assert done.returncode == 1, done.stderr
    assert re.search(words, done.stderr, re.MULTILINE), done.stderr
    waits = r"^hpcinfer: ranks 0, 2: in Allreduce \(tp, attention\), step 2, layer 2, after .*$"
    assert re.search(waits, done.stderr, re.MULTILINE), done.stderr
    (line,) = re.findall(r"^hpcinfer: hang: .*$", done.stderr, re.MULTILINE)
    if trouble != OTHER_CALL:
        assert "in Allreduce (tp, attention), step 2, layer 2, need rank 1; see above" in line
    if trouble != STOPS:
        assert re.search(r'File ".*job.py", line \d+, in layer', done.stderr)


@pytest.mark.single
@pytest.mark.parametrize("limit_s", [12, 0])
def test_a_long_step_is_no_hang(tmp_path, limit_s):
    done = run_job(2, *command(tmp_path, SLOW, "--hang-timeout", limit_s))
    assert done.returncode == 0 and "hang" not in done.stderr, done.stderr


@pytest.mark.single
def test_who_waits_for_work_under_way_waits_on(tmp_path):
    """A rank that waits longer than the limit for another that comes from layer to layer."""
    script = """
import time
from mpi4py import MPI
from hpcinfer import collectives
from hpcinfer.job.watchdog import Watchdog
from hpcinfer.heartbeat import here
comm = MPI.COMM_WORLD
with Watchdog(comm, 2.0):
    for here.layer in range(8) if comm.rank == 1 else ():
        time.sleep(0.75)
    collectives.Bcast(comm, __import__("numpy").zeros(1), 1)
"""
    done = run_job(2, sys.executable, "-c", script)
    assert done.returncode == 0 and "hang" not in done.stderr, done.stderr
    assert done.seconds > 6


@pytest.mark.single
def test_all_in_one_call_is_the_fault_of_none(tmp_path):
    script = """
from mpi4py import MPI
from hpcinfer.job.watchdog import Watchdog
from hpcinfer.heartbeat import waiting
import time
comm = MPI.COMM_WORLD
with Watchdog(comm, 1.0), waiting("Barrier", comm, "network"):
    time.sleep(60)
"""
    done = run_job(2, sys.executable, "-c", script)
    assert done.returncode == 1
    assert "need an answer of MPI, all ranks being there" in done.stderr


@pytest.mark.single
def test_a_signal_prints_the_stacks(tmp_path):
    job = subprocess.Popen(
        ["bash", ROOT / "jobs" / "site.sh", "2", *map(str, command(tmp_path, SLEEPS))],
        env=clean_environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        end_s, sleeping = time.monotonic() + 30, None
        while sleeping is None and time.monotonic() < end_s:
            time.sleep(0.5)
            for process in psutil.Process(job.pid).children(recursive=True):
                if process.environ().get("PMI_RANK") == "1" or (
                    process.environ().get("OMPI_COMM_WORLD_RANK") == "1"
                ):
                    if (tmp_path / "out.jsonl.state").exists():
                        time.sleep(2)
                        sleeping = process
        sleeping.send_signal(signal.SIGUSR2)
        time.sleep(1)
    finally:
        kill_tree(job.pid)
    _, stderr = job.communicate()
    assert re.search(r'File ".*job.py", line \d+ in layer', stderr), stderr


def test_a_rank_knows_the_call_that_it_is_in(comm, monkeypatch):
    """Inside of a call its place is set, outside of calls it is not."""
    import numpy as np

    seen, before = [], here.calls
    real = collectives.to_host
    monkeypatch.setattr(collectives, "to_host", lambda x: seen.append(here.call) or real(x))
    collectives.Allreduce(comm, np.zeros(3), purpose="test")
    transfer = collectives.Shift(comm, np.zeros(3), np.empty(3), purpose="ring")
    assert here.call is None
    transfer.wait()
    verbs = {call[0]: call[2] for call in seen}
    alone = {"Shift": "ring"}  # one rank has nothing to reduce
    assert verbs == (alone if comm.size == 1 else {"Allreduce": "test", **alone})
    assert here.call is None and here.calls == before + 2


def test_the_record_costs_little(comm):
    """What every call pays for being watched: less than a microsecond, most of it the ledger's."""
    ledger, n = Ledger(), 20_000
    times = []
    for _ in range(5):
        start_s = time.perf_counter()
        for _ in range(n):
            ledger.enter(ledger.begin("Allreduce", comm, "test"), 8)
        times.append((time.perf_counter() - start_s) / n)
    assert min(times) < 5e-6


@pytest.mark.single
@pytest.mark.parametrize(
    ("networks", "addresses"),
    [
        ({"a": {"10.0.0.0/8": "10.0.0.1"}}, ["127.0.0.1"]),
        (
            {
                "a": {"10.0.0.0/8": "10.0.0.1", "192.168.7.0/24": "192.168.7.1"},
                "b": {"192.168.7.0/24": "192.168.7.2", "172.17.0.0/16": "172.17.0.1"},
            },
            ["192.168.7.1", "192.168.7.2"],
        ),
        (
            {"no-such-host": {"10.0.0.0/8": "10.0.0.1"}, "b.invalid": {"10.1.0.0/16": "10.1.0.2"}},
            ["", ""],
        ),
    ],
)
def test_each_rank_listens_at_one_address_that_the_others_reach(networks, addresses):
    from hpcinfer.job.watchdog import common_address

    assert [common_address(networks, host) for host in networks] == addresses
