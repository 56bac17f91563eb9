"""The parent's end of the process that runs a checkpoint's tokenizer and chat template.

Both are programs of strangers: a template loops, a regular expression backtracks, a normaliser
makes a gigabyte of a letter, a library panics or aborts. So they run in a process of their own
(`hpcinfer.text.child`) with an allowance for each request. What breaks it ends that process and is
one ValueError here; the next request starts another one.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

from hpcinfer.launcher import environment_of_child
from hpcinfer.text.frames import ANSWER, OUT_OF_MEMORY, REQUEST, Allowance, as_json, receive, send

# A request whose process does nothing is given up after so many times its processor time; a process
# that has closed its pipe has so many seconds to end; an answer is at most so long.
_PATIENCE, _END_S, _ANSWER_BYTES = 20.0, 2.0, 1 << 28


@dataclass(frozen=True)
class Budget:
    """What opening the text of a checkpoint, and one request after it, may take.

    Attributes
    ----------
    memory_bytes : of the whole process
    per_file_byte, per_byte : more for each byte of the files, and for each byte of the request
    open_s, seconds : processor time of opening, and of a request
    per_file_byte_s, per_byte_s : more for each byte of the files, and for each byte of the request
    """

    memory_bytes: int = 1 << 30
    per_file_byte: int = 32
    per_byte: int = 320
    open_s: float = 10.0
    seconds: float = 3.0
    per_file_byte_s: float = 1e-6
    per_byte_s: float = 1e-5


class Worker:
    """A process that encodes for this one, started when it is first needed or by `start`.

    It holds the files of one checkpoint at a time: of the one that was asked for last.
    """

    def __init__(self, budget: Budget | None = None) -> None:
        self.budget = Budget() if budget is None else budget
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = self._file_bytes = 0
        self._held: dict[str, Any] | None = None

    @property
    def process_id(self) -> int | None:
        """Number of the process, None if none runs."""
        return self._process.pid if self._process is not None and self._runs() else None

    def start(self) -> None:
        """Start the process if none runs, without waiting for it."""
        if self.process_id is None:
            self.close()
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "hpcinfer.text.child"],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment_of_child(),
            )
            self._owner = os.getpid()

    def open(self, files: dict[str, Any]) -> dict[str, Any]:
        """Have the process read the files of a checkpoint; what `Encoder.tables` says of them.

        Raises
        ------
        ValueError
            If they cannot be read, or not within the budget.
        """
        self._held = None
        self.start()
        body = as_json(["open", [files]])
        self._file_bytes = len(body)
        seconds = self.budget.open_s + self.budget.per_file_byte_s * len(body)
        tables = self._exchange("tokenizer", body, seconds, 0)
        self._held = files
        return tables

    def ask(self, subject: str, files: dict[str, Any], what: str, *arguments: Any) -> Any:
        """Result of a method of the Encoder of `files`.

        Parameters
        ----------
        subject : what an error is about, "tokenizer" or "chat template"
        files : as `open` takes them, which is called first where they are not held
        what, arguments : the method, and what it takes

        Raises
        ------
        ValueError
            What the method raises, or that it takes more than its budget.
        """
        try:
            body = as_json([what, arguments])
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"request: got a value that JSON cannot hold ({error}), need text, numbers, lists "
                "and objects; correct the request"
            ) from None
        if self._held is not files or self.process_id is None:
            self.open(files)
        seconds = self.budget.seconds + self.budget.per_byte_s * len(body)
        return self._exchange(subject, body, seconds, self.budget.per_byte * len(body))

    def close(self) -> None:
        """End the process, if there is one."""
        process, self._process, self._held = self._process, None, None
        if process is None:
            return
        for pipe in filter(None, (process.stdin, process.stdout)):
            pipe.close()
        if self._owner == os.getpid():
            process.kill()
            process.wait()

    def _runs(self) -> bool:
        """True if the process runs, and is not that of a process of which this one is a fork."""
        process = self._process
        return process is not None and self._owner == os.getpid() and process.poll() is None

    def _exchange(self, subject: str, body: bytes, seconds: float, more_bytes: int) -> Any:
        """Send a request and wait for its answer; whatever hinders that ends the process."""
        memory_bytes = self.budget.memory_bytes + self.budget.per_file_byte * self._file_bytes
        allowance = Allowance(memory_bytes + more_bytes, seconds)
        try:
            answer = self._answer(body, allowance)
        except (OSError, EOFError):
            got = self._breach(allowance)
            raise ValueError(
                f"{subject}: got {got}, need less; check tokenizer.json and the chat template, or "
                "shorten the request"
            ) from None
        except BaseException:
            self.close()
            raise
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["value"]

    def _answer(self, body: bytes, allowance: Allowance) -> dict[str, Any]:
        """The answer to a request; OSError or EOFError if none comes."""
        assert self._process is not None and self._process.stdin and self._process.stdout
        target, source = self._process.stdin.fileno(), self._process.stdout.fileno()
        send(target, REQUEST.pack(len(body), allowance.memory_bytes, allowance.seconds), body)
        patience_s = _PATIENCE * allowance.seconds
        (n_bytes,) = ANSWER.unpack(receive(source, ANSWER.size, patience_s))
        if n_bytes > _ANSWER_BYTES:
            raise EOFError
        return json.loads(receive(source, n_bytes, patience_s))

    def _breach(self, allowance: Allowance) -> str:
        """What the process has done that gave no answer; it is ended where it has not."""
        status = None
        with suppress(subprocess.TimeoutExpired):
            status = self._process and self._process.wait(_END_S)
        self.close()
        if status in (OUT_OF_MEMORY, -signal.SIGABRT):
            return f"more than {allowance.memory_bytes / 2**30:.1f} GiB of memory for one request"
        if status == -signal.SIGPROF:
            return f"more than {allowance.seconds:.3g} s of processor time for one request"
        if status is None:
            return f"no answer in time, or one of more than {_ANSWER_BYTES >> 20} MiB"
        return f"a process that ended with status {status}"


@cache
def shared_worker() -> Worker:
    """The worker of this process, which all its texts share; closed at its end."""
    worker = Worker()
    atexit.register(worker.close)
    return worker
