"""`hpcinfer verify`: every row holds on any number of ranks, and a row that must fail does."""

import json
import sys
from functools import partial

import numpy as np
import pytest

from hpcinfer import collectives, partition, verify
from hpcinfer.cli import main
from hpcinfer.errors import is_agreed
from hpcinfer.ops.attention import ragged_attention
from hpcinfer.verify import Case, Trial, linear, oracle, row
from hpcinfer.verify.attention import LENGTHS, deal, problem

APART = ["tensor, sum in GELU", "split K only"]  # rows that must differ
HPCINFER = (sys.executable, "-m", "hpcinfer")


def one(comm, function, equal=True):
    """Outcome of a row that is made of `function` (comm) -> (got, want, formula_bytes)."""

    def trial(comm, rng, put):
        got, want, formula_bytes = function(comm)
        return Trial((np.asarray(got, float),), (np.asarray(want, float),), formula_bytes)

    return row.run_case(comm, Case("a strategy", "a cut", trial, equal), np.random.default_rng(0))


# --- the table -----------------------------------------------------------------------------------


def test_every_row_is_as_it_must_be(comm):
    outcomes = verify.run(comm, verify.ROWS, seed=1)
    tried = [o for o in outcomes if o.tried]
    assert not [(o.row.name, o.error, o.difference) for o in tried if not o.passed]
    assert [o.row.strategy for o in tried if not o.equal] == (APART if comm.size > 1 else [])
    assert all(o.counted_bytes > 0 or comm.size == 1 for o in tried[1:])
    left = [o.row.strategy for o in outcomes if not o.tried]
    assert left == (["disagg", "disagg, dense"] if comm.size == 1 else [])


def test_rows_have_names_of_their_own():
    names = [r.name for r in verify.ROWS]
    assert len(set(names)) == len(names)
    cuts = {r.cut.replace("-", "_") for r in verify.ROWS if r.strategy == "ring"}
    assert cuts == set(partition.CUTS)


def test_teaching_forms_are_marked(comm):
    rows = [r for r in verify.ROWS if r.strategy in ("ring", "split Q only")]
    marked = {o.row.cut: o.cells()[0] for o in verify.run(comm, rows)}
    assert marked.pop("block-cyclic") == "ring"
    assert set(marked.values()) == {"ring *", "split Q only *"}


def test_a_row_that_needs_more_ranks_neither_fails_nor_passes(comm):
    def never(c, rng, put):
        raise AssertionError("tried")

    wide = Case("a strategy", "a cut", never, least_ranks=comm.size + 1)
    outcome = row.run_case(comm, wide, np.random.default_rng(0))
    assert outcome.passed is None and not outcome.tried
    assert outcome.cells()[-1] == f"needs {comm.size + 1} ranks"
    facts = json.loads(json.dumps(outcome.facts(), allow_nan=False))
    assert facts["passed"] is facts["equal"] is None
    assert (facts["least_ranks"], facts["ranks"]) == (comm.size + 1, comm.size)


def test_the_window_ends_the_ring_early(comm):
    (outcome,) = verify.run(comm, [r for r in verify.ROWS if r.strategy == "ring, window"])
    assert outcome.passed
    assert outcome.collectives.get("Shift", 0) < max(1, comm.size - 1) or comm.size == 2


@pytest.mark.parametrize("cut", partition.CUTS)
def test_a_cut_deals_every_token_of_every_sequence_once(comm, cut):
    tokens = problem(np.random.default_rng(0)).k_tokens
    rows = deal(tokens, comm.size, cut)
    assert sorted(np.concatenate(rows)) == list(range(sum(LENGTHS)))


def test_the_oracle_and_the_mathematics_of_one_rank_agree():
    x = problem(np.random.default_rng(3), newest=5, window=7)
    expected = oracle.attention(x.q, x.k, x.v, x.q_tokens, x.k_tokens, 0.3, x.window)
    got = ragged_attention(
        x.q, x.k, x.v, x.q_tokens, x.k_tokens,
        scale=0.3, groups=((0, 2), (2, 4), (4, 6)), window=x.window,
    )  # fmt: skip
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


# --- rows that must fail -------------------------------------------------------------------------


def test_a_wrong_result_on_one_rank_fails(comm):
    last = comm.size - 1
    outcome = one(comm, lambda c: ([1.0, 2.0], [1.0, 2.0 + 1e-4 * (c.rank == last)], 0))
    assert not outcome.equal and not outcome.passed
    assert outcome.difference == pytest.approx(5e-5, rel=1e-2)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("equal", [True, False])
def test_what_is_not_finite_fails_even_where_it_must_differ(comm, wrong, equal):
    outcome = one(comm, lambda c: ([wrong], [1.0], 0), equal)
    assert not outcome.passed
    json.dumps(outcome.facts(), allow_nan=False)


def test_a_wrong_shape_fails(comm):
    assert not one(comm, lambda c: ([1.0], [1.0, 1.0], 0)).passed


def test_what_must_differ_fails_if_it_is_equal(comm):
    assert one(comm, lambda c: ([1.0], [1.0], 0), equal=False).passed == (comm.size == 1)


def test_bytes_beside_the_formula_fail(comm):
    def function(c, excess):
        x = np.ones(3, np.float32)
        return collectives.Allreduce(c, x), [c.size] * 3, 2 * 12 * (c.size - 1) + excess

    for excess, passed in ((0, True), (1, False)):
        outcome = one(comm, partial(function, excess=excess))
        assert outcome.equal and outcome.passed == passed
        assert outcome.collectives == {"Allreduce": 1}
        assert outcome.counted_bytes == 24 * (comm.size - 1)


def test_an_error_on_all_ranks_fails_the_row_alone(comm):
    """A message that the failed row leaves behind does not reach the next row."""

    def fails(c, rng, put):
        collectives.Shift(c, np.ones(1), np.empty(1))
        raise ValueError("ring: got nothing, need\nsomething")

    rows = [Case("bad", "a cut", fails), *(r for r in verify.ROWS if r.strategy == "ring")]
    bad, *good = verify.run(comm, rows)
    assert bad.error == "ring: got nothing, need something"
    assert not bad.passed and "FAILED" in bad.cells()
    assert all(outcome.passed for outcome in good)


@pytest.mark.single
def test_an_error_on_one_rank_ends_the_job(mpirun):
    """The others wait in a collective which that rank never enters."""
    source = """
from hpcinfer import verify
from hpcinfer.cli.main import main
from hpcinfer.verify import row

def one_raises(comm, rng, put):
    if comm.rank == 1:
        raise ValueError("a room: got one, need two")
    comm.Barrier()

row.GRACE_S = 0.5
verify.ROWS[:] = [verify.Case("bad", "a cut", one_raises)]
main(["verify"])
"""
    done = mpirun(3, sys.executable, "-c", source, timeout_s=40)
    assert done.returncode == 1
    assert "hpcinfer (rank 1): a room: got one, need two" in done.stderr


# --- the command ---------------------------------------------------------------------------------


def test_the_command_names_the_rows_that_fail(comm, monkeypatch, capsys):
    def wrong(c, rng, put):
        return Trial((np.ones(1),), (np.zeros(1),), 0)

    wide = Case("wide", "a cut", wrong, least_ranks=comm.size + 1)
    monkeypatch.setattr(verify, "ROWS", [Case("bad", "of all", wrong), linear.ROWS[0], wide])
    arguments = main.parser().parse_args(["verify"])
    with pytest.raises(RuntimeError, match=r"got 1 rows that fail, .* bad \(of all\)") as raised:
        arguments.run(arguments)
    assert is_agreed(raised.value)
    printed = capsys.readouterr().out
    says = "1 of 2 rows are as they must be, 1 need more ranks"
    assert (says in printed) == (comm.rank == 0)


@pytest.mark.single
def test_the_command(mpirun, tmp_path):
    path = tmp_path / "rows.json"
    done = mpirun(2, *HPCINFER, "verify", "--seed", "5", "--json", path)
    assert done.returncode == 0, done.stderr
    assert f"{len(verify.ROWS)} of {len(verify.ROWS)} rows are as they must be" in done.stdout
    rows = json.loads(path.read_text())
    assert [r["strategy"] for r in rows] == [r.strategy for r in verify.ROWS]
    assert all(r["passed"] and r["ranks"] == 2 for r in rows)
    assert all(r["counted_bytes"] == r["formula_bytes"] for r in rows)
    assert "\n* a teaching form" in done.stdout
    assert [r["engine"] for r in rows] == [r.engine for r in verify.ROWS]
    apart = [r for r in rows if not r["must_be_equal"]]
    assert [r["strategy"] for r in apart] == APART
    assert all(r["difference"] > 0.01 for r in apart)


@pytest.mark.single
@pytest.mark.timeout(90)
def test_the_command_on_a_device(mpirun, standin):
    """Every row on the stand-in for CuPy, where a hazard would be an error."""
    settings = {"STANDIN_DEVICES": "2", "STANDIN_STRICT": "1"} | standin
    done = mpirun(2, *HPCINFER, "verify", "--device", "cuda", timeout_s=80, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("verify: 2 ranks on cuda, seed 0, float32")
    assert f"{len(verify.ROWS)} of {len(verify.ROWS)} rows are as they must be" in done.stdout


@pytest.mark.single
@pytest.mark.parametrize("seed", ["x", "1.5", ""])
def test_a_wrong_seed_is_a_usage_error(mpirun, seed):
    done = mpirun(2, *HPCINFER, "verify", "--seed", seed)
    assert done.returncode == 2
    assert done.stderr.count("hpcinfer:") == 1


@pytest.mark.single
def test_a_file_that_cannot_be_written_is_one_line(mpirun, tmp_path):
    done = mpirun(2, *HPCINFER, "verify", "--json", tmp_path / "none" / "rows.json")
    assert done.returncode == 1
    assert done.stderr.count("output: cannot write") == 1
