"""This rank's parameters, as the layers use them.

Parameters are kept (out, in); those that meet the same input are laid one after the other along
`out`, so that queries, keys and values, or gate and up, are one product.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Protocol

import numpy as np

from hpcinfer.array import Array


@dataclass
class Layer:
    """This rank's parameters of one layer; absent ones are None.

    C is (H + 2 G) K in attention; in an FFN it is F, or 2 F with a gate.

    Those of QUANTISED are all arrays or all Quantized, the others are arrays.

    Attributes
    ----------
    norm1, norm1_bias, norm2, norm2_bias : (D,) float32
    qkv, qkv_bias : (C/P, D), (C/P,): queries, then keys, then values of the rank's heads
    q_norm, k_norm : (K,) float32, or (H K/P,), (G K/P,) where all heads are normed together
    o, o_bias : (D, H K/P), (D,)
    up, up_bias : (C/P, D), (C/P,): for every part of cp its gate, if there is one, then its up
    down, down_bias : (D, F/P), (D,)
    latents, latents_bias : of latent attention, the products that give the latents of queries, if
        they have one, then of keys and values, then the rotated key; q_norm and kv_norm
        (latent,) float32 are then those latents' norms
    q, kv : (own columns of queries, latent or D), (own columns of plain keys and values, latent),
        head by head
    router, router_bias : (E, D), (E,) float32
    experts_up : (own experts, C/P, D), own columns of each in the order of `up`
    experts_down : (own experts, D, F/P)
    shared_up, shared_down : (C/P, D), (D, F/P), of all shared experts as one FFN
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


class Parameters(Protocol):
    """What a model asks of its parameters; `Weights` and `ZeroWeights` have it.

    Attributes
    ----------
    final_norm, final_norm_bias : (D,) float32, or None
    nbytes : bytes of parameters that this rank ever holds at a time
    """

    final_norm: np.ndarray | None
    final_norm_bias: np.ndarray | None

    @property
    def nbytes(self) -> int: ...

    def layer(self, n: int) -> Layer:
        """Parameters of layer n, good until the next layer is asked for."""

    def embedding(self) -> tuple:
        """(embed, positions), good as long as the caller keeps them."""

    def output(self) -> Array:
        """The head, good until a layer or the embedding is asked for."""

    def test(self) -> None:
        """Let MPI move on what is in flight; by default nothing is."""

    def settle(self) -> None:
        """Wait for what is in flight, at the end of a run; by default nothing is."""


@dataclass
class Weights(Parameters):
    """This rank's parameters, all of them at hand.

    Attributes
    ----------
    embed : (V/P, D), rows of the ids that the rank looks up
    positions : (context, D), or None
    final_norm, final_norm_bias : (D,) float32
    head : (V/P, D), rows of the ids whose logits it computes
    tied_rows : slice of the embedding that the head is; None if it is not
    layers : list of Layer, or of what stands for one (`load`)
    """

    embed: np.ndarray | None = None
    positions: np.ndarray | None = None
    final_norm: np.ndarray | None = None
    final_norm_bias: np.ndarray | None = None
    head: np.ndarray | None = None
    tied_rows: slice | None = None
    layers: list = field(default_factory=list)

    def layer(self, n: int) -> Layer:
        """Parameters of layer n."""
        return self.layers[n]

    def embedding(self) -> tuple:
        """(embed, positions)."""
        return self.embed, self.positions

    def output(self) -> Array:
        """The head."""
        return self.head

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters; a head that is a part of the embedding counts once."""
        outside = [self.embed, self.positions, self.final_norm, self.final_norm_bias]
        if self.tied_rows is None:
            outside.append(self.head)
        layers = (vars(layer).values() for layer in self.layers)
        return sum(x.nbytes for x in chain(outside, *layers) if x is not None)


def tied_rows(ranges: dict[str, tuple]) -> slice:
    """Slice of a rank's rows of the embedding whose logits it computes, where the head is tied."""
    return slice(*(bound - ranges["embed"][0] for bound in ranges["head"]))


def slice_columns(
    layer: Layer, qkv: slice, o: slice, ffn: tuple, moe: tuple, shared: tuple
) -> Layer:
    """A layer with only some of its columns: views of its parameters.

    Parameters
    ----------
    qkv, o : slices of the rows of a column cut, of the inputs of a row cut
    ffn, moe, shared : pairs of such slices
    """

    def part(parameter, *index):
        return None if parameter is None else parameter[(..., *index)]

    # Cut columns along `out`, rows along `in`, biases of columns with them.
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
