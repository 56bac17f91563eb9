"""A whole run over files: requests from an input, results to outputs, progress and report."""

import os
import sys
import time
from contextlib import ExitStack
from itertools import islice

import numpy as np
from tqdm import tqdm

from hpcinfer import collectives
from hpcinfer.engine.activations.extract import ExtractTask
from hpcinfer.engine.feed import Feed
from hpcinfer.engine.generate import GenerateTask
from hpcinfer.engine.loop import run as run_loop
from hpcinfer.engine.loop import sequences_of
from hpcinfer.engine.score import ScoreTask
from hpcinfer.errors import agreed
from hpcinfer.grid import agree, agree_all
from hpcinfer.io.lines import read_lines
from hpcinfer.io.results import open_results
from hpcinfer.job.kv_state import KvState
from hpcinfer.job.outbox import Outbox
from hpcinfer.job.state import identity_of_model, under_way, unfinished
from hpcinfer.job.stop import stopped
from hpcinfer.requests.request import BadRequest
from hpcinfer.requests.results import (
    completion_line,
    extract_record,
    generate_record,
    score_line,
    score_record,
)

_EXTENSIONS = (".h5", ".jsonl")
_KINDS = {
    "generate": (GenerateTask, generate_record),
    "score": (ScoreTask, score_record),
    "extract": (ExtractTask, extract_record),
}

# Seconds between two lines of progress: on a terminal, and in the log of a job.
_TERMINAL_S, _LOG_S = 0.2, 10.0


def check_files(comm, source, outputs):
    """Refuse, before a model is loaded, files that cannot be read or written.

    Returns
    -------
    number of lines of the input, on every rank
    """
    return agree(comm, _check_files, source, outputs)


def run(engine, kind, source, n_lines, sampling, facts, state, stop, show=False, selection=None):
    """Do every request of a file; every rank calls this.

    Parameters
    ----------
    engine : Engine
    kind : "generate", "score" or "extract"
    source : path of the input, .jsonl or .txt
    n_lines : lines of the input
    sampling : dict, defaults of the command line for requests that do not say
    facts : dict, kept in .h5 results: command, model and the like
    state : RunState, entered; its outputs are written
    stop : Stop, entered
    show : True to print every prompt with its text as it finishes
    selection : Selection, what is extracted

    Returns
    -------
    (finished, refused, before) : requests that this run finished and refused, and those that
        earlier ones did, on every rank

    Raises
    ------
    ValueError
        On every rank, if not one request could be run, or the state is another run's.
    Stopped
        On every rank, if the run was stopped before all requests were finished.
    """
    with engine.in_use():
        return _run(engine, kind, source, n_lines, sampling, facts, state, stop, show, selection)


def _run(engine, kind, source, n_lines, sampling, facts, state, stop, show, selection):
    do, record_of = _KINDS[kind]
    work = do(engine) if selection is None else do(engine, selection)
    grid, comm, counts = engine.grid, engine.grid.comm, np.zeros(2, np.int64)
    lines = None
    defaults = engine.defaults(sampling)
    if grid.is_leader:
        lines = _entries(engine, kind, source, sampling)
    agree_all(comm, lambda: grid.is_leader and next(read_lines(source)))
    state.refuse_changed(
        lambda: (
            identity_of_model(engine, defaults if kind == "generate" else None)
            | ({} if selection is None else selection.facts)
        )
    )
    with ExitStack() as stack:
        out = _Output(engine, kind, source, n_lines, show, state) if grid.is_root else None
        open_file = work.open if kind == "extract" else None
        before = agree(comm, lambda: out.open(stack, facts, open_file))
        if kind == "extract":
            stack.enter_context(work.into_parts(state.outputs[0]))
        outbox = Outbox(grid, lambda *message: out.take(*message))
        if grid.is_root:
            stop.last_resort = lambda: state.rescue(0, under_way(engine.scheduler))

        # Every replica leaves out what is finished, and what has its keys and values in one.
        kv = KvState(engine, state) if state.keeps_kv else None
        kept = {} if kv is None else kv.sequences
        if grid.is_leader:
            done, left = grid.dp.bcast(out.left if grid.is_root else None)
            rest = {index: samples for index, samples in left.items() if index not in kept}
            lines = unfinished(lines, done | kept.keys(), rest)

        def deliver(outcome):
            engine.stats.answered += 1
            if grid.is_leader:
                counts[int(isinstance(outcome, BadRequest))] += 1
                outbox.put("record", record_of(outcome))

        def tell(last=False):
            of_cache = kv.save() if kv is not None and grid.role != "ffn" else None
            if grid.is_leader:
                outbox.put("under way", grid.dp.rank, under_way(engine.scheduler), last, of_cache)

        def between():
            outbox.poll()
            due = state.due()
            if kv is not None:
                due = collectives.Bcast(grid.replica, np.array([due]), purpose="kv")[0]
            if due:
                tell()

        def kept_here():
            """Requests that this replica has kept, from a reading of the input of its own."""
            mine = {index for index, (replica, _) in kept.items() if replica == grid.dp.rank}
            entries = unfinished(_entries(engine, kind, source, sampling), done, left)
            return list(islice((e for e in entries if e.index in mine), len(mine)))

        def resume(found):
            kv.resume([s for entry in found for s in sequences_of(engine, entry, deliver, work)])

        if kept:
            found = agree_all(comm, lambda: kept_here() if grid.is_leader else [])
            found = grid.replica.bcast(found)
            agree_all(comm, lambda: resume(found))
        with Feed(grid, lines, n_lines - before - len(kept)) as feed:
            run_loop(engine, feed, deliver, work, between, stop)
            tell(last=True)
            outbox.close()
        stop.settle(grid)
        finished, refused = comm.allreduce(counts).tolist()
        if before + finished + refused < n_lines:
            agree(comm, state.save)
            raise agreed(
                stopped(
                    comm.bcast(stop.reason),
                    before + finished + refused,
                    n_lines,
                    comm.bcast(state.n_under_way),
                )
            )
    agree(comm, state.finish)
    if not finished + before:
        raise agreed(
            ValueError(
                f"input: got {refused} requests in {source} and none that can be run, need at "
                "least one; see the error records in the output"
            )
        )
    return finished, refused, before


def _entries(engine, kind, source, sampling):
    """Entries of the input, read anew."""
    reader = engine.reader(sampling, source.lower().endswith(".txt"), kind != "generate")
    return reader.read(read_lines(source))


class _Output:
    """The root's side of a run: the files of results, the progress, and what is shown.

    Attributes
    ----------
    left : (done, under_way), what an earlier run has left; see `RunState.begin`
    """

    def __init__(self, engine, kind, source, n_lines, show, state):
        self._engine, self._kind, self._source = engine, kind, source
        self._n_lines, self._show, self._state = n_lines, show, state
        self._writers, self._began_s = [], time.perf_counter()

    def open(self, stack, facts, open_file=None):
        """Open the files and the progress bar, which `stack` closes.

        Parameters
        ----------
        open_file : function (path, facts, resume, least) -> writer of an output; None for results

        Returns
        -------
        number of requests that an earlier run has finished
        """
        state = self._state
        name = os.path.basename(os.path.normpath(facts["model"]))
        created = int(os.stat(self._source).st_mtime)

        def format_line(record):
            if self._kind == "score":
                return score_line(record)
            return completion_line(record, name, created, self._engine.text)

        for path in state.outputs:
            rest = state.resumes, state.least(path)
            if open_file is not None:
                writer = open_file(path, facts, *rest)
            else:
                writer = open_results(path, self._kind, facts, format_line, *rest)
            self._writers.append(stack.enter_context(writer))
        self.left = state.begin(self._writers, self._engine.grid.layout.dp)
        before = len(self.left[0])
        self._bar = stack.enter_context(
            tqdm(
                total=self._n_lines,
                initial=before,
                desc=self._kind,
                unit=" requests",
                mininterval=_TERMINAL_S if sys.stderr.isatty() else _LOG_S,
                dynamic_ncols=True,
            )
        )

        return before

    def take(self, what, *message):
        """Take what a replica hands on: a record, or a snapshot of what it has under way."""
        if what == "record":
            self._write(*message)
        else:
            self._state.take(*message)

    def _write(self, record):
        """Write the record of one finished request."""
        for writer in self._writers:
            writer.write(record)
        counter = self._engine.stats
        tokens = counter.prefill.tokens + counter.decode.tokens
        self._bar.set_postfix_str(
            f"{tokens / (time.perf_counter() - self._began_s):.0f} tokens/s", refresh=False
        )
        self._bar.update()
        if self._show:
            self._bar.write(_shown(record, self._engine.text), file=sys.stdout)


def _shown(record, text):
    """A prompt with its text, or a refusal, for human eyes."""
    name = record["custom_id"]
    if record["error"] is not None:
        return f"[{name}] line {record['line']}: {record['error']}"
    if "n_rows" in record:
        return f"[{name}] {len(record['token_ids'])} tokens, {record['n_rows']} rows"
    if "choices" not in record:
        return (
            f"[{name}] {len(record['token_ids'])} tokens, log-probability "
            f"{record['sum_logprob']:.3f}, perplexity {record['perplexity']:.3f}"
        )
    prompt = text.decode(record["prompt_token_ids"])
    prompt = prompt if len(prompt) <= 200 else f"{prompt[:60]} ... {prompt[-130:]}"
    answers = "\n".join(f"    > {choice['text']!r}" for choice in record["choices"])
    return f"[{name}] {prompt!r}\n{answers}"


def _check_files(source, outputs):
    """Number of lines of the input, when all files can be used."""
    for path in outputs:
        folder = os.path.dirname(os.path.abspath(path))
        if os.path.splitext(path)[1].lower() not in _EXTENSIONS:
            raise ValueError(f"output: got {path}, need a name that ends in .h5 or .jsonl")
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
            raise ValueError(f"output: got {path}, need a folder that exists and can be written")
        if os.path.isdir(path) or os.path.realpath(path) == os.path.realpath(source):
            raise ValueError(f"output: got {path}, need a file that is not the input or a folder")
    if len({os.path.realpath(path) for path in outputs}) < len(outputs):
        raise ValueError("output: got one file twice, need each once")
    if os.path.splitext(source)[1].lower() not in (".jsonl", ".txt"):
        raise ValueError(f"input: got {source}, need a name that ends in .jsonl or .txt")
    n_lines = sum(
        not isinstance(line, bytes) or bool(line.strip()) for _, line in read_lines(source)
    )
    if not n_lines:
        raise ValueError(f"input: got no request in {source}, need at least one line")
    return n_lines
