"""What a step of decoding tells a GPU: launches, copies, waits and allocations, to the last one.

Counted on the stand-in for CuPy, with a model of 24 layers in bfloat16 on one rank
(`standin/count_steps.py`). Each costs the host some microseconds, in which a small model's step
could have ended. Who saves some, or needs more, changes the table.
"""

import json
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.single

SCRIPT = Path(__file__).resolve().parent / "standin" / "count_steps.py"
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
    from conftest import run_job

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
