"""`hpcinfer bench`: the commands run at tiny sizes and their rows are sound; no time is judged."""

import json
import sys

import numpy as np
import pytest
from pytest import approx

from hpcinfer.array import DTYPES
from hpcinfer.bench import attention, decode_attention, extract, measure
from hpcinfer.bench.shape import Shape
from hpcinfer.cli import main
from hpcinfer.io.rows import text_table

HPCINFER = (sys.executable, "-m", "hpcinfer")
FIELDS = {
    "bench", "model", "dtype", "batch", "context", "ranks", "threads", "tokens_per_s",
    "limit_tokens_per_s", "share_of_limit", "strategy", "time_s", "speedup", "exchange_s",
}  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Limits and caches of a size for tests."""
    monkeypatch.setattr(measure, "_MATRIX", 16)
    monkeypatch.setattr(measure, "_READ_BYTES", 1 << 12)
    monkeypatch.setattr(decode_attention, "_COLD_BYTES", 1 << 16)


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
        rows = attention.run(comm, Shape(6, 3, 8, dtype), tokens, ["zigzag", "contiguous"], 2)
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
    row = attention.run(comm, Shape(2, 1, 4, "float32"), 3, ["striped"], 1)[1]
    pairs = 1 + 2 + 3
    assert row["limit_flop_per_s"] == approx(4 * 4 * 2 * pairs * row["limit_tokens_per_s"] / 3)


# --- decode --------------------------------------------------------------------------------------


def test_decode_rows(comm):
    """Bytes are the formulas', of all ranks together."""
    H, G, K, P = 4, 2, 8, comm.size
    rows = decode_attention.run(comm, Shape(H, G, K, "float32"), [40, 3], [1, 3], 2)
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


# --- clocks --------------------------------------------------------------------------------------


def test_alone_runs_on_the_first_rank_only(comm):
    ran = []
    time_s = measure.alone_s(comm, lambda: ran.append(1))
    assert len(ran) == (comm.rank == 0)
    assert comm.allgather(time_s) == [time_s] * comm.size


def test_a_short_call_is_repeated_and_a_long_one_is_not():
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
    rows = extract.run(comm, str(shared_path), width, 3, 5, 4, "bfloat16", 1)
    assert [row["writes"] for row in rows] == ["plain", "parts"]
    for row in rows:
        assert row["bytes"] == width * 3 * 5 * 4 * 2 and row["ranks"] == comm.size
        assert row["share_of_limit"] == approx(rows[0]["time_s"] / row["time_s"])
    assert "of plain %" in extract.table(rows)
    comm.Barrier()
    assert not list(shared_path.iterdir())
