"""The process that runs what a stranger has written: a checkpoint's tokenizer and chat template.

`python -m hpcinfer.text.child`, started by `hpcinfer.text.worker`. It answers one request after the
other over its standard input and output, each within its own allowance of memory and processor
time. Whoever breaks one, or makes a library abort, ends this process and nothing else. It ends with
the process that started it, and knows neither MPI nor the engine.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
from contextlib import suppress

from hpcinfer.text.frames import ANSWER, OUT_OF_MEMORY, REQUEST, Allowance, as_json, receive, send
from hpcinfer.text.tokenizer import Encoder

# Signals that a launcher or a terminal sends to all processes; the parent decides what they mean
_OF_THE_JOB = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Answer requests until the parent closes the pipe or ends."""
    source, target = _set_apart()
    encoder = None
    with suppress(EOFError):
        while True:
            encoder = _serve(source, target, encoder)


def _serve(source: int, target: int, encoder: Encoder | None) -> Encoder | None:
    """Answer one request with the encoder, or with a new one, which is returned."""
    # Keep to the allowance from reading the request on
    n_bytes, memory_bytes, seconds = REQUEST.unpack(receive(source, REQUEST.size))
    _keep_to(Allowance(memory_bytes, seconds))
    try:
        what, arguments = json.loads(receive(source, n_bytes))
        if what == "open":
            encoder = None  # which gives its memory back
            encoder = Encoder(*arguments)
            what, arguments = "tables", []
        text = as_json({"value": getattr(encoder, what)(*arguments)})
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except ValueError as error:
        text = as_json({"error": str(error)})

    # Take no time of the next request
    signal.setitimer(signal.ITIMER_PROF, 0)
    send(target, ANSWER.pack(len(text)), text)
    return encoder


def _set_apart() -> tuple[int, int]:
    """End with the parent, heed no signals of the job, keep the pipes from libraries that print."""
    # Be killed with the parent, also where it cannot close the pipe
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in _OF_THE_JOB:
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    # A library that panics prints; the line of its error is enough
    pipes = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    return pipes


def _keep_to(allowance: Allowance) -> None:
    """Let the kernel refuse more memory, and end the process after more processor time."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = allowance.memory_bytes
    resource.setrlimit(
        resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
    )
    signal.setitimer(signal.ITIMER_PROF, allowance.seconds)


if __name__ == "__main__":
    main()
