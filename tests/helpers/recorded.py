"""A layout's answers beside the recorded ones; run as a program, of many layouts in one job.

    PYTHONPATH=tests mpirun -n 6 python -m mpi4py -m helpers.recorded mixtral/ep=3,dp=2,tp=3

The program prints a line for each layout that answers otherwise, and its exit status is 1 then.
"""

import shutil
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path

import numpy as np
from reference import models
from reference.parity import TOLERANCE, greedy, on_root

LENGTHS, PROMPTS, NEW = (7, 33, 150), 2, 16
KV_MEMORY = 1 << 26


def load(comm, folder, case, layout, **options):
    """A case over all ranks, written to the folder where it is not yet there."""
    import hpcinfer

    path = on_root(comm, partial(_written, folder, case))
    return hpcinfer.load(path, comm, layout, **{"kv_memory": KV_MEMORY} | options)


def _written(folder, case):
    path = Path(folder) / case
    return path if path.exists() else models.write_model(case, path)


def difference(engine, case):
    """What an engine answers otherwise than is recorded of a case, in words; "" for nothing."""
    record = models.record(case)
    texts = [models.tokens(case, n) for n in LENGTHS]
    for n, score in zip(LENGTHS, engine.score(texts), strict=True):
        gap = np.abs(score.logprobs[1:] - record["arrays"][f"logprobs_{n}"][1:]).max()
        if not gap < TOLERANCE:
            return f"log-probabilities of {n} tokens differ by {gap:.2e}"
    paths = record["greedy"][:PROMPTS]
    expected = [path["tokens"][:NEW] for path in paths]
    found = greedy(engine, [models.tokens(case, path["prompt"]) for path in paths], NEW)
    return "" if found == expected else f"got tokens {found}, need {expected}"


def main(items):
    """Check case/layout for each item; returns the exit status."""
    from mpi4py import MPI

    comm, failed = MPI.COMM_WORLD, 0
    folder = on_root(comm, tempfile.mkdtemp)
    for item in items:
        case, _, layout = item.partition("/")
        try:
            found = difference(load(comm, folder, case, layout), case)
        except Exception:
            # The others may wait for this rank.
            print(f"{item}: rank {comm.rank}: {traceback.format_exc()}", flush=True)
            comm.Abort(1)
        found = [of_rank for of_rank in comm.allgather(found) if of_rank]
        failed += bool(found)
        if found and comm.rank == 0:
            print(f"{item}: {found[0]}", flush=True)
    if comm.rank == 0:
        shutil.rmtree(folder)
        print(f"{len(items)} layouts on {comm.size} ranks, {failed} failed", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
