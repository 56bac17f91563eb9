"""Takes what the model shows on the way, and cuts it by columns for the files.

Outside, rows are tokens in the order in which a replica computes them. Each rank writes some
columns of all of them, so that a file needs no table of which rows are whose: where a point of the
forward pass leaves tokens cut over ranks, one Alltoall per step makes columns cut of them. What the
ranks of tp hold alike, each of them writes a part of.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hpcinfer import array, partition
from hpcinfer.engine.activations.selection import Selection
from hpcinfer.engine.activations.sink import Sink
from hpcinfer.io.parts import ColumnShare, Field
from hpcinfer.model.step import Step, part_order
from hpcinfer.model.token_owners import At, holders
from hpcinfer.parallel.ulysses import to_heads
from hpcinfer.parallel.vocabulary import rows_at_a_time

if TYPE_CHECKING:
    from hpcinfer.model.forward import Model


@dataclass
class Spread:
    """How the columns of a dataset are spread over ranks, along its first axis.

    Attributes
    ----------
    share : ColumnShare, the own columns
    held : (start, stop) among the columns at hand on this rank, those of which it answers for
        together with other ranks
    over_cp, over_all : (start, stop) of every rank of cp, and of tp x cp, among the columns at hand
    """

    share: ColumnShare
    held: slice
    over_cp: list[tuple[int, int]]
    over_all: list[tuple[int, int]] | None = None


def spreads_of(model: Model, fields: Iterable[Field]) -> dict[str, Spread]:
    """Spread of every dataset that this rank has a part in, by its name."""
    # Take what this stage of the pipeline computes.
    layers, last = model.layers, model.arch.N if model.pipeline.is_last else None
    spreads = {}
    for spec in fields:
        point, _, n = spec.name.partition("/")
        if point == "logits" and last is not None:
            share = ColumnShare(spec, *model.head_range)
            spreads[spec.name] = Spread(share, slice(None), [])
        elif point != "logits" and (int(n) in layers or int(n) == last):
            spreads[spec.name] = _spread(model, spec, point)
    return spreads


def _spread(model: Model, spec: Field, point: str) -> Spread:
    """Spread of one dataset of a layer."""
    # Find the columns that this rank of tp answers for: heads of its own, or columns of all.
    tp, cp, heads = model.grid.tp, model.grid.cp, model.heads
    if point in ("q", "lse"):
        held, first = slice(None), heads.query[0]
        n = heads.n_query
    elif point in ("k", "v") and spec.labels[0] == "heads":
        # A head that several ranks have is written by the first of them.
        start, stop = model.attention.first_kv
        held, first, n = slice(start, stop), heads.kv[0] + start, max(0, stop - start)
    else:
        ranges = partition.block(spec.shape[0], tp.size * cp.size)
        of_cp = ranges[tp.rank * cp.size : (tp.rank + 1) * cp.size]
        return Spread(ColumnShare(spec, *of_cp[cp.rank]), slice(None), of_cp, ranges)

    # Deal them to the ranks of cp, which all have them of some tokens.
    of_cp = partition.block(n, cp.size)
    own = of_cp[cp.rank]
    return Spread(ColumnShare(spec, first + own[0], first + own[1]), held, of_cp)


class Tap:
    """Takes what a model shows, and hands every rank's columns on in the order of the texts.

    Parameters
    ----------
    model : Model
    selection : Selection
    spreads : Spread of every dataset that this rank has a part in, by its name
    sink : where the rows go
    """

    def __init__(self, model: Model, selection: Selection, spreads: dict[str, Spread], sink: Sink):
        self._model, self._spreads, self._sink = model, spreads, sink
        self._pool, self._sums, self._tokens = selection.pool, {}, (None, None)
        self._points = {name.partition("/")[0] for name in spreads}

    def wants(self, point: str) -> bool:
        """True if a point is wanted in any layer."""
        return point in self._points

    def take(self, point: str, n: int, x: np.ndarray, step: Step, at: At) -> None:
        """Take what the model shows; see `Pass.show`."""
        if not step.n_tokens:
            return
        if point == "final":
            self._take(f"residual/{n}", x, step, at)
            self._take_logits(x, step)
        elif point == "router":
            self._take(f"router/{n}", x[0], step, at)
            self._take(f"experts/{n}", x[1], step, at)
        else:
            self._take(f"{point}/{n}", x, step, at)

    def _take(self, name: str, x: np.ndarray, step: Step, at: At) -> None:
        """Take the activations of some tokens: (T/P, columns, ...)."""
        spread = self._spreads.get(name)
        if spread is None:
            return
        if self._pool != "mean":
            x = _rounded(x, spread.share.field)
        if x.ndim > 1 + len(spread.share.field.shape):  # a key that all heads share
            x = x[:, 0]
        own = self._own_columns(x[:, spread.held], spread, step, at)
        self._put(name, self._pooled(name, own, step))

    def _take_logits(self, hidden: np.ndarray, step: Step) -> None:
        """Scores of the own part of the vocabulary, a bounded number of rows at a time."""
        spread = self._spreads.get("logits")
        if spread is None:
            return
        xp = array.namespace(hidden)
        hidden = self._pooled("logits", hidden[xp.asarray(self._wanted(step))], step)
        block = rows_at_a_time(self._model.arch.V, self._model.grid.tp_cp.size)
        for start in range(0, len(hidden), block):
            self._put("logits", self._model.logits(hidden[start : start + block]))

    def _own_columns(self, x: np.ndarray, spread: Spread, step: Step, at: At) -> np.ndarray:
        """The own columns of all wanted tokens, texts in the order in which they came.

        (T/P, columns at hand, ...) -> (wanted, own columns, ...)
        """
        # Where every rank has all tokens, each takes its columns.
        grid, xp, wanted = self._model.grid, array.namespace(x), self._wanted(step)
        comm, held, owner = holders(step, at, grid)
        if comm is None:
            ranges = spread.over_all or spread.over_cp
            rank = grid.tp_cp.rank if spread.over_all else grid.cp.rank
            return x[xp.asarray(wanted)][:, slice(*ranges[rank])]

        # Where they are dealt out, send every rank its columns of the own tokens.
        ranges = spread.over_all if comm is grid.tp_cp else spread.over_cp
        tokens = np.sort(wanted)
        owner = owner[tokens]
        mine = np.searchsorted(held, tokens[owner == comm.rank])
        counts = np.bincount(owner, minlength=comm.size).tolist()
        sent = x[xp.asarray(mine)]
        sent = sent if x.ndim == 3 else sent[..., None]

        # Put what has come in the order of the texts.
        received = to_heads(comm, sent, counts, ranges, purpose="extract")
        received = received if x.ndim == 3 else received[..., 0]
        return received[xp.asarray(part_order(owner)[np.searchsorted(tokens, wanted)])]

    def _wanted(self, step: Step) -> np.ndarray:
        """Tokens of a step that are wanted, texts in the order in which they came: (n,) int64."""
        if self._tokens[0] is not step:
            number = step.numbers[step.tokens[:, 0]]
            tokens = np.argsort(number, kind="stable")
            if self._pool == "last":
                ends = step.lengths[step.tokens[:, 0]] - 1 == step.positions
                tokens = tokens[(ends & step.complete[step.tokens[:, 0]])[tokens]]
            self._tokens = step, tokens
        return self._tokens[1]

    def _pooled(self, name: str, x: np.ndarray, step: Step) -> np.ndarray:
        """Rows of the wanted tokens, or the means of the texts that are complete."""
        if self._pool != "mean":
            return x
        means = []
        for b in np.argsort(step.numbers, kind="stable"):
            # Add the tokens of this step to those of the steps before.
            of_text = step.tokens[self._wanted(step), 0] == b
            key, total = (name, int(step.numbers[b])), 0.0
            if step.positions[step.tokens[:, 0] == b][0] > 0:
                total = self._sums.pop(key)
            total = total + x[of_text].sum(axis=0, dtype=np.float64)

            # Give out the mean with the last of them.
            if step.complete[b]:
                means.append(total / int(step.lengths[b]))
            else:
                self._sums[key] = total
        xp = array.namespace(x)
        return xp.stack(means).astype(np.float32) if means else x[:0]

    def _put(self, name: str, rows: np.ndarray) -> None:
        """Hand own columns on, rounded to the type in which they are stored."""
        field = self._spreads[name].share.field
        if rows.size:
            self._sink.append(name, array.host(_rounded(rows, field)))


def _rounded(x: np.ndarray, field: Field) -> np.ndarray:
    """`x` in the element type of a field.

    Raises
    ------
    ValueError
        If a value is too large for it.
    """
    if x.dtype == field.dtype or field.dtype != np.float16:
        return array.narrow(x, field.dtype)

    # Refuse what becomes infinite.
    xp = array.namespace(x)
    with np.errstate(over="ignore"):
        rounded = array.narrow(x, field.dtype)
    if bool(xp.isinf(rounded).any()):
        raise ValueError(
            f"extract: got {float(abs(x).max()):.3g} in {field.name}, need at most 65504 for "
            "float16; use --store bfloat16 or float32"
        )
    return rounded
