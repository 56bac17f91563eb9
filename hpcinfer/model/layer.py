"""One decoder layer, composed from the strategies and one rank's mathematics.

What a half of a layer finds is added to x by the norm of the next half, in one pass over both: so a
layer is given, beside x, what is still to be added to it, and leaves the like to the next one.

The functions here, and those of `moe` and `mla`, take a Pass p and the number n of a layer; w are
this rank's parameters of it, `p.layer(n)`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import DTypeLike

from hpcinfer import array, collectives
from hpcinfer.array import Array
from hpcinfer.model.architecture import Architecture
from hpcinfer.model.mla import latent_attention
from hpcinfer.model.moe import mixture_sum, shared_sum, spread_experts
from hpcinfer.model.token_owners import At
from hpcinfer.ops.inplace import add_into, copy_into
from hpcinfer.ops.linear import linear_pair
from hpcinfer.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm

if TYPE_CHECKING:
    from hpcinfer.model.forward_pass import Pass
    from hpcinfer.model.weights.parameters import Layer

# Tokens of a step up to which products on the CPU round what they are given, as they read it.
_FEW = 8


def layer(p: Pass, n: int, x: Array, y: Array | None) -> tuple[Array, Array]:
    """Layer n of a model.

    Parameters
    ----------
    x : (T/P, D) float32, the tokens step.mine, equal on every rank of the tensor axis; with
        sequence parallelism those of them that this rank keeps
    y : as x, still to be added to it, in whose memory the sum will be; None for nothing

    Returns
    -------
    x, y : as the arguments
    """
    w = p.layer(n)
    if p.model.arch.parallel_residual:
        return _both_halves(p, n, w, x, y)

    # Attend, then apply the FFN; messages of others move on behind each.
    x, y = attention_half(p, n, w, x, y)
    p.model.progress()
    x, y = _ffn_half(p, n, w, x, y)
    p.model.progress()
    return x, y


def attention_half(p: Pass, n: int, w: Layer, x: Array, y: Array | None) -> tuple[Array, Array]:
    """x + y, and what attention adds to that: both (T/P, D)."""
    arch = p.model.arch
    dtype = _type_of_input(p, w.qkv if arch.mla is None else w.latents)
    x, normed = add_norm(arch, x, y, w.norm1, w.norm1_bias, dtype)
    if not arch.parallel_residual:
        p.show("residual", n, x, At.HOME)
    y = p.cut.complete(normed, partial(_attention_sum, p, n, w), w.o_bias, "attention")
    p.show("attention", n, y, At.HOME)
    return x, y


def _ffn_half(p, n, w, x, y):
    """x + y, and what the FFN adds to that: both (T/P, D)."""
    # Round for a product alone: a router takes what is not rounded.
    dtype = _type_of_input(p, None if p.model.arch.sparse[n] else w.up)
    x, normed = add_norm(p.model.arch, x, y, w.norm2, w.norm2_bias, dtype)
    y = _ffn(p, n, w, normed)
    p.show("ffn", n, y, At.HOME)
    return x, y


def _both_halves(p, n, w, x, y):
    """A layer whose halves read the same input: their partial sums are completed together."""
    arch, x = p.model.arch, x if y is None else add_into(y, x)
    p.show("residual", n, x, At.HOME)

    # Complete each half for itself if someone wants to see it.
    if p.wants("attention") or p.wants("ffn"):
        _, of_attention = attention_half(p, n, w, x, None)
        _, of_ffn = _ffn_half(p, n, w, x, None)
        return x, of_attention + of_ffn

    def both_sums(x_all):
        y_sum = _attention_sum(p, n, w, norm(arch, x_all, w.norm1, w.norm1_bias))
        return add_into(y_sum, _ffn_sum(p, n, w, norm(arch, x_all, w.norm2, w.norm2_bias)))

    return x, p.cut.complete(x, both_sums, _sum(w.o_bias, w.down_bias), "layer")


def _attention_sum(p, n, w, x):
    """This rank's share of the attention half: (T, D) -> (T, D){sum}."""
    if p.model.arch.mla is not None:
        return latent_attention(p, n, w, x)
    return linear_pair(x, w.qkv, partial(_attend, p, n, w), w.o, w.qkv_bias)


def _attend(p, n, w, qkv):
    """Attention of the rank's own heads, between its two products: (T, C/P) -> (T, M/P)."""
    model, arch, heads = p.model, p.model.arch, p.model.heads
    qkv, T = p.cut.whole(qkv), qkv.shape[0]
    qkv = qkv.reshape(T, heads.n_query + 2 * heads.n_kv, arch.K)

    # Norm over all heads, or before a clip; else the cache's function does it on the way.
    norms, (q, k, _) = (None, None), _split(qkv, heads)
    if arch.qk_norm == "whole":
        q[...], k[...] = _norm_of_all_heads(model, w, q, k)
    elif arch.qk_norm == "head" and arch.clip_qkv is None:
        norms = w.q_norm, w.k_norm
    elif arch.qk_norm == "head":
        copy_into(q, rms_norm(q, w.q_norm, arch.eps))
        copy_into(k, rms_norm(k, w.k_norm, arch.eps))
    if arch.clip_qkv is not None:
        qkv = qkv.clip(-arch.clip_qkv, arch.clip_qkv)
    v = _split(qkv, heads)[2]

    # Norm and rotate queries and keys, and cache keys and values.
    qk = model.cache.place_heads(n, p.step, qkv, norms, arch.eps, p.rotation)
    q, k, _ = _split(qk, heads)
    p.show("q", n, q, At.MINE)
    p.show("k", n, k, At.MINE)
    p.show("v", n, v, At.MINE)
    o = model.attention.attend(p, n, q)
    return o.reshape(T, o.shape[1] * arch.K)


def _norm_of_all_heads(model, w, q, k):
    """RMS norms over the heads of all ranks together: their sums of squares are added up.

    Parameters
    ----------
    q, k : (T, H/P, K), (T, G/P, K) float32; a key head may be on several ranks and counts once
    """
    arch, xp = model.arch, array.namespace(q)
    squares = xp.stack([_squares(q), _squares(k[:, slice(*model.attention.first_kv)])])
    squares = collectives.Allreduce(model.grid.tp, squares, purpose="qk norm")
    results = []
    for x, weight, n_heads, square in zip(
        (q, k), (w.q_norm, w.k_norm), (arch.H, arch.G), squares, strict=True
    ):
        root = xp.sqrt(square / xp.float32(n_heads * arch.K) + xp.float32(arch.eps))
        results.append(x / root[:, None, None] * weight.reshape(x.shape[1:]))
    return results


def _squares(x):
    """Sum of squares of every token: (T, heads, K) -> (T,)."""
    return (x * x).sum(axis=(1, 2))


def _split(qkv, heads):
    """Queries, keys and values of the rank's heads: views of (T, heads, K)."""
    H, G = heads.n_query, heads.n_kv
    return qkv[:, :H], qkv[:, H : H + G], qkv[:, H + G :]


def _ffn(p, n, w, normed):
    """The complete sum of the FFN half: (T/P, D) -> (T/P, D)."""
    if p.model.grid.experts is None or not p.model.arch.sparse[n]:
        return p.cut.complete(normed, partial(_ffn_sum, p, n, w), w.down_bias, "ffn")
    if w.shared_up is None:
        y = spread_experts(p, n, w, p.cut.own(normed))
        return p.cut.everywhere(y, len(normed))

    # Add to the shared experts' partial sums what the routed ones found for the own tokens.
    def both_sums(x_all):
        y_sum, own = shared_sum(p.cut, w, x_all), p.cut.rows(len(x_all))
        y_sum[own] += spread_experts(p, n, w, x_all[own])
        return y_sum

    return p.cut.complete(normed, both_sums, None, "ffn")


def _ffn_sum(p, n, w, x):
    """This rank's share of the FFN half: (T, D) -> (T, D){sum}."""
    if p.model.arch.sparse[n]:
        return mixture_sum(p, n, w, x)
    return linear_pair(x, w.up, p.cut.between, w.down, w.up_bias)


def norm(
    arch: Architecture, x: Array, weight: Array, bias: Array | None, dtype: DTypeLike = np.float32
) -> Array:
    """The family's norm, rounded to a type."""
    if arch.norm == "layer":
        return layer_norm(x, weight, bias, arch.eps, dtype)
    return rms_norm(x, weight, arch.eps, dtype)


def add_norm(
    arch: Architecture,
    x: Array,
    y: Array | None,
    weight: Array,
    bias: Array | None,
    dtype: DTypeLike = np.float32,
) -> tuple[Array, Array]:
    """x + y, in the memory of y where there is one, and its norm: both (T/P, D)."""
    if y is None:
        return x, norm(arch, x, weight, bias, dtype)
    if arch.norm == "layer":
        return add_layer_norm(y, x, weight, bias, arch.eps, dtype)
    return add_rms_norm(y, x, weight, arch.eps, dtype)


def _type_of_input(p, weight):
    """Type in which a norm hands a step's tokens to a product, the same on every rank."""
    few = p.step.n_tokens <= _FEW and p.model.device.name == "cpu"
    return np.float32 if weight is None or few else weight.dtype


def _sum(a, b):
    """a + b, of which either may be None."""
    return b if a is None else a if b is None else a + b
