"""hpcinfer on the stand-in beside hpcinfer on the CPU: one line of JSON for every case.

    mpirun -n P python tests/standin/compare.py CASE...

A case reads MODEL/LAYOUT/DTYPE, such as llama-gqa/tp=2/float32: a model of `reference.models`, or
"shipped". A fourth word is int8 or int4 for weights as integers, or plain for array code alone.
The line has the differences that the rank with most of them found, the hazards of all ranks, and
how many graphs were launched.
"""

import json
import math
import sys
import tempfile
import traceback
from collections import Counter
from functools import partial
from pathlib import Path

import cupy
import numpy as np
from cupy import _notes
from mpi4py import MPI

TESTS = Path(__file__).resolve().parent.parent
sys.path[1:1] = [str(TESTS), str(TESTS.parent)]

from reference import models  # noqa: E402

import hpcinfer  # noqa: E402
from hpcinfer.io.convert import convert  # noqa: E402
from hpcinfer.model.weights.quantize import recoding  # noqa: E402
from hpcinfer.ops import dispatch  # noqa: E402

TOLERANCES = {"float32": 2e-4, "bfloat16": 6e-2, "float16": 2e-2}
BITS = {"int8": 8, "int4": 4}
LENGTHS = (7, 33, 50)
TOKENS = 9  # enough for a graph to be captured, tried, and launched again
POINTS = ("residual", "attention", "ffn", "q", "k", "v", "lse", "logits")
SAMPLED = (  # text, options: every filter and penalty at least once
    (0, {"temperature": 0.9, "seed": 3, "logprobs": 3}),
    (1, {"temperature": 0.8, "top_p": 0.8, "seed": 4}),
    (0, {"temperature": 0.8, "top_k": 5, "seed": 5, "n": 2}),
    (1, {"temperature": 1.0, "min_p": 0.1, "seed": 6, "repetition_penalty": 1.2,
         "presence_penalty": 0.3, "frequency_penalty": 0.2, "min_tokens": 3}),
)  # fmt: skip


def model_of(name, word, folder):
    """Path of a case's model, written when it is first asked for."""
    source = TESTS.parent / "data" / "model" if name == "shipped" else folder / name
    if not source.exists():
        models.write_model(name, source)
    if word not in BITS:
        return source
    coded = folder / f"{name}-{word}.h5"
    if not coded.exists():
        convert(source, coded, recode=partial(recoding, bits=BITS[word], group=32))
    return coded


def texts_of(name):
    """Token ids of the prompts."""
    if name != "shipped":
        return [models.tokens(name, n) for n in LENGTHS]
    return [[(7 * i * i + 3 * i + n) % 1000 + 1 for i in range(n)] for n in LENGTHS]


def answers(engine, texts):
    """What an engine says to the texts: name -> array; names of tokens begin with "token"."""
    found = {}
    for i, score in enumerate(engine.score(texts)):
        found[f"score {i}"] = np.asarray(score.logprobs[1:], np.float64)
    prompts = [{"prompt_token_ids": text} for text in texts]
    greedy = engine.generate(prompts, max_tokens=TOKENS, temperature=0)
    requests = [{"prompt_token_ids": texts[i], "max_tokens": 4, **how} for i, how in SAMPLED]
    for kind, results in (("greedy", greedy), ("sampled", engine.generate(requests))):
        for i, result in enumerate(results):
            for choice in result.choices:
                found[f"tokens {kind} {i}.{choice.index}"] = np.asarray(choice.token_ids)
    arch = engine.model.arch
    points = [p for p in POINTS if p != "v" or arch.mla is None] + ["router"] * bool(arch.E)
    for pool in (None, "mean"):
        found |= extracted(engine, texts[:2], tuple(points), pool)
    return found


def extracted(engine, texts, points, pool):
    """Activations at some points; numbers of experts have no mean."""
    points = tuple(p for p in points if pool is None or p != "router")
    found = {}
    for i, result in enumerate(engine.extract(texts, what=points, pool=pool)):
        for point in points:
            by_layer = result[point] if isinstance(result[point], dict) else {"": result[point]}
            for layer, x in by_layer.items():
                found[f"{point} {i} {layer} {pool}"] = np.asarray(x, np.float64)
    return found


def differences(got, expected, dtype):
    """Lines on what differs by more than rounding; tokens are compared in float32 alone."""
    lines = [f"{name}: only one has it" for name in got.keys() ^ expected.keys()]
    for name in got.keys() & expected.keys():
        x, y = got[name], expected[name]
        if x.shape != y.shape:
            lines.append(f"{name}: shapes {x.shape} and {y.shape}")
        elif name.startswith("tokens"):
            if dtype == "float32" and not np.array_equal(x, y):
                lines.append(f"{name}: got {x.tolist()}, need {y.tolist()}")
        elif not (gap := apart(x, y)) < TOLERANCES[dtype]:
            lines.append(f"{name}: differs by {gap:.1e}")
    return sorted(lines)


def apart(x, y):
    """Largest difference of two arrays, relative to the largest value; infinite if it is nowhere.

    Minus infinity, which an empty attention has, equals itself.
    """
    if not np.array_equal(np.isfinite(x), np.isfinite(y)):
        return math.inf
    x, y = x[np.isfinite(x)], y[np.isfinite(y)]
    return np.abs(x - y).max(initial=0) / (1 + np.abs(y).max(initial=0))


def verdict(comm, case, folder):
    """Differences and hazards of a case, on rank 0; None elsewhere."""
    name, layout, dtype, word = (*case.split("/"), None)[:4]
    path = comm.bcast(model_of(name, word, folder) if comm.rank == 0 else None)
    found = {}
    for device in ("cpu", "cuda"):
        dispatch.use("plain" if device == "cpu" or word == "plain" else "auto")
        engine = hpcinfer.load(
            str(path), comm, layout, dtype=dtype, device=device, kv_memory=1 << 24
        )
        found[device] = answers(engine, texts_of(name))
    lines = comm.gather(differences(found["cuda"], found["cpu"], dtype))
    graphs = _notes.counts["graph"]
    hazards = comm.gather(Counter({" at ".join(k): n for k, n in _notes.hazards.items()}))
    _notes.clear()
    if comm.rank == 0:
        facts = {"hazards": sum_of(hazards), "graphs": graphs}
        return {"case": case, "differences": max(lines, key=len)} | facts
    return None


def sum_of(counters):
    """The counters of all ranks as one."""
    total = Counter()
    for counter in counters:
        total.update(counter)
    return dict(total)


def main(cases):
    """Compare every case; a rank that fails ends the job."""
    comm = MPI.COMM_WORLD
    folder = comm.bcast(tempfile.mkdtemp(prefix="standin-") if comm.rank == 0 else None)
    for case in cases:
        try:
            found = verdict(comm, case, Path(folder))
        except Exception:
            print(
                f"{case}: rank {comm.rank}\n{traceback.format_exc()}", file=sys.stderr, flush=True
            )
            comm.Abort(1)
            raise
        if found is not None:
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    assert "standin" in cupy.__version__
    main(sys.argv[1:])
