"""`hpcinfer bench` of a loaded model: tiny models, few steps, sound rows; no time is judged."""

import json
import sys

import numpy as np
import pytest
from pytest import approx

from hpcinfer import array
from hpcinfer.bench import drive, limits, measure, work
from hpcinfer.bench.random_checkpoint import RandomCheckpoint, has_weights
from hpcinfer.cli import main
from hpcinfer.io.checkpoint import open_checkpoint
from hpcinfer.model.families import read_architecture
from hpcinfer.ops import fastest

HPCINFER = (sys.executable, "-m", "hpcinfer")
FIELDS = {
    "bench", "model", "dtype", "batch", "context", "ranks", "threads", "tokens_per_s",
    "limit_tokens_per_s", "share_of_limit", "time_s",
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96, "hidden_act": "silu",
    "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
}  # fmt: skip
MOE = LLAMA | {
    "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 8,
    "moe_intermediate_size": 16, "norm_topk_prob": True, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Limits of a size for tests; the choice of forms is put back."""
    monkeypatch.setattr(limits, "_READ_BYTES", 1 << 12)
    monkeypatch.setattr(limits, "_PRODUCT", (4, 8, 16))
    monkeypatch.setattr(limits, "_RUNS", 1)
    monkeypatch.setattr(measure, "_READ_BYTES", 1 << 12)
    monkeypatch.setattr(measure, "_CALLS_S", 1e-3)
    yield
    fastest.use("auto")


@pytest.fixture
def config(comm, shared_path):
    """Writes a config.json for all ranks; returns its path."""

    def write(values=LLAMA):
        path = shared_path / "config.json"
        if comm.rank == 0:
            path.write_text(json.dumps(values))
        comm.Barrier()
        return str(path)

    return write


def run(comm, folder, *words):
    """Run a bench in the processes of the tests; returns its rows."""
    path = folder / "rows.json"
    arguments = main.parser().parse_args(["bench", *map(str, words), "--json", str(path)])
    arguments.run(arguments)
    comm.Barrier()
    return json.loads(path.read_text())


def sound(rows, bench, ranks):
    """True if the rows have the fields of a bench of a model, and they agree with each other."""
    for row in rows:
        assert FIELDS <= row.keys() and row["bench"] == bench and row["ranks"] == ranks
        assert min(row["time_s"], row["tokens_per_s"], row["limit_tokens_per_s"]) > 0
        assert row["share_of_limit"] == approx(row["tokens_per_s"] / row["limit_tokens_per_s"])
        assert row["peak_bytes"] > row["weight_bytes"] > 0
    return True


# --- decode and prefill --------------------------------------------------------------------------


def test_decode_rows(comm, config, shared_path, capsys):
    words = ("--batch", "1,3", "--context", "5,70", "--new", 2, "--repeat", 2, "--dtype", "float32")
    rows = run(comm, shared_path, "decode", config(), *words)
    assert sound(rows, "decode", comm.size)
    assert [(r["batch"], r["context"]) for r in rows] == [(1, 5), (3, 5), (1, 70), (3, 70)]
    assert all(row["steps"] == 4 for row in rows)
    assert rows[0]["tokens_per_s"] == approx(1 / rows[0]["time_s"])
    assert rows[2]["read_bytes"] > rows[0]["read_bytes"] and rows[1]["flop"] > rows[0]["flop"]
    assert ("of limit %" in capsys.readouterr().out) == (comm.rank == 0)


def test_decode_with_replicas(comm, config, shared_path):
    """A replica without a sequence adds nothing; the weights that count are read all the same."""
    words = ("--batch", "1,4", "--context", 5, "--new", 2, "--repeat", 1)
    one, four = run(comm, shared_path, "decode", config(), *words, "--layout", f"dp={comm.size}")
    assert one["steps"] == four["steps"] == 2
    assert one["batch"] == 1 and four["tokens_per_s"] > 0
    busy = min(4, comm.size)
    assert busy * 0.9 < four["read_bytes"] / one["read_bytes"] < busy * 1.5


def test_decode_of_experts(comm, config, shared_path):
    words = ("--batch", "1,6", "--context", 8, "--new", 2, "--repeat", 1, "--kernels", "plain")
    one, six = run(comm, shared_path, "decode", config(MOE), *words)
    assert one["touched_share"] == approx(2 / 8)
    assert 2 / 8 <= six["touched_share"] <= 1
    assert one["kernels"] == "plain"


def test_prefill_rows(comm, config, shared_path):
    words = ("--batch", "1,2", "--context", "5,70", "--repeat", 1, "--step-tokens", 64)
    rows = run(comm, shared_path, "prefill", config(), *words)
    assert sound(rows, "prefill", comm.size)
    assert [(r["batch"], r["context"]) for r in rows] == [(1, 5), (2, 5), (1, 70), (2, 70)]
    for row in rows:
        assert row["tokens_per_s"] == approx(row["batch"] * row["context"] / row["time_s"])


def test_cases_that_do_not_fit_are_left_out(comm, config, shared_path, monkeypatch, capsys):
    init = drive.Bench.__init__

    def small(self, *arguments):
        init(self, *arguments)
        self.most_pages = 2

    monkeypatch.setattr(drive.Bench, "__init__", small)
    words = ("--batch", "1,400", "--context", 8, "--new", 1, "--repeat", 1)
    rows = run(comm, shared_path, "decode", config(), *words)
    assert [row["batch"] for row in rows] == [1]
    assert ("skipped   400 sequences" in capsys.readouterr().err) == (comm.rank == 0)


@pytest.mark.single
def test_a_turn_is_a_token_of_every_sequence():
    """Micro-batches add up; steps with prompts do not count."""
    spent = drive.Spent([(3, 2, 9.0), (2, 0, 1.0), (1, 0, 2.0), (2, 0, 3.0), (1, 0, 4.0)], 3)
    assert spent.turns_s() == [3.0, 7.0] and spent.prompts_s() == 9.0


# --- what a step needs ---------------------------------------------------------------------------


@pytest.mark.single
def test_operations_of_a_token(config):
    arch = read_architecture(LLAMA)
    of_layer = 32 * (4 + 2 * 2) * 8 + 32 * 32 + 3 * 32 * 48
    assert work.token_flop(arch) == (2 * 2 * of_layer, 2 * 96 * 32)
    pairs = 1 + 2 + 3
    assert work.attention_flop(arch, 3, 3) == 2 * 4 * 4 * 8 * pairs
    assert work.attention_flop(arch, 1, 3) == 2 * 4 * 4 * 8 * 3


@pytest.mark.single
def test_experts_that_are_expected():
    arch = read_architecture(MOE)
    even, one = np.full((2, 8), 5), np.array([[9, 9, 0, 0, 0, 0, 0, 0]] * 2)
    assert work.touched_share(arch, even, 1) == approx(1 / 4)
    assert work.touched_share(arch, even, 2) == approx(1 - (3 / 4) ** 2)
    assert work.touched_share(arch, one, 7) == approx(2 / 8)
    assert work.touched_share(arch, np.zeros((2, 0)), 7) == 1


# --- random weights ------------------------------------------------------------------------------


@pytest.mark.single
@pytest.mark.parametrize("values", [LLAMA, MOE])
def test_random_weights_are_those_of_the_config(config, values, shared_path):
    path = config(values)
    assert not has_weights(path) and not has_weights(shared_path)
    with open_checkpoint(RandomCheckpoint(shared_path, array.BFLOAT16)) as checkpoint:
        up = checkpoint.read("model.layers.1.self_attn.q_proj.weight", 0, [(8, 24)])
        again = checkpoint.read("model.layers.1.self_attn.q_proj.weight", 0, [(8, 24)])
        norm = np.empty(32, np.float32)
        checkpoint.read("model.norm.weight", out=norm)
    assert up.shape == (16, 32) and up.dtype == array.BFLOAT16
    assert np.array_equal(up.view(np.uint16), again.view(np.uint16))
    assert 0.01 < array.widen(up).std() < 0.04 and abs(norm.mean() - 1) < 0.05
    assert len({row.tobytes() for row in up}) == 16


# --- the commands --------------------------------------------------------------------------------


def test_pictures(comm, config, shared_path):
    pytest.importorskip("matplotlib")
    words = ("--context", 5, "--repeat", 1)
    for name, kind in (("decode", "svg"), ("prefill", "png")):
        picture = shared_path / f"{name}.{kind}"
        run(comm, shared_path, name, config(), *words, "--batch", 1, "--plot", picture)
        comm.Barrier()
        assert picture.read_bytes()[:5] in (b"<?xml", b"\x89PNG\r")


def test_a_picture_without_matplotlib_is_refused(config, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"plot: got no matplotlib.*hpcinfer\[plot\]"):
        words = ["bench", "decode", config(), "--plot", "a.png"]
        arguments = main.parser().parse_args(words)
        arguments.run(arguments)


@pytest.mark.single
@pytest.mark.parametrize(
    "words",
    [
        ["decode"],
        ["decode", "config.json", "--batch", "0"],
        ["decode", "config.json", "--kernels", "slow"],
        ["prefill", "config.json", "--plot", "picture.gif"],
        ["prefill", "config.json", "--dtype", "int3"],
    ],
)
def test_wrong_words_are_usage_errors(words, capsys):
    with pytest.raises(SystemExit) as end:
        main.main(["bench", *words])
    assert end.value.code == 2
    assert capsys.readouterr().err.count("hpcinfer: ") == 1


@pytest.mark.single
def test_a_missing_config_is_one_line(mpirun):
    done = mpirun(2, *HPCINFER, "bench", "decode", "nowhere/config.json")
    assert done.returncode == 1
    assert done.stderr.count("hpcinfer: checkpoint: got nowhere/config.json") == 1
