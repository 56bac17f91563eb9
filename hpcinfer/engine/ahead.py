"""The next step, built while the device computes: the one in which the same sequences go on.

As a rule every sequence of a step has one more token in the next one. Its positions, pages and
tables are known before the token is: they are made while the host would wait for the device. When
the scheduler then plans another step, what was made is thrown away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpcinfer.engine.block_manager import pages_for
from hpcinfer.engine.sequence import Sequence
from hpcinfer.engine.task import Plan
from hpcinfer.model.step import Step

if TYPE_CHECKING:
    from hpcinfer.engine.api import Engine


class Ahead:
    """The step that is likely to come next.

    Parameters
    ----------
    engine : Engine
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._plan: Plan = []
        self._step: Step | None = None

    @property
    def serves(self) -> bool:
        """True where a device computes beside the host, and no other rank is waited for."""
        model = self._engine.model
        alone = self._engine.depth == self._engine.width == 1 and not self._engine.grid.role
        return alone and model.device.name != "cpu"

    def prepare(self) -> None:
        """Build the step in which all sequences that run have one more token."""
        # Leave it where a sequence may end.
        running = self._engine.scheduler.running
        self._plan = []
        if not running or not all(map(self._goes_on, running)):
            return

        # A token stands in for the one to come while the step is built.
        plan = [(sequence, 1) for sequence in running]
        for sequence, _ in plan:
            sequence.tokens.append(0)
        try:
            self._step = self._engine.build_step(plan)
        finally:
            for sequence, _ in plan:
                sequence.tokens.pop()
                sequence.computed = sequence.target
        self._engine.model.prepare(self._step)
        self._plan = plan

    def step(self, plan: Plan) -> Step:
        """The step of a plan, from what has been prepared if it is that."""
        # Build what was not foreseen.
        same = len(plan) == len(self._plan) and all(
            a is b and m == n for (a, m), (b, n) in zip(plan, self._plan, strict=True)
        )
        if not (plan and same) or self._step is None:
            return self._engine.build_step(plan)

        # Put the tokens in that were not known.
        for i, (sequence, n) in enumerate(plan):
            self._step.token_ids[i] = sequence.tokens[-1]
            sequence.computed += n
        return self._step

    def _goes_on(self, sequence: Sequence) -> bool:
        """True if nothing is known that ends a sequence, and its pages have room for a token."""
        return (
            sequence.computed == sequence.target
            and not sequence.wants_all_hidden
            and sequence.n_new + 1 < sequence.request.sampling.max_tokens
            and pages_for(sequence.computed + 1) <= len(sequence.pages)
        )
