"""transformers as the oracle: weights put into its models, log-probabilities and greedy tokens."""

from __future__ import annotations

import copy
import re
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

NUDGE = 3e-5  # relative change of a router's weights that must not change a choice


def saved_tensors(model: torch.nn.Module) -> list[tuple[str, list[int]]]:
    """Return name and shape of every tensor as `save_pretrained` writes it."""
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        with safe_open(Path(directory) / "model.safetensors", "np") as file:
            return [(name, file.get_slice(name).get_shape()) for name in sorted(file.keys())]


def put_weights(model: torch.nn.Module, weights: dict[str, np.ndarray]) -> torch.nn.Module:
    """Load weights by their saved names; every parameter must be given, of tied ones either."""
    known = model.state_dict()
    state = {}
    for name, array in with_experts_stacked(weights).items():
        inner = name if name in known else name.replace("embed_out.", "lm_head.")
        state[inner] = torch.from_numpy(array)
    if model.config.tie_word_embeddings:
        tied = model.get_output_embeddings().weight
        twins = [name for name, p in model.named_parameters(remove_duplicate=False) if p is tied]
        given = next(state[name] for name in twins if name in state)
        state.update({name: given for name in twins})
    model.load_state_dict(state, strict=True)
    return model


def with_experts_stacked(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Put the experts of a layer into the two tensors that transformers' modules have for them."""
    whole, experts = {}, {}
    for name, array in weights.items():
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name)
        if match:
            prefix = match[1].replace("block_sparse_moe", "mlp")
            experts.setdefault(prefix, {}).setdefault(match[3], {})[int(match[2])] = array
        else:
            whole[name.replace("block_sparse_moe", "mlp")] = array
    for prefix, parts in experts.items():
        gate, up, down = (
            np.stack([array for _, array in sorted((parts.get(a) or parts[b]).items())])
            for a, b in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
        )
        whole[f"{prefix}.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        whole[f"{prefix}.down_proj"] = down
    return whole


@torch.no_grad()
def choices(model: torch.nn.Module, ids: list[int]) -> list[np.ndarray]:
    """Return the experts that each router chooses, (T, k) ascending; [] for a dense model."""
    model, chosen = fresh(model), []
    for name, module in model.named_modules():
        if name.endswith(".gate"):
            module.register_forward_hook(lambda *call: chosen.append(call[-1][-1].sort(-1)[0]))
    model(torch.tensor([ids]))
    return [x.numpy() for x in chosen]


def same_experts(a: torch.nn.Module, b: torch.nn.Module, ids: list[int]) -> bool:
    """Return whether two models choose the same experts for every token of a text."""
    return all(map(np.array_equal, choices(a, ids), choices(b, ids)))


def nudged(model: torch.nn.Module) -> torch.nn.Module:
    """Return a copy whose routers are off by NUDGE, relative to each weight."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".gate.weight"):
                p.mul_(1 + NUDGE * torch.randn(p.shape, generator=generator))
    return model


def fresh(model: torch.nn.Module) -> torch.nn.Module:
    """Return a copy for one text: dynamic rope keeps the longest text that a model has seen."""
    return copy.deepcopy(model)


@torch.no_grad()
def logprobs(model: torch.nn.Module, ids: list[int]) -> np.ndarray:
    """Return the (T,) log-probabilities of the tokens given those before; the first is NaN."""
    logits = fresh(model)(torch.tensor([ids])).logits[0].double()
    chosen = torch.log_softmax(logits[:-1], -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return np.concatenate([[np.nan], chosen.numpy()]).astype(np.float32)


@torch.no_grad()
def greedy(model: torch.nn.Module, ids: list[int], count: int) -> tuple[list[int], float]:
    """Return `count` greedy tokens, decoded with a cache, and the least margin of the best one."""
    model = fresh(model)
    out = model(torch.tensor([ids]), use_cache=True)
    chosen, margin = [], np.inf
    while True:
        best = out.logits[0, -1].topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        chosen.append(int(best.indices[0]))
        if len(chosen) == count:
            return chosen, margin
        last = torch.tensor([chosen[-1:]])
        out = model(last, past_key_values=out.past_key_values, use_cache=True)
