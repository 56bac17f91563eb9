"""The FFN half of a layer that is a mixture of experts: choose, compute, add up.

    before   x (T, D) on every rank; of each own expert, and of the shared experts, own columns
    after    (T, D){sum}: the Allreduce that completes a dense FFN completes this one
    source   Shazeer 2017 (arXiv:1701.06538); shared experts, Dai 2024 (arXiv:2401.06066)

Every rank scores all tokens with the whole router, so all make the same choices without a message.
The scores are float32: rounded ones would choose other experts where two are near.
"""

import numpy as np

from hpcinfer import array
from hpcinfer.model.weights.expert_placement import expert_shares
from hpcinfer.ops.activation import sigmoid
from hpcinfer.ops.experts import experts_ffn
from hpcinfer.ops.inplace import add_into
from hpcinfer.ops.linear import linear, linear_pair
from hpcinfer.ops.route import route
from hpcinfer.parallel import expert


def routed_choices(model, n, w, x, step, rows):
    """Experts that the tokens take.

    Parameters
    ----------
    w : Layer
    x : (T, D) float32
    rows : which tokens of the step these are, as `step.holders` says

    Returns
    -------
    ids : (T, k) int32
    weights : (T, k) float32
    """
    logits = linear(x, w.router)
    ids, weights = route(logits, model.arch.router, w.router_bias)
    model.show("router", n, (logits, ids), step, rows)
    return ids, weights


def moe_sum(cut, w, x, ids, weights):
    """This rank's share of the FFN half: routed experts and shared ones.

    Parameters
    ----------
    cut : Cut
    w : Layer
    x : (T, D) float32
    ids, weights : (T, k), as `routed_choices` returns them

    Returns
    -------
    (T, D) float32, {sum}
    """
    y = experts_ffn(
        x, ids, weights, w.experts_up, w.experts_down, cut.first_expert, cut.experts_between
    )
    return y if w.shared_up is None else add_into(y, shared_sum(cut, w, x))


def shared_sum(cut, w, x):
    """This rank's share of the experts that every token takes: (T, D) -> (T, D){sum}."""
    y = linear_pair(x, w.shared_up, cut.shared_between, w.shared_down)
    if w.shared_gate is None:
        return y
    return y * sigmoid(linear(x, w.shared_gate))


def spread_experts(model, n, cut, w, x, step):
    """Routed experts that are spread over ranks, to which tokens travel.

    Parameters
    ----------
    n : number of the layer
    x : (T/P, D) float32, tokens for which this rank answers alone

    Returns
    -------
    (T/P, D) float32
    """
    arch = model.arch
    ids, weights = routed_choices(model, n, w, x, step, "own")
    model.count_choices(n, ids)

    def compute(x, ids, weights):
        up, down = w.experts_up, w.experts_down
        return experts_ffn(x, ids, weights, up, down, cut.first_expert, cut.experts_between)

    shares = expert_shares(arch, model.grid)
    return expert.experts(model.grid.experts, x, ids, weights, shares, compute, model.dtype)


def choices_to_send(model, n, w, x, step):
    """What the FFN side must know of each token to compute it.

    A dense FFN is one expert that all tokens choose. The shared experts are one more choice of all
    tokens, whose weight is their gate.

    Parameters
    ----------
    x : (T/P, D) float32

    Returns
    -------
    ids : (T/P, k) int32
    weights : (T/P, k) float32
    common : True if the last choice is the shared experts
    """
    arch, xp = model.arch, array.namespace(x)
    if not arch.sparse[n]:
        return xp.zeros((len(x), 1), np.int32), xp.ones((len(x), 1), np.float32), False
    ids, weights = routed_choices(model, n, w, x, step, "own")
    model.count_choices(n, ids)
    if not arch.shared_F:
        return ids, weights, False
    shared = xp.full((len(x), 1), arch.E, ids.dtype)
    gate = xp.ones((len(x), 1), np.float32)
    if w.shared_gate is not None:
        gate = sigmoid(linear(x, w.shared_gate))
    return xp.concatenate([ids, shared], 1), xp.concatenate([weights, gate], 1), True
