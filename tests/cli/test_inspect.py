"""What inspect says of a model that cannot run, of types, and of lines of results."""

import json
import shutil

import pytest
from helpers.paths import SHIPPED

from hpcinfer.cli.inspect import _verdict
from hpcinfer.io.inspect import describe
from hpcinfer.io.models import open_checkpoint
from hpcinfer.model.families import read_architecture

pytestmark = pytest.mark.single

CONFIG = json.loads((SHIPPED / "config.json").read_text())


def verdict(tmp_path, **changes):
    shutil.copytree(SHIPPED, tmp_path / "model", dirs_exist_ok=True)
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG | changes))
    with open_checkpoint(tmp_path / "model") as checkpoint:
        return _verdict(checkpoint)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "yes"),
        ({"model_type": "mamba"}, "no: config: got model_type 'mamba'"),
        ({"hidden_size": 128}, "no: "),
        ({"dtype": "float8_e4m3fn", "torch_dtype": None}, "yes, with a --dtype"),
        ({"hidden_size": 256.0, "num_hidden_layers": 4.0}, "yes"),
    ],
)
def test_whether_a_model_runs_is_said(tmp_path, changes, words):
    assert verdict(tmp_path, **changes).startswith(words)


def test_a_config_may_write_types_and_whole_numbers_otherwise():
    config = CONFIG | {"hidden_size": 256.0, "dtype": "torch.bfloat16"}
    assert read_architecture(config) == read_architecture(CONFIG | {"dtype": "bfloat16"})
    assert read_architecture(CONFIG | {"dtype": "int7"}).dtype is None
    with pytest.raises(ValueError, match="hidden_size=256.5"):
        read_architecture(CONFIG | {"hidden_size": 256.5})


def test_lines_of_results_are_counted(tmp_path):
    lines = [
        {"custom_id": "a", "response": {"status_code": 200}, "error": None},
        {"custom_id": "b", "response": None, "error": {"message": "no"}},
    ]
    path = tmp_path / "out.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\nhalf a li")
    text = describe(path)
    for word, n in (("lines", 3), ("with an error", 1), ("answers", 1), ("no JSON object", 1)):
        assert f"{word} " in text and str(n) in text
    assert "results in lines" in text
    path.write_text(json.dumps({"prompt": "a"}))
    assert "requests in lines" in describe(path)
