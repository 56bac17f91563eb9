"""The loading of a shard: each rank reads the part of every tensor that it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain, groupby
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from hpcinfer import array, node
from hpcinfer.array import Device
from hpcinfer.heartbeat import here
from hpcinfer.io.checkpoint import SCALES
from hpcinfer.model.architecture import Architecture
from hpcinfer.model.weights.check import check, coding_of
from hpcinfer.model.weights.parameters import Layer, Weights, tied_rows
from hpcinfer.model.weights.table import by_target, find, in_parts, table, vocabulary_row
from hpcinfer.ops import quantize
from hpcinfer.ops.quantize import LANES, QuantFormat, Quantized, form_of, from_arrays, to_arrays

_FULL = ("router", "shared_gate")


def load(
    arch: Architecture,
    checkpoint: Any,
    ranges: dict[str, tuple],
    dtype: DTypeLike,
    device: Device,
    cp: int = 1,
    keep: Callable | None = None,
    keep_layer: Callable | None = None,
) -> Weights:
    """Read this rank's shard, and nothing else, from a checkpoint.

    Matrices take `dtype`, or stay quantised if they are in the checkpoint; vectors (norms, biases)
    are kept in float32.

    Parameters
    ----------
    ranges : dict cut -> (start, stop), as `owned` returns it; its parts of cp follow from the rest
    cp : ranks of cp
    keep : function of a TensorSpec, True if this rank has it; None for all
    keep_layer : function (n, Layer) -> what is kept of a layer, called when it has been read; None
        to keep all

    Returns
    -------
    Weights, whose layers are what `keep_layer` returned
    """
    names, ranges = check(arch, checkpoint.tensors), in_parts(ranges, cp)
    weights = Weights(layers=[Layer() for _ in range(arch.N)])
    rows = [row for row in table(arch, cp) if keep is None or keep(row)]

    # Read layer by layer, parameter by parameter, and keep what is asked for.
    for layer, of_layer in groupby(rows, key=lambda row: row.layer):
        here.layer, target = layer, weights if layer is None else weights.layers[layer]
        for of_parameter in by_target(of_layer):
            read = _read if of_parameter[0].expert is None else _read_experts
            parameter = read(of_parameter, names, checkpoint, ranges, dtype)
            setattr(target, of_parameter[0].key, _put(device, parameter))
        if layer is not None and keep_layer is not None:
            weights.layers[layer] = keep_layer(layer, target)

    # Take the head from the embedding where the config ties them.
    head = vocabulary_row(arch, "head")
    if arch.tied and (keep is None or keep(head)) and weights.embed is not None:
        _tie_head(arch, checkpoint, ranges, weights, dtype, device)
    return weights


def _read(rows, names, checkpoint, ranges, dtype):
    """One parameter of this rank, from the rows of the table that make it up."""
    shape = _stacked(rows, ranges)
    full = len(shape) == 1 or rows[0].key in _FULL
    coding = coding_of(checkpoint.tensors[names[rows[0].name]])
    parameter = _empty(shape, np.float32 if full else dtype, coding, _first_input(rows[0], ranges))
    _read_into(parameter, rows, names, checkpoint, ranges)
    return parameter


def _read_experts(rows, names, checkpoint, ranges, dtype):
    """One parameter of all experts of this rank: as `_read`, the experts along a new first axis."""
    first, last = ranges["experts"]
    of_expert = {}
    for row in rows:
        of_expert.setdefault(row.expert, []).append(row)
    row = rows[0]
    coding = coding_of(checkpoint.tensors[names[row.name]])
    shape = (last - first, *_stacked(of_expert[row.expert], ranges))
    parameter = _empty(shape, dtype, coding, _first_input(row, ranges))
    for e in range(first, last):
        _read_into(parameter[e - first], of_expert[e], names, checkpoint, ranges)
    return parameter


def _empty(shape, dtype, coding, first):
    """Room for a parameter, quantised if there is a coding, whose inputs begin with `first`."""
    if coding is None:
        return node.large_empty(shape, dtype)
    form = QuantFormat(coding.bits, coding.group, shape[-1], first % coding.group, np.dtype(dtype))
    words = node.large_empty((*shape[:-1], form.blocks * LANES), np.uint16)
    return Quantized(form, words, np.zeros((*shape[:-1], form.groups), np.float16))


def _first_input(row, ranges):
    """Number of the first input of a matrix that this rank owns."""
    pieces = row.pieces(ranges) if _cuts_inputs(row) else None
    return pieces[0][0] if pieces else 0


def _cuts_inputs(row):
    """True for a matrix whose inputs are cut, False where outputs are, or nothing."""
    return row.cut is not None and len(row.shape) == 2 and row.axis != int(row.transposed)


def _put(device, parameter):
    """A parameter in the device's memory."""
    return from_arrays(form_of(parameter), [device.put(x) for x in to_arrays(parameter)])


def _stacked(rows, ranges):
    """Shape of the own parts of some rows of the table, laid one after the other."""
    shapes = [row.local_shape(ranges) for row in rows]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _read_into(parameter, rows, names, checkpoint, ranges):
    """Read the own parts of some rows of the table, one after the other, into a parameter."""
    start = 0
    for row in rows:
        shape = row.local_shape(ranges)
        part = parameter[start : start + shape[0]]
        start += shape[0]
        pieces = None if row.cut is None else row.pieces(ranges)
        if 0 in part.shape:
            continue
        if isinstance(part, Quantized):
            _read_codes(part, row, checkpoint.tensors[names[row.name]], checkpoint, ranges)
        elif row.transposed:
            part[...] = checkpoint.read(names[row.name], row.axis, pieces).T
        else:
            checkpoint.read(names[row.name], row.axis, pieces, out=part)


def _read_codes(part, row, info, checkpoint, ranges):
    """Read the own part of a quantised tensor, which is stored (out, in), and pack it."""
    coding, form = info.coding, part.form
    pieces = [(0, len(part))] if row.cut is None else row.pieces(ranges)

    # Outputs: their whole rows, some at a time.
    if not _cuts_inputs(row):
        step, at = max(1, checkpoint.block_bytes // (8 * coding.columns)), 0
        for start, stop in chain.from_iterable(_steps(*piece, step) for piece in pieces):
            codes, scales = (
                checkpoint.read(name, 0, [(start, stop)])
                for name in (info.name, info.name + SCALES)
            )
            _pack_into(part[at : at + stop - start], codes, scales, 0)
            at += stop - start
        return

    # Inputs: from the byte and the group in which they begin.
    start, stop = pieces[0][0], pieces[-1][1]
    a_byte, group = 8 // form.bits, form.group
    of_codes = [(start // a_byte, -(-stop // a_byte))]
    of_scales = [(start // group, -(-stop // group))]
    codes = checkpoint.read(info.name, 1, of_codes)
    scales = checkpoint.read(info.name + SCALES, 1, of_scales)
    for first, last in _steps(0, len(part), max(1, checkpoint.block_bytes // (8 * form.width))):
        _pack_into(part[first:last], codes[first:last], scales[first:last], start % a_byte)


def _steps(start, stop, step):
    """A range in steps: pairs (start, stop)."""
    return ((at, min(at + step, stop)) for at in range(start, stop, step))


def _pack_into(part, stored, scales, first):
    """Pack the codes of some rows, from number `first` of those that are stored on."""
    codes = quantize.from_bytes(stored, part.form.bits, first, part.form.inputs)
    part.words[...] = quantize.pack(codes, part.form.bits, part.form.offset)
    part.scales[:, : scales.shape[1]] = scales


def _tie_head(arch, checkpoint, ranges, weights, dtype, device):
    """Take for head a part of the embedding, or of what the file holds beside it if it differs.

    All rows of the embedding are compared, so that the ranks of cp, which have the same ones, all
    decide alike.
    """
    rows = tied_rows(ranges)
    weights.head, weights.tied_rows = weights.embed[rows], rows
    name = find(arch.names["head"], checkpoint.tensors)
    if name is None or tuple(checkpoint.tensors[name].shape) != (arch.V, arch.D):
        return
    row = replace(vocabulary_row(arch, "head"), cut="embed")
    head = _read([row], {row.name: name}, checkpoint, ranges, dtype)
    if not np.array_equal(head.view(np.uint8), array.host(weights.embed).view(np.uint8)):
        weights.head, weights.tied_rows = device.put(head[rows].copy()), None
