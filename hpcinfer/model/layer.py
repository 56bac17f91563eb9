"""One decoder layer, composed from the tensor-parallel room and one rank's mathematics."""

from hpcinfer import array, collectives
from hpcinfer.ops.norm import layer_norm, rms_norm
from hpcinfer.ops.rope import rotate
from hpcinfer.parallel import tensor


def layer(model, n, x, step, rotation):
    """Layer n of a model.

    Parameters
    ----------
    x : (T/P, D) float32, the tokens step.mine, equal on every rank of the tensor axis
    step : Step
    rotation : (cos, sin), each (T/P, dim/2), or None without rope

    Returns
    -------
    (T/P, D) float32, equal on every rank of the tensor axis
    """
    cut = model.cut(step)
    w, comm, middle = cut.layers[n], cut.comm, cut.middle
    attend = _attention(model, n, step, rotation)
    normed = norm(model.arch, x, w.norm1, w.norm1_bias)

    # Both halves read the same input: their partial sums share one Allreduce.
    if model.arch.parallel_residual:
        y_sum = tensor.partial_sum(normed, w.qkv, attend, w.o, w.qkv_bias)
        normed = norm(model.arch, x, w.norm2, w.norm2_bias)
        y_sum += tensor.partial_sum(normed, w.up, middle, w.down, w.up_bias)
        y = collectives.Allreduce(comm, y_sum, purpose="layer")
        for bias in (w.o_bias, w.down_bias):
            y = y if bias is None else y + bias
        return x + y

    # Attention half, then FFN half, each with its Allreduce.
    x = x + tensor.half_layer(comm, normed, w.qkv, attend, w.o, w.qkv_bias, w.o_bias, "attention")
    normed = norm(model.arch, x, w.norm2, w.norm2_bias)
    return x + tensor.half_layer(comm, normed, w.up, middle, w.down, w.up_bias, w.down_bias, "ffn")


def norm(arch, x, weight, bias):
    """The family's norm."""
    if arch.norm == "layer":
        return layer_norm(x, weight, bias, arch.eps)
    return rms_norm(x, weight, arch.eps)


def _attention(model, n, step, rotation):
    """What stands between the attention's two products: (T, C/P) -> (T, H K/P) for layer n."""
    arch, heads, w = model.arch, model.heads, model.weights.layers[n]

    def attend(qkv):
        qkv, T = model.cut(step).whole(qkv), qkv.shape[0]
        q, k, v = _split(qkv.reshape(T, heads.n_query + 2 * heads.n_kv, arch.K), heads)
        if arch.qk_norm:
            q, k = rms_norm(q, w.q_norm, arch.eps), rms_norm(k, w.k_norm, arch.eps)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        stored = array.namespace(k).asarray(step.stored)
        model.cache.write(n, step.slots, k[stored], v[stored])
        o = model.context.attend(n, q, step)
        return o.reshape(T, o.shape[1] * arch.K)

    return attend


def _split(qkv, heads):
    """Queries, keys and values of the rank's heads: views of (T, heads, K)."""
    H, G = heads.n_query, heads.n_kv
    return qkv[:, :H], qkv[:, H : H + G], qkv[:, H + G :]


def add_positions(x, table, positions):
    """x plus the learned embedding of every token's position."""
    return x + array.widen(table[array.namespace(x).asarray(positions)])
