"""The table of weights (name, global shape, which axis is cut by whom) and the loading of a shard.

A row of the table says where a parameter stands in the checkpoint and which items of one axis
belong to a rank. Parameters are kept (out, in); rows with the same key are laid one after the other
along `out`, so that queries, keys and values, or gate and up, are one product.
"""

import re
from dataclasses import dataclass, field, replace
from itertools import chain, groupby

import numpy as np

from hpcinfer import array, partition
from hpcinfer.io.checkpoint import SCALES
from hpcinfer.ops import quantize
from hpcinfer.ops.quantize import LANES, Form, Quantized, arrays_of, form_of, joined
from hpcinfer.where import here

# Cuts of which the parts of cp are cut once more, and parameters that are float32 like vectors.
FFN_CUTS = ("ffn", "moe", "shared")

# Parameters that the FFN side holds where attention and FFN are on ranks of their own; the router
# and the shared experts' gate stay with attention, which sends tokens to the experts they choose.
FFN_KEYS = frozenset(
    ("up", "up_bias", "down", "down_bias")
    + ("experts_up", "experts_down", "shared_up", "shared_down")
)
_FULL = ("router", "shared_gate")

# Parameters that a file may hold quantised. `kv` of latent attention is none, as it is multiplied
# from both sides.
QUANTISED = frozenset(
    ("qkv", "o", "up", "down", "latents", "q")
    + ("experts_up", "experts_down", "shared_up", "shared_down", "head")
)

# Tensors that checkpoints carry and inference does not read: masks and tables that are computed
# here.
_IGNORED = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias|attention\.bias|attention\.masked_bias)$"
)


@dataclass(frozen=True)
class Row:
    """One tensor of the checkpoint and the part of it that ranks own.

    Attributes
    ----------
    key : attribute of `Weights` or `Layer` that it fills
    layer : number of the layer, None outside the layers
    name : tensor name in the checkpoint
    shape : global shape as stored
    cut : "query", "kv", "ffn", "moe", "shared", these three also with " I" behind (part I of cp),
        "embed", "head", or None if every rank holds the whole
    axis : stored axis that is cut
    unit : length of one item (head width for heads, 1 otherwise)
    offset, stride : item j begins at offset + j · stride
    transposed : True if stored (in, out)
    expert : number of the expert, None outside the experts
    """

    key: str
    layer: int | None
    name: str
    shape: tuple
    cut: str | None = None
    axis: int = 0
    unit: int = 1
    offset: int = 0
    stride: int = 1
    transposed: bool = False
    expert: int | None = None

    def pieces(self, ranges):
        """(start, stop) ranges of the cut axis that a rank owning items `ranges[cut]` reads."""
        if self.cut is None:
            return [(0, self.shape[0])] if self.shape else []
        first, last = ranges[self.cut]
        if self.stride == self.unit:
            start, stop = self.offset + first * self.unit, self.offset + last * self.unit
            return [(start, stop)] if stop > start else []
        starts = (self.offset + j * self.stride for j in range(first, last))
        return [(start, start + self.unit) for start in starts]

    def local_shape(self, ranges):
        """Shape (out, in) of the part that a rank owns."""
        shape = list(self.shape)
        if self.cut is not None:
            first, last = ranges[self.cut]
            shape[self.axis] = (last - first) * self.unit
        return tuple(reversed(shape)) if self.transposed else tuple(shape)


@dataclass
class Layer:
    """This rank's parameters of one layer; absent ones are None. C is (H + 2 G) K, U is F or 2 F.

    Those of QUANTISED are all arrays or all Quantized, the others are arrays.

    Attributes
    ----------
    norm1, norm1_bias, norm2, norm2_bias : (D,) float32
    qkv, qkv_bias : (C/P, D), (C/P,): queries, then keys, then values of the rank's heads
    q_norm, k_norm : (K,) float32, or (H K/P,), (G K/P,) where all heads are normed together
    o, o_bias : (D, H K/P), (D,)
    up, up_bias : (U/P, D), (U/P,): for every part of cp its gate, if there is one, then its up
    down, down_bias : (D, F/P), (D,)
    latents, latents_bias : of latent attention, the products that give the latents of queries, if
        they have one, then of keys and values, then the rotated key; q_norm and kv_norm
        (latent,) float32 are then those latents' norms
    q, kv : (own columns of queries, latent or D), (own columns of plain keys and values, latent),
        head by head
    router, router_bias : (E, D), (E,) float32
    experts_up : (own experts, U/P, D), own columns of each in the order of `up`
    experts_down : (own experts, D, F/P)
    shared_up, shared_down : (U/P, D), (D, F/P), of all shared experts as one FFN
    shared_gate : (1, D) float32
    """

    norm1: np.ndarray | None = None
    norm1_bias: np.ndarray | None = None
    qkv: np.ndarray | None = None
    qkv_bias: np.ndarray | None = None
    q_norm: np.ndarray | None = None
    k_norm: np.ndarray | None = None
    o: np.ndarray | None = None
    o_bias: np.ndarray | None = None
    norm2: np.ndarray | None = None
    norm2_bias: np.ndarray | None = None
    up: np.ndarray | None = None
    up_bias: np.ndarray | None = None
    down: np.ndarray | None = None
    down_bias: np.ndarray | None = None
    latents: np.ndarray | None = None
    latents_bias: np.ndarray | None = None
    kv_norm: np.ndarray | None = None
    q: np.ndarray | None = None
    kv: np.ndarray | None = None
    router: np.ndarray | None = None
    router_bias: np.ndarray | None = None
    experts_up: np.ndarray | None = None
    experts_down: np.ndarray | None = None
    shared_up: np.ndarray | None = None
    shared_down: np.ndarray | None = None
    shared_gate: np.ndarray | None = None


@dataclass
class Weights:
    """This rank's parameters.

    Attributes
    ----------
    embed : (V/P, D), rows of the ids that the rank looks up
    positions : (context, D), or None
    final_norm, final_norm_bias : (D,) float32
    head : (V/P, D), rows of the ids whose logits it computes
    tied_rows : slice of the embedding that the head is; None if it is not
    layers : list of Layer
    """

    embed: np.ndarray | None = None
    positions: np.ndarray | None = None
    final_norm: np.ndarray | None = None
    final_norm_bias: np.ndarray | None = None
    head: np.ndarray | None = None
    tied_rows: slice | None = None
    layers: list = field(default_factory=list)

    def layer(self, n):
        """Parameters of layer n."""
        return self.layers[n]

    def embedding(self):
        """(embed, positions)."""
        return self.embed, self.positions

    def output(self):
        """The head."""
        return self.head

    @property
    def nbytes(self):
        """Bytes of all parameters; a head that is a part of the embedding counts once."""
        outside = [self.embed, self.positions, self.final_norm, self.final_norm_bias]
        if self.tied_rows is None:
            outside.append(self.head)
        layers = (vars(layer).values() for layer in self.layers)
        return sum(x.nbytes for x in chain(outside, *layers) if x is not None)

    def release(self):
        """Forget what the step before has fetched: nothing, as all is here."""

    def test(self):
        """Move on what is in flight: nothing."""

    def settle(self):
        """Wait for what is in flight: nothing."""


def table(arch, cp=1):
    """Every tensor that a model of this architecture has, in the order of computation.

    Parameters
    ----------
    cp : parts in which the FFN's columns of a rank are divided once more, for decoding

    Returns
    -------
    list of Row
    """
    rows = [_vocabulary(arch, "embed")]
    if arch.learned_positions:
        rows.append(
            Row("positions", None, arch.names["positions"], (arch.learned_positions, arch.D))
        )
    for n in range(arch.N):
        rows += _layer(arch, n, cp)
    rows += _norm(arch, "final_norm", None)
    if not arch.tied:
        rows.append(_vocabulary(arch, "head"))
    return rows


def owned(arch, P, rank, cp=1, part=0):
    """Items of every cut axis that a rank owns.

    The vocabulary's logits are divided among all ranks of tp and cp, the embedding's rows among
    those of tp only, as every part of cp looks up its own tokens. Every rank owns all experts, and
    its own columns of each; who owns them otherwise changes "experts" and "moe".

    Parameters
    ----------
    P, rank : ranks of tp, and this one
    cp, part : ranks of cp, and this one

    Returns
    -------
    dict cut -> (start, stop)
    """
    heads = partition.heads(arch.H, arch.G, P)[rank]
    logits = partition.block(arch.V, P * cp)[rank * cp : (rank + 1) * cp]
    ranges = {
        "query": heads.query,
        "kv": heads.kv,
        "ffn": partition.block(arch.F, P)[rank],
        "experts": (0, arch.E),
        "moe": partition.block(arch.moe_F, P)[rank],
        "shared": partition.block(arch.shared_F, P)[rank],
        "embed": (logits[0][0], logits[-1][1]),
        "head": logits[part],
    }
    return in_parts(ranges, cp)


def in_parts(ranges, cp):
    """The ranges, with the part of every rank of cp ("ffn 0", "ffn 1", ...) of the columns in them.

    Parameters
    ----------
    ranges : dict cut -> (start, stop), as `owned` returns it
    """
    parts = {}
    for cut in FFN_CUTS:
        first, last = ranges[cut]
        for i, (start, stop) in enumerate(partition.block(last - first, cp)):
            parts[f"{cut} {i}"] = (first + start, first + stop)
    return {**ranges, **parts}


def check(arch, tensors):
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
    names = {row.name: find(row.name, tensors) for row in rows}
    missing = [row.name for row in rows if names[row.name] is None]
    if missing == [arch.names["embed"]] and find(arch.names["head"], tensors):
        names[arch.names["embed"]] = find(arch.names["head"], tensors)
        missing = []
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"weights: got no tensor {missing[0]}{more}, which the config's {arch.family} of "
            f"{arch.N} layers needs; check that the checkpoint is complete"
        )
    for row in rows:
        _check_tensor(row, tensors[names[row.name]])
    head = tensors.get(find(arch.names["head"], tensors))
    if arch.tied and _coding(head) is not None:
        raise ValueError(
            "weights: got a quantised head, need a config that does not tie it to the embedding; "
            "convert the model again"
        )
    for of_parameter in _by_target(rows):
        _check_alike([(names[row.name], tensors[names[row.name]]) for row in of_parameter])
    known = {*names.values(), find(arch.names["head"], tensors)}
    scales = {name + SCALES for name in known if name in tensors and _coding(tensors[name])}
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
    return names


def load(arch, checkpoint, ranges, dtype, device, cp=1, keep=None, pieces=None):
    """Read this rank's shard, and nothing else, from a checkpoint.

    Matrices take `dtype`, or stay quantised if they are in the checkpoint; vectors (norms, biases)
    are kept in float32.

    Parameters
    ----------
    ranges : dict cut -> (start, stop), as `owned` returns it; its parts of cp follow from the rest
    cp : ranks of cp
    keep : function of a Row, True if this rank has it; None for all
    pieces : Pieces, which then keeps a part of the parameters and fetches them when they are used;
        None to keep them whole

    Returns
    -------
    Weights, or `pieces`
    """
    names, ranges = check(arch, checkpoint.tensors), in_parts(ranges, cp)
    weights = Weights(layers=[Layer() for _ in range(arch.N)])
    rows = [row for row in table(arch, cp) if keep is None or keep(row)]
    for layer, of_layer in groupby(rows, key=lambda row: row.layer):
        here.layer, target = layer, weights if layer is None else weights.layers[layer]
        for of_parameter in _by_target(of_layer):
            read = _read if of_parameter[0].expert is None else _read_experts
            parameter = read(of_parameter, names, checkpoint, ranges, dtype)
            setattr(target, of_parameter[0].key, _put(device, parameter))
        if layer is not None and pieces is not None:
            pieces.keep_layer(layer, target)
            weights.layers[layer] = None
    head = _vocabulary(arch, "head")
    if arch.tied and (keep is None or keep(head)) and weights.embed is not None:
        _tie_head(arch, checkpoint, ranges, weights, dtype, device)
    return weights if pieces is None else pieces.keep_rest(weights)


def tied_rows(ranges):
    """Slice of a rank's rows of the embedding whose logits it computes, where the head is tied."""
    return slice(*(bound - ranges["embed"][0] for bound in ranges["head"]))


def slice_columns(layer, qkv, o, ffn, moe, shared):
    """A layer with only some of its columns: views of its parameters.

    Parameters
    ----------
    qkv, o : slices of the rows of a column cut, of the inputs of a row cut
    ffn, moe, shared : pairs of such slices
    """

    def part(parameter, *index):
        return None if parameter is None else parameter[(..., *index)]

    whole = slice(None)
    return replace(
        layer,
        qkv=part(layer.qkv, qkv, whole),
        qkv_bias=part(layer.qkv_bias, qkv),
        o=part(layer.o, o),
        up=part(layer.up, ffn[0], whole),
        up_bias=part(layer.up_bias, ffn[0]),
        down=part(layer.down, ffn[1]),
        experts_up=part(layer.experts_up, moe[0], whole),
        experts_down=part(layer.experts_down, moe[1]),
        shared_up=part(layer.shared_up, shared[0], whole),
        shared_down=part(layer.shared_down, shared[1]),
    )


def _read(rows, names, checkpoint, ranges, dtype):
    """One parameter of this rank, from the rows of the table that make it up."""
    shape = _stacked(rows, ranges)
    full = len(shape) == 1 or rows[0].key in _FULL
    coding = _coding(checkpoint.tensors[names[rows[0].name]])
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
    coding = _coding(checkpoint.tensors[names[row.name]])
    shape = (last - first, *_stacked(of_expert[row.expert], ranges))
    parameter = _empty(shape, dtype, coding, _first_input(row, ranges))
    for e in range(first, last):
        _read_into(parameter[e - first], of_expert[e], names, checkpoint, ranges)
    return parameter


def _empty(shape, dtype, coding, first):
    """Room for a parameter, quantised if there is a coding, whose inputs begin with `first`."""
    if coding is None:
        return array.large_empty(shape, dtype)
    form = Form(coding.bits, coding.group, shape[-1], first % coding.group, np.dtype(dtype))
    words = array.large_empty((*shape[:-1], form.blocks * LANES), np.uint16)
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
    return joined(form_of(parameter), [device.put(x) for x in arrays_of(parameter)])


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
    row = replace(_vocabulary(arch, "head"), cut="embed")
    head = _read([row], {row.name: name}, checkpoint, ranges, dtype)
    if not np.array_equal(head.view(np.uint8), array.host(weights.embed).view(np.uint8)):
        weights.head, weights.tied_rows = device.put(head[rows].copy()), None


def _vocabulary(arch, key):
    return Row(key, None, arch.names[key], (arch.V, arch.D), key)


def _norm(arch, key, layer):
    """Rows of one norm: weight, and bias where the family's norms have one."""
    keys = [key, f"{key}_bias"] if arch.norm == "layer" else [key]
    return [Row(k, layer, arch.names[k].format(n=layer), (arch.D,)) for k in keys]


def _layer(arch, n, cp):
    """Rows of layer n."""
    rows = _norm(arch, "norm1", n)
    rows += _qkv(arch, n) + _qk_norm(arch, n) if arch.mla is None else _latents(arch, n)
    width = arch.K if arch.mla is None else arch.mla.value
    heads = _by_heads("query", width)
    rows += _matrix(arch, n, "o", "o", arch.H * width, arch.D, arch.o_bias, heads, column=False)
    rows += _norm(arch, "norm2", n)
    return rows + (_moe(arch, n, cp) if arch.sparse[n] else _ffn(arch, n, cp))


def _by_heads(cut, width):
    """What a row says of a cut by heads of this width, which follow one another."""
    return {"cut": cut, "unit": width, "stride": width}


def _latents(arch, n):
    """Rows of latent attention: the products that give the latents are whole, heads are cut."""
    D, H, mla, rows = arch.D, arch.H, arch.mla, []
    per_query = _by_heads("query", mla.plain + mla.rotated)
    if mla.q_rank:
        rows += _matrix(arch, n, "latents", "q_a", D, mla.q_rank, mla.bias, {})
        rows += [Row("q_norm", n, arch.names["q_norm"].format(n=n), (mla.q_rank,))]
    rows += _matrix(arch, n, "latents", "kv_a", D, mla.kv_rank + mla.rotated, mla.bias, {})
    rows += [Row("kv_norm", n, arch.names["kv_norm"].format(n=n), (mla.kv_rank,))]
    name, inputs = ("q_b", mla.q_rank) if mla.q_rank else ("q", D)
    rows += _matrix(arch, n, "q", name, inputs, H * (mla.plain + mla.rotated), False, per_query)
    per_key = _by_heads("query", mla.plain + mla.value)
    return rows + _matrix(
        arch, n, "kv", "kv_b", mla.kv_rank, H * (mla.plain + mla.value), False, per_key
    )


def _qk_norm(arch, n):
    """Rows of the norms of queries and keys: of one head, or of the own heads of all."""
    if arch.qk_norm != "whole":
        keys = ("q_norm", "k_norm") if arch.qk_norm else ()
        return [Row(k, n, arch.names[k].format(n=n), (arch.K,)) for k in keys]
    cuts = (("q_norm", "query", arch.H), ("k_norm", "kv", arch.G))
    return [
        Row(k, n, arch.names[k].format(n=n), (m * arch.K,), **_by_heads(cut, arch.K))
        for k, cut, m in cuts
    ]


def _ffn(arch, n, cp):
    """Rows of a dense FFN."""
    rows, bias = [], arch.ffn_bias
    for part in range(cp):
        for name in ("gate", "up") if arch.gated else ("up",):
            rows += _matrix(arch, n, "up", name, arch.D, arch.F, bias, {"cut": f"ffn {part}"})
    return rows + _matrix(arch, n, "down", "down", arch.F, arch.D, bias, {"cut": "ffn"}, False)


def _moe(arch, n, cp):
    """Rows of a mixture of experts: router, routed experts, shared experts and their gate."""
    D, E, names = arch.D, arch.E, arch.names
    rows = [Row("router", n, names["router"].format(n=n), (E, D))]
    if arch.router.corrected:
        rows.append(Row("router_bias", n, names["router_bias"].format(n=n), (E,)))
    for e in range(E):
        rows += _gated(names, "experts", n, e, D, arch.moe_F, "moe", cp)
    if arch.shared_F:
        rows += _gated(names, "shared", n, None, D, arch.shared_F, "shared", cp)
    if arch.shared_gate:
        rows.append(Row("shared_gate", n, names["shared_gate"].format(n=n), (1, D)))
    return rows


def _gated(names, key, n, e, D, F, cut, cp):
    """Rows of an FFN with a gate and no biases: of expert e, or of the shared experts."""
    gate, up, down = (names[f"{key}.{x}"].format(n=n, e=e) for x in ("gate", "up", "down"))
    rows = [
        Row(f"{key}_up", n, name, (F, D), f"{cut} {part}", expert=e)
        for part in range(cp)
        for name in (gate, up)
    ]
    return [*rows, Row(f"{key}_down", n, down, (D, F), cut, axis=1, expert=e)]


def _qkv(arch, n):
    """Rows of the queries, keys and values of layer n: three tensors, or one that holds all."""
    parts = (("q", "query", arch.H), ("k", "kv", arch.G), ("v", "kv", arch.G))
    rows = []
    for i, (name, cut, heads) in enumerate(parts):
        items = _by_heads(cut, arch.K)
        out = heads * arch.K
        if "fused_qkv" in arch.names:
            name, out = "fused_qkv", 3 * arch.H * arch.K
            if arch.qkv_per_head:
                items |= {"offset": i * arch.K, "stride": 3 * arch.K}
            else:
                items |= {"offset": i * arch.H * arch.K}
        rows += _matrix(arch, n, "qkv", name, arch.D, out, arch.qkv_bias, items)
    return rows


def _matrix(arch, n, key, name, inputs, outputs, bias, cut, column=True):
    """Rows of a projection: a column cut also cuts the bias, a row cut leaves it whole."""
    shape = (inputs, outputs) if arch.stored_in_out else (outputs, inputs)
    axis = int(column == arch.stored_in_out)
    tensor = arch.names[name].format(n=n)
    rows = [Row(key, n, tensor, shape, axis=axis, transposed=arch.stored_in_out, **cut)]
    if bias:
        tensor = arch.names[f"{name}_bias"].format(n=n)
        rows.append(Row(f"{key}_bias", n, tensor, (outputs,), **(cut if column else {})))
    return rows


def _by_target(rows):
    """The table's rows grouped by the parameter that they fill, in order."""
    groups = {}
    for row in rows:
        groups.setdefault((row.layer, row.key), []).append(row)
    return groups.values()


def _check_tensor(row, info):
    """Refuse a tensor of another shape or type than a row of the table says."""
    shape, coding = tuple(info.shape), _coding(info)
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
    kinds = {c and (c.bits, c.group): name for name, info in infos for c in [_coding(info)]}
    if len(kinds) > 1:
        raise ValueError(
            f"weights: got {' and '.join(list(kinds.values())[:2])} quantised in different ways, "
            "need one, as they are multiplied together; convert the model again"
        )


def _coding(info):
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


def find(name, tensors):
    """A tensor's name in the checkpoint: with the family's prefix, or saved without it."""
    if name in tensors:
        return name
    short = name.partition(".")[2]
    return short if short in tensors and name.split(".")[0] in _PREFIXES else None


_PREFIXES = ("model", "transformer", "gpt_neox")
