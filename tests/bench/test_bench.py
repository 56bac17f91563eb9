"""`hpcinfer bench`: the commands run at tiny sizes and their rows are sound; no time is judged."""

import json
import sys

import numpy as np
import pytest
from pytest import approx

from hpcinfer.array import DTYPES, Device
from hpcinfer.bench import (
    attention,
    decode_attention,
    disagg,
    expert,
    extract,
    limits,
    measure,
    pipeline,
    sequence,
    zero,
)
from hpcinfer.bench.shape import AttentionShape, Ffn
from hpcinfer.cli import main
from hpcinfer.errors import UsageError
from hpcinfer.io.rows import text_table

HPCINFER = (sys.executable, "-m", "hpcinfer")
CPU = Device("cpu")
FIELDS = {
    "bench", "model", "dtype", "device", "batch", "context", "ranks", "threads", "tokens_per_s",
    "limit_tokens_per_s", "share_of_limit", "strategy", "time_s", "speedup", "exchange_s",
}  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Limits and caches of a size for tests."""
    monkeypatch.setattr(limits, "_MATRIX", {"cpu": 16})
    monkeypatch.setattr(limits, "_READ_BYTES", 1 << 12)
    monkeypatch.setattr(measure, "_CALLS_S", 1e-3)
    monkeypatch.setattr(decode_attention, "_COLD_BYTES", 1 << 16)
    monkeypatch.setattr(pipeline, "SLEEP_S", 1e-3)
    monkeypatch.setattr(disagg, "SLEEP_S", 1e-3)


def run(*words):
    """Run the command in the processes of the tests."""
    arguments = main.parser().parse_args(["bench", *map(str, words)])
    arguments.run(arguments)


def sound(rows, comm):
    """True if every row has the common fields, and they agree with each other."""
    one_s = None
    for row in rows:
        assert FIELDS <= row.keys()
        assert row["ranks"] == (1 if row["strategy"] == "one rank" else comm.size)
        assert min(row["time_s"], row["tokens_per_s"], row["limit_tokens_per_s"]) > 0
        assert row["share_of_limit"] == approx(row["tokens_per_s"] / row["limit_tokens_per_s"])
        one_s = row["time_s"] if row["strategy"] == "one rank" else one_s
        assert row["speedup"] == approx(one_s / row["time_s"])
    return True


# --- prefill -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_rows(comm, dtype):
    """Fewer tokens than ranks, and more."""
    for tokens in (2, 37):
        rows = attention.run(
            comm, CPU, AttentionShape(6, 3, 8, dtype), tokens, ["zigzag", "contiguous"], 2
        )
        assert [row["cut"] for row in rows] == [None, "zigzag", "contiguous"]
        assert sound(rows, comm)
        for row in rows[1:]:
            assert 0 < row["balance"] <= 1
            assert row["hidden_share"] is None or 0 <= row["hidden_share"] <= 1
            assert (row["hidden_share"] is None) == (comm.size == 1)
            assert row["batch"] == 1 and row["context"] == tokens
        assert len(attention.table(rows).splitlines()) == 2 + 1 + len(rows)


def test_prefill_limit_counts_the_causal_products(comm):
    """Two products of 2 K operations for every pair of a query and a key that it sees."""
    row = attention.run(comm, CPU, AttentionShape(2, 1, 4, "float32"), 3, ["striped"], 1)[1]
    pairs = 1 + 2 + 3
    assert row["limit_flop_per_s"] == approx(4 * 4 * 2 * pairs * row["limit_tokens_per_s"] / 3)


# --- decode --------------------------------------------------------------------------------------


def test_decode_rows(comm):
    """Bytes are the formulas', of all ranks together."""
    H, G, K, P = 4, 2, 8, comm.size
    rows = decode_attention.run(comm, CPU, AttentionShape(H, G, K, "float32"), [40, 3], [1, 3], 2)
    assert sound(rows, comm)
    assert len(decode_attention.table(rows).splitlines()) == 2 + 1 + len(rows)
    strategies = ["one rank", "ring", "gather", "tree", "tree_single"]
    assert [row["strategy"] for row in rows] == strategies * 4
    for row in rows:
        L, T = row["cached"], row["batch"]
        assert (L, T) in {(40, 1), (40, 3), (3, 1), (3, 3)} and row["context"] == L // T
        sent_bytes = {
            "one rank": 0,
            "ring": (P - 1) * L * (2 * G * K * 4 + 8),
            "gather": 4 * T * H * (K + 1) * (P - 1 + (P > 1)),
            "tree": 2 * (P - 1) * 4 * T * H * (K + 2),
            "tree_single": 2 * (P - 1) * 4 * T * H * (K + 1),
        }
        assert row["sent_bytes"] == sent_bytes[row["strategy"]]
    calls = {row["strategy"]: row["calls"] for row in rows}
    assert calls["tree"] == "Allreduce x 2" and calls["tree_single"] == "AllreduceRecords x 1"


# --- within and between layers -------------------------------------------------------------------


def alike(rows, comm, bench):
    """True if every row has the common fields, they agree with each other, and on every rank."""
    for row in rows:
        assert FIELDS <= row.keys() and row["bench"] == bench
        assert min(row["time_s"], row["tokens_per_s"], row["limit_tokens_per_s"]) > 0
        assert row["share_of_limit"] == approx(row["tokens_per_s"] / row["limit_tokens_per_s"])
        for name in ("overlapped_share", "hidden_share", *filter(is_idle, row)):
            assert row.get(name) is None or 0 <= row[name] <= 1
    json.dumps(rows, allow_nan=False)
    assert comm.allgather(rows) == [rows] * comm.size
    return True


def is_idle(name):
    return name.endswith(("idle_share", "bubble_share"))


@pytest.mark.parametrize("tokens", [1, 13])
def test_sequence_rows(comm, tokens):
    """1/P of the activations between the halves, for the same bytes."""
    D, P = 24, comm.size
    rows = sequence.run(comm, CPU, Ffn(D, 40), tokens, 2, 2)
    assert alike(rows, comm, "sequence")
    assert [row["strategy"] for row in rows] == ["one rank", "tensor", "sequence"]
    assert [row["ranks"] for row in rows] == [1, P, P]
    held = [tokens, tokens, -(-tokens // P)]
    assert [row["held_bytes"] for row in rows] == [4 * D * n for n in held]
    assert [row["sent_bytes"] for row in rows] == [0, *[2 * (P - 1) * 4 * tokens * D] * 2]
    assert all(row["peak_bytes"] > row["held_bytes"] for row in rows)
    assert len(sequence.table(rows).splitlines()) == 2 + 1 + len(rows)


def test_zero_rows(comm):
    """Bytes sent are the formula's, and bytes held are counted: they are those of the formula."""
    D, F, P, layers = 24, 1000, comm.size, 3
    rows = zero.run(comm, CPU, Ffn(D, F), 5, layers, 2)
    assert alike(rows, comm, "zero")
    assert [row["strategy"] for row in rows] == [
        "kept whole", "allgather", "allgather, ahead", "broadcast", "broadcast, ahead",
    ]  # fmt: skip
    n, owned = 2 * 4 * D * F, -(-layers // P)
    assert [row["sent_bytes"] for row in rows] == [0, *[n * (P - 1)] * 2, *[n * (P > 1)] * 2]
    in_layers = [layers, layers / P + 1, layers / P + 2, owned + 1, owned + 2]
    for row, held in zip(rows, in_layers, strict=True):
        assert row["formula_bytes"] == approx(held * n, rel=1e-3)
        assert row["peak_bytes"] == approx(held * n, rel=0.1)
        assert row["whole_bytes"] == layers * n
        assert (row["exchange_share_of_limit"] is None) == (row["sent_bytes"] == 0)
    assert len(zero.table(rows).splitlines()) == 2 + 1 + len(rows)


@pytest.mark.parametrize("work", ["compute", "sleep"])
def test_pipeline_rows(comm, work):
    P, micro = comm.size, [1, 3]
    rows = pipeline.run(comm, CPU, Ffn(16, 24), 4, 2, micro, work, 2)
    assert alike(rows, comm, "pipeline")
    assert [row["batch"] for row in rows] == micro
    assert [row["bubble_share"] for row in rows] == [(P - 1) / (m + P - 1) for m in micro]
    assert all(row["layers"] == 2 * P and row["context"] == 4 for row in rows)
    assert ("GFLOP/s" in pipeline.table(rows)) == (work == "compute")


def test_expert_rows(comm):
    """Bytes sent by all ranks are those of the room's formula; skew shows in the balance."""
    D, T, P, E, top = 8, 40, comm.size, 2 * comm.size, 2
    rows = expert.run(comm, CPU, Ffn(D, 12), T, E, top, [0, 3], 2)
    assert alike(rows, comm, "expert")
    assert [row["strategy"] for row in rows] == ["even", "Zipf 3"]
    for row in rows:
        pairs = 0
        for rank in range(P):
            ids = expert.choices(rank, T, E, top, row["skew"])
            assert all(len(set(chosen)) == top for chosen in ids.tolist())
            pairs += sum(len(set(chosen) - {rank}) for chosen in (ids // 2).tolist())
        assert row["sent_bytes"] == 8 * P * (P - 1) + pairs * (4 * D + 8 * top + 4 * D)
        assert row["calls"] == "Alltoall x 3"
        assert 1 <= row["tokens_balance"] and 1 <= row["choices_balance"]
    if P > 1:
        assert rows[1]["choices_balance"] > rows[0]["choices_balance"]
    assert len(expert.table(rows).splitlines()) == 2 + 1 + len(rows)


@pytest.mark.parametrize("work", ["compute", "sleep"])
@pytest.mark.parametrize("context", [None, 3])
def test_disagg_rows(comm, work, context):
    """A dense FFN sends every token to each FFN rank, and back."""
    if comm.size < 2:
        pytest.skip("two sides need two ranks")
    T, D, M = 7, 8, comm.size - 1
    ffn, split = Ffn(D, 20), (M, 1)
    rows = disagg.run(comm, CPU, 2, ffn, T, 2, split, [1, 2, 3], context, work, 2)
    assert alike(rows, comm, "disagg")
    assert [row["batch"] for row in rows] == [1, 2, 3]
    assert [row["equal_idle_share"] for row in rows] == [1 / 2, 1 / 5, 1 / 7]
    for row in rows:
        assert row["sent_bytes"] == T * (4 * D + 8 + 4 * D)
        assert row["split"] == f"{M}:1" and (row["cached"] == context or context is None)
    assert len(disagg.table(rows).splitlines()) == 2 + 1 + len(rows)


# --- clocks --------------------------------------------------------------------------------------


def test_alone_runs_on_the_first_rank_only(comm):
    ran = []
    time_s = measure.alone_s(comm, lambda: ran.append(1))
    assert len(ran) == (comm.rank == 0)
    assert comm.allgather(time_s) == [time_s] * comm.size


def test_a_short_call_is_repeated_and_a_long_one_is_not(monkeypatch):
    monkeypatch.setattr(measure, "_CALLS_S", 0.1)
    count = []

    def clock(function):
        before = len(count)
        function()
        return 0.01 * (len(count) - before)

    assert measure.call_s(clock, lambda: count.append(1), repeat=3) == approx(0.01)
    assert len(count) == 1 + 3 * 10
    assert measure.call_s(lambda f: f() or 5.0, lambda: None, repeat=2) == 5.0


def test_a_table_sets_numbers_to_the_right():
    text = text_table(["name", "n"], [["a", "1"], ["long name", "-"], ["b", "100"]])
    assert text.splitlines() == [
        "name         n", "a            1", "long name    -", "b          100",
    ]  # fmt: skip


# --- the commands --------------------------------------------------------------------------------


def test_commands_print_a_table_and_write_the_rows(comm, shared_path, capsys):
    small = ("--heads", 4, "--kv-heads", 2, "--width", 8, "--repeat", 1)
    for name, sizes in (
        ("attention", ("--tokens", 33, "--cuts", "block-cyclic,striped")),
        ("decode-attention", ("--cached", "64", "--queries", "2")),
    ):
        path = shared_path / f"{name}.json"
        run(name, *sizes, *small, "--dtype", "bfloat16", "--json", path)
        comm.Barrier()
        rows = json.loads(path.read_text())
        assert sound(rows, comm)
        assert {row["bench"] for row in rows} == {name}
        printed = capsys.readouterr().out
        assert ("limit: " in printed) == (comm.rank == 0)
        assert not np.isnan([row["time_s"] for row in rows]).any()


def test_commands_of_the_layers(comm, shared_path, capsys):
    """Each prints a table on the first rank, and writes its rows."""
    ffn = ("--width", 8, "--ffn", 12, "--repeat", 1)
    for name, sizes in (
        ("sequence", ("--tokens", 5, "--layers", 1, *ffn)),
        ("zero", ("--tokens", 5, "--layers", 2, *ffn)),
        ("pipeline", ("--tokens", 3, "--micro", "2", "--work", "sleep", *ffn)),
        ("expert", ("--tokens", 9, "--experts", 3, "--top", 3, "--zipf", "0.5", *ffn)),
        ("disagg", ("--tokens", 5, "--heads", 2, "--micro", "2", "--context", 4, *ffn)),
    ):
        if name == "disagg" and comm.size < 2:
            continue
        path = shared_path / f"{name}.json"
        run(name, *sizes, "--json", path)
        comm.Barrier()
        assert alike(json.loads(path.read_text()), comm, name)
        assert ("limit: " in capsys.readouterr().out) == (comm.rank == 0)


ON_A_DEVICE = """
from hpcinfer.bench import limits, measure
from hpcinfer.cli.main import parser
limits._MATRIX = dict.fromkeys(limits._MATRIX, 16)
limits._READ_BYTES, measure._CALLS_S = 1 << 12, 1e-3
for words in (
    "attention --tokens 33 --heads 4 --kv-heads 2 --width 16",
    "zero --tokens 5 --layers 2 --width 16 --ffn 24",
    "sequence --tokens 5 --layers 1 --width 16 --ffn 24",
    "collectives --sizes 1KiB",
):
    words = ["bench", *words.split(), "--repeat", "1", "--device", "cuda"]
    arguments = parser().parse_args(words)
    arguments.run(arguments)
"""


@pytest.mark.single
def test_benches_on_a_device(mpirun, standin):
    """On the stand-in for CuPy, where a hazard would be an error."""
    settings = {"STANDIN_DEVICES": "2", "STANDIN_STRICT": "1"} | standin
    done = mpirun(2, sys.executable, "-c", ON_A_DEVICE, timeout_s=50, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("device cuda") == done.stdout.count("limit: ") == 4


def test_disagg_refuses_on_every_rank(comm):
    P = comm.size
    for split in (f"{P}:1", f"1:{P}"):
        with pytest.raises(UsageError, match="bench: got .* need all ranks on one side or the oth"):
            run("disagg", "--split", split)
    if P == 1:
        with pytest.raises(UsageError, match="bench: got 1:0 attention and FFN ranks of 1"):
            run("disagg")


@pytest.mark.single
@pytest.mark.parametrize(
    "words",
    [
        ["bench"],
        ["bench", "nothing"],
        ["bench", "attention", "--cuts", "diagonal"],
        ["bench", "attention", "--tokens", "0"],
        ["bench", "attention", "--heads", "3", "--kv-heads", "2"],
        ["bench", "decode-attention", "--cached", "64,x"],
        ["bench", "decode-attention", "--dtype", "int8"],
        ["bench", "pipeline", "--micro", "0"],
        ["bench", "expert", "--zipf", "-1"],
        ["bench", "expert", "--top", "17"],
        ["bench", "disagg", "--split", "2"],
        ["bench", "disagg", "--heads", "5"],
    ],
)
def test_wrong_words_are_usage_errors(mpirun, words):
    done = mpirun(2, *HPCINFER, *words)
    assert done.returncode == 2
    assert done.stderr.count("hpcinfer:") == 1


# --- extract -------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 37])
def test_extract_rows(comm, shared_path, width):
    """Columns fewer than ranks, and more; nothing is left on the disk."""
    rows = extract.run(comm, CPU, str(shared_path), width, 3, 5, 4, "bfloat16", 1)
    assert [row["writes"] for row in rows] == ["plain", "parts"]
    for row in rows:
        assert row["bytes"] == width * 3 * 5 * 4 * 2 and row["ranks"] == comm.size
        assert row["share_of_limit"] == approx(rows[0]["time_s"] / row["time_s"])
    assert "of plain %" in extract.table(rows)
    comm.Barrier()
    assert not list(shared_path.iterdir())
