"""Where this rank is: the MPI call that it waits in, and the step and layer that it works on.

Written in passing by whoever makes calls and computes, and read by a thread that tells other ranks
when they miss this one (`hpcinfer.job.watchdog`). Writing costs an assignment.
"""

import time
from contextlib import contextmanager


class Heartbeat:
    """Where one rank is.

    Attributes
    ----------
    call : (verb, axis, purpose, start_s) of the MPI call under way, None outside of calls
    calls : number of calls that have ended
    step : number of the step at work, 0 before the first
    layer : the layer at work, or being read; None before the first
    """

    def __init__(self):
        self.call, self.calls = None, 0
        self.step, self.layer = 0, None


here = Heartbeat()


@contextmanager
def waiting(verb, comm, purpose):
    """Note that the body waits in a call that enters no ledger: one on small Python objects."""
    here.call = verb, comm.Get_name() or "comm", purpose, time.perf_counter()
    try:
        yield
    finally:
        here.call = None
        here.calls += 1
