"""The router of a mixture of experts: which experts see a token, and with what weight.

Sources: top-k of a softmax, Shazeer 2017 (arXiv:1701.06538) and Fedus 2021 (arXiv:2101.03961);
groups of experts, DeepSeek-AI 2024, section 2.2.2 (arXiv:2405.04434); sigmoid scores with a
correction that decides the choice but not the weight, DeepSeek-AI 2024, section 2.1.2
(arXiv:2412.19437).
"""

from dataclasses import dataclass

from hpcinfer import array
from hpcinfer.ops.activation import sigmoid
from hpcinfer.ops.dispatch import dispatch


@dataclass(frozen=True)
class Router:
    """How a family chooses experts.

    Attributes
    ----------
    k : experts per token
    score : "softmax" over the experts, or "sigmoid" of each
    normalise : True if the weights of a token's choices are made to add up to 1
    scale : factor on the weights, after that
    groups : groups of equal size into which the experts fall, 1 for no groups
    top_groups : groups among which a token's experts are chosen
    group_score : "max", or "top2" for the sum of a group's two largest scores
    corrected : True if a bias per expert is added to the scores that decide the choice
    """

    k: int
    score: str = "softmax"
    normalise: bool = False
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    corrected: bool = False


@dispatch
def route(logits, router, bias=None):
    """Experts of every token, the best first, and their weights; of equal scores the lowest number.

    Parameters
    ----------
    logits : (T, E) float32
    router : Router
    bias : (E,) float32, the correction of the scores, or None

    Returns
    -------
    ids : (T, k) int32
    weights : (T, k) float32
    """
    xp = array.namespace(logits)
    scores = _SCORES[router.score](logits)
    choice = scores if bias is None else scores + bias
    if router.groups > 1:
        choice = _within_best_groups(router, choice)
    ids = _largest(choice, router.k)
    weights = xp.take_along_axis(scores, ids, axis=1)
    if router.normalise:
        weights = weights / (weights.sum(axis=1, keepdims=True) + xp.float32(1e-20))
    return ids.astype(xp.int32), weights * xp.float32(router.scale)


def _softmax(logits):
    xp = array.namespace(logits)
    numerators = xp.exp(logits - logits.max(axis=1, keepdims=True))
    return numerators / numerators.sum(axis=1, keepdims=True)


_SCORES = {"softmax": _softmax, "sigmoid": sigmoid}


def _within_best_groups(router, choice):
    """The scores (T, E) with -inf outside the best groups of each token."""
    xp = array.namespace(choice)
    T, E = choice.shape
    grouped = choice.reshape(T, router.groups, E // router.groups)
    if router.group_score == "top2":
        of_groups = xp.sort(grouped, axis=2)[:, :, -2:].sum(axis=2)
    else:
        of_groups = grouped.max(axis=2)
    best = _largest(of_groups, router.top_groups)
    chosen = (best[:, :, None] == xp.arange(router.groups)).any(axis=1)
    return xp.where(chosen[:, :, None], grouped, xp.float32(-xp.inf)).reshape(T, E)


def _largest(scores, k):
    """Numbers (T, k) of the largest scores of every row, descending."""
    return array.namespace(scores).argsort(-scores, axis=1, kind="stable")[:, :k]


@dispatch
def count_into(counts, ids):
    """Add to counts how many tokens chose each expert.

    Parameters
    ----------
    counts : (E,) int64
    ids : (T, k) integers, where the counts are; below 0 for no choice

    Returns
    -------
    counts
    """
    xp, E = array.namespace(counts), len(counts)
    chosen = ids.reshape(-1)
    counts += xp.bincount(xp.where(chosen < 0, E, chosen), minlength=E + 1)[:E]
    return counts
