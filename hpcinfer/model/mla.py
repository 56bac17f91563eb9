"""The attention half of a layer with latent attention, in the form that never expands its keys.

    before   x (T, D) on every rank; latent products whole, heads cut over tp
    after    (T, D){sum}: the Allreduce that completes multi-head attention completes this one
    source   DeepSeek-AI 2024, section 2.1 (arXiv:2405.04434)

A head's key is W_k · latent beside a rotated key that all heads share, and its value W_v · latent.
So q · (W_k · latent) = (W_kᵀ · q) · latent, and the sum of weights · W_v · latent is W_v · (sum of
weights · latent): attention is that of many query heads over one key/value head, whose key is the
latent with the rotated key behind it, and whose value is the latent. This one key per token is all
that is cached, and all that travels where the cache is cut over ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpcinfer import array
from hpcinfer.array import Array
from hpcinfer.model.token_owners import At
from hpcinfer.ops.linear import linear
from hpcinfer.ops.norm import rms_norm
from hpcinfer.ops.rope import rotate

if TYPE_CHECKING:
    from hpcinfer.model.forward_pass import Pass
    from hpcinfer.model.weights.parameters import Layer


def latent_attention(p: Pass, n: int, w: Layer, x: Array) -> Array:
    """This rank's share of the attention half of layer n: (T, D) -> (T, D){sum}."""
    model, mla, heads = p.model, p.model.arch.mla, p.model.heads.n_query
    xp, T = array.namespace(x), len(x)
    latents = linear(x, w.latents, w.latents_bias)
    q_latent, kv_latent = latents[:, : mla.q_rank], latents[:, mla.q_rank :]

    # Cache the latent and the key that all heads share.
    latent = rms_norm(kv_latent[:, : mla.kv_rank], w.kv_norm, mla.eps)
    k_rotated = _rotated(mla, kv_latent[:, None, mla.kv_rank :], p.rotation)
    k = xp.concatenate([latent[:, None], k_rotated], axis=-1)
    p.show("k", n, k, At.MINE)
    model.cache.write(n, p.step, k, k[..., :0])

    # Bring the queries to where the latents are.
    source = rms_norm(q_latent, w.q_norm, mla.eps) if mla.q_rank else x
    q = linear(source, w.q).reshape(T, heads, mla.plain + mla.rotated)
    of_heads = w.kv.reshape(heads, mla.plain + mla.value, mla.kv_rank)
    q_plain = _by_head(q[..., : mla.plain], of_heads[:, : mla.plain].swapaxes(1, 2))
    q_rotated = _rotated(mla, q[..., mla.plain :], p.rotation)
    q = xp.concatenate([q_plain, q_rotated], axis=-1)
    p.show("q", n, q, At.MINE)
    o_latent = model.attention.attend(p, n, q)

    # Expand the outputs, one value a head and token.
    o = _by_head(o_latent, of_heads[:, mla.plain :])
    return linear(o.reshape(T, heads * mla.value), w.o)


def _rotated(mla, x, rotation):
    """Rotary embedding of columns that may be stored pair by pair: (T, H, rotated)."""
    if mla.interleaved:
        x = array.namespace(x).concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
    return rotate(x, *rotation)


def _by_head(x, weight):
    """Each head's own product: x (T, H, I), weight (H, O, I) -> (T, H, O) float32."""
    x = array.widen(array.narrow(x, weight.dtype)).swapaxes(0, 1)
    return (x @ array.widen(weight).swapaxes(1, 2)).swapaxes(0, 1)
