"""The table of weights: shards put together are the whole, read once, and nothing else fits."""

import copy
import math
import time
import tracemalloc
import warnings
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.speed import scaled
from reference import models

from hpcinfer import partition
from hpcinfer.array import BFLOAT16, Device
from hpcinfer.io.models import open_checkpoint
from hpcinfer.model.families import read_architecture
from hpcinfer.model.weights import table as table_
from hpcinfer.model.weights.check import check
from hpcinfer.model.weights.load import load
from hpcinfer.model.weights.table import owned
from hpcinfer.ops.rope import frequencies

pytestmark = pytest.mark.single

CASES = ("gpt2", "gpt2-untied", "gpt_neox", "gpt_neox-tied", "llama-gqa", "llama-bias", "qwen3")
SPARSE = (
    "mixtral",
    "qwen2_moe-step",
    "olmoe",
    "deepseek_v2",
    "deepseek_v2-lite",
    "deepseek_v3-plain",
)
CPU = Device("cpu")
stored_weights = cache(models.weights)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Function case -> its Hugging Face directory, written once."""
    folder = tmp_path_factory.mktemp("models")

    def write(case, dtype="float32"):
        path = folder / f"{case}-{dtype}"
        return path if path.exists() else models.write_model(case, path, dtype=dtype)

    return write


def architecture(case, **changes):
    return read_architecture(models.CASES[case] | changes)


def shards(path, arch, P, dtype=np.float32, cp=1):
    """Weights of every rank of tp, each with its parts of cp, and the bytes that all read."""
    loaded, n_bytes = [], 0
    for rank in range(P):
        loaded.append([])
        for part in range(cp):
            ranges = owned(arch, P, rank, cp, part)
            with open_checkpoint(path) as checkpoint:
                shard = load(arch, checkpoint, ranges, np.dtype(dtype), CPU, cp)
                loaded[-1].append(shard)
                n_bytes += checkpoint.bytes_read
    return loaded, n_bytes


def projections(case, arch, n):
    """Queries, keys, values (heads, K, ...) and the FFN of layer n, read off the file's layout.

    Returns
    -------
    dict key -> array: q, k, v and their biases by heads; o (D, H, K); gate, up (F, D); down (D, F)
    """
    D, H, K = arch.D, arch.H, arch.K
    prefix = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}.get(arch.family)
    stored = stored_weights(case)
    at = {
        name.removeprefix(f"{prefix or 'model.layers'}.{n}."): x
        for name, x in stored.items()
        if f"layers.{n}." in name or f"h.{n}." in name
    }
    if arch.family == "gpt2":
        q, k, v = np.split(at["attn.c_attn.weight"].T.reshape(3 * H, K, D), 3)
        biases = np.split(at["attn.c_attn.bias"].reshape(3 * H, K), 3)
        o, up, down = (at[f"{name}.weight"].T for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"))
        rest = [at[f"{name}.bias"] for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    elif arch.family == "gpt_neox":
        fused = at["attention.query_key_value.weight"].reshape(H, 3, K, D)
        q, k, v = fused[:, 0], fused[:, 1], fused[:, 2]
        biases = at.get("attention.query_key_value.bias")
        biases = None if biases is None else list(biases.reshape(H, 3, K).swapaxes(0, 1))
        names = ("attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
        o, up, down = (at[f"{name}.weight"] for name in names)
        rest = [at.get(f"{name}.bias") for name in names]
    else:
        q, k, v = (at[f"self_attn.{x}_proj.weight"].reshape(-1, K, D) for x in "qkv")
        biases = [at.get(f"self_attn.{x}_proj.bias") for x in "qkv"]
        biases = None if biases[0] is None else [b.reshape(-1, K) for b in biases]
        o = at["self_attn.o_proj.weight"]
        up = (at["mlp.gate_proj.weight"], at["mlp.up_proj.weight"])
        down = at["mlp.down_proj.weight"]
        rest = [at.get("self_attn.o_proj.bias"), None, at.get("mlp.down_proj.bias")]
        if arch.ffn_bias:
            rest[1] = (at["mlp.gate_proj.bias"], at["mlp.up_proj.bias"])
    return {
        "qkv": (q, k, v),
        "qkv_bias": biases,
        "o": o.reshape(D, H, K),
        "up": up,
        "down": down,
    } | {
        "o_bias": rest[0],
        "up_bias": rest[1],
        "down_bias": rest[2],
    }


def part_of(whole, heads, ffn, K, cp):
    """What one rank must hold of a layer's projections."""
    blocks = [(ffn[0] + a, ffn[0] + b) for a, b in partition.block(ffn[1] - ffn[0], cp)]

    def by_heads(parts):
        spans = (heads.query, heads.kv, heads.kv)
        return np.concatenate(
            [
                x[a:b].reshape((b - a) * K, *x.shape[2:])
                for (a, b), x in zip(spans, parts, strict=True)
            ]
        )

    def by_columns(parts):
        parts = parts if isinstance(parts, tuple) else (parts,)
        return np.concatenate([x[a:b] for a, b in blocks for x in parts])

    D = len(whole["o"])
    own = {
        "qkv": by_heads(whole["qkv"]),
        "o": whole["o"][:, slice(*heads.query)].reshape(D, -1),
        "up": by_columns(whole["up"]),
        "down": whole["down"][:, slice(*ffn)],
        "o_bias": whole["o_bias"],
        "down_bias": whole["down_bias"],
    }
    own["qkv_bias"] = None if whole["qkv_bias"] is None else by_heads(whole["qkv_bias"])
    own["up_bias"] = None if whole["up_bias"] is None else by_columns(whole["up_bias"])
    return own


@pytest.mark.parametrize("cp", [1, 2])
@pytest.mark.parametrize("P", [1, 2, 3, 5])
@pytest.mark.parametrize("case", CASES)
def test_shards_put_together_are_the_whole(written, case, P, cp):
    """Every rank holds its heads, FFN columns and vocabulary, and whole norms and row biases.

    With parts of cp, its FFN columns stand part by part, and each part has its share of the head.
    """
    arch = architecture(case)
    loaded, _ = shards(written(case), arch, P, cp=cp)
    stored = stored_weights(case)
    heads, ffn = partition.heads(arch.H, arch.G, P), partition.block(arch.F, P)
    for n in range(arch.N):
        whole = projections(case, arch, n)
        for rank, shard in [(r, shard) for r in range(P) for shard in loaded[r]]:
            for key, expected in part_of(whole, heads[rank], ffn[rank], arch.K, cp).items():
                mine = getattr(shard.layers[n], key)
                assert (mine is None) == (expected is None), key
                if expected is not None:
                    np.testing.assert_array_equal(mine, expected, err_msg=key)

    # Embedding in order of tp, head in order of tp and cp; norms on each
    everywhere = [shard for parts in loaded for shard in parts]
    embed = np.concatenate([parts[-1].embed for parts in loaded])
    np.testing.assert_array_equal(embed, stored[arch.names["embed"]])
    head = np.concatenate([shard.head for shard in everywhere])
    np.testing.assert_array_equal(head, stored[arch.names["embed" if arch.tied else "head"]])
    for shard in everywhere:
        np.testing.assert_array_equal(shard.final_norm, stored[arch.names["final_norm"]])
        assert np.shares_memory(shard.head, shard.embed) == arch.tied
        if arch.learned_positions:
            np.testing.assert_array_equal(shard.positions, stored[arch.names["positions"]])


def ffn_of(at, names, blocks):
    """Own columns of a gated FFN in the file's tensors: up in blocks of gate and up, and down."""
    gate, up, down = (at[name] for name in names)
    own_up = [x[a:b] for a, b in blocks for x in (gate, up)]
    return np.concatenate(own_up), down[:, blocks[0][0] : blocks[-1][1]]


def mixture_of(arch, n, stored, ranges, cp):
    """What a rank must hold of a layer's experts, read off the file's names."""
    at = {name.partition(f"layers.{n}.")[2].partition(".")[2]: x for name, x in stored.items()}
    gate, up, down = ("w1", "w3", "w2") if arch.family == "mixtral" else ("gate", "up", "down")
    end = "" if arch.family == "mixtral" else "_proj"

    def blocks(cut):
        first, last = ranges[cut]
        return [(first + a, first + b) for a, b in partition.block(last - first, cp)]

    def names(part):
        return [f"{part}.{x}{end}.weight" for x in (gate, up, down)]

    both = [ffn_of(at, names(f"experts.{e}"), blocks("moe")) for e in range(*ranges["experts"])]
    own = {
        "router": at["gate.weight"],
        "router_bias": at.get("gate.e_score_correction_bias"),
        "experts_up": np.stack([up for up, _ in both]),
        "experts_down": np.stack([down for _, down in both]),
        "shared_gate": at.get("shared_expert_gate.weight"),
    }
    if arch.shared_F:
        part = "shared_expert" if arch.shared_gate else "shared_experts"
        own["shared_up"], own["shared_down"] = ffn_of(at, names(part), blocks("shared"))
    return own


@pytest.mark.parametrize("cp", [1, 2])
@pytest.mark.parametrize("P", [1, 3, 5])
@pytest.mark.parametrize("case", SPARSE)
def test_every_rank_holds_its_columns_of_every_expert(written, case, P, cp):
    """The router whole, experts and shared experts by columns; dense layers have none of it."""
    arch, stored = architecture(case), stored_weights(case)
    loaded, _ = shards(written(case), arch, P, cp=cp)
    for n in range(arch.N):
        for rank, shard in [(r, shard) for r in range(P) for shard in loaded[r]]:
            layer, ranges = shard.layers[n], owned(arch, P, rank, cp)
            assert (layer.up is None) == arch.sparse[n] == (layer.router is not None)
            if arch.sparse[n]:
                for key, expected in mixture_of(arch, n, stored, ranges, cp).items():
                    mine = getattr(layer, key)
                    assert (mine is None) == (expected is None), key
                    if expected is not None:
                        np.testing.assert_array_equal(mine, expected, err_msg=key)


@pytest.mark.parametrize("experts", [(2, 5), (0, 1), (4, 4)])
def test_experts_may_be_owned_whole(written, experts):
    """A caller that divides the experts themselves reads those, and all their columns."""
    arch, path, cp = architecture("mixtral"), written("mixtral"), 2
    usual = owned(arch, 3, 1, cp)
    ranges = usual | {"experts": experts, "moe": (0, arch.moe_F)}
    with open_checkpoint(path) as checkpoint:
        before = checkpoint.bytes_read
        shard = load(arch, checkpoint, ranges, np.dtype(np.float32), CPU, cp)
        read = checkpoint.bytes_read - before
        whole = load(arch, checkpoint, usual, np.dtype(np.float32), CPU, cp)
        rest = checkpoint.bytes_read - before - read
    for layer, other in zip(shard.layers, whole.layers, strict=True):
        assert layer.experts_up.shape == (experts[1] - experts[0], 2 * arch.moe_F, arch.D)
        assert layer.experts_down.shape == (experts[1] - experts[0], arch.D, arch.moe_F)
        np.testing.assert_array_equal(layer.router, other.router)
    for n in range(arch.N) if experts[0] < experts[1] else ():
        own = mixture_of(arch, n, stored_weights("mixtral"), ranges, cp)
        np.testing.assert_array_equal(shard.layers[n].experts_up, own["experts_up"])
        np.testing.assert_array_equal(shard.layers[n].experts_down, own["experts_down"])

    # Beside the experts both read the same.
    first, last = usual["moe"]
    column = 3 * arch.D * 4 * arch.N
    n_own = (experts[1] - experts[0]) * arch.moe_F
    assert read - n_own * column == rest - arch.E * (last - first) * column


@pytest.mark.parametrize("P", [1, 2, 3, 7])
@pytest.mark.parametrize("case", ["deepseek_v2", "deepseek_v2-lite", "deepseek_v3-plain"])
def test_latent_attention_is_cut_by_query_heads(written, case, P):
    """Latents whole on every rank; queries, keys and values of a latent by heads."""
    arch, stored, mla = architecture(case), stored_weights(case), architecture(case).mla
    loaded, _ = shards(written(case), arch, P)
    for n in range(arch.N):
        at = {name.partition("self_attn.")[2]: x for name, x in stored.items() if f"s.{n}." in name}
        latents = [at["kv_a_proj_with_mqa.weight"]]
        if mla.q_rank:
            latents.insert(0, at["q_a_proj.weight"])
        q = at["q_b_proj.weight" if mla.q_rank else "q_proj.weight"]
        for rank, heads in enumerate(partition.heads(arch.H, arch.G, P)):
            [shard] = loaded[rank]
            layer, (first, last) = shard.layers[n], heads.query
            np.testing.assert_array_equal(layer.latents, np.concatenate(latents))
            assert (layer.latents_bias is not None) == mla.bias
            np.testing.assert_array_equal(layer.kv_norm, at["kv_a_layernorm.weight"])
            for mine, whole in ((layer.q, q), (layer.kv, at["kv_b_proj.weight"])):
                by_head = whole.reshape(arch.H, -1, whole.shape[1])[first:last]
                np.testing.assert_array_equal(mine, by_head.reshape(mine.shape))
            o = at["o_proj.weight"].reshape(arch.D, arch.H, mla.value)[:, first:last]
            np.testing.assert_array_equal(layer.o, o.reshape(layer.o.shape))


def used_bytes(arch, path):
    """Bytes of the tensors that the model reads, and of those that no cut divides."""
    with open_checkpoint(path) as checkpoint:
        names = check(arch, checkpoint.tensors)
        size = {row.name: checkpoint.tensors[names[row.name]].nbytes for row in table_.table(arch)}
    whole = {row.name for row in table_.table(arch) if row.cut is None}
    return sum(size.values()), sum(size[name] for name in whole), size


@pytest.mark.parametrize(("P", "cp"), [(1, 1), (2, 1), (3, 1), (5, 1), (9, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("case", CASES + SPARSE)
def test_each_rank_reads_its_shard_and_no_more(written, case, P, cp):
    """The ranks' sum is the file, and what is replicated by design: what no cut divides on every
    rank, key/value heads that serve two ranks, and all but the head on every part of cp."""
    arch, path = architecture(case), written(case)
    used, whole, size = used_bytes(arch, path)
    copies = sum(h.n_kv for h in partition.heads(arch.H, arch.G, P)) - arch.G
    rows = [row for row in table_.table(arch) if row.cut == "kv"]
    per_head = sum(4 * arch.K * math.prod(row.shape) // row.shape[row.axis] for row in rows)
    head = 0 if arch.tied else size[arch.names["head"]]
    _, read = shards(path, arch, P, cp=cp)
    assert read == head + cp * (used - head + (P - 1) * whole + copies * per_head)


def test_a_head_stored_beside_its_embedding_is_read_and_shared(written):
    """Files of tied models may hold both; equal ones take memory once."""
    arch, path = architecture("llama-tied"), written("llama-tied")
    loaded, read = shards(path, arch, 3)
    assert all(np.shares_memory(shard.head, shard.embed) for (shard,) in loaded)
    used, whole, _ = used_bytes(arch, path)
    assert read == used + 2 * whole + arch.V * arch.D * 4


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
@pytest.mark.parametrize("case", ["gpt2", "llama-bias", "qwen3", "qwen2_moe-step", "deepseek_v3"])
def test_matrices_take_the_type_and_vectors_are_float32(written, case, dtype):
    """Routers and the gate of shared experts are float32 too."""
    arch = architecture(case)
    for (shard,) in shards(written(case, "bfloat16"), arch, 3, dtype)[0]:
        arrays = [(key, x) for y in (shard, *shard.layers) for key, x in vars(y).items()]
        arrays = [(key, x) for key, x in arrays if isinstance(x, np.ndarray)]
        for key, x in arrays:
            full = x.ndim == 1 or key in ("router", "shared_gate")
            assert x.dtype == (np.float32 if full else dtype), key


def test_bfloat16_keeps_its_bits(written):
    arch, path = architecture("llama-gqa"), written("llama-gqa", "bfloat16")
    [[shard]], _ = shards(path, arch, 1, BFLOAT16)
    with open_checkpoint(path) as checkpoint:
        stored = checkpoint.read("model.layers.1.self_attn.o_proj.weight")
    np.testing.assert_array_equal(shard.layers[1].o.view(np.uint16), stored.view(np.uint16))


# --- Refusals ------------------------------------------------------------------------------------


def infos(case):
    """What a checkpoint of this case says of its tensors."""
    return {
        name: SimpleNamespace(shape=tuple(x.shape), dtype=x.dtype)
        for name, x in stored_weights(case).items()
    }


def refusal(function, *arguments):
    """The one line of a ValueError, raised soon and without memory."""
    tracemalloc.start()
    start_s = time.perf_counter()
    with pytest.raises(ValueError) as raised:
        function(*arguments)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20
    assert time.perf_counter() - start_s < scaled(5)
    message = str(raised.value)
    assert "\n" not in message and len(message) < 500
    return message


def test_a_missing_tensor_is_named():
    tensors = infos("llama-gqa")
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    message = refusal(check, architecture("llama-gqa"), tensors)
    assert "got no tensor model.layers.1.mlp.up_proj.weight and 1 more" in message


def test_a_shape_other_than_the_configs_is_named():
    tensors = infos("gpt2")
    tensors["transformer.h.0.mlp.c_fc.weight"].shape = (171, 100)
    message = refusal(check, architecture("gpt2"), tensors)
    assert "got transformer.h.0.mlp.c_fc.weight of shape (171, 100), need (100, 171)" in message


def test_tensors_that_the_family_does_not_have_are_named():
    tensors = infos("llama-gqa") | infos("gpt_neox")
    message = refusal(check, architecture("llama-gqa"), tensors)
    assert "tensors that llama does not have, such as embed_out.weight" in message


def test_a_missing_expert_is_named_and_too_many_are_counted():
    tensors = infos("mixtral")
    del tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    message = refusal(check, architecture("mixtral"), tensors)
    assert "got no tensor model.layers.1.block_sparse_moe.experts.3.w2.weight, which" in message
    message = refusal(check, architecture("mixtral", num_local_experts=60), tensors)
    assert "need those of 120 experts" in message


def test_layers_for_further_tokens_are_not_read():
    """Where the config counts them; others are unknown tensors."""
    tensors = infos("deepseek_v3")
    extra = SimpleNamespace(shape=(75, 75), dtype=np.dtype(np.float32))
    tensors["model.layers.3.eh_proj.weight"] = extra
    check(architecture("deepseek_v3"), tensors)
    tensors["model.layers.4.eh_proj.weight"] = extra
    message = refusal(check, architecture("deepseek_v3"), tensors)
    assert "got 1 tensors that deepseek_v3 does not have, such as model.layers.4." in message


def test_a_table_of_many_experts_is_made_and_checked_soon():
    """61 layers of 256 experts: 45 000 tensors."""
    changes = {"num_hidden_layers": 61, "n_routed_experts": 256, "n_group": 8, "topk_group": 4}
    arch = architecture("deepseek_v3", **changes)
    start_s = time.perf_counter()
    rows = table_.table(arch)
    dtype = np.dtype(np.float32)
    check(arch, {row.name: SimpleNamespace(shape=row.shape, dtype=dtype) for row in rows})
    assert len(rows) > 45_000
    assert time.perf_counter() - start_s < scaled(5)


@pytest.mark.parametrize(
    ("case", "changes", "line"),
    [
        ("mixtral", {"num_experts_per_tok": 6}, "got num_experts_per_tok=6, need at most 5"),
        ("deepseek_v3", {"num_experts_per_tok": 7}, "got num_experts_per_tok=7, need at most 6"),
        ("deepseek_v3", {"n_group": 2}, "got n_group=2, need a divisor of 9 experts"),
        ("deepseek_v3", {"topk_group": 4}, "got topk_group=4, need at most 3 groups"),
        ("deepseek_v3", {"n_group": 9}, "got 9 experts in 9 groups, need 2 in each"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "got scoring_func='softmax', need 'sigmoid'"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "got topk_method='noaux_tc', need greedy or"),
        ("deepseek_v2", {"norm_topk_prob": True}, "got norm_topk_prob=True, need False"),
        ("deepseek_v2", {"mlp_bias": True}, "got mlp_bias=True, need False"),
        ("deepseek_v2", {"moe_layer_freq": 2}, "got moe_layer_freq=2, need 1"),
        ("deepseek_v2", {"num_key_value_heads": 1}, "got num_key_value_heads=1, need 5"),
        ("qwen3_moe", {"mlp_only_layers": "1"}, "got mlp_only_layers='1', need a list"),
        ("olmoe", {"head_dim": 16}, "got width 80, 10 heads and head_dim=16"),
    ],
)
def test_what_a_config_may_not_say_of_experts_is_named(case, changes, line):
    assert line in refusal(lambda: architecture(case, **changes))


@pytest.mark.parametrize("dtype", [np.int8, np.float64, np.bool_])
def test_a_type_that_is_no_weight_is_named(dtype):
    tensors = infos("qwen3")
    tensors["model.embed_tokens.weight"].dtype = np.dtype(dtype)
    message = refusal(check, architecture("qwen3"), tensors)
    assert f"of type {np.dtype(dtype)}, need float32, float16 or bfloat16" in message


@pytest.mark.parametrize("family", ["bert", "", None, ["llama"], "../llama"])
def test_an_unknown_family_is_named(family):
    message = refusal(read_architecture, {"model_type": family})
    assert f"config: got model_type {family!r}, need one of deepseek_v2, " in message


def test_quantised_weights_are_refused():
    config = models.CASES["llama-gqa"] | {"quantization_config": {"bits": 4}}
    assert "quantised weights" in refusal(read_architecture, config)


def load_as(case, **changes):
    """Compare a changed config with the true tensors of a case, as a load does first."""
    arch = read_architecture(models.CASES[case] | changes)
    check(arch, infos(case))


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("llama-gqa", "num_hidden_layers"),
        ("qwen2", "num_hidden_layers"),
        ("gpt2", "n_layer"),
        ("gpt_neox", "num_hidden_layers"),
        ("llama-gqa", "hidden_size"),
        ("llama-gqa", "intermediate_size"),
        ("llama-gqa", "vocab_size"),
        ("llama-gqa", "num_attention_heads"),
        ("llama-gqa", "head_dim"),
        ("gpt2", "n_embd"),
        ("gpt2", "n_head"),
        ("gpt2", "n_positions"),
        ("gpt_neox", "hidden_size"),
        ("mixtral", "num_local_experts"),
        ("mixtral", "num_hidden_layers"),
        ("qwen2_moe", "shared_expert_intermediate_size"),
        ("qwen3_moe", "moe_intermediate_size"),
        ("deepseek_v3", "n_routed_experts"),
        ("deepseek_v3", "kv_lora_rank"),
    ],
)
@pytest.mark.parametrize("value", [10**6, 2**31 - 2])
def test_a_config_that_claims_a_giant_is_refused_at_once(case, name, value):
    """Before anything of that size is made: a million layers, or a width of 2³¹."""
    message = refusal(lambda: load_as(case, **{name: value}))
    assert message.startswith(("config: got", "weights: got"))


def places(config, path=()):
    """Every key of a config and of the objects in it."""
    for name, value in config.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from places(value, (*path, name))


ODD = [
    None, True, 0, -1, 1, 2, 3, 1.5, -0.5, 0.0, 1e308, float("inf"), float("nan"), 2**31 - 1,
    2**31, 10**400, "", "8", [], [1], ["a"], [0.0] * 8, [float("inf")] * 12, {}, {"a": 1},
]  # fmt: skip


@pytest.mark.parametrize("case", models.CASES)
def test_whatever_a_config_holds_it_is_refused_in_one_line_or_works(case):
    """Every value of every config replaced by odd ones; those accepted give finite angles."""
    for path in places(models.CASES[case]):
        for value in ODD:
            config = copy.deepcopy(models.CASES[case])
            target = config
            for name in path[:-1]:
                target = target[name]
            target[path[-1]] = value
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    arch = read_architecture(config)
                    if arch.rope is not None and arch.rope.dim < 1000:
                        for length in (3, 100_000):
                            table = frequencies(arch.rope, arch.rope.length_class(length))
                            assert np.isfinite(table).all()
            except ValueError as error:
                assert str(error).startswith(("config: got", "dtype: got", "activation: got"))
            except Exception as error:
                pytest.fail(f"{path} = {value!r}: {error!r}")
