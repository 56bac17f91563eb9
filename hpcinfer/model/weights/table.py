"""The table of weights: name, global shape, which axis is cut by whom."""

from __future__ import annotations

from dataclasses import dataclass

from hpcinfer import partition
from hpcinfer.model.architecture import Architecture

# Cuts of which the parts of cp are cut once more, and parameters that are float32 like vectors.
FFN_CUTS = ("ffn", "moe", "shared")


# Parameters that the FFN side holds where attention and FFN are on ranks of their own; the router
# and the shared experts' gate stay with attention, which sends tokens to the experts they choose.
FFN_KEYS = frozenset(
    ("up", "up_bias", "down", "down_bias")
    + ("experts_up", "experts_down", "shared_up", "shared_down")
)

# Parameters that every expert of a layer has its own of
EXPERT_KEYS = ("experts_up", "experts_down")

# Parameters that a file may hold quantised. `kv` of latent attention is none, as it is multiplied
# from both sides.
QUANTISED = frozenset(
    ("qkv", "o", "up", "down", "latents", "q")
    + ("experts_up", "experts_down", "shared_up", "shared_down", "head")
)


@dataclass(frozen=True)
class TensorSpec:
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

    def pieces(self, ranges: dict[str, tuple]) -> list[tuple[int, int]]:
        """(start, stop) ranges of the cut axis that a rank owning items `ranges[cut]` reads."""
        if self.cut is None:
            return [(0, self.shape[0])] if self.shape else []
        first, last = ranges[self.cut]
        if self.stride == self.unit:
            start, stop = self.offset + first * self.unit, self.offset + last * self.unit
            return [(start, stop)] if stop > start else []
        starts = (self.offset + j * self.stride for j in range(first, last))
        return [(start, start + self.unit) for start in starts]

    def local_shape(self, ranges: dict[str, tuple]) -> tuple:
        """Shape (out, in) of the part that a rank owns."""
        shape = list(self.shape)
        if self.cut is not None:
            first, last = ranges[self.cut]
            shape[self.axis] = (last - first) * self.unit
        return tuple(reversed(shape)) if self.transposed else tuple(shape)


def table(arch: Architecture, cp: int = 1) -> list[TensorSpec]:
    """Every tensor that a model of this architecture has, in the order of computation.

    Parameters
    ----------
    cp : parts in which the FFN's columns of a rank are divided once more, for decoding

    Returns
    -------
    list of TensorSpec
    """
    # Go from the embedding through the layers to the head.
    rows = [vocabulary_row(arch, "embed")]
    if arch.learned_positions:
        rows.append(
            TensorSpec("positions", None, arch.names["positions"], (arch.learned_positions, arch.D))
        )
    for n in range(arch.N):
        rows += _layer(arch, n, cp)
    rows += _norm(arch, "final_norm", None)
    if not arch.tied:
        rows.append(vocabulary_row(arch, "head"))
    return rows


def owned(arch: Architecture, P: int, rank: int, cp: int = 1, part: int = 0) -> dict[str, tuple]:
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
    # Divide heads, columns and vocabulary by rank, then columns by part of cp.
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


def in_parts(ranges: dict[str, tuple], cp: int) -> dict[str, tuple]:
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


def vocabulary_row(arch: Architecture, key: str) -> TensorSpec:
    return TensorSpec(key, None, arch.names[key], (arch.V, arch.D), key)


def _norm(arch, key, layer):
    """Rows of one norm: weight, and bias where the family's norms have one."""
    keys = [key, f"{key}_bias"] if arch.norm == "layer" else [key]
    return [TensorSpec(k, layer, arch.names[k].format(n=layer), (arch.D,)) for k in keys]


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
        rows += [TensorSpec("q_norm", n, arch.names["q_norm"].format(n=n), (mla.q_rank,))]
    rows += _matrix(arch, n, "latents", "kv_a", D, mla.kv_rank + mla.rotated, mla.bias, {})
    rows += [TensorSpec("kv_norm", n, arch.names["kv_norm"].format(n=n), (mla.kv_rank,))]
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
        return [TensorSpec(k, n, arch.names[k].format(n=n), (arch.K,)) for k in keys]
    cuts = (("q_norm", "query", arch.H), ("k_norm", "kv", arch.G))
    return [
        TensorSpec(k, n, arch.names[k].format(n=n), (m * arch.K,), **_by_heads(cut, arch.K))
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
    rows = [TensorSpec("router", n, names["router"].format(n=n), (E, D))]
    if arch.router.corrected:
        rows.append(TensorSpec("router_bias", n, names["router_bias"].format(n=n), (E,)))
    for e in range(E):
        rows += _gated(names, "experts", n, e, D, arch.moe_F, "moe", cp)
    if arch.shared_F:
        rows += _gated(names, "shared", n, None, D, arch.shared_F, "shared", cp)
    if arch.shared_gate:
        rows.append(TensorSpec("shared_gate", n, names["shared_gate"].format(n=n), (1, D)))
    return rows


def _gated(names, key, n, e, D, F, cut, cp):
    """Rows of an FFN with a gate and no biases: of expert e, or of the shared experts."""
    gate, up, down = (names[f"{key}.{x}"].format(n=n, e=e) for x in ("gate", "up", "down"))
    rows = [
        TensorSpec(f"{key}_up", n, name, (F, D), f"{cut} {part}", expert=e)
        for part in range(cp)
        for name in (gate, up)
    ]
    return [*rows, TensorSpec(f"{key}_down", n, down, (D, F), cut, axis=1, expert=e)]


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
    rows = [TensorSpec(key, n, tensor, shape, axis=axis, transposed=arch.stored_in_out, **cut)]
    if bias:
        tensor = arch.names[f"{name}_bias"].format(n=n)
        rows.append(TensorSpec(f"{key}_bias", n, tensor, (outputs,), **(cut if column else {})))
    return rows


def by_target(rows):
    """The table's rows grouped by the parameter that they fill, in order."""
    groups = {}
    for row in rows:
        groups.setdefault((row.layer, row.key), []).append(row)
    return groups.values()


def find(name: str, tensors: dict) -> str | None:
    """A tensor's name in the checkpoint: with the family's prefix, or saved without it."""
    if name in tensors:
        return name
    short = name.partition(".")[2]
    return short if short in tensors and name.split(".")[0] in _PREFIXES else None


_PREFIXES = ("model", "transformer", "gpt_neox")
