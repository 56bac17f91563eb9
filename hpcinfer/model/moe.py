"""The FFN half of a layer that is a mixture of experts: choose, compute, add up.

    before   x (T, D) on every rank; of each own expert, and of the shared experts, own columns
    after    (T, D){sum}: the Allreduce that completes a dense FFN completes this one
    source   Shazeer 2017 (arXiv:1701.06538); shared experts, Dai 2024 (arXiv:2401.06066)

Every rank scores all tokens with the whole router, so all make the same choices without a message.
The scores are float32: rounded ones would choose other experts where two are near.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from hpcinfer import array
from hpcinfer.array import Array
from hpcinfer.model.token_owners import At
from hpcinfer.model.weights.expert_placement import expert_shares
from hpcinfer.ops.activation import sigmoid
from hpcinfer.ops.experts import experts_ffn
from hpcinfer.ops.inplace import add_into
from hpcinfer.ops.linear import linear, linear_pair
from hpcinfer.ops.route import route
from hpcinfer.parallel import expert

if TYPE_CHECKING:
    from hpcinfer.model.cut import Cut
    from hpcinfer.model.forward_pass import Pass
    from hpcinfer.model.weights.parameters import Layer


def mixture_sum(p: Pass, n: int, w: Layer, x: Array) -> Array:
    """This rank's share of the FFN half, routed experts and shared ones: (T, D) -> (T, D){sum}."""
    ids, weights = _routed_choices(p, n, w, x, At.MINE)
    p.model.expert_load.add(n, ids[p.cut.rows(len(x))])
    y = routed_sum(p.cut, w, x, ids, weights)
    return y if w.shared_up is None else add_into(y, shared_sum(p.cut, w, x))


def routed_sum(cut: Cut, w: Layer, x: Array, ids: Array, weights: Array) -> Array:
    """This rank's share of the experts that tokens chose.

    Parameters
    ----------
    x : (T, D) float32
    ids, weights : (T, k) int, float32: experts that each token chose, and their weights

    Returns
    -------
    (T, D) float32, {sum}
    """
    up, down = w.experts_up, w.experts_down
    return experts_ffn(x, ids, weights, up, down, cut.first_expert, cut.experts_between)


def shared_sum(cut: Cut, w: Layer, x: Array) -> Array:
    """This rank's share of the experts that every token takes: (T, D) -> (T, D){sum}."""
    y = linear_pair(x, w.shared_up, cut.shared_between, w.shared_down)
    if w.shared_gate is None:
        return y
    return y * sigmoid(linear(x, w.shared_gate))


def spread_experts(p: Pass, n: int, w: Layer, x: Array) -> Array:
    """Routed experts that are spread over ranks, to which tokens travel.

    Parameters
    ----------
    x : (T/P, D) float32, tokens for which this rank answers alone

    Returns
    -------
    (T/P, D) float32
    """
    model = p.model
    ids, weights = _routed_choices(p, n, w, x, At.OWN)
    model.expert_load.add(n, ids)
    shares, compute = expert_shares(model.arch, model.grid), partial(routed_sum, p.cut, w)
    return expert.experts(model.grid.experts, x, ids, weights, shares, compute, model.dtype)


def choices_to_send(p: Pass, n: int, w: Layer, x: Array) -> tuple[Array, Array, bool]:
    """What the FFN ranks must know of each token to compute it.

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
    arch, xp = p.model.arch, array.namespace(x)
    ones = xp.ones((len(x), 1), np.float32)
    if not arch.sparse[n]:
        return xp.zeros((len(x), 1), np.int32), ones, False
    ids, weights = _routed_choices(p, n, w, x, At.OWN)
    p.model.expert_load.add(n, ids)
    if not arch.shared_F:
        return ids, weights, False

    # Put the shared experts behind the routed ones.
    shared = xp.full((len(x), 1), arch.E, ids.dtype)
    gate = ones if w.shared_gate is None else sigmoid(linear(x, w.shared_gate))
    return xp.concatenate([ids, shared], 1), xp.concatenate([weights, gate], 1), True


def _routed_choices(p, n, w, x, at):
    """Experts that tokens (T, D) take: ids (T, k) int32, weights (T, k) float32."""
    logits = linear(x, w.router)
    ids, weights = route(logits, p.model.arch.router, w.router_bias)
    p.show("router", n, (logits, ids), at)
    return ids, weights
