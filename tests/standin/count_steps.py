"""What one step of decoding tells the device, on the stand-in: a line of JSON for every batch.

    python tests/standin/count_steps.py BATCH...         also under mpirun: tp over all ranks

The model has 24 layers of the Llama family with random weights in bfloat16, as narrow as the
kernels serve. Two runs of different length differ by steps of decoding alone; before them come some
in which what can be captured is captured, and the pools become as large as they need.

STANDIN_TRACE=1 adds the places that the counts come from, and
STANDIN_DRY=1 saves the time of the kernels.
"""

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
from cupy import _notes
from mpi4py import MPI
from safetensors.numpy import save_file

TESTS = Path(__file__).resolve().parent.parent
sys.path[1:1] = [str(TESTS), str(TESTS.parent)]

from reference import models  # noqa: E402

import hpcinfer  # noqa: E402

N, D, H, G, K, F, V = 24, 64, 4, 2, 16, 96, 256
PROMPT, SHORT, LONG = 4, 8, 24  # tokens, all in one page of the cache


def write_model(folder):
    """A Hugging Face directory with random weights."""
    config = models.CASES["llama-gqa"] | {
        "hidden_size": D,
        "num_attention_heads": H,
        "num_key_value_heads": G,
        "head_dim": K,
        "intermediate_size": F,
        "num_hidden_layers": N,
        "vocab_size": V,
        "dtype": "bfloat16",
    }
    of_layer = {
        "input_layernorm": (D,),
        "post_attention_layernorm": (D,),
        "self_attn.q_proj": (H * K, D),
        "self_attn.k_proj": (G * K, D),
        "self_attn.v_proj": (G * K, D),
        "self_attn.o_proj": (D, H * K),
        "mlp.gate_proj": (F, D),
        "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
    }
    shapes = {"model.embed_tokens": (V, D), "model.norm": (D,), "lm_head": (V, D)}
    shapes |= {f"model.layers.{n}.{k}": shape for n in range(N) for k, shape in of_layer.items()}
    rng = np.random.default_rng(1)
    weights = {
        f"{name}.weight": (rng.standard_normal(shape) / 8).astype(ml_dtypes.bfloat16)
        for name, shape in shapes.items()
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def counts_of(engine, batch, n):
    """What `n` new tokens for each of some sequences tell the device."""
    prompts = [{"prompt_token_ids": [b + 1] * PROMPT, "ignore_eos": True} for b in range(batch)]
    before = Counter(_notes.counts), Counter(_notes.places)
    engine.generate(prompts, max_tokens=n, temperature=0)
    return _notes.counts - before[0], _notes.places - before[1]


def main(batches):
    """Print the counts of a step for every batch."""
    comm = MPI.COMM_WORLD
    with tempfile.TemporaryDirectory(prefix="standin-") as folder:
        write_model(Path(folder))
        folder = comm.bcast(folder)
        engine = hpcinfer.load(folder, dtype="bfloat16", device="cuda", kv_memory=1 << 24)
        comm.Barrier()
    for batch in batches:
        runs = [counts_of(engine, batch, n) for n in (LONG, LONG, LONG, SHORT)]
        (long, of_long), (short, of_short) = runs[-2:]
        long.subtract(short), of_long.subtract(of_short)
        steps = LONG - SHORT
        del long["cudaMalloc"]  # comes and goes with the pieces that a pool is in
        counts = {kind: n / steps for kind, n in sorted(long.items()) if n}
        places = [[*at, n / steps] for at, n in of_long.most_common() if n]
        if comm.rank == 0:
            line = {"batch": batch, "counts": counts, "places": places}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main([int(batch) for batch in sys.argv[1:]])
