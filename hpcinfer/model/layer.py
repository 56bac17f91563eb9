"""One decoder layer, composed from the rooms and one rank's mathematics.

What a half of a layer finds is added to x by the norm of the next half, in one pass over both: so a
layer is given, beside x, what is still to be added to it, and leaves the like to the next one.
"""

import numpy as np

from hpcinfer import array, collectives
from hpcinfer.model.mla import latent_attention
from hpcinfer.model.moe import moe_sum, routed_choices, shared_sum, spread_experts
from hpcinfer.ops.embed import embed
from hpcinfer.ops.inplace import add_into, copy_into
from hpcinfer.ops.linear import linear_pair
from hpcinfer.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm

# Tokens of a step up to which products on the CPU round what they are given, as they read it.
_FEW = 8


def layer(model, n, x, y, step, cut, rotation):
    """Layer n of a model.

    Parameters
    ----------
    x : (T/P, D) float32, the tokens step.mine, equal on every rank of the tensor axis; with
        sequence parallelism those of them that this rank keeps
    y : as x, still to be added to it, in whose memory the sum will be; None for nothing
    step : Step
    cut : Cut, how the step's work is divided
    rotation : (cos, sin), each (T/P, dim/2) of all of step.mine, host, or None without rope

    Returns
    -------
    x, y : as the arguments
    """
    arch, w = model.arch, cut.layer(n)

    # Both halves read the same input: their partial sums are completed together.
    if arch.parallel_residual:
        x = x if y is None else add_into(y, x)
        model.show("residual", n, x, step, "home")
        if model.wants("attention") or model.wants("ffn"):
            return x, _halves_apart(model, n, x, step, cut, w, rotation)
        attention = _attention(model, n, cut, w, step, rotation)
        ffn = _ffn(model, n, cut, w, step)

        def both(x_all):
            y_sum = attention(norm(arch, x_all, w.norm1, w.norm1_bias))
            return add_into(y_sum, ffn(norm(arch, x_all, w.norm2, w.norm2_bias)))

        return x, cut.complete(x, both, _sum(w.o_bias, w.down_bias), "layer")

    # Attention half, then FFN half.
    x, y = attention_half(model, n, x, y, step, cut, w, rotation)
    model.progress()
    x, y = _ffn_half(model, n, x, y, step, cut, w)
    model.progress()
    return x, y


def attention_half(model, n, x, y, step, cut, w, rotation):
    """x + y, and what attention adds to that: both (T/P, D)."""
    first = w.qkv if model.arch.mla is None else w.latents
    x, normed = add_norm(model, x, y, w.norm1, w.norm1_bias, _type_of_input(model, step, first))
    if not model.arch.parallel_residual:
        model.show("residual", n, x, step, "home")
    attention = _attention(model, n, cut, w, step, rotation)
    y = cut.complete(normed, attention, w.o_bias, "attention")
    model.show("attention", n, y, step, "home")
    return x, y


def _ffn_half(model, n, x, y, step, cut, w):
    """x + y, and what the FFN adds to that: both (T/P, D)."""
    # A router takes what is not rounded.
    first = None if model.arch.sparse[n] else w.up
    x, normed = add_norm(model, x, y, w.norm2, w.norm2_bias, _type_of_input(model, step, first))
    y = _ffn_sum(model, n, normed, step, cut, w)
    model.show("ffn", n, y, step, "home")
    return x, y


def _halves_apart(model, n, x, step, cut, w, rotation):
    """What both halves add to the same input, where someone wants to see each of them."""
    _, y = attention_half(model, n, x, None, step, cut, w, rotation)
    _, of_ffn = _ffn_half(model, n, x, None, step, cut, w)
    return y + of_ffn


def _ffn_sum(model, n, normed, step, cut, w):
    """The complete sum of the FFN half: (T/P, D) -> (T/P, D)."""
    if model.grid.experts is None or not model.arch.sparse[n]:
        return cut.complete(normed, _ffn(model, n, cut, w, step), w.down_bias, "ffn")
    if w.shared_up is None:
        y = spread_experts(model, n, cut, w, cut.own(normed), step)
        return cut.everywhere(y, len(normed))

    # The shared experts' partial sums, with what the routed ones found for the own tokens.
    def both(x_all):
        y_sum, own = shared_sum(cut, w, x_all), cut.rows(len(x_all))
        y_sum[own] += spread_experts(model, n, cut, w, x_all[own], step)
        return y_sum

    return cut.complete(normed, both, None, "ffn")


def norm(arch, x, weight, bias, dtype=np.float32):
    """The family's norm, rounded to a type."""
    if arch.norm == "layer":
        return layer_norm(x, weight, bias, arch.eps, dtype)
    return rms_norm(x, weight, arch.eps, dtype)


def add_norm(model, x, y, weight, bias, dtype=np.float32):
    """x + y, in the memory of y where there is one, and its norm: both (T/P, D)."""
    arch = model.arch
    if y is None:
        return x, norm(arch, x, weight, bias, dtype)
    if arch.norm == "layer":
        return add_layer_norm(y, x, weight, bias, arch.eps, dtype)
    return add_rms_norm(y, x, weight, arch.eps, dtype)


def _type_of_input(model, step, weight):
    """Type in which a norm hands the tokens of a step to a product, the same on every rank."""
    few = step.n_tokens <= _FEW and model.device.name == "cpu"
    return np.float32 if weight is None or few else weight.dtype


def _attention(model, n, cut, w, step, rotation):
    """This rank's share of the attention half of layer n: function (T, D) -> (T, D){sum}."""
    if model.arch.mla is not None:
        return latent_attention(model, n, w, step, rotation)
    arch, heads = model.arch, model.heads

    def attend(qkv):
        qkv, T = cut.whole(qkv), qkv.shape[0]
        qkv = qkv.reshape(T, heads.n_query + 2 * heads.n_kv, arch.K)
        q, k, v = _split(qkv, heads)
        norms = (None, None)
        if arch.qk_norm == "whole":
            q[...], k[...] = _norm_of_all_heads(model, w, q, k)
        elif arch.qk_norm == "head" and arch.clip_qkv is None:
            norms = w.q_norm, w.k_norm
        elif arch.qk_norm == "head":
            copy_into(q, rms_norm(q, w.q_norm, arch.eps))
            copy_into(k, rms_norm(k, w.k_norm, arch.eps))
        if arch.clip_qkv is not None:
            qkv = qkv.clip(-arch.clip_qkv, arch.clip_qkv)

        # Norm and rotate queries and keys, and cache keys and values.
        qk = model.cache.place_heads(n, step, qkv, norms, arch.eps, rotation)
        q, k, _ = _split(qk, heads)
        for point, heads_of_point in (("q", q), ("k", k), ("v", v)):
            model.show(point, n, heads_of_point, step, "mine")
        o = model.attention.attend(n, q, step)
        return o.reshape(T, o.shape[1] * arch.K)

    return lambda x: linear_pair(x, w.qkv, attend, w.o, w.qkv_bias)


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
    for x, weight, n, square in zip(
        (q, k), (w.q_norm, w.k_norm), (arch.H, arch.G), squares, strict=True
    ):
        root = xp.sqrt(square / xp.float32(n * arch.K) + xp.float32(arch.eps))
        results.append(x / root[:, None, None] * weight.reshape(x.shape[1:]))
    return results


def _squares(x):
    """Sum of squares of every token: (T, heads, K) -> (T,)."""
    return (x * x).sum(axis=(1, 2))


def _ffn(model, n, cut, w, step):
    """This rank's share of the FFN half of layer n: function (T, D) -> (T, D){sum}."""
    if not model.arch.sparse[n]:
        return lambda x: linear_pair(x, w.up, cut.between, w.down, w.up_bias)

    def mixture(x):
        ids, weights = routed_choices(model, n, w, x, step, "mine")
        model.count_choices(n, ids[cut.rows(len(x))])
        return moe_sum(cut, w, x, ids, weights)

    return mixture


def _sum(a, b):
    """a + b, of which either may be None."""
    return b if a is None else a if b is None else a + b


def _split(qkv, heads):
    """Queries, keys and values of the rank's heads: views of (T, heads, K)."""
    H, G = heads.n_query, heads.n_kv
    return qkv[:, :H], qkv[:, H : H + G], qkv[:, H + G :]


def add_positions(x, table, positions):
    """x plus the learned embedding of every token's position."""
    return x + embed(table, positions, 0)
