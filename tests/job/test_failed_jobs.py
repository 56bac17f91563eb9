"""A job that fails with nothing done binds no other; one whose requests are refused may say so."""

import json
import shutil

import numpy as np
import pytest
from helpers.jobs import HPCINFER, run_job
from helpers.paths import SHIPPED
from safetensors.numpy import load_file, save_file

pytestmark = pytest.mark.single


def too_large(folder):
    """The shipped model with weights that float16 cannot hold."""
    shutil.copytree(SHIPPED, folder)
    (path,) = folder.glob("*.safetensors")
    weights = {name: w.astype(np.float32) for name, w in load_file(path).items()}
    for name in weights:
        if "down_proj" in name:
            weights[name] *= 3e5
    save_file(weights, path, metadata={"format": "pt"})
    return folder


def generate(model, folder, *options):
    return run_job(
        1, *HPCINFER, "generate", model, "--input", folder / "in.jsonl", "--output",
        folder / "out.jsonl", "--kv-memory", "16M", "--kernels", "plain", *options,
    )  # fmt: skip


def test_another_dtype_may_be_chosen_as_the_refusal_says(tmp_path):
    model = too_large(tmp_path / "model")
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "Once", "max_tokens": 2}))
    done = generate(model, tmp_path, "--dtype", "float16")
    assert done.returncode == 1 and "choose another --dtype" in done.stderr
    assert "Warning" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "model"]
    assert generate(model, tmp_path, "--dtype", "bfloat16").returncode == 0


def test_strict_jobs_end_with_an_error_if_a_request_is_refused(tmp_path):
    lines = [{"prompt": "Once", "max_tokens": 2}, {"prompt": "Once", "beam": 2}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = generate(SHIPPED, tmp_path, "--strict")
    assert done.returncode == 1 and "need none under --strict" in done.stderr
    assert "line 2: request: got the unknown field 'beam'" in done.stdout
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
