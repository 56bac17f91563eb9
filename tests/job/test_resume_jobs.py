"""Jobs that get signals, are killed, or reach their time limit, and are started again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import psutil
import pytest
from helpers.jobs import clean_environment, kill_tree, run_job
from helpers.paths import ROOT, SHIPPED
from helpers.speed import scaled

from hpcinfer.errors import REQUEUE, SIGNALLED
from hpcinfer.io.state import read_state

pytestmark = pytest.mark.single

STORY = "Once there was a shy hare named Nell who lived near the harbour. "
GO_ON = "; run the same command again to go on"

# The command, on a machine on which some things take longer
SLOW = """
import sys, time
from hpcinfer.cli.main import main
from hpcinfer.job import stop
from hpcinfer.io.checkpoint import Checkpoint
from hpcinfer.io.jsonl import JsonlWriter
from hpcinfer.model.forward import Model

def slow(owner, name, delay_s):
    fast = getattr(owner, name)
    def slowly(self, *arguments, **options):
        time.sleep(delay_s(*arguments, **options))
        return fast(self, *arguments, **options)
    setattr(owner, name, slowly)

{patches}
if __name__ == "__main__":
    main(sys.argv[1:])
"""
TOKENS = 'slow(Model, "forward", lambda steps: {step_s} + {token_s} * steps[0].n_tokens)'


class Started:
    """A job that runs.

    Parameters
    ----------
    folder : for its script and its output
    ranks : how many
    patches : lines of Python that make the command slow
    arguments : of hpcinfer
    """

    def __init__(self, folder, ranks, patches, *arguments):
        script = folder / "slow.py"
        script.write_text(SLOW.format(patches=patches))
        self.command = (sys.executable, str(script), *map(str, arguments))
        self.log = folder / "log"
        self.began_s = time.monotonic()
        with open(self.log, "w") as log:
            self.job = subprocess.Popen(
                ["bash", ROOT / "jobs" / "site.sh", str(ranks), *self.command],
                cwd=ROOT,
                env=clean_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def __enter__(self):
        return self

    def __exit__(self, *details):
        if self.job.poll() is None:
            kill_tree(self.job.pid)

    def ranks(self):
        """The processes of its ranks, the first first."""
        found = []
        for process in psutil.Process(self.job.pid).children(recursive=True):
            try:
                if process.cmdline()[:2] == list(self.command[:2]):
                    found.append((int(process.environ().get("PMI_RANK", 0)), process))
            except psutil.Error:
                continue
        return [process for _, process in sorted(found, key=lambda item: item[0])]

    def wait_for(self, condition, limit_s=30):
        """Wait until a condition holds while the job runs."""
        start_s = time.monotonic()
        while not condition():
            assert self.job.poll() is None, self.log.read_text()
            assert time.monotonic() - start_s < scaled(limit_s), self.log.read_text()
            time.sleep(0.02)

    def end(self, number=None, *processes, limit_s=15):
        """Send a signal to some processes, the launcher if none is named; wait for the end.

        Returns
        -------
        exit code, what the command said of its end, seconds that it took
        """
        start_s = time.monotonic()
        if number is not None:
            for process in processes or [self.job]:
                process.send_signal(number)
        self.job.wait(scaled(limit_s))
        lines = [line for line in self.log.read_text().splitlines() if line.startswith("hpcinfer")]
        return self.job.returncode, lines, time.monotonic() - start_s


def progress(path):
    """Finished requests and tokens under way, as the state file says; none without one."""
    state = read_state(f"{path}.state") or {"records": {"": 0}, "under way": {}}
    tokens = sum(len(s[0]) for samples in state["under way"].values() for s in samples)
    return min(state["records"].values()), tokens


def advanced(path, before):
    """True once the state holds more than `before`."""
    return progress(path) > before


def options(folder, layout, name="out", every_s=0.2):
    return (
        "generate", SHIPPED, "--input", folder / "in.jsonl", "--output", folder / f"{name}.jsonl",
        "--output", folder / f"{name}.h5", "--kv-memory", "16M", "--dtype", "float32",
        "--layout", layout, "--checkpoint-every", every_s, "--seed", 5,
    )  # fmt: skip


def write_input(folder, n, prompt=STORY, max_tokens=120):
    lines = [
        {"prompt": prompt, "max_tokens": max_tokens + 10 * i, "ignore_eos": True, "n": 1 + i % 2}
        for i in range(n)
    ]
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))


@pytest.mark.timeout(150)
def test_a_job_survives_every_fault(tmp_path):
    """A signal to the launcher, one to a rank, a killed rank, all killed: one run in the end."""
    write_input(tmp_path, 6)
    out = tmp_path / "out.jsonl"
    faults = [
        ("tp=2", lambda job: job.end(signal.SIGTERM), "by SIGTERM"),
        ("dp=2", lambda job: job.end(signal.SIGUSR1, job.ranks()[1]), "on another rank"),
        ("pp=2", lambda job: job.end(signal.SIGKILL, job.ranks()[1]), None),
        ("cp=2", lambda job: job.end(signal.SIGKILL, *job.ranks(), job.job), None),
    ]
    steps = TOKENS.format(step_s=0.02, token_s=0)
    for layout, fault, words in faults:
        before = progress(out)
        with Started(tmp_path, 2, steps, *options(tmp_path, layout)) as job:
            job.wait_for(lambda before=before: advanced(out, before))
            code, lines, seconds = fault(job)
        assert progress(out) > before and seconds < scaled(10)
        if words is None:
            # The files open, and what is lost is not older than the interval
            assert code != 0 and time.time() - os.path.getmtime(f"{out}.state") < seconds + 1
            with h5py.File(tmp_path / "out.h5") as f:
                assert not f.attrs["complete"]
        else:
            assert code == REQUEUE and len(lines) == 1, (code, lines)
            assert lines[0].startswith(f"hpcinfer: stopped {words} with ") and GO_ON in lines[0]

    # The rest, and all of it in one go
    for name in ("out", "straight"):
        done = run_job(1, sys.executable, "-m", "hpcinfer", *options(tmp_path, "tp=1", name))
        assert done.returncode == 0, done.stderr
    assert "requests finished, 0 refused -> " in done.stdout
    assert out.read_bytes() == (tmp_path / "straight.jsonl").read_bytes()
    with h5py.File(tmp_path / "out.h5") as a, h5py.File(tmp_path / "straight.h5") as b:
        assert a["token_ids"][:].tolist() == b["token_ids"][:].tolist()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {
        "in.jsonl", "log", "slow.py", "out.jsonl", "out.jsonl.done", "out.h5", "straight.jsonl",
        "straight.jsonl.done", "straight.h5",
    }  # fmt: skip


def test_a_long_prefill_is_left_in_time(tmp_path):
    """A prompt that takes 16 s is computed in steps that are short enough."""
    write_input(tmp_path, 1, prompt=STORY * 40)
    prefill = TOKENS.format(step_s=0, token_s=0.02)
    with Started(tmp_path, 2, prefill, *options(tmp_path, "tp=2")) as job:
        job.wait_for((tmp_path / "out.jsonl.state").exists)
        time.sleep(1)
        code, lines, seconds = job.end(signal.SIGTERM)
    assert code == REQUEUE and seconds < scaled(6)
    assert lines == [
        f"hpcinfer: stopped by SIGTERM with 0 of 1 requests finished and 0 under way{GO_ON}"
    ]


def test_a_long_prefill_gets_ahead_from_job_to_job(tmp_path):
    """A long prompt goes on where it was, after a signal and after all ranks were killed."""
    write_input(tmp_path, 1, prompt=STORY * 60, max_tokens=3)
    prefill = TOKENS.format(step_s=0, token_s=0.01)
    command = (*options(tmp_path, "tp=2"), "--checkpoint-kv", "--step-tokens", 64)
    out, reached = tmp_path / "out.jsonl", 0

    def computed():
        state = read_state(f"{out}.state") or {}
        kept = [f["sequences"].values() for f in state.get("kv", {}).values()]
        return max((sample[0] for samples in kept for s in samples for sample in s), default=0)

    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
        with Started(tmp_path, 2, prefill, *command) as job:
            job.wait_for(lambda before=reached: computed() > before)
            targets = [*job.ranks(), job.job] if number == signal.SIGKILL else []
            _, _, seconds = job.end(number, *targets)
        assert computed() > reached and seconds < scaled(6)
        reached = computed()
    for name in ("out", "straight"):
        again = [*options(tmp_path, "tp=2", name), *["--checkpoint-kv"] * (name == "out")]
        done = run_job(2, sys.executable, "-m", "hpcinfer", *again)
        assert done.returncode == 0, done.stderr
    assert out.read_bytes() == (tmp_path / "straight.jsonl").read_bytes()
    assert not list(tmp_path.glob("*.kv"))


def test_a_step_without_end_does_not_keep_the_job(tmp_path):
    """What the last step found is saved, and the job ends with the same code."""
    write_input(tmp_path, 2)
    hangs = (
        "stop._ORDER_S = 1.0, 1.5\nsteps = []\n"
        'slow(Model, "forward", lambda s: steps.append(s) or 0.01 + 60 * (len(steps) > 20))'
    )
    with Started(tmp_path, 2, hangs, *options(tmp_path, "tp=2", every_s=100)) as job:
        job.wait_for((tmp_path / "out.jsonl.state").exists)
        time.sleep(1)
        code, lines, seconds = job.end(signal.SIGUSR1)
    assert code == REQUEUE and seconds < scaled(5)
    assert lines == [f"hpcinfer: stopped by SIGUSR1 in a long step{GO_ON}"]
    assert progress(tmp_path / "out.jsonl") == (0, 3 * 20)


def test_an_interrupt_stops_in_order_and_a_second_one_at_once(tmp_path):
    write_input(tmp_path, 4)
    path = tmp_path / "out.jsonl"
    steps = TOKENS.format(step_s=0.02, token_s=0)
    with Started(tmp_path, 2, steps, *options(tmp_path, "tp=2")) as job:
        job.wait_for(lambda: progress(path) > (0, 0))
        code, lines, _ = job.end(signal.SIGINT)
    assert code == REQUEUE and len(lines) == 1
    assert lines[0].startswith("hpcinfer: stopped by SIGINT with ") and progress(path) > (0, 0)

    # A step that does not end is not waited for by who presses again.
    hangs = 'stop._SAME_S = 0.1\nslow(Model, "forward", lambda s: 60)'
    with Started(tmp_path, 1, hangs, *options(tmp_path, "tp=1")) as job:
        job.wait_for(lambda: "generate:" in job.log.read_text())
        time.sleep(0.5)
        for process in job.ranks():
            process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        code, lines, seconds = job.end(signal.SIGINT, *job.ranks())
    assert lines == ["hpcinfer: killed by a second SIGINT; what OUTPUT.state holds is kept"]
    assert code == SIGNALLED + signal.SIGINT and seconds < 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_without_a_state_ends_in_one_line(tmp_path, number):
    """And leaves no part of a file."""
    reads = 'slow(Checkpoint, "_read_box", lambda *_: 60)\nslow(Checkpoint, "stream", lambda _: 60)'
    with Started(tmp_path, 1, reads, "convert", SHIPPED, tmp_path / "model.h5") as job:
        job.wait_for((tmp_path / "model.h5.partial").exists)
        code, lines, seconds = job.end(number, *job.ranks())
    assert code == SIGNALLED + number and seconds < 4
    assert lines == [f"hpcinfer: ended by {signal.Signals(number).name}"]
    assert "Traceback" not in job.log.read_text() and not list(tmp_path.glob("model*"))


@pytest.mark.parametrize("target", ["launcher", "last rank"])
def test_a_signal_while_the_model_is_read(tmp_path, target):
    write_input(tmp_path, 1)
    reads = 'slow(Checkpoint, "read", lambda *_, **__: 60)'
    with Started(tmp_path, 2, reads, *options(tmp_path, "tp=2")) as job:
        job.wait_for((tmp_path / "out.jsonl.lock").exists)
        time.sleep(1)
        rank = [job.ranks()[-1]] if target == "last rank" else []
        code, lines, seconds = job.end(signal.SIGTERM, *rank)
    assert code == REQUEUE and seconds < scaled(5)
    who = "hpcinfer (rank 1)" if rank else "hpcinfer"
    assert lines == [f"{who}: stopped by SIGTERM before the first step{GO_ON}"]
    assert not list(tmp_path.glob("out.*[!k]"))


def test_a_signal_while_the_output_is_put_in_order(tmp_path):
    """There is nothing left to stop: the run finishes."""
    write_input(tmp_path, 2, max_tokens=3)
    ordering = 'slow(JsonlWriter, "close", lambda final=True: 0.6)'
    with Started(tmp_path, 1, ordering, *options(tmp_path, "tp=1")) as job:
        path = Path(f"{tmp_path / 'out.jsonl'}.index")
        job.wait_for(lambda: path.exists() and len(path.read_bytes().splitlines()) == 2)
        code, lines, _ = job.end(signal.SIGTERM)
    assert (code, lines) == (0, []) and len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
