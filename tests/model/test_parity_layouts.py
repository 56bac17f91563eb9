"""Every layout gives the recorded answers: drawn ones, and experts spread in every way."""

import os
import shutil
import sys
import tempfile
from functools import partial

import numpy as np
import pytest
from helpers import layouts
from helpers.parity import spread
from helpers.paths import ROOT, TESTS
from helpers.recorded import difference, load
from mpi4py import MPI
from reference import models
from reference.parity import on_root, score_gap

import hpcinfer
from hpcinfer import array

SIZE = MPI.COMM_WORLD.size
CASES = ("llama-gqa", "mixtral")
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3")
N_LAYOUTS, SEED = 20, 1


def drawn(size):
    """case/layout for the drawn layouts of both cases."""
    return [f"{case}/{x}" for case in CASES for x in layouts.draw(size, case, N_LAYOUTS, SEED)]


@pytest.fixture(scope="module")
def folder(comm):
    """Models of all cases, each written when it is first loaded."""
    path = on_root(comm, tempfile.mkdtemp)
    yield path
    comm.Barrier()
    if comm.rank == 0:
        shutil.rmtree(path)


@pytest.mark.parametrize("item", drawn(SIZE))
def test_a_drawn_layout_gives_the_recorded_answers(comm, folder, item):
    case, _, layout = item.partition("/")
    found = difference(load(comm, folder, case, layout), case)
    assert not found, f"{item}: {found}"


@pytest.mark.parametrize("layout", spread(SIZE))
@pytest.mark.parametrize("case", FAMILIES)
def test_spread_experts_give_the_recorded_answers(comm, folder, case, layout):
    found = difference(load(comm, folder, case, layout), case)
    assert not found, f"{case}/{layout}: {found}"


@pytest.mark.parametrize("layout", [*spread(SIZE), f"cp={SIZE},zero=allgather", f"pp={SIZE}"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", ["mixtral", "deepseek_v2"])
def test_half_precision_stays_near(comm, shared_path, case, dtype, layout):
    """Tokens that travel in it lose no more than rounding the weights does."""
    if not layouts.is_legal(layout, SIZE):
        pytest.skip("one rank has no pieces")
    path = on_root(comm, partial(models.write_model, case, shared_path / "model", dtype=dtype))
    engine = hpcinfer.load(path, comm, layout, kv_memory=1 << 24)
    assert engine.model.dtype == np.dtype(array.parse_dtype(dtype))
    arrays = models.record(case)["arrays"]
    full, rounded = arrays["logprobs_33"], arrays[dtype]
    change = np.nanmax(np.abs(rounded - full))
    assert score_gap(engine, [models.tokens(case, 33)], [full]) < 3 * change


@pytest.mark.single
@pytest.mark.timeout(180)
@pytest.mark.parametrize("size", [6, 8])
def test_many_ranks_give_the_recorded_answers(mpirun, size):
    """In a job of its own, whatever the number of ranks of this session."""
    items = [*drawn(size), *(f"{case}/{x}" for case in FAMILIES[1:] for x in spread(size)[4:6])]
    program = (sys.executable, "-m", "mpi4py", "-m", "helpers.recorded")
    paths = os.pathsep.join([str(TESTS), str(ROOT)])
    done = mpirun(size, *program, *items, timeout_s=170, PYTHONPATH=paths)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_drawn_layouts_hold_every_strategy():
    """As far as there are ranks for it, the seed leaves no room out."""
    texts = [layout for size in (4, 6, 8) for layout in drawn(size)]
    for word in ("pp", "dp", "cp", "tp", "ep"):
        assert any(f"{word}={n}" in text for text in texts for n in range(2, 9)), word
    for name, values in layouts.STRATEGIES.items():
        assert all(any(f"{name}={value}" in text for text in texts) for value in values), name
    assert all(case in models.CASES for case in CASES)
