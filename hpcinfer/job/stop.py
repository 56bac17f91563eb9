"""Ending a run before its end: on a signal or at a time limit, in order and within seconds.

A rank that is to stop tells the leaders of all replicas, and each leader tells its replica at the
beginning of the next round. With the same words it says how many tokens a step may have, so that no
step is so long that the end would be late. Where the ranks cannot come to the next round in time (a
model that is being read, a step that takes very long) a thread ends the job. A second SIGINT ends
it at once.
"""

import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress

import numpy as np

from hpcinfer import collectives
from hpcinfer.errors import REQUEUE, SIGNALLED, Stopped, one_line
from hpcinfer.launcher import abort, launcher_rank

_NOT_YET = "before the first step"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_TAG = 12

# Seconds that a step may take, and that an end in order may take before the job is ended without;
# the first rank is the first to lose its patience, as it can save what is under way.
_STEP_S, _ORDER_S, _LOAD_S = 3.0, (7.5, 9.0), (0.2, 1.0)

# Seconds in which another SIGINT is the same one: terminal and launcher may both hand on a Ctrl-C.
_SAME_S = 1.0


class Pace:
    """How many tokens a step may have, so that it takes no longer than it should.

    A step has a fixed cost and one that grows with its tokens; neither is known before.

    Parameters
    ----------
    most : tokens of a step at most
    limit_s : seconds that it may take

    Attributes
    ----------
    tokens : tokens that the next step may have
    """

    _FIRST, _GROWTH = 64, 8

    def __init__(self, most, limit_s=_STEP_S):
        self.most, self.limit_s = most, limit_s
        self.tokens = min(most, self._FIRST)
        self._fixed_s = limit_s

    def step(self, tokens, time_s):
        """Take note of a step of so many tokens."""
        if tokens == 0:
            return
        self._fixed_s = min(self._fixed_s, time_s)
        if time_s > self.limit_s:
            # Fewer tokens help as far as the time grew with them
            growing = (self.limit_s - self._fixed_s) / (time_s - self._fixed_s)
            if growing > 0:
                self.tokens = min(self.tokens, max(1, int(tokens * growing)))
        elif 2 * tokens >= self.tokens:
            growth = min(self.limit_s / max(time_s, 1e-9), self._GROWTH)
            self.tokens = min(self.most, max(self.tokens, int(tokens * growth)))


class Stop:
    """Whether and why this rank must stop; listens from `with` on.

    Parameters
    ----------
    end_s : seconds since 1970 at which to stop, or None; the first rank's counts

    Attributes
    ----------
    reason : why, in words that follow "stopped"; None as long as there is none
    stopping : True once the replica has agreed to stop
    pace : Pace of this rank's steps, which counts on the leader of a replica
    last_resort : function that saves what it can when the job must be ended at once, or None
    """

    def __init__(self, end_s=None):
        self.reason, self.stopping, self.pace, self.last_resort = None, False, None, None
        self._end_s = end_s if launcher_rank() == 0 else None
        self._began, self._told, self._heard = False, False, 0
        self._over = threading.Event()

    def __enter__(self):
        """Listen to signals. A thread does, as the interpreter may be busy for long."""
        self._wake, self._alarm = os.pipe()
        os.set_blocking(self._alarm, False)
        self._wakeup_before = signal.set_wakeup_fd(self._alarm, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, _nothing) for number in SIGNALS}
        self._thread = threading.Thread(target=self._watch, daemon=True, name="stop")
        self._thread.start()
        return self

    def __exit__(self, kind, *details):
        self._over.set()
        signal.set_wakeup_fd(self._wakeup_before)

        # A second signal must not take the exit code of the first.
        if self.reason is None:
            for number, handler in self._before.items():
                signal.signal(number, handler)
        os.write(self._alarm, b"\0")
        self._thread.join()
        os.close(self._alarm)
        os.close(self._wake)

    def tell(self, grid):
        """Tell the leaders of all replicas, once, if this rank must stop."""
        self._began = True
        if self.reason is None or self._told:
            return
        self._told = True
        nothing = np.empty(0, np.uint8)
        for leader in grid.leaders:
            if leader == grid.comm.rank:
                self.stopping = True
            else:
                collectives.Isend(grid.comm, nothing, leader, _TAG, "stop").wait()

    def round(self, grid, scheduler):
        """Agree in the replica on whether to stop and on the tokens of the next steps.

        Collective over the ranks of the replica.

        Returns
        -------
        True to plan nothing more
        """
        self.tell(grid)
        if self.pace is None:
            self.pace = Pace(scheduler.limits.tokens, _STEP_S / grid.layout.pp)
        if grid.is_leader and grid.comm.iprobe(tag=_TAG):
            self._hear(grid)
        words = np.array([self.stopping, self.pace.tokens], np.int64)
        collectives.Bcast(grid.replica, words, purpose="stop")
        self.stopping, scheduler.token_budget = bool(words[0]), int(words[1])
        return self.stopping

    def rescue(self):
        """Save what can be saved when the job must be ended at once; any thread may call this."""
        if self.last_resort is not None:
            self.last_resort()

    def settle(self, grid):
        """Take what is still on its way; every rank must call this when its loop is over."""
        told = grid.comm.allreduce(int(self._told))
        while grid.comm.rank in grid.leaders and self._heard < told - self._told:
            self._hear(grid)

    def _hear(self, grid):
        collectives.RecvBytes(grid.comm, tag=_TAG, purpose="stop")
        self._heard += 1
        self.stopping = True

    def _watch(self):
        """Wait for a reason to stop, and then for the end in order."""
        while self.reason is None:
            wait_s = None if self._end_s is None else max(0.0, self._end_s - time.time())
            ready, _, _ = select.select([self._wake], [], [], wait_s)
            if self._over.is_set():
                return
            if not ready:
                self.reason = "at its time limit"
                continue
            for number in os.read(self._wake, 64):
                if number in SIGNALS:
                    self.reason = f"by {signal.Signals(number).name}"

        # Where nothing is to be saved, as long as the model is read, nothing is worth waiting for.
        since_s, first = time.monotonic(), launcher_rank() == 0
        while not self._over.wait(0.05):
            if self._hears_interrupt() and time.monotonic() - since_s > _SAME_S:
                self._say("killed by a second SIGINT; what OUTPUT.state holds is kept")
                abort(SIGNALLED + signal.SIGINT)
            patience_s = (_ORDER_S if self._began else _LOAD_S)[not first]
            if time.monotonic() - since_s > patience_s:
                self._end_job()

    def _hears_interrupt(self):
        """True if a SIGINT has come since the last look."""
        ready, _, _ = select.select([self._wake], [], [], 0)
        return bool(ready) and signal.SIGINT in os.read(self._wake, 64)

    def _end_job(self):
        """End all ranks at once; on the first one, save what can be saved."""
        line = f"stopped {self.reason} " + ("in a long step" if self._began else _NOT_YET)
        try:
            self.rescue()
        except Exception as error:
            line = f"{line}; {one_line(error)}"
        self._say(f"{line}; run the same command again to go on")
        abort(REQUEUE)

    @staticmethod
    def _say(line):
        """Print a line on standard error from a thread, whatever the main one is at."""
        where = "" if launcher_rank() == 0 else f" (rank {launcher_rank()})"
        with suppress(OSError):
            os.write(sys.__stderr__.fileno(), f"\nhpcinfer{where}: {line}\n".encode())


def stopped(reason, finished, total, under_way):
    """What a run raises that was stopped."""
    return Stopped(
        f"stopped {reason or 'on another rank'} with {finished} of {total} requests finished and "
        f"{under_way} under way; run the same command again to go on"
    )


def _nothing(number, frame):
    """The thread that listens hears of the signal."""
