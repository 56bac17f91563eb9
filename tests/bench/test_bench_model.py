"""`hpcinfer bench` of a loaded model: tiny models, few steps, sound rows; no time is judged."""

import importlib.util
import json
import sys

import numpy as np
import pytest
from helpers.paths import SHIPPED
from pytest import approx

from hpcinfer import array, node
from hpcinfer.bench import collectives, decode, drive, limits, load, measure, prefill, scaling, work
from hpcinfer.bench.random_checkpoint import RandomCheckpoint, has_weights
from hpcinfer.cli import main
from hpcinfer.io.models import open_checkpoint
from hpcinfer.job import machine
from hpcinfer.model.families import read_architecture
from hpcinfer.ops import dispatch

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
    monkeypatch.setitem(limits._PRODUCT, "cpu", (4, 8, 16))
    monkeypatch.setattr(limits, "_RUNS", 1)
    monkeypatch.setattr(measure, "_CALLS_S", 1e-3)
    yield
    dispatch.use("auto")


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
        assert FIELDS <= row.keys() and row["bench"] == bench
        assert ranks is None or row["ranks"] == ranks
        assert min(row["time_s"], row["tokens_per_s"], row["limit_tokens_per_s"]) > 0
        assert row["share_of_limit"] == approx(row["tokens_per_s"] / row["limit_tokens_per_s"])
        assert row["peak_bytes"] > row["weight_bytes"] > 0
    return True


# --- decode and prefill --------------------------------------------------------------------------


def test_decode_rows(comm, config, shared_path, capsys):
    """By the command: a table, the rows as JSON, and a picture where it can be drawn."""
    words = ("--batch", "1,3", "--context", "5,70", "--new", 2, "--repeat", 2, "--dtype", "float32")
    picture = shared_path / "decode.svg"
    if importlib.util.find_spec("matplotlib"):
        words += ("--plot", picture)
    rows = run(comm, shared_path, "decode", config(), *words)
    assert sound(rows, "decode", comm.size)
    assert [(r["batch"], r["context"]) for r in rows] == [(1, 5), (3, 5), (1, 70), (3, 70)]
    assert all(row["steps"] == 4 for row in rows)
    assert rows[0]["tokens_per_s"] == approx(1 / rows[0]["time_s"])
    assert rows[2]["read_bytes"] > rows[0]["read_bytes"] and rows[1]["flop"] > rows[0]["flop"]
    assert ("of limit %" in capsys.readouterr().out) == (comm.rank == 0)
    assert picture not in words or picture.read_bytes()[:5] == b"<?xml"


def test_decode_with_replicas(comm, config):
    """A replica without a sequence adds nothing; the weights that count are read all the same."""
    setting = drive.Setting(config(), layout=f"dp={comm.size}")
    one, four = decode.run(comm, setting, [1, 4], [5], 2, 1)
    assert one["steps"] == four["steps"] == 2
    assert one["batch"] == 1 and four["tokens_per_s"] > 0
    busy = min(4, comm.size)
    assert busy * 0.9 < four["read_bytes"] / one["read_bytes"] < busy * 1.5


def test_decode_of_experts(comm, config):
    setting = drive.Setting(config(MOE), kernels="plain")
    one, six = decode.run(comm, setting, [1, 6], [8], 2, 1)
    assert one["touched_share"] == approx(2 / 8)
    assert 2 / 8 <= six["touched_share"] <= 1
    assert one["kernels"] == "plain"


def test_prefill_rows(comm, config):
    rows = prefill.run(comm, drive.Setting(config(), step_tokens=64), [1, 2], [5, 70], 1)
    assert sound(rows, "prefill", comm.size)
    assert [(r["batch"], r["context"]) for r in rows] == [(1, 5), (2, 5), (1, 70), (2, 70)]
    for row in rows:
        assert row["tokens_per_s"] == approx(row["batch"] * row["context"] / row["time_s"])
    assert len(prefill.table(rows).splitlines()) == 4 + 1 + len(rows)


def test_cases_that_do_not_fit_are_left_out(comm, config, monkeypatch, capsys):
    init = drive.Bench.__init__

    def small(self, *arguments):
        init(self, *arguments)
        self.most_pages = 2

    monkeypatch.setattr(drive.Bench, "__init__", small)
    rows = decode.run(comm, drive.Setting(config()), [1, 400], [8], 1, 1)
    assert [row["batch"] for row in rows] == [1]
    assert ("skipped   400 sequences" in capsys.readouterr().err) == (comm.rank == 0)
    with pytest.raises(ValueError, match="bench: got no case whose cache fits"):
        decode.run(comm, drive.Setting(config()), [400], [8], 1, 1)


@pytest.mark.single
def test_a_turn_is_a_token_of_every_sequence():
    """Micro-batches add up; steps with prompts do not count."""
    spent = drive.Spent([(3, 2, 9.0), (2, 0, 1.0), (1, 0, 2.0), (2, 0, 3.0), (1, 0, 4.0)], 3)
    assert spent.turns_s() == [3.0, 7.0] and spent.prompts_s() == 9.0


def test_decode_of_codes(comm, config):
    """Random codes have the bytes of quantised weights, and weights of the usual size."""
    path, nbytes = config(LLAMA | {"hidden_size": 128, "intermediate_size": 256}), {}
    for bits in (None, 8, 4):
        bench = drive.Bench(comm, drive.Setting(path, bits=bits), 1, 12)
        facts = bench.facts()
        assert facts["weights"] == (f"int{bits} in groups of 32" if bits else "bfloat16")
        nbytes[bits] = facts["weight_bytes"]
        bench.allocate(bench.pages(1, 8))
        assert len(bench.decode(1, 5, 2).turns_s()) == 2
    assert comm.size > 1 or nbytes[4] < nbytes[8] < nbytes[None]


# --- load, scaling, collectives ------------------------------------------------------------------


@pytest.mark.parametrize("cold", [False, True])
def test_load_rows(comm, cold):
    rows = load.run(comm, drive.Setting(str(SHIPPED), dtype=None), 1, cold)
    assert [row["reads"] for row in rows] == ["plain", "load"]
    for row in rows:
        assert row["bench"] == "load" and row["ranks"] == comm.size and row["cold"] == cold
        assert row["byte_per_s"] == approx(row["bytes"] / row["time_s"])
        assert row["share_of_limit"] == approx(row["byte_per_s"] / rows[0]["byte_per_s"])
        assert row["first_token_s"] > row["open_s"] > 0
    size = (SHIPPED / "model.safetensors").stat().st_size
    assert rows[0]["bytes"] == size and rows[1]["bytes"] > 0.9 * size
    assert comm.allgather(rows) == [rows] * comm.size
    assert len(load.table(rows).splitlines()) == 2 + 1 + 2


def test_scaling_rows(comm, config):
    P = comm.size
    ranks = sorted({1, P})
    rows = scaling.run(comm, drive.Setting(config()), ranks, 2, 5, 2, 1)
    assert sound(rows, "scaling", None)
    assert [(r["scaling"], r["ranks"], r["batch"]) for r in rows] == [
        *(("strong", n, 2) for n in ranks), *(("weak", n, 2 * n) for n in ranks),
    ]  # fmt: skip
    assert [r["axis"] for r in rows] == ["tp"] * len(ranks) + ["dp"] * len(ranks)
    for row in rows:
        assert row["efficiency"] == approx(row["speedup"] / row["ranks"])
        assert row["speedup"] == 1 or row["ranks"] > 1
    assert comm.allgather(rows) == [rows] * P
    assert len(scaling.table(rows).splitlines()) == 2 + 1 + len(rows)


def test_scaling_ends_on_every_rank_where_one_number_of_ranks_fails(comm):
    with pytest.raises(ValueError, match="checkpoint: got nowhere"):
        scaling.run(comm, drive.Setting("nowhere"), [1], 1, 5, 1, 1)


def test_collectives_rows(comm):
    """Bytes are those of the ledger's formulas, of all ranks together."""
    P = comm.size
    rows = collectives.run(comm, array.Device("cpu"), [64, 4 * 17 * P], 2)
    names = ["Allreduce", "Allgather", "ReduceScatter", "Alltoall", "Sendrecv", "window"]
    assert [row["collective"] for row in rows] == names * 2
    n = 4 * 17 * P
    sent = {row["collective"]: row["sent_bytes"] for row in rows[6:]}
    assert sent["Allreduce"] == sent["window"] == 2 * n * (P - 1)
    assert sent["Allgather"] == sent["ReduceScatter"] == sent["Alltoall"] == n * (P - 1)
    assert sent["Sendrecv"] == (n * P if P > 1 else 0)
    assert all(row["time_s"] > 0 and row["ranks"] == P for row in rows)
    assert len(collectives.table(rows).splitlines()) == 2 + 1 + len(rows)


def test_the_window_sums_what_allreduce_sums(comm):
    P, n = comm.size, 7
    window = collectives._Window(comm, 4 * n)
    out = np.empty(n, np.float32)
    for start in (0, 10):
        window.reduce(np.arange(n, dtype=np.float32) + start + comm.rank, out)
        assert np.array_equal(out, P * (np.arange(n) + start) + P * (P - 1) / 2)
    window.free()


# --- the machine ---------------------------------------------------------------------------------


@pytest.mark.single
def test_inspect_shows_the_machine(capsys, monkeypatch, shared_path):
    listed = shared_path / "cpuinfo"
    listed.write_text("processor : 0\nmodel name\t: A Chip\nflags\t: fpu avx2 amx_bf16\n")
    monkeypatch.setattr(machine, "_CPUINFO", str(listed))
    monkeypatch.setattr(machine.cpu, "missing", lambda: "numba is not installed")
    arguments = main.parser().parse_args(["inspect", "--machine"])
    arguments.run(arguments)
    text = capsys.readouterr().out
    assert "A Chip" in text and "avx2 yes, avx512f no" in text and "amx_bf16 yes" in text
    assert "plain only: numba is not installed" in text
    assert f"mpirun -n {len(node.cores())}" in text or node.core_quota()
    assert "MPI" in text and "GiB" in text


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


@pytest.mark.single
@pytest.mark.parametrize("bench", ["prefill", "scaling", "collectives", "load", "attention"])
def test_pictures_of_rows(bench, shared_path):
    """One row and several; every kind of bench has what its picture needs."""
    pytest.importorskip("matplotlib")
    from hpcinfer.bench.plot import draw

    rows = [
        {
            "bench": bench, "model": "m", "dtype": "float32", "ranks": n, "batch": n, "bytes": n,
            "context": 8 * n, "tokens_per_s": 5.0 * n, "limit_tokens_per_s": 9.0, "axis": "tp",
            "share_of_limit": 5.0 * n / 9, "byte_per_s": 7.0, "limit_byte_per_s": 8.0,
            "time_s": 0.1, "speedup": n, "limit_speedup": n, "scaling": scaling, "reads": "plain",
            "collective": "Allreduce", "strategy": "ring", "cut": "zigzag",
        }
        for n in (1, 2) for scaling in ("strong", "weak")
    ]  # fmt: skip
    for name, some in (("a.png", rows), ("b.pdf", rows[:2])):
        draw(str(shared_path / name), some)
        assert (shared_path / name).read_bytes()[:4] in (b"\x89PNG", b"%PDF")


def test_a_picture_without_matplotlib_is_refused(config, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="plot: got no matplotlib.*pip install"):
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
        ["decode", str(SHIPPED), "--quantize", "int8"],
        ["decode", "config.json", "--group", "64"],
        ["load", "config.json"],
        ["scaling", "config.json", "--ranks", "2"],
        ["scaling", "config.json", "--weak", "cp"],
        ["collectives", "--sizes", "2"],
        ["--machine"],
    ],
)
def test_wrong_words_are_usage_errors(words, capsys):
    with pytest.raises(SystemExit) as end:
        main.main(["bench", *words])
    assert end.value.code == 2
    assert capsys.readouterr().err.count("hpcinfer: ") == 1


@pytest.mark.single
@pytest.mark.parametrize("words", [[], ["--check"]])
def test_inspect_needs_something(words, capsys):
    with pytest.raises(SystemExit) as end:
        main.main(["inspect", *words])
    assert end.value.code == 2
    assert capsys.readouterr().err.count("hpcinfer: inspect: got ") == 1


@pytest.mark.single
def test_a_missing_config_is_one_line(mpirun):
    done = mpirun(2, *HPCINFER, "bench", "decode", "nowhere/config.json")
    assert done.returncode == 1
    assert done.stderr.count("hpcinfer: checkpoint: got nowhere/config.json") == 1
