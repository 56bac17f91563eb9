"""Activations equal those of transformers, and those of one rank in every layout."""

import functools
import importlib.util
import json
import random
import re
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
from helpers.jobs import clean_environment, kill_tree
from helpers.layouts import draw
from helpers.paths import ROOT, SHIPPED
from helpers.speed import scaled
from mpi4py import MPI
from reference import models
from reference.parity import on_root

import hpcinfer
from hpcinfer.engine.activations import tap
from hpcinfer.engine.activations.extract import ExtractTask, check_extract
from hpcinfer.engine.activations.selection import POINTS, Selection
from hpcinfer.engine.activations.tap import spreads_of
from hpcinfer.errors import UsageError, is_agreed
from hpcinfer.grid import agree
from hpcinfer.io.activations import joined_datasets, open_activations
from hpcinfer.model.families import read_architecture
from hpcinfer.requests.request import BadRequest
from hpcinfer.requests.results import extract_record

SEED = 5
TOLERANCE = 1e-4
LENGTHS = (3, 1, 40, 1, 70, 2)
FAMILIES = ("llama-gqa", "gpt2", "gpt_neox", "qwen3-window", "mixtral", "qwen2_moe", "deepseek_v3")
DRAWN = {"llama-gqa": 4, "gpt_neox": 2, "qwen2_moe": 4, "deepseek_v3": 3}


def texts(case):
    return [models.tokens(case, n) for n in LENGTHS]


def points(case):
    """Every point that a case has."""
    arch = read_architecture(models.CASES[case])
    lacking = {"v": arch.mla is not None, "router": not arch.E}
    return tuple(point for point in POINTS if not lacking.get(point))


def load(comm, case, path, layout=None, **options):
    on_root(comm, partial(write, case, path))
    options = {"dtype": "float32", "kv_memory": 1 << 24, "layout": layout} | options
    return hpcinfer.load(path / case, comm=comm, **options)


def write(case, path):
    if not (path / case).exists():
        models.write_model(case, path / case)


@functools.cache
def of_one_rank(case, path):
    """Activations of the texts by one rank in one step each, on rank 0."""
    engine = load(MPI.COMM_SELF, case, path)
    return [engine.extract([text], what=points(case))[0] for text in texts(case)]


@pytest.fixture(scope="module")
def folder(comm, tmp_path_factory):
    """One folder for all ranks and tests."""
    return comm.bcast(tmp_path_factory.mktemp("extract"))


def flat(found):
    """dict name -> array of what `Engine.extract` returns for one text."""
    arrays = {}
    for point, value in found.items():
        if isinstance(value, dict):
            arrays |= {f"{point}/{n}": x for n, x in value.items()}
        elif point == "logits":
            arrays[point] = value
    return arrays


def gap(found, expected):
    """Largest difference, relative to the largest value of the same dataset; 0 if all is equal."""
    assert found.keys() == expected.keys()
    gaps = [0.0]
    for name, x in expected.items():
        assert found[name].shape == x.shape, name
        scale = max(1.0, float(np.abs(x).max()))
        gaps.append(float(np.abs(found[name].astype(np.float64) - x).max()) / scale)
    return max(gaps)


def pooled(arrays, pool):
    """Rows of a text as pooling makes one of them."""
    rows = {"last": lambda x: x[-1:], "mean": lambda x: x.mean(axis=0, keepdims=True)}
    return {name: rows[pool](x) for name, x in arrays.items()}


# --- What is extracted ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", FAMILIES)
def test_hidden_states_are_those_recorded_from_transformers(comm, folder, case):
    """Every index of `output_hidden_states`, and the logits."""
    engine = load(comm, case, folder)
    arrays = models.record(case)["arrays"]
    hidden, logits = arrays["hidden"], arrays["logits"]
    [found] = engine.extract([models.tokens(case, len(logits))], what=("residual", "logits"))
    assert sorted(found["residual"]) == list(range(len(hidden)))
    expected = {f"residual/{n}": x for n, x in enumerate(hidden)} | {"logits": logits}
    assert gap(flat(found), expected) < TOLERANCE


@pytest.mark.single
@pytest.mark.parametrize("case", FAMILIES)
def test_points_are_those_of_transformers(comm, folder, case):
    """What its modules return, for a text in chunks; skipped where it is not installed."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        pytest.skip("torch and transformers are not installed")
    engine = load(comm, case, folder, step_tokens=32)
    expected = of_transformers(folder / case, texts(case)[4])
    wanted = {name.partition("/")[0].replace("experts", "router") for name in expected}
    found = flat(engine.extract([texts(case)[4]], what=tuple(wanted))[0])
    chosen = {name: np.sort(found[name], axis=1) for name in found if name.startswith("experts/")}
    found = {name: x for name, x in (found | chosen).items() if not name.startswith("router/")}
    assert gap(found, expected) < TOLERANCE


def of_transformers(path, tokens):
    """dict name -> what the modules of transformers' model return for a text."""
    import torch
    from reference.oracle import choices
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    ).eval()
    arch = read_architecture(json.loads((path / "config.json").read_text()))
    sparse = [n for n in range(arch.N) if arch.sparse[n]]
    chosen = choices(model, tokens) if sparse else []
    found, counts = {}, {"attention": 0, "ffn": 0}

    def keep(point):
        def hook(module, inputs, output):
            output = output[0] if isinstance(output, tuple) else output
            found[f"{point}/{counts[point]}"] = output.detach().reshape(len(tokens), -1).numpy()
            counts[point] += 1

        return hook

    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last in ("self_attn", "attn", "attention"):
            module.register_forward_hook(keep("attention"))
        elif last in ("mlp", "block_sparse_moe"):
            module.register_forward_hook(keep("ffn"))
    with torch.no_grad():
        out = model(torch.tensor([tokens]), output_hidden_states=True)
    found |= {f"residual/{n}": x[0].numpy() for n, x in enumerate(out.hidden_states)}
    found["logits"] = out.logits[0].numpy()
    return found | {f"experts/{n}": x for n, x in zip(sparse, chosen, strict=True)}


@pytest.mark.single
@pytest.mark.parametrize("case", ["llama-gqa", "qwen3-window", "qwen2_moe", "deepseek_v3"])
def test_points_belong_together(folder, case):
    """Queries and keys give the log-sum-exps, all halves the residuals, and scores the choices."""
    arch = read_architecture(models.CASES[case])
    found = flat(load(MPI.COMM_SELF, case, folder).extract([texts(case)[4]], what=points(case))[0])
    T = LENGTHS[4]
    distance = np.arange(T)[:, None] - np.arange(T)
    for n in range(arch.N):
        seen = (distance >= 0) & (distance < (arch.windows[n] or T))
        k = found[f"k/{n}"].reshape(T, arch.G, -1).repeat(arch.H // arch.G, axis=1)
        scores = arch.scales[n] * np.einsum("shk,thk->sht", found[f"q/{n}"], k)
        scores = np.where(seen[:, None], scores, -np.inf)
        lse = np.log(np.exp(scores).sum(axis=2))
        np.testing.assert_allclose(found[f"lse/{n}"], lse, atol=1e-4)
        if n + 1 < arch.N:
            after = found[f"residual/{n}"] + found[f"attention/{n}"] + found[f"ffn/{n}"]
            np.testing.assert_allclose(found[f"residual/{n + 1}"], after, atol=1e-4)
        if f"router/{n}" in found and not arch.router.groups > 1:
            best = np.argsort(-found[f"router/{n}"], axis=1)[:, : arch.router.k]
            assert np.array_equal(np.sort(best), np.sort(found[f"experts/{n}"]))


def test_values_are_those_that_attention_reads(comm, folder):
    """Where a model clips them, the clipped ones."""
    bound = read_architecture(models.CASES["olmoe"]).clip_qkv
    [found] = load(comm, "olmoe", folder).extract([models.tokens("olmoe", 40)], what="v")
    assert all(np.abs(v).max() == np.float32(bound) for v in found["v"].values())


# --- Layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", DRAWN)
def test_every_layout_equals_one_rank(comm, folder, case):
    """All points, uneven texts in chunks, one row a token or a text; ranks without columns too."""
    one = on_root(comm, lambda: [flat(x) for x in of_one_rank(case, folder)])
    rng = random.Random(SEED)
    for layout in draw(comm.size, case, DRAWN[case], SEED):
        engine = load(comm, case, folder, layout, step_tokens=rng.choice([16, 32, 100]))
        found = engine.extract(texts(case), what=points(case))
        for x, expected in zip(found, one, strict=True):
            assert gap(flat(x), expected) < TOLERANCE, layout
        pool = rng.choice(["last", "mean"])
        what = tuple(p for p in points(case) if p != "router")
        found = engine.extract(texts(case), what=what, pool=pool)
        for x, expected in zip(found, one, strict=True):
            expected = {n: y for n, y in expected.items() if n.partition("/")[0] in what}
            assert gap(flat(x), pooled(expected, pool)) < TOLERANCE, (layout, pool)


@pytest.mark.parametrize("axis", ["tp", "cp"])
def test_every_column_is_written_once(comm, folder, axis):
    """Also where heads, experts or choices are fewer than ranks, some of which then have none."""
    engine = load(comm, "qwen2_moe", folder, f"{axis}={comm.size}")
    selection = Selection(points("qwen2_moe"))
    spreads = spreads_of(engine.model, selection.fields(engine.model.arch))
    for name, spread in spreads.items():
        start, stop, width = spread.share.start, spread.share.stop, spread.share.field.shape[0]
        owned = [set(range(*of_rank)) for of_rank in comm.allgather((start, stop))]
        assert sum(map(len, owned)) == width and set.union(*owned) == set(range(width)), name


# --- Files ---------------------------------------------------------------------------------------


def write_all(comm, engine, path, items, selection):
    """Extract to files in this session; the root joins them."""
    work = ExtractTask(engine, selection)
    writers = []
    on_root(comm, lambda: writers.append(work.open(str(path), {"layout": "x"})))
    with work.into_parts(str(path)):
        outcomes = engine._run(lambda engine: work, engine.reader({}, score=True), items)

    def join():
        for outcome in outcomes:
            writers[0].write(extract_record(outcome))
        writers[0].write(extract_record(BadRequest(len(items), 9, "bad", "no prompt")))
        writers[0].close()

    on_root(comm, join)


def read_texts(file):
    """For each request the dict name -> its rows."""
    arrays = {name: np.asarray(x[:]) for name, x in joined_datasets(file).items()}
    for first, n in zip(file["first_row"][:], file["n_rows"][:], strict=True):
        yield {name: x[first : first + n] for name, x in arrays.items()}


@pytest.mark.parametrize("case", ["llama-gqa", "qwen2_moe"])
def test_files_hold_the_same(comm, folder, shared_path, case):
    """In drawn layouts, stored in every type, compressed or not."""
    one = on_root(comm, lambda: [flat(x) for x in of_one_rank(case, folder)])
    stores = [("float32", 1e-4), ("bfloat16", 8e-3), ("float16", 1e-3)]
    for turn, layout in enumerate(draw(comm.size, case, 3, SEED + 1)):
        store, tolerance = stores[turn % 3]
        engine = load(comm, case, folder, layout, step_tokens=32)
        selection = Selection(points(case), store=store, compress=turn % 2 == 1)
        path = shared_path / f"{turn}.h5"
        write_all(comm, engine, path, texts(case), selection)
        with open_activations(path, verify=comm.rank == 0) as file:
            assert file["custom_id"].asstr()[:].tolist()[-1] == "bad" and bool(
                file.attrs["complete"]
            )
            assert file["n_rows"][:].tolist() == [*LENGTHS, 0]
            assert file["token_ids"][:].tolist() == sum(texts(case), [])
            for found, expected in zip(read_texts(file), one, strict=False):
                assert gap(found, expected) < tolerance, layout


def test_one_row_a_request_in_files(comm, folder, shared_path):
    case = "llama-gqa"
    one = on_root(comm, lambda: [flat(x) for x in of_one_rank(case, folder)])
    engine = load(comm, case, folder, f"dp={comm.size}")
    selection = Selection(("residual",), (-1,), "mean")
    write_all(comm, engine, shared_path / "a.h5", texts(case), selection)
    with open_activations(shared_path / "a.h5") as file:
        assert list(joined_datasets(file)) == ["residual/2"]
        assert file["residual/2"].dims[0].label == "requests"
        for found, arrays in zip(read_texts(file), one, strict=False):
            expected = {"residual/2": pooled(arrays, "mean")["residual/2"]}
            assert gap(found, expected) < TOLERANCE


# --- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case, selection, message",
    [
        ("llama-gqa", {"what": ("hidden",)}, "got what=hidden, need some of residual, attention"),
        ("llama-gqa", {"what": ()}, "got what=nothing"),
        ("llama-gqa", {"pool": "max"}, "got pool=max, need last or mean"),
        ("llama-gqa", {"store": "int8"}, "got store=int8, need float32"),
        (
            "llama-gqa",
            {"what": ("router",)},
            "what=router for llama, need a model with experts",
        ),
        ("llama-gqa", {"layers": (3,)}, "got layer 3 for residual, need layers from 0 to 2"),
        (
            "llama-gqa",
            {"layers": (2,), "what": ("q",)},
            "got layer 2 for q, need layers from 0",
        ),
        ("deepseek_v3", {"what": ("v",)}, "got what=v for deepseek_v3, need k"),
        ("deepseek_v3", {"what": ("router",), "layers": (0,)}, "need layers with experts from 1"),
        ("mixtral", {"what": ("router",), "pool": "mean"}, "got pool=mean for router"),
    ],
)
def test_refuses_what_a_model_does_not_have(comm, folder, case, selection, message):
    """In one line, on every rank, before the model is loaded."""
    on_root(comm, partial(write, case, folder))
    with pytest.raises(UsageError, match=message) as caught:
        agree(comm, check_extract, folder / case, ["a.h5"], Selection(**selection))
    assert is_agreed(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("outputs", [["a.jsonl"], ["a.h5", "b.h5"]])
def test_refuses_other_outputs(comm, outputs):
    with pytest.raises(UsageError, match="need one name that ends in .h5"):
        agree(comm, check_extract, "none", outputs, Selection())


@pytest.mark.single
def test_refuses_values_that_float16_does_not_hold():
    field = Selection(store="float16").fields(read_architecture(models.CASES["gpt2"]))[0]
    assert tap._rounded(np.array([-65504.0, 1.0], np.float32), field).dtype == np.float16
    with pytest.raises(ValueError, match="got 7e.04 in residual/0, need at most 65504"):
        tap._rounded(np.array([1.0, -7e4], np.float32), field)


@pytest.mark.single
def test_layers_are_counted_from_the_end():
    arch = read_architecture(models.CASES["qwen2_moe-step"])
    fields = Selection(("residual", "q", "logits"), (0, -1)).fields(arch)
    N = arch.N
    assert [f.name for f in fields] == [
        "residual/0", f"residual/{N}", "q/0", f"q/{N - 1}", "logits",
    ]  # fmt: skip
    routed = [f.name for f in Selection(("router",)).fields(arch)]
    assert routed == [f"{p}/{n}" for n in range(N) if arch.sparse[n] for p in ("router", "experts")]


# --- The command ---------------------------------------------------------------------------------


HPCINFER = (sys.executable, "-m", "hpcinfer")
OPTIONS = ("--kv-memory", "32M", "--dtype", "float32", "--what", "residual,lse", "--layers", "0,-1")


def arguments(source, output, *options):
    return ("extract", SHIPPED, "--input", source, "--output", output, *OPTIONS, *options)


@pytest.mark.single
def test_the_command_writes_and_inspect_shows(tmp_path, mpirun):
    source = tmp_path / "in.txt"
    source.write_text("Once there was a shy hare.\nWhat is 2 + 3? 5\nA\n")
    done = mpirun(2, *HPCINFER, *arguments(source, tmp_path / "h.h5", "--layout", "dp=2"))
    assert done.returncode == 0, done.stderr
    assert "written " in done.stdout and "done      3 requests finished" in done.stdout
    with open_activations(tmp_path / "h.h5", verify=True) as file:
        assert list(joined_datasets(file)) == ["lse/0", "lse/3", "residual/0", "residual/4"]
        assert file.attrs["layout"] == "dp=2,pp=1,cp=1,tp=1" and file.attrs["layers"] == "0,-1"
        assert {"command", "model_checksum", "hpcinfer_version", "dtype"} <= set(file.attrs)
    shown = mpirun(1, *HPCINFER, "inspect", tmp_path / "h.h5")
    assert "residual/{0,4}" in shown.stdout and "all there" in shown.stdout
    checked = mpirun(1, *HPCINFER, "inspect", tmp_path / "h.h5", "--check")
    assert checked.returncode == 0 and "every checksum as it was written" in checked.stdout
    [part, *_] = sorted((tmp_path / "h.parts").iterdir())
    part.unlink()
    gone = mpirun(1, *HPCINFER, "inspect", tmp_path / "h.h5")
    assert gone.returncode == 1 and f"got no file for {part}" in gone.stderr
    assert gone.stderr.count("\n") == 1


@pytest.mark.single
def test_the_command_refuses_in_one_line(tmp_path, mpirun):
    source = tmp_path / "in.txt"
    source.write_text("A\n")
    for output, options, message in (
        ("h.jsonl", (), "need one name that ends in .h5"),
        ("h.h5", ("--layers", "9"), "got layer 9 for residual, need layers from 0 to 4"),
        ("h.h5", ("--layers", "0,x"), "need all or whole numbers"),
    ):
        done = mpirun(2, *HPCINFER, *arguments(source, tmp_path / output, *options))
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr
    assert not (tmp_path / "h.parts").exists()


@pytest.mark.single
@pytest.mark.timeout(180)
def test_a_killed_run_is_readable_and_goes_on(tmp_path, mpirun):
    """kill -9 of all ranks; then another number of ranks and another layout complete it."""
    rng = random.Random(SEED)
    words = "the shy hare ran over a hill and away from an old harbour".split()
    lines = [" ".join(rng.choices(words, k=rng.randint(1, 40))) for _ in range(120)]
    source, output, whole = (tmp_path / name for name in ("in.txt", "h.h5", "whole.h5"))
    source.write_text("\n".join(lines) + "\n")
    slowly = arguments(source, output, "--step-tokens", "32")
    job = subprocess.Popen(
        ["bash", ROOT / "jobs" / "site.sh", "2", *HPCINFER, *slowly],
        env=clean_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_until(lambda: n_readable(output) > 9, job)
    kill_tree(job.pid)
    job.wait()
    with open_activations(output, verify=True) as file:
        n_killed = len(file["index"])
        assert not file.attrs["complete"] and 0 < n_killed < len(lines)

    done = mpirun(3, *HPCINFER, *arguments(source, output, "--layout", "cp=3"))
    assert done.returncode == 0, done.stderr
    before = int(re.search(r"(\d+) before", done.stdout)[1])
    assert n_killed <= before and f"{len(lines) - before} requests finished" in done.stdout
    done = mpirun(1, *HPCINFER, *arguments(source, whole))
    assert done.returncode == 0, done.stderr
    with open_activations(output, verify=True) as a, open_activations(whole) as b:
        assert bool(a.attrs["complete"]) and a["index"][:].tolist() == list(range(len(lines)))
        assert a["token_ids"][:].tolist() == b["token_ids"][:].tolist()
        for x, y in zip(read_texts(a), read_texts(b), strict=True):
            assert gap(x, y) < TOLERANCE


def n_readable(output):
    """Requests of an output that can be read by now."""
    try:
        with open_activations(output) as file:
            return len(file["index"])
    except (OSError, ValueError):
        return 0


def wait_until(condition, job, timeout_s=40):
    """Wait for a condition while a job runs."""
    end_s = time.monotonic() + scaled(timeout_s)
    while not condition():
        assert job.poll() is None and time.monotonic() < end_s
        time.sleep(0.005)
