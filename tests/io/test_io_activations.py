"""Parts of activations and the file that joins them: exact, whole, or refused."""

import os
import shutil
from itertools import pairwise

import h5py
import numpy as np
import pytest

from hpcinfer.array import BFLOAT16
from hpcinfer.io import parts as room
from hpcinfer.io.activations import ActivationsWriter, open_activations
from hpcinfer.io.inspect import describe
from hpcinfer.io.parts import ColumnShare, Field, PartFiles, next_generation, parts_folder

pytestmark = pytest.mark.single

FLOAT32 = np.dtype(np.float32)
COLUMNS = {"residual/0": (0, 6, 10), "q/1": (0, 1, 4), "experts/1": (0, 2, 2), "logits": (0, 5, 11)}


class Run:
    """A run of two replicas of two ranks, in one process.

    Attributes
    ----------
    rows : for each request the dict name -> its rows, None if it was refused
    """

    def __init__(self, path, dtype=FLOAT32, compress=False, resume=False, replicas=2, seed=0):
        self.path, self.rows, self.rng = str(path), [], np.random.default_rng(seed)
        self.fields = [
            Field("residual/0", (10,), dtype, ("features",), "x"),
            Field("q/1", (4, 3), dtype, ("heads", "width"), "queries"),
            Field("experts/1", (2,), np.dtype(np.int32), ("choices",), "experts"),
            Field("logits", (11,), dtype, ("vocabulary",), "scores"),
        ]
        self.writer = ActivationsWriter(self.path, self.fields, {"layout": "dp=2"}, resume=resume)
        self.generation = next_generation(self.path)
        self.ranks = {
            (replica, rank): PartFiles(
                self.path, self.generation, replica, 2 * replica + rank, self.shares(rank), compress
            )
            for replica in range(replicas)
            for rank in (0, 1)
        }
        self.first = [0] * replicas

    def shares(self, rank):
        cuts = [list(pairwise(COLUMNS[f.name]))[rank] for f in self.fields]
        return [
            ColumnShare(f, *cut)
            for f, cut in zip(self.fields, cuts, strict=True)
            if cut[1] > cut[0]
        ]

    def step(self, index, noted=True, ranks=(0, 1)):
        """One request of some tokens, computed by the replica whose turn it is."""
        replica, n = index % len(self.first), int(self.rng.integers(1, 9))
        of_request = {}
        for spec in self.fields:
            x = self.rng.integers(0, 100, (n, *spec.shape)).astype(spec.dtype)
            of_request[spec.name] = x
            for rank in ranks:
                for share in self.shares(rank):
                    if share.field is spec:
                        own = x[:, share.start : share.stop]
                        self.ranks[replica, rank].append(spec.name, own)
        if noted:
            self.writer.write(
                {
                    "index": index, "line": index + 1, "custom_id": f"r{index}", "error": None,
                    "token_ids": list(range(n)), "generation": self.generation,
                    "replica": replica, "first_row": self.first[replica], "n_rows": n,
                }
            )  # fmt: skip
            self.rows.append(of_request)
        self.first[replica] += n

    def refuse(self, index):
        record = {"index": index, "line": index + 1, "custom_id": "bad", "error": "no prompt"}
        self.writer.write(record)
        self.rows.append(None)

    def close(self):
        for parts in self.ranks.values():
            parts.close()
        self.writer.close()

    def kill(self):
        """End as if killed: nothing more is written."""
        for parts in self.ranks.values():
            parts.abandon()
        self.writer.close(final=False)


def check(path, rows):
    """Compare every request of a joined file with what was written."""
    with open_activations(path, verify=True) as file:
        for place, index in enumerate(file["index"][:]):
            expected, n = rows[index], file["n_rows"][place]
            if expected is None:
                assert n == 0 and file["error"].asstr()[place] == "no prompt"
                continue
            first, at = file["first_row"][place], file["token_offsets"][place]
            assert file["token_ids"][at : at + n].tolist() == list(range(n))
            for name, x in expected.items():
                found = np.asarray(file[name][first : first + n])
                assert np.array_equal(found.astype(np.float32), x.astype(np.float32)), name
        return file["index"][:].tolist()


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT32, np.dtype(np.float16), BFLOAT16])
def test_rows_come_back(tmp_path, monkeypatch, dtype, compress):
    """All types, in parts of several sizes, read where the folder was moved to."""
    monkeypatch.setattr(room, "_FIRST_BYTES", 1 << 11)
    monkeypatch.setattr(room, "_PACKED_BYTES", 1 << 11)
    (tmp_path / "100 %d").mkdir()
    run = Run(tmp_path / "100 %d" / "hidden%b.h5", dtype, compress)
    for index in range(40):
        run.step(index)
    run.refuse(40)
    run.close()
    moved = tmp_path / "moved"
    os.rename(tmp_path / "100 %d", moved)
    assert check(moved / "hidden%b.h5", run.rows) == list(range(41))
    with open_activations(moved / "hidden%b.h5") as file:
        assert [dim.label for dim in file["q/1"].dims] == ["tokens", "heads", "width"]
        assert file.attrs["layout"] == "dp=2" and bool(file.attrs["complete"])
        assert len(file["parts/name"]) > 4
    assert "all there" in describe(moved / "hidden%b.h5")


def test_a_killed_run_is_readable_and_goes_on(tmp_path):
    """Finished requests are there, half-written ones are not, and are done by the next run."""
    path = tmp_path / "hidden.h5"
    run = Run(path)
    for index in range(10):
        run.step(index)
    run.step(10, ranks=(0,))
    run.step(11, noted=False)
    run.kill()
    rows = run.rows[:10]
    assert sorted(check(path, run.rows)) == list(range(10))

    # The next run has another number of replicas.
    second = Run(path, resume=True, replicas=1, seed=1)
    assert second.generation == 2 and second.writer.done == set(range(10))
    for index in range(10, 15):
        second.step(index)
    second.close()
    assert check(path, rows + second.rows) == list(range(15))
    with open_activations(path) as file:
        assert bool(file.attrs["complete"])


def test_room_that_was_not_needed_is_given_back(tmp_path):
    """Also while a file joins the parts that were made with it, as after a kill at the very end."""
    run = Run(tmp_path / "hidden.h5")
    for index in range(4):
        run.step(index)
    run.writer.close(final=False)
    before = [entry.stat().st_size for entry in os.scandir(parts_folder(run.path))]
    for parts in run.ranks.values():
        parts.close()
    after = [entry.stat().st_size for entry in os.scandir(parts_folder(run.path))]
    assert min(before) > 1 << 22 > 50 * max(after)
    assert sorted(check(run.path, run.rows)) == [0, 1, 2, 3]


def test_rows_that_are_gone_are_done_again(tmp_path):
    """A request whose part is missing when a run goes on does not count as finished."""
    run = Run(tmp_path / "hidden.h5")
    for index in range(6):
        run.step(index)
    run.kill()
    os.unlink(os.path.join(parts_folder(run.path), "001-001-00003-00000.h5"))
    again = Run(run.path, resume=True)
    assert again.writer.done == {0, 2, 4}
    again.kill()


def test_a_new_run_removes_the_parts_of_the_last(tmp_path):
    path = tmp_path / "hidden.h5"
    for seed in (0, 1):
        run = Run(path, seed=seed)
        assert run.generation == 1
        run.step(0)
        run.close()
        assert check(path, run.rows) == [0]


def test_other_fields_are_refused(tmp_path):
    run = Run(tmp_path / "hidden.h5")
    run.step(0)
    run.kill()
    with pytest.raises(ValueError, match="need parts of the same points"):
        ActivationsWriter(run.path, run.fields[:1], {}, resume=True)


@pytest.mark.parametrize("verify", [False, True])
def test_a_missing_or_changed_part_is_detected(tmp_path, verify):
    """Our reader and `inspect` say which one; HDF5 alone would read NaN."""
    path = tmp_path / "hidden.h5"
    run = Run(path)
    for index in range(6):
        run.step(index)
    run.close()
    part = os.path.join(parts_folder(run.path), "001-000-00001-00000.h5")
    shutil.copy(part, tmp_path / "kept")

    os.unlink(part)
    for read in (open_activations, describe):
        with pytest.raises(ValueError, match="got no file for .*00001-00000.h5, need the 4"):
            read(path)
    with h5py.File(path) as file:
        assert np.isnan(file["residual/0"][0, 6:]).all()
        assert not np.isnan(file["residual/0"][0, :6]).any()

    # Another run's part of the same name, then one flipped byte.
    shutil.copy(os.path.join(parts_folder(run.path), "001-001-00003-00000.h5"), part)
    with pytest.raises(ValueError, match="got another file for"):
        open_activations(path)
    shutil.copy(tmp_path / "kept", part)
    with h5py.File(part) as file:
        at = file["logits"].id.get_offset()
    with open(part, "r+b") as file:
        file.seek(at + 1)
        file.write(b"\xff")
    if verify:
        with pytest.raises(ValueError, match="got other bytes of logits for"):
            open_activations(path, verify=True)
    else:
        open_activations(path).close()


def test_what_is_no_such_file_is_refused(tmp_path):
    with h5py.File(tmp_path / "other.h5", "w", libver="v110") as file:
        file["x"] = 1
    with pytest.raises(ValueError, match="need what `hpcinfer extract` wrote"):
        open_activations(tmp_path / "other.h5")
