"""Record what transformers computes with the cases of `models.py`.

    python tests/reference/record.py [case ...]

Needs torch and transformers (the test extra). For every case the model is built by transformers'
own configuration class, takes the weights of `models.weights` and runs in float32 with eager
attention. Written are `<case>.json` and `<case>.npz`:

    tensors        name and shape of every tensor that `save_pretrained` writes
    seed           of the weights: the first with which every greedy choice is decided by more than
                   MARGIN, no greedy path runs into a short cycle, and experts are chosen clearly:
                   the same ones with weights rounded to 16 bits, in the text of ROUNDED tokens, and
                   with routers off by oracle.NUDGE, in all texts
    logprobs_<n>   (n,) log-probability of each token of `models.tokens(case, n)` given those
                   before it; the first is NaN
    bfloat16, float16   (ROUNDED,) the same with the weights rounded to that type
    logits         (SHORT, V) of the text of SHORT tokens
    hidden         (N + 1, SHORT, D) its activations before each layer, and the final normed ones
    greedy         64 greedy tokens after each prompt, and the smallest margin of the choices
    noise          largest difference of a log-probability between float32 and float64

It also checks that transformers loads the written directory itself, and then computes the same.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from pathlib import Path

import models
import numpy as np
import torch
import transformers
from oracle import fresh, greedy, logprobs, nudged, put_weights, same_experts, saved_tensors
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SHORT = 3
ROUNDED = 33
LENGTHS = (1, 7, ROUNDED, 150)
PROMPTS = (12, 70, 90)
NEW_TOKENS = 64
MARGIN = 2e-3
DISTINCT = 20
SEEDS = 200
HALF = (torch.bfloat16, torch.float16)


def build(case: str) -> torch.nn.Module:
    """Return the model of a case by its configuration class, with transformers' initial weights."""
    config = copy.deepcopy(models.CASES[case])
    config = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    return AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    ).eval()


def generated(model: torch.nn.Module, ids: list[int]) -> list[int]:
    """Return the greedy tokens that transformers' own `generate` gives."""
    out = fresh(model).generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(ids) :].tolist()


def decided(case: str, model: torch.nn.Module, facts: dict) -> None:
    """Load the weights of the first seed with clear greedy choices and DISTINCT or more tokens."""
    for seed in range(SEEDS):
        facts["seed"] = seed
        put_weights(model, models.weights(case, facts))
        text = models.tokens(case, ROUNDED)
        if not all(same_experts(model, rounded(model, dtype), text) for dtype in HALF):
            continue
        paths = [greedy(model, models.tokens(case, n), NEW_TOKENS) for n in PROMPTS]
        clear = min(margin for _, margin in paths) > MARGIN
        varied = min(len(set(path)) for path, _ in paths) >= DISTINCT
        texts = [models.tokens(case, max(LENGTHS))]
        texts += [models.tokens(case, n) + p for n, (p, _) in zip(PROMPTS, paths, strict=True)]
        if clear and varied and all(same_experts(model, nudged(model), ids) for ids in texts):
            break
    else:
        raise RuntimeError(f"record: no seed of {SEEDS} gives case {case} clear and varied paths")
    facts["greedy"] = [
        {"prompt": n, "tokens": path, "margin": margin}
        for n, (path, margin) in zip(PROMPTS, paths, strict=True)
    ]


def rounded(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Return a float32 copy whose weights are rounded to `dtype`."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(dtype).float())
    return model


def record(case: str) -> None:
    """Record one case and say in a line how it went."""
    model = build(case)
    facts = {
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "tensors": saved_tensors(model),
    }
    decided(case, model, facts)

    # Log-probabilities in float32, with rounded weights, and against float64
    texts = {n: models.tokens(case, n) for n in LENGTHS}
    arrays = {f"logprobs_{n}": logprobs(model, ids) for n, ids in texts.items()}
    arrays["bfloat16"] = logprobs(rounded(model, torch.bfloat16), texts[ROUNDED])
    arrays["float16"] = logprobs(rounded(model, torch.float16), texts[ROUNDED])
    double = copy.deepcopy(model).double()
    facts["noise"] = max(
        float(np.nanmax(np.abs(logprobs(double, ids) - arrays[f"logprobs_{n}"]), initial=0))
        for n, ids in texts.items()
        if n > 1
    )

    # All of a short text, for finding the layer that differs
    with torch.no_grad():
        out = fresh(model)(torch.tensor([models.tokens(case, SHORT)]), output_hidden_states=True)
    arrays["logits"] = out.logits[0].numpy()
    arrays["hidden"] = torch.stack(out.hidden_states)[:, 0].numpy()

    # Write, then check that transformers reads the directory and generates the same
    (models.HERE / f"{case}.json").write_text(compact(facts))
    np.savez_compressed(models.HERE / f"{case}.npz", **arrays)
    with tempfile.TemporaryDirectory() as directory:
        models.write_model(case, Path(directory), shards=models.SHARDS.get(case, 1))
        loaded = AutoModelForCausalLM.from_pretrained(
            directory,
            attn_implementation="eager",
            experts_implementation="eager",
            dtype=torch.float32,
        ).eval()
    for n, ids in texts.items():
        np.testing.assert_array_equal(logprobs(loaded, ids), arrays[f"logprobs_{n}"])
    for path in facts["greedy"]:
        if generated(loaded, models.tokens(case, path["prompt"])) != path["tokens"]:
            raise RuntimeError(f"record: generate() differs from the cached loop in case {case}")

    margin = min(path["margin"] for path in facts["greedy"])
    kinds = [len(set(path["tokens"])) for path in facts["greedy"]]
    full = arrays[f"logprobs_{ROUNDED}"]
    change = [float(np.nanmax(np.abs(arrays[d] - full))) for d in ("bfloat16", "float16")]
    print(
        f"{case:22s} seed {facts['seed']:2d}  margin {margin:.4f}  noise {facts['noise']:.1e}  "
        f"distinct tokens {kinds}  mean log-probability {float(np.nanmean(full)):.2f}  "
        f"bfloat16 {change[0]:.3f}  float16 {change[1]:.4f}"
    )


def compact(facts: dict) -> str:
    """Return JSON with one tensor or greedy path per line."""
    lines = []
    for key, value in facts.items():
        if isinstance(value, list):
            rows = ",\n".join(f"    {json.dumps(row)}" for row in value)
            lines.append(f"  {json.dumps(key)}: [\n{rows}\n  ]")
        else:
            lines.append(f"  {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> None:
    """Record the cases named on the command line, all of them by default."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for case in sys.argv[1:] or models.CASES:
        record(case)


if __name__ == "__main__":
    main()
