"""What is in a model, results or activations file, as lines for human eyes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from hpcinfer.io import integrity
from hpcinfer.io.atomic import AnyPath
from hpcinfer.io.bounds import bounded_memory
from hpcinfer.io.checkpoint import SCALES, Checkpoint, TensorInfo
from hpcinfer.io.lines import read_lines
from hpcinfer.io.models import METADATA_MEMORY, has_hdf5_signature, open_checkpoint

if TYPE_CHECKING:
    import h5py

# Words for the numbers of a config, each with the names that families give it
CONFIG_NAMES = {
    "family": ("model_type",),
    "layers N": ("num_hidden_layers", "n_layer"),
    "width D": ("hidden_size", "n_embd"),
    "FFN width F": ("intermediate_size", "n_inner"),
    "query heads H": ("num_attention_heads", "n_head"),
    "KV heads G": ("num_key_value_heads",),
    "head width K": ("head_dim",),
    "experts E": ("num_experts", "num_local_experts", "n_routed_experts"),
    "experts per token": ("num_experts_per_tok",),
    "vocabulary V": ("vocab_size",),
    "positions": ("max_position_embeddings", "n_positions"),
    "sliding window": ("sliding_window",),
    "tied embeddings": ("tie_word_embeddings",),
}
KINDS = {"safetensors": "Hugging Face directory", "hdf5": "converted model"}
ROWS_AT_ONCE = 1 << 16


def describe(
    path: AnyPath, check: bool = False, verdict: Callable[[Checkpoint], str] | None = None
) -> str:
    """Description of a Hugging Face directory, a converted model, results or activations.

    Parameters
    ----------
    path : of the directory or file
    check : True to read all weights of a model, or all activations, and to refuse those that are
        not sound
    verdict : what to say of whether a model can run, if anything

    Returns
    -------
    lines without a final line end

    Raises
    ------
    ValueError
        If it is none of these, is damaged, or joins parts that are not there.
    """
    path = os.fspath(path)
    if os.path.isfile(path) and has_hdf5_signature(path):
        from hpcinfer.io import activations, hdf5, results

        describers: dict[str, Callable[[str, h5py.File], list[str]]] = {
            results.FORMAT: _describe_results,
            activations.FORMAT: partial(_describe_activations, check=check),
        }
        with hdf5.open_h5(path) as file:
            try:
                describe_file = describers.get(hdf5.file_format(file))
                if describe_file is not None:
                    with bounded_memory(METADATA_MEMORY):
                        return "\n".join(describe_file(path, file))
            except Exception as error:
                # What is not said here is the library's, which raises errors of many kinds
                reason = " ".join(str(error).split())[:500]
                if isinstance(error, ValueError) and ": got " in reason:
                    raise
                raise ValueError(
                    f"inspect: got damaged results {path} ({reason}); make them again"
                ) from error
    if path.lower().endswith(".jsonl") and os.path.isfile(path):
        return "\n".join(_describe_lines(path))
    checked = _checked(path) if check else None
    with open_checkpoint(path) as model:
        return "\n".join(_describe_model(model, checked, verdict))


def collapse(names: Sequence[str]) -> dict[str, list[str]]:
    """Name patterns of tensors: each number between dots becomes the set of its values.

    Returns
    -------
    pattern -> names, e.g. ``{"layers.{0..1}.w": ["layers.0.w", "layers.1.w"]}``
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "{}", name), []).append(name)
    return {_fill(pattern, members): members for pattern, members in groups.items()}


def size_text(nbytes: int) -> str:
    """`nbytes` in the largest binary unit of which it holds one."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(max(nbytes.bit_length() - 1, 0) // 10, len(units) - 1)
    return f"{nbytes} B" if power == 0 else f"{nbytes / 1024**power:.2f} {units[power]}"


def _checked(path: str) -> str:
    """What reading all weights has shown, if they are sound."""
    found, n_checksums = integrity.check(path)
    if found is not None:
        raise ValueError(found[1].line)
    return f"all weights are finite, {n_checksums} checksums are right"


def _describe_model(
    model: Checkpoint, checked: str | None, verdict: Callable[[Checkpoint], str] | None
) -> list[str]:
    """Lines about an open model; `checked` is what reading all of it has shown."""
    # Count what is stored: bytes of each type, numbers, checksums
    tensors = model.tensors.values()
    by_type: dict[str, int] = {}
    for info in tensors:
        by_type[_type_text(info)] = by_type.get(_type_text(info), 0) + info.nbytes
    is_scales = {info.name + SCALES for info in tensors if info.coding is not None}
    n_values = sum(info.n_values for info in tensors if info.name not in is_scales)
    n_values -= sum(model.tensors[name].n_values for name in _repeated_heads(model))
    n_checked = sum(info.crc32 is not None for info in tensors)

    # Say it with the essentials of the config
    facts = {
        "kind": KINDS[model.kind],
        **_config_facts(model.config),
        **({} if verdict is None else {"runs": verdict(model)}),
        "parameters": f"{n_values:,}",
        "bytes": ", ".join(f"{name} {size_text(n)}" for name, n in by_type.items()),
        "files": len({info.file for info in tensors}),
        "tokenizer": "yes" if model.tokenizer_json is not None else "no",
        "chat template": "yes" if model.chat_template is not None else "no",
        "checksums": f"{n_checked} of {len(tensors)} tensors" if n_checked else "no",
        "identity": model.checksum,
    }
    if is_scales:
        facts["quantised"] = ", ".join(_coding_lines(model.tensors))
    if checked is not None:
        facts["checked"] = checked
    return [model.path, *_fact_lines(facts), *_tensor_lines(model.tensors)]


def _repeated_heads(model: Checkpoint) -> list[str]:
    """Tensors that repeat a tied embedding, with which they are one parameter."""
    words = ("tie_word_embeddings", "untied_by_quantisation")
    if not any(model.config.get(word) for word in words):
        return []
    heads = [name for name in ("lm_head.weight", "embed_out.weight") if name in model.tensors]
    shapes = [_shape(info) for name, info in model.tensors.items() if name not in heads]
    return [name for name in heads if _shape(model.tensors[name]) in shapes]


def _shape(info: TensorInfo) -> tuple[int, ...]:
    """Shape of the numbers that a tensor stands for."""
    return info.shape if info.coding is None else (info.shape[0], info.coding.columns)


def _type_text(info: TensorInfo) -> str:
    """Element type of a tensor, int4 or int8 where its values are codes."""
    return info.dtype.name if info.coding is None else f"int{info.coding.bits}"


def _coding_lines(tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    """Of every coding in use its bits, group, tensors, and the bits of a number with its scale."""
    alike: dict[tuple[int, int], list[TensorInfo]] = {}
    for info in tensors.values():
        if info.coding is not None:
            alike.setdefault((info.coding.bits, info.coding.group), []).append(info)
    for (bits, group), infos in alike.items():
        stored = sum(info.nbytes + tensors[info.name + SCALES].nbytes for info in infos)
        each = 8 * stored / max(1, sum(info.n_values for info in infos))
        yield f"int{bits} in groups of {group}, {len(infos)} tensors, {each:.2f} bits a number"


def _config_facts(config: dict[str, Any]) -> dict[str, Any]:
    """The essentials of a config under one set of words."""
    facts = {}
    for word, names in CONFIG_NAMES.items():
        values = [config[name] for name in names if config.get(name) is not None]
        if values:
            facts[word] = values[0]
    return facts


def _tensor_lines(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Table of the tensors; those that differ only in numbers of their names share a row."""
    alike: dict[tuple[tuple[int, ...], str], list[str]] = {}
    for info in tensors.values():
        alike.setdefault((_shape(info), _type_text(info)), []).append(info.name)

    # Make a row of each pattern of names
    rows = []
    for (shape, dtype), names in alike.items():
        for pattern, members in collapse(names).items():
            nbytes = sum(tensors[name].nbytes for name in members)
            rows.append((pattern, str(list(shape)), dtype, f"{len(members)} x", size_text(nbytes)))
    return [f"  {len(tensors)} tensors", *_table_lines(sorted(rows))]


def _describe_results(path: str, file: h5py.File) -> list[str]:
    """Lines about an open results file."""
    n_failed = _failed(file)
    n_requests = len(file["index"])
    facts: dict[str, Any] = {
        "kind": f"results of {_plain(file.attrs.get('kind'))}",
        "requests": n_requests,
        "finished": n_requests - n_failed,
        "errors": n_failed,
        "tokens": len(file["token_ids"]),
    }
    for name in ("prompt_token_ids", "text"):
        if name in file:
            facts[{"text": "choices", "prompt_token_ids": "prompt tokens"}[name]] = len(file[name])
    facts |= {name: _plain(value) for name, value in file.attrs.items() if name not in facts}

    # Make a row of each dataset
    rows = [
        (name, str(list(data.shape)), data.dtype.name, data.attrs.get("description", ""))
        for name, data in file.items()
    ]
    return [path, *_fact_lines(facts), f"  {len(rows)} datasets", *_table_lines(rows)]


def _describe_lines(path: str) -> list[str]:
    """Lines about results, or requests, in a .jsonl file."""
    counts = {"lines": 0, "with an error": 0, "answers": 0, "scores": 0, "no JSON object": 0}
    for _, line in read_lines(path):
        counts["lines"] += 1
        try:
            item = json.loads(line) if isinstance(line, bytes) else None
        except (ValueError, RecursionError):
            item = None
        if not isinstance(item, dict):
            counts["no JSON object"] += 1
            continue
        counts["with an error"] += item.get("error") is not None
        counts["answers"] += isinstance(item.get("response"), dict)
        counts["scores"] += "sum_logprob" in item

    # Tell results from requests by what they hold
    n_results = counts["with an error"] + counts["answers"] + counts["scores"]
    kind = "results" if n_results else "requests"
    shown = {word: n for word, n in counts.items() if n or word == "lines"}
    return [path, *_fact_lines({"kind": f"{kind} in lines of JSON"} | shown)]


def _describe_activations(path: str, file: h5py.File, check: bool) -> list[str]:
    """Lines about an open file that joins parts, which must all be there."""
    from hpcinfer.io.activations import check_parts, joined_datasets

    check_parts(file, path, check)
    n_failed = _failed(file)
    facts: dict[str, Any] = {
        "kind": "activations",
        "requests": len(file["index"]),
        "finished": len(file["index"]) - n_failed,
        "errors": n_failed,
        "tokens": len(file["token_ids"]),
        "parts": f"{len(file['parts/name'])}, {size_text(int(file['parts/bytes'][:].sum()))}, "
        + ("all there, every checksum as it was written" if check else "all there"),
    }
    facts |= {name: _plain(value) for name, value in file.attrs.items() if name not in facts}

    # Make a row of the layers that differ in nothing else
    alike: dict[tuple[str, ...], list[str]] = {}
    shared: tuple[str, ...]
    for name, data in joined_datasets(file).items():
        labels = ", ".join(dim.label for dim in data.dims)
        shared = (str(list(data.shape)), data.dtype.name, labels, data.attrs.get("description", ""))
        alike.setdefault(shared, []).append(name)
    rows = []
    for shared, names in alike.items():
        for pattern in collapse([name.replace("/", ".") for name in names]):
            rows.append((pattern.replace(".", "/", 1), *shared))
    n_datasets = sum(map(len, alike.values()))
    return [path, *_fact_lines(facts), f"  {n_datasets} datasets", *_table_lines(rows)]


def _failed(file: h5py.File) -> int:
    """Number of requests with an error, counted piece by piece."""
    errors = file["error"].asstr()
    starts = range(0, len(errors), ROWS_AT_ONCE)
    return sum(int((errors[start : start + ROWS_AT_ONCE] != "").sum()) for start in starts)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _fact_lines(facts: Mapping[str, Any]) -> list[str]:
    width = max(map(len, facts))
    return [f"  {word:<{width}}  {value}" for word, value in facts.items()]


def _table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of texts, each column as wide as its widest entry."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "    " + "  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _fill(pattern: str, names: Sequence[str]) -> str:
    """Put the values that the numbers of `names` take into the places of `pattern`."""
    numbers = [re.findall(r"(?<![^.])\d+(?![^.])", name) for name in names]
    for values in zip(*numbers, strict=True):
        ordered = sorted({int(value) for value in values})
        pattern = pattern.replace("{}", _ranges(ordered), 1)
    return pattern


def _ranges(values: Sequence[int]) -> str:
    """Sorted whole numbers as text: 3, or {0..3} or {0..3,5}."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    if len(values) == 1:
        return str(values[0])
    return "{" + ",".join(f"{a}..{b}" if b > a else f"{a}" for a, b in runs) + "}"
