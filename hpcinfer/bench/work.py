"""Bytes that a step must read and operations that it must compute, at least."""

import numpy as np

from hpcinfer.model.cache import PAGE
from hpcinfer.model.weights.table import in_parts, table


def weight_bytes(model, touched=1.0):
    """Bytes of this rank's weights that a step reads: each once, of the embedding next to nothing.

    Parameters
    ----------
    model : hpcinfer.model.forward.Model, or the FFN side's part of one
    touched : share of the experts that some token of the step has chosen
    """
    if model.grid.layout.zero != "off":
        return _bytes_of_layers(model, touched)
    w, cp = model.weights, 1 if model.grid.role == "ffn" else model.grid.cp.size
    outside = [w.embed, w.positions] + ([w.head] if w.tied_rows is None else [])
    experts = sum(_expert_bytes(layer) for layer in w.layers)
    nbytes = w.nbytes - sum(x.nbytes for x in outside if x is not None) - experts
    head = 0 if w.head is None else w.head.nbytes

    # The ranks of cp hold equal layers, of which each need read a part only; experts may be spread.
    share = 1 if model.grid.experts is not None else 1 / cp
    return head + nbytes / cp + touched * experts * share


def cache_bytes(model, length):
    """Bytes that attention of one token to a sequence of this length reads, on this rank.

    A sliding window bounds what a layer reads; pages are dealt evenly to the ranks that share them.
    """
    if not model.page_bytes:
        return 0.0
    windows = [model.arch.windows[n] if model.arch.windows else None for n in model.layers]
    lengths = [min(length, window or length) for window in windows]
    return model.page_bytes / PAGE * float(np.mean(lengths or [0])) / model.pools


def token_flop(arch):
    """Operations of the matrix products for a token, without the head; and those of the head."""
    flop = 0.0
    for row in table(arch):
        if len(row.shape) == 2 and row.key not in ("embed", "positions", "head"):
            share = 1.0 if row.expert is None else arch.router.k / arch.E
            flop += 2 * share * row.shape[0] * row.shape[1]
    return flop, 2.0 * arch.V * arch.D


def attention_flop(arch, new, length):
    """Operations of attention of the last `new` tokens of a sequence of this length, all layers."""
    mla = arch.mla
    columns = 2 * arch.K if mla is None else mla.plain + mla.rotated + mla.value
    pairs = 0.0
    for n in range(arch.N):
        window = (arch.windows[n] if arch.windows else None) or length
        seen = np.minimum(np.arange(length - new + 1, length + 1), window)
        pairs += float(seen.sum())
    return 2.0 * arch.H * columns * pairs


def touched_share(arch, counts, tokens):
    """Share of the experts that a step of some tokens is expected to choose.

    Parameters
    ----------
    counts : (N, E) how often each was chosen, in steps like this one
    """
    layers = counts[counts.sum(axis=1) > 0] if counts.size else counts
    if not layers.size:
        return 1.0
    chance = arch.router.k * layers / layers.sum(axis=1, keepdims=True)
    return float(np.mean(1 - (1 - np.minimum(chance, 1)) ** tokens))


def _expert_bytes(layer):
    if layer is None:
        return 0
    return sum(x.nbytes for x in (layer.experts_up, layer.experts_down) if x is not None)


def _bytes_of_layers(model, touched):
    """As `weight_bytes`, by the table of weights: what is kept in parts is whole when read."""
    cp, nbytes = model.grid.cp.size, 0.0
    ranges = in_parts(model.ranges, cp)
    first, last = ranges["experts"]
    for row in table(model.arch, cp):
        here = row.layer in model.layers or (row.key == "head" and model.pipeline.is_last)
        if here and (row.expert is None or first <= row.expert < last):
            shape = row.local_shape(ranges)
            share = (1.0 if row.expert is None else touched) * float(np.prod(shape))
            whole = row.key == "head" or (row.expert is not None and model.grid.experts is not None)
            size = model.dtype.itemsize if len(shape) == 2 else 4
            nbytes += size * share * (1 if whole else 1 / cp)
    if model.arch.tied and model.pipeline.is_last:
        nbytes += model.dtype.itemsize * model.arch.D * (ranges["head"][1] - ranges["head"][0])
    return nbytes
