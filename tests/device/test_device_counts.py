"""What a step of decoding tells a GPU: launches, copies, waits and allocations, to the last one.

Counted on the stand-in for CuPy, with a model of 24 layers in bfloat16 on one rank
(`standin/count_steps.py`). Each costs the host some microseconds, in which a small model's step
could have ended. Who saves some, or needs more, changes the table.
"""

import json
import sys

import pytest
from helpers.paths import TESTS

pytestmark = pytest.mark.single

SCRIPT = TESTS / "standin" / "count_steps.py"
BATCHES = (1, 8)  # sequences that decode at a time

COUNTS = {
    # kernels, fills, and copies within the device; a graph counts as one
    "launch": (4, 4),
    # graphs among them, and what the graphs launch
    "graph": (1, 1),
    "graph_launch": (194, 218),
    # copies to the device and from it
    "h2d": (2, 2),
    "d2h": (1, 1),
    # times that the host waits for the device
    "sync": (1, 1),
    # arrays made, in memory of a pool
    "alloc": (4, 4),
    # pieces of page-locked memory taken from their pool, and events made
    "pinned": (1, 1),
    "event": (1, 1),
}


@pytest.fixture(scope="module")
def steps(standin):
    """What was counted for each batch."""
    from helpers.jobs import run_job

    settings = {"STANDIN_TRACE": "1", "STANDIN_DRY": "1"} | standin
    done = run_job(1, sys.executable, SCRIPT, *BATCHES, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("kind", COUNTS)
def test_a_step_of_decoding(steps, kind):
    """As in the table; if not, it says where they come from."""
    found = tuple(step["counts"].get(kind, 0) for step in steps)
    lines = [
        f"batch {step['batch']}: {n:8.2f}  {what}  {at}"
        for step in steps
        for of_kind, what, at, n in step["places"]
        if of_kind == kind
    ]
    assert found == COUNTS[kind], "\n".join(lines)


def test_nothing_else_is_counted(steps):
    assert {kind for step in steps for kind in step["counts"]} <= COUNTS.keys()


@pytest.fixture(scope="module")
def steps_of_two(standin):
    """As `steps`, of one sequence on two GPUs: {wanted by HPCINFER_NCCL: counts}."""
    from helpers.jobs import run_job

    found, settings = {}, {"STANDIN_DRY": "1", "STANDIN_DEVICES": "2"} | standin
    for wanted in ("0", "1"):
        done = run_job(2, sys.executable, SCRIPT, 1, HPCINFER_NCCL=wanted, **settings)
        assert done.returncode == 0, done.stdout + done.stderr
        found[wanted] = json.loads(done.stdout)["counts"]
    return found


def test_sums_over_gpus_by_nccl_wait_for_nobody(steps_of_two):
    """They are in the step's one graph; by MPI each cuts it: a copy there, one back, a wait."""
    sums, (alone, *_) = 2 * 24 + 1, zip(*COUNTS.values(), strict=True)
    alone = dict(zip(COUNTS, alone, strict=True))
    by_nccl, by_mpi = steps_of_two["1"], steps_of_two["0"]
    assert by_nccl == alone | {"graph_launch": alone["graph_launch"] + sums}
    assert by_mpi["graph"] == 1 + sums
    assert [by_mpi[kind] - alone[kind] for kind in ("h2d", "d2h", "sync")] == [sums] * 3
