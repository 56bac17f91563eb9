"""Telling which rank is missing when others wait for it, and ending the job then.

A thread of every rank sees where the rank is (`hpcinfer.heartbeat`) and tells the threads of other
ranks that ask: over UDP, as many an MPI takes no calls from a second thread, and a rank that hangs
in MPI must still answer. Each rank listens on one address, of a network that all nodes are in; on
one node that is the loopback, which nobody outside can reach.

A rank that waits in one call for longer than the limit asks all others. One is missing if it does
not answer, or if it has come to no other layer and no call for as long; or all wait in different
calls. A rank that waits for others who are at work, as at the end of a run, waits on. Where one is
missing, the asking rank prints where all are, with a stack of each group, and ends the job.
"""

import faulthandler
import ipaddress
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress

import psutil

from hpcinfer.errors import FAILED
from hpcinfer.heartbeat import here, waiting
from hpcinfer.launcher import abort

# Seconds that the others are given to answer, and more for each rank; between two questions; and
# from the report to the end of the job, in which the first rank saves what it can.
_PATIENCE_S, _PATIENCE_PER_RANK_S, _AGAIN_S, _END_S = 3.0, 0.005, 0.5, 1.5

# What is sent and shown at most: bytes of a message, frames of a stack, groups of ranks and stacks.
_MESSAGE_BYTES, _FRAMES, _GROUPS, _STACKS = 60_000, 24, 20, 4


class Watchdog:
    """Watches over the ranks of a job from `with` on; its signal SIGUSR2 prints a rank's stacks.

    Parameters
    ----------
    comm : communicator of all ranks; entering is collective over it
    limit_s : seconds in one call after which the others are asked; 0 for never
    last_resort : function called on every rank before the job is ended, or None
    """

    def __init__(self, comm, limit_s, last_resort=None):
        self._comm, self._limit_s, self._last_resort = comm, limit_s, last_resort
        self._tick_s = min(1.0, limit_s / 4)
        self._patience_s = _PATIENCE_S + _PATIENCE_PER_RANK_S * comm.size
        self._over, self._thread = threading.Event(), None
        self._asking, self._reporting, self._ended = False, False, False

    def __enter__(self):
        with suppress(AttributeError, ValueError, OSError):  # where nobody could read the stacks
            faulthandler.register(signal.SIGUSR2, sys.__stderr__, all_threads=True)
        if self._limit_s and self._comm.size > 1:
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            with waiting("allgather", self._comm, "watchdog"):
                of_ranks = self._comm.allgather((socket.gethostname(), _networks()))
                address = common_address(dict(of_ranks), socket.gethostname())
                self._socket.bind((address, 0))
                place = _own_place(address or socket.gethostname(), self._socket.getsockname()[1])
                self._ranks = self._comm.allgather(place)
                self._token = self._comm.bcast(secrets.token_hex(8))
            self._rank, self._main = self._comm.rank, threading.main_thread().ident
            self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
            self._thread.start()
        return self

    def __exit__(self, *details):
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._socket.close()

    def _watch(self):
        """Answer whoever asks, and ask when this rank waits for too long."""
        self._seen, self._since_s, ask_s = None, time.monotonic(), 0.0
        while not self._over.is_set():
            self._listen(time.monotonic() + self._tick_s)
            call = here.call
            late = call is not None and time.perf_counter() - call[-1] > self._limit_s
            if late and not self._ended and time.monotonic() >= ask_s:
                self._asking = True
                self._ask()
                self._asking, ask_s = False, time.monotonic() + self._limit_s / 4

    def _ask(self):
        """Ask all others where they are; report and end the job if one is missing."""
        others = [rank for rank in range(len(self._ranks)) if rank != self._rank]
        places = self._collect("where", others)
        places[self._rank] = self._place()

        # The first of the ranks that ask is the one that reports
        asking = [rank for rank, place in places.items() if place["asking"]]
        reported = any(place["reporting"] for place in places.values())
        if self._ended or self._over.is_set() or reported or min(asking) < self._rank:
            return
        silent = {rank: self._silence(rank) for rank in others if rank not in places}
        idle = {r for r, p in places.items() if p["idle_s"] >= self._limit_s}
        missing = sorted({*silent, *(r for r in idle if places[r]["call"] is None)})
        if missing or len(idle) == len(self._ranks):
            self._reporting = True
            self._report(places, silent, missing)

    def _report(self, places, silent, missing):
        """Print where all ranks are, have the first one save what it can, and end the job."""
        groups = {}
        for rank in sorted({*places, *silent}):
            words = silent[rank] if rank in silent else _words(places[rank])
            groups.setdefault(words, []).append(rank)

        # Show the groups of those who are missing first, with the stack of one of each
        order = sorted(groups.items(), key=lambda item: item[1][0] not in missing)[:_GROUPS]
        speakers = [ranks[0] for _, ranks in order if ranks[0] in places][:_STACKS]
        stacks = self._collect("stack", [r for r in speakers if r != self._rank])
        stacks[self._rank] = self._stack()
        lines = []
        for words, ranks in order:
            calls = sorted({places[r]["calls"] for r in ranks if r in places})
            count = f", after {calls[0]} calls" if calls else ""
            count = f", after {calls[0]} to {calls[-1]} calls" if len(calls) > 1 else count
            lines.append(f"hpcinfer: {_ranks_text(ranks)}: {words}{count}")
            if ranks[0] in speakers and ranks[0] in stacks:
                lines += stacks[ranks[0]]["stack"]

        # Say in one line who is missing
        verb, axis, purpose, waited_s = places[self._rank]["call"]
        if not missing:
            own = places[self._rank]["call"][:3]
            missing = [r for r, p in places.items() if p["call"][:3] != own]
        who = _ranks_text(sorted(missing)) if missing else "an answer of MPI, all ranks being there"
        lines.append(
            f"hpcinfer: hang: got rank {self._rank} waiting for {waited_s:.0f} s in {verb} "
            f"({axis}, {purpose}){_at(places[self._rank])}, need {who}; see above where the ranks "
            "are, and raise --hang-timeout if they were at work"
        )
        self._send("end", range(len(self._ranks)))
        with suppress(OSError):
            os.write(sys.__stderr__.fileno(), ("\n" + "\n".join(lines) + "\n").encode())
        self._end()
        time.sleep(_END_S)
        abort(FAILED)

    def _end(self):
        """Save what can be saved, once."""
        if not self._ended:
            self._ended = True
            with suppress(Exception):
                if self._last_resort is not None:
                    self._last_resort()

    def _place(self):
        """Where this rank is, in plain values."""
        call, now_s = here.call, time.monotonic()
        seen = call, here.calls, here.step, here.layer
        if seen != self._seen:
            self._seen, self._since_s = seen, now_s
        if call is not None:
            call = [*call[:3], time.perf_counter() - call[3]]
        return {
            "call": call,
            "calls": here.calls,
            "step": here.step,
            "layer": here.layer,
            "idle_s": now_s - self._since_s,
            "asking": self._asking,
            "reporting": self._reporting,
        }

    def _stack(self):
        """Stack of this rank's main thread."""
        frame = sys._current_frames().get(self._main)
        frames = traceback.format_stack(frame)[-_FRAMES:] if frame else []
        text = "".join(frames)[-_MESSAGE_BYTES // 2 :]
        return {"stack": text.splitlines()}

    def _silence(self, rank):
        """Why a rank may not have answered."""
        host, process, started_s, _ = self._ranks[rank]
        where = f"(process {process} on {host})"
        if host != socket.gethostname():
            return f"no answer {where}, stopped, dead, or without UDP from node to node"
        try:
            found = psutil.Process(process)
            if found.create_time() != started_s or found.status() == psutil.STATUS_ZOMBIE:
                return f"ended {where}"
            if found.status() == psutil.STATUS_STOPPED:
                return f"stopped {where}"
            os.kill(process, signal.SIGUSR2)
        except (psutil.Error, OSError):
            return f"ended {where}"
        return f"no answer {where}, busy outside Python, see its stack"

    # --- Messages ---

    def _collect(self, what, ranks):
        """Answers of those of `ranks` that give one in time, by rank."""
        answers, end_s = {}, time.monotonic() + self._patience_s
        while len(answers) < len(ranks) and time.monotonic() < end_s and not self._over.is_set():
            self._send(what, [rank for rank in ranks if rank not in answers])
            until_s = min(end_s, time.monotonic() + _AGAIN_S)
            self._listen(until_s, what, answers, len(ranks))
        return answers

    def _listen(self, until_s, wanted=None, answers=None, enough=0):
        """Take messages until then, or until there are enough answers; answer questions."""
        while (left_s := until_s - time.monotonic()) > 0:
            # Take the next message that is for this rank of this job.
            self._place()
            self._socket.settimeout(left_s)
            try:
                data, sender = self._socket.recvfrom(1 << 16)
                message = json.loads(data)
                if message["token"] != self._token or message["to"] != self._rank:
                    continue
                what, rank = message["what"], message["from"]
            except (OSError, ValueError, KeyError, TypeError):
                continue

            # Keep an answer, end with the others, or answer.
            if what == "answer":
                if wanted == message["of"]:
                    answers[rank] = message["place"]
                    if len(answers) >= enough:
                        return
            elif what == "end":
                self._end()
            else:
                place = self._stack() if what == "stack" else self._place()
                self._post(sender, rank, {"what": "answer", "of": what, "place": place})

    def _send(self, what, ranks):
        for rank in ranks:
            if rank != self._rank:
                self._post(self._ranks[rank][-1], rank, {"what": what})

    def _post(self, address, rank, message):
        message |= {"token": self._token, "from": self._rank, "to": rank}
        with suppress(OSError):
            self._socket.sendto(json.dumps(message).encode(), address)


def common_address(networks, host):
    """The address of a host at which all the others reach it.

    Parameters
    ----------
    networks : dict of host -> dict of its networks, as text, -> its address there
    host : of this rank

    Returns
    -------
    str: the loopback of a single host, the address in the first network that all are in, else the
    one that the host's name stands for, else any
    """
    if len(networks) == 1:
        return "127.0.0.1"
    common = set.intersection(*map(set, networks.values()))
    if common:
        return networks[host][min(common)]
    with suppress(OSError):
        named = socket.gethostbyname(host)
        if named in networks[host].values():
            return named
    return ""


def _networks():
    """Networks of this host, as text, with its address in each, but for the loopback."""
    found = {}
    for of_card in psutil.net_if_addrs().values():
        for one in of_card:
            if one.family == socket.AF_INET and one.netmask and not one.address.startswith("127."):
                network = ipaddress.ip_interface(f"{one.address}/{one.netmask}").network
                found[str(network)] = one.address
    return found


def _own_place(address, port):
    """(host, process, when it started, (address, port)) of this rank."""
    me = psutil.Process()
    return socket.gethostname(), me.pid, me.create_time(), (address, port)


def _words(place):
    """Where a rank is, in words that follow its number; its count of calls is not among them."""
    if place["call"] is None:
        return f"in no call{_at(place)}"
    verb, axis, purpose, _ = place["call"]
    return f"in {verb} ({axis}, {purpose}){_at(place)}"


def _at(place):
    step = f", step {place['step']}" if place["step"] else ", before the first step"
    return step + ("" if place["layer"] is None else f", layer {place['layer']}")


def _ranks_text(ranks):
    """Sorted ranks as text: rank 3, or ranks 0-2, 5."""
    runs = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
