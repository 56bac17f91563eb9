"""A checkpoint's tensors beside the table of weights: missing, unknown, of another shape."""

from __future__ import annotations

import re

import numpy as np

from hpcinfer import array
from hpcinfer.io.checkpoint import SCALES
from hpcinfer.model.architecture import Architecture
from hpcinfer.model.weights.table import QUANTISED, by_target, find, table
from hpcinfer.ops import quantize

# Tensors that checkpoints carry and inference does not read: masks and tables that are computed
# here.
_IGNORED = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias|attention\.bias|attention\.masked_bias)$"
)


def check(arch: Architecture, tensors: dict) -> dict[str, str]:
    """Compare the table with what a checkpoint holds, before anything is allocated.

    Parameters
    ----------
    tensors : dict name -> object with `shape` and `dtype`

    Returns
    -------
    dict from a table's name to the checkpoint's (which may lack the family's prefix)

    Raises
    ------
    ValueError
        For a missing tensor, a shape other than the config's, a type that is no floating type, or a
        tensor that this family does not know.
    """
    _check_experts(arch, tensors)
    rows = table(arch)
    names = _found(arch, rows, tensors)

    # Hold each tensor, and those of one parameter together, to what the table says.
    for row in rows:
        _check_tensor(row, tensors[names[row.name]])
    head = tensors.get(find(arch.names["head"], tensors))
    if arch.tied and coding_of(head) is not None:
        raise ValueError(
            "weights: got a quantised head, need a config that does not tie it to the embedding; "
            "convert the model again"
        )
    for of_parameter in by_target(rows):
        _check_alike([(names[row.name], tensors[names[row.name]]) for row in of_parameter])
    _refuse_unknown(arch, tensors, {*names.values(), find(arch.names["head"], tensors)})
    return names


def _found(arch, rows, tensors):
    """dict from a table's name to the checkpoint's, which has each; a tied head may be the only."""
    names = {row.name: find(row.name, tensors) for row in rows}
    missing = [row.name for row in rows if names[row.name] is None]
    if missing == [arch.names["embed"]] and find(arch.names["head"], tensors):
        return names | {arch.names["embed"]: find(arch.names["head"], tensors)}
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"weights: got no tensor {missing[0]}{more}, which the config's {arch.family} of "
            f"{arch.N} layers needs; check that the checkpoint is complete"
        )
    return names


def _refuse_unknown(arch, tensors, known):
    """Refuse tensors that are neither known nor scales of such, nor left unread on purpose."""
    scales = {name + SCALES for name in known if name in tensors and coding_of(tensors[name])}
    unknown = sorted(
        name
        for name in set(tensors) - known - scales
        if not _IGNORED.search(name) and not _behind(arch, name)
    )
    if unknown:
        raise ValueError(
            f"weights: got {len(unknown)} tensors that {arch.family} does not have, such as "
            f"{unknown[0]}; check model_type in config.json"
        )


def _check_tensor(row, info):
    """Refuse a tensor of another shape or type than a row of the table says."""
    # Hold its shape to the config's, then its type to those that are known, or its coding.
    shape, coding = tuple(info.shape), coding_of(info)
    if coding is not None:
        shape = (shape[0], coding.columns)[:: -1 if row.transposed else 1]
    if shape != row.shape:
        raise ValueError(
            f"weights: got {row.name} of shape {shape}, need {row.shape} as the config says"
        )
    if coding is None and np.dtype(info.dtype) not in array.DTYPES.values():
        raise ValueError(
            f"weights: got {row.name} of type {info.dtype}, need float32, float16 or bfloat16"
        )
    if coding is not None and row.key not in QUANTISED:
        raise ValueError(
            f"weights: got {row.name} quantised, need float32, float16 or bfloat16 there"
        )
    if coding is not None and coding.group not in quantize.GROUPS:
        raise ValueError(
            f"weights: got {row.name} in groups of {coding.group}, need one of "
            f"{', '.join(map(str, quantize.GROUPS))}"
        )


def _check_alike(infos):
    """Refuse tensors of one parameter of which only some are quantised, or in another way."""
    kinds = {c and (c.bits, c.group): name for name, info in infos for c in [coding_of(info)]}
    if len(kinds) > 1:
        raise ValueError(
            f"weights: got {' and '.join(list(kinds.values())[:2])} quantised in different ways, "
            "need one, as they are multiplied together; convert the model again"
        )


def coding_of(info):
    """Coding of a tensor of a checkpoint, None if it is not quantised."""
    return getattr(info, "coding", None)


def _check_experts(arch, tensors):
    """Refuse a config with more experts than tensors, before they are listed one by one."""
    n_experts = arch.E * sum(arch.sparse)
    if n_experts > len(tensors):
        raise ValueError(
            f"weights: got {len(tensors)} tensors, need those of {n_experts} experts as the config "
            "says; check that the checkpoint is complete and stores each expert by itself"
        )


def _behind(arch, name):
    """True for a tensor of a layer behind the last, as some checkpoints hold for training."""
    number = re.search(r"(?:^|\.)layers\.(\d{1,9})\.", name) if arch.unread_layers else None
    return number is not None and 0 <= int(number[1]) - arch.N < arch.unread_layers
