"""Every strategy on random data, held to the answer of one rank and to its own cost formula.

A strategy joins the table by one function in the file of its section of the theory, and a `Case` in
that file's ROWS. The function puts random numbers on the rank's device, computes this rank's result
by the strategy there and by the definition on the host, and evaluates the formula of the strategy's
docstring in the letters; what was sent is read from the ledger.
"""

from hpcinfer.verify import attention, layers, linear
from hpcinfer.verify.row import HEADINGS, Case, Outcome, Trial, run

__all__ = ["HEADINGS", "ROWS", "Outcome", "Case", "Trial", "run"]

ROWS = [*linear.ROWS, *layers.ROWS, *attention.ROWS]
