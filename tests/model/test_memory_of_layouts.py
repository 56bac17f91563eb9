"""What each rank holds: its shard in every layout, and nothing beside it."""

import gc
import itertools
import types
from dataclasses import fields, replace
from functools import partial

import numpy as np
import pytest
from helpers import layouts
from helpers.recorded import difference, load
from mpi4py import MPI
from reference import models
from reference.parity import greedy, on_root, score_gap

import hpcinfer
from hpcinfer import node, partition
from hpcinfer.engine.expert_load import ExpertLoad
from hpcinfer.layout import Layout
from hpcinfer.model import forward as forward_room
from hpcinfer.model import layer as layer_room
from hpcinfer.model.weights.parameters import Layer
from hpcinfer.model.weights.stages import layers_of_stage
from hpcinfer.model.weights.table import FFN_KEYS, table
from hpcinfer.parallel import zero

SIZE = MPI.COMM_WORLD.size
LINE = 64  # bytes
OUTSIDE = ("embed", "positions", "final_norm", "final_norm_bias", "head")

several = pytest.mark.skipif(SIZE < 2, reason="needs two ranks")


def parameters(weights):
    """dict (layer or None, key) -> array of all that a rank holds."""
    found = {(None, key): getattr(weights, key) for key in OUTSIDE}
    if weights.tied_rows is not None:
        del found[None, "head"]
    for n, of_layer in enumerate(weights.layers):
        found |= {(n, field.name): getattr(of_layer, field.name) for field in fields(Layer)}
    return {name: x for name, x in found.items() if x is not None}


def alone(path, case):
    """The whole model on one rank."""
    return load(MPI.COMM_SELF, path, case, "tp=1")


def resident_bytes(*roots, beside=()):
    """Bytes of all arrays that can be reached from some objects, each buffer once."""
    leave = (type, types.ModuleType, MPI.Comm)
    seen, buffers, queue = {id(x) for x in beside}, {}, list(roots)
    while queue:
        x = queue.pop()
        if id(x) in seen or isinstance(x, leave):
            continue
        seen.add(id(x))
        if isinstance(x, np.ndarray):
            size = x.nbytes
            while isinstance(x.base, np.ndarray):
                x = x.base
            whole, most = buffers.get(id(x), (x.nbytes, 0))
            buffers[id(x)] = whole, max(most, size)
        elif isinstance(x, types.FunctionType):
            queue += [*(x.__closure__ or ()), *(x.__defaults__ or ())]
        else:
            queue += gc.get_referents(x)

    # An array that is made to begin a line of the cache has a line's room beside it.
    return sum(most if whole == most + LINE else whole for whole, most in buffers.values())


def held_bytes(engine):
    """Bytes of arrays that a rank's model holds between runs, beside cache and expert load."""
    model = engine.model
    beside = [getattr(model, "cache", None), model.expert_load, model.grid]
    return resident_bytes(model, beside=[x for x in beside if x is not None])


def sum_by_name(comm, weights):
    """dict (layer, key) -> numbers of all ranks together."""
    total = {}
    for of_rank in comm.allgather({name: x.size for name, x in parameters(weights).items()}):
        for name, n in of_rank.items():
            total[name] = total.get(name, 0) + n
    return total


# --- Two sides -----------------------------------------------------------------------------------


@several
@pytest.mark.parametrize(
    "case", ["llama-bias", "gpt2", "gpt_neox", "mixtral", "qwen2_moe", "deepseek_v3"]
)
def test_two_sides_hold_the_model_once(comm, shared_path, case):
    """Attention on one rank, FFNs on all others: no parameter of the other side, none twice."""
    engine = load(comm, shared_path, case, f"afd=1:{SIZE - 1}")
    own = parameters(engine.model.weights)
    if engine.grid.role == "ffn":
        assert {key for _, key in own} <= FFN_KEYS and None not in {n for n, _ in own}
        assert not hasattr(engine.model, "cache") and engine.stats.kv_bytes == 0
        assert held_bytes(engine) <= engine.model.weights.nbytes
    else:
        assert not {key for _, key in own} & FFN_KEYS
        assert engine.stats.kv_bytes > 0
    whole = parameters(alone(shared_path, case).model.weights)
    expected = {name: x.size for name, x in whole.items()}
    assert sum_by_name(comm, engine.model.weights) == expected


@several
def test_attention_side_reads_its_part_of_the_file(comm, shared_path):
    """Both sides together read the file once, and neither what is the other's."""
    engine = load(comm, shared_path, "mixtral", f"afd=1:{SIZE - 1}")
    read = comm.allgather(engine.stats.bytes_read)
    ffn = sum(
        4 * int(np.prod(row.shape)) for row in table(engine.model.arch) if row.key in FFN_KEYS
    )
    assert sum(read) == engine.stats.file_bytes
    assert read[0] == engine.stats.file_bytes - ffn


# --- Parts of layers ----------------------------------------------------------------------------


def padded(x):
    return -(-x.nbytes // 64) * 64


def pieces_bytes(whole, P, rank, small):
    """(parts and two layers, embedding and head apart with the larger whole) of one rank."""
    layers = {}
    for (n, _), x in whole.items():
        layers.setdefault(n, []).append(x)
    units = [layers[n] for n in sorted(n for n in layers if n is not None)]
    embed = [whole[None, key] for key in ("embed", "positions") if (None, key) in whole]
    head = [whole[None, "head"]] if (None, "head") in whole else []

    def kept(xs, owner):
        large = sum(padded(x) for x in xs if x.nbytes >= small)
        rest = sum(padded(x) for x in xs if x.nbytes < small)
        start, stop = partition.block(large, P)[rank]
        return stop - start + rest * (rank == owner)

    inner = sum(kept(xs, n % P) for n, xs in enumerate(units))
    inner += 2 * max(sum(map(padded, xs)) for xs in units)
    outer = kept(embed, 0) + kept(head, 0)
    return inner, outer, max(sum(map(padded, embed)), sum(map(padded, head)))


@several
@pytest.mark.parametrize("mode", ["allgather", "broadcast"])
@pytest.mark.parametrize("case", ["llama-gqa", "gpt2", "mixtral"])
def test_pieces_are_parts_and_two_layers(comm, shared_path, case, mode):
    """Nothing else is resident: as much as the formula says, and less than the whole model."""
    engine = load(comm, shared_path, case, f"dp={SIZE},zero={mode}")
    whole = parameters(alone(shared_path, case).model.weights)
    small = zero.SMALL_BYTES if mode == "allgather" else np.inf
    inner, outer, fetched = pieces_bytes(whole, SIZE, comm.rank, small)
    assert engine.model.weights.nbytes == inner + outer + fetched

    # Between runs the embedding and the head are not whole; the final norm always is.
    norms = sum(x.nbytes for (_, key), x in whole.items() if key.startswith("final_norm"))
    for run in (lambda: None, lambda: engine.score([models.tokens(case, 20)])):
        run()
        assert inner + outer <= held_bytes(engine) <= inner + outer + norms + 4096


@several
def test_pieces_of_all_ranks_are_the_model_once(comm, shared_path):
    """Beside buffers, dp and cp keep each layer once; spread experts stay where they are."""
    for layout in (f"cp={SIZE},zero=allgather", f"dp={SIZE},ep={SIZE},zero=broadcast"):
        engine = load(comm, shared_path, "mixtral", layout)
        pieces, whole = (
            engine.model.weights,
            parameters(alone(shared_path, "mixtral").model.weights),
        )
        kept = sum(unit.kept_bytes for gathered in pieces._gathered for unit in gathered.units)
        experts = sum(
            x.nbytes for of_layer in pieces._rest for x in vars(of_layer).values() if x is not None
        )
        layers = sum(x.nbytes for (n, _), x in whole.items() if n is not None)
        padding = 64 * len(whole)
        assert layers <= comm.allreduce(kept + experts) <= layers + padding


# --- Stages --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", ["layers", "memory", "time"])
@pytest.mark.parametrize("case", ["llama-bias", "llama-tied", "deepseek_v2"])
def test_a_stage_holds_its_layers_only(comm, shared_path, case, stages):
    """The embedding on the first, norm and head on the last; a tied head needs it there too."""
    engine = load(comm, shared_path, case, f"pp={SIZE},stages={stages}")
    model, own = engine.model, parameters(engine.model.weights)
    assert {n for n, _ in own if n is not None} == set(model.layers)
    first, last = comm.rank == 0, comm.rank == SIZE - 1
    assert ((None, "embed") in own) == (first or (last and model.arch.tied))
    assert ((None, "final_norm") in own) == last
    assert ((None, "head") in own) == (last and not model.arch.tied)
    assert held_bytes(engine) == model.weights.nbytes

    # Together they are the model, each layer on one.
    expected = {
        name: x.size for name, x in parameters(alone(shared_path, case).model.weights).items()
    }
    if model.arch.tied and SIZE > 1:
        expected[None, "embed"] *= 2
    assert sum_by_name(comm, model.weights) == expected
    assert engine.stats.kv_bytes == engine.scheduler.pages.n * model.page_bytes


@pytest.mark.single
@pytest.mark.parametrize("case", ["llama-gqa", "mixtral"])
@pytest.mark.parametrize("P", [2, 3, 4, 5])
def test_a_large_vocabulary_takes_layers_from_the_ends(case, P):
    """By memory the embedding and the head count, by time the head alone, by layers neither."""
    arch = layouts.architecture(case)
    N = 12
    arch = replace(
        arch, N=N, V=20_000, sparse=arch.sparse[:1] * N, windows=arch.windows[:1] * N,
        scales=arch.scales[:1] * N,
    )  # fmt: skip

    def cut(stages):
        runs = layers_of_stage(arch, Layout(pp=P, stages=stages), np.float32)
        assert [n for run in runs for n in run] == list(range(N))
        return [len(run) for run in runs]

    def heaviest(counts, layer, first, last):
        loads = [layer * n for n in counts]
        loads[0] += first
        loads[-1] += last
        return max(loads)

    ends = 4 * arch.V * arch.D
    of_layer = sum(4 * int(np.prod(row.shape)) for row in table(arch) if row.layer == 0)
    work = of_layer // 4
    if arch.E:
        work -= 3 * arch.D * arch.moe_F * (arch.E - arch.router.k)
    assert cut("layers") == partition.counts(partition.block(N, P))
    for stages, weights in (("memory", (of_layer, ends, ends)), ("time", (work, 0, ends // 4))):
        best = min(
            heaviest(counts, *weights)
            for counts in itertools.product(range(N + 1), repeat=P)
            if sum(counts) == N
        )
        assert heaviest(cut(stages), *weights) == best
    assert cut("time")[-1] < cut("layers")[-1]
    if P > 2:
        assert max(cut("memory")[0], cut("memory")[-1]) < min(cut("memory")[1:-1])


# --- Tokens cut over tp --------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["llama-gqa", "mixtral", "gpt_neox"])
def test_a_rank_keeps_its_share_of_the_tokens(comm, shared_path, monkeypatch, case):
    """Between the halves, and into every norm, (T/P, D); all tokens where they are few."""
    if SIZE == 1:
        pytest.skip("sp needs several ranks of tp")
    engine = load(comm, shared_path, case, f"tp={SIZE},sp=on")
    layer, kept = forward_room.layer, []

    def watched(p, n, x, y):
        arriving = len(x)
        x, y = layer(p, n, x, y)
        kept.append((p.step.n_tokens, arriving, len(x), len(y)))
        return x, y

    monkeypatch.setattr(forward_room, "layer", watched)
    norm, normed = layer_room.add_norm, []
    if not engine.model.arch.parallel_residual:
        monkeypatch.setattr(layer_room, "add_norm", lambda *a: normed.append(len(a[1])) or norm(*a))
    greedy(engine, [models.tokens(case, 40), models.tokens(case, 33)[::-1]], 3)
    assert {T for T, *_ in kept} == {73, 2}
    for T, arriving, *leaving in kept:
        share = partition.counts(partition.block(T, SIZE))[comm.rank] if T >= SIZE else T
        assert [arriving, *leaving] == [share] * 3
    assert max(normed, default=0) <= -(-73 // SIZE)
    assert normed or engine.model.arch.parallel_residual


# --- Experts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["tp", "cp", "dp"])
@pytest.mark.parametrize("case", ["mixtral", "deepseek_v3"])
def test_a_rank_holds_its_share_of_the_experts(comm, shared_path, case, axis):
    """E/ep experts each; where ranks are more than experts, a part of the columns of one."""
    engine = load(comm, shared_path, case, f"{axis}={SIZE},ep={SIZE}")
    arch = engine.model.arch
    own = parameters(engine.model.weights)
    expected = partition.counts(partition.block(arch.E, SIZE))[comm.rank] if SIZE > 1 else arch.E
    for n in range(arch.N):
        if arch.sparse[n]:
            assert own[n, "experts_up"].shape[0] == own[n, "experts_down"].shape[0] == expected
    sums = sum_by_name(comm, engine.model.weights)
    whole = parameters(alone(shared_path, case).model.weights)
    for (n, key), x in whole.items():
        if key in ("experts_up", "experts_down"):
            assert sums[n, key] == x.size


# --- One copy of equal weights -------------------------------------------------------------------


def equal_weights():
    """Layouts whose ranks hold equal parameters."""
    texts = [f"dp={SIZE}", f"cp={SIZE}", f"dp={SIZE},ep={SIZE}", f"cp={SIZE},ep={SIZE}"]
    texts += ["dp=2,tp=2,ep=2", "dp=2,cp=2", "dp=2,pp=2", "dp=2,afd=2:2", "cp=2,tp=2,ep=4"]
    return [text for text in texts if layouts.is_legal(text, SIZE)]


def is_mapped(x):
    """True if an array lies in memory that is mapped."""
    while isinstance(x, np.ndarray):
        x = x.base
    return x is not None and not isinstance(x, bytes)


@several
@pytest.mark.parametrize("layout", equal_weights())
@pytest.mark.parametrize("case", ["mixtral", "llama-tied"])
def test_equal_weights_are_one_memory(comm, shared_path, case, layout):
    """What the first of some ranks writes, the others see, who can only read."""
    if not layouts.is_legal(layout, SIZE, layouts.architecture(case)):
        pytest.skip("no experts")
    engine = load(comm, shared_path, case, layout)
    grid, weights = engine.grid, engine.model.weights
    if grid.role == "ffn":
        assert grid.same_weights.size == 1
    spread = grid.cp.size > 1 or grid.layout.experts_over_dp
    own = parameters(weights)
    shared = {
        name: x
        for name, x in own.items()
        if grid.same_weights.size > 1
        and not (name[1] == "head" and grid.cp.size > 1)
        and not (name[1].startswith("experts") and grid.experts is not None and spread)
    }
    assert {name for name, x in own.items() if is_mapped(x)} == set(shared)
    if weights.tied_rows is not None and weights.embed is not None:
        assert np.shares_memory(weights.head, weights.embed)

    # Write a number to each parameter of the first rank, and take it back.
    for name, x in sorted(shared.items(), key=str):
        if not x.size:
            continue
        at = (-1,) * x.ndim
        before = grid.same_weights.bcast(x[at])
        assert x[at] == before
        grid.same_weights.Barrier()
        if grid.same_weights.rank == 0:
            x[at] = 77
        else:
            assert not x.flags.writeable
            with pytest.raises(ValueError, match="read-only"):
                x[at] = 0
        grid.same_weights.Barrier()
        assert x[at] == 77, name
        grid.same_weights.Barrier()
        if grid.same_weights.rank == 0:
            x[at] = before
    comm.Barrier()
    assert not difference(engine, case)


@several
@pytest.mark.parametrize("case", ["llama-gqa", "llama-tied", "mixtral", "deepseek_v2"])
@pytest.mark.parametrize("axis", ["dp", "cp"])
def test_the_file_is_read_once(comm, shared_path, case, axis):
    engine = load(comm, shared_path, case, f"{axis}={SIZE}")
    assert engine.shares_weights
    total = comm.allreduce(engine.stats.bytes_read)
    whole = alone(shared_path, case).stats.bytes_read
    assert total == whole


@several
@pytest.mark.parametrize("victim", [1, SIZE - 1])
@pytest.mark.parametrize("case", ["llama-gqa", "llama-tied", "mixtral"])
@pytest.mark.parametrize("axis", ["dp", "cp"])
def test_a_rank_that_cannot_map_reads_alone(comm, shared_path, monkeypatch, case, axis, victim):
    """It answers the same, and so do the others, who share as before."""
    if comm.rank == victim:
        monkeypatch.setattr(node, "map_common", lambda handle, write=False: None)
    engine = load(comm, shared_path, case, f"{axis}={SIZE}")
    assert engine.shares_weights == (comm.rank != victim)
    assert any(map(is_mapped, parameters(engine.model.weights).values())) == engine.shares_weights
    assert not difference(engine, case)
    read = comm.allgather(engine.stats.bytes_read)
    assert read[victim] > engine.stats.file_bytes / (2 if axis == "cp" else 1.5)


def with_another_head(path, rows):
    """A model whose file holds a head beside the embedding that its config ties; `rows` differ."""
    stored = models.as_on_hub("llama-tied", models.weights("llama-tied"))
    models.write_model("llama-tied", path)
    stored["lm_head.weight"][rows] *= -1
    models.write_weights(stored, path, 1)
    return path


@pytest.mark.parametrize("rows", [slice(None), slice(-3, None)], ids=["all", "last"])
@pytest.mark.parametrize("words", ["dp={P}", "cp={P}", "tp={P}", "cp={P},zero=broadcast"])
def test_a_head_beside_a_tied_embedding(comm, shared_path, words, rows):
    """It counts, however little differs, and for ranks that share too: each reads for itself."""
    layout = words.format(P=SIZE)
    if not layouts.is_legal(layout, SIZE):
        pytest.skip("one rank has no pieces")
    path = on_root(comm, partial(with_another_head, shared_path / "model", rows))
    reference = hpcinfer.load(path, MPI.COMM_SELF, kv_memory=1 << 24)
    engine = hpcinfer.load(path, comm, layout, kv_memory=1 << 24)
    text = models.tokens("llama-tied", 33)
    text[-5:] = [1006, 1007, 1008, 0, 1008]
    expected = [score.logprobs for score in reference.score([text])]
    assert score_gap(engine, [text], expected) < 1e-4
    assert greedy(engine, [text], 8) == greedy(reference, [text], 8)


def test_the_walk_finds_every_array():
    """Of an object, in closures, in partial functions and behind views, once each."""
    x, y, z = np.zeros(100), np.zeros(50), np.zeros(25)
    holder = types.SimpleNamespace(a=x[:3], b=[x, {"y": lambda: y}], c=partial(print, z))
    assert resident_bytes(holder) == 800 + 400 + 200
    assert resident_bytes(holder, beside=[holder.b]) == 800 + 200
    assert resident_bytes(ExpertLoad(layouts.architecture("mixtral"))) > 0
