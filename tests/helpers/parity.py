"""A case over all ranks beside what is recorded of it."""

from functools import partial

from reference import models
from reference.parity import TOLERANCE, greedy, on_root, score_gap

import hpcinfer
from helpers import layouts
from hpcinfer.io.convert import convert


def spread(size):
    """Layouts that spread experts over tp, over cp, over dp, and over an FFN side."""
    texts = [f"{axis}={size},ep={size}" for axis in ("tp", "cp", "dp")]
    texts += [f"tp={size},sp=on,ep={size}"]
    if size > 1:
        texts += [f"afd={M}:{size - M}" for M in {1, size // 2, size - 1}]
    if size > 2:
        texts += [f"cp={size - 1},ep=1,afd={size - 1}:1", f"tp={size - 1},sp=on,afd={size - 1}:1"]
    if size > 3:
        texts += [f"tp=2,dp={size // 2},ep={size},sp=on", f"dp=2,afd=2:{size - 2},ep=1"]
    return [text for text in texts if layouts.is_legal(text, size)]


LENGTHS = (1, 7, 33, 150)


def write(case, form, path, dtype="float32"):
    """Write a case as a Hugging Face directory or a converted file; returns its path."""
    directory = models.write_model(case, path / "model", models.SHARDS.get(case, 1), dtype)
    if form == "directory":
        return directory
    convert(directory, path / "model.h5")
    return path / "model.h5"


def load(comm, case, form, path, dtype="float32", layout=None, **options):
    """Write a case on rank 0 and load it over all ranks."""
    model = on_root(comm, partial(write, case, form, path, dtype))
    layout = layout or f"tp={comm.size}"
    return hpcinfer.load(model, comm=comm, layout=layout, **options)


def assert_equals_record(engine, case):
    """Compare scores of all recorded texts and all recorded greedy paths."""
    record = models.record(case)
    texts = [models.tokens(case, n) for n in LENGTHS]
    expected = [record["arrays"][f"logprobs_{n}"] for n in LENGTHS]
    assert score_gap(engine, texts, expected) < TOLERANCE
    prompts = [models.tokens(case, path["prompt"]) for path in record["greedy"]]
    assert greedy(engine, prompts, 64) == [path["tokens"] for path in record["greedy"]]
