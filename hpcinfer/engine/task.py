"""What the loop of steps does with requests: generating, scoring and extracting.

Arrays that come from the model are NumPy's or CuPy's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from hpcinfer.engine.sequence import Sequence
from hpcinfer.requests.request import BadRequest, Extracted, Request, Result, Score

Outcome = Result | Score | Extracted | BadRequest

# What takes the outcome of a request; called on every rank of its replica.
Deliver = Callable[[Outcome], None]

# A planned step: sequences, with the number of tokens to compute of each.
Plan = list[tuple[Sequence, int]]


class Task(Protocol):
    """What `engine.loop.run` does with the requests of a run; `GenerateTask` and its like.

    Of every step `expect` says what is to be found, when the step is planned; `find` finds it, when
    it is computed; and `use` draws the consequences, in a pipeline some rounds later. All ranks of
    a replica do the same, but only those of the last stage have hidden states to find it in: the
    others are told.
    """

    def tokens_of(self, request: Request) -> int:
        """Tokens that the cache must be able to hold for a request."""

    def sequences_of(self, request: Request, deliver: Deliver) -> list[Sequence]:
        """Sequences to compute for a request, which is delivered at once if there are none."""

    def expect(self, plan: Plan) -> Any:
        """What to find for a step, whose sequences count as computed so far."""

    def find(self, expected: Any, hidden: np.ndarray) -> Any:
        """Find it: (wanted tokens, D) after the final norm -> what `use` takes, picklable."""

    def use(self, expected: Any, found: Any, deliver: Deliver) -> None:
        """Give the sequences what was found; end those that are done, and deliver their requests.

        Parameters
        ----------
        expected : what `expect` said of the step
        found : what `find` returned for it
        deliver : see `Deliver`
        """
