"""What an unfinished run leaves beside its outputs, and how a new start takes it up.

Finished requests stand in the outputs. ``OUTPUT.state`` beside the first one says what the run is
(model, input, kind, sampling) and what was under way: of every request the tokens of its samples so
far, with their log-probabilities. Nothing else is needed: random numbers depend on the seed, the
request, the sample and the position alone, and keys and values are computed again, unless they
are kept too (`kv_state.py`). So it does not matter on how many ranks, and in which layout, a run
goes on.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from hpcinfer import __version__
from hpcinfer.io.kv import remove_kv, remove_kv_before
from hpcinfer.io.lines import digest
from hpcinfer.io.state import (
    STATE_SUFFIX,
    locked,
    read_state,
    remove_records,
    remove_state,
    set_aside,
    write_state,
)
from hpcinfer.requests.request import BadRequest, Request
from hpcinfer.requests.sampling import Sampling

if TYPE_CHECKING:
    from hpcinfer.engine.api import Engine
    from hpcinfer.engine.scheduler import Scheduler
    from hpcinfer.job.settings import JobSettings

EVERY_S = 60.0


class RunState:
    """The state of a run: the root opens and writes it, every rank has one and asks what is due.

    A context manager, which lets go of the outputs; it sends nothing.

    Parameters
    ----------
    outputs : paths of the results
    every_s : seconds from one snapshot to the next
    restart : True to keep what an earlier run has left under other names, and to begin anew
    keeps_kv : True to keep the keys and values of what is under way too

    Attributes
    ----------
    kept : new names of files of an earlier run, on the root
    kv : dict of replica -> what the state says of its keys and values; see `KvState`
    """

    def __init__(
        self,
        outputs: Sequence[str],
        every_s: float = EVERY_S,
        restart: bool = False,
        keeps_kv: bool = False,
    ):
        self.outputs, self.every_s, self.restart = outputs, every_s, restart
        self.keeps_kv, self.kv, self._first_kv = keeps_kv, {}, 0
        self.path, self.kept = f"{outputs[0]}{STATE_SUFFIX}", []
        self._stack, self._saved, self._identity = ExitStack(), None, {}
        self._writers, self._before, self._under_way = {}, {}, {}
        self._replicas, self._fresh, self._ended = set(), set(), set()
        self._saving = threading.Lock()
        self._taken_s = time.monotonic()

    def __enter__(self) -> RunState:
        return self

    def __exit__(self, *details) -> None:
        self._stack.close()

    def open(self) -> None:
        """Lock the outputs, and read what an earlier run has left; on the root.

        Raises
        ------
        ValueError
            If an output is another unfinished run's.
        RuntimeError
            If a run is at work on one, or it cannot be written.
        """
        for path in self.outputs:
            self._stack.enter_context(locked(path))
        if self.restart:
            self.kept = set_aside(self.outputs)
        for path in self.outputs[1:]:
            if os.path.exists(f"{path}{STATE_SUFFIX}"):
                raise ValueError(
                    f"resume: got {path} of another unfinished run, need an output of its own; "
                    "start that run again, or begin anew with --restart"
                )
        self._saved = read_state(self.path)

    def refuse_changed(self, identity: dict) -> None:
        """Refuse to go on with another run than the one that has left the state; on the root.

        Parameters
        ----------
        identity : dict of plain values; they are compared, and kept in the state

        Raises
        ------
        ValueError
            Saying what differs.
        """
        self._identity |= identity
        if self._saved is None:
            return
        before = self._saved["identity"]
        other = [word for word, value in identity.items() if before.get(word) != value]
        if other:
            got = ", ".join(f"{word} {identity[word]}" for word in other)
            need = ", ".join(f"{word} {before.get(word)}" for word in other)
            raise ValueError(
                f"resume: got {got}, need {need}, with which {self.outputs[0]} was begun; start "
                "again as before, or begin anew with --restart"
            )

    @property
    def resumes(self) -> bool:
        """True on the root if an earlier run has left a state."""
        return self._saved is not None

    def least(self, path: str) -> int:
        """Records that an output must hold already, on the root."""
        return self._saved["records"][os.path.basename(path)] if self.resumes else 0

    def begin_anew(self) -> None:
        """Make the outputs this run's, on the root, where no earlier run has left a state.

        What the user has told to replace is removed. The state comes first: a run that is killed
        before it has written anything finds what it has made.
        """
        if not self.resumes:
            for path in self.outputs:
                remove_records(path)
            self.save()

    def begin(self, writers: Sequence, replicas: int) -> tuple[set[int], dict]:
        """Take up what was left, and write the first state; on the root, when outputs are open.

        Parameters
        ----------
        writers : writer of each output, as `io.results.open_results` returns them
        replicas : number of replicas that will send snapshots

        Returns
        -------
        done : set of the indices of finished requests
        under_way : dict of index -> samples, as in `under_way` below
        """
        self._writers = dict(zip(self.outputs, writers, strict=True))
        self._replicas = set(range(replicas))

        # Finished is what stands in every output.
        done = set.intersection(*(set(writer.done) for writer in writers))
        if self.resumes:
            left = {int(i): samples for i, samples in self._saved["under way"].items()}
            self._before = {i: s for i, s in left.items() if i not in done}
            self.kv = self._left_kv(done) if self.keeps_kv else {}
        self.save()
        self._taken_s = time.monotonic()
        return done, self._before

    def begin_kv(self, usable: dict, generation: int) -> None:
        """Keep of the keys and values what is usable, until replicas send theirs; on the root.

        Parameters
        ----------
        usable : dict as `kv`
        generation : number of the first ones that this run keeps
        """
        self.kv, self._first_kv = usable, generation

    def _left_kv(self, done: set[int]) -> dict:
        """Keys and values that an earlier run has left of unfinished requests."""
        return {
            replica: facts
            | {"sequences": {i: s for i, s in facts["sequences"].items() if int(i) not in done}}
            for replica, facts in self._saved.get("kv", {}).items()
        }

    def due(self) -> bool:
        """True when the next snapshot is due on this rank, which then counts as taken."""
        if time.monotonic() - self._taken_s < self.every_s:
            return False
        self._taken_s = time.monotonic()
        return True

    def take(
        self, replica: int, under_way: dict, last: bool = False, kv: dict | None = None
    ) -> None:
        """Take a replica's snapshot, and write the state when all replicas have sent theirs.

        Parameters
        ----------
        replica : its number
        under_way : see the function of that name
        last : True if the replica's run is over
        kv : what `KvState.save` returned
        """
        if kv is not None:
            self.kv[replica] = kv
        self._under_way[replica] = under_way
        self._fresh.add(replica)
        if last:
            self._ended.add(replica)
        if self._fresh | self._ended >= self._replicas and self._fresh - self._ended:
            self._fresh.clear()
            self.save()

    def rescue(self, replica: int, under_way: dict) -> None:
        """Save what can be saved from a thread, while the run itself does not come to it."""
        self._under_way[replica] = under_way
        self.save(wait_s=1.0)

    def save(self, wait_s: float = -1) -> None:
        """Bring the finished records and the state to the disk.

        Parameters
        ----------
        wait_s : seconds to wait for another thread that is at it; without end if negative
        """
        if not self._saving.acquire(timeout=wait_s):
            return
        try:
            # Bring the records to the disk before the state that counts on them.
            records = dict.fromkeys(map(os.path.basename, self.outputs), 0)
            for path, writer in self._writers.items():
                records[os.path.basename(path)] = len(writer.done)
                writer.sync()

            # Write the state, and then remove the keys and values that it names no more.
            state = {"identity": self._identity, "records": records}
            state["under way"] = self._unfinished()
            write_state(self.path, state | ({"kv": self.kv} if self.kv else {}))
            self._clear_kv()
        finally:
            self._saving.release()

    def forget_nothing(self) -> None:
        """Remove the files of a run that has failed with nothing done, which binds no other."""
        written = any(len(writer.done) for writer in self._writers.values())
        if self._writers and not (self.resumes or written or self._unfinished() or self.kv):
            for path in self.outputs:
                remove_records(path)
            self.finish()

    def finish(self) -> None:
        """Forget the state, on the root, when the outputs are complete."""
        remove_state(self.path)
        remove_kv(self.outputs[0])

    def _clear_kv(self) -> None:
        """Remove the keys and values that the state on the disk does not name."""
        if self.kv or self.keeps_kv:
            generations = {int(replica): facts["generation"] for replica, facts in self.kv.items()}
            remove_kv_before(self.outputs[0], generations, self._first_kv)
        else:
            remove_kv(self.outputs[0])

    @property
    def n_under_way(self) -> int:
        """Requests in the last snapshots that are not finished."""
        return len(self._unfinished())

    def _unfinished(self) -> dict:
        """What is under way, of all replicas, without requests that were finished since.

        A request that this run has not come to yet is still as an earlier run has left it.
        """
        merged = dict(self._before)
        for of_replica in self._under_way.values():
            merged |= of_replica
        writers = self._writers.values()
        return {i: s for i, s in merged.items() if not all(i in w.done for w in writers)}


def identity_of_input(settings: JobSettings) -> dict:
    """What a run is, as far as it is known before the model is read."""
    return {
        "kind": settings.kind,
        "version": __version__,
        "outputs": " ".join(os.path.basename(path) for path in settings.targets),
        "input": digest(settings.input),
        "seed": settings.seed,
        "shard": "{}/{}".format(*settings.shard) if settings.shard else None,
    }


def identity_of_model(engine: Engine, defaults: Sampling | None = None) -> dict:
    """What else decides the results: the model, and the sampling of requests that do not say."""
    sampling = {} if defaults is None else asdict(replace(defaults, seed=engine.seed))
    return {
        "model": engine.checksum,
        "dtype": str(engine.model.dtype),
        "context": engine.context,
        "end-of-text": list(engine.text.eos_ids),
    } | {
        word.replace("_", "-"): list(value) if isinstance(value, tuple) else value
        for word, value in sampling.items()
    }


def under_way(scheduler: Scheduler) -> dict:
    """What a replica has of its unfinished requests.

    Returns
    -------
    dict of index -> for every sample (new tokens, log-probabilities, the likeliest at each place)
    """
    requests = {s.request.index: s for s in (*scheduler.running, *scheduler.waiting)}
    left = {}
    for index, sequence in requests.items():
        samples = [
            (s.tokens[s.n_prompt :], list(s.logprobs), list(s.top_logprobs))
            for s in sequence.siblings or [sequence]
        ]
        if any(tokens or logprobs for tokens, logprobs, _ in samples):
            left[index] = samples
    return left


def unfinished(
    entries: Iterable[Request | BadRequest], done: set[int], under_way: dict
) -> Iterator[Request | BadRequest]:
    """Entries of the input that are not finished, each with what an earlier run had of it.

    Parameters
    ----------
    entries : iterable of Request and BadRequest
    done : set of indices
    under_way : dict, as the function of that name returns
    """
    for entry in entries:
        if entry.index in under_way:
            yield replace(entry, progress=under_way[entry.index])
        elif entry.index not in done:
            yield entry
