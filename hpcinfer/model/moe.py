"""The FFN half of a layer that is a mixture of experts: choose, compute, add up.

    before   x (T, D) on every rank; of each own expert, and of the shared experts, own columns
    after    (T, D){sum}: the Allreduce that completes a dense FFN completes this one
    source   Shazeer 2017 (arXiv:1701.06538); shared experts, Dai 2024 (arXiv:2401.06066)

Every rank scores all tokens with the whole router, so all make the same choices without a message.
The scores are float32: rounded ones would choose other experts where two are near.
"""

from hpcinfer import array
from hpcinfer.ops.experts import experts_ffn
from hpcinfer.ops.linear import linear
from hpcinfer.ops.route import route


def routed_choices(arch, w, x):
    """Experts that the tokens take.

    Parameters
    ----------
    w : Layer
    x : (T, D) float32

    Returns
    -------
    ids : (T, k) int32
    weights : (T, k) float32
    """
    return route(arch.router, linear(x, w.router), w.router_bias)


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
        x, ids, weights, w.experts_up, w.experts_down, cut.first_expert, cut.experts_middle
    )
    return y if w.shared_up is None else y + shared_sum(cut, w, x)


def shared_sum(cut, w, x):
    """This rank's share of the experts that every token takes: (T, D) -> (T, D){sum}."""
    y = linear(cut.shared_middle(linear(x, w.shared_up)), w.shared_down)
    if w.shared_gate is None:
        return y
    xp = array.namespace(x)
    return y / (1 + xp.exp(-linear(x, w.shared_gate)))
