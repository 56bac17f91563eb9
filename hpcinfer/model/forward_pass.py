"""One micro-batch's way through a rank's layers: what its functions are handed in one object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hpcinfer import array, collectives
from hpcinfer.array import Array
from hpcinfer.model.cut import Cut
from hpcinfer.model.layer import add_norm, norm
from hpcinfer.model.step import Step, part_order
from hpcinfer.model.token_owners import At, holders
from hpcinfer.model.weights.parameters import Layer
from hpcinfer.ops.embed import embed
from hpcinfer.parallel import vocabulary

if TYPE_CHECKING:
    from hpcinfer.model.forward import Model


@dataclass(frozen=True, eq=False)
class Pass:
    """One micro-batch on its way through the layers of this rank's stage.

    Attributes
    ----------
    model : Model
    step : Step, the tokens
    cut : Cut, how the work outside attention is divided among the ranks of cp and tp
    rotation : (cos, sin), each (T/P, dim/2) of all of step.mine, host; None without rope
    """

    model: Model
    step: Step
    cut: Cut
    rotation: tuple[np.ndarray, np.ndarray] | None

    def layer(self, n: int) -> Layer:
        """This rank's parameters of layer n."""
        return self.cut.layer(n)

    def wants(self, point: str) -> bool:
        """True if someone wants to see what is computed at a point."""
        return self.model.tap is not None and self.model.tap.wants(point)

    def show(self, point: str, n: int, x: object, at: At) -> None:
        """Show what was computed at a point of layer n to whoever wants to see it.

        Parameters
        ----------
        point : "residual", "attention", "ffn", "q", "k", "v", "lse", "router" or "final"
        x : (tokens, ...) array, or the pair (logits, ids) of a router
        at : which tokens this rank has, as `holders` knows them
        """
        if self.model.tap is not None:
            self.model.tap.take(point, n, x, self.step, at)

    def begin(self) -> Array:
        """The embedding on the first stage, a buffer for what arrives on others: (T/P, D)."""
        model, step, counts = self.model, self.step, self.cut.counts
        n = len(step.mine) if counts is None else counts[model.grid.tp.rank]
        if not model.pipeline.is_first:
            return model.device.empty((n, model.arch.D), np.float32)

        # Look up the tokens, and keep those that are this rank's between the halves.
        embedding, positions = model.weights.embedding()
        all_mine = len(step.mine) == step.n_tokens
        token_ids = step.token_ids if all_mine else step.token_ids[step.mine]
        x = vocabulary.embed(model.grid.tp, token_ids, embedding, model.embed_range[0], counts)
        if not model.arch.learned_positions:
            return x

        # Add the learned embedding of each one's position.
        of_mine = step.positions if all_mine else step.positions[step.mine]
        start = 0 if counts is None else sum(counts[: model.grid.tp.rank])
        return x + embed(positions, of_mine[start : start + n], 0)

    def end(self, x: Array, y: Array | None) -> Array:
        """Final norm of x + y, of all tokens, in the type of operands: (T, D) -> (T, D).

        y may be None, for nothing to add.
        """
        model, w = self.model, self.model.weights
        self._fetch_head()
        bias, dtype = w.final_norm_bias, model.operand_type
        return add_norm(model.arch, x, y, w.final_norm, bias, dtype)[1]

    def hidden(self, x: Array) -> Array:
        """Final norm of the wanted tokens: (T/P, D) -> (R, D) on every rank."""
        arch, w = self.model.arch, self.model.weights
        self._fetch_head()
        hidden = norm(arch, self._wanted(x), w.final_norm, w.final_norm_bias)
        self.show("final", arch.N, hidden, At.WANTED)
        return hidden

    def _fetch_head(self):
        """Have the head ready: who fetches it together may not all need it in this step."""
        self.model.weights.output()

    def _wanted(self, x):
        """Hidden states of the wanted tokens on every rank: (T/P, D) -> (R, D)."""
        xp, step = array.namespace(x), self.step
        comm, held, owner = holders(step, At.HOME, self.model.grid)
        if comm is None or comm.size == 1:
            return x if step.all_wanted else x[xp.asarray(step.wanted)]

        # Put together what each rank has of them, and bring it in order.
        owner = owner[step.wanted]
        own = np.searchsorted(held, step.wanted[owner == comm.rank])
        counts = np.bincount(owner, minlength=comm.size).tolist()
        rows = collectives.Allgather(comm, x[xp.asarray(own)], counts, purpose="wanted")
        return rows[xp.asarray(part_order(owner))]
