"""The ranks of a session of tests: verdicts that they exchange, stacks, and the end of a job."""

import faulthandler
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from mpi4py import MPI

from helpers.speed import scaled
from hpcinfer import launcher

STAGGER_S = 2.0  # between the times at which ranks end a job that hangs: one of them does it
STUCK_S = 5.0  # how long a test that was told to stop may take to do so, on one rank
BACKSTOP_S = 20.0  # after that the process is ended without Python


@dataclass(frozen=True)
class Verdict:
    """How one phase of one test went on one rank."""

    test: str
    phase: str
    outcome: str
    message: str = ""


class Ranks:
    """The ranks of this session, able to exchange verdicts and to end the job in words.

    Attributes
    ----------
    comm : communicator of the verdicts alone, so that no message of a test can be taken for one
    stderr : the terminal or log behind pytest's capture
    """

    def __init__(self):
        self.comm = MPI.COMM_WORLD.Dup()
        self.stderr = os.fdopen(os.dup(2), "w")
        self._stacks = tempfile.TemporaryFile("w+")
        faulthandler.register(signal.SIGUSR2, self._stacks, all_threads=True)
        own = socket.gethostname(), os.getpid(), self._stacks.fileno()
        self._processes = self.comm.allgather(own)
        self._timer = None

    def exchange(self, verdict, grace_s=float("inf")):
        """Return the verdicts by rank: of all ranks, or of those that arrived within `grace_s`."""
        comm, start_s = self.comm, time.monotonic()
        sends = [comm.isend(verdict, rank) for rank in range(comm.size) if rank != comm.rank]
        verdicts = {comm.rank: verdict}
        while len(verdicts) < comm.size:
            for rank in range(comm.size):
                if rank not in verdicts and comm.iprobe(rank):
                    verdicts[rank] = comm.recv(source=rank)
            waited_s = time.monotonic() - start_s
            if waited_s > grace_s:
                return verdicts
            time.sleep(0 if waited_s < 0.01 else 0.002)
        MPI.Request.waitall(sends)
        return verdicts

    def stacks(self):
        """Where every thread of every rank is, as text; of those on this host."""
        here = [p for p in enumerate(self._processes) if p[1][0] == socket.gethostname()]
        for _, (_, process, _) in here:
            os.kill(process, signal.SIGUSR2)
        time.sleep(1.0)
        found = []
        for rank, (_, process, file) in here:
            text = Path(f"/proc/{process}/fd/{file}").read_text()
            found.append(
                f"---- stacks of rank {rank}\n{text.rstrip() or 'none: it did not answer'}"
            )
        return "\n".join(found)

    def watch(self, limit_s, give_up):
        """Call `give_up` in a thread if a test hangs, which no signal may reach.

        Ranks do so one after the other, if the one before could not. A process in which no thread
        gets on is ended.
        """
        own_s = self.comm.rank * STAGGER_S if self.comm.size > 1 else scaled(STUCK_S)
        self._timer = threading.Timer(limit_s + own_s, give_up)
        self._timer.daemon = True
        self._timer.start()
        last_s = limit_s + self.comm.size * STAGGER_S + scaled(BACKSTOP_S)
        faulthandler.dump_traceback_later(last_s, exit=True, file=self.stderr)

    def unwatch(self):
        """The test has ended."""
        faulthandler.cancel_dump_traceback_later()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def end(self, text):
        """Print `text` and end the job on every rank; any thread may call this."""
        print(text, file=self.stderr, flush=True)
        sys.stdout.flush()
        launcher.abort(1)
