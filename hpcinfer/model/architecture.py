"""What a model is, as its config says: sizes in the legend's letters, choices of its family."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field

import numpy as np

from hpcinfer import array
from hpcinfer.errors import integer
from hpcinfer.ops import rope as ropes
from hpcinfer.ops.activation import activation
from hpcinfer.ops.rope import Rope
from hpcinfer.ops.route import Router

# Largest value that a size and a number in a config may have, and most layers; anything above is a
# broken or hostile file.
_LARGEST, _LARGEST_NUMBER, _MOST_LAYERS = 1 << 31, 1e30, 1 << 12


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-AI 2024, section 2.1, arXiv:2405.04434).

    Keys and values of all heads are products of one latent per token, which is all that the cache
    holds, beside one rotated key that all heads share.

    Attributes
    ----------
    q_rank : width of the latent of the queries, 0 if they are products of the input itself
    kv_rank : width of the latent of keys and values
    plain, rotated, value : columns of a head's queries and keys without and with rotary embedding,
        and of its values
    interleaved : True if rotated pairs are columns 2 i and 2 i + 1 in the weights
    bias : True if the products that give the latents have biases
    eps : added to the mean square in the latents' norms
    """

    q_rank: int
    kv_rank: int
    plain: int
    rotated: int
    value: int
    interleaved: bool = True
    bias: bool = False
    eps: float = 1e-6


@dataclass(frozen=True)
class Architecture:
    """Sizes and choices of one model.

    Attributes
    ----------
    family : the config's model_type
    D, H, G, K, F, V, N : sizes, see the legend in `hpcinfer`; F is the width of a dense FFN. With
        latent attention G is 1 and K the width of what is cached for a token
    context : positions that the model can take
    dtype : element type that the config names for the weights, None if nothing computes in it
    activation : name of the FFN's non-linearity
    eps : added to the variance in norms
    norm : "rms" or "layer"
    gated : True if the FFN has a gate beside its up projection
    rope : Rope or None
    learned_positions : number of learned position embeddings, 0 if there are none
    parallel_residual : True if both halves of a layer read the same input
    qk_norm : "head" if queries and keys are normed head by head, "whole" if over all heads
        together, "" if not
    clip_qkv : bound of the magnitude of queries, keys and values, None for none
    mla : Latent or None
    qkv_bias, o_bias, ffn_bias : True if these projections have biases
    tied : True if the head is the embedding
    scales : factor on the attention scores, per layer
    windows : sliding window in tokens or None, per layer
    names : tensor names in the checkpoint, by the keys of `hpcinfer.model.weights.parameters`
    stored_in_out : True if the checkpoint stores matrices (in, out)
    qkv_per_head : True if fused queries, keys and values alternate head by head
    E, moe_F : experts of a layer that has any, and the width of each
    shared_F : width of all the experts together that every token takes, 0 if there are none
    shared_gate : True if a gate per token weighs the shared experts
    router : Router or None
    sparse : True or False per layer: its FFN is a mixture of experts
    unread_layers : layers behind the last that a checkpoint may hold and inference does not read
    """

    family: str
    D: int
    H: int
    G: int
    K: int
    F: int
    V: int
    N: int
    context: int
    dtype: np.dtype | None
    activation: str
    eps: float
    norm: str = "rms"
    gated: bool = True
    rope: Rope | None = None
    learned_positions: int = 0
    parallel_residual: bool = False
    qk_norm: str = ""
    clip_qkv: float | None = None
    mla: Latent | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    ffn_bias: bool = False
    tied: bool = False
    scales: tuple = ()
    windows: tuple = ()
    names: dict = field(default_factory=dict)
    stored_in_out: bool = False
    qkv_per_head: bool = False
    E: int = 0
    moe_F: int = 0
    shared_F: int = 0
    shared_gate: bool = False
    router: Router | None = None
    sparse: tuple = ()
    unread_layers: int = 0

    def __post_init__(self):
        activation(self.activation)
        if len(self.sparse) != self.N:
            object.__setattr__(self, "sparse", (False,) * self.N)
        if self.H % self.G:
            raise ValueError(
                f"config: got {self.H} query heads and {self.G} key/value heads, need the second "
                "to divide the first"
            )

    @property
    def value_width(self) -> int:
        """Columns of a cached value: 0 where the values are columns of the cached key."""
        return self.K if self.mla is None else 0


class Config:
    """Reader of a config.json that names the key in every error."""

    def __init__(self, values):
        self.values = values
        self.family = values.get("model_type")

    def size(self, *names, default=None):
        """Positive integer under the first of `names` that is present and not null."""
        value = self.get(*names, default=default)
        number = integer(value)
        if number is None or not 0 < number < _LARGEST:
            raise ValueError(
                f"config: got {names[0]}={reprlib.repr(value)}, need a positive integer"
            )
        return number

    def layers(self, *names, default=None):
        """Number of layers, before anything is listed for each of them."""
        value = self.size(*names, default=default)
        if value > _MOST_LAYERS:
            raise ValueError(f"config: got {names[0]}={value}, need at most {_MOST_LAYERS}")
        return value

    def count(self, *names, default=0):
        """Integer of 0 or more under the first of `names` that is present and not null."""
        value = self.get(*names, default=default)
        return 0 if integer(value) == 0 else self.size(*names, default=value)

    def number(self, *names, default=None):
        """Number under the first of `names` that is present and not null."""
        value = self.get(*names, default=default)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not abs(value) < _LARGEST_NUMBER
        ):
            raise ValueError(f"config: got {names[0]}={reprlib.repr(value)}, need a number")
        return float(value)

    def positive(self, *names, default=None):
        """Number above 0 under the first of `names` that is present and not null."""
        value = self.number(*names, default=default)
        if value <= 0:
            raise ValueError(f"config: got {names[0]}={value}, need more than 0")
        return value

    def flag(self, name, default):
        """True or false under `name`."""
        value = self.get(name, default=default)
        if not isinstance(value, bool):
            raise ValueError(f"config: got {name}={reprlib.repr(value)}, need true or false")
        return value

    def word(self, *names, default=None):
        """String under the first of `names` that is present and not null."""
        value = self.get(*names, default=default)
        if not isinstance(value, str):
            raise ValueError(f"config: got {names[0]}={reprlib.repr(value)}, need a string")
        return value

    def get(self, *names, default=None):
        """Value under the first of `names` that is present and not null, else the default."""
        for name in names:
            if self.values.get(name) is not None:
                return self.values[name]
        return default

    def without(self, *names):
        """The same config with `names` left out."""
        return Config({key: value for key, value in self.values.items() if key not in names})

    def dtype(self):
        """Element type of the weights; float32 where the config does not say.

        None where it names one that nothing here computes in: the user may say another.
        """
        name = self.get("dtype", "torch_dtype", default="float32")
        try:
            return array.parse_dtype(name.removeprefix("torch.") if isinstance(name, str) else name)
        except ValueError:
            return None

    def rope_table(self):
        """What the config says of its rope, as a config of its own."""
        values = self.get("rope_scaling", "rope_parameters", default={})
        if not isinstance(values, dict):
            raise ValueError(
                f"config: got rope_scaling={reprlib.repr(values)}, need an object or null"
            )
        return Config({"rope_theta": self.get("rope_theta"), **values})

    def rope(self, width, theta=None, partial=1.0):
        """Rotary embedding of heads `width` wide, in the keys of transformers 4 or 5.

        `theta` and `partial` are the family's own defaults.
        """
        table = self.rope_table()
        kind = table.word("rope_type", "type", default="default")
        if kind not in _ROPES:
            known = ", ".join(_ROPES)
            raise ValueError(f"config: got rope_type={reprlib.repr(kind)}, need one of {known}")

        # Find for how many positions the model was made, before and after it was extended.
        positions = self.size("max_position_embeddings", default=2048)
        original = self.get(
            "original_max_position_embeddings",
            default=table.get("original_max_position_embeddings", default=positions),
        )
        original = Config({"original_max_position_embeddings": original}).size(
            "original_max_position_embeddings"
        )

        # Find how many columns are rotated, and the base of their angles.
        dim = int(width * table.number("partial_rotary_factor", default=partial))
        if dim < 2 or dim % 2 or dim > width:
            raise ValueError(f"config: got {dim} rotated columns of {width}, need an even number")
        theta = table.number("rope_theta", default=theta or 10000.0)
        if theta <= 1:
            raise ValueError(f"config: got rope_theta={theta}, need more than 1")
        return _ROPES[kind](table, dim, theta, positions, original)

    def router(self, E, k, **choices):
        """Router over `E` experts; `k` is the family's own number of choices."""
        router = Router(self.size("num_experts_per_tok", default=k), **choices)
        groups, top_groups = router.groups, router.top_groups
        if E % groups:
            raise ValueError(f"config: got n_group={groups}, need a divisor of {E} experts")
        if not top_groups <= groups:
            raise ValueError(f"config: got topk_group={top_groups}, need at most {groups} groups")
        if router.group_score == "top2" and 1 < groups and E < 2 * groups:
            raise ValueError(f"config: got {E} experts in {groups} groups, need 2 in each or more")
        if router.k > E // groups * top_groups:
            raise ValueError(
                f"config: got num_experts_per_tok={router.k}, need at most "
                f"{E // groups * top_groups}, the experts that can be chosen"
            )
        return router


def _default(table, dim, theta, positions, original):
    return Rope("default", dim, theta)


def _linear(table, dim, theta, positions, original):
    return Rope("linear", dim, theta, factor=_factor(table))


def _dynamic(table, dim, theta, positions, original):
    if dim < 4:
        raise ValueError(f"config: got {dim} rotated columns, need 4 or more for dynamic rope")
    return Rope("dynamic", dim, theta, factor=_factor(table), original_context=positions)


def _llama3(table, dim, theta, positions, original):
    low_factor = table.positive("low_freq_factor", default=1.0)
    high_factor = table.positive("high_freq_factor", default=4.0)
    if high_factor <= low_factor:
        raise ValueError(
            f"config: got high_freq_factor={high_factor}, need more than low_freq_factor, "
            f"which is {low_factor}"
        )
    return Rope(
        "llama3",
        dim,
        theta,
        factor=_factor(table),
        original_context=original,
        low_factor=low_factor,
        high_factor=high_factor,
    )


def _yarn(table, dim, theta, positions, original):
    factor = table.positive("factor", default=positions / original)
    mscale = table.number("mscale", default=0.0)
    mscale_all = table.number("mscale_all_dim", default=0.0)
    growth = ropes.yarn_magnitude(factor)
    if mscale and mscale_all:
        growth = ropes.yarn_magnitude(factor, mscale) / ropes.yarn_magnitude(factor, mscale_all)
    return Rope(
        "yarn",
        dim,
        theta,
        factor=factor,
        original_context=original,
        beta_fast=table.positive("beta_fast", default=32.0),
        beta_slow=table.positive("beta_slow", default=1.0),
        truncate=table.flag("truncate", True),
        magnitude=table.number("attention_factor", default=growth),
    )


def _longrope(table, dim, theta, positions, original):
    # Read a divisor for every pair of columns, for short texts and for long ones.
    factor = table.positive("factor", default=positions / original)
    divisors = {}
    for name in ("short_factor", "long_factor"):
        values = table.get(name)
        if not isinstance(values, list) or len(values) != dim // 2:
            raise ValueError(f"config: got no {name} of {dim // 2} numbers, which longrope needs")
        divisors[name] = tuple(Config({name: v}).positive(name) for v in values)

    # Raise the magnitude with the logarithm of the extension, unless the config says how far.
    growth = 1.0
    if factor > 1 and original > 1:
        growth = float(np.sqrt(1 + np.log(factor) / np.log(original)))
    return Rope(
        "longrope",
        dim,
        theta,
        factor=factor,
        original_context=original,
        short=divisors["short_factor"],
        long=divisors["long_factor"],
        magnitude=table.number("attention_factor", default=growth),
    )


def _factor(table):
    factor = table.number("factor")
    if factor < 1:
        raise ValueError(f"config: got rope factor {factor}, need 1 or more")
    return factor


_ROPES = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def head_width(D: int, H: int) -> int:
    """Width of a head where the heads share the model's width."""
    if D % H:
        raise ValueError(
            f"config: got width {D} and {H} heads, need the second to divide the first"
        )
    return D // H


def context_of(rope, positions):
    """Positions that a model with `rope` can take, its config naming `positions`."""
    if rope.kind in ("linear", "dynamic"):
        return int(positions * rope.factor)
    if rope.kind in ("yarn", "longrope"):
        return max(positions, int(rope.original_context * rope.factor))
    return positions
